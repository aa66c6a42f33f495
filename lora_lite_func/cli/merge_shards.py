"""Merging into a model's folder shard by shard, without building the model."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..api.apply import attachments_of
from ..core.errors import CheckpointError, UnsupportedError, nearest, short_repr
from ..injection.attachment import Attachment
from ..injection.dense_weight import merge_site
from ..io.shards import PLAIN, Shards
from ..io.writing import write_safetensors
from ..layers.kinds import module_and_name
from .merge_folders import merged_into, others

__all__ = ["Job", "bar", "jobs_of", "write_shards"]


def write_shards(
    shards: Shards,
    jobs: Mapping[str, Job],
    target: Path,
    *,
    force: bool = False,
    progress: Callable[[Iterator[str], int], Iterator[str]] | None = None,
) -> None:
    """Write the folder with the jobs done, with one shard in memory at a time.

    Everything is written in a folder of its own inside the target first, and moved when all of it
    is there. Other files of the base (config, tokenizer) are copied.

    Args:
        shards: the base.
        jobs: what `jobs_of` returned.
        target: a folder, which is made if it isn't there.
        force: whether to replace the files of a model that is there, and to write values that
            aren't finite.
        progress: what wraps the loop over shards.

    Raises:
        CheckpointError: a folder or file can't be read or written.
        UnsupportedError: a weight overflows, or a bias has nowhere to go.
    """
    along = others(shards.folder)
    files: Iterator[str] = iter(shards.files)
    with merged_into(target, shards, force) as work:
        for file in files if progress is None else progress(files, len(shards.files)):
            _write(shards, file, jobs, work, force)
        for entry in along:
            shutil.copy(entry, work / entry.name)


Job = tuple[list[Attachment], str, str | None]
"""(the adapters there, the weight's name, the bias's name)."""


def jobs_of(shards: Shards, params: Any, *, of_modules: bool = False) -> dict[str, Job]:
    """Return {tensor name: what makes it}.

    Args:
        shards: the base.
        params: the adapters.
        of_modules: a parameter of theirs is meant at its own module alone, as PEFT means it.

    Raises:
        CheckpointError: the folder has no tensor for a site.
        UnsupportedError: a method has no dense equivalent, a weight is packed, or the head shares
            a table.
    """
    jobs: dict[str, Job] = {}
    for path, attachments in attachments_of(params).items():
        module_path, leaf = module_and_name(attachments[-1].site)
        prefix = module_path + "." if module_path else ""
        weight, bias = prefix + leaf, prefix + "bias"
        if weight not in shards:
            raise CheckpointError(
                f"{shards.folder}: no tensor {short_repr(weight)} for the site "
                f"{short_repr(path)}; {nearest(weight, shards)}"
            )
        if shards.shapes[weight][1] not in PLAIN:
            raise UnsupportedError(
                f"{short_repr(weight)} is packed ({shards.shapes[weight][1]}); merge into the "
                f"unquantised model instead"
            )
        kind = attachments[-1].site.kind
        table = kind == "parameter" and len(shards.shapes[weight][0]) == 2
        if kind == "embedding" or (of_modules and table):
            _refuse_tied(shards, path, weight)
        jobs[weight] = (
            attachments,
            weight,
            bias if attachments[-1].site.bias and bias in shards else None,
        )
        if bias in shards and attachments[-1].site.bias:
            jobs[bias] = jobs[weight]
    return jobs


def _refuse_tied(shards: Shards, path: str, weight: str) -> None:
    """Refuse a table that the model's head shares. The folder has one tensor for both, and the
    adapter is the table's alone.
    """
    says, shape = shards.config(), shards.shapes[weight][0]
    heads = [
        name
        for name, (other, _) in shards.shapes.items()
        if name != weight and other[:1] == shape[:1] and len(other) == 2
    ]
    named = says.get("architectures")
    writes = isinstance(named, list) and any(
        isinstance(n, str) and re.search("LM|Generation|PreTraining", n) for n in named
    )
    tied = says.get("tie_word_embeddings", writes and not heads)
    if tied is not False and (writes or not named) and says.get("vocab_size", shape[0]) == shape[0]:
        raise UnsupportedError(
            f"{short_repr(path)}: {shards.folder} has one tensor for this table and the model's "
            f"head, and the adapter is the table's alone; merge in memory (ll.merged unties "
            f"them), or adapt the table under its full name in target_parameters"
        )


def _write(shards: Shards, file: str, jobs: Mapping[str, Job], work: Path, force: bool) -> None:
    tensors: dict[str, Tensor] = {}
    made: dict[str, Tensor] = {}  # a weight and its bias come of one merge
    with shards.open(file) as opened:
        for name in opened.keys():  # noqa: SIM118
            if name not in jobs:
                tensors[name] = opened.get_tensor(name)
                continue
            if name not in made:
                found = _merged(shards, jobs[name])
                made |= {n: t for n, t in found.items() if shards[n] == file}
            tensors[name] = made.pop(name)
            if not force and not tensors[name].isfinite().all():
                raise UnsupportedError(
                    f"{short_repr(name)}: the merged tensor holds NaN or infinity in "
                    f"{tensors[name].dtype}; --force writes it all the same"
                )
        write_safetensors(tensors, work / file, shards.metadata[file] or {"format": "pt"}, "merge")


def _merged(shards: Shards, job: Job) -> dict[str, Tensor]:
    """Return {tensor name: what a job makes of it}, of the weight and of the bias if there is
    one.
    """
    attachments, weight, bias = job
    W, b = shards.read(weight), None if bias is None else shards.read(bias)
    new, moved = merge_site(None, attachments, W, b)
    if bias is None and moved is not None:
        raise UnsupportedError(
            f"{short_repr(attachments[-1].site.path)}: {attachments[-1].variant.name} merges "
            f"into a bias, and this layer has none in the folder; "
            "leave the layer out, or keep the adapter unmerged"
        )
    found = {weight: new} if bias is None or moved is None else {weight: new, bias: moved}
    return {name: t.contiguous() for name, t in found.items()}


def bar(files: Iterator[str], count: int) -> Iterator[str]:
    """Return the shards with a progress bar, where tqdm is installed and the output is a
    terminal.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        return files
    return iter(tqdm(files, total=count, unit="shard", disable=not sys.stderr.isatty()))
