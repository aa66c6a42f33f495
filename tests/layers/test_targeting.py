"""Which layers a config selects, and what is said when it selects none."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from cases import CASES
from helpers import close, moved, net, normal, same_state, snapshot
from hypothesis import given
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import lora_lite_func as ll
from lora_lite_func.core import registry as methods

LoRA = ll.LoRAConfig


def paths(model: nn.Module, cfg: ll.AdapterConfig) -> list[str]:
    """The paths that a config selects, in model order."""
    return [site.path for site in ll.targets(model, cfg)]


class Lookalike(nn.Module):
    """Linear by structure alone."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.in_features, self.out_features = d_in, d_out
        self.weight = nn.Parameter(normal(d_out, d_in, seed=0, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.mT


def named(**modules: nn.Module) -> nn.Module:
    """Modules under names."""
    return nn.ModuleDict(modules)


# ---------------------------------------------------------------------------------------- what fits
def test_lora_lites_own_exclusions_need_match_nothing() -> None:
    cfg = LoRA(exclude_names=("lm_head", "embed_tokens"))
    assert paths(nn.ModuleDict({"q": nn.Linear(4, 4)}), cfg) == ["q"]


def test_every_linear_but_heads_and_embeddings_by_default() -> None:
    names = ("q", "lm_head", "score", "patch_embed", "heads")
    model = named(table=nn.Embedding(3, 4), **{name: nn.Linear(4, 4) for name in names})
    assert paths(model, LoRA()) == ["q", "heads"]
    assert paths(model, LoRA(exclude_names=())) == ["q", "lm_head", "score", "patch_embed", "heads"]
    assert paths(model, LoRA(exclude_names=("q",))) == ["lm_head", "score", "patch_embed", "heads"]


def test_a_model_that_is_itself_a_linear() -> None:
    model = nn.Linear(4, 6, dtype=torch.float64)
    assert paths(model, LoRA()) == [""]
    params = ll.init(model, LoRA(r=2))
    assert list(params) == [""]
    x = torch.randn(3, 4, dtype=torch.float64)
    assert torch.equal(ll.apply(model, params, x), model(x))
    assert repr(params).splitlines()[1].startswith('  ""  4 -> 6')


def test_linear_by_structure() -> None:
    model = nn.Sequential(Lookalike(4, 6), nn.ReLU(), Lookalike(6, 2))
    params = ll.init(model, LoRA(r=2, init_A="orthogonal"))
    assert [(s.path, s.d_in, s.d_out, s.bias) for s in ll.targets(model, LoRA(r=2))] == [
        ("0", 4, 6, False),
        ("2", 6, 2, False),
    ]
    x = torch.randn(3, 4)
    assert torch.allclose(ll.apply(model, params, x), ll.merged(model, params)(x), atol=1e-5)


def test_sizes_of_numpy_are_sizes(tmp_path: Path) -> None:
    np = pytest.importorskip("numpy")
    sizes = np.prod((2, 3)), np.int32(4)

    class Made(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(*sizes), nn.Linear(sizes[1], 2)
            self.conv, self.table = nn.Conv1d(*sizes, 1), nn.Embedding(*sizes)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.down(self.up(x) + self.conv(x[..., None])[..., 0])
            return y + self.table(x.argmax(-1)).sum(-1, keepdim=True)

    model, x = Made(), torch.randn(3, 6)
    assert paths(model, LoRA()) == ["up", "down"]
    cfg = LoRA(r=2, target_kinds=("linear", "conv", "embedding"), exclude_names=())
    params = moved(ll.init(model, cfg))
    assert {type(n) for s in params.sites.values() for n in (s.d_in, s.d_out)} == {int}
    ll.save(params, tmp_path / "a.safetensors")
    again = ll.load(tmp_path / "a.safetensors")
    assert torch.allclose(ll.apply(model, again, x), ll.merged(model, params)(x), atol=1e-5)


def test_the_sites_carry_what_the_layer_is() -> None:
    (up, down, *_) = ll.targets(
        net(bias=False), LoRA(r=2, alpha=6, rank_pattern={"up": 3}, alpha_pattern={"down": 8})
    )
    assert (up.path, up.d_in, up.d_out, up.bias, up.kind) == (
        "layers.0.up",
        16,
        24,
        False,
        "linear",
    )
    assert (up.r, up.alpha, up.scaling) == (3, 6.0, 2.0)
    assert (down.r, down.alpha, down.scaling) == (2, 8.0, 4.0)
    assert all(site.bias for site in ll.targets(net(), LoRA()))


def test_names_are_searched_in_full_paths() -> None:
    model = net(depth=3)
    assert paths(model, LoRA(target_names=r"^layers\.1\.")) == ["layers.1.up", "layers.1.down"]
    assert paths(model, LoRA(target_names=("up$", r"2\.down"))) == [
        "layers.0.up",
        "layers.1.up",
        "layers.2.up",
        "layers.2.down",
    ]
    assert paths(model, LoRA(target_names="head", exclude_names=())) == ["head"]


def test_layers_count_from_both_ends() -> None:
    model = net(depth=4)
    assert paths(model, LoRA(layers=(-1,))) == ["layers.3.up", "layers.3.down"]
    assert paths(model, LoRA(layers=range(1, 3), target_names="up")) == [
        "layers.1.up",
        "layers.2.up",
    ]
    assert paths(model, LoRA(layers=(0, -4, 0), target_names="up")) == ["layers.0.up"]


def test_roles_follow_the_residual_width() -> None:
    model = named(
        q_proj=nn.Linear(8, 8),
        o_proj=nn.Linear(8, 8),
        up=nn.Linear(8, 32),
        down=nn.Linear(32, 8),
        gate=nn.Linear(32, 32),
    )
    model.config = SimpleNamespace(hidden_size=8)
    assert paths(model, LoRA(target_roles=("reader",))) == ["q_proj", "up"]
    assert paths(model, LoRA(target_roles=("writer",))) == ["o_proj", "down"]
    assert paths(model, LoRA(target_roles=("inner",))) == ["gate"]
    assert paths(model, LoRA(target_roles=("inner", "reader"))) == ["q_proj", "up", "gate"]
    assert paths(net(), LoRA(target_roles=("writer",))) == ["layers.0.down", "layers.1.down"]


def test_a_shared_layer_is_one_site() -> None:
    linear = nn.Linear(4, 4)
    assert paths(named(a=linear, b=linear), LoRA()) == ["a"]


@given(st.data())
def test_selectors_only_ever_narrow(data: st.DataObject) -> None:
    model = net(depth=3)
    every = paths(model, LoRA(exclude_names=()))
    fields = {
        "target_names": data.draw(st.sampled_from([(), ("up",), ("layers",), (r"[12]\.down",)])),
        "layers": data.draw(st.none() | st.lists(st.integers(-3, 2), min_size=1)),
        "target_roles": data.draw(st.sampled_from([(), ("reader",), ("reader", "writer")])),
        "exclude_names": data.draw(st.sampled_from([(), (r"0\.up",)])),
    }
    try:
        found = paths(model, LoRA(**fields))
    except ll.TargetError:
        found = []
    assert found == [p for p in every if p in found]
    alone = {p: {**fields, "target_names": f"^{p}$".replace(".", r"\.")} for p in every}
    for path in found:
        assert paths(model, LoRA(**alone[path])) == [path]
    for path in set(every) - set(found) if not fields["target_names"] else ():
        with pytest.raises(
            ll.TargetError, match="none of 7 linear-like layers is left under target_names="
        ):
            paths(model, LoRA(**alone[path]))


# ----------------------------------------------------------------------------- what matches nothing
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"target_names": "dwon"},
            r"target_names: 'dwon' matched none of 5 linear-like layers; did you mean 'down'\?",
        ),
        (
            {"target_names": ("up", "q_proj")},
            "target_names: 'q_proj' matched none of 5 linear-like layers; first ones: "
            "'layers.0.up', ",
        ),
        (
            {"exclude_names": ("haed",)},
            r"exclude_names: 'haed' matched none of 5 linear-like layers; did you mean 'head'\?",
        ),
        (
            {"rank_pattern": {"uq": 4}},
            r"rank_pattern: 'uq' matched none of 4 linear-like layers; first ones: 'layers.0.up'",
        ),
        (
            {"alpha_pattern": {"donw": 4}},
            r"alpha_pattern: 'donw' matched none of 4 linear-like layers; did you mean 'down'\?",
        ),
        ({"rank_pattern": {"head": 4}}, "rank_pattern: 'head' matched none of 4"),
        ({"layers": (2,)}, "layers: index 2 matches nothing; the layers are 0 to 1"),
        ({"layers": (0, -3)}, "layers: index -3 matches nothing; the layers are 0 to 1"),
        (
            {"target_roles": ("inner",)},
            r"none of 5 linear-like layers is left under target_roles=\('inner',\)",
        ),
        (
            {"target_names": "head"},
            r"none of 5 linear-like layers is left under target_names=\('head',\), exclude_names=",
        ),
        (
            {"exclude_names": "."},
            r"none of 5 linear-like layers is left under exclude_names=\('.',\); first ones: "
            r"'layers.0.up'",
        ),
    ],
)
def test_a_selector_that_matches_nothing(fields: dict[str, Any], message: str) -> None:
    for verb in (ll.targets, ll.init):
        with pytest.raises(ll.TargetError, match=message):
            verb(net(), LoRA(**fields))


