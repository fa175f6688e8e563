"""Test-wide settings: one thread per worker, no implicit randomness, vision libraries importable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch


def _skip_absent_vision_operators() -> None:
    """Let a torchvision built for another torch be imported beside this one.

    Its compiled operators are then missing, and its ``register_fake("torchvision::...")`` lines fail at import
    although nothing in the model definitions needs them. Only those registrations are skipped; every other
    operator, and every other kind of failure, behaves as before.
    """
    original = torch.library.register_fake

    def register_fake(op: Any, *args: Any, **kwargs: Any) -> Any:
        decorated = original(op, *args, **kwargs)
        if not (isinstance(op, str) and op.startswith("torchvision::")):
            return decorated

        def tolerant(function: Callable[..., Any]) -> Callable[..., Any]:
            try:
                return decorated(function)  # type: ignore[no-any-return, operator]
            except RuntimeError:
                return function

        return tolerant

    torch.library.register_fake = register_fake


_skip_absent_vision_operators()
torch.set_num_threads(1)  # several workers share few cores, and one thread makes sums reproducible


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Every test starts from the same random state and leaves the defaults as they were."""
    torch.manual_seed(0)
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    yield
    assert torch.get_default_dtype() is dtype, "a test left another default dtype behind"
    assert torch.is_grad_enabled() is grad, "a test left gradients switched off"
