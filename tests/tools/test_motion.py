"""`cachedit bench motion`: weights counted on a graph, times of steps, and the tables made of them."""

import re

import pytest
import torch
from lib import models
from lib.command_line import invoke

from cachedit_fx.bench import flux, known_models, motion, motion_memory, motion_times
from cachedit_fx.bench.flux import Size
from cachedit_fx.bench.graphs import largest_graph


@pytest.fixture
def tiny(monkeypatch):
    """The one model of the list: a small FLUX."""

    def make():
        with torch.device("cpu"):
            module, inputs = models.flux()
        inputs = {name: value.to("meta") for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        return module.to("meta"), inputs

    monkeypatch.setattr(known_models, "MODELS", {"tiny": make})


def test_the_weights_add_up(tiny):
    module, arguments = known_models.make("tiny")
    row = motion.count("tiny", module, largest_graph(module, arguments))
    assert row is not None
    assert row.today == row.parameters
    assert row.rest + row.timed + row.prompted + row.conditions == row.today
    assert row.prompted > row.timed > 0 and row.conditions > 0
    assert 0 < row.cached_rest < row.cached_today < row.today
    assert row.same_steps == (row.rest + row.prompted) / row.today
    assert row.kept == row.rest / row.today < row.batched < row.same_steps < 1
    assert row.step_bytes > 0 and row.prompt_bytes > 0
    assert row.bytes == 2 * row.parameters
    assert row.host_bytes == 2 * (row.timed + row.prompted)


def test_a_card_holds_what_it_could_not():
    row = motion.Reads("one", 0, 0, 0, 0, 0, step_bytes=2**40, bytes=30 * 2**30, host_bytes=12 * 2**30)
    assert motion_memory.on_device(row) == (30.25 * 2**30, 18.25 * 2**30)  # no more than `hoisted_mib` is kept
    fits, holds_anyway = motion_memory.cards([row])
    assert fits.startswith("A card of 24 GiB can hold") and fits.endswith(": one.")
    assert holds_anyway.startswith("A card of 48 GiB") and holds_anyway.endswith(": none of these models.")


def test_the_page(tiny, tmp_path):
    result = invoke("bench", "motion", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    page = (tmp_path / "motion.md").read_text()
    assert re.search(r"\| tiny \| \d+ k \| \d+\.\d+% \|", page) and "28 steps at once" in page
    assert 'peak with "host"' in page and "A card of 24 GiB" in page
    assert "tiny" in result.output and all(len(line) <= 80 for line in result.output.splitlines()[:-1])


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("-k", "flax"), "did you mean 'FLUX.1-dev'?"),
        (("--tokens", "60"), "60 is no square number, such as 64"),
        (("--width", "200"), "200 is no multiple of 128"),
    ],
)
def test_wrong_words(words, error, tmp_path):
    result = invoke("bench", "motion", *words, "--out", str(tmp_path))
    assert result.exit_code == 2
    assert error in " ".join(result.output.replace("│", " ").split())


def test_a_model_whose_modulations_are_constants_is_the_model():
    size = Size(1, 1, 128, head=64)
    module, arguments = flux.make(size), flux.inputs(size)
    constant = motion_times.with_constants(module, arguments)
    assert torch.equal(constant(**arguments)[0], module(**arguments)[0])
    assert torch.equal(constant(**arguments | {"timestep": torch.zeros(1)})[0], module(**arguments)[0])
    weights = [sum(weight.numel() for weight in each.parameters()) for each in (constant, module)]
    assert weights[0] < 0.8 * weights[1]


def test_times_are_ratios(monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(motion_times.time, "process_time", lambda: float(next(clock)))
    monkeypatch.setattr(motion_times.cachedit_fx, "compile", lambda module, **options: module)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: None)
    timing = motion_times.measure(Size(1, 1, 64), 2, 3)
    assert timing == motion_times.Timing(4, *(1.0,) * 5, 3)


def test_long_steps_are_timed_a_few_times(monkeypatch):
    monkeypatch.setattr(motion_times, "LONG", -1.0)
    monkeypatch.setattr(motion_times.cachedit_fx, "compile", lambda module, **options: module)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: None)
    assert motion_times.measure(Size(1, 1, 64), 2, 20).rounds == motion_times.FEW
