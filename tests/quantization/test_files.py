"""`save_quantized` and `load_quantized`: equal to the bit, and errors before a weight changes."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch
from lib.toys import Toy, make, noise
from lib.wrapped import SKIPS, enabled, generation, toy
from safetensors.torch import load_file, save_file
from torch import nn

from cachedit_fx import OptionError, load_quantized, quantize, save_quantized
from cachedit_fx.quantization.files import MEANING, WEIGHTS

pytestmark = pytest.mark.filterwarnings("ignore:.*gains no time", "ignore:.*is a stand-in")
KINDS = ["float8_weight_only", "int8", "int8_per_tensor", "int8_weight_only", "int4_emulated"]
KINDS += ["int4_weight_only_emulated"]


class Shares(Toy):
    """A parameter at the top, and two names for one."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.table = nn.Parameter(torch.ones(3))
        self.embed.weight = self.out.weight


def inputs(width: int = 32) -> list[torch.Tensor]:
    return [noise(width=width), torch.tensor([500.0]), noise(1, 3, width=width)]


@pytest.fixture
def saved(tmp_path):
    """A folder with a model, and the model."""
    model = make(width=32)
    quantize(model, "int8_weight_only", exclude="blocks.1")
    save_quantized(model, tmp_path / "new" / "folder")
    return tmp_path / "new" / "folder", model


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_model_is_equal_to_the_bit(kind, tmp_path):
    model = make(Shares, width=32)
    quantize(model, kind, per_layer={"blocks.1": "float8_weight_only"})
    save_quantized(model, tmp_path)
    other = make(Shares, seed=1, width=32)
    assert load_quantized(other, tmp_path) is other
    assert torch.equal(other(*inputs()), model(*inputs()))
    assert other.embed.weight is other.out.weight
    assert sorted(path.name for path in tmp_path.iterdir()) == [MEANING, WEIGHTS]
    again = make(Shares, seed=2, width=32)
    quantize(again, "int8")
    assert torch.equal(load_quantized(again, tmp_path)(*inputs()), model(*inputs()))


def test_other_dtypes_and_no_device_come_out_as_saved(tmp_path):
    model = make(width=32).bfloat16()
    quantize(model, "int8")
    save_quantized(model, tmp_path)
    other = load_quantized(make(width=32).to("meta"), tmp_path)
    other.frequencies = model.frequencies
    half = [each.bfloat16() for each in inputs()]
    assert torch.equal(other(*half), model(*half))


def test_with_the_cache_enabled(tmp_path):
    model, arguments = toy()
    quantize(model, "int8")
    enabled(model, SKIPS)
    expected = generation(model, arguments)
    save_quantized(model, tmp_path)
    other, _ = toy()
    other.time.reset_parameters()
    enabled(other, SKIPS)
    generation(other, arguments)
    assert torch.equal(generation(load_quantized(other, tmp_path), arguments), expected)


def change(folder, **changes):
    meaning = json.loads((folder / MEANING).read_text())
    (folder / MEANING).write_text(json.dumps(meaning | changes))


def other_save(folder):
    model = make(width=32)
    quantize(model, "int8")
    kept = (folder / MEANING).read_text()
    save_quantized(model, folder)
    (folder / MEANING).write_text(kept)


def without_a_part(folder):
    parts = load_file(folder / WEIGHTS)
    key = json.loads((folder / MEANING).read_text())["key"]
    del parts["blocks.0.up._weight_scale"]
    save_file(parts, folder / WEIGHTS, {"key": key})


BROKEN: dict[str, tuple[Any, str]] = {
    "no folder": (shutil.rmtree, "has no file quantization.json"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "has no file weights.safetensors"),
    "no JSON": (lambda folder: (folder / MEANING).write_text("{"), "is no description of quantized weights"),
    "a list": (lambda folder: (folder / MEANING).write_text("[]"), "is no description of quantized weights"),
    "a field": (lambda folder: change(folder, quantized=3), "a field has the wrong type"),
    "another type": (
        lambda folder: change(folder, quantized={"blocks.0.up.weight": '{"_type": "os.system"}'}),
        "does not fit its weights: Unsupported tensor type: os.system",
    ),
    "format": (lambda folder: change(folder, format=2), "has format 2, and this version reads format 1"),
    "torchao": (
        lambda folder: change(folder, versions={"torchao": "0.21.0"}),
        "was saved with torchao 0.21.0, and this is .*: install that version, or quantize and save anew",
    ),
    "class": (lambda folder: change(folder, **{"class": "Other"}), "holds a Other, and the module is a Toy"),
    "two saves": (other_save, "are of two different saves"),
    "cut off": (
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:500]),
        "weights.safetensors is broken",
    ),
    "a part": (without_a_part, "does not fit its weights: parts of blocks.0.up.weight are missing"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_an_error_before_a_weight_changes(case, saved):
    folder, _ = saved
    spoil, words = BROKEN[case]
    spoil(folder)
    model = make(width=32, seed=1)
    before = model(*inputs())
    with pytest.raises(OptionError, match=words):
        load_quantized(model, folder)
    assert torch.equal(model(*inputs()), before)


def test_another_model_is_an_error(saved):
    folder, _ = saved
    with pytest.raises(OptionError, match="does not fit this Toy: the file lacks blocks.6.* and 7 more$"):
        load_quantized(make(width=32, blocks=7), folder)
    with pytest.raises(OptionError, match="the module lacks blocks.5.* and 7 more$"):
        load_quantized(make(width=32, blocks=5), folder)
    with pytest.raises(OptionError, match=r"other sizes have .*embed.weight \(\[32, 32\], in the module \[16, 16\]\)"):
        load_quantized(make(width=16), folder)


def test_what_cannot_be_saved_is_an_error(tmp_path):
    with pytest.raises(OptionError, match="Toy has no layer that torchao quantized: call quantize first"):
        save_quantized(make(), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    model = make()
    quantize(model, "int8")
    with pytest.raises(OptionError, match="file is a file; give a folder"):
        save_quantized(model, tmp_path / "file")


def test_weights_that_wait_on_the_host_are_an_error(tmp_path):
    model, _ = toy()
    quantize(model, "int8")
    save_quantized(model, tmp_path)
    other, _ = toy()
    enabled(other, time_weights="host")
    with pytest.raises(OptionError, match="wait on the host"):
        load_quantized(other, tmp_path)


def test_an_interrupted_save_leaves_the_folder_as_it_was(saved, monkeypatch):
    folder, model = saved
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr("json.dumps", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_quantized(model, folder)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
