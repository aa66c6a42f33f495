"""What a module's call may write on in place, as far as the code of its class tells.

Counters, statistics and caches are kept in tensors that a forward writes on, and some models bound
their weights while they run. The copied tree has copies of those, so that nothing reaches the base.
Weights, and large tables that are only read, mustn't be copied in every call.
"""

from __future__ import annotations

import dis
import types
from collections.abc import Iterator

from torch import nn

from ..core.torch_internals import at_trace_time
from ..core.weak_memo import WeakMemo
from .prompt_scope import under_scope
from .references import is_users
from .unfollowed import calls_of

__all__ = ["may_write", "writes_directly"]


@at_trace_time
def may_write(cls: type[nn.Module]) -> bool:
    """Whether the calls of a class may write in place on what it holds, in evaluation mode.

    The layers of torch and of the libraries that are known write in training mode alone.
    """
    return _MAY_WRITE(cls)


def _may_write(cls: type[nn.Module]) -> bool:
    cls = getattr(cls, "_ll_base", under_scope(cls))
    return any(_writes(function.__code__) for function in _reached(cls))


_MAY_WRITE = WeakMemo(_may_write)


def _reached(cls: type[nn.Module]) -> Iterator[types.FunctionType]:
    """The user's functions that the calls of a class may reach: its own, what those are wrapped
    around, and those that they name.
    """
    left, done = list(calls_of(cls)), set[types.CodeType]()
    while left:
        function = left.pop()
        if function.__code__ in done or not is_users(function.__module__ or ""):
            continue
        done.add(function.__code__)
        yield function
        for cell in function.__closure__ or ():
            try:
                held = cell.cell_contents
            except ValueError:  # it isn't filled yet
                continue
            left += [held] if isinstance(held, types.FunctionType) else []
        named = map(function.__globals__.get, function.__code__.co_names)
        left += [f for f in named if isinstance(f, types.FunctionType)]


def writes_directly(cls: type[nn.Module]) -> tuple[tuple[str, ...], ...]:
    """The tensors that the calls of a class write on by name, each as the attributes that lead to
    it: ("scale",) for `self.scale.clamp_(0)`, ("norm", "bias") for `self.norm.bias.data = ...`.

    One that is written under another name (`w = self.scale; w += 1`) isn't seen.
    """
    cls = getattr(cls, "_ll_base", under_scope(cls))
    found = [_direct(function.__code__) for function in calls_of(cls)]
    return tuple(sorted(set[tuple[str, ...]]().union(*found)))


def _direct(code: types.CodeType) -> set[tuple[str, ...]]:
    found: set[tuple[str, ...]] = set()
    chains: dict[str, tuple[str, ...]] = {}
    chain: tuple[str, ...] = ()
    before, adds = "", False
    for i in dis.get_instructions(code):
        if i.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            chain = () if before.startswith(("LOAD_FAST", "LOAD_GLOBAL", "LOAD_DEREF")) else chain
            if _is_in_place(i.argval):
                found.add(chain)
            else:
                chain = (*chain, i.argval)
                chains[i.argval] = chain
        elif i.opname == "STORE_ATTR":
            if i.argval == "data":
                found.add(chain)
            elif adds:
                found.add(chains.get(i.argval, ()))
        adds = _adds(i) or (adds and i.opname not in ("STORE_ATTR", "STORE_FAST"))
        before = i.opname
    for held in code.co_consts:
        if isinstance(held, types.CodeType):
            found |= _direct(held)
    return {chain[: chain.index("data")] if "data" in chain else chain for chain in found} - {()}


def _is_in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _adds(i: dis.Instruction) -> bool:
    """Whether it is `+=` or the like."""
    return i.opname.startswith("INPLACE_") or (i.opname == "BINARY_OP" and i.argrepr.endswith("="))


def _writes(code: types.CodeType) -> bool:
    """Whether a function has a statement that may write on a tensor in place."""
    if any(map(_is_in_place, code.co_names)):
        return True
    for held in code.co_consts:
        if isinstance(held, types.CodeType) and _writes(held):
            return True
        if isinstance(held, tuple) and "out" in held:  # the keyword of a call
            return True
    return any(i.opname == "STORE_SUBSCR" or _adds(i) for i in dis.get_instructions(code))
