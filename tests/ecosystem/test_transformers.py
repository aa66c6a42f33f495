"""Real architectures, built small: the main laws on Qwen3, BERT and T5, generation, accelerate's
hooks, checkpointing.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import FAMILIES
from helpers import close, in_threads, leaves, moved, same_state, snapshot
from torch._dynamo.testing import CompileCounter
from torch.func import grad, vmap
from torch_versions import GRAPHS_OF_UNLIKE_STRENGTHS

import lora_lite_func as ll

pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:There is a performance drop because we have not yet implemented the batching rule"
    ),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def qwen3() -> Any:
    return FAMILIES["qwen3"].fresh()


IDS = torch.randint(3, 64, (3, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, 5:] = 0

INPUTS: dict[str, dict[str, Any]] = {
    "qwen3": {"input_ids": IDS, "attention_mask": MASK},
    "bert": {"input_ids": IDS, "attention_mask": MASK},
    "t5": {"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": IDS[:, :4]},
}
CONFIGS = {
    "lora": ll.LoRAConfig(r=4),
    "pissa": ll.PiSSAConfig(r=4),
    "delora": ll.DeLoRAConfig(r=4),
    "ia3": ll.IA3Config(),
    "ia3_ff": ll.IA3FFConfig(),
    "dora": ll.DoRAConfig(r=4),
    "hra": ll.HRAConfig(r=4),
    "road": ll.ROADConfig(group_size=8),
}
family = pytest.mark.parametrize("name", INPUTS)
method = pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS.keys())


@family
@method
def test_laws_on_real_architectures(name: str, cfg: ll.AdapterConfig, tmp_path: Any) -> None:
    model, inputs, output = FAMILIES[name].fresh(), INPUTS[name], FAMILIES[name].output
    start = ll.init(model, cfg)
    assert len(start) == {"qwen3": 14, "bert": 13, "t5": 32}[name]
    with torch.no_grad():
        model(**inputs)  # a model may prepare itself on its first call
        before = snapshot(model)
        close(
            output(ll.apply(model, start, **inputs)),
            output(model(**inputs)),
            1e-5 if isinstance(cfg, ll.HRAConfig) else 0.0,
        )
        params = moved(start, size=0.05)
        y = output(ll.apply(model, params, **inputs))
        assert (y - output(model(**inputs))).abs().max() > 1e-3
        close(y, output(ll.merged(model, params)(**inputs)), 2e-5)
        close(y, output(ll.bind(model, params)(**inputs)), 1e-6)
        ll.save(params, tmp_path / "a.safetensors")
        assert torch.equal(
            output(ll.apply(model, ll.load(tmp_path / "a.safetensors", model), **inputs)), y
        )
    trainable, frozen = ll.partition(params)
    g = grad(lambda t: output(ll.apply(model, ll.combine(t, frozen), **inputs)).square().mean())(
        trainable
    )
    unread = {"pooler.dense"} if name == "bert" else set()  # nothing reads BERT's pooler here
    assert all(
        (t.abs().max() > 0) == (path not in unread)
        for path, ts in g.items()
        for t in ts.values()
        if isinstance(t, torch.Tensor)
    )
    assert same_state(before, snapshot(model))


@family
def test_vmap_over_the_whole_model(name: str) -> None:
    model, inputs, output = FAMILIES[name].fresh(), INPUTS[name], FAMILIES[name].output
    several = [moved(ll.init(model, ll.LoRAConfig(r=4)), seed, 0.05) for seed in range(3)]
    with torch.no_grad():
        ys = vmap(lambda p: output(ll.apply(model, p, use_cache=False, **inputs)))(
            ll.stack(several)
        )
        close(ys, torch.stack([output(ll.apply(model, p, **inputs)) for p in several]), 1e-5)


def test_one_graph_for_eight_adapters_of_different_alphas() -> None:
    torch._dynamo.reset()
    model = qwen3()
    counter = CompileCounter()
    compiled = torch.compile(
        lambda p, ids: ll.apply(model, p, ids, use_cache=False).logits,
        backend=counter,
        fullgraph=True,
    )
    for i in range(8):
        params = moved(ll.init(model, ll.LoRAConfig(r=4, alpha=4.0 + i), seed=i))
        with torch.no_grad():
            close(compiled(params, IDS), ll.apply(model, params, IDS).logits, 1e-5)
    assert counter.frame_count <= GRAPHS_OF_UNLIKE_STRENGTHS
    torch._dynamo.reset()


def test_two_hundred_calls_from_four_threads() -> None:
    model = qwen3()
    several = [moved(ll.init(model, ll.LoRAConfig(r=4)), seed) for seed in range(4)]
    with torch.no_grad():
        expected = [ll.apply(model, p, IDS).logits for p in several]
    wrong: list[int] = []

    def work(i: int) -> None:
        with torch.no_grad():
            wrong.extend(
                i
                for _ in range(50)
                if not torch.equal(ll.apply(model, several[i], IDS).logits, expected[i])
            )

    in_threads(4, work)
    assert not wrong


def test_hidden_states_are_captured_once_and_off_the_model() -> None:
    model = qwen3()
    params = moved(ll.init(model, ll.LoRAConfig(r=4)))
    before = snapshot(model)
    for _ in range(3):
        out = ll.apply(model, params, IDS, output_hidden_states=True)
        assert len(out.hidden_states) == 3
    assert same_state(before, snapshot(model))


@pytest.mark.parametrize(
    "settings",
    [{"do_sample": False}, {"num_beams": 2}, {"do_sample": True}],
    ids=["greedy", "beams", "sampling"],
)
def test_generate_on_a_bound_model(settings: dict[str, Any]) -> None:
    model = qwen3()
    params = moved(ll.init(model, ll.LoRAConfig(r=4)), size=0.3)
    found = []
    for made in (ll.bind(model, params), ll.merged(model, params)):
        torch.manual_seed(0)
        found.append(made.generate(IDS[:2, :4], max_new_tokens=6, min_new_tokens=6, **settings))
    assert torch.equal(*found)


def test_gradient_checkpointing_through_the_library() -> None:
    model = qwen3()
    params = moved(ll.init(model, ll.LoRAConfig(r=4)))
    tensors = [t.requires_grad_() for t in leaves(params)]
    wanted = torch.autograd.grad(ll.apply(model, params, IDS).logits.square().mean(), tensors)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    found = torch.autograd.grad(
        ll.apply(model, params, IDS, use_cache=False).logits.square().mean(), tensors
    )
    close(found, wanted, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast(dtype: torch.dtype) -> None:
    model = qwen3()
    params = ll.init(model, ll.LoRAConfig(r=4))
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        assert torch.equal(ll.apply(model, params, IDS).logits, model(IDS).logits)
    half = copy.deepcopy(model).to(dtype)
    with torch.no_grad():
        for cfg in CONFIGS.values():
            start = ll.init(half, cfg)
            y, base = ll.apply(half, start, IDS).logits, half(IDS).logits
            assert y.dtype == dtype
            close(y.float(), base.float(), 0.05 if isinstance(cfg, ll.HRAConfig) else 0.0)


# --------------------------------------------------------------------------------------- accelerate
def test_accelerate_dispatch_and_offload(tmp_path: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    plain = qwen3()
    for cfg in (ll.LoRAConfig(r=4), ll.DoRAConfig(r=4), ll.HRAConfig(r=4)):
        params = moved(ll.init(plain, cfg))
        with torch.no_grad():
            expected = ll.apply(plain, params, IDS).logits
        dispatched = accelerate.dispatch_model(
            qwen3(),
            device_map={"model": "cpu", "lm_head": "cpu"},
            main_device="cpu",
            force_hooks=True,
            offload_dir=str(tmp_path),
        )
        offloaded = accelerate.cpu_offload(qwen3(), execution_device=torch.device("cpu"))
        for model in (dispatched, offloaded):
            assert "_hf_hook" in model.model.layers[0].self_attn.q_proj.__dict__
            before = [(n, p.device, p.requires_grad) for n, p in model.named_parameters()]
            with torch.no_grad():
                close(ll.apply(model, params, IDS).logits, expected, 1e-5)
                close(ll.bind(model, params)(IDS).logits, expected, 1e-5)
            ll.apply(model, params, IDS)
            assert before == [(n, p.device, p.requires_grad) for n, p in model.named_parameters()]
            fresh = ll.init(model, cfg)
            assert {t.device.type for t in leaves(fresh)} == {"cpu"}
            assert all(
                torch.equal(a, b)
                for a, b in zip(leaves(fresh), leaves(ll.init(plain, cfg)), strict=True)
            )
