"""`construct_subnet`: cut the removed units out of a copy of the model.

[Note: one code path]
Surgery is two steps. ``plan`` looks at the model and its groups and writes down everything that is to be done
as a `SurgeryRecord`: which positions of which tensors stay, what attributes become, how norms go on counting the
full width. `apply_record` does it. ``construct_subnet`` is the two in a row on a copy, and loading a saved subnet
is the second alone on a freshly built model, so a loaded subnet cannot differ from the constructed one.

Sizes are never counted down: what stays of a dim is what no group removed, and ``in_features`` and its like are
read back from the cut tensors (`_SIZES`).
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.weight_norm import WeightNorm

from . import masking
from .copying import copy_module
from .errors import ConfigurationError, SurgeryError
from .groups import ParamSlice, PruningGroup, Role
from .inputs import in_float64
from .norms import (
    FullWidthGatedRMSNorm,
    FullWidthGroupNorm,
    FullWidthLayerNorm,
    FullWidthResponseNorm,
    FullWidthRMSNorm,
    FullWidthScaledRMSNorm,
)
from .record import (
    ATTRIBUTE_PATH,
    AttributeChange,
    NormChange,
    Runs,
    SurgeryRecord,
    TensorCut,
    count,
    from_runs,
    to_runs,
)

logger = logging.getLogger(__name__)

_NORM_TOLERANCE = 1e-9

# ----------------------------------------------------------------------------------------------------------------
# From groups to a record
# ----------------------------------------------------------------------------------------------------------------


def construct_subnet(
    model: nn.Module,
    groups: Iterable[PruningGroup],
    removed: Mapping[str, Sequence[int]] | None = None,
    *,
    fold_norms: bool = False,
    rescale_norms: bool = True,
) -> tuple[nn.Module, SurgeryRecord]:
    """A smaller copy of ``model`` without the removed units, and what was done to get there.

    ``model`` stays as it is. The subnet computes what ``model`` computes provided that the removed units are at
    zero there; ``verify_subnet`` tells.

    Args:
        groups: from ``find_groups``, or written by hand.
        removed: group name -> units to remove; None removes the prunable units that are at zero. At least one unit
            of a group stays.
        fold_norms: rescale weight and eps of RMS norms of the user's own class even where the rescaled weight
            rounds in its dtype (6e-8 in float32), so that the class stays. By default such a norm becomes a
            `FullWidthRMSNorm` unless rescaling is exact.
        rescale_norms: False never rescales: training goes on, and a weight of another size would train differently.

    Raises:
        ConfigurationError: ``removed`` names a group or a unit that does not exist.
        SurgeryError: the groups do not fit the model, a norm cannot be told the full width, or ``removed`` names a
            number of units that cannot leave together (`PruningGroup.multiple`); of units found at zero, those that
            are too many stay, with a warning.
    """
    with torch.inference_mode(False):  # or the subnet could never be trained
        record = plan(model, groups, removed, fold_norms=fold_norms, rescale_norms=rescale_norms)
        return apply_record(record, copy_module(model)), record


def apply_record(record: SurgeryRecord, model: nn.Module, *, same_tensors: bool = False) -> nn.Module:
    """Perform the surgery on ``model`` itself (meta tensors are cut in shape only) and return it.

    Everything is checked before anything is changed.

    Args:
        same_tensors: the parameters and buffers stay the objects that they are and get smaller, with their gradients:
            an optimizer, or whoever else refers to them, goes on with them.

    Raises:
        SurgeryError: ``model`` is not the one the record was made for; names the first difference.
    """
    check_fits(record, model)
    touched = _cut_tensors(model, record.tensors, shrink_tensors if same_tensors else replace_tensors)
    for path, change in record.attributes.items():
        owner = set_attribute(model, path, change.kept)
        if isinstance(owner, nn.Module):
            touched.append(owner)
    for path, norm in record.norms.items():
        _change_norm(model.get_submodule(path), norm)
    for module in dict.fromkeys(touched):
        _read_sizes_back(module)
    _leave_fused_layers(model)
    return model


def check_fits(record: SurgeryRecord, model: nn.Module) -> None:
    """Raise SurgeryError unless ``record`` was made for such a model."""
    tensors = named_tensors(model)
    for name, cut in record.tensors.items():
        for each in (name, *cut.aliases):
            if each not in tensors:
                raise SurgeryError(f"the record cuts {each!r}, which {type(model).__name__} does not have")
            if tuple(tensors[each].shape) != cut.shape:
                raise SurgeryError(
                    f"the record cuts {each!r} of shape {list(cut.shape)}, but {type(model).__name__} has it with "
                    f"shape {list(tensors[each].shape)}: the record belongs to another model"
                )
    for path, change in record.attributes.items():
        value = _get_attribute(model, path)
        if value != change.full:
            raise SurgeryError(
                f"the record changes {path!r} from {change.full} to {change.kept}, but {type(model).__name__} has "
                f"{value!r} there: the record belongs to another model"
            )
    for path, norm in record.norms.items():
        try:
            module = model.get_submodule(path)
        except AttributeError as error:
            raise SurgeryError(f"the record changes the norm {path!r}, which the model does not have") from error
        eps = None if norm.eps_name is None else getattr(module, norm.eps_name, None)
        if norm.eps_name is not None and (isinstance(eps, bool) or not isinstance(eps, (int, float, type(None)))):
            raise SurgeryError(f"the record reads {norm.eps_name!r} of the norm {path!r}, which is {eps!r:.80} there")
        if norm.eps_name is not None and not hasattr(module, norm.eps_name):
            raise SurgeryError(f"the record reads {norm.eps_name!r} of {path!r}, which {type(module).__name__} lacks")


def zero_units(model: nn.Module, groups: Iterable[PruningGroup]) -> dict[str, NDArray[np.int64]]:
    """Per prunable group the units whose ``zero`` slices are all exactly 0 (possibly none)."""
    tensors, chosen = named_tensors(model), [group for group in groups if group.prunable]
    for group in chosen:
        for s in group.with_role(Role.ZERO):
            if _tensor_of(tensors, group, s).device.type == "meta":
                raise SurgeryError(
                    f"{s.param!r} is on the meta device, so no value of it says which units of group {group.name!r} "
                    "are at zero; name them in construct_subnet(model, groups, removed)"
                )
    return masking.zero_units(chosen, tensors)


def plan(
    model: nn.Module,
    groups: Iterable[PruningGroup],
    removed: Mapping[str, Sequence[int]] | None = None,
    *,
    fold_norms: bool = False,
    rescale_norms: bool = True,
) -> SurgeryRecord:
    """What removing units does to ``model``, without doing it; arguments as in `construct_subnet`."""
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    listed = list(groups) if isinstance(groups, Iterable) else [groups]
    for group in listed:
        if not isinstance(group, PruningGroup):
            raise ConfigurationError(f"groups hold a {type(group).__name__}, expected what find_groups returns")
    if removed is not None and not isinstance(removed, Mapping):
        raise ConfigurationError(
            f"removed is a {type(removed).__name__}, expected a dict: group name -> units, or None"
        )
    by_name = {group.name: group for group in listed}
    tensors = named_tensors(model)
    first, aliases = ties(tensors)
    for group in by_name.values():
        for s in group.slices:
            _check_slice(model, tensors, group, s)
    wanted: Mapping[str, Sequence[int] | NDArray[np.int64]]
    wanted = zero_units(model, by_name.values()) if removed is None else removed
    units = {name: _chosen(by_name, name, chosen) for name, chosen in wanted.items()}
    if removed is None:
        units = {name: whole_multiples(by_name[name], chosen) for name, chosen in units.items()}
    for name, chosen in units.items():
        _check_multiple(by_name[name], len(chosen))
    units = {name: chosen for name, chosen in units.items() if len(chosen)}

    gone = removed_positions(by_name, units, first)
    while empty := [key for key, mask in gone.items() if mask.all()]:
        # Groups that overlap on a dim can empty it together though each keeps a unit.
        role, name, dim = empty[0]
        culprit = next(n for n in units if any(slice_key(s, first) == empty[0] for s in by_name[n].slices))
        staying = _staying(units[culprit][: by_name[culprit].multiple])
        logger.warning("%s: %s, or %s[%d] would be empty", culprit, staying, name, dim)
        units[culprit] = units[culprit][by_name[culprit].multiple :]
        units = {n: chosen for n, chosen in units.items() if len(chosen)}
        gone = removed_positions(by_name, units, first)

    cuts: dict[str, dict[int, Runs]] = {}
    attributes: dict[str, AttributeChange] = {}
    norm_sites: dict[str, tuple[int, NDArray[np.bool_]]] = {}
    for (role, name, dim), mask in gone.items():
        if role is Role.ATTRIBUTE:
            attributes[name] = AttributeChange(len(mask), int((~mask).sum()))
        elif role is Role.NORM:
            if name in norm_sites:
                raise SurgeryError(f"norm {name!r}: slices name the dims {norm_sites[name][0]} and {dim} of its input")
            norm_sites[name] = (dim, ~mask)
        else:
            cuts.setdefault(name, {})[dim] = to_runs(np.flatnonzero(~mask))
    zeroed = removed_positions(by_name, units, first, (Role.ZERO, Role.CONSUMER))
    follow: dict[str, dict[int, Runs]] = {}
    for (role, name, dim), mask in gone.items():
        if role.is_tensor:
            free = np.flatnonzero(mask & ~zeroed.get((role, name, dim), np.zeros_like(mask)))
            if len(free):
                follow.setdefault(name, {})[dim] = to_runs(free)
    record_tensors = {
        name: TensorCut(tuple(tensors[name].shape), dict(sorted(kept.items())), aliases[name], follow.get(name, {}))
        for name, kept in cuts.items()
    }
    rescaling = _Rescaling(rescale_norms, fold_norms)
    norms = {
        path: _plan_norm(model, path, dim, kept, record_tensors, rescaling) for path, (dim, kept) in norm_sites.items()
    }
    return SurgeryRecord(
        tensors=record_tensors,
        attributes=attributes,
        norms=norms,
        removed={name: to_runs(chosen) for name, chosen in units.items()},
        sizes={name: by_name[name].size for name in units},
        versions={"only_train_once": _library_version(), "torch": str(torch.__version__)},
    )


SliceKey: TypeAlias = "tuple[Role, str, int]"


def slice_key(s: ParamSlice, first: Mapping[str, str]) -> SliceKey:
    """Slices with the same key cut the same dim of the same thing, whatever their roles as tensors are."""
    return (Role.ZERO, first[s.param], s.dim) if s.role.is_tensor else (s.role, s.param, s.dim)


def removed_positions(
    groups: Mapping[str, PruningGroup],
    units: Mapping[str, NDArray[np.int64]],
    first: Mapping[str, str],
    roles: Collection[Role] = tuple(Role),
) -> dict[SliceKey, NDArray[np.bool_]]:
    """(length,) mask of what some group removes by slices of some roles, for every dim that loses anything."""
    gone: dict[SliceKey, NDArray[np.bool_]] = {}
    for name, chosen in units.items():
        for s in groups[name].with_role(*roles):
            gone.setdefault(slice_key(s, first), np.zeros(s.length, dtype=bool))[s.index[chosen].ravel()] = True
    return gone


def _chosen(
    groups: Mapping[str, PruningGroup], name: str, chosen: Sequence[int] | NDArray[np.int64]
) -> NDArray[np.int64]:
    """Units to remove from one group, valid, sorted, and never all of them."""
    if name not in groups:
        raise ConfigurationError(f"removed names the group {name!r}, which does not exist; known: {list(groups)}")
    group = groups[name]
    units = np.unique(_whole_numbers(name, chosen, group.size))
    if len(units) and (units[0] < 0 or units[-1] >= group.size):
        raise ConfigurationError(
            f"removed[{name!r}] names the unit {int(units[0] if units[0] < 0 else units[-1])}, "
            f"the group has the units 0 to {group.size - 1}"
        )
    if len(units) and not group.prunable:
        raise SurgeryError(f"group {name!r} is frozen ({group.reason}), no unit of it can be removed")
    if len(units) == group.size and group.size:
        staying = units[: group.size - group.most]
        logger.warning("%s: all %d units are to be removed; %s", name, group.size, _staying(staying))
        return units[len(staying) :]
    return units


def _staying(units: NDArray[np.int64]) -> str:
    return f"unit {units[0]} stays" if len(units) == 1 else f"units {units.tolist()} stay"


def whole_multiples(group: PruningGroup, units: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of ``units`` as many as may leave together (`PruningGroup.multiple`), from the first on."""
    count = len(units) // group.multiple * group.multiple
    if count < len(units):
        logger.warning("%s", staying_at_zero(group, len(units), count))
    return units[:count]


