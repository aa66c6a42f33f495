"""VeRA: frozen random factors, the same for every layer of a shape; two small vectors are learned.

    y' = y + b * ( ((x A^T) * d) B^T )
    A (r, d_in), B (d_out, r) frozen;   d (r,), b (d_out,)

Paper: Kopiczko, Blankevoort and Asano 2023, arXiv 2310.11454. There one A and B of the largest size
are sliced; here each shape has its own, drawn from `projection_seed` and the shape alone, with the
bounds that fit it.
Identity at the start: b = 0. Needs only x and y. alpha has no part in this method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import random
from ..core.config import AdapterConfig, probability, record
from ..core.method import MATRICES, ParamSpec, Variant
from ..core.site import Params, Site
from ..core.update_functions import Forms, Work
from ..kernels import low_rank


@dataclass(frozen=True, kw_only=True)
class VeRAConfig(AdapterConfig):
    """Shared fields (see AdapterConfig; alpha has no part in this method), and:

    Args:
        r: number of random directions, larger than elsewhere: they cost no parameters.
        d_initial: what d starts at.
        projection_seed: of the frozen factors.
        dropout: probability of dropping an entry of the branch's input, in training mode only.
    """

    r: int = 256
    d_initial: float = record(0.1)
    projection_seed: int = record(0)
    dropout: float = 0.0

    def validate(self) -> None:
        probability(self.dropout, "VeRAConfig.dropout")


def param_specs(cfg: VeRAConfig, site: Site) -> dict[str, ParamSpec]:
    """Trainable lora_vera_d, lora_vera_b; frozen lora_vera_A, lora_vera_B."""
    return {
        "lora_vera_d": ParamSpec(
            (site.r,),
            lambda shape, gen: torch.full(tuple(shape), cfg.d_initial),
            dtype=torch.float32,
            rank_axis=0,
        ),
        "lora_vera_b": ParamSpec((site.d_out,), dtype=torch.float32),
        "lora_vera_A": ParamSpec((site.r, site.d_in), trainable=False, rank_axis=0),
        "lora_vera_B": ParamSpec((site.d_out, site.r), trainable=False, rank_axis=1),
    }


@random.kept
def _random(seed: int, name: str, shape: tuple[int, int]) -> Tensor:
    """Kaiming-uniform of gain sqrt(2), within +-sqrt(6 / columns); one per (seed, name, shape)."""
    draw = random.uniform(math.sqrt(6.0 / shape[1]))
    return draw(shape, random.generator(seed, f"{shape}", name))


def init(
    cfg: VeRAConfig,
    site: Site,
    specs: Mapping[str, ParamSpec],
    weight: None,
    stats: None,
    generator: Callable[[str], torch.Generator],
) -> dict[str, Tensor]:
    """The frozen factors, which the site's path has no part in."""
    shapes = {"lora_vera_A": (site.r, site.d_in), "lora_vera_B": (site.d_out, site.r)}
    return {name: _random(cfg.projection_seed, name, shape) for name, shape in shapes.items()}


def outputs(cfg: VeRAConfig, p: Params, d: None, x: Tensor, y: Tensor, site: Site) -> Tensor:
    """y + b * (((x A^T) * d) B^T). To scale h and the result, not A and B, spares the backward pass
    two weight-sized products.
    """
    A, B = p["lora_vera_A"], p["lora_vera_B"]
    h = low_rank.project(x, A)  # (..., r)
    h = F.linear((h * p["lora_vera_d"]).to(h.dtype), B)  # (..., d_out)
    return torch.addcmul(y, h, p["lora_vera_b"]).to(y.dtype)


def weight(
    cfg: VeRAConfig, p: Params, site: Site, W: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """W + diag(b) B diag(d) A."""
    A, B, gate, d = (p[f"lora_vera_{n}"].to(W.dtype) for n in ("A", "B", "b", "d"))
    return low_rank.add_dense(W, d[:, None] * A, gate[:, None] * B), b


def dense(cfg: VeRAConfig, site: Site, tokens: int) -> Forms:
    """The branch, or the update built."""
    size = site.d_in * site.d_out
    return Forms(Work(site.r * (site.d_in + site.d_out)), Work(site.r * size, passes=size))


def scale(cfg: VeRAConfig, p: Params, c: float | Tensor) -> dict[str, Tensor]:
    """b times c."""
    return {**p, "lora_vera_b": p["lora_vera_b"] * c}


VARIANT = Variant(
    name="vera",
    good_for="many stored adapters, two vectors each",
    config=VeRAConfig,
    paper="Kopiczko, Blankevoort and Asano 2023, arXiv 2310.11454",
    param_specs=param_specs,
    init=init,
    outputs=outputs,
    weight=weight,
    additive=True,
    dense=dense,
    scale=scale,
    sites=(*MATRICES, "embedding"),
)
