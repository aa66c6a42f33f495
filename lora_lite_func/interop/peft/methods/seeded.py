"""PEFT's methods with frozen random parts: VeRA, RandLoRA (shared by all modules), FourierFT (from a seed), SHiRA (saved places)."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ....core.adapter import Adapter
from ....core.errors import CheckpointError, UnsupportedError, short_repr
from ....variants import FourierFTConfig, RandLoRAConfig, SHiRAConfig, VeRAConfig
from ...assembly import ModuleEntry, Part
from ...metadata import ConfigReader
from ..codec import Codec, Written, of_config, ranks, same
from .updates import patterned

_LARGEST = 2**31  # entries of a weight that a permutation is drawn for


def _shared(reader: ConfigReader, entry: ModuleEntry, name: str) -> Tensor:
    if name not in entry.shared:
        raise CheckpointError(
            f"{reader.where}: no {name} among its tensors (save_projection=false): PEFT draws it "
            f"again from the sizes of all targets; "
            "save it in PEFT with save_projection=True"
        )
    return entry.shared[name]


def _sliced(t: Tensor, name: str, *sizes: int) -> Tensor:
    """The leading corner of these sizes."""
    if t.ndim != len(sizes) or any(n < size for n, size in zip(t.shape, sizes, strict=True)):
        raise CheckpointError(f"{name}: expected at least {sizes}, found {tuple(t.shape)}")
    return t[tuple(slice(size) for size in sizes)].contiguous()


def _joined(parts: Sequence[Tensor], name: str, way_out: str, least: Sequence[int] = ()) -> Tensor:
    """The smallest tensor, `least` or larger, that all parts are leading corners of.

    Raises:
        UnsupportedError: they disagree where they overlap.
    """
    shapes = [p.shape for p in parts] + ([least] if least else [])
    whole = torch.zeros([max(sizes) for sizes in zip(*shapes, strict=True)], dtype=parts[0].dtype)
    for part in sorted(parts, key=torch.numel):
        whole[tuple(slice(n) for n in part.shape)] = part.to(whole)
    for part in parts:
        if not torch.equal(whole[tuple(slice(n) for n in part.shape)], part.to(whole)):
            raise UnsupportedError(
                f"to_peft: PEFT has one {name} for all modules, and these differ by shape; "
                f"{way_out}"
            )
    return whole


# --------------------------------------------------------------------------------------------- VeRA
def _read_vera(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """vera_lambda_b (d_out,), vera_lambda_d (r,); corners of the shared vera_A (r, most), vera_B
    (most, r).
    """
    site, b, d = (
        entry.known("VeRA has a vector per output alone"),
        held["vera_lambda_b"],
        held["vera_lambda_d"],
    )
    r = d.shape[0]
    leaves = {
        "lora_vera_b": b,
        "lora_vera_d": d,
        "lora_vera_A": _sliced(_shared(reader, entry, "vera_A"), "vera_A", r, site.d_in),
        "lora_vera_B": _sliced(_shared(reader, entry, "vera_B"), "vera_B", site.d_out, r),
    }
    return [Part(VeRAConfig, leaves, {"dropout": reader.number("vera_dropout", 0.0)}, r)]


def _write_vera(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    """PEFT has one pair of projections for all modules: unlike ones lie side by side in it, as more
        directions, and a module's
    vera_lambda_d is zero in those that aren't its own.
    """
    said = of_config(adapters, "dropout", method="VeRA")
    held = {path: h for a in adapters for path, h in a.items()}
    groups: list[list[str]] = []
    for path, h in held.items():
        alike = next((g for g in groups if all(_overlap(h, held[p]) for p in g)), None)
        groups.append([path]) if alike is None else alike.append(path)
    pairs = [
        [
            _joined([held[p][f"lora_vera_{n}"] for p in g], f"vera_{n}", "write two folders")
            for n in "AB"
        ]
        for g in groups
    ]
    ranks_ = [A.shape[0] for A, _ in pairs]
    d_in, d_out = max(A.shape[1] for A, _ in pairs), max(B.shape[0] for _, B in pairs)
    shared = {
        "vera_A": torch.cat([F.pad(A, (0, d_in - A.shape[1])) for A, _ in pairs]),
        "vera_B": torch.cat([F.pad(B, (0, 0, 0, d_out - B.shape[0])) for _, B in pairs], dim=1),
    }
    tensors, r = {}, sum(ranks_)
    for i, group in enumerate(groups):
        before = sum(ranks_[:i])
        for path in group:
            d = F.pad(held[path]["lora_vera_d"], (before, r - before - ranks_[i]))
            tensors[path] = {"vera_lambda_b": held[path]["lora_vera_b"], "vera_lambda_d": d}
    return Written(
        {"r": r, "vera_dropout": said["dropout"], "save_projection": True}, tensors, shared
    )


def _overlap(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    """Whether two modules' projections can be corners of one pair."""
    for name in ("lora_vera_A", "lora_vera_B"):
        t, u = one[name], two[name]
        corner = tuple(slice(min(sizes)) for sizes in zip(t.shape, u.shape, strict=True))
        if not torch.equal(t[corner], u[corner].to(t)):
            return False
    return one["lora_vera_d"].shape == two["lora_vera_d"].shape