def staying_at_zero(group: PruningGroup, zero: int, leaving: int) -> str:
    """What to tell about units that are at zero and stay."""
    return (
        f"{group.name}: {zero - leaving} of {zero} units at zero stay in the subnet: units leave in multiples of "
        f"{group.multiple}"
    )


def _check_multiple(group: PruningGroup, count: int) -> None:
    if count % group.multiple:
        below = count // group.multiple * group.multiple
        raise SurgeryError(
            f"group {group.name!r}: {count} units are to be removed, but they leave in multiples of {group.multiple} "
            f"(an operator wants rows of such a length); remove {below} or {min(below + group.multiple, group.most)}"
        )


def _whole_numbers(name: str, chosen: Any, size: int) -> NDArray[np.int64]:
    """Units as given, or an error: a mask or a rounded score would remove the wrong ones without a word."""
    try:
        array = np.asarray(chosen)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged, or a tensor of another device
        raise ConfigurationError(f"removed[{name!r}] is {chosen!r:.80}, expected a list of units: {error}") from error
    if array.ndim == 1 and (array.dtype.kind in "iu" or not array.size):
        return array.astype(np.int64)
    way_out = "; give np.flatnonzero(mask) instead of a mask" if array.dtype.kind == "b" else ""
    raise ConfigurationError(
        f"removed[{name!r}] is {chosen!r:.80}, expected a list of units, whole numbers from 0 to {size - 1}{way_out}"
    )


