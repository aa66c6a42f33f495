"""A weight that is used without calling its layer is the adapted one, in apply and in bind, and
can't be written on.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import close, in_threads, leaves, moved, normal
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_lite_func as ll
from lora_lite_func.core import registry as methods
from lora_lite_func.injection import weight_properties, weight_route

CONFIGS = [
    ll.LoRAConfig(r=4),
    ll.DoRAConfig(r=4, detach_norm=False),
    ll.HRAConfig(r=4),
    ll.ROADConfig(group_size=4),
    ll.BitFitConfig(),
]
method = pytest.mark.parametrize("cfg", CONFIGS, ids=lambda c: type(c).__name__)

USES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "linear": lambda m, x: F.linear(x, m.weight, m.bias),
    "matmul": lambda m, x: x @ m.weight.T + m.bias,
    "from the left": lambda m, x: (m.weight @ x.mT).mT + m.bias.float().double(),
    "addmm": lambda m, x: torch.addmm(m.bias, x, m.weight.t()),
    "slices": lambda m, x: (
        torch.cat([F.linear(x, w) for w in m.weight.chunk(2)], -1) + m.bias[None]
    ),
    "item": lambda m, x: F.linear(x, m.weight[:, :], 1.0 * m.bias + 0.0),
    "both": lambda m, x: (
        m(x) + 0.5 * F.linear(x.to(m.weight.dtype), m.weight, m.bias) * (m.weight.shape[0] / 16)
    ),
    "einsum": lambda m, x: torch.einsum("bi,oi->bo", x, m.weight) + m.bias,
    "convolution": lambda m, x: F.conv1d(x[..., None], m.weight.unsqueeze(-1), m.bias)[..., 0],
    "listed": lambda m, x: x @ torch.stack([m.weight, m.weight]).mean(0).mT + m.bias.to(x),
}


class Reader(nn.Module):
    """Uses a layer's weight in one of the ways."""

    def __init__(self, use: str, bias: bool = True) -> None:
        super().__init__()
        self.use = use
        self.layer = nn.Linear(16, 16, bias=bias, dtype=torch.float64)
        gen = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=gen, dtype=torch.float64) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return USES[self.use](self.layer, x)


X = normal(5, 16, seed=0)


@pytest.mark.parametrize("use", USES)
@method
def test_any_use_of_a_weight_is_a_use_of_the_adapted_one(cfg: ll.AdapterConfig, use: str) -> None:
    model = Reader(use)
    params = moved(ll.init(model, cfg))
    dense, bound = ll.merged(model, params), ll.bind(model, params)
    expected = dense(X)
    assert (expected - model(X)).abs().max() > 1e-3
    close(ll.apply(model, params, X), expected, 1e-12)
    close(bound(X), expected, 1e-12)
    close(pickle.loads(pickle.dumps(bound))(X), expected, 1e-12)
    close(ll.apply(model, (params, params), X), ll.merged(dense, params)(X), 1e-12)
    trainable, frozen = ll.partition(params)
    wanted = torch.func.grad(
        lambda t: (
            torch.func.functional_call(model, ll.merge(model, ll.combine(t, frozen)), (X,))
            .square()
            .sum()
        )
    )(trainable)
    close(
        torch.func.grad(lambda t: ll.apply(model, ll.combine(t, frozen), X).square().sum())(
            trainable
        ),
        wanted,
        1e-10,
    )
    several = [moved(params, seed) for seed in range(2)]
    ys = torch.func.vmap(lambda p: ll.apply(model, p, X))(ll.stack(several))
    close(ys, torch.stack([ll.apply(model, p, X) for p in several]), 1e-12)


@pytest.mark.parametrize("use", ["linear", "both", "slices"])
def test_one_compiled_graph(use: str) -> None:
    torch._dynamo.reset()
    model = Reader(use)
    step = torch.compile(lambda p, x: ll.apply(model, p, x), backend="eager", fullgraph=True)
    for seed in range(2):
        params = moved(ll.init(model, ll.LoRAConfig(r=4)), seed)
        close(step(params, X), ll.apply(model, params, X), 1e-12)
    bound = ll.bind(model, params)
    close(torch.compile(bound, backend="eager", fullgraph=True)(X), bound(X), 1e-12)
    torch._dynamo.reset()


def test_a_bias_that_an_adapter_brings() -> None:
    model = Reader("linear", bias=False)
    params = moved(ll.init(model, ll.BitFitConfig()))
    close(ll.apply(model, params, X), model(X) + params["layer"]["lora_b"], 1e-12)
    assert (ll.apply(model, params, X) - model(X)).abs().max() > 1e-3
    lora = moved(ll.init(model, ll.LoRAConfig(r=4)))
    close(ll.apply(model, lora, X), ll.merged(model, lora)(X), 1e-12)


