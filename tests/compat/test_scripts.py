"""Scripts after cache-dit's documented calls run with nothing changed but the import."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lib.ranks import close, on_ranks

from cachedit_fx import AttentionConfig
from cachedit_fx.compat import load_configs
from cachedit_fx.runtime.registry import states_of

FOLDER = Path(__file__).parent / "scripts"
ON_RANKS = "parallel.py"
"""The script that torchrun starts."""
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py") if path.name not in ("preamble.py", ON_RANKS))
SAYS = {
    "quantize_and_compile.py": ["set_compile_configs has no effect", "options of torch.compile have no effect"],
    "registered.py": ["patches nothing"],
}
"""Script -> what its warnings say."""


@pytest.fixture
def in_folder(monkeypatch):
    """The scripts' folder, with pieces that are not compiled, and without what scripts leave behind."""
    from cachedit_fx.compat import BlockAdapterRegister

    monkeypatch.chdir(FOLDER)
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr("cachedit_fx.lowering.inner_compiler", lambda options: lambda gm, inputs: gm.forward)
    monkeypatch.setattr("cachedit_fx.runtime.compiled_call.warm_up", lambda options: None)
    monkeypatch.setattr(BlockAdapterRegister, "_adapters", {})
    yield
    sys.modules.pop("preamble", None)


def run(name):
    """What the script's names stand for at its end, and its warnings. Asserts that it cached."""
    limits = torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            names = runpy.run_path(name)
        finally:
            torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit = limits
    assert any(entry.cached_steps for entry in names["stats"])
    messages = "\n".join(str(warning.message) for warning in caught)
    assert all(words in messages for words in SAYS.get(name, ())), messages
    return names, messages


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_and_caches(name, in_folder):
    names, _ = run(name)
    if name == "quantize_and_compile.py":
        assert names["plain"]._compiled_call_impl is None and not hasattr(names["plain"], "_orig_mod")


def test_a_script_shares_its_samples(in_folder):
    """Its output on two ranks is that of the same script without `parallelism_config`."""
    alone = (FOLDER / ON_RANKS).read_text().replace("ulysses_size=2", "ulysses_size=1")

    def shared(rank):
        names, _ = run(ON_RANKS)
        (state,) = states_of(names["pipe"].transformer)
        assert state.ranks is not None and state.ranks.size == 2
        assert state.options.attention == AttentionConfig("flash")
        assert load_configs("whole.yaml")["parallelism_config"].ulysses_size == 2  # "auto"
        whole: dict[str, Any] = {}
        exec(alone, whole)
        assert [each.cached_steps for each in names["stats"]] == [each.cached_steps for each in whole["stats"]]
        return close(names["output"].images, whole["output"].images)

    assert on_ranks(shared) == [True, True]


@pytest.mark.full("peers")
@pytest.mark.parametrize("name", [name for name in SCRIPTS if "BlockAdapter(" in (FOLDER / name).read_text()])
def test_a_script_with_an_adapter_is_one_of_cache_dit(name, tmp_path):
    """With the import of cache-dit the very script runs too, in the environment of the part `peers`."""
    text = (FOLDER / name).read_text().replace("import cachedit_fx.compat as cache_dit", "import cache_dit")
    (tmp_path / name).write_text(text.replace("cachedit_fx.compat", "cache_dit"))
    python = os.environ.get("PEERS_PYTHON", sys.executable)
    run = subprocess.run(
        [python, name], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(FOLDER)}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
