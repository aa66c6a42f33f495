"""What each method is fine-tuned with: peak learning rate, places, sizes beside its defaults."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

import lora_lite_func as ll

__all__ = ["LEARNING_RATES", "config"]

LEARNING_RATES = {
    "head": 3e-3,
    "abba": 1e-2,
    "adalora": 1e-2,
    "adamss": 3e-2,
    "antipasto": 5e-2,
    "arrow": 3e-3,
    "asvd": 3e-3,
    "bdlora": 1e-2,
    "bitfit": 1e-2,
    "boft": 1e-2,
    "c3a": 2e-1,
    "corda": 3e-3,
    "deft": 1e-2,
    "delora": 1e-2,
    "direft": 4e-3,
    "dora": 4e-3,
    "eva": 4e-3,
    "fourierft": 5e-2,
    "frod": 3e-2,
    "full": 5e-4,
    "glora": 3e-3,
    "gralora": 1e-2,
    "hira": 5e-2,
    "hra": 5e-3,
    "ia3": 5e-2,
    "ia3_ff": 5e-2,
    "kasa": 3e-3,
    "lily": 3e-3,
    "ln_tuning": 1e-2,
    "loha": 1e-2,
    "lokr": 1e-2,
    "lora": 4e-3,
    "lora_ga": 1e-3,
    "lora_xs": 1e-2,
    "loreft": 4e-3,
    "lori": 1e-2,
    "mica": 1e-2,
    "milora": 3e-3,
    "miss": 1e-3,
    "moelora": 3e-3,
    "monteclora": 3e-3,
    "mora": 1e-2,
    "mpt": 1e-1,
    "oft": 3e-3,
    "olora": 1e-3,
    "osf": 3e-3,
    "p_tuning": 1e-3,
    "peanut": 3e-3,
    "pissa": 3e-3,
    "poly": 1e-2,
    "prompt_tuning": 1e-1,
    "psoft": 1e-2,
    "pvera": 1e-1,
    "qalora": 3e-3,
    "randlora": 1e-3,
    "rasa": 1e-2,
    "road": 5e-2,
    "shira": 2e-2,
    "ssvd": 2e-2,
    "tinylora": 1e-2,
    "tokens": 1e-3,
    "unilora": 1e-1,
    "velora": 3e-3,
    "vera": 5e-2,
    "waveft": 3e-3,
}
"""Peak learning rate per method on the sentiment task, and of its head. Where every_method's search
begins; the later ones are what it found.
"""

FIXED: dict[str, dict[str, Any]] = {
    "c3a": {"block_size": 128},  # must divide the widths
    "tokens": {
        "token_ids": range(2000, 30000),
        "target_names": "word_embeddings",
    },  # BERT's whole words and their ends
    "vblora": {"vector_length": 128},  # must divide the widths
}


def config(method: str, *, r: int, targets: str) -> ll.AdapterConfig:
    """A method's config: rank r and alpha 2 r where these mean what they do for LoRA, its own
    defaults elsewhere.

    Methods that adapt something else than linear layers have places of their own: the norms of all
        layers, the blocks, or the weights
    of the targets as parameters.
    """
    variant = ll.variants()[method]
    defaults = {f.name: f.default for f in dataclasses.fields(variant.config)}
    given: dict[str, Any] = {"dtype": torch.float32, **FIXED.get(method, {})}
    if defaults["r"] == 8 and defaults["alpha"] == 16.0:
        given |= {"r": r, "alpha": 2.0 * r}
    if "target_names" in given:
        return variant.config(**given)
    if "linear" in variant.sites:
        given["target_names"] = (targets,)
    elif variant.sites[0] == "parameter":
        given["target_parameters"] = (targets.removesuffix("$") + r"\.weight$",)
    return variant.config(**given)
