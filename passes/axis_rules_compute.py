"""Says how products, norms, reductions and attention run on parts of their inputs, from shapes alone.

    linear(x cut along tokens, w)                   ->  cut along tokens
    matmul(k^T, v), both cut along tokens           ->  each rank's sum, and one all-reduce (linear attention)
    softmax, layer_norm, mean along another axis    ->  cut as before

    attention(q, k, v)
      all cut along tokens        all-to-all: heads are cut, tokens whole, in order rank by rank; and back
      q cut, k and v whole        no communication: text that every rank has
      all cut along another axis  no communication: frames, windows
      fewer heads than ranks      k and v are gathered, and each rank attends with its own q
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from .axis_rules import As, Call, Step, operand_layout, positive, rule, source_of
from .graph_values import target_name, value_of
from .layouts import Cut, Layout, Size

# ---------------------------------------------------------------------------------------------------------------------
# Products: each axis of an operand has a letter, as in einsum
# ---------------------------------------------------------------------------------------------------------------------

Letters = list[str]


@rule("linear", "matmul", "__matmul__", "bmm", "mm", "mv", "addmm", "baddbmm", "einsum")
def contraction(call: Call) -> Step | None:
    """Cut along a letter of the result; or along one that is summed over, and then the ranks' results are summed."""
    spelled = _spelled(call)
    if spelled is None:
        return None
    operands, letters, result, bias = spelled
    heads = _scores_by_heads(call, operands, letters)
    letter, cut = heads or _letter_of(call, operands, letters, result)
    if cut is None:
        return None
    layouts: dict[Any, Layout] = {}
    for operand, names in zip(operands, letters, strict=True):
        sizes = call.sizes(operand)
        axis = names.index(letter) if letter in names else None
        wanted = cut.at(axis) if axis is not None and sizes is not None and sizes[axis] != 1 else None
        if layouts.setdefault(operand, wanted) != wanted:
            return None  # one value as two operands that must be cut differently
    if letter not in result:
        return None if bias is not None else call.step(None, layouts, is_partial=True)
    made = cut.at(result.index(letter))
    if bias is not None:
        sizes = call.sizes(bias)
        assert sizes is not None
        layouts[bias] = operand_layout(made, sizes, len(result))
    if cut.rows and heads is None:
        return call.step(replace(made, rows=()), layouts, handed_on=Cut(len(result) - 2, cut.rows))
    return call.step(made, layouts)


def _spelled(call: Call) -> tuple[list[fx.Node], list[Letters], Letters, fx.Node | None] | None:
    """(operands, the letters of each, the letters of the result, what is added); None for forms that are not known."""
    name, node = target_name(call.node), call.node
    if name == "einsum":
        return _spelled_einsum(call)
    values = list(call.arguments.values()) if name != "__matmul__" else list(node.args)
    bias = values.pop(0) if name in ("addmm", "baddbmm") else None
    if len(values) < 2:
        return None
    left, right = values[:2]
    a, b, out = call.sizes(left), call.sizes(right), call.sizes(node)
    if a is None or b is None or out is None or not a or not b or len(b) < (1 if name == "linear" else 2) or len(a) < 2:
        return None
    if name == "linear":
        bias = values[2] if len(values) > 2 and isinstance(values[2], fx.Node) else None
        rows = [f"i{axis}" for axis in range(len(a) - 1)]
        columns = ["n"] if len(b) == 2 else []
        return [left, right], [[*rows, "k"], [*columns, "k"]], [*rows, *columns], bias
    rank = max(len(a), len(b)) - 2
    batch = [f"i{axis}" for axis in range(rank)]
    first, second = batch[rank - (len(a) - 2) :], batch[rank - (len(b) - 2) :]
    return [left, right], [[*first, "m", "k"], [*second, "k", "n"]], [*batch, "m", "n"], bias


def _spelled_einsum(call: Call) -> tuple[list[fx.Node], list[Letters], Letters, None] | None:
    equation, *operands = call.node.args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    if not isinstance(equation, str) or "->" not in equation or "." in equation:
        return None
    inputs, _, result = equation.replace(" ", "").partition("->")
    letters = [list(each) for each in inputs.split(",")]
    if len(letters) != len(operands) or any(len(set(each)) < len(each) for each in letters):
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


def _scores_by_heads(
    call: Call, operands: Sequence[fx.Node], letters: Sequence[Letters]
) -> tuple[str, Cut] | None:
    """The letter of the heads, and their cut, for products of queries and keys, both cut along their tokens.

    Each rank then has the scores of its heads whole. Their product with the values is handed back along the rows.
    """
    cuts = [call.layout(operand) for operand in operands]
    if len(operands) != 2 or not all(isinstance(cut, Cut) and len(cut.segments) == 1 for cut in cuts):
        return None
    rows, columns = (names[cut.axis] for names, cut in zip(letters, cuts, strict=True))
    sizes = [call.sizes(operand) or [] for operand in operands]
    if rows in letters[1] or columns in letters[0]:
        return None
    for name in reversed(letters[0]):
        counts = [sizes[at][names.index(name)] for at, names in enumerate(letters) if name in names]
        is_shared = len(counts) == 2 and counts[0] == counts[1]
        if is_shared and name != letters[0][-1] and isinstance(counts[0], int) and counts[0] >= call.ranks:
            return name, replace(Cut.along(letters[0].index(name), counts[0]), rows=cuts[0].segments)
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Norms, reductions, look-ups
# ---------------------------------------------------------------------------------------------------------------------


