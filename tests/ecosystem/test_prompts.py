"""Virtual tokens in front of a model's own: hand-made calls, rows, generation with every cache.

The laws' toy models embed no tokens, so what holds there for every method is asked for here of
models of transformers.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import close, moved, same_state, snapshot
from prompts import CAUSAL, ENCODERS, IDS, both, fresh, greedy, output, single
from torch import Tensor, nn
from torch.func import grad, vmap

import lora_lite_func as ll
from lora_lite_func.core.adapter import replace

transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
every = pytest.mark.parametrize("name", [*CAUSAL, *ENCODERS, *both])
causal = pytest.mark.parametrize("name", CAUSAL)


def prompt(model: nn.Module, r: int = 4, seed: int = 0) -> ll.Adapter:
    """Virtual tokens of a size that every model notices."""
    return ll.init(model, ll.PromptTuningConfig(r=r, init="normal"), seed=seed)


def by_hand(model: Any, tokens: Tensor, ids: Tensor, **more: Any) -> Any:
    """The model's own call with embedded tokens in front of the rows'."""
    own = model.get_input_embeddings()(ids)
    front = tokens.to(own).expand(ids.shape[0], *tokens.shape)
    return model(inputs_embeds=torch.cat([front, own], dim=1), **more)


# --------------------------------------------------------------------------------- hand-made calls
@every
def test_it_is_the_models_call_with_embedded_tokens_in_front(name: str) -> None:
    model, given = fresh(name), single(name, IDS)
    params = prompt(model)
    more = {k: v for k, v in given.items() if k != "input_ids"}
    before = snapshot(model)
    with torch.no_grad():
        expected = by_hand(model, params[""]["lora_tokens"], IDS, **more)
        found = ll.apply(model, params, **given)
        bound = ll.bind(model, params)(**given)
    own = 0 if name in both else 4
    whole = output(expected)
    if "pooler_output" in expected:
        close(found.pooler_output, expected.pooler_output, 1e-6)
        whole, found, bound = expected.last_hidden_state, found.last_hidden_state, bound[0]
        close(found, whole[:, own:], 1e-6)
        close(bound, found, 1e-6)
    else:
        close(output(found), whole[:, own:], 1e-6)
        close(output(bound), output(found), 1e-6)
    assert same_state(before, snapshot(model))


def test_labels_hidden_states_and_tuples_are_the_callers() -> None:
    model = fresh("llama")
    params, labels = prompt(model), IDS.clone()
    labels[0, :2] = -100
    front = torch.full((3, 4), -100)
    with torch.no_grad():
        expected = by_hand(
            model, params[""]["lora_tokens"], IDS, labels=torch.cat([front, labels], 1)
        )
        found = ll.apply(model, params, IDS, labels=labels, output_hidden_states=True)
        close(found.loss, expected.loss, 1e-6)
        assert [tuple(h.shape[:2]) for h in found.hidden_states] == [(3, 6)] * 3
        loss, logits, *_ = ll.apply(model, params, IDS, labels=labels, return_dict=False)
        close(loss, expected.loss, 1e-6)
        close(logits, found.logits, 0.0)
        last = ll.apply(model, params, IDS, logits_to_keep=2).logits
        close(last, found.logits[:, -2:], 1e-6)
        chosen = ll.apply(model, params, IDS, logits_to_keep=torch.tensor([0, 3])).logits
        close(chosen, found.logits[:, [0, 3]], 1e-6)
        embedded = ll.apply(model, params, inputs_embeds=model.get_input_embeddings()(IDS)).logits
        close(embedded, found.logits, 1e-6)


def test_places_in_the_text_move_with_it() -> None:
    model = fresh("bert", "BertForQuestionAnswering")
    params = prompt(model)
    start, end = torch.tensor([1, 0, 2]), torch.tensor([3, 3, 5])
    with torch.no_grad():
        found = ll.apply(model, params, IDS, start_positions=start, end_positions=end)
        expected = by_hand(
            model, params[""]["lora_tokens"], IDS, start_positions=start + 4, end_positions=end + 4
        )
    close(found.loss, expected.loss, 1e-6)
    assert found.start_logits.shape == (3, 6)


# ------------------------------------------------------------------------------------------- rows
def ragged(name: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    """A padded batch of four rows, its mask, and the rows alone."""
    lengths = (6, 4, 5, 3)
    gen = torch.Generator().manual_seed(3)
    alone = [torch.randint(3, 63, (1, n), generator=gen) for n in lengths]
    ids, mask = torch.zeros(4, 6, dtype=torch.long), torch.zeros(4, 6, dtype=torch.long)
    for i, row in enumerate(alone):
        at = slice(6 - lengths[i], 6) if name in CAUSAL else slice(0, lengths[i])
        ids[i, at], mask[i, at] = row[0], 1
    return ids, mask, alone


@every
def test_rows_of_unlike_lengths_bare_rows_and_padding_are_single_calls(name: str) -> None:
    model = fresh(name)
    several = [prompt(model, r, seed=r) for r in (5, 2)]
    stack = ll.stack(several)
    ids, mask, alone = ragged(name)
    more = {"decoder_input_ids": IDS[:1, :3].expand(4, -1)} if name in both else {}
    members = [1, -1, 0, 1]
    with torch.no_grad():
        rows = ll.rows(stack, members)
        found = ll.apply(model, rows, ids, attention_mask=mask, **more)
        for i, (member, row) in enumerate(zip(members, alone, strict=True)):
            params: Any = () if member < 0 else several[member]
            own = {k: v[i : i + 1] for k, v in more.items()}
            expected = ll.apply(model, params, row, **own)
            if "pooler_output" in found:
                close(found.pooler_output[i], expected.pooler_output[0], 5e-6)
            one, y = output(found)[i], output(expected)[0]
            if name in ENCODERS:
                close(one[: row.shape[1]], y[: row.shape[1]], 5e-6)
            else:
                close(one[-y.shape[0] :], y, 5e-6)


@pytest.mark.parametrize("name", CAUSAL)
def test_the_loss_of_rows_is_that_of_single_calls(name: str) -> None:
    """A bare row's first token is predicted by nothing, as in the model's own loss."""
    model = fresh(name)
    several = [prompt(model, r, seed=r) for r in (5, 2)]
    members = (several[1], (), several[0])
    with torch.no_grad():
        found = ll.apply(model, ll.rows(ll.stack(several), [1, -1, 0]), IDS, labels=IDS).loss
        each = [
            ll.apply(model, p, IDS[i : i + 1], labels=IDS[i : i + 1]).loss
            for i, p in enumerate(members)
        ]
    close(found, (6 * each[0] + 5 * each[1] + 6 * each[2]) / 17, 5e-6)


def test_a_mixed_stack_by_vmap_and_a_bank() -> None:
    """transformers' mask for SDPA asks whether a mask leaves all, which vmap can't tell."""
    model = fresh("llama", attn_implementation="eager")
    several = [prompt(model, r, seed=r) for r in (3, 1)]
    with torch.no_grad():
        expected = torch.stack([ll.apply(model, p, IDS).logits for p in several])
        found = vmap(lambda p: ll.apply(model, p, IDS, use_cache=False).logits)(ll.stack(several))
        close(found, expected, 5e-6)
        bank = ll.Bank(capacity=2)
        for label, params in zip(("a", "b"), several, strict=True):
            bank.add(label, params)
        by_bank = ll.apply(model, ll.rows(bank, ["b", "a", None]), IDS).logits
        close(by_bank[0], expected[1, 0], 5e-6)
        close(by_bank[1], expected[0, 1], 5e-6)
        close(by_bank[2], model(IDS).logits[2], 5e-6)
    back = ll.unstack(ll.stack(several))
    assert [p[""]["lora_tokens"].shape[0] for p in back] == [3, 1]


# ------------------------------------------------------------------------------------- generation
@causal
def test_generate_is_a_full_call_at_every_step(name: str) -> None:
    model = fresh(name)
    params = prompt(model)
    bound = ll.bind(model, params)
    ids, steps = IDS[:1], 5
    how = {"max_new_tokens": steps, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        expected = greedy(lambda x: ll.apply(model, params, x), ids, steps)
        assert not torch.equal(expected, model.generate(ids, **how))
        for cache in (None, "dynamic", "static_with_room", "uncached"):
            given: dict[str, Any] = {}
            if cache == "uncached":
                given["use_cache"] = False
            elif cache == "static_with_room":
                room = ids.shape[1] + steps + 4
                given["cache"] = transformers.StaticCache(model.config, max_cache_len=room)
            elif cache is not None:
                given["cache_implementation"] = cache
            assert torch.equal(bound.generate(ids, **given, **how), expected), cache


@causal
def test_generate_of_rows_and_left_padding(name: str) -> None:
    model = fresh(name)
    several = [prompt(model, r, seed=r) for r in (5, 2)]
    ids, mask, alone = ragged(name)
    members, steps = [1, -1, 0, 1], 4
    bound = ll.bind(model, ll.rows(ll.stack(several), members))
    how = {"max_new_tokens": steps, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        found = bound.generate(ids, attention_mask=mask, **how)
        uncached = bound.generate(ids, attention_mask=mask, use_cache=False, **how)
        for i, (member, row) in enumerate(zip(members, alone, strict=True)):
            params: Any = () if member < 0 else several[member]
            expected = greedy(lambda x, p=params: ll.apply(model, p, x), row, steps)
            assert torch.equal(found[i, -steps:], expected[0, -steps:])
            assert torch.equal(uncached[i, -steps:], expected[0, -steps:])


@pytest.mark.parametrize("name", both)
def test_generate_of_encoder_decoders(name: str) -> None:
    """`generate` calls the encoder alone, which has the virtual tokens there too."""
    model = fresh(name)
    params, steps = prompt(model), 4
    bound = ll.bind(model, params)
    begin = torch.full((3, 1), model.config.decoder_start_token_id)
    with torch.no_grad():
        written = begin
        for _ in range(steps):
            logits = ll.apply(model, params, IDS, decoder_input_ids=written).logits
            written = torch.cat([written, logits[:, -1:].argmax(-1)], dim=1)
        for cached in (True, False):
            found = bound.generate(
                IDS, max_new_tokens=steps, do_sample=False, use_cache=cached, eos_token_id=None
            )
            assert torch.equal(found, written)
        states = bound.get_encoder()(IDS)
        assert states[0].shape[1] == IDS.shape[1] + 4
        close(
            bound(encoder_outputs=states, decoder_input_ids=begin).logits,
            bound(IDS, decoder_input_ids=begin).logits,
            1e-6,
        )
        mask, bare = torch.ones_like(IDS), model.get_encoder()(IDS)
        with pytest.raises(ll.UnsupportedError, match="isn't of 4 virtual tokens and those of"):
            bound(encoder_outputs=bare, attention_mask=mask, decoder_input_ids=begin)


@pytest.mark.parametrize("name", both)
def test_virtual_tokens_of_a_decoder(name: str) -> None:
    model, steps = fresh(name), 4
    params = ll.init(model, ll.PromptTuningConfig(r=4, init="normal", decoder=True))
    p, own, decoded = params[""], model.get_input_embeddings()(IDS), IDS[:, :3]
    mask = torch.ones_like(IDS)
    mask[1, 4:] = 0
    front = {"inputs_embeds": p["lora_tokens"], "decoder_inputs_embeds": p["lora_decoder"]}
    after = (own, model.get_input_embeddings()(decoded))
    joined: Any = {
        k: torch.cat([e.expand(3, -1, -1), x], 1)
        for (k, e), x in zip(front.items(), after, strict=True)
    }
    labels = torch.cat([torch.full((3, 4), -100), decoded], 1)
    with torch.no_grad():
        joined["attention_mask"] = torch.cat([torch.ones(3, 4).long(), mask], 1)
        expected = model(**joined, labels=labels)
        given = {"attention_mask": mask, "decoder_input_ids": decoded}
        found = ll.apply(model, params, IDS, **given, labels=decoded)
        close(found.logits, expected.logits[:, 4:], 2e-6)
        close(found.loss, expected.loss, 2e-6)
        assert found.encoder_last_hidden_state.shape[1] == 10
        as_long = {"decoder_input_ids": IDS, "use_cache": False}
        found = ll.apply(model, params, IDS, **as_long)
        parts = ll.apply(model, params, IDS, **as_long, return_dict=False)
        assert [part.shape for part in parts] == [part.shape for part in found.to_tuple()]
        by_labels = ll.apply(model, params, IDS, labels=decoded).loss
        begun = model.prepare_decoder_input_ids_from_labels(decoded)
        expected = ll.apply(model, params, IDS, decoder_input_ids=begun, labels=decoded).loss
        close(by_labels, expected, 1e-6)
        written = torch.full((3, 1), model.config.decoder_start_token_id)
        for _ in range(steps):
            logits = ll.apply(model, params, IDS, decoder_input_ids=written).logits
            written = torch.cat([written, logits[:, -1:].argmax(-1)], dim=1)
        bound = ll.bind(model, params)
        how = {"max_new_tokens": steps, "do_sample": False, "eos_token_id": None}
        for cached in (True, False):
            assert torch.equal(bound.generate(IDS, use_cache=cached, **how), written)
    g = grad(lambda p: ll.apply(model, p, IDS, labels=decoded).loss)(params)[""]
    assert all(t.abs().max() > 0 for t in g.values())
    several = [ll.init(model, dataclasses.replace(params.config, r=r), seed=r) for r in (5, 2)]
    rows = ll.rows(ll.stack(several), [1, -1, 0])
    with torch.no_grad():
        if name == "bart":
            with pytest.raises(ll.UnsupportedError, match="unlike numbers of virtual ones there"):
                ll.apply(model, rows, IDS, decoder_input_ids=decoded)
            return
        found = ll.apply(model, rows, IDS, decoder_input_ids=decoded).logits
        for i, member in enumerate((several[1], (), several[0])):
            ids, begun = IDS[i : i + 1], decoded[i : i + 1]
            expected = ll.apply(model, member, ids, decoder_input_ids=begun).logits
            close(found[i], expected[0], 5e-6)


def test_a_decoder_s_tokens_need_a_decoder() -> None:
    model = fresh("llama")
    for cfg in (ll.PromptTuningConfig(decoder=True), ll.MPTConfig(decoder=True)):
        with pytest.raises(ll.UnsupportedError, match="decoder=True: the model doesn't encode and"):
            ll.init(model, cfg)
    params = ll.init(model, ll.PromptTuningConfig(r=2, init="normal", decoder=True))
    with pytest.raises(ll.UnsupportedError, match="has virtual tokens for a decoder, and Llama"):
        ll.apply(model, params, IDS)


def test_generate_of_a_model_without_attention() -> None:
    """Its cache is a state, which knows no number of tokens."""
    model = fresh("mamba")
    params = prompt(model)
    how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        expected = greedy(lambda x: ll.apply(model, params, x), IDS[:1], 4)
        for cached in (True, False):
            found = ll.bind(model, params).generate(IDS[:1], use_cache=cached, **how)
            assert torch.equal(found, expected)


def test_a_cache_without_room_is_refused_by_name() -> None:
    model = fresh("llama")
    bound = ll.bind(model, prompt(model))
    how = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with (
        torch.no_grad(),
        pytest.raises(ll.UnsupportedError, match=r"room for 8 tokens, .* needs 10"),
    ):
        bound.generate(IDS[:1], cache_implementation="static", **how)
    with torch.no_grad():  # longer by the virtual tokens
        bound.generate(IDS[:1], cache_implementation="static", max_cache_len=20, **how)


# -------------------------------------------------------------------------------- other transforms
def test_gradients_are_those_of_the_hand_made_call() -> None:
    model = fresh("llama")
    params = prompt(model)
    tokens = params[""]["lora_tokens"].clone().requires_grad_()
    front = torch.full((3, 4), -100)
    loss = by_hand(model, tokens, IDS, labels=torch.cat([front, IDS], 1)).loss
    (expected,) = torch.autograd.grad(loss, tokens)
    found = grad(lambda p: ll.apply(model, p, IDS, labels=IDS).loss)(params)
    close(found[""]["lora_tokens"], expected, 1e-6)
    bound = ll.bind(model, params)
    bound(IDS, labels=IDS).loss.backward()
    (leaf,) = [p for p in bound.parameters() if p.requires_grad]
    close(leaf.grad, expected, 1e-6)
    assert all(p.grad is None for p in model.parameters())


def test_with_other_adapters_inside_and_outside() -> None:
    model = fresh("llama")
    first, second = prompt(model, 3), prompt(model, 2, seed=5)
    cfg = ll.LoRAConfig(r=2, target_kinds=("linear", "embedding"), exclude_names=())
    lora = moved(ll.init(model, cfg), size=0.05)
    with torch.no_grad():
        merged = ll.merged(model, lora)
        close(ll.apply(model, (lora, first), IDS).logits, ll.apply(merged, first, IDS).logits, 1e-5)
        both_in = torch.cat([first[""]["lora_tokens"], second[""]["lora_tokens"]])
        expected = by_hand(model, both_in, IDS).logits[:, 5:]
        close(ll.apply(model, (first, second), IDS).logits, expected, 1e-6)
        twice = ll.bind(ll.bind(model, first), second)
        close(twice(IDS).logits, expected, 1e-6)


def test_one_graph_for_prompts_of_a_length() -> None:
    torch._dynamo.reset()
    from torch._dynamo.testing import CompileCounter

    model, counter = fresh("llama"), CompileCounter()
    call = torch.compile(
        lambda p: ll.apply(model, p, IDS, use_cache=False).logits, backend=counter, fullgraph=True
    )
    with torch.no_grad():
        for seed in range(3):
            params = prompt(model, seed=seed)
            close(call(params), ll.apply(model, params, IDS).logits, 1e-5)
    assert counter.frame_count == 1
    torch._dynamo.reset()


# ------------------------------------------------------------------------------ places and starts
class Wrapped(nn.Module):
    """A model of transformers inside another module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = copy.deepcopy(fresh("bert_pooled"))
        self.head = nn.Linear(32, 1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.inner(ids).last_hidden_state.mean(1))


