"""The container: an immutable Mapping, one pytree for torch and optree, that prints, copies and
exports.
"""

from __future__ import annotations

import copy
import io
import pickle
from itertools import product
from typing import Any

import optree
import pytest
import torch
import torch.utils._pytree as pytree
from cases import CASES, Case
from helpers import leaves, moved, net
from torch import Tensor, nn
from torch.func import vmap

import lora_lite_func as ll

every = pytest.mark.parametrize("case", CASES, ids=repr)
ORDER = [
    f"layers.{i}.{m}.{n}" for i in (0, 1) for m in ("down", "up") for n in ("lora_A", "lora_B")
]


def lora(**fields: Any) -> ll.Adapter:
    """LoRA on a small net."""
    return ll.init(net(), ll.LoRAConfig(**{"r": 4, **fields}))


def pissa() -> ll.Adapter:
    """An adapter with frozen tensors."""
    return ll.init(net(), ll.PiSSAConfig(r=4))


# ------------------------------------------------------------------------------------------ mapping
def test_a_mapping_of_sorted_sites() -> None:
    params = ll.init(net(depth=11), ll.LoRAConfig(r=2, target_names="up"))
    assert (
        list(params)
        == sorted(f"layers.{i}.up" for i in range(11))
        == list(params.keys())
        == list(params.sites)
    )
    assert len(params) == 11
    assert "layers.3.up" in params
    assert "layers.3" not in params
    assert all(list(tensors) == ["lora_A", "lora_B"] for tensors in params.values())
    assert params.get("layers.30.up") is None
    assert params.config == ll.LoRAConfig(r=2)


def test_a_missing_site_names_the_nearest() -> None:
    with pytest.raises(KeyError, match=r"no site 'layers.0.upp'; did you mean 'layers.0.up'\?"):
        lora()["layers.0.upp"]
    with pytest.raises(
        ll.StructureError,
        match=(
            r"a member of a stack: 'layers.0.down' lora_A: expected \(K, 4, 24\), "
            r"found \(4, 24\)"
        ),
    ):
        lora()[0]  # a number asks for a stack's member


def test_nothing_can_be_put_in() -> None:
    params: Any = lora()
    with pytest.raises((TypeError, AttributeError), match=r"item assignment|__setitem__"):
        params["layers.0.up"] = {}
    with pytest.raises(TypeError, match="does not support item assignment"):
        params["layers.0.up"]["lora_A"] = torch.zeros(1)
    with pytest.raises(TypeError, match="does not support item assignment"):
        params.sites["layers.0.up"] = None
    with pytest.raises((TypeError, AttributeError), match=r"item deletion|__delitem__"):
        del params["layers.0.up"]
    with pytest.raises(AttributeError, match="config"):
        params.config = ll.LoRAConfig()
    with pytest.raises(AttributeError, match="anything"):
        params.anything = 1


def test_the_layout_can_not_be_replaced() -> None:
    params = lora()
    with pytest.raises(AttributeError, match="layout"):
        params.layout = lora(alpha=1).layout
    with pytest.raises(AttributeError, match="layout"):
        del params.layout


def test_equality_is_identity() -> None:
    params = lora()
    assert params == params
    assert params != copy.copy(params)
    assert len({params, params, copy.copy(params)}) == 2
    assert params.layout == lora(target_names=("up", "down"), layers=(0, 1)).layout
    assert hash(params.layout) == hash(lora(dtype=torch.float32).layout)
    assert params.layout != lora(alpha=3).layout
    assert params.layout != lora(target_names="up").layout


def test_data_that_does_not_fit_the_layout() -> None:
    params = lora()
    data = {path: dict(tensors) for path, tensors in params.items()}
    with pytest.raises(ll.StructureError, match="site 'elsewhere' is in the data alone"):
        ll.Adapter(params.layout, {**data, "elsewhere": {}})
    with pytest.raises(ll.StructureError, match=r"site 'layers\.1\.up' is in the layout alone"):
        ll.Adapter(params.layout, {p: t for p, t in data.items() if p != "layers.1.up"})
    with pytest.raises(
        ll.StructureError,
        match=r"'layers\.0\.up': expected tensors lora_A, lora_B, found lora_A, lora_C",
    ):
        ll.Adapter(params.layout, {**data, "layers.0.up": {"lora_A": 1, "lora_C": 2}})


# -------------------------------------------------------------------------------------------- trees
@every
def test_torch_and_optree_flatten_alike(case: Case) -> None:
    params = ll.init(net(), case.config(r=4))
    keys = [key for path, names in params.layout.names.items() for key in product((path,), names)]
    ours = [params[key] for key in keys]
    for flat in (pytree.tree_leaves(params), optree.tree_leaves(params)):
        assert all(a is b for a, b in zip(flat, ours, strict=True))
    names = [".".join(key) for key in keys]
    assert [".".join(keys[0].key) for keys, _ in pytree.tree_flatten_with_path(params)[0]] == names
    assert [".".join(p[-1]) for p in optree.tree_paths(params)] == names
    for again in (
        pytree.tree_unflatten(ours, pytree.tree_flatten(params)[1]),
        optree.tree_unflatten(optree.tree_structure(params), ours),
    ):
        assert isinstance(again, ll.Adapter)
        assert again.layout == params.layout
        assert all(a is b for a, b in zip(leaves(again), ours, strict=True))


