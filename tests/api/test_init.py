"""The start of an adapter: seeds, dtypes, devices, data that isn't wanted, and methods that give
the wrong tensors.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Case
from helpers import close, leaves, net, normal, same_state, snapshot
from torch import Tensor, nn

import lora_lite_func as ll
from lora_lite_func.core import registry as methods

every = pytest.mark.parametrize("case", CASES, ids=repr)


def equal(a: ll.Adapter, b: ll.Adapter) -> bool:
    """Bit-equal leaves."""
    return all(
        u.dtype == v.dtype and torch.equal(u, v) for u, v in zip(leaves(a), leaves(b), strict=True)
    )


# -------------------------------------------------------------------------------------------- seeds
@every
def test_a_seed_is_the_whole_of_chance(case: Case) -> None:
    cfg, model = case.config(r=4), net()
    first = ll.init(model, cfg, seed=0)
    torch.manual_seed(123)
    torch.rand(7)
    assert equal(first, ll.init(model, cfg))
    assert equal(first, ll.init(model.train(), cfg, seed=0))
    with torch.inference_mode():
        assert equal(first, ll.init(model, cfg, seed=0))


@pytest.mark.parametrize(
    "cfg",
    [
        ll.LoRAConfig(),
        ll.LoRAConfig(init_A="orthogonal"),
        ll.DoRAConfig(),
        ll.DeLoRAConfig(),
        ll.HRAConfig(),
    ],
    ids=["lora", "orthogonal", "dora", "delora", "hra"],
)
def test_seeds_paths_and_names_draw_apart(cfg: ll.AdapterConfig) -> None:
    name = "lora_U" if isinstance(cfg, ll.HRAConfig) else "lora_A"
    draws = [
        ll.init(net(), cfg, seed=seed)[f"layers.{i}.up"][name]
        for seed, i in itertools.product((0, 1, -1, 2**70), (0, 1))
    ]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(draws, 2))
    assert all(d.unique().numel() > d.numel() // 3 for d in draws)


def _changed_by(start: Callable[[nn.Module, ll.AdapterConfig], ll.Adapter]) -> list[str]:
    """The methods that start elsewhere when `start` surrounds ll.init with something."""
    changed = []
    for case in CASES:
        model, cfg = net(dtype=torch.float32), case.config(r=4)
        expected = ll.init(model, cfg)
        try:
            same = equal(start(model, cfg), expected)
        except (RuntimeError, NotImplementedError):
            same = False
        changed += [] if same else [case.name]
    return changed


def test_the_default_dtype_does_not_change_the_draws() -> None:
    def start(model: nn.Module, cfg: ll.AdapterConfig) -> ll.Adapter:
        torch.set_default_dtype(torch.float64)
        try:
            return ll.init(model, cfg)
        finally:
            torch.set_default_dtype(torch.float32)

    assert _changed_by(start) == []


def test_the_default_device_does_not_matter() -> None:
    def start(model: nn.Module, cfg: ll.AdapterConfig) -> ll.Adapter:
        with torch.device("meta"):
            return ll.init(model, cfg)

    assert _changed_by(start) == []


def test_autocast_does_not_reach_the_start() -> None:
    def start(model: nn.Module, cfg: ll.AdapterConfig) -> ll.Adapter:
        with torch.autocast("cpu", torch.bfloat16):
            return ll.init(model, cfg)

    assert _changed_by(start) == []


@pytest.mark.parametrize("seed", ["0", 0.0, None, True, torch.tensor(0)], ids=repr)
def test_a_seed_is_an_int(seed: Any) -> None:
    with pytest.raises(ll.ConfigError, match="seed: expected int, found"):
        ll.init(net(), ll.LoRAConfig(r=2), seed=seed)


# ------------------------------------------------------------------------------- dtypes and devices
@every
@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("asked", [None, torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_is_the_bases_unless_asked_for_and_wide_where_it_must(
    case: Case, base: torch.dtype, asked: torch.dtype | None
) -> None:
    params = ll.init(net(dtype=base), case.config(r=4, dtype=asked))
    narrow = asked or base
    for path, tensors in params.items():
        for name, t in tensors.items():
            least = params.layout.specs[path][name].dtype
            if t.is_floating_point():
                assert t.dtype == (
                    narrow if least is None else torch.promote_types(narrow, least)
                ), name
            assert t.is_contiguous()
            assert not t.requires_grad


def test_gates_and_angles_are_wide() -> None:
    model = net(dtype=torch.bfloat16)
    for cfg in (ll.IA3Config(), ll.IA3FFConfig(), ll.ROADConfig(group_size=8)):
        assert {t.dtype for t in leaves(ll.init(model, cfg))} == {torch.float32}
    kinds = {
        name: t.dtype
        for name, t in ll.init(model, ll.DeLoRAConfig(dtype=torch.float16))["layers.0.up"].items()
    }
    assert kinds["lora_lambda"] is kinds["lora_wnorm"] is torch.float32
    assert kinds["lora_A"] is torch.float16


def test_an_integer_weight_has_a_float32_adapter() -> None:
    model = nn.Linear(4, 4)
    model.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    assert {t.dtype for t in leaves(ll.init(model, ll.LoRAConfig(r=2)))} == {torch.float32}
    with pytest.raises(
        ll.UnsupportedError,
        match=r"site '': pissa needs the dense weight; .*can't be read .torch\.int8.*use a method",
    ):
        ll.init(model, ll.PiSSAConfig(r=2))


class Upcasting(nn.Linear):
    """A layer that stores its weight in eight bits and multiplies in the input's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype), self.bias)


