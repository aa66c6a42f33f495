"""What methods do in training mode alone: noise by its moments and draws, a gradient of its own,
and what is refused where a weight stands for the call.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import close, moved, normal
from linear_layers import layer
from torch import Tensor, nn
from torch.distributions import Dirichlet, kl_divergence

import lora_lite_func as ll

NOISY = [ll.PVeRAConfig(r=6, sample=True), ll.MonteCLoRAConfig(r=4, noise=0.1)]
ALL = [*NOISY, ll.VeLoRAConfig(r=4, num_groups=3)]
every = pytest.mark.parametrize("cfg", ALL, ids=lambda c: type(c).__name__)
noisy = pytest.mark.parametrize("cfg", NOISY, ids=lambda c: type(c).__name__)


def trained(cfg: ll.AdapterConfig) -> tuple[nn.Module, ll.Adapter, Tensor]:
    model = layer(True, 16, 24).train()
    x = normal(5, 16, seed=1)
    return model, moved(ll.init(model, cfg), size=0.3), x


@noisy
def test_noise_is_torchs_and_of_training_alone(cfg: ll.AdapterConfig) -> None:
    model, params, x = trained(cfg)
    torch.manual_seed(0)
    first, second = ll.apply(model, params, x), ll.apply(model, params, x)
    assert (first - second).abs().max() > 1e-6
    torch.manual_seed(0)
    assert torch.equal(ll.apply(model, params, x), first)
    torch.manual_seed(0)
    close(ll.bind(model, params)(x), first, 1e-12)
    mean = ll.apply(model.eval(), params, x)
    assert torch.equal(ll.apply(model, params, x), mean)
    close(ll.merged(model.train(), params)(x), mean, 1e-12)
    prepared = ll.prepared(model.train(), params)
    close(prepared(x), mean, 1e-12)


@pytest.mark.parametrize("cfg", [ll.PVeRAConfig(r=6), ll.MonteCLoRAConfig(r=4)], ids=repr)
def test_nothing_is_drawn_that_is_not_asked_for(cfg: ll.AdapterConfig) -> None:
    model, params, x = trained(cfg)
    assert torch.equal(ll.apply(model, params, x), ll.apply(model.eval(), params, x))
    attention = nn.MultiheadAttention(16, 2).train()
    tokens = torch.randn(3, 2, 16)
    ll.apply(attention, ll.init(attention, cfg), tokens, tokens, tokens)


def test_pvera_draws_of_its_mean_and_variance() -> None:
    model, params, x = trained(ll.PVeRAConfig(r=6, sample=True))
    p, many = params[""], x[:1].expand(40_000, -1)
    torch.manual_seed(0)
    y = ll.apply(model, params, many)
    close(y.mean(0), ll.apply(model.eval(), params, x)[0], 0.02)
    log_variance = (p["lora_A"][6:] @ x[0]) * p["lora_d"][6:]
    variance = p["lora_b"].square() * (p["lora_B"].square() @ log_variance.exp())
    close(y.var(0) / variance, torch.ones(24, dtype=torch.float64), 0.05)


def test_pvera_draws_at_inference_where_it_is_asked_for() -> None:
    cfg = ll.PVeRAConfig(r=6, sample=True, sample_at_inference=True)
    model, params, x = trained(cfg)
    torch.manual_seed(0)
    training = ll.apply(model, params, x)
    mean = ll.apply(ll.merged(model.eval(), params), (), x)
    for call in (
        lambda: ll.apply(model, params, x),
        lambda: ll.bind(model, params)(x),
        lambda: ll.prepared(model, params)(x),
    ):
        torch.manual_seed(0)
        close(call(), training, 1e-12)
    stack = ll.stack([params, moved(params, 2)])
    for several in (ll.rows(stack, [0, 1, -1, 0, 1]), ll.mixed(stack, torch.ones(5, 2).double())):
        first, second = ll.apply(model, several, x), ll.apply(model, several, x)
        assert ((first - second).abs().amax(-1) > 1e-9).sum() >= 4
    assert (training - mean).abs().max() > 1e-3
    attention = nn.MultiheadAttention(16, 2).eval()
    tokens = torch.randn(3, 2, 16)
    with pytest.raises(ll.UnsupportedError, match=r"what pvera does acts on a layer's call"):
        ll.apply(attention, ll.init(attention, cfg), tokens, tokens, tokens)
    with pytest.raises(ll.ConfigError, match="nothing is drawn with sample=False"):
        ll.PVeRAConfig(sample_at_inference=True)


def test_monteclora_s_draw_is_the_formula() -> None:
    cfg = ll.MonteCLoRAConfig(r=4, alpha=6.0, num_samples=3, noise=0.1)
    model, params, x = trained(cfg)
    p = params[""]
    torch.manual_seed(0)
    found = ll.apply(model, params, x)
    torch.manual_seed(0)
    normal = torch.randn(4, 4, dtype=torch.float64)
    v = (2 * p["lora_sigma"]).exp() * (normal**2).sum(1)
    alpha = p["lora_pi"].exp()
    mu = alpha.log() - alpha.log().mean()
    variance = (1 / alpha) * (1 - 2 / 3) + (1 / alpha).sum() / 9
    w = torch.softmax(mu + variance.sqrt() * torch.randn(3, dtype=torch.float64), 0)
    Z = torch.randn(4, 16, dtype=torch.float64)
    N = 0.1 * torch.diag(v.sqrt()) @ ((w**2).sum().sqrt() * Z)
    close(found, model(x) + 1.5 * x @ (p["lora_A"] + N).mT @ p["lora_B"].mT, 1e-12)


def test_monteclora_s_penalty_is_the_sum_of_divergences() -> None:
    cfg = ll.MonteCLoRAConfig(r=4, num_samples=3, dirichlet_prior=0.5, kl_weight=0.2)
    _, params, _ = trained(cfg)
    sigma, pi = params[""]["lora_sigma"], params[""]["lora_pi"]
    dirichlet = kl_divergence(Dirichlet(pi.exp()), Dirichlet(torch.full_like(pi, 0.5)))
    wishart = 2.0 * ((2 * sigma).exp() - 2 * sigma - 1).sum()
    chi2 = normal(400_000, 4, seed=2, dtype=torch.float32).square().sum(1)
    v = (2 * sigma).exp()[:, None] * chi2.double()
    draws = 1.5 * (v - v.log() - 1).mean(1).sum()
    close(ll.penalty(params), 0.2 * (dirichlet + wishart + draws), 1e-2)
    close(ll.penalty(params) / 0.2 - draws, dirichlet + wishart, 0.1)
    grads = ll.grad(ll.penalty)(params)[""]
    assert grads["lora_sigma"].any()
    assert grads["lora_pi"].any()


def test_velora_s_gradient_of_A_is_that_of_compressed_inputs() -> None:
    """The others are LoRA's, and so are its values."""
    model, params, x = trained(ll.VeLoRAConfig(r=4, alpha=6.0, num_groups=3, gradient_scale=0.7))
    like = ll.init(model, ll.LoRAConfig(r=4, alpha=6.0))
    lora = ll.from_dict(ll.to_dict(params), like)
    g = torch.randn(5, 24, dtype=torch.float64)

    def loss(p: Any, x: Tensor) -> Tensor:
        return (ll.apply(model, p, x) * g).sum()

    trained_value = ll.apply(model, params, x)
    close(trained_value, ll.apply(model.eval(), params, x), 1e-12)
    model.train()
    found, to_x = torch.func.grad(loss, (0, 1))(params, x)
    exact, exact_x = torch.func.grad(loss, (0, 1))(lora, x)
    close(to_x, exact_x, 1e-12)
    close(found[""]["lora_B"], exact[""]["lora_B"], 1e-12)
    x_g = torch.cat([x, torch.zeros(5, 2, dtype=x.dtype)], 1).view(5, 3, 6)
    e = x_g.mean((0, 1))
    e = e / e.norm()
    told = 0.7 * torch.einsum("tg,d->tgd", x_g @ e, e).reshape(5, 18)[:, :16]
    expected = 1.5 * (g @ params[""]["lora_B"]).mT @ told
    close(found[""]["lora_A"], expected, 1e-12)
    assert (found[""]["lora_A"] - exact[""]["lora_A"]).abs().max() > 1e-2
    bound = ll.bind(model, params)
    (bound(x) * g).sum().backward()
    close(bound.adapter[0].lora_A.grad, expected, 1e-12)
    model.eval()  # outside of training it is the gradient of the function
    close(torch.func.grad(loss)(params, x)[""]["lora_A"], exact[""]["lora_A"], 1e-12)


