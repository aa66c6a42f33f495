"""PEFT's LoKr: the Kronecker product of two factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ....core.adapter import Adapter
from ....core.errors import CheckpointError, UnsupportedError, short_repr
from ....variants import LoKrConfig
from ....variants.lokr import split
from ...assembly import ModuleEntry, Part
from ...metadata import ConfigReader
from ..codec import Codec, Written
from .config_fields import of_config, ranks
from .layer_shapes import through_core
from .tensor_names import renamed, same

__all__ = ["LOKR"]

_NAMES = {f"lora_{name}": f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")}


def read(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """Read lokr_w1 (l, m) and lokr_w2 (k, n), each whole or as two factors. The update is kron(w1,
    w2) alpha / r, and PEFT scales it so even where both are whole. A convolution's lokr_w2 is (k,
    n, *kernel), or lokr_t2 stands between its factors.

    Raises:
        CheckpointError: the factors don't tell the layer's size, or a convolution's update isn't a
            Kronecker product.
    """
    r = int(reader.at("rank_pattern", entry.pattern_path, reader.whole("r", 8)))
    alpha = reader.at("alpha_pattern", entry.pattern_path, reader.number("alpha", 8))
    if entry.kind == "conv":
        return [_of_convolution(entry, held, r, alpha)]
    leaves, factor = renamed(held, _NAMES), reader.get("decompose_factor", -1)
    if "lora_w1" in leaves and "lora_w2" in leaves:
        # Two whole factors of ours have no rank to divide by, so the scale goes into W1.
        leaves["lora_w1"] = leaves["lora_w1"] * (alpha / r)
    fields = {"factor": factor, "decompose_both": reader.flag("decompose_both")}
    d_in, d_out = sizes(entry.path, held)
    (l, m), _ = _shapes(held)  # noqa: E741
    usual = (l, m) == (split(d_out, factor)[0], split(d_in, factor)[0])
    return [
        Part(LoKrConfig, leaves, fields, r, alpha, sited={} if usual else {"w1_shapes": (l, m)})
    ]


def _of_convolution(entry: ModuleEntry, held: Mapping[str, Tensor], r: int, alpha: float) -> Part:
    """Read a convolution's factors. PEFT splits the channels, while here all entries of a kernel
    are inputs. So W1's shape is kept beside the factors, and W2 is whole where PEFT's is, whatever
    its rank.

    Raises:
        CheckpointError: both factors of a kernel of one dimension are whole, and PEFT multiplies
            those in another order.
    """
    w1 = held["lokr_w1"] if "lokr_w1" in held else held["lokr_w1_a"] @ held["lokr_w1_b"]
    fields = {"factor": -1, "decompose_both": False}
    sited = {"w1_shapes": tuple(w1.shape)}
    full = held.get("lokr_w2")
    if full is None:
        a, b = held["lokr_w2_a"], held["lokr_w2_b"]
        a, b = through_core(held["lokr_t2"], a, b) if "lokr_t2" in held else (a, b)
        leaves = {"lora_w1": w1, "lora_w2_a": a, "lora_w2_b": b}
        return Part(LoKrConfig, leaves, fields, r, alpha, sited=sited)
    if full.ndim == 3:
        if full.shape[-1] != 1:
            raise CheckpointError(
                f"{short_repr(entry.path)}: PEFT's LoKr of this convolution isn't a Kronecker "
                f"product: the two factors, both full, are multiplied in an order that mixes the "
                f"kernel's entries; merge it in PEFT"
            )
        w1, full = full[..., 0], w1  # PEFT multiplies them in this order
        sited = {"w1_shapes": tuple(w1.shape)}
    w2 = full.flatten(1)
    whole = max(w2.shape)
    leaves = {"lora_w1": w1 * (alpha / r), "lora_w2": w2}
    return Part(LoKrConfig, leaves, fields, whole, float(whole), sited=sited)


def write(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    """Write lokr_w1 (l, m) and lokr_w2 (k, n) of linear layers, each whole or as two factors.

    Raises:
        CheckpointError: the factors don't tell a layer's size.
        UnsupportedError: the adapters differ in a setting, or PEFT would give W1 another size.
    """
    said = of_config(adapters, "factor", "decompose_both", method="LoKr")
    tensors, (r, alpha) = same(adapters, **_NAMES), ranks(adapters)
    for path, held in tensors.items():
        d_in, d_out = sizes(path, held)
        expected = tuple(_split_by_peft(d, said["factor"]) for d in (d_out, d_in))
        if _shapes(held)[0] != expected:
            raise UnsupportedError(
                f"to_peft: {path!r}: PEFT splits every layer by one factor, and by "
                f"{said['factor']} this W1 would be {expected}, found {_shapes(held)[0]}; merge it"
            )
        if "lokr_w1" in held and "lokr_w2" in held:
            if not alpha[path]:
                alpha[path] = float(r[path])
            held["lokr_w1"] = held["lokr_w1"] * (r[path] / alpha[path])
    fields = {"decompose_factor": said["factor"], "decompose_both": said["decompose_both"]}
    return Written(fields, tensors, {}, r, alpha)


def sizes(path: str, held: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return (d_in, d_out) of a linear layer, as its factors tell them.

    Raises:
        CheckpointError: the factors are a convolution's, which don't tell the size of its kernel.
    """
    if "lokr_t2" in held or ("lokr_w2" in held and held["lokr_w2"].ndim > 2):
        raise CheckpointError(
            f"{short_repr(path)}: a convolution's factors don't say its kernel's size; give the "
            f"base model too"
        )
    (l, m), (k, n) = _shapes(held)  # noqa: E741
    return m * n, l * k


def _shapes(held: Mapping[str, Tensor]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return (l, m) of W1 and (k, n) of W2."""

    def shape(name: str) -> tuple[int, int]:
        full = held.get(name)
        if full is not None:
            return int(full.shape[0]), int(full.shape[1])
        return int(held[f"{name}_a"].shape[0]), int(held[f"{name}_b"].shape[1])

    return shape("lokr_w1"), shape("lokr_w2")


def _split_by_peft(width: int, factor: int) -> int:
    """Return W1's part of a dimension: `factor` itself where it divides `width`, else what `split`
    gives.
    """
    return factor if factor > 0 and width % factor == 0 else split(width, factor)[0]


LOKR = Codec(
    peft_type="LOKR",
    configs=(LoKrConfig,),
    suffixes=(*_NAMES.values(), "lokr_t2"),
    understood="r alpha rank_pattern alpha_pattern decompose_both decompose_factor",
    ignored="rank_dropout module_dropout rank_dropout_scale use_effective_conv2d",
    read=read,
    write=write,
    sizes=sizes,
    alpha="alpha",
)
