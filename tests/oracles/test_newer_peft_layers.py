"""Newer methods beside PEFT's own layers, as test_peft_layers.py has the older ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import close
from peft_layers import D_IN, Tiny, compare, ours, peft, renamed, theirs
from torch import Tensor, nn

import lora_lite_func as ll

lora = pytest.importorskip("peft.tuners.lora")
BdLoraConfig, KasaConfig = lora.BdLoraConfig, lora.KasaConfig
MontecloraConfig, VeloraConfig = lora.MontecloraConfig, lora.VeloraConfig

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own, of which there are many


class Single(Tiny):
    """Tiny in float32, which is what PEFT decomposes in."""

    def __init__(self) -> None:
        super().__init__()
        self.float()


def test_mica() -> None:
    """PEFT decomposes no float64 weight, so B is taken from its own."""
    model = Single()
    made = peft.get_peft_model(
        copy.deepcopy(model),
        peft.LoraConfig(r=3, lora_alpha=6, init_lora_weights="mica", target_modules=["l"]),
    )
    site = made.base_model.model.l
    assert not site.lora_B["default"].weight.requires_grad
    start = ll.init(model, ll.MiCAConfig(r=3, alpha=6))["l"]
    B, theirs_B = start["lora_B"], site.lora_B["default"].weight
    close(B @ B.mT, theirs_B @ theirs_B.mT, 1e-5)
    assert torch.equal(start["lora_A"], site.lora_A["default"].weight)
    assert not ll.init(model, ll.MiCAConfig(r=3)).layout.specs["l"]["lora_B"].trainable


def test_kasa() -> None:
    """PEFT takes the minor directions out of the base weight itself, and leaves them out when the
    adapter is disabled; ours puts them back with the strength.
    """

    def take(site: Any, p: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"lora_A": p["lora_A"], "lora_B": p["lora_B"], "lora_d": p["lora_diag"]}

    config = peft.LoraConfig(r=3, lora_alpha=6, kasa_config=KasaConfig())
    compare(Tiny(), config, ll.KaSAConfig(r=3, alpha=6), take, tol=1e-6)
    model, x = Tiny(), torch.randn(3, 16, dtype=torch.float64)
    made, _ = theirs(model, config)
    with made.disable_adapter():
        assert (made(x) - model(x)).abs().max() > 1e-2, "PEFT gives the base back now"
    close(ll.apply(model, ll.scale(ll.init(model, ll.KaSAConfig(r=3)), 0.0), x), model(x), 1e-12)


def test_kasa_s_penalty() -> None:
    config = peft.LoraConfig(r=3, kasa_config=KasaConfig(beta=0.2, gamma=0.3))
    made, site = theirs(Tiny(), config)
    leaves = {"lora_A": site.lora_A, "lora_B": site.lora_B}
    held = {name: layers["default"].weight.detach() for name, layers in leaves.items()}
    held["lora_d"] = site.lora_diag["default"].detach()
    params = ours(Tiny(), ll.KaSAConfig(r=3, beta=0.2, gamma=0.3), held)
    close(ll.penalty(params), made.base_model._get_kasa_loss().double(), 1e-6)


def test_tinylora() -> None:
    def take(site: Any, p: dict[str, Tensor]) -> dict[str, Tensor]:
        v = site.tinylora_v["default"]["0"]
        frozen = (site.tinylora_A, site.tinylora_B, site.tinylora_P)
        A, B, P = (t["default"].double() for t in frozen)
        return {"lora_v": v, "lora_A": A, "lora_B": B, "lora_P": P}

    compare(Tiny(), peft.TinyLoraConfig(r=3, u=5), ll.TinyLoRAConfig(r=3, u=5), take)


@pytest.mark.parametrize("decomposition", ["relu", "qr"])
@pytest.mark.parametrize("para", [False, True])
def test_deft(decomposition: Any, para: bool) -> None:
    """PEFT computes in float32, and its start is the base's only to rounding."""

    def take(site: Any, p: dict[str, Tensor]) -> dict[str, Tensor]:
        P = p["deft_P"]
        sign = torch.linalg.qr(P)[1].diagonal().sign() if decomposition == "qr" else 1.0
        leaves = {"lora_P": P, "lora_gain": torch.ones((), dtype=P.dtype)}
        if not para:
            leaves["lora_R"] = p["deft_R"] * (2.0 * torch.ones(3, dtype=P.dtype) * sign)[:, None]
            leaves["lora_right0"] = torch.zeros_like(P)
        return leaves

    settings = {"r": 3, "para": para}
    compare(
        Tiny(),
        peft.DeftConfig(alpha=6, decomposition_method=decomposition, **settings),
        ll.DEFTConfig(decomposition=decomposition, **settings),
        take,
        tol=1e-5,
    )


