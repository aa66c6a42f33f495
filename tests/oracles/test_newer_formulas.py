"""Each newer method against its paper's formula, as test_formulas.py has the older ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from formulas import Dense, Oracle, check_formula, oracles
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


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("formula", "cfg", "d_in", "d_out"), ORACLES)
def test_merged_and_applied_are_the_formula(
    formula: Oracle, cfg: ll.AdapterConfig, d_in: int, d_out: int, bias: bool
) -> None:
    check_formula(formula, cfg, d_in, d_out, bias)


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
        (lambda: ll.LoRAXSConfig(svd_niter=-1), "svd_niter: expected None or at least 0"),
        (lambda: ll.MiLoRAConfig(alpha=0.0), "the start divides by it"),
        (lambda: ll.MiCAConfig(dropout=1.0), "MiCAConfig.dropout: expected a probability"),
        (lambda: ll.KaSAConfig(dropout=0.1), "KaSAConfig has no field 'dropout'"),
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
        (ll.DEFTConfig(r=25), "DEFT takes r of d_out directions, .* at most 24, found r=25"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_does(cfg: ll.AdapterConfig, match: str) -> None:
    with pytest.raises(ll.UnsupportedError, match=match):
        ll.init(nn.Linear(12, 24), cfg)
