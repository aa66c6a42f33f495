"""The keys of diffusion LoRA files: their component, the module's name, the tensor's role.

diffusers   unet.<path>.lora_A.weight, .lora_B.weight; older: <path>.lora.down.weight,
            <path>.processor.to_q_lora.down.weight, <path>.lora_linear_layer.down.weight
ComfyUI     diffusion_model.<path>.lora_down.weight; text_encoders.clip_l.transformer.<path> ...
kohya       lora_unet_<path with _ for .>.lora_down.weight, .lora_up.weight, .lora_mid.weight
LyCORIS     the same with .hada_w1_a ..., .lokr_w1 ..., .diff, .diff_b, .w_norm, .dora_scale;
            .weight and .on_input; .a1.weight ... .b2.weight; .oft_blocks, .rescale
all         <the same>.alpha, a number: the scale is alpha / r, and 1 where there is none
"""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["COMPONENTS", "FOREIGN", "GATED", "component_of", "split_role"]

_DENOISER = (
    "diffusion_model.",
    "model.diffusion_model.",
    "lora_unet_",
    "Hunyuan_video_lora_",
    "Hunyuan_video_I2V_lora_",
)
COMPONENTS: Mapping[str, tuple[str, ...]] = {
    "unet": ("unet.", *_DENOISER),
    "transformer": ("transformer.", "lora_transformer_", *_DENOISER),
    "transformer_2": ("transformer_2.",),
    "text_encoder": (
        "text_encoder.",
        "lora_te1_",
        "lora_te_",
        "text_encoders.clip_l.transformer.",
        "text_encoders.clip_l.",
    ),
    "text_encoder_2": (
        "text_encoder_2.",
        "lora_te2_",
        "text_encoders.clip_g.transformer.",
        "text_encoders.clip_g.",
    ),
    "text_encoder_3": (
        "text_encoder_3.",
        "lora_te3_",
        "text_encoders.t5xxl.transformer.",
        "text_encoders.t5xxl.",
    ),
    "model": _DENOISER[:2],
}
"""Whose keys begin with what. A key that begins with none of these can be of any of them."""
# The prefix of LyCORIS' own wrapper, which doesn't name the component.
_LYCORIS = "lycoris_"

_PAIRS = {
    "lora_{}.weight": ("down", "up"),
    "lora_{}": ("A", "B"),
    "lora.{}.weight": ("down", "up"),
    "lora_linear_layer.{}.weight": ("down", "up"),
    "{}.weight": ("down", "up"),
}
_PLAIN = (
    *(f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
    *(f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
    *("alpha", "diff", "diff_b", "set_weight", "on_input", "oft_blocks", "rescale"),
)
_ROLES: Mapping[str, str] = {
    **{
        "." + form.format(word): role
        for form, words in _PAIRS.items()
        for word, role in zip(words, ("down", "up"), strict=True)
    },
    **{  # the learned bias of an up
        "." + form.replace("weight", "bias").format(up): "up_bias"
        for form, (_, up) in _PAIRS.items()
        if "lora" in form and form.endswith("weight")
    },
    **{f".{name}": name for name in _PLAIN},
    ".w_norm": "diff",  # LyCORIS' words for the changes of a norm
    ".b_norm": "diff_b",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    "_lora.alpha": "alpha",
    ".lora.alpha": "alpha",
    ".lora_mid.weight": "mid",
    ".lora_embedding_A": "down",
    ".lora_embedding_B": "up",
    ".lora_up.bias": "up_bias",
    ".dora_scale": "dora_scale",
    **{f".{name}.weight": name for name in ("a1", "a2", "b1", "b2", "bm")},  # GLoRA's
    ".lora_magnitude_vector": "magnitude",
}
GATED = ".on_input"
"""The end of a key beside LyCORIS' gate, which is called weight."""
_NAMED = re.compile(
    r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)"
    r"(\.(?!weight$|bias$)[^.]+)?"  # an adapter's name, such as default
    r"(\.weight|\.bias)?$"
)
_NAMED_ROLES = {
    "A.weight": "down",
    "B.weight": "up",
    "B.bias": "up_bias",
    "embedding_A": "down",
    "embedding_B": "up",
    "magnitude_vector": "magnitude",
    "magnitude_vector.weight": "magnitude",
}
FOREIGN: Mapping[str, str] = {
    "oft_diag": "OFT",
    "lora_E": "AdaLoRA",
    "scalar": "LyCORIS' use_scalar",
    "reshape_weight": "a layer of another shape",
    "difference": "a difference of models",
}
"""What a tensor belongs to that isn't read, by the end of its key."""


def split_role(key: str) -> tuple[str, str] | None:
    """Return (the module's part of a key, the tensor's role), or None for a role that isn't
    read.
    """
    named = _NAMED.search(key)
    if named is not None and (named[2] or named[3]):
        role = _NAMED_ROLES.get(named[1] + (named[3] or ""))
        return None if role is None else (key[: named.start()], role)
    end = max((end for end in _ROLES if key.endswith(end)), key=len, default=None)
    return None if end is None else (key[: -len(end)], _ROLES[end])


def component_of(key: str) -> tuple[str, tuple[str, ...]]:
    """Return (the prefix that names a key's component, the components it can be of). The components
    are () where it can be of any.
    """
    starts = {start for starts in COMPONENTS.values() for start in starts if key.startswith(start)}
    start = max(starts, key=len, default=_LYCORIS if key.startswith(_LYCORIS) else "")
    return start, tuple(name for name, known in COMPONENTS.items() if start in known)
