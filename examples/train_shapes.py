"""Train the bundled shapes model from nothing, look at it, count what it gets right, export it.

In this order (about two hours on one CPU core):

  python examples/train_shapes.py train --out runs/shapes --minutes 120

  python examples/train_shapes.py grid --checkpoint runs/shapes/last.pt

  python examples/train_shapes.py check --checkpoint runs/shapes/last.pt

  python examples/train_shapes.py export --checkpoint runs/shapes/last.pt

The model is diffusers' FluxTransformer2DModel (6 double-stream and 12 single-stream blocks) with a small text encoder.
It learns the velocity of a straight path from picture to noise (flow matching) on scenes that are drawn as it trains;
nothing is downloaded. Samples are recognisable after about 1,500 steps.
"""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from cachedit_fx.shapes import dataset
from cachedit_fx.shapes.checker import check_image
from cachedit_fx.shapes.pipeline import (
    WEIGHTS_DIR,
    build_models,
    generate,
    image_ids,
    load_pipeline,
    make_pipeline,
    pack_images,
    save_weights,
)
from cachedit_fx.shapes.text import MAX_WORDS, ShapesTextEncoder, tokenize

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, rich_markup_mode="rich")
console = Console()

GRID_PROMPTS = (
    "a large red circle at the center on white",
    "a small blue square at the top left on black",
    "a large green triangle at the bottom right on gray",
    "a large yellow cross at the left on navy",
    "a small orange diamond at the right on white",
    "a large purple square at the top on gray",
    "a small cyan circle at the bottom left on navy",
    "a large pink diamond at the top right on black",
    "a small red triangle at the bottom on gray",
    "a large blue cross at the center on white",
    "a small green cross at the top right on black",
    "a large orange triangle at the center on navy",
    "a small red circle left of a large blue square on navy",
    "a large yellow triangle right of a small pink cross on black",
    "a small cyan diamond above a small orange square on gray",
    "a large green circle below a large purple diamond on white",
)


class TrainingAttention:
    """An attention processor for training only: the same sums as diffusers' own, with an explicit softmax.

    For sequences this short the backward pass of the fused CPU attention kernel (torch 2.13) takes half of a training
    step; this way the whole step is twice as fast. The weights know nothing of it.
    """

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        streams = [(hidden_states, attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)]
        if encoder_hidden_states is not None:
            added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k)
            streams.insert(0, (encoder_hidden_states, *added))
        parts: list[tuple[torch.Tensor, ...]] = []
        for x, to_q, to_k, to_v, norm_q, norm_k in streams:
            q, k, v = (project(x).unflatten(-1, (attn.heads, -1)) for project in (to_q, to_k, to_v))
            parts.append((norm_q(q), norm_k(k), v))
        query, key, value = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1).transpose(1, 2)
        key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1).transpose(1, 2)
        weights = torch.softmax((query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2), dim=-1)
        output = (weights.to(value.dtype) @ value.transpose(1, 2)).transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return output
        text, image = output.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)
        return attn.to_out[0](image), attn.to_add_out(text)


class Trainee(nn.Module):
    """Both networks as one module: tokens of noisy pictures and captions in, velocities out."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer, self.text_encoder = build_models()
        self.register_buffer("img_ids", image_ids(), persistent=False)
        self.register_buffer("txt_ids", torch.zeros(MAX_WORDS, 3), persistent=False)
        # Under autocast the embedder's bfloat16 output would also set the precision of the timestep (8 bits of 1000)
        # and of the residual stream.
        self.transformer.x_embedder.register_forward_hook(lambda module, args, output: output.float())
        _initialise(self)

    def forward(self, noisy: torch.Tensor, sigma: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        embeds, pooled = self.text_encoder(tokens)
        return self.transformer(
            hidden_states=noisy,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            timestep=sigma,
            img_ids=self.img_ids,
            txt_ids=self.txt_ids,
            return_dict=False,
        )[0]


def _initialise(model: Trainee) -> None:
    """Xavier for linear layers; modulations and the last layer start at zero, so every block starts as identity."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    flux = model.transformer
    zeroed = [flux.proj_out, flux.norm_out.linear]
    for block in flux.transformer_blocks:
        zeroed += [block.norm1.linear, block.norm1_context.linear]
    zeroed += [block.norm.linear for block in flux.single_transformer_blocks]
    for linear in zeroed:
        nn.init.zeros_(linear.weight)