def test_key_paths_lead_to_their_leaves() -> None:
    params = lora()
    assert params["layers.0.up", "lora_A"] is params["layers.0.up"]["lora_A"]
    with pytest.raises(KeyError, match=r"no site 'layers.0.upp'"):
        params["layers.0.upp", "lora_A"]
    for keys, leaf in pytree.tree_flatten_with_path(params)[0]:
        assert pytree.key_get(params, keys) is leaf
    for accessor, leaf in zip(
        optree.tree_accessors(params), optree.tree_leaves(params), strict=True
    ):
        assert accessor(params) is leaf


@pytest.mark.parametrize("tree_map", [pytree.tree_map, optree.tree_map], ids=["torch", "optree"])
def test_leaves_may_be_anything(tree_map: Any) -> None:
    params = lora()
    shapes = tree_map(lambda t: torch.Size(t.shape).numel(), params)
    assert shapes["layers.0.up"]["lora_A"] == 4 * 16
    for value in (None, 3, "text", object()):
        filled = tree_map(lambda _, v=value: v, params)
        assert isinstance(filled, ll.Adapter)
        assert filled["layers.1.down"]["lora_B"] is value
        assert "layers.{0-1}.up" in repr(filled)
    assert len(pytree.tree_leaves(tree_map(lambda _: None, params))) == len(ORDER)
    assert optree.tree_leaves(tree_map(lambda _: None, params)) == []
    assert len(optree.tree_leaves(tree_map(lambda _: None, params), none_is_leaf=True)) == len(
        ORDER
    )
    pairs = tree_map(lambda a, b: (a, b), params, params)
    assert pairs["layers.0.up"]["lora_A"][0] is params["layers.0.up"]["lora_A"]


def test_trees_of_different_adapters_do_not_mix() -> None:
    with pytest.raises(ValueError, match=r"[Nn]ode|[Mm]ismatch|context"):
        pytree.tree_map(lambda a, b: a, lora(), lora(alpha=2))
    with pytest.raises(ValueError, match=r"[Mm]ismatch|node|Expected"):
        optree.tree_map(lambda a, b: a, lora(), lora(target_names="up"))


def test_inside_other_trees() -> None:
    tree = {"b": [lora(), None], "a": (pissa(), {"x": torch.ones(1)})}
    doubled = optree.tree_map(lambda t: t * 2, tree)
    assert isinstance(doubled["b"][0], ll.Adapter)
    assert torch.equal(
        doubled["a"][0]["layers.0.up"]["lora_A0"], 2 * tree["a"][0]["layers.0.up"]["lora_A0"]
    )
    assert len(optree.tree_leaves(tree)) == 8 + 16 + 1


def test_an_adapter_of_axes() -> None:
    model, params = net(), lora()
    several = [moved(params, i) for i in (1, 2, 3)]
    x = torch.randn(2, 16, dtype=torch.float64)
    stacked = ll.stack(several)
    mixed = pytree.tree_map_with_path(lambda k, t: t if k[0].key[1] == "lora_B" else t[0], stacked)
    axes = pytree.tree_map_with_path(lambda k, t: 0 if k[0].key[1] == "lora_B" else None, params)
    y = vmap(lambda p: ll.apply(model, p, x), in_dims=(axes,))(mixed)
    for i in range(3):
        one = pytree.tree_map_with_path(
            lambda k, t, i=i: t[i] if k[0].key[1] == "lora_B" else t, mixed
        )
        assert torch.allclose(y[i], ll.apply(model, one, x), atol=1e-12)
    moved_axis = vmap(lambda p: p, out_dims=pytree.tree_map(lambda _: 1, params))(stacked)
    assert torch.equal(
        moved_axis["layers.0.up"]["lora_A"][:, 2], several[2]["layers.0.up"]["lora_A"]
    )


def test_absent_leaves_are_no_leaves() -> None:
    trainable, frozen = ll.partition(pissa())
    for part, kept in ((trainable, {"lora_A", "lora_B"}), (frozen, {"lora_A0", "lora_B0"})):
        assert (
            len(pytree.tree_leaves(part))
            == len(optree.tree_leaves(part))
            == len(optree.tree_leaves(part, none_is_leaf=True))
            == 8
        )
        again = optree.tree_map(lambda t: t + 1, pytree.tree_map(lambda t: t - 1, part))
        assert {n for n, t in again["layers.0.up"].items() if isinstance(t, Tensor)} == kept
        for twin in (copy.copy(part), copy.deepcopy(part), pickle.loads(pickle.dumps(part))):
            assert {n for n, t in twin["layers.0.up"].items() if isinstance(t, Tensor)} == kept
            assert pytree.tree_structure(twin) == pytree.tree_structure(part)
            assert optree.tree_structure(twin) == optree.tree_structure(part)
        optree.tree_map(torch.add, part, copy.deepcopy(part))
    assert (
        repr(next(t for t in trainable["layers.0.up"].values() if not isinstance(t, Tensor)))
        == "absent"
    )


