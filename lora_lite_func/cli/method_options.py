"""The options that name a method and its settings, for verbs that make a config of them."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterable
from typing import Any

from ..core.config import AdapterConfig
from ..core.errors import ConfigError, nearest, short_repr
from ..core.method import Variant
from ..core.registry import variants

__all__ = ["add_method_options", "config_from", "method_named", "settings", "unused_fields"]


def add_method_options(parser: argparse.ArgumentParser, method: str | None = "lora") -> None:
    """Add the method and its settings. Without a default method there is no option for it."""
    if method is not None:
        parser.add_argument("--method", default=method, help=f"a method's name (default {method})")
    parser.add_argument("--r", type=int, help="rank (default: the method's own)")
    parser.add_argument("--alpha", type=float, help="strength (default: the method's own)")
    parser.add_argument(
        "--targets",
        nargs="+",
        default=(),
        metavar="REGEX",
        help="patterns searched in the layers' paths (default: every layer that it can adapt)",
    )
    parser.add_argument("--layers", nargs="+", type=int, metavar="N", help="layer indices")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="NAME=VALUE",
        help="another field of the method's config; may be given again",
    )


def method_named(name: str) -> Variant:
    """The method of that name.

    Raises:
        ConfigError: there is none.
    """
    known = variants()
    if name not in known:
        raise ConfigError(f"unknown method {short_repr(name)}; {nearest(name, known, first=50)}")
    return known[name]


def config_from(given: argparse.Namespace, variant: Variant) -> AdapterConfig:
    """The config that the options describe.

    Raises:
        ConfigError: a setting that the method hasn't, or a value that it doesn't allow.
    """
    fields = {"r": given.r, "alpha": given.alpha, "layers": given.layers}
    said = {name: value for name, value in fields.items() if value is not None}
    if given.targets:
        bare = variant.sites[0] == "parameter"
        said["target_parameters" if bare else "target_names"] = tuple(given.targets)
    return variant.config(**{**said, **settings(given.settings)})


def settings(texts: Iterable[str]) -> dict[str, Any]:
    """{name: value} of texts name=value, whose values are Python literals, or plain texts.

    Raises:
        ConfigError: a text has another form.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(f"--set: expected NAME=VALUE, found {short_repr(text)}")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = {"true": True, "false": False}.get(value, value)
    return found


def unused_fields(variant: Variant) -> set[str]:
    """Which of "r" and "alpha" a method takes and leaves alone, by its config's docstring."""
    said = re.search(r"\b(r and alpha|r|alpha) ha(?:s|ve) no part", _words(variant.config))
    return set(said[1].split(" and ")) if said else set()


def _words(config: type[AdapterConfig]) -> str:
    return " ".join((config.__doc__ or "").split())
