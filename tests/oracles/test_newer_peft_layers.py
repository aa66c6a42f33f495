"""Newer methods beside PEFT's own layers, as test_peft_layers.py has the older ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import close
from peft_layers import Tiny, compare, peft, theirs
from torch import Tensor, nn

import lora_lite_func as ll

KasaConfig = pytest.importorskip("peft.tuners.lora").KasaConfig

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
