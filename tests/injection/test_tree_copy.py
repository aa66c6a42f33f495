"""The copied module tree: what models do to themselves, and what must come through it unchanged."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Net, close, leaves, moved, net, normal, same_state, snapshot
from hooks import hooked
from torch import Tensor, nn

import lora_lite_func as ll


def adapter(model: nn.Module, **config: Any) -> ll.Adapter:
    return moved(ll.init(model, ll.LoRAConfig(r=4, **config)))


def x16(*batch: int) -> Tensor:
    return torch.randn(
        *(batch or (5,)), 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )


# ----------------------------------------------------------------------------------- sharing, tying
class Twice(nn.Module):
    """One linear under two names, another tied to it by its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16, dtype=torch.float64)
        self.b = self.a
        self.c = nn.Linear(16, 16, dtype=torch.float64)
        self.c.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def test_a_shared_module_is_copied_once_and_adapted_everywhere() -> None:
    model, x = Twice(), x16()
    params = adapter(model, target_names=("^a$",))
    assert list(params) == ["a"]
    delta = 2 * 2.0 * params["a"]["lora_B"] @ params["a"]["lora_A"]
    a = lambda x: F.linear(x, model.a.weight + delta, model.a.bias)  # noqa: E731
    close(ll.apply(model, params, x), model.c(torch.tanh(a(torch.tanh(a(x))))), 1e-12)
    bound = ll.bind(model, params)
    assert bound.a is bound.b
    stored = dict(bound.named_parameters(remove_duplicate=False))
    assert stored["c.weight"] is stored["a.weight"] is stored["b.weight"]
    close(bound(x), ll.apply(model, params, x), 1e-12)


def test_two_names_of_one_module_are_refused_together() -> None:
    model = Twice()
    site = ll.init(model, ll.LoRAConfig(r=4, target_names=("^a$",)))
    twin = nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.Linear(16, 16)})
    both = ll.init(twin, ll.LoRAConfig(r=4))
    assert set(both) == {"a", "b"}
    assert set(site) == {"a"}
    with pytest.raises(
        ll.StructureError, match="site 'b' is the same module as one at another path"
    ):
        ll.apply(model, both, x16())


def test_base_override_reaches_every_name_of_a_tied_parameter() -> None:
    model, x = Twice(), x16()
    W = torch.randn(16, 16, dtype=torch.float64, requires_grad=True)
    y = ll.functional_call(model, {}, x, base={"c.weight": W})
    expected = torch.func.functional_call(model, {"c.weight": W}, (x,))
    assert torch.equal(y, expected)
    (g,) = torch.autograd.grad(y.sum(), W)
    assert g.abs().sum() > 0
    with pytest.raises(
        ll.StructureError, match=r"no parameter or buffer 'c.weigth'; did you mean 'c.weight'"
    ):
        ll.functional_call(model, {}, x, base={"c.weigth": W})
    with pytest.raises(
        ll.StructureError, match=r"base 'c.weight': expected shape \(16, 16\), found \(3,\)"
    ):
        ll.functional_call(model, {}, x, base={"c.weight": torch.zeros(3)})


def test_the_model_itself_is_a_linear() -> None:
    model, x = nn.Linear(16, 8, dtype=torch.float64), x16()
    params = adapter(model)
    assert list(params) == [""]
    y = ll.apply(model, params, x)
    close(y, ll.merged(model, params)(x), 1e-12)
    assert set(ll.merge(model, params)) == {"weight"}
    assert torch.equal(ll.bind(model, params)(x), y)
    close(y, ll.apply(model, params, input=x), 1e-12)


# ----------------------------------------------------------------------------- what instances carry


def test_instance_level_forwards_are_bound_to_the_copy() -> None:
    model, x = net(), x16()
    params = adapter(model)
    expected = ll.apply(model, params, x)
    assert (expected - model(x)).abs().max() > 1e-3
    for module in model.modules():
        hooked(module)
    before = snapshot(model)
    y = ll.apply(model, params, x)
    close(y, expected, 1e-12)  # another of the equal forms serves a layer whose call is wrapped
    assert torch.equal(ll.bind(model, params)(x), y)
    assert same_state(before, snapshot(model))


