"""Sets of adapters: stacks of unlike members, and batches whose rows each have their own adapter,
equal to loops over the members.
"""

from __future__ import annotations

import weakref
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from cases import CALIBRATED, CASES, Case, start
from families import FAMILIES
from helpers import Net, close, in_threads, leaves, moved, net, normal, same_state, seeded, snapshot
from hypothesis import given
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import lora_lite_func as ll

every = pytest.mark.parametrize("case", CASES + CALIBRATED, ids=repr)


def several(
    case: Case, count: int, model: Net | None = None, **fields: Any
) -> tuple[Net, list[ll.Adapter]]:
    """A net and adapters of one method, as if trained."""
    model = net() if model is None else model
    first = start(case, model, case.config(**{"r": 4, **fields}))
    return model, [moved(first, seed) for seed in range(count)]


def looped(model: nn.Module, members: list[ll.Adapter], ids: list[int], x: Tensor) -> Tensor:
    """Each row by its own adapter, one call per row."""
    calls = [
        ll.apply(model, members[i], x[row : row + 1]) if i >= 0 else model(x[row : row + 1])
        for row, i in enumerate(ids)
    ]
    return torch.cat(calls) if calls else model(x)


mixes = st.integers(1, 4).flatmap(
    lambda k: st.tuples(st.just(k), st.lists(st.integers(-1, k - 1), min_size=1, max_size=9))
)


# --------------------------------------------------------------------------------------------- laws
@every
@given(mix=mixes, inner=st.sampled_from([(), (3,), (2, 2)]), sort=st.booleans())
def test_rows_is_a_loop_over_members(
    case: Case, mix: tuple[int, list[int]], inner: tuple[int, ...], sort: bool
) -> None:
    count, ids = mix
    ids = sorted(ids) if sort else ids
    model, members = several(case, count)
    x = normal(len(ids), *inner, 16)
    before = snapshot(model)
    with torch.no_grad():
        close(
            ll.apply(model, ll.rows(ll.stack(members), ids), x),
            looped(model, members, ids, x),
            1e-9,
        )
    assert same_state(before, snapshot(model))


@every
@given(mix=mixes)
def test_each_member_gets_exactly_its_own_gradient(case: Case, mix: tuple[int, list[int]]) -> None:
    count, ids = mix
    model, members = several(case, count)
    x = normal(len(ids), 2, 16)

    def loss(stack: ll.Adapter) -> Tensor:
        return ll.apply(model, ll.rows(stack, ids), x).square().sum()

    trainable, frozen = ll.partition(ll.stack(members))
    found = torch.func.grad(lambda t: loss(ll.combine(t, frozen)))(trainable)
    for i, member in enumerate(members):
        rows = [row for row, of in enumerate(ids) if of == i]
        own, rest = ll.partition(member)
        mine = torch.func.grad(
            lambda t, rest=rest, rows=rows: (
                ll.apply(model, ll.combine(t, rest), x[rows]).square().sum()
            )
        )(own)
        got = torch.utils._pytree.tree_map(lambda t, i=i: t[i], found)
        close(got, mine, 1e-8)
        assert rows or all(not g.any() for g in leaves(got))


@every
def test_bind_takes_rows_and_trains_the_stack(case: Case) -> None:
    model, members = several(case, 3)
    stack, ids, x = ll.stack(members), [2, 0, -1, 0], normal(4, 3, 16)
    bound = ll.bind(model, ll.rows(stack, ids))
    y = bound(x)
    close(y.detach(), looped(model, members, ids, x).detach(), 1e-9)
    y.square().sum().backward()
    assert all(p.grad is None or not p.grad[1].any() for p in bound.parameters())
    assert any(p.grad is not None and p.grad[0].any() for p in bound.parameters())
    again = ll.unbind(bound)
    assert isinstance(again, ll.Adapter)
    close(again, stack, 0.0)


@every
def test_vmap_over_a_stack_of_unlike_strengths_is_a_loop(case: Case) -> None:
    model, _ = several(case, 1)
    members = [
        moved(start(case, model, case.config(r=4, alpha=alpha)), i)
        for i, alpha in enumerate((1.0, 8.0, 12.5))
    ]
    stack, x = ll.stack(members), normal(3, 16)
    ys = torch.func.vmap(lambda p: ll.apply(model, p, x))(stack)
    close(ys, torch.stack([ll.apply(model, p, x) for p in members]), 1e-10)
    ids = [1, 2, 0, -1, 1]
    x = normal(5, 2, 16)
    close(ll.apply(model, ll.rows(stack, ids), x), looped(model, members, ids, x), 1e-9)
    for i, member in enumerate(members):
        again = ll.unstack(stack)[i]
        assert again.layout == member.layout
        assert again.config.alpha == member.config.alpha
        assert all(torch.equal(a, b) for a, b in zip(leaves(again), leaves(member), strict=True))


