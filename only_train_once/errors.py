"""Every exception this library raises on purpose.

OTOError
├── TraceError            the model could not be run or captured on its example inputs
├── AnalysisError         the analysis has no answer for what was asked
│   ├── NothingPrunableError   no group can be pruned; the message lists the reasons
│   └── RuleError              a rule is registered twice, or for something that is no operator
├── ConfigurationError    an argument is outside its range (also a ValueError)
├── NumericalError        a NaN or an infinity where a finite number is needed
├── SurgeryError          a subnet cannot be built from these groups
│   ├── StockError             a stock architecture cannot express the subnet; `subnet.save` can
│   └── VerificationError      the subnet does not compute what the full network computes
├── ExportError           a module cannot be exported, or the program computes something else
└── CheckpointError       a file is damaged, foreign, or belongs to another model

A message names the thing, its value, the rule it breaks and the way out.
"""

from __future__ import annotations


class OTOError(Exception):
    """Base class of every exception of this library."""


class TraceError(OTOError):
    """The model could not be run or captured on its example inputs."""


class AnalysisError(OTOError):
    """The analysis has no answer for what was asked."""


class NothingPrunableError(AnalysisError):
    """No group of the model can be pruned; the message lists why."""


class RuleError(AnalysisError):
    """A rule is registered twice, or for something that is no operator."""


class ConfigurationError(OTOError, ValueError):
    """An argument is outside its range."""


class NumericalError(OTOError, ArithmeticError):
    """A NaN or an infinity where a finite number is needed."""


class SurgeryError(OTOError):
    """A subnet cannot be built from these groups."""


class StockError(SurgeryError):
    """A stock architecture cannot express the subnet; the message names the width that stands in the way."""


class VerificationError(SurgeryError):
    """The subnet does not compute what the full network computes."""


class ExportError(OTOError):
    """A module cannot be exported, a package for it is missing, or the program computes something else."""


class CheckpointError(OTOError):
    """A file is damaged, foreign, or belongs to another model."""
