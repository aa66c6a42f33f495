"""A method from outside the package: what it takes to add one. It is held to every law by its row in cases.py."""

import torch
from new_method import MIX, MixConfig

import lora_lite_func as ll


def test_it_is_known_by_name_and_by_config():
    assert ll.variants()["mix"] is MIX
    assert list(ll.init(torch.nn.Linear(3, 4), MixConfig())[""]) == ["lora_c", "lora_v"]