# ---------------------------------------------------------------------------------- ranks and names
@every
def test_ranks_are_padded_or_refused_by_name(case: Case) -> None:
    model, _ = several(case, 1)
    members = [
        moved(start(case, model, case.config(r=r, alpha=a)), i)
        for i, (r, a) in enumerate(((2, 1.0), (8, 16.0), (4, 4.0)))
    ]
    path = next(iter(members[0].sites))
    names = {m.layout.names[path] for m in members}
    fixed = [name for name, s in members[0].layout.specs[path].items() if s.rank_axis is None]
    if len(names) > 1 or any(
        len({m.layout.specs[path][name].shape for m in members}) > 1 for name in fixed
    ):
        with pytest.raises(
            ll.StructureError,
            match=(
                r"stack: number 1 (has other tensors|differs) at "
                r"'layers.0.down'.*(padded|lora_w)"
            ),
        ):
            ll.stack(members)
        return
    stack, ids, x = ll.stack(members), [2, 0, 1, -1, 0], normal(5, 2, 16)
    close(ll.apply(model, ll.rows(stack, ids), x), looped(model, members, ids, x), 1e-9)
    for member, again in zip(members, ll.unstack(stack), strict=True):
        assert again.layout == member.layout
        assert again.config == member.config
        assert all(torch.equal(a, b) for a, b in zip(leaves(again), leaves(member), strict=True))


def test_padding_stays_zero_in_training() -> None:
    model, _ = several(CASES[0], 1)
    stack = ll.stack([moved(ll.init(model, ll.LoRAConfig(r=r)), r) for r in (2, 8)])
    trainable, frozen = ll.partition(stack)
    x = normal(4, 16)
    g = torch.func.grad(
        lambda t: ll.apply(model, ll.rows(ll.combine(t, frozen), [0, 1, 0, 1]), x).square().sum()
    )(trainable)
    assert not g["layers.0.up"]["lora_A"][0, 2:].any()
    assert not g["layers.0.up"]["lora_B"][0, :, 2:].any()
    assert g["layers.0.up"]["lora_B"][1, :, 2:].any()


def test_a_stack_has_names() -> None:
    model, (fr, de) = several(CASES[0], 2)
    stack = ll.stack({"fr": fr, "de": de})
    assert ll.names(stack) == ("fr", "de")
    assert ll.num_members(stack) == 2
    x = normal(4, 16)
    close(
        ll.apply(model, ll.rows(stack, ["de", None, "fr", "de"]), x),
        looped(model, [fr, de], [1, -1, 0, 1], x),
        1e-10,
    )
    close(stack[1], de, 0.0)
    close(stack[-1], de, 0.0)
    swapped = ll.update(stack, "fr", de)
    assert ll.names(swapped) == ("fr", "de")
    close(swapped[0], de, 0.0)
    close(ll.update(stack, 1, fr)[1], fr, 0.0)
    more = ll.concatenate([stack, ll.stack({"it": fr})])
    assert ll.names(more) == ("fr", "de", "it")
    assert ll.num_members(ll.concatenate([stack, ll.stack([fr])])) == 3
    with pytest.raises(ll.StructureError, match="two members are named 'fr'"):
        ll.concatenate([stack, stack])
    with pytest.raises(ll.StructureError, match="no member 'frr'; did you mean 'fr'"):
        ll.rows(stack, ["frr"])
    with pytest.raises(ll.StructureError, match="update: no member 'x'"):
        ll.update(stack, "x", fr)
    with pytest.raises(ll.StructureError, match="update: expected a member 0 to 1, found 2"):
        ll.update(stack, 2, fr)
    with pytest.raises(IndexError, match="expected a member 0 to 1 of the stack, found 2"):
        stack[2]


