"""`cachedit bench --pipeline`: the table of cache-dit's README, and rows by their names."""

import json
import sys

import pytest
from lib.benches import ENTRY, SHARES_SYSTEMS, measured
from lib.command_line import invoke, plain
from lib.small_networks import save_clip, save_image_reward

from cachedit_fx.bench.measure import Settings
from cachedit_fx.bench.pages import markdown
from cachedit_fx.bench.record import Record
from cachedit_fx.bench.rows import RowError, named_arguments, named_row, read_rows

pytestmark = SHARES_SYSTEMS

NAMES = [
    ("F8B0_W4MC2_R0.12", (8, 0, 4, 0.12), {"max_continuous_cached_steps": 2}),
    ("F1B0_W8I1M0MC0_R0.08", (1, 0, 8, 0.08), {"warmup_interval": 1}),
    ("DBCache_F8B8_W2M3MC1_R0.8", (8, 8, 2, 0.8), {"max_cached_steps": 3, "max_continuous_cached_steps": 1}),
    ("F24B24_W2MC1_R1_T1O2", (24, 24, 2, 1.0),
     {"max_continuous_cached_steps": 1, "calibrator": {"name": "taylorseer", "taylorseer_order": 2}}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "values", "more"), NAMES)
def test_a_name_is_read_as_cache_dits_tables_mean_it(name, values, more):
    keys = ("Fn_compute_blocks", "Bn_compute_blocks", "max_warmup_steps", "residual_diff_threshold")
    assert named_arguments(name) == dict(zip(keys, values, strict=True)) | more
    assert named_row(name).arguments == named_arguments(name)


@pytest.mark.parametrize("name", ["F8B0", "F8_W4_R0.1", "DBCache 0.12", "F8B0_W4MC2_R0.12_FoCa", ""])
def test_other_names_say_nothing(name):
    assert named_arguments(name) is None
    with pytest.raises(RowError, match=r"write one such as F8B0_W4MC2_R0\.12"):
        named_row(name)


def test_a_table_without_keys_has_those_of_its_name(tmp_path):
    path = tmp_path / "rows.toml"
    path.write_text('["F1B0_W2MC1_R0.8"]\n["F1B0_W2MC1_R0.9"]\nFn_compute_blocks = 3\n["default"]\n')
    named, written, default = read_rows(path, 28)
    assert named.arguments == named_arguments("F1B0_W2MC1_R0.8")
    assert written.arguments == {"Fn_compute_blocks": 3} and default.arguments == {}


@pytest.fixture
def entry(tmp_path, monkeypatch):
    """A pipeline in the current folder, and two prompts."""
    (tmp_path / "scored_entry.py").write_text(ENTRY)
    (tmp_path / "prompts.txt").write_text("a red square\na blue circle\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield ("bench", "--pipeline", "scored_entry:Entry", "--prompts", "prompts.txt", "--steps", 4, "--rounds", 1)
    sys.modules.pop("scored_entry", None)


def test_the_table_is_filled_and_resumed(entry, tmp_path):
    for save in (save_clip, save_image_reward):
        folder = tmp_path / save.__name__
        folder.mkdir()
        save(folder)
    weights = ("--clip", "save_clip", "--image-reward", "save_image_reward", "--out", "out")
    rows = ("--row", "F1B0_W1MC1_R9", "--row", "F1B0_W2MC1_R9")
    assert invoke(*entry, *weights, *rows[:2], columns=200).exit_code == 0
    result = invoke(*entry, *weights, *rows, "--resume", columns=200)
    assert result.exit_code == 0, result.output
    page = {row["name"]: row for row in json.loads((tmp_path / "out/bench.json").read_text())["rows"]}
    assert len(page["uncached"]["clip_score"]) == len(page["F1B0_W2MC1_R9"]["image_reward"]) == 2
    assert page["F1B0_W1MC1_R9"]["flops"] < page["F1B0_W2MC1_R9"]["flops"] < page["uncached"]["flops"]
    table = (tmp_path / "out/bench.md").read_text()
    assert "| config | CLIP score | ImageReward | PSNR dB | TFLOPs | speed-up |" in table
    assert sum("F1B0_W1MC1_R9" in line and line.endswith("x |") for line in table.splitlines()) == 1
    assert "No CLIP score" not in table


def test_weights_that_were_named_must_be_there(entry):
    for option in ("--clip", "--image-reward"):
        result = invoke(*entry, option, "nothing", "--row", "F1B0_W1MC1_R9", columns=200)
        assert result.exit_code == 2 and "nothing" in plain(result.output)


def test_columns_without_values_are_left_out_and_the_reasons_are_there():
    rows = [measured("uncached", 1.0, [None], "uncached"), measured("a", 0.5, [40.0], flops=2e12)]
    page = markdown(Record(Settings(("a",), clip="default"), "cachedit bench", "a machine", {}, rows))
    assert "| config | PSNR dB | TFLOPs |" in page and "| a | 40.0 | 2 |" in page
    for reason in ("No CLIP score: no CLIP", "No ImageReward: --image-reward", "No speed-up: nothing was timed"):
        assert reason in page
    assert "TFLOPs" not in markdown(Record(Settings(("a",)), "cachedit bench", "a machine", {}, rows))