def _tensor_of(tensors: Mapping[str, Tensor], group: PruningGroup, s: ParamSlice) -> Tensor:
    """The tensor of a slice, after checking that the slice fits it."""
    if s.param not in tensors:
        raise SurgeryError(f"group {group.name!r} cuts {s.param!r}, which the model does not have")
    tensor = tensors[s.param]
    if not 0 <= s.dim < tensor.ndim or tensor.shape[s.dim] != s.length:
        raise SurgeryError(
            f"group {group.name!r} expects {s.length} positions in dim {s.dim} of {s.param!r}, "
            f"which has shape {list(tensor.shape)}: the groups belong to another model"
        )
    return tensor


def _check_slice(model: nn.Module, tensors: Mapping[str, Tensor], group: PruningGroup, s: ParamSlice) -> None:
    if s.role.is_tensor:
        _tensor_of(tensors, group, s)
    elif s.role is Role.ATTRIBUTE:
        value = _get_attribute(model, s.param)
        if value != s.length:
            raise SurgeryError(f"group {group.name!r} expects {s.param} to be {s.length}, the model has {value!r}")
    else:
        try:
            model.get_submodule(s.param)
        except AttributeError as error:
            raise SurgeryError(f"group {group.name!r}: the model has no norm {s.param!r}") from error
    if s.index.size and (s.index.min() < 0 or s.index.max() >= s.length):
        raise SurgeryError(f"group {group.name!r}: {s} has positions outside of range({s.length})")


