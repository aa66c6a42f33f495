"""Each method against its paper's formula, written slowly and densely by hand: W' and b' of `ll.merge`, and the output of `ll.apply`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import close, moved
from torch import Tensor, nn

import lora_lite_func as ll

Dense = tuple[Tensor, Tensor | None]
Oracle = Callable[[Any, Tensor, Tensor | None, Any], Dense]
ORACLES: list[Any] = []


def oracle(config: ll.AdapterConfig, d_in: int = 16, d_out: int = 24, **more: Any) -> Callable[[Oracle], Oracle]:
    """A row: the formula below is what `config` does to a layer of these sizes."""

    def row(f: Oracle) -> Oracle:
        settings = ",".join(f"{k}={v}" for k, v in more.items())
        ORACLES.append(pytest.param(f, config, d_in, d_out, id=f"{f.__name__[1:]}-{d_out}x{d_in}{settings and '-' + settings}"))
        return f

    return row


def layer(d_in: int, d_out: int, bias: bool, seed: int = 0) -> nn.Linear:
    """A frozen layer with seeded weights, float64."""
    gen = torch.Generator().manual_seed(seed)
    made = nn.Linear(d_in, d_out, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        for t in made.parameters():
            t.copy_(torch.randn(t.shape, generator=gen, dtype=torch.float64) * 0.3)
    return made


def blockdiag(blocks: Any) -> Tensor:
    return torch.block_diag(*blocks)


def skew(q: Tensor, b: int) -> Tensor:
    """Entry by entry: the strict upper triangle, row by row, and its negative below."""
    Q = torch.zeros(b, b, dtype=q.dtype)
    entries = iter(q)
    for i in range(b):
        for j in range(i + 1, b):
            Q[i, j] = next(entries)
            Q[j, i] = -Q[i, j]
    return Q


def cayley(Q: Tensor) -> Tensor:
    """(I + Q)(I - Q)^-1."""
    eye = torch.eye(len(Q), dtype=Q.dtype)
    return (eye + Q) @ torch.linalg.inv(eye - Q)


# ------------------------------------------------------------------------------------------------------- the formulas
@oracle(ll.OLoRAConfig(r=4, alpha=6.0))
@oracle(ll.OLoRAConfig(r=4, alpha=6.0), d_in=24, d_out=16)
def _olora(p: Any, W: Tensor, b: Tensor | None, cfg: Any) -> Dense:
    Q, R = torch.linalg.qr(W)
    return W + 1.5 * (p["lora_B"] @ p["lora_A"] - Q[:, :4] @ R[:4]), b


@oracle(ll.LoHaConfig(r=2, alpha=6.0), what="Khatri-Rao")
@oracle(ll.LoHaConfig(r=4, alpha=12.0), what="dense")
def _loha(p: Any, W: Tensor, b: Tensor | None, cfg: Any) -> Dense:
    return W + 3.0 * (p["lora_w1_a"] @ p["lora_w1_b"]) * (p["lora_w2_a"] @ p["lora_w2_b"]), b


@oracle(ll.LoKrConfig(r=2, alpha=6.0))
@oracle(ll.LoKrConfig(r=8, alpha=6.0), what="full")
@oracle(ll.LoKrConfig(r=2, alpha=6.0, factor=8), what="swapped")
@oracle(ll.LoKrConfig(r=2, alpha=6.0, decompose_both=True), d_in=100, d_out=72, what="both")
@oracle(ll.LoKrConfig(r=2, alpha=6.0), d_in=13, d_out=7, what="primes")
def _lokr(p: Any, W: Tensor, b: Tensor | None, cfg: Any) -> Dense:
    W1 = p["lora_w1"] if "lora_w1" in p else p["lora_w1_a"] @ p["lora_w1_b"]
    W2 = p["lora_w2"] if "lora_w2" in p else p["lora_w2_a"] @ p["lora_w2_b"]
    assert W1.shape[0] <= W2.shape[0]
    assert W1.shape[1] <= W2.shape[1]
    s = 1.0 if "lora_w1" in p and "lora_w2" in p else cfg.alpha / cfg.r
    return W + s * torch.kron(W1.contiguous(), W2.contiguous()), b


@oracle(ll.VeRAConfig(r=6))
def _vera(p: Any, W: Tensor, b: Tensor | None, cfg: Any) -> Dense:
    diagonal_b, diagonal_d = torch.diag(p["lora_vera_b"]), torch.diag(p["lora_vera_d"])
    return W + diagonal_b @ p["lora_vera_B"] @ diagonal_d @ p["lora_vera_A"], b


@oracle(ll.OFTConfig(block_size=2))
@oracle(ll.OFTConfig(block_size=3), d_in=12)
@oracle(ll.OFTConfig(block_size=4))
@oracle(ll.OFTConfig(block_size=5), d_in=15)
@oracle(ll.OFTConfig(block_size=16), what="whole")
@oracle(ll.OFTConfig(block_size=4, block_share=True), what="share")
def _oft(p: Any, W: Tensor, b: Tensor | None, cfg: Any) -> Dense:
    blocks = [cayley(skew(q, cfg.block_size)) for q in p["lora_oft_q"]]
    R = blockdiag(blocks * (W.shape[1] // cfg.block_size if cfg.block_share else 1))
    close(R @ R.mT, torch.eye(len(R), dtype=R.dtype), 1e-12)
    return W @ R.mT, b


@oracle(ll.OFTConfig(block_size=4, cayley="neumann"))
@oracle(ll.OFTConfig(block_size=8, cayley="neumann"))
def _oft_neumann(p: Any, W: Tensor, b: Tensor | None, cfg: Any) -> Dense:
    eye = torch.eye(cfg.block_size, dtype=W.dtype)
    blocks = [(eye + Q) @ (eye + Q + Q @ Q + Q @ Q @ Q) for Q in (skew(q, cfg.block_size) for q in p["lora_oft_q"])]
    return W @ blockdiag(blocks).mT, b


def butterfly(n: int, b: int, i: int) -> Tensor:
    """P_i as a matrix: in each run of b 2^i, the even half-blocks first, then the odd ones."""
    half, run = b // 2, b * 2**i
    order = []
    for start in range(0, n, run):
        chunks = [list(range(k, k + half)) for k in range(start, start + run, half)]
        order += [j for chunk in chunks[0::2] + chunks[1::2] for j in chunk]
    return torch.eye(n, dtype=torch.float64)[order]


@oracle(ll.BOFTConfig(block_size=4, m=1))
@oracle(ll.BOFTConfig(block_size=4, m=3))
@oracle(ll.BOFTConfig(block_size=2, m=4))
def _boft(p: Any, W: Tensor, b: Tensor | None, cfg: Any) -> Dense:
    n = W.shape[1]
    R = torch.eye(n, dtype=W.dtype)
    for i in range(cfg.m):
        P = butterfly(n, cfg.block_size, i)
        R = P @ blockdiag([cayley(skew(q, cfg.block_size)) for q in p["lora_boft_q"][i]]) @ P.mT @ R
    return torch.diag(p["lora_boft_s"]) @ W @ R.mT, b


@oracle(ll.AdaLoRAConfig(r=4, alpha=6.0))
def _adalora(p: Any, W: Tensor, b: Tensor | None, cfg: Any) -> Dense:
    return W + 1.5 * p["lora_B"] @ torch.diag(p["lora_E"]) @ p["lora_A"], b


@oracle(ll.BitFitConfig())
def _bitfit(p: Any, W: Tensor, b: Tensor | None, cfg: Any) -> Dense:
    return W, p["lora_b"] if b is None else b + p["lora_b"]


# -------------------------------------------------------------------------------------------------------------- tests
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("formula", "cfg", "d_in", "d_out"), ORACLES)
def test_merged_and_applied_are_the_formula(formula: Oracle, cfg: ll.AdapterConfig, d_in: int, d_out: int, bias: bool) -> None:
    model = layer(d_in, d_out, bias)
    params = moved(ll.init(model, cfg, seed=7), size=0.3)
    W, b = formula(params[""], model.weight.detach(), model.bias.detach() if bias else None, cfg)
    assert (W - model.weight).abs().max() > 1e-3 or not isinstance(b, type(model.bias))
    merged = ll.merge(model, params)
    close(merged["weight"], W, 1e-10)
    assert ("bias" in merged) == ((b is not None and (not bias or not torch.equal(b, model.bias))) or "bias" in merged)
    if "bias" in merged:
        close(merged["bias"], b, 1e-10)
    x = torch.randn(2, 5, d_in, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = x @ W.mT if b is None else x @ W.mT + b
    close(ll.apply(model, params, x), y, 1e-10)


def test_vera_shapes_share_their_random_factors() -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 12))
    params = ll.init(model, ll.VeRAConfig(r=4, exclude_names=()), seed=5)
    for name in ("lora_vera_A", "lora_vera_B"):
        assert torch.equal(params["0"][name], params["2"][name])
    again = ll.init(model, ll.VeRAConfig(r=4, exclude_names=(), projection_seed=1))
    assert not torch.equal(again["0"]["lora_vera_A"], params["0"]["lora_vera_A"])


def test_coft_projection_bounds_every_block_and_leaves_short_ones() -> None:
    from lora_lite_func.variants.oft import project

    cfg = ll.OFTConfig(block_size=4, coft_eps=0.2)
    q = torch.tensor([[1.0, 2.0, 0.0, 0.0, 0.0, 2.0], [0.01, 0.0, 0.0, 0.0, 0.0, 0.0], [0.0] * 6, [0.3] * 6], dtype=torch.float64)
    done = project(cfg, {"lora_oft_q": q})["lora_oft_q"]
    norms = torch.stack([skew(row, 4).norm() for row in done])
    close(norms, torch.tensor([0.1, 0.01 * 2**0.5, 0.0, 0.1], dtype=torch.float64), 1e-12)
    close(done[0], q[0] * (0.1 / skew(q[0], 4).norm()), 1e-12)
    assert torch.equal(done[1:3], q[1:3])
    slope = torch.func.grad(lambda q: project(cfg, {"lora_oft_q": q})["lora_oft_q"].sum())(q)
    assert slope.isfinite().all()


@pytest.mark.parametrize(
    ("cfg", "d_in", "match"),
    [
        (ll.OFTConfig(block_size=4), 18, r"divisible by block_size=4, found d_in=18; block_size=2 or 3 or 6 fits"),
        (ll.OFTConfig(block_size=4), 7, r"block_size=7 fits"),
        (ll.BOFTConfig(block_size=4, m=3), 24, r"runs of 16 features.*d_in=24; m=2 fits"),
        (ll.BOFTConfig(block_size=4, m=2), 18, r"block_size=2 or 6"),
        (ll.OLoRAConfig(r=16), 12, r"rank of at most 12, found r=16"),
    ],
    ids=repr,
)
def test_what_does_not_divide_is_refused_with_what_fits(cfg: ll.AdapterConfig, d_in: int, match: str) -> None:
    with pytest.raises(ll.UnsupportedError, match=match):
        ll.init(nn.Linear(d_in, 24), cfg)
