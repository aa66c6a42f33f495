"""A plain linear layer with one adapter: the forms it may take are one function; dropout keeps
nothing and is differentiated right.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
import torch.utils._pytree as pytree
from helpers import close, leaves, moved, net
from linear_layers import rows, wet
from torch import Tensor, nn

import lora_lite_func as ll
from benchmarks.measure.harness import saved
from lora_lite_func.injection import linear as plain
from lora_lite_func.kernels import cost as _cost
from lora_lite_func.kernels import dropout
from lora_lite_func.kernels import low_rank_fused as fused
from lora_lite_func.kernels import low_rank_rows as fused_rows

LOW_RANK = [
    ll.LoRAConfig(r=4),
    ll.LoRAConfig(r=4, rslora=True),
    ll.PiSSAConfig(r=4),
    ll.AdaLoRAConfig(r=4),
    ll.DeLoRAConfig(r=4),
]


def by_phases(monkeypatch: pytest.MonkeyPatch, call: Any) -> Any:
    """A call where nothing is ordinary, so that phases make every output."""
    with monkeypatch.context() as patch:
        patch.setattr(plain, "surroundings", lambda: None)
        return call()


# ---------------------------------------------------------------------------------- without a graph
@pytest.mark.parametrize("cfg", LOW_RANK, ids=lambda cfg: type(cfg).__name__)
@pytest.mark.parametrize(
    "shape",
    [(), (1,), (3,), (200,), (1, 1), (1, 200), (2, 3), (2, 200), (2, 1, 3), (0,), (2, 0, 3)],
    ids=str,
)
def test_every_form_is_the_phases(
    cfg: ll.AdapterConfig, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = net(bias=True), rows(*shape)
    start = ll.init(model, cfg)
    with torch.no_grad():
        if not isinstance(cfg, ll.DeLoRAConfig):  # whose start moves the base by rounding
            assert torch.equal(ll.apply(model, start, x), model(x))
        params = moved(start)
        y = ll.apply(model, params, x)
        close(y, by_phases(monkeypatch, lambda: ll.apply(model, params, x)), 1e-12)
        assert torch.equal(y, ll.bind(model, params)(x))
        turned = (
            rows(*shape[::-1]).permute(*reversed(range(len(shape))), -1) if len(shape) > 1 else x
        )
        close(ll.apply(model, params, turned), ll.apply(model, params, turned.contiguous()), 1e-12)


def test_recomputed_linear_for_many_rows_two_beside_the_layer_for_few(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str] = []
    for name in ("linear_with_low_rank", "low_rank", "one_row"):
        patched = functools.partial(_noted, seen, name, getattr(plain, name))
        monkeypatch.setattr(plain, name, patched)
    model = nn.Sequential(nn.Linear(16, 16, dtype=torch.float64))
    params = moved(ll.init(model, ll.LoRAConfig(r=2)))
    with torch.no_grad():
        ll.apply(model, params, rows(1))
        ll.apply(model, params, rows(72))
        ll.apply(model, params, rows(73))
        # W' would round the update away
        ll.apply(model.bfloat16(), ll.cast(params, torch.bfloat16), rows(90).bfloat16())
    assert seen == ["one_row", "linear_with_low_rank", "linear_with_low_rank"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(48,), (1, 48), (1, 1, 48), (1, 1, 1, 48)])
def test_one_row_is_the_layers_own_bit_by_bit_until_it_is_adapted(
    dtype: torch.dtype, bias: bool, shape: tuple[int, ...]
) -> None:
    model = nn.Sequential(nn.Linear(48, 80, bias=bias, dtype=dtype))
    x = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(3))
    start = ll.init(model, ll.LoRAConfig(r=3))
    params = moved(start)
    with torch.no_grad():
        assert torch.equal(ll.apply(model, start, x), model(x))
        y = ll.apply(model, params, x)
        assert y.shape == (*shape[:-1], 80)
        twice = ll.apply(model, params, x.expand(2, *shape).reshape(2, -1, 48))[0].reshape(y.shape)
        close(y, twice, 32 * torch.finfo(dtype).eps)  # an entry is a sum of 48 of about 1


def _noted(seen: list[str], name: str, call: Any, *args: Any) -> Any:
    seen.append(name)
    return call(*args)


def test_other_dtypes_autocast_tangents_and_base_weights_are_left_to_the_phases() -> None:
    model, x = net(dtype=torch.float32), rows(40, dtype=torch.float32)
    params = moved(ll.init(model, ll.LoRAConfig(r=4, dtype=torch.float64)))
    with torch.no_grad():
        wide = ll.apply(model.double(), params, x.double())
        close(ll.apply(model.float(), params, x), wide, 1e-5)
        params = ll.cast(params, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            assert ll.apply(model, params, x).dtype == torch.bfloat16
        tangent = torch.ones_like(x)
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(
                ll.apply(model, params, forward_ad.make_dual(x, tangent))
            ).tangent
        assert dual is not None
        there = [
            ll.apply(model.double(), ll.cast(params, torch.float64), x.double() + nudge)
            for nudge in (1e-6, -1e-6)
        ]
        close(dual, (there[0] - there[1]) / 2e-6, 1e-4)
    base = {name: t.float().requires_grad_() for name, t in model.state_dict().items()}
    model.float()
    y = ll.functional_call(model, params, x, base=base)
    assert all(
        g.abs().max() > 0 for g in torch.autograd.grad(y.square().sum(), list(base.values()))
    )
    traced = torch.jit.trace(ll.bind(model, params).eval(), x, check_trace=False)
    close(traced(x[:3]), ll.apply(model, params, x[:3]), 1e-5)


# ------------------------------------------------------------------------------------------ dropout


def test_dropout_is_unbiased_in_its_share_and_ruled_by_the_seed() -> None:
    x = torch.ones(300, 401)
    for p in (0.1, 0.5, 0.9, 1e-3):
        mask = dropout.mask(x, p, 7)
        assert set(mask.unique().tolist()) == {0.0, 1.0}
        share, error = (mask == 0).double().mean().item(), (p * (1 - p) / x.numel()) ** 0.5
        assert abs(share - p) < 5 * error + 2**-16
        assert abs(dropout.gain(p) * (1 - round(p * 65536) / 65536) - 1) < 1e-12
        assert torch.equal(mask, dropout.mask(x, p, 7))
        assert not torch.equal(mask, dropout.mask(x, p, 8))
    columns = dropout.mask(torch.ones(4000, 64), 0.5, 1).ne(0).double().mean(0)
    assert (columns - 0.5).abs().max() < 0.05
    model, params = wet()
    x = rows(5, 7)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(ll.apply(model, params, x))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


def test_the_mean_over_many_masks_is_the_output_without() -> None:
    model = nn.Sequential(nn.Linear(16, 3, dtype=torch.float64)).train()
    params = moved(ll.init(model, ll.LoRAConfig(r=2, dropout=0.3)), size=0.5)
    x = rows(1).expand(20_000, 16).contiguous()
    y = ll.apply(model, params, x)
    dry = ll.apply(model.eval(), params, x[:1])
    spread = y.std(0) / 20_000**0.5
    assert ((y.mean(0) - dry[0]).abs() < 5 * spread).all()


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(3,), (1, 5), (2, 3)])
def test_gradients_of_one_function_are_exact_twice(shape: tuple[int, ...], p: float) -> None:
    gen = torch.Generator().manual_seed(0)
    W, b, A, B = (
        torch.randn(s, generator=gen, dtype=torch.float64) for s in ((4, 16), (4,), (2, 16), (4, 2))
    )
    x = rows(*shape).requires_grad_()

    def call(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        torch.manual_seed(5)
        return fused.low_rank(x, W, b, A, B, 1.5, p, transformed=True)

    given = (x, A.requires_grad_(), B.requires_grad_())
    assert torch.autograd.gradcheck(call, given)
    assert torch.autograd.gradgradcheck(call, given)
    y, cotangents = (
        call(*given),
        torch.eye(4, dtype=torch.float64)[:, None]
        .expand(4, x.numel() // 16, 4)
        .reshape(4, *shape, 4),
    )
    each = [torch.autograd.grad(y, given, one, retain_graph=True) for one in cotangents]
    for many, one in zip(
        torch.autograd.grad(y, given, cotangents, is_grads_batched=True),
        zip(*each, strict=True),
        strict=True,
    ):
        close(many, torch.stack(one), 1e-12)
    torch.manual_seed(5)
    mask = dropout.mask(x.detach().reshape(-1, 16), 0.5, int(torch.randint(1 << 62, ()))).view(
        x.shape
    )
    dropped = 2.0 * x * mask if p else x
    close(y, F.linear(x, W, b) + 1.5 * dropped @ A.mT @ B.mT, 1e-12)


@pytest.mark.parametrize("cfg", LOW_RANK, ids=lambda cfg: type(cfg).__name__)
@pytest.mark.parametrize("shape", [(1,), (3,), (200,), (2, 3), (2, 0, 3)], ids=str)
def test_a_training_step_is_the_phases(
    cfg: ll.AdapterConfig, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = nn.Sequential(net(bias=True), nn.ReLU(inplace=True)), rows(*shape).requires_grad_()
    trainable, frozen = ll.partition(moved(ll.init(model, cfg)))
    flat, tree = pytree.tree_flatten(trainable)
    given = (x, *(t.requires_grad_() for t in flat))

    def step() -> tuple[Tensor, ...]:
        y = ll.apply(model, ll.combine(pytree.tree_unflatten(list(given[1:]), tree), frozen), x)
        return y, *torch.autograd.grad(y.square().sum(), given)

    for one, other in zip(step(), by_phases(monkeypatch, step), strict=True):
        close(one, other, 1e-11)


@pytest.mark.parametrize(
    "cfg",
    [cfg for cfg in LOW_RANK if not isinstance(cfg, ll.PiSSAConfig)],
    ids=lambda cfg: type(cfg).__name__,
)
@pytest.mark.parametrize("shape", [(), (3,), (1, 3), (2, 3)], ids=str)
def test_gradients_lie_as_their_tensors_do_so_they_can_be_flattened(
    cfg: ll.AdapterConfig, shape: tuple[int, ...]
) -> None:
    model, x = net(bias=True), rows(*shape)
    trainable, frozen = ll.partition(moved(ll.init(model, cfg)))

    def loss(trainable: Any) -> Tensor:
        return ll.apply(model, ll.combine(trainable, frozen), x).square().sum()

    flat = [t.requires_grad_() for t in leaves(trainable)]
    direct = nn.utils.parameters_to_vector(torch.autograd.grad(loss(trainable), flat))
    close(nn.utils.parameters_to_vector(leaves(torch.func.grad(loss)(trainable))), direct, 1e-11)


def test_rows_give_no_view_for_a_layers_caller_may_detach_them_in_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(nn.Linear(16, 8, dtype=torch.float64))
    params = moved(ll.init(model, ll.LoRAConfig(r=2)))
    bound, x = ll.bind(model, params), rows(3)
    for y in (bound(x), by_phases(monkeypatch, lambda: bound(x))):
        assert not y.detach_().requires_grad


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # sizes of the adapter's own blocks
@pytest.mark.parametrize(
    "cfg",
    [*LOW_RANK, ll.OFTConfig(block_size=4), ll.BOFTConfig(block_size=4, m=2)],
    ids=lambda cfg: type(cfg).__name__,
)
def test_a_trace_is_the_same_with_and_without_a_graph_and_serves_any_batch(
    cfg: ll.AdapterConfig,
) -> None:
    model = net(bias=True)
    bound = ll.bind(model, moved(ll.init(model, cfg))).eval()
    for shape in ((3,), (1, 3), (2, 3)):
        # torch.jit.trace traces once more without a graph, and compares the two
        traced = torch.jit.trace(bound, rows(*shape))
        for other in (shape, (4, *shape[1:])):
            close(traced(rows(*other)), bound(rows(*other)), 1e-12)


@pytest.mark.parametrize(
    "cfg",
    [ll.LoRAConfig(r=2), ll.LoRAConfig(r=2, dropout=0.5), ll.HiRAConfig(r=2)],
    ids=["lora", "dropout", "hira"],
)
def test_gradients_enabled_within_inference_mode_change_nothing(
    cfg: ll.AdapterConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cost, "dense_pays", lambda *args, **kwargs: True)
    model, x = net(bias=True), rows(2, 3)
    params = moved(ll.init(model, cfg))
    for training in (False, True):
        bound = ll.bind(model, params).train(training)
        with torch.inference_mode(), torch.enable_grad():
            y = bound(x)
        if not (training and getattr(cfg, "dropout", 0.0)):
            close(y, bound(x).detach(), 1e-12)
        assert y.is_inference()


def test_grad_of_torch_func_is_backward() -> None:
    model, params = wet()
    x = rows(6)

    def loss(params: ll.Adapter) -> Tensor:
        torch.manual_seed(9)
        return ll.apply(model, params, x).square().mean()

    direct = torch.func.grad(loss)(params)
    bound = ll.bind(model, params)
    torch.manual_seed(9)
    bound(x).square().mean().backward()
    for path, tensors in direct.items():
        for name, g in tensors.items():
            close(bound.get_submodule(path).get_parameter(f"adapter.0.{name}").grad, g, 1e-12)
    several = ll.stack([params, params])
    each = torch.func.vmap(
        torch.func.grad(lambda p: ll.apply(model, p, x).square().mean()), randomness="different"
    )(several)
    assert all(t.shape[0] == 2 and t.abs().sum() > 0 for t in leaves(each))


def test_dropout_keeps_neither_mask_nor_dropped_input() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    x = torch.randn(256, 64, requires_grad=True)
    kept = {}
    for p in (0.0, 0.1):
        bound = ll.bind(
            model, ll.init(model, ll.LoRAConfig(r=2, dropout=p, target_names=(r"^[02]$",)))
        ).train()
        kept[p] = saved(lambda bound=bound: bound(x), [*bound.parameters(), x])
    assert kept[0.1] <= 1.02 * kept[0.0]


# --------------------------------------------------------------------------------------------- rows
MIXES = [
    (0, 1, 2),
    (0, 0, 1, 1, 2, 2),
    (2, -1, 0, -1),
    (1, 1, 1),
    (-1, -1),
    (0, 0, 0, 2),
    (2, 0, 1, 0, 2, -1, 1),
]


def pieces_of(seen: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made = fused_rows._LowRankByRows.apply
    monkeypatch.setattr(
        fused_rows._LowRankByRows, "apply", functools.partial(_noted, seen, "rows", made)
    )


@pytest.mark.parametrize("alphas", [(8.0, 8.0, 8.0), (8.0, 2.0, 1.0)], ids=str)
@pytest.mark.parametrize("ranks", [(4, 4, 4), (1, 4, 2)], ids=str)
@pytest.mark.parametrize("ids", MIXES, ids=str)
def test_a_training_step_of_rows_is_the_phases(
    ids: tuple[int, ...],
    ranks: tuple[int, ...],
    alphas: tuple[float, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = (
        nn.Sequential(nn.Linear(16, 6, dtype=torch.float64)),
        rows(len(ids), 5).requires_grad_(),
    )
    stack = ll.stack(
        [
            moved(ll.init(model, ll.LoRAConfig(r=r, alpha=a)), seed=i)
            for i, (r, a) in enumerate(zip(ranks, alphas, strict=True))
        ]
    )
    trainable, frozen = ll.partition(stack)
    flat, tree = pytree.tree_flatten(trainable)
    given = (x, *(t.requires_grad_() for t in flat))
    seen: list[str] = []
    pieces_of(seen, monkeypatch)

    def call(x: Tensor, *flat: Tensor) -> Tensor:
        return ll.apply(
            model, ll.rows(ll.combine(pytree.tree_unflatten(list(flat), tree), frozen), ids), x
        )

    def step() -> tuple[Tensor, ...]:
        y = call(*given)
        found = torch.autograd.grad(
            y.square().sum(), given, create_graph=True, materialize_grads=True
        )
        once = torch.autograd.grad(
            y.square().sum(), given, retain_graph=True, materialize_grads=True
        )
        # entries that only pad a shorter member are left out
        real = sum((g * (t != 0)).sin().sum() for g, t in zip(found, given, strict=True))
        return y, *once, *found, *torch.autograd.grad(real, given, materialize_grads=True)

    ours = step()
    padded = ids in ((0, 0, 0, 2), (2, 0, 1, 0, 2, -1, 1))
    assert seen or padded
    for one, other in zip(ours, by_phases(monkeypatch, step), strict=True):
        close(one, other, 1e-10)
    y, cotangents = call(*given), torch.randn(3, len(ids), 5, 6, dtype=torch.float64)
    each = [
        torch.autograd.grad(y, given, one, retain_graph=True, materialize_grads=True)
        for one in cotangents
    ]
    many = torch.autograd.grad(y, given, cotangents, is_grads_batched=True, materialize_grads=True)
    for several, one in zip(many, zip(*each, strict=True), strict=True):
        close(several, torch.stack(one), 1e-11)


# -------------------------------------------------------------------------------------- one product
DENSE = [
    ll.HiRAConfig(r=4),
    ll.SHiRAConfig(r=2),
    ll.C3AConfig(block_size=4),
    ll.FourierFTConfig(n_frequency=20),
    ll.VeRAConfig(r=16),
    ll.RandLoRAConfig(r=4),
    ll.OFTConfig(block_size=4),
    ll.BOFTConfig(block_size=4, m=2),
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("cfg", DENSE, ids=lambda cfg: type(cfg).__name__)
def test_gradients_of_recomputed_linear_are_the_phases_and_exact_twice(
    cfg: ll.AdapterConfig, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # small sizes would choose the phases
    monkeypatch.setattr(_cost, "dense_pays", lambda *args, **kwargs: True)
    seen: list[str] = []
    monkeypatch.setattr(
        plain, "recomputed_linear", functools.partial(_noted, seen, "one", plain.recomputed_linear)
    )
    model = nn.Sequential(nn.Linear(16, 16, bias=bias, dtype=torch.float64))
    trainable, frozen = ll.partition(moved(ll.init(model, cfg)))
    flat, tree = pytree.tree_flatten(trainable)

    def call(x: Tensor, *tensors: Tensor) -> Tensor:
        return ll.apply(model, ll.combine(pytree.tree_unflatten(tensors, tree), frozen), x)

    given = (rows(1, 3).requires_grad_(), *(t.clone().requires_grad_() for t in flat))
    cotangent = rows(1, 3).flip(1)
    y = call(*given)
    ours = torch.autograd.grad(y, given, cotangent)
    assert seen == ["one"]
    with torch.no_grad():
        assert torch.equal(y, call(*given))
    theirs = torch.autograd.grad(by_phases(monkeypatch, lambda: call(*given)), given, cotangent)
    for one, other in zip(ours, theirs, strict=True):
        close(one, other, 1e-11)
    composed = torch.func.grad(
        lambda *given: (call(*given) * cotangent).sum(), tuple(range(len(given)))
    )(*(t.detach() for t in given))
    for one, other in zip(composed, ours, strict=True):
        close(one, other, 1e-11)
    assert seen == ["one"] * 2
    assert torch.autograd.gradcheck(call, given)
    assert torch.autograd.gradgradcheck(call, given)


def test_recomputed_linear_reaches_a_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(16, 16, dtype=torch.float64)).requires_grad_(False)
    params, x = moved(ll.init(model, ll.HiRAConfig(r=4))), rows(3)

    def gradient() -> Tensor:
        bias = torch.ones(16, dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(
            ll.functional_call(model, params, x, base={"0.bias": bias}).square().sum(), bias
        )[0]

    close(gradient(), by_phases(monkeypatch, gradient), 1e-12)


@pytest.mark.parametrize(
    "cfg",
    [ll.HiRAConfig(r=4), ll.SHiRAConfig(r=4), ll.C3AConfig(block_size=16)],
    ids=lambda cfg: type(cfg).__name__,
)
def test_recomputed_linear_keeps_nothing_of_the_weights_size(cfg: ll.AdapterConfig) -> None:
    model = nn.Sequential(nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 128)).requires_grad_(False)
    x = torch.randn(256, 128, requires_grad=True)
    bound = ll.bind(model, ll.init(model, dataclasses.replace(cfg, target_names=(r"^[02]$",))))
    kept = saved(lambda: bound(x), [*bound.parameters(), *bound.buffers(), x])
    assert (
        kept
        <= saved(lambda: model(x), [*model.parameters(), x]) + 4 * x.numel() * x.element_size() // 4
    )


@pytest.mark.parametrize("cfg", [ll.HiRAConfig(r=2), ll.LoHaConfig(r=2), ll.LoRAConfig(r=2)])
@pytest.mark.parametrize("reads", [False, True])
def test_a_backward_pass_within_hooks_on_what_is_saved(cfg: ll.AdapterConfig, reads: bool) -> None:
    """As trainers offload activations: the whole step is within the hooks."""

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = x @ self.layer.weight.mT if reads else self.layer(x)
            return y

    model, x = Reads(), rows(300)
    params = moved(ll.init(model, cfg))

    def gradients(*, hooked: bool) -> list[Any]:
        bound = ll.bind(model, params)
        with torch.autograd.graph.save_on_cpu() if hooked else contextlib.nullcontext():
            bound(x).square().mean().backward()
        return [p.grad for p in bound.parameters() if p.requires_grad]

    close(gradients(hooked=True), gradients(hooked=False), 1e-12)
