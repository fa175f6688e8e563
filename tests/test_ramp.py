"""A ramp prepared for many steps multiplies what regions multiply one by one."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from only_train_once.masking import Region
from only_train_once.optim.ramp import Ramp

_HALF = torch.bfloat16
# shape, dtype, dim -> chosen positions, what of the plan does it
CASES: dict[str, tuple[tuple[int, ...], torch.dtype, dict[int, list[int]], str]] = {
    "long rows, a few": ((40, 6, 500), torch.float32, {0: [1, 2, 17]}, "rows"),
    "short rows, several at a time": ((9000, 40), torch.float64, {0: [*range(0, 9000, 90)]}, "rows"),
    "short rows, more than fit": ((40000, 24), torch.float32, {0: [*range(0, 39999, 90)]}, "rows"),
    "most rows": ((40, 600), torch.float32, {0: [*range(1, 39)]}, "whole"),
    "a vector": ((40,), torch.float32, {0: [0, 39]}, "whole"),
    "many columns": ((30, 40, 2), torch.float64, {1: [*range(0, 40, 3)]}, "whole"),
    "few columns": ((30, 40), torch.float32, {1: [7]}, "rest"),
    "rows and columns": ((30, 30), torch.float32, {0: [1, 4], 1: [1, 5]}, "rest"),
    "rows in half precision": ((400, 600), _HALF, {0: [1, 4]}, "rest"),
    "a vector in half precision": ((40,), _HALF, {0: [3, 5]}, "whole"),
    "complex rows": ((40, 60), torch.complex64, {0: [3, 5, 20]}, "whole"),
}


def _made(name: str) -> tuple[Tensor, Region]:
    shape, dtype, index, _ = CASES[name]
    torch.manual_seed(0)
    return torch.randn(shape, dtype=dtype), Region("w", {d: torch.tensor(i) for d, i in index.items()})


@pytest.mark.parametrize("name", CASES)
def test_every_step_multiplies_each_entry_once(name: str) -> None:
    tensor, region = _made(name)
    ramp, values = Ramp([region], {"w": tensor}), tensor.clone()
    for factor in (0.75, 0.9, 0.3):  # the plan of the first step serves the others
        mask = torch.zeros(tensor.shape, dtype=torch.bool)
        for dim, positions in region.index.items():
            mask.index_fill_(dim, positions, True)
        values = torch.where(mask, values * factor, values)
        ramp.scale_(factor)
        torch.testing.assert_close(tensor, values, rtol=0, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_the_cheapest_way_is_taken(name: str) -> None:
    tensor, region = _made(name)
    ramp = Ramp([region], {"w": tensor})
    ramp.scale_(0.5)
    assert ramp._plan is not None
    taken = [kind for kind in ("rows", "whole", "rest") if getattr(ramp._plan, kind)]
    assert taken == [CASES[name][3]]


def test_tensors_with_the_same_units_share_their_numbers() -> None:
    tensors = {"w": torch.ones(6, 2), "b": torch.ones(6), "c": torch.ones(6)}
    chosen = {"w": [0, 5], "b": [0, 5], "c": [1, 5]}
    ramp = Ramp([Region(n, {0: torch.tensor(i)}) for n, i in chosen.items()], tensors)
    ramp.scale_(0.5)
    assert ramp._plan is not None
    assert [len(n.values) for n in ramp._plan.numbers] == [12]
    assert tensors["w"].tolist() == [[0.5, 0.5], *[[1.0, 1.0]] * 4, [0.5, 0.5]]
    assert tensors["b"].tolist() == [0.5, 1, 1, 1, 1, 0.5]
    assert tensors["c"].tolist() == [1, 0.5, 1, 1, 1, 0.5]


def test_a_ramp_follows_tensors_to_another_precision() -> None:
    tensor, region = _made("long rows, a few")
    ramp = Ramp([region], {"w": tensor})
    ramp.scale_(0.5)
    tensor.data = tensor.double()
    before = tensor.clone()
    ramp.scale_(0.5)
    assert torch.equal(tensor[[1, 2, 17]], before[[1, 2, 17]] / 2)
    assert torch.equal(tensor[3:17], before[3:17])


@pytest.mark.parametrize("copied_by", [copy.deepcopy, lambda ramp: pickle.loads(pickle.dumps(ramp))])
@pytest.mark.parametrize("name", CASES)
def test_a_copy_scales_its_own_tensors(name: str, copied_by: Callable[[Ramp], Ramp]) -> None:
    tensor, region = _made(name)
    ramp = Ramp([region], {"w": tensor})
    ramp.scale_(0.5)
    held = tensor.clone()
    copied = copied_by(ramp)
    copied.scale_(0.25)
    assert torch.equal(tensor, held)
    ramp.scale_(0.25)
    assert not torch.equal(tensor, held)
    assert torch.equal(copied.tensors["w"], tensor)
