"""AdaMSS's allocation of subspaces as pure functions: start, then allocate after each step.

    schedule = ll.adamss.Schedule(target=20, first_step=50, last_step=1000)
    state = ll.adamss.start(params, schedule)
    # after the optimizer's step, with that step's gradients
    params, state = ll.adamss.allocate(params, grads, state, step)

A subspace is one cluster's A_k with its rows of B. Its importance is the mean over A_k of the
smoothed |p * dL/dp| times its smoothed deviation, plus that over its rows of B, counted anew after
each choice. The least important of all layers together are frozen as they are, for good, until only
the target is trained. Paper: AdaMSS, NeurIPS 2025, openreview 8ZdWmpYxT0. (PEFT's choice leaves one
fewer than the target, as it keeps what is above the last one's importance.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.adapter import Adapter, replace
from ..core.errors import ConfigError, StructureError
from ..kernels.positions import decoded
from .alike import check_method
from .importance import best_of_all, zeros_like

__all__ = ["Schedule", "State", "allocate", "budget", "start"]

_TRAINED = ("lora_A", "lora_B")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When and how far the number of trained subspaces falls.

    Args:
        target: how many are trained at the end, of all layers together.
        first_step: the step from which importance is counted.
        last_step: the last step that may freeze some.
        interval: steps between two choices, which are made at its multiples and at the last step.
        exponent: how fast the number falls; 1 is a straight line.
        beta1: smoothing of the sensitivity.
        beta2: smoothing of its deviation.

    Raises:
        ConfigError: a number is out of range.
    """

    target: int = 50
    first_step: int = 50
    last_step: int = 1000
    interval: int = 100
    exponent: float = 3.0
    beta1: float = 0.85
    beta2: float = 0.85

    def __post_init__(self) -> None:
        if not 0 <= self.first_step < self.last_step:
            raise ConfigError(f"Schedule: expected 0 <= first_step < last_step, found {self}")
        if self.target < 1 or self.interval < 1 or self.exponent <= 0:
            raise ConfigError(
                f"Schedule: expected target and interval of at least 1 and an exponent above 0, "
                f"found {self}"
            )
        if not 0 <= self.beta1 < 1 or not 0 <= self.beta2 < 1:
            raise ConfigError(f"Schedule: expected betas in [0, 1), found {self}")


@dataclass(frozen=True)
class State:
    """What is carried from step to step: the schedule, two running means shaped like what is
    trained, which subspaces still are (K,), and the values of those that aren't.
    """

    schedule: Schedule
    sensitivity: Mapping[str, Mapping[str, Tensor]]
    uncertainty: Mapping[str, Mapping[str, Tensor]]
    keep: Mapping[str, Tensor]
    frozen: Mapping[str, Mapping[str, Tensor]]


def start(params: Adapter, schedule: Schedule) -> State:
    """The state before the first step.

    Raises:
        StructureError: not an AdaMSS adapter, a site is a stack of weights, or the target is above
            the number of subspaces.
    """
    check_method(params, "adamss", "ll.AdaMSSConfig", "adamss")
    stacked = next((site.path for site in params.sites.values() if site.num_experts), None)
    if stacked is not None:
        raise StructureError(
            f"adamss: site {stacked!r} is a stack of weights, in which subspaces aren't allocated; "
            f"leave it out with exclude_names"
        )
    keep = {
        path: torch.ones(len(ts["lora_A"]), dtype=torch.bool, device=ts["lora_A"].device)
        for path, ts in params.items()
    }
    total = sum(len(mask) for mask in keep.values())
    if schedule.target > total:
        raise StructureError(
            f"adamss: expected a target of at most the {total} subspaces, found {schedule.target}"
        )
    zeros, now = _zeros(params), {path: dict(ts) for path, ts in params.items()}
    return State(schedule, zeros, zeros, keep, now)


def budget(schedule: Schedule, total: int, step: int) -> int:
    """How many of `total` subspaces are trained after a step (counted from 1): `total` at first,
    the target at last, a power of what is left of the time between.
    """
    left = 1.0 - (step - schedule.first_step) / (schedule.last_step - schedule.first_step)
    left = min(max(left, 0.0), 1.0)
    return int(schedule.target + (total - schedule.target) * left**schedule.exponent)


