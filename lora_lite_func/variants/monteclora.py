"""Monte-CLoRA: a LoRA whose A is drawn around its mean in training, with a learned spread.

    y' = y + s (x (A + N)^T) B^T,   N = eta diag(v)^1/2 sum_k w_k Z_k in training, else 0
    A (r, d_in), B (d_out, r);   Z_k (r, d_in) ~ N(0, 1), k = 1 ... num_samples
    v (r,): v_i = max(exp(2 sigma_i) chi^2_r, 0.001), the diagonal of a Wishart draw
    w (num_samples,): softmax of a Gaussian that stands for Dirichlet(exp(pi)) in the logarithm

sigma (r,) and pi (num_samples,) are learned. sum_k w_k Z_k is one Gaussian of variance sum w_k^2,
so one Z is drawn. The loss has, in addition, how far these distributions are from their priors,
which is `ll.penalty`. Paper: Sengupta et al. 2024, arXiv 2411.04358. A merged weight is the mean.
Identity at the start: B = 0. Needs only x and y.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.config import AdapterConfig, probability, record
from ..core.errors import ConfigError
from ..core.method import Layer, ParamSpec, Variant
from ..core.random import kaiming
from ..core.site import Params, Site
from ..kernels import low_rank
from . import _pair


@dataclass(frozen=True, kw_only=True)
class MonteCLoRAConfig(AdapterConfig):
    """Shared fields (see AdapterConfig), and:

    Args:
        num_samples: of how many draws one step's is the weighted mean.
        noise: eta, the size of the draws in training mode, 1e-4 in the paper. At 0 nothing is
            drawn, and a call is a function of its arguments, as without dropout.
        dirichlet_prior: concentration of the prior of their weights, in `ll.penalty`.
        kl_weight: weight of the divergences in `ll.penalty`.
        dropout: probability of dropping an entry of the branch's input, in training mode only.
    """

    num_samples: int = 8
    noise: float = 0.0
    dirichlet_prior: float = record(0.1)
    kl_weight: float = record(1e-5)
    dropout: float = 0.0

    def validate(self) -> None:
        probability(self.dropout, "MonteCLoRAConfig.dropout")
        if self.num_samples < 2:
            raise ConfigError(
                f"MonteCLoRAConfig.num_samples: expected at least 2, found {self.num_samples}"
            )
        for name, least in (("noise", 0.0), ("kl_weight", 0.0), ("dirichlet_prior", 1e-6)):
            value = getattr(self, name)
            if not least <= value < math.inf:
                raise ConfigError(
                    f"MonteCLoRAConfig.{name}: expected at least {least}, found {value}"
                )


def param_specs(cfg: MonteCLoRAConfig, site: Site) -> dict[str, ParamSpec]:
    """lora_A (r, d_in), lora_B (d_out, r), lora_sigma (r,), lora_pi (num_samples,)."""
    return {
        "lora_A": ParamSpec((site.r, site.d_in), kaiming),
        "lora_B": ParamSpec((site.d_out, site.r)),
        "lora_sigma": ParamSpec((site.r,), _unit, dtype=torch.float32),
        "lora_pi": ParamSpec((cfg.num_samples,), _unit, dtype=torch.float32),
    }


def _unit(shape: Sequence[int], gen: torch.Generator) -> Tensor:
    """Uniform in [0, 1)."""
    return torch.rand(tuple(shape), generator=gen, dtype=torch.float32, device="cpu")


def _spread(p: Params) -> Tensor:
    """One draw of (v sum w_k^2)^1/2, (r,), differentiable in sigma and pi."""
    sigma, pi = p["lora_sigma"], p["lora_pi"]
    r, k = sigma.shape[0], pi.shape[0]
    normal = torch.randn(r, r, dtype=sigma.dtype, device=sigma.device)
    v = ((2.0 * sigma).exp() * normal.square().sum(-1)).clamp_min(1e-3)
    inverse = (-pi).exp()
    variance = (inverse * (1.0 - 2.0 / k) + inverse.sum() / k**2).clamp_min(1e-6)
    drawn = torch.randn(k, dtype=pi.dtype, device=pi.device)
    w = (pi - pi.mean() + variance.sqrt() * drawn).softmax(-1)
    return (v * w.square().sum()).sqrt()


def prepare(cfg: MonteCLoRAConfig, p: Params, site: Site, layer: Layer) -> Tensor:
    """A, with noise in training."""
    A = p["lora_A"]
    if not (cfg.noise and layer.training):
        return A
    return A + (cfg.noise * _spread(p)[:, None]).to(A.dtype) * torch.randn_like(A)


def outputs(
    cfg: MonteCLoRAConfig, p: Params, d: Tensor, x: Tensor, y: Tensor, site: Site
) -> Tensor:
    """y + s (x (A + N)^T) B^T."""
    return low_rank.add(y, x, d, p["lora_B"], site.scale)


def penalty(cfg: MonteCLoRAConfig, p: Params, site: Site) -> Tensor:
    """kl_weight times three divergences from the priors: of the weights' Dirichlet, of the Wishart
    (r degrees of freedom) from that of scale I, and of the draws' N(0, diag(v)) from N(0, I), its
    mean over v.
    """
    sigma, pi = (
        p[name].to(low_rank.core_dtype(p[name].dtype)) for name in ("lora_sigma", "lora_pi")
    )
    r, k, prior = site.r, cfg.num_samples, cfg.dirichlet_prior
    alpha = pi.exp()
    total = alpha.sum()
    dirichlet = total.lgamma() - alpha.lgamma().sum() + k * math.lgamma(prior)
    dirichlet = dirichlet - math.lgamma(k * prior)
    dirichlet = dirichlet + ((alpha - prior) * (alpha.digamma() - total.digamma())).sum()
    squared = (2.0 * sigma).exp()
    wishart = 0.5 * r * (squared - 2.0 * sigma - 1.0).sum()
    log_chi2 = sigma.new_full((), 0.5 * r).digamma() + math.log(2.0)
    draws = 0.5 * k * (r * squared - 2.0 * sigma - log_chi2 - 1.0).sum()
    return cfg.kl_weight * (dirichlet + wishart + draws)


VARIANT = Variant(
    name="monteclora",
    good_for="calibrated answers, robust to rates",
    config=MonteCLoRAConfig,
    paper="Sengupta et al. 2024, arXiv 2411.04358",
    param_specs=param_specs,
    prepare=prepare,
    outputs=outputs,
    weight=_pair.weight,
    additive=True,
    scale=_pair.scale,
    penalty=penalty,
    low_rank_factors=_pair.low_rank_factors,
    phases_in_training=lambda cfg: cfg.noise > 0.0,
    sites=("linear",),
)
