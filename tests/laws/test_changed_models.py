"""What a user does to a model after init: the next call is that of a fresh oracle on the changed
model, or refused by name.

The oracle is dense: the adapter merged by hand into what the model holds now, run by torch alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from helpers import close, leaves, moved, net, normal, same_state, snapshot
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import lora_lite_func as ll

SITES = ("layers.0.down", "layers.0.up", "layers.1.down", "layers.1.up")
CONFIGS = [
    ll.LoRAConfig(r=2),
    ll.DoRAConfig(r=2),
    ll.HRAConfig(r=2),
    ll.BitFitConfig(),
    ll.PiSSAConfig(r=2),
]


def x16() -> Tensor:
    return normal(4, 16, seed=0)


def dense(model: nn.Module, params: ll.Adapter) -> nn.Module:
    """The adapter in plain weights: each site a fresh nn.Linear that holds what the method's
    formula gives for the layer's weight now.
    """
    made = copy.deepcopy(model)
    for path, tensors in params.items():
        old: Any = made.get_submodule(path)
        with torch.no_grad():
            W, b = (
                old.weight.detach().clone(),
                None if old.bias is None else old.bias.detach().clone(),
            )
            wide = torch.promote_types(W.dtype, torch.float32)
            variant, cfg, site = params.layout.variant, params.config, params.sites[path]
            assert variant.weight is not None
            W, b = variant.weight(cfg, tensors, site, W.to(wide), None if b is None else b.to(wide))
        new = nn.Linear(
            W.shape[1],
            W.shape[0],
            bias=b is not None,
            dtype=old.weight.dtype,
            device=old.weight.device,
        )
        with torch.no_grad():
            new.weight.copy_(W)
            if b is not None:
                new.bias.copy_(b)
        for name in ("_forward_hooks", "_forward_pre_hooks"):
            setattr(new, name, getattr(old, name))
        parent, _, name = path.rpartition(".")
        setattr(made.get_submodule(parent), name, new.train(old.training))
    return made


class Changing(RuleBasedStateMachine):
    """A model under an adapter, changed in any order; after every change apply, bind and merged
    agree with the oracle, or say why not.
    """

    @initialize(cfg=st.sampled_from(CONFIGS))
    def start(self, cfg: ll.AdapterConfig) -> None:
        self.model: Any = net()
        self.params = moved(ll.init(self.model, cfg))
        self.dtype = torch.float64
        self.hooks: list[Any] = []

    @rule(dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    def to(self, dtype: torch.dtype) -> None:
        if dtype == torch.bfloat16 and any(
            parametrize.is_parametrized(self.model.get_submodule(path)) for path in SITES
        ):
            return  # torch computes no orthogonal weight in it
        self.model.to(dtype)
        self.dtype = dtype

    @rule(mode=st.booleans())
    def train(self, mode: bool) -> None:
        self.model.train(mode)

    @rule(seed=st.integers(1, 9), path=st.sampled_from(SITES))
    def weights(self, seed: int, path: str) -> None:
        layer = self.model.get_submodule(path)
        if parametrize.is_parametrized(layer):
            return
        other = net(seed).get_submodule(path)
        if seed % 3 == 0:
            layer.load_state_dict(other.state_dict(), strict=False)
        elif seed % 3 == 1:
            layer.weight.data = other.weight.detach().to(self.dtype)
        else:
            layer.weight = nn.Parameter(other.weight.detach().to(self.dtype))

    @rule(
        path=st.sampled_from(SITES),
        bias=st.booleans(),
        kind=st.sampled_from([nn.Linear, type("Own", (nn.Linear,), {})]),
    )
    def replaced(self, path: str, bias: bool, kind: Any) -> None:
        parent, _, name = path.rpartition(".")
        site = self.params.sites[path]
        if isinstance(self.params.config, ll.BitFitConfig):
            bias = True  # the other way is refused at merge, elsewhere
        setattr(
            self.model.get_submodule(parent),
            name,
            kind(site.d_in, site.d_out, bias=bias, dtype=self.dtype),
        )

    @rule(
        path=st.sampled_from(SITES),
        wrap=st.sampled_from([parametrizations.weight_norm, parametrizations.orthogonal]),
    )
    def parametrized(self, path: str, wrap: Any) -> None:
        layer = self.model.get_submodule(path)
        if parametrize.is_parametrized(layer):
            layer.requires_grad_(True)  # or torch leaves a buffer behind
            parametrize.remove_parametrizations(layer, "weight")
        elif (
            self.dtype != torch.bfloat16
            and self.model.layers[0].up.weight is not self.model.layers[1].up.weight
        ):
            wrap(layer)

    @rule(flag=st.booleans())
    def requires_grad(self, flag: bool) -> None:
        self.model.requires_grad_(flag)

    @rule(path=st.sampled_from([*SITES, "layers.1", ""]), double=st.booleans())
    def hook(self, path: str, double: bool) -> None:
        if self.hooks and not double:
            self.hooks.pop().remove()
        else:
            self.hooks.append(
                self.model.get_submodule(path).register_forward_hook(
                    lambda module, args, out: out * 1.5
                )
            )

    @rule()
    def tied(self) -> None:
        up, other = self.model.layers[0].up, self.model.layers[1].up
        if not parametrize.is_parametrized(up) and not parametrize.is_parametrized(other):
            other.weight = up.weight

    @precondition(lambda self: self.dtype != torch.bfloat16)
    @rule()
    def compiled(self) -> None:
        self.model.layers[0].compile(backend="eager")

    @invariant()
    def calls_agree(self) -> None:
        if not hasattr(self, "model"):
            return
        x = x16().to(self.dtype)
        before = snapshot(self.model)
        with torch.no_grad():
            expected = dense(self.model, self.params)(x)
            tolerance = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 0.15}[self.dtype]
            y = ll.apply(self.model, self.params, x)
            assert y.dtype == self.dtype
            close(y, expected, tolerance)
            close(ll.bind(self.model, self.params)(x), y, 1e-12)
            if any(parametrize.is_parametrized(self.model.get_submodule(path)) for path in SITES):
                with pytest.raises(
                    ll.UnsupportedError,
                    match=r"'layers\.\d\.\w+' .*: its weight is computed, not a parameter",
                ):
                    ll.merged(self.model, self.params)
            else:
                close(ll.merged(self.model, self.params)(x), expected, tolerance)
        assert same_state(before, snapshot(self.model))


TestChanging = Changing.TestCase
TestChanging.settings = hypothesis.settings(max_examples=15, stateful_step_count=8, deadline=None)


# ---------------------------------------------------------------------------------- refused by name
def _set(path: str, module: nn.Module) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module)

    return change


def _renamed(model: Any) -> None:
    model.layers[0].rise = model.layers[0].up
    del model.layers[0].up


def _shortened(model: Any) -> None:
    del model.layers[1]


NONE = r"site 'layers\.1\.down': expected 24 -> 16, found Tanh \(no linear layer\)"

REFUSED: dict[str, tuple[Callable[[Any], None], str]] = {
    "a layer of another size": (
        _set("layers.0.up", nn.Linear(16, 40)),
        r"site 'layers\.0\.up': expected 16 -> 24, found Linear \(16 -> 40\)",
    ),
    "no linear layer": (_set("layers.1.down", nn.Tanh()), NONE),
    "a renamed layer": (_renamed, r"no module at site 'layers\.0\.up'; did you mean 'layers\.\d"),
    "a removed block": (_shortened, r"no module at site 'layers\.1\.\w+'; did you mean 'layers\.0"),
    "one layer twice": (
        lambda m: setattr(m.layers[1], "up", m.layers[0].up),
        r"site 'layers\.1\.up' is the same module as one at another path",
    ),
    "a compiled block": (
        lambda m: _set("layers.0", torch.compile(m.layers[0], backend="eager"))(m),
        r"'layers\.0' .*torch\.compile.*_orig_mod",
    ),
    "a wrapped block": (
        lambda m: _set("layers.0", nn.DataParallel(m.layers[0]))(m),
        r"'layers\.0' \(DataParallel\).*bind first, then wrap",
    ),
    "a forward nobody can look into": (
        lambda m: setattr(
            m.layers[0], "forward", type("Opaque", (), {"__call__": lambda self, x: x})()
        ),
        r"'layers\.0': its own `forward` is a Opaque",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize(
    "cfg", [ll.LoRAConfig(r=2), ll.HRAConfig(r=2)], ids=lambda c: type(c).__name__
)
def test_what_no_longer_fits_is_refused_by_name(what: str, cfg: ll.AdapterConfig) -> None:
    change, message = REFUSED[what]
    model = net()
    params = moved(ll.init(model, cfg))
    bound = ll.bind(model, params)
    expected = bound(x16())
    change(model)
    for verb in (
        lambda: ll.apply(model, params, x16()),
        lambda: ll.bind(model, params),
        lambda: ll.check(model, params, x16()),
    ):
        with pytest.raises((ll.StructureError, ll.UnsupportedError), match=message):
            verb()
    assert torch.equal(bound(x16()), expected)  # a bound module has a life of its own


# ------------------------------------------------------------------------ a bound module's own life
CHANGES: dict[str, Callable[[Any], Any]] = {
    "train": lambda b: b.train(),
    "float": lambda b: b.float(),
    "bfloat16": lambda b: b.to(torch.bfloat16),
    "requires_grad": lambda b: b.requires_grad_(True),
    "hook": lambda b: b.layers[0].up.register_forward_hook(lambda m, a, o: o * 2),
    "replaced head": lambda b: setattr(b, "head", nn.Identity()),
    "replaced block": lambda b: b.layers.__setitem__(0, nn.Identity()),
    "deleted block": lambda b: b.layers.__delitem__(1),
    "new weight": lambda b: setattr(
        b.layers[0].up, "weight", nn.Parameter(torch.zeros(24, 16, dtype=torch.float64))
    ),
    "compiled": lambda b: b.compile(backend="eager"),
    "buffers": lambda b: b.register_buffer("seen", torch.zeros(())),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_of_a_bound_module_stay_its_own(name: str) -> None:
    model = net()
    params = moved(ll.init(model, ll.LoRAConfig(r=2)))
    before, kept = snapshot(model), [t.clone() for t in leaves(params)]
    expected = ll.apply(model, params, x16())
    bound: Any = ll.bind(model, params)
    CHANGES[name](bound)
    bound(x16().to(next(bound.parameters()).dtype))
    assert same_state(before, snapshot(model))
    assert all(torch.equal(a, b) for a, b in zip(leaves(params), kept, strict=True))
    assert torch.equal(ll.apply(model, params, x16()), expected)
    torch._dynamo.reset()


def test_a_bound_module_sees_values_written_on_the_base_and_not_what_is_put_in_their_place() -> (
    None
):
    model: Any = net()
    params = moved(ll.init(model, ll.LoRAConfig(r=2)))
    bound = ll.bind(model, params)
    with torch.no_grad():
        model.head.weight.mul_(2.0)  # the same storage
    assert torch.equal(bound(x16()), ll.apply(model, params, x16()))
    expected = bound(x16())
    model.head = nn.Identity()
    model.layers[0].up.weight = nn.Parameter(torch.zeros(24, 16, dtype=torch.float64))
    model.train().float()
    assert torch.equal(bound(x16()), expected)
    assert not bound.training


def test_a_bound_module_moves_with_its_adapter() -> None:
    model = net()
    params = moved(ll.init(model, ll.PiSSAConfig(r=2)))
    bound = ll.bind(model, params).to(torch.float32)
    found = ll.unbind(bound)
    assert isinstance(found, ll.Adapter)
    assert {t.dtype for t in leaves(found)} == {torch.float32}
    close(bound(x16().float()).double(), ll.apply(model, params, x16()), 1e-5)
    meta = ll.bind(model, params).to("meta")
    assert meta(x16().to("meta")).shape == (4, 8)


def test_a_bound_module_whose_site_is_taken_out_says_so_when_it_is_unbound() -> None:
    bound: Any = ll.bind(net(), ll.init(net(), ll.LoRAConfig(r=2)))
    bound.layers[0].up = nn.Linear(16, 24)
    with pytest.raises(ll.StructureError, match=r"site 'layers\.0\.up'"):
        ll.unbind(bound)
    del bound.layers[1]
    with pytest.raises(ll.StructureError, match=r"site 'layers\.\d\.\w+'"):
        ll.unbind(bound)


def test_state_dicts_of_a_bound_module() -> None:
    model = net()
    params = moved(ll.init(model, ll.LoRAConfig(r=2)))
    bound, other = ll.bind(model, params), ll.bind(net(3), ll.init(net(3), ll.LoRAConfig(r=2)))
    other.load_state_dict(bound.state_dict())
    assert torch.equal(other(x16()), bound(x16()))
    missing, unexpected = bound.load_state_dict(net(5).state_dict(), strict=False)
    assert not unexpected
    assert all(".adapter.0.lora_" in name for name in missing)
    close(bound(x16()), ll.apply(net(5), params, x16()), 1e-12)
