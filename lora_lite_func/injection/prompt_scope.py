"""Calls that know their prompt, and how they hand it to the sites inside.

A model's call has an attention mask. So has the call of each stack in it: an encoder, which
`generate` calls alone, or a decoder, whose mask isn't the encoder's. Such a call runs on copies of
the modules that lead to sites, and each copy carries the prompt. So whatever runs a block again
(gradient checkpointing, in a backward pass, in any thread) finds the prompt of the call that the
block was in, and calls inside one another don't disturb each other.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.torch_internals import at_trace_time, own_attributes, paired
from ..layers.kinds import KINDS
from ..layers.signatures import arguments_of
from .prompt import Prompt
from .rebinding import Rebinding
from .references import PLAIN, refers, shallow_copy

__all__ = ["has_own_prompt", "is_scope", "scope_class", "takes_mask", "under_scope"]

_MASK = "attention_mask"
_TOKENS = ("input_ids", "inputs_embeds")
_ENCODED = "encoder_hidden_states"
_OWN = ("_modules", "_ll_prompt", "forward")
"""Attributes that belong to the copy of a call, so that they aren't handed back."""


# ----------------------------------------------------------------------- what a call says of itself
@at_trace_time
def has_own_prompt(cls: type) -> bool:
    """Whether calls of a class have a mask of their own, as those of a stack that takes tokens."""
    return takes_mask(cls) and any(name in arguments_of(cls) for name in _TOKENS)


@at_trace_time
def takes_mask(cls: type) -> bool:
    """Whether calls of a class are given a mask, their own or what their stack makes of its own."""
    return _MASK in arguments_of(cls)


def _prompt_of(
    cls: type, args: tuple[Any, ...], kwargs: Mapping[str, Any], outer: Prompt | None
) -> Prompt:
    """What a call says of its prompt.

    It says its attention mask (N, T), since padding is no part of the prompt, and whether it goes
    on from a cache. Where it says nothing, the prompt is that of the call around it.

    What a part that takes no tokens is given may be made for its layers: a cache that those before
    it have filled, a mask that is added. So of such a part a mask of whole numbers alone counts.
    """
    given = {**dict(paired(arguments_of(cls), args)), **kwargs}
    mask = given.get(_MASK)
    if outer is not None and not has_own_prompt(cls):
        counts = isinstance(mask, Tensor) and mask.ndim == 2 and not mask.is_floating_point()
        return outer._replace(mask=mask) if counts else outer
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        encoders = mask is None and given.get(_ENCODED) is not None
        mask = None if outer is None or encoders else outer.mask
    caches = [v for name, v in given.items() if v is not None and _is_cache(name, v)]
    if not caches:
        return Prompt(mask, cached=outer is not None and outer.cached)
    return Prompt(mask, cached=any(map(_holds_tokens, caches)), may_go_on=True)


def _is_cache(name: str, value: Any) -> bool:
    return "past" in name or name.startswith("cache") or hasattr(type(value), "get_seq_length")


def _holds_tokens(cache: Any) -> bool:
    """Whether a model's key-value cache goes on from earlier tokens.

    It is known for a cache of transformers and for a sequence of pairs. For others it isn't known.
    """
    length = getattr(cache, "get_seq_length", None)
    if callable(length):
        return bool(length() > 0)
    return isinstance(cache, (tuple, list)) and bool(cache)


# -------------------------------------------------------------------------------- classes of scopes
@at_trace_time
def is_scope(cls: type) -> bool:
    """Whether modules of a class tell their sites the prompt of each call."""
    return hasattr(cls, "_ll_under")


@at_trace_time
def under_scope(cls: Any) -> Any:
    """The class that a scope's class was made of; any other class itself."""
    return getattr(cls, "_ll_under", cls)


