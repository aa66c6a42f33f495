"""to_peft: adapters as a folder that PEFT loads. PEFT itself isn't needed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...algebra.flatten import Adapters, flatten
from ...core.adapter import Adapter
from ...core.errors import CheckpointError, UnsupportedError
from ...core.site import Site
from ...injection.bound import base_modules, underneath
from ...io.swapping import swapped
from ...io.writing import own_copies, write_safetensors, write_text
from ...variants import BitFitConfig, FullConfig, TokensConfig
from .codec import Codec, Written
from .extras_write import Values, biases, copies, whole
from .folder import CONFIG, TENSORS
from .keys import KeyMap, key_map
from .methods import LORA, METHODS, TOKENS
from .methods.lora_write import is_pair
from .methods.tensor_names import shifts_of
from .token_rows import tied_tables, written_rows
from .whole_model import of_whole_model_keys
from .write_checks import check_whole, checked_sites
from .write_fields import about_base, ranks_and_alphas, targeted, targets

__all__ = ["peft_form", "to_peft", "write_form"]


def to_peft(
    params: Adapters,
    model: nn.Module | None,
    folder: str | os.PathLike[str],
    *,
    as_lora: bool = False,
) -> None:
    """Write an adapter, or several of one method on different layers, as a PEFT folder with
    adapter_config.json and adapter_model.safetensors.

    Methods with `low_rank_factors` of which PEFT has no form become the plain LoRA that they are;
    those with a subtracted start (PiSSA, OLoRA, MiLoRA, DeLoRA) have twice the rank. A BitFit
    beside another adapter becomes a LoRA's lora_bias or a learned bias, a FullConfig's parameters
    become modules_to_save, and a TokensConfig's rows become trainable tokens. Scales are written so
    that PEFT's outputs are ours.

    Args:
        params: the adapter, or a tuple, list or dict of them.
        model: the base it was made for. With None, nothing checks that the names mean its modules
            and no others.
        folder: where to write; it is made if it isn't there. The two files in it are replaced
            together: an interruption leaves the old adapter, the new one, or a folder that isn't
            read.
        as_lora: whether to write VeRA as the LoRA that it amounts to. PEFT has one pair of
            projections for every layer, so layers of unlike shapes give a VeRA file more
            directions.

    Raises:
        UnsupportedError: PEFT has no form for the method, a setting or a mixture.
        CheckpointError: `params` is a part of a partition or a stack, or the folder can't be
            written.
    """
    form = peft_form(params, model, as_lora=as_lora, structured=not as_lora)
    with swapped(folder, "to_peft", marker=CONFIG) as work:
        write_form(form, work, "to_peft")


Form = tuple[dict[str, Any], dict[str, Tensor]]
"""The fields of adapter_config.json, and the tensors by PEFT's keys."""


def write_form(form: Form, folder: Path, what: str) -> None:
    """Write the two files of a PEFT folder.

    Raises:
        CheckpointError: they can't be written. The message begins with `what`.
    """
    fields, tensors = form
    write_safetensors(tensors, folder / TENSORS, {"format": "pt"}, what)
    write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", folder / CONFIG, what)


def peft_form(
    params: Adapters,
    model: nn.Module | None,
    *,
    as_lora: bool = False,
    structured: bool = False,
) -> Form:
    """Return (the fields of adapter_config.json, the tensors by PEFT's keys) of adapters, for
    `to_peft` and for files that share its form. Without `structured` a LoRA is whole factors.

    Raises:
        UnsupportedError, CheckpointError: as `to_peft`.
    """
    parts = flatten(params, everywhere=False)
    adapters = [adapter for adapter, _ in parts]
    if any(plan is not None for _, plan in parts):
        raise CheckpointError(
            "to_peft: these are rows of a stack; write its members (ll.unstack) one by one"
        )
    if model is not None and not isinstance(model, nn.Module):
        raise CheckpointError(
            f"to_peft: expected the base, an nn.Module, found {type(model).__name__}"
        )
    check_whole(adapters)
    turned = next(
        (
            path
            for a in adapters
            for path, site in a.sites.items()
            if site.kind == "conv" and site.transposed
        ),
        None,
    )
    if turned is not None:
        raise UnsupportedError(
            f"to_peft: {turned!r}: PEFT has no adapter of a transposed convolution; merge it "
            f"(ll.merge)"
        )
    fields, tensors = _folder(
        adapters,
        {} if model is None else dict(base_modules(model)),
        as_lora,
        structured,
    )
    return about_base(model) | fields, own_copies(tensors)