def training_batch(seed: int, step: int, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noisy tokens, sigmas, caption tokens and target velocities of one step; depends on the arguments alone."""
    generator = torch.Generator().manual_seed(seed * 10_000_000 + step)
    images, captions, _ = dataset.sample_batch(size, generator)
    dropped = (torch.rand(size, generator=generator) < 0.1).tolist()
    captions = ["" if drop else caption for drop, caption in zip(dropped, captions, strict=True)]
    clean = pack_images(images)
    noise = torch.randn(clean.shape, generator=generator)
    # Logit-normal, a little wider and noisier than usual: where things are is decided at high noise.
    sigma = torch.sigmoid(0.2 + 1.2 * torch.randn(size, generator=generator))
    weight = sigma[:, None, None]
    return (1 - weight) * clean + weight * noise, sigma, tokenize(captions), noise - clean


def learning_rate(step: int, done: float, peak: float, warmup: int) -> float:
    """Linear warm-up over `warmup` steps, then a cosine from `peak` to 2 % of it as `done` goes from 0 to 1."""
    return peak * min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that a crash leaves the previous one whole."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def pipeline_of(checkpoint: Path) -> tuple[Any, dict[str, Any]]:
    """A pipeline of a checkpoint's averaged weights, and the checkpoint."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    model = Trainee()
    model.load_state_dict(state["ema"])
    return make_pipeline(model.transformer, model.text_encoder), state


def write_grid(pipe: Any, path: Path, true_cfg_scale: float = 1.0, seed: int = 0) -> None:
    """Draw `GRID_PROMPTS` and write them as one PNG with captions."""
    from matplotlib.figure import Figure

    images = generate(pipe, GRID_PROMPTS, seed=seed, true_cfg_scale=true_cfg_scale)
    figure = Figure(figsize=(11, 11.5), layout="constrained")
    for axis, image, prompt in zip(figure.subplots(4, 4).flat, images, GRID_PROMPTS, strict=True):
        axis.imshow(image.permute(1, 2, 0).numpy())
        words = prompt.split()
        axis.set_title(" ".join(words[:6]) + "\n" + " ".join(words[6:]), fontsize=8)
        axis.axis("off")
    figure.savefig(path, dpi=80)


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, the log and sample grids.")] = Path("runs/shapes"),
    minutes: Annotated[float, typer.Option(help="Time budget; the learning rate decays over it.")] = 120.0,
    steps: Annotated[
        int, typer.Option(help="Largest number of steps; the decay ends at whichever comes first.")
    ] = 100_000,
    batch: Annotated[int, typer.Option(help="Pictures in a batch.")] = 48,
    lr: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 1.5e-3,
    warmup: Annotated[int, typer.Option(help="Steps of linear warm-up.")] = 200,
    ema_decay: Annotated[float, typer.Option(help="Decay of the average of weights.")] = 0.999,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the data.")] = 0,
    compile_blocks: Annotated[bool, typer.Option("--compile/--eager", help="Compile the blocks with inductor.")] = True,
    grid_every: Annotated[int, typer.Option(help="Steps between sample grids (PNG).")] = 500,
    save_minutes: Annotated[float, typer.Option(help="Minutes between checkpoints.")] = 4.0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    resume: Annotated[bool, typer.Option(help="Go on from last.pt in the output folder.")] = False,
) -> None:
    """Train; Ctrl-C writes a checkpoint and stops, --resume goes on from it."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    model = Trainee()
    names = [name for name, _ in model.named_parameters()]
    params = list(model.parameters())
    decayed = [p for p in params if p.ndim > 1]
    groups = [
        {"params": decayed, "weight_decay": 0.01},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), fused=True)
    averaged = [p.detach().clone() for p in params]
    step, spent, smooth = 0, 0.0, 0.0
    if resume:
        state = torch.load(out / "last.pt", map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        averaged = [state["ema"][name] for name in names]
        step, spent, smooth = state["step"], state["seconds"], state["loss"]
    model.transformer.set_attn_processor(TrainingAttention())
    if compile_blocks:
        model.transformer.compile_repeated_blocks(fullgraph=True)
    console.print(
        f"{sum(p.numel() for p in params):,} parameters; step {step}, {spent / 60:.1f} of {minutes:g} minutes spent"
    )

    asked_to_stop = False

    def on_signal(signum: int, frame: Any) -> None:
        nonlocal asked_to_stop
        asked_to_stop = True

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)

    def checkpoint() -> None:
        ema = dict(zip(names, averaged, strict=True))
        state = {"model": model.state_dict(), "ema": ema, "optimizer": optimizer.state_dict()}
        facts = {"batch": batch, "lr": lr, "ema_decay": ema_decay, "seed": seed, "loss": smooth}
        save_checkpoint(out / "last.pt", state | facts | {"step": step, "seconds": spent})

    def draw(path: Path) -> None:
        copy = Trainee()
        copy.load_state_dict(dict(zip(names, averaged, strict=True)))
        write_grid(make_pipeline(copy.transformer, copy.text_encoder), path)

    saved_at, started = time.monotonic(), time.monotonic() - spent
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    with bar, (out / "log.jsonl").open("a") as log:
        task = bar.add_task("training", total=1.0)
        while (done := max(step / steps, spent / (60 * minutes))) < 1.0 and not asked_to_stop:
            tick = time.monotonic()
            rate = learning_rate(step, done, lr, warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            noisy, sigma, tokens, target = training_batch(seed, step, batch)
            with torch.autocast("cpu", torch.bfloat16):
                velocity = model(noisy, sigma, tokens)
            loss = (velocity.float() - target).square().mean()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            torch._foreach_lerp_(averaged, [p.detach() for p in params], 1 - min(ema_decay, step / (step + 10)))
            value = float(loss.detach())
            smooth = value if smooth == 0.0 else 0.98 * smooth + 0.02 * value
            spent = time.monotonic() - started
            bar.update(task, completed=done, description=f"step {step} loss {smooth:.4f}")
            if step % 20 == 0 or step <= 5:
                seconds = time.monotonic() - tick
                row = {"step": step, "loss": round(value, 5), "smooth": round(smooth, 5), "lr": round(rate, 7)}
                row |= {"grad": round(float(norm), 4), "seconds": round(spent, 1), "step_seconds": round(seconds, 3)}
                log.write(json.dumps(row) + "\n")
                log.flush()
                if not console.is_terminal:
                    console.print(json.dumps(row), soft_wrap=True, highlight=False)
            if time.monotonic() - saved_at > 60 * save_minutes:
                checkpoint()
                saved_at = time.monotonic()
            if step % grid_every == 0:
                draw(out / f"grid_{step:06d}.png")
        checkpoint()
    draw(out / f"grid_{step:06d}.png")
    console.print(f"{'stopped' if asked_to_stop else 'finished'} at step {step}; checkpoint {out / 'last.pt'}")
    if asked_to_stop:
        sys.exit(130)


@app.command()
def grid(
    checkpoint: Annotated[Path, typer.Option(help="A checkpoint of `train`.")],
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("grid.png"),
    true_cfg_scale: Annotated[float, typer.Option(help="Classifier-free guidance; 1 is none.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the first picture.")] = 0,
) -> None:
    """Draw 16 prompts with a checkpoint's averaged weights."""
    torch.set_num_threads(1)
    pipe, _ = pipeline_of(checkpoint)
    write_grid(pipe, out, true_cfg_scale, seed)
    console.print(f"wrote {out}")


