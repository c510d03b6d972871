"""diffusers' transformer classes, each through the checks of `cachedit coverage`.

By default a class is captured once, and that capture serves every check but the one of a second resolution, which two
classes of distinct shape have. Copies of another class wait for the part `zoo`. It makes the whole check of every
class, and captures anew for each setting, as a user's calls do; one class has that by default.
"""

import re
from pathlib import Path
from typing import Any

import pytest
from lib import zoo
from lib.marks import only_in
from lib.shared import SharedSubject
from torch.utils._pytree import tree_map

import cachedit_fx
from cachedit_fx.bench.coverage import CHECKS, check
from cachedit_fx.bench.coverage_attention import check_attention
from cachedit_fx.bench.coverage_quantized import check_quantized
from cachedit_fx.runtime.memory import BranchMemory
from cachedit_fx.runtime.policies.base import Action, Decision, Reason
from cachedit_fx.runtime.policies.dbcache import DBCache

CAPTURED = sorted(set(zoo.ZOO) - set(zoo.SHORT))
COPIES = {
    "AceStepTransformer1DModel": "DiTTransformer2DModel",
    "AllegroTransformer3DModel": "LatteTransformer3DModel",
    "AnyFlowFARTransformer3DModel": "WanTransformer3DModel",
    "AnyFlowTransformer3DModel": "WanTransformer3DModel",
    "AuraFlowTransformer2DModel": "Flux2Transformer2DModel",
    "BriaFibo2Transformer2DModel": "Lumina2Transformer2DModel",
    "BriaFiboTransformer2DModel": "Flux2Transformer2DModel",
    "BriaTransformer2DModel": "FluxTransformer2DModel",
    "ChromaTransformer2DModel": "Flux2Transformer2DModel",
    "ChronoEditTransformer3DModel": "WanTransformer3DModel",
    "CogView4Transformer2DModel": "CogView3PlusTransformer2DModel",
    "ConsisIDTransformer3DModel": "CogVideoXTransformer3DModel",
    "CosmosTransformer3DModel": "WanTransformer3DModel",
    "EasyAnimateTransformer3DModel": "CogVideoXTransformer3DModel",
    "ErnieImageTransformer2DModel": "DiTTransformer2DModel",
    "GlmImageTransformer2DModel": "QwenImageTransformer2DModel",
    "HeliosTransformer3DModel": "WanTransformer3DModel",
    "HunyuanVideoFramepackTransformer3DModel": "FluxTransformer2DModel",
    "HunyuanVideoTransformer3DModel": "FluxTransformer2DModel",
    "Ideogram4Transformer2DModel": "DiTTransformer2DModel",
    "JoyImageEditPlusTransformer3DModel": "QwenImageTransformer2DModel",
    "JoyImageEditTransformer3DModel": "QwenImageTransformer2DModel",
    "Kandinsky5Transformer3DModel": "MiniMaxH3Transformer3DModel",
    "Kandinsky6SRTransformer3DModel": "DiTTransformer2DModel",
    "Kandinsky6Transformer3DModel": "QwenImageTransformer2DModel",
    "Krea2Transformer2DModel": "Lumina2Transformer2DModel",
    "LTX2VideoTransformer3DModel": "Cosmos3OmniTransformer",
    "LongCatAudioDiTTransformer": "MiniMaxH3Transformer3DModel",
    "LongCatImageTransformer2DModel": "FluxTransformer2DModel",
    "LuminaNextDiT2DModel": "DiTTransformer2DModel",
    "MochiTransformer3DModel": "QwenImageTransformer2DModel",
    "MotifVideoTransformer3DModel": "Flux2Transformer2DModel",
    "OvisImageTransformer2DModel": "FluxTransformer2DModel",
    "PRXTransformer2DModel": "DiTTransformer2DModel",
    "PriorTransformer": "DiTTransformer2DModel",
    "QwenImage21Transformer2DModel": "OmniGenTransformer2DModel",
    "SanaVideoTransformer3DModel": "SanaTransformer2DModel",
    "SanaWMLTX2RefinerTransformer3DModel": "WanTransformer3DModel",
    "SanaWMTransformer3DModel": "SanaTransformer2DModel",
    "SkyReelsV2Transformer3DModel": "WanTransformer3DModel",
    "StableAudio3DiTModel": "StableAudioDiTModel",
    "Transformer2DModel": "DiTTransformer2DModel",
    "WanAnimateTransformer3DModel": "WanTransformer3DModel",
    "WanVACETransformer3DModel": "WanTransformer3DModel",
    "ZImageTransformer2DModel": "Lumina2Transformer2DModel",
}
"""Classes whose chain is that of another class, which the default part has: as many loops, carried values, results.

Hints for each block, which some of them add, are in test_elsewhere.py.
"""

