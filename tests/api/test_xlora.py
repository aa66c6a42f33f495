"""ll.xlora: experts mixed by a classifier of the base's hidden states, in two passes."""

from __future__ import annotations

from typing import Any

import optree
import pytest
import torch
from families import FAMILIES
from helpers import close, moved, net, same_state, snapshot
from torch import Tensor, nn

import lora_lite_func as ll

IDS = torch.tensor([[8, 5, 6, 7, 5, 6, 9], [5, 6, 8, 9, 3, 4, 7]])
SITES = ("q_proj", "up_proj", "down_proj")


def model() -> Any:
    return FAMILIES["llama"].fresh()


def experts(base: Any, count: int = 3) -> list[ll.Adapter]:
    cfg = ll.LoRAConfig(r=2, alpha=6.0, target_names=SITES)
    return [moved(ll.init(base, cfg, seed=s), s, 0.3) for s in range(count)]


def made(base: Any, **fields: Any) -> ll.XLoRA:
    """One with a classifier as if trained."""
    x = ll.xlora(base, experts(base), **fields)
    gen = torch.Generator().manual_seed(7)
    head = {name: t + 0.5 * torch.randn(t.shape, generator=gen) for name, t in x.head.items()}
    return x.having(head)


def by_hand(base: Any, x: ll.XLoRA, ids: Tensor) -> Tensor:
    """Both passes, with the experts' dense updates summed at each layer."""
    h = base(ids, output_hidden_states=True).hidden_states[-1]
    for i in range(len(x.head) // 2):
        h = torch.relu(h) if i else h
        h = h @ x.head[f"{i}.weight"].mT + x.head[f"{i}.bias"]
    order = [name for name, _ in base.named_modules() if name in x.stack]
    members, handles = ll.unstack(x.stack), []
    for n, path in enumerate(order):
        logits = h[..., n * 3 : n * 3 + 3] if x.settings.layerwise else h
        w = (logits / x.settings.temperature).softmax(-1)
        if x.settings.top_k is not None:
            w = torch.where(w >= w.sort(-1, descending=True).values[..., :2][..., -1:], w, 0.0)
        w = w * x.settings.strength

        def add(_: Any, args: Any, y: Tensor, path: str = path, w: Tensor = w) -> Tensor:
            for k, p in enumerate(members):
                D = p.sites[path].scaling * p[path]["lora_B"] @ p[path]["lora_A"]
                y = y + w[..., k : k + 1] * (args[0] @ D.mT)
            return y

        handles.append(base.get_submodule(path).register_forward_hook(add))
    try:
        return base(ids).logits
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("fields", [{}, {"layerwise": True, "depth": 2, "width": 8}], ids=repr)
def test_both_passes_are_one_graph(fields: dict[str, Any]) -> None:
    """It takes the last hidden states as they are, since recording all of them breaks a graph."""
    torch._dynamo.reset()
    base = model()
    x = made(base, **fields)

    def logits(x: ll.XLoRA) -> Tensor:
        return x(base, IDS, use_cache=False).logits

    def grads(head: dict[str, Tensor]) -> dict[str, Tensor]:
        return ll.grad(lambda h: x.having(h)(base, IDS, labels=IDS, use_cache=False).loss)(head)

    with torch.no_grad():
        close(torch.compile(logits, backend="eager", fullgraph=True)(x), logits(x), 1e-6)
    found = torch.compile(grads, backend="eager", fullgraph=True)(x.head)
    for name, g in grads(x.head).items():
        close(found[name], g, 1e-6)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "fields",
    [{}, {"layerwise": True, "temperature": 0.5}, {"depth": 3, "width": 8, "top_k": 2}],
    ids=["flat", "layerwise", "deep"],
)
def test_it_is_the_papers_two_passes(fields: dict[str, Any]) -> None:
    base = model()
    x, before = made(base, strength=1.5, **fields), snapshot(base)
    with torch.no_grad():
        y = x(base, IDS).logits
        assert same_state(before, snapshot(base))
        close(y, by_hand(base, x, IDS), 1e-4)
        close(ll.apply(base, x.mixed(base, IDS), IDS).logits, y, 1e-6)
        assert (y - base(IDS).logits).abs().max() > 0.05


def test_it_starts_with_equal_weights_of_all_experts() -> None:
    base = model()
    x = ll.xlora(base, {"a": experts(base)[0], "b": experts(base)[1]}, depth=2, width=8)
    hidden = torch.randn(2, 3, 32)
    close(x.weights(hidden), torch.full((2, 3, 2), 0.5), 1e-6)
    again = ll.xlora(base, experts(base)[:2], depth=2, width=8)
    close(again.head, x.head, 0.0)
    other = ll.xlora(base, experts(base)[:2], depth=2, width=8, seed=1)
    assert not torch.equal(other.head["0.weight"], x.head["0.weight"])


