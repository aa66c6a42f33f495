"""The weight route: a module's own call on adapted tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..core.errors import UnsupportedError
from ..core.torch_internals import flatten_again, parameters_of, with_class
from ..kernels.mixture import Mixture
from ..kernels.row_plan import RowPlan
from ..layers.kinds import KINDS
from .attachment import Attachment
from .checks import check_bias, check_training
from .dense_weight import merge_site
from .narrowing import Within, narrowed
from .rebinding import turn_callables
from .references import shallow_copy
from .rows_weight import Chains, by_adapters
from .tokens_weight import by_tokens, has_tokens

__all__ = ["Tensors", "adapted", "chains_of", "substituted"]

Tensors: TypeAlias = Mapping[str, Tensor | None]
"""{name: tensor} of a module, None where it has none of that name."""


def substituted(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The module's own call on its adapted tensors.

    Where rows have adapters of their own, the module is called once for each of those.
    """
    chains = chains_of(self)
    if all(
        attachment.row_plan is None for attachments in chains.values() for attachment in attachments
    ):
        return _on_adapted(self, chains, args, kwargs)

    def holder(key: tuple[str, str]) -> Any:
        return self._modules[key[0]] if key[0] else self

    def call(
        chains: Chains, args: tuple[Any, ...], kwargs: dict[str, Any], within: Within | None = None
    ) -> Any:
        return _on_adapted(self, chains, args, kwargs, within)

    _check_unmixed(self, chains)
    chains = _at_input(self, chains, args)
    way = by_tokens if has_tokens(chains) else by_adapters
    return way(self, chains, holder, call, args, kwargs)


def _at_input(site: Any, chains: Chains, args: tuple[Any, ...]) -> Chains:
    """The adapters with the plans for the site's input, which may have its tokens flattened."""
    if not args or not isinstance(args[0], Tensor):
        return chains

    def at(attachment: Attachment) -> Attachment:
        plan = attachment.row_plan
        if not isinstance(plan, RowPlan) or not plan.flattened:
            return attachment
        return attachment.changed(row_plan=plan.at(args[0], site._ll.path))

    return {key: tuple(map(at, attachments)) for key, attachments in chains.items()}


def _check_unmixed(site: Any, chains: Chains) -> None:
    """Refuse a weighted sum of several members' updates for each row.

    Raises:
        UnsupportedError: there is one; the message says what to do instead.
    """
    for attachment in (a for attachments in chains.values() for a in attachments):
        if isinstance(attachment.row_plan, Mixture):
            raise UnsupportedError(
                f"{attachment.site.path!r} ({site._ll_base.__name__}): its weight itself is "
                f"adapted, so there is no update of its output that could be summed for each row; "
                f"leave it out with exclude_names, or give each row one member (ll.rows)"
            )


def chains_of(site: Any) -> Chains:
    """The adapters that go into each tensor that a site substitutes.

    The keys are (name of the child that holds the tensor, or "", name of the tensor).
    """
    own = {("", name): attachments for name, attachments in site._ll.substituted.items()}
    return own | {
        (child, name): attachments
        for child in site._ll.inner
        for name, attachments in site._modules[child]._ll.substituted.items()
    }


def _on_adapted(
    self: Any,
    chains: Chains,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    within: Within | None = None,
) -> Any:
    """The call on tensors with the adapters of `chains` in them.

    What the module notes on itself during the call stays noted.
    """
    made = _concrete(self, chains)
    if within is not None:
        made.__dict__["_modules"] = narrowed(made, within)
    if torch.compiler.is_dynamo_compiling():
        return made.forward(*args, **kwargs)
    before = dict(made.__dict__)
    try:
        return made.forward(*args, **kwargs)
    finally:
        for name, value in made.__dict__.items():
            if before.get(name, before) is not value and not name.startswith("_flat_weight"):
                self.__dict__[name] = value


def _concrete(site: Any, chains: Chains) -> Any:
    """A plain module that stands for a site for the length of one call.

    It is of the layer's own class. The adapted tensors are computed once and are in place as plain
    ones.
    """
    made = shallow_copy(site, site._ll_base)
    attributes = made.__dict__
    attributes["_parameters"] = {
        **parameters_of(site),
        **adapted(site, chains, parameters_of(site)),
    }
    for name in attributes["_parameters"]:
        # A replica has a stand-in of this name, which would be read first.
        if name in attributes:
            del attributes[name]
    # Torch bounds the norms of the table in place, so the call gets a table of its own.
    if attributes.get("max_norm") is not None:
        attributes["_parameters"]["weight"] = attributes["_parameters"]["weight"].clone()
    inner = site._ll.inner
    if inner:
        held = {
            name: {
                ("", tensor): attachments
                for (child, tensor), attachments in chains.items()
                if child == name
            }
            for name in inner
        }
        attributes["_modules"] = {
            **site._modules,
            **{name: _concrete(site._modules[name], held[name]) for name in inner},
        }
    own = site._ll.own_forward
    if own is not None:
        # The forward that the instance carried, and whatever is bound to it, works on this one.
        attributes["forward"] = own
        turn_callables(made, {id(site): made})
    flatten_again(made)
    return made


def adapted(module: Any, chains: Chains, stored: Tensors) -> Tensors:
    """{name: tensor}: a module's stored tensors with the adapters in them."""
    made: dict[str, Tensor | None] = {}
    for (child, name), attachments in chains.items():
        if child or not attachments:
            continue
        check_training(module, attachments)
        pair = not KINDS[attachments[0].site.kind].bare
        bias = stored.get("bias") if pair else None
        buffer = module._buffers.get(name)
        W = stored.get(name) if buffer is None else buffer
        assert W is not None
        merged, b = merge_site(module, attachments, W, bias)
        made[name] = with_class(merged, W)
        # The call may count or average in a buffer, and that must not be kept in the adapter.
        if buffer is not None:
            made[name] = made[name].clone()  # type: ignore[union-attr]
        if b is not None:
            check_bias(module, attachments[-1], b)
            made["bias"] = b
    return made
