"""Models and adapters the tests are made of. No network, no files: everything is built here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_lite_func as ll


class Block(nn.Module):
    """A residual block: two linears of different sizes and a norm, with or without biases."""

    def __init__(self, width: int, inner: int, bias: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, inner, bias=bias)
        self.down = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """A few blocks and an output head, which no config targets by default."""

    def __init__(
        self, width: int = 16, inner: int = 24, depth: int = 2, out: int = 8, bias: bool = True
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width, inner, bias) for _ in range(depth))
        self.head = nn.Linear(width, out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def seeded(model: Any, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """The model with seeded weights (biases too), in eval mode."""
    gen = torch.Generator().manual_seed(seed)
    model = model.to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(
                torch.randn(p.shape, generator=gen, dtype=torch.float64)
                * (0.3 if p.ndim == 1 else p.shape[-1] ** -0.5)
            )
    return model


def net(seed: int = 0, dtype: torch.dtype = torch.float64, **sizes: Any) -> Net:
    """A Net with seeded weights."""
    made: Net = seeded(Net(**sizes), seed, dtype)
    return made


def moved(params: ll.Adapter, seed: int = 1, size: float = 0.1) -> ll.Adapter:
    """The adapter with noise on its trainable leaves: as if trained."""
    gen = torch.Generator().manual_seed(seed)
    trainable, frozen = ll.partition(params)

    def noisy(t: Tensor) -> Tensor:
        return (t + size * torch.randn(t.shape, generator=gen, dtype=torch.float64).to(t)).to(
            t.dtype
        )

    return ll.combine(pytree.tree_map(noisy, trainable), frozen)


def normal(*shape: int, seed: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    """Seeded numbers, normally distributed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Checkpointed(nn.Module):
    """A module that runs again in the backward pass."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.inner, x, use_reentrant=False)


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """work(0), work(1) ... at once, a thread each; what one of them raises is raised here."""
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(work, range(count)))


def leaves(tree: Any) -> list[Any]:
    """The leaves of a pytree."""
    return pytree.tree_leaves(tree)


def seen_at(model: nn.Module, path: str, batches: list[Any]) -> Tensor:
    """Every input row that came to a layer, collected by a hook on a model of the caller's own."""
    rows: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(
        lambda module, args: rows.append(args[0].reshape(-1, args[0].shape[-1]))
    )
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    return torch.cat(rows)


def close(a: Any, b: Any, tol: float) -> None:
    """Every leaf within tol of the other's, relative to the larger magnitude."""
    for u, v in zip(leaves(a), leaves(b), strict=True):
        assert u.shape == v.shape
        error = (u - v).abs().max().item() if u.numel() else 0.0
        size = max(1.0, v.abs().max().item()) if v.numel() else 1.0
        assert error <= tol * size, f"off by {error:.2e}, allowed {tol * size:.2e}"


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    """Everything a call could have written on a model: tensors, flags, gradients, hooks, attribute
    names, training modes.
    """
    return tuple(_state(model))


def _state(model: nn.Module) -> Iterator[Any]:
    for name, t in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        yield name, id(t), t._version, t.requires_grad, t.grad is None, t.detach().clone()
    for name, module in model.named_modules(remove_duplicate=False):
        hooks = [
            len(value)
            for name, value in sorted(module.__dict__.items())
            if "hook" in name and hasattr(value, "__len__")
        ]
        hooks.append(len(module._non_persistent_buffers_set))
        yield (
            name,
            type(module),
            id(module),
            module.training,
            sorted(module.__dict__),
            hooks,
            list(module._modules),
        )


def same_state(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Two snapshots are bit-equal."""
    return len(a) == len(b) and all(
        _same(u, v) for s, t in zip(a, b, strict=True) for u, v in zip(s, t, strict=True)
    )


def _same(u: Any, v: Any) -> bool:
    if isinstance(u, Tensor):
        return (
            u.dtype == v.dtype
            and u.shape == v.shape
            and bool(((u == v) | (u != u) & (v != v)).all())
        )
    return u == v