# ----------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 2], "row 1 has id 2, expected -1 .the bare base. to 1: the stack has 2 members"),
        ([-2], "row 0 has id -2"),
        (["a"], "'a' is a name, but the stack has none"),
        ([0.5], "expected ints, names or None, found float"),
        ([True], "expected ints, names or None, found bool"),
        (torch.zeros(2), r"expected integer ids \(N,\) .*, found torch.float32 of shape \(2,\)"),
        (torch.zeros(2, 2, 2, dtype=torch.int64), r"found torch.int64 of shape \(2, 2, 2\)"),
        ("ab", "expected a sequence of ids, found str"),
        (3, "expected a sequence of ids, found int"),
    ],
)
def test_ids_that_are_none(ids: Any, message: str) -> None:
    _, members = several(CASES[0], 2)
    with pytest.raises(ll.StructureError, match=f"rows: .*{message}"):
        ll.rows(ll.stack(members), ids)


def test_rows_of_what_is_no_stack() -> None:
    _, members = several(CASES[0], 2)
    with pytest.raises(
        ll.StructureError,
        match=r"rows: 'layers.0.down' lora_A: expected \(K, 4, 24\), found \(4, 24\)",
    ):
        ll.rows(members[0], [0])


def test_more_rows_than_ids_may_be_repeats_or_tokens() -> None:
    model = net()
    stack = ll.stack([ll.init(model, ll.LoRAConfig(r=2), seed=s) for s in (0, 1)])
    message = (
        r"repeat each id: ids.repeat_interleave\(3\); where this layer alone sees tokens "
        r"flattened, row by row, say so: rows\(..., flattened=\['layers.0.up'\]\)"
    )
    with pytest.raises(ll.StructureError, match=message):
        ll.apply(model, ll.rows(stack, [0, 1]), torch.randn(6, 16, dtype=torch.float64))


def test_a_leading_dimension_that_is_not_rows_is_refused_with_the_path() -> None:
    model, members = several(CASES[0], 2)
    mixed = ll.rows(ll.stack(members), [0, 1])
    with pytest.raises(
        ll.StructureError,
        match=r"site 'layers.0.up': rows expects .* 2 rows .* found shape \(6, 16\), 3 for each",
    ):
        ll.apply(model, mixed, normal(6, 16))
    with pytest.raises(
        ll.StructureError,
        match=r"site 'layers.0.up': rows expects .*found shape \(3, 16\)\. A layer",
    ):
        ll.apply(model, mixed, normal(3, 16))


def test_a_weight_that_is_read_without_a_call_is_refused_with_the_path() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.lin = nn.Conv1d(16, 16, 1), nn.Linear(16, 16)

        def forward(self, x: Tensor, kind: str) -> Tensor:
            return x @ getattr(self, kind).weight.view(16, 16).mT

    model = Reader().double()
    for kind, chosen in (("conv", {"target_kinds": "conv"}), ("lin", {})):
        members = [ll.init(model, ll.LoRAConfig(r=2, **chosen), seed=s) for s in (0, 1)]
        with pytest.raises(
            ll.UnsupportedError,
            match=f"'{kind}'.*the weight itself is used here, one for the whole batch",
        ):
            ll.apply(model, ll.rows(ll.stack(members), [0, 1]), normal(2, 16), kind)
    with pytest.raises(ll.UnsupportedError, match="one for the whole batch"):
        ll.merge(net(), ll.rows(ll.stack(several(CASES[0], 2)[1]), [0, 1]))


# -------------------------------------------------------------------------------------- composition
def test_rows_and_plain_adapters_compose_in_order() -> None:
    model, members = several(CASES[0], 3)
    gate = moved(ll.init(model, ll.IA3Config()), 9)
    others = several(next(c for c in CASES if c.name == "oft_4"), 2)[1]
    x, ids, second = normal(4, 2, 16), [2, -1, 0, 2], [1, 0, 1, -1]
    mixed = ll.rows(ll.stack(members), ids)
    turned = ll.rows(ll.stack(others), second)

    def of(members: list[ll.Adapter], i: int) -> tuple[ll.Adapter, ...]:
        return () if i < 0 else (members[i],)

    for order in (lambda a, b, c: (a, b, c), lambda a, b, c: (c, b, a), lambda a, b, c: (b, c, a)):
        pairs = enumerate(zip(ids, second, strict=True))
        wanted = [
            ll.apply(model, order(of(members, i), (gate,), of(others, j)), x[n : n + 1])
            for n, (i, j) in pairs
        ]
        close(ll.apply(model, order(mixed, gate, turned), x), torch.cat(wanted), 1e-9)