@rule("layer_norm", "rms_norm", "fused_layer_norm", "fused_rms_norm")
def norm(call: Call) -> Step | None:
    """Over the last axes, which are not cut."""
    source, shape = source_of(call), call.arguments.get("normalized_shape")
    if source is None or not isinstance(shape, (list, tuple)):
        return None
    value, cut, sizes = source
    return call.step(cut, {value: cut}) if cut.axis < len(sizes) - len(shape) else None


@rule("group_norm", "batch_norm", "instance_norm")
def batch_axis_norm(call: Call) -> Step | None:
    """Samples are normed separately."""
    source = source_of(call)
    if source is None or target_name(call.node) == "batch_norm":
        return None
    value, cut, _ = source
    return call.step(cut, {value: cut}) if cut.axis == 0 else None


@rule(
    "softmax", "log_softmax", "_softmax", "normalize", "cumsum", "glu", "flip", "roll", "sort", "argsort", "topk",
    "index_select", "one_hot", "cumprod", "softmin", "renorm", "cosine_similarity", "rotate_half",
)  # fmt: skip
def along(call: Call) -> Step | None:
    """Work along other axes."""
    source, axes = source_of(call), _axes(call)
    if source is None or axes is None:
        return None
    value, cut, sizes = source
    if cut.axis in {positive(axis, len(sizes)) for axis in axes}:
        return None
    results = value_of(call.node)
    return call.step((cut,) * len(results) if isinstance(results, (tuple, list)) else cut, {value: cut})


@rule(
    "sum", "mean", "amax", "amin", "var", "std", "norm", "vector_norm", "prod", "all", "any", "argmax", "argmin",
    "logsumexp", "linalg_vector_norm", "max", "min", "median",
)  # fmt: skip
def reduction(call: Call) -> Step | None:
    """Over other axes; a sum over the axis adds up the ranks' sums."""
    source, axes = source_of(call), _axes(call)
    if source is None:
        return None
    value, cut, sizes = source
    reduced = set(range(len(sizes))) if not axes else {positive(axis, len(sizes)) for axis in axes}
    if cut.axis in reduced:
        is_sum = target_name(call.node) == "sum"
        return call.step(None, {value: cut}, is_partial=True) if is_sum else None
    keeps = bool(call.arguments.get("keepdim", call.node.kwargs.get("keepdims", False)))
    made = cut if keeps else cut.at(cut.axis - sum(axis < cut.axis for axis in reduced))
    results = value_of(call.node)
    return call.step((made,) * len(results) if isinstance(results, (tuple, list)) else made, {value: cut})


def _axes(call: Call) -> list[int] | None:
    """The axes that the node works along; None if it does not say so."""
    arguments = call.arguments
    names = ("dim", "dims", "axis")
    given = next((arguments[name] for name in names if arguments.get(name) is not None), None)
    if given is None and len(call.node.args) > 1 and target_name(call.node) in ("mean", "sum", "max", "min", "std", "var"):
        given = call.node.args[1]
    if given is None and target_name(call.node) in ("glu", "topk", "sort", "argsort"):
        given = -1
    axes = list(given) if isinstance(given, (list, tuple)) else [given]
    return axes if all(isinstance(axis, int) and not isinstance(axis, bool) for axis in axes) else None


@rule("gather", "take_along_dim")
def look_up(call: Call) -> Step | None:
    """Look-ups along another axis, with an index that has the axis too."""
    arguments = list(call.arguments.values())
    value, axis, index = (*arguments, None, None, None)[:3]
    sizes, indices = call.sizes(value), call.sizes(index)
    if sizes is None or indices is None or not isinstance(axis, int) or len(sizes) != len(indices):
        return None
    _, cut = call.cuts[0]
    if positive(axis, len(sizes)) == cut.axis or sizes[cut.axis] != indices[cut.axis]:
        return None
    return call.step(cut, {value: cut, index: cut})


@rule("embedding")
def embedding(call: Call) -> Step | None:
    """Each index is looked up by the rank that has it."""
    index = call.arguments.get("input", call.arguments.get("indices"))
    cut = call.layout(index)
    return call.step(cut, {index: cut}) if isinstance(cut, Cut) and [each for each, _ in call.cuts] == [index] else None