def test_which_call_is_adapted() -> None:
    assert [s.path for s in ll.targets(fresh("llama"), ll.PromptTuningConfig())] == [""]
    assert [s.path for s in ll.targets(Wrapped(), ll.PromptTuningConfig())] == ["inner"]
    classifier = fresh("llama", "LlamaForSequenceClassification")
    assert [s.path for s in ll.targets(classifier, ll.PromptTuningConfig())] == ["model"]
    chosen = ll.PromptTuningConfig(target_names="^model$")
    assert [s.path for s in ll.targets(fresh("llama"), chosen)] == ["model"]
    with pytest.raises(ll.TargetError, match="has no models that embed tokens"):
        ll.init(nn.Linear(3, 3), ll.PromptTuningConfig())
    model = Wrapped().eval()
    params = prompt(model)
    with torch.no_grad():
        assert (ll.apply(model, params, IDS) - model(IDS)).abs().max() > 1e-3


def test_a_classifier_finds_the_last_token_of_padded_rows() -> None:
    """PEFT leaves it without ids, so it takes the last place, padding or not."""
    model = fresh("llama", "LlamaForSequenceClassification", num_labels=3)
    params = prompt(model)
    ids = IDS.clone()
    ids[1, 4:] = 0
    with torch.no_grad():
        found = ll.apply(model, params, ids, attention_mask=(ids != 0).long()).logits
        close(found[1], ll.apply(model, params, ids[1:2, :4]).logits[0], 1e-6)


