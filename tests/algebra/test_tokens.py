"""Batches whose tokens have adapters of their own, equal to a reference that picks at each site."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CALIBRATED, CASES, Case, start
from families import FAMILIES
from helpers import Net, close, leaves, moved, net, normal, same_state, seeded, snapshot
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import lora_lite_func as ll

every = pytest.mark.parametrize("case", CASES + CALIBRATED, ids=repr)

IDS = torch.tensor([[0, 2, -1, 1, 1], [2, 2, 0, -1, 0], [1, 1, 1, 1, 0]])


def several(case: Case, count: int = 3, **fields: Any) -> tuple[Net, list[ll.Adapter]]:
    """A net, whose layers take each token alone, and adapters of one method, as if trained."""
    model = net()
    first = start(case, model, case.config(**{"r": 4, **fields}))
    return model, [moved(first, seed) for seed in range(count)]


def picked(model: nn.Module, members: list[ll.Adapter], ids: Tensor, x: Tensor) -> Tensor:
    """The model's output, each token's by its own adapter; right where tokens don't meet."""
    each = torch.stack([*(ll.apply(model, m, x) for m in members), ll.apply(model, (), x)])
    rows, tokens = ids.shape
    return each[ids, torch.arange(rows)[:, None], torch.arange(tokens)]


def lora_at_each_site(model: Any, members: list[ll.Adapter], ids: Tensor, *args: Any) -> Tensor:
    """The output with a LoRA's dense update at each site, picked for each token, by hooks."""
    handles = []
    for path, site in members[0].sites.items():

        def add(module: Any, args: Any, y: Tensor, path: str = path, site: Any = site) -> Tensor:
            updates = [
                site.scaling * args[0] @ (m[path]["lora_B"] @ m[path]["lora_A"]).mT for m in members
            ]
            each = torch.stack([*updates, torch.zeros_like(y)])
            rows, tokens = ids.shape
            return y + each[ids, torch.arange(rows)[:, None], torch.arange(tokens)]

        handles.append(model.get_submodule(path).register_forward_hook(add))
    try:
        return model(*args).logits
    finally:
        for handle in handles:
            handle.remove()


# --------------------------------------------------------------------------------------------- laws
@every
def test_each_token_has_its_own_adapter(case: Case) -> None:
    model, members = several(case)
    x = normal(3, 5, 16)
    before, wanted = snapshot(model), picked(model, members, IDS, x)
    mixed = ll.rows(ll.stack(members), IDS)
    close(ll.apply(model, mixed, x), wanted, 1e-9)
    with torch.no_grad():
        close(ll.bind(model, mixed)(x), wanted, 1e-9)
        packed = ll.rows(ll.stack(members), IDS.view(1, -1).tolist())
        close(ll.apply(model, packed, x.view(1, 15, 16)), wanted.view(1, 15, 8), 1e-9)
    assert same_state(before, snapshot(model))


