"""Each newer method against its paper's formula, as test_formulas.py has the older ones."""

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


def part(W: Tensor, chosen: slice) -> Tensor:
    """W with these singular triplets alone."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, chosen] @ torch.diag(S[chosen]) @ Vh[chosen]


@oracle(ll.LoRAXSConfig(r=4, alpha=6.0))
@oracle(ll.LoRAXSConfig(r=4, alpha=6.0), d_in=24, d_out=16)
def _lora_xs(p: Any, W: Tensor, b: Tensor | None, cfg: Any) -> Dense:
    A, B = p["lora_A"], p["lora_B"]
    close(B @ A, part(W, slice(0, 4)), 1e-12)
    close(A @ A.mT, torch.eye(4, dtype=W.dtype), 1e-12)
    return W + 1.5 * B @ p["lora_R"] @ A, b


@oracle(ll.TinyLoRAConfig(r=3, u=5))
@oracle(ll.TinyLoRAConfig(r=3, u=2), d_in=24, d_out=16)
def _tinylora(p: Any, W: Tensor, b: Tensor | None, cfg: Any) -> Dense:
    A, B = p["lora_A"], p["lora_B"]
    close(B @ A, part(W, slice(0, 3)), 1e-12)
    close(A @ A.mT, B.mT @ B, 1e-12)  # both have the values' roots
    R = sum(v * P for v, P in zip(p["lora_v"], p["lora_P"], strict=True))
    return W + B @ R @ A, b


@oracle(ll.MiLoRAConfig(r=4, alpha=6.0))
@oracle(ll.MiLoRAConfig(r=4, alpha=6.0), d_in=24, d_out=16)
def _milora(p: Any, W: Tensor, b: Tensor | None, cfg: Any) -> Dense:
    """The paper's rewritten weight has lost its minor part, which the factors start as."""
    principal = W - part(W, slice(-4, None))
    return principal + 1.5 * p["lora_B"] @ p["lora_A"], b


@oracle(ll.MiCAConfig(r=4, alpha=6.0))
@oracle(ll.MiCAConfig(r=4, alpha=6.0), d_in=24, d_out=16)
def _mica(p: Any, W: Tensor, b: Tensor | None, cfg: Any) -> Dense:
    B = p["lora_B"]
    close(B @ B.mT @ W, part(W, slice(-4, None)), 1e-12)
    return W + 1.5 * B @ p["lora_A"], b


@oracle(ll.KaSAConfig(r=4, alpha=6.0))
@oracle(ll.KaSAConfig(r=4, alpha=6.0), d_in=24, d_out=16)
def _kasa(p: Any, W: Tensor, b: Tensor | None, cfg: Any) -> Dense:
    """The paper's rewritten weight has its first min(d_in, d_out) - r directions."""
    principal = part(W, slice(0, 12))
    return principal + 1.5 * p["lora_B"] @ torch.diag(p["lora_d"]) @ p["lora_A"], b


@oracle(ll.DEFTConfig(r=4))
@oracle(ll.DEFTConfig(r=4, decomposition="qr"), what="qr")
@oracle(ll.DEFTConfig(r=4, para=True), what="para")
@oracle(ll.DEFTConfig(r=4, decomposition="qr", para=True), what="para_qr")
def _deft(p: Any, W: Tensor, b: Tensor | None, cfg: Any) -> Dense:
    P = p["lora_P"]
    Q = torch.linalg.qr(P)[0] if cfg.decomposition == "qr" else P
    right = Q if cfg.decomposition == "qr" else P.clamp_min(0)
    if cfg.para:
        return W - Q @ right.mT @ W, b
    # the paper's R starts where the first P's directions are filled as they were
    Q = Q * (Q * P).sum(0).sign() if cfg.decomposition == "qr" else Q
    right = Q if cfg.decomposition == "qr" else right
    R = p["lora_right0"].mT @ W + p["lora_R"]
    return W + Q @ (R - right.mT @ W), b


