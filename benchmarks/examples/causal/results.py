"""What runs leave behind. Each has a new folder, and a line in summary.tsv; nothing is replaced."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from .data import Example
from .evaluation import Outcome

__all__ = [
    "append_json_line",
    "append_summary",
    "commit",
    "examples_text",
    "json_lines",
    "new_folder",
    "peak_mib",
    "write_json",
]


def new_folder(out: Path, name: str) -> Path:
    """A new folder <time>-<name> in `out`; with a number behind it where that is taken."""
    stamp = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    for number in range(10_000):
        folder = out / f"{stamp}-{name}{f'-{number}' if number else ''}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise SystemExit(f"{out}: no name is left for a run's folder")


def write_json(file: Path, data: Any) -> None:
    """Write JSON whole or not at all."""
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(data, indent=2, default=str) + "\n", encoding="utf-8")
    os.replace(part, file)


def append_json_line(file: Path, data: Mapping[str, Any]) -> None:
    """Add a line to a file of JSON lines."""
    with file.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(data, ensure_ascii=False) + "\n")


def json_lines(file: Path) -> list[dict[str, Any]]:
    """The lines of such a file; none where it isn't there yet."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def append_summary(out: Path, row: Mapping[str, Any]) -> Path:
    """Add a row to summary.tsv, under a lock; other columns than the file has go to a new file,
    summary-2.tsv and so on.
    """
    names = [*row]
    with (out / ".summary.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        number = 1
        while True:
            file = out / f"summary{f'-{number}' if number > 1 else ''}.tsv"
            if not file.exists() or _header(file) == names:
                break
            number += 1
        fresh = not file.exists()
        with file.open("a", encoding="utf-8", newline="") as handle:
            writer = csv.writer(handle, delimiter="\t", lineterminator="\n")
            if fresh:
                writer.writerow(names)
            writer.writerow(row.values())
    return file


def _header(file: Path) -> list[str]:
    with file.open(encoding="utf-8", newline="") as handle:
        return next(csv.reader(handle, delimiter="\t"), [])


def commit() -> str:
    """The commit of the code that runs, "+" behind it where files differ; "unknown" without git."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + "+" * bool(
            git("status", "--porcelain", "--untracked-files=no")
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def peak_mib(device: str) -> float:
    """The most memory that was in use: of the device, or of the process on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def examples_text(examples: Sequence[Example], outcome: Outcome, count: int) -> str:
    """The first examples with what was generated and asked for."""
    lines = []
    for example, text, right in list(zip(examples, outcome.texts, outcome.right, strict=True))[
        :count
    ]:
        asked = example.prompt if isinstance(example.prompt, str) else example.prompt[-1].content
        lines.append(
            f"  {'right' if right else 'wrong'}  {_short(asked)} -> {_short(text)} "
            f"(asked for {_short(example.response)})"
        )
    return "\n".join(lines)


def _short(text: str, most: int = 100) -> str:
    shown = repr(text)
    return shown if len(shown) <= most else f"{shown[: most // 2]} ... {shown[-most // 2 :]}"