def test_a_float8_weight_is_refused_with_its_path_where_its_layer_cannot_be_called() -> None:
    model = net(dtype=torch.float32)
    eight = model.layers[0].up.weight.detach().to(torch.float8_e4m3fn)
    model.layers[0].up.weight = nn.Parameter(eight, requires_grad=False)
    with pytest.raises(
        ll.UnsupportedError,
        match=r"site 'layers\.0\.up': pissa needs the dense weight; .*torch\.float8_e4m3fn",
    ):
        ll.init(model, ll.PiSSAConfig(r=2))


def test_a_float8_weight_is_read_where_its_layer_can_be_called() -> None:
    model = nn.Sequential(Upcasting(16, 16))
    eight = model[0].weight.detach().to(torch.float8_e4m3fn)
    model[0].weight = nn.Parameter(eight, requires_grad=False)
    params = ll.init(model, ll.DoRAConfig(r=2))
    assert {t.dtype for t in params["0"].values()} == {torch.float32}
    close(params["0", "lora_wnorm2"], eight.float().square().sum(1), 1e-6)
    x = normal(3, 16, seed=0, dtype=torch.float32)
    assert torch.equal(ll.apply(model, params, x), model(x))


def test_a_weight_that_is_not_finite_is_refused_with_its_path() -> None:
    model = net()
    with torch.no_grad():
        model.layers[1].down.weight[0, 0] = float("nan")
    with pytest.raises(ll.LoraLiteError, match=r"site 'layers\.1\.down'"):
        ll.init(model, ll.PiSSAConfig(r=2))


@every
def test_a_model_on_the_meta_device(case: Case) -> None:
    model, cfg = net().to("meta"), case.config(r=4)
    if "weight" in methods.variant_for(type(cfg)).needs_of(cfg):
        message = (
            r"site 'layers.0.up(.weight)?': \w+ reads the weight, which is on the meta device; "
            r"load the model's weights first"
        )
        with pytest.raises(ll.UnsupportedError, match=message):
            ll.init(model, cfg)
    else:
        params = ll.init(model, cfg)
        assert all(t.is_meta for t in leaves(params))
        assert params.layout == ll.init(net(), cfg).layout


# ----------------------------------------------------------------------------------------- refusals
def test_data_for_a_method_that_takes_none() -> None:
    for given in (
        {"calibration_data": [torch.ones(1, 16)]},
        {"loss_fn": lambda y, batch: y.sum()},
        {"calibration_data": []},
    ):
        with pytest.raises(
            ll.ConfigError,
            match="lora takes no calibration data: its start depends on the weights and the seed "
            "alone",
        ):
            ll.init(net(), ll.LoRAConfig(), **given)


@contextmanager
def method(
    monkeypatch: pytest.MonkeyPatch, specs: Any, init: Any = None, **fields: Any
) -> Iterator[ll.AdapterConfig]:
    """A third party's method, registered for the length of a test."""
    with monkeypatch.context() as patch:
        patch.setattr(methods, "_REGISTRY", dict(methods._REGISTRY))
        config = dataclasses.make_dataclass(
            "TheirConfig", [], bases=(ll.AdapterConfig,), frozen=True, kw_only=True
        )
        given = specs if callable(specs) else lambda cfg, site: specs
        start = init if init is None or callable(init) else lambda *_: init
        ll.register(
            ll.Variant(name="theirs", config=config, param_specs=given, init=start, **fields)
        )
        yield config()


GATE = {"lora_g": ll.ParamSpec((3,), "ones")}


def test_a_third_partys_method(monkeypatch: pytest.MonkeyPatch) -> None:
    def outputs(cfg: Any, p: Any, d: Any, x: Tensor, y: Tensor, site: ll.Site) -> Tensor:
        return y * p["lora_g"]

    with method(
        monkeypatch, GATE, {"lora_g": torch.tensor([1.0, 2.0, 3.0])}, outputs=outputs
    ) as cfg:
        model = nn.Linear(2, 3)
        params = ll.init(model, cfg)
        x = torch.randn(5, 2)
        assert torch.equal(ll.apply(model, params, x), model(x) * torch.tensor([1.0, 2.0, 3.0]))
        assert "theirs" in ll.variants()
    assert "theirs" not in ll.variants()


