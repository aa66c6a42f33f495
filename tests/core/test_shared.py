"""Leaves that several sites have in common: one leaf in every walk over an adapter, and frozen
tensors that are one in fact.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optree
import pytest
import torch
from cases import CASES, Case
from helpers import close, leaves, moved, net, normal
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad

import lora_lite_func as ll
from lora_lite_func.core import registry
from lora_lite_func.core.layout import Layout
from lora_lite_func.injection.bound import entries_of, part_of, tensors_in

BANK = (".all", "lora_bank")
UP, DOWN = "layers.0.up", "layers.1.down"
SHARING = [case for case in CASES if ll.init(net(), case.config(r=4)).layout.shared and case.linear]
every = pytest.mark.parametrize("case", SHARING, ids=repr)
X = normal(5, 16, seed=2)


def vblora(seed: int = 0, **fields: Any) -> ll.Adapter:
    """VB-LoRA on a small net, as if trained."""
    sizes = {"r": 2, "num_vectors": 6, "vector_length": 4}
    return moved(ll.init(net(), ll.VBLoRAConfig(**{**sizes, **fields}), seed=seed), seed)


def homes(params: ll.Adapter) -> list[tuple[str, str]]:
    """The keys of what is shared."""
    layout = params.layout
    groups = [path for path in layout.names if path not in layout.sites]
    return [(path, name) for path in groups for name in layout.names[path]]


# ---------------------------------------------------------------------------------- the leaf is one
@every
def test_every_walk_meets_it_once(case: Case, tmp_path: Path) -> None:
    params = moved(ll.init(net(), case.config(r=4)))
    keys = homes(params)
    assert keys
    assert not any(path in params.sites or path in list(params) for path, _ in keys)
    places = [(path, name) for path, names in params.layout.names.items() for name in names]
    total = sum(params[key].numel() for key in places)
    assert ll.num_params(params, trainable_only=False) == total
    for path, shared in params.layout.shared.items():
        for name, group in shared.items():
            assert params[path][name] is params[group, name]
    trainable = ll.partition(params)[0]
    vector, unravel = ll.ravel(trainable)
    assert len(vector) == ll.num_params(params)
    close(unravel(vector), trainable, 0.0)
    ll.save(params, tmp_path / "a")
    stored = load_file(tmp_path / "a")
    assert len(stored) <= len(leaves(params))
    assert {f"{path}.{name}" for path, name in keys} <= stored.keys()
    assert {*ll.to_dict(params)} == {*params.layout.names}
    again = ll.from_dict(ll.to_dict(params), params)
    assert all(a is b for a, b in zip(leaves(again), leaves(params), strict=True))
    assert "shared" in repr(params)


@every
def test_sharing_stays_whatever_is_done(case: Case, tmp_path: Path) -> None:
    model = net()
    params = moved(ll.init(model, case.config(r=4)))
    ll.save(params, tmp_path / "a")
    stack = ll.stack([params, moved(params, 2)])
    ways: dict[str, ll.Adapter] = {
        "load": ll.load(tmp_path / "a", model),
        "pickle": pickle.loads(pickle.dumps(params)),
        "deepcopy": copy.deepcopy(params),
        "tree_map": optree.tree_map(torch.clone, params),
        "cast": ll.cast(params, torch.float64),
        "to": params.to(torch.float64),
        "member": stack[0],
        "update": ll.update(stack, 1, params)[1],
        "from sites": ll.Adapter(params.layout, {path: dict(params[path]) for path in params}),
        "bound": ll.unbind(ll.bind(model, params)),
    }
    for way, made in ways.items():
        assert made.layout == params.layout, way
        for path, shared in made.layout.shared.items():
            assert all(made[path][name] is made[group, name] for name, group in shared.items()), way
        assert torch.equal(ll.apply(model, made, X), ll.apply(model, params, X)), way


@every
def test_the_gradient_is_the_sum_over_the_sites(case: Case) -> None:
    """Beside adapters of one site each, with copies of their own."""
    model = net()
    params = moved(ll.init(model, case.config(r=4)))
    layout = params.layout
    each = tuple(
        ll.Adapter(Layout(layout.variant, layout.config, [site]), {path: dict(params[path])})
        for path, site in layout.sites.items()
    )

    def loss(params: Any) -> Tensor:
        return ll.apply(model, params, X).square().sum()

    whole, parts = grad(loss)(params), grad(loss)(each)
    close(loss(each), loss(params), 1e-12)
    for path, name in homes(params):
        found = [g[path, name] for g in parts if path in g]
        assert len(found) > 1
        assert all(g.any() for g in found) or not layout.specs[path][name].trainable
        close(whole[path, name], torch.stack(found).sum(0), 1e-10)


def test_a_state_with_unlike_values_for_one_parameter_is_refused() -> None:
    tied = ll.bind(net(), ll.init(net(), ll.TinyLoRAConfig(u=5, tying=1.0)))
    apart = ll.bind(net(), moved(ll.init(net(), ll.TinyLoRAConfig(u=5))))
    with pytest.raises(RuntimeError, match=r"unlike values for .*lora_v.* share one here"):
        tied.load_state_dict(apart.state_dict())


# ------------------------------------------------------------------------------------ bound models
@every
def test_a_bound_model_has_one_parameter(case: Case) -> None:
    model = net()
    params = moved(ll.init(model, case.config(r=4)))
    bound = ll.bind(model, params)
    trained = [p for p in bound.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == ll.num_params(params)
    own = leaves(ll.partition(params)[0])
    assert {t.data_ptr() for t in trained} == {t.data_ptr() for t in own}
    state = {name: t.clone() for name, t in bound.state_dict().items()}
    for made in (copy.deepcopy(bound), bound.double(), ll.reference(bound)):
        back = ll.unbind(made)
        held = [p for module in made.modules() for p in module._parameters.values()]
        names = [n for n, _ in made.named_parameters() if ".adapter." in n]
        assert len(names) == len(trained) == len(own)
        assert len({id(p) for p in held if p is not None}) == len(list(made.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(leaves(back), leaves(params), strict=True))
    other = ll.bind(model, ll.init(model, params.config))
    other.load_state_dict(state)
    assert torch.equal(other(X), ll.apply(model, params, X))


def test_a_step_moves_it_at_every_site() -> None:
    model, params = net(), vblora()
    bound = ll.bind(model, params)
    optimizer = torch.optim.SGD((p for p in bound.parameters() if p.requires_grad), lr=1e-2)
    bound(X).square().sum().backward()
    optimizer.step()
    expected = grad(lambda p: ll.apply(model, p, X).square().sum())(vblora())[BANK]
    close(params[BANK], vblora()[BANK] - 1e-2 * expected, 1e-10)
    assert torch.equal(bound(X), ll.apply(model, params, X))


# ------------------------------------------------------------------------------------------- stacks
def test_members_on_unlike_sites() -> None:
    """One that lacks all sites of a group has nothing of the group, and comes back so."""
    several = [vblora(seed, target_names=names) for seed, names in enumerate(("up", "down$", ()))]
    stack = ll.stack(several)
    assert stack[BANK].shape == (3, 6, 4)
    for made, params in zip(ll.unstack(stack), several, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(leaves(made), leaves(params), strict=True))
    close(
        ll.mean(ll.stack([vblora(1), vblora(2)]))[BANK], (vblora(1)[BANK] + vblora(2)[BANK]) / 2, 0
    )


def test_unlike_groups_are_refused() -> None:
    ties = [
        ll.init(net(), ll.TinyLoRAConfig(u=5, tying=0.5, target_names=names))
        for names in ("up", ())
    ]
    assert len(set(dict(ties[1].config.tied).values())) == 2
    with pytest.raises(ll.StructureError, match=r"number 1 has other settings: tied="):
        ll.stack(ties)


def test_a_bank_of_adapters_that_share() -> None:
    model = net()
    bank = ll.Bank({"a": vblora(1, target_names="up"), "b": vblora(2)})
    bank.add("c", vblora(3, target_names="down$"))
    for name, params in {
        "a": vblora(1, target_names="up"),
        "c": vblora(3, target_names="down$"),
    }.items():
        assert torch.equal(bank[name][BANK], params[BANK])
        y = ll.apply(model, ll.rows(bank, [name] * len(X)), X)
        close(y, ll.apply(model, params, X), 1e-12)


# --------------------------------------------------------------------------------------- the method
@contextmanager
def method(
    monkeypatch: pytest.MonkeyPatch, specs: Callable[..., Any]
) -> Iterator[ll.AdapterConfig]:
    """A method with these tensors, registered for the length of a test."""
    with monkeypatch.context() as patch:
        patch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
        config = dataclasses.make_dataclass(
            "TheirConfig", [], bases=(ll.AdapterConfig,), frozen=True, kw_only=True
        )
        ll.register(
            ll.Variant(
                name="theirs",
                config=config,
                param_specs=specs,
                outputs=lambda cfg, p, d, x, y, site: y * p["lora_g"],
            )
        )
        yield config()


OWN = ll.ParamSpec(())


@pytest.mark.parametrize(
    ("specs", "match"),
    [
        (
            lambda cfg, site: {"lora_g": ll.ParamSpec((site.d_out,), group="all"), "lora_h": OWN},
            r"theirs: 'layers\.0\.down' and 'layers\.0\.up' share one lora_g, but it is \(16,\) at "
            r"the first and \(24,\) at the second; give them one rank, or leave one out",
        ),
        (
            lambda cfg, site: {"lora_g": ll.ParamSpec((), group="all")},
            r"at least one tensor of the site's own, found \['lora_g'\]",
        ),
        (
            lambda cfg, site: {"lora_g": ll.ParamSpec((), group=""), "lora_h": OWN},
            "theirs: lora_g has the group ''; expected a name, or None",
        ),
    ],
)
def test_a_careless_method_is_told(
    monkeypatch: pytest.MonkeyPatch, specs: Callable[..., Any], match: str
) -> None:
    with method(monkeypatch, specs) as cfg, pytest.raises(ll.ConfigError, match=match):
        ll.init(net(), cfg)


def test_a_site_at_the_path_of_a_group_is_refused() -> None:
    layout = vblora().layout
    odd = layout.sites[UP].having(path=BANK[0])
    with pytest.raises(ll.ConfigError, match=r"'\.all' is no path of a module: it begins"):
        Layout(layout.variant, layout.config, [*layout.sites.values(), odd])


def test_layers_of_two_devices_share_none() -> None:
    model = net()
    model.layers[1].to("meta")
    with pytest.raises(
        ll.UnsupportedError,
        match=r"site 'layers\.1\.up': it shares lora_bank with layers on cpu and is itself on meta",
    ):
        ll.init(model, ll.VBLoRAConfig(num_vectors=6, vector_length=4))


def test_the_draw_is_the_groups() -> None:
    one = ll.init(net(), ll.VBLoRAConfig(num_vectors=6, vector_length=4, target_names="up"))
    other = ll.init(net(), ll.VBLoRAConfig(num_vectors=6, vector_length=4, target_names="down"))
    assert torch.equal(one[BANK], other[BANK])
    assert not torch.equal(one[BANK], ll.init(net(), one.config, seed=1)[BANK])


# --------------------------------------------------------------------- frozen tensors that are one
def test_frozen_tensors_that_are_one_stay_one(tmp_path: Path) -> None:
    model = net()
    params = ll.init(model, ll.VeRAConfig(r=4))
    ll.save(params, tmp_path / "a")
    bound, moved_ = ll.bind(model, params), ll.bind(model, params).to(torch.float32)
    stack = ll.stack([params, moved(params)])
    for way, made in {
        "init": params,
        "load": ll.load(tmp_path / "a"),
        "cast": ll.cast(params, torch.bfloat16),
        "to": params.to(torch.float32),
        "bound": ll.unbind(bound),
        "bound.to": ll.unbind(moved_),
        "half": ll.unbind(bound.half()),
        "stack": stack,
        "member": stack[1],
        "update": ll.update(stack, 0, moved(params, 3)),
        "concatenate": ll.concatenate([stack, stack]),
    }.items():
        ups = [made[f"layers.{i}.up"] for i in (0, 1)]
        for name in ("lora_vera_A", "lora_vera_B"):
            assert ups[0][name].data_ptr() == ups[1][name].data_ptr(), way
        assert ups[0]["lora_vera_b"].data_ptr() != ups[1]["lora_vera_b"].data_ptr(), way


def test_moving_one_layer_leaves_the_others() -> None:
    bound = ll.bind(net(), ll.init(net(), ll.VeRAConfig(r=4)))
    bound.layers[0].up.to(torch.float32)
    kinds = [layer.up.adapter[0].lora_vera_A.dtype for layer in bound.layers]
    assert kinds == [torch.float32, torch.float64]


# ---------------------------------------------------------------------- settings kept path by path
class Inside(nn.Module):
    """A model whose layers have other paths inside a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.part = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)


