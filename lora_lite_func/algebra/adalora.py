"""AdaLoRA's schedule as pure functions: start, allocate after each step, prune at the end.

    schedule = ll.adalora.Schedule(total_steps=1000, initial_steps=100, final_steps=300)
    state = ll.adalora.start(params, schedule)
    loss = task_loss + 0.1 * ll.adalora.orthogonality(params)
    # after the optimizer's step, with that step's gradients
    params, state = ll.adalora.allocate(params, grads, state, step)
    small = ll.adalora.prune(params)

A triplet is one singular value with its two vectors. Its importance is the smoothed |p * dL/dp|
times its smoothed deviation, of the value itself plus the means over the vectors. The least
important of all layers together are set to zero until only the budget is left. Paper: Zhang et al.
2023, arXiv 2303.10512 (equations 7 to 12; the released code's cubic, as equation 12 has a slip in
its numerator).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.adapter import Adapter, replace
from ..core.errors import ConfigError, StructureError
from ..core.layout import Layout
from .alike import check_method
from .importance import best_of_all, zeros_like

__all__ = ["Schedule", "State", "allocate", "budget", "orthogonality", "prune", "start"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When and how far the budget falls.

    Args:
        total_steps: optimizer steps of the whole training.
        target_r: average rank at the end.
        initial_steps: steps at the full rank.
        final_steps: steps at the target, with the choice frozen.
        interval: steps between two choices.
        beta1: smoothing of the sensitivity.
        beta2: smoothing of its deviation.

    Raises:
        ConfigError: the phases don't fit into the whole, or a number is out of range.
    """

    total_steps: int
    target_r: int = 4
    initial_steps: int = 0
    final_steps: int = 0
    interval: int = 10
    beta1: float = 0.85
    beta2: float = 0.85

    def __post_init__(self) -> None:
        if (
            min(self.initial_steps, self.final_steps) < 0
            or self.initial_steps + self.final_steps >= self.total_steps
        ):
            raise ConfigError(
                f"Schedule: expected initial_steps + final_steps < total_steps, all of them at "
                f"least 0, found {self}"
            )
        if (
            self.target_r < 1
            or self.interval < 1
            or not 0 <= self.beta1 < 1
            or not 0 <= self.beta2 < 1
        ):
            raise ConfigError(
                f"Schedule: expected target_r and interval of at least 1 and betas in [0, 1), "
                f"found {self}"
            )


@dataclass(frozen=True)
class State:
    """What is carried from step to step: the schedule, two running means shaped like the adapter,
    and which triplets are in.
    """

    schedule: Schedule
    sensitivity: Mapping[str, Mapping[str, Tensor]]
    uncertainty: Mapping[str, Mapping[str, Tensor]]
    keep: Mapping[str, Tensor]


def start(params: Adapter, schedule: Schedule) -> State:
    """The state before the first step.

    Raises:
        StructureError: not an AdaLoRA adapter, or the target is above the rank it starts with.
    """
    check_method(params, "adalora", "ll.AdaLoRAConfig", "adalora")
    average = sum(site.r for site in params.sites.values()) / len(params)
    if schedule.target_r > average:
        raise StructureError(
            f"adalora: expected target_r of at most the starting rank {average:g}, found "
            f"{schedule.target_r}"
        )
    zeros = zeros_like(params)
    keep = {path: torch.ones_like(ts["lora_E"], dtype=torch.bool) for path, ts in params.items()}
    return State(schedule, zeros, zeros, keep)


def budget(schedule: Schedule, total: int, sites: int, step: int) -> int:
    """How many triplets are left at a step (counted from 1): `total` at first, target_r * sites at
    last, a cubic between.
    """
    target = schedule.target_r * sites
    if step <= schedule.initial_steps:
        return total
    if step > schedule.total_steps - schedule.final_steps:
        return target
    share = (step - schedule.initial_steps) / (
        schedule.total_steps - schedule.initial_steps - schedule.final_steps
    )
    return int(target + (total - target) * (1.0 - share) ** 3)


