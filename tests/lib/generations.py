"""Whole generations of small models, for ranks that share a sample: what one rank gives, and several must."""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from lib.ranks import close
from lib.shared import SharedCapture
from lib.zoo.base import packed
from torch.utils._pytree import tree_leaves

import cachedit_fx
from cachedit_fx.shapes import generate, load_pipeline

STEPS = 6
DBCACHE: dict[str, Any] = {"Fn_compute_blocks": 1, "max_warmup_steps": 1, "residual_diff_threshold": 0.9}

TOKENS = {1: (3, 5, 11), 2: (5, 5, 3), 3: (3, 4, 9)}
"""Size -> height and width in image tokens, and text tokens.

At sizes 1 and 3 each of four ranks has several tokens of the text: a length of one is captured as a number, which
`SharedCapture` refuses. At size 2 the second of two ranks has one.
"""


def odd_flux(heads=2, dtype=torch.float32):
    """A small FLUX, and its inputs at the sizes in `TOKENS`."""
    sizes = {"in_channels": 4, "attention_head_dim": 8, "joint_attention_dim": 12, "pooled_projection_dim": 10}
    torch.manual_seed(0)
    module = FluxTransformer2DModel(
        num_layers=2, num_single_layers=3, num_attention_heads=heads, axes_dims_rope=(2, 2, 4), **sizes
    )

    def inputs(size):
        height, width, text = TOKENS[size]
        given = packed(height, width, text=text)
        given |= {"pooled_projections": torch.randn(1, 10), "timestep": torch.tensor([0.5]), "guidance": None}
        given = {name: value.to(dtype) if torch.is_tensor(value) else value for name, value in given.items()}
        return given | {"return_dict": False}

    return module.to(dtype).eval().requires_grad_(False), inputs


def capture(make, sizes=(1,)):
    """A model, captured at some sizes; its inputs; the facts about its graphs, whenever they are compiled.

    Args:
        make: gives the module, and its inputs at a size.
    """
    facts: list[Any] = []
    module, make_inputs = make()
    inputs = functools.cache(make_inputs)  # the ranks must have equal ones
    shared = SharedCapture(module, facts.append)
    shared.compile(cache=None)
    for size in sizes:
        shared(**inputs(size))
    return shared, inputs, facts


def generation(shared, arguments):
    """The results of a generation whose sample moves less and less, and what the statistics say of it."""
    sample = next(name for name in ("hidden_states", "sample") if name in arguments)
    outputs = []
    for step in range(STEPS):
        moved = arguments[sample] * (1 + 0.3 / (1 + step) ** 2)
        timestep = arguments["timestep"] * (1 - 0.1 * step)
        changes = {sample: moved, "timestep": timestep.to(arguments["timestep"].dtype)}
        outputs += [x.clone() for x in tree_leaves(shared(**arguments | changes)) if torch.is_tensor(x)]
    stats = shared.summary()
    return outputs, [(entry.cached_steps, entry.pruned_blocks) for entry in stats], sum(e.bytes_held for e in stats)


def bundled():
    """The bundled pipeline, and its transformer, which is captured once for all ranks."""
    pipe = load_pipeline()
    shared = SharedCapture(pipe.transformer)
    pipe.transformer._compiled_call_impl = shared._call
    return pipe, shared


def pictures(pipe, shared, guidance=1.0, **ranks):
    """Pictures without and with reuse, and the cached steps of each branch."""
    found = []
    for threshold in (0.0, 0.9):
        options: dict[str, Any] = DBCACHE | {"residual_diff_threshold": threshold} | ranks
        if shared is not None:
            shared.compile(**options)
        else:
            cachedit_fx.enable_cache(pipe, **options, inner_backend="eager")
        prompts = ["a large red circle at the center on white"]
        images = generate(pipe, prompts, num_inference_steps=5, seed=0, true_cfg_scale=guidance)
        stats = cachedit_fx.summary(pipe) if shared is None else shared.summary()
        found.append((images, [each.cached_steps for each in stats]))
    return found


def check_pictures(found, expected):
    for (images, cached), (images_of_one, cached_of_one) in zip(found, expected, strict=True):
        assert cached == cached_of_one and close(images, images_of_one)
