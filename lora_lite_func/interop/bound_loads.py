"""How a bound model loads what its `save_pretrained` wrote, by its `load_state_dict`.

That is how a Trainer resumes a run, and how it takes the best checkpoint at the end: transformers'
from the file of ours, sentence-transformers' from a model that it loads with PEFT's layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.errors import CheckpointError, LoraLiteError
from ..injection.bound import Entry, base_keys, entries_of, leaf_keys, tensors_in
from ..io.manifest import joined

__all__ = ["teach_loading"]


def teach_loading(bound: nn.Module) -> None:
    """Let a model that was bound just now load the state of its adapters in other names."""
    bound.register_load_state_dict_pre_hook(_take_adapters)
    bound.register_load_state_dict_pre_hook(_take_peft_layers)
    bound.register_load_state_dict_pre_hook(_part_shared)
    bound.register_load_state_dict_post_hook(_need_no_base)


def _take_adapters(
    module: nn.Module,
    state_dict: dict[str, Tensor],
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Give the tensors of a file of ours the names that they have in the bound model's state."""
    entries = entries_of(module) or []
    for i, entry in enumerate(entries):
        front = prefix + (f"{i}/" if len(entries) > 1 else "")
        leaves = [
            (_saved(entry, front, path, name), prefix + key, (path, name))
            for path, name, key in leaf_keys(module, entry)
        ]
        file = {saved: state_dict.pop(saved) for saved, _, _ in leaves if saved in state_dict}
        if not file:
            continue
        state_dict.pop(prefix + next(base_keys(module), ""), None)  # the file's empty guard
        held = tensors_in(module, entry)
        stored: dict[Any, Tensor] = {}
        for saved, key, (path, name) in leaves:
            own = held[path][name]
            # A file has frozen tensors that share memory once.
            memory = _memory_of(own)
            frozen = not entry.layout.specs[path][name].trainable
            if saved in file:
                state_dict[key] = file[saved]
                stored.setdefault(memory, state_dict[key])
            elif frozen and memory in stored:
                state_dict[key] = stored[memory]
            else:
                error_msgs.append(
                    f"the file lacks {saved!r} of the adapter, or has it once for several sites; "
                    f"bind what ll.load reads"
                )


def _saved(entry: Entry, front: str, path: str, name: str) -> str:
    """The key of a leaf in a file of ours."""
    return joined(front, entry.layout.shared.get(path, {}).get(name, path), name)


def _part_shared(
    module: nn.Module,
    state_dict: dict[str, Tensor],
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Give frozen tensors that share memory memory of their own where the state has unlike values
    for them, as that of an adapter with a projection of its own at each site. Miss the one value of
    a parameter that sites share.
    """
    for entry in entries_of(module) or []:
        held, first = tensors_in(module, entry), dict[Any, Tensor]()
        for path, name, key in leaf_keys(module, entry):
            own, value = held[path][name], state_dict.get(prefix + key)
            if value is None:
                continue
            known = first.setdefault(_memory_of(own), value)
            if known is not value and not torch.equal(known, value):
                parent, last = key.rpartition(".")[::2]
                leaves = module.get_submodule(parent)
                if last in leaves._buffers:
                    leaves._buffers[last] = own.clone()
                elif name in entry.layout.shared.get(path, ()):
                    error_msgs.append(
                        f"the state has unlike values for {prefix + key!r} and the same tensor at "
                        f"other sites, which share one here; bind the adapter that the state is of"
                    )


def _memory_of(t: Tensor) -> tuple[Any, ...]:
    return t.data_ptr(), t.dtype, t.shape, t.stride(), t.device


def _take_peft_layers(
    module: nn.Module,
    state_dict: dict[str, Tensor],
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Give the state of a model with PEFT's layers the names of the bound model's state."""
    entries = entries_of(module) or []
    wrapped = [key for key in state_dict if any(word in key for word in _OF_PEFTS_LAYERS)]
    if prefix or not entries or not wrapped:
        return
    from .peft.read import from_peft
    from .peft.write import peft_form

    for key in wrapped:
        plain = key
        for word in _OF_PEFTS_LAYERS:
            plain = plain.replace(word, ".")
        state_dict[plain] = state_dict.pop(key)
    known = module.state_dict().keys()
    theirs = {key: state_dict.pop(key) for key in list(state_dict) if key not in known}
    try:
        own = tuple(Adapter(entry.layout, tensors_in(module, entry)) for entry in entries)
        read = from_peft(theirs, module, config=peft_form(own, module)[0])
        parts = (read,) if isinstance(read, Adapter) else read
        if [part.layout for part in parts] != [entry.layout for entry in entries]:
            raise CheckpointError("PEFT's layers have another form")
    except LoraLiteError as error:
        error_msgs.append(
            f"the state of a model with PEFT's layers doesn't give this adapter ({error}); bind "
            f"what ll.load reads of its folder"
        )
        return
    for entry, part in zip(entries, parts, strict=True):
        for path, name, key in leaf_keys(module, entry):
            state_dict[key] = part[path][name]


_OF_PEFTS_LAYERS = (".base_layer.", ".original_module.")
"""What PEFT puts into the names of the base's tensors."""


def _need_no_base(module: nn.Module, incompatible: Any) -> None:
    """Miss no tensor of the base where the adapters were loaded alone."""
    missing: list[str] = incompatible.missing_keys
    if set(base_keys(module)) <= set(missing):
        adapters = {
            key for entry in entries_of(module) or () for _, _, key in leaf_keys(module, entry)
        }
        missing[:] = [key for key in missing if key in adapters]
