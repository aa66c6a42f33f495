"""S-steer against its formula written densely, and AntiPaSTO's choice of directions by what the
data does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from helpers import close, net, same_state, snapshot
from hypothesis import given
from torch import Tensor, nn

import lora_lite_func as ll


def data(n: int, *inner: int, seed: int = 0) -> Tensor:
    return torch.randn(
        n, *inner, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def pairs(n: int = 6, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Two batches of texts (n, tokens, width) that differ by a shift, and noise."""
    shift = data(1, 1, seed=99)
    return [
        (data(n, 3, seed=seed + i) + shift, data(n, 3, seed=seed + i + 50) - shift)
        for i in range(2)
    ]


def inputs_at(model: nn.Module, path: str, x: Tensor) -> Tensor:
    """What comes to a layer at the last token."""
    seen: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_pre_hook(
        lambda module, args: seen.append(args[0][:, -1])
    )
    model(x)
    hook.remove()
    return seen[0].detach()


@given(r=st.sampled_from([1, 3, 8, 16]), seed=st.integers(0, 99))
def test_the_formula(r: int, seed: int) -> None:
    model = net()
    before = snapshot(model)
    params = ll.init(model, ll.SSteerConfig(r=r), calibration_data=pairs(seed=seed))
    assert same_state(before, snapshot(model))
    for path, p in params.items():
        W = model.get_submodule(path).weight.detach()
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        apart = (
            torch.cat(
                [inputs_at(model, path, a) - inputs_at(model, path, b) for a, b in pairs(seed=seed)]
            )
            @ Vh.T
        )
        for i in range(len(S)):
            if (apart[:, i] > 0).double().mean() < 0.5:
                U[:, i], Vh[i], apart[:, i] = -U[:, i], -Vh[i], -apart[:, i]
        m = S.sqrt() * apart.mean(0)
        delta = m / m.norm()
        best = sorted(range(len(S)), key=lambda i: -abs(float(delta[i])))[:r]
        update = sum(S[i] * delta[i] * torch.outer(U[:, i], Vh[i]) for i in best)
        # S and delta are kept in the adapter's dtype
        close(ll.merge(model, params)[f"{path}.weight"], W + update, 1e-6)
        assert p["lora_delta"].shape == (r,)


def test_strength_is_linear_and_zero_is_the_base(tmp_path: Path) -> None:
    model, x = net(), data(4, 5, seed=7)
    params = ll.init(
        model, ll.SSteerConfig(r=4, target_names=(r"layers\.1\.down",)), calibration_data=pairs()
    )
    base, plus, minus = (ll.apply(model, ll.scale(params, c), x) for c in (0.0, 1.0, -1.0))
    assert torch.equal(base, model(x))
    close(plus - base, base - minus, 1e-9)
    close(plus, ll.merged(model, params)(x), 1e-10)
    swept = torch.func.vmap(lambda c: ll.apply(model, ll.scale(params, c), x))(
        torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64)
    )
    close(swept, torch.stack([base, plus, minus]), 1e-10)
    ll.save(params, tmp_path / "steer.safetensors")
    assert torch.equal(ll.apply(model, ll.load(tmp_path / "steer.safetensors", model), x), plus)
    assert ll.num_params(params) == 0
    stack = ll.stack([params, ll.scale(params, -2.0)])
    close(ll.apply(model, ll.rows(stack, [1, -1, 0, 1]), x)[2], plus[2], 1e-10)


def test_strength_above_zero_takes_the_outputs_apart() -> None:
    """Where every pair differs alike, the update moves along what sets positive outputs apart."""
    model = nn.Sequential(nn.Linear(16, 12, bias=False)).double().requires_grad_(False)
    shift = data(1, seed=3)
    negative = data(5, seed=4)
    params = ll.init(model, ll.SSteerConfig(r=12), calibration_data=[(negative + shift, negative)])
    assert (params["0"]["lora_delta"] > 0).all()
    moved = ll.apply(model, params, shift) - model(shift)
    assert float((moved * model(shift)).sum()) > 0


