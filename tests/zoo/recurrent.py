"""Recurrent layers, linear attention and state-space models."""

from __future__ import annotations

from .case import Case

RECURRENT: dict[str, Case] = {}
