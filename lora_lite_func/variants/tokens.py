"""Tokens: chosen rows of a table of ids are trained, by what is added to them.

    table'[t] = table[t] + d[k]   for the k-th chosen id t
    d lora_rows (k, width), zero at the start

No paper: the usual way to teach a model new or special tokens without training the whole table.
Identity at the start: d = 0. Needs nothing. r and alpha have no part in this method.

A site is one of three. An embedding: its looked-up rows move. A linear head: its scores of the
chosen ids move. A table under its full name in `target_parameters`: where an embedding and a head
share it, both move by the same trained rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
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


def _by_input(site: Site) -> bool:
    """Whether the ids are a site's inputs, as an embedding's are; a head's are its outputs."""
    return site.transposed and site.kind != "linear"


def _sizes(site: Site) -> tuple[int, int]:
    """(how many ids there are, the width of a row)."""
    return (site.d_in, site.d_out) if _by_input(site) else (site.d_out, site.d_in)


def _ids(p: Params, site: Site) -> Tensor:
    return positions.decoded(p["lora_ids"], _sizes(site)[0])


def param_specs(cfg: TokensConfig, site: Site) -> dict[str, ParamSpec]:
    """lora_rows (k, width), frozen lora_ids (k,), ascending, stored as positions.py says.

    Raises:
        UnsupportedError: not a table, or without such an id, or no ids.
    """
    if not cfg.token_ids:
        raise UnsupportedError(
            "tokens trains the rows of chosen ids, and none are chosen; name them: "
            "TokensConfig(token_ids=...)"
        )
    if site.num_experts:
        raise UnsupportedError(
            f"{site.path!r}: tokens are rows of one table, this is a stack of {site.num_experts} "
            f"weights; name an embedding's or a head's"
        )
    ids, width = _sizes(site)
    if max(cfg.token_ids) >= ids:
        raise UnsupportedError(
            f"token id {max(cfg.token_ids)}: the table has {ids} rows; choose the table "
            f"with target_names"
        )
    k = len(set(cfg.token_ids))
    return {
        "lora_rows": ParamSpec((k, width)),
        "lora_ids": ParamSpec((k,), trainable=False, dtype=positions.index_dtype(ids)),
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
    """Of an embedding which row of d each id has, (d_in,), k for those that aren't chosen; of a
    head the chosen ids.
    """
    ids = _ids(p, site)
    if not _by_input(site):
        return ids
    k = torch.arange(ids.shape[0], device=ids.device)
    return torch.full((site.d_in,), ids.shape[0], device=ids.device).scatter(0, ids, k)


def outputs(cfg: TokensConfig, p: Params, d: Tensor, x: Tensor, y: Tensor, site: Site) -> Tensor:
    """y, and the chosen ids' rows of d, or their products with x."""
    rows = p["lora_rows"]
    if not _by_input(site):
        return y.index_add(-1, d, F.linear(x.to(rows.dtype), rows).to(y.dtype))
    padded = torch.cat([rows, torch.zeros_like(rows[:1])])  # (k + 1, d_out)
    return (y + padded[d[x]]).to(y.dtype)


def weight(
    cfg: TokensConfig, p: Params, site: Site, W: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """W with the chosen columns moved, (d_out, ids), or a head's chosen rows, (ids, d_in)."""
    ids, rows = _ids(p, site), p["lora_rows"].to(W.dtype)
    return (W.index_add(1, ids, rows.mT) if _by_input(site) else W.index_add(0, ids, rows)), b


def scale(cfg: TokensConfig, p: Params, c: float | Tensor) -> dict[str, Tensor]:
    """d times c."""
    return {**p, "lora_rows": p["lora_rows"] * c}


def validate(cfg: TokensConfig, p: Params, site: Site) -> None:
    """The ids are different rows of the table.

    Raises:
        StructureError: they aren't.
    """
    check_indices((p["lora_ids"],), (_sizes(site)[0],), "lora_ids")


VARIANT = Variant(
    name="tokens",
    good_for="new tokens, or few changed ones",
    config=TokensConfig,
    param_specs=param_specs,
    init=init,
    prepare=prepare,
    outputs=outputs,
    weight=weight,
    additive=True,
    validate=validate,
    scale=scale,
    sites=("embedding", "linear", "parameter"),
)