@torch.no_grad()
def allocate(params: Adapter, grads: Any, state: State, step: int) -> tuple[Adapter, State]:
    """The adapter with the least important triplets at zero, and the next state. Vectors stay, so a
    triplet may come back.

    Args:
        params: the adapter after the optimizer's step.
        grads: path -> {lora_name: gradient} of that step, an Adapter as `torch.func.grad` gives it
            or any mapping like it.
        state: from `start` or the step before.
        step: number of this step, from 1.

    Raises:
        StructureError: not an AdaLoRA adapter.
    """
    check_method(params, "adalora", "ll.AdaLoRAConfig", "adalora")
    schedule = state.schedule
    mean: dict[str, dict[str, Tensor]] = {}
    deviation: dict[str, dict[str, Tensor]] = {}
    for path, ts in params.items():
        now = {name: (t * grads[path][name]).abs().float() for name, t in ts.items()}
        mean[path] = {
            n: torch.lerp(v, state.sensitivity[path][n], schedule.beta1) for n, v in now.items()
        }
        deviation[path] = {
            n: torch.lerp((v - mean[path][n]).abs(), state.uncertainty[path][n], schedule.beta2)
            for n, v in now.items()
        }
    last = schedule.total_steps - schedule.final_steps + 1  # its choice is kept from there on
    due = schedule.initial_steps < step < last and step % schedule.interval == 0
    keep = state.keep
    if due or step == last:
        keep = _choose(params, mean, deviation, step, schedule)
    data = {
        path: {**ts, "lora_E": torch.where(keep[path], ts["lora_E"], 0.0)}
        for path, ts in params.items()
    }
    return replace(params, data), State(schedule, mean, deviation, keep)


def _choose(
    params: Adapter, mean: Any, deviation: Any, step: int, schedule: Schedule
) -> dict[str, Tensor]:
    """A mask for each site of the best triplets, chosen from all layers together."""
    scores = {}
    for path in params:
        s = {name: mean[path][name] * deviation[path][name] for name in mean[path]}
        scores[path] = s["lora_E"] + s["lora_A"].mean(dim=1) + s["lora_B"].mean(dim=0)  # (r,)
    return best_of_all(scores, lambda total: budget(schedule, total, len(scores), step))


def orthogonality(params: Adapter) -> Tensor:
    """The penalty to add to the loss (usual weight 0.1 to 0.5): the mean of |P^T P - I| and |Q Q^T
    - I| over all sites, Frobenius.

    Raises:
        StructureError: not an AdaLoRA adapter.
    """
    check_method(params, "adalora", "ll.AdaLoRAConfig", "adalora")
    norms = []
    for ts in params.values():
        eye = torch.eye(ts["lora_E"].numel(), dtype=ts["lora_A"].dtype, device=ts["lora_A"].device)
        norms += [
            (ts["lora_A"] @ ts["lora_A"].mT - eye).norm(),
            (ts["lora_B"].mT @ ts["lora_B"] - eye).norm(),
        ]
    return torch.stack(norms).mean()


def prune(params: Adapter) -> Adapter:
    """The same function in fewer numbers: triplets whose value is zero dropped, and sites that have
    none left.

    Raises:
        StructureError: not an AdaLoRA adapter, or nothing would be left.
    """
    check_method(params, "adalora", "ll.AdaLoRAConfig", "adalora")
    sites, data = [], {}
    for path, ts in params.items():
        kept = ts["lora_E"].detach() != 0
        r = int(kept.sum())
        if r:
            old = params.sites[path]
            # alpha shrinks with r, so that the scale alpha / r stays what it was
            sites.append(dataclasses.replace(old, r=r, alpha=old.alpha * r / old.r))
            data[path] = {
                "lora_A": ts["lora_A"][kept],
                "lora_E": ts["lora_E"][kept],
                "lora_B": ts["lora_B"][:, kept].contiguous(),
            }
    if not sites:
        raise StructureError(
            "adalora.prune: every singular value is zero, so nothing would be left; train it first"
        )
    exact = {site.path: f"^{re.escape(site.path)}$" for site in sites}
    config = dataclasses.replace(
        params.config,
        rank_pattern=tuple((exact[site.path], site.r) for site in sites),
        alpha_pattern=tuple((exact[site.path], site.alpha) for site in sites),
    )
    return Adapter(Layout(params.layout.variant, config, sites), data)
