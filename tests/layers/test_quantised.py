"""Packed bases on the CPU: bitsandbytes' 8-bit and NF4 layers and torchao's int8 weights serve
every method; merging makes them dense.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import CASES, Case, merging
from helpers import close, moved
from torch import Tensor, nn

import lora_lite_func as ll
from lora_lite_func.layers.quantised import dequantised

pytestmark = pytest.mark.filterwarnings("ignore")  # the packers' own

KINDS = ("8bit", "nf4", "int8")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).requires_grad_(False)


def model(kind: str) -> Any:
    made = plain()
    if kind == "int8":
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(
            made, quantization.Int8WeightOnlyConfig(), filter_fn=lambda module, path: path == "1"
        )
        return made
    bnb = pytest.importorskip("bitsandbytes")
    packed = (
        bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
        if kind == "8bit"
        else bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)
    )
    packed.load_state_dict(made[1].state_dict())
    made[1] = packed.requires_grad_(False).to("cpu")
    made(torch.randn(2, 64))  # some layers repack themselves at their first call
    return made


def values(base: Any) -> list[Tensor]:
    """All that a call could write: the plain layer, and what the packed one multiplies by."""
    return [*base[0].parameters(), base[1].bias, dequantised(base[1], base[1].weight)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", [case for case in CASES if case.linear], ids=repr)
def test_every_method(
    kind: str, case: Case, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case.noise:  # bitsandbytes rounds otherwise in eval mode, so it is the noise that is off
        monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    base = model(kind)
    before = [t.clone() for t in values(base)]
    x = torch.randn(4, 64)
    start = ll.init(base, case.config(r=4, target_names="1"))
    assert {t.dtype for t in start["1"].values()} == {torch.float32}
    if case.identity is not None:
        near = max(1e-5, case.identity * torch.finfo(torch.float32).eps)
        close(ll.apply(base, start, x), base(x), near)
    params = moved(start)
    y = ll.apply(base, params, x)
    assert (y - base(x)).abs().max() > 1e-3
    bound = ll.bind(base, params)
    close(bound(x), y, 1e-6)
    bound(x).square().sum().backward()
    trained = {n.rpartition(".")[2]: p for n, p in bound.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for n, p in trained.items() if n not in case.in_training)
    assert any(p.grad is not None and p.grad.any() for p in trained.values())
    ll.save(params, tmp_path / "a.safetensors")
    close(ll.apply(base, ll.load(tmp_path / "a.safetensors", base), x), y, 1e-6)
    with merging(case):
        close(ll.merged(base, params, dequantize=True)(x), y, 1e-4)
    close([t.clone() for t in values(base)], before, 0.0)
    assert all(p.grad is None for p in base.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_the_dequantised_view_is_what_the_layer_multiplies_by(kind: str) -> None:
    base, x = model(kind), torch.randn(16, 64)
    W = dequantised(base[1], base[1].weight)
    assert (W - plain()[1].weight).abs().max() < 0.03
    close(nn.functional.linear(x, W, base[1].bias), base[1](x), 1e-5)
    evaluated = copy.deepcopy(base).eval()
    evaluated(x)  # bitsandbytes rearranges 4 bits for some processors here
    close(dequantised(evaluated[1], evaluated[1].weight), W, 2e-3)
    close(evaluated(x), nn.functional.linear(base[0](x), W, base[1].bias), 0.03)
    pissa = ll.init(base, ll.PiSSAConfig(r=64, target_names="1"))
    close(pissa.sites["1"].scaling * pissa["1", "lora_B0"] @ pissa["1", "lora_A0"], W, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_asks_first_and_makes_a_dense_layer(kind: str) -> None:
    base, x = model(kind), torch.randn(4, 64)
    params = moved(ll.init(base, ll.LoRAConfig()))
    for verb in (ll.merge, ll.merged):
        with pytest.raises(
            ll.UnsupportedError,
            match=r"'1' \(Linear\w*\): its weight is packed .*dequantize=True, which costs",
        ):
            verb(base, params)
    new = ll.merge(base, params, dequantize=True)
    assert {name: t.dtype for name, t in new.items()} == dict.fromkeys(
        ("0.weight", "1.weight"), torch.float32
    )
    dense = ll.merged(base, params, dequantize=True)
    assert type(dense[1]) is nn.Linear
    assert type(dense[1].weight) is nn.Parameter
    close(dense(x), ll.apply(base, params, x), 1e-4)
    assert type(base[1].weight) is not nn.Parameter
    alone = ll.merged(
        base[1], ll.scale(moved(ll.init(base[1], ll.LoRAConfig())), 0.0), dequantize=True
    )
    close(alone(x), base[1](x), 1e-4)


def test_a_packing_that_nobody_knows_is_asked_for_its_values() -> None:
    class Rows(nn.Module):
        """Whole numbers with a scale per row."""

        def __init__(self, dense: nn.Linear) -> None:
            super().__init__()
            self.in_features, self.out_features, self.bias = (
                dense.in_features,
                dense.out_features,
                dense.bias,
            )
            self.register_buffer("scales", dense.weight.abs().amax(1) / 127)
            self.weight = nn.Parameter(
                (dense.weight / self.scales[:, None]).round().to(torch.int8), requires_grad=False
            )

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(
                x, self.weight.to(x.dtype) * self.scales[:, None].to(x.dtype), self.bias
            )

    base, x = nn.Sequential(Rows(plain()[0])), torch.randn(4, 64)
    W = base[0].weight * base[0].scales[:, None]
    close(dequantised(base[0], base[0].weight), W, 1e-6)
    params = moved(ll.init(base, ll.DoRAConfig(r=4)))
    close(ll.merged(base, params, dequantize=True)(x), ll.apply(base, params, x), 1e-5)
    base[0].forward = None
    with pytest.raises(
        ll.UnsupportedError,
        match=r"site '0': pissa needs the dense weight; Rows keeps its weight in a packing",
    ):
        ll.init(base, ll.PiSSAConfig(r=4))


@pytest.mark.parametrize("kind", KINDS)
def test_what_would_have_to_change_the_packed_tensor_itself_is_refused(kind: str) -> None:
    with pytest.raises(ll.UnsupportedError, match=r"'1.weight' is packed .*: adapt its layer"):
        ll.init(model(kind), ll.LoRAConfig(target_parameters="1.weight"))


def test_a_layer_that_casts_its_bias_in_place_casts_its_own() -> None:
    base = model("8bit")
    params = ll.init(base, ll.LoRAConfig(r=2, target_names="1"))
    x = torch.randn(2, 64).bfloat16()
    ll.apply(base[1], ll.init(base[1], ll.LoRAConfig(r=2)), x)
    ll.bind(base[1], ll.init(base[1], ll.LoRAConfig(r=2)))(x)
    assert base[1].bias.dtype == torch.float32
    assert ll.apply(base, params, x.float()).dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_every_method(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)  # noise is off, as above
    base, x, ids = model(kind), torch.randn(4, 3, 64), [1, -1, 0, 1]
    for case in CASES:
        if not case.linear:
            continue
        members = [moved(ll.init(base, case.config(r=4), seed=seed), seed, 0.05) for seed in (1, 2)]
        stack = ll.stack(members)
        each = [
            ll.apply(base, members[i] if i >= 0 else {}, x[k : k + 1]) for k, i in enumerate(ids)
        ]
        # with 8 bits, rounding depends on the batch
        close(
            ll.apply(base, ll.rows(stack, ids), x),
            torch.cat(each),
            2e-2 if kind == "8bit" else 1e-4,
        )
        bound = ll.bind(base, ll.rows(stack, ids))
        bound(x).square().sum().backward()
        assert any(p.grad is not None and p.grad.any() for p in bound.parameters())


# ------------------------------------------------------------------------------ a dense reference
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [2.0, 64.0])
def test_loftq_brings_a_quantised_model_nearer_to_the_dense_one(kind: str, alpha: float) -> None:
    base, dense, x = model(kind), plain(), torch.randn(32, 64)
    before = [t.clone() for t in values(base)]

    def error(params: Any) -> float:
        return float((ll.apply(base, params, x) - dense(x)).norm())

    errors = [error(())]
    for r in (8, 32, 64):
        cfg = ll.LoftQConfig(r=r, alpha=alpha, target_names="1")
        params = ll.init(base, cfg, reference=dense)
        A, B = params["1"]["lora_A"], params["1"]["lora_B"]
        close(A @ A.mT, B.mT @ B, 1e-5)  # the scale and the values are split evenly
        errors.append(error(params))
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.9 * errors[0]
    assert errors[3] < 1e-3 * errors[0]  # of full rank it is the dense layer
    close(ll.apply(base, ll.scale(params, 0.0), x), base(x), 1e-6)
    close([t.clone() for t in values(base)], before, 0.0)


def test_loftq_of_stacked_experts_and_tables() -> None:
    class Both(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            gen = torch.Generator().manual_seed(seed)
            self.experts = nn.Parameter(torch.randn(3, 6, 4, generator=gen))
            self.table = nn.Embedding(7, 5, _weight=torch.randn(7, 5, generator=gen))

    base, dense = Both(0), Both(1)
    for chosen, r in (({"target_parameters": "experts"}, 4), ({"target_kinds": "embedding"}, 5)):
        params = ll.init(base, ll.LoftQConfig(r=r, **chosen), reference=dense)
        found = ll.merge(base, params)
        assert len(found) == 1
        close(found, {name: dense.get_parameter(name) for name in found}, 1e-5)


def test_a_reference_that_cannot_serve_is_refused() -> None:
    base, cfg = model("int8"), ll.LoftQConfig(target_names="1")
    with pytest.raises(ll.ConfigError, match=r"loftq starts from .* ll\.init\(model, cfg, refer"):
        ll.init(base, cfg)
    with pytest.raises(ll.ConfigError, match="reference: lora doesn't start from another model's"):
        ll.init(base, ll.LoRAConfig(), reference=plain())
    with pytest.raises(ll.ConfigError, match=r"reference: expected an nn\.Module, found \{\}"):
        ll.init(base, cfg, reference={})
    with pytest.raises(
        ll.ConfigError, match="site '1': the reference has no layer of kind 'linear' at"
    ):
        ll.init(base, cfg, reference=nn.Sequential(nn.Linear(64, 64)))
    small = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 128))
    with pytest.raises(ll.ConfigError, match=r"site '1': expected a weight of 64 x 64 in the ref"):
        ll.init(base, cfg, reference=small)
    with pytest.raises(ll.ConfigError, match=r"site '0': .* this weight is the reference's; give"):
        ll.init(base, ll.LoftQConfig(target_names="0"), reference=plain())
    other = nn.Sequential(nn.Linear(64, 64), nn.Embedding(64, 64))
    with pytest.raises(ll.ConfigError, match="the reference has no layer of kind 'linear' at"):
        ll.init(base, cfg, reference=other)
