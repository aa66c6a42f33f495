"""PEFT's Arrow: a router's folder says how, the experts are in folders of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ...algebra.arrow import arrow
from ...core.adapter import Adapter
from ...core.errors import CheckpointError, short_repr
from ..metadata import ConfigReader

__all__ = ["is_router", "read_router"]


def is_router(reader: ConfigReader) -> bool:
    """Tell whether a config is that of a router without experts."""
    return bool(reader.get("arrow_config"))


def read_router(
    reader: ConfigReader,
    experts: Sequence[Any],
    general: Sequence[Any],
    read: Callable[[Any], Any],
) -> Adapter:
    """Make an Arrow adapter of a router's config and the adapters that it is for. The router's own
    tensors have no part in PEFT's outputs.

    PEFT finds an expert's direction by 15 power steps from a random vector, where this is the exact
    one, and takes general knowledge out factor by factor; so does this.

    Args:
        reader: the router's config.
        experts: folders, or adapters, in PEFT's order of names.
        general: likewise, where the router says `use_gks`.
        read: reads a folder.

    Raises:
        CheckpointError: no experts or another number of them, or ones that aren't single adapters.
    """
    said = ConfigReader(reader["arrow_config"], f"{reader.where}: arrow_config")
    said.check(
        [
            "top_k",
            "router_temperature",
            "use_gks",
            "task_adapter_names",
            "gks_adapter_names",
            "rng_seed",
        ],
        (),
    )
    subtracts = said.flag("use_gks")
    for name, given, wanted in (
        ("experts", experts, said.names("task_adapter_names")),
        ("general", general, said.names("gks_adapter_names") if subtracts else []),
    ):
        if len(given) != len(wanted) if wanted else bool(given) != (name == "experts"):
            names = ", ".join(wanted) or ("any number" if name == "experts" else "none")
            raise CheckpointError(
                f"{reader.where}: an Arrow router's folder holds no experts, so it needs theirs: "
                f"from_peft(folder, model, experts=[...], general=[...]); {name}: expected {names},"
                f" found {len(given)}"
            )
    return arrow(
        [_one(source, read) for source in experts],
        top_k=said.whole("top_k", 3),
        temperature=said.number("router_temperature", 1.0),
        general=[_one(source, read) for source in general],
        subtract="factors",
    )


def _one(source: Any, read: Callable[[Any], Any]) -> Adapter:
    """Return an expert's adapter."""
    found = source if isinstance(source, Adapter) else read(source)
    if not isinstance(found, Adapter):
        raise CheckpointError(
            f"{short_repr(str(source))}: expected one adapter of an expert, found {len(found)}"
        )
    return found
