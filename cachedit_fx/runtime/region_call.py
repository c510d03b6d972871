"""Decides about each region of a graph in one call, then computes or bypasses the region.

entry = region_call.decide(0, reference, hidden, streams)        position, difference, the policy's decision
results = region_call.run(entry, compute, inputs, bases, ...)    computed and stored, or restored
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from cachedit_fx.config.calibrators import CalibratorConfig
from cachedit_fx.config.options import LoopSettings
from cachedit_fx.config.rules import ContractError
from cachedit_fx.runtime.calibrators import Moment, calibrator_of, coefficients, values_kept
from cachedit_fx.runtime.call import STRAY, Call
from cachedit_fx.runtime.forms import CallForms, Forms
from cachedit_fx.runtime.guard import Residual, read_differences
from cachedit_fx.runtime.memory import BranchMemory, copy_of
from cachedit_fx.runtime.policies.base import Action, Decision, Situation, context_start, decision_of
from cachedit_fx.runtime.ranks import Ranks
from cachedit_fx.runtime.region import RegionInfo, RegionKey
from cachedit_fx.runtime.stopwatch import Stopwatch


class Entry(NamedTuple):
    """A region that is about to run: the decision, and the values that `run` needs."""

    info: RegionInfo
    key: RegionKey
    settings: LoopSettings
    situation: Situation
    decision: Decision
    memory: BranchMemory
    residual: Residual | None
    """r, if it may be compared."""
    signature: Hashable
    device: torch.device | None


class RegionCall:
    """Decides and runs the regions of one graph in one call.

    Args:
        call: the transformer call that the graph is a part of.
        regions: as planned, indexed by the numbers that the graph passes to `decide`.
        keys: the regions' keys in the session.
        values_last: whether nothing writes to the regions' values before the call ends. If not, they are copied.
        on_locate: called in turn as soon as the call's position is known.
        forms: chooses the regions' forms; None if each has one only.
        ranks: those that hold parts of the regions' values, and decide together; None if this one holds all.
    """

    def __init__(
        self,
        call: Call,
        regions: Sequence[RegionInfo],
        keys: Sequence[RegionKey],
        values_last: bool = True,
        on_locate: Sequence[Callable[[], None]] = (),
        forms: CallForms | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.call, self.regions, self.keys, self.values_last = call, regions, keys, values_last
        self.on_locate, self.forms, self.ranks = on_locate, forms, ranks
        self.session = call.session
        options = call.session.state.options
        self.settings = [options.settings_of(region.loop) for region in regions]

    def decide(
        self,
        number: int,
        reference: torch.Tensor | None,
        hidden: torch.Tensor | None,
        streams: Sequence[torch.Tensor],
    ) -> Entry | None:
        """Decide whether to compute region `number` or to reuse its stored values. None: compute, and store nothing.

        Args:
            reference: base of the hidden states after the first F blocks (H_in in a plain chain), of any shape; None
                if there is no base.
            hidden: the hidden states after the first F blocks, H_F; None if F is 0. For a region of one block, the
                block's input, without a reference.
            streams: the values that enter the region. Stored values must fit their shapes.
        """
        if self.session.is_stray:
            self._pass_stray()
            return None
        key, policy = self.keys[number], self.settings[number].policy
        tensors = [stream for stream in streams if isinstance(stream, torch.Tensor)]
        signature = (
            # a rank's part may keep its shape when the whole value does not
            self.call.forms if self.ranks is not None else None,
            *[(tensor.shape, tensor.dtype) for tensor in tensors],
            *[stream for stream in streams if not isinstance(stream, torch.Tensor)],
        )
        residual = None
        if hidden is not None and policy.measures:
            spare = self.session.spares.pop(key, None)
            residual = Residual.of(hidden, reference, spare, policy.config.downsample_factor)
        was_located = self.call.is_located
        differences = self._locate(key, residual, signature)
        for notice in () if was_located else self.on_locate:
            notice()
        if self.call.position is None:
            return None
        _, step, branch = self.call.position
        settings = self.session.settings(self.regions[number].loop, step, self.call.tick)
        policy = settings.policy
        memory, start = self.session.memory(key, branch), context_start(policy.config, step)
        if memory.start != start:
            self.call.on_failure(memory.forget(start))
            differences = {}
        situation = Situation(step - start, memory.stored_for(signature), key.block)

        def measure() -> float:
            return self._difference(key, settings, memory, residual, differences)

        history = self.session.history(key.chain, branch, start, policy)
        decision = decision_of(policy, situation, history, measure)
        warning = policy.warning(decision)
        if warning is not None:
            self.session.state.warn_once(warning)
        device = tensors[0].device if tensors else None
        return Entry(self.regions[number], key, settings, situation, decision, memory, residual, signature, device)

    def _pass_stray(self) -> None:
        """Count a call that may belong to any session, and explain it once."""
        if self.call.is_located:
            return
        self.call.is_located = True
        self.call.on_success(lambda: self.session.record_uncached(STRAY))
        self.session.state.warn_once(
            "no caching: this thread's call is in no session(...), while another thread's is. Open the block in the "
            "thread that calls the model: asyncio.to_thread takes it along, run_in_executor does not"
        )

    def run(
        self,
        entry: Entry | None,
        compute: Callable[..., tuple[Any, ...]],
        inputs: Sequence[Any],
        bases: Callable[..., tuple[Any, ...]],
        base_inputs: Sequence[Any],
        forms: Forms = (),
    ) -> tuple[Any, ...]:
        """Carry out the decision.

        Args:
            compute: the region, from `inputs` to its results.
            bases: from `base_inputs` to the base of each result; None for a result without a base.
            forms: the region's other forms, if it has some.

        Returns:
            The region's results, computed and stored, or restored from stored values and bases.
        """
        if entry is None or self.call.position is None:
            return compute(*inputs)
        _, step, branch = self.call.position
        decision = entry.decision
        now = Moment(step, self.call.now() if entry.settings.calibrator else None, decision.action is Action.COMPUTE)
        watch = Stopwatch(entry.device)
        names: tuple[str, ...] = ()
        if decision.action is Action.REUSE:
            results = _restored(entry, now, bases, base_inputs, self.ranks)
        else:
            if self.forms is not None and forms:
                names, form = self.forms.choose(forms, entry.key, entry.settings.policy.config)
                compute, inputs = form or compute, self.forms.inputs_of(names, inputs)
            results = compute(*inputs)
        watch.stop()
        self._advance(entry, branch)
        stored, stored_bases = results, functools.partial(bases, *base_inputs)
        if not self.values_last and decision.action is Action.COMPUTE:
            if entry.residual is not None:
                entry.residual.copy()
            copies = tuple(None if base is None else copy_of(base) for base in stored_bases())
            stored, stored_bases = tuple(map(copy_of, results)), functools.partial(tuple, copies)

        def record() -> None:
            spare = entry.residual.spare if entry.residual is not None else None
            if decision.action is Action.REUSE:
                entry.memory.trail.insert(0, now)
            else:
                if entry.residual is not None:
                    entry.memory.reference, spare = entry.residual.keep(entry.memory.reference)
                if entry.settings.policy.reuses:
                    _store(entry, now, stored, stored_bases())
            if spare is not None:
                self.session.spares[entry.key] = spare
            stats = self.session.region_stats(entry.key, entry.info, entry.settings.policy.config)
            stats.record(branch, step, decision, entry.key.block, names)
            self.session.watches.append((stats, decision.action, watch))

        self.call.on_success(record)
        return results

    def _advance(self, entry: Entry, branch: int) -> None:
        """Let the policy advance its history by its decision."""
        chain, policy, start = entry.key.chain, entry.settings.policy, entry.memory.start
        history = self.session.history(chain, branch, start, policy)
        advanced = policy.advance(history, entry.situation, entry.decision)
        self.call.on_failure(self.session.set_history(chain, branch, start, advanced))

    def _difference(
        self,
        key: RegionKey,
        settings: LoopSettings,
        memory: BranchMemory,
        residual: Residual | None,
        differences: Mapping[int, float],
    ) -> float:
        """The difference that the policy asks for. It may be shared by the step's branches, or read already."""
        assert self.call.position is not None
        _, step, branch = self.call.position
        shared = self.session.shared_differences
        if not settings.policy.config.cfg_diff_compute_separate and (key, step) in shared:
            return shared[key, step]
        difference = differences.get(branch)
        if difference is None:
            if memory.reference is None or residual is None:
                raise ContractError(
                    f"{type(settings.policy).__name__}.decide asks for a difference, and there is none: call `measure` "
                    "only if situation.stored is Stored.FITS and the policy's `measures` is True"
                )
            (difference,), _ = read_differences(residual, [memory.reference], ranks=self.ranks)
        shared[key, step] = difference
        self.call.on_failure(lambda: shared.__delitem__((key, step)))
        return difference

    def _locate(self, key: RegionKey, residual: Residual | None, signature: Hashable) -> dict[int, float]:
        """Find the call's position, once in a call. Returns branch -> difference, for differences read on the way.

        Without a pipeline's clock, a timestep on the device is read in one transfer with differences: one for each
        branch that the call may belong to.
        """
        call, tracker = self.call, self.session.tracker
        if call.is_located:
            return {}
        differences: dict[int, float] = {}
        if not tracker.is_clocked(call.tick) and call.time.waits and call.time.unread is not None:
            references = {} if residual is None else self._references(key, signature)
            if residual is not None and references:
                previous, ranks = list(references.values()), self.ranks
                values, (number,) = read_differences(residual, previous, call.time.unread, ranks=ranks)
                differences = dict(zip(references, values, strict=True))
                call.time.set(number)
        return {} if call.locate_region(signature) else differences

    def _references(self, key: RegionKey, signature: Hashable) -> dict[int, torch.Tensor]:
        """Branch -> reference that r may be compared with, for every branch that the call may belong to."""
        candidates = self.session.tracker.candidates(self.call.branch_name)
        memories = [(branch, self.session.memories.get((key, branch))) for branch in candidates]
        return {
            branch: memory.reference
            for branch, memory in memories
            if memory is not None and memory.signature == signature and memory.reference is not None
        }


