"""A run is put back exactly where it was, whatever the optimizer keeps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.optim import SGD, AdamW

from only_train_once.optim.snapshot import Snapshot
from tests.reference.nets import batch, loss_of, make, tensors_of


@pytest.mark.parametrize("cls", ["SGD", "Adam", "AdamW", "RMSprop", "Adafactor", "NAdam", "Rprop"])
@pytest.mark.parametrize("before", [0, 3])
def test_training_on_after_putting_back_equals_not_having_trained(cls: str, before: int) -> None:
    ends = []
    for detour in (0, 4):
        model = make("conv")
        options = {"momentum": 0.9} if cls == "SGD" else {}
        optimizer = getattr(torch.optim, cls)(model.parameters(), lr=1e-2, **options)

        def train(steps: range) -> None:
            for step in steps:
                optimizer.zero_grad()  # noqa: B023
                loss_of(model, batch("conv", step)).backward()  # noqa: B023
                optimizer.step()  # noqa: B023

        train(range(before))
        snapshot = Snapshot.take(optimizer, tensors_of(model))
        train(range(50, 50 + detour))
        snapshot.put_back(optimizer, tensors_of(model))
        train(range(before, before + 4))
        ends.append(copy.deepcopy(model.state_dict()))
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name


def test_what_is_not_trained_is_left_alone() -> None:
    model = make("mlp")
    frozen = model.get_parameter("fc1.weight").requires_grad_(False)
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    snapshot = Snapshot.take(optimizer, tensors_of(model))
    frozen.data += 1
    expected = frozen.clone()
    snapshot.put_back(optimizer, tensors_of(model))
    assert torch.equal(frozen, expected)
    assert set(snapshot.parameters) == {"fc1.bias", "fc2.weight", "fc2.bias"}


def test_the_tensors_stay_the_same_objects() -> None:
    model = make("mlp")
    optimizer = AdamW(model.parameters())
    loss_of(model, batch("mlp", 0)).backward()
    optimizer.step()
    snapshot = Snapshot.take(optimizer, tensors_of(model))
    kept = [optimizer.state[p][key] for p in model.parameters() for key in ("exp_avg", "exp_avg_sq", "step")]
    optimizer.step()
    snapshot.put_back(optimizer, tensors_of(model))
    now = [optimizer.state[p][key] for p in model.parameters() for key in ("exp_avg", "exp_avg_sq", "step")]
    assert all(a is b for a, b in zip(kept, now, strict=True))
