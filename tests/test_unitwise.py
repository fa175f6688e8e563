"""Numbers per unit of many groups at once, against one unit at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from only_train_once import masking
from only_train_once.groups import Kind, ParamSlice, PruningGroup, Role
from only_train_once.masking import rows, unit_dot
from only_train_once.unitwise import Sum, Units

Z = Role.ZERO


def _slice(name: str, dim: int, index: list[list[int]], length: int) -> ParamSlice:
    return ParamSlice(name, dim, np.array(index, dtype=np.int64), Z, length)


_ROWS = (_slice("shared", 0, [[0, 1, 1], [4, 2, 4]], 6), _slice("bias", 0, [[1], [0]], 2))
_SQUARE = (_slice("square", 0, [[0], [2], [1]], 4), _slice("square", 1, [[1], [0], [3]], 4))
_COLUMNS = (_slice("shared", 1, [[2], [0], [1]], 3), _slice("shared", -1, [[2], [0], [1]], 3))
# a square weight cut in both dims; a position named twice, a tensor cut in part; a tensor of two groups
GROUPS = [PruningGroup(n, Kind.CHANNEL, s) for n, s in (("both", _SQUARE), ("rows", _ROWS), ("columns", _COLUMNS))]
SHAPES = {"square": (4, 4), "shared": (6, 3), "bias": (2,)}


def values(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in SHAPES.items()}


def masks(name: str) -> list[Tensor]:
    """Which entries of a tensor each unit of all groups has."""
    out = []
    for group in GROUPS:
        for unit in range(group.size):
            mask = torch.zeros(SHAPES[name], dtype=torch.bool)
            for s in group.slices:
                if s.param == name:
                    mask.index_fill_(s.dim, torch.from_numpy(s.index[unit]), True)
            out.append(mask)
    return out


def test_dot_is_the_sum_over_each_units_entries() -> None:
    a, b = values(0), values(1)
    units = Units(GROUPS, a)
    expected = [sum(float((a[n] * b[n])[masks(n)[u]].sum()) for n in SHAPES) for u in range(units.count)]
    found = units.dot(a, b)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    torch.testing.assert_close(found, torch.cat([unit_dot(g, a, b) for g in GROUPS]), rtol=1e-12, atol=0)
    scale = {"square": 2.0, "shared": 3.0, "bias": torch.tensor(0.5, dtype=torch.float64)}
    scaled = units.dot(a, {n: t * scale[n] for n, t in b.items()})
    pairs = lambda name, block: [(b[name][block],) * 2, (a[name][block], b[name][block])]  # noqa: E731
    square, both = units.dots(pairs, [Sum(0), Sum(1, scale)])
    torch.testing.assert_close(both, scaled, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(square, units.square(b), rtol=1e-12, atol=1e-15)
    half = {n: t.bfloat16() for n, t in a.items()}
    assert units.square(half).dtype == torch.float32


def test_add_scale_and_zero_reach_each_units_entries_once() -> None:
    start, direction = values(0), values(1)
    units = Units(GROUPS, start)
    coefficient = torch.linspace(-1, 2, units.count, dtype=torch.float64)
    flags = torch.tensor([True, False, False, True, False, False, True, False])
    others = torch.tensor([False, True, False, False, False, True, False, False])
    rates = {"square": 0.5, "shared": torch.tensor(2.0, dtype=torch.float64), "bias": 1.0}

    added, scaled, zeroed, copied, shrunk = ({n: t.clone() for n, t in start.items()} for _ in range(5))
    units.change_(added, direction, coefficient, rates)
    units.scale_(scaled, dict.fromkeys(SHAPES, coefficient))
    units.zero_(zeroed, flags)
    units.change_(copied, direction, coefficient, rates, back=flags, zero=others)
    units.scale_(shrunk, dict.fromkeys(SHAPES, coefficient), zero=others)
    for name in SHAPES:
        more, factor = torch.zeros(SHAPES[name]).double(), torch.ones(SHAPES[name]).double()
        gone, hidden = torch.zeros(SHAPES[name]), torch.zeros(SHAPES[name])
        for unit, mask in enumerate(masks(name)):
            more[mask] += rates[name] * coefficient[unit] * direction[name][mask]
            factor[mask] *= coefficient[unit]
            gone[mask] += float(flags[unit])
            hidden[mask] += float(others[unit])
        torch.testing.assert_close(added[name], start[name] + more, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(scaled[name], start[name] * factor, rtol=1e-12, atol=0)
        assert torch.equal(zeroed[name], start[name].where(gone == 0, 0))
        put_back = start[name].where(gone == 0, direction[name]) + more
        torch.testing.assert_close(copied[name], put_back.where(hidden == 0, 0), rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(shrunk[name], (start[name] * factor).where(hidden == 0, 0), rtol=1e-12, atol=0)
        torch.testing.assert_close(
            units.scaled(name, coefficient)(start[name][1:], slice(1, None)), scaled[name][1:], rtol=1e-12, atol=0
        )


VECTORS = [
    *GROUPS,
    PruningGroup("more", Kind.CHANNEL, tuple(_slice(n, 0, [[2], [0], [3]], 4) for n in ("one", "two", "other"))),
    PruningGroup("last", Kind.CHANNEL, (_slice("three", 0, [[0, 1], [2, 3]], 5),)),
]


def test_vectors_taken_together_are_what_they_are_one_by_one() -> None:
    """The vectors of one precision are one bundle; two rates, or two scales, take it apart."""

    def made(seed: int) -> dict[str, Tensor]:
        more = torch.Generator().manual_seed(seed + 10)
        vectors = {n: torch.randn(k, generator=more, dtype=torch.float64) for n, k in (("one", 4), ("two", 4))}
        vectors["three"] = torch.randn(5, generator=more, dtype=torch.float64)
        return {**values(seed), **vectors, "other": torch.randn(4, generator=more)}

    a, b = made(0), made(1)
    units, count = Units(VECTORS, a), 13
    assert units._bundles == [("bias", "one", "two", "three")]
    assert units.count == count
    pairs = lambda name, block: [(rows(a, name, block), rows(b, name, block))]  # noqa: E731
    one, two = dict.fromkeys(a, 0.5), {n: 0.5 if n == "one" else 2.0 for n in a}
    expected = torch.cat([unit_dot(g, a, b) for g in VECTORS])
    for scale in (None, one, two):
        apart, together = (units.dots(pairs, [Sum(0, scale)], bundled=bundled)[0] for bundled in (False, True))
        torch.testing.assert_close(together, apart, rtol=1e-12, atol=1e-15)
        if scale is not two:
            torch.testing.assert_close(together, expected * (1.0 if scale is None else 0.5), rtol=1e-6, atol=0)
    flags = torch.arange(count) % 3 == 0
    coefficient = torch.linspace(-1, 2, count, dtype=torch.float64)
    for rates in (one, two):
        changed = {n: t.clone() for n, t in a.items()}
        units.change_(changed, b, coefficient, rates, back=flags.roll(1), zero=flags)
        scaled = {n: t.clone() for n, t in a.items()}
        units.scale_(scaled, {n: coefficient * r if rates is two else coefficient for n, r in rates.items()})
        for name, index in (("one", [2, 0, 3]), ("two", [2, 0, 3])):
            for unit, at in enumerate(index, start=8):
                start = b[name][at] if flags.roll(1)[unit] else a[name][at]
                wanted = 0.0 if flags[unit] else start + rates[name] * coefficient[unit] * b[name][at]
                torch.testing.assert_close(changed[name][at], torch.as_tensor(wanted, dtype=torch.float64))
            assert changed[name][1] == a[name][1]  # of no unit
            assert scaled[name][1] == a[name][1]


def test_units_are_counted_by_group() -> None:
    units = Units(GROUPS, values(0))
    assert units.count_by_group(torch.tensor([1, 0, 1, 0, 0, 1, 1, 1]).bool()).tolist() == [2, 0, 3]


def test_entries_of_two_units_are_known() -> None:
    assert Units(GROUPS, values(0)).apart == {"bias"}
    heads = PruningGroup("heads", Kind.HEAD, (_slice("bias", 0, [[0], [1]], 2),))
    assert Units([heads], values(0)).apart == {"bias"}
    assert Units([heads, GROUPS[1]], values(0)).apart == {"shared"}  # bias belongs to a unit of each


def test_a_tensor_is_walked_through_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers do not depend on how many rows are done at a time."""
    a, b = values(0), values(1)
    units = Units(GROUPS, a)
    whole, changed = units.dot(a, b), {n: t.clone() for n, t in a.items()}
    arguments = (b, torch.linspace(-1, 2, 8).double(), dict.fromkeys(SHAPES, 0.5))
    flags = torch.tensor([True, False, False, True, False, False, True, False])
    units.change_(changed, *arguments, back=flags.roll(1), zero=flags)
    monkeypatch.setattr(masking, "BLOCK", 3)
    assert len(list(masking.blocks(SHAPES["square"]))) == 4
    torch.testing.assert_close(units.dot(a, b), whole, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(torch.cat([unit_dot(g, a, b) for g in GROUPS]), whole, rtol=1e-12, atol=1e-15)
    units.change_(a, *arguments, back=flags.roll(1), zero=flags)
    for name in SHAPES:
        assert torch.equal(a[name], changed[name])


def test_only_the_tensors_asked_for() -> None:
    units = Units(GROUPS, values(0), among=["bias", "square"])
    assert units.names == ("square", "bias")
    assert units.dot(values(0), values(1))[5:].eq(0).all()


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128]
)
def test_entries_that_are_not_finite_become_zero_too(dtype: torch.dtype) -> None:
    tensors = {n: t.to(dtype) for n, t in values(0).items()}
    for n in SHAPES:
        tensors[n].view(-1)[::2] = torch.tensor(complex("nan+infj") if dtype.is_complex else float("nan"), dtype=dtype)
        tensors[n].view(-1)[1::3] = float("-inf")
    units = Units(GROUPS, tensors)
    flags = torch.tensor([True, False, False, True, False, False, True, False])
    expected = {n: t.clone() for n, t in tensors.items()}
    for n in SHAPES:
        for u in flags.nonzero().view(-1).tolist():
            expected[n][masks(n)[u]] = 0
    units.zero_(tensors, flags[: units.count])
    for n in SHAPES:
        torch.testing.assert_close(tensors[n], expected[n], rtol=0, atol=0, equal_nan=True)
        zero = tensors[n] == 0
        assert not torch.signbit(torch.view_as_real(tensors[n]) if dtype.is_complex else tensors[n])[zero].any()
