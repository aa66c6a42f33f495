"""Mistakes of who writes a method: each is refused with what the method gave and what was expected,
or shows in `ll.check`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import moved, net
from torch import nn

import lora_lite_func as ll
from lora_lite_func.core import registry as methods

MODEL = net(depth=1)
X = torch.randn(6, 16, dtype=torch.float64)
NOTHING: Any = lambda *_: None  # noqa: E731


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ll.AdapterConfig]:
    """A learned shift of the output, registered for the length of a test, with some of its fields
    replaced.
    """
    monkeypatch.setattr(methods, "_REGISTRY", dict(methods._REGISTRY))

    def method(**fields: Any) -> ll.AdapterConfig:
        config = dataclasses.make_dataclass(
            "TheirConfig", [], bases=(ll.AdapterConfig,), frozen=True, kw_only=True
        )
        right: dict[str, Any] = {
            "param_specs": lambda cfg, site: {"lora_b": ll.ParamSpec((site.d_out,))},
            "outputs": lambda cfg, p, d, x, y, site: y + p["lora_b"],
            "weight": lambda cfg, p, site, W, b: (W, b + p["lora_b"]),
            "scale": lambda cfg, p, c: {"lora_b": c * p["lora_b"]},
            "sites": ("linear",),
        }
        ll.register(ll.Variant(name="theirs", config=config, **{**right, **fields}))
        return config()

    return method


def trained(cfg: ll.AdapterConfig) -> ll.Adapter:
    return moved(ll.init(MODEL, cfg))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"outputs": "no"}, "variant 'theirs': outputs: expected a function, found 'no'"),
        ({"param_specs": None}, "variant 'theirs': param_specs: expected a function, found None"),
        ({"factor": 2.0}, "variant 'theirs': scaling: expected a function, found 2.0"),
        ({"needs": "weight"}, "variant 'theirs': needs: expected a set of names, found 'weight'"),
        ({"sites": "linear"}, "variant 'theirs': sites: expected a tuple of names, found 'linear'"),
    ],
)
def test_fields_of_a_variant(made: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ll.ConfigError, match=message):
        made(**fields)


def test_needs_may_be_any_set(made: Any) -> None:
    assert trained(made(needs={"weight"})).layout.variant.needs == frozenset({"weight"})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (ll.ParamSpec(24), r"lora_b has the shape 24; expected a tuple of sizes"),
        (ll.ParamSpec((24.0,)), r"lora_b has the shape \(24\.0,\); expected a tuple of sizes"),
        (ll.ParamSpec((-3,)), r"lora_b has the shape \(-3,\); expected a tuple of sizes"),
        (
            ll.ParamSpec((24,), rank_axis=1),
            r"lora_b has rank_axis=1; expected one of its 1 axes, counted from 0",
        ),
        (
            ll.ParamSpec((24,), dtype=torch.int64),
            r"lora_b is torch.int64 and trainable; expected a floating dtype, or trainable=False",
        ),
        (
            ll.ParamSpec((24,), dtype=torch.complex64),
            r"lora_b is torch.complex64; expected a real dtype",
        ),
        (
            ll.ParamSpec((24,), dtype="float32"),
            r"lora_b is 'float32'; expected a torch.dtype or None",
        ),
        (ll.ParamSpec((24,), NOTHING), r"the draw of lora_b gave None, expected a tensor"),
        (
            ll.ParamSpec((24,), lambda shape, gen: torch.zeros(3)),
            r"theirs.init gave lora_b the shape \(3,\), expected \(24,\)",
        ),
        (torch.zeros(24), r"theirs.param_specs: expected a mapping of names to ParamSpecs"),
    ],
)
def test_specs(made: Any, given: Any, message: str) -> None:
    cfg = made(param_specs=lambda cfg, site: {"lora_b": given})
    with pytest.raises(ll.LoraLiteError, match=f"site 'layers.0.up': .*{message}"):
        ll.init(MODEL, cfg)


def test_a_method_without_a_tensor(made: Any) -> None:
    with pytest.raises(
        ll.ConfigError,
        match=r"site 'layers.0.up': theirs.param_specs: expected at least one tensor, found \{\}",
    ):
        ll.init(MODEL, made(param_specs=lambda cfg, site: {}))


def test_a_method_that_does_nothing(made: Any) -> None:
    params = trained(made(outputs=None, weight=None))
    with pytest.raises(
        ll.UnsupportedError,
        match=r"'layers.0.up': theirs has neither `inputs`, `outputs` nor `weight` in its Variant",
    ):
        ll.apply(MODEL, params, X)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"outputs": lambda *_: None},
            r"outputs gave NoneType, expected torch.float64 \(6, 24\), as the layer's output",
        ),
        (
            {"outputs": lambda cfg, p, d, x, y, site: (y, None)},
            r"outputs gave tuple, expected torch.float64 \(6, 24\)",
        ),
        (
            {"outputs": lambda cfg, p, d, x, y, site: y[:1]},
            r"outputs gave torch.float64 \(1, 24\), expected torch.float64 \(6, 24\)",
        ),
        (
            {"outputs": lambda cfg, p, d, x, y, site: y.float()},
            r"outputs gave torch.float32 \(6, 24\), expected torch.float64 \(6, 24\)",
        ),
        (
            {"inputs": lambda cfg, p, d, x, site: x[:1]},
            r"inputs gave torch.float64 \(1, 16\), expected torch.float64 \(6, 16\), as the "
            r"layer's input",
        ),
        (
            {"inputs": lambda cfg, p, d, x, site: x.float()},
            r"inputs gave torch.float32 \(6, 16\), expected torch.float64 \(6, 16\)",
        ),
        (
            {"outputs": lambda cfg, p, x, y, site: y},
            r"outputs\(cfg, p, d, x, y, site\): .*takes 5 positional arguments but 6 were given",
        ),
        (
            {"outputs": lambda cfg, p, d, x, y, site: y + p["lora_c"]},
            r"outputs\(cfg, p, d, x, y, site\): KeyError: 'lora_c'",
        ),
        (
            {"prepare": lambda cfg, p, site, layer: layer.wieght},
            r"prepare\(cfg, p, site, layer\): AttributeError: .*'wieght'",
        ),
        (
            {"factors": lambda cfg, p, site: (p["lora_b"], p["lora_b"])},
            r"low_rank_factors gave a tuple of 2, expected \(A \(k, 16\), B \(24, k\), s\)",
        ),
        (
            {"factors": lambda cfg, p, site: (torch.ones(2, 3), torch.ones(24, 2), 1.0)},
            r"low_rank_factors gave A \(2, 3\), B \(24, 2\), expected \(A \(k, 16\), B \(24, "
            r"k\), s\)",
        ),
    ],
)
def test_check_names_the_phase_that_gives_something_else(
    made: Any, fields: dict[str, Any], message: str
) -> None:
    params = trained(made(**fields))
    with pytest.raises(ll.ConfigError, match=rf"site 'layers.0.up': theirs.{message}"):
        ll.check(MODEL, params, X)


def test_check_compares_what_apply_does(made: Any) -> None:
    """Factors that aren't the update: `apply` goes by them on a plain linear layer."""
    A, B = torch.ones(2, 16, dtype=torch.float64), torch.ones(24, 2, dtype=torch.float64)
    params = trained(
        made(factors=lambda cfg, p, site: (A, B[: site.d_out] if site.d_in == 16 else B[:16], 1.0))
    )
    one = moved(ll.init(MODEL, dataclasses.replace(params.config, target_names=("up",))))
    found = ll.check(MODEL, one, X)
    assert not found.agrees
    assert not found.ok


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (lambda cfg, p, site, W, b: W, r"weight gave Tensor, expected \(W', b'\)"),
        (lambda cfg, p, site, W, b: None, r"weight gave NoneType, expected \(W', b'\)"),
        (lambda cfg, p, site, W, b: (W.mT, b), r"weight gave \(16, 24\) for W' \(24, 16\)"),
        (lambda cfg, p, site, W, b: (W, b.sum()), r"weight gave \(\) for b' \(24,\)"),
        (lambda cfg, p, site, W, b: (W, 0.0), r"weight gave float for b' \(24,\)"),
    ],
)
def test_dense_equivalents(made: Any, weight: Any, message: str) -> None:
    cfg = dataclasses.replace(made(weight=weight), target_names=("up",))
    with pytest.raises(ll.ConfigError, match=rf"'layers.0.up': theirs.{message}"):
        ll.merge(MODEL, trained(cfg))
    # ll.check refuses it too, instead of comparing less
    with pytest.raises(ll.ConfigError, match=rf"'layers.0.up': theirs.{message}"):
        ll.check(MODEL, trained(cfg), X)


