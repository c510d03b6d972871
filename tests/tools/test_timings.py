"""`cachedit bench --cold` and `--overhead`: the figures that they take, and the tables that they make of them."""

import pytest
import torch
from typer.testing import CliRunner

from cachedit_fx.bench import cold, overhead, process
from cachedit_fx.bench.cold import CAPTURE, OURS, REPEATED, Start
from cachedit_fx.bench.flux import STEP, Size, inputs, make, size_of
from cachedit_fx.bench.overhead import CACHED, COMPUTED, PIECES, RATIOS, SHORT_CACHED, Overhead
from cachedit_fx.cli import app
from cachedit_fx.cli.timings import cold_cells, overhead_cells, profile_cells, python_cells

TINY = Size(1, 2, width=64, side=2)


def test_a_third_of_the_blocks_is_double_stream():
    assert size_of(57)[:2] == (19, 38) and size_of(18)[:2] == (6, 12)


def test_the_model_is_the_same_every_time():
    first, second = (make(TINY).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_generation_has_room_for_every_call():
    last = inputs(TINY, overhead.MAX_STEPS)["timestep"]
    assert 0 < last < inputs(TINY, overhead.MAX_STEPS - 1)["timestep"] and STEP > 0


def test_overhead_takes_a_time_of_each_kind_of_step_in_every_round():
    found = overhead.measure(TINY, 3, inner_backend="eager")
    assert {len(times) for times in found.seconds.values()} == {3}
    assert {name for pair in RATIOS for name in pair} - {overhead.PEER} == set(found.seconds)


def test_pieces_alone_run_the_first_block_only():
    """Counted in matrix products: the cached step runs as many, the computed one more."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Products(TorchDispatchMode):
        count = 0

        @classmethod
        def ignore_compile_internals(cls):
            return True

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func._overloadpacket in (torch.ops.aten.addmm, torch.ops.aten.mm, torch.ops.aten.bmm)
            return func(*args, **(kwargs or {}))

    counts = {}
    with torch.no_grad():
        builders = overhead._builders(1, {"inner_backend": "eager"})
        for name in overhead.KINDS:
            step = builders[name](make(TINY), TINY)
            for number in range(4):
                step(inputs(TINY, number))
            with Products() as products:
                step(inputs(TINY, 4))
            counts[name] = products.count
    assert 0 < counts[PIECES] == counts[CACHED] == counts[SHORT_CACHED]
    assert counts[PIECES] < counts[COMPUTED] == counts[overhead.SHORT_COMPUTED] == counts[overhead.EAGER]


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


def test_the_table_of_start_up_takes_off_the_capture(starts):
    headings, *rows = cold_cells(starts)
    named = {row[1]: dict(zip(headings, row, strict=True)) for row in rows}
    assert named[OURS]["cold"] == "14.0" and named[OURS]["over repeated"] == "0.50"
    assert [row[3] for row in rows] == ["", "", "10.0"] and [row[6] for row in rows] == ["", "", "2.0"]
    assert named[OURS]["sizes"] == "1.0, 2.0"


def test_the_table_of_start_up_of_an_interrupted_run(starts):
    _, *rows = cold_cells(starts[2:3])
    assert rows == [["18", REPEATED, "20.0", "", "", "", "", ""]]


def test_the_table_of_steps():
    found = Overhead(18, {name: [0.002, 0.002] for pair in RATIOS for name in pair})
    _, *rows = overhead_cells([found])
    assert ["18", CACHED, "", PIECES, "1.000", "+0.00"] in rows


def test_rows_of_what_was_not_measured_are_left_out():
    found = Overhead(18, {overhead.EAGER: [0.004, 0.004], overhead.PEER: [0.002, 0.002]})
    _, *rows = overhead_cells([found])
    assert [row for row in rows if row[3]] == [["18", overhead.PEER, "", overhead.EAGER, "0.500", "-2.00"]]


def test_the_table_of_python_has_microseconds_a_block():
    _, *rows = python_cells([Overhead(10, {COMPUTED: [0.001], overhead.EAGER: [0.1]})])
    assert rows == [["10", COMPUTED, "1.00", "100.0"]]


def test_a_profile_names_our_functions():
    lines = overhead.profile(TINY, SHORT_CACHED, 3, inner_backend=overhead.NOTHING, compiled_pieces="all")
    ours = [line for line in lines if "runtime/call.py" in line.function and line.function.endswith(" decide")]
    assert len(ours) == 1 and ours[0].calls == 1 and 0 < ours[0].own <= ours[0].total
    assert profile_cells(ours)[1][1].startswith("cachedit_fx/runtime/call.py:")


def test_pieces_that_compute_nothing_are_told_from_shapes():
    module = make(TINY)
    with torch.no_grad():
        expected = module(**inputs(TINY))[0]
        step = overhead._builders(1, {"inner_backend": overhead.NOTHING, "compiled_pieces": "all"})[COMPUTED](
            module, TINY
        )
        found = step(inputs(TINY))[0]
    assert found.shape == expected.shape and not found.any()


def test_a_way_that_fails_is_told_and_left_out(monkeypatch):
    monkeypatch.setattr(process.sys, "executable", "/bin/false")
    failures: list[str] = []
    assert not list(cold.measure([3], [OURS], lambda what: None, failures.append))
    assert len(failures) == 1 and OURS in failures[0]


def test_a_process_answers_with_every_call(monkeypatch):
    monkeypatch.setattr(cold, "size_of", lambda blocks: TINY)
    threads = torch.get_num_threads()
    try:
        found = cold.start(CAPTURE, 3, warm=True)
    finally:
        torch.set_num_threads(threads)
    assert len(found.calls) == cold.CALLS and len(found.sizes) == len(cold.SIDES)
    assert found.seconds == pytest.approx(sum(found.calls))


def test_no_rounds_are_an_error():
    result = CliRunner().invoke(app, ["bench", "--overhead", "--rounds", "0"])
    assert result.exit_code == 2 and "--rounds" in result.output
