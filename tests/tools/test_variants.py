"""The variants of a model: which there are, which run, and what is said of one that is wrong."""

import re
from typing import Any, ClassVar, Literal, Optional

import torch
from lib import models
from lib.command_line import invoke, plain
from torch import nn

import cachedit_fx.pass_pipeline
from cachedit_fx.bench.variant_checks import check_variants, variants_of
from cachedit_fx.bench.variants import VariantResult, Vocabulary, changes_of, rebuilt
from cachedit_fx.passes.base import FlatGraph, Rewrite, Rewritten


class Configured(models.Toy):
    """A toy that knows its arguments, as diffusers' models do."""

    def __init__(
        self,
        width: int = models.WIDTH,
        in_channels: int = models.WIDTH,
        out_channels: Optional[int] = None,  # noqa: UP045 - the older way to write it
        bias: bool = True,
        guidance_embeds: bool = False,
        act: Literal["relu", "gelu"] = "relu",
        norm_type: str = "layer_norm",
        eps: float | None = 1e-5,
        heads: int | None = None,
        rope: str | None = None,
    ) -> None:
        super().__init__()
        self.config = {
            "width": width,
            "in_channels": in_channels,
            "out_channels": out_channels,
            "bias": bias,
            "guidance_embeds": guidance_embeds,
            "act": act,
            "norm_type": norm_type,
            "eps": eps,
            "heads": heads,
            "rope": rope,
            "_class_name": "Configured",
        }
        if norm_type not in ("layer_norm", "rms_norm"):
            raise ValueError(f"no {norm_type} here")
        if eps is None:
            raise ValueError("eps must be a number")
        self.norm = (nn.LayerNorm if norm_type == "layer_norm" else nn.RMSNorm)(width)
        self.gate = nn.Parameter(torch.zeros(out_channels or width)) if bias else 0
        self.act = getattr(nn.functional, act)
        self.guided = guidance_embeds

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        guidance: torch.Tensor | None = None,
        attention_kwargs: dict | None = None,
        camera: torch.Tensor | None = None,
        scale: Optional[float] = None,  # noqa: UP045
        return_dict: bool = True,
    ) -> Any:
        if self.guided != (guidance is not None):
            raise ValueError("guidance_embeds and guidance go together")
        if attention_mask is not None:
            hidden_states = hidden_states * attention_mask[..., None]
        result = self.act(self.norm(super().forward(hidden_states, timestep))) + self.gate  # type: ignore[arg-type]
        return {"sample": result} if return_dict else (result,)


def case(**config):
    def inputs(size):
        hidden, timestep = models.inputs(tokens=4 * size)
        return {"hidden_states": hidden.fill_(0.5), "timestep": timestep, "return_dict": False}

    return Configured(**config).eval(), inputs


class Small(nn.Module):
    """Another class, some of whose arguments have the same names."""

    def __init__(self, norm_type: str = "rms_norm", heads: int = 2) -> None:
        super().__init__()
        self.config = {"norm_type": norm_type, "heads": heads}

    def forward(self, hidden_states):
        return hidden_states


class Large(Small):
    def __init__(self, norm_type: str = "batch_norm", rope: str = "axial") -> None:
        super().__init__(norm_type)


VOCABULARY = Vocabulary([Configured(), Small(), Large()])


def test_every_flag_choice_and_optional_argument_is_changed():
    module, inputs = case()
    changes = changes_of(module, inputs, VOCABULARY)
    definite = {change.label for change in changes if not change.is_guess}
    assert definite == {"bias=False", "guidance_embeds=True", "act='gelu'", "return_dict=True"}
    assert {change.label for change in changes if change.is_guess} == {
        "out_channels=16",
        "norm_type='rms_norm'",
        "norm_type='batch_norm'",
        "eps=None",
        "heads=2",
        "rope='axial'",
        "timestep=None",
        "attention_mask given",
        "guidance given",
        "attention_kwargs given",
    }
    (mask,) = [change.value for change in changes if change.name == "attention_mask"]
    assert mask.tolist() == [[True, True, True, False]]


