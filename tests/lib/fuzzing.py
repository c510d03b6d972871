"""Random block models for fuzzing: plain data (`Spec`), the model that it describes (`build`), and what must hold
for every one of them (`check`).

    draw_spec(choose) ──► Spec(loops=(Loop(blocks=3, body="conv"),), ...) ──► build(spec) ──► check(spec) -> Outcome

One drawing function serves two masters: hypothesis, which shrinks (`specs`), and a seeded generator, which can start
at any case (`spec_of`; `tests/fuzz.py`). A Spec's repr names what is not default and can be pasted back.
"""

from __future__ import annotations

import contextlib
import math
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import cachedit_fx

Item = TypeVar("Item")
Choose = Callable[[Sequence[Any]], Any]
"""Picks one of several; the simplest stands first, which is what hypothesis shrinks to."""
Streams = tuple[Tensor, Tensor | None, Tensor | None]
"""Hidden states, text, and a narrow one; None where the model has no such stream, or no longer."""
Weights = Mapping[str, Tensor]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
WIDTH, EXTRA_WIDTH = 8, 4
STEPS = 4


# ---------------------------------------------------------------------------------------------------------------------
# Plain data
# ---------------------------------------------------------------------------------------------------------------------


class _Short:
    """A repr of the fields that are not default."""

    def __repr__(self) -> str:
        given = ((f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default)  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in given)})"


@dataclass(frozen=True, repr=False)
class Loop(_Short):
    """One loop of blocks, and what lies between it and the loop before."""

    blocks: int = 3
    body: str = "mlp"
    """mlp, gated, attention (joint over hidden states and text), conv (along the tokens), experts (two, mixed), or
    nested (the feed-forward is a ModuleList of its own)."""
    norm: str = "pre"
    write: str = "add"
    """How a block's change enters a stream; see `WRITES`."""
    container: str = "list"
    """list, sequential, dict, numbered, pylist, shared: modules; stacked, parameters: plain functions over weights."""
    returns: str = "tuple"
    """tuple, dict, dataclass."""
    glue: str = "none"
    """Ahead of the loop: none, add, linear; concat (text joins the hidden states for good), slice (the first token
    goes), fold (pairs of half sequences, for this loop only), merge (two tokens become one, by a linear)."""
    control: bool = False
    """A residual of its own is added behind each block."""
    last_drops_text: bool = False
    autocast: str = "none"
    """none, block (inside each block), loop (around all of them)."""


@dataclass(frozen=True, repr=False)
class Spec(_Short):
    """A model, its inputs, and the options under which it is compiled."""

    loops: tuple[Loop, ...] = (Loop(),)
    streams: int = 1
    """Carried values: hidden states, text, and a narrow one."""
    refiners: int = 0
    """Small blocks that prepare the text stream."""
    skips: str = "none"
    """U shape across the whole chain: none, add, cat."""
    rotary: str = "none"
    """For attention: none, cat, buffer (filled in place)."""
    mask: bool = False
    embed: bool = True
    """Without, the blocks get the graph's inputs themselves (and may write to them)."""
    result: str = "tensor"
    """tensor, tuple (with the text), dict."""
    timestep: str = "vector"
    """vector, scalar, long, tokens (one for each), float (a Python number), none."""
    dtype: str = "float32"
    batch: int = 1
    tokens: int = 6
    text_tokens: int = 4
    extra_tokens: int = 2
    dynamic: bool | None = None
    resize: str = "none"
    """A second resolution: none, tokens, batch, text."""
    first: int = 1
    last: int = 0
    granularity: str = "block"
    scope: str = "model"
    order: int | None = None
    """TaylorSeer's; None is no calibrator."""
    predicts: str = "residual"
    lowered: bool = False
    """Try cache=None too."""
    cfg: str = "none"
    """none, separate (enable_separate_cfg=True), detected (from the timestep)."""
    policy: tuple[tuple[str, Any], ...] = ()
    """For the last phase: any settings of the policy."""

    @property
    def branches(self) -> int:
        return 1 if self.cfg == "none" else 2

    @property
    def num_blocks(self) -> int:
        """Blocks in the chain."""
        return sum(loop.blocks for loop in self.loops)


