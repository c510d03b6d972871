"""`cachedit coverage` over models of one's own: the table, the file, the exit code, and what it refuses."""

import gc
import re
import weakref
from dataclasses import fields, replace

import pytest
import torch
from lib import toys
from lib.command_line import invoke, plain

from cachedit_fx.bench.coverage import CHECKS, LEGEND, NO_ENTRY, Covered, table
from cachedit_fx.bench.coverage_attention import AttentionCounts
from cachedit_fx.bench.coverage_counts import RankCounts
from cachedit_fx.bench.coverage_record import CoverageRecord
from cachedit_fx.bench.coverage_subject import Subject
from cachedit_fx.bench.motion import Reads
from cachedit_fx.bench.ulysses import Share
from cachedit_fx.bench.variants import VariantResult
from cachedit_fx.cli.terminal import console
from cachedit_fx.config.cache import DBCacheConfig
from cachedit_fx.report.tables import terminal

MODELS = """
from lib import models
import torch

def inputs(size):
    torch.manual_seed(size)
    hidden, timestep = models.inputs(tokens=4 * size)
    return {"x": hidden, "timestep": timestep}

class Breaks(models.Toy):
    def forward(self, x, timestep):
        temb = models.time_embedding(timestep)
        for block in self.blocks:
            x = block(x, temb)
            torch._dynamo.graph_break()
        return x

class Named(models.Toy):
    def forward(self, x, timestep):
        return super().forward(x, timestep)

ZOO = {
    "Good": lambda: (Named().eval(), inputs),
    "Short": lambda: (Breaks().eval(), inputs),
    "Raises": lambda: 1 / 0,
}
EXCLUDED = {"Other": "no denoiser"}
MISSING = ["Newcomer"]
"""


@pytest.fixture
def models_file(tmp_path):
    file = tmp_path / "some_models.py"
    file.write_text(MODELS)
    return file


@pytest.mark.budget(40, "three models, and counts for two ranks")
def test_the_table_says_what_held_and_what_did_not(models_file, tmp_path):
    out = tmp_path / "found" / "table.md"
    result = invoke("coverage", models_file, "--out", out)
    assert result.exit_code == 1, result.output
    checks, _, counts = out.read_text().partition("## Code motion")
    motion, _, attention = counts.partition("## Attention")
    rows = {line.split("|")[1].strip(): line.count("✓") for line in checks.splitlines() if line.startswith("|")}
    assert rows == {"model": 0, "---": 0, "Good": len(CHECKS) + 2, "Short": 2, "Raises": 0, "Newcomer": 0}
    assert re.search(r"\| Good \|.*\| 0\.\d+ \|", motion) and "| Short |" not in motion
    assert re.search(r"\| Good \| (\d) \| 0 \| \1 \| \1 \| \1 \|", attention)
    text = out.read_text()
    assert "1 of 4 models pass every check" in text and "**Other**: no denoiser" in text
    assert re.search(r"some_models\.py:\d+, in forward, `torch\._dynamo\.graph_break", text)
    assert "ZeroDivisionError" in text and "**Newcomer**: no entry" in text
    assert "1 of 4 models" in plain(result.output)
    assert [path.name for path in out.parent.iterdir()] == ["table.md"]


@pytest.mark.parametrize("has_variants", [False, True])
def test_the_table_fits_a_terminal_of_80_columns(has_variants):
    chain = ("transformer_blocks x 4", "single_transformer_blocks x 15")
    rows = [
        Covered("JoyImageEditPlusTransformer3DModel", dict.fromkeys(CHECKS, True), chain, 0.12),
        Covered("Short", {"blocks": True, "exact": False}, ("blocks x 4",), None, "why"),
    ]
    if has_variants:
        wrong = VariantResult("an_argument=True", "wrong", "differs")
        rows = [replace(row, variants=(wrong,) * 12) for row in rows]
    with console.capture() as captured:
        console.print(terminal(table(rows, is_narrow=True)), width=80)
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == [
        "model",
        "chain",
        "checks",
        "FLOPs",
        "int8",
        "attn",
        *(["variants"] if has_variants else []),
    ]
    assert "✓✓✓✓✓✓✓" in lines[2] and any("✓✗-----" in line for line in lines)
    assert list(CHECKS) == re.findall(r"\w+", LEGEND.partition(": ")[2].partition(".")[0])


