"""Adapters and bases that the command line names."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..core.adapter import Adapter
from ..core.errors import LoraLiteError, UnsupportedError
from ..interop.open import form_of, open_adapter
from ..interop.peft.folder import unpack
from ..io.checkpoint import Saved, load
from ..io.model_folder import Shards, meta_model

__all__ = ["Answer", "add_component", "opened", "parts_of", "whole_model"]

Answer = tuple[str, Any, int]
"""What a verb gives: (text, JSON, exit code)."""


def add_component(parser: argparse.ArgumentParser) -> None:
    """The options that say which modules a file means: a component's, and where they have moved."""
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
    """{old: new} of all that were given."""

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
    """The adapter in a file or folder, checked against a base's folder if one is given."""
    if model is None:
        return open_adapter(path, rename=rename)
    shards = Shards(model)

    def read(base: Any) -> Saved:
        return open_adapter(path, base, component=component, rename=rename)

    try:
        return read(lambda **how: meta_model(shards, **how))
    except LoraLiteError as error:
        return read(whole_model(shards, path, error))


def whole_model(shards: Shards, adapter: str, why: LoraLiteError) -> nn.Module:
    """The model of a folder as transformers loads it, in eval mode.

    Args:
        shards: the folder.
        adapter: what the model is for; read first, as loading a model takes long.
        why: what was said of the model that the folder's names make.

    Raises:
        LoraLiteError: `why`, where transformers knows no such model, isn't installed, or can't load
            it; or the adapter can't be read.
    """
    form = form_of(adapter)
    if form == "peft":
        unpack(adapter, None)
    elif form == "ll":
        load(adapter)
    says = shards.config()
    named = says.get("architectures")
    if not isinstance(named, list) or not named or not isinstance(named[0], str):
        raise why
    if says.get("quantization_config") is not None:
        raise UnsupportedError(
            f"{shards.folder}: its weights are packed, by its quantization_config; take the "
            f"unquantised model's folder, or merge in memory: "
            f"ll.merged(model, params, dequantize=True)"
        ) from why
    try:
        import transformers
    except ImportError:
        raise type(why)(
            f"{why} (with transformers installed it would be tried with its own names)"
        ) from None
    kind = getattr(transformers, named[0], None)
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        raise why
    try:
        loaded: Any = kind.from_pretrained(
            shards.folder,
            dtype="auto",
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # whatever transformers says of a folder that isn't its own
        raise type(why)(f"{why} (transformers doesn't load it either: {error})") from None
    model, loading = loaded
    missing = sorted(loading["missing_keys"])
    if missing:
        raise type(why)(f"{why} (for transformers it lacks {missing[0]!r})") from None
    return model.eval()


def parts_of(params: Any) -> dict[str, Adapter]:
    """The adapters by name; one alone under ""."""
    if isinstance(params, Adapter):
        return {"": params}
    pairs = params.items() if isinstance(params, Mapping) else enumerate(params)
    return {str(name): part for name, part in pairs}
