"""Row plans and children of a module for some rows of the batch alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..core.torch_internals import first_of
from .attachment import AnyRowPlan, Attachment
from .linear import choose
from .rebinding import turn_callables
from .references import shallow_copy
from .state import SiteState

__all__ = ["Within", "narrowed", "of_rows"]


Within = Callable[[AnyRowPlan], AnyRowPlan]
"""Makes the plan of some rows from the plan of all rows."""


def of_rows(rows: Sequence[int]) -> Within:
    """A function that makes the plans of these rows, each once, from the plans of all rows."""
    made: list[tuple[AnyRowPlan, AnyRowPlan]] = []

    def within(plan: AnyRowPlan) -> AnyRowPlan:
        found = first_of((new for old, new in made if old is plan), None)
        if found is None:
            found = plan.only(rows)
            made.append((plan, found))
        return found

    return within


_NO_SITE = SiteState("")


def narrowed(module: nn.Module, within: Within) -> dict[str, nn.Module | None]:
    """A module's children for some rows of the batch.

    Children in which rows have adapters of their own are copied. The others are returned as they
    are.
    """
    copies: dict[int, Any] = {}
    own: list[nn.Module] = []

    def narrow(attachments: Sequence[Attachment]) -> tuple[Attachment, ...]:
        return tuple(
            attachment
            if attachment.row_plan is None
            else attachment.changed(row_plan=within(attachment.row_plan))
            for attachment in attachments
        )

    def visit(child: nn.Module) -> nn.Module:
        if id(child) in copies:
            return copies[id(child)]
        inside = {name: c if c is None else visit(c) for name, c in child._modules.items()}
        state: SiteState = child.__dict__.get("_ll", _NO_SITE)
        attachments, subs = state.attachments, state.substituted
        mixed = any(
            attachment.row_plan is not None
            for chain in (attachments, *subs.values())
            for attachment in chain
        )
        made = child
        if mixed or any(inside[name] is not c for name, c in child._modules.items()):
            made = shallow_copy(child, type(child))
            own.append(made)
            made.__dict__["_modules"] = inside
            if mixed:
                attachments = narrow(attachments)
                made.__dict__["_ll"] = replace(
                    state,
                    attachments=attachments,
                    substituted={name: narrow(chain) for name, chain in subs.items()},
                    step=state.step and choose(attachments),
                )
        copies[id(child)] = made
        return made

    children = {name: c if c is None else visit(c) for name, c in module._modules.items()}
    for made in own:
        turn_callables(made, copies)
    return children
