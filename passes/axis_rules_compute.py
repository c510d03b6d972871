"""Says how products, norms, reductions and attention run on parts of their inputs, from shapes alone.

linear(x cut along tokens, w)                   ->  cut along tokens
matmul(k^T, v), both cut along tokens           ->  each rank's sum, and one all-reduce (linear attention)
softmax, layer_norm, mean along another axis    ->  cut as before

attention(q, k, v)
  all cut along tokens        all-to-all: heads are cut, tokens whole, in order rank by rank; and back
                              with a ring: tokens stay cut among its ranks, and keys and values pass around
  q cut, k and v whole        no communication: text that every rank has
  all cut along another axis  no communication: frames, windows
  fewer heads than ranks      k and v are gathered, and each rank attends with its own q
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from cachedit_fx.ring import ring_attention

from .axis_rules import As, Call, Step, operand_layout, operand_layouts, positive, rule
from .graph_values import target_name, tensor_of, value_of
from .layouts import Cut, Layout, Size

# ---------------------------------------------------------------------------------------------------------------------
# Products: each axis of an operand has a letter, as in einsum
# ---------------------------------------------------------------------------------------------------------------------

Letters = list[str]


@rule("linear", "matmul", "__matmul__", "bmm", "mm", "addmm", "baddbmm", "einsum")
def contraction(call: Call) -> Step | None:
    """Cut along a letter of the result; or along one that is summed over, and then the ranks' results are summed."""
    spelled = _spelled_einsum(call) if call.name == "einsum" else _spelled(call)
    if spelled is None:
        return None
    operands, letters, result, bias = spelled
    heads = _scores_by_heads(call, operands, letters)
    letter, cut = heads or _letter_of(call, operands, letters, result)
    if cut is None:
        return None
    layouts: dict[fx.Node, Layout] = {}
    for operand, names in zip(operands, letters, strict=True):
        axis = names.index(letter) if letter in names else None
        is_shared = axis is not None and (call.sizes(operand) or ())[axis] != 1
        layout = cut.at(axis) if axis is not None and is_shared else None
        if layouts.setdefault(operand, layout) != layout:
            return None  # one value as two operands, of which different axes must be cut
    if letter not in result:
        return call.step(None, layouts, is_partial=True) if bias is None else None
    made = cut.at(result.index(letter))
    if bias is not None:
        layouts |= operand_layouts(call, made, [bias], len(result))
    if cut.rows and heads is None:
        return call.step(made, layouts, handed_on=Cut(result.index(letters[0][-2]), cut.rows))
    return call.step(made, layouts)


Spelled = tuple[list[fx.Node], list[Letters], Letters, fx.Node | None]
"""Operands, the letters of each, the letters of the result, what is added."""


def _spelled(call: Call) -> Spelled | None:
    values: list[Any] = list(call.node.args) if call.name == "__matmul__" else list(call.arguments.values())
    bias = values.pop(0) if call.name in ("addmm", "baddbmm") else None
    left, right, *others = values
    a, b, out = call.sizes(left), call.sizes(right), call.sizes(call.node)
    if a is None or b is None or out is None or len(a) < 2 or len(b) < 2:
        return None
    if call.name == "linear":
        rows = [f"row {axis}" for axis in range(len(a) - 1)]
        bias = others[0] if others and isinstance(others[0], fx.Node) else None
        return [left, right], [[*rows, "inner"], ["column", "inner"]], [*rows, "column"], bias
    batch = [f"batch {axis}" for axis in range(max(len(a), len(b)) - 2)]
    first, second = (batch[len(batch) - len(sizes) + 2 :] for sizes in (a, b))
    return [left, right], [[*first, "row", "inner"], [*second, "inner", "column"]], [*batch, "row", "column"], bias


def _spelled_einsum(call: Call) -> Spelled | None:
    equation, *operands = call.node.args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    if not isinstance(equation, str) or "->" not in equation or "." in equation:
        return None
    inputs, _, result = equation.replace(" ", "").partition("->")
    letters = [list(each) for each in inputs.split(",")]
    if any(len(set(each)) < len(each) for each in letters):
        return None
    return [each for each in operands if isinstance(each, fx.Node)], letters, list(result), None