# ----------------------------------------------------------------------------------------- printing
def test_the_table() -> None:
    assert repr(pissa()).splitlines() == [
        "Adapter(pissa: 4 sites, 640 trainable parameters, 640 frozen*)",
        "  layers.{0-1}.down  24 -> 16  lora_A (4, 24) float64  lora_A0* (4, 24) float64  lora_B "
        "(16, 4) float64  lora_B0* (16, 4) float64",
        "  layers.{0-1}.up    16 -> 24  lora_A (4, 16) float64  lora_A0* (4, 16) float64  lora_B "
        "(24, 4) float64  lora_B0* (24, 4) float64",
    ]
    some = ll.init(
        net(depth=5),
        ll.LoRAConfig(r=4, layers=(0, 1, 3), target_names="up", rank_pattern={r"\.3\.": 2}),
    )
    assert [line.split()[0] for line in repr(some).splitlines()[1:]] == [
        "layers.{0-1}.up",
        "layers.3.up",
    ]
    gaps = ll.init(net(depth=5), ll.LoRAConfig(r=4, layers=(0, 1, 3), target_names="up"))
    assert [line.split()[0] for line in repr(gaps).splitlines()[1:]] == ["layers.{0-1,3}.up"]
    assert (
        repr(ll.partition(pissa())[0]).splitlines()[0]
        == "Adapter(pissa: 4 sites, 640 trainable parameters)"
    )
    assert "lora_A0* absent" in repr(ll.partition(pissa())[0])


@pytest.mark.parametrize("name", ["{a}", "a{", "{0}"])
def test_a_site_with_braces_prints(name: str) -> None:
    assert name in repr(ll.init(nn.ModuleDict({name: nn.Linear(2, 2)}), ll.LoRAConfig(r=1)))


@pytest.mark.parametrize(
    "names", [("{}", "3"), ("007", "7"), ("1" * 5000, "2")], ids=["braces", "zeros", "digits"]
)
def test_odd_numbers_print_as_they_are(names: tuple[str, ...]) -> None:
    text = repr(
        ll.init(nn.ModuleDict({name: nn.Linear(2, 2) for name in names}), ll.LoRAConfig(r=1))
    )
    assert all(f"  {name} " in text for name in names)


# ----------------------------------------------------------------------------------- files, exports
def test_torch_save_and_load() -> None:
    model, params = net(), moved(pissa())
    file = io.BytesIO()
    torch.save({"params": params, "parts": ll.partition(params)}, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert again["params"].layout == params.layout
    x = torch.randn(2, 16, dtype=torch.float64)
    assert torch.equal(ll.apply(model, again["params"], x), ll.apply(model, params, x))
    assert torch.equal(ll.apply(model, ll.combine(*again["parts"]), x), ll.apply(model, params, x))


class Applied(nn.Module):
    """A module whose call takes an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.base = net()

    def forward(self, params: ll.Adapter, x: Tensor) -> Tensor:
        return ll.apply(self.base, params, x)


@pytest.mark.parametrize("name", ["lora", "pissa", "dora"])
def test_export_takes_an_adapter_as_input(name: str) -> None:
    case = next(c for c in CASES if c.name == name)
    module, x = Applied(), torch.randn(3, 16, dtype=torch.float64)
    params = ll.init(module.base, case.config(r=2))
    exported = torch.export.export(module, (params, x)).module()
    for p in (params, moved(params)):
        assert torch.allclose(exported(p, x), module(p, x), atol=1e-12)


def test_an_exported_program_can_be_saved() -> None:
    module, x = Applied(), torch.randn(3, 16, dtype=torch.float64)
    program = torch.export.export(module, (ll.init(module.base, ll.LoRAConfig(r=2)), x))
    torch.export.save(program, io.BytesIO())


@every
def test_the_static_data_has_a_json_form(case: Case) -> None:
    params = ll.init(net(), case.config(r=4, rank_pattern={"up": 6} if case.name == "lora" else {}))
    flat, spec = pytree.tree_flatten({"one": params, "parts": ll.partition(params)})
    again = pytree.tree_unflatten(flat, pytree.treespec_loads(pytree.treespec_dumps(spec)))
    assert again["one"].layout == params.layout
    assert all(
        a is b for a, b in zip(leaves(ll.combine(*again["parts"])), leaves(params), strict=True)
    )
