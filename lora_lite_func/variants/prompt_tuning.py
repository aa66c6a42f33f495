"""Prompt tuning: virtual tokens in front of a model's own, learned as their embeddings.

    embedded' = [e_1 ... e_P, embedded]        e lora_tokens (P, width)
    with decoder=True, others in front of what is decoded: lora_decoder (P, width)

A site is the whole call of a model that embeds tokens: of a model of transformers by default that
model itself, of one that classifies causal sequences the model inside it, of one that encodes and
decodes its encoder's tokens, or those of both. Logits, hidden states and labels are the caller's,
who sees none of the virtual tokens. `generate` works on a bound model with every cache.

Paper: Lester et al. 2021, arXiv 2104.08691. It starts from tokens of the vocabulary, as here.
Identity at the start: none, as attention sees more tokens. So there is no strength to scale, and no
weight to merge into. alpha has no part in this method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..core.config import AdapterConfig, record
from ..core.errors import ConfigError
from ..core.method import ParamSpec, Variant
from ..core.phase_functions import VirtualFn
from ..core.random import normal
from ..core.site import Params, Site
from ._vocabulary import check_decodes, vocabulary


@dataclass(frozen=True, kw_only=True)
class PromptTuningConfig(AdapterConfig):
    """Shared fields (see AdapterConfig; alpha has no part), and:

    Args:
        r: how many virtual tokens.
        init: what they start as: "vocabulary", rows drawn from the model's table (or those of
            `token_ids`); "normal", standard normal numbers.
        token_ids: ids of the tokens to start from, repeated where there are fewer than r, cut where
            there are more.
        decoder: whether a model that encodes and decodes has virtual tokens in front of what it
            decodes too.
    """

    init: Literal["vocabulary", "normal"] = record("vocabulary")
    token_ids: tuple[int, ...] = record(())
    decoder: bool = False

    def validate(self) -> None:
        if min(self.token_ids, default=0) < 0:
            raise ConfigError(
                f"PromptTuningConfig.token_ids: expected ids of 0 and up, found "
                f"{min(self.token_ids)}"
            )
        if self.token_ids and self.init != "vocabulary":
            raise ConfigError(
                f'PromptTuningConfig.token_ids are of init="vocabulary", found init={self.init!r}'
            )


def param_specs(cfg: PromptTuningConfig, site: Site) -> dict[str, ParamSpec]:
    """lora_tokens (P, width), and with decoder=True lora_decoder (P, width)."""
    shape = (site.r, site.d_in)
    spec = ParamSpec(shape, normal(1.0), dtype=torch.float32, rank_axis=0)
    return {"lora_tokens": spec} | ({"lora_decoder": spec} if cfg.decoder else {})


def init(
    cfg: PromptTuningConfig,
    site: Site,
    specs: Mapping[str, ParamSpec],
    weight: Any,
    stats: None,
    generator: Callable[[str], torch.Generator],
) -> dict[str, Tensor]:
    """Tokens of the vocabulary, as the model embeds them.

    Raises:
        UnsupportedError: decoder=True, and the model decodes nothing.
    """
    if weight is None:
        return {}
    check_decodes(weight, cfg.decoder)
    return {name: vocabulary(weight, site.r, cfg.token_ids, generator(name)) for name in specs}


def virtual(cfg: PromptTuningConfig, p: Params, site: Site) -> Tensor:
    """e (P, width)."""
    return p["lora_tokens"]


def virtual_decoder(cfg: PromptTuningConfig) -> VirtualFn[PromptTuningConfig] | None:
    """What stands in front of the tokens that are decoded, if anything does."""
    return _decoder if cfg.decoder else None


def _decoder(cfg: PromptTuningConfig, p: Params, site: Site) -> Tensor:
    """(P, width)."""
    return p["lora_decoder"]


def needs_by(cfg: PromptTuningConfig) -> frozenset[str]:
    """The table, where a start is taken from it."""
    return frozenset({"weight"} if cfg.init == "vocabulary" else ())


VARIANT = Variant(
    name="prompt_tuning",
    good_for="tiny files, one per task",
    config=PromptTuningConfig,
    paper="Lester et al. 2021, arXiv 2104.08691",
    param_specs=param_specs,
    init=init,
    virtual=virtual,
    virtual_decoder=virtual_decoder,
    needs=frozenset({"weight"}),
    needs_by=needs_by,
    sites=("call",),
)
