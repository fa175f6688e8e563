"""How a model is made, as data: by which library, under which name, with which arguments.

A saved subnet carries such a description where it can be found out (models of transformers and timm) or where the
caller gives it; ``load`` then needs no constructor. It looks like this::

    {"library": "timm", "name": "resnet18", "arguments": {"num_classes": 10}}
    {"library": "torchvision", "name": "resnet18", "arguments": {}}
    {"library": "transformers", "name": "BertModel", "arguments": {"config": {...}}}

[Note: making what a file describes]
Nothing is imported but the three libraries, and of them only what they list themselves: a class that the top of
transformers exports, a name that timm or torchvision registers. Arguments are JSON; those that would fetch or run
something (weights, files, remote code, kernels of the hub) are refused. Models are made on the meta device, so their
size takes no memory; only small tensors are made for real where a constructor reads values. What registers many more
parameters or modules than the file holds tensors is stopped.
"""

from __future__ import annotations

import importlib
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from ..copying import copy_module
from ..errors import CheckpointError, OTOError
from ..record import SurgeryRecord
from ..surgery import named_tensors, set_attribute

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z_][\w.\-]*")
# What would fetch, read or run something else, by the names that the three libraries have for it.
_FETCHES = re.compile(
    r"^pretrained(_cfg|_cfg_overlay|_strict|_custom_load|_tag)?$|^use_pretrained|^weights|^checkpoint_path$|^cache_dir$"
    r"|auto_map|remote_code|use_kernels|kernel_config|quantization_config|__"
)
_PLACES = re.compile(r"\s*(hf[-_]hub|local[-_]dir|https?|file|s3)\s*:", re.IGNORECASE)
_LARGEST = 2**24  # of a whole number: configurations make lists of that many entries
_LABELS = 2**16  # of classes: configurations give each a name
_SMALL = 2**16  # entries of a tensor that may be made for real
_ATTENTION = (None, "eager", "sdpa", "flex_attention")
_EXPERTS = (None, "eager", "batched_mm", "grouped_mm")
_CHOICES = {"attn_implementation": _ATTENTION, "experts_implementation": _EXPERTS}
_EXTRA = {"transformers": "hf", "timm": "vision", "torchvision": "vision"}


class Unknown(OTOError):
    """How a model is made cannot be told; says why."""


# ----------------------------------------------------------------------------------------------------------------
# From a model to a description
# ----------------------------------------------------------------------------------------------------------------


def describe(model: nn.Module, record: SurgeryRecord) -> dict[str, Any]:
    """How the full model was made.

    Raises:
        Unknown: it is no model of transformers or timm, or these do not keep what is needed.
    """
    for library, look in (("transformers", _seen_in_transformers), ("timm", _seen_in_timm)):
        if type(model).__module__.startswith(f"{library}."):
            name, arguments = look(model, record)
            description = {"library": library, "name": name, "arguments": arguments}
            try:
                description = json.loads(json.dumps(description))
                check(description)
            except (TypeError, ValueError, RecursionError, CheckpointError) as error:
                raise Unknown(f"what {library} keeps of how the model was made cannot be used: {error}") from error
            return description
    raise Unknown(f"{type(model).__qualname__} is no model of transformers or timm")


def _seen_in_transformers(model: Any, record: SurgeryRecord) -> tuple[str, dict[str, Any]]:
    if not hasattr(model, "config") or not hasattr(model.config, "to_dict"):
        raise Unknown(f"{type(model).__name__} has no configuration")
    config: Any = _before_surgery(model, record).config
    entries = config.to_dict()
    for key in ("transformers_version", "_name_or_path", "architectures"):
        entries.pop(key, None)
    arguments = {"config": _without(entries, ("_name_or_path", "transformers_version"))}
    for key, allowed in _CHOICES.items():
        chosen = {path: getattr(part, f"_{key}", None) for path, part in _configs(config)}
        if any(value not in allowed for value in chosen.values()):
            raise Unknown(f"its {key} is {chosen}, and only {allowed} can be loaded again")
        arguments[key] = chosen
    return type(model).__name__, arguments


def _without(value: Any, keys: tuple[str, ...]) -> Any:
    if isinstance(value, dict):
        return {key: _without(each, keys) for key, each in value.items() if key not in keys}
    return [_without(each, keys) for each in value] if isinstance(value, (list, tuple)) else value