def test_starts_are_tokens_of_the_vocabulary() -> None:
    model = fresh("gemma2")
    embedded = model.get_input_embeddings()(torch.arange(64)).detach()
    given = ll.init(model, ll.PromptTuningConfig(r=5, token_ids=(7, 9, 8)))[""]["lora_tokens"]
    assert torch.equal(given, embedded[torch.tensor([7, 9, 8, 7, 9])])
    drawn = ll.init(model, ll.PromptTuningConfig(r=5))[""]["lora_tokens"]
    assert all((embedded == row).all(-1).any() for row in drawn)
    assert drawn.dtype == torch.float32
    with pytest.raises(ll.ConfigError, match="token id 64: the model has 64 of them"):
        ll.init(model, ll.PromptTuningConfig(token_ids=(64,)))
    with pytest.raises(ll.ConfigError, match='are of init="vocabulary"'):
        ll.PromptTuningConfig(token_ids=(1,), init="normal")


# --------------------------------------------------------------------------------- what is refused
def test_what_has_no_meaning_is_refused() -> None:
    model = fresh("llama")
    params = prompt(model)
    for verb in (ll.merged, ll.merge):
        with pytest.raises(ll.UnsupportedError, match="prompt_tuning has no dense equivalent"):
            verb(model, params)
    with pytest.raises(ll.UnsupportedError, match="no `scale` function"):
        ll.scale(params, 0.5)
    stack = ll.stack([params, params])
    with pytest.raises(ll.UnsupportedError, match="no weighted sum of its members"):
        ll.mixed(stack, torch.ones(3, 2))
    with pytest.raises(ll.UnsupportedError, match="give an id for each row"):
        ll.apply(model, ll.rows(stack, torch.zeros(3, 6, dtype=torch.long)), IDS)
    with pytest.raises(ll.StructureError, match="first dimension is the 2 rows"):
        ll.apply(model, ll.rows(stack, [0, 1]), IDS)
    with pytest.raises(ll.UnsupportedError, match=r"attention_mask \(\(3, 1, 6, 6\)\); give one"):
        ll.apply(model, params, IDS, attention_mask=torch.ones(3, 1, 6, 6))
    with pytest.raises(ll.UnsupportedError, match="the call has no tokens"):
        ll.apply(model, params)
    with pytest.raises(ll.UnsupportedError, match="2 dimensions, found"):
        ll.apply(model, params, IDS[0])
    with pytest.raises(ll.UnsupportedError, match=r"weights \(3, 6\) has something for each"):
        ll.apply(model, params, IDS, weights=torch.ones(3, 6))