@oracle(ll.PSOFTConfig(r=4))
@oracle(ll.PSOFTConfig(r=4, both_sides=True), d_in=24, d_out=16, what="both_sides")
def _psoft(p: Any, W: Tensor, b: Tensor | None, cfg: Any) -> Dense:
    U, S, Vh = p["lora_U"], torch.diag(p["lora_S"]), p["lora_Vh"]
    close(U @ S @ Vh, part(W, slice(0, 4)), 1e-12)
    R = cayley(skew(p["lora_q"], 4))
    R = torch.diag(1 + p["lora_gain_b"]) @ R @ torch.diag(1 + p["lora_gain_a"])
    middle = S.sqrt() @ R @ S.sqrt() if cfg.both_sides else S @ R
    return U @ middle @ Vh + part(W, slice(4, None)), b


@oracle(ll.PEANuTConfig(r=4, alpha=1.5))
@oracle(ll.PEANuTConfig(r=4, depth=1, activation="tanh"), what="deep")
@oracle(ll.PEANuTConfig(r=3, depth=3, activation="silu"), d_in=24, d_out=16, what="deeper")
def _peanut(p: Any, W: Tensor, b: Tensor | None, cfg: Any) -> Dense:
    """Row vectors of W^T go through the network."""
    f = {"relu": torch.relu, "tanh": torch.tanh, "silu": nn.functional.silu}[cfg.activation]
    F = f(W.mT @ p["lora_A"].mT)
    seen = [F]
    for i in range(cfg.depth):
        F = f(F @ p["lora_E"][i].mT)
        seen.append(F)
    for i in range(cfg.depth):
        F = f(F @ p["lora_D"][i].mT) + seen[cfg.depth - 1 - i]
    return W + cfg.alpha * p["lora_B"] @ F.mT, b


def haar(d: int) -> Tensor:
    """The synthesis matrix (d, d made even): neighbours' sums, then their differences."""
    half, root = (d + 1) // 2, 0.5**0.5
    R = torch.zeros(2 * half, 2 * half, dtype=torch.float64)
    for j in range(half):
        R[2 * j, j] = R[2 * j + 1, j] = R[2 * j, half + j] = root
        R[2 * j + 1, half + j] = -root
    close(R @ R.mT, torch.eye(2 * half, dtype=torch.float64), 1e-12)
    return R[:d]


@oracle(ll.WaveFTConfig(n_frequency=40))
@oracle(ll.WaveFTConfig(n_frequency=15, alpha=3.0), d_in=7, d_out=9, what="odd")
@oracle(ll.WaveFTConfig(n_frequency=30), d_in=6, d_out=5, what="all")
def _waveft(p: Any, W: Tensor, b: Tensor | None, cfg: Any) -> Dense:
    R_o, R_i = (haar(d) for d in W.shape)
    C = torch.zeros(R_o.shape[1], R_i.shape[1], dtype=W.dtype)
    for j, k, c in zip(*p["lora_idx"].long(), p["lora_c"], strict=True):
        C[j, k] = c
    assert (C != 0).sum() == cfg.n_frequency
    return W + cfg.alpha * R_o @ C @ R_i.mT, b


@oracle(ll.GLoRAConfig(r=4))
@oracle(ll.GLoRAConfig(r=4, prompt_form="none", bias_form="vector"), what="vector_bias")
@oracle(
    ll.GLoRAConfig(weight_form="vector", prompt_form="vector", bias_form="none"), what="vectors"
)
@oracle(ll.GLoRAConfig(weight_form="constant"), what="constants")
def _glora(p: Any, W: Tensor, b: Tensor | None, cfg: Any) -> Dense:
    def matrix(name: str, rows: int, columns: int) -> Tensor:
        if f"lora_{name}_d" in p:
            return p[f"lora_{name}_d"] @ p[f"lora_{name}_u"]
        x = p.get(f"lora_{name}_x", torch.zeros((), dtype=W.dtype))
        return x[:, None].expand(rows, columns) if x.ndim else x.expand(rows, columns)

    A, B = (matrix(name, *W.shape) for name in "AB")
    if b is None:
        assert all(name[5] in "AB" for name in p)
        return W + W * A + B, None
    C = matrix("C", W.shape[1], 1)[:, 0]
    D, E = (matrix(name, W.shape[0], 1)[:, 0] for name in "DE")
    return W + W * A + B, b + b * D + E + W @ C


