"""Virtual keys and values in front of a model's own: hand-made caches, rows, generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import close, moved, same_state, snapshot
from prompts import IDS, fresh, greedy
from torch import Tensor
from torch.func import grad, vmap

import lora_lite_func as ll

transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
DECODERS = ("llama", "gpt2", "gemma2", "bloom")
decoder = pytest.mark.parametrize("name", DECODERS)
CONFIGS = {
    "prefix": ll.PrefixTuningConfig(r=4),
    "projected": ll.PrefixTuningConfig(r=4, projection=8),
    "cartridge": ll.CartridgeConfig(r=4, token_ids=tuple(range(3, 9))),
}
HOW: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def prefix(model: Any, r: int = 4, seed: int = 0) -> ll.Adapter:
    return ll.init(model, ll.PrefixTuningConfig(r=r), seed=seed)


def heads(model: Any) -> tuple[int, int]:
    """(heads, size of a head) of a cache's keys."""
    config = model.config
    count = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return count, size


def by_hand(model: Any, made: Tensor, ids: Tensor, **more: Any) -> Any:
    """The model's own call that goes on from a cache of these keys and values."""
    cache = transformers.DynamicCache(config=model.config)
    for i, (k, v) in enumerate(made.unflatten(-1, heads(model)).transpose(2, 3)):
        cache.update(*(t.expand(ids.shape[0], *t.shape) for t in (k, v)), i)
    return model(ids, cache=cache, **more)


@decoder
def test_it_is_the_models_call_that_goes_on_from_keys_and_values(name: str) -> None:
    model = fresh(name)
    params = prefix(model)
    before = snapshot(model)
    with torch.no_grad():
        expected = by_hand(model, params[""]["lora_prefix"], IDS, labels=IDS)
        found = ll.apply(model, params, IDS, labels=IDS)
        close(found.logits, expected.logits, 1e-6)
        close(found.loss, expected.loss, 1e-6)
        close(ll.bind(model, params)(IDS).logits, expected.logits, 1e-6)
        assert (expected.logits - model(IDS).logits).abs().max() > 1e-2
    assert same_state(before, snapshot(model))


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_each_method_in_calls_generation_and_gradients(cfg: ll.AdapterConfig) -> None:
    model = fresh("llama")
    params = moved(ll.init(model, cfg), size=0.05)
    ids = IDS[:1]
    with torch.no_grad():
        expected = greedy(lambda x: ll.apply(model, params, x), ids, 4)
        bound = ll.bind(model, params)
        room = transformers.StaticCache(model.config, max_cache_len=14)
        for how in ({}, {"cache": room}, {"use_cache": False}):
            assert torch.equal(bound.generate(ids, max_new_tokens=4, **how, **HOW), expected), how
        uncached = ll.apply(model, params, ids, use_cache=False)
        assert "cache" not in uncached
        close(uncached.logits, ll.apply(model, params, ids).logits, 1e-6)
    found = grad(lambda p: ll.apply(model, p, IDS, labels=IDS).loss)(params)
    bound(IDS, labels=IDS).loss.backward()
    (adapter,) = [m for m in bound.modules() if type(m).__name__ == "Leaves"]
    for key, t in adapter.named_parameters():
        close(t.grad, found[""][key], 1e-6)
        assert t.grad.abs().max() > 0


