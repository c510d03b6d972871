"""What code motion saves: weights that a step reads, counted on graphs of true configurations; and time, on this CPU.

reads    models on the meta device, so no weight exists: the rewritten graph is asked which weights it takes
time     a FLUX in bfloat16 with random weights, one thread, steps with and without the pass by turns
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, cast

import torch
from torch import fx

import cachedit_fx
from cachedit_fx.backend import rewrite
from cachedit_fx.bench.flux import Size, inputs, make
from cachedit_fx.bench.progress import Tell, silent
from cachedit_fx.capture import capturing, copy_of
from cachedit_fx.config.options import parse_options
from cachedit_fx.passes.base import Traced
from cachedit_fx.passes.block_loops import Detection
from cachedit_fx.passes.graph_cost import bytes_of, numel_of
from cachedit_fx.passes.graph_values import is_of_module
from cachedit_fx.passes.hoist_invariants import HOISTED, Hoisted
from cachedit_fx.passes.manager import Outcome
from cachedit_fx.report.tables import Table

STEPS = 28
"""Of a generation, if the modulations are computed for all steps at once."""
DTYPE = torch.bfloat16


def _tokens(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype)


def _flux() -> tuple[Any, dict[str, Any]]:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(guidance_embeds=True), {
        "hidden_states": _tokens(1, 256, 64),
        "encoder_hidden_states": _tokens(1, 64, 4096),
        "pooled_projections": _tokens(1, 768),
        "timestep": _tokens(1),
        "guidance": _tokens(1),
        "img_ids": _tokens(256, 3),
        "txt_ids": _tokens(64, 3),
    }


def _qwen_image() -> tuple[Any, dict[str, Any]]:
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(), {
        "hidden_states": _tokens(1, 256, 64),
        "encoder_hidden_states": _tokens(1, 64, 3584),
        "encoder_hidden_states_mask": None,
        "timestep": _tokens(1),
        "img_shapes": [[(1, 16, 16)]],
    }


def _sd3() -> tuple[Any, dict[str, Any]]:
    from diffusers import SD3Transformer2DModel

    sizes = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192}
    return SD3Transformer2DModel(joint_attention_dim=4096, pooled_projection_dim=2048, **sizes), {
        "hidden_states": _tokens(1, 16, 32, 32),
        "encoder_hidden_states": _tokens(1, 64, 4096),
        "pooled_projections": _tokens(1, 2048),
        "timestep": _tokens(1),
    }


def _auraflow() -> tuple[Any, dict[str, Any]]:
    from diffusers import AuraFlowTransformer2DModel

    return AuraFlowTransformer2DModel(pos_embed_max_size=9216), {
        "hidden_states": _tokens(1, 4, 32, 32),
        "encoder_hidden_states": _tokens(1, 64, 2048),
        "timestep": _tokens(1),
    }


def _hunyuan_video() -> tuple[Any, dict[str, Any]]:
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(), {
        "hidden_states": _tokens(1, 16, 1, 32, 32),
        "timestep": _tokens(1),
        "encoder_hidden_states": _tokens(1, 64, 4096),
        "encoder_attention_mask": torch.empty(1, 64, dtype=torch.bool),
        "pooled_projections": _tokens(1, 768),
        "guidance": _tokens(1),
    }


def _cogvideox() -> tuple[Any, dict[str, Any]]:
    from diffusers import CogVideoXTransformer3DModel

    sizes = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}
    return CogVideoXTransformer3DModel(**sizes), {
        "hidden_states": _tokens(1, 2, 16, 32, 32),
        "encoder_hidden_states": _tokens(1, 226, 4096),
        "timestep": torch.empty(1, dtype=torch.int64),
        "image_rotary_emb": (_tokens(512, 64), _tokens(512, 64)),
    }


def _wan() -> tuple[Any, dict[str, Any]]:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(), {
        "hidden_states": _tokens(1, 16, 1, 32, 32),
        "timestep": torch.empty(1, dtype=torch.int64),
        "encoder_hidden_states": _tokens(1, 512, 4096),
    }


def _cogview4() -> tuple[Any, dict[str, Any]]:
    from diffusers import CogView4Transformer2DModel

    return CogView4Transformer2DModel(), {
        "hidden_states": _tokens(1, 16, 32, 32),
        "encoder_hidden_states": _tokens(1, 64, 4096),
        "timestep": _tokens(1),
        "original_size": _tokens(1, 2),
        "target_size": _tokens(1, 2),
        "crop_coords": _tokens(1, 2),
    }


def _dit() -> tuple[Any, dict[str, Any]]:
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(in_channels=4, out_channels=8, num_layers=28, sample_size=64), {
        "hidden_states": _tokens(1, 4, 64, 64),
        "timestep": torch.empty(1, dtype=torch.int64),
        "class_labels": torch.empty(1, dtype=torch.int64),
    }


def _ltx() -> tuple[Any, dict[str, Any]]:
    from diffusers import LTXVideoTransformer3DModel

    return LTXVideoTransformer3DModel(), {
        "hidden_states": _tokens(1, 256, 128),
        "encoder_hidden_states": _tokens(1, 64, 4096),
        "timestep": _tokens(1),
        "encoder_attention_mask": torch.empty(1, 64),
        "num_frames": 1,
        "height": 16,
        "width": 16,
    }


MODELS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "FLUX.1-dev": _flux,
    "Qwen-Image": _qwen_image,
    "SD3 medium": _sd3,
    "AuraFlow": _auraflow,
    "HunyuanVideo": _hunyuan_video,
    "CogVideoX-5B": _cogvideox,
    "CogView4": _cogview4,
    "DiT-XL/2": _dit,
    "LTX-Video": _ltx,
    "Wan 2.1 14B": _wan,
}
"""Model -> makes its module, and the inputs of one call, on the present device. Few tokens, since weights count."""


@dataclass(frozen=True)
class Reads:
    """What a step of one model reads, in elements of weights, and what is kept.

    "Today" is a step without the pass.

    Attributes:
        parameters: of the model.
        today, cached_today: a computed and a cached step without code motion; a cached one computes the first block.
        rest, cached_rest: the same steps, what is hoisted left out.
        timed: elements behind values that change with the timestep alone.
        prompted: elements behind values that change with the timestep and conditions.
        conditions: elements behind values that change with conditions alone.
        values: number of hoisted values.
        kept: bytes of the values that change with the timestep, for one step.
        kept_conditions: bytes of the values that change with conditions alone.
    """

    model: str
    parameters: int
    today: int
    cached_today: int
    rest: int
    cached_rest: int
    timed: int
    prompted: int
    conditions: int
    values: int
    kept: int
    kept_conditions: int

    @property
    def same_steps(self) -> float:
        """A new prompt with steps that came before, over today: only values of the timestep alone are kept."""
        return (self.rest + self.prompted) / self.today

    @property
    def batched(self) -> float:
        """A generation of `STEPS` steps whose values are all computed at once, over today."""
        return (self.rest + (self.prompted + self.timed) / STEPS) / self.today

    @property
    def cached(self) -> float:
        """A cached step that finds all values, over today's."""
        return self.cached_rest / self.cached_today