def test_check_sees_the_call() -> None:
    model = fresh("llama")
    report = ll.check(model, prompt(model), IDS)
    assert report.ok
    assert report.calls == {"": 1}
    assert report.effect > 0.1
    assert "no dense equivalent" in report.unmerged
    wrong = ll.Variant(
        name="wrong",
        config=ll.PromptTuningConfig,
        param_specs=lambda cfg, site: {},
        sites=("call",),
        virtual=lambda cfg, p, site: torch.zeros(site.r, 3),
    )
    params = prompt(model)
    layout = ll.Layout(wrong, params.config, params.sites.values())
    with pytest.raises(ll.ConfigError, match=r"wrong.virtual gave \(4, 3\), expected \(4, 32\)"):
        ll.check(model, ll.rebuild(layout, []), IDS)


# -------------------------------------------------------------------------------------------- files
def test_files_keep_lengths_and_places(tmp_path: Any) -> None:
    model = fresh("llama")
    several = {"a": prompt(model, 3), "b": prompt(model, 1, seed=1)}
    ll.save(several["a"], tmp_path / "one.safetensors")
    back = ll.load(tmp_path / "one.safetensors", model)
    assert torch.equal(back[""]["lora_tokens"], several["a"][""]["lora_tokens"])
    ll.save(ll.stack(several), tmp_path / "stack.safetensors")
    with torch.no_grad():
        rows = ll.rows(ll.load(tmp_path / "stack.safetensors", model), ["b", "a", None])
        found = ll.apply(model, rows, IDS).logits
        close(found[0], ll.apply(model, several["b"], IDS[:1]).logits[0], 5e-6)


