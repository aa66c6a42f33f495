"""A run's state on disk: one that is resumed goes on bit by bit as if it had never stopped."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree

from .training import State

__all__ = ["read_state", "write_state"]


def write_state(file: Path, state: State, best: dict[str, Any]) -> None:
    """Write a state, and what has been best so far, whole or not at all."""
    leaves = pytree.tree_leaves((state.trainable, state.optimizer))
    part = file.with_name(file.name + ".part")
    held = {"step": state.step, "leaves": leaves, "random": state.random, "best": best}
    torch.save(held, part)
    os.replace(part, file)


def read_state(file: Path, new: State, device: str) -> tuple[State, dict[str, Any]]:
    """The state of a file, and what was best; the random state is put back, too.

    Raises:
        SystemExit: the file is of another adapter than the one that `new` has.
    """
    try:
        held = torch.load(file, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise SystemExit(
            f"--resume: {file} isn't there; has the run come to a checkpoint?"
        ) from None
    leaves, form = pytree.tree_flatten((new.trainable, new.optimizer))
    shapes = [t.shape for t in held["leaves"]]
    if shapes != [t.shape for t in leaves]:
        raise SystemExit(f"--resume: {file} is of another adapter than the run's options describe")
    trainable, optimizer = pytree.tree_unflatten(held["leaves"], form)
    random = [t.cpu() for t in held["random"]]
    torch.set_rng_state(random[0])
    if len(random) > 1 and torch.cuda.is_available():
        torch.cuda.set_rng_state(random[1])
    return State(held["step"], trainable, optimizer, random), held["best"]