def test_a_bias_that_is_lost(made: Any) -> None:
    """On each weight of a stack as on one bare tensor."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj, self.mix = (
                nn.Parameter(torch.randn(2, 3, 4)),
                nn.Parameter(torch.randn(3, 4)),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.proj.sum(0).mT + x @ self.mix.mT

    model = Experts()
    cfg = made(
        weight=lambda cfg, p, site, W, b: (W, p["lora_b"] if b is None else b + p["lora_b"]),
        sites=("linear", "parameter"),
    )
    for name in ("proj", "mix"):
        params = ll.init(model, dataclasses.replace(cfg, target_parameters=(name,)))
        with pytest.raises(
            ll.UnsupportedError,
            match=f"'{name}': theirs moves a bias, which a bare parameter hasn't; .*`sites`",
        ):
            ll.apply(model, params, torch.randn(5, 4))


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (
            lambda cfg, p, c: None,
            "theirs.scale: expected a mapping of names to tensors, found None",
        ),
        (
            lambda cfg, p, c: {"lora_bias": c * p["lora_b"]},
            "theirs.scale gave 'lora_bias', the adapter has lora_b",
        ),
        (lambda cfg, p, c: {"lora_b": c}, "theirs.scale: expected a mapping of names to tensors"),
    ],
)
def test_scales_and_projections(made: Any, scale: Any, message: str) -> None:
    cfg = made(scale=scale, project=lambda cfg, p: scale(cfg, p, 0.5))
    with pytest.raises(ll.ConfigError, match=f"site 'layers.0.down': {message}"):
        ll.scale(trained(cfg), 0.5)
    with pytest.raises(
        ll.ConfigError, match=f"site 'layers.0.down': {message.replace('scale', 'project')}"
    ):
        ll.project(trained(cfg))