# ------------------------------------------------------------------------------- methods of its kin
def test_p_tuning_is_a_prompt_that_a_network_makes() -> None:
    model = fresh("llama")
    params = ll.init(model, ll.PTuningConfig(r=4, hidden=5))
    p = params[""]
    h = torch.relu(p["lora_tokens"] @ p["lora_W1"].mT + p["lora_b1"])
    h = torch.relu(h @ p["lora_W2"].mT + p["lora_b2"])
    tokens = h @ p["lora_W3"].mT + p["lora_b3"]
    several = [ll.init(model, ll.PTuningConfig(r=r, hidden=5), seed=r) for r in (3, 1)]
    with torch.no_grad():
        expected = by_hand(model, tokens, IDS).logits[:, 4:]
        close(ll.apply(model, params, IDS).logits, expected, 1e-6)
        found = ll.apply(model, ll.rows(ll.stack(several), [1, -1, 0]), IDS).logits
        close(found[0], ll.apply(model, several[1], IDS[:1]).logits[0], 5e-6)
        close(found[2], ll.apply(model, several[0], IDS[2:]).logits[0], 5e-6)
    g = grad(lambda p: ll.apply(model, p, IDS, labels=IDS).loss)(params)
    assert all(t.abs().max() > 0 for t in g[""].values())


