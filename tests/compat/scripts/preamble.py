"""Tiny pipelines for the scripts in this folder: real classes of diffusers, with random weights."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import nn

WIDTH = 16


class TinyBlock(nn.Module):
    """Takes and returns two streams, the hidden states first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.scale, self.text, self.up, self.down = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, hidden_states, encoder_hidden_states, temb):
        change = self.down(torch.tanh(self.up(self.norm(hidden_states) * (1 + self.scale(temb)[:, None]))))
        text = encoder_hidden_states + torch.tanh(self.text(encoder_hidden_states))
        return hidden_states + change + text.mean(1, keepdim=True), text


class TinySingleBlock(nn.Module):
    """Takes and returns the hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states, temb):
        return hidden_states + self.down(torch.tanh(self.up(self.norm(hidden_states)) + temb[:, None]))


class TinyTransformer(ModelMixin, ConfigMixin):
    """Two lists of blocks."""

    _repeated_blocks = ["TinyBlock", "TinySingleBlock"]

    @register_to_config
    def __init__(self, num_layers: int = 4, num_single_layers: int = 4) -> None:
        super().__init__()
        self.x_embedder, self.proj_out, self.time = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.transformer_blocks = nn.ModuleList(TinyBlock() for _ in range(num_layers))
        self.single_transformer_blocks = nn.ModuleList(TinySingleBlock() for _ in range(num_single_layers))

    def forward(self, hidden_states, encoder_hidden_states, timestep):
        angles = timestep.reshape(-1, 1) / 1000 * torch.linspace(0.1, 3, WIDTH)
        temb = self.time(torch.cos(angles))
        hidden = self.x_embedder(hidden_states)
        for block in self.transformer_blocks:
            hidden, encoder_hidden_states = block(hidden, encoder_hidden_states, temb)
        for block in self.single_transformer_blocks:
            hidden = block(hidden, temb)
        return self.proj_out(hidden)


class TinyPipeline(DiffusionPipeline):
    """Denoises with one transformer, or with `transformer_2` in the second half."""

    _optional_components = ["transformer_2"]

    def __init__(self, transformer, scheduler, transformer_2=None) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, transformer_2=transformer_2)

    @torch.no_grad()
    def __call__(self, prompt: str, num_inference_steps: int = 12):
        generator = torch.Generator().manual_seed(len(prompt))
        latents, text = (torch.randn(1, tokens, WIDTH, generator=generator) for tokens in (6, 3))
        self.scheduler.set_timesteps(num_inference_steps)
        for step, timestep in enumerate(self.scheduler.timesteps):
            second = self.transformer_2 is not None and 2 * step >= num_inference_steps
            transformer = self.transformer_2 if second else self.transformer
            noise = transformer(latents, text, timestep.expand(1))
            latents = self.scheduler.step(noise, timestep, latents).prev_sample
        self.maybe_free_model_hooks()
        return SimpleNamespace(images=latents)


def tiny_transformer() -> TinyTransformer:
    torch.manual_seed(0)
    return TinyTransformer().eval()


def tiny_pipeline() -> TinyPipeline:
    return TinyPipeline(tiny_transformer(), FlowMatchEulerDiscreteScheduler())


def tiny_experts() -> TinyPipeline:
    return TinyPipeline(tiny_transformer(), FlowMatchEulerDiscreteScheduler(), tiny_transformer())
