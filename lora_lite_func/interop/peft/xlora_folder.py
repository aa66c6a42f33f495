"""PEFT's X-LoRA folders: a classifier, its settings, and the experts in folders inside.

base_model.internal_xlora_classifier.layers.<i>.{weight, bias}, i counting ReLU and dropout too
<folder>/0, <folder>/1, ...: LoRA folders
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...core.adapter import Adapter
from ...core.errors import CheckpointError, short_repr
from ...io.files import path_of
from ...io.swapping import swapped
from ...io.writing import own_copies
from ..metadata import ConfigReader
from .folder import CONFIG, unpack
from .read import from_unpacked
from .write import peft_form, write_form
from .write_fields import about_base

__all__ = ["read_folder", "write_folder"]

_CLASSIFIER = "internal_xlora_classifier."
_FIELDS = (
    "hidden_size adapters enable_softmax enable_softmax_topk layerwise_scalings xlora_depth "
    "xlora_size xlora_dropout_p use_trainable_adapters softmax_temperature top_k_lora "
    "global_scaling_weight"
)


def read_folder(
    folder: str | os.PathLike[str],
    model: nn.Module,
    experts: Sequence[Any] | None,
    classifier: Mapping[str, Tensor] | None,
) -> tuple[list[Adapter], dict[str, Tensor], dict[str, Any]]:
    """Return (the experts, the classifier's tensors, settings).

    Args:
        folder: as PEFT saved it.
        model: the base.
        experts: folders or adapters instead of those inside.
        classifier: the state dict of PEFT's classifier instead of the file's.

    Raises:
        CheckpointError: it isn't X-LoRA's, or something is missing.
    """
    reader, held = unpack(folder, None)
    if reader.text("peft_type").upper() != "XLORA":
        raise CheckpointError(
            f"{reader.where}: expected peft_type 'XLORA', found "
            f"{short_repr(reader.get('peft_type'))}; read it with ll.from_peft"
        )
    reader.check(_FIELDS.split(), (), ("scaling_pass_value",))
    depth, dropout = reader.whole("xlora_depth", 1), reader.number("xlora_dropout_p", 0.2)
    if classifier is None:
        found = {key.removeprefix("base_model."): t for key, t in held.items()}
        found = {k.removeprefix(_CLASSIFIER): t for k, t in found.items() if _CLASSIFIER in k}
    else:
        found = dict(classifier)
    top_k = None if reader.get("top_k_lora") is None else reader.whole("top_k_lora", 1)
    settings = {
        "layerwise": reader.flag("layerwise_scalings"),
        "softmax": reader.flag("enable_softmax", True),
        "temperature": reader.number("softmax_temperature", 1.0),
        "top_k": top_k,
        "softmax_top_k": reader.flag("enable_softmax_topk"),
        "strength": reader.number("global_scaling_weight", 1.0),
        "dropout": dropout if depth > 1 else 0.0,
    }
    head = _head(reader, found, depth, dropout)
    return _experts(reader, Path(os.fsdecode(folder)), model, experts), head, settings


def _head(
    reader: ConfigReader, found: Mapping[str, Tensor], depth: int, dropout: float
) -> dict[str, Tensor]:
    """Return the classifier's tensors by the numbers of its linear layers.

    Raises:
        CheckpointError: some are missing, as PEFT leaves them out.
    """
    head = {}
    for i in range(depth):
        for name in ("weight", "bias"):
            key = f"layers.{_place(i, dropout)}.{name}"
            if key not in found:
                raise CheckpointError(
                    f"{reader.where}: the classifier lacks {_CLASSIFIER}{key}. PEFT leaves out of "
                    f"the file whatever has an expert's name ('0', '1', ...) in its key, so what "
                    f"was trained isn't there; where PEFT's model is still at hand, give it as "
                    f"classifier=model.base_model.internal_xlora_classifier.state_dict()"
                )
            head[f"{i}.{name}"] = found[key].detach().clone()
    return head


def _place(i: int, dropout: float) -> int:
    """Return the number of a linear layer in PEFT's sequence of layers."""
    return i * (3 if dropout > 0.0 else 2)


def _experts(
    reader: ConfigReader, folder: Path, model: nn.Module, experts: Sequence[Any] | None
) -> list[Adapter]:
    """Return the experts, in order.

    Raises:
        CheckpointError: a folder is missing, or has something else than one adapter.
    """
    said = reader.get("adapters") or {}
    count = len(said) if isinstance(said, Mapping) else 0
    sources = [folder / str(i) for i in range(count)] if experts is None else list(experts)
    if len(sources) != count:
        raise CheckpointError(
            f"{reader.where}: expected {count} experts, as `adapters` says, found {len(sources)}"
        )
    made = []
    for source in sources:
        one = source if isinstance(source, Adapter) else _expert(source, model)
        if not isinstance(one, Adapter):
            raise CheckpointError(f"{source}: expected one adapter of an expert, found {len(one)}")
        made.append(one)
    return made


def _expert(folder: Any, model: nn.Module) -> Any:
    """Return what an expert's folder holds. PEFT's own, inside an X-LoRA's, have other keys.

    Raises:
        CheckpointError: it can't be read; also where PEFT has left out layers.
    """
    reader, held = unpack(folder, None)
    keys = {
        key: key.replace("base_model.lora_model.model.", "base_model.model.", 1) for key in held
    }
    try:
        return from_unpacked(reader, {keys[key]: t for key, t in held.items()}, model)
    except CheckpointError as error:
        if list(keys) == list(keys.values()):
            raise
        raise CheckpointError(
            f"{error}. PEFT leaves out of an expert's file whatever has another expert's name in "
            f"its key, such as layers.1; give the folders that the experts came from: "
            f"experts=[...]"
        ) from error


def write_folder(
    experts: Sequence[Adapter],
    model: nn.Module,
    folder: str | os.PathLike[str],
    head: Mapping[str, Tensor],
    settings: Any,
) -> None:
    """Write a whole X-LoRA folder: the classifier, its settings, and the experts inside.

    Raises:
        UnsupportedError: PEFT has no form for an expert.
        CheckpointError: the folder can't be written.
    """
    what = "xlora_to_peft"
    target = Path(path_of(folder, what))
    depth = len(head) // 2
    width, hidden = head["0.weight"].shape
    dropout = settings.dropout if depth > 1 else 0.0
    fields = {
        "peft_type": "XLORA",
        "hidden_size": hidden,
        "adapters": {str(i): str(target / str(i)) for i in range(len(experts))},
        "enable_softmax": settings.softmax,
        "enable_softmax_topk": settings.softmax_top_k,
        "layerwise_scalings": settings.layerwise,
        "xlora_depth": depth,
        "xlora_size": width if depth > 1 else 2048,
        "xlora_dropout_p": dropout,
        "use_trainable_adapters": False,
        "softmax_temperature": settings.temperature,
        "top_k_lora": settings.top_k,
        "scaling_pass_value": 0.0,
        "global_scaling_weight": settings.strength,
    }
    tensors = {}
    for name, t in head.items():
        number, _, which = name.partition(".")
        place = _place(int(number), dropout)
        tensors[f"base_model.{_CLASSIFIER}layers.{place}.{which}"] = t.detach()
    forms = [peft_form(expert, model) for expert in experts]
    with swapped(target, what, marker=CONFIG) as work:
        write_form((about_base(model) | fields, own_copies(tensors)), work, what)
        # until all experts are new, nobody reads the folder
        (target / CONFIG).unlink(missing_ok=True)
        for i, form in enumerate(forms):
            with swapped(target / str(i), what, marker=CONFIG) as inside:
                write_form(form, inside, what)
