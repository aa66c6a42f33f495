"""What a file holds beside its method's tensors: biases, modules trained whole, new rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import CheckpointError, short_repr
from ...core.site import Site
from ...layers.kinds import matrix
from ...layers.weights import held, stored
from ...variants import BitFitConfig, FullConfig, LoRAConfig, TokensConfig
from ..assembly import ModuleEntry, Part
from ..metadata import ConfigReader
from .keys import WRAPPED, elsewhere, ties
from .modules import adaptable, in_one_of, refuse_tied

__all__ = ["beside"]


def beside(
    reader: ConfigReader, rest: Mapping[str, Tensor], model: Any
) -> list[tuple[ModuleEntry, Part]]:
    """What a file holds beside its method's tensors: learned biases (bias="all", "lora_only"),
    replaced token embeddings.

    Raises:
        CheckpointError: a tensor that is neither, one that needs the model and there is none, or
            none of a module that was trained whole.
    """
    learned, saved = (
        reader.get("bias", "none") not in ("none", None),
        reader.names("modules_to_save"),
    )
    modules = (
        dict(model.named_modules(remove_duplicate=False)) if isinstance(model, nn.Module) else {}
    )
    tying = reader.flag(
        "ensure_weight_tying"
    )  # PEFT keeps a copy of what shares a tensor with a module trained whole, too
    whole: dict[str, Tensor] = {}
    biases: dict[str, Tensor] = {}
    tokens: dict[str, Tensor] = {}
    for key, t in rest.items():
        path, _, name = key.rpartition(".")
        bare = (
            path.removesuffix(WRAPPED)
            if path.removesuffix(WRAPPED) in modules
            else path.replace(WRAPPED, "")
        )
        if ".original_module." in key and in_one_of(saved, path):
            pass  # bias="all" keeps what a copy replaces, too
        elif in_one_of(saved, path) or (
            tying
            and any(in_one_of(saved, other.rpartition(".")[0]) for other in elsewhere(modules, key))
        ):
            whole[key.replace(".modules_to_save.", ".")] = t
        elif name == "bias" and learned:
            biases[bare] = t
        elif name == "trainable_tokens_delta":
            tokens[path.removesuffix(".token_adapter")] = t
        elif name in ("weight", "bias") and _is_the_base(model, bare, name, t):
            pass  # PEFT copies an embedding that it adapts into the file, and the head beside it
        else:
            raise CheckpointError(
                f"{reader.where}: unexpected tensor {short_repr(key)}; "
                f"{_unknown(model, path, bare)}"
            )
    if (whole or biases or tokens) and not isinstance(model, nn.Module):
        raise CheckpointError(
            f"{reader.where}: {short_repr(next(iter(rest)))} replaces a tensor of the base; give "
            f"the base model too"
        )
    _check_saved(reader, saved, whole, model)
    _check_learned(reader, biases, tokens, modules)
    known = adaptable(model, [*whole, *biases]) if whole or biases else {}
    for path in whole:
        refuse_tied(reader, modules, path, whole)
    found = [_whole(reader, path, t, *known[path]) for path, t in whole.items()]
    found += [_bias(reader, path, t, *known[path]) for path, t in biases.items()]
    return found + [part for path, t in tokens.items() for part in _tokens(reader, path, t, model)]


def _check_saved(
    reader: ConfigReader, saved: Iterable[str], whole: Iterable[str], model: Any
) -> None:
    """Refuse a file that has lost a module which its config says was trained whole.

    Raises:
        CheckpointError: with the module.
    """
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    meant = [path for path, module in modules if path and module.state_dict()]
    for name in saved:
        paths = [path for path in meant if path.endswith(name)]
        if paths and not any(f"{key}.".startswith(f"{path}.") for key in whole for path in paths):
            raise CheckpointError(
                f"{reader.where}: modules_to_save names {name!r}, which is {paths[0]!r} of the "
                f"model, and there is no tensor of it; take the "
                "whole folder, or the name out of the config if the base's own is meant"
            )


def _check_learned(
    reader: ConfigReader, biases: Iterable[str], tokens: Iterable[str], modules: Mapping[str, Any]
) -> None:
    """Refuse a file that has lost what else its config says was trained.

    Raises:
        CheckpointError: with the field.
    """
    has = next(
        (path for path, module in modules.items() if module._parameters.get("bias") is not None),
        None,
    )
    if reader.get("bias") == "all" and has is not None and not biases:
        raise CheckpointError(
            f"{reader.where}: bias is 'all', and there is no tensor of a bias, such as that of "
            f"{has!r}; take the whole folder"
        )
    if reader.get("trainable_token_indices") and not tokens:
        raise CheckpointError(
            f"{reader.where}: trainable_token_indices name tokens, and there is no tensor of "
            f"them; take the whole folder"
        )


def _is_the_base(model: Any, path: str, name: str, t: Tensor) -> bool:
    module = dict(model.named_modules()).get(path) if isinstance(model, nn.Module) else None
    base = None if module is None else stored(module, name)
    return (
        isinstance(base, Tensor)
        and base.shape == t.shape
        and torch.equal(held(module, name).to(t), t)
    )


def _unknown(model: Any, path: str, bare: str) -> str:
    """What to say of a tensor that isn't the base's own."""
    if not path.endswith(WRAPPED):
        return "nothing here corresponds to it"
    if not isinstance(model, nn.Module):
        return "if it is PEFT's copy of the base's, give the base model too"
    return (
        f"it isn't what {short_repr(bare)} of this model has: a copy of another base, or of one "
        f"that was trained or resized"
    )


def _whole(
    reader: ConfigReader, path: str, t: Tensor, site: Site, module: Any
) -> tuple[ModuleEntry, Part]:
    """A parameter that was trained whole (modules_to_save): it takes the base's place before
    anything else is applied.
    """
    base = module._parameters[path.rpartition(".")[2]]
    if base.shape != t.shape:
        raise CheckpointError(
            f"{reader.where}: {short_repr(path)}: expected shape {tuple(base.shape)}, found "
            f"{tuple(t.shape)}"
        )
    return ModuleEntry(path, {}, site, module), Part(
        FullConfig, {"lora_W": matrix(t, site)}, order=-1
    )


def _bias(
    reader: ConfigReader, path: str, learned: Tensor, site: Site, module: Any
) -> tuple[ModuleEntry, Part]:
    """Kept as the difference from the base's, which a BitFit adds."""
    base = stored(module, "bias")
    if not isinstance(base, Tensor) or base.shape != learned.shape:
        raise CheckpointError(
            f"{reader.where}: {short_repr(path)} has no bias of shape {tuple(learned.shape)}"
        )
    return ModuleEntry(path, {}, site, module), Part(
        BitFitConfig, {"lora_b": learned - base.detach().to(learned)}, order=2
    )


