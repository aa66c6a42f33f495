"""merge_folder: a model's folder with an adapter merged in, shard by shard, without building the model."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from ..api.apply import attachments_of
from ..core.errors import CheckpointError, UnsupportedError, nearest, short_repr
from ..injection.attachment import Attachment
from ..injection.dense_weight import merge_site
from ..interop.open import open_adapter
from ..io.model_folder import Shards, meta_model
from ..layers.kinds import module_and_name

__all__ = ["bar", "merge_folder"]

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")


def merge_folder(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    progress: Callable[[Iterator[str], int], Iterator[str]] | None = None,
) -> list[str]:
    """Write a model's folder with the adapter merged into its weights; returns the merged tensors'
    names.

    One shard is in memory at a time. Everything is written in a folder of its own inside `out`
    first and moved when all of it is there. Other files of the base (config, tokenizer) are copied.

    Args:
        base: a folder with safetensors shards.
        adapter: a file of `ll.save`, or a PEFT folder.
        out: made if it isn't there.
        force: write into a folder that isn't empty; files of the same names are replaced.
        progress: wraps the loop over shards.

    Raises:
        CheckpointError: a folder or file that can't be read, a site that the model hasn't, an `out`
            that isn't empty or is the base.
        UnsupportedError: a method without a dense equivalent, a packed weight, a bias with nowhere
            to go.
    """
    shards = Shards(base)
    target = Path(os.fsdecode(out))
    _check_out(shards.folder, target, force)
    others = _others(shards.folder)
    jobs = _jobs(shards, open_adapter(adapter, lambda **how: meta_model(shards, **how)))
    files: Iterator[str] = iter(shards.files)
    with _beside(target) as work:
        for file in files if progress is None else progress(files, len(shards.files)):
            _write(shards, file, jobs, work)
        for entry in others:
            shutil.copyfile(entry, work / entry.name)
        for entry in sorted(work.iterdir()):
            os.replace(entry, target / entry.name)
    return sorted(jobs)


def _others(folder: Path) -> list[Path]:
    """The files that go along as they are: config, tokenizer.

    Raises:
        CheckpointError: one is a link to a file elsewhere, whose contents would be copied out; the
            hub's cache links to its own blobs.
    """
    found = [
        f
        for f in sorted(folder.iterdir())
        if f.is_file() and not f.name.endswith(_WEIGHTS) and not f.name.startswith("adapter_")
    ]
    homes = (folder.resolve(), folder.resolve().parent.parent / "blobs")
    for file in found:
        if file.resolve().parent not in homes:
            raise CheckpointError(
                f"{file}: a link that leads out of its folder; put a copy of the file there, or "
                f"remove it"
            )
    return found


def _check_out(base: Path, target: Path, force: bool) -> None:
    try:
        if target.exists() and target.samefile(base):
            raise CheckpointError(f"{target}: is the base itself; merge into another folder")
        if target.exists() and not target.is_dir():
            raise CheckpointError(f"{target}: expected a folder")
        if target.is_dir() and any(target.iterdir()) and not force:
            raise CheckpointError(
                f"{target}: isn't empty; choose another folder, or --force to replace files of "
                f"the same names"
            )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{target}: {error}") from None


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A working folder inside the target, gone afterwards; so is a target that was made for
    nothing.
    """
    new = not target.exists()
    try:
        work = target / f".merging-{secrets.token_hex(6)}"
        work.mkdir(parents=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{target}: can't be written: {error}") from None
    done = False
    try:
        yield work
        done = True
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{target}: can't be written: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if new and not done and not any(target.iterdir()):
            target.rmdir()


Job = tuple[list[Attachment], str, str | None]
"""(the adapters there, the weight's name, the bias's name)."""


def _jobs(shards: Shards, params: Any) -> dict[str, Job]:
    """{tensor name: what makes it}."""
    jobs: dict[str, Job] = {}
    for path, attachments in attachments_of(params).items():
        home, leaf = module_and_name(attachments[-1].site)
        prefix = home + "." if home else ""
        weight, bias = prefix + leaf, prefix + "bias"
        if weight not in shards:
            raise CheckpointError(
                f"{shards.folder}: no tensor {short_repr(weight)} for the site "
                f"{short_repr(path)}; {nearest(weight, shards)}"
            )
        if attachments[-1].site.kind == "embedding":
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
    """Refuse a table that the model's head shares: the folder has one tensor for both, and the
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
            f"head, and the adapter is the table's alone; "
            "merge in memory (ll.merged unties them), or adapt the table under its full name in "
            "target_parameters"
        )


def _write(shards: Shards, file: str, jobs: Mapping[str, Job], work: Path) -> None:
    tensors: dict[str, Tensor] = {}
    with shards.open(file) as opened:
        for name in opened.keys():  # noqa: SIM118
            tensors[name] = (
                _merged(shards, name, jobs[name]) if name in jobs else opened.get_tensor(name)
            )
        safetensors.torch.save_file(tensors, work / file, shards.metadata[file] or {"format": "pt"})


def _merged(shards: Shards, name: str, job: Job) -> Tensor:
    attachments, weight, bias = job
    W, b = shards.read(weight), None if bias is None else shards.read(bias)
    if not W.is_floating_point() or W.element_size() == 1:
        raise UnsupportedError(
            f"{short_repr(weight)} is packed ({W.dtype}); merge into the unquantised model instead"
        )
    new, moved = merge_site(None, attachments, W, b)
    if bias is None and moved is not None:
        raise UnsupportedError(
            f"{short_repr(attachments[-1].site.path)}: {attachments[-1].variant.name} merges "
            f"into a bias, and this layer has none in the folder; "
            "leave the layer out, or keep the adapter unmerged"
        )
    result = new if name == weight else moved
    return (b if result is None else result).contiguous()  # type: ignore[union-attr]


def bar(files: Iterator[str], count: int) -> Iterator[str]:
    """The shards with a progress bar, where tqdm is installed and somebody watches."""
    try:
        from tqdm import tqdm
    except ImportError:
        return files
    return iter(tqdm(files, total=count, unit="shard", disable=not sys.stderr.isatty()))
