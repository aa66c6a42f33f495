"""Rows with adapters of their own where a weight itself is adapted: every method on every kind of
place, equal to loops.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from cases import CASES, Case
from helpers import close, leaves, moved, normal, same_state, seeded, snapshot
from places import Experts, Mixing, Own, Scaled, Transposed, features, method
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import lora_lite_func as ll

Make = Callable[[], nn.Module]


class Tokens(nn.Module):
    """Bare parameters as vision transformers have them: a token before the others, positions, and a
    matrix that is used twice.
    """

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.empty(1, 1, 16))
        self.mix = nn.Parameter(torch.empty(16, 16))

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) @ self.mix
        return (x if scale is None else x * scale) @ self.mix.mT


class Attention(nn.Module):
    """torch's attention as one tensor to another, batch first or second."""

    def __init__(self, batch_first: bool, **sizes: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=batch_first, **sizes)
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        if not self.batch_first:
            x = x.transpose(0, 1)
        key, value = x[..., : self.attention.kdim], x[..., : self.attention.vdim]
        y, weights = self.attention(x, key, value)
        return (y if self.batch_first else y.transpose(0, 1)) + weights.sum(-1, keepdim=True)


class Recurrent(nn.Module):
    """A recurrent layer, its output and its last states, rows first or second."""

    def __init__(self, kind: Any, batch_first: bool) -> None:
        super().__init__()
        self.layer = kind(16, 8, 2, batch_first=batch_first, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        first = self.layer.batch_first
        y, states = self.layer(x if first else x.transpose(0, 1))
        last = sum(states) if isinstance(states, tuple) else states
        return torch.cat(
            [(y if first else y.transpose(0, 1)).flatten(1), last.transpose(0, 1).flatten(1)], 1
        )


class Activated(nn.Module):
    """A layer and a function that it holds as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.layer = F.relu, nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.layer(x))


class Around(nn.Module):
    """A bare matrix before such layers."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.empty(16, 16))
        self.inner, self.last = Activated(), Activated()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x @ self.mix))


class Twice(nn.Bilinear):
    """A bilinear form of one input."""

    def forward(self, input1: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input1, torch.tanh(input1))


def ids(rows: int) -> Tensor:
    return torch.randint(0, 16, (rows, 3), generator=torch.Generator().manual_seed(2))


def shaped(*shape: int) -> Callable[[int], Tensor]:
    return lambda rows: features(rows, *shape)