@decoder
def test_rows_of_unlike_lengths_bare_rows_and_padding(name: str) -> None:
    model = fresh(name)
    several = [prefix(model, r, seed=r) for r in (5, 2)]
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[1, :2], mask[1, :2] = 0, 0
    rows = ll.rows(ll.stack(several), [1, 0, None])
    with torch.no_grad():
        bound = ll.bind(model, rows)
        written = bound.generate(ids, attention_mask=mask, max_new_tokens=3, **HOW)
        uncached = bound.generate(
            ids, attention_mask=mask, max_new_tokens=3, use_cache=False, **HOW
        )
        found = ll.apply(model, rows, ids, attention_mask=mask).logits
        for i, params in enumerate((several[1], several[0], ())):
            own = ids[i : i + 1, 2 if i == 1 else 0 :]
            close(found[i, -own.shape[1] :], ll.apply(model, params, own).logits[0], 2e-6)
            expected = greedy(lambda x, p=params: ll.apply(model, p, x), own, 3)
            assert torch.equal(written[i, -3:], expected[0, -3:])
            assert torch.equal(uncached[i, -3:], expected[0, -3:])


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_decoders_have_it_in_the_decoders_own_attention(name: str) -> None:
    model = fresh(name)
    params = prefix(model)
    begin = torch.full((3, 1), model.config.decoder_start_token_id)
    bound = ll.bind(model, params)
    with torch.no_grad():
        written = begin
        for _ in range(4):
            logits = ll.apply(model, params, IDS, decoder_input_ids=written).logits
            written = torch.cat([written, logits[:, -1:].argmax(-1)], dim=1)
        for cached in (True, False):
            found = bound.generate(
                IDS, max_new_tokens=4, use_cache=cached, do_sample=False, eos_token_id=None
            )
            assert torch.equal(found, written)
        rows = ll.rows(ll.stack([prefix(model, 2), prefix(model, 3)]), [0, 1, 0])
        if name == "bart":
            with pytest.raises(ll.UnsupportedError, match="numbers its decoder's tokens"):
                ll.apply(model, rows, IDS, decoder_input_ids=begin)
        else:
            found = ll.apply(model, rows, IDS, decoder_input_ids=begin.expand(3, 2)).logits
            one = ll.apply(model, prefix(model, 2), IDS, decoder_input_ids=begin.expand(3, 2))
            close(found[0], one.logits[0], 2e-6)


def test_a_cartridge_of_a_text_is_the_text_in_front() -> None:
    """Before any training its keys and values are those of the text's own tokens."""
    model, text = fresh("llama"), IDS[:1]
    params = ll.init(model, ll.CartridgeConfig(r=6, token_ids=tuple(text[0].tolist())))
    assert params[""]["lora_sink"].shape[2] == 1
    with torch.no_grad():
        whole = model(torch.cat([text, IDS[1:2]], dim=1)).logits[:, 6:]
        close(ll.apply(model, params, IDS[1:2]).logits, whole, 1e-5)
    with pytest.raises(ll.ConfigError, match="at least r = 6 ids"):
        ll.init(model, ll.CartridgeConfig(r=6, token_ids=(1, 2)))
    with pytest.raises(ll.ConfigError, match="expected 0 to r - 1 = 1"):
        ll.CartridgeConfig(r=2, frozen=2)


def test_several_in_order_and_tokens_beside() -> None:
    model = fresh("llama")
    first, second = prefix(model, 3), prefix(model, 2, seed=1)
    tokens = ll.init(model, ll.PromptTuningConfig(r=2, init="normal"))
    made = torch.cat([first[""]["lora_prefix"], second[""]["lora_prefix"]], dim=2)
    with torch.no_grad():
        expected = by_hand(model, made, IDS).logits
        close(ll.apply(model, (first, second), IDS).logits, expected, 1e-6)
        for params in ((first, tokens), (tokens, first)):
            bound = ll.bind(model, params)
            found = bound.generate(IDS[:1], max_new_tokens=3, **HOW)
            full = greedy(lambda x, p=params: ll.apply(model, p, x), IDS[:1], 3)
            assert torch.equal(found, full)


def test_vmap_over_prefixes() -> None:
    model = fresh("llama")
    several = [prefix(model, 3, seed) for seed in range(2)]
    with torch.no_grad():
        found = vmap(lambda p: ll.apply(model, p, IDS).logits)(ll.stack(several))
        close(found, torch.stack([ll.apply(model, p, IDS).logits for p in several]), 2e-6)


def test_what_has_no_keys_of_its_own_is_refused() -> None:
    with pytest.raises(ll.TargetError, match="has no models with a key-value cache"):
        prefix(fresh("bert"))
    bound = ll.bind(fresh("llama"), prefix(fresh("llama")))
    bound.gradient_checkpointing_enable()
    bound.train()
    with pytest.raises(ll.UnsupportedError, match="gradient checkpointing takes away"):
        bound(IDS)
    with pytest.raises(ll.UnsupportedError, match="no dense equivalent"):
        ll.merged(fresh("llama"), prefix(fresh("llama")))