@at_trace_time
def scope_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The subclass whose calls tell the sites inside their prompt; it is made once per class."""
    made: type[nn.Module] | None = cls.__dict__.get(_KEPT)
    if made is None:

        @functools.wraps(getattr(cls, "_ll_base", cls).forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return _call(self, args, kwargs)

        body = {
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__reduce_ex__": _reduce_scope,
            "_ll_under": cls,
            "forward": forward,
        }
        made = type(cls.__name__, (cls,), body)
        type.__setattr__(cls, _KEPT, made)
    return made


_KEPT = "_ll_scope_class"


def _reduce_scope(self: Any, protocol: Any) -> tuple[Any, ...]:
    cls: Any = next(base for base in type(self).__mro__ if "_ll_under" in base.__dict__)
    make, args, *rest = super(cls, self).__reduce_ex__(protocol)
    under = tuple(cls._ll_under if arg is type(self) else arg for arg in args)
    return _new_scope, (make, under), *rest


def _new_scope(make: Any, args: tuple[Any, ...]) -> Any:
    made = make(*args)
    made.__class__ = scope_class(type(made))
    return made


# ----------------------------------------------------------------------------------------- the call
def _call(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a scope's call on copies that carry its prompt.

    What modules note on themselves during the call stays noted.
    """
    outer: Prompt | None = self.__dict__.get("_ll_prompt")
    under = self._ll_under
    prompt_call = _PromptCall(_prompt_of(under, args, kwargs, outer))
    made = prompt_call.copy(self, under)
    prompt_call.rebind()
    own = made.__dict__.get("_ll_forward")
    forward = made.forward if own is None else own
    if torch.compiler.is_dynamo_compiling():
        return forward(*args, **kwargs)
    before = [(module, copy, dict(copy.__dict__)) for module, copy in prompt_call.pairs]
    try:
        return forward(*args, **kwargs)
    finally:
        originals = {id(copy): module for module, copy in prompt_call.pairs}
        for module, copy, attributes in before:
            for name, value in copy.__dict__.items():
                if name not in _OWN and attributes.get(name, attributes) is not value:
                    module.__dict__[name] = originals.get(id(value), value)


class _PromptCall:
    """One call's copies of the modules that lead to sites.

    Args:
        prompt: what is known of the call's prompt.
    """

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt
        self.pairs: list[tuple[Any, Any]] = []
        self.seen: dict[int, Any] = {}

    def copy(self, module: Any, cls: type[nn.Module]) -> Any:
        """A copy of a module of class `cls`, with copies of what leads to sites inside."""
        made = shallow_copy(module, cls)
        self.seen[id(module)] = made
        self.pairs.append((module, made))
        if "forward" in made.__dict__:
            del made.__dict__["forward"]
        made.__dict__["_ll_prompt"] = self.prompt
        made.__dict__["_modules"] = self._children(module)
        return made

    def _children(self, module: Any) -> dict[str, Any]:
        children: dict[str, Any] = module._modules.copy()
        for name, child in module._modules.items():
            if child is not None and (child._modules or "_ll" in child.__dict__):
                children[name] = self._visit(child)
        return children

    def _visit(self, module: Any) -> Any:
        """The copy of a module that leads to a site, or the module itself if it leads to none."""
        if id(module) in self.seen:
            return self.seen[id(module)]
        self.seen[id(module)] = module
        # A scope inside goes on from there in its own call.
        scope = is_scope(type(module))
        children = module._modules if scope else self._children(module)
        same = all(children[name] is child for name, child in module._modules.items())
        if same and not scope and not _reads_prompt(module):
            return module
        made = shallow_copy(module, type(module))
        made.__dict__["_modules"] = children
        made.__dict__["_ll_prompt"] = self.prompt
        self.seen[id(module)] = made
        self.pairs.append((module, made))
        return made

    def rebind(self) -> None:
        """Turn references to the copied modules to their copies."""
        rebinding = Rebinding({id(module): copy for module, copy in self.pairs})
        for _, copy in self.pairs:
            attributes = copy.__dict__
            names = [
                name
                for name, value in own_attributes(copy)
                if type(value) not in PLAIN and name not in _NOT_OURS and refers(value)
            ]
            for name in names:
                attributes[name] = rebinding.turned(attributes[name])


_NOT_OURS = ("_ll", "_ll_bound", "_ll_prompt")


def _reads_prompt(module: Any) -> bool:
    state = module.__dict__.get("_ll")
    return state is not None and any(KINDS[a.site.kind].listed for a in state.attachments)