PLACES: dict[str, tuple[str, Make, Callable[[int], Tensor], dict[str, Any]]] = {
    "conv1": (
        "conv",
        lambda: nn.Conv1d(8, 16, 3, stride=2, dilation=2, padding=2, padding_mode="reflect"),
        shaped(8, 9),
        {},
    ),
    "conv2": (
        "conv",
        lambda: nn.Conv2d(8, 16, 2, stride=2, padding=1, padding_mode="circular", groups=2),
        shaped(8, 5, 6),
        {},
    ),
    "conv3": (
        "conv",
        lambda: nn.Conv3d(4, 8, (2, 1, 4), padding=2, groups=4),
        shaped(4, 3, 2, 4),
        {},
    ),
    "deconv": ("conv", lambda: nn.ConvTranspose2d(8, 16, 2, 2, groups=2), shaped(8, 3, 2), {}),
    "own": ("embedding", lambda: Own(16, 16), ids, {}),
    "bounded": ("embedding", lambda: Scaled(17, 16, max_norm=1.0), ids, {}),
    "bag": ("embedding", lambda: nn.EmbeddingBag(16, 16, mode="sum"), ids, {}),
    "layer_norm": ("norm", lambda: nn.LayerNorm((2, 8)), shaped(3, 2, 8), {}),
    "batch_norm": ("norm", lambda: nn.BatchNorm2d(16), shaped(16, 2, 3), {}),
    "group_norm": ("norm", lambda: nn.GroupNorm(2, 16), shaped(16, 2), {}),
    "instance_norm": ("norm", lambda: nn.InstanceNorm1d(16, affine=True), shaped(16, 5), {}),
    "linear": (
        "parameter",
        lambda: nn.Linear(16, 24),
        shaped(3, 16),
        {"target_parameters": "weight"},
    ),
    "turned": (
        "parameter",
        lambda: Transposed(24, 16),
        shaped(3, 16),
        {"target_parameters": "weight", "transposed_parameters": "w"},
    ),
    "matrix": ("parameter", lambda: Mixing(16), shaped(3, 16), {"target_parameters": "mix"}),
    "tokens": ("parameter", Tokens, shaped(3, 16), {"target_parameters": "mix"}),
    "bilinear": (
        "parameter",
        lambda: Twice(16, 16, 8),
        shaped(3, 16),
        {"target_parameters": "weight"},
    ),
    "vector": ("vector", lambda: Mixing(16), shaped(3, 16), {"target_parameters": "gain"}),
    "attention": (
        "parameter",
        lambda: Attention(True),
        shaped(3, 16),
        {"target_parameters": "in_proj_weight"},
    ),
    "out_proj": ("linear", lambda: Attention(False), shaped(3, 16), {"target_names": "out_proj"}),
    "separate": (
        "parameter",
        lambda: Attention(False, kdim=8, vdim=8),
        shaped(3, 16),
        {"target_parameters": "proj_weight|out_proj.weight"},
    ),
    "lstm": (
        "parameter",
        lambda: Recurrent(nn.LSTM, True),
        shaped(3, 16),
        {"target_parameters": "weight_[ih]h_l[01]$"},
    ),
    "gru": (
        "parameter",
        lambda: Recurrent(nn.GRU, False),
        shaped(3, 16),
        {"target_parameters": "weight_hh_l1$"},
    ),
}
"""By name: kind, model, rows -> input, how the site is chosen."""

EVERY = [
    (case, name)
    for case in CASES
    for name, (kind, *_) in PLACES.items()
    if kind in ll.variants()[method(case)].sites
]
FEW = [
    (case, name)
    for case, name in EVERY
    if case.name in ("lora", "dora", "ln_tuning", "full", "ia3", "bitfit")
]
ALL = [
    (case, name)
    for case, name in EVERY
    if name in ("conv2", "own", "matrix", "group_norm", "vector") or (case, name) in FEW
]
SOME = [
    (case, name)
    for case, name in FEW
    if case.name in ("lora", "ln_tuning", "full") and name not in ("lstm", "gru", "bounded", "bag")
]
places = lambda chosen: pytest.mark.parametrize(("case", "name"), chosen, ids=str)  # noqa: E731


def several(case: Case, name: str, count: int = 3) -> tuple[nn.Module, list[ll.Adapter]]:
    """A model and adapters of one method on one kind of place, as if trained."""
    kind, build, _, chosen = PLACES[name]
    model = seeded(build())
    first = ll.init(model, case.config(r=4, **(chosen or {"target_kinds": kind})), seed=3)
    return model, [moved(first, seed) for seed in range(count)]


def looped(model: nn.Module, members: list[Any], of: list[int], x: Tensor) -> Tensor:
    """Each row by its own adapter, one call per row."""
    return torch.cat(
        [ll.apply(model, members[i] if i >= 0 else {}, x[n : n + 1]) for n, i in enumerate(of)]
    )


