"""A weight that is used without calling its layer is the adapted one, in apply and in bind, and can't be written on."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import close, leaves, moved
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_lite_func as ll
from lora_lite_func.core import method as methods
from lora_lite_func.injection import weight_route

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


X = torch.randn(5, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


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
    close(
        ll.apply(model, params, X), model(X) + params["layer"]["lora_b"], 1e-12
    ) if "lora_b" in params["layer"] else None
    assert (ll.apply(model, params, X) - model(X)).abs().max() > 1e-3
    lora = moved(ll.init(model, ll.LoRAConfig(r=4)))
    close(ll.apply(model, lora, X), ll.merged(model, lora)(X), 1e-12)


def test_questions_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer: Any = ll.bind(Reader("linear"), ll.init(Reader("linear"), ll.LoRAConfig(r=4))).layer
    monkeypatch.setattr(weight_route, "merge_site", lambda *_: 1 / 0)
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    assert (weight.dtype, weight.shape, weight.device.type, weight.ndim, weight.numel()) == (
        torch.float64,
        (16, 16),
        "cpu",
        2,
        256,
    )
    assert (
        weight.size(0),
        weight.is_floating_point(),
        weight.requires_grad,
        layer.bias is not None,
    ) == (16, True, False, True)
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

    def work() -> None:
        wrong.extend(1 for _ in range(100) if not torch.equal(bound(X), expected))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
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


def test_a_weight_that_an_autograd_function_would_take_is_refused() -> None:
    model = Checkpointed("reentrant arguments")
    params = ll.init(model, ll.LoRAConfig(r=2, target_kinds=("embedding",)))
    with pytest.raises(
        ll.UnsupportedError,
        match=r"'table.weight' is the weight with an adapter in.*autograd.Function.*exclude_names",
    ):
        ll.apply(model, params, X)