def test_a_method_that_reads_the_layer_goes_inside_rows() -> None:
    model, members = several(CASES[0], 2)
    dora = moved(ll.init(model, ll.DoRAConfig(r=2)), 3)
    mixed, x = ll.rows(ll.stack(members), [1, 0]), normal(2, 16)
    wanted = torch.cat(
        [ll.apply(model, (dora, members[i]), x[n : n + 1]) for n, i in enumerate((1, 0))]
    )
    close(ll.apply(model, (dora, mixed), x), wanted, 1e-10)
    with pytest.raises(
        ll.UnsupportedError,
        match="dora reads the layer underneath, which here is another one for each row",
    ):
        ll.apply(model, (mixed, dora), x)


# --------------------------------------------------------------------------------------- transforms
def test_one_graph_serves_every_mix_inside_a_compiled_call() -> None:
    model, members = several(CASES[0], 3)
    stack, x = ll.stack(members), normal(6, 2, 16)
    counter = CompileCounter()
    step = torch.compile(
        lambda s, ids, x: ll.apply(model, ll.rows(s, ids), x), fullgraph=True, backend=counter
    )
    for ids in ([0, 1, 2, 0, 1, 2], [2, 2, -1, 0, 0, 0], [-1] * 6, [1] * 6):
        close(step(stack, torch.tensor(ids), x), looped(model, members, ids, x), 1e-9)
    assert counter.frame_count == 1
    fewer = ll.stack(members[:2])  # more rows than members by more: the rows share chunks
    counter.clear()
    for ids in ([0, 1, 1, 0, 1, 0], [1, 1, -1, 1, 1, 1]):
        close(step(fewer, torch.tensor(ids), x), looped(model, members, ids, x), 1e-9)
    assert counter.frame_count <= 1


def test_one_graph_serves_every_value_of_rows() -> None:
    model, members = several(CASES[0], 3)
    stack, x = ll.stack(members), normal(6, 2, 16)
    counter = CompileCounter()
    step = torch.compile(
        lambda mixed, x: ll.apply(model, mixed, x), fullgraph=True, backend=counter
    )
    for ids in ([0, 1, 2, 0, 1, 2], [2, 2, -1, 0, 0, 0], [-1] * 6, [1] * 6):
        close(step(ll.rows(stack, ids), x), looped(model, members, ids, x), 1e-9)
    assert counter.frame_count == 1


def test_a_compiled_call_may_have_its_ids_as_numbers() -> None:
    model, members = several(CASES[0], 3)
    stack, x = ll.stack(members), normal(4, 2, 16)
    step = torch.compile(
        lambda s, x: ll.apply(model, ll.rows(s, [2, 0, None, 0]), x),
        fullgraph=True,
        backend="eager",
    )
    close(step(stack, x), looped(model, members, [2, 0, -1, 0], x), 1e-9)


def test_rows_is_a_tree_and_ids_may_be_mapped() -> None:
    model, members = several(CASES[0], 3)
    stack, x = ll.stack(members), normal(4, 16)
    mixed = ll.rows(stack, [1, -1, 0, 2])
    g = torch.func.grad(lambda m: ll.apply(model, m, x).square().sum())(mixed)
    close(
        g.stack,
        torch.func.grad(lambda s: ll.apply(model, ll.rows(s, [1, -1, 0, 2]), x).square().sum())(
            stack
        ),
        1e-12,
    )
    both = torch.tensor([[1, -1, 0, 2], [0, 0, 2, 2]])
    ys = torch.func.vmap(lambda ids: ll.apply(model, ll.rows(stack, ids), x))(both)
    close(ys, torch.stack([looped(model, members, ids, x) for ids in both.tolist()]), 1e-10)


def test_threads_do_not_meet() -> None:
    model, members = several(CASES[0], 3)
    stack, x = ll.stack(members), normal(5, 2, 16)
    mixes_ = [[0, 1, 2, 0, 1], [2, 1, 0, 0, -1], [1, 1, 1, 1, 1], [2, -1, 0, 2, 1]]
    wanted = [looped(model, members, ids, x) for ids in mixes_]
    shared = [ll.rows(stack, ids) for ids in mixes_]
    wrong: list[int] = []

    def work(i: int) -> None:
        for n in range(20):
            k = (i + n) % len(mixes_)
            if not torch.allclose(ll.apply(model, shared[k], x), wanted[k], atol=1e-9):
                wrong.append(k)

    in_threads(4, work)
    assert not wrong


