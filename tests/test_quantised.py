"""Packed bases on the CPU: bitsandbytes' 8-bit and NF4 layers serve every method that needs only the layer's call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import close, moved, same_state, snapshot
from torch import nn

import lora_lite_func as ll

bnb = pytest.importorskip("bitsandbytes")

pytestmark = pytest.mark.filterwarnings("ignore")  # bitsandbytes' own

LAYERS = {
    "8bit": lambda: bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False),
    "nf4": lambda: bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32),
}
CONFIGS = (
    ll.LoRAConfig(),
    ll.IA3Config(),
    ll.IA3FFConfig(),
    ll.HRAConfig(),
    ll.ROADConfig(),
    ll.LoHaConfig(r=2),
    ll.OFTConfig(block_size=4),
)


def model(kind: str) -> Any:
    torch.manual_seed(0)
    plain = nn.Linear(64, 64)
    packed = LAYERS[kind]()
    packed.load_state_dict(plain.state_dict())
    made = nn.Sequential(nn.Linear(64, 64), packed.to("cpu"))
    made(torch.randn(2, 64))  # some layers repack themselves at their first call
    return made


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("cfg", CONFIGS, ids=lambda c: type(c).__name__)
def test_forward_and_gradients(kind: str, cfg: ll.AdapterConfig, tmp_path: Any) -> None:
    base = model(kind)
    x = torch.randn(4, 64)
    start = ll.init(base, cfg)
    assert {t.dtype for t in start["1"].values()} == {torch.float32}
    before = snapshot(base)
    close(ll.apply(base, start, x), base(x), 1e-6 if isinstance(cfg, ll.HRAConfig) else 0.0)
    params = moved(start)
    y = ll.apply(base, params, x)
    assert (y - base(x)).abs().max() > 1e-3
    bound = ll.bind(base, params)
    close(bound(x), y, 1e-6)
    bound(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in bound.parameters() if p.requires_grad)
    ll.save(params, tmp_path / "a.safetensors")
    close(ll.apply(base, ll.load(tmp_path / "a.safetensors", base), x), y, 1e-6)
    assert same_state(before, snapshot(base))


@pytest.mark.parametrize("kind", LAYERS)
def test_what_needs_the_dense_weight_is_refused_with_a_way_out(kind: str) -> None:
    base = model(kind)
    for cfg in (ll.PiSSAConfig(), ll.DoRAConfig(), ll.DeLoRAConfig()):
        with pytest.raises(ll.UnsupportedError, match=r"site '1': \w+ needs the dense weight.*use a method that needs none"):
            ll.init(base, cfg)
    with pytest.raises(ll.UnsupportedError, match=r"'1' \(Linear\w+\): its weight is packed"):
        ll.merge(base, ll.init(base, ll.LoRAConfig()))