@oracle(ll.BDLoRAConfig(r=4, alpha=6.0))
@oracle(ll.BDLoRAConfig(r=4, alpha=6.0, blocks_A=4, blocks_B=1), what="A")
@oracle(ll.BDLoRAConfig(r=4, alpha=6.0, blocks_A=2, blocks_B=2), what="melora")
def _bdlora(p: Any, W: Tensor, b: Tensor | None, cfg: Any) -> Dense:
    A = blockdiag(p["lora_A"].chunk(cfg.blocks_A))
    B = blockdiag(p["lora_B"].chunk(cfg.blocks_B))
    if cfg.blocks_A == cfg.blocks_B == 2:  # two LoRAs, each on its half of x, for its half of y
        assert not (B @ A)[:12, 8:].any()
    return W + 1.5 * B @ A, b


@oracle(ll.QALoRAConfig(r=4, alpha=6.0, group_size=4))
def _qalora(p: Any, W: Tensor, b: Tensor | None, cfg: Any) -> Dense:
    pool = torch.zeros(4, 16, dtype=W.dtype)
    for i in range(16):
        pool[i // 4, i] = 1.0
    return W + 1.5 * p["lora_B"] @ p["lora_A"] @ pool, b


@oracle(ll.MoRAConfig(r=2, mode="sharing"))
@oracle(ll.MoRAConfig(r=1, mode="sharing"), d_in=24, d_out=16)
@oracle(ll.MoRAConfig(r=8, mode="sharing"), d_in=3, d_out=40, what="wide")
def _mora_sharing(p: Any, W: Tensor, b: Tensor | None, cfg: Any) -> Dense:
    k = p["lora_M"].shape[0]
    assert k == round(((W.shape[0] + W.shape[1]) * cfg.r) ** 0.5)
    update = torch.zeros_like(W)
    for o in range(W.shape[0]):
        for i in range(-(-W.shape[1] // k) * k):  # beyond d_in x begins anew
            update[o, i % W.shape[1]] += p["lora_M"][o % k, i % k]
    return W + update, b


@oracle(ll.MoRAConfig(r=2))
@oracle(ll.MoRAConfig(r=1), d_in=24, d_out=16)
@oracle(ll.MoRAConfig(r=1), d_in=6, d_out=40, what="tall")
def _mora_rope(p: Any, W: Tensor, b: Tensor | None, cfg: Any) -> Dense:
    M, k = p["lora_M"], p["lora_M"].shape[0]
    parts = -(-W.shape[1] // k)
    whole = torch.zeros(parts * k, W.shape[1], dtype=W.dtype)
    for part_ in range(parts):
        R = torch.zeros(k, k, dtype=W.dtype)
        for j in range(k // 2):
            angle = torch.tensor(part_ * 10000.0 ** (-2 * j / k), dtype=W.dtype)
            R[j, j] = R[j + k // 2, j + k // 2] = angle.cos()
            R[j + k // 2, j], R[j, j + k // 2] = angle.sin(), -angle.sin()
        for i in range(k):
            whole[part_ * k : part_ * k + k, (part_ * k + i) % W.shape[1]] += M @ R[:, i]
    rows = [o % len(whole) for o in range(W.shape[0])]
    return W + whole[rows], b


@oracle(ll.OSFConfig())
@oracle(ll.OSFConfig(kept=0.75), d_in=24, d_out=16)
@oracle(ll.OSFConfig(kept=0.25), d_in=16, d_out=16)
def _osf(p: Any, W: Tensor, b: Tensor | None, cfg: Any) -> Dense:
    h = int(16 * cfg.kept)
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    out, in_ = torch.eye(W.shape[0], dtype=W.dtype), torch.eye(W.shape[1], dtype=W.dtype)
    low_U = p["lora_U"] + (out - U[:, :h] @ U[:, :h].mT) @ p["lora_Z"]
    low_V = p["lora_V"] + p["lora_Y"] @ (in_ - Vh[:h].mT @ Vh[:h])
    low = low_U @ torch.diag(p["lora_S"] + p["lora_dS"]) @ low_V
    close(U[:, :h].mT @ low, torch.zeros(h, W.shape[1], dtype=W.dtype), 1e-12)
    close(low @ Vh[:h].mT, torch.zeros(W.shape[0], h, dtype=W.dtype), 1e-12)
    return part(W, slice(0, h)) + low, b


@oracle(ll.ABBAConfig(r=2, alpha=6.0), what="Khatri-Rao")
@oracle(ll.ABBAConfig(r=4, alpha=12.0), what="dense")
def _abba(p: Any, W: Tensor, b: Tensor | None, cfg: Any) -> Dense:
    return W + 3.0 * (p["lora_w1_a"] @ p["lora_w1_b"]) * (p["lora_w2_a"] @ p["lora_w2_b"]), b


@oracle(ll.LoRIConfig(r=4, alpha=6.0))
def _lori(p: Any, W: Tensor, b: Tensor | None, cfg: Any) -> Dense:
    assert p["lora_mask"].all()
    return W + 1.5 * p["lora_B"] @ p["lora_A"], b


@oracle(ll.RaSAConfig(r=5, k=2, alpha=6.0))
@oracle(ll.RaSAConfig(r=4, alpha=6.0), d_in=24, d_out=16)
def _rasa(p: Any, W: Tensor, b: Tensor | None, cfg: Any) -> Dense:
    """Of one layer the pool has k directions."""
    A = torch.cat([p["lora_A"], p["lora_shared_A"]])
    B = torch.cat([p["lora_B"], p["lora_shared_B"]], 1)
    assert len(A) == cfg.r
    assert len(p["lora_shared_A"]) == cfg.k
    return W + B @ torch.diag(p["lora_d"]) @ A, b


@oracle(ll.UniLoRAConfig(r=3, length=7))
@oracle(ll.UniLoRAConfig(r=2, length=500, exact_start=False), what="long")
def _unilora(p: Any, W: Tensor, b: Tensor | None, cfg: Any) -> Dense:
    """One layer alone: each place is divided by the root of how often it occurs, on the average."""
    entries = cfg.r * (W.shape[0] + W.shape[1])
    root = (entries / cfg.length) ** 0.5
    places = {side: p[f"lora_idx_{side}"].long() for side in "AB"}
    counts = torch.bincount(places["A"].flatten(), minlength=cfg.length)
    assert counts.max() - counts.min() <= 1

    def update(theta: Tensor) -> Tensor:
        A, B = (torch.stack([theta[row] for row in places[side]]) / root for side in "AB")
        return B @ A

    start = update(p["lora_theta0"]) if cfg.exact_start else 0.0
    return W + update(p["lora_theta"]) - start, b


@oracle(ll.VBLoRAConfig(r=3, num_vectors=7, vector_length=4, topk=3))
@oracle(ll.VBLoRAConfig(r=3, num_vectors=7, vector_length=8, exact_start=True), what="exact")
def _vblora(p: Any, W: Tensor, b: Tensor | None, cfg: Any) -> Dense:
    def mixture(bank: Tensor, logits: Tensor) -> Tensor:
        best = sorted(range(len(logits)), key=lambda i: -logits[i])[: cfg.topk]
        weights = torch.softmax(logits[best], 0)
        return sum(w * bank[i] for w, i in zip(weights, best, strict=True))

    def update(bank: Tensor, A: Tensor, B: Tensor) -> Tensor:
        rows = [torch.cat([mixture(bank, ls) for ls in row]) for row in A]
        columns = [torch.cat([mixture(bank, ls) for ls in column]) for column in B.unbind(1)]
        return torch.stack(columns, 1) @ torch.stack(rows)

    made = W + update(p["lora_bank"], p["lora_logits_A"], p["lora_logits_B"])
    if not cfg.exact_start:
        return made, b
    start = [
        torch.full_like(p[f"lora_logits_{s}"], -torch.inf).scatter(
            -1, p[f"lora_index_{s}0"].long(), p[f"lora_top_{s}0"]
        )
        for s in "AB"
    ]
    return made - update(p["lora_bank0"], *start), b


@oracle(ll.PVeRAConfig(r=6))
def _pvera(p: Any, W: Tensor, b: Tensor | None, cfg: Any) -> Dense:
    """Its mean: the first halves of A and d."""
    A, d = p["lora_A"][:6], torch.diag(p["lora_d"][:6])
    return W + torch.diag(p["lora_b"]) @ p["lora_B"] @ d @ A, b


@oracle(ll.MonteCLoRAConfig(r=4, alpha=6.0))
@oracle(ll.VeLoRAConfig(r=4, alpha=6.0), what="velora")
def _lora_outside_training(p: Any, W: Tensor, b: Tensor | None, cfg: Any) -> Dense:
    return W + 1.5 * p["lora_B"] @ p["lora_A"], b


@oracle(ll.AdaMSSConfig(r=6, num_subspaces=3, subspace_rank=2))
@oracle(ll.AdaMSSConfig(r=6, num_subspaces=4), d_in=24, d_out=16)
def _adamss(p: Any, W: Tensor, b: Tensor | None, cfg: Any) -> Dense:
    N = p["lora_N"]
    close(N.mT @ N, torch.linalg.pinv(part(W, slice(0, 6))) @ part(W, slice(0, 6)), 1e-10)
    rows = [
        p["lora_B"][o] @ p["lora_A"][int(k)] @ N for o, k in enumerate(p["lora_cluster"].tolist())
    ]
    return W + torch.stack(rows), b


@oracle(ll.FRoDConfig(sparse_rate=0.1))
@oracle(ll.FRoDConfig(sparse_rate=0.1), d_in=24, d_out=16)
def _frod(p: Any, W: Tensor, b: Tensor | None, cfg: Any) -> Dense:
    V, l0 = p["lora_V"], p["lora_l0"]
    columns = W @ torch.linalg.inv(V).mT
    close(columns.norm(dim=0), l0, 1e-10)
    U = torch.where(l0 > 0, columns / l0.clamp_min(1e-9), 0.0)
    close(U @ torch.diag(l0) @ V.mT, W, 1e-10)
    S = torch.zeros_like(V)
    for j, i, s in zip(*p["lora_idx"].long(), p["lora_s"], strict=True):
        assert j != i
        S[j, i] = s
    assert (S != 0).sum() == int(0.1 * len(V) ** 2)
    return U @ (torch.diag(l0 + p["lora_lambda"]) + S) @ V.mT, b


@oracle(ll.PolyConfig(r=4, skills=3, alpha=6.0))
@oracle(ll.PolyConfig(r=4, skills=2, splits=8), what="mhr")
def _poly(p: Any, W: Tensor, b: Tensor | None, cfg: Any) -> Dense:
    amounts = p["lora_logits"][0].sigmoid()
    A, B = [], []
    for i in range(cfg.splits):
        w = amounts[i * cfg.skills : (i + 1) * cfg.skills]
        w = w / w.sum()
        A.append(sum(w[q] * p["lora_A"][i, q] for q in range(cfg.skills)))
        B.append(sum(w[q] * p["lora_B"][i, q] for q in range(cfg.skills)))
    return W + cfg.alpha / cfg.r * torch.cat(B) @ torch.cat(A, 1), b


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("formula", "cfg", "d_in", "d_out"), ORACLES)
def test_merged_and_applied_are_the_formula(
    formula: Oracle, cfg: ll.AdapterConfig, d_in: int, d_out: int, bias: bool
) -> None:
    check_formula(formula, cfg, d_in, d_out, bias)


def test_abba_starts_at_the_principal_part() -> None:
    model = layer(True, 16, 24)
    p = ll.init(model, ll.ABBAConfig(r=4))[""]
    close(p["lora_w1_a"] @ p["lora_w1_b"], part(model.weight, slice(0, 4)), 1e-12)
    close(p["lora_w1_a"].mT @ p["lora_w1_a"], p["lora_w1_b"] @ p["lora_w1_b"].mT, 1e-12)


def test_deft_over_a_learned_bias_moves_it_as_merging_in_order_does() -> None:
    """What is beneath it counts as the layer, bias included: the projection leaves biases alone."""
    model = layer(True, 16, 24)
    shift = moved(ll.init(model, ll.BitFitConfig()))
    deft = ll.init(model, ll.DEFTConfig(r=4, para=True))
    x = torch.randn(5, 16, dtype=torch.float64)
    both = (shift, deft)
    close(ll.apply(model, both, x), ll.merged(model, both)(x), 1e-12)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: ll.TinyLoRAConfig(u=0), "TinyLoRAConfig.u: expected at least 1, found 0"),
        (lambda: ll.TinyLoRAConfig(tying=1.5), r"tying: expected a part in \[0, 1\], found 1.5"),
        (lambda: ll.LoRAXSConfig(svd_niter=-1), "svd_niter: expected None or at least 0"),
        (lambda: ll.MiLoRAConfig(alpha=0.0), "the start divides by it"),
        (lambda: ll.MiCAConfig(dropout=1.0), "MiCAConfig.dropout: expected a probability"),
        (lambda: ll.PSOFTConfig(svd_niter=-1), "PSOFTConfig.svd_niter: expected None or at least"),
        (lambda: ll.PEANuTConfig(depth=-1), "PEANuTConfig.depth: expected at least 0, found -1"),
        (lambda: ll.WaveFTConfig(n_frequency=0), "n_frequency: expected at least 1, found 0"),
        (lambda: ll.BDLoRAConfig(blocks_A=0), "blocks_A: expected at least 1, found 0"),
        (lambda: ll.QALoRAConfig(group_size=0), "group_size: expected at least 1, found 0"),
        (lambda: ll.OSFConfig(kept=1.0), r"OSFConfig.kept: expected a part in \(0, 1\), found 1"),
        (lambda: ll.MoELoRAConfig(experts=0), "MoELoRAConfig.experts: expected at least 1, found"),
        (lambda: ll.MoELoRAConfig(top_k=4), "MoELoRAConfig.top_k: expected 1 to experts=3, found"),
        (lambda: ll.MoELoRAConfig(temperature=0.0), "temperature: expected more than 0, found 0"),
        (lambda: ll.ArrowConfig(experts=0), "ArrowConfig.experts: expected at least 1, found 0"),
        (lambda: ll.ArrowConfig(top_k=5), "ArrowConfig.top_k: expected 1 to experts=4, found 5"),
        (lambda: ll.ArrowConfig(temperature=-1.0), "temperature: expected more than 0, found -1"),
        (
            lambda: ll.FRoDConfig(sparse_rate=0.0),
            r"sparse_rate: expected a part in \(0, 1\]",
        ),
        (lambda: ll.AdaMSSConfig(num_subspaces=0), "num_subspaces: expected at least 1, found 0"),
        (lambda: ll.MonteCLoRAConfig(num_samples=1), "num_samples: expected at least 2, found 1"),
        (lambda: ll.MonteCLoRAConfig(noise=-1.0), "MonteCLoRAConfig.noise: expected at least 0"),
        (lambda: ll.VeLoRAConfig(num_groups=0), "num_groups: expected at least 1, found 0"),
        (lambda: ll.LoftQConfig(alpha=0.0), "LoftQConfig.alpha: the start divides by it"),
        (lambda: ll.PolyConfig(skills=0), "PolyConfig.skills: expected at least 1, found 0"),
        (lambda: ll.KaSAConfig(dropout=0.1), "KaSAConfig has no field 'dropout'"),
        (lambda: ll.RaSAConfig(r=2, k=2), "some of the r=2 directions and not all, found 2"),
        (lambda: ll.RaSAConfig(r=4, rank_pattern={"up": 2}), "at least r=4, found 2; leave it to"),
        (lambda: ll.UniLoRAConfig(length=0), "UniLoRAConfig.length: expected at least 1, found 0"),
        (lambda: ll.VBLoRAConfig(num_vectors=2, topk=3), "at most num_vectors=2, found 3"),
        (lambda: ll.VBLoRAConfig(vector_length=0), "vector_length: expected at least 1, found 0"),
    ],
)
def test_what_a_config_cannot_mean_is_refused(make: Any, match: str) -> None:
    with pytest.raises(ll.ConfigError, match=match):
        make()


@pytest.mark.parametrize(
    ("cfg", "match"),
    [
        (ll.LoRAXSConfig(r=16), "LoRA-XS splits a 24 x 12 weight, .* at most 12, found r=16"),
        (ll.KaSAConfig(r=13), "KaSA splits a 24 x 12 weight, .* at most 12, found r=13"),
        (ll.PSOFTConfig(r=13), "PSOFT splits a 24 x 12 weight, .* at most 12, found r=13"),
        (ll.WaveFTConfig(), r"at most d_out \* d_in = 288, found 2592"),
        (
            ll.BDLoRAConfig(blocks_A=5),
            "d_in and r among blocks, .* by blocks_A=5, found d_in=12 and r=8",
        ),
        (ll.QALoRAConfig(), "by group_size=32, found d_in=12; group_size=12 fits"),
        (ll.AdaMSSConfig(), "AdaMSS splits a 24 x 12 weight, .* at most 12, found r=100"),
        (ll.AdaMSSConfig(r=4, num_subspaces=25), "num_subspaces=25 is more than the 24 outputs"),
        (ll.AdaMSSConfig(r=4, subspace_rank=5), "subspace_rank=5 is more than the 4 principal"),
        (ll.PolyConfig(splits=5), "d_in and d_out divisible by splits=5, found d_in=12 and d_out"),
        (ll.DEFTConfig(r=25), "DEFT takes r of d_out directions, .* at most 24, found r=25"),
        (ll.VBLoRAConfig(), "24 x 12 update .* divides both, found 256; one that divides 12 fits"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_does(cfg: ll.AdapterConfig, match: str) -> None:
    with pytest.raises(ll.UnsupportedError, match=match):
        ll.init(nn.Linear(12, 24), cfg)


@pytest.mark.parametrize(
    "cfg", [ll.PEANuTConfig(r=4), ll.GLoRAConfig(r=4)], ids=lambda c: type(c).__name__
)
def test_what_reads_the_weight_reads_what_is_beneath(cfg: ll.AdapterConfig) -> None:
    """Adapters in order are the merged weights in order, also where the outer one reads them."""
    model, x = layer(True, 16, 24), torch.randn(5, 16, dtype=torch.float64)
    both = (moved(ll.init(model, ll.LoRAConfig(r=2))), moved(ll.init(model, cfg)))
    close(ll.apply(model, both, x), ll.merged(model, both)(x), 1e-12)
    inner = ll.merged(model, both[0])
    close(ll.apply(model, both, x), ll.apply(inner, both[1], x), 1e-12)
