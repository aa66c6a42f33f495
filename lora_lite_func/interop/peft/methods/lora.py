"""PEFT's LoRA, with what its config can ask of it, and the methods that leave a LoRA behind.

lora_A.weight (r, d_in), lora_B.weight (d_out, r); s = lora_alpha / r, or / sqrt(r) with use_rslora
lora_magnitude_vector (d_out,) with use_dora
lora_A.weight (r, d_in / n) or lora_B.weight (d_out, r / n) with use_bdlora, n blocks
lora_A.weight (r, d_in / g) with use_qalora, groups of g
lora_diag (r,) with kasa_config, which takes the weight's minor directions out of it
lora_B.bias (d_out,) with lora_bias: y + s (B A x + bias)
embeddings: lora_embedding_A (r, num), lora_embedding_B (dim, r)
convolutions: A (r, c, *k), B (d_out, r, 1, ...)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ....core.errors import CheckpointError, short_repr
from ....core.site import Site
from ....variants import (
    ASVDConfig,
    BitFitConfig,
    CorDAConfig,
    DoRAConfig,
    EVAConfig,
    LoRAConfig,
    LoRAGAConfig,
    OLoRAConfig,
    PiSSAConfig,
)
from ...assembly import ModuleEntry, Part
from ...metadata import ConfigReader
from ..codec import Codec
from .lora_starts import magnitudes, minor_directions, rewrites_base, subtracted_start
from .lora_structured import keep_structure, structured_part
from .lora_write import as_lora_bias, divisor, write

__all__ = ["LORA", "factors", "scale_of"]

_PAIRS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))


def read(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """Read the low-rank pair of a module, with DoRA's magnitudes and a learned bias where it has
    them.

    Raises:
        CheckpointError: half a pair, a rank that isn't the config's, or a start that the file
            doesn't hold.
    """
    rslora, dropout = reader.flag("use_rslora"), reader.number("lora_dropout", 0.0)
    part = structured_part(reader, entry, held, dropout)
    A, B = factors(entry, held) if part is None else (held["lora_A.weight"], held["lora_B.weight"])
    if entry.site is not None and entry.site.num_experts:
        A, B = _as_laid_out(reader, entry.site, A, B)
    r = A.shape[-2]
    alpha = _alpha(reader, entry.pattern_path, r) * entry.times
    fields: dict[str, Any] = {"dropout": dropout if "lora_A.weight" in held else 0.0}
    leaves = {"lora_A": A, "lora_B": B}
    scale = alpha / divisor(r, rslora)
    if part is not None:
        part.alpha = scale * r
    part = part or minor_directions(reader, entry, held, leaves, fields, r, scale)
    part = part or subtracted_start(reader, entry, leaves, fields, r, scale)
    part = part or Part(LoRAConfig, leaves, fields | {"rslora": rslora}, r, alpha)
    tokens = reader.ids("alora_invocation_tokens")
    if tokens:
        part = _activated(reader, entry, held, part, tokens)
    gain: Tensor | float = 1.0
    if "lora_magnitude_vector" in held or reader.flag("use_dora"):
        part, gain = magnitudes(entry, held, leaves, fields, r, scale)
    if "lora_B.bias" not in held:
        return [part]
    return [part, Part(BitFitConfig, {"lora_b": held["lora_B.bias"] * scale * gain}, order=1)]


def _activated(
    reader: ConfigReader,
    entry: ModuleEntry,
    held: Mapping[str, Tensor],
    part: Part,
    tokens: tuple[int, ...],
) -> Part:
    """Return a part for the tokens from an invocation sequence on. PEFT has that for plain factors
    of linear layers.

    Raises:
        CheckpointError: it is anything else.
    """
    plain = part.config is LoRAConfig and entry.kind == "linear"
    if not plain or any("magnitude" in name or name == "lora_B.bias" for name in held):
        raise CheckpointError(
            f"{reader.where}: {short_repr(entry.path)}: alora_invocation_tokens is for plain "
            f"factors of linear layers, found {', '.join(sorted(held))}"
        )
    return dataclasses.replace(part, fields=part.fields | {"invocation_tokens": tokens})


def _alpha(reader: ConfigReader, path: str, r: int) -> float:
    """Return the alpha of a module whose factors have rank r.

    Raises:
        CheckpointError: the config says another rank.
    """
    if r != reader.at("rank_pattern", path, reader.whole("r", 8)):
        raise CheckpointError(
            f"{reader.where}: {short_repr(path)} has rank {r}, its config says another (r, "
            f"rank_pattern)"
        )
    return reader.at("alpha_pattern", path, reader.number("lora_alpha", 8))


def scale_of(reader: ConfigReader, path: str, held: Mapping[str, Tensor]) -> float:
    """Return the number that a plain pair's product is multiplied by."""
    r = held["lora_A.weight"].shape[0]
    return _alpha(reader, path, r) / divisor(r, reader.flag("use_rslora"))


