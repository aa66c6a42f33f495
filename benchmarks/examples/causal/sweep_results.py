"""What a sweep found: its members, their table, the best of them on all test examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import lora_lite_func as ll

from . import results
from .evaluation import Outcome
from .job import Job

__all__ = ["Member", "Scored", "conclude", "rank", "table"]


@dataclass(frozen=True)
class Member:
    """A point of the grid.

    Attributes:
        name: its values, as text.
        rate: peak learning rate.
        params: the adapter.
    """

    name: str
    rate: float
    params: ll.Adapter


class Scored(NamedTuple):
    """A trained member and what the validation sample gave."""

    member: Member
    outcome: Outcome


def rank(outcome: Outcome, by: str) -> tuple[float, float]:
    """Less is better; what isn't a number is worst."""
    loss = outcome.loss if outcome.loss == outcome.loss else float("inf")
    return (loss, -outcome.score) if by == "loss" else (-outcome.score, loss)


def table(scored: Sequence[Scored], best: Scored) -> str:
    width = max(len(s.member.name) for s in scored)
    lines = [f"{'adapter':<{width}}  {'numbers':>10}  {'loss':>8}  right (validation)"]
    for s in scored:
        mark = "  <- best" if s is best else ""
        lines.append(
            f"{s.member.name:<{width}}  {ll.num_params(s.member.params):>10,}  "
            f"{s.outcome.loss:>8.4f}  {s.outcome.score:.3f}{mark}"
        )
    return "\n".join(lines)


def conclude(
    job: Job, folder: Path, best: Scored, seconds: float, ratio: str, argv: Sequence[str] | None
) -> None:
    """Score the best on all test examples, and write the results."""
    base = job.evaluate((), job.test) if job.args.baseline else None
    final = job.evaluate(best.member.params, job.test)
    before = f"base {base.score:.3f} right; " if base else ""
    print(
        f"of {len(job.test):,} test examples: {before}the best ({best.member.name}) "
        f"{final.score:.3f} right (loss {final.loss:.4f})"
    )
    row = {
        "method": job.args.method,
        "sweep": " ".join(job.args.sweep),
        "best": best.member.name,
        "score": round(final.score, 4),
        "base_score": round(base.score, 4) if base else "",
        "loss": round(final.loss, 5),
        "speed": ratio,
        "model": job.args.model,
        "data": job.hash,
        "commit": results.commit(),
        "peak_mib": round(results.peak_mib(job.args.device)),
        "seconds": round(seconds),
        "folder": str(folder),
        "arguments": " ".join(argv or ()),
    }
    results.write_json(folder / "result.json", row)
    print(
        f"{folder}: the stacks and the best; a line in {results.append_summary(job.args.out, row)}"
    )
