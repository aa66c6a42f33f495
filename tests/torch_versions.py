"""What older versions of torch can't do, by the tests that ask for it: each with its reason."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.func import vmap
from torch.utils.checkpoint import checkpoint

from lora_lite_func.core.torch_internals import TRACES_IDS

GRAPHS_OF_UNLIKE_STRENGTHS = 1 if TRACES_IDS else 2
"""How many graphs serve adapters of three alphas: torch 2.8 makes a float of a config a constant of
the first graph, and an input of the second.
"""


GROUPED = frozenset({"mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"})
"""The families of transformers' models whose experts are one grouped product."""


def _runs(call: Callable[[], Any]) -> bool:
    try:
        call()
    except RuntimeError:
        return False
    return True


@functools.cache
def transforms_expanded_gradients() -> bool:
    """Whether the gradient of an inverse Fourier transform may be an expanded number (what `sum`
    gives): MKL as torch 2.8 calls it refuses.
    """
    spectrum = torch.ones(3, 3, dtype=torch.complex128, requires_grad=True)
    return _runs(lambda: torch.fft.irfft(spectrum, n=4).sum().backward())


@functools.cache
def checkpoints_in_vmap() -> bool:
    """Whether vmap can go through torch's checkpoint: what saves its inputs has no rule in 2.8."""
    inner = lambda x: checkpoint(torch.sin, x, use_reentrant=False)  # noqa: E731
    return _runs(lambda: vmap(inner)(torch.ones(2, 2)))


def groups_in_grad() -> bool:
    """Whether transformers' grouped products go through torch.func.grad: they ask tensors for their
    addresses up to torch 2.10, and those of a transform have none.
    """
    return tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)


def skip_without(can: Callable[[], bool]) -> None:
    """Skip the test that calls it where this torch can't do what it needs."""
    if not can():
        reason = " ".join((can.__doc__ or "").split())
        pytest.skip(f"torch {torch.__version__}: {reason}")
