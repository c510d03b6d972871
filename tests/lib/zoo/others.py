"""Neither images nor videos nor sounds: embeddings and proteins."""

from __future__ import annotations

from typing import Any

import torch

from .base import Case, at, entry, length, noise, tiny, yes


@entry(blocks=4)
def PriorTransformer() -> Case:
    """Denoises one embedding: the size is the length of the batch here, since its sequence is fixed."""
    module = tiny(
        "PriorTransformer",
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=4,
        embedding_dim=12,
        num_embeddings=5,
        additional_embeddings=4,
    )

    def inputs(size: int) -> dict[str, Any]:
        return {
            "hidden_states": noise(size, 12),
            "timestep": at(),
            "proj_embedding": noise(size, 12),
            "encoder_hidden_states": noise(size, 5, 12),
            "attention_mask": yes(size, 5),
        }

    return module, inputs


@entry(blocks=6)
def RFD4ProteinaTransformer() -> Case:
    """Proteins: tokens and pairs of them run through the trunk twice, the second time from what the first made."""
    module = tiny(
        "RFD4ProteinaTransformer",
        nlayers=3,
        token_dim=16,
        nheads=2,
        dim_cond=8,
        pair_repr_dim=8,
        latent_dim=4,
        token_type_emb_dim=4,
        cath_emb_dim=4,
        t_emb_dim=8,
        seq_sep_dim=8,
        xt_pair_dist_dim=6,
        feats_seq=("xt_bb_ca", "xt_local_latents", "token_type", "rasa_binned", "secondary_structure", "hotspot"),
        feats_pair_repr=(
            "xt_bb_ca_pair_dists",
            "bond_mask",
            "bond_order",
            "molecule_idx_pair",
            "token_bond_path_length",
        ),
        tri_mult_c=8,
        num_sequence_classes=10,
        recycle_conditioning_dim=3,
    )

    def inputs(size: int) -> dict[str, Any]:
        tokens = length(size)
        along = torch.arange(tokens)
        return {
            "bb_ca": noise(1, tokens, 3),
            "local_latents": noise(1, tokens, 4),
            "bb_ca_time": at(0.5),
            "local_latents_time": at(0.4),
            "padding_mask": yes(1, tokens),
            "token_type": torch.zeros(1, tokens, dtype=torch.long),
            "atom37_mask": yes(1, tokens, 37),
            "conditioning": {
                "is_in_context_conditioning": ~yes(1, tokens),
                "supports_local_latent": yes(1, tokens),
                "molecule_iid": torch.zeros(1, tokens, dtype=torch.long),
                "token_bond_path_length": (along[:, None] - along).abs()[None],
            },
            "recycle_depth": 2,
        }

    return module, inputs
