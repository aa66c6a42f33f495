"""PEFT's HiRA: the base weight times a low-rank matrix, elementwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ....core.adapter import Adapter
from ....core.errors import CheckpointError, short_repr
from ....variants import (
    HiRAConfig,
)
from ...assembly import ModuleEntry, Part
from ...metadata import ConfigReader
from ..codec import Codec, Written
from .config_fields import of_config, ranks
from .layer_shapes import kernel, without_padding
from .tensor_names import columns_rows

__all__ = ["HIRA"]


def read(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """Read hira_A (r, d_in) and hira_B (d_out, r), which an embedding has as hira_embedding_A and
    hira_embedding_B. The weight becomes W * (1 + B A); there is no scale, so alpha is r.

    Raises:
        CheckpointError: the layer is a convolution in groups.
    """
    table = "hira_embedding_A" in held
    A, B = (held[f"hira_embedding_{n}"] if table else held[f"hira_{n}"] for n in "AB")
    if getattr(entry.module, "groups", 1) != 1:
        raise CheckpointError(
            f"{short_repr(entry.path)}: HiRA of a convolution in groups isn't read"
        )
    r, B = A.shape[0], B / _table_scale(entry.module)
    fields = {"dropout": reader.number("hira_dropout", 0.0)}
    return [Part(HiRAConfig, {"lora_A": A.flatten(1), "lora_B": B.flatten(1)}, fields, r, float(r))]


def _table_scale(module: Any) -> float:
    """Return what an embedding multiplies its rows by, as Gemma's does. PEFT adds HiRA's change
    without this factor.
    """
    scale = getattr(module, "embed_scale", 1.0)
    return float(scale) if isinstance(scale, (int, float, Tensor)) else 1.0


def write(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    """Write hira_A (r, d_in) and hira_B (d_out, r), as kernels for a convolution, and under the
    names hira_embedding_* for an embedding. The scale goes into hira_B.

    Raises:
        CheckpointError: a convolution's shape needs the base model, and none was given.
        UnsupportedError: the adapters differ in dropout, or a convolution is in groups.
    """
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
                B = B * _table_scale(modules.get(path))
            tensors[path] = {f"{own}_A": A, f"{own}_B": B}
    return Written({"hira_dropout": said["dropout"]}, tensors, {}, r)


HIRA = Codec(
    peft_type="HIRA",
    configs=(HiRAConfig,),
    suffixes=("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"),
    understood="r rank_pattern hira_dropout",
    read=read,
    write=write,
    sizes=columns_rows("hira_A", "hira_B"),
    kinds="linear conv1d conv2d conv3d embedding",
    transposed=True,
)