def test_deft_starts_at_the_base_which_pefts_only_nears() -> None:
    model, x = Single(), torch.randn(64, 16)
    untrained = peft.get_peft_model(
        copy.deepcopy(model), peft.DeftConfig(r=4, target_modules=["l"])
    )
    assert not torch.equal(untrained(x), model(x)), "PEFT's start is exact now"
    assert torch.equal(ll.apply(model, ll.init(model, ll.DEFTConfig(r=4)), x), model(x))


def test_osf_stays_in_its_subspace_which_pefts_leaves_under_adam() -> None:
    """PEFT projects gradients, and Adam divides them entry by entry afterwards."""
    model, x = Single(), torch.randn(64, 16)
    kept = torch.linalg.svd(model.l.weight)[0][:, :8]
    made = peft.get_peft_model(copy.deepcopy(model), peft.OSFConfig(target_modules=["l"]))
    site = made.base_model.model.l
    optimizer = torch.optim.Adam((p for p in made.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        made(x).square().mean().backward()
        optimizer.step()
    low = site.osf_svd_params["default"]["U_low"].detach()
    assert (kept.mT @ low).abs().max() > 1e-2, "PEFT's steps stay in the subspace now"
    params = ll.init(model, ll.OSFConfig())
    bound = ll.bind(model, params)
    optimizer = torch.optim.Adam((p for p in bound.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        bound(x).square().mean().backward()
        optimizer.step()
    update = ll.merge(model, ll.unbind(bound))["l.weight"] - model.l.weight
    assert update.abs().max() > 1e-2
    assert (kept.mT @ update).abs().max() < 1e-5


def test_supertuning() -> None:
    def take(site: Any, p: dict[str, Tensor]) -> dict[str, Tensor]:
        flat = site.supertuning_indices["default"].long()
        places = torch.stack([flat // 16, flat % 16]).double()
        return {"lora_v": p["supertuning_values"], "lora_idx": places}

    compare(
        Tiny(),
        peft.SupertuningConfig(sparsity=0.9),
        ll.SHiRAConfig(mask="magnitude", fraction=1 - 0.9),
        take,
    )
    for top, mask in ((True, "magnitude"), (False, "smallest")):
        _, site = theirs(Tiny(), peft.SupertuningConfig(sparsity=0.9, select_top=top))
        model = Tiny()
        model.l.weight = nn.Parameter(site.base_layer.weight.detach())
        idx = ll.init(model, ll.SHiRAConfig(mask=mask, fraction=1 - 0.9))["l"]["lora_idx"].long()
        flat = site.supertuning_indices["default"].long().sort().values
        assert torch.equal(idx[0] * 16 + idx[1], flat)


@pytest.mark.parametrize("start", ["psoft_init", "pissa_init"])
def test_psoft(start: Any) -> None:
    """PEFT's alpha has no effect: it divides its factors by the scale that it multiplies by."""

    def take(site: Any, p: dict[str, Tensor]) -> dict[str, Tensor]:
        U, S, Vh = torch.linalg.svd(site.base_layer.weight.float(), full_matrices=False)
        leaves = {"lora_U": U[:, :4], "lora_S": S[:4], "lora_Vh": Vh[:4]}
        return {name: t.detach().double() for name, t in leaves.items()} | {
            "lora_q": p["psoft_R"],
            "lora_gain_a": p["psoft_R.vector_a"] - 1.0,
            "lora_gain_b": p["psoft_R.vector_b"] - 1.0,
        }

    for alpha in (4, 9):
        compare(
            Tiny().float().double(),
            peft.PsoftConfig(r=4, psoft_alpha=alpha, ab_svd_init=start),
            ll.PSOFTConfig(r=4, both_sides=start == "pissa_init"),
            take,
            tol=1e-5,
            single=True,
        )


@pytest.mark.parametrize("depth", [0, 2])
def test_peanut(depth: int) -> None:
    def take(site: Any, p: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {"lora_A": p["peanut_A"], "lora_B": p["peanut_B"]}
        if depth:
            for ours, kind in (("lora_E", "encoders"), ("lora_D", "decoders")):
                layers = [getattr(site, f"peanut_{kind}")["default"][i] for i in range(depth)]
                leaves[ours] = torch.stack([layer.weight for layer in layers])
        return leaves

    compare(
        Tiny(),
        peft.PeanutConfig(r=4, depth=depth, scaling=2.0, act_fn="silu"),
        ll.PEANuTConfig(r=4, depth=depth, alpha=2.0, activation="silu"),
        take,
    )


def test_waveft() -> None:
    """PEFT's starts at zero here; its transform is ours with two quarters exchanged."""

    def take(site: Any, p: dict[str, Tensor]) -> dict[str, Tensor]:
        rows, columns = site.waveft_indices["default"]
        right, below = (rows < 12) & (columns >= 8), (rows >= 12) & (columns < 8)
        rows = rows + 12 * right.long() - 12 * below.long()
        columns = columns - 8 * right.long() + 8 * below.long()
        return {"lora_c": p["waveft_spectrum"], "lora_idx": torch.stack([rows, columns]).double()}

    compare(
        Tiny(),
        peft.WaveFTConfig(n_frequency=40, scaling=15.0),
        ll.WaveFTConfig(n_frequency=40, alpha=15.0),
        take,
        tol=1e-6,  # PEFT's filters are float32 numbers
    )


@pytest.mark.parametrize(
    ("weight", "prompt", "bias"),
    [("lora", "lora", "constant"), ("vector", "vector", "vector"), ("constant", "none", "none")],
)
def test_glora(weight: Any, prompt: Any, bias: Any) -> None:
    def take(site: Any, p: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {}
        for name, t in p.items():
            path, key = name.split(".")
            form = {"A": weight, "B": weight, "C": prompt}.get(path[-1], bias)
            value = t.flatten() if key == "X" else t
            leaves[f"lora_{path[-1]}_{key[-1].lower()}"] = value[0] if form == "constant" else value
        return leaves

    compare(
        Tiny(),
        peft.GloraConfig(r=3, config_A_B=weight, config_C=prompt, config_D_E=bias),
        ll.GLoRAConfig(r=3, weight_form=weight, prompt_form=prompt, bias_form=bias),
        take,
    )


@pytest.mark.parametrize("side", ["a", "b"])
def test_bdlora(side: str) -> None:
    """PEFT's A starts sqrt(6 n) times as far out as LoRA's; ours as far as its blocks' LoRAs."""
    blocks = BdLoraConfig(**{f"target_modules_bd_{side}": ["l"]}, nblocks=2)
    config = peft.LoraConfig(r=4, lora_alpha=6, use_bdlora=blocks)
    ours_ = ll.BDLoRAConfig(
        r=4, alpha=6, blocks_A=2 if side == "a" else 1, blocks_B=2 if side == "b" else 1
    )
    compare(Tiny(), config, ours_, renamed(lora_A="lora_A", lora_B="lora_B"))
    if side == "a":
        config.target_modules = ["l"]
        A = peft.get_peft_model(Tiny(), config).base_model.model.l.lora_A["default"].weight
        bound = (D_IN / 2) ** -0.5
        assert A.abs().max() > 1.5 * bound, "PEFT's start is LoRA's now"
        assert ll.init(Tiny(), ours_)["l"]["lora_A"].abs().max() <= bound


def test_pvera() -> None:
    def take(site: Any, p: dict[str, Tensor]) -> dict[str, Tensor]:
        A, B = site.pvera_A["default"], site.pvera_B["default"]
        return {
            "lora_b": p["pvera_lambda_b"],
            "lora_d": p["pvera_lambda_d"],
            "lora_A": A[:, :16].double(),
            "lora_B": B[:24].double(),
        }

    compare(Tiny().eval(), peft.PveraConfig(r=6), ll.PVeRAConfig(r=6), take)


def test_adamss() -> None:
    """PEFT's bias column is a shift of the output, so it is compared on a layer without one."""
    model = Tiny()
    model.l.bias = None

    def take(site: Any, p: dict[str, Tensor]) -> dict[str, Tensor]:
        cluster, B = torch.zeros(24), torch.zeros(24, 2, dtype=torch.float64)
        for i, rows in site.seg_result["default"].items():
            cluster[rows] = float(i)
            B = B.index_put((rows,), p[f"adamss_B.{i}"])
        return {
            "lora_A": torch.stack([p[f"adamss_A.{i}"] for i in range(3)]),
            "lora_B": B,
            "lora_N": site.adamss_newB["default"].double(),
            "lora_cluster": cluster,
        }

    sizes = {"r": 6, "num_subspaces": 3, "subspace_rank": 2}
    compare(model, peft.AdamssConfig(**sizes), ll.AdaMSSConfig(**sizes), take)


def test_frod() -> None:
    """PEFT makes its decomposition of the weight in float32."""

    def take(site: Any, p: dict[str, Tensor]) -> dict[str, Tensor]:
        V = site.frod_V["default"].double()
        inverse = torch.linalg.inv(V)
        l0 = (site.base_layer.weight @ inverse.mT).norm(dim=0)
        return {
            "lora_lambda": p["frod_lambda_l"] - l0,
            "lora_s": p["frod_lambda_s_values"],
            "lora_l0": l0.detach(),
            "lora_idx": site.frod_s_indices["default"].double(),
            "lora_V": V,
            "lora_V_inv": inverse,
        }

    compare(
        Tiny(),
        peft.FrodConfig(sparse_rate=0.1),
        ll.FRoDConfig(sparse_rate=0.1),
        take,
        tol=1e-5,
        single=True,
    )


def test_monteclora_outside_training_and_a_divergence_that_pefts_has_wrong() -> None:
    """PEFT's term of the weights' Dirichlet isn't zero at the prior itself."""
    config = peft.LoraConfig(r=3, lora_alpha=6, monteclora_config=MontecloraConfig(buffer_size=1))
    made, site = theirs(Tiny(), config)
    leaves = {f"lora_{n}": getattr(site, f"lora_{n}")["default"].weight for n in "AB"}
    params = ours(Tiny(), ll.MonteCLoRAConfig(r=3, alpha=6), leaves)
    x = torch.randn(5, 16, dtype=torch.float64)
    model = Tiny()
    model.l = site.base_layer
    close(ll.apply(model, params, x), made(x), 1e-10)
    sampler = site.lora_monteclora_sampler["default"]
    prior = torch.full((8,), 0.1)
    assert sampler.dirichlet_kl(prior).abs() > 1e-3 or sampler.dirichlet_kl(3 * prior) < 0, (
        "PEFT's divergence is one now"
    )


def test_velora_s_gradient_in_training() -> None:
    config = peft.LoraConfig(r=3, lora_alpha=6, velora_config=VeloraConfig(num_groups=4))
    made, site = theirs(Tiny(), config)
    model, x = Tiny(), torch.randn(2, 5, 16, dtype=torch.float64)
    model.l = site.base_layer
    leaves = {f"lora_{n}": getattr(site, f"lora_{n}")["default"].weight for n in "AB"}
    params = ours(model, ll.VeLoRAConfig(r=3, alpha=6, num_groups=4), leaves)
    g = torch.randn(2, 5, 24, dtype=torch.float64)
    expected = torch.autograd.grad((made.train()(x) * g).sum(), list(leaves.values()))
    found = torch.autograd.grad((ll.apply(model.train(), params, x) * g).sum(), [*leaves.values()])
    close(found, expected, 1e-6)
