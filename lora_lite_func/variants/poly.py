"""Poly: every task's LoRA is a mixture of a few shared skills; with splits, MHR.

    y' = y + s (x A_t^T) B_t^T        s = alpha / r
    A_t = [sum over q of w_tpq A_pq] side by side over p, A_pq (r, d_in / P)
    B_t = [sum over q of w_tpq B_pq] one below the other over p, B_pq (d_out / P, r)
    w_tp = sigmoid(Z_tp) / sum over q of sigmoid(Z_tpq), Z (tasks, P Q)

With one split (P = 1) it is Polytropon, with more Multi-Head Routing: each part of the input and of
the output has its own mixture. `ll.tasks` gives the tasks' LoRAs, of which `ll.rows` takes one for
each row of a batch.
Papers: Poly, Ponti et al. 2022, arXiv 2202.13914; MHR, Caccia et al. 2022, arXiv 2211.03831.
Identity at the start: B = 0. Needs only x and y.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.config import AdapterConfig
from ..core.errors import ConfigError, UnsupportedError
from ..core.method import ParamSpec, Variant
from ..core.random import kaiming, uniform
from ..core.site import Params, Site
from ..kernels.skills import mixed_skills
from ._made_pair import Pair, made_pair
from ._pair import scale


@dataclass(frozen=True, kw_only=True)
class PolyConfig(AdapterConfig):
    """Shared fields (see AdapterConfig), and:

    Args:
        alpha: strength, scaled by 1 / r; 1 by default.
        tasks: how many tasks there are.
        skills: how many pairs of factors they share.
        splits: in how many parts inputs and outputs are cut, each with mixtures of its own (MHR);
            it divides d_in and d_out.
    """

    alpha: float = 1.0
    tasks: int = 1
    skills: int = 4
    splits: int = 1

    def validate(self) -> None:
        for name in ("tasks", "skills", "splits"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"PolyConfig.{name}: expected at least 1, found {getattr(self, name)}"
                )


def param_specs(cfg: PolyConfig, site: Site) -> dict[str, ParamSpec]:
    """lora_A (P, Q, r, d_in / P), lora_B (P, Q, d_out / P, r), lora_logits (tasks, P Q).

    Raises:
        UnsupportedError: the splits don't divide d_in and d_out.
    """
    P, Q = cfg.splits, cfg.skills
    if site.d_in % P or site.d_out % P:
        raise UnsupportedError(
            f"Poly cuts inputs and outputs in parts, expected d_in and d_out divisible by "
            f"splits={P}, found d_in={site.d_in} and d_out={site.d_out}"
        )
    return {
        "lora_A": ParamSpec((P, Q, site.r, site.d_in // P), kaiming, rank_axis=2),
        "lora_B": ParamSpec((P, Q, site.d_out // P, site.r), rank_axis=3),
        "lora_logits": ParamSpec((cfg.tasks, P * Q), uniform(1e-3), dtype=torch.float32),
    }


def _factors(cfg: PolyConfig, p: Params, site: Site, dtype: torch.dtype | None) -> Pair:
    """A (r, d_in) and B (d_out, r) of the only task.

    Raises:
        UnsupportedError: there are several.
    """
    if cfg.tasks > 1:
        raise UnsupportedError(
            f"site {site.path!r}: this adapter has {cfg.tasks} tasks, and which of them isn't "
            f"said; give each row its own, ll.rows(ll.tasks(params), task_ids), or take one, "
            f"ll.tasks(params)[0]"
        )
    return mixed_skills(p["lora_A"], p["lora_B"], p["lora_logits"][..., 0, :].sigmoid())


_PHASES = made_pair(_factors)


def of_tasks(p: Params, noise: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """A (tasks, r, d_in) and B (tasks, d_out, r), with noise (tasks, P Q) added to the logits."""
    return mixed_skills(p["lora_A"], p["lora_B"], (p["lora_logits"] + noise).sigmoid())


VARIANT = Variant(
    name="poly",
    good_for="tasks that share a few skills",
    config=PolyConfig,
    paper="Poly, Ponti et al. 2022, arXiv 2202.13914; MHR, Caccia et al. 2022, arXiv 2211.03831",
    param_specs=param_specs,
    prepare=_PHASES.prepare,
    outputs=_PHASES.outputs,
    weight=_PHASES.weight,
    additive=True,
    scale=scale,
    low_rank_factors=_PHASES.low_rank_factors,
    batched=True,
)
