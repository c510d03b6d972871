"""Chooses how a number of ranks share a step: every split of them, the fastest first, with reasons for people.

choose(qwen_image, l20, ranks=8)  ->  cfg_parallel=True, ulysses_size=4, ulysses_async=True    242 ms a step
                                      ulysses_size=8, ulysses_async=True                       253 ms
                                      cfg_parallel=True, ulysses_size=4                        269 ms
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from cachedit_fx.parallel_plan.costs import Cost, cost, refusal
from cachedit_fx.parallel_plan.descriptions import Cards, Float8, Model, Split

ASYNC_DOUBT, RING_DOUBT = 0.01, 0.1
"""Shares of the time that these must gain before they are chosen. The formulas have published rings too fast, by 6 to
11 %, and other splits on the same cards by -3 to 6 % (docs/performance/links.md)."""


@dataclass(frozen=True)
class Choice:
    """A split, its cost, and words about it.

    Attributes:
        speed: times as fast as one rank.
        reasons: for each dimension of the split, its option and what it does.
    """

    split: Split
    cost: Cost
    speed: float
    reasons: tuple[str, ...]

    @property
    def words(self) -> str:
        """A line for people."""
        change = f"{self.speed:.1f} times as fast as" if self.speed >= 1 else f"{1 / self.speed:.3g} times as slow as"
        time = f"{self.split.words}: {_time(self.cost.seconds)} a step, {change} one rank"
        return f"{time} ({'; '.join(self.reasons)})" if self.reasons else time


@dataclass(frozen=True)
class Plan:
    """Every split of a number of ranks.

    Attributes:
        ranked: those that are possible, the fastest first, with `ASYNC_DOUBT` and `RING_DOUBT` added to their time.
        refused: the others, with the reason.
    """

    ranked: tuple[Choice, ...]
    refused: tuple[tuple[Split, str], ...]

    @property
    def best(self) -> Choice | None:
        """The first; None if no split is possible."""
        return self.ranked[0] if self.ranked else None

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for people: what was chosen, what would come next, and what is impossible."""
        notes = [each.words for each in self.ranked[:1]]
        notes += [self._next(each) for each in self.ranked[1:] if not _is_form(each.split, self.ranked[0].split)][:1]
        return (*notes, *(f"not {split.words}: {obstacle}" for split, obstacle in self.refused if not split.is_async))

    def _next(self, choice: Choice) -> str:
        change = choice.cost.seconds / self.ranked[0].cost.seconds - 1
        return f"next: {choice.split.words}, {abs(change):.0%} {'faster' if change < 0 else 'slower'} by the formulas"


def _is_form(split: Split, of: Split) -> bool:
    return replace(split, is_async=of.is_async) == of


def choose(
    model: Model, cards: Cards, ranks: int, *, with_async: bool = True, float8: Float8 = False, no_cfg: str = ""
) -> Plan:
    """Every split of a step over exactly this many ranks, by the model of its cost.

    Args:
        with_async: whether exchanges may run beside the computation, which changes no bit.
        float8: what exchanges of heads send in eight bits. It changes numerics, so it is asked for, never chosen.
        no_cfg: why the branches of guidance cannot be shared; empty if they can.
    """
    ranked, refused = [], []
    alone = cost(model, cards, Split()).seconds
    for split in splits_of(ranks, with_async, float8):
        obstacle = no_cfg if no_cfg and split.cfg > 1 else refusal(model, split)
        if obstacle:
            refused.append((split, obstacle))
        else:
            found = cost(model, cards, split)
            ranked.append(Choice(split, found, alone / found.seconds, tuple(_reasons(model, split, found))))
    ranked.sort(key=_order)
    return Plan(tuple(ranked), tuple(refused))


def _order(choice: Choice) -> float:
    split = choice.split
    return choice.cost.seconds * (1 + ASYNC_DOUBT * split.is_async + RING_DOUBT * (split.ring > 1))


def splits_of(ranks: int, with_async: bool = True, float8: Float8 = False) -> Iterator[Split]:
    """The splits of exactly this many ranks, possible or not."""
    for cfg in (1, 2):
        tokens = ranks // cfg
        if tokens * cfg != ranks:
            continue
        for ulysses in (size for size in range(1, tokens + 1) if tokens % size == 0):
            for is_async in (False, True) if with_async and ulysses > 1 else (False,):
                yield Split(cfg, tokens // ulysses, ulysses, is_async, float8 if ulysses > 1 else False)


def _reasons(model: Model, split: Split, found: Cost) -> Iterator[str]:
    """For each dimension of the split, its option and what it does."""
    if split.cfg > 1:
        yield f"cfg_parallel=True: two branches, one result of {_size(model.result_bytes)} a step is sent"
    if split.ring > 1:
        waited = found.waiting.get("ring", 0.0)
        hidden = f"{_time(waited)} more than attention hides" if waited else "all beside attention"
        yield f"ring_size={split.ring}: keys and values pass on, {_size(found.sent['ring'])} sent, {hidden}"
    if split.ulysses > 1:
        heads = -(-model.heads // split.ulysses)
        sent, waited = found.sent["ulysses"], found.waiting["ulysses"]
        yield (
            f"ulysses_size={split.ulysses}: {heads} of {model.heads} heads a rank, {_size(sent)} sent, "
            f"{_time(waited)} waited for"
        )


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.1f} ms" if seconds < 0.01 else f"{seconds * 1e3:.0f} ms"


def _size(size: float) -> str:
    for unit, unit_bytes in (("GB", 1e9), ("MB", 1e6)):
        if size >= unit_bytes:
            return f"{size / unit_bytes:.1f} {unit}"
    return f"{size / 1e3:.0f} kB"
