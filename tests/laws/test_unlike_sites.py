"""Adapters on unlike sites in one stack: a site that a member lacks is the base for it, whatever
the method, the way in and the transform.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from cases import CALIBRATED, CASES, MERGED, Case, start
from helpers import Net, close, leaves, moved, net, normal
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.func import grad, vmap

import lora_lite_func as ll
from lora_lite_func.io.files import read_safetensors

every = pytest.mark.parametrize("case", CASES + CALIBRATED, ids=repr)
PLACES = (("up",), (), (r"layers\.0\.",))
IDS = [1, 0, -1, 2, 0, 1, 2]


def unlike(case: Case) -> tuple[Net, list[ll.Adapter]]:
    """A model, and adapters on some of its sites each."""
    model = net(depth=2)
    several = [
        moved(start(case, model, case.config(r=4, target_names=names), seed=i), seed=i)
        for i, names in enumerate(PLACES)
    ]
    assert len({tuple(params) for params in several}) > 1
    return model, several


def batch(rows: int = len(IDS)) -> Tensor:
    return normal(rows, 3, 16)


def alone(model: nn.Module, several: list[ll.Adapter], x: Tensor, ids: list[int]) -> Tensor:
    """Each row by a call of its own."""
    own = [several[i] if i >= 0 else {} for i in ids]
    return torch.cat([ll.apply(model, p, x[n : n + 1]) for n, p in enumerate(own)])


@every
def test_members_come_back(case: Case, tmp_path: Path) -> None:
    _, several = unlike(case)
    named = ll.stack(dict(zip("abc", several, strict=True)))
    ll.save(named, tmp_path / "stack")
    read = ll.load(tmp_path / "stack")
    for stack in (named, read, pickle.loads(pickle.dumps(named)), ll.concatenate([named])):
        assert ll.names(stack) == ("a", "b", "c")
        for member, params in zip(ll.unstack(stack), several, strict=True):
            assert member.layout == params.layout
            assert all(
                torch.equal(t, u) for t, u in zip(leaves(member), leaves(params), strict=True)
            )
    one = ll.load(tmp_path / "stack", member="c")
    assert all(torch.equal(t, u) for t, u in zip(leaves(one), leaves(several[2]), strict=True))


@every
def test_rows_are_single_calls(case: Case) -> None:
    model, several = unlike(case)
    stack, x = ll.stack(several), batch()
    wanted = alone(model, several, x, IDS)
    for grads in (True, False):
        with torch.set_grad_enabled(grads):
            close(ll.apply(model, ll.rows(stack, IDS), x), wanted, 1e-10)
    close(ll.bind(model, ll.rows(stack, IDS))(x), wanted, 1e-10)
    close(ll.prepared(model, ll.rows(stack, IDS))(x), wanted, 1e-10)


@every
def test_vmap_is_a_loop(case: Case) -> None:
    model, several = unlike(case)
    stack, x = ll.stack(several), batch(2)
    wanted = torch.stack([ll.apply(model, params, x) for params in several])
    close(vmap(lambda p: ll.apply(model, p, x))(stack), wanted, 1e-10)
    for i in range(len(several)):
        # what a tree map takes out of the stack isn't told that a site is missing; its leaf says so
        member = pytree.tree_map(lambda t, i=i: t[i], stack)
        close(ll.apply(model, member, x), wanted[i], 1e-10)
        close(ll.bind(model, member)(x), wanted[i], 1e-10)


@pytest.mark.parametrize("case", MERGED, ids=repr)
def test_weights_are_merged_together(case: Case) -> None:
    model, several = unlike(case)
    weights = vmap(lambda p: ll.merge(model, p))(ll.stack(several))
    for i, params in enumerate(several):
        merged = {**dict(model.named_parameters()), **ll.merge(model, params)}
        close({n: t[i] for n, t in weights.items()}, {n: merged[n] for n in weights}, 1e-10)


@every
def test_gradients_are_those_of_single_calls(case: Case) -> None:
    model, several = unlike(case)
    stack, x = ll.stack(several), batch()
    trainable, frozen = ll.partition(stack)

    def by_rows(trainable: ll.Adapter) -> Tensor:
        y = ll.apply(model, ll.rows(ll.combine(trainable, frozen), IDS), x)
        return y.square().sum()

    def by_vmap(trainable: ll.Adapter) -> Tensor:
        def one(params: ll.Adapter, mine: Tensor) -> Tensor:
            return (ll.apply(model, params, x).square().sum((1, 2)) * mine).sum()

        mine = torch.tensor([[float(i == k) for i in IDS] for k in range(3)]).double()
        return vmap(one)(ll.combine(trainable, frozen), mine).sum()

    for loss in (by_rows, by_vmap):
        found = grad(loss)(trainable)
        for i, params in enumerate(several):
            mine = x[torch.tensor(IDS) == i]
            own, rest = ll.partition(params)
            wanted = grad(
                lambda t, rest=rest, mine=mine: (
                    ll.apply(model, ll.combine(t, rest), mine).square().sum()
                )
            )(own)
            close(found[i], wanted, 1e-9)
            for path, names in found.layout.names.items():
                if path not in params:
                    own = [found[path][name] for name in names]
                    assert all(not t[i].any() for t in own if t is not ll.ABSENT)


@pytest.mark.parametrize("config", [ll.LoRAConfig, ll.HRAConfig, ll.IA3Config, ll.BitFitConfig])
def test_one_graph_serves_every_mix(config: Any) -> None:
    model, counter = net(depth=2), CompileCounter()
    several = [
        moved(ll.init(model, config(r=4, target_names=names)), i) for i, names in enumerate(PLACES)
    ]
    stack, x = ll.stack(several), batch()
    step = torch.compile(
        lambda s, ids, x: ll.apply(model, ll.rows(s, ids), x), backend=counter, fullgraph=True
    )
    for ids in (IDS, IDS[::-1], [2] * len(IDS)):
        close(step(stack, torch.tensor(ids), x), alone(model, several, x, ids), 1e-10)
    assert counter.frame_count == 1
    mapped = torch.compile(
        lambda s, x: vmap(lambda p: ll.apply(model, p, x))(s), backend="eager", fullgraph=True
    )
    close(mapped(stack, x), torch.stack([ll.apply(model, p, x) for p in several]), 1e-10)


class Attending(nn.Module):
    """Two attentions, whose output projections torch reads without a call."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.MultiheadAttention(16, 4, batch_first=True) for _ in "12")

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, x, x, need_weights=False)[0]
        return x


