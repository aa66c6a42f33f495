"""Every method x every law. A row in cases.py is all a method needs to be held to them."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import optree
import pytest
import torch
import torch.utils._pytree as pytree
from cases import CALIBRATED, CASES, MERGED, Case, dense, merging, needs_data, start
from helpers import Net, close, in_threads, leaves, moved, net, normal, same_state, snapshot
from hypothesis import given
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call, grad, jvp, vmap
from torch_versions import GRAPHS_OF_UNLIKE_STRENGTHS

import lora_lite_func as ll

every = pytest.mark.parametrize("case", CASES + CALIBRATED, ids=repr)
merged = pytest.mark.parametrize("case", MERGED, ids=repr)
FP64 = st.just(torch.float64)
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])


@st.composite
def situations(draw: Any, dtypes: Any = FP64) -> dict[str, Any]:
    """A model's sizes and a config's keywords."""
    return {
        "model": {
            "width": draw(st.sampled_from([8, 16, 24])),
            "inner": draw(st.sampled_from([8, 16, 40])),
            "depth": draw(st.integers(1, 3)),
            "bias": draw(st.booleans()),
            "dtype": draw(dtypes),
            "seed": draw(st.integers(0, 99)),
        },
        "config": {
            "r": draw(st.sampled_from([2, 4, 8])),
            "alpha": draw(st.sampled_from([1.0, 8.0, 12.5])),
            "target_names": draw(st.sampled_from([(), ("up",), ("down$",), (r"layers\.0\.",)])),
        },
        "seed": draw(st.integers(0, 2**31)),
        "batch": draw(st.sampled_from([(3,), (2, 5), (1,), (2, 1, 3)])),
    }


def build(case: Case, s: dict[str, Any], train: bool = True) -> tuple[Net, ll.Adapter, Tensor]:
    """Model, adapter (as if trained, unless told otherwise) and input of a situation."""
    model = net(**s["model"])
    params = start(case, model, case.config(**s["config"]), seed=s["seed"])
    gen = torch.Generator().manual_seed(s["seed"] % 1000)
    x = torch.randn(*s["batch"], s["model"]["width"], generator=gen, dtype=torch.float64).to(
        s["model"]["dtype"]
    )
    return model, moved(params) if train else params, x


def simple(case: Case, **config: Any) -> tuple[Net, ll.Adapter, Tensor]:
    """One fixed situation, for the laws that are slow or don't depend on sizes."""
    model = net(width=16, inner=24, depth=2)
    params = start(case, model, case.config(r=4, **config), seed=3)
    return (
        model,
        moved(params),
        normal(6, 16, seed=5),
    )


def loss(model: nn.Module, params: Any, x: Tensor) -> Tensor:
    return ll.apply(model, params, x).square().sum()


# ---------------------------------------------------------------------------------------- the start
@every
@given(s=situations(DTYPES))
def test_identity_at_init(case: Case, s: dict[str, Any]) -> None:
    model, params, x = build(case, s, train=False)
    y, base = ll.apply(model, params, x), model(x)
    if case.exact:
        assert torch.equal(y, base)
    elif case.identity is None:
        assert not torch.equal(y, base)
    else:
        close(y, base, case.identity * torch.finfo(x.dtype).eps)


@every
@given(s=situations(DTYPES))
def test_dtype_in_is_dtype_out_and_leaves_have_theirs(case: Case, s: dict[str, Any]) -> None:
    model, params, x = build(case, s)
    assert ll.apply(model, params, x).dtype == x.dtype == model(x).dtype
    for path, tensors in params.items():
        for name, t in tensors.items():
            assert name.startswith("lora_")
            assert t.is_contiguous()
            assert not t.is_floating_point() or t.dtype in (
                x.dtype,
                torch.promote_types(torch.float32, x.dtype),
            ), path


