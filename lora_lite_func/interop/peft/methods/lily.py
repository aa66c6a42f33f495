"""PEFT's Lily: factors that layers share, which its files repeat under each of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ....core.adapter import Adapter
from ....core.errors import CheckpointError, UnsupportedError
from ....variants import LilyConfig
from ...assembly import ModuleEntry, Part
from ...metadata import ConfigReader
from ..codec import Codec, Written
from ..write_fields import targets
from .config_fields import of_config, one_of, ranks

__all__ = ["LILY"]


def read(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """Read lily_A (r, d_in), lily_B (E r, d_out) and lily_router (E, r). Which layers share them
    follows from the targets' names, as in PEFT.

    Raises:
        ModelNeededError: no model was given.
    """
    site = entry.known("Lily shares factors among layers in their order")
    A, R = held["lily_A.weight"], held["lily_router.weight"]
    B = held["lily_B.weight"].unflatten(0, (R.shape[0], A.shape[0])).mT
    named = reader.get("target_modules")
    stride = reader.whole("stride_A", 1)
    alike = [
        other.path
        for other in entry.among
        if other.site is not None
        and (other.site.d_in, other.site.d_out) == (site.d_in, site.d_out)
        and _target(named, other.pattern_path) == _target(named, entry.pattern_path)
    ]
    kind = f"{_target(named, entry.pattern_path)} {site.d_out}x{site.d_in}"
    first = alike.index(entry.path) // stride * stride
    fields = {
        "experts": R.shape[0],
        "stride": stride,
        "gate": "batch",
        "dropout": 0.0,
    }
    return [
        Part(
            LilyConfig,
            {"lora_A": A, "lora_B": B, "lora_route": R},
            fields,
            A.shape[0],
            reader.number("scaling", 1.0),
            sited={"groups": (f"{kind} from {first}" if stride > 1 else "", kind)},
        )
    ]


def _target(named: Any, path: str) -> str:
    """Return the entry of target_modules that PEFT finds a module by."""
    if not isinstance(named, list):
        return str(named)
    return next((name for name in reversed(named) if path.endswith(name)), path)


def write(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    """Write the factors of each site, shared ones under each.

    Raises:
        CheckpointError: no model was given, and layers in a row share A.
        UnsupportedError: the mixture isn't one of the whole batch, the adapters differ in a
            setting, or PEFT would share other factors.
    """
    names = ("experts", "stride", "gate", "dropout")
    said = of_config(adapters, *names, method="Lily")
    if said["gate"] != "batch" or said["dropout"]:
        raise UnsupportedError(
            f"to_peft: PEFT's Lily mixes by the mean over a whole batch and drops no inputs, which "
            f"is gate='batch' and dropout=0.0, found gate={said['gate']!r} and "
            f"dropout={said['dropout']}; its outputs would be others"
        )
    if said["stride"] > 1 and not modules:
        raise CheckpointError(
            "to_peft: PEFT's Lily shares A among layers in the order of the model's modules; give "
            "the base model"
        )
    held = {path: h for a in adapters for path, h in a.items()}
    order = [path for path in modules if path in held] or list(held)
    _check_groups(held, order, targets(order, modules or held), said["stride"])
    r, alpha = ranks(adapters)
    fields = {
        "r": one_of(r, "Lily", "r"),
        "scaling": one_of(alpha, "Lily", "alpha"),
        "stride_A": said["stride"],
        "num_B": said["experts"],
    }
    tensors = {
        path: {
            "lily_A.weight": h["lora_A"],
            "lily_B.weight": h["lora_B"].mT.flatten(0, 1),
            "lily_router.weight": h["lora_route"],
        }
        for path, h in held.items()
    }
    return Written(fields, tensors)


def _check_groups(
    held: Mapping[str, Mapping[str, Tensor]], order: Sequence[str], named: Any, stride: int
) -> None:
    """Refuse factors that differ among layers for which PEFT will have one.

    Raises:
        UnsupportedError: with the layers.
    """
    kinds: dict[Any, list[str]] = {}
    for path in order:
        sizes = held[path]["lora_A"].shape[1], held[path]["lora_B"].shape[1]
        kinds.setdefault((_target(named, path), sizes), []).append(path)
    for paths in kinds.values():
        _check_equal(held, paths, "lora_B")
        for i in range(0, len(paths), stride):
            _check_equal(held, paths[i : i + stride], "lora_A")


def _check_equal(held: Mapping[str, Mapping[str, Tensor]], paths: Iterable[str], name: str) -> None:
    first, *others = paths
    for path in others:
        if not torch.equal(held[first][name], held[path][name]):
            raise UnsupportedError(
                f"to_peft: PEFT's Lily has one {name} for {first!r} and {path!r}, these differ; "
                f"write a folder for each"
            )


LILY = Codec(
    peft_type="LILY",
    configs=(LilyConfig,),
    suffixes=("lily_A.weight", "lily_B.weight", "lily_router.weight"),
    understood="r stride_A num_B scaling",
    read=read,
    write=write,
)
