"""Which layers are quantized: by the structure of blocks, by names, by patterns, by what a kind takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lib.zoo import ZOO
from torch import nn

import cachedit_fx
from cachedit_fx import OptionError
from cachedit_fx.config.patterns import matches
from cachedit_fx.quantization.kinds import KINDS
from cachedit_fx.quantization.layers import OUTSIDE, Request, blocks_of, groups_of, linear_layers, select

INT8 = KINDS["int8"]
FEW_ROWS = {
    "ConsisIDTransformer3DModel": "perceiver_cross_attention",  # one identity token
    "HiDreamImageTransformer2DModel": "experts",  # as many rows as tokens choose the expert
}
"""Class -> a part of the names of layers that work on tokens, and on one row in the zoo's small inputs."""


class Mlp(nn.Module):
    """Two layers, and one that steers them."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, width))


class Other(Mlp):
    """Another class of block."""


class Net(nn.Module):
    """Blocks in many guises."""

    def __init__(self) -> None:
        super().__init__()
        self.x_embedder = nn.Linear(16, 16)
        self.blocks = nn.ModuleList(Mlp() for _ in range(12))
        self.mixed = nn.ModuleList([Mlp(), Other(), Mlp(), Other()])
        self.side_1, self.side_2 = Mlp(), Mlp()
        self.nest = nn.Module()
        self.nest.stages = nn.ModuleList([nn.ModuleList([Mlp(), Mlp()]), nn.ModuleList([Mlp(), Mlp()])])
        self.single = nn.ModuleList([Mlp()])
        self.feed = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))
        self.proj_out = nn.Linear(16, 16)


def chosen(module: nn.Module, **settings: Any) -> set[str]:
    return {*select(module, Request(INT8, **settings)).kinds}


def test_blocks_are_found_by_structure():
    numbered = [f"blocks.{index}" for index in range(12)] + [f"mixed.{index}" for index in range(4)]
    assert [*blocks_of(Net())] == [*numbered, "side_1", "side_2", "nest.stages.0", "nest.stages.1"]


def test_the_default_takes_layers_on_tokens_in_blocks_alone():
    names = chosen(Net())
    assert {name.rpartition(".")[2] for name in names} == {"up", "down"} and len(names) == 2 * (12 + 4 + 2 + 4)
    kept = select(Net(), Request(INT8)).kept
    assert kept["proj_out"] == kept["x_embedder"] == kept["single.0.up"] == OUTSIDE
    assert "adaLN_modulation" in kept["blocks.3.adaLN_modulation.1"]


def test_groups_are_the_parts_of_each_block():
    net = Net()
    net.deep = nn.ModuleList(nn.ModuleDict({"inner": Mlp()}) for _ in range(2))
    groups = groups_of(net, [*chosen(net), "proj_out"])
    assert groups["blocks.10", "up"] == ("blocks.10.up",) and groups["deep.1", "inner.up"] == ("deep.1.inner.up",)
    assert {name for layers in groups.values() for name in layers} == chosen(net)
    assert {*groups["nest.stages.0", "1"]} == {"nest.stages.0.1.up", "nest.stages.0.1.down"}
    flux = ZOO["FluxTransformer2DModel"]()[0]
    parts = {part: len(layers) for (_, part), layers in groups_of(flux, chosen(flux)).items()}
    assert parts == {"attn": 3, "ff": 2, "ff_context": 2, "proj_mlp": 1, "proj_out": 1}
    joint = groups_of(flux, chosen(flux))["transformer_blocks.0", "attn"]
    assert len(joint) == 8 and {name.rpartition(".")[0] for name in joint} == {
        "transformer_blocks.0.attn", "transformer_blocks.0.attn.to_out"
    }  # fmt: skip


def test_outside_the_blocks_first_and_last_layers_are_kept():
    more = chosen(Net(), regional=False) - chosen(Net())
    assert more == {"single.0.up", "single.0.down", "feed.0", "feed.2"}


@pytest.mark.parametrize("name", ZOO)
def test_layers_by_name_are_those_on_tokens(name):
    """No layer is taken that works on one row a sample, whatever the class."""
    module, make_inputs = ZOO[name]()
    inputs, rows = make_inputs(1), {}
    for layer_name, layer in linear_layers(module).items():
        layer.register_forward_pre_hook(
            lambda _, args, name=layer_name: rows.update({name: args[0].shape[:-1].numel()})
        )
    with torch.no_grad():
        module(**inputs)
    batch = min(value.shape[0] for value in inputs.values() if isinstance(value, torch.Tensor) and value.dim())
    selection = select(module, Request(INT8))
    assert selection.kinds
    few = FEW_ROWS.get(name, "none")
    assert [layer for layer in selection.kinds if rows.get(layer, 99) <= batch and few not in layer] == []


PATTERNS = [
    ("blocks.1", "blocks.1.up", True),
    ("blocks.1", "blocks.10.up", False),
    ("blocks.1*", "blocks.10.up", True),
    ("up", "blocks.1.up", True),
    ("u", "blocks.1.up", False),
    ("*p", "blocks.1.up", True),
    ("blocks.1.up", "blocks.1.up", True),
    ("1.up", "blocks.1.up", True),
]


@pytest.mark.parametrize(("pattern", "name", "expected"), PATTERNS)
def test_a_pattern_is_neighbouring_parts_of_a_name(pattern, name, expected):
    assert matches(name, pattern) is expected


def test_exclude_include_and_per_layer():
    default = chosen(Net())
    assert default - chosen(Net(), exclude=("blocks.1", "down")) == {
        name for name in default if "down" in name or name == "blocks.1.up"
    }
    assert chosen(Net(), include=("proj_out", "side_1")) - default == {"proj_out", "side_1.adaLN_modulation.1"}
    plan = {"blocks.0.adaLN_modulation.1": INT8, "blocks.0": None, "up": KINDS["float8_weight_only"]}
    kinds = select(Net(), Request(INT8, per_layer=plan)).kinds
    assert default ^ {*kinds} == {"blocks.0.adaLN_modulation.1", "blocks.0.up", "blocks.0.down"}
    assert kinds["blocks.1.up"].name == "float8_weight_only" and kinds["blocks.1.down"] is INT8
    assert chosen(Net(), exclude=("proj_out",), include=("proj_out",)) == default


def test_a_plan_alone_quantizes_what_it_names():
    selection = select(Net(), Request(None, per_layer={"side_2": INT8, "proj_out": INT8}))
    assert {*selection.kinds} == {"side_2.up", "side_2.down", "proj_out"}
    assert selection.kept["blocks.0.up"] == "per_layer names no kind for it"


def test_layers_that_a_kind_does_not_fit_are_kept_with_the_reason():
    net = Net()
    net.blocks[0].up = nn.Linear(15, 32)
    kind = KINDS["float8_per_tensor"]
    assert select(net, Request(kind)).kept["blocks.0.up"] == (
        "float8_per_tensor needs input features in multiples of 16, not 15"
    )
    reason = select(net, Request(KINDS["float8"])).kept["blocks.1.up"]
    assert reason == "float8 takes weights in bfloat16, not float32"
    assert not select(Net().bfloat16(), Request(KINDS["float8"])).kept.keys() & chosen(Net())


class Packed(nn.Linear):
    """As bitsandbytes and GGUF have it: a class of weight of their own."""

    class Weight(nn.Parameter):
        pass

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.weight = Packed.Weight(torch.zeros(outputs * inputs // 2, 1, dtype=torch.uint8), requires_grad=False)


class Elsewhere(nn.Module):
    """As Nunchaku has it: a packed weight under another name."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.register_buffer("qweight", torch.zeros(outputs, inputs // 2, dtype=torch.int8))


