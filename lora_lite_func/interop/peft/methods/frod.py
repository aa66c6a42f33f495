"""PEFT's FRoD: the weights of a role in a basis that they share, which the file holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ....core.adapter import Adapter
from ....core.errors import CheckpointError, UnsupportedError, short_repr
from ....core.site import Site
from ....variants import FRoDConfig
from ....variants._joint_basis import basis, inverted, strengths
from ...assembly import ModuleEntry, Part
from ...metadata import ConfigReader
from ..codec import Codec, Written
from .config_fields import of_config

__all__ = ["FROD"]

_L, _S = "frod_lambda_l", "frod_lambda_s_values"
_V, _IDX, _SIZE = "frod_V.", "frod_s_indices.", "frod_s_size."
_LEAST = 1e-5  # a direction that the weight maps to less than this part is lost in float32


def _category(path: str) -> str:
    """Return what PEFT calls the modules that share a basis with this one."""
    parts = path.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    if parts[-2:] == ["output", "dense"] and parts[-3:-2] == ["attention"]:
        return "attention_output"
    return f"{parts[-2]}_{parts[-1]}"


def _layer(path: str, otherwise: int) -> int:
    """Return the number of a module's layer, as PEFT tells layers of a category apart."""
    parts = path.split(".")
    behind = parts[parts.index("layers") + 1 :][:1] if "layers" in parts else []
    return next((int(part) for part in [*behind, *parts] if part.isdigit()), otherwise)


def read(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """Read frod_lambda_l (d_in,), the diagonal, and frod_lambda_s_values (n,), with the shared
    frod_V.<category> (d_in, d_in) and frod_s_indices.<category> (2, n).

    Raises:
        CheckpointError: the shared tensors are missing, or the weight maps a direction to nothing.
        ModelNeededError: no model was given.
    """
    W, category = entry.weight("FRoD's diagonal"), _category(entry.path)
    if _V + category not in entry.shared or _IDX + category not in entry.shared:
        raise CheckpointError(
            f"{reader.where}: no {_V}{category} among its tensors (save_projection=false): PEFT "
            f"decomposes the weights of all targets again; save it in PEFT with "
            f"save_projection=True"
        )
    V, places = entry.shared[_V + category], entry.shared[_IDX + category]
    inverse = inverted(V)
    l0 = strengths(W, inverse)
    if not bool((l0 > _LEAST * l0.max()).all()):  # NaN is refused too
        raise CheckpointError(
            f"{short_repr(entry.path)}: its weight maps directions of the basis to nothing but "
            f"rounding, which PEFT trains all the same; merge it in PEFT where it was trained"
        )
    leaves = {
        "lora_lambda": (held[_L].double() - l0).to(held[_L].dtype),
        "lora_s": held[_S],
        "lora_l0": l0.to(V.dtype),
        "lora_idx": places.to(torch.float64),
        "lora_V": V,
        "lora_V_inv": inverse.to(V.dtype),
    }
    return [Part(FRoDConfig, leaves, {"sparse_rate": reader.number("sparse_rate", 0.01)})]


def write(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    """Write frod_lambda_l (d_in,) and frod_lambda_s_values (n,) of each site, and the basis and the
    places of each category.

    Raises:
        ModelNeededError: no model was given.
        UnsupportedError: the adapters differ in a setting, or a basis isn't the one that PEFT finds
            in these layers.
    """
    said = of_config(adapters, "sparse_rate", method="FRoD")
    sites = {path: site for a in adapters for path, site in a.sites.items()}
    held = {path: h for a in adapters for path, h in a.items()}
    roles: dict[str, list[str]] = {}
    for path in (path for path in (modules or held) if path in held):
        roles.setdefault(_category(path), []).append(path)
    shared: dict[str, Tensor] = {}
    for category, paths in roles.items():
        _check_basis(category, [sites[p] for p in paths], held, modules)
        V, places = held[paths[0]]["lora_V"], held[paths[0]]["lora_idx"]
        shared[_V + category] = V
        shared[_IDX + category] = places.long()
        shared[_SIZE + category] = torch.tensor(V.shape)
    tensors = {p: {_L: h["lora_l0"] + h["lora_lambda"], _S: h["lora_s"]} for p, h in held.items()}
    return Written({"sparse_rate": said["sparse_rate"], "save_projection": True}, tensors, shared)


def _check_basis(
    category: str,
    sites: Sequence[Site],
    held: Mapping[str, Mapping[str, Tensor]],
    modules: Mapping[str, Any],
) -> None:
    """Refuse a basis that isn't the one that PEFT would find in these layers: it makes the rest of
    the decomposition by its own as it loads a file.
    """
    numbers = {_layer(site.path, i): site.path for i, site in enumerate(sites)}
    if len(numbers) < len(sites):
        lost = next(site.path for site in sites if site.path not in numbers.values())
        raise UnsupportedError(
            f"to_peft: {lost!r}: PEFT takes another layer of the same name and number for it as it "
            f"decomposes the weights; write a folder for each, or merge it (ll.merge)"
        )
    first = held[sites[0].path]
    if any(not bool(held[s.path]["lora_l0"].all()) for s in sites):
        raise UnsupportedError(
            f"to_peft: {category!r}: its weights map directions of the basis to nothing, of which "
            f"PEFT makes others; merge it (ll.merge) instead"
        )
    weights = [ModuleEntry(s.path, {}, s, modules.get(s.path)).weight("FRoD") for s in sites]
    alike = all(
        torch.equal(held[s.path][name], first[name])
        for s in sites
        for name in ("lora_V", "lora_idx")
    )
    if not alike or (basis(weights) - first["lora_V"].to(weights[0])).abs().max() > 1e-5:
        raise UnsupportedError(
            f"to_peft: {category!r}: PEFT decomposes the weights of all layers of this name "
            f"anew, and finds another basis than this adapter's; merge it (ll.merge) instead"
        )


FROD = Codec(
    peft_type="FROD",
    configs=(FRoDConfig,),
    suffixes=(_L, _S),
    understood="sparse_rate save_projection",
    ignored="regularization_alpha projection_prng_key runtime_offload_base_weight",
    read=read,
    write=write,
    shared=(_V, _IDX, _SIZE),
    biased="frod_only",
    transposed=True,
)