@every
@given(s=situations(), data=st.data())
def test_draws_depend_on_seed_path_and_name_alone(
    case: Case, s: dict[str, Any], data: st.DataObject
) -> None:
    if not case.alone:
        pytest.skip("its start is of several layers together, by the method's design")
    model, _, _ = build(case, s)
    everything = start(
        case, model, case.config(**{**s["config"], "target_names": ()}), seed=s["seed"]
    )
    some = data.draw(st.lists(st.sampled_from(sorted(everything)), min_size=1, unique=True))
    state = torch.random.get_rng_state()
    names = tuple(f"^{p}$".replace(".", r"\.") for p in some)
    part = start(case, model, case.config(**{**s["config"], "target_names": names}), seed=s["seed"])
    assert torch.equal(state, torch.random.get_rng_state())
    assert sorted(part) == sorted(some)
    for path in some:
        for name in part[path].keys() - case.of_all:
            assert torch.equal(part[path][name], everything[path][name])


# ------------------------------------------------------------------------- one function, many forms
@merged
@given(s=situations())
def test_merge_equals_apply(case: Case, s: dict[str, Any]) -> None:
    model, params, x = build(case, s)
    y = ll.apply(model, params, x)
    new = ll.merge(model, params)
    assert set(new) <= {*params, *(f"{p}.{w}" for p in params for w in ("weight", "bias"))}
    close(ll.merged(model, params)(x), y, 1e-10)
    names = dict(model.named_parameters())
    if all(n in names for n in new):
        close(ll.functional_call(model, {}, x, base=new), y, 1e-10)
        close(functional_call(model, new, (x,)), y, 1e-10)


@pytest.mark.parametrize("case", [c for c in CASES if c.update is not None], ids=repr)
@given(s=situations())
def test_what_no_weight_can_stand_for_is_refused_where_one_has_to(
    case: Case, s: dict[str, Any]
) -> None:
    model, params, x = build(case, s)
    close(ll.apply(model, params, x), dense(case, model, params, x), 1e-10)
    for verb in (ll.merge, ll.merged):
        with merging(case):
            verb(model, params)
    attention = nn.MultiheadAttention(16, 4, batch_first=True, dtype=torch.float64).eval()
    q = torch.randn(2, 5, 16, dtype=torch.float64)
    with merging(case):
        ll.apply(attention, ll.init(attention, case.config(r=4)), q, q, q)


@every
@given(s=situations())
def test_bound_equals_apply(case: Case, s: dict[str, Any]) -> None:
    model, params, x = build(case, s)
    bound = ll.bind(model, params)
    assert torch.equal(bound(x), ll.apply(model, params, x))
    assert isinstance(bound, Net)
    back = ll.unbind(bound)
    assert all(torch.equal(a, b) for a, b in zip(leaves(back), leaves(params), strict=True))


@every
def test_a_kept_copy_gives_what_apply_gives(case: Case) -> None:
    model, params, x = simple(case)
    f, several = ll.functional(model, params), [params, moved(params, 2)]
    for p in (*several, params):
        with torch.no_grad():
            assert torch.equal(f(p, x), ll.apply(model, p, x))
        close(
            ll.grad(lambda p: f(p, x).square().sum())(p), ll.grad(lambda p: loss(model, p, x))(p), 0
        )
    stacked = ll.stack(several)
    close(vmap(lambda p: f(p, x))(stacked), vmap(lambda p: ll.apply(model, p, x))(stacked), 1e-12)


@every
@given(
    s=situations(), batch=st.sampled_from([(), (1,), (0,), (4,), (2, 3), (2, 0, 3), (1, 2, 1, 2)])
)
def test_any_batch_shape(case: Case, s: dict[str, Any], batch: tuple[int, ...]) -> None:
    model, params, _ = build(case, s)
    x = torch.randn(*batch, s["model"]["width"], dtype=torch.float64)
    y = ll.apply(model, params, x)
    assert y.shape == model(x).shape
    close(y.reshape(-1, y.shape[-1]), ll.apply(model, params, x.reshape(-1, x.shape[-1])), 1e-12)


