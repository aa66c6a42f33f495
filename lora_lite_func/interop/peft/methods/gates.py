"""PEFT's gates, rotations and reflections: IA3, RoAd, HRA, OFT, BOFT, and BEFT's biases. The keys and their meaning are at each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ....core.adapter import Adapter
from ....core.errors import CheckpointError, UnsupportedError, short_repr
from ....layers.weights import stored
from ....variants import (
    BitFitConfig,
    BOFTConfig,
    HRAConfig,
    IA3Config,
    IA3FFConfig,
    LNTuningConfig,
    OFTConfig,
    ROADConfig,
)
from ...assembly import ModuleEntry, Part
from ...metadata import ConfigReader
from ..codec import Codec, Written, of_config, same


# ---------------------------------------------------------------------------------------------- IA3
def _read_ia3(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """ia3_l: (d_out, 1) on the output, (1, d_in) on the input of feed-forward modules; convolutions
    have (1, channels, 1 ...).
    """
    site, gate = entry.known("IA3 has gates of one side of the layer alone"), held["ia3_l"]
    plain = gate.ndim == 2 and gate.shape[0] != gate.shape[1]
    forward = gate.shape[0] == 1 if plain else _feed_forward(reader, entry.path)
    if not forward:
        return [Part(IA3Config, {"lora_g": gate.flatten()})]
    gate = gate.flatten()
    if gate.numel() and site.d_in % gate.numel() == 0:
        gate = gate.repeat_interleave(
            site.d_in // gate.numel()
        )  # a channel's gate for each entry of its kernel
    return [Part(IA3FFConfig, {"lora_g": gate})]


def _feed_forward(reader: ConfigReader, path: str) -> bool:
    names = reader.get("feedforward_modules")
    if isinstance(names, str):
        return reader.matches("feedforward_modules", rf"(?:{names})\Z", names, path)
    return any(path.endswith(name) for name in reader.names("feedforward_modules"))


def _write_ia3(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    made = Written({"feedforward_modules": []}, {})
    for a in adapters:
        forward = isinstance(a.config, IA3FFConfig)
        for path, held in a.items():
            gate, site = held["lora_g"], a.sites[path]
            if site.kind == "conv":
                made.tensors[path] = {
                    "ia3_l": _channels(path, gate, modules.get(path))
                    if forward
                    else _wide(path, gate, modules)
                }
            elif site.kind == "linear":
                made.tensors[path] = {"ia3_l": gate[None] if forward else gate[:, None]}
            else:
                raise UnsupportedError(
                    f"to_peft: {path!r}: PEFT's IA3 has no such gate on a {site.kind}"
                )
            if forward:
                made.fields["feedforward_modules"].append(path)
    return made


def _wide(path: str, t: Tensor, modules: Mapping[str, Any]) -> Tensor:
    """A number per channel of a convolution as (1, channels, 1 ...)."""
    if path not in modules:
        raise CheckpointError(
            f"to_peft: {path!r}: PEFT's tensors of a convolution have its dimensions; give the "
            f"base model"
        )
    return t.view(1, -1, *(1 for _ in modules[path].weight.shape[2:]))


def _channels(path: str, gate: Tensor, module: Any) -> Tensor:
    """A gate per entry of a kernel as PEFT's one per input channel, (1, c, 1 ...)."""
    by_channel = (
        gate.unflatten(0, (module.weight.shape[1], -1)) if module is not None else gate[:, None]
    )
    if module is None or module.groups != 1 or not (by_channel == by_channel[:, :1]).all():
        raise UnsupportedError(
            f"to_peft: {path!r}: PEFT's IA3 has one gate per input channel, here each entry of "
            f"the kernel has its own"
        )
    return _wide(path, by_channel[:, 0], {path: module})


