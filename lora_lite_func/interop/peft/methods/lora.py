"""PEFT's LoRA, with what its config can ask of it, and the methods that leave a rank-2r LoRA behind (PiSSA, OLoRA ...).

lora_A.weight (r, d_in), lora_B.weight (d_out, r); s = lora_alpha / r, or / sqrt(r) with use_rslora
lora_magnitude_vector (d_out,) with use_dora, lora_B.bias (d_out,) with lora_bias: y + s (B A x + bias)
embeddings: lora_embedding_A (r, num), lora_embedding_B (dim, r); convolutions: A (r, c, *k), B (d_out, r, 1, ...)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ....core import random
from ....core.errors import CheckpointError, short_repr
from ....core.method import site_for, variants
from ....variants import BitFitConfig, DoRAConfig, EVAConfig, LoRAConfig, OLoRAConfig, PiSSAConfig
from ...assembly import ModuleEntry, Part
from ...metadata import ConfigReader
from ..codec import Codec
from .low_rank import LOW_RANK, divisor, write

_HARMLESS_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
_PAIRS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))


def read(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """The low-rank pair, its magnitudes, its bias.

    Raises:
        CheckpointError: half a pair, a rank that isn't the config's, or a start that the file
            doesn't hold.
    """
    A, B = factors(entry, held)
    r = A.shape[-2]
    if r != reader.at("rank_pattern", entry.named or entry.path, reader.whole("r", 8)):
        raise CheckpointError(
            f"{reader.where}: {short_repr(entry.path)} has rank {r}, its config says another (r, "
            f"rank_pattern)"
        )
    alpha = (
        reader.at("alpha_pattern", entry.named or entry.path, reader.number("lora_alpha", 8))
        * entry.times
    )
    rslora, dropout = reader.flag("use_rslora"), reader.number("lora_dropout", 0.0)
    fields: dict[str, Any] = {"dropout": dropout if "lora_A.weight" in held else 0.0}
    leaves = {"lora_A": A, "lora_B": B}
    scale = alpha / divisor(r, rslora)
    started = _start(reader, entry, leaves, fields, r, scale)
    part = started or Part(LoRAConfig, leaves, fields | {"rslora": rslora}, r, alpha)
    gain: Tensor | float = 1.0
    if "lora_magnitude_vector" in held or reader.flag("use_dora"):
        part, gain = _dora(entry, held, leaves, fields, r, scale)
    if "lora_B.bias" not in held:
        return [part]
    return [part, Part(BitFitConfig, {"lora_b": held["lora_B.bias"] * scale * gain}, order=1)]


def factors(entry: ModuleEntry, held: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A (r, d_in), B (d_out, r), as matrices whatever the layer.

    Raises:
        CheckpointError: half a pair, or one that makes no matrix.
    """
    experts = 0 if entry.site is None else entry.site.num_experts
    if experts:
        return _experts(entry, held, experts)
    for a, b in _PAIRS:
        if a in held and b in held:
            A, B = held[a], held[b]
            break
    else:
        raise CheckpointError(
            f"{short_repr(entry.path)}: expected a pair lora_A and lora_B, found "
            f"{', '.join(sorted(held))}"
        )
    if A.ndim > 2 or B.ndim > 2:
        groups = getattr(entry.module, "groups", 1)
        if groups != 1 or any(n != 1 for n in B.shape[2:]):
            raise CheckpointError(
                f"{short_repr(entry.path)}: lora_B of a convolution in {groups} groups has no "
                f"dense counterpart"
            )
        A, B = A.flatten(1), B.flatten(1)
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
        raise CheckpointError(
            f"{short_repr(entry.path)}: expected (r, d_in) and (d_out, r), found "
            f"{tuple(A.shape)} and {tuple(B.shape)}"
        )
    if entry.kind == "parameter" and entry.site is not None and entry.site.transposed:
        return B.mT, A.mT  # PEFT sees a matrix as it is stored
    return A, B