def test_velora_keeps_no_input() -> None:
    model, x = nn.Linear(512, 32).train(), torch.randn(256, 512)
    kept: dict[str, int] = {}

    def bytes_of(cfg: ll.AdapterConfig) -> int:
        seen: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        bound = ll.bind(model, ll.init(model, cfg))
        own = {t.untyped_storage().data_ptr() for t in (*bound.parameters(), *bound.buffers())}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            bound(x).sum()
        return sum(size for where, size in seen.items() if where not in own)

    kept["lora"] = bytes_of(ll.LoRAConfig(r=4))
    kept["velora"] = bytes_of(ll.VeLoRAConfig(r=4, num_groups=16))
    assert kept["lora"] >= x.untyped_storage().nbytes()
    assert kept["velora"] < kept["lora"] / 4


def test_velora_takes_an_empty_batch_and_one_of_zeros() -> None:
    model, params, _ = trained(ll.VeLoRAConfig(r=4, num_groups=3))
    for x in (torch.zeros(0, 16, dtype=torch.float64), torch.zeros(2, 16, dtype=torch.float64)):
        grads = ll.grad(lambda p, x=x: ll.apply(model, p, x).sum())(params)[""]
        assert all(bool(g.isfinite().all()) for g in grads.values())


@every
def test_rows_mixtures_and_compiled_calls_train_too(cfg: ll.AdapterConfig) -> None:
    model, params, x = trained(cfg)
    stack = ll.stack([params, moved(params, 2)])
    mean = ll.apply(copy.deepcopy(model).eval(), ll.rows(stack, [0, 1, -1, 0, 1]), x)
    mixtures = ll.mixed(stack, torch.full((5, 2), 0.5, dtype=torch.float64))
    blend = ll.apply(copy.deepcopy(model).eval(), mixtures, x)
    step = torch.compile(lambda p, x: ll.apply(model, p, x), fullgraph=True, backend="eager")
    for call, expected in (
        (lambda: ll.apply(model, ll.rows(stack, [0, 1, -1, 0, 1]), x), mean),
        (lambda: ll.apply(model, mixtures, x), blend),
        (lambda: step(params, x), ll.apply(copy.deepcopy(model).eval(), params, x)),
    ):
        found = call()
        changed = (found - expected).abs().amax(-1)
        assert bool((changed > 1e-9).any()) == (cfg in NOISY)
        assert found.shape == expected.shape


@every
def test_where_a_weight_stands_for_the_call_training_is_refused(cfg: ll.AdapterConfig) -> None:
    model = nn.MultiheadAttention(16, 2).train()
    params, x = ll.init(model, cfg), torch.randn(3, 2, 16)
    with pytest.raises(
        ll.UnsupportedError, match=r"'out_proj': what .* does in training acts on a layer"
    ):
        ll.apply(model, params, x, x, x)
    ll.apply(model.eval(), params, x, x, x)
