"""`cachedit bench motion`: weights counted on a graph, times of steps, and the tables made of them."""

import pytest
import torch
from lib import models
from lib.command_line import invoke

from cachedit_fx.bench import motion
from cachedit_fx.bench.flux import Size


@pytest.fixture
def tiny(monkeypatch):
    """The one model of the list: a small FLUX."""

    def make():
        with torch.device("cpu"):
            module, inputs = models.flux()
        inputs = {name: value.to("meta") for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        return module.to("meta"), inputs

    monkeypatch.setattr(motion, "MODELS", {"tiny": make})


def test_the_weights_add_up(tiny):
    row = motion.count("tiny")
    assert row.today == row.parameters
    assert row.rest + row.timed + row.prompted + row.conditions == row.today
    assert row.prompted > row.timed > 0 and row.conditions > 0
    assert 0 < row.cached_rest < row.cached_today < row.today
    assert row.same_steps == (row.rest + row.prompted) / row.today
    assert row.rest / row.today < row.batched < row.same_steps < 1
    assert row.kept > 0 and row.kept_conditions > 0


def test_the_page(tiny, tmp_path):
    result = invoke("bench", "motion", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    page = (tmp_path / "motion.md").read_text()
    assert "| tiny | 0.00 B |" in page and "28 steps at once" in page
    assert "tiny" in result.output and all(len(line) <= 80 for line in result.output.splitlines()[:-1])


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("-k", "flax"), "did you mean 'FLUX.1-dev'?"),
        (("--tokens", "60"), "60 is no square number, such as 64"),
        (("--width", "100"), "100 is no multiple of 64"),
    ],
)
def test_wrong_words(words, error, tmp_path):
    result = invoke("bench", "motion", *words, "--out", str(tmp_path))
    assert result.exit_code == 2
    assert error in " ".join(result.output.replace("│", " ").split())


def test_times_are_ratios(monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(motion.time, "process_time", lambda: float(next(clock)))
    monkeypatch.setattr(motion.cachedit_fx, "compile", lambda module, **options: module)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: None)
    timing = motion.measure(Size(1, 1, 64), 2, 3)
    assert timing == motion.Timing(4, 1.0, 1.0, 1.0, 3)