def _experts(entry: ModuleEntry, held: Mapping[str, Tensor], experts: int) -> tuple[Tensor, Tensor]:
    """Of a stack of E weights: stored (E r, d_in), expert by expert, and (d_out, r E), direction by
    direction.
    """
    A, B = held["lora_A.weight"], held["lora_B.weight"]
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or A.shape[0] % experts:
        raise CheckpointError(
            f"{short_repr(entry.path)}: expected the factors of {experts} experts, found "
            f"{tuple(A.shape)} and {tuple(B.shape)}"
        )
    return A.unflatten(0, (experts, -1)), B.unflatten(1, (-1, experts)).permute(
        2, 0, 1
    )  # (E, r, d_in), (E, d_out, r)


def _start(
    reader: ConfigReader,
    entry: ModuleEntry,
    leaves: dict[str, Tensor],
    fields: dict[str, Any],
    r: int,
    scale: float,
) -> Part | None:
    """The part of a start that PEFT takes out of the base weight; None for those that leave it
    alone, as all do of an embedding.
    """
    start = reader.get("init_lora_weights", True)
    if (
        entry.kind == "embedding"
        or start in _HARMLESS_STARTS
        or (isinstance(start, str) and start.lower() in ("gaussian", "true", "false"))
    ):
        return None
    config = {"pissa": PiSSAConfig, "olora": OLoRAConfig}.get(
        start if isinstance(start, str) else ""
    )
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
    site, weight = entry.known(f"{start} starts from the base weight"), entry.weight(str(start))
    variant, cfg = variants()[str(start)], config(r=r, alpha=scale * r)
    here = site_for(variant, cfg, dataclasses.replace(site, r=r, alpha=scale * r), {})
    assert variant.init is not None
    first = variant.init(
        cfg,
        here,
        variant.param_specs(cfg, here),
        weight,
        None,
        lambda name: random.generator(0, entry.path, name),
    )
    dtype = leaves["lora_A"].dtype
    wide = torch.promote_types(dtype, torch.float32)
    frozen = {name: first[name].to(wide) for name in ("lora_A0", "lora_B0")}
    return Part(
        config, {name: t.to(wide) for name, t in leaves.items()} | frozen, fields, r, scale * r
    )


def _dora(
    entry: ModuleEntry,
    held: Mapping[str, Tensor],
    leaves: dict[str, Tensor],
    fields: dict[str, Any],
    r: int,
    scale: float,
) -> tuple[Part, Tensor]:
    if "lora_magnitude_vector" not in held:
        raise CheckpointError(
            f"{short_repr(entry.path)}: use_dora is set, but there is no lora_magnitude_vector"
        )
    m, W = (
        held["lora_magnitude_vector"].flatten(),
        entry.weight("DoRA"),
    )  # conv stores (1, d_out, 1 ...)
    dora = {**leaves, "lora_m": m, "lora_wnorm2": W.square().sum(1)}
    norm = torch.addmm(W, leaves["lora_B"].to(W), leaves["lora_A"].to(W), alpha=scale).norm(dim=1)
    return Part(DoRAConfig, dora, fields, r, scale * r), m / norm


def sizes(path: str, held: Mapping[str, Tensor]) -> tuple[int, int]:
    """(d_in, d_out) of the pair."""
    A, B = factors(ModuleEntry(path, {}), held)
    return A.shape[1], B.shape[0]


LORA = Codec(
    peft_type="LORA",
    configs=(LoRAConfig, DoRAConfig, EVAConfig, *LOW_RANK, BitFitConfig),
    suffixes=(
        "lora_A.weight",
        "lora_B.weight",
        "lora_B.bias",
        "lora_embedding_A",
        "lora_embedding_B",
        "lora_magnitude_vector",
        "lora_magnitude_vector.weight",
    ),
    understood="r lora_alpha lora_dropout use_rslora use_dora lora_bias rank_pattern "
    "alpha_pattern init_lora_weights "
    "target_parameters trainable_token_indices",
    ignored="eva_config corda_config loftq_config lora_ga_config qalora_group_size",
    read=read,
    write=write,
    sizes=sizes,
    kinds="linear conv1d conv2d conv3d embedding parameter",
    biased="lora_only",
)