def test_no_layers_at_all_is_named() -> None:
    with pytest.raises(ll.TargetError, match=r"layers=\(\)"):
        ll.init(net(), LoRA(layers=()))


def test_a_model_without_linears() -> None:
    for model in (nn.ReLU(), nn.Sequential(nn.Conv2d(3, 3, 1)), nn.Embedding(3, 4)):
        with pytest.raises(
            ll.TargetError,
            match=rf"{type(model).__name__} has no linear-like module \(in_features, "
            rf"out_features, weight",
        ):
            ll.init(model, LoRA())


def test_layers_of_a_model_without_numbers() -> None:
    with pytest.raises(
        ll.TargetError,
        match="layers: no linear-like layer has a number in its path; first ones: 'q'",
    ):
        ll.init(named(q=nn.Linear(2, 2)), LoRA(layers=(0,)))


# --------------------------------------------------------------------- what a method can't do there
def test_a_rank_above_the_weights_is_refused_where_it_is_split() -> None:
    with pytest.raises(
        ll.UnsupportedError,
        match=r"'layers.0.up': PiSSA .*at most 16, found r=17; lower r, or .*rank_pattern",
    ):
        ll.init(net(), ll.PiSSAConfig(r=17))
    assert ll.init(net(), ll.PiSSAConfig(r=17, rank_pattern={"": 16})).sites["layers.0.up"].r == 16
    assert ll.init(net(), LoRA(r=64)).sites["layers.0.up"].r == 64


