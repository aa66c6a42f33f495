"""Each method against its paper's formula, written slowly and densely by hand: W' and b' of
`ll.merge`, and the output of `ll.apply`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from formulas import Dense, Oracle, blockdiag, cayley, check_formula, oracles, skew
from helpers import close, moved
from linear_layers import layer
from torch import Tensor, nn

import lora_lite_func as ll

ORACLES: list[Any] = []
oracle = oracles(ORACLES)


# ------------------------------------------------------------------------------------- the formulas
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
@oracle(ll.LoKrConfig(r=2, alpha=6.0, w1_shapes={"": (8, 2)}), d_in=24, d_out=16, what="given")
def _lokr(p: Any, W: Tensor, b: Tensor | None, cfg: Any) -> Dense:
    W1 = p["lora_w1"] if "lora_w1" in p else p["lora_w1_a"] @ p["lora_w1_b"]
    W2 = p["lora_w2"] if "lora_w2" in p else p["lora_w2_a"] @ p["lora_w2_b"]
    if cfg.w1_shapes:
        assert [*cfg.w1_shapes] == [("", tuple(W1.shape))]
    else:
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
    blocks = [
        (eye + Q) @ (eye + Q + Q @ Q + Q @ Q @ Q)
        for Q in (skew(q, cfg.block_size) for q in p["lora_oft_q"])
    ]
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


@oracle(ll.C3AConfig(block_size=4))
@oracle(ll.C3AConfig(block_size=5), d_in=15, d_out=10)
@oracle(ll.C3AConfig(block_size=8))
def _c3a(p: Any, W: Tensor, b: Tensor | None, cfg: Any) -> Dense:
    rows = []
    for kernels in p["lora_w"]:
        # the first row is w
        circulants = [torch.stack([w.roll(shift) for shift in range(len(w))]) for w in kernels]
        rows.append(torch.cat(circulants, dim=1))
    return W + torch.cat(rows) / W.shape[1], b


@oracle(ll.FourierFTConfig(n_frequency=40))
@oracle(ll.FourierFTConfig(n_frequency=15), d_in=7, d_out=9, what="odd")
@oracle(ll.FourierFTConfig(n_frequency=30), d_in=6, d_out=5, what="all")
def _fourierft(p: Any, W: Tensor, b: Tensor | None, cfg: Any) -> Dense:
    F = torch.zeros_like(W)
    rows, columns = p["lora_idx"].long()
    assert len(set(zip(rows.tolist(), columns.tolist(), strict=True))) == cfg.n_frequency
    for j, k, c in zip(rows, columns, p["lora_c"], strict=True):
        F[j, k] = c
    return W + 150.0 * torch.fft.ifft2(F).real, b


@oracle(ll.MiSSConfig(r=4))
@oracle(ll.MiSSConfig(r=5), what="padded")
@oracle(ll.MiSSConfig(r=4, mode="mini", mini_r=6), what="mini")
def _miss(p: Any, W: Tensor, b: Tensor | None, cfg: Any) -> Dense:
    D, update = p["lora_D"], torch.zeros_like(W)
    for o in range(W.shape[0]):
        for i in range(W.shape[1]):
            update[o, i] = D[i % cfg.r, o % D.shape[1]]
    return W + update, b


@oracle(ll.MiSSConfig(r=4, mode="bat"))
@oracle(ll.MiSSConfig(r=8, mode="bat"))
def _miss_bat(p: Any, W: Tensor, b: Tensor | None, cfg: Any) -> Dense:
    new, r = W.clone(), cfg.r
    for o, D in enumerate(p["lora_D"]):
        for i in range(W.shape[1] // r):
            at = slice(o * r, (o + 1) * r), slice(i * r, (i + 1) * r)
            new[at] = W[at] @ (torch.eye(r, dtype=W.dtype) + D) + D
    return new, b


@oracle(ll.SSVDConfig(r=4))
@oracle(ll.SSVDConfig(r=4, mode="cayley"))
@oracle(ll.SSVDConfig(r=16, mode="cayley"), d_in=24, d_out=16)
def _ssvd(p: Any, W: Tensor, b: Tensor | None, cfg: Any) -> Dense:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    rest = U[:, cfg.r :] @ torch.diag(S[cfg.r :]) @ Vh[cfg.r :]
    K, eye = skew(p["lora_rot_K"], cfg.r), torch.eye(cfg.r, dtype=W.dtype)
    G = eye - 2 * K if cfg.mode == "first_order" else (eye - K) @ torch.linalg.inv(eye + K)
    U, S, Vh = p["lora_U"], p["lora_S"], p["lora_Vh"]  # the same ones, in their stored signs
    return U @ torch.diag(S + p["lora_delta_s"]) @ G @ Vh + rest, b


@oracle(ll.AntiPaSTOConfig(r=8, block_size=4))
@oracle(ll.AntiPaSTOConfig(r=8, block_size=4, basis="U"))
@oracle(ll.AntiPaSTOConfig(r=6, block_size=2, max_angle=0.3), what="bounded")
@oracle(ll.AntiPaSTOConfig(r=6, block_size=2, max_angle=0.3, half_angles=True), what="halved")
@oracle(ll.AntiPaSTOConfig(r=7, basis="none"))
@oracle(ll.AntiPaSTOConfig(r=15, block_size=5), d_in=24, d_out=16)
def _antipasto(p: Any, W: Tensor, b: Tensor | None, cfg: Any) -> Dense:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    rest = U[:, cfg.r :] @ torch.diag(S[cfg.r :]) @ Vh[cfg.r :]
    U, S, Vh, n = p["lora_U"], p["lora_S"], p["lora_Vh"], cfg.block_size
    R = torch.eye(cfg.r, dtype=W.dtype)
    if cfg.basis != "none":
        A = p["lora_rot"] / 2 if cfg.half_angles else p["lora_rot"]
        if cfg.max_angle:
            a = 2 * torch.tan(torch.tensor(cfg.max_angle / 2, dtype=W.dtype))
            A = a * torch.tanh(A / a)
        eye = torch.eye(n, dtype=W.dtype)
        R = blockdiag([torch.linalg.inv(eye - X) @ (eye + X) for X in (skew(q, n) / 2 for q in A)])
        if cfg.max_angle:
            assert torch.arccos(R.diagonal()).max() <= cfg.max_angle
    middle = torch.diag(S + p["lora_delta_s"])
    return U @ (R.mT @ middle if cfg.basis == "U" else middle @ R) @ Vh + rest, b


@oracle(ll.RandLoRAConfig(r=3, alpha=6.0))
@oracle(ll.RandLoRAConfig(r=4, alpha=8.0), d_in=24, d_out=16)
@oracle(ll.RandLoRAConfig(r=5, alpha=10.0), d_in=16, d_out=16)
def _randlora(p: Any, W: Tensor, b: Tensor | None, cfg: Any) -> Dense:
    A, B, lam, gam = (p[n] for n in ("lora_rand_A", "lora_rand_B", "lora_lambda", "lora_gamma"))
    parts = [B[:, j] @ torch.diag(lam[:, j]) @ A @ torch.diag(gam[j]) for j in range(gam.shape[0])]
    assert len(parts) == -(-min(W.shape) // cfg.r)
    close(B.std(), torch.ones((), dtype=W.dtype), 1e-6)
    update = sum(parts)
    return W + 2.0 * (update if W.shape[0] >= W.shape[1] else update.mT), b


@oracle(ll.GraLoRAConfig(r=4, alpha=6.0))
@oracle(ll.GraLoRAConfig(r=8, alpha=12.0, k=4, hybrid_r=0), what="k4")
@oracle(ll.GraLoRAConfig(r=4, alpha=9.0, hybrid_r=2), what="hybrid")
def _gralora(p: Any, W: Tensor, b: Tensor | None, cfg: Any) -> Dense:
    A, B, k = p["lora_A"], p["lora_B"], cfg.k
    group = [slice(g * cfg.r // k, (g + 1) * cfg.r // k) for g in range(k)]
    rows = [
        torch.cat([B[j][:, group[n]] @ A[n][group[j]] for n in range(k)], dim=1) for j in range(k)
    ]
    update = torch.cat(rows)
    if cfg.hybrid_r:
        update = update + p["lora_B_whole"] @ p["lora_A_whole"]
    return W + 1.5 * update, b


@oracle(ll.SHiRAConfig(r=2))
@oracle(ll.SHiRAConfig(r=2, mask="struct"))
@oracle(ll.SHiRAConfig(r=3, mask="struct"), d_in=24, d_out=16)
@oracle(ll.SHiRAConfig(r=2, mask="magnitude"))
def _shira(p: Any, W: Tensor, b: Tensor | None, cfg: Any) -> Dense:
    places = p["lora_idx"].long().T.tolist()
    assert len({tuple(place) for place in places}) == len(p["lora_v"])
    new = W.clone()
    for (o, i), v in zip(places, p["lora_v"], strict=True):
        new[o, i] += v
    if cfg.mask == "magnitude":
        kept = torch.stack([W[o, i].abs() for o, i in places]).min()
        assert (W.abs() > kept).sum() < len(places)
    if cfg.mask == "struct":
        touched = torch.zeros_like(W).index_put(
            tuple(p["lora_idx"].long()), torch.ones(len(places), dtype=W.dtype)
        )
        assert touched.diagonal().all()
        assert touched.all(dim=0).sum() == touched.all(dim=1).sum() == cfg.r
    return new, b


@oracle(ll.HiRAConfig(r=4, alpha=6.0))
def _hira(p: Any, W: Tensor, b: Tensor | None, cfg: Any) -> Dense:
    return W * (1.0 + 1.5 * p["lora_B"] @ p["lora_A"]), b


# -------------------------------------------------------------------------------------------- tests
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("formula", "cfg", "d_in", "d_out"), ORACLES)
def test_merged_and_applied_are_the_formula(
    formula: Oracle, cfg: ll.AdapterConfig, d_in: int, d_out: int, bias: bool
) -> None:
    check_formula(formula, cfg, d_in, d_out, bias)


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
    q = torch.tensor(
        [[1.0, 2.0, 0.0, 0.0, 0.0, 2.0], [0.01, 0.0, 0.0, 0.0, 0.0, 0.0], [0.0] * 6, [0.3] * 6],
        dtype=torch.float64,
    )
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
        (
            ll.OFTConfig(block_size=4),
            18,
            r"divisible by block_size=4, found d_in=18; block_size=2 or 3 or 6 fits",
        ),
        (ll.OFTConfig(block_size=4), 7, r"block_size=7 fits"),
        (ll.BOFTConfig(block_size=4, m=3), 24, r"runs of 16 features.*d_in=24; m=2 fits"),
        (ll.BOFTConfig(block_size=4, m=2), 18, r"block_size=2 or 6"),
        (ll.OLoRAConfig(r=16), 12, r"rank of at most 12, found r=16"),
        (
            ll.C3AConfig(block_size=8),
            12,
            r"divisible by block_size=8, found d_in=12; block_size=4 or 6 or 12 fits",
        ),
        (ll.C3AConfig(block_size=5), 15, r"found d_out=24"),
        (ll.MiSSConfig(r=5, mode="bat"), 15, r"mode 'bat'.*r=5, found d_out=24"),
        (ll.MiSSConfig(mode="mini", mini_r=5), 15, r"mini_r=5, found d_out=24"),
        (ll.FourierFTConfig(n_frequency=200), 8, r"at most d_out \* d_in = 192, found 200"),
        (
            ll.GraLoRAConfig(r=6, k=4),
            8,
            r"r into equal blocks, expected it divisible by k=4, found r=6",
        ),
        (ll.SHiRAConfig(r=8), 8, r"found only 24 x 8 with r=8"),
        (ll.SSVDConfig(r=16), 12, r"rank of at most 12"),
    ],
)
def test_what_does_not_divide_is_refused_with_what_fits(
    cfg: ll.AdapterConfig, d_in: int, match: str
) -> None:
    with pytest.raises(ll.UnsupportedError, match=match):
        ll.init(nn.Linear(d_in, 24), cfg)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: ll.OFTConfig(block_size=1), r"block_size: .*at least 2, found 1"),
        (lambda: ll.OFTConfig(coft_eps=0.0), r"coft_eps: expected a positive bound"),
        (lambda: ll.BOFTConfig(block_size=3), r"even for half-blocks"),
        (lambda: ll.BOFTConfig(m=0), r"m: expected at least one factor"),
        (lambda: ll.LoKrConfig(factor=0), r"factor: expected -1"),
        (lambda: ll.LoKrConfig(w1_shapes={"a": (0, 2)}), r"w1_shapes\['a'\]: expected two sizes"),
        (
            lambda: ll.init(nn.Linear(8, 8), ll.LoKrConfig(w1_shapes={"": (3, 2)})),
            r"W1 of shape \(3, 2\) doesn't divide \(8, 8\)",
        ),
        (lambda: ll.C3AConfig(block_size=0), r"block_size: expected at least 1"),
        (lambda: ll.FourierFTConfig(n_frequency=0), r"n_frequency: expected at least 1"),
        (lambda: ll.MiSSConfig(mini_r=0), r"mini_r: expected at least 1"),
        (lambda: ll.AntiPaSTOConfig(block_size=1), r"block_size: .*at least 2"),
        (lambda: ll.AntiPaSTOConfig(r=6), r"multiple of block_size=4, found 6"),
        (lambda: ll.AntiPaSTOConfig(max_angle=4.0), r"max_angle: .*between 0 and pi"),
        (lambda: ll.GraLoRAConfig(k=0), r"k of at least 1"),
        (lambda: ll.LoHaConfig(dropout=1.0), r"probability"),
    ],
)
def test_what_a_config_cannot_mean_is_refused(make: Any, match: str) -> None:
    with pytest.raises(ll.ConfigError, match=match):
        make()


@pytest.mark.parametrize(
    "cfg",
    [ll.FourierFTConfig(n_frequency=9), ll.SHiRAConfig(r=1), ll.RandLoRAConfig(r=2)],
    ids=lambda c: type(c).__name__,
)
def test_equal_shapes_have_equal_random_parts(cfg: ll.AdapterConfig) -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 12))
    params = ll.init(model, cfg, seed=5)
    frozen = ll.partition(params)[1]
    for name, t in frozen["0"].items():
        if isinstance(t, Tensor):
            assert torch.equal(t, frozen["2"][name])


def test_positions_rounded_by_a_cast_are_refused() -> None:
    model = layer(True, 8, 12)
    params = ll.init(model, ll.SHiRAConfig(r=1))
    assert ll.cast(params, torch.bfloat16)[""]["lora_idx"].dtype == torch.float32
    bound = ll.bind(model, params).to(torch.bfloat16)
    with pytest.raises(
        ll.UnsupportedError, match=r"found torch\.bfloat16.*ll\.cast before ll\.bind"
    ):
        bound(torch.zeros(2, 8, dtype=torch.bfloat16))


@pytest.mark.parametrize("basis", ["V", "U"])
def test_antipasto_steers_both_ways(basis: Any) -> None:
    model = layer(False)
    params = moved(ll.init(model, ll.AntiPaSTOConfig(r=8, basis=basis)), size=0.3)
    turns = []
    for c in (1.0, -1.0):
        p = dict(ll.scale(params, c)[""])
        U, S, Vh = p["lora_U"], p["lora_S"], p["lora_Vh"]
        rest = model.weight - U @ torch.diag(S) @ Vh
        # (S + c d) R(c), or R(c)^T (S + c d)
        middle = U.mT @ (ll.merged(model, ll.scale(params, c)).weight - rest) @ Vh.mT
        value = S + p["lora_delta_s"]
        turns.append(middle / (value[:, None] if basis == "V" else value))
        close(value, S + c * params[""]["lora_delta_s"], 1e-12)
    close(turns[0] @ turns[1], torch.eye(8, dtype=torch.float64), 1e-10)
