"""Says which ranks take part in a call, by the store of torch.distributed: before the ranks exchange anything.

    rank 0   comes to meeting 7 ─────────────► all here? ─► compare the calls
    rank 1   disables its cache: says so ────► the others raise at once, and name rank 1

A collective waits for a rank that does not come until the group's time-out, and does not say for which one. So the
ranks meet before they compare their calls: each counts its meetings in the store, and looks at the counts of the
others. A rank that will not come says why. No step needs the store: ranks meet only to compare their calls.

A rank that left is no fault if all ranks left. In one program, a rank that has not come yet is behind this one. So the
fault is what the other rank has done since the last meeting, and this one has not: it left more often, and is still
away.

Keys in the store, one of each kind for a rank, never deleted:

    cachedit_fx/<group>/<rank>   how many meetings of the group the rank came to
    cachedit_fx/left/<rank>      model -> how often the rank left since the model's last meeting, and why it is away
    cachedit_fx/process/<rank>   the machine and the id of the rank's process
"""

from __future__ import annotations

import json
import os
import select
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

POLL_SECONDS = 0.0005, 0.05
"""The pause between two looks at the store: at first, and in a long wait."""
DEATH_SECONDS = 1.0
"""How long after a failed exchange a rank's process may take to end."""
ADVICE = "All ranks of a group must call the model under the same options, or disable_cache on all of them"
_SIGNS = ("gloo", "pair closure", "NCCL", "ProcessGroup", "c10d", "Timed out waiting")
"""Words in the errors of collectives that are plain RuntimeErrors, as gloo's are."""


class RanksDisagree(RuntimeError):
    """The ranks that share a sample do not call the model in the same way."""


class RankMissing(RanksDisagree):
    """A rank does not take part in a call: it left the group, its process ended, or it did not come in time."""


@dataclass(frozen=True)
class Presence:
    """The ranks of a group, and what they say in the store. Ranks are numbered as in the whole program.

    Attributes:
        name: the group's.
        members: all ranks of the group, this one included.
        rank: this one.
        seconds: what a collective of the group waits for a rank.
        words: the options that ask for the ranks, for errors.
    """

    name: str
    members: tuple[int, ...]
    rank: int
    seconds: float
    words: str
    store: dist.Store = field(repr=False, compare=False)

    @classmethod
    def of(cls, group: dist.ProcessGroup, words: str, name: str | None = None) -> Presence:
        """The ranks of a group, which options ask for. `name` tells meetings for another purpose apart."""
        members = tuple(dist.get_process_group_ranks(group))
        return cls(name or group.group_name, members, dist.get_rank(), _seconds_of(group), words, _store())

    @property
    def heading(self) -> str:
        """The beginning of every error."""
        return f"{self.words}: "

    @contextmanager
    def meeting(self, model: str = "") -> Iterator[None]:
        """Context manager that waits until all ranks of the group have come, for what they do together inside.

        Args:
            model: name of the class that is called, if one is.

        Raises:
            RankMissing: if a rank left the group, its process ended, or it does not come within the group's time-out.
        """
        with self._watched_store():
            number = self.store.add(self._key(self.rank), 1)
        try:
            with self._watched_store():
                self._wait(number, model)
                self._return(model)
            yield
        except BaseException as error:
            # A retry must meet under the same number on all ranks. They disagree after a meeting, all together.
            if isinstance(error, RankMissing) or not isinstance(error, RanksDisagree):
                with suppress(RuntimeError):
                    self.store.add(self._key(self.rank), -1)
            raise

    def _return(self, model: str) -> None:
        """All ranks are here: forget who left the model since the last meeting. They left equally often."""
        left = _left(self.store, self.rank)
        rest = {name: entry for name, entry in left.items() if name not in (model, "")} if model else {}
        if rest != left:
            self.store.set(_left_key(self.rank), json.dumps(rest))

    def _wait(self, meeting: int, model: str) -> None:
        pause, longest = POLL_SECONDS
        end = time.monotonic() + self.seconds
        absent = [rank for rank in self.members if rank != self.rank]
        while absent := [rank for rank in absent if self._meetings(rank) < meeting]:
            for rank in absent:
                self._check(rank, model)
            if time.monotonic() > end:
                self._raise_late(absent, model)
            time.sleep(pause)
            pause = min(2 * pause, longest)

    def _meetings(self, rank: int) -> int:
        """How many meetings a rank came to."""
        key = self._key(rank)
        return int(self.store.get(key)) if self.store.check([key]) else 0

    def _check(self, rank: int, model: str) -> None:
        """Raise if a rank that has not come will not come."""
        reason = self._reason(rank, model)
        if reason is not None:
            raise RankMissing(
                f"{self.heading}rank {rank} takes no part in the call of {model or 'the model'}: it {reason}. {ADVICE}"
            )
        if self.has_ended(rank):
            raise RankMissing(self.heading + self._end_of([rank], model))

    def _reason(self, rank: int, model: str) -> str | None:
        """Why a rank is away, as far as it says so; None if it is not."""
        with suppress(RuntimeError):
            return _reason(_left(self.store, rank), _left(self.store, self.rank), model)
        return None

    def _raise_late(self, absent: list[int], model: str) -> NoReturn:
        processes = "; ".join(f"rank {rank}: {self._process(rank)}" for rank in absent)
        raise RankMissing(
            f"{self.heading}{_names(absent)} did not come to the call of {model or 'the model'} within "
            f"{self.seconds:g} s, the time-out of the group ({processes}). All ranks must call the model equally often "
            "and in the same order. Look where that rank is (py-spy dump --pid ...); if it is only slow, pass a longer "
            "timeout to init_process_group"
        )

    def _process(self, rank: int) -> str:
        """A rank's process, for people."""
        machine, pid = _process_of(self.store, rank)
        return "never enabled the cache with ulysses_size" if pid is None else f"process {pid}"

    def has_ended(self, rank: int) -> bool:
        """Whether a rank's process has ended, if it ran on this machine."""
        machine, pid = _process_of(self.store, rank)
        return pid is not None and machine == _machine() and _has_ended(pid)

    def _end_of(self, ranks: list[int], model: str) -> str:
        return (
            f"{_names(ranks)} ended before or during the call of {model or 'the model'}. The ranks' own output says "
            "why; start all ranks again"
        )

    @contextmanager
    def watch(self, model: str) -> Iterator[None]:
        """Context manager that makes one error of whatever a collective raises inside: it names the ranks that ended.

        Raises:
            RankMissing: from the collective's own error.
        """
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, RanksDisagree) or not _is_of_collective(error):
                raise
            is_late = "imed out" in str(error)
            raise RankMissing(self.heading + self._loss(model, 0.0 if is_late else DEATH_SECONDS)) from error

    def _loss(self, model: str, seconds: float) -> str:
        """The reason why an exchange failed, as far as it can be told. A process may take some seconds to end."""
        end = time.monotonic() + seconds
        others = [rank for rank in self.members if rank != self.rank]
        while True:
            ended = [rank for rank in others if self.has_ended(rank)]
            if ended:
                return self._end_of(ended, model)
            if time.monotonic() > end:
                reasons = [f"rank {rank} {reason}" for rank in others if (reason := self._reason(rank, model))]
                if reasons:
                    away = "; ".join(reasons)
                    return f"{away} during a generation, and the others waited for {self.seconds:g} s. {ADVICE}"
                return (
                    f"the ranks could not exchange values in the call of {model or 'the model'}: {_names(others)} "
                    f"ended on another machine, failed, or did not answer within {self.seconds:g} s. The group is of "
                    "no use any more: look at the output of every rank, and start all ranks again"
                )
            time.sleep(POLL_SECONDS[1])

    @contextmanager
    def _watched_store(self) -> Iterator[None]:
        try:
            yield
        except dist.DistError as error:
            raise RankMissing(
                f"{self.heading}the store of torch.distributed does not answer: the process that holds it, rank 0 or "
                "torchrun, has ended. Start all ranks again"
            ) from error

    def _key(self, rank: int) -> str:
        return f"cachedit_fx/{self.name}/{rank}"


