"""merge: writes a model's folder with an adapter merged in."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ..core.errors import LoraLiteError, printable
from ..interop.open import form_of, open_adapter
from ..io.model_folder import meta_model
from ..io.shards import Shards
from .merge_folders import check_finite, check_out
from .merge_shards import bar, jobs_of, write_shards
from .merge_whole import write_whole
from .opening import Answer, add_component

__all__ = ["EXAMPLES", "HELP", "add_arguments", "run"]

HELP = (
    "a model's folder with an adapter merged in, a shard in memory at a time; where the folder's "
    "names aren't the model's own, transformers loads it whole"
)
EXAMPLES = """\
python -m lora_lite_func merge model_folder adapter.safetensors merged_folder
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments to its parser."""
    parser.add_argument("base", help="the model's folder, with safetensors")
    parser.add_argument("adapter", help="an adapter's file of any form, or a PEFT folder")
    parser.add_argument("output", help="a new or empty folder")
    add_component(parser)
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace a model in a folder that isn't empty, and merge values that aren't finite",
    )


def run(given: argparse.Namespace) -> Answer:
    """Merge the adapter, and answer with the names of the tensors that were merged."""
    shards, target = Shards(given.base), Path(os.fsdecode(given.output))
    check_out(shards.folder, target, given.force)
    try:
        params = open_adapter(
            given.adapter,
            lambda **how: meta_model(shards, **how),
            component=given.component,
            rename=given.rename,
        )
        jobs = jobs_of(shards, params, of_modules=form_of(given.adapter) == "peft")
    except LoraLiteError as error:
        names = write_whole(shards, given, target, error)
        how = ", loaded whole by transformers"
    else:
        check_finite(params, given.force)
        write_shards(shards, jobs, target, force=given.force, progress=bar)
        names, how = sorted(jobs), ""
    text = printable(f"{len(names)} tensors merged into {given.output}{how}")
    return text, {"output": given.output, "merged": names, "whole": bool(how)}, 0
