"""What sets of adapters are for: many trained at once, gradients per sample, several as one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Case
from helpers import Net, close, leaves, moved, net, normal
from torch import Tensor

import lora_lite_func as ll
from lora_lite_func.core.registry import variant_for

PHASED = [c for c in CASES if variant_for(type(c.config(r=4))).has_phases]
every = pytest.mark.parametrize("case", PHASED, ids=repr)


# ------------------------------------------------------------------------------------- many at once
STEPS = 50
RATES = torch.tensor([1e-2, 3e-3, 1e-3], dtype=torch.float64)
DECAYS = torch.tensor([0.0, 0.1, 0.01], dtype=torch.float64)


def alone(
    model: Net,
    start: ll.Adapter,
    xs: Tensor,
    target: Tensor,
    lr: float,
    decay: float,
    bound: float | None,
) -> ll.Adapter:
    """One run with torch.optim.AdamW."""
    trainable, frozen = ll.partition(torch.utils._pytree.tree_map(torch.clone, start))
    live = [t.requires_grad_() for t in leaves(trainable)]
    optimizer = torch.optim.AdamW(live, lr=lr, weight_decay=decay)
    for x in xs:
        optimizer.zero_grad()
        F.mse_loss(ll.apply(model, ll.combine(trainable, frozen), x), target).backward()
        if bound is not None:
            torch.nn.utils.clip_grad_norm_(live, bound)
        optimizer.step()
    return torch.utils._pytree.tree_map(lambda t: t.detach(), trainable)


@pytest.mark.parametrize(
    "config",
    [ll.LoRAConfig(r=4), ll.DoRAConfig(r=4), ll.HRAConfig(r=4), ll.IA3Config()],
    ids=lambda c: type(c).__name__,
)
@pytest.mark.parametrize("bound", [None, 0.05])
def test_a_stacked_run_is_as_many_runs_alone(config: ll.AdapterConfig, bound: float | None) -> None:
    model, rows = net(depth=1), 4
    starts = [moved(ll.init(model, config, seed=s), s, 0.02) for s in range(3)]
    xs, targets = normal(3, STEPS, rows, 16), normal(3, rows, 8, seed=6)
    trainable, frozen = ll.partition(ll.stack(starts))
    optimizer = ll.adamw(RATES, weight_decay=DECAYS)
    state = optimizer.init(trainable)
    ids = torch.arange(3).repeat_interleave(rows)

    def loss(trainable: ll.Adapter, step: int) -> Tensor:
        y = ll.apply(model, ll.rows(ll.combine(trainable, frozen), ids), xs[:, step].flatten(0, 1))
        # a mean per member, one backward for all
        return (y.unflatten(0, (3, rows)) - targets).square().mean((1, 2)).sum()

    for step in range(STEPS):
        grads = torch.func.grad(loss)(trainable, step)
        if bound is not None:
            grads, norms = ll.clip_grads(grads, bound)
            assert norms.shape == (3,)
        trainable, state = optimizer.update(grads, state, trainable)
    for i, start in enumerate(starts):
        wanted = alone(model, start, xs[i], targets[i], RATES[i].item(), DECAYS[i].item(), bound)
        close(torch.utils._pytree.tree_map(lambda t, i=i: t[i], trainable), wanted, 1e-9)


def test_one_fused_optimizer_of_torch_serves_a_stack() -> None:
    model, rows = net(depth=1), 4
    starts = [moved(ll.init(model, ll.LoRAConfig(r=4), seed=s), s, 0.02) for s in range(3)]
    xs, targets = normal(3, STEPS, rows, 16), normal(3, rows, 8, seed=6)
    bound = ll.bind(model, ll.rows(ll.stack(starts), [0] * rows + [1] * rows + [2] * rows))
    live = [p for p in bound.parameters() if p.requires_grad]
    assert len(live) == len(leaves(starts[0]))  # as many tensors for three members as for one
    optimizer = torch.optim.AdamW(live, lr=1e-2, weight_decay=0.1, fused=True)
    for step in range(STEPS):
        optimizer.zero_grad()
        y = bound(xs[:, step].flatten(0, 1)).unflatten(0, (3, rows))
        (y - targets).square().mean((1, 2)).sum().backward()
        optimizer.step()
    found = ll.unbind(bound)
    assert isinstance(found, ll.Adapter)
    for i, start in enumerate(starts):
        close(
            ll.partition(found[i])[0], alone(model, start, xs[i], targets[i], 1e-2, 0.1, None), 1e-9
        )


def test_learning_rates_that_do_not_fit_are_refused() -> None:
    one = ll.partition(ll.init(net(depth=1), ll.LoRAConfig(r=2)))[0]
    with pytest.raises(
        ll.StructureError, match=r"adamw: lr: expected one number or 2, .* found shape \(3,\)"
    ):
        ll.adamw(torch.ones(3)).init(ll.stack([one, one]))
    with pytest.raises(
        ll.StructureError,
        match=r"adamw: weight_decay: 'layers.0.down' lora_A: expected \(K, 2, 24\)",
    ):
        ll.adamw(0.1, weight_decay=torch.ones(3)).init(one)
    with pytest.raises(ll.StructureError, match="adamw: expected an Adapter"):
        ll.adamw(0.1).init({})  # type: ignore[arg-type]


def test_adamw_moves_one_adapter_too_and_takes_a_schedule() -> None:
    params = moved(ll.init(net(depth=1), ll.LoRAConfig(r=2)))
    optimizer = ll.adamw(0.1)
    grads, norm = ll.clip_grads(params, 0.5)
    assert norm.shape == ()
    close(
        torch.stack([t.square().sum() for t in leaves(grads)]).sum().sqrt(),
        torch.tensor(0.5, dtype=torch.float64),
        1e-5,
    )
    still, state = optimizer.update(grads, optimizer.init(params), params, lr=0.0)
    close(still, params, 0.0)
    assert state.step == 1
    there, _ = optimizer.update(grads, state, params)
    assert any(not torch.equal(a, b) for a, b in zip(leaves(there), leaves(params), strict=True))


# --------------------------------------------------------------------------------------- per sample
@every
def test_per_sample_grads_are_a_loop(case: Case) -> None:
    model = net(depth=1)
    params = moved(ll.init(model, case.config(r=4)))
    x, target = normal(5, 3, 16), normal(5, 3, 8, seed=6)
    found = ll.per_sample_grads(
        model, params, lambda y, b: (y - b[1]).square().mean((1, 2)), (x, target)
    )
    trainable, frozen = ll.partition(params)
    for i in range(5):
        own = torch.func.grad(
            lambda t, i=i: (
                (ll.apply(model, ll.combine(t, frozen), x[i : i + 1]) - target[i : i + 1])
                .square()
                .mean()
            )
        )(trainable)
        close(torch.utils._pytree.tree_map(lambda t, i=i: t[i], found), own, 1e-9)


def test_a_diagonal_fisher() -> None:
    """The mean square of per-sample gradients of the log likelihood: of a linear Gaussian model
    known in closed form.
    """
    model = torch.nn.Linear(3, 1, bias=False).double()
    params = ll.init(model, ll.BitFitConfig())
    x, target = normal(64, 3), normal(64, 1, seed=6)
    grads = ll.per_sample_grads(
        model, params, lambda y, b: 0.5 * (y - b[1]).square().squeeze(1), (x, target)
    )
    fisher = torch.utils._pytree.tree_map(lambda g: g.square().mean(0), grads)
    close(fisher["", "lora_b"], (model(x) - target).square().mean(0).detach(), 1e-12)


@pytest.mark.parametrize("loss", [lambda y, b: y.mean(), lambda y, b: y, lambda y, b: 3.0])
def test_losses_that_are_not_per_sample_are_refused(loss: Any) -> None:
    model = net(depth=1)
    with pytest.raises(
        ll.StructureError, match=r"per_sample_grads: expected a loss per sample, \(2,\), found"
    ):
        ll.per_sample_grads(model, ll.init(model, ll.LoRAConfig(r=2)), loss, normal(2, 16))
    with pytest.raises(ll.StructureError, match="holds no tensor to count samples by"):
        ll.per_sample_grads(model, ll.init(model, ll.LoRAConfig(r=2)), loss, (torch.tensor(1.0),))


# ------------------------------------------------------------------------------------------ combine
FACTORED = [c for c in CASES if variant_for(type(c.config(r=4))).factors is not None]


@pytest.mark.parametrize("case", FACTORED, ids=repr)
def test_cat_adds_updates_exactly(case: Case) -> None:
    model = net(depth=1)
    a = moved(ll.init(model, case.config(r=4, alpha=6.0)), 1)
    b = moved(ll.init(model, ll.LoRAConfig(r=2, alpha=8, target_names="up")), 2)
    made = ll.combine_adapters([a, b], [0.5, -2.0])
    base, only_a, only_b, both = (
        dict(model.named_parameters()),
        ll.merge(model, a),
        ll.merge(model, b),
        ll.merge(model, made),
    )
    for name, W in both.items():
        wanted = (
            base[name]
            + 0.5 * (only_a[name] - base[name])
            - 2.0 * (only_b.get(name, base[name]) - base[name])
        )
        close(W, wanted, 1e-12)
    close(ll.merge(model, ll.add(a, b)), ll.merge(model, ll.combine_adapters([a, b])), 1e-12)
    whole = ll.combine_adapters([a, b], [0.5, -2.0], "svd", r=14)
    close(ll.merge(model, whole), both, 1e-9)
    assert ll.combine_adapters([a, b], how="svd").sites["layers.0.up"].r >= 2


HOWS = ["cat", "svd", "linear", "ties", "ties_svd", "magnitude_prune", "magnitude_prune_svd"]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("majority_sign", ["total", "frequency"])
@pytest.mark.filterwarnings("ignore")
def test_combining_is_pefts(how: Any, majority_sign: Any) -> None:
    peft = pytest.importorskip("peft")
    model = net(depth=1, dtype=torch.float32)
    several = [
        moved(ll.init(model, ll.LoRAConfig(r=4, alpha=a)), s) for s, a in enumerate((4.0, 8.0, 2.0))
    ]
    weights = [0.7, 1.0, -0.4]
    names = ["up", "down"]
    first = peft.LoraConfig(r=4, lora_alpha=4, target_modules=names)
    other: Any = peft.get_peft_model(copy.deepcopy(model), first, adapter_name="0")
    for i, a in enumerate((8, 2), 1):
        other.add_adapter(str(i), peft.LoraConfig(r=4, lora_alpha=a, target_modules=names))
    with torch.no_grad():
        for i, adapter in enumerate(several):
            for path, p in adapter.items():
                layer = other.base_model.model.get_submodule(path)
                layer.lora_A[str(i)].weight.copy_(p["lora_A"])
                layer.lora_B[str(i)].weight.copy_(p["lora_B"])
    pruned = (
        {}
        if how in ("cat", "svd", "linear")
        else {"density": 0.5, "majority_sign_method": majority_sign}
    )
    other.base_model.add_weighted_adapter(
        ["0", "1", "2"], weights, "all", combination_type=how, **pruned
    )
    made = ll.combine_adapters(several, weights, how, density=0.5, majority_sign=majority_sign)
    for path, p in made.items():
        layer = other.base_model.model.get_submodule(path)
        close(p["lora_B"] @ p["lora_A"], layer.get_delta_weight("all"), 1e-5)


@pytest.mark.parametrize("how", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_dare_keeps_everything_at_density_1_and_draws_by_seed(how: Any) -> None:
    model = net(depth=1)
    several = [moved(ll.init(model, ll.LoRAConfig(r=4)), s) for s in (1, 2)]
    plain: Any = {
        "dare_linear": "linear",
        "dare_linear_svd": "svd",
        "dare_ties": "ties",
        "dare_ties_svd": "ties_svd",
    }[how]
    kept, whole = (
        ll.merge(model, ll.combine_adapters(several, None, h, density=1.0)) for h in (how, plain)
    )
    close(kept, whole, 1e-9)
    one, two, three = (
        ll.combine_adapters(several, None, how, density=0.5, seed=s) for s in (0, 0, 1)
    )
    close(one, two, 0.0)
    assert any(not torch.equal(a, b) for a, b in zip(leaves(one), leaves(three), strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a, b: ll.combine_adapters([]), "expected at least one adapter"),
        (lambda a, b: ll.combine_adapters([a], [1.0, 2.0]), "expected 1 weights, found 2"),
        (
            lambda a, b: ll.combine_adapters([a], how="mean"),
            "expected one of cat, svd, .* found 'mean'",
        ),
        (
            lambda a, b: ll.combine_adapters([a], how="ties", majority_sign="totl"),
            "majority_sign: expected 'total' or 'frequency', found 'totl'",
        ),
        (lambda a, b: ll.combine_adapters([a], how="svd", r=0), "r: expected at least 1, found 0"),
        (
            lambda a, b: ll.combine_adapters([a], how="svd", r=2.0),
            r"r: expected at least 1, found 2\.0",
        ),
        (
            lambda a, b: ll.combine_adapters([a], density=0.0),
            r"expected a density in \(0, 1\], found 0.0",
        ),
        (
            lambda a, b: ll.combine_adapters([a, b], how="linear"),
            r"'layers.0.up' has ranks \[2, 4\]; 'linear' adds factor by factor",
        ),
        (lambda a, b: ll.combine_adapters([3]), "number 0: expected an Adapter, found int"),
        (lambda a, b: ll.combine_adapters([ll.stack([a, a])]), "a stack of 2 adapters"),
        (
            lambda a, b: ll.add(a, ll.init(net(depth=1), ll.IA3Config())),
            "lora, ia3 don't make one adapter",
        ),
        (
            lambda a, b: ll.add(a, ll.init(net(depth=1), ll.BitFitConfig())),
            "bitfit's update isn't a product of two factors",
        ),
        (
            lambda a, b: ll.add(a, ll.init(net(depth=1, width=8), ll.LoRAConfig())),
            "'layers.0.down' is linear 24 -> 16 in one, linear 24 -> 8",
        ),
    ],
)
def test_what_does_not_combine(call: Any, message: str) -> None:
    a, b = (
        ll.init(net(depth=1), ll.LoRAConfig(r=r, target_names=names))
        for r, names in ((4, ()), (2, ("up",)))
    )
    with pytest.raises((ll.StructureError, ll.UnsupportedError), match=message):
        call(a, b)


def test_a_combined_adapter_is_a_file_like_any_other(tmp_path: Any) -> None:
    model = net(depth=1)
    made = ll.add(
        ll.init(model, ll.LoRAConfig(r=4)),
        moved(ll.init(model, ll.LoRAConfig(r=2, target_names="up"))),
    )
    ll.save(made, tmp_path / "a")
    again = ll.load(tmp_path / "a", model)
    assert again.layout == made.layout
    close(again, made, 0.0)


# --------------------------------------------------------------- gates, products, several parts
def test_gates_are_combined_into_gates() -> None:
    model, x = net(), torch.randn(2, 16, dtype=torch.float64)
    configs = (ll.IA3Config(target_names="up"), ll.IA3FFConfig(target_names="up"))
    for config in configs:
        a, b = (moved(ll.init(model, config), seed=seed) for seed in (1, 2))
        linear = ll.combine_adapters([a, b], [0.5, 0.3], "linear")  # as PEFT
        path = next(iter(a))
        close(linear[path]["lora_g"], 0.5 * a[path]["lora_g"] + 0.3 * b[path]["lora_g"], 1e-12)
        exact = ll.combine_adapters([a, b], [0.5, -2.0])
        for name, base in ll.merge(model, a).items():
            start = model.get_parameter(name)
            other = ll.merge(model, b)[name]
            change = 0.5 * (base - start) - 2.0 * (other - start)
            close(ll.merge(model, exact)[name], start + change, 1e-10)
        with pytest.raises(
            ll.UnsupportedError, match="can be combined by cat, linear, found 'ties'"
        ):
            ll.combine_adapters([a, b], how="ties")
        assert ll.apply(model, exact, x).shape == model(x).shape


def test_two_hira_on_one_layer_are_one() -> None:
    model = net()
    a, b = (
        moved(ll.init(model, ll.HiRAConfig(r=r, alpha=3.0, target_names="up")), seed=r)
        for r in (2, 3)
    )
    made = ll.combine_adapters([a, b], [0.5, -2.0])
    assert {site.r for site in made.sites.values()} == {5}
    for name, one in ll.merge(model, a).items():
        start, two = model.get_parameter(name), ll.merge(model, b)[name]
        close(ll.merge(model, made)[name], start + 0.5 * (one - start) - 2.0 * (two - start), 1e-10)
    with pytest.raises(ll.UnsupportedError, match="hira can be combined by cat, found 'svd'"):
        ll.combine_adapters([a, b], how="svd")
    lora = ll.init(model, ll.LoRAConfig(r=2, target_names="up"))
    with pytest.raises(ll.UnsupportedError, match="hira, lora don't make one adapter"):
        ll.combine_adapters([a, lora])


def test_adapters_of_several_parts_are_combined_part_by_part() -> None:
    model, x = net(), torch.randn(2, 16, dtype=torch.float64)
    wet = {"up": 0.1, "down": 0.0}  # as a file is read whose dropout some layers can't have
    members = [
        tuple(
            moved(ll.init(model, ll.LoRAConfig(r=2, dropout=p, target_names=name)), seed=seed)
            for name, p in wet.items()
        )
        for seed in (1, 2)
    ]
    (made,) = ll.combine_adapters(members, [0.5, 2.0])
    parts = tuple(
        ll.scale(part, w) for member, w in zip(members, (0.5, 2.0), strict=True) for part in member
    )
    close(ll.apply(model, made, x), ll.apply(model, parts, x), 1e-10)
    gate = ll.init(model, ll.IA3Config(target_names="down"))
    both = ll.combine_adapters([(members[0][0], gate), (members[1][0], gate)])
    assert [type(part.config) for part in both] == [ll.LoRAConfig, ll.IA3Config]


def test_the_rank_of_an_svd_is_the_largest_of_all() -> None:
    model = net()
    small = moved(ll.init(model, ll.LoRAConfig(r=2, target_names="down")))
    large = moved(ll.init(model, ll.LoRAConfig(r=5, target_names="up")))
    made = ll.combine_adapters([small, large], how="svd")
    assert {site.r for site in made.sites.values()} == {5}


def test_a_callers_autocast_has_no_part_in_combining() -> None:
    model = net(dtype=torch.float32)
    several = [moved(ll.init(model, c)) for c in (ll.PiSSAConfig(r=2), ll.LoRAConfig(r=2))]
    expected = ll.combine_adapters(several, how="svd", r=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        close(ll.combine_adapters(several, how="svd", r=2), expected, 1e-6)
