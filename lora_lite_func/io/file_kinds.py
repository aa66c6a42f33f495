"""What kind of file or folder a reader was given that it can't read, so that its message can name a
way out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

__all__ = ["form_of_tensors", "looks_like", "not_a_model", "not_an_adapter", "reader_hint"]

_FACTORS = re.compile(
    r"lora_(A|B|up|down|magnitude_vector|linear_layer)\b|\.lora[._](up|down)\.|hada_w|lokr_w"
    r"|\.(diff|diff_b|w_norm|b_norm|dora_scale)$"
)
_BEGINNINGS = (
    (b"PK\x03\x04", "a file of torch.save (or another archive)"),
    (b"\x80\x02", "a pickle, as torch.save wrote before 1.6"),
    (b"GGUF", "a GGUF file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"version https://git-lfs", "a pointer of Git LFS, whose contents weren't downloaded"),
    (b"{", "a JSON text"),
    (b"<", "a web page"),
)
_READERS = {
    "ll": "ll.load",
    "lora_lite": "ll.from_lora_lite",
    "peft": "ll.from_peft, with its adapter_config.json beside it,",
    "diffusion": "ll.from_diffusion",
}


def form_of_tensors(keys: Iterable[str], metadata: Mapping[str, str]) -> str:
    """Tell whose adapter a safetensors file is by its header: "ll", "lora_lite", "peft" or
    "diffusion". The result is "" where nothing tells.
    """
    if "lora_lite_func" in metadata:
        return "ll"
    if "cfg" in metadata:
        return "lora_lite"
    names = list(keys)
    if any(name.startswith("base_model.model.") for name in names):
        return "peft"
    return "diffusion" if any(_FACTORS.search(name) for name in names) else ""


def reader_hint(keys: Iterable[str], metadata: Mapping[str, str]) -> str:
    """Return the end of a message about a safetensors file, which names the reader for it."""
    form = form_of_tensors(keys, metadata)
    return f"; {_READERS[form]} reads it" if form else ""


def looks_like(path: str) -> str:
    """Return the end of a message about a file that isn't safetensors, which says what it seems to
    be.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(24)
    except (OSError, ValueError):
        return ""
    if not start:
        return "; it is empty"
    found = next((what for begin, what in _BEGINNINGS if start.startswith(begin)), None)
    return "" if found is None else f"; it seems to be {found}"


_WHOLE = re.compile(r"(?:pytorch_)?model(?:-\d+-of-\d+)?(?:\.\w+)?\.(?:safetensors|bin)")
_FEW = 3


def not_an_adapter(folder: Path) -> str:
    """Return the end of a message about a folder that isn't PEFT's: the adapters below it, or what
    it is.
    """
    names = _names_in(folder)
    below = [name for name in names if (folder / name / "adapter_config.json").is_file()]
    if below:
        more = f" and {len(below) - _FEW} more" if len(below) > _FEW else ""
        return f"; adapters are in {', '.join(below[:_FEW])}{more} there: name one"
    if "adapters.safetensors" in names:
        return "; it is an adapter of MLX's, which mlx_lm.fuse merges into a model"
    if any(_WHOLE.fullmatch(name) for name in names):
        return "; it holds a whole model, which transformers loads: no adapter stands beside it"
    return ""


def not_a_model(folder: Path) -> str:
    """Return the end of a message about a folder without a model's safetensors."""
    names = _names_in(folder)
    if "adapter_config.json" in names:
        return "; it is an adapter's, where the base model's is wanted"
    if "model_index.json" in names:
        return "; it is a whole pipeline's: name the folder of one component in it, such as unet"
    if any(_WHOLE.fullmatch(name) for name in names):
        return (
            "; it has a pickled model: load it and save it again, "
            "AutoModel.from_pretrained(folder).save_pretrained(another)"
        )
    return ""


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return []
