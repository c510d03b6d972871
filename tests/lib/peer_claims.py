"""What docs/coming-from-cache-dit.md says of cache-dit 1.5.3, tried on it. Prints claim -> whether it holds, as JSON.

python tests/lib/peer_claims.py        in an environment with cache-dit
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402 - after the path
from lib.peer_runs import STEPS, Denoiser, denoise, pattern_case  # noqa: E402


def adapter_of(cache_dit: Any, model: Any, pattern: int) -> Any:
    patterns = list(cache_dit.ForwardPattern)
    return cache_dit.BlockAdapter(transformer=model, blocks=model.blocks, forward_pattern=patterns[pattern])


def keeps_the_first_config(cache_dit: Any) -> bool:
    model = Denoiser(0)
    for warm_up in (4, 15):
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1, max_warmup_steps=warm_up, residual_diff_threshold=1.0, num_inference_steps=STEPS
        )
        cache_dit.enable_cache(adapter_of(cache_dit, model, 0), cache_config=config)
    denoise(model)
    return model.blocks._cached_steps == list(range(4, STEPS))


def ignores_unknown_keys(cache_dit: Any) -> bool:
    config, _ = cache_dit.load_cache_config({"cache_config": {"max_warm_up_steps": 4}})
    return (config, config.reset(warm_up=4), config.update(warm_up=4)) == (config,) * 3


def accepts_any_threshold(cache_dit: Any) -> bool:
    return cache_dit.DBCacheConfig(residual_diff_threshold="abc").residual_diff_threshold == "abc"


def has_uneven_masks(cache_dit: Any) -> bool:
    mask = cache_dit.steps_mask(total_steps=16, mask_policy="ultra")
    return "".join(map(str, mask)) == "1100000000000001"


def has_no_masks_of_five_and_seven(cache_dit: Any) -> bool:
    return all(raises(AssertionError, cache_dit.steps_mask, total_steps=steps) for steps in (5, 7))


def prunes_no_single_streams(cache_dit: Any) -> bool:
    return all(
        raises(TypeError, pattern_case, cache_dit, {}, pattern, config_class="DBPruneConfig") for pattern in (3, 4, 5)
    )


def returns_none_for_unknown_types(cache_dit: Any) -> bool:
    return cache_dit.cache_type("DBCash") is cache_dit.NONE


def adds_differences_up_over_the_generation(cache_dit: Any) -> bool:
    """So that nothing is cached any more once the limit is reached."""
    (free,) = pattern_case(cache_dit, {}, 3)
    (limited,) = pattern_case(cache_dit, {}, 3, max_accumulated_residual_diff_threshold=0.3)
    return limited == free[: len(limited)] and 0 < len(limited) < len(free) - 3


def uses_derivatives_from_the_third_step_on(cache_dit: Any) -> bool:
    from cache_dit.caching.cache_contexts.calibrators import TaylorSeerCalibrator

    calibrator = TaylorSeerCalibrator(n_derivatives=1, max_warmup_steps=2, skip_interval_steps=100)
    return [float(calibrator.step(torch.tensor(float(step)))) for step in range(3)] == [0, 1, 1]


def adds_an_entry_for_a_transformer(cache_dit: Any) -> bool:
    """And has no other for an adapter."""
    model = Denoiser(0)
    adapter = adapter_of(cache_dit, model, 0)
    config = cache_dit.DBCacheConfig(Fn_compute_blocks=1, num_inference_steps=STEPS)
    cache_dit.enable_cache(adapter, cache_config=config)
    denoise(model)
    return [len(cache_dit.summary(each, logging=False)) for each in (model, adapter)] == [2, 1]


def keeps_names_of_masks_and_bare_exponents_as_text(cache_dit: Any) -> bool:
    flat, _ = cache_dit.load_cache_config({"steps_computation_mask": "fast", "num_inference_steps": 28})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache.yaml"
        path.write_text("cache_config: {residual_diff_threshold: 8e-2}")
        exponent, _ = cache_dit.load_cache_config(str(path))
    return (flat.steps_computation_mask, exponent.residual_diff_threshold) == ("fast", "8e-2")


def switches_a_reset_calibrator_off(cache_dit: Any) -> bool:
    from cache_dit.caching.cache_contexts.cache_context import CachedContext

    calibrator = cache_dit.TaylorSeerCalibratorConfig().reset(taylorseer_order=2)
    context = CachedContext("name", cache_config=cache_dit.DBCacheConfig(), calibrator_config=calibrator)
    return not context.enable_calibrator()


def takes_no_slices(cache_dit: Any) -> bool:
    model = Denoiser(3)
    pattern = cache_dit.ForwardPattern.Pattern_3
    return raises(
        AssertionError, cache_dit.BlockAdapter, transformer=model, blocks=model.blocks[1:3], forward_pattern=pattern
    )


def raises(kind: type[Exception], function: Callable[..., Any], *arguments: Any, **settings: Any) -> bool:
    try:
        function(*arguments, **settings)
    except kind:
        return True
    return False


CLAIMS = (
    keeps_the_first_config,
    ignores_unknown_keys,
    accepts_any_threshold,
    has_uneven_masks,
    has_no_masks_of_five_and_seven,
    prunes_no_single_streams,
    returns_none_for_unknown_types,
    adds_differences_up_over_the_generation,
    uses_derivatives_from_the_third_step_on,
    adds_an_entry_for_a_transformer,
    keeps_names_of_masks_and_bare_exponents_as_text,
    switches_a_reset_calibrator_off,
    takes_no_slices,
)


if __name__ == "__main__":
    torch.set_num_threads(1)
    import cache_dit as peer

    print(json.dumps({claim.__name__: bool(claim(peer)) for claim in CLAIMS}))