def test_a_group_that_does_not_divide() -> None:
    with pytest.raises(
        ll.UnsupportedError,
        match=r"'layers.0.up': ROAD .*group_size=64, found d_out=24; group_size=24 fits",
    ):
        ll.init(net(), ll.ROADConfig())
    with pytest.raises(
        ll.UnsupportedError,
        match=r"'': ROAD .*found d_out=5; an odd d_out can't be paired: leave it out",
    ):
        ll.init(nn.Linear(4, 5), ll.ROADConfig(group_size=4))


def test_a_kind_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    config = type("OddConfig", (ll.AdapterConfig,), {})
    variant = ll.Variant(
        name="odd", config=config, param_specs=lambda cfg, site: {}, sites=("lineer",)
    )
    monkeypatch.setitem(methods._REGISTRY, config, variant)
    with pytest.raises(
        ll.UnsupportedError, match=r"odd says that it adapts 'lineer'; did you mean 'linear'\?"
    ):
        ll.init(net(), config())


def test_a_kind_of_layer_the_method_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    config = type("ConvOnlyConfig", (ll.AdapterConfig,), {})
    variant = ll.Variant(
        name="conv_only", config=config, param_specs=lambda cfg, site: {}, sites=frozenset({"conv"})
    )
    monkeypatch.setitem(methods._REGISTRY, config, variant)
    with pytest.raises(
        ll.UnsupportedError, match=r"target_kinds: conv_only adapts conv, this asks for 'linear'"
    ):
        ll.init(net(), config(target_kinds="linear"))
    with pytest.raises(
        ll.TargetError,
        match=r"Net has no convolutions; it has 2 of kind 'norm' and 5 of kind 'linear': add "
        r"target_kinds",
    ):
        ll.init(net(), config())