@every
@given(s=situations())
def test_strength(case: Case, s: dict[str, Any]) -> None:
    model, params, x = build(case, s)
    close(ll.apply(model, ll.scale(params, 0.0), x), model(x), 1e-12)
    close(ll.apply(model, ll.scale(params, 1.0), x), ll.apply(model, params, x), 1e-10)
    strengths = torch.tensor([0.0, 0.5, -1.0], dtype=torch.float64)
    swept = vmap(lambda c: ll.apply(model, ll.scale(params, c), x))(strengths)
    close(swept[1], ll.apply(model, ll.scale(params, 0.5), x), 1e-12)
    assert ll.scale(params, 2.0).layout == params.layout


@merged
def test_attention_output_projection_goes_by_weight(case: Case) -> None:
    if not case.linear:
        pytest.skip(
            "it adapts something else: tests/laws/test_every_kind.py has it on every kind of place"
        )
    model = nn.MultiheadAttention(16, 4, batch_first=True, dtype=torch.float64).eval()
    if needs_data(case):
        with pytest.raises(
            ll.UnsupportedError,
            match="site 'out_proj': its weight is used without calling the layer",
        ):
            start(case, model, case.config(r=4))
        return
    params = moved(start(case, model, case.config(r=4)))
    assert list(params) == ["out_proj"]
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    for need_weights in (True, False):
        y, base = (
            f(x, x, x, need_weights=need_weights)[0]
            for f in (lambda *a, **k: ll.apply(model, params, *a, **k), model)
        )
        assert (y - base).abs().max() > 1e-3
        close(y, ll.merged(model, params)(x, x, x, need_weights=need_weights)[0], 1e-10)
        close(y, ll.bind(model, params)(x, x, x, need_weights=need_weights)[0], 1e-12)
        with torch.no_grad():  # torch's fused kernel reads the weight without a call
            close(y, ll.apply(model, params, x, x, x, need_weights=need_weights)[0], 1e-10)


# ---------------------------------------------------------------------------------------- gradients
@every
def test_gradient_reaches_every_trainable_leaf_and_nothing_else(case: Case) -> None:
    model, _, x = simple(case)
    model.train()  # in which mode alone some tensors act
    params = start(case, model, case.config(r=4), seed=3)
    trainable, frozen = ll.partition(params)
    tensors = pytree.tree_map(lambda t: t.clone().requires_grad_(), trainable)
    optimizer = torch.optim.SGD(leaves(tensors), lr=1e-2)
    for step in range(2):
        optimizer.zero_grad()
        loss(model, ll.combine(tensors, frozen), x).backward()
        for path, names in tensors.items():
            for name, t in names.items():
                if isinstance(t, Tensor) and (step or name not in case.dead):
                    assert t.grad is not None
                    assert t.grad.abs().max() > 0, f"{path} {name} has no gradient at step {step}"
        optimizer.step()
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    everything = grad(lambda p: loss(model, p, x))(params)
    specs = params.layout.specs
    for path, names in everything.items():
        for name, g in names.items():
            assert specs[path][name].trainable or not g.any(), (
                f"frozen {path} {name} got a gradient"
            )


def _home(params: ll.Adapter, path: str) -> str:
    """The module that holds a site's tensors when bound."""
    return path.rpartition(".")[0] if params.sites[path].kind == "parameter" else path


@every
def test_grads_of_bound_module_and_functional_agree(case: Case) -> None:
    model, params, x = simple(case)
    bound = ll.bind(model, params)
    bound(x).square().sum().backward()
    expected = grad(lambda p: loss(model, p, x))(params)
    for path in params:
        held = dict(bound.get_submodule(_home(params, path)).named_parameters())
        for name, g in expected[path].items():
            if params.layout.specs[path][name].trainable and name not in case.in_training:
                close(held[f"adapter.0.{name}"].grad, g, 1e-10)
    named = bound.named_parameters(remove_duplicate=False)  # what sites share, at each of them
    assert {n for n, p in named if p.requires_grad} == {
        f"{_home(params, path)}.adapter.0.{name}"
        for path in params
        for name in params[path]
        if params.layout.specs[path][name].trainable
    }
    assert all(p.grad is None for p in model.parameters())