@torch.no_grad()
def allocate(params: Adapter, grads: Any, state: State, step: int) -> tuple[Adapter, State]:
    """The adapter with frozen subspaces as they were when they were frozen, and the next state.

    Args:
        params: the adapter after the optimizer's step, all of it.
        grads: path -> {lora_name: gradient} of that step, an Adapter as `torch.func.grad` gives it
            or any mapping like it.
        state: from `start` or the step before.
        step: number of this step, from 1.

    Raises:
        StructureError: not an AdaMSS adapter.
    """
    check_method(params, "adamss", "ll.AdaMSSConfig", "adamss")
    schedule = state.schedule
    data = {path: _with_frozen(ts, state, path) for path, ts in params.items()}
    made = replace(params, data)
    if not schedule.first_step <= step <= schedule.last_step:
        return made, state
    mean, deviation = _counted(data, grads, state)
    keep, frozen = state.keep, state.frozen
    if step % schedule.interval == 0 or step == schedule.last_step:
        keep = _choose(data, mean, deviation, state, step)
        mean = deviation = _zeros(params)
        # clones, since an optimizer may write on the adapter
        frozen = {path: {n: ts[n].clone() for n in _TRAINED} for path, ts in data.items()}
    return made, State(schedule, mean, deviation, keep, frozen)


def _with_frozen(ts: Mapping[str, Tensor], state: State, path: str) -> dict[str, Tensor]:
    """A site's tensors with those of frozen subspaces put back."""
    held, keep = state.frozen[path], state.keep[path]
    rows = keep[_cluster(ts)]
    return {
        **ts,
        "lora_A": torch.where(keep[:, None, None], ts["lora_A"], held["lora_A"]),
        "lora_B": torch.where(rows[:, None], ts["lora_B"], held["lora_B"]),
    }


def _counted(
    data: Mapping[str, Mapping[str, Tensor]], grads: Any, state: State
) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
    """The two running means with this step's sensitivity in."""
    schedule = state.schedule
    mean: dict[str, dict[str, Tensor]] = {}
    deviation: dict[str, dict[str, Tensor]] = {}
    for path, ts in data.items():
        now = {n: (ts[n] * grads[path][n]).abs().float() for n in _TRAINED}
        before, spread = state.sensitivity[path], state.uncertainty[path]
        # of the mean before this step, as in the released code
        deviation[path] = {
            n: torch.lerp((v - before[n]).abs(), spread[n], schedule.beta2) for n, v in now.items()
        }
        mean[path] = {n: torch.lerp(v, before[n], schedule.beta1) for n, v in now.items()}
    return mean, deviation


def _choose(
    data: Mapping[str, Mapping[str, Tensor]],
    mean: Any,
    deviation: Any,
    state: State,
    step: int,
) -> dict[str, Tensor]:
    """A mask for each site of the best subspaces that are still trained, of all layers together."""
    scores = {}
    for path, ts in data.items():
        s = {n: mean[path][n] * deviation[path][n] for n in _TRAINED}
        cluster, (K, q, r) = _cluster(ts), s["lora_A"].shape
        size = torch.bincount(cluster, minlength=K)
        own_q = size.clamp(1, q)  # a smaller cluster has no more directions than outputs
        of_A = s["lora_A"].sum((1, 2)) / (own_q * r)  # (K,)
        of_B = torch.zeros_like(of_A).index_add(0, cluster, s["lora_B"].sum(1))
        score = of_A + of_B / (own_q * size.clamp(min=1))
        scores[path] = score.masked_fill(~state.keep[path], -torch.inf)
    trained = sum(int(mask.sum()) for mask in state.keep.values())
    return best_of_all(scores, lambda total: min(budget(state.schedule, total, step), trained))


def _cluster(ts: Mapping[str, Tensor]) -> Tensor:
    """(d_out,) which subspace each output is of."""
    return decoded(ts["lora_cluster"], len(ts["lora_A"]))


def _zeros(params: Adapter) -> dict[str, dict[str, Tensor]]:
    return zeros_like({path: {n: ts[n] for n in _TRAINED} for path, ts in params.items()})