def test_the_classifier_is_what_learns() -> None:
    base = model()
    x = ll.xlora(base, experts(base), layerwise=True)

    def loss(head: dict[str, Tensor]) -> Tensor:
        return x.having(head)(base, IDS, labels=IDS).loss

    head, first = x.head, loss(x.head)
    for _ in range(8):
        slopes = ll.grad(loss)(head)
        assert all(g.any() for g in slopes.values())
        head = {name: t - 0.5 * slopes[name] for name, t in head.items()}
    assert loss(head) < first - 0.01
    close(torch.func.grad(loss)(head), ll.grad(loss)(head), 1e-5)


def test_it_is_a_pytree_and_dropout_needs_training() -> None:
    base = model()
    x = made(base, depth=2, width=8, dropout=0.5)
    doubled = optree.tree_map(lambda t: t * 2, x)
    assert isinstance(doubled, ll.XLoRA)
    assert torch.equal(doubled.head["0.bias"], x.head["0.bias"] * 2)
    assert doubled.settings == x.settings
    hidden = torch.randn(1, 4, 32)
    assert torch.equal(x.weights(hidden), x.weights(hidden))
    assert not torch.equal(x.weights(hidden, training=True), x.weights(hidden, training=True))
    assert "layers" in repr(x)


@pytest.mark.parametrize("layerwise", [False, True])
def test_generation_is_equal_with_and_without_a_cache(layerwise: bool) -> None:
    base = model()
    x, before = made(base, layerwise=layerwise, strength=3.0), snapshot(base)
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    text = x.generate(base, IDS, **how)
    assert torch.equal(text, x.generate(base, IDS, use_cache=False, **how))
    assert torch.equal(text[:, :7], IDS)
    with torch.no_grad():
        for length in range(7, 13):
            logits = x(base, text[:, :length]).logits
            assert torch.equal(logits[:, -1].argmax(-1), text[:, length])
    assert same_state(before, snapshot(base))
    assert not torch.equal(text, base.generate(IDS, **how))
    beams = x.generate(base, IDS, num_beams=2, **how)
    assert torch.equal(beams, x.generate(base, IDS, num_beams=2, use_cache=False, **how))
    padded = torch.nn.functional.pad(IDS[:1, 2:], (2, 0))
    mask = (torch.arange(7) >= 2).long()[None]
    text = x.generate(base, padded, attention_mask=mask, **how)
    assert torch.equal(text[:, 2:], x.generate(base, IDS[:1, 2:], **how))


# ----------------------------------------------------------------------------------------- refusals
def test_what_cannot_be_one_is_refused() -> None:
    base = model()
    several = experts(base)
    for fields, message in (
        ({"depth": 0}, "depth: expected at least 1, found 0"),
        ({"top_k": 4}, "top_k: expected at most 3"),
        ({"temperature": 0.0}, "temperature: expected more than 0"),
        ({"dropout": 1.0}, r"dropout: expected a probability"),
    ):
        with pytest.raises(ll.ConfigError, match=f"xlora: {message}"):
            ll.xlora(base, several, **fields)
    gates = [ll.init(base, ll.IA3Config(target_names=SITES))] * 2
    with pytest.raises(ll.UnsupportedError, match="mixed: what ia3 does isn't a sum"):
        ll.xlora(base, gates)
    with pytest.raises(ll.StructureError, match=r"xlora: .*expected \(K"):
        ll.xlora(base, several[0])
    with pytest.raises(ll.StructureError, match=r"the model has no module at site 'model\.layers"):
        ll.xlora(net(), several, hidden_size=16)
    with pytest.raises(ll.ConfigError, match="the model's config says no hidden_size"):
        ll.xlora(net(), [ll.init(net(), ll.LoRAConfig(r=2))] * 2)


def test_a_model_without_hidden_states() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)

        def forward(self, x: Tensor, **_: Any) -> Tensor:
            return self.layer(x)

    base = Plain()
    x = ll.xlora(
        base, [moved(ll.init(base, ll.LoRAConfig(r=2)), s) for s in range(2)], hidden_size=16
    )
    features = torch.randn(2, 3, 16)
    with pytest.raises(ll.StructureError, match=r"with hidden_states .* ll\.mixed\(x\.stack, x\.w"):
        x(base, features)
    with pytest.raises(ll.StructureError, match="that generates, found Plain"):
        x.generate(base, features)
    y = ll.apply(base, ll.mixed(x.stack, x.weights(features)), features)
    assert (y - base(features)).abs().max() > 1e-3
    with pytest.raises(ll.StructureError, match=r"hidden states \(N, T, 16\), found \(2, 3, 8\)"):
        x.weights(torch.randn(2, 3, 8))