@every
def test_each_member_gets_exactly_its_tokens_gradient(case: Case) -> None:
    model, members = several(case)
    ids, x = torch.where(IDS == 1, 0, IDS), normal(3, 5, 16)
    trainable, frozen = ll.partition(ll.stack(members))
    found = torch.func.grad(
        lambda t: ll.apply(model, ll.rows(ll.combine(t, frozen), ids), x).square().sum()
    )(trainable)
    for i, member in enumerate(members):
        own, rest = ll.partition(member)
        mine = torch.func.grad(
            lambda t, rest=rest, i=i: (
                ll.apply(model, ll.combine(t, rest), x).square()[ids == i].sum()
            )
        )(own)
        got = torch.utils._pytree.tree_map(lambda t, i=i: t[i], found)
        close(got, mine, 1e-8)
        assert i != 1 or all(not g.any() for g in leaves(got))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_at_each_site_of_a_model_whose_tokens_meet(name: str) -> None:
    model = FAMILIES[name].fresh().double()
    chosen = {"target_names": r"(q_proj|v_proj|up_proj|c_attn|c_fc)$"}
    members = [
        moved(ll.init(model, ll.LoRAConfig(r=2, **chosen), seed=s), s, 0.5) for s in range(3)
    ]
    inputs = torch.randint(3, 50, (3, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = lora_at_each_site(model, members, IDS, inputs)
        mixed = ll.rows(ll.stack(members), IDS)
        close(ll.apply(model, mixed, inputs).logits, wanted, 1e-9)
    assert (wanted - model(inputs).logits).abs().max() > 1e-3


def test_a_packed_batch_is_its_requests_one_by_one() -> None:
    model = FAMILIES["llama"].fresh().double()
    members = [moved(ll.init(model, ll.LoRAConfig(r=2), seed=s), s, 0.5) for s in range(2)]
    lengths, of = [3, 1, 4], [1, -1, 0]
    inputs = torch.randint(3, 50, (1, 8), generator=torch.Generator().manual_seed(0))
    request = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    same = request[:, None] == request
    mask = (same & torch.ones(8, 8, dtype=torch.bool).tril())[None, None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    ids = torch.tensor(of)[request][None]
    with torch.no_grad():
        packed = ll.apply(
            model,
            ll.rows(ll.stack(members), ids),
            inputs,
            attention_mask=mask,
            position_ids=positions,
        ).logits
        for n, i in enumerate(of):
            own = inputs[:, request == n]
            alone = ll.apply(model, members[i] if i >= 0 else (), own).logits
            close(packed[:, request == n], alone, 1e-9)


# --------------------------------------------------------------------------------------- transforms
def test_one_graph_serves_every_mix_of_tokens_and_ids_may_be_mapped() -> None:
    model, members = several(CASES[0])
    stack, x, counter = ll.stack(members), normal(3, 5, 16), CompileCounter()
    step = torch.compile(
        lambda s, ids, x: ll.apply(model, ll.rows(s, ids), x), fullgraph=True, backend=counter
    )
    for ids in (IDS, IDS.flip(0, 1), torch.full_like(IDS, -1)):
        close(step(stack, ids, x), picked(model, members, ids, x), 1e-9)
    assert counter.frame_count == 1
    both = torch.stack([IDS, IDS.flip(1)])
    ys = torch.func.vmap(lambda ids: ll.apply(model, ll.rows(stack, ids), x))(both)
    close(ys, torch.stack([picked(model, members, ids, x) for ids in both]), 1e-10)


def test_tokens_rows_and_plain_adapters_compose_in_order() -> None:
    model, members = several(CASES[0])
    gate = moved(ll.init(model, ll.IA3Config()), 9)
    others = several(next(c for c in CASES if c.name == "full"))[1]
    x, of = normal(3, 5, 16), [1, -1, 0]
    tokens, rows = ll.rows(ll.stack(members), IDS), ll.rows(ll.stack(members), of)
    spread = torch.tensor(of)[:, None].expand(3, 5)
    close(
        ll.apply(model, (tokens, gate, rows), x),
        ll.apply(model, (tokens, gate, ll.rows(ll.stack(members), spread)), x),
        1e-10,
    )
    first, second = ll.rows(ll.stack(others), IDS), ll.rows(ll.stack(others), of)
    close(
        ll.apply(model, (first, second), x),
        ll.apply(model, (first, ll.rows(ll.stack(others), spread)), x),
        1e-10,
    )


# ------------------------------------------------------------------------------ values, refusals
def test_ids_of_tokens_by_name_and_of_any_integer_dtype() -> None:
    model, (fr, de) = several(CASES[0], 2)
    stack, x = ll.stack({"fr": fr, "de": de}), normal(2, 2, 16)
    by_name = ll.rows(stack, [["fr", None], ["de", "de"]])
    assert by_name.ids.tolist() == [[0, -1], [1, 1]]
    assert "4 tokens of 2 adapters" in repr(by_name)
    as_bytes = ll.rows(stack, by_name.ids.to(torch.int8))
    close(ll.apply(model, by_name, x), ll.apply(model, as_bytes, x), 0.0)
    assert ll.rows(stack, list(torch.tensor([0, 1]))).ids.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[0, 1], [0, 2]], "row 1, token 1 has id 2, expected -1 .the bare base. to 1"),
        ([[0], [0, 1]], "expected as many ids for each row, .* found 1, 2; pad them with -1"),
        ([0, [0]], "expected as many ids for each row, .* found 1, None"),
        (torch.zeros(2, 2, 2, dtype=torch.int64), r"expected .* \(N, T\), found .*\(2, 2, 2\)"),
    ],
)
def test_ids_of_tokens_that_are_none(ids: Any, message: str) -> None:
    with pytest.raises(ll.StructureError, match=f"rows: {message}"):
        ll.rows(ll.stack(several(CASES[0], 2)[1]), ids)


class Around(nn.Module):
    """A layer that is given its tokens in one of several ways."""

    def __init__(self, way: Any) -> None:
        super().__init__()
        self.inner, self.way = nn.Linear(16, 16), way

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.way(x))


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        (lambda x: x.flatten(0, 1), "may have its tokens flattened, in an order that can't be"),
        (lambda x: x.mean(1), "hasn't these tokens"),
        (lambda x: x[:, -1:], "hasn't these tokens"),
        (
            lambda x: x[:, :, None].expand(-1, -1, 5, -1),
            "another dimension of 5 beside the tokens'",
        ),
    ],
)
def test_inputs_whose_tokens_cannot_be_told_are_refused(way: Any, reason: str) -> None:
    model = seeded(Around(way))
    for cfg in (ll.LoRAConfig(r=2), ll.LoRAConfig(r=2, target_parameters="weight")):
        stack = ll.stack([ll.init(model, cfg, seed=seed) for seed in (0, 1)])
        mixed = ll.rows(stack, [[0, 1, 0, 1, 1]] * 2)
        match = rf"site 'inner': adapters for 2 x 5 tokens.*{reason}.*exclude_names"
        with pytest.raises(ll.StructureError, match=match):
            ll.apply(model, mixed, normal(2, 5, 16))


@pytest.mark.parametrize(
    ("build", "cfg", "message"),
    [
        (
            lambda: nn.Conv1d(4, 4, 3, padding=1),
            ll.LoRAConfig(r=2, target_kinds="conv"),
            r"'' .Conv1d.: its weight itself is adapted, and tokens may meet in its call",
        ),
        (
            lambda: nn.MultiheadAttention(4, 2, batch_first=True),
            ll.LoRAConfig(r=2, target_parameters="in_proj_weight"),
            r"'' .MultiheadAttention.: .*tokens may meet.*exclude_names",
        ),
        (
            lambda: nn.Sequential(nn.Linear(4, 4)),
            ll.LoReFTConfig(r=2, target_names="0"),
            "site '0': loreft changes a whole module's output",
        ),
    ],
)
def test_modules_in_which_tokens_may_meet_are_refused(build: Any, cfg: Any, message: str) -> None:
    model = seeded(build())
    stack = ll.stack([ll.init(model, cfg, seed=seed) for seed in (0, 1)])
    x = normal(2, 4, 4)
    args = (x, x, x) if isinstance(model, nn.MultiheadAttention) else (x,)
    with pytest.raises(ll.UnsupportedError, match=message):
        ll.apply(model, ll.rows(stack, [[0, 1, 0, 1]] * 2), *args)