def test_questions_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer: Any = ll.bind(Reader("linear"), ll.init(Reader("linear"), ll.LoRAConfig(r=4))).layer
    for file in (weight_route, weight_properties):
        monkeypatch.setattr(file, "merge_site", lambda *_: 1 / 0)
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    assert (weight.dtype, weight.shape, weight.device.type, weight.ndim, weight.numel()) == (
        torch.float64,
        (16, 16),
        "cpu",
        2,
        256,
    )
    # the weight requires a gradient because the adapter is trained
    assert (
        weight.size(0),
        weight.is_floating_point(),
        weight.requires_grad,
        weight.is_leaf,
        layer.bias is not None,
    ) == (16, True, True, False, True)
    with pytest.raises(ZeroDivisionError, match="division"):
        weight.sum()


def test_it_cannot_be_written_on() -> None:
    model = Reader("linear")
    params = moved(ll.init(model, ll.LoRAConfig(r=4)))
    bound: Any = ll.bind(model, params)
    before = [t.clone() for t in bound.state_dict().values()]
    writes: list[Callable[[], Any]] = [
        lambda: bound.layer.weight.zero_(),
        lambda: bound.layer.weight.data,
        lambda: bound.layer.weight.requires_grad_(),
        lambda: setattr(bound.layer.weight, "requires_grad", True),
        lambda: nn.init.zeros_(bound.layer.weight),
        lambda: nn.init.normal_(bound.layer.bias),
    ]
    for write in writes:
        with pytest.raises(
            ll.UnsupportedError,
            match=r"'layer\.(weight|bias)' is the weight with an adapter in.*named_parameters",
        ):
            write()
    with pytest.raises(TypeError, match="item assignment"):
        bound.layer.weight[0] = 0.0
    other = nn.Linear(16, 16)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match="non-leaf"):
            other.weight = bound.layer.weight
    assert all(torch.equal(a, b) for a, b in zip(before, bound.state_dict().values(), strict=True))
    bound.load_state_dict({k: v + 1.0 for k, v in bound.state_dict().items()})
    dict(bound.named_parameters())["layer.weight"].data.sub_(1.0)
    close(bound.state_dict()["layer.weight"], before[0], 1e-12)
    close(
        bound.get_parameter("layer.weight") - before[0],
        ll.merge(model, ll.unbind(bound))["layer.weight"] - before[0],
        1e-12,
    )


def test_threads_in_one_bound_model() -> None:
    model = Reader("both")
    bound = ll.bind(model, moved(ll.init(model, ll.LoRAConfig(r=4))))
    expected, wrong = bound(X), []

    def work(i: int) -> None:
        wrong.extend(i for _ in range(100) if not torch.equal(bound(X), expected))

    in_threads(4, work)
    assert not wrong


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.*:FutureWarning")
@pytest.mark.parametrize(
    "wrap",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.orthogonal,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
    ],
)
@method
def test_a_weight_that_is_computed(cfg: ll.AdapterConfig, wrap: Any) -> None:
    plain = Reader("both")
    model = Reader("both").eval()
    wrap(model.layer)
    model(X)
    plain.layer.weight = nn.Parameter(model.layer.weight.detach().clone())
    params = moved(ll.init(plain, cfg))
    expected = ll.merged(plain, params)(X)
    close(ll.apply(model, params, X), expected, 1e-9)
    close(ll.bind(model, params)(X), expected, 1e-9)
    found = ll.check(model, params, X)
    assert (found.calls, found.weights, found.reads) == ({"layer": 1}, ("layer",), {})
    assert "its weight is computed" in found.unmerged


def test_a_method_without_a_dense_form_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    config = type("CallOnlyConfig", (ll.AdapterConfig,), {})
    spec = lambda cfg, site: {"lora_v": ll.ParamSpec((site.d_out,))}  # noqa: E731
    variant = ll.Variant(
        name="call_only",
        config=config,
        param_specs=spec,
        outputs=lambda cfg, p, d, x, y, site: y + p["lora_v"],
    )
    monkeypatch.setitem(methods._REGISTRY, config, variant)
    model = Reader("linear")
    with pytest.raises(ll.UnsupportedError, match="'layer': call_only has no dense equivalent"):
        ll.apply(model, ll.init(model, config()), X)
    assert leaves(ll.init(model, config()))[0].shape == (16,)


