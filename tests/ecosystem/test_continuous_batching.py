"""Transformers' continuous batching, in which each request has an adapter of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers import moved, same_state, snapshot
from torch import nn

import lora_lite_func as ll
from lora_lite_func.interop import continuous_batching

transformers = pytest.importorskip("transformers")
if not hasattr(transformers, "ContinuousBatchingConfig"):
    pytest.skip("this transformers has no such continuous batching", allow_module_level=True)
pytest.importorskip("transformers.models.llama.modeling_llama", exc_type=ImportError)

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

NEW = {"max_new_tokens": 5}


def llama(attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=None,
        attn_implementation=attention,
    )
    return transformers.LlamaForCausalLM(config).eval()


def settings(**given: Any) -> Any:
    """A small cache, and steps of at most 16 tokens: a long prompt comes in parts."""
    sizes = {"num_blocks": 24, "page_size": 8, "max_batch_tokens": 16, **given}
    return transformers.ContinuousBatchingConfig(**sizes)


def prompts_of(*lengths: int) -> list[list[int]]:
    gen = torch.Generator().manual_seed(1)
    return [torch.randint(3, 64, (n,), generator=gen).tolist() for n in lengths]


def stack_of(model: Any, config: ll.AdapterConfig, names: Sequence[str] = "abc") -> ll.Adapter:
    return ll.stack(
        {name: moved(ll.init(model, config, seed=i), i, 0.3) for i, name in enumerate(names)}
    )


def alone(model: Any, adapter: ll.Adapter | None, prompt: list[int]) -> list[int]:
    """What `generate` answers to one prompt with one adapter."""
    bound = model if adapter is None else ll.bind(model, adapter)
    ids = torch.tensor([prompt])
    done = bound.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **NEW)
    found: list[int] = done[0, len(prompt) :].tolist()
    return found


def answers(outputs: Any) -> list[list[int]]:
    assert all(output.error is None for output in outputs.values())
    return [output.generated_tokens for output in outputs.values()]


def greedy(model: Any) -> Any:
    return transformers.GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=-1, **NEW)


@pytest.mark.parametrize(
    ("config", "attention"),
    [
        (ll.LoRAConfig(r=4), "sdpa"),
        (ll.LoRAConfig(r=4, target_names=("q_proj", "lm_head"), exclude_names=()), "eager"),
        (ll.DoRAConfig(r=4), "sdpa"),
        (ll.IA3Config(), "sdpa"),
    ],
    ids=["lora", "a head", "dora", "ia3"],
)
def test_each_request_is_answered_by_its_adapter(config: ll.AdapterConfig, attention: str) -> None:
    model = llama(attention)
    before, implementation = snapshot(model), model.config._attn_implementation
    stack = stack_of(model, config)
    prompts = prompts_of(3, 21, 1, 9, 5)
    adapters = ["b", None, "a", "c", "b"]
    served = ll.bind_requests(model, stack)
    outputs = served.generate_batch(prompts, greedy(model), settings(), adapters=adapters)
    expected = [
        alone(model, None if name is None else stack[ll.names(stack).index(name)], prompt)
        for name, prompt in zip(adapters, prompts, strict=True)
    ]
    assert answers(outputs) == expected
    assert len({tuple(answer) for answer in expected}) > 3
    assert same_state(snapshot(model), before)
    assert model.config._attn_implementation == implementation
    assert isinstance(served, type(model))


def test_the_same_prompt_is_answered_by_each_adapter() -> None:
    """A cache shared by what begins with the same tokens would be another adapter's."""
    model = llama()
    stack = stack_of(model, ll.LoRAConfig(r=4))
    (prompt,) = prompts_of(20)
    outputs = ll.bind_requests(model, stack).generate_batch(
        [prompt] * 4, greedy(model), settings(), adapters=[0, 1, 2, None]
    )
    expected = [alone(model, adapter, prompt) for adapter in (*ll.unstack(stack), None)]
    assert answers(outputs) == expected
    assert len({tuple(answer) for answer in expected}) > 1


def test_several_answers_to_a_prompt_have_its_adapter() -> None:
    model = llama()
    stack = stack_of(model, ll.LoRAConfig(r=4))
    prompts = prompts_of(6, 4)
    config = greedy(model)
    config.num_return_sequences = 2
    outputs = ll.bind_requests(model, stack).generate_batch(
        prompts, config, settings(), adapters=["c", "a"]
    )
    first, second = (alone(model, stack[i], p) for i, p in zip((2, 0), prompts, strict=True))
    assert answers(outputs) == [first, first, second, second]


def test_a_bank_that_changes_while_requests_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuous_batching, "_FORGET_EVERY", 2)
    model = llama()
    one, two, three = ll.unstack(stack_of(model, ll.LoRAConfig(r=4)))
    other_sites = moved(ll.init(model, ll.LoRAConfig(r=2, target_names=("down_proj",))), 7, 0.3)
    bank = ll.Bank({"one": one, "two": two}, capacity=2)
    served = ll.bind_requests(model, bank)
    prompts = prompts_of(4, 6, 3, 7)

    def result(manager: Any) -> tuple[str, list[int]]:
        while (found := manager.get_result(timeout=1)) is None:
            assert manager.is_running()
        assert found.error is None
        return found.request_id, found.generated_tokens

    with served.continuous_batching_context_manager(
        greedy(model), continuous_batching_config=settings()
    ) as manager:
        name = manager.add_request(prompts[0], adapter="one")
        manager.add_request(prompts[1], request_id="mine", adapter="two")
        found = dict([result(manager), result(manager)])
        assert found == {name: alone(model, one, prompts[0]), "mine": alone(model, two, prompts[1])}
        bank.drop("one")
        bank.add("three", three)
        bank.add("four", other_sites)
        manager.add_request(prompts[2], request_id="mine", adapter="three")
        assert result(manager) == ("mine", alone(model, three, prompts[2]))
        names = manager.add_requests(prompts[2:], adapters=["four", None])
        found = dict([result(manager), result(manager)])
        expected = [alone(model, other_sites, prompts[2]), alone(model, None, prompts[3])]
        assert found == dict(zip(names, expected, strict=True))
        with pytest.raises(ll.StructureError, match="no member 'one'"):
            manager.add_request(prompts[0], adapter="one")
        with pytest.raises(ll.StructureError, match=r"add_request: expected adapter="):
            manager.add_request(prompts[0])
        with pytest.raises(ll.StructureError, match=r"an adapter for each of 4 prompts, found 1"):
            manager.add_requests(prompts, adapters=["two"])
        (requests,) = served.generate_batch.__self__.requests.values()
        assert len(requests._adapters) < 4  # those that are done are forgotten


