"""Real model families, built small from their configs with random weights: what they take, what
they give, whether they generate.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FAMILIES", "Family"]

_GEN = torch.Generator().manual_seed(0)
IDS = torch.randint(3, 64, (2, 7), generator=_GEN)
MASK = torch.ones_like(IDS)
MASK[1, 5:] = 0
PIXELS = torch.randn(2, 3, 16, 16, generator=_GEN)
SOUND = torch.randn(2, 8, 32, generator=_GEN)
TEXT = {"input_ids": IDS, "attention_mask": MASK}
IMAGE = {"pixel_values": PIXELS}

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_DECODER = {**_SIZES, "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True)
class Family:
    """A model and what to do with it.

    Attributes:
        build: makes it (weights from the global random state).
        inputs: keyword arguments of its call.
        output: what to look at.
        sites: how many places the config adapts.
        generate: what `generate` is given, for those that generate.
        checkpoints: it has gradient checkpointing.
        config: what the config says beside, where not every linear layer and nothing else is meant.
        unread: sites that `output` doesn't depend on.
        rows: how rows with adapters of their own are refused, where some site's inputs aren't rows;
            None where outputs aren't rows.
    """

    build: Callable[[], nn.Module]
    inputs: dict[str, Any]
    output: Callable[[Any], Tensor]
    sites: int
    generate: dict[str, Any] | None = None
    checkpoints: bool = True
    unread: frozenset[str] = frozenset()
    config: dict[str, Any] = field(default_factory=dict)
    rows: str | None = ""

    @functools.cached_property
    def model(self) -> Any:
        """The model in eval mode; nobody may write on it."""
        return self.fresh()

    def fresh(self) -> Any:
        """The same model again, in eval mode, for one test alone."""
        torch.manual_seed(0)
        return self.build().eval()


def _hub(model: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    """A transformers model of a config class, made when it is asked for."""

    def build() -> nn.Module:
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(**settings))

    return build


def _logits(out: Any) -> Tensor:
    return out.logits


def _hidden(out: Any) -> Tensor:
    return out.last_hidden_state


def _clip() -> nn.Module:
    import transformers

    text = {**_SIZES, "vocab_size": 64, "max_position_embeddings": 16, **_TOKENS}
    vision = {**_SIZES, "image_size": 16, "patch_size": 8}
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    )


def _minilm() -> nn.Module:
    import transformers

    from benchmarks.examples.sentiment import minilm

    return transformers.AutoModel.from_pretrained(minilm())


def _unet() -> Any:
    import diffusers

    return diffusers.UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=4,
    )


class _Residual(nn.Module):
    """A block as ResNets and ConvNeXts have them: strided, grouped and depthwise convolutions,
    batch norm, squeeze and excitation.
    """

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False, padding_mode="reflect")
        self.bn1 = nn.BatchNorm2d(c_out)
        self.depthwise = nn.Conv2d(c_out, c_out, 3, 1, 2, dilation=2, groups=c_out)
        self.grouped = nn.Conv2d(c_out, c_out, (1, 3), 1, "same", groups=2)
        self.downsample = nn.Conv2d(c_in, c_out, 1, stride)
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(c_out, 4, 1),
            nn.ReLU(),
            nn.Conv2d(4, c_out, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.grouped(torch.nn.functional.gelu(self.depthwise(y)))
        return self.downsample(x) + y * self.squeeze(y)


def _convnet() -> nn.Module:
    stages = [
        _Residual(8, 16, 2),
        _Residual(16, 16, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 24),
        nn.ReLU(),
    ]
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), *stages, nn.Linear(24, 5)
    )


def _decoder(name: str, **more: Any) -> Callable[[], nn.Module]:
    return _hub(f"{name}ForCausalLM", f"{name}Config", **{**_DECODER, **_TOKENS, **more})


_DEEPSEEK: dict[str, Any] = {
    "target_names": ("self_attn", "mlp"),
    "target_parameters": (r"experts\.\w+_proj$",),
}
_MLA = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 16,
}
_deepseek = _decoder("DeepseekV3", **_MLA, **_ROUTED, first_k_dense_replace=1, n_shared_experts=1)
_MAMBA2 = {
    "hidden_size": 32,
    "state_size": 4,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "num_heads": 8,
    "head_dim": 8,
    "n_groups": 2,
}
_MAMBA2 |= {"expand": 2, "chunk_size": 4}

PROMPT = {"input_ids": IDS[:, :4]}

NOISE = torch.randn(2, 4, 8, 8, generator=_GEN)
CONDITION = torch.randn(2, 5, 16, generator=_GEN)
FLATTENED = (
    r"site 'model.layers.\d.mlp.experts': rows expects .* 2 rows of the batch, "
    r"found shape \(14, 32\)"
)
EXPERTS = {"target_names": ("self_attn",), "target_parameters": ("experts",)}
CONVOLUTIONS = {"target_kinds": ("linear", "conv")}


def _language(build: Callable[[], nn.Module], sites: int, **more: Any) -> Family:
    """A causal language model."""
    return Family(build, TEXT, _logits, sites, PROMPT, **more)


FAMILIES: dict[str, Family] = {
    "llama": _language(_decoder("Llama"), 14),
    "qwen3": _language(_decoder("Qwen3", head_dim=8, tie_word_embeddings=True), 14),
    "gemma2": _language(_decoder("Gemma2", head_dim=8, sliding_window=4), 14),
    "gemma3": _language(
        _hub(
            "Gemma3ForCausalLM",
            "Gemma3TextConfig",
            **_DECODER,
            **_TOKENS,
            head_dim=8,
            sliding_window=4,
        ),
        14,
    ),
    "mistral": _language(_decoder("Mistral", sliding_window=4), 14),
    "mixtral": _language(
        _decoder("Mixtral", num_local_experts=4, num_experts_per_tok=2),
        12,
        config=EXPERTS,
        rows=FLATTENED,
    ),
    "qwen3_moe": _language(
        _decoder(
            "Qwen3Moe", head_dim=8, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2
        ),
        12,
        config=EXPERTS,
        rows=FLATTENED,
    ),
    "gpt_oss": _language(
        _decoder(
            "GptOss", head_dim=8, sliding_window=4, num_local_experts=4, num_experts_per_tok=4
        ),
        12,
        config={**EXPERTS, "target_parameters": (r"experts\.\w+_proj$",)},
        rows=FLATTENED,
    ),
    "deepseek_v3": _language(_deepseek, 18, config=_DEEPSEEK, rows=FLATTENED),
    "gpt2": _language(
        _hub(
            "GPT2LMHeadModel",
            "GPT2Config",
            n_embd=32,
            n_layer=2,
            n_head=4,
            vocab_size=64,
            n_positions=64,
            **_TOKENS,
        ),
        8,
    ),
    "bert": Family(
        _hub("BertModel", "BertConfig", **_SIZES, vocab_size=64, max_position_embeddings=64),
        TEXT,
        _hidden,
        13,
        unread=frozenset({"pooler.dense"}),
    ),
    "albert": Family(
        _hub(
            "AlbertModel",
            "AlbertConfig",
            **_SIZES,
            embedding_size=16,
            vocab_size=64,
            max_position_embeddings=64,
        ),
        TEXT,
        _hidden,
        7,
        checkpoints=False,
        unread=frozenset({"pooler"}),
    ),
    "minilm": Family(_minilm, TEXT, _hidden, 37, unread=frozenset({"pooler.dense"})),
    "t5": Family(
        _hub(
            "T5ForConditionalGeneration",
            "T5Config",
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            vocab_size=64,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
        ),
        {**TEXT, "decoder_input_ids": IDS[:, :4]},
        _logits,
        32,
        TEXT,
    ),
    "vit": Family(
        _hub("ViTModel", "ViTConfig", **_SIZES, image_size=16, patch_size=8),
        IMAGE,
        _hidden,
        13,
        unread=frozenset({"pooler.dense"}),
    ),
    "swin": Family(
        _hub(
            "SwinModel",
            "SwinConfig",
            image_size=16,
            patch_size=2,
            embed_dim=16,
            depths=[1, 1],
            num_heads=[2, 2],
            window_size=4,
        ),
        IMAGE,
        _hidden,
        14,
        config=CONVOLUTIONS,
        rows=r"site 'encoder.layers.0.blocks.0.attention.q_proj': rows expects .*found shape "
        r"\(8, 16, 16\)",
    ),
    "clip": Family(_clip, {**TEXT, **IMAGE}, lambda out: out.logits_per_image, 26, rows=None),
    "whisper": Family(
        _hub(
            "WhisperForConditionalGeneration",
            "WhisperConfig",
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            vocab_size=64,
            num_mel_bins=8,
            max_source_positions=16,
            max_target_positions=16,
            decoder_start_token_id=1,
            **_TOKENS,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        ),
        {"input_features": SOUND, "decoder_input_ids": IDS[:, :4]},
        _logits,
        32,
        {"input_features": SOUND},
    ),
    "mamba": Family(
        _hub(
            "MambaForCausalLM",
            "MambaConfig",
            hidden_size=32,
            state_size=4,
            num_hidden_layers=2,
            vocab_size=64,
            **_TOKENS,
        ),
        {"input_ids": IDS},
        _logits,
        8,
        PROMPT,
        rows="'backbone.layers.0.mixer.dt_proj': the weight itself is used here, one for the "
        "whole batch",
    ),
    "mamba2": Family(
        _hub("Mamba2ForCausalLM", "Mamba2Config", **_MAMBA2, **_TOKENS),
        {"input_ids": IDS},
        _logits,
        6,
        PROMPT,
        config=CONVOLUTIONS,
        rows="'backbone.layers.0.mixer.conv1d': the weight itself is used here, one for the "
        "whole batch",
    ),
    "unet": Family(
        _unet,
        {"sample": NOISE, "timestep": 3, "encoder_hidden_states": CONDITION},
        lambda out: out.sample,
        77,
        config=CONVOLUTIONS,
    ),
    "convnet": Family(
        _convnet, {"input": PIXELS}, lambda out: out, 15, checkpoints=False, config=CONVOLUTIONS
    ),
}