@app.command()
def check(
    checkpoint: Annotated[
        Path | None, typer.Option(help="A checkpoint of `train`; the bundled weights by default.")
    ] = None,
    count: Annotated[int, typer.Option(help="Pictures of each kind.")] = 200,
    true_cfg_scale: Annotated[float, typer.Option(help="Classifier-free guidance; 1 is none.")] = 1.0,
    inference_steps: Annotated[int, typer.Option(help="Denoising steps.")] = 28,
    seed: Annotated[int, typer.Option(help="Seed of the captions and of the noise.")] = 12345,
) -> None:
    """Draw full captions that sampling makes and count, by measuring, how many pictures are right."""
    torch.set_num_threads(1)
    pipe = load_pipeline() if checkpoint is None else pipeline_of(checkpoint)[0]
    for name, share in (("one object", 0.0), ("two objects", 1.0)):
        scenes = dataset.sample_scenes(count, torch.Generator().manual_seed(seed), two_objects=share)
        captions = [scene.caption() for scene in scenes]
        wrong: list[str] = []
        for start in range(0, count, 50):
            part = captions[start : start + 50]
            images = generate(pipe, part, inference_steps, seed + start, true_cfg_scale)
            results = [check_image(image, caption) for image, caption in zip(images, part, strict=True)]
            wrong += [f"{c}: {'; '.join(r.problems)}" for c, r in zip(part, results, strict=True) if not r.ok]
        console.print(f"{name}: {count - len(wrong)} of {count} right")
        for line in wrong[:15]:
            console.print(f"  {line}", highlight=False, soft_wrap=True)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Option(help="A checkpoint of `train`.")],
    out: Annotated[Path, typer.Option(help="Folder for the safetensors file and its configuration.")] = WEIGHTS_DIR,
) -> None:
    """Write a checkpoint's averaged weights as 16-bit safetensors, where `load_pipeline` finds them."""
    pipe, state = pipeline_of(checkpoint)
    text_encoder: ShapesTextEncoder = pipe.shapes_text_encoder
    facts = {key: state[key] for key in ("step", "seconds", "loss", "batch", "lr", "ema_decay", "seed")}
    path = save_weights(pipe.transformer.state_dict(), text_encoder.state_dict(), out, training=facts)
    console.print(f"wrote {path}: {path.stat().st_size / 1e6:.2f} MB, step {state['step']}")


if __name__ == "__main__":
    app()
