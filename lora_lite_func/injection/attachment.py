"""One adapter at one site, and where its tensors are."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from ..core.config import AdapterConfig
from ..core.errors import UnsupportedError
from ..core.method import Variant
from ..core.site import Params, Site
from ..core.stacked import PRESENT
from ..kernels.mixture import Mixture
from ..kernels.row_axes import not_rows
from ..kernels.row_plan import RowPlan
from ..layers.tied import tied_names
from .prompt import Prompt
from .side_outputs import SideOutputs

__all__ = ["AnyRowPlan", "Attachment", "everywhere", "ids_of_rows", "is_here"]

AnyRowPlan: TypeAlias = RowPlan | Mixture
"""Which member of a stack each row of a batch has, or how much of each."""


class Attachment(NamedTuple):
    """One adapter at one site.

    Attributes:
        variant: the method.
        cfg: its config.
        site: the site.
        p: the adapter's tensors there; None where the site itself holds them (a bound model).
        dropout: the probability of dropping an entry of the branch's input in training.
        slot: the child of a bound site that holds the tensors.
        prompt: what the call knows of its prompt, where the site is a whole module; None in a bound
            model, whose calls tell it.
        row_plan: which member of a stack each row of the batch has, or which mixture of members;
            the tensors are those of the stack then.
        here: () bool, whether a row has an adapter at all, where that is known in the call alone.
        optional: some members of the stack lack the site, and the tensor `PRESENT` says whether
            this one has it.
        called: the site holds the factors as linear layers, which are called.
        seen: takes what the method's router decides; None where that isn't asked for.
        shared: names of the tensors that all experts of a stack of weights have in common.
    """

    variant: Variant
    cfg: AdapterConfig
    site: Site
    p: Params | None
    dropout: float
    slot: str = "0"
    prompt: Prompt | None = None
    row_plan: AnyRowPlan | None = None
    here: Tensor | None = None
    optional: bool = False
    called: bool = False
    seen: SideOutputs | None = None
    shared: Collection[str] = ()

    def changed(self, **fields: Any) -> Attachment:
        """`_replace`, which the compiler of torch 2.8 can't trace."""
        own = zip(Attachment._fields, self, strict=True)
        values: list[Any] = [fields.get(name, value) for name, value in own]
        return Attachment(*values)


def is_here(attachment: Attachment, p: Params) -> Tensor | None:
    """() bool, whether there is an adapter at all; None where there is one in any case.

    Args:
        attachment: the adapter.
        p: its tensors at the site.
    """
    return p[PRESENT] > 0.5 if attachment.optional else attachment.here


def ids_of_rows(attachment: Attachment, rows: int, why: str) -> Tensor:
    """Which member of the stack each row of a batch has, (N,) int64, -1 for none.

    Args:
        attachment: an adapter with a row plan.
        rows: N, how many rows came to the site.
        why: what the method does that can't be another for each token, for the message.

    Raises:
        StructureError: the plan is for another number of rows.
        UnsupportedError: each token has an adapter of its own.
    """
    plan, path = attachment.row_plan, attachment.site.path
    assert isinstance(plan, RowPlan)
    if plan.by_token:
        raise UnsupportedError(
            f"site {path!r}: {attachment.variant.name} {why}, so it can't be another one for each "
            f"token; give an id for each row"
        )
    if plan.rows != rows:
        raise not_rows(path, torch.empty(rows, 0, device="meta"), plan.rows)
    return plan.ids


def everywhere(
    model: nn.Module, sites: Mapping[str, Sequence[Attachment]]
) -> Mapping[str, Sequence[Attachment]]:
    """The adapters by path, with those of tied bare parameters under each of their names."""
    more = tied_names(model, (attachments[-1].site for attachments in sites.values()))
    if not more:
        return sites
    spread = {path: list(attachments) for path, attachments in sites.items()}
    for path, others in more.items():
        for site in others:
            spread.setdefault(site.path, []).extend(
                attachment.changed(site=site) for attachment in sites[path]
            )
    return spread
