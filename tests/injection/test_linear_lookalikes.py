"""Linear layers that look plain and aren't, and what autograd does around a layer whose dropout is
one function.
"""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.prune as prune
from helpers import close, moved, net
from linear_layers import rows, wet
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import lora_lite_func as ll


class Twice(nn.Module):
    def forward(self, b: Tensor) -> Tensor:
        return 2 * b + 1


class Masked(nn.Linear):
    """A linear layer whose weight is a property of its class."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__(16, 16)
        self.register_buffer(
            "mask", torch.rand(16, 16, generator=torch.Generator().manual_seed(0)) > 0.5
        )

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        if "weight" not in self._parameters:
            raise AttributeError
        stored, mask = self._parameters["weight"], self._buffers.get("mask")
        assert stored is not None
        return stored if mask is None else stored * mask

    @weight.setter
    def weight(self, value: Tensor) -> None:
        assert isinstance(value, nn.Parameter)
        self.register_parameter("weight", value)


def _elsewhere(layer: nn.Linear, put: Callable[[nn.Linear, Tensor], None]) -> None:
    bias = layer.bias.detach().clone()
    del layer.bias
    put(layer, bias)


UNPLAIN: dict[str, Callable[[nn.Linear], Any]] = {
    "bias parametrized": lambda layer: parametrize.register_parametrization(layer, "bias", Twice()),
    "weight parametrized": parametrizations.weight_norm,
    "bias pruned": lambda layer: prune.RandomUnstructured.apply(layer, "bias", 0.5),
    "weight pruned": lambda layer: prune.RandomUnstructured.apply(layer, "weight", 0.5),
    "bias a buffer": lambda layer: _elsewhere(
        layer, lambda made, b: made.register_buffer("bias", b)
    ),
    "bias an attribute": lambda layer: _elsewhere(layer, lambda made, b: setattr(made, "bias", b)),
    "weight strided otherwise": lambda layer: setattr(
        layer, "weight", nn.Parameter(layer.weight.detach().mT.contiguous().mT)
    ),
}


@pytest.mark.parametrize(
    "cfg",
    [ll.LoRAConfig(r=4), ll.DoRAConfig(r=4), ll.LoHaConfig(r=2), ll.OFTConfig(block_size=4)],
    ids=lambda cfg: type(cfg).__name__,
)
@pytest.mark.parametrize("change", [*UNPLAIN, "weight a property"])
def test_a_layer_that_is_more_than_its_parameters_keeps_all_of_it(
    change: str, cfg: ll.AdapterConfig
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Masked() if change == "weight a property" else nn.Linear(16, 16)).double()
    start = ll.init(model, cfg)
    if change in UNPLAIN:
        UNPLAIN[change](model[0])
    params = moved(ll.init(model, cfg))
    for x in (rows(3), rows(200)):
        with torch.no_grad():
            close(
                ll.apply(model, start if "bias" in change else ll.init(model, cfg), x),
                model(x),
                1e-12,
            )
            y = ll.apply(model, params, x)
        # with a graph, low-rank methods go by phases
        close(y, ll.apply(model, params, x), 1e-12)
        close(ll.prepared(model, params)(x), y, 1e-12)
    many = ll.rows(ll.stack([params, params]), [0, -1, 1])
    with torch.no_grad():
        close(ll.apply(model, many, rows(3))[1], model(rows(3))[1], 1e-12)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_sparse_inputs_and_weights_are_left_to_the_phases() -> None:
    model = nn.Sequential(nn.Linear(16, 16)).double()
    params, x = moved(ll.init(model, ll.LoRAConfig(r=4))), rows(200)
    with torch.no_grad():
        y = ll.apply(model, params, x)
        close(ll.apply(model, params, x.to_sparse_csr()), y, 1e-12)
        model[0].weight = nn.Parameter(
            model[0].weight.detach().to_sparse_csr(), requires_grad=False
        )
        close(ll.apply(model, params, x), y, 1e-12)


# ------------------------------------------------------------------------------------------ dropout
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_base_weights_that_are_given_get_their_gradient_through_dropout(name: str) -> None:
    model, params = wet()
    given = model.get_submodule("layers.0.up").get_parameter(name).detach().clone().requires_grad_()
    torch.manual_seed(0)
    y = ll.functional_call(model, params, rows(3), base={f"layers.0.up.{name}": given})
    (g,) = torch.autograd.grad(y.square().sum(), given)
    assert g.abs().max() > 0


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (1, 3), (2, 2, 3)], ids=str)
def test_what_follows_may_write_on_the_output_in_place(shape: tuple[int, ...], bias: bool) -> None:
    model = (
        nn.Sequential(nn.Linear(16, 16, bias=bias), nn.ReLU(inplace=True), nn.Linear(16, 8))
        .double()
        .train()
    )
    params = moved(ll.init(model, ll.LoRAConfig(r=4, dropout=0.5, target_names=("^0$",))))
    gradients = []
    for inplace in (True, False):
        model[1].inplace = inplace
        bound, x = ll.bind(model, params), rows(*shape).requires_grad_()
        torch.manual_seed(0)
        bound(x).square().sum().backward()
        gradients.append([x.grad, bound.get_parameter("0.adapter.0.lora_A").grad])
    close(gradients[0], gradients[1], 1e-12)


@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 1, 2)], ids=str)
@pytest.mark.parametrize(
    "cfg",
    [ll.LoRAConfig(r=4), ll.OFTConfig(block_size=4), ll.SHiRAConfig(r=4)],
    ids=lambda cfg: type(cfg).__name__,
)
@pytest.mark.parametrize("mixed", [False, True], ids=["one", "rows"])
def test_what_follows_any_form_may_write_on_the_output_in_place(
    mixed: bool, cfg: ll.AdapterConfig, shape: tuple[int, ...]
) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(inplace=True), nn.Linear(16, 16)).double()
    members = [moved(ll.init(model, cfg), seed) for seed in range(3)]
    params = ll.rows(ll.stack(members), [0, 1, 2]) if mixed else members[0]
    gradients = []
    for inplace in (True, False):
        model[1].inplace = inplace
        bound, x = ll.bind(model, params), rows(*shape).requires_grad_()
        bound(x).square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in bound.parameters() if p.requires_grad)])
    close(gradients[0], gradients[1], 1e-12)


def test_several_gradients_at_once_share_the_mask() -> None:
    model, params = wet()
    x = rows(5)

    def call(params: ll.Adapter) -> Tensor:
        torch.manual_seed(3)
        return ll.apply(model, params, x)

    bound = ll.bind(model, params)
    A = bound.get_parameter("layers.0.up.adapter.0.lora_A")
    torch.manual_seed(3)
    y = bound(x)
    each = torch.stack([torch.autograd.grad(t, A, retain_graph=True)[0] for t in y.flatten()]).view(
        *y.shape, *A.shape
    )
    close(torch.func.jacrev(call)(params)["layers.0.up"]["lora_A"], each, 1e-12)
    units = torch.eye(y.numel(), dtype=y.dtype).view(-1, *y.shape)
    (together,) = torch.autograd.grad(y, A, units, is_grads_batched=True)
    close(together.view_as(each), each, 1e-12)


@pytest.mark.parametrize("way", ["reentrant", "not", "selective", "offloaded"])
def test_checkpoints_draw_the_same_mask_again(way: str) -> None:
    model, params = wet()
    bound, x = ll.bind(model, params), rows(2, 3).requires_grad_()
    keep = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]  # type: ignore[attr-defined]
    ways: dict[str, Callable[[], Tensor]] = {
        "reentrant": lambda: checkpoint(bound, x, use_reentrant=True),
        "not": lambda: checkpoint(bound, x, use_reentrant=False),
        "selective": lambda: checkpoint(
            bound,
            x,
            use_reentrant=False,
            context_fn=functools.partial(create_selective_checkpoint_contexts, _keeping(keep)),
        ),
        "offloaded": lambda: _offloaded(bound, x),
    }
    found = []
    for call in (lambda: bound(x), ways[way]):
        bound.zero_grad()
        x.grad = None
        torch.manual_seed(7)
        y = call()
        y.square().sum().backward()
        found.append([y.detach(), x.grad, *(p.grad for p in bound.parameters() if p.requires_grad)])
    if way != "selective":  # which draws as torch's own dropout does
        close(found[1], found[0], 1e-12)
    assert all(g is not None and g.abs().max() > 0 for g in found[1])


def _keeping(ops: list[Any]) -> Any:
    return lambda ctx, op, *args, **kwargs: (
        CheckpointPolicy.MUST_SAVE if op in ops else CheckpointPolicy.PREFER_RECOMPUTE
    )


def _offloaded(bound: nn.Module, x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        y: Tensor = bound(x)
    return y


def test_a_graph_of_operations_draws_in_every_run() -> None:
    make_fx = pytest.importorskip("torch.fx.experimental.proxy_tensor").make_fx
    model, params = wet()
    graph = make_fx(lambda x: ll.apply(model, params, x))(rows(3))
    assert not torch.equal(graph(rows(3)), graph(rows(3)))


def test_almost_everything_may_be_dropped() -> None:
    model, params = wet(0.999999)
    assert ll.apply(model, params, rows(50)).isfinite().all()


# ----------------------------------------------------------------------------------------- prepared
READY = [
    ll.LoRAConfig(r=4),
    ll.AdaLoRAConfig(r=4),
    ll.DoRAConfig(r=4, detach_norm=False),
    ll.OFTConfig(block_size=4),
    ll.LoHaConfig(r=2),
]


@pytest.mark.parametrize("cfg", READY, ids=lambda cfg: type(cfg).__name__)
@pytest.mark.parametrize(
    "how", ["load_state_dict", "assign", "functional_call", "in place", "base in place", "empty"]
)
def test_prepared_is_never_half_of_other_tensors(cfg: ll.AdapterConfig, how: str) -> None:
    model, other = net(bias=True), net(seed=1, bias=True)
    params, after = moved(ll.init(model, cfg)), moved(ll.init(other, cfg, seed=3), seed=5)
    once, x = ll.prepared(model, params), rows(3)
    wanted = ll.bind(other, after).state_dict()
    with torch.no_grad():
        match how:
            case "load_state_dict" | "assign":
                once.load_state_dict(wanted, assign=how == "assign")
            case "functional_call":
                y = ll.apply(model, params, x)
                close(
                    torch.func.functional_call(once, wanted, (x,)), ll.apply(other, after, x), 1e-12
                )
                close(once(x), y, 1e-12)
                return
            case "empty":
                once = once.to("meta").to_empty(device="cpu")
                once.load_state_dict(wanted)
            case _:
                for name, t in once.state_dict().items():
                    if ("adapter" in name) == (how == "in place"):
                        t.copy_(wanted[name])
        if how == "base in place":
            close(once(x), ll.apply(model, params, x), 1e-12)
        else:
            unbound = ll.unbind(once)
            assert isinstance(unbound, ll.Adapter)
            close(once(x), ll.apply(model if how == "in place" else other, unbound, x), 1e-12)


@pytest.mark.parametrize("cfg", READY, ids=lambda cfg: type(cfg).__name__)
def test_prepared_that_is_made_trainable_is_trained(cfg: ll.AdapterConfig) -> None:
    model, x = net(), rows(3)
    params = moved(ll.init(model, cfg))
    found = []
    for made in (ll.bind(model, params).eval(), ll.prepared(model, params)):
        for name, p in made.named_parameters():
            p.requires_grad_("adapter" in name)
        made(x).square().sum().backward()
        found.append({name: p.grad for name, p in made.named_parameters() if p.requires_grad})
    close(found[1], found[0], 1e-12)


def test_prepared_and_compiled_sees_what_is_loaded() -> None:
    model, x = net(), rows(3)
    cfg = ll.OFTConfig(block_size=4)
    params, after = moved(ll.init(model, cfg)), moved(ll.init(model, cfg), seed=5)
    once = ll.prepared(model, params)
    compiled = torch.compile(once, fullgraph=True, backend="eager")
    with torch.no_grad():
        close(compiled(x), ll.apply(model, params, x), 1e-12)
        once.load_state_dict(ll.bind(model, after).state_dict())
        close(compiled(x), ll.apply(model, after, x), 1e-12)


def test_prepared_keeps_what_it_made_where_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = net(), rows(3)
    once = ll.prepared(model, moved(ll.init(model, ll.OFTConfig(block_size=4))))
    with torch.inference_mode():
        inside = ll.prepared(model, moved(ll.init(model, ll.OFTConfig(block_size=4))))
    y = once(x)
    monkeypatch.setattr(
        "lora_lite_func.injection.phases._prepare",
        lambda *args: pytest.fail("made again"),
    )
    for made in (
        once,
        inside,
        copy.deepcopy(once),
        pickle.loads(pickle.dumps(copy.deepcopy(once))),
        once.to("cpu").to(torch.float64),
    ):
        close(made(x), y, 1e-12)
    with torch.no_grad():
        close(once(x), y, 1e-12)
    twice = ll.bind(once, moved(ll.init(model, ll.IA3Config())))
    monkeypatch.undo()
    assert twice(x).shape == y.shape
    close(
        ll.bind(ll.prepared(model, ll.unbind(inside)), ll.init(model, ll.IA3Config()))(x), y, 1e-12
    )
