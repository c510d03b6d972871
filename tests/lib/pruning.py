"""What the tests of DBPrune share: configs, a generation, what it pruned."""

from typing import Any

from lib.toys import denoise, noise

from cachedit_fx import (
    Action,
    DBPruneConfig,
    enable_cache,
    summary,
)

EAGER: dict[str, Any] = {"inner_backend": "eager"}
BASE = DBPruneConfig(Fn_compute_blocks=1, max_warmup_steps=2, residual_diff_threshold=0.06)
ALWAYS = BASE.reset(max_warmup_steps=1, residual_diff_threshold=1e9)
"""Prunes every block that it may, so that limits alone decide."""
STILL = ALWAYS.reset(enable_separate_cfg=False)
"""For calls that all have one timestep: each is a step."""
MASK = "1101001000"
TEXTS = noise(1, 3, seed=2), noise(1, 3, seed=3) * 4


def run(model, config, calibrator=None, **arguments):
    enable_cache(model, config, calibrator, **EAGER)
    result = denoise(model, **arguments)
    (chain,) = summary(model)
    return result, chain


def fresh(shared, config, calibrator=None, granularity="block", **arguments):
    """As `run`, by a model that was never called before: of a `SharedCapture`."""
    shared.compile_anew(cache=config, calibrator=calibrator, granularity=granularity)
    result = denoise(shared, **arguments)
    (chain,) = shared.summary()
    return result, chain


def pruned(chain, branch=0):
    """The numbers of the blocks that each step pruned."""
    parts = chain.branch(branch).parts.values()
    return [[block for block, decision in blocks.items() if decision.action is Action.REUSE] for blocks in parts]


def reasons(chain, branch=0):
    return {decision.reason for decision in chain.branch(branch).every_decision}
