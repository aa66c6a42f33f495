"""Multitask prompt tuning: virtual tokens that all tasks share, times a low-rank factor of each.

    e_t = e * (c_t r_t)        for task t
    e lora_tokens (P, width);   c lora_columns (tasks, P, k);   r lora_rows (tasks, k, width)
    with decoder=True, others of the same form, with the same r, in front of what is decoded:
    lora_decoder (P, width);   lora_decoder_columns (tasks, P, k)

`ll.tasks(params)` are the tasks as a stack of plain prompt tunings, through which gradients go: a
batch of several tasks is `ll.apply(model, ll.rows(ll.tasks(params), task_ids), ids)`. An adapter of
one task is applied as it is.

Paper: Wang et al. 2023, arXiv 2303.02861. A site, and the identity that there is none of, are as in
prompt_tuning.py. alpha has no part in this method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.config import AdapterConfig, record
from ..core.errors import ConfigError, UnsupportedError
from ..core.method import ParamSpec, Variant
from ..core.phase_functions import VirtualFn
from ..core.random import normal
from ..core.site import Params, Site
from ._vocabulary import check_decodes, vocabulary


@dataclass(frozen=True, kw_only=True)
class MPTConfig(AdapterConfig):
    """Shared fields (see AdapterConfig; alpha has no part), and:

    Args:
        r: how many virtual tokens.
        tasks: how many tasks.
        task_rank: rank k of a task's factor.
        token_ids: ids of the tokens that e starts from, repeated where there are fewer than r; ()
            draws them.
        decoder: whether a model that encodes and decodes has virtual tokens in front of what it
            decodes too.
    """

    tasks: int = 1
    task_rank: int = 1
    token_ids: tuple[int, ...] = record(())
    decoder: bool = False

    def validate(self) -> None:
        if min(self.tasks, self.task_rank) < 1:
            raise ConfigError(
                f"MPTConfig: expected tasks and task_rank of at least 1, found tasks={self.tasks}, "
                f"task_rank={self.task_rank}"
            )
        if min(self.token_ids, default=0) < 0:
            raise ConfigError(
                f"MPTConfig.token_ids: expected ids of 0 and up, found {min(self.token_ids)}"
            )


def param_specs(cfg: MPTConfig, site: Site) -> dict[str, ParamSpec]:
    """lora_tokens (P, width), lora_columns (tasks, P, k), lora_rows (tasks, k, width); with
    decoder=True lora_decoder (P, width), lora_decoder_columns (tasks, P, k).
    """
    P, width, wide = site.r, site.d_in, torch.float32
    columns, rows = (cfg.tasks, P, cfg.task_rank), (cfg.tasks, cfg.task_rank, width)
    tokens = ParamSpec((P, width), dtype=wide, rank_axis=0)
    factor = ParamSpec(columns, normal(0.02), dtype=wide, rank_axis=1)
    specs = {"lora_tokens": tokens, "lora_columns": factor}
    if cfg.decoder:
        specs |= {"lora_decoder": tokens, "lora_decoder_columns": factor}
    return specs | {"lora_rows": ParamSpec(rows, normal(0.02), dtype=wide)}


def init(
    cfg: MPTConfig,
    site: Site,
    specs: Mapping[str, ParamSpec],
    weight: Any,
    stats: None,
    generator: Callable[[str], torch.Generator],
) -> dict[str, Tensor]:
    """e of the vocabulary; the factors are small numbers, as in PEFT.

    Raises:
        UnsupportedError: decoder=True, and the model decodes nothing.
    """
    check_decodes(weight, cfg.decoder)
    return {
        name: vocabulary(weight, site.r, cfg.token_ids, generator(name))
        for name in ("lora_tokens", "lora_decoder")
        if name in specs
    }


def of_tasks(p: Params) -> Tensor:
    """e_t of all tasks (tasks, P, width)."""
    return p["lora_tokens"] * (p["lora_columns"] @ p["lora_rows"])


def of_tasks_decoder(p: Params) -> Tensor:
    """The tokens in front of what is decoded, of all tasks (tasks, P, width)."""
    return p["lora_decoder"] * (p["lora_decoder_columns"] @ p["lora_rows"])


def virtual(cfg: MPTConfig, p: Params, site: Site) -> Tensor:
    """e_t (P, width) of the only task.

    Raises:
        UnsupportedError: there are several, and the call doesn't say which.
    """
    if cfg.tasks > 1:
        raise UnsupportedError(
            f"site {site.path!r}: mpt has {cfg.tasks} tasks; say which each row is of: ll.apply("
            f"model, ll.rows(ll.tasks(params), task_ids), ids), or take ll.tasks(params)[0]"
        )
    return of_tasks(p)[0]


def virtual_decoder(cfg: MPTConfig) -> VirtualFn[MPTConfig] | None:
    """What stands in front of the tokens that are decoded, if anything does."""
    return _decoder if cfg.decoder else None


def _decoder(cfg: MPTConfig, p: Params, site: Site) -> Tensor:
    """(P, width) of the only task, as `virtual` has seen to."""
    return of_tasks_decoder(p)[0]


VARIANT = Variant(
    name="mpt",
    good_for="prompts of tasks that share much",
    config=MPTConfig,
    paper="Wang et al. 2023, arXiv 2303.02861",
    param_specs=param_specs,
    init=init,
    virtual=virtual,
    virtual_decoder=virtual_decoder,
    needs=frozenset({"weight"}),
    sites=("call",),
)
