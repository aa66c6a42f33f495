"""Each method beside PEFT's own layer: the same tensors give the same output and the same gradients
of every tensor and of x.

Our leaves are made of PEFT's parameters by a differentiable map, so both sides' gradients are those
of PEFT's parameters. Where PEFT is wrong or means something else, the test says so and holds ours
to the formula instead.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import close
from peft_layers import D_IN, D_OUT, Tiny, compare, ours, peft, renamed, theirs
from torch import Tensor, nn
from torch_versions import skip_without, transforms_expanded_gradients

import lora_lite_func as ll

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own, of which there are many


def upper(R: Tensor) -> Tensor:
    """The strict upper triangles of the skew part of R (..., b, b)."""
    i, j = torch.triu_indices(R.shape[-1], R.shape[-1], 1)
    return (0.5 * (R - R.mT))[..., i, j]


# ----------------------------------------------------------------------------------------- low rank
def test_loha() -> None:
    take = renamed(
        hada_w1_a="lora_w1_a", hada_w1_b="lora_w1_b", hada_w2_a="lora_w2_a", hada_w2_b="lora_w2_b"
    )
    for r in (2, 4):
        compare(Tiny(), peft.LoHaConfig(r=r, alpha=6), ll.LoHaConfig(r=r, alpha=6), take)


def test_lokr() -> None:
    low = renamed(lokr_w1="lora_w1", lokr_w2_a="lora_w2_a", lokr_w2_b="lora_w2_b")
    compare(Tiny(), peft.LoKrConfig(r=2, alpha=6), ll.LoKrConfig(r=2, alpha=6), low)
    names = {f"lokr_{n}": f"lora_{n}" for n in ("w1_a", "w1_b", "w2_a", "w2_b")}
    both = {"r": 2, "alpha": 6, "decompose_both": True}
    compare(Tiny(100, 72), peft.LoKrConfig(**both), ll.LoKrConfig(**both), renamed(**names))


def test_lokr_of_two_full_matrices_has_no_rank_to_divide_by() -> None:
    """PEFT still scales by alpha / r there; ours is LyCORIS's, so PEFT's scale goes into W1."""
    compare(
        Tiny(),
        peft.LoKrConfig(r=8, alpha=6),
        ll.LoKrConfig(r=8, alpha=6),
        lambda s, p: {"lora_w1": p["lokr_w1"] * (6 / 8), "lora_w2": p["lokr_w2"]},
    )


def test_vera() -> None:
    def take(site: Any, p: dict[str, Tensor]) -> dict[str, Tensor]:
        A, B = site.vera_A["default"], site.vera_B["default"]
        return {
            "lora_vera_b": p["vera_lambda_b"],
            "lora_vera_d": p["vera_lambda_d"],
            "lora_vera_A": A[:, :D_IN].double(),
            "lora_vera_B": B[:D_OUT].double(),
        }

    compare(Tiny(), peft.VeraConfig(r=6), ll.VeRAConfig(r=6), take)


def test_adalora() -> None:
    """PEFT divides by r + 1e-5."""
    config = peft.AdaLoraConfig(init_r=4, lora_alpha=6, total_step=10)
    epsilon = 4 / (4 + 1e-5)
    compare(
        Tiny(),
        config,
        ll.AdaLoRAConfig(r=4, alpha=6),
        lambda s, p: {
            "lora_A": p["lora_A"],
            "lora_B": p["lora_B"],
            "lora_E": p["lora_E"].squeeze(1) * epsilon,
        },
        tol=1e-7,  # its ranknum is a float32 number
    )


@pytest.mark.parametrize(("d_in", "d_out"), [(16, 24), (24, 16), (16, 16)])
def test_randlora(d_in: int, d_out: int) -> None:
    """PEFT flattens A by rank first and B by map first: ours is the paper's pairing, reached by
    permuting the columns of B.
    """

    def take(site: Any, p: dict[str, Tensor]) -> dict[str, Tensor]:
        n, small = p["randlora_gamma"].shape
        B = site.randlora_B["default"].double()[: max(d_in, d_out), :n]  # (M, N, r)
        r = B.shape[2]
        # their column i N + j goes with row i of A and map j
        paired = B.flatten(1).unflatten(1, (r, n)).transpose(1, 2)
        A = site.randlora_A["default"].double()[:, 0, :small]
        return {
            "lora_lambda": p["randlora_lambda"],
            "lora_gamma": p["randlora_gamma"],
            "lora_rand_A": A,
            "lora_rand_B": paired,
        }

    compare(
        Tiny(d_in, d_out),
        peft.RandLoraConfig(r=3, randlora_alpha=6),
        ll.RandLoRAConfig(r=3, alpha=6),
        take,
        tol=1e-9,
    )


@pytest.mark.parametrize("hybrid", [0, 3])
def test_gralora(hybrid: int) -> None:
    def take(site: Any, p: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {"lora_A": p["gralora_A"].mT, "lora_B": p["gralora_B"].mT}
        if hybrid:
            leaves |= {
                "lora_A_whole": p["gralora_A_general"],
                "lora_B_whole": p["gralora_B_general"],
            }
        return leaves

    theirs_ = peft.GraloraConfig(r=8, alpha=6, gralora_k=4, hybrid_r=hybrid)
    compare(Tiny(), theirs_, ll.GraLoRAConfig(r=8, alpha=6, k=4, hybrid_r=hybrid), take)


def test_hira() -> None:
    """PEFT has no scale: alpha = r."""
    compare(
        Tiny(),
        peft.HiraConfig(r=4),
        ll.HiRAConfig(r=4, alpha=4),
        renamed(hira_A="lora_A", hira_B="lora_B"),
    )


# ---------------------------------------------------------------------------------------- rotations
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("b", [2, 4, 8])
def test_oft(b: int, share: bool) -> None:
    """PEFT's exact branch is (I - Q)(I + Q)^-1, the inverse rotation of its Neumann branch: q
    changes sign for it, not for the series.
    """
    kind = {"oft_block_size": b, "block_share": share}
    compare(
        Tiny(),
        peft.OFTConfig(**kind, use_cayley_neumann=False),
        ll.OFTConfig(block_size=b, block_share=share),
        lambda s, p: {"lora_oft_q": -p["oft_R"]},
    )
    compare(
        Tiny(),
        peft.OFTConfig(**kind, use_cayley_neumann=True),
        ll.OFTConfig(block_size=b, block_share=share, cayley="neumann"),
        renamed(oft_R="lora_oft_q"),
    )


def test_boft() -> None:
    """PEFT's Cayley is the inverse (q changes sign), and without its CUDA extension it silently has
    one factor, whatever is asked for.
    """

    def take(site: Any, p: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"lora_boft_q": -upper(p["boft_R"]), "lora_boft_s": p["boft_s"].squeeze(1)}

    compare(Tiny(), peft.BOFTConfig(boft_block_size=4), ll.BOFTConfig(block_size=4, m=1), take)


@pytest.mark.parametrize("m", [2, 3])
def test_boft_butterflies_are_pefts_permutations(m: int) -> None:
    """Its own permutation matrices and Cayley maps, multiplied as its forward does with the
    extension.
    """
    n, b = 16, 4
    _, site = theirs(Tiny(), peft.BOFTConfig(boft_block_size=b))
    gen = torch.Generator().manual_seed(5)
    R, rotation = (
        0.3 * torch.randn(m, n // b, b, b, generator=gen, dtype=torch.float64),
        torch.eye(n, dtype=torch.float64),
    )
    for i in range(m):
        P = site.perm2mat(site.block_butterfly_perm(n, n // b // 2**i, b // 2, m - 1)).double()
        rotation = P @ torch.block_diag(*_cayley_batch(R[i])) @ P.mT @ rotation
    model = Tiny()
    s = torch.rand(D_OUT, generator=gen, dtype=torch.float64) + 0.5
    params = ours(
        model, ll.BOFTConfig(block_size=b, m=m), {"lora_boft_q": -upper(R), "lora_boft_s": s}
    )
    close(
        ll.merge(model, params)["l.weight"], s[:, None] * (rotation @ model.l.weight.mT).mT, 1e-10
    )


def _cayley_batch(R: Tensor) -> Tensor:
    """(I - Q)(I + Q)^-1 of the skew part, as PEFT has it (its own works in float32 identity
    matrices).
    """
    Q, eye = 0.5 * (R - R.mT), torch.eye(R.shape[-1], dtype=R.dtype)
    return torch.linalg.solve(eye + Q, eye - Q, left=False)


# ------------------------------------------------------------------------------- Fourier and sparse
def test_c3a_agrees_but_for_pefts_gradient_of_x() -> None:
    """PEFT computes in float32. Its hand-written backward correlates where it must convolve: the
    gradient of x is wrong by its own size.
    """
    compare(
        Tiny(),
        peft.C3AConfig(block_size=4),
        ll.C3AConfig(block_size=4),
        renamed(c3a_kernel="lora_w"),
        tol=1e-5,
        x_gradient=False,
    )
    made, site = theirs(Tiny(), peft.C3AConfig(block_size=4))
    base = site.base_layer
    x = torch.randn(3, D_IN, dtype=torch.float64, requires_grad=True)
    model = Tiny()
    model.l.load_state_dict(base.state_dict())
    params = ours(
        model, ll.C3AConfig(block_size=4), {"lora_w": site.c3a_kernel["default"].detach()}
    )
    (true,) = torch.autograd.grad(
        nn.functional.linear(x, ll.merge(model, params)["l.weight"]).sum(), x
    )
    skip_without(transforms_expanded_gradients)
    (mine,) = torch.autograd.grad(ll.apply(model, params, x).sum(), x)
    close(mine, true, 1e-10)
    weights = torch.randn(3, D_OUT, dtype=torch.float64)
    (true,) = torch.autograd.grad(
        (nn.functional.linear(x, ll.merge(model, params)["l.weight"]) * weights).sum(), x
    )
    (wrong,) = torch.autograd.grad((made(x) * weights).sum(), x)
    (mine,) = torch.autograd.grad((ll.apply(model, params, x) * weights).sum(), x)
    close(mine, true, 1e-10)
    assert (wrong - true).abs().max() > 1e-2, "PEFT's gradient is right now: compare x's too"


def test_fourierft() -> None:
    """PEFT transforms in float32, and starts at random coefficients, so it isn't the identity at
    the start; ours is.
    """

    def take(site: Any, p: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"lora_c": p["fourierft_spectrum"], "lora_idx": site.indices["default"].double()}

    compare(
        Tiny(),
        peft.FourierFTConfig(n_frequency=20, scaling=30.0),
        ll.FourierFTConfig(n_frequency=20, alpha=30.0),
        take,
        tol=1e-5,
    )
    model, x = Tiny(), torch.randn(3, D_IN, dtype=torch.float64)
    untrained = peft.get_peft_model(
        copy.deepcopy(model), peft.FourierFTConfig(n_frequency=20, target_modules=["l"])
    )
    assert (untrained(x) - model(x)).abs().max() > 1e-2
    assert torch.equal(
        ll.apply(model, ll.init(model, ll.FourierFTConfig(n_frequency=20)), x), model(x)
    )


def test_shira() -> None:
    def take(site: Any, p: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"lora_v": p["shira_weight"], "lora_idx": site.shira_indices["default"].double()}

    compare(Tiny(), peft.ShiraConfig(r=2, random_seed=1), ll.SHiRAConfig(r=2), take)


@pytest.mark.parametrize(
    ("init_weights", "mode"),
    [
        (True, {"r": 4}),
        (True, {"r": 5}),
        ("mini", {"r": 4, "mini_r": 6}),
        ("bat", {"r": 4}),
        ("bat", {"r": 8}),
    ],
)
def test_miss(init_weights: Any, mode: dict[str, int]) -> None:
    ours_ = ll.MiSSConfig(**mode, mode="plain" if init_weights is True else init_weights)
    compare(
        Tiny(),
        peft.MissConfig(**mode, init_weights=init_weights),
        ours_,
        renamed(miss_block="lora_D"),
    )
