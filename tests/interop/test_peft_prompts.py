"""PEFT's prompt learning: its forward, loss and files, and where its generation goes wrong."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import close
from peft_models import load_file, peft
from prompts import IDS, both, fresh, greedy, output, single
from torch import Tensor

import lora_lite_func as ll

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own, of which there are many

TASKS = {
    "llama": "CAUSAL_LM",
    "gpt2": "CAUSAL_LM",
    "bert_pooled": "FEATURE_EXTRACTION",
    "t5": "SEQ_2_SEQ_LM",
    "bart": "SEQ_2_SEQ_LM",
}


def theirs(name: str, config: Any, folder: Path) -> Any:
    """PEFT's model, and its folder."""
    torch.manual_seed(5)
    made = peft.get_peft_model(copy.deepcopy(fresh(name)), config).eval()
    with torch.no_grad():
        for key, p in made.named_parameters():
            if p.requires_grad and "prompt_encoder" in key:
                p += 0.1 * torch.randn_like(p)
    made.save_pretrained(folder)
    return made


def prompt_config(name: str) -> Any:
    return peft.PromptTuningConfig(task_type=TASKS[name], num_virtual_tokens=4)


def agrees(name: str, made: Any, params: Any) -> None:
    """Outputs, with a mask and without, and the loss are PEFT's; but those of padding, whose
    positions PEFT counts on.
    """
    model, given = fresh(name), single(name, IDS)
    mask = torch.ones_like(IDS)
    mask[1, 4:] = 0
    labels = {}
    if name != "bert_pooled":
        own = IDS[:, :3].clone() if name in both else IDS.masked_fill(mask == 0, -100)
        labels = {"labels": own}
    with torch.no_grad():
        for more in ({}, {"attention_mask": mask}):
            expected = made(**given, **more, **labels)
            found = ll.apply(model, params, **given, **more, **labels)
            theirs, ours = output(expected), output(found)[:, :6]
            theirs = theirs[:, 4:10] if theirs.shape[1] > 7 else theirs
            kept = mask[:, :, None] != 0 if more and name not in both else torch.tensor(True)
            close(torch.where(kept, ours, 0.0), torch.where(kept, theirs, 0.0), 2e-6)
            if labels:
                close(found.loss, expected.loss, 2e-6)


