"""init: writes a new adapter for a model's folder, which changes nothing until it is trained."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from ..algebra.tree import num_params
from ..api.init import init
from ..core.errors import CheckpointError, printable
from ..io.checkpoint import save
from ..io.shards import Shards
from .base_model import base_weights
from .method_options import add_method_options, config_from, method_named
from .opening import Answer

__all__ = ["EXAMPLES", "HELP", "add_arguments", "run"]

_OF_MODULES = ("module", "embedding")
"""First kinds of methods that need a model's own modules, which files don't tell."""
HELP = "a new adapter for a model's folder, whose weights are read one at a time where it needs any"
EXAMPLES = """\
python -m lora_lite_func init model_folder adapter.safetensors --r 16 --targets q_proj v_proj
python -m lora_lite_func init model_folder pissa.safetensors --method pissa --set svd_niter=4
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments to its parser."""
    parser.add_argument("model", help="the model's folder, with safetensors")
    parser.add_argument("output", help="the adapter's file, to be written")
    add_method_options(parser)
    parser.add_argument("--seed", type=int, default=0, help="of the random start (default 0)")
    parser.add_argument("--force", action="store_true", help="replace a file that is there")


def run(given: argparse.Namespace) -> Answer:
    """Write the adapter, and answer with what it is.

    Raises:
        CheckpointError: the output is there already.
    """
    variant = method_named(given.method)
    cfg = config_from(given, variant)
    target = Path(os.fsdecode(given.output))
    if target.exists() and not given.force:
        raise CheckpointError(f"{target} is there already; --force replaces it")
    shards = _Counted(given.model)
    try:
        whole = variant.sites[0] in _OF_MODULES
        params = init(base_weights(shards, whole), cfg, seed=given.seed)
    finally:
        shards.close()
    save(params, target)
    count = num_params(params)
    text = f"{given.method}: {len(params)} sites, {count:,} numbers, in {given.output}"
    return printable(text), {"output": given.output, "sites": list(params), "numbers": count}, 0


class _Counted(Shards):
    """A folder that counts the matrices read, in a bar where tqdm is installed and the output is a
    terminal.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self._bar: Any = None

    def read(self, name: str) -> Tensor:
        """Read a tensor by name, and count it."""
        found = super().read(name)
        if found.ndim > 1 and sys.stderr.isatty():
            self._count()
        return found

    def _count(self) -> None:
        if self._bar is None:
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._bar = tqdm(desc="weights", unit="matrix")
        self._bar.update()

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()
