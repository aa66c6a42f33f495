"""QA-LoRA: a LoRA on sums over groups of inputs, so it fits a grouped quantisation's zero points.

    y' = y + s (pool(x) A^T) B^T        s = alpha / r
    pool(x) (..., d_in / g), sums of g neighbours;   A (r, d_in / g), B (d_out, r)

The update is one number for g neighbours of a row: where W is quantised in groups of g it goes into
their zero points, and the weight stays as small as it was.
Paper: Xu et al. 2023, arXiv 2309.14717. (PEFT multiplies the groups' means by d_in / g.)
Identity at the start: B = 0. Needs only x and y.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core.config import AdapterConfig, probability
from ..core.errors import ConfigError, UnsupportedError
from ..core.method import Layer, ParamSpec, Variant
from ..core.random import kaiming
from ..core.site import Params, Site
from ..core.update_functions import Factors
from ..kernels import low_rank
from ._pair import scale


@dataclass(frozen=True, kw_only=True)
class QALoRAConfig(AdapterConfig):
    """Shared fields (see AdapterConfig), and:

    Args:
        group_size: how many neighbouring inputs are summed; that of the quantised weight, and a
            divisor of d_in.
        dropout: probability of dropping an entry of the branch's input, in training mode only.
    """

    group_size: int = 32
    dropout: float = 0.0

    def validate(self) -> None:
        probability(self.dropout, "QALoRAConfig.dropout")
        if self.group_size < 1:
            raise ConfigError(
                f"QALoRAConfig.group_size: expected at least 1, found {self.group_size}"
            )


def param_specs(cfg: QALoRAConfig, site: Site) -> dict[str, ParamSpec]:
    """lora_A (r, d_in / g), lora_B (d_out, r).

    Raises:
        UnsupportedError: d_in isn't divisible by the group size.
    """
    if site.d_in % cfg.group_size:
        fitting = [g for g in range(1, min(site.d_in, 256) + 1) if site.d_in % g == 0]
        raise UnsupportedError(
            f"QA-LoRA sums inputs in groups, expected d_in divisible by "
            f"group_size={cfg.group_size}, found d_in={site.d_in}; group_size={max(fitting)} fits"
        )
    return {
        "lora_A": ParamSpec((site.r, site.d_in // cfg.group_size), kaiming, rank_axis=0),
        "lora_B": ParamSpec((site.d_out, site.r), rank_axis=1),
    }


def _repeated(cfg: QALoRAConfig, p: Params) -> Tensor:
    """A (r, d_in): each column of the stored one for its group."""
    return p["lora_A"].repeat_interleave(cfg.group_size, -1)


def prepare(cfg: QALoRAConfig, p: Params, site: Site, layer: Layer) -> Tensor:
    """A with its columns repeated, which spares a pass over x."""
    return _repeated(cfg, p)


def outputs(cfg: QALoRAConfig, p: Params, d: Tensor, x: Tensor, y: Tensor, site: Site) -> Tensor:
    """y + s (pool(x) A^T) B^T."""
    return low_rank.add(y, x, d, p["lora_B"], site.scale)


def weight(
    cfg: QALoRAConfig, p: Params, site: Site, W: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """W + s B A, each column of A repeated."""
    return low_rank.add_dense(W, _repeated(cfg, p), p["lora_B"], site.scale), b


def low_rank_factors(cfg: QALoRAConfig, p: Params, site: Site) -> Factors:
    """A with its columns repeated, B and alpha / r."""
    return _repeated(cfg, p), p["lora_B"], site.scale


VARIANT = Variant(
    name="qalora",
    good_for="merging into a grouped quantisation",
    config=QALoRAConfig,
    paper="Xu et al. 2023, arXiv 2309.14717",
    param_specs=param_specs,
    prepare=prepare,
    outputs=outputs,
    weight=weight,
    additive=True,
    scale=scale,
    low_rank_factors=low_rank_factors,
    batched=True,
)
