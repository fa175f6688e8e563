"""The model types of transformers from "m" to "z" that need something of their own, and those that cannot run."""

from __future__ import annotations

from .transformers_exceptions import Exception_

EXCEPTIONS: dict[str, Exception_] = {}
NOT_RUNNABLE: dict[str, str] = {}