def _letter_of(
    call: Call, operands: Sequence[fx.Node], letters: Sequence[Letters], result: Letters
) -> tuple[str, Cut | None]:
    """The letter that the product is cut along, and the cut: one that an operand has, of the result if possible."""
    candidates = [
        (names[layout.axis], layout)
        for operand, names in zip(operands, letters, strict=True)
        if isinstance(layout := call.layout(operand), Cut)
    ]
    names = [name for name, _ in candidates]
    agreed = [each for each in candidates if names.count(each[0]) > 1]
    inside = (each for each in [*agreed, *candidates] if each[0] in result)
    return next(inside, candidates[0] if candidates else ("", None))


def _scores_by_heads(call: Call, operands: Sequence[fx.Node], letters: Sequence[Letters]) -> tuple[str, Cut] | None:
    """The letter of the heads, and their cut, for products of queries and keys, both cut along their tokens.

    Each rank then has the scores of its heads whole. Their product with the values is handed back along the rows.
    """
    if not _becomes_softmax(call.node):
        return None
    cuts = [layout for operand in operands if isinstance(layout := call.layout(operand), Cut)]
    if len(operands) != 2 or len(cuts) != 2 or any(len(cut.segments) > 1 for cut in cuts):
        return None
    first, second = letters
    if first[cuts[0].axis] in second or second[cuts[1].axis] in first:
        return None
    sizes = [call.sizes(operand) or [] for operand in operands]
    for axis, name in enumerate(first[:-2]):
        size = sizes[0][axis]
        if name in second and size == sizes[1][second.index(name)] and isinstance(size, int) and size >= call.ranks:
            return name, replace(Cut.along(axis, size), rows=cuts[0].segments)
    return None


def _becomes_softmax(node: fx.Node) -> bool:
    """Whether the node's value, perhaps scaled and masked, is the argument of a softmax."""
    for _ in range(8):
        users = list(node.users)
        if any(target_name(user) == "softmax" for user in users):
            return True
        if len(users) != 1:
            return False
        node = users[0]
    return False


# ---------------------------------------------------------------------------------------------------------------------
# Norms, reductions, look-ups
# ---------------------------------------------------------------------------------------------------------------------


@rule("layer_norm", "rms_norm")
def norm(call: Call) -> Step | None:
    """Over the last axes, which are not cut."""
    shape = call.arguments.get("normalized_shape")
    if call.source is None or not isinstance(shape, (list, tuple)):
        return None
    value, cut, sizes = call.source
    return call.step(cut, {value: cut}) if cut.axis < len(sizes) - len(shape) else None


@rule("group_norm", "instance_norm")
def norm_of_samples(call: Call) -> Step | None:
    """Samples are normed separately."""
    if call.source is None:
        return None
    value, cut, _ = call.source
    return call.step(cut, {value: cut}) if cut.axis == 0 else None


@rule("softmax", "log_softmax", "softmin", "normalize", "glu", "cumsum", "cumprod", "flip", "roll", "sort", "argsort",
      "topk", "index_select", "turned_pairs")  # fmt: skip
def along(call: Call) -> Step | None:
    """Work along other axes."""
    axes = _axes(call, default=-1 if call.name in ("glu", "sort", "argsort", "topk", "turned_pairs") else None)
    if call.source is None or not axes:
        return None
    value, cut, sizes = call.source
    is_free = all(positive(axis, len(sizes)) != cut.axis for axis in axes)
    return call.step(_each(call, cut), {value: cut}) if is_free else None


@rule("sum", "mean", "amax", "amin", "var", "std", "norm", "vector_norm", "prod", "all", "any", "argmax", "argmin",
      "logsumexp", "max", "min")  # fmt: skip
def reduction(call: Call) -> Step | None:
    """Over other axes; a sum over the axis adds up the ranks' sums."""
    axes = _axes(call)
    if call.source is None or axes is None:
        return None
    value, cut, sizes = call.source
    reduced = {positive(axis, len(sizes)) for axis in axes} or set(range(len(sizes)))
    if cut.axis in reduced:
        return call.step(None, {value: cut}, is_partial=True) if call.name == "sum" else None
    keeps = bool(call.argument(2, "keepdim", "keepdims", default=False))
    made = cut if keeps else cut.at(cut.axis - sum(axis < cut.axis for axis in reduced))
    return call.step(_each(call, made), {value: cut})