@functools.cache
def _library_version() -> str:
    try:
        return metadata.version("only_train_once")
    except metadata.PackageNotFoundError:  # a checkout on the path
        return "unknown"


# ----------------------------------------------------------------------------------------------------------------
# Tensors
# ----------------------------------------------------------------------------------------------------------------


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every name of every parameter and buffer, tied ones under each of their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def ties(tensors: Mapping[str, Tensor]) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """name -> first name of the same tensor, and first name -> its other names."""
    firsts: dict[int, str] = {}
    first = {name: firsts.setdefault(id(tensor), name) for name, tensor in tensors.items()}
    aliases: dict[str, tuple[str, ...]] = dict.fromkeys(firsts.values(), ())
    for name, leader in first.items():
        if name != leader:
            aliases[leader] = (*aliases[leader], name)
    return first, aliases


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter or buffer, and its name there."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def replace_tensors(model: nn.Module, new: Mapping[tuple[str, ...], Tensor]) -> None:
    """Put tensors (as parameters where the old ones are) at all their names, and wherever a module refers to them."""
    swapped: dict[int, tuple[Tensor, Tensor]] = {}  # the old one is kept alive, so that its id stays its own
    for names, tensor in new.items():
        module, leaf = owner_of(model, names[0])
        old = getattr(module, leaf)
        if isinstance(old, nn.Parameter):
            parameter = nn.Parameter(tensor, requires_grad=old.requires_grad)
            parameter.__dict__.update(old.__dict__)  # marks that users put on parameters
            tensor = parameter
        swapped[id(old)] = (old, tensor)
        for name in names:
            module, leaf = owner_of(model, name)
            setattr(module, leaf, tensor)  # setattr, because recurrent modules mirror their weights in it
    for part in model.modules():
        for key, value in vars(part).items():
            if id(value) in swapped:
                vars(part)[key] = swapped[id(value)][1]


@torch.no_grad()
def shrink_tensors(model: nn.Module, new: Mapping[tuple[str, ...], Tensor]) -> None:
    """Give the tensors themselves what stays of them.

    ``set_`` also drops the node that accumulates a parameter's gradient, which remembers its shape; assigning to
    ``.data`` would leave it, and the next backward pass would fail wherever an earlier graph is still alive.
    """
    for names, tensor in new.items():
        module, leaf = owner_of(model, names[0])
        getattr(module, leaf).set_(tensor)


def _cut_tensors(
    model: nn.Module,
    cuts: Mapping[str, TensorCut],
    put: Callable[[nn.Module, Mapping[tuple[str, ...], Tensor]], None] = replace_tensors,
) -> list[nn.Module]:
    """Put what stays of the tensors in their places; returns the modules that own them."""
    touched: list[nn.Module] = []
    new: dict[tuple[str, ...], Tensor] = {}
    gradients: list[tuple[Tensor, Tensor]] = []
    for name, cut in cuts.items():
        module, leaf = owner_of(model, name)
        names = (name, *cut.aliases)
        held = getattr(module, leaf)
        new[names] = _cut(held, cut)
        if held.grad is not None and put is shrink_tensors:
            gradients.append((held, _cut(held.grad, cut)))
            held.grad = None
        for each in names:
            # A parametrized weight belongs to the module above `parametrizations`.
            above, found, _ = f".{each}".partition(".parametrizations.")
            touched.append(model.get_submodule(above[1:] if found else each.rpartition(".")[0]))
    put(model, new)
    for held, gradient in gradients:
        held.grad = gradient
    for module in dict.fromkeys(touched):
        compute_weight(module)
    return touched


