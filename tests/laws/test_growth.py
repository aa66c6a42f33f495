"""How cost grows, by operations and bytes counted, not by time; and the benchmark suite's own rows,
table and files.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from counting import counted
from torch import nn

import lora_lite_func as ll
from benchmarks.measure import results
from benchmarks.measure.harness import Row, Suite, compare, machine, saved, versions
from benchmarks.measure.memory import own_bytes


def chain(sites: int, width: int = 16) -> nn.Module:
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(sites)))


def test_operations_are_in_proportion_to_the_sites_and_bind_adds_none() -> None:
    x, per_site = torch.zeros(4, 16), []
    for sites in (2, 20, 2000):
        model = chain(sites)
        params = ll.init(model, ll.LoRAConfig(r=2))
        bound = ll.bind(model, params)
        base, ours = counted(partial(model, x)).operations, counted(partial(bound, x)).operations
        applied = counted(partial(ll.apply, model, params, x)).operations
        assert applied == ours
        per_site.append((ours - base) / sites)
    assert max(per_site) == min(per_site) == 2  # two products: x A^T, and B^T onto y


def test_operations_do_not_depend_on_the_rank_and_numbers_written_grow_by_it_alone() -> None:
    model, x = chain(3, 256), torch.zeros(8, 256)
    seen = {r: counted(_call(model, r, x)) for r in (1, 4, 16, 256)}
    assert len({c.operations for c in seen.values()}) == 1
    assert seen[256].written - seen[16].written == 3 * 8 * 240
    assert seen[16].written - seen[4].written == 3 * 8 * 12
    assert seen[4].written - seen[1].written == 3 * 8 * 3


def _call(model: nn.Module, r: int, x: torch.Tensor) -> Callable[[], Any]:
    bound = ll.bind(model, ll.init(model, ll.LoRAConfig(r=r)))
    return lambda: bound(x)


def test_operations_of_a_mixed_batch_do_not_depend_on_how_many_adapters_are_in_it() -> None:
    model, x = chain(3), torch.zeros(1024, 1, 16)
    one, found = ll.init(model, ll.LoRAConfig(r=2)), []
    for members in (2, 8, 32, 1024):
        bound = ll.bind(model, ll.rows(ll.stack([one] * members), torch.arange(1024) % members))
        found.append(counted(lambda m=bound: m(x)).operations)
    assert max(found) <= 2 * min(found)


def test_adapters_held_elsewhere_cost_a_call_nothing() -> None:
    model, x = chain(3), torch.zeros(4, 16)
    params = ll.init(model, ll.LoRAConfig(r=2))
    before = counted(lambda: ll.apply(model, params, x)).operations
    others = [ll.bind(model, ll.init(model, ll.LoRAConfig(r=2), seed=i)) for i in range(50)]
    assert counted(lambda: ll.apply(model, params, x)).operations == before
    size = sum(t.nbytes for at in params.values() for t in at.values())
    assert own_bytes(others, model) == 50 * size


def test_a_forward_keeps_its_input_and_r_numbers_a_token_for_the_backward() -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    x = torch.zeros(10, 32, requires_grad=True)
    for r in (1, 4):
        bound = ll.bind(model, ll.init(model, ll.LoRAConfig(r=r)))
        assert saved(lambda m=bound: m(x), [*bound.parameters(), x]) == 10 * r * 4


# ---------------------------------------------------------------------------------------- the suite
def test_a_row_says_whether_its_target_is_reached() -> None:
    assert Row("a", 1.0, "base", 1.1).verdict == "reached"
    assert Row("a", 1.2, "base", 1.1).verdict == "missed"
    assert Row("a", 9.0, "PEFT", 7, at_least=True).verdict == "reached"
    assert Row("a", 1.0, "base", 1.1, guard=1.2).verdict == "void"
    assert Row("a", 1.0, "base").verdict == ""


def test_contestants_run_in_turn_and_the_first_twice() -> None:
    turns: list[str] = []
    calls = {"base": lambda: turns.append("base"), "ours": lambda: turns.append("ours")}
    result = compare(calls, rounds=2, warmup=1)
    assert turns == ["base", "ours", "base"] * 3
    assert set(result.ratios) == {"base", "ours"}
    assert Suite(quick=True).compare(calls).ratios["base"] == 1.0


def test_figures_survive_their_file_and_reach_readme(tmp_path: Path) -> None:
    rows = {
        "forward": [
            Row("1 token", 1.05, "base", 1.1, guard=1.0, peers={"PEFT": 1.2}),
            Row("bound", 1.5, "base", curve=("t", "r", 8.0)),
        ]
    }
    file = tmp_path / "run.json"
    results.write(file, rows, {"versions": versions(), "machine": machine(), "quick": False})
    result = json.loads(file.read_text())
    assert results.rows_of(result) == rows
    text = results.rewritten(f"a\n{results.BEGIN}\nold\n{results.END}\nb\n", result)
    assert "| forward | 1 token | base | 1.050 | PEFT 1.200 | ≤ 1.1 |" in text
    assert "bound" not in text
    assert text.startswith("a\n")
    assert text.endswith("\nb\n")
    assert "old" not in text
    with pytest.raises(ValueError, match="found a quick one"):
        results.rewritten(text, result | {"quick": True})