# ----------------------------------------------------------------------------------------- RandLoRA
def _read_randlora(
    reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]
) -> list[Part]:
    """randlora_lambda (r, N), randlora_gamma (N, small); corners of the shared randlora_A (r, 1,
    small), randlora_B (large, N, r).

    PEFT pairs the columns of B, flattened map by map, with the rows of A, flattened direction by
    direction; ours are paired as the paper has them, so the columns move.
    """
    site, scales = entry.known("RandLoRA's sides depend on both sizes"), held["randlora_gamma"]
    small, large = sorted((site.d_in, site.d_out))
    n, r = scales.shape[0], held["randlora_lambda"].shape[0]
    shared = {
        **entry.shared,
        **{k: t for k, t in held.items() if k in ("randlora_A", "randlora_B")},
    }
    entry = ModuleEntry(entry.path, shared, entry.site, entry.module)
    A = _sliced(_shared(reader, entry, "randlora_A"), "randlora_A", r, 1, small)[:, 0]
    B = _sliced(_shared(reader, entry, "randlora_B"), "randlora_B", large, n, r)
    paired = B.flatten(1).unflatten(1, (r, n)).transpose(1, 2)
    leaves = {
        "lora_lambda": held["randlora_lambda"],
        "lora_gamma": scales,
        "lora_rand_A": A,
        "lora_rand_B": paired,
    }
    fields = {"dropout": reader.number("randlora_dropout", 0.0)}
    return [Part(RandLoRAConfig, leaves, fields, r, reader.number("randlora_alpha", 640))]


