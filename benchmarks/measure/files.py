"""The life of an adapter of 168 sites around its use: init, save, load, merge; beside PEFT and what
the disk and a copy cost.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

import lora_lite_func as ll

from .harness import Row, Suite, llama
from .peers import PROJECTIONS, lora, lora_lite, lora_lite_package, peft_lora


def area(suite: Suite) -> Iterator[Row]:
    """A Llama of 24 layers and hidden size 512, LoRA r=8 on all projections."""
    base = llama(4 if suite.quick else 24, device=suite.device)
    yield _init(suite, base)
    yield from _files(suite, base)
    yield from _merge(suite, base)


def shells(base: Any, count: int) -> Iterator[Any]:
    """Copies of the module tree on the same tensors, made beforehand: what PEFT writes on."""
    tensors = {id(t): t for t in (*base.parameters(), *base.buffers())}
    return iter([copy.deepcopy(base, dict(tensors)) for _ in range(count)])


def _init(suite: Suite, base: Any) -> Row:
    import peft

    settings = peft.LoraConfig(r=8, target_modules=PROJECTIONS)
    config = ll.LoRAConfig(r=8, target_names=tuple(PROJECTIONS))
    free = shells(base, 4 if suite.quick else 54)
    calls = {
        "ours": lambda: ll.init(base, config),
        "PEFT": lambda: peft.get_peft_model(next(free), settings),
    }
    if suite.lora_lite is not None:
        lite = lora_lite_package(suite.lora_lite)
        own = lite.LoRAConfig(r=8, dtype=torch.float32, target_names=tuple(PROJECTIONS))
        bare = shells(base, 4 if suite.quick else 54)
        calls["lora-lite"] = lambda: lite.attach(next(bare), own)
    found = suite.compare(calls)
    return Row(
        "init, PEFT's time over ours",
        found.ratios["PEFT"],
        "ours",
        15,
        at_least=True,
        guard=found.guard,
        peers=found.peers("lora-lite"),
    )


def _files(suite: Suite, base: Any) -> Iterator[Row]:
    import peft

    params, other, lite = lora(base), peft_lora(base), lora_lite(base, suite.lora_lite)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / "ours.safetensors"
        ll.save(params, file)
        other.save_pretrained(folder / "peft")
        theirs = folder / "peft" / "adapter_model.safetensors"
        free = shells(base, 4 if suite.quick else 54)
        calls: dict[str, Callable[[], Any]] = {
            "raw": lambda: safetensors.torch.load_file(theirs),
            "ours": lambda: ll.load(file),
            "PEFT": lambda: peft.PeftModel.from_pretrained(next(free), folder / "peft"),
        }
        package = None if lite is None else lora_lite_package(suite.lora_lite)
        if package is not None:
            package.save(lite, folder / "lite.safetensors")
            bare = shells(base, 4 if suite.quick else 54)
            calls["lora-lite"] = lambda: package.load(next(bare), folder / "lite.safetensors")
        found = suite.compare(calls)
        yield Row(
            "load",
            found.ratios["ours"],
            "raw safetensors",
            1.5,
            guard=found.guard,
            peers=found.peers("PEFT", "lora-lite"),
        )
        yield Row(
            "load, PEFT's time over ours",
            found.over("PEFT", "ours"),
            "ours",
            20,
            at_least=True,
            guard=found.guard,
        )
        calls = {
            "ours": lambda: ll.save(params, file),
            "PEFT": lambda: other.save_pretrained(folder / "peft"),
        }
        if package is not None:
            calls["lora-lite"] = lambda: package.save(lite, folder / "lite.safetensors")
        found = suite.compare(calls)
        yield Row(
            "save, PEFT's time over ours",
            found.ratios["PEFT"],
            "ours",
            1.6,
            at_least=True,
            guard=found.guard,
            peers=found.peers("lora-lite"),
        )


def _merge(suite: Suite, base: Any) -> Iterator[Row]:
    params, other = lora(base), peft_lora(base)
    weights = [base.get_submodule(path).weight for path in params]
    calls: dict[str, Callable[[], Any]] = {
        "clone": lambda: [w.clone() for w in weights],
        "ours": lambda: ll.merge(base, params),
        "PEFT": other.merge_adapter,
        "undone": other.unmerge_adapter,  # between the rounds; not counted
    }
    with torch.no_grad():
        found = suite.compare(calls)
    yield Row(
        "merge, functional",
        found.ratios["ours"],
        "a clone of the weights",
        1.7,
        guard=found.guard,
        peers={"PEFT": found.ratios["PEFT"]},
    )
    yield Row(
        "merge, functional", found.over("ours", "PEFT"), "PEFT's, in place", 0.85, guard=found.guard
    )
