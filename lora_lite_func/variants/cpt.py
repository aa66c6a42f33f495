"""Context-aware prompt tuning: the tokens of examples in front of a model's own, moved a little.

    e = E[ids] + d        |d_i| <= eps_i sqrt(width / 2048)
    d lora_delta (P, width), zero at the start

Each token of the examples has a type, by its remainder of 4: 1 and 3 are the format's (before and
after an answer), 2 an input's, 0 an answer's. Those of an answer aren't moved, and where labels are
given the loss counts them too. `ll.project` keeps d within its bounds, after each step.

With a `decay` below 1 the answers count the less the older their examples are: an answer decay
times as much as the next one, and the last one decay times as much as the row's own labels.

Paper: Blau et al. 2024, arXiv 2410.17222.
A site is as in prompt_tuning.py. Identity at the start: none of the model's, but that of its
answers with the examples in front. alpha has no part in this method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.config import AdapterConfig, record
from ..core.errors import ConfigError, UnsupportedError
from ..core.method import ParamSpec, Variant
from ..core.phase_functions import VirtualLabelsFn
from ..core.site import Params, Site
from ._vocabulary import vocabulary

_ANSWER, _INPUT = 0, 2


@dataclass(frozen=True, kw_only=True)
class CPTConfig(AdapterConfig):
    """Shared fields (see AdapterConfig; alpha has no part), and:

    Args:
        r: how many virtual tokens, as many as `token_ids`.
        token_ids: the examples' tokens.
        token_types: the type of each; () takes 1 for all.
        epsilon: bound of an input's tokens, at a width of 2048.
        format_epsilon: bound of the format's tokens.
        decay: by how much less an answer counts in the loss than the one after it; 1 counts all
            alike. It is of models that predict each token from those before it.
    """

    token_ids: tuple[int, ...] = record(())
    token_types: tuple[int, ...] = record(())
    epsilon: float = 0.1
    format_epsilon: float = 0.1
    decay: float = 1.0

    def validate(self) -> None:
        if self.token_types and len(self.token_types) != len(self.token_ids):
            raise ConfigError(
                f"CPTConfig.token_types: expected one for each of {len(self.token_ids)} token_ids, "
                f"found {len(self.token_types)}"
            )
        if min((*self.token_ids, *self.token_types), default=0) < 0:
            raise ConfigError("CPTConfig: expected token_ids and token_types of 0 and up")
        if min(self.epsilon, self.format_epsilon) < 0:
            raise ConfigError("CPTConfig: expected epsilon and format_epsilon of at least 0")
        if self.decay < 0:
            raise ConfigError(f"CPTConfig.decay: expected at least 0, found {self.decay}")


def param_specs(cfg: CPTConfig, site: Site) -> dict[str, ParamSpec]:
    """Trainable lora_delta (P, width); frozen lora_start (P, width), lora_ids and lora_types (P,),
    whole numbers.

    Raises:
        UnsupportedError: no tokens are given.
    """
    if len(cfg.token_ids) != site.r:
        raise UnsupportedError(
            f"cpt moves the tokens of examples, and {len(cfg.token_ids)} of {site.r} are given; "
            f"name them: CPTConfig(r=len(ids), token_ids=ids, token_types=types)"
        )
    shape = (site.r, site.d_in)
    whole = ParamSpec(shape[:1], trainable=False, dtype=torch.float32, rank_axis=0)
    return {
        "lora_delta": ParamSpec(shape, dtype=torch.float32, rank_axis=0),
        "lora_start": ParamSpec(shape, trainable=False, dtype=torch.float32, rank_axis=0),
        "lora_ids": whole,
        "lora_types": whole,
    }


def init(
    cfg: CPTConfig,
    site: Site,
    specs: Mapping[str, ParamSpec],
    weight: Any,
    stats: None,
    generator: Callable[[str], torch.Generator],
) -> dict[str, Tensor]:
    """The examples' tokens, as the model embeds them, and what each is."""
    types = cfg.token_types or (1,) * site.r
    return {
        "lora_start": vocabulary(weight, site.r, cfg.token_ids, generator("lora_start")),
        "lora_ids": torch.tensor(cfg.token_ids, device="cpu"),
        "lora_types": torch.tensor(types, device="cpu"),
    }


def virtual(cfg: CPTConfig, p: Params, site: Site) -> Tensor:
    """E[ids] + d (P, width)."""
    moves = (p["lora_types"] % 4 != _ANSWER)[..., None]
    return p["lora_start"] + torch.where(moves, p["lora_delta"], 0.0)


def virtual_labels(cfg: CPTConfig, p: Params, site: Site) -> Tensor:
    """(P,) the ids of an answer's tokens, -100 at the others."""
    return torch.where(_answers(p), p["lora_ids"], -100).long()


def virtual_label_weights(cfg: CPTConfig) -> VirtualLabelsFn[CPTConfig] | None:
    """What weighs the answers, if anything does."""
    return _by_age if cfg.decay != 1.0 else None


def _by_age(cfg: CPTConfig, p: Params, site: Site) -> Tensor:
    """(P,) decay to the power of how many answers come after, those of the row itself as one."""
    types = p["lora_types"]
    first = ~(types[:, None] == types).tril(-1).any(-1)  # of the tokens of a type
    later = (types > types[:, None]) & (first & _answers(p))  # (P, P)
    return cfg.decay ** (later.sum(-1) + 1.0)


def _answers(p: Params) -> Tensor:
    """(P,) which tokens are an answer's."""
    return (p["lora_types"] > 0) & (p["lora_types"] % 4 == _ANSWER)


def project(cfg: CPTConfig, p: Params) -> dict[str, Tensor]:
    """d within its bounds."""
    types, d = p["lora_types"], p["lora_delta"]
    root = math.sqrt(d.shape[-1] / 2048)
    bound = torch.where(types % 4 == _INPUT, cfg.epsilon * root, cfg.format_epsilon * root)
    bound = torch.where(types % 4 == _ANSWER, 0.0, bound)[..., None]
    norm = torch.linalg.vector_norm(d, dim=-1, keepdim=True)
    return {"lora_delta": d * (bound / norm.clamp(min=1e-30)).clamp(max=1.0)}


VARIANT = Variant(
    name="cpt",
    good_for="few-shot examples that are refined",
    config=CPTConfig,
    paper="Blau et al. 2024, arXiv 2410.17222",
    param_specs=param_specs,
    init=init,
    virtual=virtual,
    virtual_labels=virtual_labels,
    virtual_label_weights=virtual_label_weights,
    project=project,
    needs=frozenset({"weight"}),
    sites=("call",),
)