def _folder(
    every: list[Adapter], modules: Mapping[str, Any], as_lora: bool, structured: bool
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the fields of the config, and the tensors by their keys."""
    full, frozen = _trained_whole(every, modules)
    rows = [a for a in every if isinstance(a.config, TokensConfig)]
    adapters = [a for a in every if not isinstance(a.config, (FullConfig, TokensConfig))]
    method = _method(adapters, as_lora) if adapters or not rows else TOKENS
    low, shifts = _shifts_apart(adapters, method)
    sites = checked_sites(low, method, modules)
    layers = {path: underneath(module) for path, module in modules.items()}
    if shifts and method.takes_shifts is not None and method.takes_shifts(low, shifts, modules):
        made, shifts = method.write(adapters, layers), {}
    else:
        made = method.write(low, layers)
    if structured and method.structure is not None:
        method.structure(low, made, modules)
    fields, tensors, keys = _own(method, made, sites, modules)
    saved, kept = whole(full, modules, [*sites, *(p for a in rows for p in a)])
    tensors |= {f"base_model.model.{key}": t for key, t in kept.items()}
    if shifts:
        if not method.biased:
            raise UnsupportedError(
                f"to_peft: {next(iter(shifts))!r}: PEFT's {method.peft_type} has no learned "
                f"biases; write a folder for each"
            )
        if method.bias_gain is not None:
            shifts = {
                p: t / method.bias_gain(made.tensors[p]).to(t) if p in made.tensors else t
                for p, t in shifts.items()
            }
        kind, learned = biases(shifts, modules, keys, sites, saved)
        fields["bias"] = "all" if kind == "all" else method.biased
        tensors |= {f"base_model.model.{key}": t for key, t in learned.items()}
    wrapped: dict[str, str] = {}
    if rows:
        more, wrapped = _replaced(rows, method, modules, keys, tensors)
        fields |= more
    held = copies(frozen, modules, keys, wrapped)
    tensors |= {f"base_model.model.{key}": t for key, t in held.items()}
    if not method.keeps_modules and saved:
        raise UnsupportedError(
            f"to_peft: {saved[0]!r}: PEFT keeps no whole modules beside replaced rows alone; "
            f"write a folder for each"
        )
    if method.of_whole_model:
        tensors = of_whole_model_keys(tensors)
    return {"modules_to_save": saved or None} | fields if method.keeps_modules else fields, tensors


def _own(
    method: Codec, made: Written, sites: Mapping[str, Site], modules: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor], KeyMap]:
    """Return the fields and tensors of the method itself, and where its sites go in the file."""
    fields = {"peft_type": method.peft_type} | made.fields
    tensors = {f"base_model.{name}": t for name, t in made.shared.items()}
    if method.of_whole_model:
        return fields, {s: t for held in made.tensors.values() for s, t in held.items()}, KeyMap()
    keys = key_map({p: sites.get(p) or Site(p, 1, 1) for p in made.tensors}, modules, method)
    fields |= ranks_and_alphas(method, made, keys)
    if not method.names_ending:
        fields |= targeted(made, keys, modules, fields.get("feedforward_modules"))
    tensors |= {
        f"base_model.model.{keys.key(p)}.{s}": t
        for p, held in made.tensors.items()
        for s, t in held.items()
    }
    return fields, tensors, keys


def _trained_whole(every: list[Adapter], modules: Mapping[str, Any]) -> tuple[Values, Values]:
    """Return (what goes with copies of its modules, what stands for the base's parameters
    alone).
    """
    full = [a for a in every if isinstance(a.config, FullConfig)]
    values = {path: (a.sites[path], held["lora_W"]) for a in full for path, held in a.items()}
    frozen = {path for a in full if a.config.frozen for path in a}  # type: ignore[attr-defined]
    parents = {path.rpartition(".")[0] for path in values if path not in frozen}
    for path in frozen:  # a norm's statistics go with the norm
        parent, _, name = path.rpartition(".")
        if parent in modules and name in modules[parent]._buffers:
            parents.add(parent)
    alone = {path for path in frozen if path.rpartition(".")[0] not in parents}
    return (
        {path: value for path, value in values.items() if path not in alone},
        {path: value for path, value in values.items() if path in alone},
    )


def _shifts_apart(
    adapters: list[Adapter], method: Codec
) -> tuple[list[Adapter], dict[str, Tensor]]:
    """Return (the method's own adapters, {path: shift} of the BitFits beside them)."""
    if BitFitConfig in method.configs:
        return adapters, {}
    own = [a for a in adapters if not isinstance(a.config, BitFitConfig)]
    return own, shifts_of(adapters)


def _replaced(
    rows: list[Adapter],
    method: Codec,
    modules: Mapping[str, Any],
    keys: KeyMap,
    tensors: dict[str, Tensor],
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return (the fields that say which rows of tables are replaced, {path of a module: the wrapper
    around it}), and put the rows beside the other tensors.
    """
    ids, held = written_rows(rows, modules, every_place=not method.token_prefix)
    if method.token_prefix is None:
        raise UnsupportedError(
            f"to_peft: {next(iter(ids))!r}: PEFT replaces rows beside a LoRA alone; write a "
            f"folder for each"
        )
    tensors |= {
        f"base_model.model.{keys.inside(p)}.{method.token_prefix}trainable_tokens_delta": t
        for p, t in held.items()
    }
    wrapper = f".{method.token_prefix}base_layer"
    places = {parent for path in ids for parent in tied_tables(path, modules)}
    if method.token_prefix:
        return {"trainable_token_indices": ids}, dict.fromkeys(places, wrapper)
    first, *others = ids.values()
    if any(other != first for other in others):
        raise UnsupportedError(
            "to_peft: one file of trainable tokens has one list of ids for all tables; write a "
            "folder for each"
        )
    fields = {"token_indices": first, "target_modules": targets(list(ids), modules)}
    return fields, dict.fromkeys(places, wrapper)


def _method(adapters: list[Adapter], as_lora: bool) -> Codec:
    """Return the one form for these adapters. It is that of their method, beside which biases may
    be learned, or else a LoRA.

    Raises:
        UnsupportedError: there is none.
    """
    configs = {type(a.config) for a in adapters}
    own = [a for a in adapters if not isinstance(a.config, BitFitConfig)] or adapters
    named = next((m for m in METHODS.values() if all(m.is_for(a) for a in own)), None)
    convertible = all(is_pair(a) for a in adapters)
    if as_lora or (convertible and (named is None or len(configs) > 1)):
        return LORA
    if named is None:
        names = ", ".join(sorted(a.layout.variant.name for a in adapters))
        raise UnsupportedError(
            f"to_peft: PEFT has no one form for {names}; merge it (ll.merge), or write a folder "
            f"for each"
        )
    return named