def _tokens(
    reader: ConfigReader, path: str, rows: Tensor, model: nn.Module
) -> list[tuple[ModuleEntry, Part]]:
    """New rows of an embedding, as what is added to them; with a head that shares its table, as a
    LoRA of each that picks those rows.
    """
    listed: Any = reader.get("trainable_token_indices") or reader.get("token_indices")
    if isinstance(listed, Mapping):
        listed = next(
            (ids for name, ids in listed.items() if path == name or path.endswith("." + name)), None
        )
    site, module = adaptable(model, [path])[path]
    many = rows.shape[0] if rows.ndim == 2 else 0
    if (
        not isinstance(listed, list)
        or len(listed) != many
        or not all(type(i) is int and 0 <= i < site.d_in for i in listed)
    ):
        raise reader.refuse(
            "trainable_token_indices", f"{many} token ids below {site.d_in} for {path!r}"
        )
    if (
        site.kind != "embedding"
        or rows.shape != (len(listed), site.d_out)
        or len(set(listed)) != len(listed)
    ):
        raise CheckpointError(
            f"{reader.where}: {short_repr(path)}: rows of shape {tuple(rows.shape)} don't fit "
            f"this {type(module).__name__}"
        )
    ids, order = torch.tensor(listed).sort()
    change = rows[order] - held(module)[ids].to(rows)  # (n, dim)
    shared = [
        path
        for path, m in model.named_modules()
        if m is not module and stored(m, "weight") is stored(module, "weight")
    ]
    if not shared or not ties(model, module):
        leaves = {"lora_rows": change, "lora_ids": ids.double()}
        return [
            (
                ModuleEntry(path, {}, site, module),
                Part(TokensConfig, leaves, {"token_ids": tuple(ids.tolist())}, order=3),
            )
        ]
    picks = torch.zeros(many, site.d_in, dtype=rows.dtype).scatter(1, ids[:, None], 1.0)  # (n, num)
    pairs = {path: {"lora_A": picks, "lora_B": change.mT}} | {
        key: {"lora_A": change, "lora_B": picks.mT} for key in shared
    }
    known = adaptable(model, pairs)
    fields = {"dropout": 0.0, "rslora": False}
    return [
        (ModuleEntry(p, {}, *known[p]), Part(LoRAConfig, pair, fields, many, float(many), order=3))
        for p, pair in pairs.items()
    ]