@pytest.mark.parametrize("name", TASKS)
def test_prompt_tuning_both_ways(name: str, tmp_path: Path) -> None:
    made = theirs(name, prompt_config(name), tmp_path / "theirs")
    model = fresh(name)
    params = ll.from_peft(tmp_path / "theirs", model)
    assert isinstance(params.config, ll.PromptTuningConfig)
    assert params[""]["lora_tokens"].shape == (4, 32)
    agrees(name, made, params)
    ll.to_peft(params, model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    agrees(name, again, params)
    assert list(load_file(tmp_path / "ours")) == ["prompt_embeddings"]
    back = ll.from_peft(tmp_path / "ours", model)
    assert torch.equal(back[""]["lora_tokens"], params[""]["lora_tokens"])


def test_pefts_generation_with_a_cache_is_not_that_of_its_full_calls(tmp_path: Path) -> None:
    """From the second step on its model sees the virtual tokens and the last token alone."""
    made = theirs("llama", prompt_config("llama"), tmp_path)
    params = ll.from_peft(tmp_path, fresh("llama"))
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask, ids = torch.ones_like(IDS), IDS
    with torch.no_grad():
        expected = torch.cat(
            [greedy(lambda x: ll.apply(fresh("llama"), params, x), row[None], 8) for row in ids]
        )
        assert torch.equal(ll.bind(fresh("llama"), params).generate(ids, **how), expected)
        assert not torch.equal(made.generate(input_ids=ids, attention_mask=mask, **how), expected)
        uncached = made.generate(input_ids=ids, attention_mask=mask, use_cache=False, **how)
        assert torch.equal(uncached, expected)


def test_what_a_file_of_prompts_must_say(tmp_path: Path) -> None:
    theirs("llama", prompt_config("llama"), tmp_path)
    with pytest.raises(ll.CheckpointError, match="keys don't say which module's call is adapted"):
        ll.from_peft(tmp_path)
    with pytest.raises(ll.CheckpointError, match=r"expected shape \(4, 16\), found \(4, 32\)"):
        ll.from_peft(tmp_path, fresh("llama", hidden_size=16))
    file = tmp_path / "adapter_config.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps(said | {"num_virtual_tokens": 3}))
    with pytest.raises(ll.CheckpointError, match=r"num_virtual_tokens is 3, .* is \(4, 32\)"):
        ll.from_peft(tmp_path, fresh("llama"))


def test_one_file_holds_the_prompt_of_one_model(tmp_path: Path) -> None:
    model = fresh("llama")
    params = ll.init(model, ll.PromptTuningConfig(r=2))
    inner = ll.init(model, ll.PromptTuningConfig(r=2, target_names="^model$"))
    with pytest.raises(ll.UnsupportedError, match="are of 2 "):
        ll.to_peft((params, inner), model, tmp_path)
    with pytest.raises(
        ll.UnsupportedError, match="'model': PEFT's PROMPT_TUNING is of the model's"
    ):
        ll.to_peft(inner, model, tmp_path)
    with pytest.raises(ll.UnsupportedError, match="no one form for"):
        ll.to_peft((params, ll.init(model, ll.LoRAConfig(r=2))), model, tmp_path)


def test_a_classifiers_head_is_beside_its_prompt(tmp_path: Path) -> None:
    import transformers

    model = fresh("llama", "LlamaForSequenceClassification", num_labels=3)
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)
    torch.manual_seed(5)
    made = peft.get_peft_model(copy.deepcopy(model), config).eval()
    with torch.no_grad():
        for p in made.parameters():
            if p.requires_grad:
                p += 0.1
    made.save_pretrained(tmp_path)
    params = ll.from_peft(tmp_path, model)
    assert isinstance(model, transformers.PreTrainedModel)
    with torch.no_grad():
        expected = made(IDS).logits
        close(ll.apply(model, params, IDS).logits, expected, 1e-5)
    ll.to_peft(params, model, tmp_path / "ours")
    assert load_file(tmp_path / "ours").keys() == load_file(tmp_path).keys()
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    with torch.no_grad():
        close(again(IDS).logits, expected, 1e-5)


# ------------------------------------------------------------------------------------- their kin
COMMON: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
KIN = {
    "p_tuning": lambda: peft.PromptEncoderConfig(encoder_hidden_size=8, **COMMON),
    "p_tuning_lstm": lambda: peft.PromptEncoderConfig(
        encoder_hidden_size=8, encoder_reparameterization_type="LSTM", **COMMON
    ),
    "prefix": lambda: peft.PrefixTuningConfig(**COMMON),
    "prefix_projected": lambda: peft.PrefixTuningConfig(
        prefix_projection=True, encoder_hidden_size=8, **COMMON
    ),
    "cartridge": lambda: peft.CartridgeConfig(num_frozen_tokens=1, **COMMON),
    "cpt": lambda: peft.CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[5, 9, 7, 11], cpt_tokens_type_mask=[1, 2, 3, 4]
    ),
}
OURS = {
    "p_tuning": ll.PromptTuningConfig,
    "p_tuning_lstm": ll.PromptTuningConfig,
    "prefix": ll.PrefixTuningConfig,
    "prefix_projected": ll.PrefixTuningConfig,
    "cartridge": ll.CartridgeConfig,
    "cpt": ll.CPTConfig,
}