# ------------------------------------------------------------------------------- wrappers of models
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_models_that_hide_their_modules_are_refused_with_a_way_out() -> None:
    model = net(dtype=torch.float32)
    x = torch.randn(2, 16)
    params = ll.init(model, LoRA(r=2))
    wrapped = {
        r"is a TorchScript module.*give the nn.Module it was made from": torch.jit.trace(model, x),
        r"is the result of torch.compile.*compiled\._orig_mod": torch.compile(
            model, backend="eager"
        ),
        r"spreads its module over devices or processes; bind first, then wrap": nn.DataParallel(
            model
        ),
    }
    for message, wrapper in wrapped.items():
        for holder, path in ((wrapper, ""), (named(inner=wrapper), "inner")):
            with pytest.raises(ll.UnsupportedError, match=rf"'{path}' \(\w+\) {message}"):
                ll.init(holder, LoRA(r=2))
        with pytest.raises(ll.UnsupportedError, match=message):
            ll.apply(wrapper, params, x)
        with pytest.raises(ll.UnsupportedError, match=message):
            ll.bind(wrapper, params)


# --------------------------------------------------------------------------------------- odd models
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_looking_leaves_the_model_alone(case: Any) -> None:
    model = net().train()
    before = snapshot(model)
    ll.targets(model, case.config(r=4))
    assert same_state(before, snapshot(model))


def test_a_spectral_norm_keeps_its_vectors() -> None:
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 6))).train()
    before = [b.clone() for b in model.buffers()]
    ll.targets(model, LoRA(r=2))
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


@pytest.mark.parametrize("wrap", [parametrizations.spectral_norm, parametrizations.weight_norm])
@pytest.mark.parametrize(
    "cfg", [LoRA(r=2), ll.PiSSAConfig(r=2), ll.DoRAConfig(r=2)], ids=["lora", "pissa", "dora"]
)
def test_a_parametrized_layer_is_read_and_left_alone(
    wrap: Any, cfg: ll.AdapterConfig, tmp_path: Path
) -> None:
    model = nn.Sequential(wrap(nn.Linear(6, 5).double())).eval()
    plain, weight = nn.Sequential(nn.Linear(6, 5).double()), model[0].weight.detach()
    plain[0].weight = nn.Parameter(weight)
    expected = ll.init(plain, cfg)
    before = snapshot(model.train())
    params = ll.init(model, cfg)
    ll.save(params, tmp_path / "a")
    ll.load(tmp_path / "a", model)
    assert same_state(before, snapshot(model))
    close(params, expected, 1e-12)


def test_a_superscript_is_no_layer_number() -> None:
    model = named(**{"x²": nn.Linear(2, 2), "²": nn.Linear(2, 2), "3": nn.Linear(2, 2)})
    assert paths(model, LoRA(layers=(3,))) == ["3"]


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_a_layer_that_has_no_weight_yet_is_refused() -> None:
    with pytest.raises(ll.LoraLiteError, match=r"'0'.*LazyLinear"):
        ll.init(nn.Sequential(nn.LazyLinear(4)), LoRA(r=2))


def test_a_layer_without_features_is_refused() -> None:
    model = named(q=nn.Linear(2, 2), none=nn.Linear(3, 2))
    model.none.in_features = 0
    with pytest.raises(
        ll.UnsupportedError, match=r"'none': this Linear is 0 -> 2; .*exclude_names"
    ):
        ll.targets(model, LoRA())
    assert paths(model, LoRA(exclude_names="none")) == ["q"]


def test_writers_are_whole_names() -> None:
    model = named(
        **{name: nn.Linear(4, 4) for name in ("wo", "two", "o_proj", "foo_proj", "o", "go")}
    )
    assert paths(model, LoRA(target_roles="writer")) == ["wo", "o_proj", "o"]


def test_something_that_is_no_module() -> None:
    with pytest.raises(ll.LoraLiteError, match=r"expected an nn\.Module, found function"):
        ll.init(lambda x: x, LoRA())


def test_something_that_is_no_config() -> None:
    for odd, name in ((LoRA, "type"), ("lora", "str"), (ll.AdapterConfig(), "AdapterConfig")):
        with pytest.raises(ll.ConfigError, match=f"no variant is registered for {name}; "):
            ll.init(net(), odd)
    with pytest.raises(
        ll.ConfigError, match="no variant is registered for Net; there are: 'ABBAConfig'"
    ):
        ll.init(LoRA(), net())
