"""Runs cases under cache-dit's documented calls and prints the steps that were cached, predictions and masks, as JSON.

python tests/lib/peer_runs.py cache_dit             cache-dit itself
python tests/lib/peer_runs.py cachedit_fx.compat    ours, with `inner_backend="eager"`
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402 - after the path
from torch import nn  # noqa: E402

STEPS, WIDTH = 20, 16
Steps = list[list[int]]


class Block(nn.Module):
    """A block of one of the six patterns: what it takes, and in which order it returns its streams."""

    def __init__(self, pattern: int) -> None:
        super().__init__()
        self.pattern = pattern
        self.norm = nn.LayerNorm(WIDTH)
        self.scale, self.text = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def change(self, hidden: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        values = self.norm(hidden) * (1 + self.scale(temb)[:, None])
        return self.down(nn.functional.gelu(self.up(values)))


class TwoStreams(Block):
    def forward(self, hidden_states, encoder_hidden_states, temb):
        hidden = hidden_states + self.change(hidden_states, temb) + encoder_hidden_states.mean(1, keepdim=True)
        if self.pattern == 2:
            return hidden
        encoder = encoder_hidden_states + torch.tanh(self.text(encoder_hidden_states))
        return (hidden, encoder) if self.pattern == 0 else (encoder, hidden)


class OneStream(Block):
    def forward(self, hidden_states, temb):
        hidden = hidden_states + self.change(hidden_states, temb)
        if self.pattern == 3:
            return hidden
        encoder = torch.tanh(self.text(hidden[:, :2]))
        return (hidden, encoder) if self.pattern == 4 else (encoder, hidden)


class Denoiser(nn.Module):
    """Six blocks of one pattern."""

    def __init__(self, pattern: int) -> None:
        super().__init__()
        self.pattern = pattern
        self.register_buffer("frequencies", torch.linspace(0.1, 3, WIDTH))
        self.embed, self.time, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.blocks = nn.ModuleList((TwoStreams if pattern < 3 else OneStream)(pattern) for _ in range(6))

    def forward(self, hidden_states, timestep, encoder_hidden_states):
        temb = self.time(torch.cos(timestep[:, None] / 1000 * self.frequencies))
        hidden, encoder = self.embed(hidden_states), encoder_hidden_states
        for block in self.blocks:
            results = block(hidden, encoder, temb) if self.pattern < 3 else block(hidden, temb)
            if self.pattern in (2, 3):
                hidden = results
            else:
                hidden, encoder = results if self.pattern in (0, 4) else reversed(results)
        return self.out(hidden + encoder.mean(1, keepdim=True))


@torch.no_grad()
def denoise(model: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, text = (torch.randn(1, tokens, WIDTH, generator=generator) for tokens in (6, 4))
    for step in range(STEPS):
        hidden = hidden - 0.1 * model(hidden, torch.tensor([1000.0 * (1 - step / STEPS)]), text)


def steps_of(cache_dit: Any, cached: Any, *lists: Any, name: str = "cached_steps") -> Steps:
    """The cached steps of each block list. cache-dit 1.5.3 keeps them on the list; its `summary` has another order."""
    entries = [vars(blocks).get(f"_{name}") for blocks in lists]
    if all(entry is None for entry in entries):
        entries = [getattr(entry, name) for entry in cache_dit.summary(cached, logging=False)]
    return [list(entry) for entry in entries]


def pattern_case(
    cache_dit: Any,
    options: dict[str, Any],
    pattern: int,
    config_class: str = "DBCacheConfig",
    calibrator_config: Any = None,
    **settings: Any,
) -> Steps:
    """A transformer alone, whose blocks have one of the patterns."""
    torch.manual_seed(0)
    model = Denoiser(pattern)
    config = getattr(cache_dit, config_class)(
        **{"Fn_compute_blocks": 1, "max_warmup_steps": 4, "residual_diff_threshold": 0.12, "num_inference_steps": STEPS}
        | settings
    )
    adapter = cache_dit.BlockAdapter(
        transformer=model,
        blocks=model.blocks,
        forward_pattern=getattr(cache_dit.ForwardPattern, f"Pattern_{pattern}"),
    )
    cache_dit.enable_cache(adapter, cache_config=config, calibrator_config=calibrator_config, **options)
    for _ in range(2):
        denoise(model)
    return steps_of(cache_dit, model, model.blocks)


def _config(cache_dit: Any, **changes: Any) -> Any:
    return cache_dit.DBCacheConfig(
        **{"Fn_compute_blocks": 1, "max_warmup_steps": 3, "residual_diff_threshold": 0.3} | changes
    )


def flux_pipeline(cache_dit: Any, options: dict[str, Any]) -> Steps:
    """FLUX as a pipeline: its two block lists decide together."""
    pipe, call = _family("Flux")
    cache_dit.enable_cache(pipe, cache_config=_config(cache_dit, residual_diff_threshold=0.95), **options)
    pipe(**call)
    return steps_of(cache_dit, pipe, pipe.transformer)


def flux_adapter(cache_dit: Any, options: dict[str, Any]) -> Steps:
    """FLUX with settings of each block list."""
    pipe, call = _family("Flux")
    patterns = cache_dit.ForwardPattern
    adapter = cache_dit.BlockAdapter(
        pipe=pipe,
        transformer=pipe.transformer,
        blocks=[pipe.transformer.transformer_blocks, pipe.transformer.single_transformer_blocks],
        forward_pattern=[patterns.Pattern_1, patterns.Pattern_1],
        params_modifiers=[
            cache_dit.ParamsModifier(cache_config=cache_dit.DBCacheConfig().reset(max_warmup_steps=4)),
            cache_dit.ParamsModifier(cache_config=cache_dit.DBCacheConfig().reset(residual_diff_threshold=0.97)),
        ],
    )
    cache_dit.enable_cache(adapter, cache_config=_config(cache_dit, residual_diff_threshold=0.9), **options)
    pipe(**call)
    return steps_of(cache_dit, adapter, pipe.transformer.transformer_blocks, pipe.transformer.single_transformer_blocks)


def wan_experts(cache_dit: Any, options: dict[str, Any]) -> Steps:
    """Wan 2.2's two transformers, with settings of each."""
    pipe, call = _family("Wan22")
    patterns = cache_dit.ForwardPattern
    modifiers = [
        cache_dit.ParamsModifier(cache_config=cache_dit.DBCacheConfig().reset(max_warmup_steps=warm_up))
        for warm_up in (2, 4)
    ]
    adapter = cache_dit.BlockAdapter(
        pipe=pipe,
        transformer=[pipe.transformer, pipe.transformer_2],
        blocks=[pipe.transformer.blocks, pipe.transformer_2.blocks],
        forward_pattern=[patterns.Pattern_2, patterns.Pattern_2],
        params_modifiers=modifiers,
        has_separate_cfg=True,
    )
    cache_dit.enable_cache(adapter, cache_config=_config(cache_dit, residual_diff_threshold=0.4), **options)
    pipe(**call)
    lists = pipe.transformer.blocks, pipe.transformer_2.blocks
    return [
        *steps_of(cache_dit, adapter, *lists),
        *steps_of(cache_dit, adapter, *lists, name="cfg_cached_steps"),
    ]