def test_tasks_of_one_prompt_are_a_stack() -> None:
    model = fresh("llama")
    params = moved(ll.init(model, ll.MPTConfig(r=4, tasks=3, task_rank=2)), size=0.5)
    p = params[""]
    with torch.no_grad():
        found = ll.apply(model, ll.rows(ll.tasks(params), [2, 0, -1]), IDS).logits
        for row, task in enumerate((2, 0)):
            tokens = p["lora_tokens"] * (p["lora_columns"][task] @ p["lora_rows"][task])
            close(found[row], by_hand(model, tokens, IDS[row : row + 1]).logits[0, 4:], 5e-6)
    one = ll.tasks(params)[1]
    assert isinstance(one.config, ll.PromptTuningConfig)

    def loss(p: ll.Adapter) -> Tensor:
        return ll.apply(model, ll.rows(ll.tasks(p), [1, 1, 1]), IDS, labels=IDS).loss

    g = grad(loss)(params)[""]
    assert g["lora_tokens"].abs().max() > 0
    assert [t.abs().max() > 0 for t in g["lora_rows"]] == [False, True, False]
    with pytest.raises(ll.UnsupportedError, match="mpt has 3 tasks; say which each row is of"):
        ll.apply(model, params, IDS)
    with pytest.raises(ll.UnsupportedError, match="prompt_tuning has no tasks"):
        ll.tasks(one)
    with pytest.raises(ll.ConfigError, match="tasks=0"):
        ll.MPTConfig(tasks=0)