# ------------------------------------------------------------------------------------- every method
@places(ALL)
def test_rows_is_a_loop_and_gradients_are_each_member_s_own(case: Case, name: str) -> None:
    model, members = several(case, name)
    before = snapshot(model)
    for of in ([2, 0, -1, 0, 2], [0, 0, 2], [-1, -1], [0]):
        x = PLACES[name][2](len(of))
        trainable, frozen = ll.partition(ll.stack(members))

        def mixed(t: Any, of: Any = of, x: Any = x, frozen: Any = frozen) -> Any:
            return ll.apply(model, ll.rows(ll.combine(t, frozen), of), x)

        close(mixed(trainable), looped(model, members, of, x), 1e-9)
        found = torch.func.grad(lambda t, mixed=mixed: mixed(t).square().sum())(trainable)
        for i, member in enumerate(members):
            mine, rest = ll.partition(member)
            rows = x[[n for n, j in enumerate(of) if j == i]]
            got = pytree.tree_map(lambda t, i=i: t[i], found)
            if not len(rows):
                assert all(not g.any() for g in leaves(got))
                continue
            alone = torch.func.grad(
                lambda t, rest=rest, rows=rows: (
                    ll.apply(model, ll.combine(t, rest), rows).square().sum()
                )
            )(mine)
            close(got, alone, 1e-8)
    assert same_state(before, snapshot(model))


@places(FEW)
def test_bound_rows_train_the_stack(case: Case, name: str) -> None:
    model, members = several(case, name)
    stack, of = ll.stack(members), [2, 0, -1, 0]
    x = PLACES[name][2](4)
    bound = ll.bind(model, ll.rows(stack, of))
    y = bound(x)
    close(y.detach(), looped(model, members, of, x).detach(), 1e-9)
    y.square().sum().backward()
    trained = [p for p in bound.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad[0].any() and not p.grad[1].any() for p in trained)
    close(ll.unbind(bound), stack, 0.0)


@places(SOME)
def test_one_graph_serves_every_mix(case: Case, name: str) -> None:
    torch._dynamo.reset()
    model, members = several(case, name)
    stack, x, counter = ll.stack(members), PLACES[name][2](4), CompileCounter()
    step = torch.compile(
        lambda s, of, x: ll.apply(model, ll.rows(s, of), x), fullgraph=True, backend=counter
    )
    for of in ([2, 0, -1, 0], [1, 1, 1, 2], [-1, -1, -1, -1]):
        close(step(stack, torch.tensor(of), x), looped(model, members, of, x), 1e-9)
    assert counter.frame_count == 1


# ----------------------------------------------------------------------------------- beside the law
@pytest.mark.parametrize("how", ["inference", "inference_grad", "fake", "grad"])
@pytest.mark.parametrize("name", ["conv2", "layer_norm", "own", "out_proj"])
def test_rows_that_were_first_seen_in_another_mode_train(name: str, how: str) -> None:
    case = next(
        case for case in CASES if case.name == ("ln_tuning" if name == "layer_norm" else "lora")
    )
    (model, members), x = several(case, name), PLACES[name][2](4)
    mixed = [ll.rows(ll.stack(members), [2, 0, -1, 0]) for _ in range(2)]
    kept, fresh = (ll.bind(model, m) for m in mixed)
    if how == "fake":
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            kept(fake.from_tensor(x))
    elif how == "grad":
        torch.func.grad(lambda m: ll.apply(model, m, x).sum())(mixed[0])
    else:
        with torch.inference_mode(), torch.set_grad_enabled(how == "inference_grad"):
            kept(x)
    gradients = []
    for bound in (kept, fresh):
        tensors = [p for p in bound.parameters() if p.requires_grad]
        gradients.append(torch.autograd.grad(bound(x).square().sum(), tensors))
    close(gradients[0], gradients[1], 1e-12)


