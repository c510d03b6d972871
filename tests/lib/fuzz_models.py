"""The model of a `Spec`, and its inputs."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from lib.fuzz_specs import DTYPES, EXTRA_WIDTH, WIDTH, Loop, Spec, Streams, Weights
from lib.fuzz_writes import WRITES
from torch import Tensor, nn

# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------


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