def test_context_is_moved_within_bounds_and_its_answers_are_counted() -> None:
    model = fresh("llama")
    ids, types = (5, 9, 7, 11), (1, 2, 3, 4)
    cfg = ll.CPTConfig(r=4, token_ids=ids, token_types=types, epsilon=0.5)
    params = ll.init(model, cfg)
    context = torch.tensor([ids]).expand(3, -1)
    labels = torch.cat([torch.tensor([[-100, -100, -100, 11]]).expand(3, -1), IDS], 1)
    with torch.no_grad():
        whole = model(torch.cat([context, IDS], 1), labels=labels)
        found = ll.apply(model, params, IDS, labels=IDS)
        close(found.logits, whole.logits[:, 4:], 1e-6)
        close(found.loss, whole.loss, 1e-6)
        other = ll.init(model, ll.CPTConfig(r=2, token_ids=(3, 4), token_types=(1, 4), epsilon=0.5))
        rows = ll.rows(ll.stack([params, other]), [0, 1, -1])
        mixed = ll.apply(model, rows, IDS, labels=IDS.masked_fill(torch.arange(3)[:, None] > 0, 3))
        short = model(torch.cat([torch.tensor([[3, 4]]), IDS[1:2]], 1))
        close(mixed.logits[1], short.logits[0, 2:], 5e-6)
    g = grad(lambda p: ll.apply(model, p, IDS, labels=IDS).loss)(params)[""]
    assert [bool(row.abs().max() > 0) for row in g["lora_delta"]] == [True, True, True, False]
    far = ll.project(moved(params, size=9.0))[""]["lora_delta"]
    bound = (32 / 2048) ** 0.5
    close(far.norm(dim=1), torch.tensor([0.1, 0.5, 0.1, 0.0]) * bound, 1e-5)
    near = ll.project(params)[""]["lora_delta"]
    assert torch.equal(near, params[""]["lora_delta"])
    for fields, said in (
        ({"r": 1, "token_ids": (1,), "token_types": (1, 2)}, "one for each of 1 token_ids"),
        ({"epsilon": -1.0}, "of at least 0"),
        ({"token_ids": (-1,)}, "token_ids: expected numbers from 0 to 16777215, found -1"),
        ({"token_types": (2**24,), "token_ids": (1,)}, "token_types: expected numbers from 0"),
    ):
        with pytest.raises(ll.ConfigError, match=said):
            ll.CPTConfig(**fields)
    with pytest.raises(ll.UnsupportedError, match="0 of 8 are given"):
        ll.init(model, ll.CPTConfig())


