"""Masking against one boolean mask per unit; schedules against their definitions."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from only_train_once import masking, schedules
from only_train_once.errors import ConfigurationError
from only_train_once.groups import Kind, ParamSlice, PruningGroup, Role
from only_train_once.masking import Region

Z, C, F = Role.ZERO, Role.CONSUMER, Role.FOLLOW
SHAPES = {"square": (6, 6), "conv": (6, 4, 2, 2), "bias": (6,), "triple": (6, 6, 6)}


def cut(param: str, dim: int, index: list[list[int]], role: Role = Z) -> ParamSlice:
    return ParamSlice(param, dim, np.array(index, dtype=np.int64), role, SHAPES[param][dim])


GROUPS = {
    "rows": [cut("square", 0, [[0], [1], [5]]), cut("bias", 0, [[0], [1], [5]])],
    "several positions": [cut("square", 1, [[0, 3], [1, 4], [2, 5]]), cut("conv", -4, [[0, 1], [2, 3], [4, 5]])],
    "row and column": [cut("square", 0, [[0], [1], [2]]), cut("square", 1, [[0], [1], [2]])],
    "row and other columns": [cut("square", 0, [[0, 1], [2, 3], [4, 5]]), cut("square", 1, [[5], [3], [1]])],
    "same dim twice, overlapping": [cut("square", 0, [[0, 1], [2, 3], [4, 5]]), cut("square", 0, [[1], [0], [5]])],
    "three dims": [cut("triple", d, [[0, 1], [2, 3], [4, 5]]) for d in range(3)],
    "roles": [
        cut("square", 0, [[0], [1], [2]]),
        cut("conv", 0, [[0], [1], [2]], C),
        cut("bias", 0, [[3], [4], [5]], F),
    ],
}


def group(name: str) -> PruningGroup:
    return PruningGroup(name, Kind.CHANNEL, tuple(GROUPS[name]))


def tensors(seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for n, s in SHAPES.items()}


def mask(g: PruningGroup, units: list[int], name: str, roles: tuple[Role, ...]) -> Tensor:
    out = torch.zeros(SHAPES[name], dtype=torch.bool)
    for s in g.slices:
        if s.param == name and s.role in roles:
            for position in s.index[units].ravel():
                out.select(s.dim, int(position)).fill_(True)
    return out


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("roles", [(Z,), (Z, C), (Z, C, F)])
def test_sums_count_every_entry_once(name: str, roles: tuple[Role, ...]) -> None:
    g, a, b = group(name), tensors(1), tensors(2)
    masks = [{n: mask(g, [u], n, roles) for n in SHAPES} for u in range(g.size)]
    dot = torch.stack([sum((a[n] * b[n])[m].sum() for n, m in row.items()) for row in masks])
    squares = torch.stack([sum(a[n][m].square().sum() for n, m in row.items()) for row in masks])
    torch.testing.assert_close(masking.unit_dot(g, a, b, roles), dot, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(masking.unit_sq_norm(g, a, roles), squares, rtol=1e-12, atol=1e-12)
    assert masking.unit_numel(g, a, roles).tolist() == [sum(int(m.sum()) for m in row.values()) for row in masks]


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("units", [[0], [0, 2], [0, 1, 2]])
def test_scaling_and_zeroing_touch_owned_entries_once(name: str, units: list[int]) -> None:
    g, roles = group(name), (Z, C)
    for factor in (0.25, None):
        values, expected = tensors(3), tensors(3)
        for n in SHAPES:
            expected[n][mask(g, units, n, roles)] *= 0 if factor is None else factor
        for region in masking.regions([g], {name: np.array(units)}, values, roles):
            if factor is None:
                region.zero_(values[region.name])
            else:
                region.scale_(values[region.name], factor)
        for n in SHAPES:
            assert torch.equal(values[n], expected[n]), (n, factor)


def test_zeroing_removes_what_is_not_finite() -> None:
    values = tensors()
    values["square"][0] = torch.nan
    (region, _) = masking.regions([group("rows")], {"rows": np.array([0])}, values, (Z,))
    region.zero_(values["square"])
    assert values["square"][0].eq(0).all()


@pytest.mark.parametrize("name", GROUPS)
def test_zero_units_are_exactly_those_with_all_zero_entries(name: str) -> None:
    g, values = group(name), tensors()
    assert masking.zero_units([g], values)[name].tolist() == []
    for n in SHAPES:
        values[n][mask(g, [1], n, (Z,))] = 0
    found = masking.zero_units([g], values)[name].tolist()
    assert found == [u for u in range(3) if all(values[n][mask(g, [u], n, (Z,))].eq(0).all() for n in SHAPES)]
    assert 1 in found


@pytest.mark.parametrize("value", [1e-30, -1e-30, float("nan"), float("inf")])
def test_a_tiny_or_strange_entry_is_not_zero(value: float) -> None:
    values = {n: torch.zeros(s) for n, s in SHAPES.items()}
    values["bias"][1] = value
    assert masking.zero_units([group("rows")], values)["rows"].tolist() == [0, 2]


def test_a_group_that_cannot_be_zero_has_no_zero_unit() -> None:
    only_follow = PruningGroup("f", Kind.CHANNEL, (cut("bias", 0, [[0], [1]], F),))
    assert masking.zero_units([only_follow], {"bias": torch.zeros(6)})["f"].tolist() == []


def test_complex_tensors_count_both_parts() -> None:
    a, b = (torch.randn(6, 6, dtype=torch.complex128) for _ in range(2))
    expected = (a.real * b.real + a.imag * b.imag)[[0, 1, 5]].sum(1)
    only = PruningGroup("c", Kind.CHANNEL, (cut("square", 0, [[0], [1], [5]]),))
    torch.testing.assert_close(masking.unit_dot(only, {"square": a}, {"square": b}), expected)


def test_half_precision_is_summed_in_float32() -> None:
    values = {n: torch.full(s, 200.0, dtype=torch.float16) for n, s in SHAPES.items()}
    norms = masking.unit_sq_norm(group("rows"), values)  # 7 * 40000 lies beyond float16
    assert norms.dtype == torch.float32
    assert norms.tolist() == [280000.0] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("bias"), "'rows' cuts 'bias', which is not among the 3 tensors"),
        (lambda t: t.update(bias=torch.zeros(5)), r"expects 6 positions in dim 0 of 'bias', found shape \(5,\)"),
        (lambda t: t.update(square=torch.tensor(1.0)), r"in dim 0 of 'square', found shape \(\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: object, message: str) -> None:
    values = tensors()
    change(values)  # type: ignore[operator]
    with pytest.raises(ConfigurationError, match=message):
        masking.check([group("rows")], values)


def test_positions_outside_the_tensor_are_named() -> None:
    with pytest.raises(ConfigurationError, match="run from 0 to 6, the rule is 0 <= position < 6"):
        masking.check([PruningGroup("g", Kind.CHANNEL, (cut("bias", 0, [[0], [6]]),))], tensors())


@given(st.integers(1, 60), st.integers(1, 12), st.integers(0, 50), st.integers(0, 200))
@settings(max_examples=60, deadline=None)
def test_schedule_is_exact_and_telescopes(steps: int, periods: int, start: int, total: int) -> None:
    periods = min(periods, steps)
    when = {"start": start, "steps": steps, "periods": periods}
    lengths = schedules.period_lengths(steps, periods)
    assert sum(lengths) == steps
    assert set(lengths[:-1]) <= {steps // periods}
    seen = [schedules.position(n, **when) for n in range(start, start + steps)]
    assert [(p, t, n) for p, n in enumerate(lengths) for t in range(n)] == [tuple(s) for s in seen if s]
    assert schedules.position(start - 1, **when) is None
    assert schedules.position(start + steps, **when) is None
    assert schedules.period_start(periods, **when) == start + steps
    due = [schedules.units_due(p, periods, total) for p in range(periods)]
    added = np.diff([0, *due])
    assert due[-1] == total
    assert added.max() - added.min() <= 1
    curve = [schedules.linear(n, **when, total=total) for n in range(start + steps + 2)]
    assert curve == sorted(curve)
    assert curve[:start] == [0] * start
    assert curve[-2:] == [total, total]
    product = np.cumprod([schedules.decay_factor(t, lengths[0]) for t in range(lengths[0])])
    np.testing.assert_allclose(product, [(lengths[0] - t - 1) / lengths[0] for t in range(lengths[0])], atol=1e-12)
    assert product[-1] == 0


def test_scaling_follows_a_tensor_to_other_memory() -> None:
    """Rows are scaled through views; a copy, or a parameter whose data was replaced, gets views of its own."""
    tensor = torch.ones(6, 128)
    region = Region("w", {0: torch.tensor([0, 1, 4])})
    region.scale_(tensor, 0.5)
    copied, other = copy.deepcopy(region), torch.ones(6, 128)
    copied.scale_(other, 0.5)
    parameter = torch.nn.Parameter(tensor)
    region.scale_(parameter.data, 0.5)
    parameter.data = torch.ones(6, 128)
    region.scale_(parameter.data, 0.5)
    assert tensor[:, 0].tolist() == [0.25, 0.25, 1, 1, 0.25, 1]
    assert other[:, 0].tolist() == parameter[:, 0].tolist() == [0.5, 0.5, 1, 1, 0.5, 1]