def test_layers_that_share_an_input_sort_it_once_and_see_it_change() -> None:
    class Twin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(8, 8).double() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.q(x) + self.k(x)
            x.mul_(2.0)
            return y + self.v(x)

    model = Twin()
    members = [moved(ll.init(model, ll.LoRAConfig(r=2)), s) for s in (1, 2)]
    ids, x = [1, 0, 1], normal(3, 8)
    with torch.no_grad():
        wanted = torch.cat(
            [ll.apply(model, members[i], x[n : n + 1].clone()) for n, i in enumerate(ids)]
        )
        close(ll.apply(model, ll.rows(ll.stack(members), ids), x.clone()), wanted, 1e-10)


def unsorted() -> tuple[nn.Module, nn.Module]:
    """A linear layer bound with rows of unlike members in no order, and the same bound for each
    call anew.
    """
    model = nn.Linear(8, 8).double()
    mixed = ll.rows(
        ll.stack([moved(ll.init(model, ll.LoRAConfig(r=2)), s) for s in (1, 2, 3)]), [2, 0, 1, 0]
    )
    return ll.bind(model, mixed), ll.bind(model, mixed)


def test_a_sorted_input_that_comes_to_need_a_gradient_gets_all_of_it() -> None:
    kept, fresh = unsorted()
    x = normal(4, 8)
    kept(x)
    kept(x.requires_grad_()).sum().backward()
    again = x.detach().clone().requires_grad_()
    fresh(again).sum().backward()
    close(x.grad, again.grad, 1e-12)


def test_memory_that_others_write_on_is_read_again_in_each_call() -> None:
    kept, fresh = unsorted()
    memory = normal(4, 8).numpy()
    x = torch.from_numpy(memory)
    with torch.no_grad():
        for _ in range(3):
            memory += 1.0
            close(kept(x), fresh(x.clone()), 1e-12)


def test_a_layer_called_twice_has_one_gradient_with_and_without_a_graph_of_it() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(torch.tanh(self.inner(x)))

    model = Twice()
    members = [moved(ll.init(model, ll.LoRAConfig(r=2)), s) for s in (1, 2, 3)]
    bound = ll.bind(model, ll.rows(ll.stack(members), [0, 1, 2, 2, 2, 2]))
    tensors = [p for p in bound.parameters() if p.requires_grad]
    y = bound(normal(6, 8)).square().sum(1)
    wanted = torch.autograd.grad(y.sum(), tensors, retain_graph=True)
    close(torch.autograd.grad(y.sum(), tensors, create_graph=True), wanted, 1e-12)
    each = torch.autograd.grad(y, tensors, torch.eye(6, dtype=torch.float64), is_grads_batched=True)
    close([t.sum(0) for t in each], wanted, 1e-12)


@pytest.mark.parametrize("grad", [False, True])
def test_inputs_die_when_nobody_holds_them(grad: bool) -> None:
    kept, _ = unsorted()
    x = normal(4, 8).requires_grad_(grad)
    kept(x).sum().backward()
    gone = weakref.ref(x)
    del x
    assert gone() is None