def test_two_stacks_of_other_rows_and_a_plain_adapter_compose_in_order() -> None:
    model, x = seeded(Attention(False)), features(4, 3, 16)
    turned = [
        moved(ll.init(model, ll.LoRAConfig(r=2, target_parameters="in_proj_weight"), seed=s), s)
        for s in range(3)
    ]
    gates = [
        moved(
            ll.init(
                model,
                ll.IA3Config(target_parameters="in_proj_weight", target_names="out_proj"),
                seed=s,
            ),
            s,
        )
        for s in (1, 2)
    ]
    plain = moved(ll.init(model, ll.DoRAConfig(r=2, target_names="out_proj")), 7)
    of, second = [2, -1, 0, 2], [1, 0, -1, -1]
    first, other = ll.rows(ll.stack(turned), of), ll.rows(ll.stack(gates), second)
    for order in (lambda a, b, c: (a, b, c), lambda a, b, c: (c, b, a)):
        pick = lambda members, i: members[i] if i >= 0 else ()  # noqa: E731
        pairs = enumerate(zip(of, second, strict=True))
        wanted = [
            ll.apply(model, order(pick(turned, i), plain, pick(gates, j)), x[n : n + 1])
            for n, (i, j) in pairs
        ]
        close(ll.apply(model, order(first, plain, other), x), torch.cat(wanted), 1e-9)
        close(ll.bind(model, order(first, plain, other))(x), torch.cat(wanted), 1e-9)
        step = torch.compile(
            lambda a, b, x, order=order: ll.apply(model, order(a, plain, b), x),
            fullgraph=True,
            backend="eager",
        )
        close(step(first, other, x), torch.cat(wanted), 1e-9)
    both = torch.tensor([of, [0, 1, 2, -1]])
    ys = torch.func.vmap(lambda ids: ll.apply(model, ll.rows(ll.stack(turned), ids), x))(both)
    close(ys, torch.stack([looped(model, turned, ids, x) for ids in both.tolist()]), 1e-10)


def test_layers_inside_hold_functions() -> None:
    model, x, of = seeded(Around()), features(4, 3, 16), [2, 0, -1, 0]
    chosen = {"target_names": "inner.layer", "target_parameters": "^mix"}
    first = ll.init(model, ll.LoRAConfig(r=2, **chosen), seed=3)
    members = [moved(first, seed) for seed in range(3)]
    wanted, rows = looped(model, members, of, x), ll.rows(ll.stack(members), of)
    close(ll.apply(model, rows, x), wanted, 1e-9)
    bound = ll.bind(model, rows)
    for _ in range(2):
        close(bound(x), wanted, 1e-9)


@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_s_masks_go_with_their_rows(batch_first: bool) -> None:
    model = seeded(nn.MultiheadAttention(16, 2, batch_first=batch_first))
    members = [
        moved(
            ll.init(
                model,
                ll.LoRAConfig(r=2, target_names="out_proj", target_parameters="in_proj_weight"),
                seed=s,
            ),
            s,
        )
        for s in range(2)
    ]
    of, x = [1, 0, -1], features(3, 4, 16)
    hidden = torch.tensor([[0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 1]]).bool()
    seen = normal(6, 4, 4, seed=1)
    turn = lambda t: t if batch_first else t.transpose(0, 1)  # noqa: E731
    for mask in (None, seen[0], seen):
        y, weights = ll.apply(
            model,
            ll.rows(ll.stack(members), of),
            *[turn(x)] * 3,
            key_padding_mask=hidden.double() * -9,
            attn_mask=mask,
        )
        for n, i in enumerate(of):
            own = mask if mask is None or mask.ndim == 2 else mask[2 * n : 2 * n + 2]
            one = [turn(x[n : n + 1])] * 3
            z, w = ll.apply(
                model,
                members[i] if i >= 0 else {},
                *one,
                key_padding_mask=hidden[n : n + 1].double() * -9,
                attn_mask=own,
            )
            close(turn(y)[n : n + 1], turn(z), 1e-10)
            close(weights[n : n + 1], w, 1e-10)


def test_states_of_a_recurrent_layer_go_with_their_rows() -> None:
    model = seeded(nn.LSTM(16, 8))
    members = [
        moved(ll.init(model, ll.LoRAConfig(r=2, target_parameters="weight"), seed=s), s)
        for s in range(2)
    ]
    of, x, states = [1, -1, 0], features(5, 3, 16), (features(1, 3, 8), features(1, 3, 8) * 2)
    y, (h, c) = ll.apply(model, ll.rows(ll.stack(members), of), x, states)
    for n, i in enumerate(of):
        own = tuple(s[:, n : n + 1].contiguous() for s in states)
        one = ll.apply(model, members[i] if i >= 0 else {}, x[:, n : n + 1], own)
        close([y[:, n : n + 1], h[:, n : n + 1], c[:, n : n + 1]], [one[0], *one[1]], 1e-10)
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 4, 2]))
    with pytest.raises(
        ll.UnsupportedError,
        match=r"'': rows of a packed sequence can't have adapters of their own; give it padded",
    ):
        ll.apply(model, ll.rows(ll.stack(members), of), packed)


