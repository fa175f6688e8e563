"""Every model type that transformers registers, as a small network with random weights.

The default configuration of a type is walked and made small by what its fields are called (`shrink`), the inputs are
made by what the forward calls its arguments (`example`). What that gets wrong is in `EXCEPTIONS`, and what cannot run
at all is in `NOT_RUNNABLE` with the cause.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from . import transformers_a_l, transformers_m_z
from .network import Network
from .transformers_exceptions import Exception_, configure
from .transformers_inputs import example
from .transformers_shrink import shrink

EXCEPTIONS = transformers_a_l.EXCEPTIONS | transformers_m_z.EXCEPTIONS
NOT_RUNNABLE = transformers_a_l.NOT_RUNNABLE | transformers_m_z.NOT_RUNNABLE

# The heads by preference; MODEL is the bare one. A type takes the first that it has.
_TASKS = (
    "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SEQUENCE_CLASSIFICATION",
    "CAUSAL_LM", "ZERO_SHOT_IMAGE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "MASKED_LM", "OBJECT_DETECTION",
    "ZERO_SHOT_OBJECT_DETECTION",
    "SEMANTIC_SEGMENTATION", "UNIVERSAL_SEGMENTATION", "INSTANCE_SEGMENTATION", "IMAGE_SEGMENTATION",
    "DEPTH_ESTIMATION", "CTC", "RNNT", "TDT", "AUDIO_CLASSIFICATION", "VIDEO_CLASSIFICATION", "IMAGE_TO_IMAGE",
    "IMAGE_MATTING", "KEYPOINT_DETECTION", "KEYPOINT_MATCHING", "POSE_ESTIMATION", "TEXT_RECOGNITION",
    "TABLE_RECOGNITION", "DOCUMENT_QUESTION_ANSWERING", "VISUAL_QUESTION_ANSWERING", "QUESTION_ANSWERING",
    "TIME_SERIES_PREDICTION", "TEXT_TO_WAVEFORM", "TEXT_TO_SPECTROGRAM", "MASK_GENERATION", "DECISION",
    "NORMAL_ESTIMATION", "POINTMAP_ESTIMATION", "MASKED_IMAGE_MODELING",
    "PRETRAINING", "TOKEN_CLASSIFICATION", "RETRIEVAL", "MULTIPLE_CHOICE", "IMAGE", "TEXT_ENCODING", "BACKBONE",
)  # fmt: skip
_GENERATES = ("ForCausalLM", "ForConditionalGeneration")


def model_class(name: str) -> type[PreTrainedModel] | None:
    """The class of a model type: the first head of `_TASKS`, else a class of its own in its module, else None."""
    tables = [getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES") for task in _TASKS]
    found = [_first(table[name]) for table in [*tables, modeling_auto.MODEL_MAPPING_NAMES] if name in table]
    found.sort(key=lambda cls: not cls.endswith(_GENERATES))  # stable: otherwise the order of the tasks
    for cls in found:
        if hasattr(transformers, cls):
            return getattr(transformers, cls)
    config = CONFIG_MAPPING[name]
    path = config.__module__.replace(".configuration_", ".modeling_")
    if importlib.util.find_spec(path) is None:
        return None
    own = [
        cls
        for cls in vars(importlib.import_module(path)).values()
        if isinstance(cls, type) and issubclass(cls, PreTrainedModel) and cls.__module__ == path
        and cls.__dict__.get("config", cls.config_class) is not None and cls.config_class is config
        and "forward" in dir(cls) and not cls.__name__.endswith(("PreTrainedModel", "PretrainedModel_"))
    ]  # fmt: skip
    own.sort(key=lambda cls: cls.__name__.endswith(_GENERATES))
    return own[-1] if own else None


def _first(classes: str | tuple[str, ...]) -> str:
    return classes if isinstance(classes, str) else classes[0]


def names() -> list[str]:
    """Every model type with a class that runs."""
    return sorted(name for name in CONFIG_MAPPING_NAMES if name not in NOT_RUNNABLE)


def build(name: str) -> Network:
    special = EXCEPTIONS.get(name, Exception_())
    cls = _named(special.cls, name) if special.cls else model_class(name)
    if cls is None:
        raise LookupError(f"{name} has no class")
    config = special.make() if special.make else CONFIG_MAPPING[name]()
    if not special.small:
        shrink(config)
    configure(config, EXCEPTIONS)
    if cls.__name__.endswith("ForSequenceClassification") and config.get_text_config().pad_token_id is None:
        config.get_text_config().pad_token_id = 0  # the last word before the padding decides
    torch.manual_seed(0)
    model = cls(config).eval()
    return Network(model, lambda seed: example(model, seed, special.inputs), special.note)


def _named(cls: str, name: str) -> type[PreTrainedModel]:
    if ":" not in cls:
        return getattr(transformers, cls)
    module, _, cls = cls.rpartition(":")
    return getattr(importlib.import_module(f"transformers.models.{module}"), cls)