RESIZED = {
    "FluxTransformer2DModel": "joint blocks, then single ones",
    "StableAudioDiTModel": "a sound",
}
"""Classes of distinct shape, whose whole check is made by default. Pipelines of others are in test_families.py."""

WITHOUT_ATTENTION = {"T5FilmDecoder", "Kandinsky6SRTransformer3DModel"}
"""Classes that attend by other means than sdpa: written out, or by flex_attention alone."""

AS_A_USER = ["PixArtTransformer2DModel"]
"""Classes that are captured anew for each setting by default."""


def missed(row):
    """The checks of a row that did not hold."""
    return {column for column in CHECKS if not row.passed.get(column)}


def test_every_exported_class_is_in_the_zoo_or_left_out_with_a_reason():
    assert zoo.MISSING == [] and set(zoo.ZOO) == set(zoo.BLOCKS)
    assert not set(zoo.ZOO) & set(zoo.EXCLUDED)
    assert len(zoo.SHORT) <= 5


def test_a_copy_has_its_original_in_the_default_part():
    assert set(COPIES) < set(CAPTURED) and set(COPIES.values()) <= set(CAPTURED) - set(COPIES)


def test_no_class_is_named_in_the_package():
    root = Path(cachedit_fx.__file__).parent
    files = [root.parent / folder for folder in ("passes", "kernels")] + [root, root / "runtime"]
    text = "\n".join(path.read_text() for folder in files for path in folder.glob("*.py"))
    assert "choose_chain" in text and not [name for name in zoo.ZOO if re.search(rf"\b{name}\b", text)]


@pytest.mark.budget(60, "a large graph, and another with symbols")
@pytest.mark.parametrize("name", sorted(set(CAPTURED) - set(COPIES) - set(AS_A_USER)))
def test_class_by_one_capture(name):
    row = check(name, zoo.ZOO[name], zoo.BLOCKS[name], subject=SharedSubject, resizes=name in RESIZED)
    assert missed(row) == (set() if name in RESIZED else {"size"}), row.reason
    assert row.work is not None and 0 < row.work < 1


@pytest.mark.budget(120, "two captures, of large graphs too")
@pytest.mark.filterwarnings("ignore:.*gains no time", "ignore:.*no caching")
@pytest.mark.parametrize("name", only_in("zoo", CAPTURED))
def test_class_in_int8(name):
    assert check_quantized(zoo.ZOO[name]) == (True, "")


@pytest.mark.budget(120, "three captures, of large graphs too")
@pytest.mark.parametrize("name", only_in("zoo", CAPTURED))
def test_class_with_another_attention(name):
    words = (None, "it has no call of attention") if name in WITHOUT_ATTENTION else (True, "")
    assert check_attention(zoo.ZOO[name]) == words


@pytest.mark.budget(120, "several captures, of large graphs too")
@pytest.mark.parametrize("name", only_in("zoo", CAPTURED, but=AS_A_USER))
def test_class(name):
    row = check(name, zoo.ZOO[name], zoo.BLOCKS[name])
    assert row.passed == dict.fromkeys(CHECKS, True), row.reason
    assert row.work is not None and 0 < row.work < 1


@pytest.mark.budget(60, "every frame of a model that breaks is a capture")
@pytest.mark.full("zoo")
@pytest.mark.parametrize("name", zoo.SHORT)
def test_class_that_breaks_is_right_and_says_where(name):
    row = check(name, zoo.ZOO[name], zoo.BLOCKS[name])
    assert row.passed["exact"] and not row.is_full and row.loops == ()
    assert re.search(zoo.SHORT[name], row.reason)


BROKEN = {
    "a restored value is off": (BranchMemory, "restore", lambda f: lambda *a: tree_map(lambda t: t * 1.001, f(*a))),
    "nothing is ever reused": (DBCache, "decide", lambda f: lambda *a: Decision(Action.COMPUTE, Reason.WARMUP)),
}


def test_checks_fail_where_the_promise_is_broken(monkeypatch):
    """The table is worth what its checks are: each breakage shows in its column."""
    name = "DiTTransformer2DModel"

    def broken(breakage, **settings):
        target, attribute, wrap = BROKEN[breakage]
        with monkeypatch.context() as patched:
            patched.setattr(target, attribute, wrap(getattr(target, attribute)))
            return missed(check(name, zoo.ZOO[name], zoo.BLOCKS[name], **settings))

    shared: dict[str, Any] = {"subject": SharedSubject, "resizes": False}
    assert broken("a restored value is off") == {"reuse", "size"}
    assert broken("a restored value is off", **shared) == {"reuse", "size"}
    assert broken("nothing is ever reused", **shared) >= {"work", "statistics"}
    assert missed(check(name, zoo.ZOO[name], 5, **shared)) == {"blocks", "size"}
