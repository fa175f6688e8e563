"""Operators that move, cut, join and repeat: the same operation on the ids."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..graph import Node
from ..labels import Dim, Label, Spread
from .memory import align_rows
from .registry import Context, rule, without_zeros

_SOME = 2_147_483_647  # a prime that no other size is a multiple of


@rule("aten.view", "aten._unsafe_view", "aten.reshape", "aten._reshape_alias", "aten.flatten", "aten.unflatten",
      "aten._reshape_copy")  # fmt: skip
def view(c: Context, node: Node) -> None:
    """Dims merge and split in row-major order; a run of dims is matched by equal products."""
    x, out = c.tensors(node)[0], node.outputs[0]
    assert out is not None
    c.set(node, reshape(c, node, c.dims(x), c.shape(x), c.shape(out)))


def reshape(c: Context, node: Node, dims: list[Dim], old: tuple[int, ...], new: tuple[int, ...]) -> list[Dim]:
    """What the dims of ``new`` carry when a tensor of shape ``old`` is read as ``new``."""
    result: list[Dim] = [None] * len(new)
    if old.count(0) == 1 and new.count(0) == 1:  # no token took this way; any other count would be read alike
        old, new = (tuple(_SOME if n == 0 else n for n in shape) for shape in (old, new))
    if math.prod(old) != math.prod(new) or 0 in old:
        for dim in dims:
            c.freeze(dim, f"is read as another type at {c.graph.where(node)}")
        return result
    left = [d for d, n in enumerate(old) if n > 1]
    right = [d for d, n in enumerate(new) if n > 1]
    i = j = 0
    while i < len(left):
        ins, outs = [left[i]], [right[j]]
        a, b = old[left[i]], new[right[j]]
        while a != b:
            if a < b:
                i += 1
                ins.append(left[i])
                a *= old[left[i]]
            else:
                j += 1
                outs.append(right[j])
                b *= new[right[j]]
        i, j = i + 1, j + 1
        if len(ins) == 1 and len(outs) == 1:
            result[outs[0]] = dims[ins[0]]
            continue
        if a % _SOME == 0:
            for k in ins:
                c.freeze(dims[k], f"is merged with a dim of no entries at {c.graph.where(node)}")
            continue
        labels = [d if isinstance(d, Label) else None for d in (dims[k] for k in ins)]
        merged = labels[0] if len(ins) == 1 else c.store.merge(labels, [old[k] for k in ins])
        if merged is None:
            continue
        parts = [merged] if len(outs) == 1 else c.store.split(merged, [new[k] for k in outs])
        for k, part in zip(outs, parts, strict=True):
            result[k] = part
    return result


@rule("aten.permute", "aten.transpose", "aten.t", "aten.swapaxes", "aten.movedim", "aten.numpy_T", "aten.permute_copy",
      "aten.transpose_copy", "aten.t_copy")  # fmt: skip
def permute(c: Context, node: Node) -> None:
    x = c.tensors(node)[0]
    rank = c.rank(x)
    order = list(range(rank))
    kind = node.name.removesuffix("_copy")
    if kind == "aten.permute":
        order = [int(d) % rank for d in node.argument("dims")]
    elif kind == "aten.numpy_T":
        order.reverse()
    elif kind == "aten.movedim":
        sources, places = ([int(d) % rank for d in _listed(node.argument(a))] for a in ("source", "destination"))
        order = [d for d in order if d not in sources]
        for place, source in sorted(zip(places, sources, strict=True)):
            order.insert(place, source)
    elif rank > 1:
        name = "axis" if kind == "aten.swapaxes" else "dim"
        a, b = (0, 1) if kind == "aten.t" else (int(node.argument(f"{name}{i}")) % rank for i in (0, 1))
        order[a], order[b] = order[b], order[a]
    dims = c.dims(x)
    c.set(node, [dims[d] for d in order])


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


@rule("aten.unsqueeze", "aten.unsqueeze_copy")
def unsqueeze(c: Context, node: Node) -> None:
    x = c.tensors(node)[0]
    dims = list(c.dims(x))
    dims.insert(int(node.argument("dim")) % (len(dims) + 1), None)
    c.set(node, dims)


@rule("aten.squeeze", "aten.squeeze_copy")
def squeeze(c: Context, node: Node) -> None:
    x = c.tensors(node)[0]
    wanted = node.argument("dim")
    rank = c.rank(x)
    if wanted is None:
        gone = set(range(rank))
    else:
        gone = {int(d) % max(rank, 1) for d in (wanted if isinstance(wanted, (list, tuple)) else [wanted])}
    for k in gone:
        label = c.label(x, k) if k < rank else None
        if label is not None:  # a single index would be taken for a dim to drop
            c.store.freeze(label.ids[:2], f"more than one index has to be left at {c.graph.where(node)}")
    c.set(node, [d for k, d in enumerate(c.dims(x)) if not (k in gone and c.shape(x)[k] == 1)])


@rule("aten.expand", "aten.broadcast_to")
def expand(c: Context, node: Node) -> None:
    """A dim that is repeated takes any label: it is the same value everywhere, also where a unit was removed.

    Where the code took its size from a labelled dim, it is that label; where it repeated a mask as often as an
    attribute says, the ids are those that the attribute counts.
    """
    x, out = c.tensors(node)[0], node.outputs[0]
    assert out is not None
    shape, offset = c.shape(out), len(c.shape(out)) - c.rank(x)
    dims: list[Dim] = []
    for d, n in enumerate(shape):
        own = d - offset
        repeated = own < 0 or c.shape(x)[own] != n
        dims.append(_repeated(c, x, out, d) if repeated and n > 1 else c.dim(x, own) if own >= 0 else None)
    c.set(node, dims)


def _repeated(c: Context, x: int, out: int, d: int) -> Dim:
    said = c.sizes.get((out, d))
    source = c.label(*said.args) if said is not None and said.kind == "dim" else None
    if source is not None and len(source) == c.shape(out)[d]:
        return source.with_zero(False)
    plain = not any(isinstance(dim, Label) for dim in c.dims(x))  # a mask, and no channels that are repeated
    if plain and said is not None and said.kind == "attr":
        return c.store.fresh(c.shape(out)[d], False)
    return Spread((out, d))


@rule("aten.repeat")
def repeat(c: Context, node: Node) -> None:
    x = c.tensors(node)[0]
    times = list(node.argument("repeats"))
    offset = len(times) - c.rank(x)
    dims: list[Dim] = []
    for d, n in enumerate(times):
        label = c.label(x, d - offset) if d >= offset else None
        dims.append(label if label is None or n == 1 else Label(np.tile(label.ids, n), np.tile(label.zero, n)))
    c.set(node, dims)


@rule("aten.repeat_interleave")
def repeat_interleave(c: Context, node: Node) -> None:
    tensors, times, dim = c.tensors(node), node.argument("repeats"), node.argument("dim")
    if len(tensors) != 1 or not isinstance(times, int) or dim is None:
        c.freeze_node(node, "is repeated by data")
        return
    dims = list(c.dims(tensors[0]))
    label = dims[int(dim)]
    if isinstance(label, Label):
        dims[int(dim)] = Label(np.repeat(label.ids, times), np.repeat(label.zero, times))
    c.set(node, dims)


@rule("aten.slice", "aten.slice_copy")
def slice_(c: Context, node: Node) -> None:
    x = c.tensors(node)[0]
    dims = list(c.dims(x))
    dim = int(node.argument("dim")) % len(dims)
    label = dims[dim]
    start, end, step = (node.argument(name) for name in ("start", "end", "step"))
    cut = slice(start, end, step)
    whole = cut.indices(c.shape(x)[dim]) == (0, c.shape(x)[dim], 1)
    if isinstance(label, Label) and not whole:
        first, last, _ = cut.indices(c.shape(x)[dim])
        if step != 1 and (len(label) % step or first >= step or last != len(label)):
            c.freeze(label, f"every {step}th index is taken at {c.graph.where(node)}")
            label = None
        elif step != 1:  # every block of `step` indices leaves whole, so that the same one of each is taken again
            for offset in range(1, step):
                c.store.equal(label.ids[::step], label.ids[offset::step])
            label = label.take(cut)
        else:
            if not (c.stated(x, dim, first) and c.stated(x, dim, last)):
                c.freeze(label, f"it is not known how {first}:{last} was chosen at {c.graph.where(node)}")
            label = label.take(cut)
    dims[dim] = label if not isinstance(label, Spread) or whole else None
    c.set(node, dims)


@rule("aten.select", "aten.select_copy")
def select(c: Context, node: Node) -> None:
    x = c.tensors(node)[0]
    dims = list(c.dims(x))
    picked = dims.pop(int(node.argument("dim")) % len(dims))
    made = node.outputs[0]
    read = made in c.consumers or made in c.graph.outputs
    if read or node.argument("index") != 0:  # `weight[0].numel()` asks for sizes alone
        c.freeze(picked, f"one index is picked at {c.graph.where(node)}")
    c.set(node, dims)


@rule("aten.unbind", "aten.unbind_copy")
def unbind(c: Context, node: Node) -> None:
    x = c.tensors(node)[0]
    dims = list(c.dims(x))
    c.freeze(dims.pop(int(node.argument("dim")) % len(dims)), f"every index is used apart at {c.graph.where(node)}")
    for output in range(len(node.outputs)):
        c.set(node, dims, output)


@rule("aten.split", "aten.split_with_sizes", "aten.chunk", "aten.tensor_split", "aten.unsafe_split",
      "aten.unsafe_chunk", "aten.split_with_sizes_copy", "aten.split_copy")  # fmt: skip
def split(c: Context, node: Node) -> None:
    x = c.tensors(node)[0]
    dim = int(node.argument("dim")) % c.rank(x)
    position = 0
    for output, made in enumerate(node.outputs):
        assert made is not None
        size = c.shape(made)[dim]
        if not c.stated(x, dim, position):
            c.freeze(c.dim(x, dim), f"it is not known how the sizes were chosen at {c.graph.where(node)}")
        dims = list(c.dims(x))
        label = dims[dim]
        dims[dim] = label.take(slice(position, position + size)) if isinstance(label, Label) else None
        c.set(node, dims, output)
        position += size


@rule("aten.cat", "aten.concat", "aten.concatenate")
def cat(c: Context, node: Node) -> None:
    """Ids are laid side by side; a part of fixed size gets ids that have to stay."""
    out = node.outputs[0]
    assert out is not None
    parts = [x for x in c.tensors(node) if c.rank(x) == c.rank(out)]  # an empty 1-d tensor joins anything
    dim = int(node.argument("dim")) % c.rank(out)
    dims = list(c.dims(parts[0]))
    for x in parts[1:]:
        for d in range(c.rank(x)):
            if d != dim:
                joined = c.tie(dims[d], c.dim(x, d), node)
                dims[d] = joined
    labels = [c.label(x, dim) for x in parts]
    dims[dim] = None
    if any(label is not None for label in labels):
        sized = [
            label if label is not None else _fixed(c, node, c.shape(x)[dim])
            for x, label in zip(parts, labels, strict=True)
        ]
        dims[dim] = Label(np.concatenate([s.ids for s in sized]), np.concatenate([s.zero for s in sized]))
    c.set(node, dims)


def _fixed(c: Context, node: Node, size: int) -> Label:
    label = c.store.fresh(size, False)
    c.freeze(label, f"a part of fixed size joins at {c.graph.where(node)}")
    return label


@rule("aten.stack")
def stack(c: Context, node: Node) -> None:
    parts, out = c.tensors(node), node.outputs[0]
    assert out is not None
    dims = list(c.dims(parts[0]))
    for x in parts[1:]:
        dims = [c.tie(a, b, node) for a, b in zip(dims, c.dims(x), strict=True)]
    dims.insert(int(node.argument("dim")) % c.rank(out), None)
    c.set(node, dims)


@rule("aten.constant_pad_nd", "aten.pad", "aten.reflection_pad1d", "aten.reflection_pad2d", "aten.reflection_pad3d",
      "aten.replication_pad1d", "aten.replication_pad2d", "aten.replication_pad3d")  # fmt: skip
def pad(c: Context, node: Node) -> None:
    """Constant padding of an axis adds indices that have to stay; other padding of it freezes."""
    x = c.tensors(node)[0]
    amounts = list(node.argument("pad") or node.argument("padding"))
    constant = node.name == "aten.constant_pad_nd" or node.argument("mode") == "constant"
    value = float(node.argument("value", 0.0) or 0.0) if constant else None
    dims = list(c.dims(x))
    for pair in range(len(amounts) // 2):
        before, after = amounts[2 * pair], amounts[2 * pair + 1]
        d = len(dims) - 1 - pair
        label = dims[d]
        if isinstance(label, Label):
            if value is None or before < 0 or after < 0:
                c.freeze(label, f"is padded from its own values or cut at {c.graph.where(node)}")
                dims[d] = None
            elif before or after:
                left, right = _fixed(c, node, before), _fixed(c, node, after)
                dims[d] = Label(
                    np.concatenate([left.ids, label.ids, right.ids]),
                    np.concatenate([left.zero, label.zero, right.zero]),
                )
        elif isinstance(label, Spread) and (before or after):
            dims[d] = None
    if value:
        dims = without_zeros(dims)
    c.set(node, dims)


@rule("aten.flip")
def flip(c: Context, node: Node) -> None:
    x = c.tensors(node)[0]
    dims = list(c.dims(x))
    for d in node.argument("dims"):
        label = dims[d]
        if isinstance(label, Label):
            dims[d] = label.take(slice(None, None, -1))
    c.set(node, dims)


@rule("aten.roll")
def roll(c: Context, node: Node) -> None:
    x = c.tensors(node)[0]
    moved = list(node.argument("dims")) or list(range(c.rank(x)))
    c.keep(node, x, fixed=moved, why="is shifted by a fixed count")


@rule("aten.tril", "aten.triu")
def triangle(c: Context, node: Node) -> None:
    x = c.tensors(node)[0]
    c.keep(node, x, fixed=(-2, -1), why="its position decides what is masked")


@rule("aten.unfold", "aten.unfold_copy")
def unfold(c: Context, node: Node) -> None:
    x = c.tensors(node)[0]
    dims = list(c.dims(x))
    d = int(node.argument("dimension")) % len(dims)
    c.freeze(dims[d], f"is cut into windows at {c.graph.where(node)}")
    dims[d] = None
    c.set(node, [*dims, None])


@rule("aten.as_strided")
def as_strided(c: Context, node: Node) -> None:
    """The same shape in a dense layout is the same tensor; anything else is opaque."""
    x, out = c.tensors(node)[0], node.outputs[0]
    assert out is not None
    if c.shape(out) == c.shape(x) and _is_dense(c.shape(x), list(node.argument("stride"))):
        c.keep(node, x)
    else:
        c.freeze_node(node, "memory is read by strides")


def _is_dense(shape: tuple[int, ...], strides: list[int]) -> bool:
    rank = len(shape)
    layouts = [list(range(rank))]
    if rank in (4, 5):
        layouts.append([0, *range(2, rank), 1])  # channels last
    for order in layouts:
        expected, stride = [0] * rank, 1
        for d in reversed(order):
            expected[d] = stride
            stride *= shape[d]
        if all(n == 1 or a == b for n, a, b in zip(shape, expected, strides, strict=True)):
            return True
    return False


@rule("aten.pixel_shuffle", "aten.pixel_unshuffle")
def pixel_shuffle(c: Context, node: Node) -> None:
    """r * r consecutive channels become one, or the other way round."""
    x = c.tensors(node)[0]
    dims = list(c.dims(x))
    label = dims[-3]
    r = int(node.argument("upscale_factor") or node.argument("downscale_factor"))
    for d in (-1, -2):
        c.freeze(dims[d], f"space and channels are mixed at {c.graph.where(node)}")
        dims[d] = None
    if isinstance(label, Label):
        if node.name == "aten.pixel_unshuffle":
            dims[-3] = Label(np.repeat(label.ids, r * r), np.repeat(label.zero, r * r))
        else:
            channels, *inner = c.store.split(label, [len(label) // (r * r), r, r])
            for part in inner:
                c.freeze(part, f"fills a block of pixels at {c.graph.where(node)}")
            dims[-3] = channels
    c.set(node, dims)


@rule("aten.channel_shuffle", "aten.native_channel_shuffle")
def channel_shuffle(c: Context, node: Node) -> None:
    x = c.tensors(node)[0]
    dims = list(c.dims(x))
    label, groups = dims[1], int(node.argument("groups"))
    if isinstance(label, Label):
        outer, inner = c.store.split(label, [groups, len(label) // groups])
        c.freeze(outer, f"the count of groups is fixed at {c.graph.where(node)}")
        dims[1] = c.store.merge([inner, outer], [len(label) // groups, groups])
    c.set(node, dims)


@rule("aten.view_as_complex")
def view_as_complex(c: Context, node: Node) -> None:
    """Pairs of neighbours are read as numbers, without a copy: rows are whole pairs."""
    x = c.tensors(node)[0]
    align_rows(c, x, 2)
    dims = list(c.dims(x))
    c.freeze(dims.pop(), f"becomes real and imaginary part at {c.graph.where(node)}")
    c.set(node, dims)


@rule("aten.view_as_real")
def view_as_real(c: Context, node: Node) -> None:
    c.set(node, [*c.dims(c.tensors(node)[0]), None])


@rule("aten.glu")
def glu(c: Context, node: Node) -> None:
    """First half times the sigmoid of the second: zero where the first half is."""
    x = c.tensors(node)[0]
    dims = list(c.dims(x))
    d = int(node.argument("dim", -1)) % len(dims)
    label = dims[d]
    if isinstance(label, Label):
        half = len(label) // 2
        value, gate = label.take(slice(0, half)), label.take(slice(half, None))
        c.store.equal(value.ids, gate.ids)
        dims[d] = value
    c.set(node, dims)


@rule("aten.diagonal", "aten.diagonal_copy")
def diagonal(c: Context, node: Node) -> None:
    x = c.tensors(node)[0]
    rank = c.rank(x)
    gone = {int(node.argument("dim1")) % rank, int(node.argument("dim2")) % rank}
    dims = c.dims(x)
    for d in gone:
        c.freeze(dims[d], f"a diagonal is taken at {c.graph.where(node)}")
    c.set(node, [*(d for k, d in enumerate(dims) if k not in gone), None])