def _axes(call: Call, default: int | None = None) -> list[int] | None:
    """The axes that the node works along, empty if it does not say so; None if they are no plain numbers."""
    place = 2 if call.name in ("topk", "norm", "roll", "normalize") else 1
    given = call.node.kwargs.get("dims", call.argument(place, "dim", "axis", default=default))
    axes = list(given) if isinstance(given, (list, tuple)) else [] if given is None else [given]
    return axes if all(isinstance(axis, int) and not isinstance(axis, bool) for axis in axes) else None


def _each(call: Call, cut: Cut) -> Any:
    """The cut, for each of the node's results."""
    results = value_of(call.node)
    return (cut,) * len(results) if isinstance(results, (tuple, list)) else cut


@rule("gather", "take_along_dim")
def look_up(call: Call) -> Step | None:
    """Look-ups along another axis, with an index that has the axis too."""
    value, axis, index = call.first, call.argument(1, "dim"), call.argument(2, "index", "indices")
    sizes, indices = call.sizes(value), call.sizes(index)
    if sizes is None or indices is None or not isinstance(axis, int) or len(sizes) != len(indices):
        return None
    _, cut = call.cuts[0]
    is_free = positive(axis, len(sizes)) != cut.axis and sizes[cut.axis] == indices[cut.axis]
    return call.step(cut, {value: cut, index: cut}) if is_free else None


@rule("embedding")
def embedding(call: Call) -> Step | None:
    """Each index is looked up by the rank that has it."""
    index = call.arguments.get("input", call.arguments.get("indices"))
    cut = call.layout(index)
    return call.step(cut, {index: cut}) if isinstance(cut, Cut) and len(call.cuts) == 1 else None


@rule("conv1d", "conv2d", "conv3d")
def convolution(call: Call) -> Step | None:
    """Over samples; over positions if each looks at itself only."""
    kernel, result = call.sizes(call.argument(1, "weight")), call.sizes(call.node)
    if call.source is None or kernel is None or result is None or len(call.source[2]) != len(kernel):
        return None
    value, cut, sizes = call.source
    is_pointwise = all(size == 1 for size in kernel[2:]) and result[2:] == sizes[2:]
    return call.step(cut, {value: cut}) if cut.axis == 0 or (cut.axis > 1 and is_pointwise) else None


# ---------------------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------------------

QUERY, KEY, VALUE, MASK = "query", "key", "value", "attn_mask"