def test_padding_is_no_last_token_and_shards_add_up() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.inner(x)

    model, cfg = Masked(), ll.SSteerConfig(r=3)
    short = [
        tuple({"x": x, "attention_mask": torch.ones(x.shape[:2])} for x in pair) for pair in pairs()
    ]
    mask, more = torch.tensor([1, 1, 1, 0, 0]), data(6, 2, seed=1)

    def pad(x: Tensor) -> dict[str, Tensor]:
        return {"x": torch.cat([x, more], 1), "attention_mask": mask.expand(len(x), -1)}

    padded = [(pad(positive), pad(negative)) for positive, negative in pairs()]
    first = ll.init(model, cfg, calibration_data=short)
    close(ll.init(model, cfg, calibration_data=padded), first, 1e-9)
    both = ll.calibrate(model, cfg, short[:1]) + ll.calibrate(model, cfg, short[1:])
    close(ll.init(model, cfg, calibration_data=both), first, 1e-9)


@pytest.mark.parametrize(
    ("given_data", "message"),
    [
        (
            None,
            r"s_steer starts from the layers' inputs: give calibration_data \(pairs \(positive, "
            r"negative\)",
        ),
        ([data(3)], r"expected pairs \(positive, negative\), found Tensor"),
        ([(data(3), data(3), data(3))], "expected pairs"),
        (
            [(data(3), data(2))],
            r"site 'layers\.0\.up': the positive batch has 3 rows, the negative one another number",
        ),
        ([(data(3), data(3))], "the positive and the negative inputs are the same here"),
        ([], "expected at least one batch"),
    ],
)
def test_what_is_refused(given_data: Any, message: str) -> None:
    with pytest.raises(ll.ConfigError, match=message):
        ll.init(net(), ll.SSteerConfig(r=2), calibration_data=given_data)


def test_antipasto_takes_the_directions_in_which_the_outputs_vary() -> None:
    model, batches = (
        net(),
        [
            data(9, 4, seed=s) * torch.linspace(0.1, 3.0, 16, dtype=torch.float64) + 1.0
            for s in range(3)
        ],
    )
    cfg = ll.AntiPaSTOConfig(r=4, select="spread")
    params = ll.init(model, cfg, calibration_data=batches)
    x = torch.cat([model.layers[0].norm(b).reshape(-1, 16) for b in batches]).detach()
    _, S, Vh = torch.linalg.svd(model.layers[0].up.weight.detach(), full_matrices=False)
    score = S * (x @ Vh.T).std(0, correction=0)
    best = sorted(range(16), key=lambda i: -float(score[i]))[:4]
    close(params["layers.0.up"]["lora_S"].double(), S[sorted(best)], 1e-6)
    y = data(3)
    assert torch.equal(ll.apply(model, params, y), model(y))
    with pytest.raises(ll.ConfigError, match="antipasto starts from the layers' inputs"):
        ll.init(model, cfg)
    with pytest.raises(ll.ConfigError, match="takes no calibration data"):
        ll.init(model, ll.AntiPaSTOConfig(r=4), calibration_data=batches)


def test_antipasto_takes_the_directions_that_are_most_active() -> None:
    """S_i mean|v_i x|, as lora-lite chooses them; statistics of shards add up."""
    scales = torch.linspace(3.0, 0.1, 16, dtype=torch.float64)
    batches = [data(9, 4, seed=s) * scales + 1.0 for s in range(3)]
    model, cfg = net(), ll.AntiPaSTOConfig(r=4, select="active")
    params = ll.init(model, cfg, calibration_data=batches)
    x = torch.cat([model.layers[0].norm(b).reshape(-1, 16) for b in batches]).detach()
    _, S, Vh = torch.linalg.svd(model.layers[0].up.weight.detach(), full_matrices=False)
    score = S * (x @ Vh.T).abs().mean(0)
    best = sorted(sorted(range(16), key=lambda i: -float(score[i]))[:4])
    close(params["layers.0.up"]["lora_S"].double(), S[best], 1e-6)
    shards = ll.calibrate(model, cfg, batches[:1]) + ll.calibrate(model, cfg, batches[1:])
    again = ll.init(model, cfg, calibration_data=shards)
    assert torch.equal(again["layers.0.up"]["lora_S"], params["layers.0.up"]["lora_S"])
    spread = ll.calibrate(model, ll.AntiPaSTOConfig(r=4, select="spread"), batches)
    with pytest.raises(ll.ConfigError, match="expected a finite activity of its directions"):
        ll.init(model, cfg, calibration_data=spread)
    with pytest.raises(ll.StructureError, match="activity of directions in one of the two alone"):
        shards + spread
