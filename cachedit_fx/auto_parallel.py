"""Chooses how all ranks share a sample, for `parallel="auto"`, from the first graph that holds a block loop.

graph ──► heads, lengths, work of its blocks ─┐
device, LOCAL_WORLD_SIZE ──► cards, links ────┼──► parallel_plan.choose ──► cfg_parallel, ring_size, ulysses_size, ...
pipeline, batch ──► branches of guidance ─────┘

All ranks must choose alike, so nothing is timed or drawn: equal graphs on equal cards give equal choices.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch.distributed as dist
from torch import fx

from cachedit_fx.capture import copy_of
from cachedit_fx.config.options import Options
from cachedit_fx.config.rules import OptionError
from cachedit_fx.parallel_plan.cards import assumed_cards
from cachedit_fx.parallel_plan.choice import Plan, choose
from cachedit_fx.parallel_plan.counts import blocks_of
from cachedit_fx.parallel_plan.descriptions import Blocks, Float8, Model, Split
from cachedit_fx.pass_pipeline import analyses
from cachedit_fx.passes.base import Facts, Traced
from cachedit_fx.passes.block_loops import Detection
from cachedit_fx.passes.graph_cost import bytes_of, hint
from cachedit_fx.passes.graph_values import tensor_of
from cachedit_fx.passes.infer_batch_axis import BatchAxes
from cachedit_fx.passes.infer_sequence_axes import InferSequenceAxes
from cachedit_fx.runtime.clock import guidance
from cachedit_fx.runtime.host_pieces import mark_weights

logger = logging.getLogger(__name__)

HEADING = 'parallel="auto": '
"""Beginning of every note."""


@dataclass(frozen=True)
class ParallelChoice:
    """Fact: how the ranks share a sample, as chosen for this graph or for an earlier one of the module.

    Attributes:
        notes: sentences for people: what was chosen and why, and what was not.
    """

    split: Split
    notes: tuple[str, ...]

    def applied(self, options: Options) -> Options:
        """The options with the choice in place of `parallel`."""
        split = self.split
        return replace(
            options,
            parallel=None,
            cfg_parallel=split.cfg > 1,
            ring_size=split.ring,
            ulysses_size=split.ulysses,
            ulysses_async=split.is_async,
        )


def chosen(gm: fx.GraphModule, options: Options, traced: Traced) -> ParallelChoice | None:
    """How all ranks share a sample of this graph; None if it holds no block loop. The graph stays as it is."""
    ranks = dist.get_world_size()
    if ranks == 1:
        return ParallelChoice(Split(), (f"{HEADING}there is one rank",))
    copied = copy_of(gm)
    mark_weights(copied)
    outcome = analyses(options, traced).run(copied)
    detection = outcome.facts.get(Detection)
    if detection is None or not detection.chain:
        return None
    step = _Step(outcome.graph_module, outcome.facts, detection, ranks, traced.is_branch)
    no_cfg = _cfg_obstacle(options)
    plan = step.plan(options.ulysses_float8, no_cfg) if step.model.blocks else None
    if plan is None or plan.best is None:
        choice = _fallback(step.model, ranks, no_cfg)
    else:
        cards = step.cards
        nodes = f"{cards.per_node} a node" if cards.per_node < ranks else "all in one node"
        inputs = f"chosen for {ranks} ranks on {cards.name}, {nodes}, and {step.model.name}"
        choice = ParallelChoice(plan.best.split, tuple(f"{HEADING}{note}" for note in (inputs, *plan.notes)))
    for note in choice.notes:
        logger.info(note)
    return choice


class _Step:
    """A step of a graph's model.

    Args:
        is_branch: whether the pipeline says that each call is one of a step's branches.

    Attributes:
        cards: those that the ranks are taken to have.
        model: what the step computes. Its name says how many branches it has, and why.
    """

    def __init__(
        self, gm: fx.GraphModule, facts: Facts, detection: Detection, ranks: int, is_branch: bool = False
    ) -> None:
        self.gm, self.facts, self.detection, self.ranks = gm, facts, detection, ranks
        self._blocks: dict[tuple[int, int], tuple[Blocks, ...]] = {}
        loop, slot = detection.chain_loops[0], detection.hidden[0]
        hidden = tensor_of(loop.carried[slot].inputs[0])
        assert hidden is not None
        self.cards = assumed_cards(hidden.device, ranks)
        batch = hint(hidden.shape[0]) if hidden.dim() > 2 else 1
        name, branches = "one branch", 1
        is_doubled = not is_branch and batch > 1 and facts.get(BatchAxes) is not None
        if is_doubled:
            name, branches = f"two halves of a batch of {batch}", 2
        elif is_branch or (batch == 1 and guidance()[1]):
            name, branches = "two branches of guidance", 2
        results = sum(bytes_of(node) for node in gm.graph.output_node().all_input_nodes if tensor_of(node) is not None)
        blocks = max(self._shared(ranks, ranks), self._shared(2, 1), key=len)
        share = results // (2 if is_doubled else 1)
        self.model = Model(name, blocks, share, hidden.dtype.itemsize, branches, is_doubled)

    def _shared(self, ranks: int, ring: int) -> tuple[Blocks, ...]:
        """The blocks whose attention this many ranks can share."""
        key = ranks, ring
        if key not in self._blocks:
            axes = InferSequenceAxes(ranks, ring).run(self.gm, self.facts)
            self._blocks[key] = () if axes is None else blocks_of(self.gm, self.detection, axes)
        return self._blocks[key]

    def plan(self, float8: Float8, no_cfg: str) -> Plan:
        """The splits, the fastest first. The first one is possible."""
        plan = choose(self.model, self.cards, self.ranks, float8=float8, no_cfg=no_cfg)
        while plan.best is not None and not self._fits(plan.best.split):
            lost = plan.best.split, "some self-attention cannot be shared so, by its heads, mask or dropout"
            plan = Plan(plan.ranked[1:], (*plan.refused, lost))
        return plan

    def _fits(self, split: Split) -> bool:
        """Whether the graph can be cut so: the formulas know no grouped heads, and no masks."""
        return split.tokens == 1 or len(self._shared(split.tokens, split.ring)) == len(self.model.blocks)


def _cfg_obstacle(options: Options) -> str:
    """Why the options do not let ranks share the branches of guidance; empty if they do."""
    try:
        replace(options, parallel=None, cfg_parallel=True)
    except OptionError as error:
        return str(error)
    return ""


def _fallback(model: Model, ranks: int, no_cfg: str) -> ParallelChoice:
    """The choice where the formulas have nothing to say."""
    is_pair = model.branches == ranks == 2 and not no_cfg
    split = Split(cfg=2) if is_pair else Split(ulysses=ranks)
    reason = "no self-attention that ranks could share was found, so nothing was estimated"
    return ParallelChoice(split, (f"{HEADING}{split.words}, for {ranks} ranks and {model.name}: {reason}",))
