"""convert: an adapter in another form."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ..core.errors import CheckpointError, LoraLiteError, printable
from ..interop.diffusion import from_diffusion, to_diffusion
from ..interop.open import form_of
from ..interop.peft import to_peft
from ..interop.peft.folder import FILES
from ..io.checkpoint import Saved, load, save
from ..io.model_folder import meta_model
from ..io.shards import Shards
from .opening import Answer, add_component, opened, parts_of
from .whole_model import whole_model

__all__ = ["EXAMPLES", "HELP", "add_arguments", "run"]

HELP = "an adapter in another form"
_STYLES = ("diffusers", "kohya")
EXAMPLES = """\
python -m lora_lite_func convert adapter.safetensors peft_folder --to peft --model model_folder
python -m lora_lite_func convert peft_folder adapter.safetensors --to ll --model model_folder
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments to its parser."""
    parser.add_argument("input", help="an adapter's file of any form, or a PEFT folder")
    parser.add_argument("output", help="a file (ll, diffusers, kohya) or a folder (peft)")
    parser.add_argument("--to", choices=("peft", "ll", *_STYLES), required=True)
    parser.add_argument("--model", metavar="FOLDER", help="the base: a folder with safetensors")
    parser.add_argument(
        "--as-lora", action="store_true", help="write VeRA as the LoRA that it amounts to"
    )
    add_component(parser)


def run(given: argparse.Namespace) -> Answer:
    """Read the adapter, write it in the other form, and read the result again as a check.

    Raises:
        CheckpointError: the output would harm the input, or the form needs --model or --component.
    """
    _check_output(given.input, given.output, given.to)
    if given.to in _STYLES and None in (given.model, given.component):
        lacks = "--model" if given.model is None else "--component"
        raise CheckpointError(
            f"convert --to {given.to}: names follow the component that the base is; give {lacks}"
        )
    params = opened(given.input, given.model, given.component, given.rename)
    if given.to == "ll":
        save(params, given.output)
        load(given.output)
    elif given.to in _STYLES:
        _write_diffusion(params, given)
    else:
        _write_peft(params, given)
    data = {"input": given.input, "output": given.output, "to": given.to}
    return printable(f"{given.input} -> {given.output} ({given.to})"), data, 0


def _write_peft(params: Saved, given: argparse.Namespace) -> None:
    if given.model is None:
        to_peft(params, None, given.output, as_lora=given.as_lora)
        return
    sites = [site for part in parts_of(params).values() for site in part.sites.values()]
    tables = [site.path for site in sites if site.kind == "embedding"]
    shards = Shards(given.model)
    try:
        base = meta_model(shards, embeddings=tables)
        to_peft(params, base, given.output, as_lora=given.as_lora)
    except LoraLiteError as error:  # the folder's names may not be the model's own
        base = whole_model(shards, given.input, error)
        to_peft(params, base, given.output, as_lora=given.as_lora)


def _write_diffusion(params: Saved, given: argparse.Namespace) -> None:
    """Write the adapter for one component, and read the file again as a check."""
    base = meta_model(Shards(given.model))
    to_diffusion(params, base, given.output, component=given.component, style=given.to)
    from_diffusion(given.output, base, component=given.component)


def _check_output(source: str, output: str, form: str) -> None:
    """Refuse an output that would replace what is read, or that would put a file into a PEFT folder
    that PEFT doesn't read.

    Raises:
        CheckpointError: the message names the file that would be replaced.
    """
    read, target = _files(source), Path(os.fsdecode(output))
    try:
        alone = form != "peft"
        written = [target] if alone else [target / name for name in FILES]
        for file in written:
            if any(file.exists() and other.exists() and file.samefile(other) for other in read):
                raise CheckpointError(f"{file}: is of the input itself; choose another output")
        if alone and target.is_file() and form_of(target) == "peft":
            raise CheckpointError(
                f"{target}: belongs to a PEFT folder, which this would break; choose another output"
            )
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{target}: {error}") from None


def _files(source: str) -> list[Path]:
    """Return the files that an input is read from, or may be read from."""
    path = Path(os.fsdecode(source))
    try:
        folder = path if path.is_dir() else path.parent if form_of(path) == "peft" else None
    except ValueError:
        folder = None
    return [path] if folder is None else [path, *(folder / name for name in FILES)]
