"""OSF: the minor singular directions are trained, in what the principal ones leave free.

    W' = W + U diag(S) V - U0 diag(S0) V0
    W = U_h S_h V_h + U0 S0 V0, the k smallest values of min(d_in, d_out) in U0, S0, V0, frozen
    U = U0 + (I - U_h U_h^T) Z,   S = S0 + dS,   V = V0 + Y (I - V_h^T V_h)
    Z (d_out, k), Y (k, d_in), dS (k,)

Whatever the optimizer, U stays orthogonal to U_h and V to V_h, so what the principal directions
hold of earlier tasks is neither read nor written. (PEFT projects gradients; Adam's steps leave the
subspace then.) For the next task merge, and decompose what came out.
Paper: Nayak et al. 2025, arXiv 2504.07097. With k of half the sizes it has as many parameters as
the layer. On the shorter side I - U_h U_h^T is U0 U0^T; on the longer one U_h, or V_h, is kept.
Identity at the start: Z = 0, Y = 0 and dS = 0, exactly. Needs W once, for the decomposition. r and
alpha have no part in this method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.config import AdapterConfig, probability
from ..core.errors import ConfigError, UnsupportedError
from ..core.method import ParamSpec, Variant
from ..core.site import Params, Site
from ..core.update_functions import Forms, Work
from ..kernels import low_rank
from ._made_pair import Pair, made_pair


@dataclass(frozen=True, kw_only=True)
class OSFConfig(AdapterConfig):
    """Shared fields (see AdapterConfig; r and alpha have no part in this method), and:

    Args:
        kept: what part of the singular directions stays as it is, the largest ones, in (0, 1).
        dropout: probability of dropping an entry of the branch's input, in training mode only.
    """

    kept: float = 0.5
    dropout: float = 0.0

    def validate(self) -> None:
        probability(self.dropout, "OSFConfig.dropout")
        if not 0.0 < self.kept < 1.0:
            raise ConfigError(f"OSFConfig.kept: expected a part in (0, 1), found {self.kept}")


def _trained(cfg: OSFConfig, site: Site) -> int:
    """k."""
    short = min(site.d_in, site.d_out)
    return short - max(int(short * cfg.kept), 1)


def param_specs(cfg: OSFConfig, site: Site) -> dict[str, ParamSpec]:
    """Trainable lora_Z (d_out, k), lora_Y (k, d_in), lora_dS (k,); frozen lora_U, lora_S, lora_V
    and, where the layer isn't square, lora_kept: U_h (d_out, h) or V_h (h, d_in).

    Raises:
        UnsupportedError: the weight has a single direction.
    """
    k, h = _trained(cfg, site), min(site.d_in, site.d_out) - _trained(cfg, site)
    if k < 1:
        raise UnsupportedError(
            f"OSF keeps some singular directions and trains the others, found one alone in a "
            f"{site.d_out} x {site.d_in} weight; leave it out with exclude_names"
        )
    specs = {
        "lora_Z": ParamSpec((site.d_out, k)),
        "lora_Y": ParamSpec((k, site.d_in)),
        "lora_dS": ParamSpec((k,), dtype=torch.float32),
        "lora_U": ParamSpec((site.d_out, k), trainable=False),
        "lora_S": ParamSpec((k,), trainable=False, dtype=torch.float32),
        "lora_V": ParamSpec((k, site.d_in), trainable=False),
        "lora_gain": ParamSpec((), "ones", trainable=False, dtype=torch.float32),
    }
    if site.d_in != site.d_out:
        shape = (site.d_out, h) if site.d_out > site.d_in else (h, site.d_in)
        specs["lora_kept"] = ParamSpec(shape, trainable=False)
    return specs


def init(
    cfg: OSFConfig,
    site: Site,
    specs: Mapping[str, ParamSpec],
    weight: Tensor,
    stats: None,
    generator: Callable[[str], torch.Generator],
) -> dict[str, Tensor]:
    """The decomposition, cut in two."""
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    h = S.shape[0] - specs["lora_S"].shape[0]
    frozen = {"lora_U": U[:, h:], "lora_S": S[h:], "lora_V": Vh[h:]}
    if site.d_in != site.d_out:
        frozen["lora_kept"] = U[:, :h] if site.d_out > site.d_in else Vh[:h]
    return frozen


def _factors(cfg: OSFConfig, p: Params, site: Site, dtype: torch.dtype | None) -> Pair:
    """U S V - U0 S0 V0 as one factor pair, (2k, d_in) and (d_out, 2k)."""
    dtype = p["lora_U"].dtype if dtype is None else dtype
    Z, Y, U0, V0 = (p[f"lora_{name}"].to(dtype) for name in ("Z", "Y", "U", "V"))
    S0, dS, gain = (p[f"lora_{name}"].to(dtype) for name in ("S", "dS", "gain"))
    tall, wide = U0.shape[0] > V0.shape[1], U0.shape[0] < V0.shape[1]
    kept = p["lora_kept"].to(dtype) if tall or wide else U0
    U = U0 + (Z - kept @ (kept.mT @ Z) if tall else U0 @ (U0.mT @ Z))
    V = V0 + (Y - (Y @ kept.mT) @ kept if wide else (Y @ V0.mT) @ V0)
    A, B = low_rank.difference((S0 + dS)[:, None] * V, U, S0[:, None] * V0, U0)
    return A, B * gain


_PHASES = made_pair(_factors, scaled=False)


def dense(cfg: OSFConfig, site: Site, tokens: int) -> Forms:
    """The branch of rank 2k, or the update built."""
    rank, size = 2 * _trained(cfg, site), site.d_in * site.d_out
    return Forms(Work(rank * (site.d_in + site.d_out)), Work(rank * size, passes=size))


def scale(cfg: OSFConfig, p: Params, c: float | Tensor) -> dict[str, Tensor]:
    """The strength times c, since the update is linear in no trained tensor."""
    return {**p, "lora_gain": p["lora_gain"] * c}


VARIANT = Variant(
    name="osf",
    good_for="task after task without forgetting",
    config=OSFConfig,
    paper="Nayak et al. 2025, arXiv 2504.07097",
    param_specs=param_specs,
    init=init,
    prepare=_PHASES.prepare,
    outputs=_PHASES.outputs,
    weight=_PHASES.weight,
    additive=True,
    dense=dense,
    scale=scale,
    low_rank_factors=_PHASES.low_rank_factors,
    needs=frozenset({"weight"}),
)
