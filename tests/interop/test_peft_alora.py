"""PEFT's activated LoRA: its files, and its outputs where its invocation sequence is and isn't."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from families import FAMILIES
from helpers import close
from peft_models import activated_llama

import lora_lite_func as ll

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

INPUTS = torch.tensor([[8, 5, 6, 7, 5, 6, 9], [5, 6, 8, 9, 3, 4, 7], [8, 9, 3, 4, 8, 9, 3]])


def test_outputs_are_peft_s_and_the_file_comes_back(tmp_path: Path) -> None:
    other, model = activated_llama(tmp_path / "theirs"), FAMILIES["llama"].fresh()
    params = ll.from_peft(tmp_path / "theirs", model)
    assert params.config.invocation_tokens == (5, 6)
    mask = ll.invoked(INPUTS, params.config.invocation_tokens)
    assert mask.sum(1).tolist() == [3, 7, 0]
    with torch.no_grad():
        wanted = other(input_ids=INPUTS).logits
        found = ll.apply(model, ll.activated(params, mask), INPUTS).logits
    close(found, wanted, 1e-5)
    close(found[2], model(INPUTS[2:]).logits[0], 1e-5)
    ll.to_peft(params, model, tmp_path / "ours")
    said = [
        json.loads((tmp_path / name / "adapter_config.json").read_text("utf-8"))
        for name in ("theirs", "ours")
    ]
    assert said[0]["alora_invocation_tokens"] == said[1]["alora_invocation_tokens"] == [5, 6]
    again = ll.from_peft(tmp_path / "ours", model)
    assert again.config == params.config
    close(again, params, 0.0)
    ll.save(params, tmp_path / "own")
    assert ll.load(tmp_path / "own").config == params.config


def test_it_acts_on_no_other_token() -> None:
    model = FAMILIES["llama"].fresh()
    params = ll.init(model, ll.LoRAConfig(r=2, invocation_tokens=(5, 6)))
    stack = ll.stack([params, params])
    whole = (params, ll.rows(stack, [0, 1, 0]), ll.mixed(stack, torch.ones(3, 2)), (params,))
    for given in whole:
        for verb in (ll.bind, ll.merged, lambda m, p: ll.apply(m, p, INPUTS)):
            with pytest.raises(
                ll.UnsupportedError, match=r"invocation sequence \[5, 6\] on, .*ll\.activated"
            ):
                verb(model, given)
    with pytest.raises(ll.ConfigError, match=r"invocation_tokens: expected token ids .* found -1"):
        ll.LoRAConfig(invocation_tokens=(-1,))


def test_a_file_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    activated_llama(tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    said = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps(said | {"alora_invocation_tokens": ["5"]}), "utf-8")
    with pytest.raises(ll.CheckpointError, match="expected a list of token ids"):
        ll.from_peft(tmp_path / "a", FAMILIES["llama"].fresh())
    file.write_text(json.dumps(said | {"lora_bias": True}), "utf-8")
    tensors = safetensors.torch.load_file(tmp_path / "a" / "adapter_model.safetensors")
    biases = {
        key.replace("weight", "bias"): t[:, 0].clone() for key, t in tensors.items() if "_B" in key
    }
    safetensors.torch.save_file(tensors | biases, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(ll.CheckpointError, match="alora_invocation_tokens is for plain factors"):
        ll.from_peft(tmp_path / "a", FAMILIES["llama"].fresh())
