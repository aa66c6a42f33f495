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

from .. import rng
from ..errors import CheckpointError, shown
from ..spec import site_for, variants
from ..variants import BitFitConfig, DoRAConfig, EVAConfig, LoRAConfig, OLoRAConfig, PiSSAConfig
from .low_rank import LOW_RANK, divisor, write
from .method import Method, Part, Place
from .says import Says

_HARMLESS_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
_PAIRS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))


def read(says: Says, place: Place, held: Mapping[str, Tensor]) -> list[Part]:
    """The low-rank pair, its magnitudes, its bias.

    Raises:
        CheckpointError: half a pair, a rank that isn't the config's, or a start that the file doesn't hold.
    """
    A, B = factors(place, held)
    r = A.shape[-2]
    if r != says.at("rank_pattern", place.named or place.path, says.whole("r", 8)):
        raise CheckpointError(f"{says.where}: {shown(place.path)} has rank {r}, its config says another (r, rank_pattern)")
    alpha = says.at("alpha_pattern", place.named or place.path, says.number("lora_alpha", 8)) * place.times
    rslora, dropout = says.flag("use_rslora"), says.number("lora_dropout", 0.0)
    fields: dict[str, Any] = {"dropout": dropout if "lora_A.weight" in held else 0.0}
    leaves = {"lora_A": A, "lora_B": B}
    scale = alpha / divisor(r, rslora)
    started = _start(says, place, leaves, fields, r, scale)
    part = started or Part(LoRAConfig, leaves, fields | {"rslora": rslora}, r, alpha)
    gain: Tensor | float = 1.0
    if "lora_magnitude_vector" in held or says.flag("use_dora"):
        part, gain = _dora(place, held, leaves, fields, r, scale)
    if "lora_B.bias" not in held:
        return [part]
    return [part, Part(BitFitConfig, {"lora_b": held["lora_B.bias"] * scale * gain}, order=1)]


def factors(place: Place, held: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A (r, d_in), B (d_out, r), as matrices whatever the layer.

    Raises:
        CheckpointError: half a pair, or one that makes no matrix.
    """
    stack = 0 if place.site is None else place.site.stack
    if stack:
        return _experts(place, held, stack)
    for a, b in _PAIRS:
        if a in held and b in held:
            A, B = held[a], held[b]
            break
    else:
        raise CheckpointError(f"{shown(place.path)}: expected a pair lora_A and lora_B, found {', '.join(sorted(held))}")
    if A.ndim > 2 or B.ndim > 2:
        groups = getattr(place.module, "groups", 1)
        if groups != 1 or any(n != 1 for n in B.shape[2:]):
            raise CheckpointError(f"{shown(place.path)}: lora_B of a convolution in {groups} groups has no dense counterpart")
        A, B = A.flatten(1), B.flatten(1)
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
        raise CheckpointError(f"{shown(place.path)}: expected (r, d_in) and (d_out, r), found {tuple(A.shape)} and {tuple(B.shape)}")
    if place.kind == "parameter" and place.site is not None and place.site.transposed:
        return B.mT, A.mT  # PEFT sees a matrix as it is stored
    return A, B


def _experts(place: Place, held: Mapping[str, Tensor], stack: int) -> tuple[Tensor, Tensor]:
    """Of a stack of E weights: stored (E r, d_in), expert by expert, and (d_out, r E), direction by direction."""
    A, B = held["lora_A.weight"], held["lora_B.weight"]
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1] or A.shape[0] % stack:
        raise CheckpointError(f"{shown(place.path)}: expected the factors of {stack} experts, found {tuple(A.shape)} and {tuple(B.shape)}")
    return A.unflatten(0, (stack, -1)), B.unflatten(1, (-1, stack)).permute(2, 0, 1)  # (E, r, d_in), (E, d_out, r)


def _start(says: Says, place: Place, leaves: dict[str, Tensor], fields: dict[str, Any], r: int, scale: float) -> Part | None:
    """The part of a start that PEFT takes out of the base weight; None for those that leave it alone, as all do of an embedding."""
    start = says.get("init_lora_weights", True)
    if (
        place.kind == "embedding"
        or start in _HARMLESS_STARTS
        or (isinstance(start, str) and start.lower() in ("gaussian", "true", "false"))
    ):
        return None
    config = {"pissa": PiSSAConfig, "olora": OLoRAConfig}.get(start if isinstance(start, str) else "")
    if config is None:
        raise CheckpointError(
            f"{says.where}: init_lora_weights={shown(start)} changes the base weights by something the file doesn't hold; save it in "
            "PEFT with path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        )
    if says.flag("use_dora"):
        raise CheckpointError(
            f"{says.where}: use_dora with init_lora_weights={shown(start)} isn't read; convert it to a plain LoRA in PEFT"
        )
    if place.kind != "linear":
        raise CheckpointError(f"{says.where}: init_lora_weights={shown(start)} has no meaning for {shown(place.path)}, a {place.kind}")
    site, weight = place.known(f"{start} starts from the base weight"), place.weight(str(start))
    variant, cfg = variants()[str(start)], config(r=r, alpha=scale * r)
    here = site_for(variant, cfg, dataclasses.replace(site, r=r, alpha=scale * r), {})
    assert variant.init is not None
    first = variant.init(cfg, here, variant.param_specs(cfg, here), weight, None, lambda name: rng.generator(0, place.path, name))
    dtype = leaves["lora_A"].dtype
    wide = torch.promote_types(dtype, torch.float32)
    frozen = {name: first[name].to(wide) for name in ("lora_A0", "lora_B0")}
    return Part(config, {name: t.to(wide) for name, t in leaves.items()} | frozen, fields, r, scale * r)


def _dora(
    place: Place, held: Mapping[str, Tensor], leaves: dict[str, Tensor], fields: dict[str, Any], r: int, scale: float
) -> tuple[Part, Tensor]:
    if "lora_magnitude_vector" not in held:
        raise CheckpointError(f"{shown(place.path)}: use_dora is set, but there is no lora_magnitude_vector")
    m, W = held["lora_magnitude_vector"].flatten(), place.weight("DoRA")  # conv stores (1, d_out, 1 ...)
    dora = {**leaves, "lora_m": m, "lora_wnorm2": W.square().sum(1)}
    norm = torch.addmm(W, leaves["lora_B"].to(W), leaves["lora_A"].to(W), alpha=scale).norm(dim=1)
    return Part(DoRAConfig, dora, fields, r, scale * r), m / norm


def sizes(path: str, held: Mapping[str, Tensor]) -> tuple[int, int]:
    """(d_in, d_out) of the pair."""
    A, B = factors(Place(path, {}), held)
    return A.shape[1], B.shape[0]


LORA = Method(
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
    understood="r lora_alpha lora_dropout use_rslora use_dora lora_bias rank_pattern alpha_pattern init_lora_weights "
    "target_parameters trainable_token_indices",
    ignored="eva_config corda_config loftq_config lora_ga_config qalora_group_size",
    read=read,
    write=write,
    sizes=sizes,
    kinds="linear conv1d conv2d conv3d embedding parameter",
    biased="lora_only",
)