def introduce() -> None:
    """Say which process this rank is, so that the others know at once when it ends."""
    with suppress(RuntimeError):  # a pretended group has no store
        _store().set(_process_key(dist.get_rank()), f"{_machine()} {os.getpid()}")


def leave(model: str, reason: str | None) -> None:
    """Say that this rank will not come to calls of a model, and why. Nothing waits for an answer.

    Args:
        model: name of its class; empty if it is not known.
        reason: words that follow "the rank"; None if it follows another rank's fault, which then is one no longer.
    """
    _tell(model, reason, 1)


def come_back(model: str) -> None:
    """Say that this rank will come to calls of a model, if it has left before."""
    _tell(model, None, 0)


def _tell(model: str, reason: str | None, times: int) -> None:
    """Say why this rank is away, if it is, and that it has left so many times more."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    with suppress(RuntimeError):  # without a store, whoever waits for this rank finds out by the time-out
        store, rank = _store(), dist.get_rank()
        left = _left(store, rank)
        count, _ = left.get(model, (0, None))
        if times or count:
            store.set(_left_key(rank), json.dumps(left | {model: (count + times, reason)}))


def _reason(other: dict[str, Any], own: dict[str, Any], model: str) -> str | None:
    """Why another rank is away from a model, or from an unknown one, and left it more often. None: it is not."""
    for name, (count, reason) in other.items():
        is_meant = not model or name in ("", model)
        if is_meant and reason is not None and count > own.get(name, (0, None))[0]:
            return str(reason)
    return None


def _store() -> dist.Store:
    """The store that all ranks share."""
    store: dist.Store = dist.distributed_c10d._get_default_store()
    return store


def _left(store: dist.Store, rank: int) -> dict[str, Any]:
    key = _left_key(rank)
    left: dict[str, Any] = json.loads(store.get(key)) if store.check([key]) else {}
    return left


def _left_key(rank: int) -> str:
    return f"cachedit_fx/left/{rank}"


def _process_key(rank: int) -> str:
    return f"cachedit_fx/process/{rank}"


def _process_of(store: dist.Store, rank: int) -> tuple[str, int | None]:
    """The machine and the id of a rank's process; no id if the rank never said them."""
    key = _process_key(rank)
    if not store.check([key]):
        return "", None
    machine, pid = store.get(key).decode().split()
    return machine, int(pid)


def _machine() -> str:
    """A name of this machine and its space of process ids; empty parts if the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return "unknown"


def _has_ended(pid: int) -> bool:
    """Whether a process of this machine has ended. One that nobody has waited for yet has ended too."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(0))
    finally:
        os.close(descriptor)


def _seconds_of(group: dist.ProcessGroup) -> float:
    """What a collective of the group waits for a rank."""
    options = [group._get_backend(device).options for device in group._device_types]
    timeouts: list[timedelta] = [each._timeout for each in options if each is not None]
    return max(timeouts, default=default_pg_timeout).total_seconds()


def _is_of_collective(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in _SIGNS)


def _names(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
