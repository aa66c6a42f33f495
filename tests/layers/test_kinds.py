"""What each kind of place has of its own: kernels, attention, recurrence, norms, stacks, tied
tensors, and what is said about them.
"""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.attention
import torch.utils._pytree as pytree
from helpers import close, in_threads, moved, net, same_state, seeded, snapshot
from hooks import hooked
from hypothesis import given, settings
from places import IDS, Experts, Mixing, Own, Plus, Scaled, Transposed, features
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call, grad, vmap

import lora_lite_func as ll
from lora_lite_func.core.layout import Layout
from lora_lite_func.injection import dense_weight


def lora(model: nn.Module, **chosen: Any) -> ll.Adapter:
    return moved(ll.init(model, ll.LoRAConfig(r=2, **chosen)))


def first(y: Any) -> Tensor:
    return y[0] if isinstance(y, tuple) else y


def agree(model: nn.Module, params: Any, *args: Any, tol: float = 1e-10, **kwargs: Any) -> Tensor:
    """apply, bind and merged give the same, and move the output; the model isn't written."""
    before = snapshot(model)
    y = first(ll.apply(model, params, *args, **kwargs))
    assert (y - first(model(*args, **kwargs))).abs().max() > 1e-6
    close(first(ll.merged(model, params)(*args, **kwargs)), y, tol)
    close(first(ll.bind(model, params)(*args, **kwargs)), y, tol)
    assert same_state(before, snapshot(model))
    return y


# ------------------------------------------------------------------------------------- convolutions
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@given(data=st.data())
@settings(max_examples=25)
def test_a_kernel_is_moved_by_its_matrix(data: st.DataObject) -> None:
    n = data.draw(st.sampled_from([1, 2, 3]), "dimensions")
    groups = data.draw(st.sampled_from([1, 2, 4]))
    sizes = st.integers(1, 3)
    padding = data.draw(st.sampled_from(["same", "valid", 0, 1]))
    stride = 1 if padding == "same" else data.draw(sizes)
    mode = data.draw(
        st.sampled_from(
            ["zeros", "reflect", "replicate", "circular"] if n < 3 else ["zeros", "circular"]
        )
    )
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[n]
    kernel = [data.draw(sizes) for _ in range(n)]
    layer = kind(
        4, 8, kernel, stride, padding, data.draw(sizes), groups, data.draw(st.booleans()), mode
    )
    model = seeded(layer)
    params = lora(model, target_kinds="conv")
    x = features(2, 4, *[7] * n)
    y = agree(model, params, x)
    delta = 8.0 * (params["", "lora_B"] @ params["", "lora_A"]).reshape(model.weight.shape)
    close(y, functional_call(model, {"weight": model.weight + delta}, (x,)), 1e-12)
    assert params.sites[""].d_in == model.weight[0].numel()


