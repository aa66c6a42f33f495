"""What it takes to read and write one of PEFT's methods: a record of pure functions over one module's tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ...core.adapter import Adapter
from ...core.config import AdapterConfig
from ...core.errors import UnsupportedError
from ...variants import BitFitConfig
from ..assembly import ModuleEntry, Part
from ..metadata import ConfigReader

__all__ = ["Codec", "Written", "of_config", "ranks", "same", "shifts_of"]


@dataclass
class Written:
    """An adapter as PEFT's files have it.

    Attributes:
        fields: of adapter_config.json.
        tensors: {path: {suffix: tensor}}.
        shared: {name: tensor}, of the whole model.
        ranks: {path: r}, alphas: {path: alpha}, where the method has them.
    """

    fields: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]
    shared: dict[str, Tensor] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Codec:
    """One of PEFT's methods.

    Attributes:
        peft_type: how a config names it.
        configs: our methods that it can hold.
        suffixes: what a module's keys end with.
        understood: fields of its config that `read` honours.
        read: (says, place, {suffix: tensor}) -> parts.
        write: (adapters, paths' modules) -> Written; the adapters' configs are among `configs`,
            their sites differ.
        sizes: (path, {suffix: tensor}) -> (d_in, d_out), where the tensors alone tell; None where
            they don't.
        shared: names of tensors that stand beside the modules.
        rank, alpha: the config's fields with the numbers that `rank_pattern` and `alpha_pattern`
            override.
        ignored: fields without a part in a loaded adapter.
        kinds: the kinds of layer that PEFT adapts with it.
        biased: what its `bias` says where the adapted layers' own biases are learned; "" where it
            has no such field.
    """

    peft_type: str
    configs: tuple[type[AdapterConfig], ...]
    suffixes: tuple[str, ...]
    understood: str
    read: Callable[[ConfigReader, ModuleEntry, Mapping[str, Tensor]], Sequence[Part]]
    write: Callable[[Sequence[Adapter], Mapping[str, Any]], Written]
    sizes: Callable[[str, Mapping[str, Tensor]], tuple[int, int]] | None = None
    shared: tuple[str, ...] = ()
    rank: str = "r"
    alpha: str = "lora_alpha"
    ignored: str = ""
    kinds: str = "linear"
    biased: str = ""


def of_config(adapters: Sequence[Adapter], *names: str, method: str) -> dict[str, Any]:
    """Settings that all adapters must share, since one file has one config.

    Raises:
        UnsupportedError: they differ.
    """
    found = {}
    for name in names:
        values = [getattr(a.config, name) for a in adapters]
        if any(v != values[0] for v in values):
            raise UnsupportedError(
                f"to_peft: one {method} file has one {name}, these adapters have {values}; write "
                f"a folder for each"
            )
        found[name] = values[0]
    return found


def ranks(adapters: Sequence[Adapter]) -> tuple[dict[str, int], dict[str, float]]:
    """({path: r}, {path: alpha}) of all sites."""
    sites = [s for a in adapters for s in a.sites.values()]
    return {s.path: s.r for s in sites}, {s.path: s.alpha for s in sites}


def same(adapters: Sequence[Adapter], **renamed: str) -> dict[str, dict[str, Tensor]]:
    """{path: {PEFT's suffix: tensor}} by a change of names alone, given as ours=theirs with __ for
    a dot; absent ones are left out.
    """
    return {
        path: {
            theirs.replace("__", "."): held[ours]
            for ours, theirs in renamed.items()
            if ours in held
        }
        for a in adapters
        for path, held in a.items()
    }


def shifts_of(adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    """{path: what the BitFits among these add to its output}."""
    found: dict[str, Tensor] = {}
    for a in adapters:
        if isinstance(a.config, BitFitConfig):
            for path, held in a.items():
                found[path] = found[path] + held["lora_b"] if path in found else held["lora_b"]
    return found
