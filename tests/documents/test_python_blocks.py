"""Each page's Python blocks are run in order, in one namespace."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pages import PAGES, blocks

import lora_lite_func as ll
from lora_lite_func.core import registry as methods

WITH_BLOCKS = [page for page in PAGES if blocks(page, "python")]


@pytest.fixture
def namespace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, object]]:
    """A module's own, in an empty folder; methods that it registers are forgotten afterwards."""
    registered = dict(methods._REGISTRY)
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    yield module.__dict__
    methods._REGISTRY.clear()
    methods._REGISTRY.update(registered)
    torch._dynamo.reset()


OPTIONAL = {
    r"^from torchao\b": "torchao.quantization",
    r"^from transformers import .*\bGPT2LMHeadModel\b": "transformers.models.gpt2.modeling_gpt2",
    r"^from transformers import .*\bTrainer\b": "transformers.trainer",
}
"""What pages import that isn't a dependency; a release of it may not go with every torch."""


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
@pytest.mark.parametrize("page", WITH_BLOCKS)
def test_every_python_block_runs(page: str, namespace: dict[str, object]) -> None:
    code = "".join(blocks(page, "python"))
    for pattern, module in OPTIONAL.items():
        if re.search(pattern, code, re.M):
            pytest.importorskip(module, exc_type=ImportError)
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), namespace)


def test_what_the_pages_are() -> None:
    guides = {page.rpartition("/")[2] for page in PAGES if "/guides/" in page}
    assert guides > {"training.md", "many_adapters.md", "serving.md", "files_of_others.md"}
    assert guides > {"quantised_bases.md", "functional_cookbook.md", "your_own_method.md"}
    assert {"README.md", "benchmarks/README.md", ".github/CONTRIBUTING.md"} < PAGES.keys()
    assert "README.md" in WITH_BLOCKS


def test_readme_is_a_front_door() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 200
    assert len(blocks("README.md", "python")[0].splitlines()) == 6


def test_the_example_of_an_error_is_what_is_said() -> None:
    def block() -> torch.nn.ModuleDict:
        return torch.nn.ModuleDict({n: torch.nn.Linear(4, 4) for n in ("q_proj", "v_proj")})

    model = torch.nn.ModuleDict({f"{i}": block() for i in range(7)})
    with pytest.raises(ll.TargetError, match="'q_porj' matched none of 14") as caught:
        ll.init(model, ll.LoRAConfig(r=2, target_names=("q_porj",)))
    assert f"TargetError: {caught.value}" in PAGES["lora_lite_func/guides/training.md"]
