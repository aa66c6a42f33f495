"""A server loop: 1,000 adapters on the disk, 64 of them in memory, batches that mix them.

    python -m benchmarks.examples.serve [--quick] [--json serve.json]

Requests come in, each for one of the adapters, some of which are asked for far more often than
others. Each batch goes through `generate` of a small Llama with random weights: on the bare base,
with the adapters of an `ll.Bank`, and with PEFT's, which are loaded, set and deleted. The servers
take turns, batch by batch. Prints tokens per second, and how long a miss takes.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import lora_lite_func as ll

from ..measure.harness import llama, machine, token_ids, versions
from ..measure.peers import noisy
from .servers import BankServer, PeftServer, Request, answer

__all__ = ["main"]

KINDS = (
    {"r": 4, "alpha": 8.0, "target_names": ("q_proj", "v_proj")},
    {"r": 8, "alpha": 16.0, "target_names": ("q_proj", "k_proj", "v_proj", "o_proj")},
    {"r": 16, "alpha": 16.0, "target_names": ("q_proj", "v_proj", "up_proj", "down_proj")},
)
"""Adapters of several trainers: unlike ranks, strengths and sites."""

PROMPT = 8


@dataclass(frozen=True)
class Sizes:
    """How large a run is."""

    adapters: int = 1000
    resident: int = 64
    requests: int = 512
    batch: int = 16
    new_tokens: int = 16
    layers: int = 4
    hidden: int = 256
    peft_batches: int = 8


QUICK = Sizes(
    adapters=24, resident=8, requests=24, batch=4, new_tokens=4, layers=2, hidden=64, peft_batches=3
)


def write_adapters(model: Any, sizes: Sizes, files: Path) -> None:
    """The adapters, as files of `ll.save`; those of one kind differ in noise."""
    starts = [ll.init(model, ll.LoRAConfig(**kind)) for kind in KINDS]
    for i in range(sizes.adapters):
        ll.save(
            noisy(starts[i % len(starts)], seed=i, size=0.05), files / f"{name_of(i)}.safetensors"
        )


def name_of(number: int) -> str:
    """An adapter's name."""
    return f"adapter-{number}"


def requests_of(model: Any, sizes: Sizes) -> list[list[Request]]:
    """Batches of requests. The k-th most popular adapter is asked for 1 / k as often as the first
    (Zipf's law).
    """
    draw = random.Random(0)
    order = draw.sample(range(sizes.adapters), sizes.adapters)
    chosen = draw.choices(
        order, [1 / (1 + rank) for rank in range(sizes.adapters)], k=sizes.requests
    )
    prompts = token_ids(sizes.requests * PROMPT, "cpu").view(sizes.requests, PROMPT)
    made = [Request(name_of(i), prompt) for i, prompt in zip(chosen, prompts, strict=True)]
    return [made[i : i + sizes.batch] for i in range(0, len(made), sizes.batch)]


@dataclass
class Served:
    """What a server did: seconds by batch, and seconds by miss."""

    name: str
    seconds: list[float]
    misses: list[float]

    def line(self, base: Sequence[float], tokens: int) -> str:
        """A row of the table; the base's time is that of the same batches."""
        rate = tokens * len(self.seconds) / sum(self.seconds)
        over = sum(self.seconds) / sum(base[: len(self.seconds)])
        told = f"{self.name:<28}{len(self.seconds):>8}{rate:>12,.0f}{1 / over:>14.2f}"
        if not self.misses:
            return told
        middle, most = statistics.median(self.misses) * 1e3, max(self.misses) * 1e3
        return f"{told}{len(self.misses):>9}{middle:>14.1f}{most:>10.1f}"


HEADER = (
    f"{'':<28}{'batches':>8}{'tokens / s':>12}{'of the base':>14}{'misses':>9}"
    f"{'ms, median':>14}{'most':>10}"
)


def serve(model: Any, sizes: Sizes, files: Path, folders: Path) -> tuple[list[Served], int]:
    """Every server on the same batches in turn; and how many answers differ from those of one
    adapter alone, of the first batch.
    """
    batches = requests_of(model, sizes)
    bank = BankServer(model, files, sizes.resident)
    servers: dict[str, Any] = {
        "base": lambda batch, new: answer(model, batch, new),
        "ll.Bank": bank,
    }
    peft: dict[str, Any] = {}
    if sizes.peft_batches:
        for i in {r.adapter for batch in batches[: sizes.peft_batches] for r in batch}:
            ll.to_peft(ll.load(files / f"{i}.safetensors"), model, folders / i)
        peft["PEFT, set_adapter"] = PeftServer(model, folders, sizes.resident, mixed=False)
        peft["PEFT, adapter_names"] = PeftServer(model, folders, sizes.resident, mixed=True)
    done = {name: Served(name, [], []) for name in (*servers, *peft)}
    for server in (*servers.values(), *peft.values()):  # what is made on the first call
        server(batches[0][:1], 1)
    for i, batch in enumerate(batches):
        turn = servers | (peft if i < sizes.peft_batches else {})
        for name, server in turn.items():
            begin = time.perf_counter()
            server(batch, sizes.new_tokens)
            done[name].seconds.append(time.perf_counter() - begin)
    for name, server in {**servers, **peft}.items():
        done[name].misses = list(server.resident.seconds) if name != "base" else []
    return list(done.values()), differing(model, bank, batches[0], sizes, files)


def differing(
    model: Any, server: BankServer, batch: Sequence[Request], sizes: Sizes, files: Path
) -> int:
    """How many answers of a mixed batch aren't those of the request's adapter alone."""
    mixed = server(batch, sizes.new_tokens)
    count = 0
    for request, tokens in zip(batch, mixed, strict=True):
        alone = ll.prepared(model, ll.load(files / f"{request.adapter}.safetensors"))
        count += not torch.equal(answer(alone, [request], sizes.new_tokens)[0], tokens)
    return count


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the adapters, serve, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="few adapters and requests: shows that it runs"
    )
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--no-peft", action="store_true", help="without PEFT's servers")
    for field, default in vars(Sizes()).items():
        parser.add_argument(f"--{field.replace('_', '-')}", type=int, help=f"default {default}")
    given = vars(parser.parse_args(arguments))
    defaults = vars(QUICK if given["quick"] else Sizes())
    chosen = {name: given[name] or default for name, default in defaults.items()}
    sizes = Sizes(**{**chosen, **({"peft_batches": 0} if given["no_peft"] else {})})
    torch.set_num_threads(2)
    model = llama(sizes.layers, sizes.hidden)
    model.generation_config.pad_token_id = 0
    work = Path(tempfile.mkdtemp())
    files, folders = work / "files", work / "folders"
    files.mkdir()
    folders.mkdir()
    try:
        write_adapters(model, sizes, files)
        done, differ = serve(model, sizes, files, folders)
    finally:
        shutil.rmtree(work)
    tokens = sizes.batch * sizes.new_tokens
    print(
        f"{sizes.adapters} adapters on the disk, {sizes.resident} in memory, batches of "
        f"{sizes.batch} requests x {sizes.new_tokens} tokens\n\n{HEADER}"
    )
    for served in done:
        print(served.line(done[0].seconds, tokens))
    print(f"\nanswers of the first batch that differ from their adapter's alone: {differ}")
    if given["json"]:
        told = {
            "sizes": vars(sizes),
            "servers": [vars(served) for served in done],
            "differ": differ,
            "machine": machine(),
            "versions": versions(),
        }
        given["json"].write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