def compute_weight(module: nn.Module) -> None:
    """Compute a weight that is a plain attribute, as `nn.utils.weight_norm` has it, anew."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            with torch.no_grad():
                setattr(module, hook.name, hook.compute_weight(module))


def _cut(tensor: Tensor, cut: TensorCut) -> Tensor:
    out = tensor.detach()
    for dim, runs in cut.kept.items():
        if count(runs) < out.shape[dim]:
            out = out.index_select(dim, torch.from_numpy(from_runs(runs)).to(out.device))
    return out if out.is_sparse else out.clone(memory_format=layout_of(tensor))


def layout_of(tensor: Tensor) -> torch.memory_format:
    """Channels-last if the strides say so exactly (with a size of 1 a tensor can pass for both), else contiguous.

    Kernels are chosen by strides, so results are bit-equal only when these are kept.
    """
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.ndim)
    if layout is not None and (
        tensor.stride() == torch.empty(tensor.shape, device="meta", memory_format=layout).stride()
    ):
        return layout
    return torch.contiguous_format


# ----------------------------------------------------------------------------------------------------------------
# Attributes
# ----------------------------------------------------------------------------------------------------------------


def _locate(model: nn.Module, path: str) -> tuple[Any, str, int | None]:
    """Owner, attribute name and place in a sequence that a path like ``"a.b.sizes[1]"`` means."""
    match = ATTRIBUTE_PATH.fullmatch(path)
    if match is None:
        raise SurgeryError(f"{path!r} is no attribute path; expected one like 'attn.num_heads' or 'attn.sizes[1]'")
    owner: Any = model
    for part in (match["path"] or "").split("."):
        if part:
            if not hasattr(owner, part):
                raise SurgeryError(f"attribute {path!r}: {type(owner).__name__} has no {part!r}")
            owner = getattr(owner, part)
    return owner, match["name"], None if match["place"] is None else int(match["place"])


def _get_attribute(model: nn.Module, path: str) -> int:
    owner, name, place = _locate(model, path)
    value = getattr(owner, name, None)
    if place is not None and isinstance(value, (list, tuple)) and place < len(value):
        value = value[place]
    if isinstance(value, bool) or not isinstance(value, int):
        raise SurgeryError(f"attribute {path!r} of {type(model).__name__} is {value!r}, expected an int")
    return value


def set_attribute(model: nn.Module, path: str, value: int) -> Any:
    """Write an int; returns its owner."""
    owner, name, place = _locate(model, path)
    new: Any = value
    if place is not None:
        old = getattr(owner, name)
        entries = [*old[:place], value, *old[place + 1 :]]
        make: Callable[[list[int]], Any] = getattr(type(old), "_make", type(old))  # named tuples take fields
        new = make(entries)
    try:
        setattr(owner, name, new)
    except AttributeError as error:
        raise SurgeryError(f"attribute {path!r} cannot be set ({error}); freeze the axis it counts") from error
    return owner


def _conv(m: Any) -> dict[str, Any]:
    return {"out_channels": m.weight.shape[0], "in_channels": m.weight.shape[1] * m.groups}


def _conv_transpose(m: Any) -> dict[str, Any]:
    return {"in_channels": m.weight.shape[0], "out_channels": m.weight.shape[1] * m.groups}


def _num_features(m: Any) -> dict[str, Any]:
    held = [t for t in (m.weight, m.bias, m.running_mean) if t is not None]
    return {"num_features": held[0].shape[0]} if held else {}


def _normalized(m: Any) -> dict[str, Any]:
    return {} if m.weight is None else {"normalized_shape": tuple(m.weight.shape)}


def _embedding(m: Any) -> dict[str, Any]:
    rows, width = m.weight.shape
    if m.padding_idx is not None and m.padding_idx >= rows:
        raise SurgeryError(f"an embedding lost rows and its padding_idx {m.padding_idx} is not among the {rows} left")
    return {"num_embeddings": rows, "embedding_dim": width}


def _attention(m: Any) -> dict[str, Any]:
    packed = m.in_proj_weight is not None
    inner = m.in_proj_weight.shape[0] // 3 if packed else m.q_proj_weight.shape[0]
    outer = m.in_proj_weight.shape[1] if packed else m.q_proj_weight.shape[1]
    out = m.out_proj.weight.shape[1]
    if len({inner, outer, out}) != 1 or inner % m.num_heads:
        raise SurgeryError(
            f"nn.MultiheadAttention uses one embed_dim, divisible by num_heads={m.num_heads}, for what comes in and "
            f"for its heads, but after the cut its projections have {inner} inner, {outer} input and {out} channels to "
            "project from; freeze its heads or cut all of them alike"
        )
    return {
        "embed_dim": inner,
        "kdim": outer if packed else m.k_proj_weight.shape[1],
        "vdim": outer if packed else m.v_proj_weight.shape[1],
        "head_dim": inner // m.num_heads,
    }


def _recurrent(m: Any) -> dict[str, Any]:
    m.flatten_parameters()  # cuDNN reads all weights from one piece of memory
    state, hidden = m.weight_hh_l0.shape[1], m.weight_hh_l0.shape[0] // {"LSTM": 4, "GRU": 3}.get(m.mode, 1)
    return {"input_size": m.weight_ih_l0.shape[1], "hidden_size": hidden, "proj_size": state if m.proj_size else 0}


_SIZES: tuple[tuple[type | str, Callable[[Any], dict[str, Any]]], ...] = (
    (nn.Linear, lambda m: {"out_features": m.weight.shape[0], "in_features": m.weight.shape[1]}),
    (
        nn.Bilinear,
        lambda m: dict(zip(("out_features", "in1_features", "in2_features"), m.weight.shape, strict=True)),
    ),
    (nn.modules.conv._ConvTransposeNd, _conv_transpose),
    (nn.modules.conv._ConvNd, _conv),
    (nn.modules.batchnorm._NormBase, _num_features),
    (nn.GroupNorm, lambda m: {} if m.weight is None else {"num_channels": m.weight.shape[0]}),
    (nn.LayerNorm, _normalized),
    (nn.RMSNorm, _normalized),
    (nn.Embedding, _embedding),
    (nn.EmbeddingBag, _embedding),
    (nn.PReLU, lambda m: {"num_parameters": m.weight.numel()}),
    (nn.MultiheadAttention, _attention),
    (nn.RNNBase, _recurrent),
    (nn.RNNCellBase, lambda m: {"input_size": m.weight_ih.shape[1], "hidden_size": m.weight_hh.shape[1]}),
    ("Conv1D", lambda m: dict(zip(("nx", "nf"), m.weight.shape, strict=True))),  # transformers' transposed linear
)
"""Module type (or the name of a class that need not be importable) -> attributes as its tensors give them."""


def _read_sizes_back(module: nn.Module) -> None:
    names = {base.__name__ for base in type(module).__mro__}
    for kind, read in _SIZES:
        if kind in names if isinstance(kind, str) else isinstance(module, kind):
            # In training a spectral norm moves its buffers whenever somebody looks at the weight.
            modes = [(part, part.training) for part in module.modules()]
            try:
                module.eval()
                with torch.no_grad():
                    sizes = read(module)
            finally:
                for part, mode in modes:
                    part.training = mode
            for name, value in sizes.items():
                # A subclass may compute a size as a property; what it has no room for it does not read either.
                if name in vars(module):
                    setattr(module, name, value)
            return


# ----------------------------------------------------------------------------------------------------------------
# Norms
# ----------------------------------------------------------------------------------------------------------------


def _to_layer_norm(module: Any, norm: NormChange) -> None:
    _become(module, FullWidthLayerNorm, norm, normalized_shape=norm.shape, dim=norm.dim, offset=norm.offset)


def _to_rms_norm(module: Any, norm: NormChange) -> None:
    _become(module, FullWidthRMSNorm, norm, normalized_shape=norm.shape, dim=norm.dim, offset=norm.offset)


def _to_gated_rms_norm(module: Any, norm: NormChange) -> None:
    first = norm.kind == "rms of gated"
    shape, dim, offset = norm.shape, norm.dim, norm.offset
    _become(module, FullWidthGatedRMSNorm, norm, normalized_shape=shape, dim=dim, offset=offset, gate_first=first)


def _to_scaled_rms_norm(module: Any, norm: NormChange) -> None:
    _become(module, FullWidthScaledRMSNorm, norm, normalized_shape=norm.shape, dim=norm.dim, offset=norm.offset)


def _to_group_norm(module: Any, norm: NormChange) -> None:
    _become(module, FullWidthGroupNorm, norm, num_channels=norm.width, num_groups=norm.num_groups)


def _fewer_norm_groups(module: Any, norm: NormChange) -> None:
    module.num_channels, module.num_groups = norm.width, norm.num_groups


def _rescale(module: Any, norm: NormChange) -> None:
    """w x / √(S/N + ε) = (w √(N/n)) x / √(S/n + ε N/n), for S the sum of squares over the n kept channels."""
    weight = module.weight
    with torch.no_grad():
        if weight.device.type != "meta":
            weight.copy_(rescaled(weight, norm.offset, norm.full_width / norm.width))
    setattr(module, str(norm.eps_name), norm.eps)


def _to_response(module: Any, norm: NormChange) -> None:
    module.__class__ = FullWidthResponseNorm
    vars(module).update(full_width=norm.full_width, dim=norm.dim, eps=_eps_after(module, norm))


def _become(module: nn.Module, kind: type[nn.Module], norm: NormChange, **attributes: Any) -> None:
    """Change the class in place: hooks, parameters, mode and every reference to the module stay as they are."""
    state = vars(module)
    # What a class of the user's own calls otherwise.
    attributes |= {"full_width": norm.full_width, "eps": _eps_after(module, norm)}
    own = not isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm))
    if own:
        for name in ("weight", "bias"):
            tensor = getattr(module, name, None)
            if isinstance(tensor, Tensor) and tensor.numel() != math.prod(norm.shape):
                delattr(module, name)  # it was not cut, so the norm does not read it
        attributes["elementwise_affine"] = getattr(module, "weight", None) is not None
    missing = [name for name in ("weight", "bias") if own and getattr(module, name, None) is None]
    module.__class__ = kind
    for name in missing:
        state.pop(name, None)  # an ordinary attribute that is None
        module.register_parameter(name, None)
    state.update(attributes)


def _eps(module: nn.Module, name: str | None) -> float | None:
    value: float | None = None if name is None else getattr(module, name)
    return value


def _eps_after(module: nn.Module, norm: NormChange) -> float | None:
    return _eps(module, norm.eps_name) if norm.eps is None else norm.eps


def rescaled(weight: Tensor, offset: int, ratio: float) -> Tensor:
    """What a weight becomes when the mean square is taken over another number; 1 / ratio undoes it."""
    return (weight.detach().double() + offset) * math.sqrt(ratio) - offset


def _leave_fused_layers(model: nn.Module) -> None:
    """Make encoder layers of torch run operator by operator where their fused kernel would compute something else.

    The kernel normalizes over the width it finds. Tokens packed into nested tensors, in turn, run on nothing else, and
    it wants an even number of heads.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer)]
    for layer in layers:
        if any(isinstance(norm, (FullWidthLayerNorm, FullWidthRMSNorm)) for norm in (layer.norm1, layer.norm2)):
            layer.activation_relu_or_gelu = 0
    slow = {id(layer) for layer in layers if not layer.activation_relu_or_gelu or layer.self_attn.num_heads % 2}
    for encoder in (m for m in model.modules() if isinstance(m, nn.TransformerEncoder)):
        if any(id(layer) in slow for layer in encoder.layers):
            encoder.use_nested_tensor = False