SHARE = Share("Good", 2, (1, 8, 16), 0.9, 32, 1, 0, 2**20, 2**10, "conv2d (4)")
RANKS = RankCounts(SHARE, None, 30, "it writes to its inputs")
VARIANT = VariantResult("an_argument=True", "uncached", "no block loop")


def test_a_run_that_was_stopped_goes_on(models_file, tmp_path, monkeypatch):
    names, stops_at = [], "Short"

    def check(name, make, blocks=None):
        if name == stops_at:
            raise KeyboardInterrupt
        names.append(name)
        if name == "Raises":
            return Covered(name, reason="cannot be made")
        return Covered(name, dict.fromkeys(CHECKS, True), ("blocks x 4",), 0.25)

    monkeypatch.setattr("cachedit_fx.bench.coverage.check", check)
    monkeypatch.setattr("cachedit_fx.bench.variant_checks.check_variants", lambda *_: [VARIANT])
    monkeypatch.setattr("cachedit_fx.bench.coverage.check_attention", lambda _: (True, ""))
    out, unfinished = tmp_path / "out" / "table.md", tmp_path / "out" / "table-unfinished.json"
    stopped = invoke("coverage", models_file, "--variants", "--out", out)
    assert stopped.exit_code == 130 and "after 1 of 3 models" in plain(stopped.output)
    assert "--resume goes on" in plain(stopped.output) and list(out.parent.iterdir()) == [unfinished]
    other = invoke("coverage", models_file, "--out", out, "--resume")
    assert other.exit_code == 2 and "variants True there and False now" in plain(other.output)
    stops_at = ""
    resumed = invoke("coverage", models_file, "--variants", "--out", out, "--resume")
    assert resumed.exit_code == 1 and "2 of 4 models pass every check" in plain(resumed.output), resumed.output
    assert names == ["Good", "Short", "Raises"] and not unfinished.exists()
    invoke("coverage", models_file, "--variants", "--out", tmp_path / "whole.md")
    assert out.read_text() == (tmp_path / "whole.md").read_text()
    assert out.read_text().count("`an_argument=True`: no block loop") == 2
    nothing = invoke("coverage", models_file, "--variants", "--out", out, "--resume")
    assert nothing.exit_code == 2 and "there is nothing to resume" in plain(nothing.output)


def test_rows_survive_the_file(tmp_path):
    """But for those of models without an entry, which are looked for again."""
    row = Covered(
        "Good",
        {"exact": True},
        ("blocks x 4",),
        0.25,
        "why",
        (VARIANT,),
        Reads("Good", 1, 2, 3, 4, 5),
        RANKS,
        False,
        "why",
        False,
        "why",
        AttentionCounts("Good", 2, 1, {"sage": 1}),
    )
    defaults = Covered("Good")
    assert all(getattr(row, item.name) != getattr(defaults, item.name) for item in fields(Covered)[1:])
    record = CoverageRecord(tmp_path / "rows.json", {})
    for each in (row, Covered("Plain"), Covered("Newcomer", reason=NO_ENTRY)):
        record.add(each)
    record.resume(tmp_path / "rows.json")
    assert record.rows == {"Good": row, "Plain": Covered("Plain")}


def test_one_model_alone(models_file):
    result = invoke("coverage", models_file, "--only", "good")
    assert result.exit_code == 0 and "1 of 1 models" in plain(result.output)


@torch.no_grad()
def test_a_model_that_was_checked_is_freed():
    subject = Subject(toys.make_small())
    subject.compile(DBCacheConfig(Fn_compute_blocks=1))
    subject(
        {"hidden_states": toys.noise(), "timestep": torch.tensor([0.5]), "encoder_hidden_states": toys.noise(seed=2)}
    )
    assert subject.chain
    model = weakref.ref(subject.module)
    del subject
    torch.compiler.reset()
    gc.collect()
    assert model() is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.py"], "nowhere.py cannot be imported"),
        (["json"], "json has no ZOO"),
        (["MODELS", "--only", "absent"], "no name contains absent"),
        (["MODELS", "--resume"], "say by --out what was to be written"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_runs(models_file, arguments, message):
    given = [models_file if argument == "MODELS" else argument for argument in arguments]
    result = invoke("coverage", *given)
    assert result.exit_code == 2 and message in plain(result.output)