def _restored(
    entry: Entry,
    now: Moment,
    bases: Callable[..., tuple[torch.Tensor | None, ...]],
    base_inputs: Sequence[Any],
    ranks: Ranks | None,
) -> tuple[torch.Tensor, ...]:
    """The region's results from stored values."""
    memory, calibrator = entry.memory, entry.settings.calibrator
    weights = coefficients(calibrator, memory.read_trail(ranks), now)
    shapes = [buffers[0].shape for buffers in memory.stored]
    return memory.restore(_bases(calibrator, bases(*base_inputs), shapes), weights)


def _store(
    entry: Entry,
    now: Moment,
    results: Sequence[torch.Tensor],
    bases: Sequence[torch.Tensor | None],
) -> None:
    """Keep the results of a computed step for later ones."""
    memory, calibrator = entry.memory, entry.settings.calibrator
    if entry.signature != memory.signature:
        memory.trail, memory.unread = [], {}
    memory.signature = entry.signature
    dtype = calibrator.calibrator_state_dtype if calibrator is not None else "wider"
    result_bases = _bases(calibrator, bases, [result.shape for result in results])
    uses_products = calibrator_of(calibrator).uses_products
    memory.store(results, result_bases, now, values_kept(calibrator), dtype, uses_products)


def _bases(
    calibrator: CalibratorConfig | None,
    bases: Sequence[torch.Tensor | None],
    shapes: Sequence[torch.Size],
) -> tuple[torch.Tensor | None, ...]:
    """The bases of results of these shapes.

    Bases are None if whole values are predicted. A base of another shape is None too: a length that depends on data has
    changed.
    """
    if calibrator is not None and calibrator.calibrator_cache_type != "residual":
        return (None,) * len(shapes)
    pairs = zip(bases, shapes, strict=True)
    return tuple(base if base is None or base.shape == shape else None for base, shape in pairs)