@pytest.mark.parametrize("kind", KIN)
def test_their_kin_both_ways(kind: str, tmp_path: Path) -> None:
    """What PEFT projects or encodes in training is a plain tensor in its file, and here."""
    made = theirs("llama", KIN[kind](), tmp_path / "theirs")
    model = fresh("llama")
    params = ll.from_peft(tmp_path / "theirs", model)
    assert type(params.config) is OURS[kind]
    agrees("llama", made, params)
    ll.to_peft(params, model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    agrees("llama", again, params)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "t5", "bart"])
def test_prefixes_of_other_models(name: str, tmp_path: Path) -> None:
    """Of an encoder-decoder's prefix PEFT gives layer i what the file has for layer 2 i."""
    task = TASKS.get(name, "CAUSAL_LM")
    config = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=4)
    made = theirs(name, config, tmp_path / "theirs")
    model, given = fresh(name), single(name, IDS)
    params = ll.from_peft(tmp_path / "theirs", model)
    with torch.no_grad():
        expected = made(**given).logits
        close(ll.apply(model, params, **given).logits, expected, 5e-6)
    ll.to_peft(params, model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    with torch.no_grad():
        close(again(**given).logits, expected, 5e-6)


@pytest.mark.parametrize(("name", "size"), [("t5", "num_layers"), ("bart", "decoder_layers")])
def test_prefixes_of_encoder_decoders_are_written_where_peft_can_take_them(
    name: str, size: str, tmp_path: Path
) -> None:
    """It takes any of an odd number of layers, and of an even one those that repeat."""
    for layers in (1, 3):
        model = fresh(name, **{size: layers})
        params = ll.init(model, ll.PrefixTuningConfig(r=4))
        ll.to_peft(params, model, tmp_path / f"{layers}")
        made = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / f"{layers}").eval()
        given = single(name, IDS)
        with torch.no_grad():
            close(made(**given).logits, ll.apply(model, params, **given).logits, 5e-6)
    for layers in (2, 4):
        model = fresh(name, **{size: layers})
        params = ll.init(model, ll.PrefixTuningConfig(r=4))
        with pytest.raises(ll.UnsupportedError, match=f"layers 0 and {layers // 2} would have one"):
            ll.to_peft(params, model, tmp_path / f"{layers}")


def test_multitask_both_ways(tmp_path: Path) -> None:
    config = peft.MultitaskPromptTuningConfig(num_tasks=3, num_ranks=2, **COMMON)
    made = theirs("llama", config, tmp_path / "theirs")
    model, tasks = fresh("llama"), torch.tensor([2, 0, 1])
    params = ll.from_peft(tmp_path / "theirs", model)
    with torch.no_grad():
        expected = made(IDS, task_ids=tasks).logits[:, 4:]
        close(ll.apply(model, ll.rows(ll.tasks(params), tasks), IDS).logits, expected, 5e-6)
        ll.to_peft(params, model, tmp_path / "ours")
        again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
        close(again(IDS, task_ids=tasks).logits[:, 4:], expected, 5e-6)