def test_a_part_of_a_bound_model_keeps_what_its_paths_say() -> None:
    model = Inside()
    shapes = {f"part.{UP}": (8, 2), f"part.{DOWN}": (4, 8)}
    params = ll.init(model, ll.LoKrConfig(r=2, w1_shapes=shapes))
    bound = ll.bind(model, params)
    (entry,) = entries_of(bound) or ()
    part = part_of(entry, "part")
    assert part is not None
    inner = ll.Adapter(part.layout, tensors_in(bound.part, part))
    assert dict(inner.config.w1_shapes) == {UP: (8, 2), DOWN: (4, 8)}
    close(ll.apply(model.part, moved(inner), X), ll.apply(model, moved(params), X), 1e-12)


def test_a_bank_starts_near_the_base_or_at_it() -> None:
    """The default's mixtures are small; `exact_start` subtracts them."""
    model = net()
    base = model(X)
    near = ll.init(model, ll.VBLoRAConfig(num_vectors=16, vector_length=4))
    off = (ll.apply(model, near, X) - base).abs().max() / base.abs().max()
    assert 0 < off < 0.02
    there = ll.init(model, ll.VBLoRAConfig(num_vectors=16, vector_length=4, exact_start=True))
    assert torch.equal(ll.apply(model, there, X), base)