@rule("scaled_dot_product_attention")
def attention(call: Call) -> Step | None:
    """See the head of this file."""
    operands = _operands(call)
    sizes = [each for operand in operands if (each := call.sizes(operand)) is not None]
    if len(sizes) < 3 or any(len(each) != len(sizes[0]) for each in sizes):
        return None
    tokens = len(sizes[0]) - 2
    query, key, value = (call.layout(operand) for operand in operands)
    if not isinstance(query, Cut) or query.axis > tokens:
        return None
    if query.axis < tokens:
        return _batched(call, query, sizes)
    if key is None and value is None:
        return _own_queries(call, query, len(sizes[0]))
    if not isinstance(key, Cut) or key != value or key.axis != tokens:
        return None
    if call.ring == call.ranks:
        return _in_ring(call, query, key, None, sizes)
    axis = _heads(call, sizes, call.ranks // call.ring)
    if axis is None:
        return _own_queries(call, query, len(sizes[0]))
    return _in_ring(call, query, key, axis, sizes) if call.ring > 1 else _all_to_all(call, query, key, axis, sizes)


def _batched(call: Call, cut: Cut, sizes: Sequence[Sequence[Size]]) -> Step | None:
    """Each rank attends to its own samples, frames or heads."""
    if any(each[cut.axis] != cut.length for each in sizes):
        return None
    reads = {name: As(call.arguments[name], cut) for name in (QUERY, KEY, VALUE)}
    return _attention_step(call, reads, _mask(call, cut, len(sizes[0])), cut)


def _own_queries(call: Call, cut: Cut, rank: int) -> Step | None:
    """Each rank attends with its own queries to all keys."""
    if call.arguments.get("is_causal"):
        return None
    layouts = {QUERY: cut, KEY: None, VALUE: None}
    reads = {name: As(call.arguments[name], layout) for name, layout in layouts.items()}
    return _attention_step(call, reads, _mask(call, cut, rank), cut)


def _all_to_all(call: Call, query: Cut, key: Cut, axis: int, sizes: Sequence[Sequence[Size]]) -> Step | None:
    """Each rank attends with its own heads. Tokens come rank by rank, which only masks mind."""
    if call.arguments.get("is_causal") and (len(query.segments) > 1 or len(key.segments) > 1):
        return None
    heads = [Cut.along(axis, each[axis]) for each in sizes]
    reads = {
        name: As(call.arguments[name], cut, in_any_order=True)
        for name, cut in zip((QUERY, KEY, VALUE), heads, strict=True)
    }
    mask = _mask(call, heads[0], len(sizes[0]), query, key.at(key.axis + 1))
    return _attention_step(call, reads, mask, heads[0], query)


def _in_ring(call: Call, query: Cut, key: Cut, axis: int | None, sizes: Sequence[Sequence[Size]]) -> Step | None:
    """Keys and values pass by each rank's queries; with an axis, of the heads that its neighbours left to it."""
    is_causal, several = call.arguments.get("is_causal", False), len(query.segments) > 1 or len(key.segments) > 1
    is_plain = isinstance(is_causal, bool) and call.arguments.get("dropout_p", 0.0) == 0.0
    dtypes = {tensor.dtype for each in (*_operands(call), call.node) if (tensor := tensor_of(each)) is not None}
    if not is_plain or (is_causal and several) or len(dtypes) > 1:
        return None
    cuts = [query, key, key]
    if axis is not None:
        cuts = [replace(Cut.along(axis, each[axis]), is_of_ulysses=True) for each in sizes]
    reads = {
        name: As(call.arguments[name], cut, in_any_order=True)
        for name, cut in zip((QUERY, KEY, VALUE), cuts, strict=True)
    }
    mask = _mask(call, cuts[0] if axis is not None else None, len(sizes[0]), query, key.at(key.axis + 1))
    step = _attention_step(call, reads, mask, cuts[0], query if axis is not None else None)
    lengths = {"queries": query.segments, "keys": key.segments}
    return replace(step, target=ring_attention, kwargs=dict(step.kwargs) | lengths)


def _operands(call: Call) -> list[Any]:
    return [call.arguments.get(name) for name in (QUERY, KEY, VALUE)]


def _heads(call: Call, sizes: Sequence[Sequence[Size]], ranks: int) -> int | None:
    """The axis that is cut during attention: the heads, or another one that attention treats as a batch.

    With grouped heads, each rank needs the keys of its own queries: the ranks must divide both numbers.
    """
    for axis in reversed(range(len(sizes[0]) - 2)):
        queries, keys, values = (each[axis] for each in sizes)
        if isinstance(queries, int) and isinstance(keys, int) and keys == values and min(queries, keys) >= ranks:
            is_grouped = queries % ranks == keys % ranks == 0
            if queries == keys or (is_grouped and call.arguments.get("enable_gqa")):
                return axis
    return None


def _mask(call: Call, cut: Layout, rank: int, *orders: Cut) -> Any:
    """The mask for a result of `rank` axes that is cut so, with tokens in the order of the parts of `orders`.

    Without a cut the mask is whole.
    """
    mask = call.arguments.get(MASK)
    sizes = call.sizes(mask)
    if sizes is None or not isinstance(mask, fx.Node):
        return mask
    own = (operand_layout(order, sizes, rank) for order in orders if len(order.segments) > 1)
    layout = operand_layout(cut, sizes, rank) if cut is not None else None
    return As(mask, layout, orders=tuple(order for order in own if order is not None))


def _attention_step(call: Call, reads: Mapping[str, Any], mask: Any, made: Cut, handed_on: Cut | None = None) -> Step:
    """A step with these arguments by name, and the others as they are."""
    arguments = dict(reads) | {MASK: mask}
    args = tuple(arguments.get(name, each) for name, each in zip(call.arguments, call.node.args, strict=False))
    kwargs = {name: arguments.get(name, each) for name, each in call.node.kwargs.items()}
    return Step(args, kwargs, made, handed_on=handed_on)
