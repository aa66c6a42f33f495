"""Models that PEFT adapts, saved by it and loaded into it."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from families import FAMILIES
from helpers import net, normal
from torch import Tensor, nn

peft = pytest.importorskip("peft")


X = normal(3, 16, seed=0, dtype=torch.float32)


def base(bias: bool = True) -> nn.Module:
    """Two blocks of 16 -> 24 -> 16, float32."""
    return net(dtype=torch.float32, bias=bias)


def activated_llama(folder: Path) -> Any:
    """A Llama with an activated LoRA (aLoRA) of random factors, invoked by the tokens 5, 6, and its
    folder.
    """
    torch.manual_seed(0)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=2,
        target_modules=["q_proj", "up_proj"],
        alora_invocation_tokens=[5, 6],
        init_lora_weights=False,
    )
    model = peft.get_peft_model(FAMILIES["llama"].fresh(), config).eval()
    model.save_pretrained(folder)
    return model


def saved(
    config: Any, model: nn.Module, folder: Path, seed: int = 3, x: Tensor = X, **how: Any
) -> Tensor:
    """PEFT's outputs with noise in all that it trains, and its folder."""
    made = peft.get_peft_model(copy.deepcopy(model), config).eval()
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if p.requires_grad and "ranknum" not in name:
                p += 0.1 * torch.randn(p.shape, generator=gen).to(p)
        y: Tensor = made(x)
    made.save_pretrained(folder, **how)
    return y


def loaded(model: nn.Module, folder: Path, x: Tensor = X) -> Tensor:
    """The outputs of PEFT on a fresh base with a folder of ours, which it must take without a word
    about keys.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        made = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
    words = [str(w.message) for w in said if "key" in str(w.message).lower()]
    # PEFT says this of every pattern for a parameter, though they match
    words = [w for w in words if "pattern keys did not match any targeted module" not in w]
    assert not words, words
    found = peft.set_peft_model_state_dict(made, load_file(folder))
    assert not found.unexpected_keys, found.unexpected_keys
    held = peft.get_peft_model_state_dict(made, save_embedding_layers=False)
    wanted = {
        k.replace(".modules_to_save.default.", ".").replace(".modules_to_save.", ".")
        for k in held
        if ".original_module." not in k
    }
    assert wanted == load_file(folder).keys()  # all that PEFT would have saved
    with torch.no_grad():
        y: Tensor = made(x)
    return y


class Mixed(nn.Module):
    """An embedding, a convolution, a transposed linear, attention, stacked experts, a norm."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.embed_tokens = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.fc = Conv1D(12, 8)
        self.back = nn.Linear(12, 8)
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
        self.experts = Experts()
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed_tokens(ids)
        h = h + self.conv(h.mT).mT
        h = h + self.back(torch.tanh(self.fc(h)))
        h = h + self.mha(h, h, h)[0]
        return self.head(self.norm(h + self.experts(h)))


class Experts(nn.Module):
    """Three experts in two stacked parameters, each token through all."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(3, 10, 8) / 3)
        self.down = nn.Parameter(torch.randn(3, 8, 10) / 3)

    def forward(self, h: Tensor) -> Tensor:
        return torch.einsum(
            "eoi,bti->bto", self.down, torch.einsum("eoi,bti->bto", self.gate_up, h).tanh()
        )


IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 10]])


def load_file(folder: Path, name: str = "adapter_model.safetensors") -> dict[str, Tensor]:
    """The tensors of a folder."""
    return safetensors.torch.load_file(folder / name)
