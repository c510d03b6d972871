"""`cachedit bench cold` and `overhead`: the figures that they take, and the tables that they make of them."""

import pytest
import torch
from lib.command_line import invoke
from lib.helpers import UNMOVED
from torch.utils._python_dispatch import TorchDispatchMode

from cachedit_fx.bench import cold, overhead, process
from cachedit_fx.bench.cold import CAPTURE, OURS, REPEATED, Start
from cachedit_fx.bench.flux import STEP, Size, inputs, make, size_of
from cachedit_fx.bench.overhead import (
    CACHED,
    COMPUTED,
    EAGER,
    KINDS,
    NOTHING,
    PIECES,
    RATIOS,
    SHORT_CACHED,
    SHORT_COMPUTED,
    Overhead,
)
from cachedit_fx.bench.progress import silent

pytestmark = pytest.mark.keep_compiled

TINY = Size(1, 2, width=64, side=2)


POLICIES = (COMPUTED, SHORT_COMPUTED, CACHED, SHORT_CACHED)
"""Kinds of steps that are policies of one compiled model."""


@pytest.fixture(scope="module")
def products():
    """Matrix products of a step of each kind."""
    builders = overhead._builders(1, {"inner_backend": "eager", "passes": UNMOVED})
    shared = make(TINY)
    counts = {}
    with torch.no_grad():
        for name in KINDS:
            step = builders[name](shared if name in POLICIES else make(TINY), TINY)
            for number in range(4):
                step(inputs(TINY, number))
            with Products() as counter:
                step(inputs(TINY, 4))
            counts[name] = counter.count
    return counts


class Products(TorchDispatchMode):
    """Counts matrix products, inside compiled pieces too."""

    count = 0

    @classmethod
    def ignore_compile_internals(cls):
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func._overloadpacket in (torch.ops.aten.addmm, torch.ops.aten.mm, torch.ops.aten.bmm)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def nothing():
    """A cached step with pieces that compute nothing."""
    options = {"inner_backend": NOTHING, "compiled_pieces": "all"}
    with torch.no_grad():
        step = overhead._builders(1, options)[SHORT_CACHED](make(TINY), TINY)
        results = [step(inputs(TINY, number))[0] for number in range(4)]
    return step, results


def test_a_third_of_the_blocks_is_double_stream():
    assert size_of(57)[:2] == (19, 38) and size_of(18)[:2] == (6, 12)