def draw_spec(choose: Choose) -> Spec:
    """A Spec from choices; those that make no sense together are never made."""

    def sometimes(value: Item, default: Item, ones_in: int = 3) -> Item:
        return choose((default,) * (ones_in - 1) + (value,))

    streams = choose((1, 1, 2, 2, 3))
    tokens = choose((4, 6, 8))
    spec = Spec(
        streams=streams,
        refiners=sometimes(2, 0, 4) if streams > 1 else 0,
        rotary=choose(("none", "cat", "buffer")),
        mask=sometimes(True, False),
        embed=choose((True, True, True, False)),
        result=choose(("tensor", "tuple", "dict")),
        timestep=choose(("vector", "vector", "vector", "scalar", "long", "tokens", "none", "none", "float")),
        dtype=choose(("float32", "float32", "bfloat16", "float64")),
        batch=choose((1, 2, 3)),
        tokens=tokens,
        text_tokens=choose((2, 3, 5, tokens)),
        extra_tokens=choose((1, 2, 3)),
        dynamic=choose((None, None, True, False)),
        resize=choose(("none",) * 9 + ("tokens", "batch", "text")),
        granularity=sometimes("region", "block"),
        scope=sometimes("loop", "model"),
        order=choose((None, None, 0, 1, 2)),
        predicts=sometimes("hidden_states", "residual"),
        lowered=sometimes(True, False, 5),
    )
    loops: list[Loop] = []
    text, length = streams > 1, tokens
    for index in range(choose((1, 1, 1, 2, 2, 3))):
        glues = ["none", "none", "add", "linear"]
        glues += ["concat"] * 2 * text + ["slice"] * (length > 3) + ["fold"] * (length % 2 == 0)
        glues += ["merge"] * (length % 2 == 0 and length > 2)
        glue = choose(glues) if index else "none"
        if spec.resize == "tokens" and glue in ("fold", "merge") and length % 2:
            glue = "none"
        text = text and glue != "concat"
        length = {"slice": length - 1, "merge": length // 2, "concat": length + spec.text_tokens}.get(glue, length)
        container = choose(
            ("list", "list", "list", "sequential", "dict", "numbered", "pylist", "shared", "stacked", "parameters")
        )
        functional = container in ("stacked", "parameters")
        loops.append(
            Loop(
                blocks=choose((3, 2, 3, 2, 4, 5)),
                body=choose(
                    ("mlp", "gated", "attention", "attention", "conv", "experts") + ("nested",) * (not functional)
                ),
                norm=sometimes("post", "pre"),
                write=choose(("add", "add", *WRITES)),
                container=container,
                returns=choose(("tuple", "dict", "dataclass"))
                if not functional and container != "sequential"
                else "tuple",
                glue=glue,
                control=sometimes(True, False, 5) if container != "sequential" and glue != "fold" else False,
                autocast=choose(("none",) * 8 + ("block", "block", "loop")) if spec.dtype == "float32" else "none",
            )
        )
    if text and spec.result != "tuple":
        loops[-1] = replace(loops[-1], last_drops_text=sometimes(True, False))
    keeps_shape = all(loop.glue in ("none", "add", "linear") for loop in loops)
    calls = all(loop.container != "sequential" for loop in loops)
    if any(loop.glue in ("concat", "fold", "slice", "merge") for loop in loops) and spec.timestep == "tokens":
        spec = replace(spec, timestep="vector")
    spec = replace(
        spec,
        loops=tuple(loops),
        skips=choose(("none", "none", "add", "cat")) if keeps_shape and calls else "none",
        cfg=choose(("none", "separate") + ("detected",) * (spec.timestep != "none")),
        text_tokens=spec.text_tokens if text or spec.streams > 1 else 2,
    )
    room = spec.num_blocks if spec.scope == "model" else min(loop.blocks for loop in loops)
    first = choose((1, 1, 2, 0, 3)) if room > 3 else choose((1, 1, 1, 0))
    last = choose(tuple(range(min(room - first, 3)))) if choose((True,) * 9 + (False,)) else room - first
    return replace(spec, first=first, last=last, policy=_draw_policy(choose, first))


def _draw_policy(choose: Choose, first: int) -> tuple[tuple[str, Any], ...]:
    policy: dict[str, Any] = {}
    if first == 0 or choose((False, False, True)):
        policy["steps_computation_mask"] = tuple(choose((0, 1)) for _ in range(choose((STEPS, STEPS, 2))))
        policy["steps_computation_policy"] = "static" if first == 0 else choose(("dynamic", "static"))
    policy["residual_diff_threshold"] = choose((0.3, 0.05, 1.0, 0.0, 1e9))
    for name, values in (
        ("max_warmup_steps", (1, 0, 2, 8)),
        ("warmup_interval", (1, 2)),
        ("downsample_factor", (1, 1, 2)),
        ("max_cached_steps", (-1, 0, 1, 2)),
        ("max_continuous_cached_steps", (-1, 0, 1, 2)),
        ("max_accumulated_residual_diff_threshold", (None, 0.0, 0.1)),
    ):
        policy[name] = choose(values)
    return tuple(policy.items())


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    """Hypothesis's strategy."""
    return draw_spec(lambda options: draw(st.sampled_from(options)))


def spec_of(seed: int, case: int) -> Spec:
    """Case number `case` of the endless run that starts from `seed`; needs none of those before it."""
    return draw_spec(random.Random(f"{seed}/{case}").choice)


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------


def _through_slice(x: Tensor, change: Tensor) -> Tensor:
    x[:, :1] = x[:, :1] + change[:, :1]
    return x + change


def _into_view(x: Tensor, change: Tensor) -> Tensor:
    head = x[..., : x.shape[-1] // 2]
    head += change[..., : x.shape[-1] // 2]
    return x + change


def _fresh_buffer(x: Tensor, change: Tensor) -> Tensor:
    result = torch.empty_like(x)
    half = x.shape[-1] // 2
    result[..., :half] = x[..., :half] + change[..., :half]
    result[..., half:] = x[..., half:] - change[..., half:]
    return result


def _add_to(x: Tensor, change: Tensor) -> Tensor:
    x += change
    return x


def _add_to_clone(x: Tensor, change: Tensor) -> Tensor:
    x = x.clone()
    x += change
    return x


WRITES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda x, change: x + change,
    "replace": lambda x, change: change,
    "iadd": _add_to,
    "add_": lambda x, change: x.add_(change),
    "mul_add_": lambda x, change: x.mul_(0.75).add_(change),
    "onto change": lambda x, change: change.add_(x),
    "clone": _add_to_clone,
    "buffer": _fresh_buffer,
    "slice": _through_slice,
    "view": _into_view,
    "gate": lambda x, change: torch.lerp(x, change, 0.3),
}


@dataclass
class State:
    """What a block may return."""

    hidden: Tensor
    text: Tensor | None = None
    extra: Tensor | None = None


@dataclass(frozen=True)
class Around:
    """What every block of a model gets beside the streams."""

    temb: Tensor
    rotary: tuple[Tensor, Tensor] | None
    mask: Tensor | None


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def _rotated(x: Tensor, table: tuple[Tensor, Tensor], style: str) -> Tensor:
    cos, sin = (part[: x.shape[-2]].to(x.dtype) for part in table)
    a, b = x.chunk(2, dim=-1)
    if style == "cat":
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
    result = torch.empty_like(x)
    result[..., : a.shape[-1]] = a * cos - b * sin
    result[..., a.shape[-1] :] = a * sin + b * cos
    return result


def _attend(spec: Spec, w: Weights, y: Tensor, text: Tensor | None, around: Around) -> tuple[Tensor, Tensor | None]:
    joint = y if text is None else torch.cat([_norm(text), y], dim=1)
    q, k, v = F.linear(joint, w["qkv"]).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    if around.rotary is not None:
        q, k = (_rotated(item, around.rotary, spec.rotary) for item in (q, k))
    mask = None if around.mask is None else around.mask[:, : joint.shape[1]].to(q.dtype)
    joint = F.linear(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2), w["out"])
    return (joint, None) if text is None else (joint[:, text.shape[1] :], joint[:, : text.shape[1]])


def _body(
    spec: Spec, loop: Loop, w: Weights, y: Tensor, text: Tensor | None, around: Around, nested: nn.ModuleList | None
) -> tuple[Tensor, Tensor | None]:
    """The change of the hidden states, and of the text where it is made along with it."""
    if loop.body == "attention":
        return _attend(spec, w, y, text, around)
    if loop.body == "nested":
        assert nested is not None
        for layer in nested:
            y = layer(y)
    elif loop.body == "conv":
        y = F.conv1d(y.transpose(1, 2), w["kernel"], padding=1).transpose(1, 2)
    elif loop.body == "gated":
        y = F.linear(F.silu(F.linear(y, w["up"])) * F.linear(y, w["up2"]), w["down"])
    elif loop.body == "experts":
        share = F.linear(y, w["router"]).softmax(-1)
        y = sum(  # type: ignore[assignment]
            share[..., i : i + 1] * F.linear(F.gelu(F.linear(y, w[up])), w["down"])
            for i, up in enumerate(("up", "up2"))
        )
    else:
        y = F.linear(F.gelu(F.linear(y, w["up"])), w["down"])
    return (y if text is None else y + text.mean(1, keepdim=True)), None


def run_block(
    spec: Spec,
    loop: Loop,
    last: bool,
    w: Weights,
    streams: Streams,
    around: Around,
    skip: Tensor | None,
    nested: nn.ModuleList | None = None,
) -> Streams:
    """One block, as a function of its weights."""
    hidden, text, extra = streams
    write = WRITES[loop.write]
    if skip is not None:
        hidden = hidden + skip if spec.skips == "add" else F.linear(torch.cat([hidden, skip], -1), w["skip"])
    shift, scale = F.linear(F.silu(around.temb), w["modulation"]).chunk(2, dim=-1)
    y = (_norm(hidden) if loop.norm == "pre" else hidden) * (1 + scale) + shift
    with torch.autocast("cpu", torch.bfloat16) if loop.autocast == "block" else contextlib.nullcontext():
        change, text_change = _body(spec, loop, w, y, text, around, nested)
    change = change.to(hidden.dtype)
    change = _norm(change) if loop.norm == "post" else change
    if extra is not None:
        change = change + F.linear(extra, w["from_extra"]).mean(1, keepdim=True).to(hidden.dtype)
        extra = write(extra, torch.tanh(F.linear(extra, w["extra"])).to(extra.dtype))
    hidden = write(hidden, change)
    if text is not None:
        if last and loop.last_drops_text:
            text = None
        else:
            made = torch.tanh(F.linear(text, w["text"])) if text_change is None else text_change
            text = write(text, made.to(text.dtype))
    return hidden, text, extra


_SHAPES = {
    "modulation": (2 * WIDTH, WIDTH),
    "qkv": (3 * WIDTH, WIDTH),
    "out": (WIDTH, WIDTH),
    "kernel": (WIDTH, WIDTH, 3),
    "up": (2 * WIDTH, WIDTH),
    "up2": (2 * WIDTH, WIDTH),
    "down": (WIDTH, 2 * WIDTH),
    "router": (2, WIDTH),
    "skip": (WIDTH, 2 * WIDTH),
    "text": (WIDTH, WIDTH),
    "extra": (EXTRA_WIDTH, EXTRA_WIDTH),
    "from_extra": (WIDTH, EXTRA_WIDTH),
}
_OF_BODY = {
    "mlp": ("up", "down"),
    "gated": ("up", "up2", "down"),
    "attention": ("qkv", "out"),
    "conv": ("kernel",),
    "experts": ("up", "up2", "down", "router"),
    "nested": (),
}


def _new_weights(spec: Spec, loop: Loop) -> dict[str, nn.Parameter]:
    names = ["modulation", *_OF_BODY[loop.body]]
    names += (
        ["skip"] * (spec.skips == "cat") + ["text"] * (spec.streams > 1) + ["extra", "from_extra"] * (spec.streams > 2)
    )
    return {name: _weight(spec, *_SHAPES[name]) for name in names}


def _weight(spec: Spec, *shape: int) -> nn.Parameter:
    value = torch.randn(shape) / math.prod(shape[1:]) ** 0.5
    return nn.Parameter(value.to(DTYPES[spec.dtype]), requires_grad=False)


def _linear(spec: Spec, taken: int, made: int) -> nn.Linear:
    return nn.Linear(taken, made).to(DTYPES[spec.dtype])


class Block(nn.Module):
    """`run_block` with weights of its own."""

    def __init__(self, spec: Spec, loop: Loop, last: bool) -> None:
        super().__init__()
        self.spec, self.loop, self.last = spec, loop, last
        for name, weight in _new_weights(spec, loop).items():
            self.register_parameter(name, weight)
        self.ff = None
        if loop.body == "nested":
            self.ff = nn.ModuleList((_linear(spec, WIDTH, 2 * WIDTH), nn.GELU(), _linear(spec, 2 * WIDTH, WIDTH)))

    def forward(self, streams: Streams, around: Around, skip: Tensor | None = None) -> Any:
        streams = run_block(self.spec, self.loop, self.last, self._parameters, streams, around, skip, self.ff)  # type: ignore[arg-type]
        if self.loop.returns == "dataclass":
            return State(*streams)
        if self.loop.returns == "dict":
            return {"hidden": streams[0], "text": streams[1], "extra": streams[2]}
        return streams


class InSequential(Block):
    """Takes and returns one value, as a Sequential wants it."""

    def forward(self, both: tuple[Streams, Around]) -> tuple[Streams, Around]:  # type: ignore[override]
        streams, around = both
        return super().forward(streams, around), around


def _unpacked(returned: Any) -> Streams:
    """The streams that a block returned."""
    if isinstance(returned, State):
        return returned.hidden, returned.text, returned.extra
    return (returned["hidden"], returned["text"], returned["extra"]) if isinstance(returned, dict) else returned


CONTAINERS = ("blocks", "single_blocks", "late_blocks")


class Model(nn.Module):
    """Embed, refine the text, run the loops with their glue, project."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.keys: dict[str, tuple[str, ...]] = {}
        self.embed = _linear(spec, WIDTH, WIDTH)
        self.project = _linear(spec, WIDTH, WIDTH)
        self.time = _linear(spec, WIDTH, WIDTH)
        plain, refiner = replace(spec, streams=1, skips="none"), Loop(blocks=spec.refiners)
        self.refiners = nn.ModuleList(Block(plain, refiner, False) for _ in range(spec.refiners))
        for name, loop in zip(CONTAINERS, spec.loops, strict=False):
            self._make_loop(name, loop)
            taken = 2 * WIDTH if loop.glue == "merge" else WIDTH
            setattr(self, f"{name}_glue", _linear(spec, taken, WIDTH))

    def _make_loop(self, name: str, loop: Loop) -> None:
        spec, kind = self.spec, InSequential if loop.container == "sequential" else Block
        if loop.container in ("stacked", "parameters"):
            each = [_new_weights(spec, loop) for _ in range(loop.blocks)]
            self.keys[name] = tuple(each[0])
            for key in self.keys[name]:
                values: list[Tensor] = [weights[key] for weights in each]
                stacked = nn.Parameter(torch.stack(values), requires_grad=False)
                held = stacked if loop.container == "stacked" else nn.ParameterList(values)
                setattr(self, f"{name}_{key}", held)
            return
        count = 1 if loop.container == "shared" else loop.blocks
        blocks = [kind(spec, loop, index == loop.blocks - 1) for index in range(count)]
        if loop.container == "sequential":
            setattr(self, name, nn.Sequential(*blocks))
        elif loop.container == "dict":
            setattr(self, name, nn.ModuleDict({f"block_{index}": block for index, block in enumerate(blocks)}))
        elif loop.container == "numbered":
            for index, block in enumerate(blocks):
                setattr(self, f"{name}_{index}", block)
        elif loop.container == "pylist":
            setattr(self, name, tuple(blocks))
        else:
            setattr(self, name, nn.ModuleList(blocks))

    def _call_block(self, name: str, loop: Loop, index: int, streams: Streams, around: Around, skip: Any) -> Streams:
        spec, last = self.spec, index == loop.blocks - 1
        if loop.container in ("stacked", "parameters"):
            weights = {key: getattr(self, f"{name}_{key}")[index] for key in self.keys[name]}
            return run_block(spec, loop, last, weights, streams, around, skip)
        if loop.container == "numbered":
            block = getattr(self, f"{name}_{index}")
        else:
            blocks = getattr(self, name)
            held = list(blocks.values()) if loop.container == "dict" else blocks
            block = held[0 if loop.container == "shared" else index]
        return _unpacked(block(streams, around, skip))

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Any = None,
        encoder_hidden_states: Tensor | None = None,
        extra: Tensor | None = None,
        mask: Tensor | None = None,
        control: Sequence[Tensor] = (),
    ) -> Any:
        spec = self.spec
        hidden = self.embed(hidden_states) if spec.embed else hidden_states
        text, temb = encoder_hidden_states, self._time_embedding(timestep, hidden_states)
        rotary = None
        if spec.rotary != "none":
            length = hidden.shape[1] + (0 if text is None else text.shape[1])
            angles = torch.arange(length)[:, None] * torch.tensor([1.0, 0.1])
            rotary = (angles.cos(), angles.sin())
        around = Around(temb, rotary, mask)
        for block in self.refiners:
            text = _unpacked(block((text, None, None), Around(temb[:, :1], rotary, mask)))[0]
        saved: list[Tensor] = []
        left, done = list(control), 0
        text_length = 0
        for name, loop in zip(CONTAINERS, spec.loops, strict=False):
            batch, length, width = hidden.shape
            glue = getattr(self, f"{name}_glue")
            if loop.glue == "add":
                hidden = hidden + 0.25
            elif loop.glue == "linear":
                hidden = glue(hidden)
            elif loop.glue == "concat":
                assert text is not None
                text_length = text.shape[1]
                hidden, text = torch.cat([text, hidden], dim=1), None
            elif loop.glue == "slice":
                hidden = hidden[:, 1:]
            elif loop.glue == "merge":
                hidden = glue(hidden[:, : hidden.shape[1] // 2 * 2].unflatten(1, (-1, 2)).flatten(2))
            here = around
            if loop.glue == "fold":
                hidden = hidden.reshape(batch * 2, length // 2, width)
                text, extra = (None if item is None else item.repeat_interleave(2, 0) for item in (text, extra))
                here = Around(temb.repeat_interleave(2, 0), rotary, mask)
            with torch.autocast("cpu", torch.bfloat16) if loop.autocast == "loop" else contextlib.nullcontext():
                if loop.container == "sequential":
                    (hidden, text, extra), _ = getattr(self, name)(((hidden, text, extra), here))
                    done += loop.blocks
                for index in range(loop.blocks if loop.container != "sequential" else 0):
                    skip = saved.pop() if spec.skips != "none" and done >= (spec.num_blocks + 1) // 2 else None
                    hidden, text, extra = self._call_block(name, loop, index, (hidden, text, extra), here, skip)
                    if loop.control:
                        hidden = hidden + left.pop(0)
                    if spec.skips != "none" and done < spec.num_blocks // 2:
                        saved.append(hidden)
                    done += 1
            if loop.autocast == "loop":
                hidden = hidden.to(hidden_states.dtype)
            if loop.glue == "fold":
                hidden = hidden.reshape(batch, length, width)
                text, extra = (None if item is None else item[::2] for item in (text, extra))
        result = self.project(hidden[:, text_length:])
        if spec.result == "tuple":
            return tuple(item for item in (result, text, extra) if item is not None)
        return {"sample": result} if spec.result == "dict" else result

    def _time_embedding(self, timestep: Any, hidden: Tensor) -> Tensor:
        """[batch, 1 or tokens, width]."""
        if timestep is None:
            return self.time(hidden.mean(1, keepdim=True))
        if not torch.is_tensor(timestep):
            timestep = torch.tensor([timestep], dtype=torch.float32)
        times = (
            timestep.to(torch.float32).reshape(-1, 1).expand(hidden.shape[0], -1) if timestep.dim() < 2 else timestep
        )
        angles = times[..., None] / 1000 * torch.exp(-torch.arange(WIDTH // 2) * 0.5)
        return self.time(torch.cat([angles.cos(), angles.sin()], dim=-1).to(hidden.dtype))


def build(spec: Spec) -> nn.Module:
    """The model, its weights the same every time."""
    torch.manual_seed(0)
    return Model(spec).eval()


def arguments(spec: Spec, step: int = 0, branch: int = 0, resized: bool = False) -> dict[str, Any]:
    """What the model is called with at a step. Steps drift a little; branches differ."""
    batch, tokens, text = spec.batch, spec.tokens, spec.text_tokens
    if resized:
        batch, tokens, text = (
            batch + (spec.resize == "batch"),
            tokens * (1 + (spec.resize == "tokens")),
            text + (spec.resize == "text"),
        )

    def noise(kind: int, *shape: int) -> Tensor:
        start, drift = (
            torch.randn(shape, generator=torch.Generator().manual_seed(100 * kind + s)) for s in (branch, 7)
        )
        return (start + 0.05 * step * drift).to(DTYPES[spec.dtype])

    given: dict[str, Any] = {"hidden_states": noise(1, batch, tokens, WIDTH)}
    if spec.streams > 1:
        given["encoder_hidden_states"] = noise(2, batch, text, WIDTH)
    if spec.streams > 2:
        given["extra"] = noise(3, batch, spec.extra_tokens, EXTRA_WIDTH)
    if spec.mask:
        given["mask"] = torch.linspace(0, -2, tokens + text)[None]
    time = 900 - 100 * step
    if spec.timestep != "none":
        given["timestep"] = {
            "vector": torch.full((batch,), float(time)),
            "scalar": torch.tensor(float(time)),
            "long": torch.full((batch,), time),
            "tokens": torch.full((batch, tokens), float(time)),
            "float": float(time),
        }[spec.timestep]
    control: list[Tensor] = []
    length = tokens
    for loop in spec.loops:
        length = {"slice": length - 1, "merge": length // 2, "concat": length + text}.get(loop.glue, length)
        control += [0.1 * noise(4 + len(control), batch, length, WIDTH) for _ in range(loop.blocks * loop.control)]
    return given | ({"control": control} if control else {})


# ---------------------------------------------------------------------------------------------------------------------
# What must hold
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What was seen of a case that passed: blocks of each region (none: it ran uncached), and the warnings."""

    regions: tuple[int, ...]
    reused: int
    """Steps that reused in the phase of the drawn policy."""
    warnings: tuple[str, ...]


def expected(spec: Spec) -> tuple[int, ...] | None:
    """Blocks of each region, where all must be found: every loop a container that names its blocks, blocks left over
    by F and B, and nothing that is known to forbid a region. None where a graph may be read otherwise."""
    named = all(loop.container not in ("stacked", "parameters") for loop in spec.loops)
    plain = all(loop.autocast != "loop" and loop.write != "view" for loop in spec.loops)
    writes_to_a_slice = any(
        loop.glue == "slice" and spec.batch > 1 and loop.write in ("iadd", "add_", "mul_add_", "slice")
        for loop in spec.loops
    )
    # Else the text, or a control residual, may be taken for the sample: it may look more like the output.
    resembles = spec.text_tokens == spec.tokens or any(loop.glue in ("slice", "merge", "fold") for loop in spec.loops)
    told_apart = not spec.refiners or not resembles
    regions = (spec.num_blocks,) if spec.scope == "model" else tuple(loop.blocks for loop in spec.loops)
    # Behind a layer that makes other tokens the hidden states continue nothing, and loops may differ in work so much
    # that one is a refiner to the other: the bulk alone may be the region.
    ends = any(loop.glue in ("merge", "fold") for loop in spec.loops)
    clear = named and plain and told_apart and not writes_to_a_slice and not ends
    return regions if clear and spec.first + spec.last < min(regions) else None


@torch.no_grad()
def check(spec: Spec) -> Outcome:
    """Build the model and hold it to every property. Raises AssertionError where one fails, or whatever the model
    raises; what is raised is a bug, here or there."""
    torch._dynamo.reset()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        regions, reused = _Case(spec).run()
    told = tuple(
        dict.fromkeys(str(item.message) for item in caught if issubclass(item.category, cachedit_fx.CacheWarning))
    )
    assert regions or told, "uncached, and nothing was said"
    assert regions == (expected(spec) or regions), f"regions of {regions} blocks, not {expected(spec)}: {told}"
    return Outcome(regions, reused, told)


class _Case:
    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.model = build(spec)
        self.calls = 0

    def run(self) -> tuple[tuple[int, ...], int]:
        spec = self.spec
        sizes = (False,) if spec.resize == "none" else (False, True, False)
        plain = {size: self.generation(range(3), size) for size in sizes}
        if spec.lowered:
            self.compile(cache=None)
            self.compare("cache=None", plain[False][:1], self.generation(range(1), False))
        self.calls = 0
        self.compile(**self.never())
        for size in sizes:
            cachedit_fx.refresh_context(self.model)
            self.compare(f"threshold 0, resized={size}", plain[size], self.generation(range(3), size))
            self.counted(3)
        self.compile(**self.always())
        computed, *repeated = self.generation((0, 0, 0), False)
        self.compare("computed", plain[False][:1], [computed])
        self.compare("reused on identical inputs", [computed, computed], repeated, exact=spec.dtype != "float64")
        for stats in self.counted(3):
            assert stats.cached_steps == [1, 2], f"identical inputs: cached {stats.cached_steps}"
            assert spec.branches == 1 or stats.cfg_cached_steps == [1, 2], f"{stats.cfg_cached_steps}, branch 1"
        if spec.resize != "none":  # in the midst of a generation: what is stored does not fit
            self.compare("another shape", plain[True][:1], self.generation((0,), True), exact=spec.dtype != "float64")
        self.compile(**dict(spec.policy), enable_separate_cfg={"none": False, "separate": True}.get(spec.cfg))
        first = self.generation(range(STEPS), False)
        before = [stats.cached_steps for stats in self.counted(STEPS)]
        cachedit_fx.refresh_context(self.model)
        self.compare("second generation", first, self.generation(range(STEPS), False))
        after = self.counted(STEPS)
        assert [stats.cached_steps for stats in after] == before, f"cached {before}, then {after}"
        return tuple(stats.num_blocks for stats in after), sum(map(len, before))

    def compile(self, **policy: Any) -> None:
        spec = self.spec
        options: dict[str, Any] = {"inner_backend": "eager", "granularity": spec.granularity, "scope": spec.scope}
        if policy.get("cache", "") is not None:
            options |= {"Fn_compute_blocks": spec.first, "Bn_compute_blocks": spec.last}
            if spec.order is not None:
                settings: dict[str, Any] = {"taylorseer_order": spec.order, "calibrator_cache_type": spec.predicts}
                options["calibrator"] = cachedit_fx.TaylorSeerCalibratorConfig(**settings)
        cachedit_fx.compile(self.model, dynamic=spec.dynamic, fullgraph=True, **options, **policy)

    def never(self) -> dict[str, Any]:
        """A policy under which nothing is reused."""
        return self.separate() | (self.mask(1, 1, 1) if self.spec.first == 0 else {"residual_diff_threshold": 0.0})

    def always(self) -> dict[str, Any]:
        """One under which every step but the first is reused on identical inputs."""
        alike = {"residual_diff_threshold": 1e-3, "max_warmup_steps": 0}
        return self.separate() | (self.mask(1, 0, 0, 0) if self.spec.first == 0 else alike)

    def separate(self) -> dict[str, Any]:
        """Branches by turns, so that a timestep seen again is the next step."""
        return {"enable_separate_cfg": self.spec.branches == 2}

    def mask(self, *digits: int) -> dict[str, Any]:
        return {"steps_computation_mask": digits, "steps_computation_policy": "static"}

    def generation(self, steps: Sequence[int], resized: bool) -> list[list[Tensor]]:
        """For each step: the results of its branches, and what the call left in its inputs."""
        seen = []
        for step in steps:
            leaves: list[Tensor] = []
            for branch in range(self.spec.branches):
                given = arguments(self.spec, step, branch, resized)
                result = self.model(**given)
                self.calls += 1
                leaves += [x.clone() for x in tree_leaves((result, given)) if isinstance(x, Tensor)]
            seen.append(leaves)
        return seen

    def compare(
        self, what: str, expected: Sequence[Sequence[Tensor]], found: Sequence[Sequence[Tensor]], exact: bool = True
    ) -> None:
        """Bit for bit. float64 has no wider type to keep residuals in: what is restored there is close."""
        for step, (wanted, got) in enumerate(zip(expected, found, strict=True)):
            assert len(wanted) == len(got), f"{what}, step {step}: {len(got)} tensors, not {len(wanted)}"
            for index, (a, b) in enumerate(zip(wanted, got, strict=True)):
                where = f"{what}, step {step}, tensor {index}"
                assert a.shape == b.shape and a.dtype == b.dtype, f"{where}: {b.dtype} {b.shape}"
                assert a.isfinite().all(), f"{where}: not finite"
                same = torch.equal(a, b) if exact else torch.allclose(a, b, rtol=1e-12, atol=1e-12)
                assert same, f"{where}: off by {(a.double() - b.double()).abs().max():.3g}"

    def counted(self, steps: int) -> list[cachedit_fx.CacheStats]:
        """The statistics of the regions, checked: every step of every branch was decided about, or nothing was."""
        found = cachedit_fx.summary(self.model)
        regions = [stats for stats in found if stats.num_blocks]
        if not regions:
            assert [stats.uncached_calls for stats in found] == [self.calls], f"{self.calls} calls: {found}"
        for stats in regions:
            executed = [branch.executed_steps for branch in stats.branches]
            assert executed == [steps] * self.spec.branches, f"executed {executed}, not {steps}: {stats}"
            assert stats.uncached_calls == 0, f"uncached: {stats}"
        return regions


def simpler(spec: Spec) -> list[Spec]:
    """Specs one change simpler: a loop less, a field back at its default."""
    found = [
        replace(spec, loops=spec.loops[:index] + spec.loops[index + 1 :])
        for index in range(len(spec.loops))
        if len(spec.loops) > 1
    ]
    found += [
        replace(spec, **dict[str, Any]({item.name: item.default}))
        for item in fields(Spec)
        if item.name != "loops" and getattr(spec, item.name) != item.default
    ]
    for index, loop in enumerate(spec.loops):
        for item in fields(Loop):
            if getattr(loop, item.name) != item.default:
                changed = replace(loop, **dict[str, Any]({item.name: item.default}))
                found.append(replace(spec, loops=(*spec.loops[:index], changed, *spec.loops[index + 1 :])))
    return found
