"""One graph's part of a call: decides about each region, then computes or bypasses it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch

from cachedit_fx.config.cache import DBCacheConfig, DBPruneConfig
from cachedit_fx.config.calibrators import CalibratorConfig
from cachedit_fx.runtime.calibrators import Moment, coefficients, values_kept
from cachedit_fx.runtime.call import Call, NewGeneration
from cachedit_fx.runtime.guard import Residual, _thinned, on_host, read_back
from cachedit_fx.runtime.policies.base import Action, Decision, Reason
from cachedit_fx.runtime.policies.dbcache import advance, context_start, decide
from cachedit_fx.runtime.policies.dbprune import PruneHistory, decide_block
from cachedit_fx.runtime.region import RegionInfo, RegionKey
from cachedit_fx.runtime.stopwatch import Stopwatch


class GraphCall:
    """One graph's part of a call, as the rewritten graph sees it. The graph numbers its regions; `keys` are what the
    session knows them by, whichever graphs the call consists of."""

    def __init__(self, call: Call, regions: Sequence[RegionInfo], keys: Sequence[RegionKey]) -> None:
        self.call, self.regions, self.keys = call, regions, keys
        self.session = call.session
        options = call.session.cache.options
        self.policies = [options.policy(region.loop) for region in regions]
        self._entered: dict[int, tuple[Residual | None, Hashable, torch.device | None]] = {}
        """Of each region: r, where it may be compared, and signature and device of what entered."""

    def decide(
        self,
        number: int,
        reference: torch.Tensor | None,
        hidden: torch.Tensor | None,
        streams: Sequence[torch.Tensor],
    ) -> Decision:
        """Compute region `number` or reuse what is stored?

        Args:
            reference: base of the hidden states behind the first F blocks (H_in in a plain chain).
            hidden: those hidden states, H_F; None where F is 0. Of a single block: what enters it, without a reference.
            streams: the values that enter the region; what is stored must fit their shapes.
        """
        region, (config, _) = self.keys[number], self.policies[number]
        tensors = [stream for stream in streams if isinstance(stream, torch.Tensor)]
        signature = (
            *[(tensor.shape, tensor.dtype) for tensor in tensors],
            *[stream for stream in streams if not isinstance(stream, torch.Tensor)],
        )
        current = None
        if hidden is not None and _may_measure(config):
            fits = reference is not None and reference.shape == hidden.shape
            every = config.downsample_factor
            base = _thinned(reference, every) if reference is not None and fits else None
            current = Residual(_thinned(hidden, every), base, self.session.spares.pop(region, None))
        measured: dict[int, float] = {}
        if self.call.position is None:
            measured = self._locate(region, current, signature)
        assert self.call.position is not None
        _, step, branch = self.call.position
        memory = self.session.memory(region, branch)
        start = context_start(config, step)
        if start != memory.start:
            memory.forget(start)
            measured = {}
        history = memory.history
        if memory.signature != signature:
            history = replace(history, stored=history.stored and memory.signature is not None, shapes_match=False)

        def difference() -> float:
            shared = self.session.shared_differences
            if not config.cfg_diff_compute_separate and (region, step) in shared:
                return shared[region, step]
            value = measured.get(branch)
            if value is None:
                assert memory.reference is not None and current is not None
                (value,) = read_back([current.differences([memory.reference])])
            shared[region, step] = value
            return value

        if isinstance(config, DBPruneConfig):
            decision = decide_block(config, self._prune_history(region, start), history, difference)
        else:
            decision = decide(config, step - start, history, difference)
        self._entered[number] = (current, signature, tensors[0].device if tensors else None)
        self._warn(config, decision)
        return decision

    def run(
        self,
        number: int,
        decision: Decision,
        compute: Callable[..., tuple[Any, ...]],
        inputs: Sequence[Any],
        bases: Callable[..., tuple[Any, ...]],
        continued: Sequence[Any],
    ) -> tuple[Any, ...]:
        """Carry the decision out: the region's results, computed from `inputs` and stored, or restored from what is
        stored and from `bases(*continued)`."""
        assert self.call.position is not None
        region, (config, calibrator) = self.keys[number], self.policies[number]
        _, step, branch = self.call.position
        now = Moment(step, self.call.now, decision.action is Action.COMPUTE)
        memory = self.session.memory(region, branch)
        current, signature, device = self._entered[number]
        watch = Stopwatch(device)
        spare = current.spare if current is not None else None
        if decision.action is Action.REUSE:
            weights = coefficients(calibrator, memory.trail, now)
            shapes = [buffers[0].shape for buffers in memory.stored]
            results = memory.restore(_bases(calibrator, bases, continued, shapes), weights)
            memory.trail.insert(0, now)
        else:
            if current is not None:
                memory.reference, spare = current.keep(memory.reference)
            results = compute(*inputs)
            if may_reuse(config):
                if signature != memory.signature:
                    memory.trail = []
                memory.signature = signature
                found = _bases(calibrator, bases, continued, [result.shape for result in results])
                dtype = calibrator.calibrator_state_dtype if calibrator is not None else "wider"
                memory.store(results, found, now, values_kept(calibrator), dtype)
        if spare is not None:
            self.session.spares[region] = spare
        memory.history = advance(memory.history, decision)
        chain, block = region
        if block is not None:
            history = self._prune_history(region, memory.start).after(decision)
            self.session.prune_histories[chain, branch, memory.start] = history
        stats = self.session.region_stats(region, self.regions[number])
        stats.record(branch, step, decision, block)
        self.session.watches.append((stats, decision.action, watch.stop()))
        return results

    def _prune_history(self, region: RegionKey, start: int) -> PruneHistory:
        """Of the region's chain, at the present step, which is counted from `start`."""
        assert self.call.position is not None
        _, step, branch = self.call.position
        return self.session.prune_histories.get((region[0], branch, start), PruneHistory()).at(step - start)

    def _locate(self, region: RegionKey, current: Residual | None, signature: Hashable) -> dict[int, float]:
        """Find the call's position; where the timestep is on the device, read it together with the differences against
        every branch that the call may turn out to be."""
        call, tracker = self.call, self.session.tracker
        time_now, name = call.time, call.branch_name
        measured: dict[int, float] = {}
        if isinstance(time_now, torch.Tensor):
            time_now = time_now.amax() if time_now.numel() > 1 else time_now
            previous = {} if current is None or on_host(time_now) else self._references(region, signature)
            if current is not None and previous:
                time_now, *differences = read_back([time_now, current.differences(list(previous.values()))])
                measured = dict(zip(previous, differences, strict=True))
            else:
                (time_now,) = read_back([time_now])
        call.position, call.now = tracker.observe(time_now, name, signature), time_now
        if call.position.generation != self.session.generation:
            measured = {}
            self.session.begin(call.position)
            if not call.is_guarded:
                raise NewGeneration
        return measured

    def _references(self, region: RegionKey, signature: Hashable) -> dict[int, torch.Tensor]:
        """What r may have to be compared with, by the branch that the call may turn out to be."""
        candidates = self.session.tracker.candidates(self.call.branch_name)
        memories = [(branch, self.session.memories.get((region, branch))) for branch in candidates]
        return {
            branch: memory.reference
            for branch, memory in memories
            if memory is not None and memory.signature == signature and memory.reference is not None
        }

    def _warn(self, config: DBCacheConfig, decision: Decision) -> None:
        cache = self.session.cache
        if decision.reason is Reason.NOT_FINITE:
            cache.warn_once("a difference is infinite or not a number: such steps are computed")
        elif decision.reason is Reason.MASK_ENDED:
            mask = config.steps_computation_mask or ()
            cache.warn_once(f"steps_computation_mask has {len(mask)} digits; steps past its end are computed")


def _bases(
    calibrator: CalibratorConfig | None,
    bases: Callable[..., tuple[torch.Tensor | None, ...]],
    continued: Sequence[Any],
    shapes: Sequence[torch.Size],
) -> tuple[torch.Tensor | None, ...]:
    """What the stored residuals of results of these shapes are relative to; nothing where whole values are predicted,
    or where a length that depends on data has turned out another."""
    if calibrator is not None and calibrator.calibrator_cache_type != "residual":
        return (None,) * len(shapes)
    found = zip(bases(*continued), shapes, strict=True)
    return tuple(base if base is None or base.shape == shape else None for base, shape in found)


def _may_measure(config: DBCacheConfig) -> bool:
    return config.residual_diff_threshold > 0 and not config.static


def may_reuse(config: DBCacheConfig) -> bool:
    """Whether any step may ever reuse: if not, nothing needs to be stored."""
    if config.static:
        return not all(config.steps_computation_mask or ())
    return config.residual_diff_threshold > 0