_NORM_CHANGES: dict[str, Callable[[Any, NormChange], None]] = {
    "layer": _to_layer_norm,
    "rms": _to_rms_norm,
    "gated rms": _to_gated_rms_norm,
    "rms of gated": _to_gated_rms_norm,
    "scaled rms": _to_scaled_rms_norm,
    "rescale": _rescale,
    "group": _to_group_norm,
    "whole groups": _fewer_norm_groups,
    "response": _to_response,
}


def _change_norm(module: nn.Module, norm: NormChange) -> None:
    _NORM_CHANGES[norm.kind](module, norm)


def _plan_norm(
    model: nn.Module,
    path: str,
    dim: int,
    kept: NDArray[np.bool_],
    cuts: Mapping[str, TensorCut],
    rescaling: _Rescaling,
) -> NormChange:
    """The first change that makes the cut norm compute, in float64, what the full one does."""
    module = model.get_submodule(path)
    prefix = f"{path}." if path else ""
    own = {
        name.removeprefix(prefix): TensorCut(cut.shape, cut.kept)
        for first, cut in cuts.items()
        for name in (first, *cut.aliases)
        if name.startswith(prefix)
    }
    candidates = [*_norm_candidates(module, path, dim, kept, rescaling), *_response_candidates(module, dim, kept)]
    candidates.sort(key=lambda change: (change.kind == "response") is not _of_response(module))
    if any(t.device.type == "meta" for t in (*module.parameters(), *module.buffers())):
        logger.warning("norm %s: its tensors are on the meta device, the cut is not checked", path)
        return candidates[0]
    for candidate in candidates:
        if _norm_holds(module, candidate, dim, kept, own):
            return candidate
    raise SurgeryError(
        f"norm {path!r} ({type(module).__name__}) with {int(kept.sum())} of {len(kept)} channels left cannot be made "
        f"to compute what it computes in full; tried {list(dict.fromkeys((c.kind, c.offset) for c in candidates))}. "
        "Mark its width unprunable."
    )


