"""to_peft: adapters as a folder that PEFT, and what reads PEFT's files, loads. PEFT itself isn't needed."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import ABSENT, Adapter
from ..api import Adapters, flatten
from ..errors import CheckpointError, UnsupportedError, shown
from ..files import write_safetensors, write_text
from ..kinds import restored
from ..spec import Site
from ..variants import BitFitConfig, DeLoRAConfig, FullConfig
from .folder import CONFIG, TENSORS
from .gates import BEFT
from .lora import LORA
from .method import Method, Written
from .table import METHODS

__all__ = ["to_peft"]

_VERSION = "0.17.0"  # the release whose loader the layout is written for; newer ones read it


def to_peft(params: Adapters, model: nn.Module | None, folder: str | os.PathLike[str], *, as_lora: bool = False) -> None:
    """Write an adapter (or several of one method on different layers) as a PEFT folder: adapter_config.json, adapter_model.safetensors.

    Rewritten-weight methods (PiSSA, OLoRA, CorDA, ASVD, LoRA-GA) and DeLoRA with a subtracted start become the plain LoRA of twice the
    rank that they are; a BitFit beside a LoRA becomes its lora_bias. Scales are written so that PEFT's outputs are ours.

    Args:
        params: the adapter, or a tuple, list or dict of them.
        model: the base it was made for; None leaves unchecked that the names mean its modules and no others.
        folder: made if it isn't there; the two files in it are replaced.
        as_lora: write VeRA as the LoRA that it amounts to (PEFT's own form has the same projections for every layer).

    Raises:
        UnsupportedError: the method, a setting or a mixture that PEFT has no form for.
        CheckpointError: a part of a partition, a stack, or the folder can't be written.
    """
    parts = flatten(params)
    adapters = [adapter for adapter, _ in parts]
    if any(plan is not None for _, plan in parts):
        raise CheckpointError("to_peft: these are rows of a stack; write its members (ll.unstack) one by one")
    if model is not None and not isinstance(model, nn.Module):
        raise CheckpointError(f"to_peft: expected the base, an nn.Module, found {type(model).__name__}")
    _check(adapters)
    whole = {path: (a.sites[path], held["lora_W"]) for a in adapters if isinstance(a.config, FullConfig) for path, held in a.items()}
    adapters = [a for a in adapters if not isinstance(a.config, FullConfig)]
    method = _method(adapters, as_lora)
    modules = {} if model is None else dict(model.named_modules(remove_duplicate=False))
    paths = [path for a in adapters for path in a if not isinstance(a.config, BitFitConfig) or method is BEFT]
    for path in paths:
        if model is not None and path not in modules:
            raise CheckpointError(f"to_peft: {type(model).__name__} has no module {shown(path)}")
    turned = next((path for a in adapters for path, site in a.sites.items() if site.kind == "conv" and site.transposed), None)
    if turned is not None:
        raise UnsupportedError(f"to_peft: {turned!r}: PEFT has no adapter of a transposed convolution; merge it (ll.merge)")
    if len(set(paths)) != len(paths):
        twice = next(p for p, n in Counter(paths).items() if n > 1)
        raise UnsupportedError(
            f"to_peft: {twice!r} has two adapters; PEFT keeps one per folder. Write a folder for each, or merge one first"
        )
    made = method.write(adapters, modules)
    fields = _about(model) | {"peft_type": method.peft_type} | made.fields | _numbers(method, made, modules)
    forward = fields.get("feedforward_modules")
    fields["target_modules"] = _targets(list(made.tensors), modules or made.tensors, forward)
    if forward:
        fields["feedforward_modules"] = _forward(forward, fields["target_modules"])
    saved = _saved(whole, modules)
    fields["modules_to_save"] = sorted({key.rpartition(".")[0] for key in saved}) or None
    target = Path(os.fsdecode(folder))
    try:
        target.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"to_peft: can't make {target}: {error}") from error
    write_safetensors(_flat(made, saved), target / TENSORS, {"format": "pt"}, "to_peft")
    write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", target / CONFIG, "to_peft")


def _check(adapters: list[Adapter]) -> None:
    if all(isinstance(a.config, FullConfig) for a in adapters):
        raise CheckpointError("to_peft: expected an adapter, found none")
    for a in adapters:
        for path, held in a._data.items():
            for name, t in held.items():
                if t is ABSENT or not isinstance(t, Tensor) or tuple(t.shape) != a.layout.expected[path][name]:
                    raise CheckpointError(
                        f"to_peft: {path!r} {name}: expected a tensor of shape {a.layout.expected[path][name]}; write a whole adapter, "
                        "not a part of a partition, and a stack's members (ll.unstack) one by one"
                    )


def _method(adapters: list[Adapter], as_lora: bool) -> Method:
    configs = {type(a.config) for a in adapters}
    subtracted = any(isinstance(a.config, DeLoRAConfig) and a.config.init == "subtract" for a in adapters)
    if as_lora or subtracted or (len(configs) > 1 and configs <= {*LORA.configs}):
        return LORA
    for method in METHODS.values():
        if configs <= set(method.configs) and not (method is LORA and configs <= {BitFitConfig, DeLoRAConfig}):
            return method
    names = ", ".join(sorted(a.layout.variant.name for a in adapters))
    raise UnsupportedError(f"to_peft: PEFT has no one form for {names}; merge it (ll.merge), or write a folder for each")


def _about(model: nn.Module | None) -> dict[str, Any]:
    name = getattr(getattr(model, "config", None), "_name_or_path", None) or getattr(model, "name_or_path", None)
    origin = None if name else {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    fixed = {"auto_mapping": origin, "revision": None, "task_type": None, "inference_mode": True, "peft_version": _VERSION}
    return fixed | {"base_model_name_or_path": name if isinstance(name, str) else None, "modules_to_save": None}


def _numbers(method: Method, made: Written, modules: Mapping[str, Any]) -> dict[str, Any]:
    """Ranks and alphas: the commonest as the default, the others as patterns of whole paths."""
    fields: dict[str, Any] = {}
    pairs: tuple[tuple[str, str, Mapping[str, float]], ...] = (
        (method.rank, "rank_pattern", made.ranks),
        ("alpha" if method.peft_type in ("LOHA", "LOKR") else method.alpha, "alpha_pattern", made.alphas),
    )
    for name, pattern, values in pairs:
        if values:
            every = list(values.values())
            common = max(dict.fromkeys(every), key=every.count)
            fields[name] = common
            fields[pattern] = {"^" + re.escape(path): value for path, value in values.items() if value != common}
    return fields


def _targets(paths: list[str], modules: Mapping[str, Any], forward: list[str] | None = None) -> Any:
    """The shortest list that names these modules and no others: last names, else whole paths, else a pattern.

    With IA3's feed-forward modules, which PEFT finds by any ending, those must be told apart by the same names.
    """
    for names in (sorted({p.rpartition(".")[2] for p in paths}), sorted(paths)):
        if {m for m in modules if _named(m, names)} == set(paths):
            chosen = _forward(forward or [], names)
            if {p for p in paths if any(p.endswith(n) for n in chosen)} == set(forward or []):
                return names
    return rf"(?:{'|'.join(map(re.escape, sorted(paths)))})"


def _named(path: str, names: list[str]) -> bool:
    return any(path == n or path.endswith("." + n) for n in names)


def _forward(forward: list[str], targets: Any) -> Any:
    """IA3's feed-forward modules in the terms of the targets."""
    if isinstance(targets, str):
        return rf"(?:{'|'.join(map(re.escape, sorted(forward)))})"
    return [n for n in targets if any(_named(p, [n]) for p in forward)]


def _saved(whole: Mapping[str, tuple[Site, Tensor]], modules: Mapping[str, Any]) -> dict[str, Tensor]:
    """Parameters that were trained whole, with the rest of their modules: PEFT keeps copies of modules (modules_to_save)."""
    saved: dict[str, Tensor] = {}
    for path, (site, W) in whole.items():
        home, _, name = path.rpartition(".")
        if home not in modules or modules[home]._modules:
            raise UnsupportedError(f"to_peft: {path!r}: PEFT keeps copies of whole modules without children, in the base model given")
        saved |= {f"{home}.{n}": t.detach() for n, t in modules[home].state_dict().items() if f"{home}.{n}" not in whole}
        saved[path] = restored(W, modules[home]._parameters[name].detach().to(W.dtype), site)
    return saved


def _flat(made: Written, saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    flat = {f"base_model.model.{path}": t for path, t in saved.items()}
    flat |= {f"base_model.{name}": t for name, t in made.shared.items()}
    for path, held in made.tensors.items():
        flat |= {f"base_model.model.{path}.{suffix}": t for suffix, t in held.items()}
    return {key: t.detach().to("cpu").clone(memory_format=torch.contiguous_format) for key, t in flat.items()}
