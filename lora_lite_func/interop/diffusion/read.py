"""from_diffusion: adapters of diffusion models, by the keys of diffusers, kohya and others."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...core.adapter import Adapter
from ...core.errors import CheckpointError, ConfigError, short_repr
from ...io.files import read_safetensors
from ...io.pickles import read_pickle
from ..assembly import assemble
from ..peft.modules import adaptable
from ..renaming import Rename
from .declared import Declared
from .gather import gathered
from .keys import COMPONENTS
from .modules import module_parts
from .names import ModelNames

__all__ = ["from_diffusion"]

_USUAL = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")  # as diffusers saves
_SENSELESS = (ConfigError, RuntimeError, IndexError, ValueError, OverflowError)
"""What shapes that make no sense together end in."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def from_diffusion(
    source: Any,
    model: nn.Module,
    *,
    component: str | None = None,
    rename: Rename | None = None,
) -> Adapter | tuple[Adapter, ...]:
    """Read an adapter for a diffusion model, in the keys of diffusers, ComfyUI, kohya's scripts or
    LyCORIS: `params = ll.from_diffusion("lora.safetensors", pipe.unet)`. Where the file holds
    several things (a learned bias or norms besides the factors), the result is a tuple, which
    `apply`, `bind` and `merge` take as it is.

    It reads LoRA (with factors of kernels, DoRA's magnitudes and learned biases), LoHa, LoKr, IA3,
    GLoRA, OFT, and changes of weights, biases and norms. Names of the original releases (Stable
    Diffusion's UNet, SD3, Flux, HunyuanVideo, Wan, Z-Image, Lumina 2, LTX-2, Krea 2, Ideogram 4,
    Cosmos, ACE-Step) are found in diffusers' models. A fused layer's update is shared out by rows,
    exactly. Tensors of 8 bits are widened to float32.

    Args:
        source: a .safetensors file (or .bin, read without running code), a folder that diffusers
            saved one in, or a state dict.
        model: the component that is adapted. Names are looked for among its paths.
        component: the component whose keys are read, where the file has several components' (the
            others' are left out): "unet", "transformer", "transformer_2", "text_encoder",
            "text_encoder_2" or "text_encoder_3". None if the file has one.
        rename: for names that mean no place of the model: {old names: new names}, names of a path
            in a row, or a function from a file's name of a module to the model's path.

    Raises:
        CheckpointError: the file is unreadable, a key has no counterpart in the model or here or
            could mean several modules, or a tensor doesn't fit.
        UnsupportedError: the method can't adapt a layer here.
    """
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"expected the base, an nn.Module, found {type(model).__name__}")
    if component is not None and component not in COMPONENTS:
        raise CheckpointError(
            f"component: expected one of {', '.join(COMPONENTS)}, found {short_repr(component)}"
        )
    tensors, metadata, where = _opened(source)
    declared = Declared(metadata, where)
    try:
        names = ModelNames(model, rename)
        modules = gathered(tensors, component, names)
        names.paths.check_used(module.name for module in modules)
        paths = [target.path for module in modules for target in module.targets]
        entries = adaptable(model, paths)
        parts = [
            placed
            for module in modules
            for placed in module_parts(module, entries, declared, model)
        ]
        return assemble(parts)
    except CheckpointError as error:
        said = str(error)
        raise CheckpointError(said if said.startswith(where) else f"{where}: {said}") from None
    except _SENSELESS as error:
        raise CheckpointError(f"{where}: {short_repr(str(error))}") from None


def _opened(source: Any) -> tuple[Mapping[str, Tensor], Mapping[str, str], str]:
    """Return (tensors, metadata, what messages call the source).

    Raises:
        CheckpointError: the source can't be read, or is another library's.
    """
    if isinstance(source, Mapping):
        return source, {}, "the state dict"
    try:
        path = Path(os.fsdecode(source))
        if path.is_dir():
            path = _inside(path)
    except (OSError, TypeError, ValueError) as error:
        raise CheckpointError(f"{short_repr(source)}: not a path: {error}") from None
    if path.suffix in _PICKLES:
        return read_pickle(path), {}, str(path)
    tensors, metadata = read_safetensors(path)
    reader = next((reader for key, reader in _OTHERS.items() if key in metadata), None)
    if reader is not None:
        raise CheckpointError(f"{path}: not a file for diffusion models; {reader} reads it")
    return tensors, metadata, str(path)


_OTHERS = {"lora_lite_func": "ll.load", "cfg": "ll.from_lora_lite"}


def _inside(folder: Path) -> Path:
    found = next((folder / name for name in _USUAL if (folder / name).is_file()), None)
    if found is None:
        peft = (folder / "adapter_config.json").is_file()
        raise CheckpointError(
            f"{folder}: a folder without {_USUAL[0]}; "
            + ("ll.from_peft reads PEFT's" if peft else "name the file in it")
        )
    return found
