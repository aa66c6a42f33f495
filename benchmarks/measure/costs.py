"""What operations cost on a device, in the units of kernels/cost.py: where its numbers come from.

python -m benchmarks.measure.costs [--device cuda]
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

SECONDS = 0.15
"""For each operation."""


def seconds(call: Callable[[], object], device: str) -> float:
    """The time of one call of many in a row: of its launches, where those take longer on a GPU."""

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        call()
    wait()
    best, repeats = float("inf"), 1
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        wait()
        took = time.perf_counter() - start
        best = min(best, took / repeats)
        repeats = max(repeats, min(1000, int(0.02 / max(took / repeats, 1e-7))))
    return best


def fit(rows: Iterable[tuple[list[float], float]]) -> list[float]:
    """Least squares of relative errors: coefficients c with row . c near to the time."""
    weighted = [([v / t for v in values], 1.0) for values, t in rows]
    A = torch.tensor([values for values, _ in weighted], dtype=torch.float64)
    found = torch.linalg.lstsq(A, torch.ones(len(weighted), 1, dtype=torch.float64))
    return found.solution[:, 0].tolist()


def passes(device: str) -> tuple[float, float]:
    """(a multiply-add of a large product in seconds, an elementwise pass per number in those)."""
    n = 2048 if device == "cpu" else 4096
    a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    unit = seconds(lambda: a @ b, device) / n**3
    return unit, seconds(lambda: torch.addcmul(a, a, b), device) / n**2 / unit


def copied_weight(device: str, unit: float) -> list[str]:
    """By how much more of a rank W' = W + s B A costs than its product, and where it pays."""
    lines = []
    for (d_in, d_out), r in itertools.product([(1024, 1024), (4096, 4096), (1024, 4096)], (8, 64)):
        W = torch.randn(d_out, d_in, device=device)
        A, B = torch.randn(r, d_in, device=device), torch.randn(d_out, r, device=device)
        build = seconds(lambda: torch.addmm(W, B, A, alpha=2.0), device)  # noqa: B023
        more = build / unit / (d_in * d_out) - r
        crossing = None
        for tokens in (64, 128, 256, 512, 1024, 2048, 4096):
            x = torch.randn(tokens, d_in, device=device)

            def beside() -> Tensor:
                y = torch.nn.functional.linear(x, W)  # noqa: B023
                return y.addmm_(torch.nn.functional.linear(x, A), B.mT, alpha=2.0)  # noqa: B023

            def whole() -> Tensor:
                return torch.nn.functional.linear(x, torch.addmm(W, B, A, alpha=2.0))  # noqa: B023

            if seconds(whole, device) < seconds(beside, device):
                crossing = tokens
                break
        if crossing is None:
            lines.append(f"{d_in} -> {d_out}, r={r}: {more:.0f} ranks more; never pays")
            continue
        fitting = crossing * (d_in + d_out) * r / (d_in * d_out) - r
        lines.append(
            f"{d_in} -> {d_out}, r={r}: {more:.0f} ranks more; pays from {crossing} tokens on, "
            f"as with {fitting:.0f}"
        )
    return lines


def segments(device: str) -> dict[str, float]:
    """A run, a member and a copied row beside a row's token on an adapter; bands likewise."""
    d, found = 1024, []
    for members, width, r in itertools.product((1, 4, 16), (1, 4, 16, 64), (8, 16, 32, 64)):
        A, B = torch.randn(members, r, d, device=device), torch.randn(members, d, r, device=device)
        X, y = (torch.randn(members, width, d, device=device) for _ in range(2))

        def onto() -> Tensor:
            h = torch.bmm(A, X.mT)  # noqa: B023
            return y.baddbmm_(h.mT, B.mT, alpha=0.1)  # noqa: B023

        found.append((members, width, r, seconds(onto, device)))
    call, member, token = fit(([1.0, m, m * n], t) for m, n, r, t in found if r in (8, 16))
    rank = fit(([1.0, m, m * r, m * n, m * n * r], t) for m, n, r, t in found)
    X, order = torch.randn(256, d, device=device), torch.randperm(256, device=device)
    copy = seconds(lambda: X.index_select(0, order), device) / 256
    base, of_member, of_member_rank, of_row, of_row_rank = rank
    return {
        "run in tokens": call / token,
        "member in tokens": member / token,
        "copies like a token on an adapter": token / copy,
        "band: call in rows at rank 20": base / (of_row + 20 * of_row_rank),
        "band: member in rows": (of_member + 20 * of_member_rank) / (of_row + 20 * of_row_rank),
        "band: rows read and written, in ranks": of_row / of_row_rank,
    }


def main() -> None:
    """Print them all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    device = parser.parse_args().device
    name = (
        torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    )
    print(f"torch {torch.__version__}, {device}: {name}")
    with torch.inference_mode():
        unit, elementwise = passes(device)
        print(f"multiply-add {unit * 1e12:.2f} ps, elementwise {elementwise:.0f}")
        for line in copied_weight(device, unit):
            print(line)
        for what, value in segments(device).items():
            print(f"{what}: {value:.1f}")


if __name__ == "__main__":
    main()
