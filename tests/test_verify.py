"""Verification: what it accepts, what it refuses, and that it touches nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from only_train_once.errors import ConfigurationError, TraceError, VerificationError
from only_train_once.inputs import call_model, cast_inputs, clone_inputs, fresh_inputs, in_float64, tensors_of
from only_train_once.verify import verify_subnet


def mlp(width: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, 3))


def pair() -> tuple[nn.Sequential, nn.Sequential]:
    """A full network with two units at zero, and the right subnet."""
    torch.manual_seed(0)
    full, small = mlp(), mlp(6)
    with torch.no_grad():
        full[0].weight[6:] = 0  # type: ignore[index, operator, union-attr]
        full[0].bias[6:] = 0  # type: ignore[index, operator, union-attr]
        small[0].weight.copy_(full[0].weight[:6])  # type: ignore[index, operator, union-attr]
        small[0].bias.copy_(full[0].bias[:6])  # type: ignore[index, operator, union-attr]
        small[2].weight.copy_(full[2].weight[:, :6])  # type: ignore[index, operator, union-attr]
        small[2].bias.copy_(full[2].bias)  # type: ignore[operator, union-attr, arg-type]
    return full, small


class Returns(nn.Module):
    """Any output made from a network's result."""

    def __init__(self, net: nn.Module, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net = net
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.net(x))


@dataclass
class Output:
    logits: Tensor
    hidden: Any = None


