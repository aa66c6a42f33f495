"""A method from outside the package: what it takes to add one. It is held to every law by its row
in cases.py.
"""

import dataclasses

import torch
from new_method import MIX, MixConfig

import lora_lite_func as ll
from lora_lite_func.core.registry import _REGISTRY


def test_it_is_known_by_name_and_by_config():
    assert ll.variants()["mix"] is MIX
    assert list(ll.init(torch.nn.Linear(3, 4), MixConfig())[""]) == ["lora_c", "lora_v"]


def test_a_tensor_may_start_as_the_usual_lora_A_does():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class UsualConfig(ll.AdapterConfig):
        """A method of one tensor."""

    usual = ll.Variant(
        name="usual",
        config=UsualConfig,
        param_specs=lambda cfg, site: {"lora_u": ll.ParamSpec((site.r, site.d_in), "kaiming")},
        outputs=lambda cfg, p, d, x, y, site: y,
    )
    ll.register(usual)
    try:
        found = ll.init(torch.nn.Linear(16, 4), UsualConfig())[""]["lora_u"]
        assert found.abs().max() <= 0.25
        assert found.std() > 0.1
        assert torch.equal(found, ll.init(torch.nn.Linear(16, 4), UsualConfig())[""]["lora_u"])
    finally:
        _REGISTRY.pop(UsualConfig)
