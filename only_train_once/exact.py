"""Which groups can be cut exactly: cut, compare, and halve the set until those that spoil the comparison are found."""

from __future__ import annotations

from typing import Any

from torch import nn

from .errors import OTOError, SurgeryError, VerificationError
from .groups import GroupList
from .record import SurgeryRecord
from .surgery import construct_subnet
from .verify import Verification, verify_subnet


class Attempt:
    """Tries sets of groups: build the subnet with only these cut, and verify it.

    ``reasons`` says of each group that failed alone, or on top of those that passed, how.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: GroupList,
        inputs: Any,
        removed: dict[str, list[int]],
        verify: bool,
        other_outputs_may_shrink: bool = False,
        rescale_norms: bool = True,
    ) -> None:
        self.model, self.groups, self.inputs, self.removed, self.verify = model, groups, inputs, removed, verify
        self.rescale_norms = rescale_norms
        self.other_outputs_may_shrink = other_outputs_may_shrink
        self.reasons: dict[str, str] = {}
        self._last: tuple[list[str], tuple[nn.Module, SurgeryRecord, dict[str, Any]]] | None = None

    def built(self, names: list[str]) -> tuple[nn.Module, SurgeryRecord, dict[str, Any]]:
        """Subnet, record and the report's fields about its verification; raises if it is not exact."""
        if self._last is not None and self._last[0] == names:
            return self._last[1]
        model, record = construct_subnet(
            self.model, self.groups, {n: self.removed[n] for n in names}, rescale_norms=self.rescale_norms
        )
        facts: dict[str, Any] = {}
        if self.verify:
            result: Verification = verify_subnet(
                self.model, model, self.inputs, ignore_shape_mismatch=self.other_outputs_may_shrink
            )
            facts = {"verified_difference": float(result.max_relative_difference), "verification": str(result)}
        self._last = (names, (model, record, facts))
        return model, record, facts

    def _failure(self, names: list[str]) -> str | None:
        try:
            self.built(names)
        except SurgeryError as error:
            return str(error)
        except OTOError:  # a wrong argument, or a full model that does not run: no group is to blame
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError, AttributeError) as error:
            # A wrong cut shows as anything a forward pass can raise (shapes that no longer fit, a model's own check).
            return f"the subnet does not run: {type(error).__name__}: {error}"
        return None

    def largest_exact(self, names: list[str], good: list[str]) -> tuple[list[str], list[str]]:
        """Split ``names`` into (good plus those that can be cut on top of it, those that cannot), by halving.

        One construction when all is well, about two times log2(n) for each group that has to go.
        """
        failure = self._failure([*good, *names])
        if failure is None:
            return [*good, *names], []
        if not names:
            raise VerificationError(f"not even an uncut copy computes what the model computes: {failure}")
        if len(names) == 1:
            self.reasons[names[0]] = failure
            return good, names
        half = len(names) // 2
        good, bad = self.largest_exact(names[:half], good)
        good, worse = self.largest_exact(names[half:], good)
        return good, [*bad, *worse]