def test_a_closure_around_the_old_forward_is_bound_to_the_copy() -> None:
    model, x = net(depth=1), x16()
    params = adapter(model)
    block: Any = model.layers[0]
    old, up = block.up.forward, block.up
    block.up.forward = lambda x, scale=3.0: old(x) * scale + 0.0 * up.weight.sum()
    y, base = ll.apply(model, params, x), model(x)
    h = block.norm(x)
    site = params["layers.0.up"]
    inner = (F.linear(h, up.weight, up.bias)) * 3.0 + 4.0 * h @ site["lora_A"].T @ site["lora_B"].T
    t = torch.tanh(inner)
    down = params["layers.0.down"]
    z = (
        x
        + F.linear(t, block.down.weight, block.down.bias)
        + 4.0 * t @ down["lora_A"].T @ down["lora_B"].T
    )
    close(y, model.head(z), 1e-12)
    assert (y - base).abs().max() > 1e-3


class Opaque:
    """A callable that no one can look into."""

    def __init__(self, f: Any) -> None:
        self.f = f

    def __call__(self, *args: Any) -> Any:
        return self.f(*args)


def test_a_forward_that_cannot_be_rebound_is_refused_with_its_path() -> None:
    model = net()
    params = adapter(model)
    model.layers[0].forward = Opaque(model.layers[0].forward)
    with pytest.raises(ll.UnsupportedError, match=r"'layers\.0': its own `forward` is a Opaque"):
        ll.apply(model, params, x16())


def test_modules_kept_in_plain_lists_are_the_adapted_ones() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(16, 16, dtype=torch.float64)
            self.second = nn.Linear(16, 16, dtype=torch.float64)
            self.order = [self.second, ("name", self.first)]

        def forward(self, x: Tensor) -> Tensor:
            return self.order[1][1](torch.tanh(self.order[0](x)))

    model, x = Listed(), x16()
    params = adapter(model)
    close(ll.apply(model, params, x), ll.merged(model, params)(x), 1e-12)
    assert (ll.apply(model, params, x) - model(x)).abs().max() > 1e-3
    assert model.order[0] is model.second


def test_user_hooks_run_and_hooks_installed_during_a_call_stay_off_the_model() -> None:
    model, x = net(), x16()
    params = adapter(model)
    seen: list[Tensor] = []
    handle = model.layers[0].up.register_forward_hook(lambda module, args, out: seen.append(out))
    y = ll.apply(model, params, x)
    assert len(seen) == 1
    handle.remove()

    class Installing(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.inner.layers[0].register_forward_hook(lambda *_: None)
            self.inner.layers[1].norm.register_forward_pre_hook(lambda *_: None)
            return self.inner(x)

    outer = Installing(model)
    before = snapshot(outer)
    params = adapter(outer)
    for _ in range(2):
        ll.apply(outer, params, x)
    assert outer.calls == 0
    assert same_state(before, snapshot(outer))
    assert y.shape == (5, 8)


def test_what_is_registered_on_a_bound_module_stays_off_the_model() -> None:
    model = net()
    params = adapter(model)
    before = snapshot(model)
    for bound in (ll.bind(model, params), ll.prepared(model, params), ll.merged(model, params)):
        for module in (bound, bound.layers[0].up, bound.layers[0].norm):
            module.register_forward_hook(lambda *_: None, always_call=True)
            module.register_forward_pre_hook(lambda *_: None, with_kwargs=True)
            module.register_full_backward_hook(lambda *_: None)
            module.register_full_backward_pre_hook(lambda *_: None)
            module.register_state_dict_pre_hook(lambda *_: None)
            module.register_state_dict_post_hook(lambda *_: None)
            module.register_load_state_dict_pre_hook(lambda *_: None)
            module.register_load_state_dict_post_hook(lambda *_: None)
            module.register_buffer("extra", torch.zeros(()), persistent=False)
        assert same_state(before, snapshot(model))


def test_module_compile_is_left_out_of_the_copy() -> None:
    model, x = net(), x16()
    params = adapter(model)
    expected = ll.apply(model, params, x)
    model.layers[0].compile(backend="eager")
    model.layers[1].up.compile(backend="eager")
    assert torch.equal(ll.apply(model, params, x), expected)
    torch._dynamo.reset()


def test_a_copy_leaves_no_garbage_for_the_collector() -> None:
    model, x = net(), x16()
    params = adapter(model)
    alive: list[Any] = []
    model.layers[0].register_forward_hook(lambda module, *_: alive.append(weakref.ref(module)))
    ll.apply(model, params, x)
    assert alive[0]() is None


# --------------------------------------------------------------------------- the base is a constant
def test_the_base_is_a_constant_whatever_it_says() -> None:
    model, x = net(), x16()
    params = adapter(model)
    assert all(p.requires_grad for p in model.parameters())
    assert not ll.apply(model, params, x).requires_grad
    tracked = x.clone().requires_grad_()
    ll.apply(model, params, tracked).sum().backward()
    assert tracked.grad is not None
    assert all(p.grad is None for p in model.parameters())


def test_an_exception_inside_leaves_the_model_as_it_was() -> None:
    model, x = net(), x16()
    params = adapter(model)
    handle = model.head.register_forward_hook(lambda *_: 1 / 0)
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError, match="division"):
        ll.apply(model, params, x)
    assert same_state(before, snapshot(model))
    handle.remove()
    ll.apply(model, params, x)


