"""Small models of transformers for methods with virtual tokens, and their calls written out."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

__all__ = ["CAUSAL", "ENCODERS", "IDS", "MODELS", "both", "fresh", "greedy", "output", "single"]

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 63}
_DECODER = {**_SIZES, "num_key_value_heads": 2, **_TOKENS}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64, **_TOKENS}
_GPT2 |= {"initializer_range": 0.3}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
_T5 |= {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 63, "dropout_rate": 0.0}
_T5 |= {"initializer_factor": 2.0}
_BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "dropout": 0.0,
    "init_std": 0.3,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
    **_TOKENS,
}

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _DECODER),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_DECODER, "sliding_window": None}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**_DECODER, "head_dim": 8, "tie_word_embeddings": False},
    ),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, **_TOKENS}
        | {"initializer_range": 0.3},
    ),
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "vocab_size": 64}
        | {"time_step_rank": 4, **_TOKENS},
    ),
    "bert": ("BertForMaskedLM", "BertConfig", _SIZES),
    "bert_pooled": ("BertModel", "BertConfig", _SIZES),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", {**_SIZES, "pad_token_id": 0}),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5),
    "bart": ("BartForConditionalGeneration", "BartConfig", _BART),
}
CAUSAL, ENCODERS, both = (
    ("llama", "gpt2", "gemma2", "bloom"),
    ("bert", "bert_pooled", "roberta"),
    ("t5", "bart"),
)

IDS = torch.randint(3, 63, (3, 6), generator=torch.Generator().manual_seed(0))


@functools.cache
def fresh(name: str, model: str = "", **settings: Any) -> Any:
    """A model in eval mode, of its own class or another; nobody may write on it."""
    import transformers

    cls, config, sizes = MODELS[name]
    torch.manual_seed(0)
    made = getattr(transformers, model or cls)(
        getattr(transformers, config)(**{**sizes, **settings})
    )
    return made.eval()


def output(result: Any) -> Tensor:
    """What a call gives for each token, or for a pair of sequences."""
    if "pooler_output" in result:
        return torch.cat([result.last_hidden_state, result.pooler_output[:, None]], dim=1)
    return result.logits if "logits" in result else result.last_hidden_state


def single(name: str, ids: Tensor) -> dict[str, Any]:
    """The arguments of a call on whole rows."""
    more = {"decoder_input_ids": ids[:, :3]} if name in both else {}
    return {"input_ids": ids, **more}


def greedy(call: Any, ids: Tensor, steps: int) -> Tensor:
    """Tokens after ids (1, T), each by a call on all before it: without cache or `generate`."""
    for _ in range(steps):
        best = call(ids).logits[:, -1].argmax(-1)
        ids = torch.cat([ids, best[:, None]], dim=1)
    return ids
