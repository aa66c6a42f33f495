"""Real model families: apply is merged is bound, in training and generation, under checkpointing,
in bfloat16 and under autocast.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from families import FAMILIES, Family
from helpers import close, leaves, moved, same_state, snapshot
from torch_versions import GROUPED, groups_in_grad, skip_without

import lora_lite_func as ll

pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

CONFIGS: dict[str, Any] = {"lora": ll.LoRAConfig, "hra": ll.HRAConfig, "dora": ll.DoRAConfig}
family = pytest.mark.parametrize("name", FAMILIES)
method = pytest.mark.parametrize("method", CONFIGS)


def config(name: str, method: str) -> ll.AdapterConfig:
    if name == "unet":
        pytest.importorskip("diffusers")
    return CONFIGS[method](r=4, **FAMILIES[name].config)


@functools.cache
def trained(name: str, method: str) -> ll.Adapter:
    """An adapter of a family's model, with noise on it."""
    return moved(ll.init(FAMILIES[name].model, config(name, method)), size=0.05)


def loss(f: Family, out: Any) -> torch.Tensor:
    return f.output(out).float().square().mean()


@family
@method
def test_apply_is_merged_is_bound(name: str, method: str) -> None:
    f, params = FAMILIES[name], trained(name, method)
    assert len(params) == f.sites
    with torch.no_grad():
        base = f.output(f.model(**f.inputs))  # a model may prepare itself on its first call
        before = snapshot(f.model)
        y = f.output(ll.apply(f.model, params, **f.inputs))
        assert (y - base).abs().max() > 1e-3
        close(y, f.output(ll.merged(f.model, params)(**f.inputs)), 5e-5)
        close(y, f.output(ll.bind(f.model, params)(**f.inputs)), 1e-6)
    assert same_state(before, snapshot(f.model))


@family
def test_every_site_is_reached_and_learns(name: str) -> None:
    f, params = FAMILIES[name], trained(name, "lora")
    found = ll.check(f.model, params, **f.inputs)
    assert found.ok, repr(found)
    if name in GROUPED:
        skip_without(groups_in_grad)
    grads = torch.func.grad(lambda p: loss(f, ll.apply(f.model, p, **f.inputs)))(params)
    assert {
        path for path, ts in grads.items() if any(t.abs().max() == 0 for t in ts.values())
    } == f.unread
    assert all(p.grad is None for p in f.model.parameters())


@family
def test_rows_are_loops_or_refused_where_a_layer_has_no_rows(name: str) -> None:
    f, params = FAMILIES[name], trained(name, "lora")
    if f.rows is None:
        return
    several = [params, moved(params, 2, size=0.05)]
    with torch.no_grad():
        if f.rows:
            with pytest.raises(ll.LoraLiteError, match=f.rows):
                ll.apply(f.model, ll.rows(ll.stack(several), [1, 0]), **f.inputs)
            return
        y = f.output(ll.apply(f.model, ll.rows(ll.stack(several), [1, 0]), **f.inputs))
        wanted = [f.output(ll.apply(f.model, p, **f.inputs)) for p in reversed(several)]
    close(y, torch.stack([own[n] for n, own in enumerate(wanted)]), 1e-5)


def enable(model: Any) -> None:
    """Gradient checkpointing on, as transformers and as diffusers have it."""
    if hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.enable_gradient_checkpointing()


@pytest.mark.parametrize("name", [name for name, f in FAMILIES.items() if f.checkpoints])
@method
def test_gradient_checkpointing_changes_nothing(name: str, method: str) -> None:
    f, params = FAMILIES[name], trained(name, method)
    found = []
    for checkpointed in (False, True):
        bound: Any = ll.bind(f.model, params)
        if checkpointed:
            enable(bound)
            bound.train()
            # training mode turns on checkpointing, and also dropout, which this test leaves out
            for module in bound.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
        trainable = {n: p for n, p in bound.named_parameters() if p.requires_grad}
        assert all(".adapter." in n for n in trainable)
        loss(f, bound(**f.inputs)).backward()
        found.append({n: p.grad for n, p in trainable.items() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    close(found[1], found[0], 1e-5)
    assert not f.model.training
    assert all(p.grad is None for p in f.model.parameters())


@pytest.mark.parametrize("name", [name for name, f in FAMILIES.items() if f.generate is not None])
@method
def test_generation_is_that_of_merged_weights(name: str, method: str) -> None:
    f, params = FAMILIES[name], trained(name, method)
    made = [ll.bind(f.model, params), ll.merged(f.model, params)]
    tokens = [
        m.generate(**f.generate, max_new_tokens=5, min_new_tokens=5, do_sample=False) for m in made
    ]  # type: ignore[operator]
    assert torch.equal(*tokens)
    assert tokens[0].shape[1] >= 5


@functools.cache
def half(name: str) -> Any:
    return copy.deepcopy(FAMILIES[name].model).to(torch.bfloat16)


@family
@method
def test_bfloat16_and_autocast(name: str, method: str) -> None:
    f, params = FAMILIES[name], trained(name, method)
    inputs = {
        k: v.bfloat16() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in f.inputs.items()
    }
    with torch.no_grad():
        wanted = f.output(ll.apply(f.model, params, **f.inputs))
        y, base = f.output(ll.apply(half(name), params, **inputs)), f.output(half(name)(**inputs))
        assert y.dtype == base.dtype
        # the error from rounding the base alone
        off = (base.float() - f.output(f.model(**f.inputs))).abs().max().item()
        assert (y.float() - wanted).abs().max() <= 4 * off + 0.05 * wanted.abs().max()
        fresh = ll.init(half(name), config(name, method))
        assert all(t.dtype in (torch.bfloat16, torch.float32) for t in leaves(fresh))
        start = f.output(ll.apply(half(name), fresh, **inputs))
        close(start.float(), base.float(), 0.05 if method == "hra" else 0.0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, base = f.output(ll.apply(f.model, params, **f.inputs)), f.output(f.model(**f.inputs))
        assert y.dtype == base.dtype
        assert (y.float() - wanted).abs().max() <= 4 * off + 0.05 * wanted.abs().max()