def _family(name: str) -> tuple[Any, dict[str, Any]]:
    """A tiny pipeline, and the arguments of its call."""
    from lib.families import FAMILIES

    family = FAMILIES[name]
    call = family.call | family.sizes[0] | {"num_inference_steps": STEPS, "output_type": "latent"}
    call.pop("true_cfg_scale", None)
    return family.build(), call | {"generator": torch.Generator().manual_seed(0)}


def calibrated(cache_dit: Any, options: dict[str, Any], name: str) -> Steps:
    """One stream, with a calibrator."""
    calibrator = getattr(cache_dit, f"{name}CalibratorConfig")()
    return pattern_case(cache_dit, options, 3, calibrator_config=calibrator)


def masked(cache_dit: Any, options: dict[str, Any]) -> Steps:
    """A mask, whose zeros the difference decides about."""
    mask = cache_dit.steps_mask(compute_bins=[6, 1, 1, 1], cache_bins=[3, 3, 5])
    return pattern_case(cache_dit, options, 1, residual_diff_threshold=0.9, steps_computation_mask=mask)


Case = Callable[[Any, dict[str, Any]], Steps]
CASES: dict[str, Case] = {
    **{f"pattern {pattern}": partial(pattern_case, pattern=pattern) for pattern in range(6)},
    "last blocks, limits": partial(
        pattern_case, pattern=0, Bn_compute_blocks=1, max_cached_steps=7, max_continuous_cached_steps=2
    ),
    "always": partial(pattern_case, pattern=0, residual_diff_threshold=1.0),
    "every second warm-up step": partial(pattern_case, pattern=3, max_warmup_steps=8, warmup_interval=2),
    **{name: partial(calibrated, name=name) for name in ("TaylorSeer", "FoCa")},
    "DBPrune": partial(pattern_case, pattern=0, config_class="DBPruneConfig", residual_diff_threshold=0.07),
    "mask": masked,
    "FLUX": flux_pipeline,
    "FLUX with an adapter": flux_adapter,
    "Wan 2.2": wan_experts,
}


