"""Pipelines like diffusers': a scheduler, a loop over its timesteps, guidance by calls or by a doubled batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from .toys import noise

TEXTS = noise(1, 3, seed=2), noise(1, 3, seed=3)


class Cancelled(Exception):
    """Raised by a callback, as users' code does to stop a generation."""


class ToyPipeline:
    """Denoises by calls of `transformer`.

    Args:
        texts: one call a step for each; two texts are guidance by two calls without names.
        scheduler: FLUX's by default.
    """

    def __init__(self, transformer: Any, texts: Sequence[torch.Tensor] = TEXTS[:1], scheduler: Any = None) -> None:
        self.transformer, self.texts = transformer, texts
        self.scheduler = scheduler or FlowMatchEulerDiscreteScheduler()
        self.components = {"transformer": transformer, "scheduler": self.scheduler}

    @torch.no_grad()
    def __call__(
        self, latents: torch.Tensor, steps: int = 8, skip: int = 0, callback: Callable[[int], None] = lambda step: None
    ) -> torch.Tensor:
        """Denoise `latents`, from step `skip` on, as image-to-image does."""
        timesteps = self.timesteps(steps, skip)
        for step, timestep in enumerate(timesteps):
            latents = self.scheduler.step(self.predict(latents, timestep, step), timestep, latents).prev_sample
            callback(step)
        return latents

    def timesteps(self, steps: int, skip: int) -> torch.Tensor:
        self.scheduler.set_timesteps(steps)
        if skip and hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(skip)
        return self.scheduler.timesteps[skip:]

    def predict(self, latents: torch.Tensor, timestep: torch.Tensor, step: int) -> torch.Tensor:
        """The guided prediction of one step."""
        times = timestep.expand(1) / 1.0
        first, *others = [self.transformer(latents, times, text) for text in self.texts]
        return first + sum(2.0 * (first - other) for other in others)


class HalvesTheBatch(ToyPipeline):
    """Guidance by a doubled batch, which ends after step `last`."""

    last = 3

    def predict(self, latents: torch.Tensor, timestep: torch.Tensor, step: int) -> torch.Tensor:
        if step > self.last:
            return self.transformer(latents, timestep.expand(1), TEXTS[0])
        first, second = self.transformer(torch.cat([latents] * 2), timestep.expand(2), torch.cat(TEXTS)).chunk(2)
        return first + 2.0 * (first - second)


class TellsTheTimestep(ToyPipeline):
    """Shows `_current_timestep`, as many of diffusers' pipelines do."""

    def predict(self, latents: torch.Tensor, timestep: torch.Tensor, step: int) -> torch.Tensor:
        self._current_timestep = timestep
        return super().predict(latents, timestep, step)


class Inverts(ToyPipeline):
    """`invert` goes the schedule backwards with a scheduler of its own."""

    def __init__(self, transformer: Any, inverse: Any, **arguments: Any) -> None:
        super().__init__(transformer, **arguments)
        self.inverse_scheduler = inverse

    @torch.no_grad()
    def invert(self, latents: torch.Tensor, steps: int = 8) -> torch.Tensor:
        self.inverse_scheduler.set_timesteps(steps)
        for timestep in self.inverse_scheduler.timesteps:
            prediction = self.transformer(latents, timestep.expand(1), TEXTS[0])
            latents = self.inverse_scheduler.step(prediction, timestep, latents).prev_sample
        return latents


class CallsOnceMore(ToyPipeline):
    """Calls the model at timestep 0 for its side effects, before or after the loop."""

    before, after = False, False

    @torch.no_grad()
    def __call__(self, latents: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
        result = super().__call__(latents, *arguments, **keywords)
        if self.after:
            self.transformer(result, torch.zeros(1), TEXTS[0])
        return result

    def timesteps(self, steps: int, skip: int) -> torch.Tensor:
        timesteps = super().timesteps(steps, skip)
        if self.before:
            self.transformer(noise(seed=9), torch.zeros(1), TEXTS[0])
        return timesteps


class UsesACopy(ToyPipeline):
    """Denoises with a copy of its scheduler: the pipeline's own stands still."""

    @torch.no_grad()
    def __call__(self, latents: torch.Tensor, steps: int = 8, *arguments: Any, **keywords: Any) -> torch.Tensor:
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(steps)
        for step, timestep in enumerate(scheduler.timesteps):
            latents = scheduler.step(self.predict(latents, timestep, step), timestep, latents).prev_sample
        return latents


class Denoiser:
    """A block of a modular pipeline: the loop is in an object that has no scheduler."""

    def __call__(self, components: ToyPipeline, latents: torch.Tensor, steps: int) -> torch.Tensor:
        return ToyPipeline.__call__(components, latents, steps)


class HasALoopOfItsOwn(ToyPipeline):
    """A second method denoises by timesteps of its own, and leaves the scheduler where it stands."""

    @torch.no_grad()
    def refine(self, latents: torch.Tensor, steps: int = 8) -> torch.Tensor:
        for step, timestep in enumerate(torch.linspace(1000, 100, steps)):
            latents = latents - 0.01 * self.predict(latents, timestep, step)
        return latents


class HasASchedulerToSpare(ToyPipeline):
    """Sets the timesteps of a scheduler that it never steps, and has a scale of guidance that cannot be read."""

    def __init__(self, transformer: Any, **arguments: Any) -> None:
        super().__init__(transformer, **arguments)
        self.spare = FlowMatchEulerDiscreteScheduler()
        self.spare.set_timesteps(50)

    @property
    def guidance_scale(self) -> float:
        raise RuntimeError("not set")

    @property
    def do_classifier_free_guidance(self) -> torch.Tensor:
        return torch.ones(2)


class SlicesTimesteps(ToyPipeline):
    """Starts in the middle of its schedule, without a word to the scheduler."""

    def timesteps(self, steps: int, skip: int) -> torch.Tensor:
        self.scheduler.set_timesteps(steps)
        return self.scheduler.timesteps[skip:]


class WantsGradients(ToyPipeline):
    """Guides by gradients: calls the model with gradients before, or after, the call that is a step."""

    def __init__(self, transformer: Any, before: Collection[int] = (), after: Collection[int] = (), **arguments: Any):
        super().__init__(transformer, **arguments)
        self.before, self.after = before, after

    def predict(self, latents: torch.Tensor, timestep: torch.Tensor, step: int) -> torch.Tensor:
        self.want_gradients(latents, timestep, step in self.before)
        prediction = super().predict(latents, timestep, step)
        self.want_gradients(latents, timestep, step in self.after)
        return prediction

    def want_gradients(self, latents: torch.Tensor, timestep: torch.Tensor, wanted: bool) -> None:
        if wanted:
            with torch.enable_grad():
                self.transformer(latents.clone().requires_grad_(), timestep.expand(1) / 1.0, TEXTS[0]).sum().backward()
