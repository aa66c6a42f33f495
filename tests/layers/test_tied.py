"""Tables and heads that a model names as its own."""

from __future__ import annotations

from types import SimpleNamespace

from torch import nn

import lora_lite_func as ll
from lora_lite_func.layers.tied import embeddings_of


class TwoTowers(nn.Module):
    """A model with two tables: it can't name one of them, as CLIP of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.config = SimpleNamespace(tie_word_embeddings=True)

    def get_input_embeddings(self) -> nn.Module:
        raise NotImplementedError("which one?")


class Named(TwoTowers):
    """One table, and no head."""

    def get_input_embeddings(self) -> nn.Module:
        return self.first

    def get_output_embeddings(self) -> None:
        return None


def test_a_model_that_cannot_name_its_table_has_none() -> None:
    towers, named = TwoTowers(), Named()
    assert embeddings_of(towers, "input") is None
    assert embeddings_of(towers, "output") is None
    assert embeddings_of(named, "input") is named.first
    assert embeddings_of(named, "output") is None


def test_merging_into_it_leaves_its_config_alone() -> None:
    model = TwoTowers()
    dense = ll.merged(model, ll.init(model, ll.LoRAConfig(r=2)))
    assert dense.config.tie_word_embeddings is True