def test_training_mode_statistics_stay_as_they_were() -> None:
    model = (
        nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 4))
        .double()
        .train()
    )
    params = adapter(model)
    before = snapshot(model)
    ll.apply(model, params, x16())
    bound = ll.bind(model, params)
    bound(x16())
    assert same_state(before, snapshot(model))
    assert bound[1].num_batches_tracked == 1
    bound.eval()
    assert model.training


@pytest.mark.parametrize("change", ["half", "train", "weights", "replaced", "frozen"])
def test_changes_to_the_model_are_seen_at_the_next_call(change: str) -> None:
    model, x = net(), x16()
    params = adapter(model)
    ll.apply(model, params, x)
    if change == "half":
        model, x = model.to(torch.float32), x.float()
    elif change == "train":
        model.train()
    elif change == "weights":
        model.load_state_dict(net(seed=7).state_dict())
    elif change == "replaced":
        model.layers[0].up = nn.Linear(16, 24, dtype=torch.float64)
    else:
        model.requires_grad_(False)
    close(
        ll.apply(model, params, x), ll.merged(model, params)(x), 1e-5 if change == "half" else 1e-12
    )
    assert ll.apply(model, params, x).dtype == x.dtype


def test_a_site_that_is_not_there_or_has_other_sizes() -> None:
    params = adapter(net(depth=3))
    with pytest.raises(
        ll.StructureError,
        match=r"no module at site 'layers\.2\.(up|down)'; did you mean 'layers\.[01]\.\1'",
    ):
        ll.apply(net(depth=2), params, x16())
    with pytest.raises(
        ll.StructureError,
        match=r"site 'layers\.0\.up': expected 16 -> 24, found Linear \(16 -> 40\)",
    ):
        ll.apply(net(depth=3, inner=40), params, x16())
    model = net(depth=3)
    model.layers[1].up = nn.Identity()
    with pytest.raises(
        ll.StructureError,
        match=r"site 'layers\.1\.up': expected 16 -> 24, found Identity \(no linear layer\)",
    ):
        ll.bind(model, params)


# -------------------------------------------------------------------------------------- composition
def test_several_adapters_apply_in_order() -> None:
    model, x = net(), x16()
    configs = (
        ll.HRAConfig(r=4),
        ll.LoRAConfig(r=4),
        ll.DoRAConfig(r=2),
        ll.IA3FFConfig(),
        ll.ROADConfig(group_size=4),
    )
    several = [moved(ll.init(model, cfg), seed) for seed, cfg in enumerate(configs)]
    y = ll.apply(model, several, x)
    dense: nn.Module = model
    for params in several:
        dense = ll.merged(dense, params)
    close(y, dense(x), 1e-10)
    close(ll.merged(model, several)(x), y, 1e-10)
    close(ll.bind(model, tuple(several))(x), y, 1e-12)
    close(ll.apply(model, {"a": several[0], "b": several[1:]}, x), y, 1e-12)
    assert torch.equal(ll.apply(model, (), x), model(x))
    assert torch.equal(ll.apply(model, [], x), model(x))
    assert torch.equal(ll.apply(model, {}, x), model(x))
    back = ll.unbind(ll.bind(model, several))
    assert isinstance(back, tuple)
    assert all(torch.equal(a, b) for a, b in zip(leaves(list(back)), leaves(several), strict=True))


