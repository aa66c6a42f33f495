"""What one config can say of many sites: settings that all share, numbers by pattern."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ....core.adapter import Adapter
from ....core.config import feature_dropout
from ....core.errors import UnsupportedError
from ....core.site import Site

__all__ = ["clamped_rank", "of_config", "one_of", "patterned", "ranks", "refuse_dropout"]


def of_config(adapters: Sequence[Adapter], *names: str, method: str) -> dict[str, Any]:
    """Return the settings that all adapters must share, because one file has one config.

    Raises:
        UnsupportedError: the adapters differ in one.
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
    """Return ({path: r}, {path: alpha}) of all sites."""
    sites = [s for a in adapters for s in a.sites.values()]
    return {s.path: s.r for s in sites}, {s.path: s.alpha for s in sites}


def one_of(values: Mapping[str, Any], method: str, name: str) -> Any:
    """Return the one value of all sites, {path: value}.

    Raises:
        UnsupportedError: the sites differ in it.
    """
    if len(set(values.values())) != 1:
        raise UnsupportedError(
            f"to_peft: one {method} file has one {name}, these sites have "
            f"{sorted(set(values.values()))}; write a folder for each"
        )
    return next(iter(values.values()))


def refuse_dropout(adapters: Sequence[Adapter], method: str) -> None:
    """Refuse adapters that drop inputs, where PEFT has no such thing.

    Raises:
        UnsupportedError: one of them does.
    """
    if any(feature_dropout(a.config) for a in adapters):
        raise UnsupportedError(
            f"to_peft: PEFT's {method} drops no inputs; set dropout=0.0 for the file"
        )


def clamped_rank(adapters: Sequence[Adapter], method: str, most: Callable[[Site], int]) -> int:
    """Return the one r of a file, of which each module takes as much as it has room for.

    Args:
        adapters: the adapters.
        method: PEFT's name, for messages.
        most: site -> the largest rank that PEFT gives it.

    Raises:
        UnsupportedError: a site has another rank than PEFT would give it.
    """
    sites = [site for a in adapters for site in a.sites.values()]
    r = max(site.r for site in sites)
    for site in sites:
        if site.r != min(r, most(site)):
            raise UnsupportedError(
                f"to_peft: {site.path!r}: one {method} file has one r, found {site.r} beside {r}; "
                f"write a folder for each"
            )
    return r


def patterned(values: Mapping[str, Any], what: str) -> tuple[Any, dict[str, Any]]:
    """Return one number for most modules and {pattern: number} for the rest, for patterns that
    match only behind a dot.

    Raises:
        UnsupportedError: such patterns can't tell the modules apart.
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
