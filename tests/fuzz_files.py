"""A mutation fuzzer over every reader of files: python tests/fuzz_files.py --count 10000

Real files are damaged (bytes flipped, cut, doubled, spliced; values of their JSON replaced by
hostile ones) and read. Each must either be read or give a LoraLiteError (the command line: exit
code 0 or 1), within a bounded time and memory.
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
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import nn

import lora_lite_func as ll
from lora_lite_func.cli.main import main as command

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
    *(
        [],
        {},
        [[]],
        [None],
        {"": None},
        "__class__",
        "(a+)+$",
        ".*" * 40,
        "[",
        "nan",
        "LORA",
        "lora",
        "all-linear",
        ["up"] * 50,
    ),
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
    others = {
        "embed": nn.Embedding(5, 8),
        "conv": nn.Conv1d(4, 6, 3),
        "norm": nn.LayerNorm(8),
        "attn": nn.MultiheadAttention(8, 2),
    }
    experts = nn.ParameterDict({"up": torch.randn(3, 6, 8), "down": torch.randn(3, 8, 6)})
    return nn.ModuleDict({"layers": nn.ModuleList(layers), "experts": experts, **others})


def _kinds(base: nn.Module) -> dict[str, Any]:
    """Adapters of every kind of place, for one PEFT folder each."""
    bare: dict[str, Any] = {
        "target_names": (),
        "target_parameters": ("experts.up", "experts.down", "attn.in_proj_weight"),
    }
    up = ll.LoRAConfig(r=2, target_names=("up",))
    found = {
        "tables": (
            ll.LoRAConfig(r=2, target_kinds=("embedding",)),
            ll.LoRAConfig(r=2, target_kinds=("conv",)),
        ),
        "parameters": (ll.LoRAConfig(r=2, **bare),),
        "whole": (
            up,
            ll.FullConfig(target_parameters=("norm.weight",)),
            ll.TokensConfig(token_ids=(2, 4)),
        ),
        "biases": (
            ll.DoRAConfig(r=2, target_names=("up",)),
            ll.BitFitConfig(target_names=("down",)),
        ),
        "norms": (ll.LNTuningConfig(),),
    }
    return {name: tuple(ll.init(base, c) for c in configs) for name, configs in found.items()}


def targets(home: Path) -> list[Target]:
    """Good files of every form, in folders of their own."""
    base, made = model(), []
    linear: dict[str, Any] = {"target_names": ("up", "down")}
    configs = (
        ll.LoRAConfig(r=2),
        ll.DoRAConfig(r=2),
        ll.OFTConfig(block_size=4),
        ll.VeRAConfig(r=3),
    )
    adapters = [ll.init(base, replace(c, **linear)) for c in configs]
    saved = {
        "one": adapters[0],
        "several": {"a": adapters[1], "b": adapters[2]},
        "stack": ll.stack([adapters[0], adapters[0]]),
        "unlike": ll.stack(
            {"x": adapters[0], "y": ll.init(base, ll.LoRAConfig(r=3, alpha=2.0, **linear))}
        ),
    }
    for name, params in saved.items():
        folder = _made(home / f"ll_{name}")
        ll.save(params, folder / "a.safetensors")
        made.append(
            Target(
                f"ll {name}",
                folder,
                lambda f: (ll.load(f / "a.safetensors"), ll.load(f / "a.safetensors", base)),
            )
        )
        if name != "one":
            made.append(
                Target(
                    f"ll {name} member", folder, lambda f: ll.load(f / "a.safetensors", member=1)
                )
            )
    more = (
        ll.IA3Config(),
        ll.BOFTConfig(block_size=4, m=1),
        ll.AdaLoRAConfig(r=2),
        ll.LoKrConfig(r=2),
        ll.C3AConfig(block_size=4),
    )
    for config in (*configs, *more, ll.SHiRAConfig(r=1), ll.HRAConfig(r=2)):
        folder = _made(home / f"peft_{type(config).__name__}")
        ll.to_peft(ll.init(base, replace(config, **linear)), base, folder)
        made.append(
            Target(f"peft {type(config).__name__}", folder, lambda f: ll.from_peft(f, base))
        )
        made.append(Target(f"peft {type(config).__name__} alone", folder, ll.from_peft))
    for name, parts in _kinds(base).items():
        folder = _made(home / f"kinds_{name}")
        ll.to_peft(parts, base, folder)
        made.append(Target(f"peft {name}", folder, lambda f: ll.from_peft(f, base)))
    folder = _made(home / "pickle")
    ll.to_peft(adapters[0], base, folder)
    torch.save(
        safetensors.torch.load_file(folder / "adapter_model.safetensors"),
        folder / "adapter_model.bin",
    )
    (folder / "adapter_model.safetensors").unlink()
    made.append(Target("peft pickle", folder, lambda f: ll.from_peft(f, base)))
    folder = _made(home / "lite")
    tensors = {f"layers.0.up.{n}": t.contiguous() for n, t in adapters[0]["layers.0.up"].items()}
    cfg = {
        "variant": "lora",
        "r": 2,
        "alpha": 16,
        "dtype": "float32",
        "target_names": [],
        "layers": None,
    }
    print_ = {
        "layers.0.up": f"(12, "
        f"8)|{float(base.get_parameter('layers.0.up.weight').detach().square().sum()):.6e}"
    }
    metadata = {"cfg": json.dumps(cfg), "base_fp": json.dumps(print_)}
    safetensors.torch.save_file(tensors, folder / "a.safetensors", metadata)
    made.append(Target("lora-lite", folder, lambda f: ll.from_lora_lite(f / "a.safetensors", base)))
    folder = _made(home / "kohya")
    flat = {
        f"lora_unet_layers_0_up.lora_{n}.weight": t
        for n, t in zip(("down", "up"), adapters[0]["layers.0.up"].values(), strict=True)
    }
    says = {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 2})}
    safetensors.torch.save_file(
        {**flat, "lora_unet_layers_0_up.alpha": torch.tensor(2.0)}, folder / "a.safetensors", says
    )
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
    ll.to_peft(_kinds(base)["whole"], base, folder / "whole")

    def run(*arguments: str) -> Callable[[Path], Any]:
        def read(f: Path) -> None:
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                code = command([a.replace("@", str(f)) for a in arguments])
            assert code in (0, 1), code

        return read

    return [
        Target("inspect", folder, run("inspect", "@/a.safetensors", "--json")),
        Target("inspect peft", folder, run("inspect", "@/peft")),
        Target("diff", folder, run("diff", "@/a.safetensors", "@/peft")),
        Target("check", folder, run("check", "@/base", "@/peft")),
        Target(
            "convert",
            folder,
            run("convert", "@/peft", "@/b.safetensors", "--to", "ll", "--model", "@/base"),
        ),
        Target("check whole", folder, run("check", "@/base", "@/whole")),
        Target("merge", folder, run("merge", "@/base", "@/a.safetensors", "@/out")),
    ]


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


# ---------------------------------------------------------------------------------------- mutations
def damaged(data: bytes, gen: random.Random, name: str) -> bytes:
    """The file with one fault in it."""
    if name.endswith(".safetensors") and gen.random() < 0.25:
        changed = _retensored(data, gen)
        if changed is not None:
            return changed
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
                spot[gen.randrange(min(len(spot), 400) if gen.random() < 0.5 else len(spot))] = (
                    gen.randrange(256)
                )
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
    """One value of its JSON replaced, removed or added: of a config, of a safetensors header or of
    the metadata in it.
    """
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


def _retensored(data: bytes, gen: random.Random) -> bytes | None:
    """One tensor of another dtype or shape, with numbers that aren't finite, under another name, or
    gone; the file itself stays sound.
    """
    try:
        tensors, metadata = (
            safetensors.torch.load(data),
            json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]]).get("__metadata__"),
        )
    except (safetensors.SafetensorError, ValueError, RecursionError, struct.error):
        return None
    key = gen.choice(sorted(tensors))
    t = tensors.pop(key)
    dtypes = (
        torch.complex64,
        torch.bool,
        torch.int8,
        torch.int64,
        torch.uint16,
        torch.float8_e4m3fn,
        torch.bfloat16,
        torch.float64,
    )
    changes: list[Callable[[], torch.Tensor]] = [
        lambda: t.to(gen.choice(dtypes)),
        lambda: (
            torch.full_like(t, gen.choice((float("nan"), float("inf"), -1e38)))
            if t.is_floating_point()
            else -t
        ),
        *(
            lambda: t[:0] if t.ndim else t,
            lambda: t.flatten(),
            lambda: t[None],
            lambda: t.flatten()[:1].reshape(()),
            lambda: t.mT if t.ndim > 1 else t,
        ),
        *(
            lambda: t[..., :0] if t.ndim else t,
            lambda: torch.cat([t, t]) if t.ndim else t,
            lambda: t[..., None, None],
        ),
    ]
    way = gen.randrange(len(changes) + 2)
    if way < len(changes):
        tensors[key] = changes[way]().contiguous()
    elif way == len(changes):
        ends = (".x", ".default", ".base_layer.lora_A.weight", "", "\u202e")
        tensors[
            gen.choice((key.upper(), key.replace("up", "down"), "x." + key, key.partition(".")[2]))
            + gen.choice(ends)
        ] = t.clone()
    return safetensors.torch.save(tensors, metadata)


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


def _misplaced(file: Path, gen: random.Random) -> None:
    """Another thing where the file should be: nothing, a folder, a link to nowhere, to itself, to a
    device or to a text elsewhere.
    """
    file.unlink()
    way = gen.randrange(6)
    if way == 0:
        file.mkdir()
    elif way < 5:
        file.symlink_to(("/nowhere/at/all", file.name, "/dev/null", "/etc/hostname")[way - 1])


# ------------------------------------------------------------------------------------------ running
def attempt(target: Target, gen: random.Random, work: Path) -> str:
    """One damaged copy, read: "read", or the error's name; what it may not do raises."""
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(target.folder, work / "in")
    file = gen.choice(sorted(p for p in (work / "in").rglob("*") if p.is_file()))
    if gen.random() < 0.05:
        _misplaced(file, gen)
    else:
        file.write_bytes(damaged(file.read_bytes(), gen, file.name))
    began = time.process_time()
    try:
        target.read(work / "in")
        outcome = "read"
    except ll.LoraLiteError as error:
        outcome = type(error).__name__
    took = time.process_time() - began  # of this process alone, however busy the machine is
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
    # a header that asks for more is a MemoryError, which is a fault
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    outcomes: Counter[str] = Counter()
    faults = 0
    with tempfile.TemporaryDirectory() as home:
        every = targets(Path(home))
        for i in range(given.count):
            target = every[i % len(every)]
            try:
                outcomes[
                    attempt(target, random.Random(f"{given.seed} {i}"), Path(home) / "work")
                ] += 1
            except Exception as error:
                faults += 1
                print(
                    f"seed {given.seed} number {i}: {target.name}: {type(error).__name__}: "
                    f"{str(error)[:300]}",
                    flush=True,
                )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(
        f"{given.count} files over {len(every)} readers: {dict(outcomes.most_common())}, "
        f"{faults} faults, peak {peak:.0f} MiB"
    )
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
