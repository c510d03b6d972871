"""`cachedit bench`: files of rows, pipelines and arguments, what it lists of them, and what it refuses."""

import copy
import sys
import types
from typing import Any

import pytest
import torch
from lib.benches import ROWS, SHARES_SYSTEMS, bench
from lib.command_line import plain

import cachedit_fx
from cachedit_fx.bench.rows import UNCACHED, Row, RowError, fewer_steps, peer_rows, read_rows, select
from cachedit_fx.bench.systems import EntryError, load_entry

pytestmark = SHARES_SYSTEMS


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("no_such_module:make", "MODULE:FUNCTION"),
        ("toy_entry:missing", "has no attribute 'missing'"),
        ("toy_entry:nothing", "returned a int"),
        ("toy_entry:hungry", "missing 1 required positional argument"),
        ("toy_entry:__name__", "__name__ is a str"),
        ("toy_entry", "MODULE:FUNCTION"),
    ],
)
def test_an_entry_that_gives_no_pipeline(entry, name, told):
    with pytest.raises(EntryError, match=told):
        load_entry(name)


def without(pipe, **components):
    """A copy of a pipeline that lacks some of its parts."""
    other = copy.copy(pipe)
    other.components = pipe.components | components
    return other


class Unprompted:
    """A pipeline that draws classes."""

    def __init__(self, transformer):
        self.components = {"transformer": transformer}

    def __call__(self, class_labels):
        """Is never called."""


def test_a_pipeline_that_takes_no_prompts_is_refused_with_a_way_out(monkeypatch):
    class Prompted(Unprompted):
        def __call__(self, prompt):
            """Is never called."""

    module: Any = types.ModuleType("promptless")
    whole = Prompted(torch.nn.Identity())
    module.labels = lambda: Unprompted(torch.nn.Identity())
    module.embeddings = lambda: without(whole, text_encoder=None, text_encoder_2=None, tokenizer=None)
    module.partial = lambda: without(whole, text_encoder=torch.nn.Identity(), text_encoder_3=None)
    module.whole = lambda: whole
    monkeypatch.setitem(sys.modules, "promptless", module)
    with pytest.raises(EntryError, match=r"takes no `prompt`, so it cannot draw .* prompt_embeds"):
        load_entry("promptless:labels")
    with pytest.raises(EntryError, match=r"has no text encoder \(text_encoder, text_encoder_2: None\), so it cannot"):
        load_entry("promptless:embeddings")
    assert load_entry("promptless:partial")[0].components["text_encoder_3"] is None
    assert load_entry("promptless:whole")[0] is whole


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[a]\nmax_warmup_step = 1", "row 'a': unknown option 'max_warmup_step'; the nearest known one is"),
        ("[a]\nFn_compute_blocks = -1", "row 'a': Fn_compute_blocks=-1 is not allowed"),
        ("[a]\ncalibrator = 'taylor'", "did you mean 'taylorseer'?"),
        ("[a.calibrator]\nname = 'taylorseer'\norder = 2", "the nearest known one is 'taylorseer_order'"),
        ("[a]\npreset = 'balancd'", "did you mean 'balanced'?"),
        ("[a]\nmask_policy = 'fats'", "fats"),
        ("[a]\nsystem = 'teacache'", "system='teacache' is not one of cachedit_fx, cache-dit, diffusers"),
        ("steps = 3", "steps = 3 belongs to no row"),
        ("[a", "is not TOML"),
        ("", "has no rows"),
    ],
)  # fmt: skip
def test_a_file_that_is_wrong(entry, tmp_path, text, told):
    path = tmp_path / "rows.toml"
    path.write_text(text)
    listed = bench(path, "--list")
    assert listed.exit_code == 2 and told in plain(listed.output), listed.output
    result = bench(path, "--prompts", 1, "--steps", 2, "--pipeline", entry, "--out", tmp_path / "out")
    assert result.exit_code == 2 and told in plain(result.output), result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--prompts", 201], "200 prompts; 201"),
        (["--prompts", "no-such-file"], "neither a number nor a text file"),
        (["--prompts", 2, "--held-out", 2], "give one of them"),
        (["--pipeline", "a:b", "--guidance", 3], "let generate() set it"),
        (["-k", "nonsense"], "no row's name contains 'nonsense'"),
    ],
)
def test_bad_arguments_are_refused_in_words(rows_file, tmp_path, arguments, told):
    result = bench(rows_file, *arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2 and told in plain(result.output), result.output


def test_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "rows.toml"
    path.write_bytes(b"\xff\xfe\x00")
    listed = bench(path, "--list")
    assert listed.exit_code == 2 and "is not TOML" in plain(listed.output), listed.output


@pytest.mark.parametrize("name", ["no_such_module:f", "no.such.module:f", ":f", "json", "json.decoder.no:f"])
def test_list_names_a_module_that_is_not_there(rows_file, name):
    listed = bench(rows_file, "--list", "--pipeline", name)
    assert listed.exit_code == 2 and "MODULE:FUNCTION" in plain(listed.output), listed.output


def test_list_shows_rows_and_draws_nothing(rows_file, tmp_path, monkeypatch):
    monkeypatch.setattr("cachedit_fx.bench.measure.Bench", None)
    result = bench(rows_file, "--list", "--out", tmp_path / "out")
    assert result.exit_code == 0 and "mask, TaylorSeer" in result.output and "calibrator='taylorseer'" in result.output
    assert not (tmp_path / "out").exists()


def test_presets_are_rows(tmp_path):
    path = tmp_path / "rows.toml"
    path.write_text(f"presets = true\n{ROWS}")
    names = list(cachedit_fx.presets(20))
    found = read_rows(path, 20)[-len(names) :]
    assert found == [Row(f"preset {name}", arguments={"preset": name, "steps": 20}) for name in names]
    assert [row.name for row in read_rows(path, 4)[-len(names) :]] == [row.name for row in found]


def test_two_rows_of_one_name():
    with pytest.raises(RowError, match="two rows are named 'a'"):
        select([Row("a"), Row("a")], [])


def test_peers_have_names_of_their_own():
    rows = select(peer_rows(), [])
    assert {row.system for row in rows} == {"cache-dit", "diffusers"}
    assert fewer_steps(9) == Row("9 steps", UNCACHED, steps=9)


def test_help_teaches():
    helped = plain(bench("--help").output)
    for told in ("--peers", "--resume", "generate(pipe, prompts, steps, seed)", "as many steps as cost the same work"):
        assert told in helped
    assert "What is measured" in helped and "On which pictures" in helped and "How it runs" in helped
    assert "overhead" in helped and "cold" in helped
