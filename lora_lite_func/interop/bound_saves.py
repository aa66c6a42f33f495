"""What a bound model's own `save_pretrained` writes: its adapters alone.

The models of transformers, diffusers and huggingface_hub write all of their tensors. Of a bound
model that would be a folder that loads as the base, without an error and without the adapter. So
its modules with adapters inside write these alone: exactly as they are, in model.safetensors as
`ll.save` does, and besides in PEFT's layout, where PEFT has one for them. The folder can't pass
for a whole model's: model.safetensors doesn't fit one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.errors import CheckpointError, LoraLiteError
from ..core.weak_memo import WeakMemo
from ..injection.bound import Entry, base_keys, entries_of, leaf_keys, part_of, tensors_in
from ..io.checkpoint import IN_FOLDERS, OWN, save_in_folder
from ..io.files import read_header
from ..io.swapping import swapped

__all__ = ["AdapterSaver", "teach_saving"]

_WRITERS = (
    ("transformers.modeling_utils", "PreTrainedModel"),
    ("diffusers.models.modeling_utils", "ModelMixin"),
    ("huggingface_hub.hub_mixin", "PyTorchModelHubMixin"),
)
"""The classes whose `save_pretrained` writes all tensors of a module."""

_WHOLE_MODELS = (
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.bin",
)
_OF_THE_MODEL = ("config.json", "generation_config.json")


def _writes_all(cls: type) -> bool:
    return any((base.__module__, base.__name__) in _WRITERS for base in cls.__mro__)


_WRITES_ALL = WeakMemo(_writes_all)


def teach_saving(bound: nn.Module) -> None:
    """Let the modules of a bound model that write all their tensors write their adapters alone."""
    for path, module in bound.named_modules():
        if not _WRITES_ALL(type(module)):
            continue
        saver = AdapterSaver(bound, path)
        if next(saver.parts(), None) is not None:
            module.__dict__["save_pretrained"] = saver


class AdapterSaver:
    """`save_pretrained` of a bound model, or of a module in it: writes the adapters inside alone.

    Attributes:
        bound: the bound model.
        path: the module's path in it.
    """

    __slots__ = ("bound", "path")

    def __init__(self, bound: nn.Module, path: str) -> None:
        self.bound, self.path = bound, path

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **settings: Any,
    ) -> None:
        """Write the adapters to a folder: adapter_config.json and adapter_model.safetensors, which
        PEFT loads, where PEFT has a form for them; and model.safetensors, which `ll.load` reads,
        with all that they are.

        Args:
            save_directory: the folder. It is made if it isn't there.
            is_main_process: whether this process writes. Where tensors are sharded, every process
                has to call this.
            state_dict: the module's state, where it was gathered from several processes. What it
                lacks is taken from the module.
            push_to_hub: whether to call the module's own `push_to_hub` afterwards.
            settings: what else `save_pretrained` takes. The hub's are handed on; an adapter has no
                need of the others (the size of shards, a format: it is always safetensors).

        Raises:
            CheckpointError: the folder holds a whole model, or can't be written; or a tensor is
                sharded and `state_dict` lacks it.
        """
        module = self.bound.get_submodule(self.path)
        adapters = [self._adapter(part, module, state_dict) for part in self.parts()]
        if is_main_process:
            _write(adapters[0] if len(adapters) == 1 else tuple(adapters), module, save_directory)
        if is_main_process and push_to_hub:
            known = signature(module.push_to_hub).parameters  # type: ignore[arg-type]
            given = {name: value for name, value in settings.items() if name in known}
            name = Path(os.fsdecode(save_directory)).name
            module.push_to_hub(**{"repo_id": name, **given})  # type: ignore[operator]

    def parts(self) -> Iterator[Entry]:
        """The adapters inside the module."""
        parts = (part_of(entry, self.path) for entry in entries_of(self.bound) or ())
        return (part for part in parts if part is not None)

    def _adapter(
        self, part: Entry, module: nn.Module, state: Mapping[str, Tensor] | None
    ) -> Adapter:
        held = tensors_in(module, part)
        for path, name, key in leaf_keys(module, part):
            own: Any = held[path][name]
            if state is not None and key in state:
                held[path][name] = state[key].detach()
            elif hasattr(own, "full_tensor"):
                if state is not None:
                    raise CheckpointError(
                        f"save_pretrained: the state dict lacks {key!r}, a tensor of the adapter, "
                        f"of which this process has a part alone"
                    )
                held[path][name] = own.full_tensor()
        return Adapter(part.layout, held)


# ------------------------------------------------------------------------------------------ writing
def _write(
    params: Adapter | tuple[Adapter, ...], module: nn.Module, folder: str | os.PathLike[str]
) -> None:
    from .peft.folder import CONFIG, FILES
    from .peft.write import peft_form, write_form

    gone = _replaced(Path(os.fsdecode(folder)))
    try:
        form = peft_form(params, module, structured=True)
    except LoraLiteError:  # PEFT has none for these adapters
        form = None
    marker = IN_FOLDERS if form is None else CONFIG
    config: Any = getattr(module, "config", None)
    with swapped(folder, "save_pretrained", marker=marker, gone=(*gone, *FILES)) as work:
        save_in_folder(params, work, next(base_keys(module)))
        if form is not None:
            write_form(form, work, "save_pretrained")
        elif hasattr(config, "to_json_file"):
            # Without it transformers would build a model of its default sizes before it fails.
            config.to_json_file(work / _OF_THE_MODEL[0])


def _replaced(folder: Path) -> tuple[str, ...]:
    """The files of a folder that a bound model's new ones replace, besides those of the same names.

    A bound model of a version before 0.2.0 wrote all its tensors and the model's config.

    Raises:
        CheckpointError: the folder holds a whole model.
    """
    whole = next((name for name in _WHOLE_MODELS if (folder / name).exists()), None)
    if whole is None and (folder / IN_FOLDERS).exists():
        keys, metadata = read_header(folder / IN_FOLDERS)
        if OWN in metadata or any(".adapter." in key and ".lora_" in key for key in keys):
            return _OF_THE_MODEL
        whole = IN_FOLDERS
    if whole is not None:
        raise CheckpointError(
            f"save_pretrained: {folder} holds a whole model ({whole}), and this writes an adapter "
            f"alone; choose another folder, or write the merged model: "
            f"ll.merged(model, params).save_pretrained"
        )
    return ()