def _write_randlora(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    said, (r, alpha) = of_config(adapters, "dropout", method="RandLoRA"), ranks(adapters)
    if len(set(r.values())) != 1 or len(set(alpha.values())) != 1:
        raise UnsupportedError(
            "to_peft: one RandLoRA file has one r and one alpha; write a folder for each"
        )
    held = [h for a in adapters for h in a.values()]
    maps = [
        h["lora_rand_B"].transpose(1, 2).flatten(1).unflatten(1, h["lora_rand_B"].shape[1:])
        for h in held
    ]
    way_out, rank = "write a folder for each shape, or merge", next(iter(r.values()))
    most = [
        max(sizes)
        for sizes in zip(
            *((s.d_in, s.d_out) for a in adapters for s in a.sites.values()), strict=True
        )
    ]
    least_A, least_B = (
        (rank, 1, min(most)),
        (max(most), -(-min(most) // rank), rank),
    )  # as PEFT sizes them: each side's largest
    shared = {
        "randlora_A": _joined(
            [h["lora_rand_A"][:, None] for h in held], "randlora_A", way_out, least_A
        ),
        "randlora_B": _joined(maps, "randlora_B", way_out, least_B),
    }
    tensors = same(adapters, lora_lambda="randlora_lambda", lora_gamma="randlora_gamma")
    for each in tensors.values():
        each |= {
            name: t.clone() for name, t in shared.items()
        }  # PEFT expects them again under every module
    fields = {
        "r": rank,
        "randlora_alpha": next(iter(alpha.values())),
        "randlora_dropout": said["dropout"],
    }
    return Written(fields | {"save_projection": True}, tensors, shared)


# ---------------------------------------------------------------------------------------- FourierFT
@functools.lru_cache(maxsize=4)
def _frequencies(seed: int, n: int, d_out: int, d_in: int) -> Tensor:
    """PEFT's frequencies: the first n of a seeded permutation of all entries, as (2, n) rows and
    columns.
    """
    flat = torch.randperm(
        d_out * d_in, generator=torch.Generator("cpu").manual_seed(seed), device="cpu"
    )[:n]
    return torch.stack([flat // d_in, flat % d_in]).to(torch.float64)


def _read_fourierft(
    reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]
) -> list[Part]:
    """fourierft_spectrum (n,), at frequencies drawn from random_loc_seed."""
    site, c = entry.known("FourierFT has coefficients alone"), held["fourierft_spectrum"]
    if site.d_out * site.d_in > _LARGEST:
        raise CheckpointError(
            f"{short_repr(entry.path)}: FourierFT permutes all entries of a weight, {site.d_out} "
            f"x {site.d_in} are too many"
        )
    seed = reader.whole("random_loc_seed", 777, 0)
    entries = _frequencies(seed, c.shape[0], site.d_out, site.d_in)
    fields = {"n_frequency": c.shape[0], "projection_seed": seed}
    return [
        Part(
            FourierFTConfig,
            {"lora_c": c, "lora_idx": entries},
            fields,
            alpha=reader.number("scaling", 150.0),
        )
    ]


def _write_fourierft(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    alpha = next(iter(ranks(adapters)[1].values()))
    if not alpha:
        raise UnsupportedError(
            "to_peft: a FourierFT of alpha=0 has no coefficients in PEFT; give it another alpha"
        )
    seeds = [777, *dict.fromkeys(a.config.projection_seed for a in adapters)]  # type: ignore[attr-defined]
    counts = {path: a.config.n_frequency for a in adapters for path in a}  # type: ignore[attr-defined]
    seed = next((s for s in seeds if all(_drawn_from(s, a) for a in adapters)), None)
    if seed is None:
        raise UnsupportedError(
            "to_peft: PEFT draws FourierFT's frequencies from its own seed, and these were drawn "
            "otherwise; only adapters that came from "
            "PEFT go back; merge this one (ll.merge) instead"
        )
    tensors = {
        p: {"fourierft_spectrum": h["lora_c"] * (a.sites[p].alpha / alpha)}
        for a in adapters
        for p, h in a.items()
    }
    common, rest = patterned(counts, "FourierFT's n_frequency_pattern")
    return Written(
        {
            "n_frequency": common,
            "n_frequency_pattern": rest,
            "scaling": alpha,
            "random_loc_seed": seed,
        },
        tensors,
    )


def _drawn_from(seed: int, adapter: Adapter) -> bool:
    sites = adapter.sites
    return all(
        torch.equal(
            h["lora_idx"].double().cpu(),
            _frequencies(seed, h["lora_idx"].shape[1], sites[p].d_out, sites[p].d_in),
        )
        for p, h in adapter.items()
    )


# -------------------------------------------------------------------------------------------- SHiRA
def _read_shira(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """shira_weight (n,), shira_indices (2, n): rows, columns."""
    site = entry.known("SHiRA has entries of the weight alone")
    r, where = reader.whole("r", 32), held["shira_indices"]
    size = torch.tensor([site.d_out, site.d_in])
    if (
        where.ndim != 2
        or where.shape[0] != 2
        or bool(((where < 0) | (where >= size[:, None])).any())
    ):
        raise CheckpointError(
            f"{short_repr(entry.path)}: shira_indices: expected rows and columns within "
            f"{site.d_out} x {site.d_in}"
        )
    return [
        Part(
            SHiRAConfig,
            {"lora_v": held["shira_weight"], "lora_idx": where.to(torch.float64)},
            {"mask": "rand"},
            r,
        )
    ]


def _write_shira(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    r, _ = ranks(adapters)
    for a in adapters:
        for path, site in a.sites.items():
            n = a[path]["lora_v"].shape[0]
            if len(set(r.values())) != 1 or n != site.r * (site.d_in + site.d_out):
                raise UnsupportedError(
                    f"to_peft: {path!r}: PEFT's SHiRA trains r (d_in + d_out) entries with one "
                    f"r, found {n} at r={site.r}; merge it"
                )
    tensors = {
        path: {"shira_weight": h["lora_v"], "shira_indices": h["lora_idx"].to(torch.int32)}
        for a in adapters
        for path, h in a.items()
    }
    return Written({"r": next(iter(r.values())), "mask_type": "random", "random_seed": 0}, tensors)


VERA = Codec(
    "VERA",
    (VeRAConfig,),
    ("vera_lambda_b", "vera_lambda_d"),
    "r vera_dropout save_projection projection_prng_key",
    _read_vera,
    _write_vera,
    shared=("vera_A", "vera_B"),
    ignored="d_initial",
    biased="vera_only",
)
RANDLORA = Codec(
    "RANDLORA",
    (RandLoRAConfig,),
    ("randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B"),
    "r randlora_alpha randlora_dropout save_projection projection_prng_key",
    _read_randlora,
    _write_randlora,
    shared=("randlora_A", "randlora_B"),
    ignored="sparse very_sparse",
    biased="randlora_only",
)
FOURIERFT = Codec(
    "FOURIERFT",
    (FourierFTConfig,),
    ("fourierft_spectrum",),
    "n_frequency n_frequency_pattern scaling random_loc_seed",
    _read_fourierft,
    _write_fourierft,
    biased="fourier_only",
)
SHIRA = Codec(
    "SHIRA",
    (SHiRAConfig,),
    ("shira_weight", "shira_indices"),
    "r mask_type random_seed",
    _read_shira,
    _write_shira,
)
