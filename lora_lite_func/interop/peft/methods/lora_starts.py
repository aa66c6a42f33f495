"""LoRA files that depend on the base weight: what PEFT takes out of it, and DoRA's magnitudes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ....core import random
from ....core.config import AdapterConfig
from ....core.errors import CheckpointError, short_repr
from ....core.method import site_for
from ....core.registry import variant_for
from ....variants import DoRAConfig, KaSAConfig, MiCAConfig, OLoRAConfig, PiSSAConfig
from ...assembly import ModuleEntry, Part
from ...metadata import ConfigReader

__all__ = ["first_leaves", "magnitudes", "minor_directions", "rewrites_base", "subtracted_start"]

_HARMLESS = ("true", "false", "none", "gaussian", "orthogonal", "eva", "mica")
_CONFIGS = {"pissa": PiSSAConfig, "olora": OLoRAConfig}


def rewrites_base(reader: ConfigReader) -> bool:
    """Tell whether PEFT takes this file's start out of the base weights as it loads the file."""
    return _start(reader) in _CONFIGS or bool(reader.get("kasa_config"))


def _start(reader: ConfigReader) -> str:
    """Return the start's name in lower case, because PEFT takes some names in any case."""
    return str(reader.get("init_lora_weights", True)).lower()


def minor_directions(
    reader: ConfigReader,
    entry: ModuleEntry,
    held: Mapping[str, Tensor],
    leaves: dict[str, Tensor],
    fields: dict[str, Any],
    r: int,
    scale: float,
) -> Part | None:
    """Return the part of a method about the minor singular directions of the weight: MiCA, whose B
    is frozen, or KaSA, which takes them out of the weight.

    Raises:
        CheckpointError: KaSA with something that it has no form with.
    """
    if not reader.get("kasa_config"):
        frozen_B = _start(reader) == "mica" and entry.kind in ("linear", "embedding")
        return Part(MiCAConfig, leaves, fields, r, scale * r) if frozen_B else None
    for name in ("use_dora", "lora_dropout"):
        if reader.get(name):
            raise CheckpointError(
                f"{reader.where}: {name} with kasa_config isn't read"
                + ("; read it with ignore=('lora_dropout',)" if name == "lora_dropout" else "")
            )
    if entry.kind != "linear":
        raise CheckpointError(
            f"{reader.where}: kasa_config has no meaning for {short_repr(entry.path)}, a "
            f"{entry.kind}"
        )
    dropped = first_leaves(entry, KaSAConfig(r=r, alpha=scale * r), "KaSA")
    said = ConfigReader(reader["kasa_config"], f"{reader.where}: kasa_config")
    weights = {"beta": said.number("beta", 1e-4), "gamma": said.number("gamma", 1e-3)}
    own = {**leaves, "lora_d": held["lora_diag"], **dropped}
    return Part(KaSAConfig, own, weights, r, scale * r)


def first_leaves(entry: ModuleEntry, cfg: AdapterConfig, method: str) -> Mapping[str, Tensor]:
    """Return the tensors that a method's start takes from the base weight.

    Raises:
        ModelNeededError: no model was given.
    """
    site = entry.known(f"{method} starts from the base weight")
    weight, variant = entry.weight(method), variant_for(type(cfg))
    here = site_for(variant, cfg, dataclasses.replace(site, r=cfg.r, alpha=cfg.alpha), {})
    assert variant.init is not None
    specs = variant.param_specs(cfg, here)
    draw = partial(random.generator, 0, entry.path)
    return variant.init(cfg, here, specs, weight, None, draw)


def subtracted_start(
    reader: ConfigReader,
    entry: ModuleEntry,
    leaves: dict[str, Tensor],
    fields: dict[str, Any],
    r: int,
    scale: float,
) -> Part | None:
    """Return the part of a start that PEFT takes out of the base weight. The result is None for
    starts that leave the weight alone, as all of them do with an embedding.

    Raises:
        CheckpointError: a start that the file doesn't hold, or that isn't read here.
    """
    start = _start(reader)
    if entry.kind == "embedding" or start in _HARMLESS:
        return None
    config = _CONFIGS.get(start)
    if config is None:
        raise CheckpointError(
            f"{reader.where}: init_lora_weights={short_repr(start)} changes the base weights by "
            f"something the file doesn't hold; save it in "
            "PEFT with path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        )
    if reader.flag("use_dora"):
        raise CheckpointError(
            f"{reader.where}: use_dora with init_lora_weights={short_repr(start)} isn't read; "
            f"convert it to a plain LoRA in PEFT"
        )
    if entry.kind != "linear":
        raise CheckpointError(
            f"{reader.where}: init_lora_weights={short_repr(start)} has no meaning for "
            f"{short_repr(entry.path)}, a {entry.kind}"
        )
    first = first_leaves(entry, config(r=r, alpha=scale * r), start)
    wide = torch.promote_types(leaves["lora_A"].dtype, torch.float32)
    frozen = {name: first[name].to(wide) for name in ("lora_A0", "lora_B0")}
    trained = {name: t.to(wide) for name, t in leaves.items()}
    return Part(config, trained | frozen, fields, r, scale * r)


def magnitudes(
    entry: ModuleEntry,
    held: Mapping[str, Tensor],
    leaves: dict[str, Tensor],
    fields: dict[str, Any],
    r: int,
    scale: float,
) -> tuple[Part, Tensor]:
    """Return the DoRA of a pair, and what its magnitudes multiply the rows of the update by,
    (d_out,).

    Raises:
        CheckpointError: use_dora is set and there are no magnitudes.
    """
    if "lora_magnitude_vector" not in held:
        raise CheckpointError(
            f"{short_repr(entry.path)}: use_dora is set, but there is no lora_magnitude_vector"
        )
    m = held["lora_magnitude_vector"].flatten()  # a convolution has (1, d_out, 1, ...)
    W = entry.weight("DoRA")
    dora = {**leaves, "lora_m": m, "lora_wnorm2": W.square().sum(1)}
    norm = torch.addmm(W, leaves["lora_B"].to(W), leaves["lora_A"].to(W), alpha=scale).norm(dim=1)
    return Part(DoRAConfig, dora, fields, r, scale * r), m / norm
