"""Opening the adapters and bases that the command line names."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from ..core.adapter import Adapter
from ..core.errors import LoraLiteError
from ..interop.open import open_adapter
from ..io.checkpoint import Saved
from ..io.model_folder import meta_model
from ..io.shards import Shards
from .whole_model import whole_model

__all__ = ["Answer", "add_component", "opened", "parts_of"]

Answer = tuple[str, Any, int]
"""What a verb gives: (text, JSON, exit code)."""


def add_component(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which modules a file means: which component's, and where they have
    moved.
    """
    parser.add_argument(
        "--component",
        help="of a diffusion model's file: whose keys are read (unet, transformer, text_encoder)",
    )
    parser.add_argument(
        "--rename",
        metavar="OLD=NEW",
        action=_Rename,
        help="names of a path that have moved in the base since, such as "
        "model.layers=model.language_model.layers; may be given again",
    )


class _Rename(argparse.Action):
    """The action that collects all renamings given into one {old: new}."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        old, found, new = str(values).partition("=")
        if not old or not found:
            parser.error(f"--rename: expected OLD=NEW, found {values!r}")
        setattr(namespace, self.dest, {**(getattr(namespace, self.dest) or {}), old: new})


def opened(
    path: str,
    model: str | None,
    component: str | None = None,
    rename: Mapping[str, str] | None = None,
) -> Saved:
    """Open the adapter in a file or folder, checked against a base's folder if one is given."""
    if model is None:
        return open_adapter(path, rename=rename)
    shards = Shards(model)

    def read(base: Any) -> Saved:
        return open_adapter(path, base, component=component, rename=rename)

    try:
        return read(lambda **how: meta_model(shards, **how))
    except LoraLiteError as error:
        return read(whole_model(shards, path, error))


def parts_of(params: Any) -> dict[str, Adapter]:
    """Return the adapters by name. One alone has the name ""."""
    if isinstance(params, Adapter):
        return {"": params}
    pairs = params.items() if isinstance(params, Mapping) else enumerate(params)
    return {str(name): part for name, part in pairs}
