"""LLaMA-Adapter: inside the attention of models of transformers, from the identity on."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import close, moved, normal, same_state, snapshot
from prompts import IDS, fresh, greedy
from torch import Tensor
from torch.func import grad, vmap

import lora_lite_func as ll

pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
MODELS = {
    "llama": {},
    "eager": {"attn_implementation": "eager"},
    "head_dim": {"head_dim": 6},
    "biased": {"attention_bias": True},
}
every = pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)


def adapter(model: Any, seed: int = 0, r: int = 3, **more: Any) -> ll.Adapter:
    return ll.init(model, ll.LLaMAAdapterConfig(r=r, **more), seed=seed)


def by_hand(module: Any, p: Any, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """An attention's output, and what its queries find in the prompt, all written out."""
    N, T, size = *x.shape[:2], module.head_dim
    home = sys.modules[type(module).__module__]
    q = module.q_proj(x).view(N, T, -1, size).transpose(1, 2)
    q, _ = home.apply_rotary_pos_emb(q, q, *rotation)
    k, v = (
        t(p["lora_prompt"]).view(3, -1, size).transpose(0, 1).repeat_interleave(2, dim=0)
        for t in (module.k_proj, module.v_proj)
    )
    found = torch.softmax(q @ k.mT / size**0.5, dim=-1) @ v
    update = p["lora_gate"] * found.transpose(1, 2).flatten(2) @ module.o_proj.weight.mT
    return module(x, position_embeddings=rotation, attention_mask=None)[0] + update


@every
def test_it_is_the_attention_and_what_its_queries_find_in_the_prompt(
    settings: dict[str, Any],
) -> None:
    model = fresh("llama", **settings)
    module = model.model.layers[1].self_attn
    x = normal(2, 5, 32, seed=0, dtype=torch.float32)
    rotation = model.model.rotary_emb(x, torch.arange(5)[None])
    start = adapter(module)
    params = moved(start, size=0.5)
    given = {"position_embeddings": rotation, "attention_mask": None}
    with torch.no_grad():
        assert torch.equal(ll.apply(module, start, x, **given)[0], module(x, **given)[0])
        expected = by_hand(module, params[""], x, rotation)
        close(ll.apply(module, params, x, **given)[0], expected, 2e-6)


@every
def test_a_whole_model_in_calls_rows_and_generation(settings: dict[str, Any]) -> None:
    model = fresh("llama", **settings)
    before = snapshot(model)
    start = adapter(model)
    assert list(start) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    several = [moved(adapter(model, seed), seed, 0.5) for seed in (1, 2)]
    with torch.no_grad():
        assert torch.equal(ll.apply(model, start, IDS).logits, model(IDS).logits)
        single = [ll.apply(model, p, IDS).logits for p in several]
        assert (single[0] - model(IDS).logits).abs().max() > 1e-2
        bound = ll.bind(model, several[0])
        close(bound(IDS).logits, single[0], 1e-6)
        found = ll.apply(model, ll.rows(ll.stack(several), [1, -1, 0]), IDS).logits
        close(found[0], single[1][0], 5e-6)
        close(found[1], model(IDS).logits[1], 5e-6)
        close(found[2], single[0][2], 5e-6)
        mapped = vmap(lambda p: ll.apply(model, p, IDS, use_cache=False).logits)(ll.stack(several))
        close(mapped, torch.stack(single), 5e-6)
        how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        full = greedy(lambda x: ll.apply(model, several[0], x), IDS[:1], 4)
        for more in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
            assert torch.equal(bound.generate(IDS[:1], **how, **more), full)
        assert torch.equal(
            ll.apply(model, ll.scale(several[0], 0.0), IDS).logits, model(IDS).logits
        )
    assert same_state(before, snapshot(model))


def test_gradients_begin_at_the_gate() -> None:
    model = fresh("llama")

    def loss(p: ll.Adapter) -> Tensor:
        return ll.apply(model, p, IDS, labels=IDS).loss

    first = grad(loss)(adapter(model))
    assert all(t["lora_gate"].abs() > 0 and not t["lora_prompt"].any() for t in first.values())
    params = moved(adapter(model), size=0.1)
    found = grad(loss)(params)
    bound = ll.bind(model, params)
    bound(IDS, labels=IDS).loss.backward()
    leaf = bound.get_submodule("model.layers.0.self_attn.adapter.0")
    for name, t in leaf.named_parameters():
        close(t.grad, found["model.layers.0.self_attn"][name], 1e-6)


def test_beside_others_files_and_places(tmp_path: Path) -> None:
    model = fresh("llama")
    top = moved(adapter(model, layers=(-1,)), size=0.5)
    assert list(top) == ["model.layers.1.self_attn"]
    ll.save(top, tmp_path / "a.safetensors")
    lora = moved(ll.init(model, ll.LoRAConfig(r=2)), size=0.05)
    with torch.no_grad():
        back = ll.load(tmp_path / "a.safetensors", model)
        assert torch.equal(ll.apply(model, back, IDS).logits, ll.apply(model, top, IDS).logits)
        # the prompt goes through the projections as they are adapted
        expected = ll.apply(ll.merged(model, lora), top, IDS).logits
        close(ll.apply(model, (lora, top), IDS).logits, expected, 1e-5)
        twice = ll.bind(ll.bind(model, top), moved(adapter(model, 4), size=0.5))
        close(
            twice(IDS).logits,
            ll.apply(model, (top, moved(adapter(model, 4), size=0.5)), IDS).logits,
            1e-6,
        )
        assert ll.check(model, top, IDS).ok


def test_what_is_refused() -> None:
    model = fresh("llama")
    params = adapter(model)
    with pytest.raises(ll.UnsupportedError, match="no dense equivalent"):
        ll.merged(model, params)
    with pytest.raises(ll.TargetError, match="has no attention modules of transformers"):
        adapter(fresh("gpt2"))
    with pytest.raises(ll.StructureError, match="can't be padded: stack equal ranks"):
        ll.stack([params, adapter(model, r=2)])
    tokens = ll.rows(ll.stack([params]), torch.zeros(3, 6, dtype=torch.long))
    with pytest.raises(ll.UnsupportedError, match="give an id for each row"):
        ll.apply(model, tokens, IDS)
    edit = ll.init(model, ll.LoReFTConfig(r=2, target_names=r"self_attn$"))
    with pytest.raises(ll.UnsupportedError, match="inside its attention and as a whole module"):
        ll.apply(model, (params, edit), IDS)


def test_models_of_every_precision() -> None:
    model, ids = copy.deepcopy(fresh("llama")), IDS[:2]
    params = moved(adapter(model), size=0.5)
    y = ll.apply(model, params, input_ids=ids).logits
    wide = ll.cast(params, torch.float64)
    for given in (params, wide):
        made = ll.apply(model.double(), given, input_ids=ids).logits
        assert made.dtype == torch.float64
        close(made.float(), y, 1e-4)
    close(ll.apply(model.float(), wide, input_ids=ids).logits, y, 1e-4)
