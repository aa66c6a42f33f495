"""Every method x every transform of torch.func x token counts on both sides of the size rules.

The oracle is the dense model: the same number from merged weights (or from updates written by
hand), by grad or jvp alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree
from cases import CALIBRATED, CASES, Case, dense, start
from helpers import close, leaves, moved, net, normal
from torch import Tensor
from torch.func import (
    functionalize,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    vjp,
    vmap,
)
from torch_versions import skip_without, transforms_expanded_gradients

import lora_lite_func as ll

pytestmark = pytest.mark.filterwarnings(
    "ignore:Attempted to insert a get_attr Node:UserWarning",  # torch's linearize on its own graph
    "ignore:There is a performance drop:UserWarning",  # vmap of a function that torch loops over
)
ALL = CASES + CALIBRATED
every = pytest.mark.parametrize("case", ALL, ids=repr)
some = pytest.mark.parametrize("case", ALL[::6], ids=repr)
"""A sixth of the methods, for what takes a second each and goes the same way for all."""
TOKENS = (1, 4, 40, 300)
"""Below and above every rule that chooses a form by the number of rows."""

Scalar = Callable[[Tensor], Tensor]


class Situation:
    """A trained adapter on a small model, a direction, and what the dense model gives."""

    def __init__(self, case: Case, tokens: int, bias: bool) -> None:
        self.case = case
        self.model = net(width=8, inner=16, depth=1, out=4, bias=bias)
        self.params = moved(start(case, self.model, case.config(r=4), seed=3))
        self.t, self.frozen = ll.partition(self.params)
        gen = torch.Generator().manual_seed(tokens)
        self.x = torch.randn(tokens, 8, generator=gen, dtype=torch.float64)
        self.v = pytree.tree_map(
            lambda t: torch.randn(t.shape, generator=gen, dtype=torch.float64).to(t), self.t
        )

    def y(self, t: Any, x: Tensor | None = None) -> Tensor:
        """The output with trainable leaves t."""
        return ll.apply(self.model, ll.combine(t, self.frozen), self.x if x is None else x)

    def loss(self, t: Any) -> Tensor:
        return self.y(t).square().mean()

    def dense(self, t: Any) -> Tensor:
        """The same loss without the library's calls."""
        y = dense(self.case, self.model, ll.combine(t, self.frozen), self.x)
        return y.square().mean()

    def along(self, loss: Callable[[Any], Tensor]) -> Scalar:
        """The loss on the line t + c v, a function of the scalar c."""
        return lambda c: loss(pytree.tree_map(lambda t, v: t + c * v, self.t, self.v))


def inner(a: Any, b: Any) -> Tensor:
    """The inner product of two trees."""
    return torch.stack([(u * w).sum() for u, w in zip(leaves(a), leaves(b), strict=True)]).sum()


def test_the_token_counts_are_on_both_sides_of_the_size_rules() -> None:
    sides = set()
    for case in CASES:
        s = Situation(case, 1, True)
        dense, cfg = s.params.layout.variant.dense, s.params.config
        for site in s.params.sites.values() if dense else ():
            sides |= {(n, dense(cfg, site, n)) for n in TOKENS}
    assert {(1, False), (300, True)} <= sides


# -------------------------------------------------------------------------------- first derivatives
@every
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_first_derivatives(case: Case, tokens: int, bias: bool) -> None:
    s = Situation(case, tokens, bias)
    one = torch.ones((), dtype=torch.float64)
    expected = grad(s.dense)(s.t)
    slope = inner(expected, s.v)

    close(grad(s.loss)(s.t), expected, 1e-9)
    value, pull = vjp(s.loss, s.t)
    close(pull(one)[0], expected, 1e-9)
    close(value, s.dense(s.t), 1e-10)
    close(jacrev(s.loss)(s.t), expected, 1e-9)
    close(jvp(s.loss, (s.t,), (s.v,))[1], slope, 1e-9)
    close(functionalize(s.loss)(s.t), value, 1e-12)
    close(functionalize(grad(s.loss))(s.t), expected, 1e-9)