def steps_of_cases(name: str) -> dict[str, Steps]:
    """The cached steps of every case, by the package of that name."""
    cache_dit = import_module(name)
    options = {"inner_backend": "eager"} if name.startswith("cachedit_fx") else {}
    return {case: run(cache_dit, options) for case, run in CASES.items()}


def predictions(name: str) -> dict[str, list[float]]:
    """What the calibrators' classes predict on plain tensors, after five computed steps and more."""
    package = import_module(name)
    module = package if name.startswith("cachedit_fx") else import_module(f"{name}.caching.cache_contexts.calibrators")
    results = {}
    for title, arguments in (("TaylorSeer", {"n_derivatives": 1}), ("TaylorSeer", {"n_derivatives": 2}), ("FoCa", {})):
        calibrator = getattr(module, f"{title}Calibrator")(**arguments)
        predicted = results[f"{title} {arguments}"] = list[float]()
        calibrator.maybe_init_state()
        for step in range(13):  # four steps after the latest computed one: from the fifth on FoCa differs
            value = torch.tensor([math.sin(step / 3), step**1.5])
            calibrator.mark_step_begin()
            if step < 5 or step in (7, 8):
                calibrator.update(value)
            else:
                predicted.extend(calibrator.approximate().tolist())
    return results


def masks(name: str) -> dict[str, list[int]]:
    """The masks of every policy and number of steps that cache-dit has one for."""
    steps_mask, prefix = import_module(name).steps_mask, "cache-dit/" if name.startswith("cachedit_fx") else ""
    return {
        f"{policy} {steps}": steps_mask(total_steps=steps, mask_policy=prefix + policy)
        for policy in ("slow", "medium", "fast", "ultra")
        for steps in (4, 6, *range(8, 101))
    }


CONFIGS = (
    "DBCacheConfig",
    "DBPruneConfig",
    "TaylorSeerCalibratorConfig",
    "FoCaCalibratorConfig",
    "DMDCalibratorConfig",
    "ParallelismConfig",
    "QuantizeConfig",
    "BlockAdapter",
    "CacheStats",
)


def fields_of(name: str) -> dict[str, dict[str, str]]:
    """Class -> public field -> its default, which is "" if a function makes it."""
    package = import_module(name)
    statistics = package if hasattr(package, "CacheStats") else import_module(f"{name}.summary")
    classes = {title: getattr(statistics if title == "CacheStats" else package, title) for title in CONFIGS}
    return {
        title: {
            each.name: "" if each.default is dataclasses.MISSING else str(each.default)
            for each in dataclasses.fields(kind)
            if each.name[0] != "_"
        }
        for title, kind in classes.items()
    }


def main(name: str) -> None:
    torch.set_num_threads(1)
    answers = {"steps": steps_of_cases, "predictions": predictions, "masks": masks, "fields": fields_of}
    print(json.dumps({title: answer(name) for title, answer in answers.items()}))


if __name__ == "__main__":
    main(sys.argv[1])
