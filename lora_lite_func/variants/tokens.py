"""Tokens: chosen rows of an embedding are trained, by what is added to them.

    table'[t] = table[t] + d[k]   for the k-th chosen id t        d lora_rows (k, d_out), zero at the start

No paper: the usual way to teach a model new or special tokens without training the whole table.
Identity at the start: d = 0. Needs nothing. r and alpha have no part in this method.
A site is an embedding, whose rows are then looked up in d too; or, under its full name in `target_parameters`, the table as a bare
tensor, so that an output head that is tied to it scores the chosen tokens with the trained rows as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.config import AdapterConfig
from ..core.errors import ConfigError, UnsupportedError
from ..core.method import Layer, ParamSpec, Variant
from ..core.site import Params, Site
from ..kernels import positions
from ..kernels.indices import check_indices


@dataclass(frozen=True, kw_only=True)
class TokensConfig(AdapterConfig):
    """Shared fields (see AdapterConfig; r and alpha have no part in this method), and:

    Args:
        token_ids: the ids whose rows are trained.
    """

    token_ids: tuple[int, ...] = ()

    def validate(self) -> None:
        if min(self.token_ids, default=0) < 0:
            raise ConfigError(
                f"TokensConfig.token_ids: expected ids of 0 and up, found {min(self.token_ids)}"
            )


def param_specs(cfg: TokensConfig, site: Site) -> dict[str, ParamSpec]:
    """lora_rows (k, d_out), frozen lora_ids (k,), ascending, stored as positions.py says.

    Raises:
        UnsupportedError: not a table of rows, or without such an id, or no ids.
    """
    if not cfg.token_ids:
        raise UnsupportedError(
            "tokens trains the rows of chosen ids, and none are chosen; name them: "
            "TokensConfig(token_ids=...)"
        )
    if not site.transposed:
        raise UnsupportedError(
            "tokens are rows of an embedding's table; name the embedding's weight, not the "
            "head's that is tied to it"
        )
    if max(cfg.token_ids) >= site.d_in:
        raise UnsupportedError(
            f"token id {max(cfg.token_ids)}: the table has {site.d_in} rows; choose the table "
            f"with target_names"
        )
    k = len(set(cfg.token_ids))
    return {
        "lora_rows": ParamSpec((k, site.d_out)),
        "lora_ids": ParamSpec((k,), trainable=False, dtype=positions.index_dtype(site.d_in)),
    }


def init(
    cfg: TokensConfig,
    site: Site,
    specs: Mapping[str, ParamSpec],
    weight: None,
    stats: None,
    generator: Callable[[str], torch.Generator],
) -> dict[str, Tensor]:
    """The ids."""
    return {"lora_ids": torch.tensor(sorted(set(cfg.token_ids)), device="cpu")}


def prepare(cfg: TokensConfig, p: Params, site: Site, layer: Layer) -> Tensor:
    """Which row of d each id has, (d_in,): k for those that aren't chosen."""
    ids = positions.decoded(p["lora_ids"], site.d_in)
    k = torch.arange(ids.shape[0], device=ids.device)
    return torch.full((site.d_in,), ids.shape[0], device=ids.device).scatter(0, ids, k)


def outputs(cfg: TokensConfig, p: Params, d: Tensor, x: Tensor, y: Tensor, site: Site) -> Tensor:
    """y, and the chosen ids' rows of d."""
    rows = torch.cat([p["lora_rows"], torch.zeros_like(p["lora_rows"][:1])])  # (k + 1, d_out)
    return (y + rows[d[x]]).to(y.dtype)


def weight(
    cfg: TokensConfig, p: Params, site: Site, W: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """W with the chosen columns moved, (d_out, ids)."""
    ids = positions.decoded(p["lora_ids"], site.d_in)
    return W.index_add(1, ids, p["lora_rows"].to(W.dtype).mT), b


def scale(cfg: TokensConfig, p: Params, c: float | Tensor) -> dict[str, Tensor]:
    """d times c."""
    return {**p, "lora_rows": p["lora_rows"] * c}


def validate(cfg: TokensConfig, p: Params, site: Site) -> None:
    """The ids are different rows of the table.

    Raises:
        StructureError: they aren't.
    """
    check_indices((p["lora_ids"],), (site.d_in,), "lora_ids")


VARIANT = Variant(
    name="tokens",
    config=TokensConfig,
    param_specs=param_specs,
    init=init,
    prepare=prepare,
    outputs=outputs,
    weight=weight,
    additive=True,
    validate=validate,
    scale=scale,
    sites=("embedding", "parameter"),
)