def _seen_in_timm(model: Any, record: SurgeryRecord) -> tuple[str, dict[str, Any]]:
    known = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    name = known.get("architecture") if isinstance(known, Mapping) else None
    if not isinstance(name, str):
        raise Unknown("timm keeps no name of its architecture")
    return name, {k: v for k, v in getattr(model, "_model_args", {}).items() if not _FETCHES.search(k)}


def _before_surgery(model: nn.Module, record: SurgeryRecord) -> nn.Module:
    """The model, or where surgery changed its configuration a copy without values that has it as it was."""
    if not any("config." in path for path in record.attributes):
        return model
    hollow: dict[int, Tensor] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()
    }
    copied = copy_module(model, CheckpointError, hollow)
    for path, change in record.attributes.items():
        set_attribute(copied, path, change.full)
    return copied


def _configs(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """A configuration of transformers and those inside of it, by path."""
    yield path, config
    for key in getattr(config, "sub_configs", {}):
        part = getattr(config, key, None)
        if part is not None and hasattr(part, "to_dict"):
            yield from _configs(part, f"{path}.{key}" if path else key)


def difference(saved: nn.Module, made: nn.Module) -> str | None:
    """Where a model that was made from a description, and cut, is another one than what was saved; None if nowhere."""
    modules, others = dict(saved.named_modules()), dict(made.named_modules())
    if modules.keys() != others.keys():
        return f"its modules are others: {sorted(modules.keys() ^ others.keys())[:5]}"
    for path, module in modules.items():
        other, where = others[path], path or "the model"
        if _kind(module) is not _kind(other):
            return f"{where} is a {_kind(other).__name__}, not a {_kind(module).__name__}"
        for key, value in vars(module).items():
            if key != "training" and key in vars(other) and not _alike(value, vars(other)[key]):
                return f"{where}.{key} is {vars(other)[key]!r:.80}, not {value!r:.80}"
        for kind in ("_parameters", "_buffers"):
            shapes, made_shapes = (
                {n: None if t is None else tuple(t.shape) for n, t in getattr(m, kind).items()} for m in (module, other)
            )
            if shapes != made_shapes:
                return f"{where} has {made_shapes}, not {shapes}"[:300]
    return None


def _kind(module: nn.Module) -> type:
    """Its class; a parametrized module has one of its own, below the one that it was written as."""
    return type(module).__mro__[1 if parametrize.is_parametrized(module) else 0]


def _alike(one: Any, other: Any) -> bool:
    """Equal as far as plain values go; what they say nothing about is not compared."""
    plain = (bool, int, float, str, type(None))
    if isinstance(one, plain) and isinstance(other, plain):
        return type(one) is type(other) and (one == other or one != one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_alike, one, other))
    if callable(one) and callable(other) and not isinstance(one, nn.Module) and hasattr(one, "__qualname__"):
        return one.__qualname__ == getattr(other, "__qualname__", None)
    return True


# ----------------------------------------------------------------------------------------------------------------
# From a description to a model
# ----------------------------------------------------------------------------------------------------------------


def check(description: Any) -> None:
    """Raise CheckpointError unless ``description`` has the form and asks for nothing that is refused."""
    if not isinstance(description, Mapping) or set(description) != {"library", "name", "arguments"}:
        raise CheckpointError(
            f"the builder is {description!r:.200}, expected as in "
            "{'library': 'timm', 'name': 'resnet18', 'arguments': {}}"
        )
    library, name, arguments = description["library"], description["name"], description["arguments"]
    if not isinstance(library, str) or library not in _MAKERS:
        raise CheckpointError(f"the builder's library is {library!r:.80}, expected one of {sorted(_MAKERS)}")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise CheckpointError(f"the builder's name is {name!r:.80}, expected one that {library} lists")
    if not isinstance(arguments, Mapping) or not all(isinstance(key, str) for key in arguments):
        raise CheckpointError("the builder's arguments are no JSON object")
    if library == "transformers":
        _check_choices(arguments)
        arguments = arguments["config"]
    _check_values(arguments, "arguments")


