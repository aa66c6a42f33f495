"""PEFT's X-LoRA folders as values, and back."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ..algebra.stack import stack, unstack
from ..core.adapter import Adapter
from ..core.arguments import items
from ..core.errors import CheckpointError, StructureError, short_repr
from ..interop.peft.xlora_folder import read_folder, write_folder
from ..layers.refusals import check_model
from .xlora import XLoRA, XLoRASettings, module_order

__all__ = ["xlora_from_peft", "xlora_to_peft"]


def xlora_from_peft(
    folder: str | os.PathLike[str],
    model: nn.Module,
    *,
    experts: Sequence[str | os.PathLike[str] | Adapter] | None = None,
    classifier: Mapping[str, Tensor] | None = None,
) -> XLoRA:
    """Read an X-LoRA that PEFT saved: `x = ll.xlora_from_peft("folder", model)`.

    PEFT 0.21 leaves out whatever has an expert's name ("0", "1", ...) as a part of its key: layers
    of the classifier, which with one layer is all of it, and of each expert the model's layers of
    the others' numbers. Such a folder is refused, with what is missing.

    Args:
        folder: with the config, the classifier, and the experts in folders 0, 1, ... inside.
        model: the base.
        experts: the experts' folders, or adapters, instead of those inside.
        classifier: the state dict of PEFT's classifier module, where the folder lacks it.

    Raises:
        CheckpointError: the folder isn't X-LoRA's, lacks something, or a part doesn't fit another.
        StructureError: the experts don't stack.
    """
    check_model(model)
    if experts is not None:
        experts = items(experts, "xlora_from_peft: experts", "folders or adapters")
    if classifier is not None and not isinstance(classifier, Mapping):
        raise CheckpointError(
            f"xlora_from_peft: classifier: expected a state dict, found {short_repr(classifier)}"
        )
    adapters, head, settings = read_folder(folder, model, experts, classifier)
    several = stack(adapters)
    said = XLoRASettings(sites=module_order(model, several), **settings)
    outputs = len(adapters) * (len(said.sites) if said.layerwise else 1)
    found = tuple(head[f"{len(head) // 2 - 1}.weight"].shape)
    if found[0] != outputs:
        raise CheckpointError(
            f"{os.fsdecode(folder)}: the classifier has {found[0]} outputs, expected {outputs} for "
            f"{len(adapters)} experts{' at each of the sites' if said.layerwise else ''}"
        )
    return XLoRA(several, head, said)


def xlora_to_peft(x: XLoRA, model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write an X-LoRA as a PEFT folder, whole: the classifier, its settings, and the experts in
    folders 0, 1, ... inside.

    The config says where the experts are, as PEFT wants it; a folder that has moved is opened there
    with `adapters={"0": ...}`.

    Args:
        x: the experts and their classifier.
        model: the base.
        folder: where to write; the files in it are replaced together.

    Raises:
        UnsupportedError: PEFT has no form for an expert.
        CheckpointError: the folder can't be written.
    """
    if not isinstance(x, XLoRA):
        raise StructureError(f"xlora_to_peft: expected an XLoRA, found {type(x).__name__}")
    write_folder(unstack(x.stack), model, folder, x.head, x.settings)
