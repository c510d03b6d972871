"""diffusers' transformer classes, each through every check of `cachedit coverage`."""

import re
from pathlib import Path

import pytest
from lib import zoo
from torch.utils._pytree import tree_map

import cachedit_fx
from cachedit_fx.bench.coverage import CHECKS, check

pytestmark = pytest.mark.slow

SHORT = {
    "HiDreamImageTransformer2DModel": r"transformer_hidream_image\.py:\d+, in moe_infer",
    "HunyuanImageTransformer2DModel": r"attention_dispatch\.py:\d+, in _native_attention",
    "WanAnimate2Transformer3DModel": r"transformer_wan_animate_2\.py:\d+",
}
"""Classes whose blocks no capture puts into one graph, and the line upstream that breaks it: uncached, and right."""


def test_every_exported_class_is_in_the_zoo_or_left_out_with_a_reason():
    assert zoo.MISSING == [] and set(zoo.ZOO) == set(zoo.BLOCKS)
    assert not set(zoo.ZOO) & set(zoo.EXCLUDED)
    assert len(SHORT) <= 5


def test_no_class_is_named_in_the_package():
    root = Path(cachedit_fx.__file__).parent
    files = [root.parent / folder for folder in ("passes", "kernels")] + [root, root / "runtime"]
    text = "\n".join(path.read_text() for folder in files for path in folder.glob("*.py"))
    assert "choose_chain" in text and not [name for name in zoo.ZOO if re.search(rf"\b{name}\b", text)]


@pytest.mark.parametrize("name", sorted(set(zoo.ZOO) - set(SHORT)))
def test_class(name):
    row = check(name, zoo.ZOO[name], zoo.BLOCKS[name])
    assert row.passed == dict.fromkeys(CHECKS, True), row.reason
    assert row.work is not None and 0 < row.work < 1


@pytest.mark.parametrize("name", SHORT)
def test_class_that_breaks_is_right_and_says_where(name):
    row = check(name, zoo.ZOO[name], zoo.BLOCKS[name])
    assert row.passed["exact"] and not row.is_full and row.loops == ()
    assert re.search(SHORT[name], row.reason)


def test_checks_fail_where_the_promise_is_broken(monkeypatch):
    """The table is worth what its checks are: each breakage shows in its column."""
    name = "PixArtTransformer2DModel"

    def broken(target, attribute, wrap):
        with monkeypatch.context() as patched:
            patched.setattr(target, attribute, wrap(getattr(target, attribute)))
            row = check(name, zoo.ZOO[name], zoo.BLOCKS[name])
        return {column for column, held in row.passed.items() if not held}

    from cachedit_fx.runtime import memory, region_call

    worse = broken(memory.BranchMemory, "restore", lambda f: lambda *a: tree_map(lambda t: t * 1.001, f(*a)))
    assert {"reuse", "size"} <= worse and "work" not in worse
    always = broken(region_call, "may_reuse", lambda f: lambda config: False)
    assert {"work", "statistics"} <= always
    assert "blocks" in {c for c, held in check(name, zoo.ZOO[name], 5).passed.items() if not held}
