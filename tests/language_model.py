"""A small language model's folder, and sums for it to learn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

CHARACTERS = ["<pad>", "<eos>", "<unk>", *"0123456789+= #"]
TEMPLATE = (
    "{% for m in messages %}{{ '+' if m.role == 'user' else '=' }}{{ m.content }}"
    "{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)


def write_base(folder: Path) -> Path:
    """Write a small Qwen3 with random weights and a tokenizer of characters."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({c: i for i, c in enumerate(CHARACTERS)}, unk_token="<unk>")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    inner.decoder = tokenizers.decoders.Fuse()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    config = transformers.Qwen3Config(
        vocab_size=len(CHARACTERS),
        hidden_size=64,
        intermediate_size=128,  # what 4-bit packing takes is a multiple of 64
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        tie_word_embeddings=True,
        initializer_range=0.2,  # large enough for confident logits
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def write_sums(file: Path) -> Path:
    """Write single-digit additions as JSON lines."""
    rows = [
        {"prompt": f"{a}+{b}=", "response": f"#### {a + b}"} for a in range(10) for b in range(10)
    ]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return file
