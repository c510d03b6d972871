"""Sound: one axis of latents."""

from __future__ import annotations

from typing import Any

from .base import Case, at, entry, length, noise, tiny, yes


@entry(blocks=4)
def StableAudioDiTModel() -> Case:
    module = tiny(
        "StableAudioDiTModel",
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_attention_heads=1,
        cross_attention_dim=8,
        time_proj_dim=8,
        global_states_input_dim=12,
        cross_attention_input_dim=12,
    )

    def inputs(size: int) -> dict[str, Any]:
        tokens = length(size) + 1
        return {
            "hidden_states": noise(1, 4, length(size)),
            "timestep": at(),
            "encoder_hidden_states": noise(1, 5, 12),
            "global_hidden_states": noise(1, 1, 12),
            "rotary_embedding": (noise(tokens, 4), noise(tokens, 4)),
        }

    return module, inputs


@entry(blocks=4)
def StableAudio3DiTModel() -> Case:
    module = tiny(
        "StableAudio3DiTModel",
        io_channels=4,
        embed_dim=64,
        depth=4,
        num_heads=2,
        cond_token_dim=12,
        global_cond_dim=12,
        local_add_cond_dim=5,
        timestep_features_dim=16,
        num_memory_tokens=2,
    )

    def inputs(size: int) -> dict[str, Any]:
        return {
            "hidden_states": noise(1, 4, length(size)),
            "timestep": at(0.5),
            "encoder_hidden_states": noise(1, 5, 12),
            "global_hidden_states": noise(1, 12),
            "local_add_cond": noise(1, 5, length(size)),
        }

    return module, inputs


@entry(blocks=4)
def LongCatAudioDiTTransformer() -> Case:
    module = tiny("LongCatAudioDiTTransformer", dit_dim=16, dit_depth=4, dit_heads=2, dit_text_dim=12, latent_dim=4)

    def inputs(size: int) -> dict[str, Any]:
        return {
            "hidden_states": noise(1, length(size), 4),
            "encoder_hidden_states": noise(1, 5, 12),
            "encoder_attention_mask": yes(1, 5),
            "timestep": at(0.5),
            "attention_mask": yes(1, length(size)),
            "latent_cond": noise(1, length(size), 4),
        }

    return module, inputs


@entry(blocks=4)
def MiniMaxMusic3Transformer1DModel() -> Case:
    module = tiny(
        "MiniMaxMusic3Transformer1DModel",
        in_channels=4,
        condition_dim=12,
        num_layers=4,
        num_attention_heads=2,
        attention_head_dim=8,
        ff_inner_dim=32,
        rotary_dim=4,
        fourier_embedding_dim=8,
    )

    def inputs(size: int) -> dict[str, Any]:
        return {
            "hidden_states": noise(1, 4, length(size)),
            "timestep": at(0.5),
            "encoder_hidden_states": noise(1, length(size), 12),
        }

    return module, inputs


@entry(blocks=4)
def AceStepTransformer1DModel(key_heads: int = 1) -> Case:
    module = tiny(
        "AceStepTransformer1DModel",
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=key_heads,
        head_dim=8,
        in_channels=12,
        audio_acoustic_hidden_dim=4,
        sliding_window=4,
    )

    def inputs(size: int) -> dict[str, Any]:
        return {
            "hidden_states": noise(1, length(size), 4),
            "timestep": at(0.5),
            "timestep_r": at(0.5),
            "encoder_hidden_states": noise(1, 5, 16),
            "context_latents": noise(1, length(size), 8),
        }

    return module, inputs


@entry(blocks=4)
def T5FilmDecoder() -> Case:
    """The denoiser of Spectrogram Diffusion: notes are encoded, their spectrogram is made."""
    module = tiny(
        "T5FilmDecoder", input_dims=4, targets_length=24, d_model=16, num_layers=4, num_heads=2, d_kv=8, d_ff=32
    )

    def inputs(size: int) -> dict[str, Any]:
        return {
            "encodings_and_masks": [(noise(1, 5, 16), yes(1, 5)), (noise(1, 3, 16), yes(1, 3))],
            "decoder_input_tokens": noise(1, length(size), 4),
            "decoder_noise_time": at(0.5),
        }

    return module, inputs
