"""More original names of models, in the form of `families`: Lumina 2, LTX-2, Krea 2, Ideogram 4,
Cosmos (Anima) and ACE-Step.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["NEWER_NAMES"]

Names = Mapping[str, tuple[str, ...]]
_BLOCK = "transformer_blocks.#"


def _renamed(theirs: str, ours: str, names: Mapping[str, str]) -> Names:
    """Return rows for modules below one of another name."""
    return {f"{theirs}.{old}": (f"{ours}.{new}",) for old, new in names.items()}


_LUMINA_2: Names = {
    row: parts
    for blocks in ("layers", "noise_refiner", "context_refiner")
    for row, parts in {
        f"{blocks}.#.attention.qkv": tuple(f"{blocks}.#.attn.to_{n}" for n in "qkv"),
        **_renamed(
            f"{blocks}.#.attention",
            f"{blocks}.#.attn",
            {"out": "to_out.0", "q_norm": "norm_q", "k_norm": "norm_k"},
        ),
        **_renamed(
            f"{blocks}.#.feed_forward",
            f"{blocks}.#.feed_forward",
            {f"w{i}": f"linear_{i}" for i in (1, 2, 3)},
        ),
    }.items()
} | {
    f"{blocks}.#.adaLN_modulation.1": (f"{blocks}.#.norm1.linear",)
    for blocks in ("layers", "noise_refiner")
}
_LTX_2_TOP = {
    "adaln_single": "time_embed",
    "audio_adaln_single": "audio_time_embed",
    "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
    "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
    "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
}
_TIMES = ("linear", *(f"emb.timestep_embedder.linear_{i}" for i in (1, 2)))
_LTX_2: Names = {
    "patchify_proj": ("proj_in",),
    "audio_patchify_proj": ("audio_proj_in",),
    **{
        f"{theirs}.{name}": (f"{ours}.{name}",)
        for theirs, ours in _LTX_2_TOP.items()
        for name in _TIMES
    },
    **{
        f"{_BLOCK}.scale_shift_table_a2v_ca_{kind}": (
            f"{_BLOCK}.{kind}_a2v_cross_attn_scale_shift_table",
        )
        for kind in ("video", "audio")
    },
}
_KREA_ATTENTION = {
    "wq": "to_q",
    "wk": "to_k",
    "wv": "to_v",
    "wo": "to_out.0",
    "gate": "to_gate",
}
_KREA_FEED_FORWARD = {name: name for name in ("gate", "up", "down")}
_KREA_2: Names = {
    **{
        row: parts
        for theirs, ours in (
            ("blocks.#", _BLOCK),
            ("txtfusion.layerwise_blocks.#", "text_fusion.layerwise_blocks.#"),
            ("txtfusion.refiner_blocks.#", "text_fusion.refiner_blocks.#"),
        )
        for row, parts in {
            **_renamed(f"{theirs}.attn", f"{ours}.attn", _KREA_ATTENTION),
            **_renamed(f"{theirs}.mlp", f"{ours}.ff", _KREA_FEED_FORWARD),
        }.items()
    },
    "first": ("img_in",),
    "last.linear": ("final_layer.linear",),
    "tmlp.0": ("time_embed.linear_1",),
    "tmlp.2": ("time_embed.linear_2",),
    "tproj.1": ("time_mod_proj",),
    "txtmlp.1": ("txt_in.linear_1",),
    "txtmlp.3": ("txt_in.linear_2",),
    "txtfusion.projector": ("text_fusion.projector",),
}
_IDEOGRAM_4: Names = {"layers.#.attention.o": ("layers.#.attention.to_out.0",)}
_COSMOS_ATTENTION = {
    "q_proj": "to_q",
    "k_proj": "to_k",
    "v_proj": "to_v",
    "output_proj": "to_out.0",
}
_COSMOS: Names = {
    **_renamed("blocks.#.self_attn", f"{_BLOCK}.attn1", _COSMOS_ATTENTION),
    **_renamed("blocks.#.cross_attn", f"{_BLOCK}.attn2", _COSMOS_ATTENTION),
    **{
        f"blocks.#.adaln_modulation_{part}.{i}": (f"{_BLOCK}.norm{n}.linear_{i}",)
        for n, part in enumerate(("self_attn", "cross_attn", "mlp"), 1)
        for i in (1, 2)
    },
    "blocks.#.mlp.layer1": (f"{_BLOCK}.ff.net.0.proj",),
    "blocks.#.mlp.layer2": (f"{_BLOCK}.ff.net.2",),
    "final_layer.adaln_modulation.1": ("norm_out.linear_1",),
    "final_layer.adaln_modulation.2": ("norm_out.linear_2",),
    "final_layer.linear": ("proj_out",),
    "x_embedder.proj.1": ("patch_embed.proj",),
    "t_embedder.1.linear_1": ("time_embed.t_embedder.linear_1",),
    "t_embedder.1.linear_2": ("time_embed.t_embedder.linear_2",),
    "t_embedding_norm": ("time_embed.norm",),
}
_ACE_STEP: Names = {
    row: parts
    for kind in ("self_attn", "cross_attn")
    for row, parts in _renamed(
        f"layers.#.{kind}",
        f"layers.#.{kind}",
        {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "o_proj": "to_out.0"},
    ).items()
}
NEWER_NAMES: tuple[Names, ...] = (_LUMINA_2, _LTX_2, _KREA_2, _IDEOGRAM_4, _COSMOS, _ACE_STEP)
