"""What must hold after training.

The saved file gives the same predictions on a fresh base, and no tensor of the base has changed a
bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

import lora_lite_func as ll

from .training import Evaluation, Run, Task

__all__ = ["Fact", "base_fact", "original_tensors", "reload_fact", "save", "untold"]

TOLERANCE = 1e-5  # of outputs on the same machine; 0 is what is expected


class Fact(NamedTuple):
    """Something checked, as a line to print."""

    name: str
    holds: bool
    text: str
    difference: float | None = None


# -------------------------------------------------------------------------------------------- files
def save(run: Run, out: Path) -> list[str]:
    """Write the adapter to <method>.safetensors and the head to <method>.head.safetensors; their
    names.
    """
    names = []
    if run.params:
        ll.save(run.params, out / f"{run.method}.safetensors")
        names.append(f"{run.method}.safetensors")
    if run.head:
        head = {name: t.detach().contiguous() for name, t in run.head.items()}
        safetensors.torch.save_file(head, out / f"{run.method}.head.safetensors")
        names.append(f"{run.method}.head.safetensors")
    return names


def reload_fact(task: Task, run: Run, out: Path) -> Fact:
    """Whether the files, on a base loaded again, give the outputs (and texts) that the trained
    adapter gave.
    """
    assert run.final is not None
    fresh = task.fresh()
    device = next(fresh.model.parameters()).device
    adapter = ll.load(out / f"{run.method}.safetensors", model=fresh.model)
    head = (
        safetensors.torch.load_file(out / f"{run.method}.head.safetensors", device=str(device))
        if run.head
        else {}
    )
    again = fresh.evaluate(_to(adapter, device), head)
    return _compared(run.method, run.final, again)


def _to(adapter: ll.Adapter, device: torch.device) -> ll.Adapter:
    moved: ll.Adapter = torch.utils._pytree.tree_map(lambda t: t.to(device), adapter)
    return moved


def _compared(method: str, first: Evaluation, again: Evaluation) -> Fact:
    difference = (first.outputs - again.outputs).abs().max().item()
    texts = sum(a != b for a, b in zip(first.texts, again.texts, strict=True))
    text = (
        f"{method}: loaded onto a fresh base, {len(again.outputs)} held-out predictions differ by "
        f"at most {difference:.1e}"
    )
    if first.texts:
        text += f", {texts} of {len(again.texts)} generated texts differ"
    return Fact(method, difference <= TOLERANCE and texts == 0, text, difference)


# --------------------------------------------------------------------------------------------- base
def untold(model: nn.Module, source: Path) -> dict[str, Tensor]:
    """Copies of the model's tensors that its files don't hold, to compare with later; most models
    have none.
    """
    told = {name for name, _ in _matched(model, source)}
    places = {t.data_ptr() for name, t in model.state_dict().items() if name in told}
    return {
        name: t.clone()
        for name, t in model.state_dict().items()
        if name not in told and t.data_ptr() not in places
    }


def base_fact(model: nn.Module, source: Path, before: dict[str, Tensor], after: str) -> Fact:
    """Whether every tensor of the base is, bit for bit, what its files hold (and what `untold`
    copied).
    """
    state = model.state_dict()
    pairs = [*((name, t) for name, t in _matched(model, source)), *before.items()]
    changed = [name for name, t in pairs if not _same_bits(state[name], t)]
    gradients = [name for name, p in model.named_parameters() if p.grad is not None]
    text = (
        f"base after {after}: {len(pairs) - len(changed)} of {len(pairs)} tensors bit-identical to "
        f"the files it was loaded from"
    )
    if changed:
        text += f"; changed: {', '.join(changed[:3])}"
    if gradients:
        text += f"; with a gradient: {', '.join(gradients[:3])}"
    return Fact("base", bool(pairs) and not changed and not gradients, text)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    a, b = a.detach().cpu().contiguous(), b.detach().cpu().contiguous()
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))
    )


def _matched(model: nn.Module, source: Path) -> Iterator[tuple[str, Tensor]]:
    """(the model's name, the file's tensor) for the tensors of both; files may leave out or add the
    base model's prefix.
    """
    state = model.state_dict()
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for name, tensor in original_tensors(source):
        known = next(
            (n for n in (name, name.removeprefix(prefix), prefix + name) if n in state), None
        )
        if known is not None:
            yield known, tensor


def original_tensors(source: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a folder's weights: safetensors, in one file or in shards, else
    pytorch_model.bin.
    """
    index = source / "model.safetensors.index.json"
    if index.exists():
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [source / shard for shard in shards]
    else:
        files = [file for file in (source / "model.safetensors",) if file.exists()]
    for file in files:
        yield from safetensors.torch.load_file(file).items()
    if not files and (source / "pytorch_model.bin").exists():
        yield from torch.load(
            source / "pytorch_model.bin", map_location="cpu", weights_only=True
        ).items()
