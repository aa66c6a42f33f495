"""PEFT's additive updates beside LoRA: LoHa, LoKr, AdaLoRA, HiRA, MiSS, GraLoRA, DeLoRA, C3A. The keys and their meaning are at each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ....core.adapter import Adapter
from ....core.errors import CheckpointError, UnsupportedError, short_repr
from ....variants import (
    AdaLoRAConfig,
    C3AConfig,
    DeLoRAConfig,
    GraLoRAConfig,
    HiRAConfig,
    LoHaConfig,
    LoKrConfig,
    MiSSConfig,
)
from ...assembly import ModuleEntry, Part
from ...metadata import ConfigReader
from ..codec import Codec, Written, of_config, ranks, same
from .low_rank import kernel, without_padding

_HADA = {f"lora_w{i}_{side}": f"hada_w{i}_{side}" for i in (1, 2) for side in "ab"}
_LOKR = {f"lora_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")}


def _renamed(held: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    return {ours: held[theirs] for ours, theirs in names.items() if theirs in held}


def _columns_rows(a: str, b: str) -> Any:
    """Sizes of a pair stored as a (r, d_in) and b (d_out, r)."""
    return lambda path, held: (held[a].shape[-1], held[b].shape[0])


# ------------------------------------------------------------------------------------------ LyCORIS
def _read_loha(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """hada_w1_a (d_out, r), hada_w1_b (r, d_in), hada_w2_*: (w1_a w1_b) * (w2_a w2_b) alpha / r."""
    alpha = reader.at("alpha_pattern", entry.path, reader.number("alpha", 8))
    return [Part(LoHaConfig, _renamed(held, _HADA), r=held["hada_w1_b"].shape[0], alpha=alpha)]


def _write_loha(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    of_config(adapters, "dropout", method="LoHa")
    r, alpha = ranks(adapters)
    return Written({}, same(adapters, **_HADA), {}, r, alpha)


def _read_lokr(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """lokr_w1 (l, m) or its factors, lokr_w2 (k, n) or its: kron(w1, w2) alpha / r, also where both
    are full.
    """
    r = int(reader.at("rank_pattern", entry.path, reader.whole("r", 8)))
    alpha = reader.at("alpha_pattern", entry.path, reader.number("alpha", 8))
    leaves = _renamed(held, _LOKR)
    if "lora_w1" in leaves and "lora_w2" in leaves:
        leaves["lora_w1"] = leaves["lora_w1"] * (alpha / r)  # ours has no rank to divide by
    fields = {
        "factor": reader.get("decompose_factor", -1),
        "decompose_both": reader.flag("decompose_both"),
    }
    return [Part(LoKrConfig, leaves, fields, r, alpha)]


def _write_lokr(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    said = of_config(adapters, "factor", "decompose_both", method="LoKr")
    tensors, (r, alpha) = same(adapters, **_LOKR), ranks(adapters)
    for path, held in tensors.items():
        if "lokr_w1" in held and "lokr_w2" in held:
            if not alpha[path]:
                alpha[path] = float(r[path])
            held["lokr_w1"] = held["lokr_w1"] * (r[path] / alpha[path])
    return Written(
        {"decompose_factor": said["factor"], "decompose_both": said["decompose_both"]},
        tensors,
        {},
        r,
        alpha,
    )


def _lokr_sizes(path: str, held: Mapping[str, Tensor]) -> tuple[int, int]:
    def shape(name: str) -> tuple[int, int]:
        full = held.get(name)
        if full is not None:
            return int(full.shape[0]), int(full.shape[1])
        return int(held[f"{name}_a"].shape[0]), int(held[f"{name}_b"].shape[1])

    (l, m), (k, n) = shape("lokr_w1"), shape("lokr_w2")  # noqa: E741
    return m * n, l * k


# ----------------------------------------------------------------------------------------- low rank
def _read_adalora(
    reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]
) -> list[Part]:
    """lora_A (r, d_in), lora_E (r, 1), lora_B (d_out, r): alpha / (init_r + 1e-5) B diag(E) A, r
    what pruning left.
    """
    A, E, B = held["lora_A"], held["lora_E"].flatten(), held["lora_B"]
    r, first = A.shape[0], reader.whole("init_r", 12)
    alpha = reader.number("lora_alpha", 8)
    if r == 0:
        return []  # all of it was pruned: the layer is the base's
    alpha = alpha if alpha > 0 else float(first)
    leaves = {
        "lora_A": A,
        "lora_B": B,
        "lora_E": E * (r / (first + 1e-5)),
    }  # so that our alpha / r is PEFT's scale
    return [Part(AdaLoRAConfig, leaves, {"dropout": reader.number("lora_dropout", 0.0)}, r, alpha)]


def _write_adalora(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    said, (r, alphas) = of_config(adapters, "dropout", method="AdaLoRA"), ranks(adapters)
    first, alpha = max(r.values()), next(iter(alphas.values()))
    if alpha <= 0:
        raise UnsupportedError(
            f"to_peft: PEFT's AdaLoRA takes alpha={alpha} for the rank; scale the adapter and "
            f"give it a positive one"
        )
    tensors = {}
    for a in adapters:
        for (
            path,
            held,
        ) in (
            a.items()
        ):  # a smaller rank is padded: PEFT knows only the first one, and what was pruned from it
            E = held["lora_E"] * ((first + 1e-5) / r[path] * alphas[path] / alpha)
            more = first - r[path]
            A, B = F.pad(held["lora_A"], (0, 0, 0, more)), F.pad(held["lora_B"], (0, more))
            tensors[path] = {"lora_A": A, "lora_E": F.pad(E, (0, more))[:, None], "lora_B": B}
    fields: dict[str, Any] = {
        "init_r": first,
        "r": first,
        "target_r": first,
        "total_step": 1,
        "lora_dropout": said["dropout"],
    }
    return Written(fields | {"lora_alpha": alpha}, tensors)


def _read_hira(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """hira_A (r, d_in), hira_B (d_out, r), of an embedding hira_embedding_*: W * (1 + B A), without
    a scale, so alpha = r.
    """
    table = "hira_embedding_A" in held
    A, B = (held[f"hira_embedding_{n}"] if table else held[f"hira_{n}"] for n in "AB")
    if getattr(entry.module, "groups", 1) != 1:
        raise CheckpointError(
            f"{short_repr(entry.path)}: HiRA of a convolution in groups isn't read"
        )
    r = A.shape[0]
    fields = {"dropout": reader.number("hira_dropout", 0.0)}
    return [Part(HiRAConfig, {"lora_A": A.flatten(1), "lora_B": B.flatten(1)}, fields, r, float(r))]


def _write_hira(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    said, (r, _) = of_config(adapters, "dropout", method="HiRA"), ranks(adapters)
    tensors: dict[str, dict[str, Tensor]] = {}
    for a in adapters:
        for path, held in a.items():
            own = "hira_embedding" if a.sites[path].kind == "embedding" else "hira"
            A, B = held["lora_A"], held["lora_B"] * a.sites[path].scaling
            if a.sites[path].kind == "conv":
                A, B = kernel(path, A, B, modules.get(path))
            elif a.sites[path].kind == "embedding":
                A = without_padding(A, modules.get(path))
            tensors[path] = {f"{own}_A": A, f"{own}_B": B}
    return Written({"hira_dropout": said["dropout"]}, tensors, {}, r)


def _read_gralora(
    reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]
) -> list[Part]:
    """gralora_A (k, d_in / k, r), gralora_B (k, r, d_out / k), _general.weight for the hybrid part:
    alpha / (r + hybrid_r).
    """
    leaves = {"lora_A": held["gralora_A"].mT, "lora_B": held["gralora_B"].mT}
    hybrid = reader.whole("hybrid_r", 0, 0)
    if hybrid:
        leaves |= _renamed(
            held,
            {
                "lora_A_whole": "gralora_A_general.weight",
                "lora_B_whole": "gralora_B_general.weight",
            },
        )
    fields = {
        "k": reader.whole("gralora_k", 2),
        "hybrid_r": hybrid,
        "dropout": reader.number("gralora_dropout", 0.0),
    }
    # PEFT's r counts only the grid's directions
    return [Part(GraLoRAConfig, leaves, fields, reader.whole("r", 32), reader.number("alpha", 64))]


def _write_gralora(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    said = of_config(adapters, "k", "hybrid_r", "dropout", method="GraLoRA")
    r, alpha = ranks(adapters)
    if len(set(r.values())) != 1 or len(set(alpha.values())) != 1:
        raise UnsupportedError(
            "to_peft: one GraLoRA file has one r and one alpha; write a folder for each"
        )
    fields = {
        "gralora_k": said["k"],
        "hybrid_r": said["hybrid_r"],
        "gralora_dropout": said["dropout"],
    }
    tensors = {}
    for a in adapters:
        for path, held in a.items():
            tensors[path] = {"gralora_A": held["lora_A"].mT, "gralora_B": held["lora_B"].mT}
            if said["hybrid_r"]:
                whole = {
                    "gralora_A_general.weight": held["lora_A_whole"],
                    "gralora_B_general.weight": held["lora_B_whole"],
                }
                tensors[path] |= whole
    return Written(
        fields | {"r": next(iter(r.values())), "alpha": next(iter(alpha.values()))}, tensors
    )


def _read_delora(
    reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]
) -> list[Part]:
    """delora_A (r, d_in), delora_B (d_out, r), delora_lambda (1,), delora_w_norm (d_in,)."""
    A, B, strength = held["delora_A"], held["delora_B"], held["delora_lambda"].reshape(())
    norm = held["delora_w_norm"] if "delora_w_norm" in held else entry.weight("DeLoRA").norm(dim=0)
    leaves = {"lora_A": A, "lora_B": B, "lora_lambda": strength, "lora_wnorm": norm}
    return [Part(DeLoRAConfig, leaves, {"init": "zero_B"}, A.shape[0])]


def _write_delora(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    r, _ = ranks(adapters)
    names = {"lora_A": "delora_A", "lora_B": "delora_B", "lora_wnorm": "delora_w_norm"}
    tensors = same(adapters, **names)
    for a in adapters:
        for path, held in a.items():
            tensors[path]["delora_lambda"] = held["lora_lambda"].reshape(1)
    return Written({}, tensors, {}, r)


# --------------------------------------------------------------------------------------- structured
def _read_miss(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """miss_block (r, d_out); (d_out / r, r, r) with init_weights="bat"; (r, mini_r) with "mini"."""
    entry.known("MiSS repeats its block along the inputs")
    D, mode = held["miss_block"], reader.get("init_weights", True)
    if mode not in (True, False, "bat", "mini"):
        raise reader.refuse("init_weights", 'true, "bat" or "mini"')
    fields: dict[str, Any] = {
        "mode": mode if isinstance(mode, str) else "plain",
        "dropout": reader.number("miss_dropout", 0.0),
    }
    if mode == "mini":
        fields["mini_r"] = reader.whole("mini_r", 1)
    return [Part(MiSSConfig, {"lora_D": D}, fields, r=D.shape[-1] if mode == "bat" else D.shape[0])]


def _write_miss(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    said, (r, _) = of_config(adapters, "mode", "mini_r", "dropout", method="MiSS"), ranks(adapters)
    if len(set(r.values())) != 1:
        raise UnsupportedError(
            f"to_peft: one MiSS file has one r, these sites have {sorted(set(r.values()))}; "
            f"write a folder for each"
        )
    mode = True if said["mode"] == "plain" else said["mode"]
    fields = {
        "init_weights": mode,
        "mini_r": said["mini_r"],
        "miss_dropout": said["dropout"],
        "r": next(iter(r.values())),
    }
    return Written(fields, same(adapters, lora_D="miss_block"))


def _read_c3a(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """c3a_kernel (d_out / b, d_in / b, b)."""
    w = held["c3a_kernel"]
    return [Part(C3AConfig, {"lora_w": w}, {"block_size": w.shape[-1]})]


def _write_c3a(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    blocks = {path: a.config.block_size for a in adapters for path in a}  # type: ignore[attr-defined]
    common, rest = patterned(blocks, "C3A's block_size_pattern")
    return Written(
        {"block_size": common, "block_size_pattern": rest}, same(adapters, lora_w="c3a_kernel")
    )


def patterned(values: Mapping[str, Any], what: str) -> tuple[Any, dict[str, Any]]:
    """One number for most modules and {pattern: number} for the rest, for patterns that only match
    behind a dot.

    Raises:
        UnsupportedError: they can't be told apart so.
    """
    bare = {v for path, v in values.items() if "." not in path}
    every = list(values.values())
    common = next(iter(bare)) if bare else max(set(every), key=every.count)
    rest = {
        re.escape(path.partition(".")[2]): value
        for path, value in values.items()
        if value != common and "." in path
    }
    for path, value in values.items():
        found = next((v for key, v in rest.items() if re.match(rf".*\.{key}$", path)), common)
        if found != value:
            raise UnsupportedError(
                f"to_peft: {what} can't tell {path!r} apart from the others; write a folder for "
                f"each value"
            )
    return common, rest


LOHA = Codec(
    "LOHA",
    (LoHaConfig,),
    tuple(_HADA.values()),
    "r alpha rank_pattern alpha_pattern",
    _read_loha,
    _write_loha,
    kinds="linear conv1d conv2d",
)
LOKR = Codec(
    "LOKR",
    (LoKrConfig,),
    tuple(_LOKR.values()),
    "r alpha rank_pattern alpha_pattern decompose_both decompose_factor",
    _read_lokr,
    _write_lokr,
    _lokr_sizes,
)
ADALORA = Codec(
    "ADALORA",
    (AdaLoRAConfig,),
    ("lora_A", "lora_B", "lora_E"),
    "r init_r lora_alpha lora_dropout rank_pattern",
    _read_adalora,
    _write_adalora,
    _columns_rows("lora_A", "lora_B"),
    ignored="target_r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step "
    "init_lora_weights loftq_config qalora_group_size",
    kinds="linear conv2d",
    biased="lora_only",
)
HIRA = Codec(
    "HIRA",
    (HiRAConfig,),
    ("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"),
    "r rank_pattern hira_dropout",
    _read_hira,
    _write_hira,
    _columns_rows("hira_A", "hira_B"),
    kinds="linear conv1d conv2d conv3d embedding",
)
GRALORA = Codec(
    "GRALORA",
    (GraLoRAConfig,),
    ("gralora_A", "gralora_B", "gralora_A_general.weight", "gralora_B_general.weight"),
    "r alpha gralora_k hybrid_r gralora_dropout",
    _read_gralora,
    _write_gralora,
    biased="gralora_only",
)
DELORA = Codec(
    "DELORA",
    (DeLoRAConfig,),
    ("delora_A", "delora_B", "delora_lambda", "delora_w_norm"),
    "r delora_lambda rank_pattern lambda_pattern",
    _read_delora,
    _write_delora,
    _columns_rows("delora_A", "delora_B"),
    biased="delora_only",
)
MISS = Codec(
    "MISS",
    (MiSSConfig,),
    ("miss_block",),
    "r mini_r miss_dropout",
    _read_miss,
    _write_miss,
    biased="MiSS_only",
)
C3A = Codec(
    "C3A",
    (C3AConfig,),
    ("c3a_kernel",),
    "block_size block_size_pattern",
    _read_c3a,
    _write_c3a,
    lambda path, held: ((w := held["c3a_kernel"]).shape[1] * w.shape[2], w.shape[0] * w.shape[2]),
    biased="c3a_only",
)