@pytest.mark.parametrize("name", both)
def test_multitask_of_encoder_decoders_both_ways(name: str, tmp_path: Path) -> None:
    config = peft.MultitaskPromptTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4, num_tasks=3, num_ranks=2
    )
    made = theirs(name, config, tmp_path / "theirs")
    model, tasks, labels = fresh(name), torch.tensor([2, 0, 1]), IDS[:, :3].clone()
    params = ll.from_peft(tmp_path / "theirs", model)
    assert params.config.decoder
    assert params[""]["lora_decoder"].shape == (4, 32)
    ll.to_peft(params, model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    with torch.no_grad():
        expected = made(IDS, labels=labels, task_ids=tasks)
        found = ll.apply(model, ll.rows(ll.tasks(params), tasks), IDS, labels=labels)
        close(found.logits, expected.logits[:, 4:], 5e-6)
        close(found.loss, expected.loss, 2e-6)
        close(again(IDS, labels=labels, task_ids=tasks).logits, expected.logits, 5e-6)
    with pytest.raises(ll.CheckpointError, match="half of its virtual tokens are for a decoder"):
        ll.from_peft(tmp_path / "theirs", fresh("llama"))
    alone = ll.tasks(params)[1]
    with pytest.raises(ll.UnsupportedError, match=r"train with ll\.MPTConfig\(decoder=True\)"):
        ll.to_peft(alone, model, tmp_path / "alone")


@pytest.mark.parametrize("layers", [1, 3])
def test_an_lstm_trains_as_peft_s(layers: int, tmp_path: Path) -> None:
    config = peft.PromptEncoderConfig(
        encoder_hidden_size=8,
        encoder_reparameterization_type="LSTM",
        encoder_num_layers=layers,
        **COMMON,
    )
    made = theirs("llama", config, tmp_path / "theirs")
    encoder, model = made.prompt_encoder["default"], fresh("llama")
    start = ll.init(model, ll.PTuningConfig(r=4, encoder="lstm", hidden=8, lstm_layers=layers))
    leaves = of_encoder(encoder, lambda p: p.detach().clone())
    params = ll.Adapter(start.layout, {"": leaves})
    agrees("llama", made, params)
    made(IDS, labels=IDS).loss.backward()
    found = ll.grad(lambda p: ll.apply(model, p, IDS, labels=IDS).loss)(params)[""]
    for name, expected in of_encoder(encoder, lambda p: p.grad).items():
        # torch's two biases have the sum's gradient each
        close(found[name], expected / 2 if "lora_g" in name else expected, 2e-5)
    ll.to_peft(params, model, tmp_path / "ours")
    said = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert said["encoder_reparameterization_type"] == "LSTM"
    assert said["encoder_num_layers"] == layers
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    agrees("llama", again, params)


def of_encoder(encoder: Any, of: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    """What PEFT's LSTM encoder says of each of its tensors, by our names."""
    lstm, leaves = encoder.lstm_head, {"lora_tokens": of(encoder.embedding.weight)}

    def both_ways(name: str) -> Tensor:
        return torch.stack([of(getattr(lstm, name)), of(getattr(lstm, f"{name}_reverse"))])

    for i in range(lstm.num_layers):
        leaves[f"lora_x{i + 1}"] = both_ways(f"weight_ih_l{i}")
        leaves[f"lora_h{i + 1}"] = both_ways(f"weight_hh_l{i}")
        leaves[f"lora_g{i + 1}"] = both_ways(f"bias_ih_l{i}") + both_ways(f"bias_hh_l{i}")
    for i, layer in enumerate((encoder.mlp_head[0], encoder.mlp_head[2]), start=1):
        leaves |= {f"lora_W{i}": of(layer.weight), f"lora_b{i}": of(layer.bias)}
    return leaves


def test_answers_count_less_with_their_age_as_in_peft(tmp_path: Path) -> None:
    types = [1, 2, 3, 4, 4, 5, 6, 7, 8, 9, 10, 11, 12, 12]
    config = peft.CPTConfig(
        task_type="CAUSAL_LM",
        cpt_token_ids=list(range(3, 17)),
        cpt_tokens_type_mask=types,
        opt_weighted_loss_type="decay",
        opt_loss_decay_factor=0.6,
    )
    made = theirs("llama", config, tmp_path / "theirs")
    model = fresh("llama")
    params = ll.from_peft(tmp_path / "theirs", model)
    assert params.config.decay == 0.6
    labels = IDS.clone()
    labels[0, :4] = labels[2, 5:] = -100
    expected = made(IDS, labels=labels).loss
    expected.backward()
    close(ll.apply(model, params, IDS, labels=labels).loss, expected.detach(), 2e-6)
    plain = dataclasses.replace(params.config, decay=1.0)
    layout = ll.Layout(params.layout.variant, plain, params.sites.values())
    alike = ll.Adapter(layout, dict(params))
    assert (ll.apply(model, alike, IDS, labels=labels).loss - expected).abs() > 1e-2
    found = ll.grad(lambda p: ll.apply(model, p, IDS, labels=labels).loss)(params)
    delta = made.prompt_encoder["default"].delta_embedding.weight
    close(found[""]["lora_delta"], delta.grad, 2e-6)
    ll.to_peft(params, model, tmp_path / "ours")
    assert ll.from_peft(tmp_path / "ours", model).config == params.config


def test_a_prefix_of_another_model_is_refused(tmp_path: Path) -> None:
    theirs("llama", peft.PrefixTuningConfig(**COMMON), tmp_path)
    with pytest.raises(ll.CheckpointError, match=r"for 3 layers with keys of 16, .*\(4, 64\)"):
        ll.from_peft(tmp_path, fresh("llama", num_hidden_layers=3))
    params = ll.from_peft(tmp_path, fresh("llama"))
    with pytest.raises(ll.CheckpointError, match="give the base model"):
        ll.to_peft(params, None, tmp_path / "ours")


def test_pefts_generation_with_a_prefix_is_not_that_of_its_full_calls(tmp_path: Path) -> None:
    made = theirs("llama", peft.PrefixTuningConfig(**COMMON), tmp_path)
    model = fresh("llama")
    params = ll.from_peft(tmp_path, model)
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        full = [greedy(lambda x: ll.apply(model, params, x), row[None], 8) for row in IDS]
        assert torch.equal(ll.bind(model, params).generate(IDS, **how), torch.cat(full))
        found = made.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **how)
        assert not torch.equal(found, torch.cat(full))


# ------------------------------------------------------------------------------- adaption prompts
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_adaption_prompts_both_ways(name: str, tmp_path: Path) -> None:
    model = fresh(name)
    config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=1)
    torch.manual_seed(5)
    made = peft.get_peft_model(copy.deepcopy(model), config).eval()
    with torch.no_grad():
        for p in made.parameters():
            if p.requires_grad:
                p += 0.5
        expected = made(IDS, labels=IDS)
    made.save_pretrained(tmp_path / "theirs")
    params = ll.from_peft(tmp_path / "theirs", model)
    assert isinstance(params.config, ll.LLaMAAdapterConfig)
    with torch.no_grad():
        found = ll.apply(model, params, IDS, labels=IDS)
        close(found.logits, expected.logits, 5e-6)
        close(found.loss, expected.loss, 5e-6)
        how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        written = ll.bind(model, params).generate(IDS, **how)
        mask = torch.ones_like(IDS)
        assert torch.equal(written, made.generate(input_ids=IDS, attention_mask=mask, **how))
        ll.to_peft(params, model, tmp_path / "ours")
        again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
        close(again(IDS).logits, expected.logits, 5e-6)