@every
def test_gradient_equals_that_of_the_dense_model(case: Case) -> None:
    model, params, x = simple(case)
    direct = grad(lambda p: loss(model, p, x))(params)
    through = grad(lambda p: dense(case, model, p, x).square().sum())(params)
    for path in params:
        for name, g in direct[path].items():
            if params.layout.specs[path][name].trainable:
                close(g, through[path][name], 1e-9)
    close(
        grad(lambda x: loss(model, params, x))(x),
        grad(lambda x: dense(case, model, params, x).square().sum())(x),
        1e-9,
    )


@every
def test_jvp_is_a_finite_difference(case: Case) -> None:
    if not case.differentiable:
        pytest.skip("a part of it is a constant for derivatives, by the method's design")
    model, params, x = simple(case)
    trainable, frozen = ll.partition(params)
    tangent = pytree.tree_map(torch.randn_like, trainable)

    def f(t: Any) -> Tensor:
        return ll.apply(model, ll.combine(t, frozen), x)

    _, slope = jvp(f, (trainable,), (tangent,))
    h = 1e-5
    ahead, behind = (
        f(pytree.tree_map(lambda t, v, s=s: t + s * v, trainable, tangent)) for s in (h, -h)
    )
    close(slope, (ahead - behind) / (2 * h), 1e-6)


# ------------------------------------------------------------------------------------------ batches
@every
def test_vmap_over_a_stack_is_a_loop(case: Case) -> None:
    model, params, x = simple(case)
    several = [moved(params, seed) for seed in (1, 2, 3)]
    stacked = ll.stack(several)
    loop = torch.stack([ll.apply(model, p, x) for p in several])
    close(vmap(lambda p: ll.apply(model, p, x))(stacked), loop, 1e-12)
    xs = torch.randn(3, 6, 16, dtype=torch.float64)
    own_batches = torch.stack([ll.apply(model, p, u) for p, u in zip(several, xs, strict=True)])
    close(vmap(lambda p, x: ll.apply(model, p, x))(stacked, xs), own_batches, 1e-12)
    for a, b in zip(ll.unstack(stacked), several, strict=True):
        assert all(torch.equal(u, v) for u, v in zip(leaves(a), leaves(b), strict=True))


@every
def test_grad_and_vmap_commute(case: Case) -> None:
    model, params, x = simple(case)
    several = [moved(params, seed) for seed in (1, 2)]
    stacked = ll.stack(several)
    per_member = vmap(grad(lambda p: loss(model, p, x)))(stacked)
    at_once = grad(lambda s: vmap(lambda p: loss(model, p, x))(s).sum())(stacked)
    close(per_member, at_once, 1e-10)
    close(per_member, ll.stack([grad(lambda p: loss(model, p, x))(p) for p in several]), 1e-10)


@every
def test_per_sample_gradients_are_a_loop(case: Case) -> None:
    model, params, x = simple(case)
    per_sample = vmap(grad(lambda p, x: loss(model, p, x)), in_dims=(None, 0))(params, x)
    close(per_sample, ll.stack([grad(lambda p, u=u: loss(model, p, u))(params) for u in x]), 1e-10)