def test_a_bound_model_is_a_base_like_any_other() -> None:
    model, x = net(), x16()
    first, second = adapter(model), moved(ll.init(model, ll.IA3Config()))
    bound = ll.bind(model, first)
    expected = ll.apply(model, (first, second), x)
    close(ll.apply(bound, second, x), expected, 1e-12)
    again = ll.bind(bound, second)
    close(again(x), expected, 1e-12)
    assert isinstance(ll.unbind(again), tuple)
    assert torch.equal(bound(x), ll.apply(model, first, x))


def test_bind_shares_storage_with_the_adapter_and_the_base() -> None:
    model, x = net(), x16()
    params = adapter(model)
    bound = ll.bind(model, params)
    optimizer = torch.optim.AdamW([p for p in bound.parameters() if p.requires_grad], lr=1e-2)
    before = ll.apply(model, params, x)
    bound(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, ll.apply(model, params, x))
    assert torch.equal(bound(x), ll.apply(model, params, x))
    mine = {p.data_ptr() for p in model.parameters()}
    assert mine <= {p.data_ptr() for p in bound.parameters()}
    with pytest.raises(ll.StructureError, match=r"expected a module made by ll\.bind, found Net"):
        ll.unbind(model)


# --------------------------------------------------------------------------- torch's own fast paths
# the bare base takes its fast path, which warns
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("grads", [False, True])
def test_encoder_fast_path_does_not_skip_the_adapter(norm_first: bool, grads: bool) -> None:
    layer = nn.TransformerEncoderLayer(
        16, 4, 32, batch_first=True, norm_first=norm_first, dtype=torch.float64
    )
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()
    params = adapter(model)
    assert len(params) == 6
    x, mask = x16(3, 7), torch.zeros(3, 7, dtype=torch.bool)
    mask[1, 5:] = True
    with torch.set_grad_enabled(grads):
        y = ll.apply(model, params, x, src_key_padding_mask=mask)
        dense = ll.merged(model, params)
        expected = dense(x, src_key_padding_mask=mask)
        keep = ~mask[..., None].expand_as(y)
        close(y[keep], expected[keep], 1e-10)
        assert (y - model(x, src_key_padding_mask=mask))[keep].abs().max() > 1e-3
        close(ll.bind(model, params)(x, src_key_padding_mask=mask)[keep], y[keep], 1e-12)


def test_recurrent_nets_around_a_site() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(16, 16, batch_first=True)
            self.out = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.rnn(x)[0])

    model = Tagger().double()
    params = adapter(model)
    x = x16(2, 5)
    y = ll.apply(model, params, x)
    close(y, ll.merged(model, params)(x), 1e-12)
    y.sum()
    assert not y.requires_grad
    ll.bind(model, params)(x).sum().backward()
    assert all(p.grad is None for p in model.parameters())


def test_parametrized_layers_work_and_refuse_to_merge() -> None:
    model, x = net(), x16()
    nn.utils.parametrizations.weight_norm(model.layers[0].up)
    params = adapter(model)
    y = ll.apply(model, params, x)
    assert (y - model(x)).abs().max() > 1e-3
    with pytest.raises(
        ll.UnsupportedError, match=r"'layers\.0\.up' \(\w+\): its weight is computed"
    ):
        ll.merge(model, params)


