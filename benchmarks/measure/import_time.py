"""What `import lora_lite_func` adds to `import torch`, each in a process of its own, in turn."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

from .harness import Row, Suite

PROGRAMS = {
    "torch": "import torch",
    "again": "import torch",
    "ours": "import lora_lite_func",
    "PEFT": "import peft",
}


def area(suite: Suite) -> Iterator[Row]:
    """Median of the differences, in seconds."""
    spent: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for _ in range(2 if suite.quick else 15):
        for name, program in PROGRAMS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
            spent[name].append(time.perf_counter() - start)

    def over(name: str) -> float:
        return statistics.median(a - b for a, b in zip(spent[name], spent["torch"], strict=True))

    guard = statistics.median(a / b for a, b in zip(spent["again"], spent["torch"], strict=True))
    yield Row(
        "import, seconds more than torch's",
        over("ours"),
        "seconds",
        0.1,
        guard=guard,
        peers={"PEFT": over("PEFT")},
    )
