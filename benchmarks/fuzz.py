"""A mutation fuzzer over every reader of files: python -m benchmarks.fuzz --count 10000

Real files are damaged (bytes flipped, cut, doubled, spliced; values of their JSON replaced by hostile ones) and read. Each must either be
read or give a LoraLiteError (the command line: exit code 0 or 1), within a bounded time and memory.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import nn

import lora_lite_func as ll
from lora_lite_func.commands import main as command

HOSTILE: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2**31,
        2**63,
        -(2**63),
        10**400,
        0.5,
        1e308,
        -0.0,
        "",
        "x",
        "a" * 5000,
        "\0",
        "../../etc/passwd",
        "/tmp/x",
    ),
    *([], {}, [[]], [None], {"": None}, "__class__", "(a+)+$", ".*" * 40, "[", "nan", "LORA", "lora", "all-linear", ["up"] * 50),
)
_SLOW = 20.0  # seconds for one file: they are of kilobytes


class Target(NamedTuple):
    """A reader and a good file for it: the file names to damage are those in the folder."""

    name: str
    folder: Path
    read: Callable[[Path], Any]


def model() -> nn.Module:
    """A small base."""
    torch.manual_seed(0)
    layers = [nn.ModuleDict({"up": nn.Linear(8, 12), "down": nn.Linear(12, 8)}) for _ in range(2)]
    return nn.ModuleDict({"layers": nn.ModuleList(layers), "embed": nn.Embedding(5, 8)})


def targets(home: Path) -> list[Target]:
    """Good files of every form, in folders of their own."""
    base, made = model(), []
    adapters = [ll.init(base, c) for c in (ll.LoRAConfig(r=2), ll.DoRAConfig(r=2), ll.OFTConfig(block_size=4), ll.VeRAConfig(r=3))]
    saved = {
        "one": adapters[0],
        "several": {"a": adapters[1], "b": adapters[2]},
        "stack": ll.stack([adapters[0], adapters[0]]),
        "unlike": ll.stack({"x": adapters[0], "y": ll.init(base, ll.LoRAConfig(r=3, alpha=2.0))}),
    }
    for name, params in saved.items():
        folder = _made(home / f"ll_{name}")
        ll.save(params, folder / "a.safetensors")
        made.append(Target(f"ll {name}", folder, lambda f: (ll.load(f / "a.safetensors"), ll.load(f / "a.safetensors", base))))
        if name != "one":
            made.append(Target(f"ll {name} member", folder, lambda f: ll.load(f / "a.safetensors", member=1)))
    configs = (ll.LoRAConfig(r=2), ll.DoRAConfig(r=2), ll.IA3Config(), ll.OFTConfig(block_size=4), ll.BOFTConfig(block_size=4, m=1))
    for config in (*configs, ll.AdaLoRAConfig(r=2), ll.LoKrConfig(r=2), ll.C3AConfig(block_size=4), ll.SHiRAConfig(r=1), ll.HRAConfig(r=2)):
        folder = _made(home / f"peft_{type(config).__name__}")
        ll.to_peft(ll.init(base, config), base, folder)
        made.append(Target(f"peft {type(config).__name__}", folder, lambda f: ll.from_peft(f, base)))
        made.append(Target(f"peft {type(config).__name__} alone", folder, ll.from_peft))
    folder = _made(home / "pickle")
    ll.to_peft(adapters[0], base, folder)
    torch.save(safetensors.torch.load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    made.append(Target("peft pickle", folder, lambda f: ll.from_peft(f, base)))
    folder = _made(home / "lite")
    tensors = {f"layers.0.up.{n}": t.contiguous() for n, t in adapters[0]["layers.0.up"].items()}
    cfg = {"variant": "lora", "r": 2, "alpha": 16, "dtype": "float32", "target_names": [], "layers": None}
    print_ = {"layers.0.up": f"(12, 8)|{float(base.get_parameter('layers.0.up.weight').detach().square().sum()):.6e}"}
    metadata = {"cfg": json.dumps(cfg), "base_fp": json.dumps(print_)}
    safetensors.torch.save_file(tensors, folder / "a.safetensors", metadata)
    made.append(Target("lora-lite", folder, lambda f: ll.from_lora_lite(f / "a.safetensors", base)))
    folder = _made(home / "kohya")
    flat = {f"lora_unet_layers_0_up.lora_{n}.weight": t for n, t in zip(("down", "up"), adapters[0]["layers.0.up"].values(), strict=True)}
    safetensors.torch.save_file({**flat, "lora_unet_layers_0_up.alpha": torch.tensor(2.0)}, folder / "a.safetensors")
    made.append(Target("kohya", folder, lambda f: ll.from_diffusion(f / "a.safetensors", base)))
    return made + _commands(home, base, adapters[0])


def _commands(home: Path, base: nn.Module, params: ll.Adapter) -> list[Target]:
    folder = _made(home / "commands")
    ll.save(params, folder / "a.safetensors")
    ll.to_peft(params, base, folder / "peft")
    (folder / "base").mkdir()
    state = {k: t.contiguous() for k, t in base.state_dict().items()}
    safetensors.torch.save_file(state, folder / "base" / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(state, "model-00001-of-00001.safetensors")}
    (folder / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "base" / "config.json").write_text('{"model_type": "toy"}')

    def run(*arguments: str) -> Callable[[Path], Any]:
        def read(f: Path) -> None:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                code = command([a.replace("@", str(f)) for a in arguments])
            assert code in (0, 1), code

        return read

    return [
        Target("inspect", folder, run("inspect", "@/a.safetensors", "--json")),
        Target("inspect peft", folder, run("inspect", "@/peft")),
        Target("diff", folder, run("diff", "@/a.safetensors", "@/peft")),
        Target("check", folder, run("check", "@/base", "@/peft")),
        Target("convert", folder, run("convert", "@/peft", "@/b.safetensors", "--to", "ll", "--model", "@/base")),
        Target("merge", folder, run("merge", "@/base", "@/a.safetensors", "@/out")),
    ]


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


# ------------------------------------------------------------------------------------------------------------- mutations
def damaged(data: bytes, gen: random.Random, name: str) -> bytes:
    """The file with one fault in it."""
    if gen.random() < 0.6:
        changed = _structured(data, gen, name)
        if changed is not None:
            return changed
    i, j = sorted(gen.randrange(len(data) + 1) for _ in range(2))
    way = gen.randrange(6)
    if way == 0:
        spot = bytearray(data)
        for _ in range(gen.choice((1, 1, 3, 30))):
            if spot:
                spot[gen.randrange(min(len(spot), 400) if gen.random() < 0.5 else len(spot))] = gen.randrange(256)
        return bytes(spot)
    if way == 1:
        return data[:i]
    if way == 2:
        return data[:i] + data[j:]
    if way == 3:
        return data[:j] + data[i:j] + data[j:]
    if way == 4:
        return data[:i] + gen.randbytes(gen.choice((1, 8, 200))) + data[i:]
    return struct.pack("<Q", gen.choice((0, 1, 2**20, 2**31, 2**63, 2**64 - 1))) + data[8:]


def _structured(data: bytes, gen: random.Random, name: str) -> bytes | None:
    """One value of its JSON replaced, removed or added: of a config, of a safetensors header or of the metadata in it."""
    try:
        if name.endswith(".json"):
            return json.dumps(_altered(json.loads(data), gen)).encode()
        if not name.endswith(".safetensors"):
            return None
        size = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + size])
        metadata = header.get("__metadata__", {})
        inner = [k for k, v in metadata.items() if v.startswith("{")]
        if inner and gen.random() < 0.7:
            key = gen.choice(inner)
            metadata[key] = json.dumps(_altered(json.loads(metadata[key]), gen))
        else:
            header = _altered(header, gen)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + size :]
    except (ValueError, KeyError, AttributeError, struct.error, RecursionError):
        return None


def _altered(value: Any, gen: random.Random, depth: int = 0) -> Any:
    if isinstance(value, dict) and value and (depth == 0 or gen.random() < 0.8):
        key = gen.choice(list(value))
        way = gen.random()
        if way < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if way < 0.2:
            return {**value, gen.choice(("r", "x", key + ".x", "")): gen.choice(HOSTILE)}
        return {**value, key: _altered(value[key], gen, depth + 1)}
    if isinstance(value, list) and value and gen.random() < 0.8:
        i = gen.randrange(len(value))
        way = gen.random()
        if way < 0.1:
            return value[:i] + value[i + 1 :]
        if way < 0.2:
            return value + value[i : i + 1]
        return [*value[:i], _altered(value[i], gen, depth + 1), *value[i + 1 :]]
    if isinstance(value, int) and not isinstance(value, bool) and gen.random() < 0.5:
        return gen.choice((value + 1, value - 1, value * 2, -value, 2**31 - 1))
    return gen.choice(HOSTILE)


# --------------------------------------------------------------------------------------------------------------- running
def attempt(target: Target, gen: random.Random, work: Path) -> str:
    """One damaged copy, read: "read", or the error's name; what it may not do raises."""
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(target.folder, work / "in")
    file = gen.choice(sorted(p for p in (work / "in").rglob("*") if p.is_file()))
    file.write_bytes(damaged(file.read_bytes(), gen, file.name))
    began = time.monotonic()
    try:
        target.read(work / "in")
        outcome = "read"
    except ll.LoraLiteError as error:
        outcome = type(error).__name__
    took = time.monotonic() - began
    assert took < _SLOW, f"{target.name}: {took:.0f} s"
    strange = [p for p in work.iterdir() if p.name != "in"]
    assert not strange, f"{target.name} wrote {strange}"
    return outcome


def main() -> None:
    """Run it; every fault is printed with its seed, and the exit code is 1 if there was one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    size = 8 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (size, size))  # a header that asks for more is a MemoryError, which is a fault
    outcomes: Counter[str] = Counter()
    faults = 0
    with tempfile.TemporaryDirectory() as home:
        every = targets(Path(home))
        for i in range(given.count):
            target = every[i % len(every)]
            try:
                outcomes[attempt(target, random.Random(f"{given.seed} {i}"), Path(home) / "work")] += 1
            except Exception as error:
                faults += 1
                print(f"seed {given.seed} number {i}: {target.name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"{given.count} files over {len(every)} readers: {dict(outcomes.most_common())}, {faults} faults, peak {peak:.0f} MiB")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
