"""What a config of PEFT targets, held against the tensors that its file has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...core.errors import CheckpointError, short_repr
from ...core.torch_internals import CONVOLUTIONS
from ..metadata import ConfigReader
from .codec import Codec
from .keys import WRAPPED, elsewhere

__all__ = ["check_complete", "check_targeted", "in_one_of", "refuse_emptied"]


def check_complete(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    reader: ConfigReader,
    method: Codec,
    paths: set[str],
    where: Mapping[str, str],
) -> None:
    """Refuse a file that has no tensor for a place that its config names.

    Raises:
        CheckpointError: with the place.
    """
    branch = _branch(where)
    missing = next(
        (
            p
            for p in _targeted(model, reader)
            if p not in paths and p.split(".")[: len(branch)] == branch
        ),
        None,
    )
    if missing is not None and method.suffixes and not method.prunes:
        raise CheckpointError(
            f"{reader.where}: target_modules name {short_repr(missing)}, for which there is no "
            "tensor"
        )
    lost = next((p for p in _parameters(modules, reader) if p not in where.values()), None)
    if lost is not None:
        raise CheckpointError(
            f"{reader.where}: target_parameters name {short_repr(lost)}, for which there is no "
            "tensor"
        )


def _branch(where: Mapping[str, str]) -> list[str]:
    """Return the names of the module that a smaller model has become within this one, as a language
    model beside one of vision: modules elsewhere are none that the file had. It is the whole model
    where none has moved deeper.
    """
    deeper = [new.split(".") for old, new in where.items() if new.count(".") > old.count(".")]
    shared: list[str] = []
    for names in zip(*deeper, strict=False):
        if len(set(names)) > 1 or names[0].isdecimal():
            break
        shared.append(names[0])
    return shared


def check_targeted(
    reader: ConfigReader, where: Mapping[str, str], modules: Mapping[str, Any] | None = None
) -> None:
    """Refuse tensors for a place that the config doesn't name. With ensure_weight_tying, what
    shares a weight with a place that it names is named too.

    Raises:
        CheckpointError: with the place.
    """
    tying = modules if reader.flag("ensure_weight_tying") else None
    for path, found in where.items():
        names = [path, path.partition(WRAPPED)[0], found]  # PEFT's names, and the present one
        if tying is not None:
            names += [other.rpartition(".")[0] for other in elsewhere(tying, f"{found}.weight")]
        if all(reader.targeted(name) is False for name in names):
            raise CheckpointError(
                f"{reader.where}: tensors for {short_repr(found)}, which its target_modules "
                f"don't name"
            )


def _targeted(model: nn.Module, reader: ConfigReader) -> list[str]:
    """Return the modules that PEFT would surely adapt."""
    saved = reader.names("modules_to_save")
    kinds = (nn.Linear, nn.Embedding, CONVOLUTIONS)
    found = [
        path
        for path, module in model.named_modules()
        if isinstance(module, kinds) and reader.targeted(path)
    ]
    return [p for p in found if not in_one_of(saved, p)]


def _parameters(modules: Mapping[str, Any], reader: ConfigReader) -> list[str]:
    """Return the parameters that the config names."""
    named = reader.names("target_parameters")
    full = (
        f"{path}.{name}" if path else name
        for path, module in modules.items()
        for name in module._parameters
    )
    return [p for p in full if any(p == name or p.endswith(f".{name}") for name in named)]


def in_one_of(names: list[str], path: str) -> bool:
    """Tell whether a module is in one that PEFT finds by the end of its name."""
    parts = path.split(".")
    return any(".".join(parts[: i + 1]).endswith(name) for i in range(len(parts)) for name in names)


def refuse_emptied(reader: ConfigReader, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a file without tensors, or with one of shape (0,), which no pruned rank (0, d_in)
    leaves.

    Raises:
        CheckpointError: the message gives the tensor and tells how to save again.
    """
    emptied = next((key for key, t in tensors.items() if tuple(t.shape) == (0,)), None)
    if emptied is not None or not tensors:
        raise CheckpointError(
            f"{reader.where}: {'the file beside it' if emptied is None else short_repr(emptied)} "
            f"is empty, as where DeepSpeed's ZeRO-3 saved what one process holds; gather the "
            f"parameters before the save (stage3_gather_16bit_weights_on_model_save, or "
            f"deepspeed.zero.GatheredParameters), or take them out of the checkpoint "
            f"(zero_to_fp32.py)"
        )