@some
def test_linearize(case: Case) -> None:
    s = Situation(case, 40, True)
    value, slopes = linearize(s.loss, s.t)
    close(value, s.dense(s.t), 1e-10)
    close(slopes(s.v), inner(grad(s.dense)(s.t), s.v), 1e-9)


# ------------------------------------------------------------------------------------------ batches
@every
@pytest.mark.parametrize(
    ("tokens", "bias"), [(4, True), (300, True), (40, False)], ids=["few", "many", "no_bias"]
)
def test_batches(case: Case, tokens: int, bias: bool) -> None:
    s = Situation(case, tokens, bias)
    several = [s.t, pytree.tree_map(lambda t, v: t + 0.1 * v, s.t, s.v)]
    stacked = pytree.tree_map(lambda *ts: torch.stack(ts), *several)
    values = torch.stack([s.dense(t) for t in several])
    grads = pytree.tree_map(lambda *ts: torch.stack(ts), *(grad(s.dense)(t) for t in several))
    for randomness in ("error", "same", "different"):
        close(vmap(s.loss, randomness=randomness)(stacked), values, 1e-10)
    close(vmap(grad(s.loss))(stacked), grads, 1e-9)
    close(grad(lambda t: vmap(s.loss)(t).sum())(stacked), grads, 1e-9)
    close(vmap(jacrev(s.loss))(stacked), grads, 1e-9)
    slopes = torch.stack([inner(pytree.tree_map(lambda g, i=i: g[i], grads), s.v) for i in (0, 1)])
    close(vmap(lambda t: jvp(s.loss, (t,), (s.v,))[1])(stacked), slopes, 1e-9)
    both = pytree.tree_map(lambda v: torch.stack([v, v]), s.v)
    close(jvp(vmap(s.loss), (stacked,), (both,))[1], slopes, 1e-9)
    close(vmap(lambda x: s.y(s.t, x))(s.x), s.y(s.t), 1e-10)
    y, pull = vjp(s.y, s.t)
    cotangents = torch.stack([y.detach(), -2 * y.detach()])
    expected = pytree.tree_map(lambda g: torch.stack([g[0], -2 * g[0]]) * (y.numel() / 2), grads)
    close(vmap(lambda g: pull(g)[0])(cotangents), expected, 1e-9)  # what jacrev does


# ------------------------------------------------------------------------------- second derivatives
DERIVATIVES: dict[str, Callable[[Scalar], Scalar]] = {
    "grad": grad,
    "vjp": lambda f: lambda c: vjp(f, c)[1](torch.ones_like(c))[0],
    "jvp": lambda f: lambda c: jvp(f, (c,), (torch.ones_like(c),))[1],
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "vmap": lambda f: lambda c: vmap(grad(f))(c.expand(2))[1],
}


PAIRS = [("jvp", "grad"), ("grad", "jvp"), ("vjp", "vjp"), ("jacfwd", "jacrev"), ("vmap", "jvp")]


@every
def test_second_derivatives(case: Case) -> None:
    s = Situation(case, 40, True)
    _second_derivatives(s, PAIRS)
    product = jvp(grad(s.loss), (s.t,), (s.v,))[1]
    close(product, grad(lambda t: jvp(s.dense, (t,), (s.v,))[1])(s.t), 1e-8)
    close(vjp(grad(s.loss), s.t)[1](s.v)[0], product, 1e-8)


@some
def test_second_derivatives_by_every_pair(case: Case) -> None:
    if case.name == "c3a_1":
        skip_without(transforms_expanded_gradients)
    s = Situation(case, 40, True)
    _second_derivatives(s, [(a, b) for a in DERIVATIVES for b in DERIVATIVES])
    zero = torch.zeros((), dtype=torch.float64)
    close(hessian(s.along(s.loss))(zero), grad(grad(s.along(s.dense)))(zero), 1e-8)