def test_the_model_is_the_same_every_time():
    first, second = (make(TINY).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_generation_has_room_for_every_call():
    last = inputs(TINY, overhead.MAX_STEPS)["timestep"]
    assert 0 < last < inputs(TINY, overhead.MAX_STEPS - 1)["timestep"] and STEP > 0
    with pytest.raises(ValueError, match="at most 248 fit"):
        overhead.measure(TINY, 249)


def test_overhead_takes_a_time_of_each_kind_of_step_in_every_round(monkeypatch):
    calls = []

    def built(name):
        return lambda module, size: lambda arguments: calls.append((name, arguments["timestep"].item()))

    monkeypatch.setattr(overhead, "_builders", lambda first, options: {name: built(name) for name in KINDS})
    result = overhead.measure(TINY, 3, inner_backend="eager")
    assert {len(times) for times in result.seconds.values()} == {3}
    assert {name for pair in RATIOS for name in pair} - {overhead.PEER} == set(result.seconds) == set(KINDS)
    assert all(time > 0 for times in result.seconds.values() for time in times)
    # Every kind is called with the same timesteps, each lower than the last, those before the timed call included.
    timesteps = {name: [timestep for kind, timestep in calls if kind == name] for name in KINDS}
    assert len(timesteps[CACHED]) == overhead.WARMUP + 3 * (overhead.AHEAD + 1)
    assert all(timesteps[name] == sorted(set(timesteps[CACHED]), reverse=True) for name in KINDS)


def test_pieces_alone_run_the_first_block_only(products):
    """Counted in matrix products: the cached step runs as many, the computed one more."""
    assert 0 < products[PIECES] == products[CACHED] == products[SHORT_CACHED]
    assert products[PIECES] < products[COMPUTED] == products[SHORT_COMPUTED] == products[EAGER]


def test_ratios_are_medians_over_turns():
    found = Overhead(3, {"a": [1.0, 9.0, 2.0], "b": [1.0, 3.0, 1.0]})
    assert found.ratio("a", "b") == 2 and found.extra("a", "b") == 1


@pytest.fixture
def starts():
    return [
        Start(way, 18, warm, (seconds / 2, seconds / 2), (1.0, 2.0) if warm else ())
        for way, times in ((CAPTURE, (4, 4)), (REPEATED, (20, 6)), (OURS, (14, 6)))
        for warm, seconds in zip((False, True), times, strict=True)
    ]


def cells(table):
    return [list(line.cells) for line in table.lines]


def test_the_table_of_start_up_takes_off_the_capture(starts):
    table = cold.table(starts)
    named = {
        row[1]: dict(zip([heading.replace("\n", " ") for heading in table.headings], row, strict=True))
        for row in cells(table)
    }
    assert named[OURS]["cold"] == "14.0" and named[OURS]["over repeated"] == "0.50"
    assert [row[3] for row in cells(table)] == ["", "", "10.0"] and [row[6] for row in cells(table)] == ["", "", "2.0"]
    assert named[OURS]["sizes"] == "1.0, 2.0"


def test_the_table_of_start_up_of_an_interrupted_run(starts):
    assert cells(cold.table(starts[2:3])) == [["18", REPEATED, "20.0", "", "", "", "", ""]]


def test_the_table_of_steps():
    rows = cells(overhead.steps_table([Overhead(18, {name: [0.002, 0.002] for pair in RATIOS for name in pair})]))
    assert ["18", CACHED, "", PIECES, "1.000", "+0.00"] in rows


def test_rows_of_what_was_not_measured_are_left_out():
    results = [Overhead(18, {EAGER: [0.004, 0.004], overhead.PEER: [0.002, 0.002]})]
    rows = cells(overhead.steps_table(results))
    assert [row for row in rows if row[3]] == [["18", overhead.PEER, "", EAGER, "0.500", "-2.00"]]


def test_the_table_of_python_has_microseconds_a_block():
    table = overhead.python_table([Overhead(10, {COMPUTED: [0.001], EAGER: [0.1]})])
    assert cells(table) == [["10", COMPUTED, "1.00", "100.0"]]


def test_a_profile_names_our_functions(nothing, monkeypatch):
    step, _ = nothing
    monkeypatch.setattr(overhead, "_builders", lambda first, options: {SHORT_CACHED: lambda module, size: step})
    lines = overhead.profile(TINY, SHORT_CACHED, 3)
    ours = [line for line in lines if "cachedit_fx/runtime/" in line.function and line.function.endswith(" decide")]
    assert ours and all(line.calls == 1 and 0 < line.own <= line.total for line in ours)
    assert cells(overhead.profile_table(ours))[0][1].startswith("cachedit_fx/runtime/")


def test_pieces_that_compute_nothing_are_told_from_shapes(nothing):
    with torch.no_grad():
        expected = make(TINY)(**inputs(TINY))[0]
    _, results = nothing
    assert all(result.shape == expected.shape and not result.any() for result in results)


def test_the_command_writes_every_table(tmp_path, monkeypatch):
    ready = dict.fromkeys(KINDS, lambda module, size: lambda arguments: None)
    monkeypatch.setattr(overhead, "_builders", lambda first, options: ready)
    monkeypatch.setattr(overhead, "make", lambda size: torch.nn.Identity())
    monkeypatch.setattr(process.sys, "executable", "/bin/false")
    monkeypatch.setattr(process.sys, "argv", ["cachedit", "bench", "overhead"])
    result = invoke("bench", "overhead", "--blocks", 3, "--rounds", 1, "--inner-backend", "eager", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "cache-dit failed" in result.output
    text = (tmp_path / "overhead.md").read_text()
    for heading in ("Steps, F = 1, inner backend eager", "The Python of a step", "Its profile: cached, past guards"):
        assert f"# {heading}" in text and heading in result.output
    assert text.startswith("`cachedit bench overhead`") and text.count("\n| ---: | --- |") == 4


def test_a_way_that_fails_is_told_and_left_out(monkeypatch):
    monkeypatch.setattr(process.sys, "executable", "/bin/false")
    monkeypatch.setattr(process.sys, "argv", ["cachedit", "bench", "overhead"])
    failures: list[str] = []
    assert not list(cold.measure([3], [OURS], silent, failures.append))
    assert len(failures) == 1 and OURS in failures[0]


def test_ways_are_chosen_by_name_beside_the_capture():
    assert cold.ways_named(["torch.comp"]) == [CAPTURE, "torch.compile"] and cold.ways_named([]) == list(cold.WAYS)


@pytest.mark.parametrize("is_interrupted", [False, True])
def test_cold_writes_a_whole_table_or_none(starts, tmp_path, monkeypatch, is_interrupted):
    def measure(depths, ways, tell, failed):
        yield from starts[:2]
        if is_interrupted:
            raise KeyboardInterrupt
        yield from starts[2:]

    monkeypatch.setattr(cold, "measure", measure)
    result = invoke("bench", "cold", "--out", tmp_path / "out")
    assert result.exit_code == (130 if is_interrupted else 0)
    assert CAPTURE in result.output and (tmp_path / "out").exists() != is_interrupted
    if not is_interrupted:
        assert "| 18 | cachedit_fx | 14.0 | 10.0 | 0.50 |" in (tmp_path / "out" / "cold.md").read_text()


def test_a_process_answers_with_every_call(monkeypatch):
    monkeypatch.setattr(cold, "size_of", lambda blocks: TINY)
    monkeypatch.setattr(cold, "SIDES", (2,))
    threads = torch.get_num_threads()
    try:
        start = cold.start(CAPTURE, 3, warm=True)
    finally:
        torch.set_num_threads(threads)
    assert len(start.calls) == cold.CALLS and len(start.sizes) == len(cold.SIDES)
    assert start.seconds == pytest.approx(sum(start.calls))


def test_no_rounds_are_an_error():
    result = invoke("bench", "overhead", "--rounds", "0")
    assert result.exit_code == 2 and "--rounds" in result.output