def test_a_gradient_for_each_sample_of_a_convolution() -> None:
    model = seeded(nn.Conv2d(8, 16, 3))
    params, x = moved(ll.init(model, ll.LoRAConfig(r=2, target_kinds="conv"))), features(3, 8, 5, 5)
    found = ll.per_sample_grads(model, params, lambda y, x: y.square().flatten(1).sum(1), x)
    for n in range(3):
        own = torch.func.grad(lambda p, n=n: ll.apply(model, p, x[n : n + 1]).square().sum())(
            params
        )
        close(found[n], own, 1e-10)


def test_a_stranger_s_further_tensors() -> None:
    model = seeded(Tokens())
    members = [
        moved(ll.init(model, ll.LoRAConfig(r=2, target_parameters="mix"), seed=s), s)
        for s in range(2)
    ]
    mixed, x = ll.rows(ll.stack(members), [1, 0, 1]), features(3, 4, 16)
    # a scale for each row, or one for all rows
    for scale in (features(3, 1, 1), features(1, 5, 16), features(1)[0], features(16)):
        own = [scale[n : n + 1] if scale.shape == (3, 1, 1) else scale for n in range(3)]
        wanted = [
            ll.apply(model, members[i], x[n : n + 1], own[n]) for n, i in enumerate((1, 0, 1))
        ]
        close(ll.apply(model, mixed, x, scale), torch.cat(wanted), 1e-10)
    with pytest.raises(
        ll.UnsupportedError,
        match=r"'' .Tokens.: is given a tensor of shape .5, 1. beside .*can't be told",
    ):
        ll.apply(model, mixed, x, features(5, 1))
    with pytest.raises(
        ll.UnsupportedError,
        match=r"'' .Tokens.: is given a tensor of shape .3, 1, 1. beside .* is the 3 rows",
    ):
        ll.apply(model, mixed, features(3, 3, 16), features(3, 1, 1))
    with pytest.raises(
        ll.UnsupportedError,
        match=r"'' .Tokens.: is given a SimpleNamespace, in which rows can't be told apart",
    ):
        ll.apply(model, mixed, x, SimpleNamespace())


@pytest.mark.parametrize(
    ("build", "chosen", "x", "error", "message"),
    [
        (
            lambda: nn.Conv1d(4, 4, 1),
            {"target_kinds": "conv"},
            (2, 4),
            ll.UnsupportedError,
            "shape .2, 4., which has no dimension of rows",
        ),
        (
            lambda: nn.Conv1d(4, 4, 1),
            {"target_kinds": "conv"},
            (6, 4, 2),
            ll.StructureError,
            "2 rows .*found shape .6, 4, 2., 3",
        ),
        (
            lambda: nn.LayerNorm(4),
            {"target_kinds": "norm"},
            (4,),
            ll.UnsupportedError,
            "shape .4,., which has no dimension of rows",
        ),
        (
            lambda: nn.InstanceNorm1d(2, affine=True),
            {"target_kinds": "norm"},
            (2, 4),
            ll.UnsupportedError,
            "no dimension of rows",
        ),
        (
            lambda: nn.BatchNorm1d(4).train(),
            {"target_kinds": "norm"},
            (2, 4),
            ll.UnsupportedError,
            "statistics of its BatchNorm1d",
        ),
        (
            lambda: Experts(2, 4, 4, False),
            {"target_parameters": "proj"},
            (6, 4),
            ll.StructureError,
            "A layer that mixes rows",
        ),
    ],
)
def test_rows_that_are_none(
    build: Make, chosen: dict[str, Any], x: tuple[int, ...], error: Any, message: str
) -> None:
    model = build()
    members = [
        ll.init(
            model,
            (ll.LNTuningConfig if chosen.get("target_kinds") == "norm" else ll.LoRAConfig)(
                **chosen
            ),
        )
        for _ in range(2)
    ]
    with pytest.raises(error, match=message):
        ll.apply(model, ll.rows(ll.stack(members), [0, 1]), torch.randn(*x))