@pytest.mark.parametrize(
    ("specs", "init", "message"),
    [
        (
            GATE,
            {"lora_g": torch.ones(4)},
            r"site '': theirs.init gave lora_g the shape \(4,\), expected \(3,\)",
        ),
        (
            GATE,
            {"lora_g": torch.ones(())},
            r"site '': theirs.init gave lora_g the shape \(\), expected \(3,\)",
        ),
        (
            {"lora_g": ll.ParamSpec((3,), lambda shape, gen: torch.ones(2))},
            None,
            r"site '': theirs.init gave lora_g the shape \(2,\)",
        ),
        (
            {"g": ll.ParamSpec((3,))},
            None,
            "site '': theirs names a tensor 'g'; expected a name that begins with 'lora_', "
            "without dots",
        ),
        (
            {"lora_a.b": ll.ParamSpec((3,))},
            None,
            r"site '': theirs names a tensor 'lora_a\.b'; expected a name that begins with 'lora_'",
        ),
    ],
)
def test_wrong_tensors_of_a_method_are_refused(
    monkeypatch: pytest.MonkeyPatch, specs: Any, init: Any, message: str
) -> None:
    with method(monkeypatch, specs, init) as cfg, pytest.raises(ll.LoraLiteError, match=message):
        ll.init(nn.Linear(2, 3), cfg)


@pytest.mark.parametrize(
    ("specs", "init", "fields"),
    [
        pytest.param(
            GATE, {"lora_h": torch.ones(3)}, {}, id="a name that isn't in the specs: ignored"
        ),
        pytest.param(GATE, [torch.ones(3)], {}, id="a list: ignored"),
        pytest.param(GATE, lambda *_: None, {}, id="None: TypeError"),
        pytest.param(GATE, {"lora_g": 1.0}, {}, id="a number: AttributeError"),
        pytest.param(
            {"lora_g": ll.ParamSpec((3,), "zeroes")}, None, {}, id="an unknown start: TypeError"
        ),  # type: ignore[arg-type]
        pytest.param(lambda cfg, site: None, None, {}, id="no specs: AttributeError"),
        pytest.param(GATE, None, {"needs": frozenset({"weights"})}, id="an unknown need: ignored"),
    ],
)
def test_a_careless_method_is_told(
    monkeypatch: pytest.MonkeyPatch, specs: Any, init: Any, fields: dict[str, Any]
) -> None:
    with (
        pytest.raises(ll.LoraLiteError, match="theirs"),
        method(monkeypatch, specs, init, **fields) as cfg,
    ):
        ll.init(nn.Linear(2, 3), cfg)


def test_names_and_configs_are_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "_REGISTRY", dict(methods._REGISTRY))
    config = dataclasses.make_dataclass(
        "OtherConfig", [], bases=(ll.AdapterConfig,), frozen=True, kw_only=True
    )
    taken: list[Callable[[], Any]] = [
        lambda: ll.register(
            ll.Variant(name="lora", config=config, param_specs=lambda cfg, site: GATE)
        ),
        lambda: ll.register(
            ll.Variant(name="other", config=ll.LoRAConfig, param_specs=lambda cfg, site: GATE)
        ),
    ]
    for register in taken:
        with pytest.raises(
            ll.ConfigError,
            match=r"variant '(lora|other)' .*: 'lora' has that name or config already",
        ):
            register()
    lora = ll.variants()["lora"]
    assert ll.register(lora) is lora


@pytest.mark.parametrize(
    "fields", [{"config": int}, {"name": 3}, {"name": ""}, {"needs": "weight"}]
)
def test_register_checks_what_it_gets(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    monkeypatch.setattr(methods, "_REGISTRY", dict(methods._REGISTRY))
    config = dataclasses.make_dataclass(
        "OtherConfig", [], bases=(ll.AdapterConfig,), frozen=True, kw_only=True
    )
    with pytest.raises(ll.ConfigError, match="variant"):
        ll.register(
            ll.Variant(
                **{
                    "name": "other",
                    "config": config,
                    "param_specs": lambda cfg, site: GATE,
                    **fields,
                }
            )
        )


def test_a_start_never_shares_the_models_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 3)
    specs = {"lora_w": ll.ParamSpec((3, 2)), "lora_w0": ll.ParamSpec((3, 2), trainable=False)}

    def init(
        cfg: Any, site: Any, specs: Any, weight: Tensor, stats: None, generator: Any
    ) -> dict[str, Tensor]:
        return {"lora_w": weight, "lora_w0": weight}

    with method(monkeypatch, specs, init, needs=frozenset({"weight"})) as cfg:
        params = ll.init(model, cfg)
    pointers = {t.data_ptr() for t in [*leaves(params), model.weight]}
    assert len(pointers) == 3


def test_a_start_may_write_on_the_weight_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 3)
    before = model.weight.detach().clone()
    start = lambda cfg, site, specs, weight, *_: {"lora_w": weight.zero_()}  # noqa: E731
    with method(
        monkeypatch, {"lora_w": ll.ParamSpec((3, 2))}, start, needs=frozenset({"weight"})
    ) as cfg:
        ll.init(model, cfg)
    assert torch.equal(model.weight, before)


@every
def test_a_refusal_leaves_no_trace(case: Case) -> None:
    model = net()
    before = snapshot(model)
    with pytest.raises(ll.TargetError, match="'nowhere' matched none of"):
        ll.init(model, case.config(target_names="nowhere"))
    assert same_state(before, snapshot(model))