def _check_choices(arguments: Mapping[str, Any]) -> None:
    config = arguments.get("config")
    if not isinstance(config, Mapping) or arguments.keys() - _CHOICES - {"config"}:
        raise CheckpointError(
            f"the builder's arguments are {sorted(arguments)}, expected a config and {list(_CHOICES)}"
        )
    for key, allowed in _CHOICES.items():
        chosen = arguments.get(key, {})
        if not isinstance(chosen, Mapping) or any(value not in allowed for value in chosen.values()):
            raise CheckpointError(f"the builder's {key} is {chosen!r:.80}, expected a dict to some of {allowed}")


def _check_values(value: Any, where: str) -> None:
    if isinstance(value, Mapping):
        for key, each in value.items():
            if each and _FETCHES.search(key):
                raise CheckpointError(f"the builder's {where} have {key!r}: what fetches or runs something is refused")
            choice = next((allowed for name, allowed in _CHOICES.items() if name in key), None)
            if choice is not None and each not in choice:
                raise CheckpointError(f"the builder's {where} have {key!r} = {each!r:.80}, expected one of {choice}")
            if key == "num_labels" and isinstance(each, int) and each > _LABELS:
                raise CheckpointError(f"the builder's {where} have {each!r:.80} labels, {_LABELS} at most are expected")
            _check_values(each, f"{where}[{key!r:.80}]")
    elif isinstance(value, list):
        for each in value:
            _check_values(each, where)
    elif isinstance(value, str) and _PLACES.match(value):
        raise CheckpointError(f"the builder's {where} is {value!r:.80}, a place to fetch something from: refused")
    elif isinstance(value, int) and abs(value) > _LARGEST:
        raise CheckpointError(f"the builder's {where} is {value!r:.80}, more than {_LARGEST}")


def make(description: Mapping[str, Any], tensors: int, path: str) -> nn.Module:
    """The full model that is described, its tensors on the meta device or without the right values.

    Args:
        tensors: how many the saved model has; one that registers many more is stopped.
        path: the file that describes it, for messages.

    Raises:
        CheckpointError: there is no description, or no model can be made from it.
    """
    if set(description) == {"unknown"} or not description:
        reason = f" ({description['unknown']!s:.300})" if description else ""
        raise CheckpointError(
            f"{path} does not say how the model is made{reason}: give build=, the original constructor, or say it when "
            "saving, subnet.save(dir, builder={'library': ..., 'name': ..., 'arguments': ...})"
        )
    try:
        check(description)
        library, name = description["library"], description["name"]
        maker = _MAKERS[library](_imported(library), name, description["arguments"])
        return _made(maker, tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}; give build=, the original constructor") from error


def _imported(library: str) -> Any:
    try:
        return importlib.import_module(library)
    except Exception as error:  # of its own dependencies, too
        raise CheckpointError(
            f"the model is made by {library}, which cannot be imported ({error}): pip install "
            f"only_train_once[{_EXTRA[library]}]"
        ) from error


def _made(maker: Callable[[], nn.Module], tensors: int) -> nn.Module:
    failures = []
    for place in (torch.device("meta"), _SmallForReal()):
        try:
            with ExitStack() as stack:
                stack.enter_context(_limited(tensors))
                stack.enter_context(torch.random.fork_rng(devices=[]))
                stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")  # whoever made the model has seen them
                mode: AbstractContextManager[Any] = place
                stack.enter_context(mode)
                model = maker()
            stray = stray_meta_tensor(model)
        except Exception as error:  # a constructor may raise anything
            failures.append(f"{type(error).__name__}: {error!s:.300}")
            if isinstance(error, _TooLarge):
                break
            continue
        if stray is None:
            return model
        failures.append(f"{stray} needs values")
    raise CheckpointError(
        f"the described model cannot be made without its weights: {'; '.join(dict.fromkeys(failures))}"
    )


def _from_transformers(library: Any, name: str, arguments: Mapping[str, Any]) -> Callable[[], nn.Module]:
    kind = _class_in_transformers(library, name, arguments["config"].get("model_type"))

    def build() -> nn.Module:
        config = kind.config_class.from_dict(json.loads(json.dumps(arguments["config"])))
        for path, part in _configs(config):
            for key in _CHOICES:
                chosen = arguments.get(key, {}).get(path)
                if chosen is not None:
                    setattr(part, f"_{key}_internal", chosen)
        made: nn.Module = kind(config)
        return made

    return build


