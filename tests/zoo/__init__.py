"""Small networks, one per structure, each with example inputs: the table that the properties run over."""

from .attention import ATTENTION
from .basics import BASICS, MLP, ConvNet, FusedAttention, Gated, Reshaped
from .case import Case
from .experts import EXPERTS
from .recurrent import RECURRENT
from .signal import SIGNAL
from .vision import VISION

ZOO: dict[str, Case] = {**BASICS, **ATTENTION, **RECURRENT, **EXPERTS, **VISION, **SIGNAL}

__all__ = ["MLP", "ZOO", "Case", "ConvNet", "FusedAttention", "Gated", "Reshaped"]