def _second_derivatives(s: Situation, pairs: list[tuple[str, str]]) -> None:
    zero = torch.zeros((), dtype=torch.float64)
    f, dense = s.along(s.loss), s.along(s.dense)
    expected = grad(grad(dense))(zero)
    size = max(1.0, grad(dense)(zero).abs().item(), expected.abs().item())
    for outer, name in pairs:
        found = DERIVATIVES[outer](DERIVATIVES[name](f))(zero)
        assert (found - expected).abs() <= 1e-8 * size, (outer, name)


# ------------------------------------------------------------------------------------------ dropout
WET = [c for c in ALL if "dropout" in type(c.config(r=4)).__dataclass_fields__]


@pytest.mark.parametrize("case", WET, ids=repr)
@pytest.mark.parametrize("tokens", [1, 40])
def test_a_seed_gives_one_mask_in_every_mode(case: Case, tokens: int) -> None:
    model = net(width=8, inner=16, depth=1, out=4).train()
    params = moved(start(case, model, case.config(r=4, dropout=0.5), seed=3))
    t, frozen = ll.partition(params)
    x = normal(tokens, 8, seed=1)

    def y(t: Any, x: Tensor = x) -> Tensor:
        return ll.apply(model, ll.combine(t, frozen), x)

    def seeded(f: Callable[[], Any]) -> Any:
        torch.manual_seed(7)
        return f()

    expected = seeded(lambda: y(t))
    assert not torch.equal(expected, y(t))  # the next call draws another mask
    stacked = pytree.tree_map(lambda t: torch.stack([t, t]), t)
    zero = pytree.tree_map(torch.zeros_like, t)
    several = ll.stack([params, moved(params)])
    modes = {
        "a graph": lambda: ll.apply(model, pytree.tree_map(_live, params), x),
        "bind": lambda: ll.bind(model, params)(x),
        "rows": lambda: ll.apply(model, ll.rows(several, [0] * tokens), x),
        "jvp": lambda: jvp(y, (t,), (zero,))[0],
        "vjp": lambda: vjp(y, t)[0],
        "grad": lambda: grad(lambda t: (lambda o: (o.sum(), o))(y(t)), has_aux=True)(t)[1],
        "functionalize": lambda: functionalize(y)(t),
        "vmap over adapters": lambda: vmap(y, randomness="same")(stacked)[1],
        "vmap over inputs": lambda: vmap(lambda x: y(t, x), randomness="same")(torch.stack([x, x]))[
            1
        ],
        "jvp of vmap": lambda: jvp(
            vmap(y, randomness="same"),
            (stacked,),
            (pytree.tree_map(torch.zeros_like, stacked),),
        )[0][1],
    }
    for mode, call in modes.items():
        found = seeded(call)
        assert (found - expected).abs().max() < 1e-12, mode
    different = seeded(lambda: vmap(y, randomness="different")(stacked))
    assert not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="random"):
        vmap(y)(stacked)


def _live(t: Tensor) -> Tensor:
    return t.detach().requires_grad_() if t.is_floating_point() else t


def test_a_rows_mask_does_not_depend_on_the_other_rows_adapters() -> None:
    for config in (ll.LoRAConfig(r=2, dropout=0.5), ll.HiRAConfig(r=2, dropout=0.5)):
        model = net(width=8, inner=16, depth=1, out=4).train()
        several = [moved(ll.init(model, config, seed=i), i) for i in range(3)]
        x = torch.randn(6, 8, dtype=torch.float64)
        ids = [2, 0, 1, -1, 0, 2]
        torch.manual_seed(3)
        found = ll.apply(model, ll.rows(ll.stack(several), ids), x)
        for row, i in enumerate(ids):
            torch.manual_seed(3)
            alone = model.eval()(x) if i < 0 else ll.apply(model.train(), several[i], x)
            close(found[row], alone[row], 1e-12)
            model.train()