# --------------------------------------------------------------------------------------------- RoAd
def _read_road(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """road_theta, road_alpha: laid out as ours."""
    entry.known("RoAd turns outputs alone")
    fields = {
        "mode": reader.get("variant", "road_1"),
        "group_size": reader.whole("group_size", 64, 2),
    }
    return [
        Part(
            ROADConfig,
            {f"lora_{name}": held[name] for name in ("road_theta", "road_alpha")},
            fields,
        )
    ]


def _write_road(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    said = of_config(adapters, "mode", "group_size", method="RoAd")
    tensors = same(adapters, lora_road_theta="road_theta", lora_road_alpha="road_alpha")
    return Written({"variant": said["mode"], "group_size": said["group_size"]}, tensors)


# ---------------------------------------------------------------------------------------------- HRA
def _read_hra(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """hra_u (d_in, r), a reflection per column."""
    entry.known("HRA acts on inputs alone")
    U = held["hra_u"].mT
    return [Part(HRAConfig, {"lora_U": U}, r=U.shape[0])]


def _write_hra(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    tensors = {path: {"hra_u": held["lora_U"].mT} for a in adapters for path, held in a.items()}
    many = {held["hra_u"].shape[1] for held in tensors.values()}
    if len(many) != 1:
        raise UnsupportedError(
            f"to_peft: one HRA file has one r, these sites have {sorted(many)}; write a folder "
            f"for each"
        )
    return Written({"r": many.pop()}, tensors)


# ---------------------------------------------------------------------------------------------- OFT
def _read_oft(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """oft_R.weight (n, b (b - 1) / 2); PEFT's exact branch turns the other way, its series as ours."""
    site = entry.known("OFT acts on inputs alone")
    q = held["oft_R.weight"]
    if _overlaps(entry.module):
        raise CheckpointError(
            f"{short_repr(entry.path)}: PEFT's OFT adds up the patches of a convolution's input, "
            f"which isn't a rotation of them"
        )
    block = int((1 + (1 + 8 * q.shape[-1]) ** 0.5) / 2)
    share, series = reader.flag("block_share"), reader.flag("use_cayley_neumann", True)
    if block * (block - 1) // 2 != q.shape[-1] or site.d_in % block:
        raise CheckpointError(
            f"{short_repr(entry.path)}: {q.shape[-1]} numbers aren't the upper triangle of a "
            f"block that divides {site.d_in}"
        )
    if series and reader.whole("num_cayley_neumann_terms", 5) != 5:
        raise reader.refuse("num_cayley_neumann_terms", "5, the one length of the series here")
    fields = {"block_size": block, "cayley": "neumann" if series else "exact", "block_share": share}
    return [Part(OFTConfig, {"lora_oft_q": q if series else -q}, fields)]


def _overlaps(module: Any) -> bool:
    """A convolution whose kernel sees more than one place: PEFT rotates its patches and folds them
    back, where they add up.
    """
    size = getattr(module, "kernel_size", ())
    return isinstance(size, tuple) and any(n != 1 for n in size)


def _write_oft(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    wide = next((path for a in adapters for path in a if _overlaps(modules.get(path))), None)
    if wide is not None:
        raise UnsupportedError(
            f"to_peft: {wide!r}: PEFT's OFT of a convolution isn't a rotation of its input; "
            f"merge it"
        )
    said = of_config(adapters, "cayley", "block_share", method="OFT")
    sign = 1.0 if said["cayley"] == "neumann" else -1.0
    blocks = {path: (a.sites[path].d_in, a.config.block_size) for a in adapters for path in a}  # type: ignore[attr-defined]
    tensors = {
        path: {"oft_R.weight": sign * held["lora_oft_q"]}
        for a in adapters
        for path, held in a.items()
    }
    fields = {
        "use_cayley_neumann": sign > 0,
        "block_share": said["block_share"],
        "r": 0,
        "oft_block_size": 0,
        "coft": False,
    }
    sizes, counts = {b for _, b in blocks.values()}, {d // b for d, b in blocks.values()}
    for size in sorted(sizes, reverse=True):
        if all(_adjusted(d, size) == b for d, b in blocks.values()):
            return Written(fields | {"oft_block_size": size}, tensors)
    if len(counts) == 1:
        return Written(fields | {"r": counts.pop()}, tensors)
    raise UnsupportedError(
        f"to_peft: one OFT file has one block size or one count, these sites have "
        f"{sorted(sizes)}; write a folder for each"
    )


def _adjusted(width: int, size: int) -> int:
    """The block size that PEFT takes where `size` doesn't divide: the nearest that does, the
    smaller of two.
    """
    if size >= width:
        return width
    above = next(b for b in range(size, width + 1) if width % b == 0)
    below = next(b for b in range(size, 0, -1) if width % b == 0)
    return below if size - below <= above - size else above


# --------------------------------------------------------------------------------------------- BOFT
def _read_boft(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """boft_R (m, n, b, b), of which the skew part counts, turning the other way; boft_s (d_out, 1)."""
    entry.known("BOFT acts on inputs")
    R = held["boft_R"]
    if R.ndim != 4 or R.shape[-1] != R.shape[-2]:
        raise CheckpointError(
            f"{short_repr(entry.path)}: boft_R: expected (m, n, b, b), found {tuple(R.shape)}"
        )
    i, j = torch.triu_indices(R.shape[-1], R.shape[-1], 1)
    skew = 0.5 * (R - R.mT)
    fields = {"block_size": R.shape[-1], "m": R.shape[0]}
    return [
        Part(
            BOFTConfig,
            {"lora_boft_q": -skew[..., i, j], "lora_boft_s": held["boft_s"].flatten()},
            fields,
        )
    ]


def _write_boft(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    said = of_config(adapters, "block_size", "m", method="BOFT")
    b, tensors = said["block_size"], {}
    for a in adapters:
        for path, held in a.items():
            q = held["lora_boft_q"]
            R = torch.zeros(*q.shape[:-1], b, b, dtype=q.dtype, device=q.device)
            i, j = torch.triu_indices(b, b, 1)
            R[..., i, j] = -q
            s = held["lora_boft_s"]
            tensors[path] = {
                "boft_R": R - R.mT,
                "boft_s": s[None] if a.sites[path].kind == "conv" else s[:, None],
            }
    return Written(
        {"boft_block_size": b, "boft_block_num": 0, "boft_n_butterfly_factor": said["m"]}, tensors
    )


# --------------------------------------------------------------------------------------------- BEFT
def _read_beft(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """beft_bias (1, d_out), added to the output."""
    entry.known("BEFT shifts outputs alone")
    return [Part(BitFitConfig, {"lora_b": held["beft_bias"].flatten()})]


def _write_beft(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    return Written(
        {},
        {path: {"beft_bias": held["lora_b"][None]} for a in adapters for path, held in a.items()},
    )


# ---------------------------------------------------------------------------------------- LN-tuning
def _read_ln(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """ln_tuning_layers.weight, .bias: a trained copy of the norm; kept as the difference from the
    base's.
    """
    entry.known("LN-tuning replaces the base's norms")
    own = {
        "ln_tuning_layers.weight": ("lora_ln_w", "weight"),
        "ln_tuning_layers.bias": ("lora_ln_b", "bias"),
    }
    leaves = {}
    for name, t in held.items():
        ours, base = own[name][0], stored(entry.module, own[name][1])
        if not isinstance(base, Tensor) or base.shape != t.shape:
            raise CheckpointError(
                f"{short_repr(entry.path)}: its norm has no {own[name][1]} of shape "
                f"{tuple(t.shape)}"
            )
        leaves[ours] = (t - base.detach().to(t)).flatten()
    return [Part(LNTuningConfig, leaves)]


def _write_ln(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    tensors: dict[str, dict[str, Tensor]] = {}
    for a in adapters:
        for path, held in a.items():
            if path not in modules:
                raise CheckpointError(
                    f"to_peft: {path!r}: PEFT's LN-tuning holds whole norms; give the base model"
                )
            pairs = {
                "weight": held["lora_ln_w"],
                **({"bias": held["lora_ln_b"]} if "lora_ln_b" in held else {}),
            }
            base = {name: stored(modules[path], name).detach() for name in pairs}
            tensors[path] = {
                f"ln_tuning_layers.{n}": base[n] + t.to(base[n]).view(base[n].shape)
                for n, t in pairs.items()
            }
    return Written({}, tensors)


LN_TUNING = Codec(
    "LN_TUNING",
    (LNTuningConfig,),
    ("ln_tuning_layers.weight", "ln_tuning_layers.bias"),
    "",
    _read_ln,
    _write_ln,
    kinds="norm",
)
IA3 = Codec(
    "IA3",
    (IA3Config, IA3FFConfig),
    ("ia3_l",),
    "feedforward_modules init_ia3_weights",
    _read_ia3,
    _write_ia3,
    kinds="linear conv2d conv3d",
)
ROAD = Codec(
    "ROAD",
    (ROADConfig,),
    ("road_theta", "road_alpha"),
    "variant group_size",
    _read_road,
    _write_road,
)
HRA = Codec(
    "HRA",
    (HRAConfig,),
    ("hra_u",),
    "r",
    _read_hra,
    _write_hra,
    kinds="linear conv2d",
    biased="hra_only",
)
OFT = Codec(
    "OFT",
    (OFTConfig,),
    ("oft_R.weight",),
    "r oft_block_size block_share use_cayley_neumann num_cayley_neumann_terms",
    _read_oft,
    _write_oft,
    ignored="eps",
    kinds="linear conv2d",
    biased="oft_only",
)
BOFT = Codec(
    "BOFT",
    (BOFTConfig,),
    ("boft_R", "boft_s"),
    "boft_block_size boft_block_num boft_n_butterfly_factor",
    _read_boft,
    _write_boft,
    kinds="linear conv2d",
    biased="boft_only",
)
BEFT = Codec("BEFT", (BitFitConfig,), ("beft_bias",), "", _read_beft, _write_beft)