@given(data=st.data())
@settings(max_examples=25)
def test_a_transposed_kernel_has_a_row_for_each_output_channel(data: st.DataObject) -> None:
    n, groups = (
        data.draw(st.sampled_from([1, 2, 3]), "dimensions"),
        data.draw(st.sampled_from([1, 2, 4]), "groups"),
    )
    stride, dilation = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    kernel = [data.draw(st.integers(1, 3)) for _ in range(n)]
    kind = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[n]
    model = seeded(
        kind(
            4,
            8,
            kernel,
            stride,
            data.draw(st.integers(0, 1)),
            0,
            groups,
            data.draw(st.booleans()),
            dilation,
        )
    )
    x = features(2, 4, *[4] * n)
    sizes = [s + data.draw(st.integers(0, stride - 1)) for s in model(x).shape[2:]]
    params = lora(model, target_kinds="conv")
    y = agree(model, params, x, output_size=sizes)
    delta = torch.zeros_like(model.weight)  # (in, out / groups, ...)
    update = 8.0 * params["", "lora_B"] @ params["", "lora_A"]
    for o in range(8):
        group, place = divmod(o, 8 // groups)
        delta[group * 4 // groups : (group + 1) * 4 // groups, place] = update[o].view(
            4 // groups, *kernel
        )
    close(
        y,
        functional_call(model, {"weight": model.weight + delta}, (x,), {"output_size": sizes}),
        1e-12,
    )
    gate = moved(ll.init(model, ll.IA3Config(target_kinds="conv")))
    g = gate["", "lora_g"].view(-1, *[1] * n)
    bias = 0.0 if model.bias is None else model.bias.view(-1, *[1] * n)
    close(ll.apply(model, gate, x), g * (model(x) - bias) + g * bias, 1e-12)


def test_transposed_convolutions_are_not_taken_for_others() -> None:
    model = seeded(nn.Sequential(nn.ConvTranspose1d(4, 4, 2), nn.Conv1d(4, 4, 2)))
    params = lora(model, target_kinds="conv")
    assert [(s.d_in, s.d_out, s.transposed) for s in params.sites.values()] == [
        (8, 4, True),
        (8, 4, False),
    ]
    x = features(1, 4, 4)
    agree(model, params, x)
    agree(model, lora(model, target_parameters="0.weight"), x)
    with pytest.raises(
        ll.StructureError, match=r"site '0': expected 8 -> 4, stored transposed, found Conv1d"
    ):
        ll.apply(nn.Sequential(model[1], model[1]), lora(model[:1], target_kinds="conv"), x)
    with pytest.raises(
        ll.StructureError,
        match=r"site '0': expected 8 -> 4, stored as it is, found ConvTranspose1d",
    ):
        ll.apply(model, lora(nn.Sequential(model[1]), target_kinds="conv"), x)
    with pytest.raises(
        ll.UnsupportedError,
        match=r"to_peft: '0': PEFT has no adapter of a transposed convolution; merge it",
    ):
        ll.to_peft(lora(model[:1], target_kinds="conv"), model, "nowhere")


# ---------------------------------------------------------------------------------------- attention
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("grads", [True, False])
def test_attention_in_both_layouts(batch_first: bool, separate: bool, grads: bool) -> None:
    sizes = {"kdim": 6, "vdim": 10} if separate else {}
    model = seeded(nn.MultiheadAttention(8, 2, batch_first=batch_first, **sizes))
    inputs = (
        features(3, 5, 8),
        features(3, 5, sizes.get("kdim", 8)),
        features(3, 5, sizes.get("vdim", 8)),
    )
    if not separate:
        inputs = (inputs[0],) * 3  # so that torch's fast path is open where gradients are off
    names = "[qkv]_proj_weight|out_proj.weight" if separate else "in_proj_weight"
    params = lora(model, target_parameters=names)
    assert len(params) == (4 if separate else 1)
    both = (
        (params, moved(ll.init(model, ll.IA3Config(target_names="out_proj"))))
        if not separate
        else params
    )
    with torch.set_grad_enabled(grads):
        for weights in (True, False):
            agree(model, both, *inputs, need_weights=weights)


@pytest.mark.parametrize("norm_first", [True, False])
def test_an_encoder_layer_s_fast_path(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
    model = seeded(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    adapters = (
        lora(model, target_parameters="in_proj_weight"),
        moved(ll.init(model, ll.IA3Config(target_kinds=("linear", "norm")))),
    )
    with torch.no_grad():
        agree(model, adapters, features(2, 5, 8))


def test_the_weight_is_made_once_per_call(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    real = dense_weight.merge_site

    def counting(module: Any, chain: Any, W: Tensor, b: Any) -> Any:
        made.append(chain[0].site.path)
        return real(module, chain, W, b)

    monkeypatch.setattr("lora_lite_func.injection.weight_route.merge_site", counting)
    attention = seeded(nn.MultiheadAttention(8, 2, batch_first=True))
    x = features(2, 5, 8)
    for model, args, config in (
        (seeded(Experts(4, 8, 6, False)), (features(8, 8),), {"target_parameters": "proj"}),
        (seeded(Mixing(8)), (x,), {"target_parameters": "mix"}),
        (attention, (x, x, x), {"target_names": "out_proj"}),
        (attention, (x, x, x), {"target_parameters": "in_proj_weight"}),
        (seeded(nn.LSTM(8, 4, bidirectional=True)), (x,), {"target_parameters": "weight_ih_l0$"}),
    ):
        params = lora(model, **config)
        for run in (lambda m, *a, p=params: ll.apply(m, p, *a), ll.bind(model, params)):
            made.clear()
            run(model, *args) if not isinstance(run, nn.Module) else run(*args)
            assert made == list(params)


# --------------------------------------------------------------------------------------- recurrence
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_see_the_adapted_tensors(kind: Any) -> None:
    model = seeded(kind(6, 8, 2, batch_first=True, bidirectional=True))
    params = lora(model, target_parameters="weight_[ih]h_l[01]")
    assert len(params) == 8
    x = features(2, 5, 6)
    y = agree(model, params, x)
    direct = grad(lambda p: first(ll.apply(model, p, x)).square().sum())(params)
    through = grad(
        lambda p: first(functional_call(model, ll.merge(model, p), (x,))).square().sum()
    )(params)
    close(direct, through, 1e-9)
    bound = ll.bind(model, params)
    first(bound(x)).square().sum().backward()
    held = dict(bound.named_parameters())
    assert all(p.grad is not None for p in held.values() if p.requires_grad)
    assert all(p.grad is None for p in model.parameters())
    close(first(ll.bind(model, params).to(torch.float32)(x.float())).double(), y, 1e-5)


def test_a_recurrent_layer_takes_base_tensors_and_keeps_them_constant() -> None:
    model, x = seeded(nn.GRU(4, 4)), features(3, 2, 4)
    W = torch.randn(12, 4, dtype=torch.float64, requires_grad=True)
    y = ll.functional_call(model, {}, x, base={"weight_ih_l0": W})[0]
    close(y, functional_call(model, {"weight_ih_l0": W}, (x,))[0], 1e-12)
    assert torch.autograd.grad(y.sum(), W)[0].any()
    assert not ll.apply(model, {}, x)[0].requires_grad


def test_bilinear_goes_by_its_stack() -> None:
    model = seeded(nn.Bilinear(5, 6, 4))
    params = lora(model, target_parameters="weight")
    assert (params.sites["weight"].stack, params["weight", "lora_A"].shape) == (4, (4, 2, 6))
    agree(model, params, features(3, 5), features(3, 6))


# -------------------------------------------------------------------------------------------- norms
class Odd(nn.Module):
    """A norm that nobody calls one."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.eps = 1e-6

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.weight * (
            hidden_states * torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + self.eps)
        )


class Scale(nn.Module):
    """One gain per feature, and no norm."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


def test_norms_are_known_by_what_they_do() -> None:
    model = nn.Sequential(
        nn.LayerNorm(8),
        nn.RMSNorm(8),
        Odd(8),
        Plus(8),
        Scale(8),
        nn.PReLU(8),
        nn.LayerNorm(8, elementwise_affine=False),
        nn.Linear(8, 8),
    )
    model.train()
    before = snapshot(model)
    sites = ll.targets(model, ll.IA3Config(target_kinds="norm"))
    assert same_state(before, snapshot(model))
    assert [site.path for site in sites] == ["0", "1", "2", "3"]
    assert [site.plus_one for site in sites] == [False, False, False, True]
    agree(seeded(model), moved(ll.init(model, ll.IA3Config(target_kinds="norm"))), features(3, 8))


@pytest.mark.parametrize(
    "layer",
    [
        nn.GroupNorm(2, 6),
        nn.BatchNorm2d(6),
        nn.InstanceNorm2d(6, affine=True),
        nn.LayerNorm((6, 4, 4)),
        nn.LayerNorm((4, 4)),
    ],
)
def test_norms_over_other_dimensions(layer: nn.Module) -> None:
    model, x = seeded(layer), features(2, 6, 4, 4)
    agree(model, moved(ll.init(model, ll.IA3Config(target_kinds="norm"))), x)
    agree(model, moved(ll.init(model, ll.BitFitConfig(target_kinds="norm"))), x)


def test_one_plus_a_weight_stays_exact_at_the_start() -> None:
    model = nn.Sequential(Plus(64)).to(torch.bfloat16)
    with torch.no_grad():
        model[0].weight.normal_(std=1e-3)
    x = torch.randn(3, 64).to(torch.bfloat16)
    params = ll.init(model, ll.IA3Config(target_kinds="norm"))
    assert torch.equal(ll.apply(model, params, x), model(x))
    assert torch.equal(ll.merge(model, params)["0.weight"], model[0].weight)


def test_a_bias_without_a_place_is_refused_in_the_first_call() -> None:
    model = seeded(nn.Sequential(nn.RMSNorm(8)))
    params = moved(ll.init(model, ll.BitFitConfig(target_kinds="norm")))
    for verb in (lambda: ll.apply(model, params, features(2, 8)), lambda: ll.merge(model, params)):
        with pytest.raises(
            ll.UnsupportedError,
            match=r"'0' \(RMSNorm\): bitfit merges into a bias, and this layer has no parameter",
        ):
            verb()


# --------------------------------------------------------------------------------------- embeddings
def test_lora_on_an_embedding_leaves_unseen_rows_alone() -> None:
    model = seeded(nn.Embedding(16, 8, padding_idx=3))
    params = ll.init(model, ll.LoRAConfig(r=2, target_kinds="embedding"))
    g = grad(lambda p: ll.apply(model, p, IDS).square().sum())(params)
    # 3 is the padding, which has no gradient
    assert set(g["", "lora_A"].abs().sum(0).nonzero().flatten().tolist()) == {0, 1, 5, 14}
    params = moved(params)
    y = ll.apply(model, params, IDS)
    expected = model.weight + 8.0 * (params["", "lora_B"] @ params["", "lora_A"]).mT
    close(y, torch.where((IDS == 3)[..., None], model.weight[3], expected[IDS]), 1e-12)
    assert torch.equal(ll.merge(model, params)["weight"][3], model.weight[3])


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Embedding(16, 8, max_norm=0.7),
        lambda: Scaled(16, 8, max_norm=0.7),
        lambda: nn.EmbeddingBag(16, 8, max_norm=0.7),
    ],
)
def test_a_bound_on_norms_never_writes_on_the_model(build: Any) -> None:
    model = nn.Sequential(seeded(build()))
    table = model[0].weight.detach().clone()
    params = lora(model, target_kinds="embedding")
    bare = ll.apply(model, {}, IDS)
    ll.apply(model, params, IDS)
    ll.bind(model, params)(IDS)
    assert torch.equal(table, model[0].weight)
    close(bare, model(IDS), 1e-12)  # the model itself does write
    assert not torch.equal(table, model[0].weight)


def test_an_offset_and_bags() -> None:
    model = seeded(nn.EmbeddingBag(16, 8, mode="mean", padding_idx=5))
    agree(model, lora(model, target_kinds="embedding"), IDS.flatten(), torch.tensor([0, 2]))
    agree(seeded(Own(16, 8)), lora(seeded(Own(16, 8)), target_kinds="embedding"), IDS)


# ------------------------------------------------------------------------------------------- stacks
def test_each_expert_has_its_own() -> None:
    model = seeded(Experts(3, 8, 6, False))
    params = lora(model, target_parameters="proj")
    A, B = params["proj", "lora_A"], params["proj", "lora_B"]
    assert (A.shape, B.shape) == ((3, 2, 8), (3, 6, 2))
    assert not torch.equal(A[0], A[1])
    delta = 8.0 * torch.einsum("eor,eri->eoi", B, A)
    x = features(6, 8)
    close(
        ll.apply(model, params, x),
        functional_call(model, {"proj": model.proj + delta}, (x,)),
        1e-12,
    )
    turned = seeded(Experts(3, 8, 6, True))
    site = ll.targets(turned, ll.LoRAConfig(target_parameters="proj"))[0]
    assert (site.d_in, site.d_out, site.num_experts, site.transposed) == (8, 6, 3, True)
    del turned.is_transposed
    site = ll.targets(
        turned, ll.LoRAConfig(target_parameters="proj", transposed_parameters="proj")
    )[0]
    assert (site.d_in, site.d_out, site.transposed) == (8, 6, True)
    assert "proj  3 x 8 -> 6  lora_A (3, 2, 8)" in repr(params)


def test_svd_starts_are_each_expert_s_own() -> None:
    model = seeded(Experts(3, 8, 6, True))
    params = ll.init(model, ll.PiSSAConfig(r=6, target_parameters="proj"))
    start = params.sites["proj"].scaling * params["proj", "lora_B0"] @ params["proj", "lora_A0"]
    close(start, model.proj.mT, 1e-10)


# --------------------------------------------------------------------------------------- everything
class Everything(nn.Module):
    """One of each."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.experts = Experts(2, 8, 8, True)
        self.lin = Transposed(8, 8)
        self.head = nn.Linear(8, 16, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.conv(x.mT).mT
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = self.norm(x + self.experts(x.flatten(0, 1)).view_as(x))
        return self.head(self.lin(x))


KINDS_OF_MODULE = {
    "target_kinds": ("linear", "conv", "embedding"),
    "target_parameters": ("in_proj_weight", "experts.proj"),
}


# torch warns of vmap over attention's fused kernel
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_one_adapter_over_all_kinds() -> None:
    model = seeded(Everything())
    params = lora(model, **KINDS_OF_MODULE)
    assert set(params) == {
        "embed",
        "conv",
        "attention.out_proj",
        "lin",
        "attention.in_proj_weight",
        "experts.proj",
    }
    y = agree(model, params, IDS)
    second = moved(ll.init(model, ll.DoRAConfig(r=2, **KINDS_OF_MODULE)), 4)
    two = ll.apply(model, (params, second), IDS)
    close(ll.merged(ll.merged(model, params), second)(IDS), two, 1e-9)
    close(ll.bind(ll.bind(model, params), second)(IDS), two, 1e-9)
    close(ll.apply(ll.bind(model, params), second, IDS), two, 1e-9)
    back = ll.unbind(ll.bind(model, (params, second)))
    assert isinstance(back, tuple)
    close(list(back), [params, second], 0.0)
    close(vmap(lambda p: ll.apply(model, p, IDS))(ll.stack([params, params]))[1], y, 1e-12)
    W = model.conv.weight * 2.0
    close(
        ll.functional_call(model, params, IDS, base={"conv.weight": W}),
        ll.apply(_with(model, W), params, IDS),
        1e-12,
    )


def _with(model: Any, W: Tensor) -> nn.Module:
    made = seeded(Everything())
    made.load_state_dict({**model.state_dict(), "conv.weight": W.detach()})
    return made


def test_all_kinds_have_derivatives_and_threads_do_not_meet() -> None:
    model = seeded(Everything())
    several = [lora(model, **KINDS_OF_MODULE), moved(lora(model, **KINDS_OF_MODULE), 5)]
    expected = [ll.apply(model, p, IDS) for p in several]
    before = snapshot(model)
    bound = [ll.bind(model, p) for p in several]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(10):
            wrong.extend(
                i
                for y in (ll.apply(model, several[i], IDS), bound[i](IDS))
                if (y - expected[i]).abs().max() > 1e-12
            )

    in_threads(4, lambda i: work(i % 2))
    assert not wrong
    assert same_state(before, snapshot(model))
    model.train()  # attention's fused kernels have no forward derivative
    tangent = torch.utils._pytree.tree_map(torch.ones_like, several[0])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        _, slope = torch.func.jvp(lambda p: ll.apply(model, p, IDS), (several[0],), (tangent,))
    h = 1e-6
    ahead, behind = (
        ll.apply(
            model,
            torch.utils._pytree.tree_map(lambda t, v, s=s: t + s * v, several[0], tangent),
            IDS,
        )
        for s in (h, -h)
    )
    close(slope, (ahead - behind) / (2 * h), 1e-5)


def test_what_a_layer_notes_on_itself_and_an_instance_s_own_forward() -> None:
    class Counting(nn.Conv1d):
        calls = 0

        def forward(self, input: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(input)

    model, x = seeded(nn.Sequential(Counting(4, 4, 1), nn.Conv1d(4, 4, 1))), features(2, 4, 5)
    params = lora(model, target_kinds="conv")
    bound: Any = ll.bind(model, params)
    bound(x)
    y = bound(x)
    assert (bound[0].calls, model[0].calls) == (2, 0)
    for module in model.modules():
        hooked(module)
    close(ll.apply(model, params, x), y, 1e-12)
    close(ll.bind(model, params)(x), y, 1e-12)


def test_one_graph_over_all_kinds() -> None:
    torch._dynamo.reset()
    model = seeded(Everything())
    counter = CompileCounter()
    compiled = torch.compile(lambda p, x: ll.apply(model, p, x), backend=counter, fullgraph=True)
    for seed in (1, 2):
        params = moved(lora(model, **KINDS_OF_MODULE), seed)
        close(compiled(params, IDS), ll.apply(model, params, IDS), 1e-10)
    assert counter.frame_count == 1
    bound = ll.bind(model, params)
    close(torch.compile(bound, backend="eager", fullgraph=True)(IDS), bound(IDS), 1e-10)
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------- what is said
@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        (
            {"target_names": "conv"},
            ll.TargetError,
            r"'conv' matched none of 3 linear-like layers; it matches 1 of kind 'conv': add "
            r"target_kinds=\('conv',\)",
        ),
        (
            {"target_names": "embed"},
            ll.TargetError,
            r"it matches 1 of kind 'embedding': add target_kinds=\('embedding',\)",
        ),
        (
            {"target_names": "experts"},
            ll.TargetError,
            "it matches the parameter 'experts.proj': name it in target_parameters",
        ),
        ({"target_kinds": "cnov"}, ll.TargetError, r"unknown kind 'cnov'; did you mean 'conv'\?"),
        (
            {"target_kinds": "parameter"},
            ll.TargetError,
            r"unknown kind 'parameter' \(name parameters in target_parameters\)",
        ),
        (
            {"target_kinds": "norm"},
            ll.UnsupportedError,
            "lora adapts linear, conv, parameter, embedding, this asks for 'norm'",
        ),
        (
            {"target_parameters": "norm.weight"},
            ll.UnsupportedError,
            "'norm.weight': lora adapts linear, .*, this is of kind 'vector'",
        ),
        (
            {"target_parameters": "experst"},
            ll.TargetError,
            r"target_parameters: 'experst' matched none of \d+ parameters",
        ),
        (
            {"target_kinds": "conv", "target_parameters": "conv.weight"},
            ll.TargetError,
            "'conv.weight' is named by .* belongs to the site 'conv'",
        ),
        (
            {"target_kinds": "conv", "dropout": 0.1},
            ll.UnsupportedError,
            "'conv': dropout acts on features .*set dropout=0",
        ),
        (
            {"target_kinds": "embedding", "dropout": 0.1},
            ll.UnsupportedError,
            "'embed': dropout acts on features .*this embedding",
        ),
        (
            {"target_parameters": "in_proj_weight", "dropout": 0.1},
            ll.UnsupportedError,
            "'attention.in_proj_weight': dropout acts on",
        ),
        (
            {"target_names": "out_proj", "dropout": 0.1},
            ll.UnsupportedError,
            "'attention.out_proj': dropout acts on features",
        ),
    ],
)
def test_what_cannot_be_meant(fields: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        ll.init(seeded(Everything()), ll.LoRAConfig(**fields))


def test_dropout_is_never_left_out_of_training() -> None:
    class Reading(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.lin.weight.mT

    places = (seeded(nn.Conv1d(8, 8, 1)), seeded(Reading()))
    for model, x in zip(places, (features(2, 8, 5), features(2, 8)), strict=True):
        kind = "conv" if isinstance(model, nn.Conv1d) else "linear"
        plain = lora(model, target_kinds=kind)
        from_file = Layout(
            plain.layout.variant, ll.LoRAConfig(r=2, dropout=0.5), plain.sites.values()
        )
        params = ll.Adapter(from_file, dict(plain))
        close(ll.apply(model, params, x), ll.apply(model, plain, x), 0.0)
        bound = ll.bind(model, params).train()
        for call in (
            lambda b=bound, x=x: b(x),
            lambda m=model, p=params, x=x: ll.apply(m.train(), p, x),
        ):
            with pytest.raises(
                ll.UnsupportedError,
                match=r"'(lin)?': dropout acts on features .*in this model the weight itself is "
                r"used",
            ):
                call()
    with pytest.raises(
        ll.UnsupportedError,
        match=r"'': block_dropout acts on features .*this convolution .*set block_dropout=0",
    ):
        ll.init(places[0], ll.OFTConfig(block_size=4, block_dropout=0.5, target_kinds="conv"))


def test_default_exclusions_are_for_linear_layers() -> None:
    model = nn.ModuleDict(
        {
            "embed_tokens": nn.Embedding(4, 4),
            "patch_embed": nn.Conv2d(3, 4, 2),
            "embed_proj": nn.Linear(4, 4),
            "q": nn.Linear(4, 4),
        }
    )
    paths = lambda **kw: [site.path for site in ll.targets(model, ll.LoRAConfig(**kw))]  # noqa: E731
    assert paths() == ["q"]
    assert paths(target_kinds=("linear", "embedding", "conv")) == [
        "embed_tokens",
        "patch_embed",
        "q",
    ]
    assert paths(target_kinds="embedding", target_names="embed") == ["embed_tokens"]


def test_a_place_that_changed_is_named() -> None:
    model = seeded(Everything())
    params = lora(model, **KINDS_OF_MODULE)
    x = IDS
    for path, new, message in (
        ("conv", nn.Conv1d(8, 4, 3), "site 'conv': expected 24 -> 8, found Conv1d .24 -> 4."),
        (
            "embed",
            nn.Linear(8, 8),
            "site 'embed': expected 16 -> 8, found Linear .no embedding layer.",
        ),
        ("lin", nn.Linear(8, 8), "site 'lin': expected 8 -> 8, stored transposed"),
        (
            "experts",
            Experts(3, 8, 8, True),
            r"site 'experts.proj': expected 2 x 8 -> 8, found Experts .proj of shape \(3, 8, 8\)",
        ),
    ):
        changed = seeded(Everything())
        setattr(changed, path, new.double())
        for verb in (
            lambda c=changed: ll.apply(c, params, x),
            lambda c=changed: ll.merge(c, params),
            lambda c=changed: ll.bind(c, params),
        ):
            with pytest.raises(ll.StructureError, match=message):
                verb()


def test_a_weight_that_is_computed_cannot_be_substituted() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 1)))
    params = ll.init(model, ll.LoRAConfig(r=2, target_kinds="conv"))
    with pytest.raises(
        ll.UnsupportedError, match=r"'0' \(\w+\): its weight is computed, not a parameter"
    ):
        ll.apply(model, params, torch.randn(1, 4, 3))


def test_a_tensor_is_adapted_as_one_thing() -> None:
    model = net()
    layer = lora(model, target_names="0.up")
    bare = lora(model, target_parameters="0.up.weight")
    with pytest.raises(
        ll.UnsupportedError,
        match=r"'layers.0.up.weight' is adapted as a bare parameter and with its layer "
        r"'layers.0.up'",
    ):
        ll.apply(model, (layer, bare), features(2, 16))
    agree(model, bare, features(2, 16))


def test_bound_recurrent_layers_copy_and_pickle() -> None:
    model, x = seeded(nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4))), features(3, 2, 4)
    bound = ll.bind(model, lora(model, target_names="0", target_parameters="weight_hh_l0"))
    for twin in (copy.deepcopy(bound), pickle.loads(pickle.dumps(bound))):
        close(twin(x)[0], bound(x)[0], 1e-12)


# --------------------------------------------------------------------------------------------- ties
class Tied(nn.Module):
    """A language model in small: the head's weight is the table."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.mid = nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 16, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(torch.tanh(self.mid(self.embed(ids))))


def test_a_tied_parameter_is_adapted_in_every_use() -> None:
    model = seeded(Tied())
    for pattern in ("embed.weight", "lm_head.weight"):
        params = lora(model, target_parameters=pattern)
        y = agree(model, params, IDS)
        report = ll.check(model, params, IDS)
        assert report.ok
        assert not report.tied
        new = ll.merge(model, params)
        assert set(new) == {"embed.weight", "lm_head.weight"}
        # torch puts the one new tensor in place of both tied weights
        close(y, functional_call(model, {"embed.weight": new["embed.weight"]}, (IDS,)), 1e-12)
        merged: Any = ll.merged(model, params)
        assert merged.embed.weight is merged.lm_head.weight
        bound = ll.bind(model, params)
        assert len([p for p in bound.parameters() if p.requires_grad]) == 2
        bound(IDS).square().sum().backward()
        (path,) = params
        direct = grad(lambda p: ll.apply(model, p, IDS).square().sum())(params)
        close(
            [p.grad for p in bound.parameters() if p.requires_grad],
            [direct[path]["lora_A"], direct[path]["lora_B"]],
            1e-9,
        )
        close(
            ll.apply(ll.bind(model, params), params, IDS),
            ll.apply(model, (params, params), IDS),
            1e-10,
        )


def test_an_adapted_layer_is_untied_from_the_others() -> None:
    model = seeded(Tied())
    for chosen in ({"target_kinds": "embedding"}, {"target_names": "lm_head", "exclude_names": ()}):
        params = lora(model, **chosen)
        agree(model, params, IDS)
        merged: Any = ll.merged(model, params)
        assert merged.embed.weight is not merged.lm_head.weight
        (path,) = params
        other = "lm_head" if path == "embed" else "embed"
        assert torch.equal(merged.get_submodule(other).weight, model.embed.weight)
        report = ll.check(model, params, IDS)
        assert report.tied == {path: (f"{other}.weight",)}


# ------------------------------------------------------------------------------------ chosen tokens
def test_chosen_tokens_are_trained_alone() -> None:
    model = seeded(Tied())
    cfg = ll.TokensConfig(token_ids=(5, 1, 5))
    params = ll.init(model, cfg)
    assert list(params) == ["embed"]
    assert torch.equal(ll.apply(model, params, IDS), model(IDS))
    assert params["embed", "lora_rows"].shape == (2, 8)
    params = moved(params)
    y = agree(model, params, IDS)
    new = ll.merge(model, params)["embed.weight"]
    assert (new != model.embed.weight).any(1).nonzero().flatten().tolist() == [1, 5]
    close(new[[1, 5]] - model.embed.weight[[1, 5]], params["embed", "lora_rows"], 1e-12)
    assert (
        grad(lambda p: ll.apply(model, p, IDS).square().sum())(params)["embed", "lora_rows"]
        .any(1)
        .all()
    )
    close(vmap(lambda p: ll.apply(model, p, IDS))(ll.stack([params, params]))[0], y, 1e-12)
    close(
        ll.apply(model, ll.scale(params, 0.5), IDS),
        ll.apply(model, moved(ll.init(model, cfg), size=0.05), IDS),
        1e-12,
    )
    untouched = torch.tensor([[0, 14]])
    assert torch.equal(ll.apply(model, params, untouched), model(untouched))


def test_chosen_tokens_of_a_tied_table_are_scored_too() -> None:
    model = seeded(Tied())
    params = moved(
        ll.init(model, ll.TokensConfig(token_ids=(1, 5), target_parameters="embed.weight"))
    )
    y = agree(model, params, IDS)
    close(
        y,
        functional_call(model, {"embed.weight": ll.merge(model, params)["embed.weight"]}, (IDS,)),
        1e-12,
    )
    with pytest.raises(
        ll.UnsupportedError,
        match="'embed': tokens trains the rows of chosen ids, and none are chosen",
    ):
        ll.init(model, ll.TokensConfig())
    with pytest.raises(ll.UnsupportedError, match="token id 16: the table has 16 rows"):
        ll.init(model, ll.TokensConfig(token_ids=(16,)))
    with pytest.raises(ll.ConfigError, match="expected ids of 0 and up, found -1"):
        ll.TokensConfig(token_ids=(-1,))
    named = ll.init(model, ll.TokensConfig(token_ids=(1, 5), target_parameters="lm_head.weight"))
    same = pytree.tree_unflatten(pytree.tree_leaves(params), pytree.tree_structure(named))
    close(ll.apply(model, same, IDS), y, 1e-12)


def test_chosen_tokens_of_a_head_alone() -> None:
    model = seeded(Tied())
    cfg = ll.TokensConfig(
        token_ids=(5, 1), target_kinds="linear", target_names="lm_head", exclude_names=()
    )
    params = moved(ll.init(model, cfg))
    assert params["lm_head", "lora_rows"].shape == (2, 8)
    y, base = ll.apply(model, params, IDS), model(IDS)
    assert (y != base).flatten(0, 1).any(0).nonzero().flatten().tolist() == [1, 5]
    hidden = torch.tanh(model.mid(model.embed(IDS)))
    close(y[..., [1, 5]] - base[..., [1, 5]], hidden @ params["lm_head", "lora_rows"].mT, 1e-12)
    with pytest.raises(ll.UnsupportedError, match="token id 16: the table has 16 rows"):
        ll.init(model, dataclasses.replace(cfg, token_ids=(16,)))


# ------------------------------------------------------------------------------- real architectures
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe", "GptOss", "GPT2"])
def test_stacked_experts_and_transposed_linears_of_transformers(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 32,
    }
    sizes |= {
        "num_key_value_heads": 1,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    sizes |= {"moe_intermediate_size": 24, "n_embd": 16, "n_layer": 2, "n_head": 2}
    kind = getattr(transformers, "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")
    # float32: the experts' grouped product has no double form
    model = kind(getattr(transformers, f"{family}Config")(**sizes)).eval()
    ids = torch.randint(0, 32, (2, 7))
    if family == "GPT2":
        params = lora(model, target_names=r"\.(c_attn|c_proj|c_fc)$")
        assert {(s.d_in, s.d_out) for s in params.sites.values()} == {
            (16, 48),
            (16, 16),
            (16, 64),
            (64, 16),
        }
    else:
        params = lora(model, target_parameters=r"experts\.(gate_up|down)_proj$")
        site = params.sites["model.layers.0.mlp.experts.gate_up_proj"]
        assert (site.num_experts, site.d_in, site.d_out, site.transposed) == (
            4,
            16,
            site.d_out,
            family == "GptOss",
        )
        assert site.d_out in (48, 2 * 24)
    y = ll.apply(model, params, ids).logits
    assert (y - model(ids).logits).abs().max() > 1e-3
    close(ll.merged(model, params)(ids).logits, y, 1e-5)
    bound = ll.bind(model, params)
    close(bound(ids).logits, y, 1e-5)
    bound(ids).logits.square().sum().backward()
    assert all(p.grad is not None for p in bound.parameters() if p.requires_grad)


class Noting(nn.Linear):
    """A layer whose call takes more than its input."""

    def forward(self, input: Tensor, note: Tensor | None = None) -> Tensor:
        assert note is None or note.ndim == 1
        return super().forward(input)


class Pair(nn.Linear):
    """A layer whose call returns more than its product."""

    def forward(self, input: Tensor) -> Any:
        return super().forward(input), None


@pytest.mark.parametrize(
    "config",
    [ll.LoRAConfig(r=2), ll.DoRAConfig(r=2), ll.HRAConfig(r=2)],
    ids=lambda c: type(c).__name__,
)
def test_the_input_is_found_among_keywords_in_any_order(config: ll.AdapterConfig) -> None:
    class Caller(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Noting(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(note=x[0], input=x)
            return y

    model, x = Caller(), torch.randn(3, 4)
    params = moved(ll.init(model, config))
    close(ll.apply(model, params, x), ll.merged(model, params)(x), 1e-5)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'input'"):
        ll.bind(model, params).layer()


def test_a_layer_that_returns_more_than_its_product() -> None:
    model, x = nn.Sequential(Pair(4, 4)), torch.randn(3, 4)
    with pytest.raises(
        ll.UnsupportedError,
        match=r"'0' \(Pair\): expected a tensor from the layer's call, found tuple; leave it out",
    ):
        ll.apply(model, ll.init(model, ll.LoRAConfig(r=2)), x)
    for config in (ll.HRAConfig(r=2), ll.LoRAConfig(r=2, target_parameters=r"0\.weight")):
        params = moved(ll.init(model, config))
        close(ll.apply(model, params, x)[0], ll.merged(model, params)(x)[0], 1e-5)


class Grouped(nn.Linear):
    """Takes (..., groups, d_in) and gives (..., groups, d_out / groups): one weight each."""

    groups = 2

    def forward(self, input: Tensor) -> Tensor:
        W = self.weight.view(self.groups, -1, self.in_features)
        return torch.einsum("...gi,goi->...go", input, W)


@pytest.mark.parametrize("config", [ll.LoRAConfig(r=2), ll.DoRAConfig(r=2), ll.IA3Config()])
def test_a_layer_whose_product_goes_by_groups(config: ll.AdapterConfig) -> None:
    model, x = nn.Sequential(Grouped(4, 6, bias=False)), torch.randn(3, 2, 4)
    params = moved(ll.init(model, config))
    message = r"'0' \(Grouped\): expected \(\.\.\., 6\) from the layer's call, found \(3, 2, 3\)"
    for adapted in (params, ll.rows(ll.stack([params, params]), [0, 1, 0])):
        with pytest.raises(ll.UnsupportedError, match=message):
            ll.apply(model, adapted, x)
    agree(model, lora(model, target_parameters=r"0\.weight"), x, tol=1e-5)
