"""Cross-entropy of the tokens to learn, per row of a batch."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lora_lite_func as ll

from ..training import Batch
from .encoding import IGNORED, Encoded, packed

__all__ = ["calibration", "check_packing", "held_out_losses", "row_losses"]


def row_losses(model: Any, params: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """(sums (n,) of the learned tokens' losses, how many those are (n,)), for each row.

    Args:
        model: the base.
        params: what `ll.apply` takes.
        batch: as encoding makes it.
    """
    labels = batch["labels"][:, 1:]
    learned = labels != IGNORED
    inputs = {name: t for name, t in batch.items() if name != "labels"}
    columns = learned.any(0).nonzero().squeeze(1)
    few = _can_leave_out_logits(type(model).forward) and len(columns) < labels.shape[1]
    if few:  # the head's product is a good part of a small model's time
        inputs["logits_to_keep"] = columns
        labels = labels[:, columns]
    logits = ll.apply(model, params, **inputs, use_cache=False).logits
    logits = logits if few else logits[:, :-1]  # (n, columns, vocabulary)
    losses = F.cross_entropy(
        logits.float().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
    )
    return losses.sum(1), learned.sum(1)


@functools.cache
def _can_leave_out_logits(forward: Any) -> bool:
    return "logits_to_keep" in inspect.signature(forward).parameters


@torch.no_grad()
def held_out_losses(model: Any, params: Any, batches: Sequence[Batch]) -> Tensor:
    """The mean loss of each row's learned tokens (n,)."""
    parts = [sums / counts for sums, counts in (row_losses(model, params, b) for b in batches)]
    return torch.cat(parts).cpu()


@torch.no_grad()
def check_packing(model: Any, rows: Sequence[Encoded], pad: int, device: str) -> None:
    """Refuse a model whose packed examples see each other.

    Raises:
        SystemExit: the second of two examples has other losses behind the first than alone.
    """
    found = []
    for groups in ([list(rows[:2])], [[row] for row in rows[:2]]):
        batch = {name: t.to(device) for name, t in packed(groups, pad).items()}
        sums, _ = row_losses(model, (), batch)
        found.append(sums.sum())
    together, apart = (value.item() for value in found)
    if abs(together - apart) > 1e-2 * max(1.0, abs(apart)):
        raise SystemExit(
            f"--pack: {type(model).__name__} lets packed examples see each other (their losses add "
            f"up to {together:.4g}, alone to {apart:.4g}); train it without --pack"
        )


def calibration(batches: Sequence[Batch]) -> dict[str, Any]:
    """The keywords of `ll.init` for methods that start from data: padded batches and their loss."""
    inputs = [{name: b[name] for name in ("input_ids", "attention_mask")} for b in batches]

    def loss(output: Any, batch: tuple[Any, Batch]) -> Tensor:
        logits = output.logits[:, :-1].float().transpose(1, 2)  # (n, vocabulary, tokens - 1)
        return F.cross_entropy(logits, batch[1]["labels"][:, 1:], ignore_index=IGNORED)

    return {"calibration_data": list(zip(inputs, batches, strict=True)), "loss_fn": loss}