# ------------------------------------------------------------------------------------------ compile
@every
def test_one_full_graph_serves_many_adapters(case: Case) -> None:
    torch._dynamo.reset()
    model, _, x = simple(case)
    counter = CompileCounter()
    compiled = torch.compile(lambda p, x: ll.apply(model, p, x), backend=counter, fullgraph=True)
    for alpha in (16.0, 8.0, 3.0):
        params = moved(
            start(case, model, case.config(r=4, alpha=alpha), seed=int(alpha)), seed=int(alpha)
        )
        close(compiled(params, x), ll.apply(model, params, x), 1e-10)
    assert counter.frame_count <= GRAPHS_OF_UNLIKE_STRENGTHS
    step = torch.compile(
        lambda p, x: grad(lambda p: loss(model, p, x))(p), backend="eager", fullgraph=True
    )
    close(step(params, x), grad(lambda p: loss(model, p, x))(params), 1e-10)
    sweep = torch.compile(
        lambda s, x: vmap(lambda p: ll.apply(model, p, x))(s), backend="eager", fullgraph=True
    )
    stacked = ll.stack([params, moved(params)])
    close(sweep(stacked, x), vmap(lambda p: ll.apply(model, p, x))(stacked), 1e-10)
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------- values
@every
@given(s=situations(DTYPES))
def test_save_then_load_is_bit_equal(case: Case, s: dict[str, Any], tmp_path_factory: Any) -> None:
    model, params, x = build(case, s)
    file = Path(tmp_path_factory.mktemp("files")) / "a.safetensors"
    ll.save(params, file)
    again = ll.load(file, model)
    assert again.config == params.config
    assert hash(again.config) == hash(params.config)
    assert again.layout == params.layout
    assert same_state(tuple((t,) for t in leaves(again)), tuple((t,) for t in leaves(params)))
    assert torch.equal(ll.apply(model, again, x), ll.apply(model, params, x))


@every
def test_copies_pickles_and_trees(case: Case) -> None:
    model, params, x = simple(case)
    y = ll.apply(model, params, x)
    for again in (
        copy.deepcopy(params),
        copy.copy(params),
        pickle.loads(pickle.dumps(params)),
        optree.tree_map(torch.clone, params),
    ):
        assert isinstance(again, ll.Adapter)
        assert again.layout == params.layout
        assert torch.equal(ll.apply(model, again, x), y)
    bound = ll.bind(model, params)
    for twin in (copy.deepcopy(bound), pickle.loads(pickle.dumps(bound))):
        assert torch.equal(twin(x), y)
        with torch.no_grad():
            for p in twin.parameters():
                p.zero_()
    assert torch.equal(bound(x), y)


# ------------------------------------------------------------------------------- nothing is written
@every
@given(s=situations(DTYPES))
def test_the_model_is_never_written(case: Case, s: dict[str, Any]) -> None:
    model, params, x = build(case, s)
    before = snapshot(model)
    start(case, model, case.config(**s["config"]))
    ll.apply(model, params, x)
    ll.bind(model, params).train().to(torch.float32)
    for verb in (ll.merge, ll.merged):
        with merging(case):
            verb(model, params)
    with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied|size|dimension|expected"):
        ll.apply(model, params, x[..., :3])
    assert same_state(before, snapshot(model))


@every
def test_many_threads_at_once(case: Case) -> None:
    model, params, x = simple(case)
    before = snapshot(model)
    several = [moved(params, seed) for seed in range(4)]
    expected = [ll.apply(model, p, x) for p in several]
    wrong: list[int] = []

    def work(i: int) -> None:
        wrong.extend(
            i for _ in range(20) if not torch.equal(ll.apply(model, several[i], x), expected[i])
        )

    in_threads(4, work)
    assert not wrong
    assert same_state(before, snapshot(model))


# ----------------------------------------------------------------------------------------- autocast
@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(case: Case, dtype: torch.dtype) -> None:
    model = net(dtype=torch.float32)
    params = moved(start(case, model, case.config(r=4)), size=0.05)
    trainable, frozen = ll.partition(params)
    x = normal(6, 16, seed=5, dtype=torch.float32)
    expected = ll.apply(model, params, x)
    with torch.autocast("cpu", dtype=dtype):
        y, base = ll.apply(model, params, x), model(x)
        grads = grad(lambda t: loss(model, ll.combine(t, frozen), x).float())(trainable)
    assert y.dtype == base.dtype == dtype
    close(y.float(), expected, 0.05)
    close(grads, grad(lambda t: loss(model, ll.combine(t, frozen), x))(trainable), 0.1)


@merged
def test_merging_is_no_call_that_autocast_rounds(case: Case) -> None:
    model = net(dtype=torch.float32)
    params = moved(start(case, model, case.config(r=4)), size=0.05)
    weights = ll.merge(model, params)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = ll.merge(model, params)
    assert all(torch.equal(inside[name], weights[name]) for name in weights)
