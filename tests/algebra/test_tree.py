"""Tree algebra: what is taken apart goes together again, and what doesn't fit is refused by its
first difference.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import optree
import pytest
import torch
from cases import CASES, Case
from helpers import close, leaves, moved, net
from hypothesis import given
from torch import Tensor

import lora_lite_func as ll
from lora_lite_func.core import registry as methods

every = pytest.mark.parametrize("case", CASES, ids=repr)


def made(case: Case, seed: int = 1, **fields: Any) -> ll.Adapter:
    """An adapter of a method on a small net, as if trained."""
    return moved(ll.init(net(), case.config(**{"r": 4, **fields})), seed)


def lora(**fields: Any) -> ll.Adapter:
    return ll.init(net(), ll.LoRAConfig(**{"r": 4, **fields}))


def same(a: ll.Adapter, b: ll.Adapter) -> bool:
    """Equal layouts, bit-equal leaves."""
    pairs = list(zip(leaves(a), leaves(b), strict=True))
    return a.layout == b.layout and all(u.dtype == v.dtype and torch.equal(u, v) for u, v in pairs)


# ---------------------------------------------------------------------------- partition and combine
@every
@given(data=st.data())
def test_partition_then_combine_is_nothing(case: Case, data: st.DataObject) -> None:
    params = made(case)
    keys = [(path, name) for path, names in params.layout.names.items() for name in names]
    chosen = data.draw(st.sets(st.sampled_from(keys)))
    first, second = ll.partition(params, lambda path, name: (path, name) in chosen)
    assert len(optree.tree_leaves(first)) == len(chosen)
    assert len(optree.tree_leaves(second)) == len(keys) - len(chosen)
    for parts in ((first, second), (second, first)):
        again = ll.combine(*parts)
        assert all(a is b for a, b in zip(leaves(again), leaves(params), strict=True))
        assert again.layout == params.layout
    third, fourth = ll.partition(second, lambda path, name: name == "lora_A")
    assert same(ll.combine(third, first, fourth), params)


@every
def test_partition_by_default_parts_what_learns(case: Case) -> None:
    params = made(case)
    trainable, frozen = ll.partition(params)
    for path, specs in params.layout.specs.items():
        for name, spec in specs.items():
            assert isinstance(trainable[path][name], Tensor) == spec.trainable
            assert isinstance(frozen[path][name], Tensor) != spec.trainable


def test_combine_refuses_what_is_no_partition() -> None:
    params = lora()
    first, second = ll.partition(params, lambda path, name: name == "lora_A")
    with pytest.raises(
        ll.StructureError,
        match=r"combine: 'layers.0.down' lora_A is in 2 of the 2 parts, expected one",
    ):
        ll.combine(first, params)
    with pytest.raises(
        ll.StructureError,
        match=r"combine: 'layers.0.down' lora_A is in 0 of the 1 parts, expected one",
    ):
        ll.combine(second)
    with pytest.raises(ll.StructureError, match=r"combine differs at 'layers.0.down'.*alpha=3.0"):
        ll.combine(first, ll.partition(lora(alpha=3), lambda path, name: name != "lora_A")[0])
    with pytest.raises(ll.StructureError, match="combine: expected an Adapter, found int"):
        ll.combine(3, params)  # type: ignore[arg-type]


def test_a_predicate_is_asked_once_per_leaf() -> None:
    asked: list[tuple[str, str]] = []
    ll.partition(lora(), lambda *key: bool(asked.append(key)))
    assert len(asked) == len(set(asked))


@pytest.mark.parametrize("parts", [(), (3,)])
def test_combine_of_nothing(parts: Any) -> None:
    with pytest.raises(ll.StructureError, match="combine: expected"):
        ll.combine(*parts)


# -------------------------------------------------------------------------------- stack and unstack
@every
@given(count=st.integers(1, 4))
def test_stack_then_unstack_is_nothing(case: Case, count: int) -> None:
    several = [made(case, seed) for seed in range(count)]
    for stacked in (ll.stack(several), ll.stack(tuple(several)), ll.stack(iter(several))):  # type: ignore[arg-type]
        again = ll.unstack(stacked)
        assert len(again) == count
        assert all(same(a, b) for a, b in zip(again, several, strict=True))
    assert same(ll.stack(again), stacked)
    assert same(ll.stack(ll.unstack(stacked)[::-1]), ll.stack(several[::-1]))


def test_stack_keeps_absent_leaves_absent() -> None:
    several = [moved(ll.init(net(), ll.PiSSAConfig(r=4)), seed) for seed in (1, 2)]
    trainable, frozen = zip(*map(ll.partition, several), strict=True)
    assert same(ll.combine(ll.stack(trainable), ll.stack(frozen)), ll.stack(several))
    assert same(ll.combine(ll.unstack(ll.stack(trainable))[1], frozen[1]), several[1])


def _other(**fields: Any) -> Callable[[], ll.Adapter]:
    return lambda: lora(**fields)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda: ll.init(net(), ll.IA3Config()),
            "number 1 is 'ia3', the first 'lora': one method at a time",
        ),
        (
            _other(dropout=0.5),
            r"number 1 has other settings: .*dropout=0.5.*, the first .*dropout=0.0",
        ),
        (
            lambda: ll.init(net(width=8), ll.LoRAConfig(r=4)),
            "number 1 differs at 'layers.0.down': .*d_out=8.*d_out=16",
        ),
        (lambda: 3, "number 1: expected an Adapter, found int"),
        (lambda: {"layers.0.up": {}}, "number 1: expected an Adapter, found dict"),
    ],
)
def test_stack_names_the_first_difference(other: Callable[[], Any], message: str) -> None:
    with pytest.raises(ll.StructureError, match=f"stack: {message}"):
        ll.stack([lora(), other()])
    with pytest.raises(
        ll.StructureError, match=f"stack: {message.replace('number 1', 'number 2')}"
    ):
        ll.stack([lora(), lora(), other()])


def test_stack_and_unstack_refuse_what_is_none() -> None:
    with pytest.raises(ll.StructureError, match="stack: expected at least one adapter, found none"):
        ll.stack([])
    with pytest.raises(
        ll.StructureError,
        match=r"unstack: 'layers.0.down' lora_A: expected \(K, 4, 24\), found \(4, 24\)",
    ):
        ll.unstack(lora())
    uneven = optree.tree_map(lambda t: t[: 1 + (t.shape[1] == 4)], ll.stack([lora(), lora()]))
    with pytest.raises(
        ll.StructureError, match=r"unstack: expected one leading size, found \[1, 2\]"
    ):
        ll.unstack(uneven)
    with pytest.raises(
        ll.StructureError, match="unstack: expected one leading size, found no tensors"
    ):
        ll.unstack(ll.partition(lora(), lambda *_: False)[0])


@pytest.mark.parametrize(
    "act",
    [
        pytest.param(
            lambda whole, part: ll.stack([part, whole]),
            id="a part first: the other's leaves vanish in silence",
        ),
        pytest.param(lambda whole, part: ll.stack([whole, part]), id="a part second: TypeError"),
        pytest.param(lambda whole, part: ll.stack([3]), id="a lone non-adapter: AttributeError"),
        pytest.param(
            lambda whole, part: ll.unstack(3), id="unstack of a non-adapter: AttributeError"
        ),
        pytest.param(
            lambda whole, part: ll.stack(ll.init(torch.nn.Linear(2, 2), ll.LoRAConfig())),
            id="an adapter: AttributeError",
        ),
    ],
)
def test_stack_of_what_does_not_stack(act: Callable[..., Any]) -> None:
    whole = lora()
    with pytest.raises(ll.StructureError, match="stack"):
        act(whole, ll.partition(whole, lambda path, name: name == "lora_A")[0])


def test_stack_does_not_promote_in_silence() -> None:
    with pytest.raises(ll.StructureError, match="bfloat16"):
        ll.stack([lora(), ll.cast(lora(), torch.bfloat16)])


def test_stack_names_the_leaf_that_differs() -> None:
    whole = lora()
    part, _ = ll.partition(whole, lambda path, name: name == "lora_A")
    with pytest.raises(
        ll.StructureError,
        match=r"stack: number 1 differs at 'layers.0.down' lora_B: absent, the first \(16, 4\), "
        r"torch",
    ):
        ll.stack([whole, part])
    with pytest.raises(
        ll.StructureError, match=r"stack: number 1 differs at 'layers.0.down' lora_A: \(2, 4, 24\)"
    ):
        ll.stack([whole, ll.stack([whole, whole])])


def test_a_refusal_names_only_what_differs() -> None:
    with pytest.raises(ll.StructureError, match=r"settings: dropout=0.5, the first dropout=0.0$"):
        ll.stack([lora(), lora(dropout=0.5)])


# -------------------------------------------------------------------------------------------- scale
@every
@pytest.mark.parametrize(
    "strength", [0.5, torch.tensor(-1.0, dtype=torch.float64)], ids=["float", "tensor"]
)
def test_scaling_a_stack_is_scaling_its_members(case: Case, strength: Any) -> None:
    several = [made(case, seed) for seed in (1, 2)]
    close(
        ll.scale(ll.stack(several), strength),
        ll.stack([ll.scale(p, strength) for p in several]),
        1e-12,
    )


@every
def test_a_stack_takes_a_strength_per_member(case: Case) -> None:
    several = [made(case, seed) for seed in (1, 2, 3)]
    strengths = torch.tensor([0.5, 0.0, -1.0], dtype=torch.float64)
    scaled = ll.scale(ll.stack(several), strengths)
    close(
        scaled,
        ll.stack([ll.scale(p, c.item()) for p, c in zip(several, strengths, strict=True)]),
        1e-12,
    )
    with pytest.raises(ValueError, match=r"same size in the mapped dimension|strength"):
        ll.scale(ll.stack(several), strengths[:2])


@every
def test_scaling_is_pure_and_keeps_what_it_is(case: Case) -> None:
    params = ll.cast(made(case), torch.float32)
    before = copy.deepcopy(params)
    for strength in (0.5, 2, torch.tensor(0.5)):
        scaled = ll.scale(params, strength)
        assert scaled.layout == params.layout
        assert [(t.shape, t.dtype) for t in leaves(scaled)] == [
            (t.shape, t.dtype) for t in leaves(params)
        ]
    assert same(before, params)


@every
def test_scaling_by_a_wider_tensor_keeps_dtypes(case: Case) -> None:
    params = ll.cast(made(case), torch.float32)
    scaled = ll.scale(params, torch.tensor(0.5, dtype=torch.float64))
    assert [t.dtype for t in leaves(scaled)] == [t.dtype for t in leaves(params)]


def test_a_vector_of_strengths_needs_a_stack() -> None:
    params = ll.init(torch.nn.Linear(4, 4), ll.IA3Config())
    with pytest.raises(ll.StructureError, match="stack"):
        ll.scale(params, torch.zeros(4))


def test_strengths_are_one_per_member() -> None:
    several = ll.stack([lora(), lora()])
    for strengths in (torch.zeros(3), torch.zeros(2, 2)):
        with pytest.raises(
            ll.StructureError,
            match=r"scale: expected one strength or 2, one per member of the stack, found \(",
        ):
            ll.scale(several, strengths)
    with pytest.raises(
        ll.StructureError,
        match=r"stack: 'layers.0.down' lora_A: expected \(K, 4, 24\), found \(4, 24\)",
    ):
        ll.scale(lora(), torch.zeros(4))


@pytest.mark.parametrize(
    "verb", [ll.partition, ll.cast, ll.scale, ll.num_params, ll.unstack, ll.combine]
)
def test_what_is_no_adapter(verb: Any) -> None:
    args = {ll.cast: (torch.float32,), ll.scale: (0.5,)}.get(verb, ())
    with pytest.raises(
        ll.StructureError, match=f"{verb.__name__}: expected an Adapter, found dict"
    ):
        verb({}, *args)


def test_a_method_without_a_path_has_no_strength(monkeypatch: pytest.MonkeyPatch) -> None:
    config = type("StiffConfig", (ll.AdapterConfig,), {})
    variant = ll.Variant(
        name="stiff", config=config, param_specs=lambda cfg, site: {"lora_g": ll.ParamSpec((2,))}
    )
    monkeypatch.setitem(methods._REGISTRY, config, variant)
    with pytest.raises(
        ll.UnsupportedError,
        match="stiff has no `scale` function in its Variant, so its strength can't be set",
    ):
        ll.scale(ll.init(torch.nn.Linear(2, 2), config()), 0.5)


def test_strength_is_differentiable() -> None:
    params, model, x = moved(lora()), net(), torch.randn(2, 16, dtype=torch.float64)
    slope = torch.func.grad(lambda c: ll.apply(model, ll.scale(params, c), x).square().sum())(
        torch.tensor(1.0, dtype=torch.float64)
    )
    assert slope.abs() > 0


# ------------------------------------------------------------------------------ cast, counts, table
@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_cast_keeps_what_must_stay_wide(case: Case, dtype: torch.dtype) -> None:
    params = made(case)
    cast = ll.cast(params, dtype)
    assert cast.layout == params.layout
    expected = ll.init(net(), case.config(r=4, dtype=dtype))
    assert [t.dtype for t in leaves(cast)] == [t.dtype for t in leaves(expected)]
    assert same(ll.cast(params, torch.float64), params)


def test_cast_refuses_what_is_no_floating_dtype() -> None:
    for dtype in (torch.int8, torch.bool, torch.complex64):
        with pytest.raises(
            ll.StructureError, match=f"cast: expected a floating dtype, found {dtype}"
        ):
            ll.cast(lora(), dtype)


def test_a_part_can_be_cast() -> None:
    trainable, frozen = ll.partition(lora(), lambda path, name: name == "lora_A")
    assert same(
        ll.combine(ll.cast(trainable, torch.float32), ll.cast(frozen, torch.float32)),
        ll.cast(lora(), torch.float32),
    )


def test_a_part_is_scaled_or_refused_with_words() -> None:
    with pytest.raises(ll.StructureError, match=r"partition.*combine"):
        ll.scale(ll.partition(ll.init(net(), ll.PiSSAConfig(r=4)))[0], 0.5)


def test_cast_to_a_name_is_refused_with_words() -> None:
    with pytest.raises(
        ll.StructureError, match="cast: expected a floating dtype, found 'bfloat16'"
    ):
        ll.cast(lora(), "bfloat16")  # type: ignore[arg-type]


@every
def test_counts_and_table(case: Case) -> None:
    params = made(case)
    trainable, frozen = ll.partition(params)
    everything = sum(t.numel() for t in leaves(params))
    assert (
        ll.num_params(params)
        == sum(t.numel() for t in leaves(trainable))
        == ll.num_params(trainable)
    )
    assert ll.num_params(params, trainable_only=False) == everything
    assert ll.num_params(frozen) == 0
    assert ll.num_params(frozen, trainable_only=False) == everything - ll.num_params(params)
    assert ll.num_params(ll.stack([params, params])) == 2 * ll.num_params(params)
    assert ll.summary(params) == repr(params)
    assert f"{len(params)} sites, {ll.num_params(params):,} trainable" in ll.summary(params)
