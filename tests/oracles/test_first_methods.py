"""The first eight methods against their papers' formulas, written slowly and densely by hand, and
against PEFT's own layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import close, moved, normal
from linear_layers import layer
from torch import Tensor, nn

import lora_lite_func as ll
from lora_lite_func.core.adapter import replace

Dense = tuple[Tensor, Tensor | None]


# ------------------------------------------------------------------------------------- the formulas
def lora(p: Any, W: Tensor, b: Tensor | None, s: float) -> Dense:
    dW = torch.zeros_like(W)
    for i in range(p["lora_A"].shape[0]):
        dW = dW + torch.outer(p["lora_B"][:, i], p["lora_A"][i])
    return W + s * dW, b


def pissa(p: Any, W: Tensor, b: Tensor | None, s: float) -> Dense:
    U, S, Vh = torch.linalg.svd(W)
    r = p["lora_A"].shape[0]
    principal = U[:, :r] @ torch.diag(S[:r]) @ Vh[:r]
    return W - principal + s * p["lora_B"] @ p["lora_A"], b


def delora(p: Any, W: Tensor, b: Tensor | None, s: float) -> Dense:
    r = p["lora_A"].shape[0]
    columns = torch.stack([W[:, j].norm() for j in range(W.shape[1])])

    def term(A: Tensor, B: Tensor, lam: Tensor) -> Tensor:
        Xi = torch.diag(torch.stack([1.0 / (A[i].norm() * B[:, i].norm()) for i in range(r)]))
        return lam / r * B @ Xi @ A @ torch.diag(columns)

    dW = term(p["lora_A"], p["lora_B"], p["lora_lambda"])
    if "lora_A0" in p:
        dW = dW - term(p["lora_A0"], p["lora_B0"], p["lora_lambda0"])
    return W + dW, b


def ia3(p: Any, W: Tensor, b: Tensor | None, s: float) -> Dense:
    return torch.diag(p["lora_g"]) @ W, None if b is None else torch.diag(p["lora_g"]) @ b


def ia3_ff(p: Any, W: Tensor, b: Tensor | None, s: float) -> Dense:
    return W @ torch.diag(p["lora_g"]), b


def dora(p: Any, W: Tensor, b: Tensor | None, s: float) -> Dense:
    V = W + s * p["lora_B"] @ p["lora_A"]
    rows = [p["lora_m"][i] * V[i] / V[i].norm() for i in range(len(V))]
    return torch.stack(rows), b


def hra(p: Any, W: Tensor, b: Tensor | None, s: float) -> Dense:
    R = torch.eye(W.shape[1], dtype=W.dtype)
    for u in p["lora_U"]:
        R = R @ (torch.eye(len(u), dtype=W.dtype) - 2.0 * torch.outer(u, u) / u.dot(u))
    close(R @ R.mT, torch.eye(len(R), dtype=W.dtype), 1e-12)
    return W @ R, b


def road(mode: str, group: int) -> Callable[..., Dense]:
    def formula(p: Any, W: Tensor, b: Tensor | None, s: float) -> Dense:
        theta, a = p["lora_road_theta"], p["lora_road_alpha"]
        n, half = W.shape[0], group // 2
        R = torch.zeros(n, n, dtype=W.dtype)
        for g in range(n // group):
            for k in range(half):
                i, j = g * group + k, g * group + k + half
                pair = g * half + k
                cos_i, sin_i, cos_j, sin_j = {
                    "road_1": (pair, pair, pair, pair),
                    "road_2": (i, i, j, j),
                    "road_4": (
                        2 * g * group + k,
                        (2 * g + 1) * group + k,
                        2 * g * group + k + half,
                        (2 * g + 1) * group + k + half,
                    ),
                }[mode]
                R[i, i] = a[cos_i] * torch.cos(theta[cos_i])
                R[i, j] = -a[sin_i] * torch.sin(theta[sin_i])
                R[j, i] = a[sin_j] * torch.sin(theta[sin_j])
                R[j, j] = a[cos_j] * torch.cos(theta[cos_j])
        return R @ W, None if b is None else R @ b

    return formula


ORACLES = [
    (ll.LoRAConfig(r=4, alpha=6.0), lora, 1.5),
    (ll.LoRAConfig(r=4, alpha=6.0, rslora=True), lora, 3.0),
    (ll.LoRAConfig(r=4, alpha=6.0, init_A="orthogonal"), lora, 1.5),
    (ll.PiSSAConfig(r=4, alpha=6.0), pissa, 1.5),
    (ll.DeLoRAConfig(r=4), delora, 0.0),
    (ll.DeLoRAConfig(r=4, init="zero_B"), delora, 0.0),
    (ll.IA3Config(), ia3, 0.0),
    (ll.IA3FFConfig(), ia3_ff, 0.0),
    (ll.DoRAConfig(r=4, alpha=6.0), dora, 1.5),
    (ll.HRAConfig(r=6), hra, 0.0),
    (ll.ROADConfig(group_size=8), road("road_1", 8), 0.0),
    (ll.ROADConfig(mode="road_2", group_size=8), road("road_2", 8), 0.0),
    (ll.ROADConfig(mode="road_4", group_size=4), road("road_4", 4), 0.0),
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("cfg", "formula", "s"),
    ORACLES,
    ids=lambda v: f"{type(v).__name__}" if isinstance(v, ll.AdapterConfig) else "",
)
def test_dense_formula(
    cfg: ll.AdapterConfig, formula: Callable[..., Dense], s: float, bias: bool
) -> None:
    model = layer(bias)
    params = moved(ll.init(model, cfg), size=0.2)
    x = normal(2, 3, 16, seed=1)
    p = dict(params[""])
    W, b = formula(p, model.weight.detach(), None if model.bias is None else model.bias.detach(), s)
    new = ll.merge(model, params)
    close(new["weight"], W, 1e-10)
    if "bias" in new:
        close(new["bias"], b, 1e-10)
    expected = x @ W.mT if b is None else x @ W.mT + b
    close(ll.apply(model, params, x), expected, 1e-10)
    assert (expected - model(x)).abs().max() > 1e-2


# --------------------------------------------------------------------------------------- the starts
def test_pissa_starts_at_the_principal_triplets_and_exports_as_rank_2r() -> None:
    model = layer()
    p = ll.init(model, ll.PiSSAConfig(r=4, alpha=6.0))[""]
    U, S, Vh = torch.linalg.svd(model.weight.detach())
    close(1.5 * p["lora_B0"] @ p["lora_A0"], U[:, :4] @ torch.diag(S[:4]) @ Vh[:4], 1e-10)
    close(p["lora_B0"].norm(dim=0), p["lora_A0"].norm(dim=1), 1e-10)
    q = moved(ll.init(model, ll.PiSSAConfig(r=4, alpha=6.0)))[""]
    plain = torch.cat([q["lora_B"], -q["lora_B0"]], 1) @ torch.cat([q["lora_A"], q["lora_A0"]])
    close(
        model.weight + 1.5 * plain,
        ll.merge(model, moved(ll.init(model, ll.PiSSAConfig(r=4, alpha=6.0))))["weight"],
        1e-10,
    )


def test_pissa_randomised_svd_is_close_to_the_full_one() -> None:
    model = layer()
    full, quick = (ll.init(model, ll.PiSSAConfig(r=4, svd_niter=n))[""] for n in (None, 8))
    close(quick["lora_B0"] @ quick["lora_A0"], full["lora_B0"] @ full["lora_A0"], 1e-3)


def test_delora_moves_gently_from_the_papers_start_and_jumps_from_zero_B() -> None:
    """One Adam step of 1e-4: the subtracted start moves the weight by per mille, the zero-B one by
    lam / sqrt(r d_in).
    """
    model = layer(d_in=256, d_out=256)
    x = torch.randn(64, 256, dtype=torch.float64)
    moves = {}
    for init in ("subtract", "zero_B"):
        params = ll.init(model, ll.DeLoRAConfig(r=8, init=init))
        bound = ll.bind(model, params)
        optimizer = torch.optim.Adam([p for p in bound.parameters() if p.requires_grad], lr=1e-4)
        bound(x).square().mean().backward()
        optimizer.step()
        moves[init] = (
            (ll.merge(model, params)["weight"] - model.weight).norm() / model.weight.norm()
        ).item()
    assert moves["subtract"] < 0.01
    assert abs(moves["zero_B"] - 15.0 / (8 * 256) ** 0.5) < 0.05


def test_dora_norm_is_a_constant_for_the_gradient_unless_asked() -> None:
    model, x = layer(), torch.randn(5, 16, dtype=torch.float64)

    def naive(p: Any, detach: bool) -> Tensor:
        V = model.weight.detach() + 2.0 * p[""]["lora_B"] @ p[""]["lora_A"]
        n = V.norm(dim=1)
        g = p[""]["lora_m"] / (n.detach() if detach else n)
        return (x @ (g[:, None] * V).mT + model.bias.detach()).square().sum()

    for detach in (True, False):
        params = moved(ll.init(model, ll.DoRAConfig(r=8, detach_norm=detach)))
        found = torch.func.grad(lambda p: ll.apply(model, p, x).square().sum())(params)
        wanted = torch.func.grad(lambda p, d=detach: naive(p, d))(params)
        for name in ("lora_A", "lora_B", "lora_m"):
            close(found[""][name], wanted[""][name], 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_like_leaves_move_in_any_dtype(dtype: torch.dtype) -> None:
    """Twenty Adam steps of 1e-3 move every trainable leaf, those near 1 and near 15 too."""
    model = layer().to(dtype)
    x = torch.randn(32, 16, dtype=dtype)
    gates = (ll.IA3Config(), ll.IA3FFConfig(), ll.ROADConfig(group_size=8))
    for cfg in (*gates, ll.DoRAConfig(r=4), ll.DeLoRAConfig(r=4), ll.PiSSAConfig(r=4)):
        params = ll.init(model, cfg)
        start = copy.deepcopy(params)
        bound = ll.bind(model, params)
        optimizer = torch.optim.Adam([p for p in bound.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(20):
            optimizer.zero_grad()
            bound(x).float().square().mean().backward()
            optimizer.step()
        for name, t in params[""].items():
            if params.layout.specs[""][name].trainable:
                assert not torch.equal(t, start[""][name]), f"{type(cfg).__name__} {name} is stuck"


def test_hra_strength_turns_each_pair_by_its_share() -> None:
    model = layer()
    params = moved(ll.init(model, ll.HRAConfig(r=2)), size=0.3)
    R = {
        c: torch.linalg.lstsq(
            model.weight.detach(), ll.merge(model, ll.scale(params, c))["weight"]
        ).solution
        for c in (1.0, 0.5, -1.0)
    }
    close(R[0.5] @ R[0.5], R[1.0], 1e-8)
    close(R[-1.0] @ R[1.0], torch.eye(16, dtype=torch.float64), 1e-8)


# ----------------------------------------------------------------------------- beside PEFT's layers
class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.l(x)


def flat(t: Tensor) -> Tensor:
    return t.flatten()


PEFT = [
    (
        "LoraConfig",
        {"r": 4, "lora_alpha": 6},
        ll.LoRAConfig(r=4, alpha=6),
        {"lora_A": "lora_A", "lora_B": "lora_B"},
    ),
    (
        "LoraConfig",
        {"r": 4, "lora_alpha": 6, "use_rslora": True},
        ll.LoRAConfig(r=4, alpha=6, rslora=True),
        {"lora_A": "lora_A", "lora_B": "lora_B"},
    ),
    (
        "LoraConfig",
        {"r": 4, "lora_alpha": 6, "use_dora": True},
        ll.DoRAConfig(r=4, alpha=6),
        {"lora_A": "lora_A", "lora_B": "lora_B", "lora_magnitude_vector": "lora_m"},
    ),
    ("IA3Config", {"feedforward_modules": []}, ll.IA3Config(), {"ia3_l": "lora_g"}),
    ("IA3Config", {"feedforward_modules": ["l"]}, ll.IA3FFConfig(), {"ia3_l": "lora_g"}),
    ("HRAConfig", {"r": 4}, ll.HRAConfig(r=4), {"hra_u": "lora_U"}),
    (
        "DeloraConfig",
        {"r": 4},
        ll.DeLoRAConfig(r=4, init="zero_B"),
        {"delora_A": "lora_A", "delora_B": "lora_B", "delora_lambda": "lora_lambda"},
    ),
    *(
        (
            "RoadConfig",
            {"variant": mode, "group_size": 8},
            ll.ROADConfig(mode=mode, group_size=8),
            {"road_theta": "lora_road_theta", "road_alpha": "lora_road_alpha"},
        )
        for mode in ("road_1", "road_2", "road_4")
    ),
]


@pytest.mark.filterwarnings("ignore")  # PEFT's own, of which there are many
@pytest.mark.parametrize(
    ("theirs", "settings", "cfg", "names"),
    PEFT,
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_same_outputs_and_gradients_as_peft(
    theirs: str, settings: dict[str, Any], cfg: ll.AdapterConfig, names: dict[str, str]
) -> None:
    peft = pytest.importorskip("peft")
    model = Tiny()
    config = getattr(peft, theirs)(target_modules=["l"], **settings)
    made = (
        peft.get_peft_model(copy.deepcopy(model), config, autocast_adapter_dtype=False)
        .double()
        .eval()
    )
    gen = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in made.parameters():
            if p.requires_grad:
                p += 0.3 * torch.randn(p.shape, generator=gen, dtype=torch.float64)
    named = {
        n.split(".l.", 1)[1].replace(".default", "").removesuffix(".weight"): p
        for n, p in made.named_parameters()
        if ".l." in n
    }
    trained = {n: p for n, p in named.items() if p.requires_grad}
    assert set(trained) == set(names)
    start = ll.init(model, cfg)
    site = {
        our: (trained[their].mT if their == "hra_u" else trained[their])
        for their, our in names.items()
    }
    params = replace(
        start, {"l": {**start["l"], **{n: t.reshape(start["l"][n].shape) for n, t in site.items()}}}
    )
    x = torch.randn(2, 5, 16, generator=gen, dtype=torch.float64).requires_grad_()
    g = torch.randn(2, 5, 24, generator=gen, dtype=torch.float64)
    expected, mine = made(x), ll.apply(model, params, x)
    close(mine, expected, 1e-10)
    wanted = torch.autograd.grad((expected * g).sum(), [*trained.values(), x])
    found = torch.autograd.grad((mine * g).sum(), [*trained.values(), x])
    close(found, wanted, 1e-9)