# -------------------------------------------------------------------------- bound models that move
@every
def test_torchs_own_stack_of_bound_models(case: Case) -> None:
    model = net(width=8, inner=8, depth=1)
    several = [moved(ll.init(model, case.config(r=4)), seed) for seed in (1, 2)]
    bound = [ll.bind(model, params).eval() for params in several]
    tensors = torch.func.stack_module_state(bound)  # type: ignore[arg-type]
    x = X[:, :8]
    empty = copy.deepcopy(bound[0]).to("meta")
    for base in (bound[0], empty):
        made = torch.func.vmap(lambda *t, b=base: torch.func.functional_call(b, t, (x,)))(*tensors)
        close(made, torch.stack([ll.apply(model, p, x) for p in several]), 1e-10)


def _wide(t: Tensor) -> Tensor:
    return t.double()


def test_a_function_that_lives_on_keeps_no_buffers_of_a_bound_model() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    found = []
    for _ in range(2):
        bound: Any = ll.bind(model, ll.init(model, ll.VeRAConfig(r=4)))
        bound._apply(_wide)
        found.append(weakref.ref(bound[0].adapter[0].lora_vera_A))
        del bound
    gc.collect()
    assert [r() for r in found] == [None, None]


@pytest.mark.parametrize(
    "cfg",
    [
        ll.VeRAConfig(r=2),
        ll.PVeRAConfig(r=2),
        ll.RandLoRAConfig(r=2),
        ll.SHiRAConfig(r=2),
        ll.FourierFTConfig(n_frequency=5),
        ll.WaveFTConfig(n_frequency=5),
    ],
    ids=lambda cfg: type(cfg).__name__,
)
def test_what_was_drawn_on_fake_tensors_is_forgotten(cfg: ll.AdapterConfig) -> None:
    model = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9))
    with FakeTensorMode(allow_non_fake_inputs=True):
        ll.init(model, cfg)
    assert {type(t) for t in leaves(ll.init(model, cfg))} == {Tensor}
