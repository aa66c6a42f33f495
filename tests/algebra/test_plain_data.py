"""Adapters as plain dicts and as one vector, and averages of stacks: there and back."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.utils._pytree as pytree
from helpers import close, leaves, moved, net
from torch import Tensor

import lora_lite_func as ll


def adapter(seed: int = 0, **config: Any) -> ll.Adapter:
    return moved(ll.init(net(depth=1), ll.LoRAConfig(**{"r": 2, **config}), seed=seed), seed)


# ------------------------------------------------------------------------------------- plain dicts
def test_dicts_are_the_adapters_own_tensors_and_come_back() -> None:
    params = adapter()
    stack = ll.stack([params, adapter(1)])
    for whole in (params, stack, ll.partition(params, lambda path, name: name == "lora_B")[0]):
        plain = ll.to_dict(whole)
        assert type(plain) is dict
        assert all(type(ts) is dict for ts in plain.values())
        again = ll.from_dict(plain, whole)
        assert again.layout == whole.layout
        assert all(a is b for a, b in zip(leaves(again), leaves(whole), strict=True))
    assert leaves(ll.from_dict(ll.to_dict(params), params.layout))[0] is leaves(params)[0]


def test_torchs_own_files_take_them(tmp_path: Path) -> None:
    params = adapter()
    file = io.BytesIO()
    torch.save(ll.to_dict(params), file)
    file.seek(0)
    close(ll.from_dict(torch.load(file), params), params, 0.0)
    torch.save(dict(params), tmp_path / "sites")
    close(ll.from_dict(torch.load(tmp_path / "sites"), params), params, 0.0)


@pytest.mark.filterwarnings("ignore")
def test_distributed_checkpoints_take_them(tmp_path: Path) -> None:
    params = adapter()
    dcp.save(ll.to_dict(params), checkpoint_id=str(tmp_path))
    room = ll.to_dict(pytree.tree_map(torch.zeros_like, params))
    dcp.load(room, checkpoint_id=str(tmp_path))
    close(ll.from_dict(room, params), params, 0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: {**d, "layers.0.pu": {}}, "no site 'layers.0.pu'; .*layers.0.up"),
        (lambda d: {"layers.0.up": d["layers.0.up"]}, "'layers.0.down': no tensor 'lora_A'"),
        (
            lambda d: {**d, "layers.0.up": {"lora_C": torch.ones(1)}},
            "'layers.0.up': no tensor 'lora_C'; did you mean",
        ),
        (
            lambda d: {p: {n: t[:1] for n, t in ts.items()} for p, ts in d.items()},
            r"'layers.0.down' lora_A: expected shape \(2, 24\), found \(1, 24\)",
        ),
        (lambda d: {**d, "layers.0.up": 3}, "'layers.0.up': expected {name: tensor}, found int"),
        (lambda d: [d], "expected {path: {name: tensor}}, found list"),
        (
            lambda d: {p: dict.fromkeys(ts, 1.0) for p, ts in d.items()},
            "lora_A: expected a tensor, found float",
        ),
    ],
)
def test_dicts_that_do_not_fit_are_refused(change: Any, message: str) -> None:
    params = adapter()
    with pytest.raises(ll.StructureError, match=message):
        ll.from_dict(change(ll.to_dict(params)), params)
    with pytest.raises(ll.StructureError, match="expected an Adapter or its layout, found int"):
        ll.from_dict({}, 3)  # type: ignore[arg-type]


def test_one_sites_tensors_are_plain_data() -> None:
    site = adapter()["layers.0.up"]
    doubled = pytree.tree_map(lambda t: t * 2, site)
    close(doubled["lora_A"], site["lora_A"] * 2, 0.0)
    close(pytree.tree_map(torch.add, doubled, site)["lora_B"], site["lora_B"] * 3, 1e-12)
    grads = torch.func.grad(lambda ts: ts["lora_A"].square().sum())(site)
    close(grads["lora_A"], 2 * site["lora_A"], 1e-12)
    for write in (
        lambda: site.update(lora_A=1),
        lambda: site.pop("lora_A"),
        site.clear,
        lambda: site.__ior__({}),
    ):
        with pytest.raises(TypeError, match="immutable and does not support item assignment"):
            write()


# --------------------------------------------------------------------------------------- one vector
def test_a_vector_and_back() -> None:
    t, _ = ll.partition(adapter())
    vector, unravel = ll.ravel(t)
    assert vector.shape == (ll.num_params(t),)
    close(unravel(vector), t, 0.0)
    close(unravel(2 * vector), pytree.tree_map(lambda x: 2 * x, t), 0.0)
    pair = {"a": t, "b": (t,)}
    both, back = ll.ravel(pair)
    assert isinstance(back(both)["b"][0], ll.Adapter)
    assert both.numel() == 2 * vector.numel()


def test_vectors_are_differentiated_and_mapped() -> None:
    model, x = net(depth=1), torch.randn(3, 16, dtype=torch.float64)
    t, frozen = ll.partition(adapter())
    vector, unravel = ll.ravel(t)

    def loss(v: Tensor) -> Tensor:
        return ll.apply(model, ll.combine(unravel(v), frozen), x).square().mean()

    found = torch.func.grad(loss)(vector)
    wanted = ll.grad(lambda t: ll.apply(model, ll.combine(t, frozen), x).square().mean())(t)
    close(found, ll.ravel(wanted)[0], 1e-12)
    assert torch.func.hessian(loss)(vector).shape == (vector.numel(),) * 2
    stacked = pytree.tree_map(lambda a: torch.stack([a, 2 * a]), t)
    close(torch.func.vmap(lambda t: ll.ravel(t)[0])(stacked)[1], 2 * vector, 0.0)
    slope = torch.func.jvp(lambda t: ll.ravel(t)[0], (t,), (t,))[1]
    close(slope, vector, 0.0)


def test_leaves_get_their_own_dtypes_back() -> None:
    model = net(depth=1, dtype=torch.bfloat16)
    t, _ = ll.partition(ll.init(model, ll.DoRAConfig(r=2)))
    vector, unravel = ll.ravel(t)
    assert vector.dtype == torch.float32
    for a, b in zip(leaves(unravel(vector)), leaves(t), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_what_has_no_vector_is_refused() -> None:
    t, _ = ll.partition(adapter())
    _, unravel = ll.ravel(t)
    with pytest.raises(ll.StructureError, match=r"expected a vector \(160,\), found \(3,\)"):
        unravel(torch.ones(3))
    with pytest.raises(ll.StructureError, match="expected an Adapter"):
        ll.ravel({"a": torch.ones(3)})


# ----------------------------------------------------------------------------------------- averages
def test_a_mean_is_one_adapter_that_saves(tmp_path: Path) -> None:
    several = [adapter(i) for i in range(3)]
    for stack in (ll.stack(several), ll.stack(dict(zip("abc", several, strict=True)))):
        found = ll.mean(stack)
        close(found, pytree.tree_map(lambda *ts: torch.stack(ts).mean(0), *several), 1e-12)
        ll.save(found, tmp_path / "m")
        close(ll.load(tmp_path / "m", net(depth=1)), found, 0.0)
        by_hand = pytree.tree_map(lambda t: t.mean(0), stack)
        ll.save(by_hand, tmp_path / "h")
        close(ll.load(tmp_path / "h", net(depth=1)), found, 0.0)
    weights = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    weighted = pytree.tree_map(lambda a, b, c: 0.5 * a + 0.25 * b + 0.25 * c, *several)
    close(ll.mean(stack, weights), weighted, 1e-12)
    close(ll.mean(stack, [0.5, 0.25, 0.25]), weighted, 1e-12)
    slope = torch.func.grad(lambda w: leaves(ll.mean(stack, w))[0].sum())(weights)
    close(slope, torch.stack([leaves(a)[0].sum() for a in several]), 1e-12)


def test_ranks_may_differ_in_a_mean_and_strengths_may_not(tmp_path: Path) -> None:
    several = [adapter(0, r=2, alpha=4), adapter(1, r=4, alpha=8)]
    found = ll.mean(ll.stack(several))
    assert found["layers.0.up"]["lora_A"].shape == (4, 16)
    ll.save(found, tmp_path / "m")
    close(ll.load(tmp_path / "m", net(depth=1)), found, 0.0)
    with pytest.raises(ll.StructureError, match="mean: the members' strengths differ"):
        ll.mean(ll.stack([adapter(0, alpha=4), adapter(1, alpha=8)]))
    mixed = pytree.tree_map(lambda t: t.mean(0), ll.stack([adapter(0), adapter(1, alpha=8)]))
    with pytest.raises(ll.CheckpointError, match="whose members' strengths differ"):
        ll.save(mixed, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_means_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ll.StructureError, match=r"mean: 'layers\.0\.down' lora_A: expected"):
        ll.mean(adapter())
    stack = ll.stack([adapter(), adapter(1)])
    for weights, message in (
        ([1.0], r"expected \(2,\), one per member, found"),
        (["a", "b"], "expected 2 finite numbers"),
        ([float("nan"), 1.0], "expected 2 finite numbers"),
        (torch.ones(2, dtype=torch.int64), "found torch.int64"),
    ):
        with pytest.raises(ll.StructureError, match=message):
            ll.mean(stack, weights)  # type: ignore[arg-type]
    starts = [moved(ll.init(net(seed=s, depth=1), ll.PiSSAConfig(r=2))) for s in (0, 1)]
    with pytest.raises(ll.StructureError, match="is frozen and differs among the members"):
        ll.mean(ll.stack(starts))