def count(name: str) -> Reads:
    """Count the weights that steps of a model read, on the graph."""
    with torch.device("meta"):
        module, arguments = MODELS[name]()
    module = module.to(DTYPE).eval()
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad(), capturing():
        torch.compile(module, backend=backend)(**arguments)
    gm = max(graphs, key=lambda graph: len(graph.graph.nodes))
    settings = {"Fn_compute_blocks": 1, "inner_backend": "aot_eager"}
    outcomes = []
    for hoists in (False, True):
        options = parse_options(settings | {"passes": {"gather_inputs": False, "hoist_invariants": hoists}})
        outcomes.append(rewrite(copy_of(gm), options, Traced.of(module)))
    return _reads(name, sum(parameter.numel() for parameter in module.parameters()), *outcomes)


def _reads(name: str, parameters: int, plain: Outcome, moved: Outcome) -> Reads:
    assert plain.facts[Detection].chain, f"{name}: no chain"
    hoisted = moved.facts[Hoisted]
    values = cast("tuple[fx.Node, ...]", hoisted.graph_module.graph.output_node().args[0])
    weights: dict[tuple[bool, bool], int] = {}
    sizes: dict[bool, int] = {True: 0, False: 0}
    inputs = hoisted.graph_module.graph.find_nodes(op="placeholder")
    taken = set(hoisted.inputs)
    for piece in hoisted.pieces:
        key = piece.is_timed, piece.inputs != (hoisted.timestep,)
        weights[key] = weights.get(key, 0) + sum(numel_of(inputs[place]) for place in piece.weights)
        sizes[piece.is_timed] += sum(bytes_of(values[index]) for index in piece.results if index in taken)
    (today, cached_today), (rest, cached_rest) = _taken(plain), _taken(moved)
    return Reads(
        name,
        parameters,
        today,
        cached_today,
        rest,
        cached_rest,
        weights.get((True, False), 0),
        weights.get((True, True), 0),
        weights.get((False, True), 0),
        hoisted.count,
        sizes[True],
        sizes[False],
    )