def test_dropout_only_in_training_mode_and_only_on_the_branch() -> None:
    model, x = net(), x16()
    params = moved(ll.init(model, ll.LoRAConfig(r=4, dropout=0.5)))
    y = ll.apply(model, params, x)
    assert torch.equal(y, ll.apply(model, params, x))
    model.train()
    torch.manual_seed(0)
    draws = torch.stack([ll.apply(model, params, x) for _ in range(3)])
    assert (draws[0] - draws[1]).abs().max() > 1e-3
    zero = ll.scale(params, 0.0)
    assert torch.equal(ll.apply(model, zero, x), model(x))
    torch.func.vmap(lambda p: ll.apply(model, p, x), randomness="different")(
        ll.stack([params, params])
    )


def test_wrappers_that_hide_their_modules_are_refused() -> None:
    model = net()
    params = adapter(model)
    with pytest.raises(ll.UnsupportedError, match=r"torch\.compile.*_orig_mod"):
        ll.apply(torch.compile(model), params, x16())
    with pytest.raises(ll.UnsupportedError, match=r"DataParallel.*bind first, then wrap"):
        ll.init(nn.DataParallel(model), ll.LoRAConfig())


class Bare(nn.Module):
    """Linear-like by structure alone, without so much as a bias attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features = self.out_features = 16
        self.weight = nn.Parameter(normal(16, 16, seed=0))

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        return x @ self.weight.mT * gain


@pytest.mark.parametrize(
    "cfg",
    [ll.LoRAConfig(r=4), ll.DoRAConfig(r=4), ll.HRAConfig(r=4), ll.ROADConfig(group_size=4)],
    ids=lambda c: type(c).__name__,
)
def test_linear_like_by_structure_alone(cfg: ll.AdapterConfig) -> None:
    model, x = nn.Sequential(Bare(), nn.Tanh(), Bare()), x16()
    params = moved(ll.init(model, cfg))
    close(ll.apply(model, params, x), ll.merged(model, params)(x), 1e-10)
    close(ll.bind(model, params)(x), ll.apply(model, params, x), 1e-12)


def test_a_bias_that_has_nowhere_to_go_is_refused_at_merge() -> None:
    model = nn.Sequential(Bare())
    params = moved(ll.init(model, ll.BitFitConfig()))
    assert (ll.apply(model, params, x16()) - model(x16())).abs().max() > 1e-3
    with pytest.raises(
        ll.UnsupportedError,
        match=r"'0' \(Bare\): bitfit merges into a bias, and this layer has no parameter for one",
    ):
        ll.merge(model, params)


def test_what_is_not_an_adapter_is_refused() -> None:
    model = net()
    with pytest.raises(
        ll.StructureError,
        match="expected an Adapter, or a tuple, list or dict of them, found Tensor",
    ):
        ll.apply(model, torch.zeros(3), x16())  # type: ignore[arg-type]
    params = adapter(model)
    with pytest.raises(
        ll.StructureError, match=r"a stack of 2 adapters; ll\.rows.*torch\.func\.vmap"
    ):
        ll.apply(model, ll.stack([params, params]), x16())
    with pytest.raises(ll.StructureError, match=r"ll\.combine\(trainable, frozen\)"):
        ll.apply(model, ll.partition(moved(ll.init(model, ll.PiSSAConfig(r=4))))[0], x16())


def test_gradient_checkpointing_of_a_block() -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(Net):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=False)
            return self.head(x)

    plain = net()
    model = Checkpointed().double().eval()
    model.load_state_dict(plain.state_dict())
    for cfg in (ll.LoRAConfig(r=4), ll.DoRAConfig(r=4), ll.HRAConfig(r=4)):
        trainable, frozen = ll.partition(moved(ll.init(model, cfg)))
        tensors = [t.requires_grad_() for t in leaves(trainable)]
        params = ll.combine(trainable, frozen)
        wanted = torch.autograd.grad(ll.apply(plain, params, x16()).square().sum(), tensors)
        found = torch.autograd.grad(ll.apply(model, params, x16()).square().sum(), tensors)
        close(found, wanted, 1e-12)


def test_autocast_follows_the_layer() -> None:
    model = net(dtype=torch.float32)
    params = adapter(model)
    x = x16().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, base = ll.apply(model, params, x), model(x)
    assert y.dtype == base.dtype == torch.bfloat16
    close(y.float(), ll.apply(model, params, x), 0.05)