class Checkpointed(nn.Module):
    """Blocks that are run again in the backward pass and share a table's weight, which is read
    before them.
    """

    def __init__(self, through: str) -> None:
        super().__init__()
        self.through, self.table = through, nn.Embedding(5, 16, dtype=torch.float64)
        self.blocks = nn.ModuleList(nn.Linear(16, 16, dtype=torch.float64) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        W = self.table.weight
        for block in self.blocks:

            def run(x: Tensor, W: Tensor = W, block: nn.Module = block) -> Tensor:
                return x + torch.tanh(block(x)) @ W.mT @ W

            if self.through == "plain":
                x = run(x)
            else:
                given = (x, W) if "arguments" in self.through else (x,)
                x = checkpoint(run, *given, use_reentrant="reentrant" in self.through)
        return x


@pytest.mark.parametrize("through", ["closure", "arguments", "reentrant"])
def test_a_weight_read_before_a_checkpoint_is_made_in_each_run_of_it(through: str) -> None:
    torch.manual_seed(0)
    model = Checkpointed("plain")
    params = moved(ll.init(model, ll.LoRAConfig(r=2, target_kinds=("embedding", "linear"))))
    x, grads = X.clone().requires_grad_(), []
    for model.through in ("plain", through):
        bound = ll.bind(model, params)
        bound(x).square().mean().backward()
        grads.append({n: p.grad for n, p in bound.named_parameters() if p.requires_grad})
    close(grads[1], grads[0], 1e-12)


W64 = torch.float64


class Doubled(torch.autograd.Function):
    """x W^T W, as a fused kernel would be written: what it gets goes to C++ first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor) -> Tensor:
        ctx.save_for_backward(x, W)
        return x @ W.mT @ W

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, W = ctx.saved_tensors
        with torch.enable_grad():
            x, W = x.detach().requires_grad_(), W.detach().requires_grad_()
            dx, dW = torch.autograd.grad(x @ W.mT @ W, (x, W), g)
        return dx, dW


@torch.jit.script
def scripted(x: Tensor, W: Tensor) -> Tensor:
    return F.linear(x, W) @ W


TRACED: Any = torch.jit.trace(lambda x, W: F.linear(x, W) @ W, (X, torch.eye(16).double()))
CPP: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "autograd.Function": lambda x, W: Doubled.apply(x, W),
    "jit.script": lambda x, W: scripted(x, W),
    "jit.trace": lambda x, W: TRACED(x, W),
    "operator": lambda x, W: torch.ops.aten.mm(torch.ops.aten.linear(x, W), W),
    "vmap over its rows": lambda x, W: torch.func.vmap(lambda row: x @ row, out_dims=1)(W) @ W,
    "grad in it": lambda x, W: x @ torch.func.grad(lambda W: (W @ W.mT).square().sum() / 8)(W),
    "jacobian in it": lambda x, W: torch.func.jacrev(lambda W: W @ W.mT)(W).sum((0, 1))[:5] @ W,
    "as_tensor": lambda x, W: x @ torch.as_tensor(W).mT @ W,
    "plus": lambda x, W: x @ (+W).mT @ W,
    "no subclasses": lambda x, W: _without_subclasses(x, W),
    "compiled": lambda x, W: torch.compile(lambda x, W: x @ W.mT @ W, backend="eager")(x, W),
}


def _without_subclasses(x: Tensor, W: Tensor) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return x @ W.mT @ W


class Uses(nn.Module):
    """Hands a layer's weight to what is out of Python's sight."""

    def __init__(self, use: str) -> None:
        super().__init__()
        self.use, self.layer = use, nn.Linear(16, 16, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return x + CPP[self.use](x, self.layer.weight) + self.layer(x)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch.compile's own
@pytest.mark.parametrize("use", CPP)
@pytest.mark.parametrize("cfg", CONFIGS[:3], ids=lambda c: type(c).__name__)
def test_what_cpp_is_given_is_the_adapted_weight(cfg: ll.AdapterConfig, use: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Uses(use)
    params = moved(ll.init(model, cfg))
    dense, bound = ll.merged(model, params), ll.bind(model, params)
    close(ll.apply(model, params, X), dense(X), 1e-11)
    close(bound(X), dense(X), 1e-11)
    with torch.inference_mode():
        close(bound(X), dense(X), 1e-11)
    grads = torch.autograd.grad(
        bound(X).square().mean(), [p for p in bound.parameters() if p.requires_grad]
    )
    trainable, frozen = ll.partition(params)
    tensors = [t.requires_grad_() for t in leaves(trainable) if isinstance(t, Tensor)]
    base = ll.merge(model, ll.combine(trainable, frozen))
    loss = torch.func.functional_call(model, base, (X,)).square().mean()
    close(grads, torch.autograd.grad(loss, tensors), 1e-10)


@pytest.mark.parametrize("use", ["jit.script", "vmap over its rows", "grad in it", "operator"])
def test_what_cpp_is_given_under_transforms(use: str) -> None:
    model = Uses(use)
    trainable, frozen = ll.partition(moved(ll.init(model, ll.LoRAConfig(r=4))))
    loss = lambda t: ll.apply(model, ll.combine(t, frozen), X).square().sum()  # noqa: E731

    def dense(t: ll.Adapter) -> Tensor:
        base = ll.merge(model, ll.combine(t, frozen))
        return torch.func.functional_call(model, base, (X,)).square().sum()

    close(torch.func.grad(loss)(trainable), torch.func.grad(dense)(trainable), 1e-10)
    several = ll.stack([moved(trainable, seed) for seed in range(2)])
    close(torch.func.vmap(loss)(several), torch.func.vmap(dense)(several), 1e-11)


def test_inputs_may_be_transformed_around_it() -> None:
    model = Uses("jit.script")
    params = moved(ll.init(model, ll.LoRAConfig(r=4)))
    rows = torch.func.vmap(lambda x: ll.apply(model, params, x[None])[0])(X)
    close(rows, ll.apply(model, params, X), 1e-12)
    bound = ll.bind(model, params)
    learned = [p for p in bound.parameters() if p.requires_grad]
    mapped = torch.func.vmap(lambda x: bound(x[None])[0])(X).square().sum()
    wanted = torch.autograd.grad(bound(X).square().sum(), learned)
    close(torch.autograd.grad(mapped, learned), wanted, 1e-11)


def test_cpp_cannot_write_on_it() -> None:
    @torch.jit.script
    def cleared(W: Tensor) -> Tensor:
        return W.zero_()

    layer: Any = ll.bind(Uses("plus"), ll.init(Uses("plus"), ll.LoRAConfig(r=4))).layer
    before = layer.state_dict()["weight"].clone()
    for grad in (True, False):  # what is said is lost in TorchScript's own message
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="TorchScript"):
            cleared(layer.weight)
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        with pytest.raises(ll.UnsupportedError, match="is the weight with an adapter in"):
            torch.ops.aten.zero_(layer.weight)
        with pytest.raises(ll.UnsupportedError, match="is the weight with an adapter in"):
            torch.ops.aten.add.out(X[:1], X[:1], out=layer.weight)
    assert torch.equal(layer.state_dict()["weight"], before)


def test_copies_of_a_read_weight() -> None:
    model = Uses("plus")
    params = moved(ll.init(model, ll.LoRAConfig(r=4)))
    layer: Any = ll.bind(model, params).layer
    wanted = ll.merge(model, params)["layer.weight"]
    weight = layer.weight
    found = [copy.copy(weight), copy.deepcopy(weight), torch.tensor(weight.tolist(), dtype=W64)]
    with torch.no_grad():
        found += [pickle.loads(pickle.dumps(layer.weight)), torch.from_numpy(layer.weight.numpy())]
    for made in found:
        assert type(made) in (Tensor, nn.Parameter)
        close(made.detach(), wanted, 1e-12)
    assert weight.data_ptr() == weight.data_ptr() != 0


def test_hooks_on_a_read_weight_see_its_gradient() -> None:
    model = Uses("plus")
    layer: Any = ll.bind(model, moved(ll.init(model, ll.LoRAConfig(r=4)))).layer
    weight, seen = layer.weight, []
    weight.register_hook(seen.append)
    weight.retain_grad()
    (2 * weight).sum().backward()
    assert torch.equal(seen[0], torch.full((16, 16), 2.0, dtype=torch.float64))
    assert torch.equal(weight.grad, seen[0])


def test_a_weight_that_was_read_notices_a_step() -> None:
    model = Uses("plus")
    bound: Any = ll.bind(model, moved(ll.init(model, ll.LoRAConfig(r=4))))
    weight = bound.layer.weight
    loss, before = weight.sum(), weight.detach().clone()
    with torch.no_grad():
        for p in bound.layer.adapter.parameters():
            p.mul_(2)
    assert (weight.detach() - before).abs().max() > 1e-3
    with pytest.raises(RuntimeError, match=r"'layer.weight' is made of .* inplace operation"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_weight_that_is_given_to_a_checkpoint(reentrant: bool) -> None:
    torch.manual_seed(0)
    model, grads = Checkpointed("plain"), []
    params = moved(ll.init(model, ll.LoRAConfig(r=2, target_kinds=("embedding",))))
    for model.through in ("plain", "reentrant arguments" if reentrant else "arguments"):
        bound = ll.bind(model, params)
        bound(X.clone().requires_grad_()).square().mean().backward()
        grads.append({n: p.grad for n, p in bound.named_parameters() if p.requires_grad})
    close(grads[1], grads[0], 1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cfg", [ll.LoReFTConfig(r=2, target_names=("0",)), ll.DoRAConfig(r=2)])
def test_a_bound_layer_is_printed_as_it_is_stored(bias: bool, cfg: ll.AdapterConfig) -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=bias))
    bound = ll.bind(model, ll.init(model, cfg))
    for made in (bound, ll.bind(bound, ll.init(model, ll.LoRAConfig(r=2)))):
        assert model[0].extra_repr() == made[0].extra_repr()
        assert f"in_features=4, out_features=4, bias={bias}" in repr(made)
