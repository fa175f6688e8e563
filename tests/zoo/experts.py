"""Mixtures of experts: routed, shared, one module per expert or one tensor for all."""

from __future__ import annotations

from .case import Case

EXPERTS: dict[str, Case] = {}
