"""Models whose weights behind the timestep lie on the host, for tests of `time_weights="host"`."""

import copy
from typing import Any

import torch
from lib.conditioned import Conditioned, conditions, sample, times

from cachedit_fx import enable_cache
from cachedit_fx.runtime.host_tensor import HostWeight

EXACT: dict[str, Any] = {"inner_backend": "eager", "residual_diff_threshold": 0.0, "Fn_compute_blocks": 1}
HOSTED = EXACT | {"time_weights": "host"}


def small(pooled=True):
    return Conditioned(blocks=2, pooled=pooled)


def timed():
    return small(pooled=False)


def make(kind=small, **options):
    torch.manual_seed(0)
    return enable_cache(kind(), **(HOSTED | options))


def generation(model, seed=0, steps=4):
    """Results of a generation, each equal to the bit to those of an uncompiled copy of the model."""
    prompt, plain, results = conditions(seed), copy.deepcopy(model), []
    with torch.no_grad():
        for step, time in enumerate(times(steps)):
            results.append(model(sample(step), time, **prompt))
            assert torch.equal(results[-1], plain(sample(step), time, **prompt))
    return results


def layers_on_host(model):
    return [name for name, weight in model.named_parameters() if isinstance(weight, HostWeight)]


def behind_time(model):
    return [name for name, _ in model.named_parameters() if name.split(".")[-2] in ("time", "norm_out", "modulation")]