def factors(entry: ModuleEntry, held: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return A (r, d_in) and B (d_out, r) as matrices, whatever the layer. Factors of stacked
    experts have (E, ...) in front.

    Raises:
        CheckpointError: half a pair, or one that makes no matrix.
    """
    experts = 0 if entry.site is None else entry.site.num_experts
    if experts:
        return _experts(entry, held, experts)
    pair = next(((held[a], held[b]) for a, b in _PAIRS if a in held and b in held), None)
    if pair is None:
        raise CheckpointError(
            f"{short_repr(entry.path)}: expected a pair lora_A and lora_B, found "
            f"{', '.join(sorted(held))}"
        )
    A, B = pair
    if A.ndim > 2 or B.ndim > 2:
        groups = getattr(entry.module, "groups", 1)
        if groups != 1 and A.shape[0] == groups * B.shape[1]:
            raise CheckpointError(
                f"{short_repr(entry.path)}: lora_A sees the inputs of all {groups} groups of this "
                f"convolution, and no weight of it does, so PEFT alone runs it; adapt it with "
                f"another method of PEFT's (LOHA, LOKR), or exclude it (exclude_modules)"
            )
        if any(n != 1 for n in B.shape[2:]):
            raise CheckpointError(
                f"{short_repr(entry.path)}: lora_B of shape {tuple(B.shape)} has no dense "
                f"counterpart"
            )
        A, B = A.flatten(1), B.flatten(1)
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
        raise CheckpointError(
            f"{short_repr(entry.path)}: expected (r, d_in) and (d_out, r), found "
            f"{tuple(A.shape)} and {tuple(B.shape)}"
        )
    if entry.kind == "parameter" and entry.site is not None and entry.site.transposed:
        return B.mT, A.mT  # PEFT takes a matrix as it is stored
    return A, B


def _experts(entry: ModuleEntry, held: Mapping[str, Tensor], experts: int) -> tuple[Tensor, Tensor]:
    """Return A (E, r, d_in) and B (E, d_out, r) of a stack of E weights. PEFT stores them as (E r,
    d_in), expert by expert, and as (d_out, r E), direction by direction.
    """
    A, B = held["lora_A.weight"], held["lora_B.weight"]
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or A.shape[0] % experts:
        raise CheckpointError(
            f"{short_repr(entry.path)}: expected the factors of {experts} experts, found "
            f"{tuple(A.shape)} and {tuple(B.shape)}"
        )
    return A.unflatten(0, (experts, -1)), B.unflatten(1, (-1, experts)).permute(2, 0, 1)


def _as_laid_out(reader: ConfigReader, site: Site, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors of stacked experts over (d_in, d_out), which PEFT before 0.19.1 has the
    other way round where it took d_out for d_in. Where a matrix is square, the release tells.
    """
    release = str(reader.get("peft_version"))
    if site.d_in == site.d_out:
        swapped = not site.transposed and release.startswith(("0.18.", "0.19.0"))
    else:
        swapped = (A.shape[-1], B.shape[-2]) == (site.d_out, site.d_in)
    return (B.mT, A.mT) if swapped else (A, B)


def sizes(path: str, held: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return (d_in, d_out), as the pair tells them."""
    A, B = factors(ModuleEntry(path, {}), held)
    return A.shape[1], B.shape[0]


LORA = Codec(
    peft_type="LORA",
    configs=(
        LoRAConfig,
        DoRAConfig,
        EVAConfig,
        PiSSAConfig,
        OLoRAConfig,
        CorDAConfig,
        ASVDConfig,
        LoRAGAConfig,
    ),
    suffixes=(
        "lora_A.weight",
        "lora_B.weight",
        "lora_B.bias",
        "lora_diag",
        "lora_embedding_A",
        "lora_embedding_B",
        "lora_magnitude_vector",
        "lora_magnitude_vector.weight",
    ),
    understood="r lora_alpha lora_dropout use_rslora use_dora lora_bias rank_pattern "
    "alpha_pattern init_lora_weights target_parameters trainable_token_indices kasa_config "
    "alora_invocation_tokens use_bdlora use_qalora qalora_group_size",
    ignored="eva_config corda_config loftq_config lora_ga_config velora_config monteclora_config",
    unread="layer_replication",
    leftovers=("lora_velora_embed", "lora_monteclora_sampler"),
    read=read,
    write=write,
    sizes=sizes,
    kinds="linear conv1d conv2d conv3d embedding parameter",
    biased="lora_only",
    structure=keep_structure,
    takes_shifts=as_lora_bias,
    token_prefix="token_adapter.",
    rewrites_base=rewrites_base,
    stacks_experts=True,
    transposed=True,
    undilated=True,
)