def embedded() -> nn.Module:
    """Ids, a table, a norm and a layer."""
    return nn.Sequential(nn.Embedding(20, 16), nn.LayerNorm(16), nn.Linear(16, 8))


OTHERS = {
    "whole modules": (
        lambda: net(depth=2),
        [ll.LoReFTConfig(r=4, target_names=(name,)) for name in (r"layers\.0$", r"layers\.[01]$")],
    ),
    "by weight": (
        Attending,
        [ll.LoRAConfig(r=4, target_names=(name,)) for name in (r"1\.out_proj", "out_proj")],
    ),
    "tables and norms": (
        embedded,
        [
            ll.FullConfig(keep_start=True, target_parameters=(name,))
            for name in (r"0\.weight$", r"[012]\.weight$")
        ],
    ),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # attention under vmap
@pytest.mark.parametrize("name", OTHERS)
def test_other_places(name: str) -> None:
    make, configs = OTHERS[name]
    model = make().double().eval()
    several = [moved(ll.init(model, config), seed=i) for i, config in enumerate(configs)]
    assert len(several[0]) < len(several[1])
    x = torch.randint(0, 20, (len(IDS), 3)) if isinstance(model, nn.Sequential) else batch()
    stack, ids = ll.stack(several), [min(i, 1) for i in IDS]
    wanted = alone(model, several, x, ids)
    close(ll.apply(model, ll.rows(stack, ids), x), wanted, 1e-10)
    mapped = vmap(lambda p: ll.apply(model, p, x))(stack)
    close(mapped, torch.stack([ll.apply(model, params, x) for params in several]), 1e-10)


def test_ranks_strengths_and_sites_differ_at_once() -> None:
    model, x = net(depth=2), batch()
    several = [
        moved(ll.init(model, ll.LoRAConfig(r=r, alpha=a, target_names=names)), r)
        for r, a, names in ((2, 8.0, ("up",)), (4, 4.0, (r"layers\.0\.",)), (3, 1.0, ("down$",)))
    ]
    stack = ll.stack(several)
    close(ll.apply(model, ll.rows(stack, IDS), x), alone(model, several, x, IDS), 1e-10)
    wanted = torch.stack([ll.apply(model, params, x) for params in several])
    close(vmap(lambda p: ll.apply(model, p, x))(stack), wanted, 1e-10)
    half = torch.tensor([0.5, 0.0, -1.0], dtype=torch.float64)
    scaled = [ll.scale(p, c) for p, c in zip(several, half.tolist(), strict=True)]
    close(
        ll.apply(model, ll.rows(ll.scale(stack, half), IDS), x),
        alone(model, scaled, x, IDS),
        1e-10,
    )


def test_updates_of_a_stack_are_stacks() -> None:
    model, x = net(depth=2), batch()
    several = [
        moved(ll.init(model, ll.LoRAConfig(r=4, target_names=names)), i)
        for i, names in enumerate(PLACES)
    ]
    stack = ll.stack(dict(zip("abc", several, strict=True)))
    kinds: list[dict[str, Any]] = [
        {"target_names": "up"},
        {"target_names": "down$", "r": 2},
        {"r": 8},
        {"alpha": 3.0},
    ]
    for i, kind in enumerate(kinds):
        new = moved(ll.init(model, ll.LoRAConfig(**{"r": 4, **kind})), 9 + i)
        for place, name in enumerate("abc"):
            changed = [*several[:place], new, *several[place + 1 :]]
            updated = ll.update(stack, name, new)
            assert ll.names(updated) == ("a", "b", "c")
            assert updated.layout.specs == ll.stack(changed).layout.specs
            close(ll.apply(model, ll.rows(updated, IDS), x), alone(model, changed, x, IDS), 1e-10)
            close(ll.unstack(updated), changed, 0.0)
    close(ll.unstack(stack), several, 0.0)  # and the stack is as it was


def test_a_soup_of_unlike_sites_is_refused() -> None:
    model = net(depth=2)
    several = [ll.init(model, ll.LoRAConfig(r=4, target_names=names)) for names in PLACES]
    message = r"mean: member \d has no site 'layers\.\d\.\w+', so its leaves have no average; "
    with pytest.raises(ll.StructureError, match=message + r".*ll\.combine_adapters"):
        ll.mean(ll.stack(several))
    one = pytree.tree_map(lambda t: t[1], ll.stack(several))
    with pytest.raises(ll.CheckpointError, match=r"strengths differ .* or whose sites do"):
        ll.save(one, "nowhere")


def test_a_file_that_says_otherwise_than_its_members_is_refused(tmp_path: Path) -> None:
    several = [ll.init(net(depth=2), ll.LoRAConfig(r=4, target_names=names)) for names in PLACES]
    ll.save(ll.stack(several), tmp_path / "stack")
    tensors, says = read_safetensors(tmp_path / "stack")
    for values in ([1.0, 1.0, 1.0], [0.0, 1.0, float("nan")]):
        tensors["layers.0.down.lora_present"] = torch.tensor(values, dtype=torch.float64)
        save_file(tensors, tmp_path / "other", says)
        with pytest.raises(
            ll.CheckpointError,
            match=r"'layers\.0\.down' lora_present: expected \[0\.0, 1\.0, 1\.0\], as its members",
        ):
            ll.load(tmp_path / "other")


def test_a_site_of_other_sizes_is_another_place() -> None:
    wide = ll.init(net(depth=1, inner=40), ll.LoRAConfig(r=4, target_names="up"))
    several = [ll.init(net(depth=2), ll.LoRAConfig(r=4, target_names=n)) for n in ("down$", "up")]
    with pytest.raises(
        ll.StructureError,
        match=r"number 2 differs at 'layers\.0\.up': d_out=40, the first d_out=24",
    ):
        ll.stack([*several, wide])


def test_parts_of_a_partition_stack_whatever_their_sites() -> None:
    model = net(depth=2)
    several = [
        ll.init(model, ll.PiSSAConfig(r=4, alpha=float(1 + i), target_names=names))
        for i, names in enumerate(PLACES)
    ]
    trainable, frozen = zip(*map(ll.partition, several), strict=True)
    whole = ll.combine(ll.stack(trainable), ll.stack(frozen))
    assert whole.layout == ll.stack(several).layout
    close(whole, ll.stack(several), 0.0)