def test_one_adapter_bound_is_every_requests() -> None:
    model = llama()
    adapter = stack_of(model, ll.LoRAConfig(r=4))[1]
    prompts = prompts_of(3, 8)
    outputs = ll.bind(model, adapter).generate_batch(prompts, greedy(model), settings())
    assert answers(outputs) == [alone(model, adapter, prompt) for prompt in prompts]


def test_a_manager_that_the_base_kept_isnt_used_for_the_adapter() -> None:
    model = llama()
    stack = stack_of(model, ll.LoRAConfig(r=4))
    (prompt,) = prompts_of(5)
    kept = model.generate_batch([prompt], greedy(model), settings(), persistent_manager=True)
    try:
        bound = ll.bind(model, stack[1])
        served = ll.bind_requests(model, stack)
        expected = alone(model, stack[1], prompt)
        assert answers(kept) != [expected]
        assert answers(bound.generate_batch([prompt], greedy(model), settings())) == [expected]
        outputs = served.generate_batch([prompt], greedy(model), settings(), adapters=["b"])
        assert answers(outputs) == [expected]
    finally:
        model.destroy_cached_continuous_batching_manager()


def refusals() -> dict[str, tuple[Callable[[Any, ll.Adapter], Any], type[Exception], str]]:
    (prompt,) = prompts_of(4)

    def batch(model: Any, stack: ll.Adapter, adapters: Any, **given: Any) -> Any:
        served = ll.bind_requests(model, stack)
        return served.generate_batch([prompt], greedy(model), settings(**given), adapters=adapters)

    return {
        "rows": (
            lambda m, s: ll.bind(m, ll.rows(s, ["a"])).generate_batch([prompt]),
            ll.UnsupportedError,
            r"an adapter per request: ll\.bind_requests",
        ),
        "no adapters": (
            lambda m, s: batch(m, s, None),
            ll.StructureError,
            r"generate_batch: expected adapters=\[\.\.\.\], one for each of 1 prompts",
        ),
        "too many": (
            lambda m, s: batch(m, s, ["a", "b"]),
            ll.StructureError,
            "expected an adapter for each of 1 prompts, found 2",
        ),
        "unknown": (lambda m, s: batch(m, s, ["d"]), ll.StructureError, "no member 'd'"),
        "graphs": (
            lambda m, s: batch(m, s, ["a"], use_cuda_graph=True, default_compile_level=1),
            ll.UnsupportedError,
            "use_cuda_graph, default_compile_level: a recorded or compiled call keeps the adapters",
        ),
        "a plain call": (
            lambda m, s: ll.bind_requests(m, s)(torch.tensor([prompt])),
            ll.UnsupportedError,
            r"runs in continuous batching alone .* take ll\.bind\(model, ll\.rows",
        ),
        "generate": (
            lambda m, s: ll.bind_requests(m, s).generate(torch.tensor([prompt]), **NEW),
            ll.UnsupportedError,
            "runs in continuous batching alone",
        ),
        "one adapter": (
            lambda m, s: ll.bind_requests(m, s[0]),
            ll.StructureError,
            r"rows: .* lora_A: expected \(K, ",
        ),
        "another model": (
            lambda m, s: ll.bind_requests(nn.Linear(2, 2), s),
            ll.UnsupportedError,
            "Linear has no continuous batching",
        ),
    }


@pytest.mark.parametrize("name", refusals())
def test_what_cant_be_is_refused(name: str) -> None:
    model = llama()
    call, error, message = refusals()[name]
    with pytest.raises(error, match=message):
        call(model, stack_of(model, ll.LoRAConfig(r=4)))


def test_what_a_step_refuses_is_raised() -> None:
    model = llama()
    stack = stack_of(model, ll.LoReFTConfig(r=2))  # changes whole blocks
    served = ll.bind_requests(model, stack)
    with pytest.raises(ll.UnsupportedError, match="can't be another one for each token"):
        served.generate_batch(prompts_of(4), greedy(model), settings(), adapters=["a"])


def test_an_adapter_for_some_tokens_alone_is_refused() -> None:
    model = llama()
    stack = stack_of(model, ll.LoRAConfig(r=4, invocation_tokens=(5, 6)))
    with pytest.raises(ll.UnsupportedError, match="invocation sequence"):
        ll.bind_requests(model, stack)


def test_what_the_user_set_stays_as_it_was() -> None:
    given = settings()
    made = continuous_batching.settings_of(given)
    assert given.allow_block_sharing
    assert given.use_async_batching is None
    assert not made.allow_block_sharing
    assert made.use_cuda_graph is made.use_async_batching is False
    assert (made.num_blocks, made.page_size, made.max_batch_tokens) == (24, 8, 16)
