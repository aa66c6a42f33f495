"""Two real processes: data parallel, sharded parameters, a stack's members shared out; each equal
to one process.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import close, leaves, moved, net
from two_processes import METHODS, adapted, adapter, members, shared, trained

import lora_lite_func as ll
from lora_lite_func.core.torch_internals import CALLS_SHARDED

HERE = Path(__file__).parent.parent


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_are_as_good_as_one(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(HERE / "two_processes.py"),
        str(tmp_path),
    ]
    paths = os.pathsep.join([str(HERE), str(HERE.parent)])
    environment = {
        **os.environ,
        "PYTHONPATH": paths,
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))

    bound = ll.bind(net(depth=1), adapter())
    wanted = trained(bound, slice(None))
    saved = torch.utils._pytree.tree_leaves(ll.load(tmp_path / "saved"))
    close(saved, torch.utils._pytree.tree_leaves(ll.unbind(bound)), 1e-9)
    for way in ("ddp", "fsdp"):
        close(
            [torch.cat(halves) for halves in zip(first[way], second[way], strict=True)],
            wanted,
            1e-9,
        )

    one = ll.bind(net(depth=2), shared())
    close(
        [torch.cat(halves) for halves in zip(first["shared"], second["shared"], strict=True)],
        trained(one, slice(None)),
        1e-9,
    )
    close(first["shared adapter"], [ll.unbind(one)[".tied.0", "lora_v"]], 1e-9)
    assert re.search(r"fully_shard\(\[(module_a|\*model\.layers)", first["apart"]), first["apart"]

    alone = torch.utils._pytree.tree_leaves(members(range(4)))
    for found in (first, second):
        close(found["members"], alone, 1e-9)
        assert "bind first, then wrap" in found["refusal"]

    whole = [ll.init(net(depth=1), cfg) for cfg in METHODS]
    wanted_in_parallel = [[*leaves(p), *adapted(net(depth=1), moved(p))] for p in whole]
    says = (
        r"'layers\.0\.(up|down)'.*its weight is sharded.*merged.*full_tensor\(\)",
        r"'layers\.0\.(up|down)'.*its weight is sharded.*full_tensor\(\)",
        r"'layers\.0\.up\.weight'.*its weight is sharded.*itself.*full_tensor\(\)",
        r"'layers\.0\.up'.*sharded.*each row has an adapter of its own",
        r"'layers\.0\.up'.*sharded.*set dropout to 0",
    )
    if not CALLS_SHARDED:
        says = (r"'layers\.0\.(up|down)'.*its weight is sharded.*from torch 2\.13 on",)
    for found in (first, second):
        if CALLS_SHARDED:
            close(found["parallel"], wanted_in_parallel, 1e-9)
        for text, pattern in zip(found["parallel refusals"], says, strict=True):
            assert re.search(pattern, text), text
