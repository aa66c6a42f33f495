"""GLoRA: the weight is multiplied and shifted by low-rank matrices, the bias by vectors.

    W' = W + W * A + B,   b' = b + b * D + E + W C
    A, B = X_d X_u with X_d (d_out, r), X_u (r, d_in); or one number per output; or one number
    C = X_d X_u with X_d (d_in, r), X_u (r, 1); or a vector (d_in,).   D, E (d_out,), or one number

A layer without a bias has A and B alone. Paper: Chavan et al. 2023, arXiv 2306.07967 (which
searches for the best form of each; here forms are chosen as in PEFT). alpha has no part in this
method. Identity at the start: every X_d, vector and number is 0. With low-rank A and B it
multiplies the dense weight in every call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..core.config import AdapterConfig, probability
from ..core.errors import UnsupportedError
from ..core.method import Layer, ParamSpec, Variant
from ..core.random import kaiming
from ..core.site import Params, Site
from ..core.update_functions import Forms, Work
from ..kernels import low_rank


@dataclass(frozen=True, kw_only=True)
class GLoRAConfig(AdapterConfig):
    """Shared fields (see AdapterConfig; alpha has no part in this method), and:

    Args:
        weight_form: the form of A and B: "lora", "vector", "constant" or "none".
        prompt_form: the form of C, whose product with the weight moves the bias: "lora", "vector"
            or "none".
        bias_form: the form of D and E: "vector", "constant" or "none".
        dropout: probability of dropping an entry of the branch's input, in training mode only.
    """

    weight_form: Literal["lora", "vector", "constant", "none"] = "lora"
    prompt_form: Literal["lora", "vector", "none"] = "lora"
    bias_form: Literal["vector", "constant", "none"] = "constant"
    dropout: float = 0.0

    def validate(self) -> None:
        probability(self.dropout, "GLoRAConfig.dropout")


class Prepared(NamedTuple):
    """What the phases share.

    Attributes:
        dense: W * A + B (d_out, d_in), where they are of low rank.
        gain, sums: A and B where they are vectors or numbers.
        shift: b' - b.
        bias: b, which A leaves alone.
    """

    dense: Tensor | None
    gain: Tensor | None
    sums: Tensor | None
    shift: Tensor | None
    bias: Tensor | None


def _path(name: str, form: str, rows: int, columns: int, r: int) -> dict[str, ParamSpec]:
    """The tensors of one path (rows, columns)."""
    if form == "lora":
        return {
            f"lora_{name}_d": ParamSpec((rows, r)),
            f"lora_{name}_u": ParamSpec((r, columns), kaiming),
        }
    shape = {"vector": (rows,), "constant": (), "none": None}[form]
    return {} if shape is None else {f"lora_{name}_x": ParamSpec(shape, dtype=torch.float32)}


def param_specs(cfg: GLoRAConfig, site: Site) -> dict[str, ParamSpec]:
    """lora_<path>_d and _u of low-rank paths, lora_<path>_x of the others.

    Raises:
        UnsupportedError: no path is left.
    """
    specs: dict[str, ParamSpec] = {}
    for name in "AB":
        specs |= _path(name, cfg.weight_form, site.d_out, site.d_in, site.r)
    if site.bias:
        specs |= _path("C", cfg.prompt_form, site.d_in, 1, site.r)
        for name in "DE":
            specs |= _path(name, cfg.bias_form, site.d_out, 1, site.r)
    if not specs:
        raise UnsupportedError(
            "GLoRA: nothing is left to train here: weight_form='none', and "
            + ("prompt_form and bias_form too" if site.bias else "the layer has no bias")
        )
    return specs


def _value(p: Params, name: str, dtype: torch.dtype) -> Tensor | None:
    """The matrix, vector or number of a path; None where it is absent."""
    if f"lora_{name}_x" in p:
        return p[f"lora_{name}_x"].to(dtype)
    if f"lora_{name}_d" in p:
        return p[f"lora_{name}_d"].to(dtype) @ p[f"lora_{name}_u"].to(dtype)
    return None


def _shift(p: Params, b: Tensor, product: Tensor | None) -> Tensor | None:
    """b * D + E + W C, of the product W C."""
    D, E = (_value(p, name, b.dtype) for name in "DE")
    parts = [] if D is None or E is None else [b * D + E]
    parts += [] if product is None else [product.to(b.dtype)]
    return sum(parts[1:], parts[0]) if parts else None


def prepare(cfg: GLoRAConfig, p: Params, site: Site, layer: Layer) -> Prepared:
    """The dense update or its vectors, and the shift."""
    dtype = next(iter(p.values())).dtype
    A, B, C = (_value(p, name, dtype) for name in "ABC")
    b = layer.bias
    shift = None if b is None else _shift(p, b, None if C is None else layer.linear(C.flatten()))
    if cfg.weight_form != "lora" or A is None or B is None:
        return Prepared(None, A, B, shift, b)
    W = layer.current_weight() if layer.is_changed else layer.weight
    W = W.to(torch.promote_types(W.dtype, dtype))
    return Prepared(torch.addcmul(B.to(W.dtype), W, A.to(W.dtype)), None, None, shift, b)


def outputs(cfg: GLoRAConfig, p: Params, d: Prepared, x: Tensor, y: Tensor, site: Site) -> Tensor:
    """y + x (W * A + B)^T + b' - b."""
    new = y
    if d.dense is not None:
        new = new + low_rank.project(x, d.dense)
    if d.gain is not None and d.sums is not None:
        inner = y if d.bias is None else y - d.bias
        new = new + inner * d.gain + x.sum(-1, keepdim=True) * d.sums
    return (new if d.shift is None else new + d.shift).to(y.dtype)


def weight(
    cfg: GLoRAConfig, p: Params, site: Site, W: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """W + W * A + B, b + b * D + E + W C."""
    A, B, C = (_value(p, name, W.dtype) for name in "ABC")
    if b is not None:
        shift = _shift(p, b, None if C is None else W @ C.flatten())
        b = b if shift is None else b + shift
    if A is None or B is None:
        return W, b
    column = cfg.weight_form == "vector"
    return W + W * (A[:, None] if column else A) + (B[:, None] if column else B), b


def dense(cfg: GLoRAConfig, site: Site, tokens: int) -> bool | Forms:
    """Always where A and B are of low rank: the phases take a dense product of their own then.
    Else passes over x and y, or over W.
    """
    if cfg.weight_form == "lora":
        return True
    row = Work(0.0, passes=site.d_in + 3 * site.d_out)
    return Forms(row, Work(0.0, passes=4 * site.d_in * site.d_out))


def scale(cfg: GLoRAConfig, p: Params, c: float | Tensor) -> dict[str, Tensor]:
    """All that starts at zero times c."""
    return {name: t if name.endswith("_u") else t * c for name, t in p.items()}


VARIANT = Variant(
    name="glora",
    good_for="weights and biases at once",
    config=GLoRAConfig,
    paper="Chavan et al. 2023, arXiv 2306.07967",
    param_specs=param_specs,
    prepare=prepare,
    outputs=outputs,
    weight=weight,
    dense=dense,
    scale=scale,
    sites=("linear",),
)