class _Rescaling(NamedTuple):
    """Whether weight and eps of an RMS norm may be rescaled: at all, and where that rounds."""

    exact: bool
    rounded: bool


def _norm_candidates(
    module: Any, path: str, dim: int, kept: NDArray[np.bool_], rescaling: _Rescaling
) -> list[NormChange]:
    """Ways to try, the likeliest first."""
    width, full = int(kept.sum()), len(kept)
    remembered = getattr(module, "full_width", None)  # cut before
    eps_name = _eps_name(module)
    if isinstance(module, nn.GroupNorm):
        counts = kept.reshape(module.num_groups, -1).sum(axis=1)
        counts = counts[counts > 0]
        if len(set(counts.tolist())) != 1:
            raise SurgeryError(
                f"group norm {path!r} would keep {counts.tolist()} channels in its norm groups; every norm group has "
                "to keep the same number, or leave as a whole"
            )
        per_group = remembered or full // module.num_groups
        kind = "whole groups" if counts[0] * module.num_groups == full else "group"
        return [NormChange(kind, width, per_group, 1, (width,), num_groups=len(counts), eps_name=eps_name)]

    shape = list(getattr(module, "normalized_shape", (full,)))
    shape[dim if len(shape) > 1 else 0] = width
    offsets = (module.offset,) if isinstance(module, (FullWidthLayerNorm, FullWidthRMSNorm)) else (0, 1)
    gated = _GATED if _positional(module)[1] > 1 else ()
    layer, rms, scaled = (
        [
            NormChange(k, width, remembered or full, dim, form, offset=o, eps_name=eps_name, eps=e)
            for e in ((None,) if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) else _eps_values(module))
            for k in kinds
            for o in offsets
        ]
        for kinds, form in ((("layer",), tuple(shape)), ((*gated, "rms"), (width,)), (("scaled rms",), (width,)))
    )
    folded = []
    weight, eps = getattr(module, "weight", None), _eps(module, eps_name)
    if isinstance(weight, Tensor) and weight.shape == (full,) and isinstance(eps, float) and remembered is None:
        folded = [
            NormChange("rescale", width, full, dim, (width,), None, offset, eps_name, eps * full / width)
            for offset in (0, 1)
            if rescaling.rounded or (rescaling.exact and _exact_in_dtype(weight, offset, full / width))
        ]
    if isinstance(module, nn.LayerNorm):
        return [*layer, *rms]
    return [*folded, *rms, *scaled, *([] if isinstance(module, nn.RMSNorm) else layer)]


def _of_response(module: nn.Module) -> bool:
    """Whether its name says that a module is a global response norm: tried first, or last."""
    name = type(module).__name__.lower()
    return "response" in name or "grn" in name


def _response_candidates(module: nn.Module, dim: int, kept: NDArray[np.bool_]) -> list[NormChange]:
    """Ways to try for a norm of the user's own with scale and shift; its eps may be a number in its code."""
    own = [p for p in module.parameters(recurse=False) if p.numel() == len(kept)]
    if len(own) != 2 or isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)):
        return []
    width, eps_name = int(kept.sum()), _eps_name(module)
    full = getattr(module, "full_width", len(kept))  # cut before
    eps = _eps_values(module)
    return [NormChange("response", width, full, dim, (width,), eps_name=eps_name, eps=e) for e in eps]


_GATED = ("gated rms", "rms of gated")