def test_batch_statistics_go_with_no_row_but_no_row_is_needed_in_eval_mode() -> None:
    model = seeded(nn.BatchNorm1d(4))
    members = [moved(ll.init(model, ll.LNTuningConfig()), s) for s in range(2)]
    x = features(3, 4)
    close(
        ll.apply(model, ll.rows(ll.stack(members), [1, 0, -1]), x),
        looped(model, members, [1, 0, -1], x),
        1e-12,
    )


class Gained(nn.Module):
    """A block as ConvNeXt's: bare parameters beside layers."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.empty(16))
        self.mix = nn.Parameter(torch.empty(16, 16))
        self.inner = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.Conv1d(3, 3, 1))
        self.attend = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x) * self.gain
        return (x + self.attend(y, y, y, need_weights=False)[0]) @ self.mix


@pytest.mark.parametrize("deep", [True, False])
def test_a_site_around_other_sites(deep: bool) -> None:
    model = seeded(nn.Sequential(Gained(), Gained()) if deep else Gained())
    chosen = {
        "target_kinds": ("linear", "conv", "norm"),
        "target_parameters": ("gain", "in_proj_weight"),
    }
    gates = [moved(ll.init(model, ll.IA3Config(**chosen), seed=s), s) for s in range(3)]
    turns = [
        moved(
            ll.init(model, ll.LoRAConfig(r=2, target_names="1$", target_parameters="mix"), seed=s),
            s,
        )
        for s in range(2)
    ]
    assert len(gates[0]) == (12 if deep else 6)
    of, other, x = [2, 0, -1, 0, 2], [0, 1, 1, -1, 0], features(5, 3, 16)
    pick = lambda members, i: members[i] if i >= 0 else ()  # noqa: E731
    rows = enumerate(zip(of, other, strict=True))
    wanted = torch.cat(
        [ll.apply(model, (pick(gates, i), pick(turns, j)), x[n : n + 1]) for n, (i, j) in rows]
    )
    stacks = ll.stack(gates), ll.stack(turns)
    both = lambda a, b, x: ll.apply(model, (ll.rows(a, of), ll.rows(b, other)), x)  # noqa: E731
    before = snapshot(model)
    close(both(*stacks, x), wanted, 1e-10)
    bound = ll.bind(model, (ll.rows(stacks[0], of), ll.rows(stacks[1], other)))
    for _ in range(2):
        close(bound(x), wanted, 1e-10)
    if not deep:
        mixed = lambda i, j, x: ll.apply(model, (ll.rows(stacks[0], i), ll.rows(stacks[1], j)), x)  # noqa: E731
        step = torch.compile(mixed, fullgraph=True, backend="eager")
        close(step(torch.tensor(of[1:3]), torch.tensor(other[1:3]), x[1:3]), wanted[1:3], 1e-10)
    assert same_state(before, snapshot(model))


def test_a_site_around_a_batch_norm() -> None:
    model = seeded(Gained())
    model.inner[0] = nn.BatchNorm1d(3).double().train()
    members = [moved(ll.init(model, ll.IA3Config(target_parameters="gain")), s) for s in range(2)]
    with pytest.raises(
        ll.UnsupportedError, match="'': statistics of its BatchNorm1d are the whole batch's"
    ):
        ll.apply(model, ll.rows(ll.stack(members), [0, 1]), features(2, 3, 16))
