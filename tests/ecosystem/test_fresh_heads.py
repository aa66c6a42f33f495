"""A head that the checkpoint lacked: init says once when it would stay frozen, never otherwise."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, IDS

import lora_lite_func as ll

transformers = pytest.importorskip("transformers")


@pytest.fixture
def classifier(tmp_path: Path) -> Any:
    """A language model's folder, loaded with a head of three classes."""
    FAMILIES["qwen3"].fresh().save_pretrained(tmp_path)  # type: ignore[operator]
    auto = transformers.AutoModelForSequenceClassification
    made = auto.from_pretrained(tmp_path, num_labels=3)
    if not any("_is_hf_initialized" in p.__dict__ for p in made.parameters()):
        pytest.skip("this transformers doesn't say what it loaded")
    return made


def said(model: Any, cfg: ll.AdapterConfig) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        ll.init(model, cfg)
    return [str(one.message) for one in found]


def test_it_is_said_once_with_what_to_do(classifier: Any) -> None:
    (text,) = said(classifier, ll.LoRAConfig(r=2))
    assert text.startswith("the checkpoint that the model was loaded from lacked 'score': ")
    pattern = "target_parameters=('^score\\\\.',)"
    assert pattern in text
    assert said(classifier, ll.LoRAConfig(r=2)) == []
    head = ll.init(classifier, ll.FullConfig(target_parameters=(r"^score\.",)))
    both = (ll.init(classifier, ll.LoRAConfig(r=2)), head)
    bound = ll.bind(classifier, both)
    bound(IDS, labels=torch.tensor([0, 1])).loss.backward()
    assert bound.score.adapter[0].lora_W.grad.abs().max() > 0


def test_all_layers_of_a_head_are_named(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.RobertaConfig(intermediate_size=64, vocab_size=64, **sizes)
    transformers.RobertaForMaskedLM(config).save_pretrained(tmp_path)
    made = transformers.RobertaForSequenceClassification.from_pretrained(tmp_path)
    (text,) = said(made, ll.LoRAConfig(r=2, target_names=("query",)))
    assert "lacked 'classifier.dense', 'classifier.out_proj': " in text
    assert r"('^classifier\\.dense\\.', '^classifier\\.out_proj\\.')" in text


def test_a_head_that_is_trained_first_is_none(classifier: Any) -> None:
    assert said(classifier, ll.FullConfig(target_parameters=(r"^score\.",))) == []
    assert said(classifier, ll.LoRAConfig(r=2)) == []


def test_an_adapted_head_is_none(classifier: Any) -> None:
    cfg = ll.LoRAConfig(r=2, target_names=("q_proj", "score"), exclude_names=())
    assert said(classifier, cfg) == []


def test_a_head_that_was_loaded_since_is_none(classifier: Any, tmp_path: Path) -> None:
    state = {"weight": torch.ones_like(classifier.score.weight)}
    classifier.score.load_state_dict(state)
    assert said(classifier, ll.LoRAConfig(r=2)) == []
    classifier.save_pretrained(tmp_path / "whole")
    again = type(classifier).from_pretrained(tmp_path / "whole")
    assert said(again, ll.LoRAConfig(r=2)) == []


def test_models_without_a_checkpoint_and_grown_tables_are_none(tmp_path: Path) -> None:
    model: Any = FAMILIES["bert"].fresh()
    assert said(model, ll.LoRAConfig(r=2)) == []
    language: Any = FAMILIES["qwen3"].fresh()
    language.save_pretrained(tmp_path)
    loaded = type(language).from_pretrained(tmp_path)
    assert said(loaded, ll.LoRAConfig(r=2)) == []
    grown = type(language).from_pretrained(tmp_path)
    grown.resize_token_embeddings(80)
    assert said(grown, ll.LoRAConfig(r=2)) == []
