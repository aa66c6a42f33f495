"""Adapters between an attention's softmax and its output projection, in models of transformers.

Their attention modules call a function that their config names. A site's copy has a config of its
own, which names the one here: it calls the function that the model's config names, and lets the
adapters change what that gives. The name is registered once per process; the
module that calls says which adapters are meant.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.site import Site
from ..core.stacked import unfolded
from .attachment import Attachment, ids_of_rows, is_here
from .state import tensors_at

__all__ = ["turn_to_adapters"]

_NAME = "lora_lite_func"
_CONFIG = "_ll_attention_config"
"""The attribute of a site's copy with the config that is the model's, where `config` is its own."""

_MEETS = "changes an attention, in which tokens meet"


def turn_to_adapters(site: Any) -> None:
    """Let the copy of an attention module call the adapters, by a config of its own."""
    from transformers import AttentionInterface

    attributes = site.__dict__
    if _CONFIG in attributes:
        return
    AttentionInterface.register(_NAME, _attention)
    attributes[_CONFIG] = site.config
    own = copy.copy(site.config)
    own.__dict__["_attn_implementation_internal"] = _NAME
    attributes["config"] = own


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Any]:
    """The model's own attention with the adapters of the module in what it gives."""
    model_code: Any = sys.modules[type(module)._ll_base.__module__]
    name = module.__dict__[_CONFIG]._attn_implementation
    eager = name in (None, "eager")
    own = model_code.eager_attention_forward if eager else model_code.ALL_ATTENTION_FUNCTIONS[name]
    attachments = module._ll.attachments
    _record(attachments, "inputs", query)
    y, weights = own(module, query, key, value, attention_mask, **kwargs)
    scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
    for attachment in attachments:
        if attachment.variant.attend is not None:
            y = _attended(attachment, module, query, scaling, y)
    _record(attachments, "outputs", query, y)
    return y, weights


def _attended(
    attachment: Attachment, module: Any, query: Tensor, scaling: float, y: Tensor
) -> Tensor:
    """What one adapter makes of what attention gave."""
    attend, plan = attachment.variant.attend, attachment.row_plan
    assert attend is not None
    p, here = tensors_at(attachment, module), None
    if plan is None:
        here = is_here(attachment, p)
    else:
        ids = ids_of_rows(attachment, query.shape[0], _MEETS).to(query.device)
        p = {name: t.index_select(0, ids.clamp(min=0)) for name, t in p.items()}
        here = (ids >= 0)[:, None, None, None]
    q, site = unfolded(p, attachment.site)
    made = attend(attachment.cfg, q, _keys(module, query), query, scaling, y, site)
    return made if here is None else torch.where(here, made, y)


def _keys(module: Any, like: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Takes hidden states (..., P, d) to keys and values (..., heads, P, size) by the module's own
    projections, in as many heads as the queries have.
    """
    groups = getattr(module, "num_key_value_groups", 1)

    def projected(name: str, a: Tensor) -> Tensor:
        t = getattr(module, name)(a).unflatten(-1, (-1, module.head_dim))
        if name == "k_proj" and getattr(module, "k_norm", None) is not None:
            t = module.k_norm(t)
        return t.transpose(-2, -3).repeat_interleave(groups, dim=-3)

    def keys(a: Tensor) -> tuple[Tensor, Tensor]:
        a = a.to(like.dtype)
        return projected("k_proj", a), projected("v_proj", a)

    return keys


def _record(attachments: Any, phase: str, *tensors: Tensor) -> None:
    """Run the phases of adapters of another kind, with which `ll.check` records a call."""
    for a in attachments:
        function = None if a.variant.attend is not None else getattr(a.variant, phase)
        if function is not None:
            site: Site = a.site
            function(a.cfg, a.p or {}, None, *tensors, site)
