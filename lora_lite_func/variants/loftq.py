"""LoftQ: a LoRA that starts at what quantising the weight has lost.

    y' = y + s (x A^T) B^T        s = alpha / r
    A (r, d_in), B (d_out, r)
    W_dense - W = U S V^T:   B = U sqrt(S / s), A = sqrt(S / s) V^T, of the r largest

Paper: Li et al. 2023, arXiv 2310.08659: its first step, which suits a base that is quantised
already (further ones quantise anew). The dense weights are another model's, of the same paths:
`ll.init(model, cfg, reference=dense)`. (PEFT doesn't divide by s, so that its start is off unless
alpha is r.)
The start is not the identity, by design: it is nearer to the dense model. Needs W once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.config import AdapterConfig, probability
from ..core.errors import ConfigError
from ..core.method import MATRICES, ParamSpec, Variant
from ..core.site import Site
from ..core.statistics import SiteStatistics
from ..kernels import low_rank
from . import _pair, _subtracted


@dataclass(frozen=True, kw_only=True)
class LoftQConfig(AdapterConfig):
    """Shared fields (see AdapterConfig), and:

    Args:
        dropout: probability of dropping an entry of the branch's input, in training mode only.
    """

    dropout: float = 0.0

    def validate(self) -> None:
        probability(self.dropout, "LoftQConfig.dropout")
        _subtracted.check_alpha(self)


def param_specs(cfg: LoftQConfig, site: Site) -> dict[str, ParamSpec]:
    """lora_A (r, d_in), lora_B (d_out, r).

    Raises:
        UnsupportedError: r is above min(d_in, d_out).
    """
    low_rank.check_rank(site, "LoftQ")
    return _pair.factor_specs(site)


def init(
    cfg: LoftQConfig,
    site: Site,
    specs: Mapping[str, ParamSpec],
    weight: Tensor,
    stats: SiteStatistics,
    generator: Callable[[str], torch.Generator],
) -> dict[str, Tensor]:
    """The top r singular triplets of the difference, split evenly between the factors.

    Raises:
        ConfigError: there is no difference, from which nothing could be learned.
    """
    assert stats.reference is not None
    lost = stats.reference.to(weight) - weight
    if not bool(lost.any()):
        raise ConfigError(
            "LoftQ starts at what quantising has lost, and this weight is the reference's; give "
            "the model before quantisation, or leave the layer out with exclude_names"
        )
    U, S, Vh = low_rank.top_svd(lost, site.r, None, generator("lora_A"))
    root = (S / site.scaling).sqrt()  # (r,)
    return {"lora_A": root[:, None] * Vh, "lora_B": U * root}


VARIANT = Variant(
    name="loftq",
    good_for="low-bit bases, nearer the dense",
    config=LoftQConfig,
    paper="Li et al. 2023, arXiv 2310.08659",
    param_specs=param_specs,
    init=init,
    outputs=_pair.outputs,
    weight=_pair.weight,
    additive=True,
    scale=_pair.scale,
    low_rank_factors=_pair.low_rank_factors,
    called_outputs=_pair.called_outputs,
    batched=True,
    needs=frozenset({"weight", "reference"}),
    sites=(*MATRICES, "embedding"),
)