def _positional(module: nn.Module) -> tuple[int, int]:
    """How many positional arguments the forward needs, and how many it takes."""
    found = inspect.signature(module.forward).parameters.values()
    named = [p for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return sum(p.default is p.empty for p in named), len(named)


def _exact_in_dtype(weight: Tensor, offset: int, ratio: float) -> bool:
    """Whether the rescaled weight survives its dtype: float64, or a ratio whose root is a power of two."""
    if weight.device.type == "meta":
        return weight.dtype is torch.float64
    exact = rescaled(weight, offset, ratio)
    error = (exact.to(weight.dtype).double() - exact).abs().max()
    return bool(error <= 1e-13 * (exact + offset).abs().max())


def _eps_name(module: nn.Module) -> str | None:
    """The attribute that holds a norm's eps: by its usual names, or the only small float there is."""
    state = vars(module)
    for name in ("eps", "variance_epsilon", "norm_eps", "epsilon", "layer_norm_eps"):
        if name in state:
            return name
    small = [name for name, value in state.items() if isinstance(value, float) and 0 < value < 0.1]
    return small[0] if len(small) == 1 else None


def norm_in_the_way(model: nn.Module, group: PruningGroup) -> str | None:
    """Why a norm of the user's own keeps the group from losing channels; None if nothing does, or if it is not known.

    Half of the units are tried with one norm of each kind. Torch's own classes are known, group norms may take other
    halves, and what is on the meta device has no values to be compared.
    """
    kinds: dict[tuple[Any, ...], ParamSlice] = {}
    for s in group.with_role(Role.NORM):
        norm = model.get_submodule(s.param)
        known = type(norm) in (nn.LayerNorm, nn.RMSNorm) or isinstance(norm, nn.GroupNorm)
        if not known and all(t.device.type != "meta" for t in (*norm.parameters(), *norm.buffers())):
            numbers = sorted((n, v) for n, v in vars(norm).items() if isinstance(v, (bool, int, float, str)))
            kinds.setdefault((type(norm), s.dim, s.length, *numbers), s)
    units = range(min(max(group.size // 2 // group.multiple, 1) * group.multiple, group.most))
    if not kinds or not units:
        return None
    tried = (*(s for s in group.slices if s.role is not Role.NORM), *kinds.values())
    try:
        plan(model, [replace(group, slices=tried)], {group.name: units})
    except SurgeryError as error:
        return str(error)
    return None


def _eps_values(module: nn.Module) -> tuple[float | None, ...]:
    """What to try for a norm of the user's own: None for what its attribute says, else the numbers in its code.

    Where those are not in the forward itself, one of the usual numbers may be what a function that it calls adds.
    """
    if _eps_name(module) is not None:
        return (None,)
    code = getattr(type(module).forward, "__code__", None)
    written = (c for c in getattr(code, "co_consts", ()) if isinstance(c, float) and 0 < c < 0.1)
    return (None, *dict.fromkeys((*written, 1e-6, 1e-5, 1e-8, 1e-12, 1e-7)))


def _norm_holds(
    module: nn.Module, change: NormChange, dim: int, kept: NDArray[np.bool_], cuts: Mapping[str, TensorCut]
) -> bool:
    """Whether full and cut norm agree where channels are left, on random values, zeros where they are removed.

    Weights are random too: ones or zeros would hide whether a class multiplies by w or by 1 + w.
    """
    generator = torch.Generator().manual_seed(0)
    full = copy_module(module).cpu().double().eval()
    for part in full.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    with torch.no_grad():
        for parameter in full.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator, dtype=torch.float64) + 0.5)
    try:
        cut = copy_module(full)
        touched = _cut_tensors(cut, cuts)
        _change_norm(cut, change)
        for owner in touched:
            _read_sizes_back(owner)
    except (TypeError, RuntimeError, AttributeError) as error:
        logger.debug("norm change %s does not apply: %s", change, error)
        return False
    positions = torch.from_numpy(np.flatnonzero(kept))
    gated = change.kind in _GATED or _positional(module)[0] > 1
    for shape in _norm_inputs(module, dim, len(kept)):
        if change.kind == "response" and len(shape) != 4:
            continue  # it is a norm of images
        x = torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5
        mask = torch.zeros(len(kept), dtype=torch.float64).index_fill_(0, positions, 1.0)
        x = x * mask.reshape([-1 if d == dim % len(shape) else 1 for d in range(len(shape))])
        results = []
        for scale in (1.0, 1e-3):  # the small one shows a wrong eps
            given = [x * scale]
            if gated:
                given.append(torch.randn(shape, generator=generator, dtype=torch.float64))
            small = [t.index_select(dim, positions) for t in given]
            try:
                with torch.no_grad(), in_float64():
                    expected = full(*given)
                    if not isinstance(expected, Tensor) or expected.shape != x.shape:
                        break
            except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):
                break  # not a shape this norm takes
            try:
                with torch.no_grad(), in_float64():
                    found = cut(*small)
            except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
                logger.debug("norm change %s does not run: %s", change, error)
                return False
            expected = expected.index_select(dim, positions)
            close = found.shape == expected.shape and bool(
                (found - expected).abs().max() <= _NORM_TOLERANCE * expected.abs().max()
            )
            results.append(close)
        if results:
            return all(results)
    return False


def _norm_inputs(module: Any, dim: int, width: int) -> list[tuple[int, ...]]:
    """Input shapes to try; channel-first norms take images most often."""
    tail = tuple(getattr(module, "normalized_shape", ()))
    if len(tail) > 1:
        return [(3, *tail)]
    ranks = (3, 2, 4, 5) if dim < 0 else (4, 3, 5, 2)
    sizes = (2, 3, 4, 5, 7)
    out = []
    for rank in ranks:
        if -rank <= dim < rank:
            shape = list(sizes[:rank])
            shape[dim] = width
            out.append(tuple(shape))
    return out
