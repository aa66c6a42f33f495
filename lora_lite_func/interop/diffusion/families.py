"""The names that model families' own releases give to the modules of diffusers' models.

A row says which modules of diffusers an original module corresponds to. `#` is a block's number.
Several modules are the rows of one fused layer, one below the other. `~` before a name: its two
halves stand the other way around (shift and scale of the last norm).
"""

from __future__ import annotations

from collections.abc import Mapping

from .newer_families import NEWER_NAMES

__all__ = ["ORIGINAL_NAMES"]

_DOUBLE, _SINGLE = "transformer_blocks.#", "single_transformer_blocks.#"
_IMAGE = tuple(f"{_DOUBLE}.attn.to_{n}" for n in "qkv")
_TEXT = tuple(f"{_DOUBLE}.attn.add_{n}_proj" for n in "qkv")
_ALONE = tuple(f"{_SINGLE}.attn.to_{n}" for n in "qkv")
Names = Mapping[str, tuple[str, ...]]

_FLUX: Names = {
    "double_blocks.#.img_attn.qkv": _IMAGE,
    "double_blocks.#.txt_attn.qkv": _TEXT,
    "double_blocks.#.img_attn.proj": (f"{_DOUBLE}.attn.to_out.0",),
    "double_blocks.#.txt_attn.proj": (f"{_DOUBLE}.attn.to_add_out",),
    "double_blocks.#.img_attn.norm.query_norm": (f"{_DOUBLE}.attn.norm_q",),
    "double_blocks.#.img_attn.norm.key_norm": (f"{_DOUBLE}.attn.norm_k",),
    "double_blocks.#.txt_attn.norm.query_norm": (f"{_DOUBLE}.attn.norm_added_q",),
    "double_blocks.#.txt_attn.norm.key_norm": (f"{_DOUBLE}.attn.norm_added_k",),
    "double_blocks.#.img_mlp.0": (f"{_DOUBLE}.ff.net.0.proj",),
    "double_blocks.#.img_mlp.2": (f"{_DOUBLE}.ff.net.2",),
    "double_blocks.#.txt_mlp.0": (f"{_DOUBLE}.ff_context.net.0.proj",),
    "double_blocks.#.txt_mlp.2": (f"{_DOUBLE}.ff_context.net.2",),
    "double_blocks.#.img_mod.lin": (f"{_DOUBLE}.norm1.linear",),
    "double_blocks.#.txt_mod.lin": (f"{_DOUBLE}.norm1_context.linear",),
    "single_blocks.#.linear1": (*_ALONE, f"{_SINGLE}.proj_mlp"),
    "single_blocks.#.linear2": (f"{_SINGLE}.proj_out",),
    "single_blocks.#.norm.query_norm": (f"{_SINGLE}.attn.norm_q",),
    "single_blocks.#.norm.key_norm": (f"{_SINGLE}.attn.norm_k",),
    "single_blocks.#.modulation.lin": (f"{_SINGLE}.norm.linear",),
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("~norm_out.linear",),
    "distilled_guidance_layer.layers.#.in_layer": ("distilled_guidance_layer.layers.#.linear_1",),
    "distilled_guidance_layer.layers.#.out_layer": ("distilled_guidance_layer.layers.#.linear_2",),
}
_FLUX_OF_XLABS: Names = {
    "double_blocks.#.processor.qkv_lora1": _IMAGE,
    "double_blocks.#.processor.qkv_lora2": _TEXT,
    "double_blocks.#.processor.proj_lora1": (f"{_DOUBLE}.attn.to_out.0",),
    "double_blocks.#.processor.proj_lora2": (f"{_DOUBLE}.attn.to_add_out",),
    "single_blocks.#.processor.qkv": _ALONE,
    "single_blocks.#.processor.proj": (f"{_SINGLE}.proj_out",),
}
_FLUX_2: Names = {
    "double_blocks.#.img_mlp.0": (f"{_DOUBLE}.ff.linear_in",),
    "double_blocks.#.img_mlp.2": (f"{_DOUBLE}.ff.linear_out",),
    "double_blocks.#.txt_mlp.0": (f"{_DOUBLE}.ff_context.linear_in",),
    "double_blocks.#.txt_mlp.2": (f"{_DOUBLE}.ff_context.linear_out",),
    "single_blocks.#.linear1": (f"{_SINGLE}.attn.to_qkv_mlp_proj",),
    "single_blocks.#.linear2": (f"{_SINGLE}.attn.to_out",),
    "time_in.in_layer": ("time_guidance_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_guidance_embed.timestep_embedder.linear_2",),
    "guidance_in.in_layer": ("time_guidance_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_guidance_embed.guidance_embedder.linear_2",),
    "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
    "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
    "single_stream_modulation.lin": ("single_stream_modulation.linear",),
}
_HUNYUAN_VIDEO: Names = {
    "double_blocks.#.img_attn_qkv": _IMAGE,
    "double_blocks.#.txt_attn_qkv": _TEXT,
    "double_blocks.#.img_attn_proj": (f"{_DOUBLE}.attn.to_out.0",),
    "double_blocks.#.txt_attn_proj": (f"{_DOUBLE}.attn.to_add_out",),
    "double_blocks.#.img_mlp.fc1": (f"{_DOUBLE}.ff.net.0.proj",),
    "double_blocks.#.img_mlp.fc2": (f"{_DOUBLE}.ff.net.2",),
    "double_blocks.#.txt_mlp.fc1": (f"{_DOUBLE}.ff_context.net.0.proj",),
    "double_blocks.#.txt_mlp.fc2": (f"{_DOUBLE}.ff_context.net.2",),
    "double_blocks.#.img_mod.linear": (f"{_DOUBLE}.norm1.linear",),
    "double_blocks.#.txt_mod.linear": (f"{_DOUBLE}.norm1_context.linear",),
    "single_blocks.#.modulation.linear": (f"{_SINGLE}.norm.linear",),
}
_SD3: Names = {
    "joint_blocks.#.x_block.attn.qkv": _IMAGE,
    "joint_blocks.#.x_block.attn2.qkv": tuple(f"{_DOUBLE}.attn2.to_{n}" for n in "qkv"),
    "joint_blocks.#.context_block.attn.qkv": _TEXT,
    "joint_blocks.#.x_block.attn.proj": (f"{_DOUBLE}.attn.to_out.0",),
    "joint_blocks.#.x_block.attn2.proj": (f"{_DOUBLE}.attn2.to_out.0",),
    "joint_blocks.#.context_block.attn.proj": (f"{_DOUBLE}.attn.to_add_out",),
    "joint_blocks.#.x_block.mlp.fc1": (f"{_DOUBLE}.ff.net.0.proj",),
    "joint_blocks.#.x_block.mlp.fc2": (f"{_DOUBLE}.ff.net.2",),
    "joint_blocks.#.context_block.mlp.fc1": (f"{_DOUBLE}.ff_context.net.0.proj",),
    "joint_blocks.#.context_block.mlp.fc2": (f"{_DOUBLE}.ff_context.net.2",),
    "joint_blocks.#.x_block.adaLN_modulation.1": (f"{_DOUBLE}.norm1.linear",),
    "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
    "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
    "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
    "x_embedder.proj": ("pos_embed.proj",),
}
_WAN: Names = {
    **{
        f"blocks.#.{theirs}.{name}": (f"blocks.#.{ours}.{part}",)
        for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for name, part in (
            ("q", "to_q"),
            ("k", "to_k"),
            ("v", "to_v"),
            ("o", "to_out.0"),
            ("norm_q", "norm_q"),
            ("norm_k", "norm_k"),
        )
    },
    "blocks.#.cross_attn.k_img": ("blocks.#.attn2.add_k_proj",),
    "blocks.#.cross_attn.v_img": ("blocks.#.attn2.add_v_proj",),
    "blocks.#.cross_attn.norm_k_img": ("blocks.#.attn2.norm_added_k",),
    "blocks.#.ffn.0": ("blocks.#.ffn.net.0.proj",),
    "blocks.#.ffn.2": ("blocks.#.ffn.net.2",),
    "blocks.#.norm3": ("blocks.#.norm2",),
    "blocks.#.modulation": ("blocks.#.scale_shift_table",),
    "head.modulation": ("scale_shift_table",),
    "head.head": ("proj_out",),
    "text_embedding.0": ("condition_embedder.text_embedder.linear_1",),
    "text_embedding.2": ("condition_embedder.text_embedder.linear_2",),
    "time_embedding.0": ("condition_embedder.time_embedder.linear_1",),
    "time_embedding.2": ("condition_embedder.time_embedder.linear_2",),
    "time_projection.1": ("condition_embedder.time_proj",),
    "img_emb.proj.0": ("condition_embedder.image_embedder.norm1",),
    "img_emb.proj.1": ("condition_embedder.image_embedder.ff.net.0.proj",),
    "img_emb.proj.3": ("condition_embedder.image_embedder.ff.net.2",),
    "img_emb.proj.4": ("condition_embedder.image_embedder.norm2",),
}
_Z_IMAGE: Names = {
    f"{blocks}.#.attention.{name}": tuple(f"{blocks}.#.attention.{part}" for part in parts)
    for blocks in ("layers", "noise_refiner", "context_refiner")
    for name, parts in {
        "qkv": ("to_q", "to_k", "to_v"),
        "out": ("to_out.0",),
        "q_norm": ("norm_q",),
        "k_norm": ("norm_k",),
    }.items()
}
ORIGINAL_NAMES: tuple[Names, ...] = (
    _FLUX,
    _FLUX_OF_XLABS,
    _FLUX_2,
    _HUNYUAN_VIDEO,
    _SD3,
    _WAN,
    _Z_IMAGE,
    *NEWER_NAMES,
)
"""A row counts for the models that have all its modules of diffusers."""