# ----------------------------------------------------------------------------------------- storages
def test_no_base_weight_is_copied() -> None:
    model, members = several(CASES[0], 5, net(width=13, inner=29, out=7))
    stack, x = ll.stack(members), normal(6, 13)
    sizes = {p.shape for p in model.parameters()}
    made: list[tuple[int, ...]] = []

    class Census(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            known = {p.untyped_storage().data_ptr() for p in model.parameters()}
            for t in torch.utils._pytree.tree_leaves(out):
                if (
                    isinstance(t, Tensor)
                    and t.ndim > 1
                    and t.shape[-2:] in sizes
                    and t.untyped_storage().data_ptr() not in known
                ):
                    made.append(tuple(t.shape))
            return out

    for call in (
        lambda: ll.apply(model, ll.rows(stack, [3, 1, 0, -1, 4, 2]), x),
        lambda: torch.func.grad(
            lambda s: ll.apply(model, ll.rows(s, [*range(5), 4]), x).square().sum()
        )(stack),
        lambda: ll.bind(model, ll.rows(stack, [*range(5), 4]))(x),
        lambda: torch.func.vmap(lambda p: ll.apply(model, p, x))(stack),
    ):
        with Census():
            call()
    assert not made


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_rows_is_generation_one_by_one(beams: int) -> None:
    pytest.importorskip("transformers")
    model = FAMILIES["llama"].fresh()
    inputs, mask, ids = torch.randint(3, 50, (3, 7)), torch.ones(3, 7, dtype=torch.long), [1, -1, 0]
    mask[0, :3] = 0
    how = {
        "max_new_tokens": 5,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        "num_beams": beams,
    }
    configs = (
        ll.LoRAConfig(r=4),
        ll.HRAConfig(r=4),
        ll.DoRAConfig(r=4),
        ll.LoRAConfig(r=4, target_kinds=("embedding", "linear")),
    )
    for cfg in configs:
        members = [moved(ll.init(model, cfg, seed=seed), seed, 0.3) for seed in (1, 2)]
        rows = ll.rows(ll.stack(members), torch.tensor(ids).repeat_interleave(beams))
        mixed = ll.bind(model, rows).generate(inputs, attention_mask=mask, **how)
        for i, member in enumerate(ids):
            one = model if member < 0 else ll.bind(model, members[member])
            assert torch.equal(
                mixed[i : i + 1],
                one.generate(inputs[i : i + 1], attention_mask=mask[i : i + 1], **how),
            )


def test_a_trace_of_rows_is_refused_with_the_way_out() -> None:
    model = net()
    stack = ll.stack([ll.init(model, ll.LoRAConfig(r=2), seed=seed) for seed in (0, 1)])
    bound = ll.bind(model, ll.rows(stack, [0, 1, 1])).eval()
    with pytest.raises(
        ll.UnsupportedError, match=r"'layers\.0\.up'.*torch\.jit\.trace.*torch\.export"
    ):
        torch.jit.trace(bound, torch.zeros(3, 16, dtype=torch.float64))


class SharedExperts(nn.Module):
    """Mixtures of experts flatten their tokens for the router and the experts that all share."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.shared = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.up(x))
        return h + self.shared(h.reshape(-1, 16)).view_as(h)


@pytest.mark.parametrize(
    "config",
    [
        ll.LoRAConfig(r=2),
        ll.DoRAConfig(r=2),
        ll.HRAConfig(r=2),
        ll.IA3Config(),
        ll.LoRAConfig(r=2, target_parameters="weight"),
    ],
    ids=["lora", "dora", "hra", "ia3", "weight"],
)
@pytest.mark.parametrize(
    "ids", [[1, -1, 0], [[1] * 4, [-1, 0, 0, 1], [0] * 4]], ids=["row", "token"]
)
def test_layers_whose_tokens_are_flattened_row_by_row(config: ll.AdapterConfig, ids: Any) -> None:
    model, x = seeded(SharedExperts()), torch.randn(3, 4, 16, dtype=torch.float64)
    members = [moved(ll.init(model, config, seed=seed), seed=seed) for seed in (0, 1)]
    stack = ll.stack(members)
    with pytest.raises(ll.StructureError, match=r"'shared.*say so: rows\(..., flattened=\['shared"):
        ll.apply(model, ll.rows(stack, ids), x)
    mixed = ll.rows(stack, ids, flattened="shared")
    each = [ll.apply(model, member, x) for member in members] + [model(x)]
    which = (
        torch.tensor(ids).expand(3, 4) if isinstance(ids[0], list) else torch.tensor(ids)[:, None]
    )
    wanted = torch.stack(each).gather(
        0, (which % 3).expand(3, 4)[None, :, :, None].expand(1, 3, 4, 16)
    )
    bound = ll.bind(model, mixed)
    close(ll.apply(model, mixed, x), wanted[0], 1e-5)
    close(bound(x), wanted[0], 1e-5)
    if not isinstance(ids[0], list):
        close(bound(x[:, :2]), wanted[0][:, :2], 1e-5)
        close(bound(x[:, :1]), wanted[0][:, :1], 1e-5)


def test_a_pattern_of_flattened_layers_matches_one() -> None:
    stack = ll.stack([ll.init(net(), ll.LoRAConfig(r=2))])
    with pytest.raises(ll.StructureError, match=r"rows: flattened: 'layers.0.upp' matches no site"):
        ll.rows(stack, [0], flattened="layers.0.upp")