def _taken(outcome: Outcome) -> tuple[int, int]:
    """Elements of the weights that a computed and a cached step take: the second does not call the region's graph."""
    nodes = outcome.graph_module.graph.find_nodes(op="placeholder")
    weights = [node for node in nodes if is_of_module(node) and HOISTED not in node.meta and node.users]
    runs = outcome.graph_module.graph.find_nodes(op="call_method", target="run")
    inside = {value for run in runs for value in cast("tuple[fx.Node, ...]", run.args[3])}
    outside = {node for node in weights if node not in inside or any(user not in runs for user in node.users)}
    return sum(map(numel_of, weights)), sum(map(numel_of, outside))


@dataclass(frozen=True)
class Timing:
    """CPU seconds of steps with the pass over those without it: medians of pairs.

    Attributes:
        computed, cached: a computed step, and a cached step that computes the first block.
        whole: a computed step with the pass over the model under plain `torch.compile`.
        rounds: pairs.
    """

    tokens: int
    computed: float
    cached: float
    whole: float
    rounds: int


MOVED, PLAIN, WHOLE = "moved", "plain", "whole"
COMPUTED, CACHED = 0, 1
WARMUP = 3
"""Pairs before those that count. After two of them all hoisted values are kept."""


def measure(size: Size, side: int, rounds: int, tell: Tell = silent) -> Timing:
    """Time steps of a random FLUX in bfloat16 with and without the pass, and by `torch.compile`, by turns.

    Args:
        size: of the model.
        side: image tokens a side.
        rounds: pairs of each kind.
    """
    torch.set_num_threads(1)
    module, shape = make(size).to(DTYPE), size._replace(side=side)
    models = {name: copy.deepcopy(module) for name in (MOVED, PLAIN, WHOLE)}
    models[WHOLE].compile(dynamic=False)
    for name in (MOVED, PLAIN):
        cachedit_fx.compile(
            models[name],
            dynamic=False,
            guards="generation",
            steps_computation_mask="10" * 500,
            steps_computation_policy="static",
            Fn_compute_blocks=1,
            passes={"hoist_invariants": name == MOVED},
        )
    seconds: dict[tuple[str, int], list[float]] = {}
    arguments = _arguments(shape)
    with torch.no_grad():
        for step in range(2 * (rounds + WARMUP)):
            tell(f"{side**2} image tokens, pair {step // 2 + 1} of {rounds + WARMUP}")
            kind = step % 2
            arguments["timestep"] = torch.tensor([1.0 - kind / 8])
            names = [MOVED, PLAIN] + ([WHOLE] if kind == COMPUTED else [])
            for name in names if step % 4 < 2 else reversed(names):
                begun = time.process_time()
                models[name](**arguments)
                if step >= 2 * WARMUP:
                    seconds.setdefault((name, kind), []).append(time.process_time() - begun)

    def ratio(kind: int, below: str) -> float:
        return median(a / b for a, b in zip(seconds[MOVED, kind], seconds[below, kind], strict=True))

    return Timing(side**2, ratio(COMPUTED, PLAIN), ratio(CACHED, PLAIN), ratio(COMPUTED, WHOLE), rounds)


def _arguments(size: Size) -> dict[str, Any]:
    """Inputs of a generation, floating-point ones but the timestep in bfloat16."""
    return {
        name: value.to(DTYPE) if isinstance(value, torch.Tensor) and name != "timestep" else value
        for name, value in inputs(size).items()
    }


def shares_table(rows: Sequence[Reads]) -> Table:
    """What the weights are behind, and what is kept, a line for each model."""
    table = Table(
        ("model", "weights", "time", "time and\nconditions", "conditions", "values", "MiB\na step", "MiB a\nprompt")
    )
    for row in rows:
        shares = (f"{part / row.parameters:.1%}" for part in (row.timed, row.prompted, row.conditions))
        sizes = (f"{size / 2**20:.2f}" for size in (row.kept, row.kept_conditions))
        table.add(row.model, f"{row.parameters / 1e9:.2f} B", *shares, str(row.values), *sizes)
    return table


def reads_table(rows: Sequence[Reads]) -> Table:
    """The weights that steps read, a line for each model."""
    table = Table(("model", "step by step", f"{STEPS} steps at once", "cached step"))
    for row in rows:
        table.add(row.model, *(f"{ratio:.3f}" for ratio in (row.same_steps, row.batched, row.cached)))
    return table


def time_table(rows: Sequence[Timing]) -> Table:
    """The times of steps, a line for each number of tokens."""
    table = Table(("image tokens", "computed step", "cached step", "computed, over torch.compile", "pairs"))
    for row in rows:
        table.add(
            str(row.tokens), *(f"{ratio:.2f}" for ratio in (row.computed, row.cached, row.whole)), str(row.rounds)
        )
    return table