@rule("conv1d", "conv2d", "conv3d")
def convolution(call: Call) -> Step | None:
    """Over samples; over positions if it looks at one position only."""
    source = source_of(call)
    arguments = list(call.arguments.values())
    kernel = call.sizes(arguments[1]) if len(arguments) > 1 else None
    if source is None or kernel is None or len(source[2]) != len(kernel):
        return None
    value, cut, sizes = source
    result = call.sizes(call.node)
    is_pointwise = all(size == 1 for size in kernel[2:]) and result is not None and result[2:] == sizes[2:]
    return call.step(cut, {value: cut}) if cut.axis == 0 or (cut.axis > 1 and is_pointwise) else None


# ---------------------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------------------

QUERY, KEY, VALUE, MASK = "query", "key", "value", "attn_mask"


@rule("scaled_dot_product_attention")
def attention(call: Call) -> Step | None:
    """See the head of this file."""
    arguments = call.arguments
    operands = [arguments.get(name) for name in (QUERY, KEY, VALUE)]
    sizes = [each for operand in operands if (each := call.sizes(operand)) is not None]
    if len(sizes) < 3 or any(len(each) != len(sizes[0]) for each in sizes):
        return None
    tokens = len(sizes[0]) - 2
    query, key, value = (call.layout(operand) for operand in operands)
    if isinstance(query, Cut) and query.axis < tokens:
        return _batched(call, query, sizes)
    if not isinstance(query, Cut) or query.axis != tokens:
        return None
    if key is None and value is None:
        return _own_queries(call, query, sizes)
    if not isinstance(key, Cut) or key != value or key.axis != tokens:
        return None
    axis = _heads(call, sizes, tokens)
    if axis is None:
        return _own_queries(call, query, sizes)
    return _all_to_all(call, query, key, axis, sizes)


def _heads(call: Call, sizes: Sequence[Sequence[Size]], tokens: int) -> int | None:
    """The axis that is cut during attention: the heads, or another one that attention treats as a batch.

    With grouped heads, each rank needs the keys of its own queries: the ranks must divide both numbers.
    """
    for axis in reversed(range(tokens)):
        counts = [each[axis] for each in sizes]
        if all(isinstance(count, int) and count >= call.ranks for count in counts):
            is_even = all(count % call.ranks == 0 for count in counts)  # type: ignore[operator]
            if len(set(counts)) == 1 or (is_even and counts[1] == counts[2]):
                return axis
    return None


def _attention_step(call: Call, reads: Mapping[str, Any], made: Cut, handed_on: Cut | None = None) -> Step:
    """A step with these arguments by name, and the others as they are."""
    by_place = list(zip(call.arguments, call.node.args, strict=False))
    args = tuple(reads.get(name, each) for name, each in by_place)
    kwargs = {name: reads.get(name, each) for name, each in call.node.kwargs.items()}
    return Step(args, kwargs, made, None, handed_on)


def _mask(call: Call, cut: Cut, rank: int, by_rank: tuple[Cut, ...] = ()) -> Any:
    """The mask for a result of `rank` axes that is cut so, its axes in the order of `by_rank`."""
    mask = call.arguments.get(MASK)
    sizes = call.sizes(mask)
    if sizes is None or not isinstance(mask, fx.Node):
        return mask
    orders = tuple(each for order in by_rank if (each := operand_layout(order, sizes, rank)) and len(each.segments) > 1)
    return As(mask, operand_layout(cut, sizes, rank), orders)


def _batched(call: Call, cut: Cut, sizes: Sequence[Sequence[Size]]) -> Step | None:
    """Each rank attends to its own samples, frames or heads."""
    if any(each[cut.axis] != cut.length for each in sizes):
        return None
    reads = {name: As(call.arguments[name], cut) for name in (QUERY, KEY, VALUE)}
    return _attention_step(call, reads | {MASK: _mask(call, cut, len(sizes[0]))}, cut)


def _own_queries(call: Call, cut: Cut, sizes: Sequence[Sequence[Size]]) -> Step | None:
    """Each rank attends with its own queries to all keys."""
    if call.arguments.get("is_causal"):
        return None
    reads = {QUERY: As(call.arguments[QUERY], cut)} | {name: As(call.arguments[name], None) for name in (KEY, VALUE)}
    return _attention_step(call, reads | {MASK: _mask(call, cut, len(sizes[0]))}, cut)


def _all_to_all(call: Call, query: Cut, key: Cut, axis: int, sizes: Sequence[Sequence[Size]]) -> Step | None:
    """Each rank attends with its own heads. Tokens come rank by rank, which only masks mind."""
    if call.arguments.get("is_causal") and (len(query.segments) > 1 or len(key.segments) > 1):
        return None
    names = (QUERY, KEY, VALUE)
    heads = [Cut.along(axis, each[axis]) for each in sizes]
    reads = {name: As(call.arguments[name], cut) for name, cut in zip(names, heads, strict=True)}
    orders = (query, key.at(key.axis + 1))
    return _attention_step(call, reads | {MASK: _mask(call, heads[0], len(sizes[0]), orders)}, heads[0], query)
