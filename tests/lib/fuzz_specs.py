"""Descriptions of random block models, and how they are drawn."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from hypothesis import strategies as st
from lib.fuzz_writes import WRITES
from torch import Tensor

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