def test_older_answers_count_less() -> None:
    model = fresh("llama")
    ids, types = (5, 9, 7, 11, 4, 8), (1, 4, 2, 8, 3, 8)
    cfg = ll.CPTConfig(r=6, token_ids=ids, token_types=types, decay=0.5)
    params = ll.init(model, cfg)
    whole = torch.cat([torch.tensor([ids]).expand(3, -1), IDS], 1)
    weights = torch.tensor([0.25, 0.0, 0.5, 0.0, 0.5] + 6 * [1.0])
    with torch.no_grad():
        logits = model(whole).logits[:, :-1].transpose(1, 2)
        each = nn.functional.cross_entropy(logits, whole[:, 1:], reduction="none")
        expected = (each * weights).sum() / (3 * 9)
        close(ll.apply(model, params, IDS, labels=IDS).loss, expected, 1e-6)
        close(ll.apply(model, params, IDS, labels=IDS, return_dict=False)[0], expected, 1e-6)
        summed = ll.apply(model, params, IDS, labels=IDS, num_items_in_batch=9).loss
        close(summed, 3 * expected, 1e-6)
        short = ll.init(model, dataclasses.replace(cfg, r=2, token_ids=(3, 4), token_types=(4, 8)))
        rows = ll.rows(ll.stack([params, short]), [0, 1, -1])
        alone = [
            ll.apply(model, p, IDS[i : i + 1], labels=IDS[i : i + 1]).loss
            for i, p in enumerate((params, short, ()))
        ]
        expected = (9 * alone[0] + 7 * alone[1] + 5 * alone[2]) / 21
        close(ll.apply(model, rows, IDS, labels=IDS).loss, expected, 2e-6)
        front = prompt(model)
        found = ll.apply(model, (front, params), IDS, labels=IDS).loss
        assert (found - ll.apply(model, params, IDS, labels=IDS).loss).abs() > 1e-3
        with pytest.raises(ll.UnsupportedError, match="and cpt inside has labels too"):
            ll.apply(model, (short, params), IDS, labels=IDS)
        bert = fresh("bert")
        masked = ll.init(bert, cfg)
        ll.apply(bert, masked, IDS)
        with pytest.raises(ll.UnsupportedError, match="predict each token from those before it"):
            ll.apply(bert, masked, IDS, labels=IDS)
    with pytest.raises(ll.ConfigError, match=r"decay: expected at least 0, found -1"):
        ll.CPTConfig(decay=-1.0)


def test_weighted_answers_need_logits() -> None:
    """Kernels that fuse the head and the loss give none."""
    model = copy.deepcopy(fresh("llama"))
    made: Any = type(model)

    class Fused(made):
        def forward(
            self,
            input_ids: Any = None,
            attention_mask: Any = None,
            past_key_values: Any = None,
            inputs_embeds: Any = None,
            labels: Any = None,
        ) -> Any:
            given = {"inputs_embeds": inputs_embeds, "labels": labels}
            result = made.forward(self, input_ids, attention_mask, **given)
            return result if labels is None else type(result)(loss=result.loss)

    model.__class__ = Fused
    params = ll.init(model, ll.CPTConfig(r=2, token_ids=(3, 4), token_types=(1, 4), decay=0.5))
    with pytest.raises(ll.UnsupportedError, match="takes the logits of all 8 tokens"):
        ll.apply(model, params, IDS, labels=IDS)


@pytest.mark.parametrize("name", ["lora_ids", "lora_types"])
def test_a_file_whose_context_is_no_numbers_of_tokens(name: str, tmp_path: Path) -> None:
    params = ll.init(fresh("llama"), ll.CPTConfig(r=2, token_ids=(3, 4)))
    for value in (float("nan"), -1.0, 0.5, 2.0**24):
        wrong = {**params[""], name: torch.full((2,), value)}
        ll.save(replace(params, {"": wrong}), tmp_path / "a.safetensors")
        with pytest.raises(ll.CheckpointError, match=f"{name}: expected whole numbers from 0"):
            ll.load(tmp_path / "a.safetensors")