def test_adaption_prompts_that_peft_gets_wrong(tmp_path: Path) -> None:
    config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=1)
    wide = fresh("llama", head_dim=16)
    made = peft.get_peft_model(copy.deepcopy(wide), config).eval()
    with pytest.raises(RuntimeError, match="shape"):
        made(IDS)
    params = ll.init(wide, ll.LLaMAAdapterConfig(r=3, layers=(-1,)))
    with pytest.raises(ll.UnsupportedError, match="infers from sizes, 32 and 32"):
        ll.to_peft(params, wide, tmp_path)
    biased = fresh("llama", attention_bias=True)
    bias = copy.deepcopy(biased)
    with torch.no_grad():
        bias.model.layers[1].self_attn.o_proj.bias += 1.0
    made = peft.get_peft_model(copy.deepcopy(bias), config).eval()
    with torch.no_grad():  # its gate is zero
        assert (made(IDS).logits - bias(IDS).logits).abs().max() > 1e-3
    made.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ll.CheckpointError, match="adds a second time"):
        ll.from_peft(tmp_path / "theirs", bias)
    lower = ll.init(fresh("llama"), ll.LLaMAAdapterConfig(r=3, layers=(0,)))
    with pytest.raises(ll.UnsupportedError, match="in the topmost attentions"):
        ll.to_peft(lower, fresh("llama"), tmp_path)
