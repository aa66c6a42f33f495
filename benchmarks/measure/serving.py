"""Sets of adapters while they serve: mixed batches at random, packed tokens, a bank that changes, a
server's tokens per second.

python -m benchmarks --only serving
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lora_lite_func as ll

from ..examples import serve
from .harness import Row, Suite, llama
from .sets import at_random, peft_of, stack_of

__all__ = ["area"]


def area(suite: Suite) -> Iterator[Row]:
    """Every figure."""
    for part in (ragged, tokens, replaced, packed_requests, server):
        yield from part(suite)


def ragged(suite: Suite) -> Iterator[Row]:
    """64 rows of 16 adapters at random, 1 to 10 rows each, with 1 and 16 tokens; beside 4 rows each
    in order.
    """
    base, count, rows = llama(4), 16, 64
    stack, who = stack_of(base, [8] * count), at_random(count, rows)
    other, names = peft_of(base, count), [str(i) for i in who.tolist()]
    even = ll.bind(base, ll.rows(stack, torch.arange(rows) // 4))
    mixed = ll.bind(base, ll.rows(stack, who))
    for length in (1, 16):
        ids = torch.randint(0, 1024, (rows, length))
        with torch.no_grad():
            calls: dict[str, Callable[[], Any]] = {
                "base": lambda ids=ids: base(ids),
                "even": lambda ids=ids: even(ids),
                "random": lambda ids=ids: mixed(ids),
                "PEFT": lambda ids=ids: other(input_ids=ids, adapter_names=names),
            }
            result = suite.compare(calls)
        what = f"{rows} rows x {length} token{'s' * (length > 1)}, 16 adapters"
        yield Row(f"{what}, 4 rows each", result.ratios["even"], "base", guard=result.guard)
        yield Row(
            f"{what}, at random",
            result.ratios["random"],
            "base",
            1.20 if length == 1 else None,
            guard=result.guard,
            peers={"PEFT": result.ratios["PEFT"]},
        )


def tokens(suite: Suite) -> Iterator[Row]:
    """1,024 tokens packed in one row, of 64 requests of 16 adapters at random, over the requests as
    64 rows; and weighted sums of 4 adapters for each of the 64 rows. Layers alone: attention over a
    packed row is another base.
    """
    pair = [nn.Linear(512, 1376), nn.SiLU(), nn.Linear(1376, 512)]
    base = nn.Sequential(*(layer for _ in range(4) for layer in copy.deepcopy(pair)))
    base.eval().requires_grad_(False)
    stack, who, x = stack_of(base, [8] * 16), at_random(16, 64), torch.randn(64, 16, 512)
    by_row = ll.bind(base, ll.rows(stack, who))
    packed = ll.bind(base, ll.rows(stack, who.repeat_interleave(16)[None]))
    mixed = ll.bind(base, ll.mixed(ll.stack(ll.unstack(stack)[:4]), torch.rand(64, 4)))
    with torch.no_grad():
        result = suite.compare(
            {
                "base": lambda: base(x),
                "rows": lambda: by_row(x),
                "packed": lambda: packed(x.view(1, 1024, 512)),
                "mixed": lambda: mixed(x),
            }
        )
    yield Row(
        "1,024 packed tokens, 16 adapters at random",
        result.over("packed", "rows"),
        "the same tokens as 64 rows",
        1.10,
        guard=result.guard,
    )
    yield Row(
        "64 rows x 16 tokens, each a sum of 4 adapters",
        result.ratios["mixed"],
        "base",
        guard=result.guard,
    )


def replaced(suite: Suite) -> Iterator[Row]:
    """One of 128 members on 24 sites replaced: in a bank, and in a stack by `ll.update`, over a
    copy of as many bytes, leaf by leaf.
    """
    base = nn.ModuleList(nn.Linear(512, 512) for _ in range(24))
    members = ll.unstack(stack_of(base, [8] * (8 if suite.quick else 128)))
    stack, bank = ll.stack(members), ll.Bank({str(i): a for i, a in enumerate(members)})
    values = [t for at in members[3].values() for t in at.values()]
    leaves = [t.new_zeros(len(members), *t.shape) for t in values]
    slots = itertools.cycle(range(len(members) // 8 + 1))  # as the bank's go round

    def copied() -> None:
        slot = next(slots)
        for leaf, value in zip(leaves, values, strict=True):
            leaf[slot].copy_(value)

    calls: dict[str, Callable[[], Any]] = {
        "copy": copied,
        "bank": lambda: bank.replace("1", members[3]),
        "update": lambda: ll.update(stack, 1, members[3]),
    }
    result = suite.compare(calls, inner=5)
    yield Row(
        f"Bank.replace, {len(members)} members x 24 sites",
        result.ratios["bank"],
        "a copy of its leaves",
        1.5,
        guard=result.guard,
        peers={"ll.update of a stack": result.ratios["update"]},
    )


def packed_requests(suite: Suite) -> Iterator[Row]:
    """Transformers' continuous batching: 32 requests of 8 adapters by `ll.bind_requests`, over the
    bare base's `generate_batch`.
    """
    from transformers import ContinuousBatchingConfig, GenerationConfig

    base, count = llama(2 if suite.quick else 4), 8 if suite.quick else 32
    served, who = ll.bind_requests(base, stack_of(base, [8] * 8)), at_random(8, count).tolist()
    prompts = torch.randint(0, 1024, (count, 12)).tolist()
    chosen = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": -1}

    def run(model: Any, **given: Any) -> None:
        settings = ContinuousBatchingConfig(
            num_blocks=2 * count, page_size=32, max_batch_tokens=256, allow_block_sharing=False
        )
        model.generate_batch(prompts, GenerationConfig(**chosen), settings, **given)

    calls = {"base": lambda: run(base), "served": lambda: run(served, adapters=who)}
    result = suite.compare(calls)
    yield Row(
        f"generate_batch, {count} requests of 8 adapters",
        result.ratios["served"],
        "base",
        guard=result.guard,
    )


def server(suite: Suite) -> Iterator[Row]:
    """The server loop of `benchmarks.examples.serve`, a fifth of its size: a batch's time over the
    base's, and how long a miss takes.
    """
    sizes = (
        serve.QUICK
        if suite.quick
        else dataclasses.replace(serve.Sizes(), adapters=200, resident=32, requests=192)
    )
    model = llama(sizes.layers, sizes.hidden)
    model.generation_config.pad_token_id = 0
    with tempfile.TemporaryDirectory() as name:
        files, folders = Path(name) / "files", Path(name) / "folders"
        files.mkdir()
        folders.mkdir()
        serve.write_adapters(model, sizes, files)
        done, differing = serve.serve(model, sizes, files, folders)
        size = statistics.median(file.stat().st_size for file in files.iterdir())
    assert not differing, f"{differing} answers aren't those of their adapter"
    times = {served.name: served for served in done}
    base = times["base"].seconds

    def over_base(name: str) -> float:
        own = times[name].seconds
        return statistics.median(a / b for a, b in zip(own, base, strict=False))

    theirs = [name for name in times if name.startswith("PEFT")]
    where = f"{sizes.adapters} adapters on the disk, {sizes.resident} in memory"
    yield Row(
        f"a batch, {where}",
        over_base("ll.Bank"),
        "base",
        peers={name: over_base(name) for name in theirs},
    )
    yield Row(
        f"a miss, {size / 2**10:.0f} KiB",
        statistics.median(times["ll.Bank"].misses) * 1e3,
        "ms",
        peers={name: statistics.median(times[name].misses) * 1e3 for name in theirs},
    )
