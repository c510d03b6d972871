"""The passes, in order."""

from __future__ import annotations

from cachedit_fx.config.options import Options
from cachedit_fx.passes.base import NOTHING_KNOWN, Pass, Traced
from cachedit_fx.passes.detect_block_loops import DetectBlockLoops
from cachedit_fx.passes.find_timestep import FindTimestep
from cachedit_fx.passes.fuse_rotary import FuseRotary
from cachedit_fx.passes.gather_inputs import GatherInputs
from cachedit_fx.passes.hoist_invariants import HoistInvariants
from cachedit_fx.passes.infer_batch_axis import InferBatchAxis
from cachedit_fx.passes.infer_dependence import InferDependence
from cachedit_fx.passes.infer_sequence_axes import InferSequenceAxes
from cachedit_fx.passes.insert_attention_forms import InsertAttentionForms
from cachedit_fx.passes.insert_cache_branch import InsertCacheBranch
from cachedit_fx.passes.insert_cfg_parallel import InsertCfgParallel
from cachedit_fx.passes.insert_low_precision import InsertLowPrecision
from cachedit_fx.passes.insert_ulysses import InsertUlysses
from cachedit_fx.passes.manager import PassManager
from cachedit_fx.passes.normalize import Normalize
from cachedit_fx.passes.outline_blocks import OutlineBlocks
from cachedit_fx.passes.overlap_collectives import OverlapCollectives
from cachedit_fx.passes.plan_regions import PlanRegions
from cachedit_fx.passes.replace_attention import ReplaceAttention
from cachedit_fx.passes.send_float8 import SendFloat8


def pass_manager(options: Options, traced: Traced = NOTHING_KNOWN) -> PassManager:
    """The passes, switched on and off by the options: `passes={"name": False}`, `cache=None`, `ulysses_size=1`.

    Raises:
        OptionError: if there are not as many ranks as the options ask for.
        PassOrderError: if a name in `passes` is no pass.
    """
    off: list[type[Pass]] = [PlanRegions, InsertCacheBranch] if options.cache is None else []
    off += [InsertLowPrecision] if options.precision is None else []
    off += [FuseRotary] if options.inner_backend == "eager" else []
    off += [ReplaceAttention] if options.attention is None else []
    off += [InsertAttentionForms] if options.attention is None or not options.attention.is_by_step else []
    off += [InferBatchAxis, InsertCfgParallel] if traced.is_branch or not options.cfg_parallel else []
    off += [InferSequenceAxes, InsertUlysses] if options.sizes.tokens == 1 else []
    off += [SendFloat8] if options.ulysses_size == 1 or not options.ulysses_float8 else []
    off += [OverlapCollectives] if options.ulysses_size == 1 or not options.ulysses_async else []
    return PassManager(pipeline(options, traced), dict(options.passes) | {pass_.name: False for pass_ in off})


def analyses(options: Options, traced: Traced) -> PassManager:
    """The passes that find the blocks, and whether two halves of the ranks could share the batch."""
    kinds = Normalize, FindTimestep, InferDependence, DetectBlockLoops
    first = [each for each in pipeline(options, traced) if isinstance(each, kinds)]
    passes = [*first, InferBatchAxis(2)]
    names = {each.name for each in passes}
    return PassManager(passes, {name: is_on for name, is_on in options.passes if name in names})


def pipeline(options: Options, traced: Traced) -> list[Pass]:
    """The passes in order, with their options."""
    grid = options.grid()
    dimensions = (grid.branches, grid.tokens, grid.ulysses, grid.ring) if grid is not None else (None,) * 4
    branches, *groups = ("" if each is None else each.name for each in dimensions)
    cuts = [settings.policy.structure() for settings in options.loop_settings]
    return [
        Normalize(),
        FuseRotary(),
        FindTimestep(options.timestep, traced.numbers),
        InferDependence(traced.sample),
        DetectBlockLoops(options.loops, traced=traced),
        InferBatchAxis(options.sizes.cfg),
        InsertCfgParallel(branches),
        InferSequenceAxes(options.sizes.tokens, options.ring_size),
        InsertUlysses(*groups),
        SendFloat8(options.ulysses_float8 == "with_keys"),
        ReplaceAttention(options.attention),
        OverlapCollectives(),
        PlanRegions(cuts, options.scope or "model", options.predicts_output, traced.kept),
        OutlineBlocks(options.granularity, canonical_layout=options.inner_backend != "eager"),
        HoistInvariants(options.compiles),
        InsertCacheBranch(),
        GatherInputs(),
        InsertLowPrecision(),
        InsertAttentionForms(),
    ]