def test_none_is_no_guess_where_the_class_asks_for_it():
    module, inputs = case(guidance_embeds=True)

    def with_guidance(size):
        return inputs(size) | {"guidance": torch.tensor([3.0])}

    labels = {change.label: change.is_guess for change in changes_of(module, with_guidance, VOCABULARY)}
    assert labels["guidance=None"] is False and labels["timestep=None"] is True


def test_a_rebuilt_module_keeps_the_weights_that_fit_and_draws_the_others():
    module, _ = case()
    another, again = rebuilt(module, {"norm_type": "rms_norm"}), rebuilt(module, {"norm_type": "rms_norm"})
    weights = [dict(rebuilt(module, {"out_channels": width}).named_parameters()) for width in (16, 1)]
    assert torch.equal(weights[0]["embed.weight"], dict(module.named_parameters())["embed.weight"])
    assert not weights[0]["gate"].any() and weights[1]["gate"].all()
    for one, two in zip(another.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)


def test_what_the_class_refuses_is_told_apart():
    module, inputs = case()
    tried = list(variants_of(module, inputs, VOCABULARY))
    run = {variant[0].label for variant in tried if not isinstance(variant, VariantResult)}
    assert {"bias=False", "guidance_embeds=True, guidance given", "norm_type='rms_norm'"} <= run
    refused = {result.label: result for result in tried if isinstance(result, VariantResult)}
    assert refused.keys() == {"norm_type='batch_norm'", "eps=None", "timestep=None"}
    assert {result.outcome for result in refused.values()} == {"unknown"}
    assert "ValueError" in refused["eps=None"].reason and "eps must be a number" in refused["eps=None"].reason


class WrongRelu(Rewrite):
    """Takes one activation for another."""

    name: ClassVar[str] = "wrong_relu"
    requires: ClassVar[tuple[type, ...]] = (FlatGraph,)
    preserves: ClassVar[tuple[type, ...]] = (FlatGraph,)

    def run(self, gm, facts):
        nodes = gm.graph.find_nodes(op="call_function", target=nn.functional.relu)
        for node in nodes:
            node.target = nn.functional.silu
        return Rewritten(gm, len(nodes))


FILE = """
from tools.test_variants import case

ZOO = {"Configured": lambda: case(act="gelu")}
"""


def test_a_wrong_variant_is_named_in_the_table(monkeypatch, tmp_path):
    pipeline = cachedit_fx.pass_pipeline.pipeline
    monkeypatch.setattr(cachedit_fx.pass_pipeline, "pipeline", lambda *options: [WrongRelu(), *pipeline(*options)])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    file, out = tmp_path / "configured.py", tmp_path / "table.md"
    file.write_text(FILE)
    result = invoke("coverage", file, "--variants", "--out", out, columns=200)
    assert result.exit_code == 1 and "1 wrong" in plain(result.output), result.output
    text = out.read_text()
    assert "configured.py --variants`" in text and re.search(r"\| (\d+) of \1, 1 wrong *\|", text)
    wrong, unknown = (text.index(f"## {title}") for title in ("Variants that are wrong", "Guessed values"))
    assert re.search(r"\*\*Configured\*\*, `act='relu'`: Configured: .* differs is epilogue", text[wrong:unknown])
    assert text[wrong:unknown].count("- **") == 1 and text[unknown:].count("- **") == 2


class Breaks(nn.Module):
    """Every block is a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = models.Toy().blocks

    def forward(self, hidden_states, timestep, return_dict: bool = True):
        for block in self.blocks:
            hidden_states = block(hidden_states, models.time_embedding(timestep))
            torch._dynamo.graph_break()
        return (hidden_states,)


def test_a_variant_that_cannot_be_captured_is_right_and_uncached():
    (result,) = check_variants(Breaks().eval(), case()[1], Vocabulary())
    assert (result.label, result.outcome) == ("return_dict=True", "uncached") and "graph_break" in result.reason