def _class_in_transformers(library: Any, name: str, model_type: object) -> Any:
    """A class that transformers exports, or has in the module of one of its own types of models."""
    found = getattr(library, name, None)
    types = library.models.auto.configuration_auto
    if found is None and isinstance(model_type, str) and model_type in types.CONFIG_MAPPING_NAMES:
        module = types.CONFIG_MAPPING[model_type].__module__.replace(".configuration_", ".modeling_")
        found = (
            getattr(importlib.import_module(module), name, None) if module.startswith("transformers.models.") else None
        )
    if not isinstance(found, type) or not issubclass(found, library.PreTrainedModel):
        raise CheckpointError(f"transformers has no model {name!r}")
    return found


def _from_timm(library: Any, name: str, arguments: Mapping[str, Any]) -> Callable[[], nn.Module]:
    if not library.is_model(name.partition(".")[0]):
        raise CheckpointError(f"timm registers no model {name!r}")
    given = {key: value for key, value in arguments.items() if not _FETCHES.search(key)}
    return lambda: library.create_model(name, pretrained=False, **given)


def _from_torchvision(library: Any, name: str, arguments: Mapping[str, Any]) -> Callable[[], nn.Module]:
    models = importlib.import_module("torchvision.models")
    if name not in models.list_models():
        raise CheckpointError(f"torchvision registers no model {name!r}")
    # These fetch the weights of their backbones unless told not to.
    fetching = any(part in models.get_model_builder(name).__module__ for part in (".detection.", ".segmentation."))
    backbone = {"weights_backbone": None} if fetching else {}
    given = {key: value for key, value in arguments.items() if not _FETCHES.search(key)}
    return lambda: models.get_model(name, weights=None, **backbone, **given)


_MAKERS: dict[str, Callable[[Any, str, Mapping[str, Any]], Callable[[], nn.Module]]] = {
    "transformers": _from_transformers,
    "timm": _from_timm,
    "torchvision": _from_torchvision,
}


class _TooLarge(Exception):
    pass


@contextmanager
def _limited(tensors: int) -> Iterator[None]:
    """Stop a constructor that registers many more parameters, buffers or modules than a file with ``tensors`` holds."""
    left = {"tensors": 4 * tensors + 1000, "modules": 50 * tensors + 10_000}

    def counting(what: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            left[what] -= 1
            if left[what] < 0:
                raise _TooLarge(f"it has many more {what} than the {tensors} tensors that are saved")

        return hook

    handles = [
        hooks.register_module_parameter_registration_hook(counting("tensors")),
        hooks.register_module_buffer_registration_hook(counting("tensors")),
        hooks.register_module_module_registration_hook(counting("modules")),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _SmallForReal(TorchFunctionMode):
    """Tensors are made on the meta device, small ones with values: constructors compute rates from them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _device_constructors() and kwargs.get("device") is None:
            shape_only = func(*args, **{**kwargs, "device": "meta"})
            return shape_only if shape_only.numel() > _SMALL else func(*args, **kwargs)
        return func(*args, **kwargs)


def stray_meta_tensor(model: nn.Module) -> str | None:
    """Where a module keeps a tensor without values that is neither parameter nor buffer; None if nowhere."""
    known = {id(t) for t in named_tensors(model).values()}
    seen: set[int] = set()
    machinery = {"_parameters", "_buffers", "_modules"}
    for path, module in model.named_modules():
        stack = [value for key, value in vars(module).items() if key not in machinery]
        while stack:
            value = stack.pop()
            if id(value) in seen or isinstance(value, (nn.Module, ModuleType)):
                continue
            seen.add(id(value))
            if isinstance(value, Tensor):
                if value.device.type == "meta" and id(value) not in known:
                    return f"a tensor attribute of {path or type(model).__name__}"
            elif isinstance(value, Mapping):
                stack.extend(value.values())
            elif isinstance(value, (list, tuple, set)):
                stack.extend(value)
            else:
                stack.extend(getattr(value, "__dict__", {}).values() if not isinstance(value, type) else ())
                stack.extend(c.cell_contents for c in getattr(value, "__closure__", None) or () if _filled(c))
    return None


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
