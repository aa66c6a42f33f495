"""Cartridge: a text's keys and values, kept in front of a model's own and trained further.

    K' = [k, K]    V' = [v, V]        k, v (P, heads * head size), a pair of its own in each layer
    lora_sink (layers, 2, frozen, heads * head size) are the first of them, which aren't trained
    lora_prefix (layers, 2, P - frozen, ...) the others

A site is as in prefix_tuning.py. Several of them are one longer text:
`ll.apply(model, (a, b), ids)`.

Paper: Eyuboglu et al. 2025, arXiv 2506.06266. They start as what the model's cache holds after the
text's first P tokens (`token_ids`). The first token is an attention sink, whose change spoils the
training, so it is frozen. The loss, distillation on conversations about the text, is the caller's.
Identity at the start: none, as in prefix_tuning.py. alpha has no part in this method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.config import AdapterConfig, record
from ..core.errors import ConfigError
from ..core.method import ParamSpec, Variant
from ..core.random import normal
from ..core.site import Params, Site


@dataclass(frozen=True, kw_only=True)
class CartridgeConfig(AdapterConfig):
    """Shared fields (see AdapterConfig; alpha has no part), and:

    Args:
        r: how many tokens' keys and values.
        frozen: how many of them, from the first on, aren't trained.
        token_ids: the text whose first r tokens it starts from; () starts from normal numbers.
    """

    frozen: int = 1
    token_ids: tuple[int, ...] = record(())

    def validate(self) -> None:
        if not 0 <= self.frozen < self.r:
            raise ConfigError(
                f"CartridgeConfig.frozen: expected 0 to r - 1 = {self.r - 1}, found {self.frozen}"
            )
        if min(self.token_ids, default=0) < 0:
            raise ConfigError(
                f"CartridgeConfig.token_ids: expected ids of 0 and up, found {min(self.token_ids)}"
            )


def param_specs(cfg: CartridgeConfig, site: Site) -> dict[str, ParamSpec]:
    """lora_prefix (layers, 2, P - frozen, w), frozen lora_sink (layers, 2, frozen, w)."""

    def spec(count: int, trainable: bool, axis: int | None) -> ParamSpec:
        shape = (site.d_in, 2, count, site.d_out)
        return ParamSpec(shape, normal(1.0), trainable, torch.float32, axis)

    specs = {"lora_prefix": spec(max(site.r - cfg.frozen, 0), True, 2)}
    return specs | ({"lora_sink": spec(cfg.frozen, False, None)} if cfg.frozen else {})


def init(
    cfg: CartridgeConfig,
    site: Site,
    specs: Mapping[str, ParamSpec],
    weight: Any,
    stats: None,
    generator: Callable[[str], torch.Generator],
) -> dict[str, Tensor]:
    """What the model's cache holds after the text.

    Raises:
        ConfigError: fewer than r ids, or one that the model hasn't.
    """
    if weight is None:
        return {}
    if len(cfg.token_ids) < site.r:
        raise ConfigError(
            f"CartridgeConfig.token_ids: expected at least r = {site.r} ids, found "
            f"{len(cfg.token_ids)}"
        )
    if max(cfg.token_ids) >= weight.size:
        raise ConfigError(f"token id {max(cfg.token_ids)}: the model has {weight.size} of them")
    kept = weight.cached(torch.tensor(cfg.token_ids[: site.r], device="cpu"))
    made = {"lora_prefix": kept[:, :, cfg.frozen :]}
    return made | ({"lora_sink": kept[:, :, : cfg.frozen]} if cfg.frozen else {})


def needs_by(cfg: CartridgeConfig) -> frozenset[str]:
    """The model's cache, where a start is taken from it."""
    return frozenset({"weight"} if cfg.token_ids else ())


def virtual(cfg: CartridgeConfig, p: Params, site: Site) -> Tensor:
    """Keys and values (layers, 2, P, w)."""
    own = p["lora_prefix"]
    return torch.cat([p["lora_sink"], own], dim=2) if cfg.frozen else own


VARIANT = Variant(
    name="cartridge",
    good_for="a long text kept as cache",
    config=CartridgeConfig,
    paper="Eyuboglu et al. 2025, arXiv 2506.06266",
    param_specs=param_specs,
    init=init,
    virtual=virtual,
    needs=frozenset({"weight"}),
    needs_by=needs_by,
    sites=("cache",),
)