class Cache:
    """An opaque object, as language models return."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


X = torch.zeros(2, 5)


def test_a_right_subnet_passes() -> None:
    full, small = pair()
    result = verify_subnet(full, small, X)
    assert result.max_relative_difference <= 1e-14
    assert result.dtype is torch.float64
    assert result.modes == ("eval", "train")
    assert result.samples == 2
    assert result.fresh
    assert result.deterministic
    assert result.outputs == ("output",)
    assert "float64, eval and train mode, 2 fresh inputs" in str(result)


@pytest.mark.parametrize("place", ["0.weight", "0.bias", "2.weight", "2.bias"])
def test_a_small_mistake_is_found(place: str) -> None:
    full, small = pair()
    with torch.no_grad():
        small.get_parameter(place).flatten()[0] += 1e-6
    with pytest.raises(VerificationError, match=r"output of the subnet differs in eval mode on input \d: .*1e-09"):
        verify_subnet(full, small, X)
    assert 1e-9 < verify_subnet(full, small, X, tolerance=1e-4).max_relative_difference < 1e-5


def test_a_difference_in_training_mode_only() -> None:
    full, small = pair()
    full.append(nn.BatchNorm1d(3)), small.append(nn.BatchNorm1d(3))
    verify_subnet(full, small, torch.randn(6, 5))
    small[3].momentum = 0.5  # only the statistics differ afterwards, not what this run returns
    verify_subnet(full, small, torch.randn(6, 5))
    small[3].eps = 0.1
    small[3].running_var.add_(1e-5 - 0.1)  # in evaluation mode the two differences cancel to rounding
    with pytest.raises(VerificationError, match="in train mode"):
        verify_subnet(full, small, torch.randn(6, 5), tolerance=1e-6)


def test_a_random_training_mode_is_not_compared() -> None:
    full, small = pair()
    full.append(nn.Dropout()), small.append(nn.Dropout())
    result = verify_subnet(full, small, X)
    assert result.modes == ("eval",)
    assert not result.deterministic
    assert "not compared" in str(result)


def test_nothing_is_touched() -> None:
    full, small = pair()
    full.append(nn.BatchNorm1d(3)), small.append(nn.BatchNorm1d(3))
    full.train(), small.eval()
    x = torch.randn(4, 5)
    before = copy.deepcopy((full.state_dict(), small.state_dict(), x))
    rng = torch.get_rng_state()
    fast = torch.backends.mha.get_fastpath_enabled()
    verify_subnet(full, small, x)
    assert full.training
    assert not small.training
    assert full[0].weight.dtype is torch.float32  # type: ignore[union-attr]
    for now, then in zip(
        (full.state_dict(), small.state_dict(), {"x": x}), (*before[:2], {"x": before[2]}), strict=True
    ):
        assert all(torch.equal(now[k], then[k]) for k in now)
    assert torch.equal(rng, torch.get_rng_state())
    assert torch.backends.mha.get_fastpath_enabled() == fast


OUTPUTS: dict[str, tuple[Callable[[Tensor], Any], tuple[str, ...]]] = {
    "tuple": (lambda y: (y, 2 * y), ("output[0]", "output[1]")),
    "dict": (lambda y: {"a": y, "b": [y, None, 3]}, ("output['a']", "output['b'][0]")),
    "dataclass": (lambda y: Output(y, (y,)), ("output.logits", "output.hidden[0]")),
    "cache": (lambda y: (y, Cache(y)), ("output[0]",)),
    "complex": (lambda y: torch.complex(y, 2 * y), ("output",)),
    "integers left out": (lambda y: (y, y.argmax(-1)), ("output[0]",)),
    "nan": (lambda y: torch.where(torch.tensor([True, False, True]), y, float("nan")), ("output",)),
    "infinity": (lambda y: torch.where(torch.tensor([True, False, True]), y, float("-inf")), ("output",)),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs(name: str) -> None:
    make, names = OUTPUTS[name]
    full, small = pair()
    assert verify_subnet(Returns(full, make), Returns(small, make), X).outputs == names
    with torch.no_grad():
        small[2].bias[2] += 1e-3  # type: ignore[index, operator, union-attr]
    with pytest.raises(VerificationError, match="differs"):
        verify_subnet(Returns(full, make), Returns(small, make), X)


def _with(value: float) -> Callable[[Tensor], Tensor]:
    return lambda y: torch.cat([y, torch.full_like(y[:, :1], value)], -1)


@pytest.mark.parametrize(
    ("one", "two"),
    [(1.0, float("nan")), (float("nan"), 1.0), (float("inf"), float("-inf")), (float("inf"), float("nan"))],
)
def test_nan_and_infinity_have_to_agree(one: float, two: float) -> None:
    full, small = pair()
    with pytest.raises(VerificationError, match="relative difference inf"):
        verify_subnet(Returns(full, _with(one)), Returns(small, _with(two)), X)


def test_outputs_that_cannot_be_compared() -> None:
    full, small = pair()
    for make in (lambda y: y.argmax(-1), lambda y: y * float("nan"), Cache):
        with pytest.raises(VerificationError, match="nothing to compare"):
            verify_subnet(Returns(full, make), Returns(small, make), X)
    with pytest.raises(VerificationError, match="returns the outputs"):
        verify_subnet(Returns(full, lambda y: (y, y)), Returns(small, lambda y: (y,)), X)


def test_outputs_of_other_shapes() -> None:
    full, small = pair()

    def both(net: nn.Sequential) -> nn.Module:
        class Both(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = net

            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                return self.net(x), self.net[0](x)

        return Both()

    with pytest.raises(VerificationError, match=r"output\[1\] has shape \[2, 6\].*\[2, 8\]"):
        verify_subnet(both(full), both(small), X)
    result = verify_subnet(both(full), both(small), X, ignore_shape_mismatch=True)
    assert result.outputs == ("output[0]",)
    assert result.skipped == ("output[1]",)
    assert "output[1]" in str(result)


def test_a_subnet_that_does_not_run() -> None:
    full, small = pair()
    small[2] = nn.Linear(5, 3)
    with pytest.raises(VerificationError, match="does not run in eval mode on input 0: RuntimeError"):
        verify_subnet(full, small, X)
    with pytest.raises(TraceError, match="does not run on its example inputs"):
        verify_subnet(full, full, torch.zeros(2, 4))


def test_float32_by_name_stays_in_float64() -> None:
    """A cast inside the forward would limit the comparison to 1e-7."""

    class Casts(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            y = self.net(x).to(torch.float32)
            angle = torch.arange(3, dtype=torch.float32) / 7
            y = torch.softmax(y, -1, dtype=torch.float32) * angle.cos() + torch.ones(3, dtype=torch.bfloat16)
            y[0] = y[0] * torch.zeros(3).add_(0.1)
            return y.to(x.dtype)

    full, small = pair()
    with torch.no_grad():
        for m in (full, small):
            m[0].weight.mul_(1 / 3)  # type: ignore[operator, union-attr]
    assert verify_subnet(Casts(full), Casts(small), X).max_relative_difference < 1e-14
    wrong = copy.deepcopy(small).double()
    with torch.no_grad():
        wrong[2].bias[0] += 3e-8  # type: ignore[index, operator, union-attr]
    with pytest.raises(VerificationError, match="differs in eval mode"):  # far below what float32 can tell
        verify_subnet(Casts(full), Casts(wrong), X)
    with in_float64():
        y = Casts(full).double()(torch.randn(2, 5, dtype=torch.float64))
        assert torch.zeros(2, dtype=torch.float16).dtype is torch.float64
        assert torch.zeros(2, dtype=torch.int32).view(torch.float32).dtype is torch.float32
        assert torch.full((2,), torch.finfo(torch.float64).min).dtype is torch.float64  # more than float32 holds
        assert torch.full((2,), 7).dtype is torch.int64
    assert y.dtype is torch.float64


def test_a_network_that_does_not_run_in_float64() -> None:
    class Single(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            if x.dtype is not torch.float32:
                raise RuntimeError("expected float")
            return self.net(x)

    full, small = pair()
    result = verify_subnet(Single(full), Single(small), X)
    assert result.dtype is torch.float32
    assert result.tolerance == 1e-4
    assert "float64 does not run" in str(result)
    small[2].bias.data += 1  # type: ignore[union-attr, operator]
    with pytest.raises(VerificationError, match="float32"):
        verify_subnet(Single(full), Single(small), X)


def test_inputs_that_have_to_be_the_example() -> None:
    """A network that checks its input's values is compared on the example itself."""

    class Picky(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            if not bool((x == 1).all()):
                raise ValueError("ones, please")
            return self.net(x)

    full, small = pair()
    result = verify_subnet(Picky(full), Picky(small), torch.ones(2, 5))
    assert not result.fresh
    assert "1 example inputs" in str(result)


def test_inputs_written_to_by_the_model() -> None:
    class Writes(Returns):
        def forward(self, x: Tensor) -> Any:
            return self.net(x.add_(1))

    full, small = pair()
    x = torch.zeros(2, 5)
    verify_subnet(Writes(full, lambda y: y), Writes(small, lambda y: y), x)
    assert not x.any()


@pytest.mark.parametrize("bad", [None, (), {}, [torch.zeros(2)], "x", {1: torch.zeros(2)}])
def test_inputs_of_no_form_are_refused(bad: Any) -> None:
    for use in (lambda: call_model(mlp(), bad), lambda: fresh_inputs(bad), lambda: verify_subnet(mlp(), mlp(), bad)):
        with pytest.raises(ConfigurationError, match="give a tensor, a tuple of positional arguments or a dict"):
            use()


@pytest.mark.parametrize(("option", "match"), [({"samples": 0}, "samples is 0"), ({"tolerance": -1.0}, "tolerance is")])
def test_options_are_checked(option: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        verify_subnet(*pair(), X, **option)


def test_how_a_model_is_called() -> None:
    class Records(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return args, kwargs

    x = torch.zeros(1)
    assert call_model(Records(), x) == ((x,), {})
    assert call_model(Records(), (x, {"a": 1})) == ((x, {"a": 1}), {})
    assert call_model(Records(), {"a": x}) == ((), {"a": x})
    nested = (x, [x, {"k": x}], 3)
    assert len(tensors_of(nested)) == 3
    with pytest.raises(ConfigurationError, match="hold no tensor"):
        tensors_of((1, "a"))
    copied: Any = clone_inputs(nested)
    assert copied[1][1]["k"] is not x
    cast: Any = cast_inputs((x, torch.zeros(1, dtype=torch.long)), torch.float64)
    assert [t.dtype for t in cast] == [torch.float64, torch.int64]


def test_fresh_inputs() -> None:
    torch.manual_seed(0)
    rng = torch.get_rng_state()
    example: dict[str, Any] = {
        "x": torch.zeros(400) + 5 + 2 * torch.linspace(-1, 1, 400),
        "constant": torch.zeros(3, 4),
        "tokens": torch.tensor([[3, 9, 4, 3, 5, 6, 7, 8]]),
        "mask": torch.tensor([True, False]),
        "bias": torch.tensor([0.0, float("-inf")]),
        "ones": torch.ones(1, 4, dtype=torch.long),
        "wave": torch.complex(torch.ones(3), torch.zeros(3)),
        "flag": "a",
    }
    rng = torch.get_rng_state()
    fresh: Any = fresh_inputs(example, seed=1)
    assert torch.equal(rng, torch.get_rng_state())
    again: Any = fresh_inputs(example, seed=1)
    other: Any = fresh_inputs(example, seed=2)
    for name, value in example.items():
        if isinstance(value, Tensor):
            assert fresh[name].shape == value.shape
            assert fresh[name].dtype == value.dtype
            assert torch.equal(fresh[name], again[name])
    for name in ("x", "constant", "tokens", "wave"):
        assert not torch.equal(fresh[name], example[name])
        assert not torch.equal(fresh[name], other[name])
    for name in ("mask", "bias", "ones"):
        assert torch.equal(fresh[name], example[name])
    assert abs(float(fresh["x"].mean()) - 5) < 0.3
    assert abs(float(fresh["x"].std()) - 1.16) < 0.3
    assert 3 <= int(fresh["tokens"].min()) <= int(fresh["tokens"].max()) <= 9
    assert fresh["flag"] == "a"


def test_only_generators_in_use_are_seeded_and_they_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.manual_seed`` writes down the stack of calls for every kind of device that is not in use."""
    full, small = (Returns(net, lambda y: y + torch.randn_like(y)) for net in pair())
    x = torch.randn(4, 5)
    before = torch.random.get_rng_state()

    def everywhere(seed: int) -> None:
        raise AssertionError("seeds the generators of all devices")

    monkeypatch.setattr(torch, "manual_seed", everywhere)
    assert verify_subnet(full, small, x).max_relative_difference <= 1e-9  # both drew the same noise
    assert torch.equal(torch.random.get_rng_state(), before)