def test_layers_of_other_libraries_stay_and_are_listed():
    net = Net()
    net.blocks[0].up, net.blocks[1].up = Packed(16, 32), Elsewhere(16, 32)
    report = cachedit_fx.quantize(net, "int8_weight_only")
    reasons = {layer.name: (layer.reason, layer.bytes) for layer in report.kept}
    assert reasons["blocks.0.up"] == ("quantized already (Weight)", 256)
    assert reasons["blocks.1.up"] == ("quantized already (Elsewhere)", 256)
    assert len(report.layers) == len(chosen(Net())) - 2


def test_a_model_that_another_library_quantized_whole_is_no_error():
    net = nn.ModuleList(nn.ModuleList([Packed(16, 16), Elsewhere(16, 16)]) for _ in range(2))
    report = cachedit_fx.quantize(net, "int8")
    assert report.layers == () and report.bytes_after == report.bytes_before
    assert report.reasons == {"quantized already (Weight)": 2, "quantized already (Elsewhere)": 2}


def test_layers_that_others_read_and_those_without_data_are_kept():
    net = nn.ModuleList(
        nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2), "up": nn.Linear(16, 16)}) for _ in range(2)
    )
    net.get_submodule("0.up").to("meta")
    report = cachedit_fx.quantize(net, "int8_weight_only")
    assert [layer.name for layer in report.layers] == ["1.up"]
    assert report.reasons == {
        "torch.nn.MultiheadAttention reads its weight": 2,
        "its weight is on the device 'meta': quantize before offloading": 1,
    }


class Transposes(nn.Linear):
    """Multiplies in a way that no quantized weight takes."""

    def forward(self, hidden):
        return hidden @ self.weight.T + self.bias


class Experts(nn.Module):
    """A matrix for each expert."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        self.weight = nn.Parameter(torch.zeros(2, inputs, outputs))


def test_layers_that_would_not_run_quantized_are_kept_with_the_reason():
    net: Any = Net()
    net.blocks[0].up, net.blocks[1].up = Transposes(16, 32), Experts(16, 32)
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(net.blocks[2].up)
    report = cachedit_fx.quantize(net, "int8_weight_only")
    reasons = {layer.name: layer.reason for layer in report.kept}
    assert reasons["blocks.0.up"].startswith("its class Transposes does not run with a quantized weight: ")
    assert reasons["blocks.1.up"] == "its weight is no matrix, but has 3 dimensions"
    assert reasons["blocks.2.up"] == "its weight is no parameter, but a buffer or a hook's result"
    for number in (0, 2, 3):
        assert net.blocks[number].up(torch.ones(1, 16)).shape == (1, 32)


def test_layers_that_a_plan_keeps_have_one_reason():
    plan = {name: None for name in chosen(Net()) if name.startswith("blocks.0")}
    report = cachedit_fx.quantize(Net(), "int8_weight_only", per_layer=plan)
    assert report.reasons["kept by its name in per_layer"] == len(plan) > 1


@pytest.mark.parametrize("title", ["exclude", "include", "per_layer"])
def test_a_pattern_without_a_layer_is_an_error_with_the_nearest(title):
    patterns: Any = {"dwn": "int8"} if title == "per_layer" else "dwn"
    with pytest.raises(OptionError, match=f"{title}: 'dwn' matches none of the .* did you mean 'down'"):
        cachedit_fx.quantize(Net(), "int8", **{title: patterns})
