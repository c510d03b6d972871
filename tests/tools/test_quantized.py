"""`cachedit bench quantized`: times of steps as ratios, and the tables made of them."""

from __future__ import annotations

import pytest
import torch
from lib.command_line import invoke

from cachedit_fx.bench import quantized_times
from cachedit_fx.bench.quantized_times import CACHED, EAGER, EAGER_CACHED, LOW, PLAIN, Timing

LADDER = {EAGER: 1.0, EAGER_CACHED: 0.6, PLAIN: 0.9, CACHED: 0.5, LOW: 0.2}


def test_times_are_ratios_of_steps_of_one_kind(monkeypatch):
    """The clock goes on by one at each reading, and by one more for every step of the quantized model."""
    seconds = {LOW: 2.0}
    now = 0.0

    class Model(torch.nn.Linear):
        def forward(self, name):
            nonlocal now
            now += seconds.get(name, 4.0)

    class Named:
        def __init__(self, module, name):
            self.module, self.name = module, name

        def compile(self, **options):
            pass

        def __call__(self):
            self.module(self.name)

    names = iter((EAGER, EAGER_CACHED, PLAIN, CACHED, LOW, quantized_times.BY_STEP))
    monkeypatch.setattr(quantized_times, "make", lambda size: Model(1, 1))
    monkeypatch.setattr(quantized_times.copy, "deepcopy", lambda module: Named(module, next(names)))
    monkeypatch.setattr(quantized_times, "inputs_in", lambda dtype, size, step: {})
    monkeypatch.setattr(quantized_times, "quantize", lambda module, kind: None)
    monkeypatch.setattr(quantized_times.cachedit_fx, "compile", lambda module, **options: module)
    monkeypatch.setattr(quantized_times.time, "process_time", lambda: now)

    timing = quantized_times.measure(64, torch.float32, "int8", 3)
    assert (timing.computed, timing.reused, timing.half, timing.rounds) == (0.5, 0.5, 0.5, 3)
    assert (timing.low, timing.full, timing.half_full) == (2.0, 1.0, 1.0)
    assert timing.ladder == {EAGER: 1.0, EAGER_CACHED: 1.0, PLAIN: 1.0, CACHED: 1.0, LOW: 0.5}


def test_the_page(monkeypatch, tmp_path):
    row = Timing(1024, "bfloat16", "int8_weight_only", *(0.125,) * 6, 20, LADDER)
    monkeypatch.setattr(quantized_times, "measure", lambda *_: row)
    result = invoke("bench", "quantized", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    page = (tmp_path / "quantized.md").read_text()
    assert "| 1024 | bfloat16 | 1.00 | 0.60 | 0.90 | 0.50 | 0.20 |" in page
    assert "| 1024 | bfloat16 | int8_weight_only | 0.125 |" in page
    assert all(len(line) <= 80 for line in result.output.splitlines()[:-1])
    assert "rounds" in result.output


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--width", "200"), "200 is no multiple of 64, the width of a head"),
        (("--dtype", "half"), "'half' is neither float32 nor bfloat16"),
        (("--kind", "int7"), "did you mean 'int8'"),
        (("--kind", "float8"), "float8' does not run here: it needs an NVIDIA GPU"),
    ],
)
def test_wrong_words(words, error, tmp_path):
    result = invoke("bench", "quantized", *words, "--width", "64", "--out", str(tmp_path))
    assert result.exit_code == 2
    assert error in " ".join(result.output.replace("│", " ").split())
