"""A module's own call on a batch whose rows have adapters of their own: once for each adapter, on its rows and its weights.

Where the rows are in what comes to a call its class says; of a class that isn't known, what can't be told is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from .errors import UnsupportedError
from .ops import Op, tensors_at
from .plan import Parts, Plan, not_rows, parted
from .rebind import BINDABLE, rebound, twin
from .spec import Params

__all__ = ["Chains", "Within", "by_adapters", "narrowed"]

Chains = Mapping[tuple[str, str], tuple[Op, ...]]
"""The adapters that go into each tensor that a module substitutes, by names of the module's child (or "") and the tensor."""

Within = Callable[[Plan], Plan]
"""The plan of a part's rows, of a plan of all rows."""

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


class _Rows(NamedTuple):
    """Where a tensor has its rows: in which dimension, and how many of its entries are one row's."""

    dim: int = 0
    each: int = 1


_FIRST = _Rows()


def by_adapters(
    module: Any, chains: Chains, home: Callable[[Any], Any], call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The module's output, each row's by its own adapters.

    Args:
        module: the site.
        chains: its adapters, some of them a stack's with a plan of the rows.
        home: key of a chain -> the module that holds its tensors.
        call: (chains, args, kwargs, within) -> the output, for adapters that all rows have; `within` is for what is inside the module.
        args: of the call.
        kwargs: of the call.

    Raises:
        StructureError: a tensor hasn't the rows where it should.
        UnsupportedError: rows meet in the module, or can't be told in what comes to it or leaves it.
    """
    _check_apart(module)
    mixed = {(key, i): op for key, ops in chains.items() for i, op in enumerate(ops) if op.plan is not None}
    plans = [op.plan for op in mixed.values() if op.plan is not None]
    flat, form = pytree.tree_flatten((args, kwargs))
    places = _places(module, args, kwargs, flat, [plan.rows for plan in plans])
    lead = next((t for t, at in zip(flat, places, strict=True) if at is not None))
    parts = parted(plans, lead.device)
    members = {at: _members(op, home(at[0]), parts, n) for n, (at, op) in enumerate(mixed.items())}
    cut = [[t] * len(parts.rows) if at is None else _cut(t, at, parts) for t, at in zip(flat, places, strict=True)]
    made = []
    for n, rows in enumerate(parts.rows):
        own = {
            key: tuple(one for i, op in enumerate(ops) if (one := members[key, i][n] if (key, i) in members else op) is not None)
            for key, ops in chains.items()
        }
        within = None if len(parts.rows) == 1 else _of(rows)
        made.append(call(own, *pytree.tree_unflatten([pieces[n] for pieces in cut], form), within))
    if not made:  # no rows
        return call({key: tuple(op for op in ops if op.plan is None) for key, ops in chains.items()}, args, kwargs)
    return made[0] if len(made) == 1 else _joined(module, made, parts)


def _members(op: Op, module: Any, parts: Parts, plan: int) -> list[Op | None]:
    """The adapter of each part; None where it has none."""
    index, bare, here = parts.members[plan], parts.bare[plan], parts.here[plan]
    leaves = {name: t.index_select(0, index.to(t.device)).unbind(0) for name, t in tensors_at(op, module).items()}
    flags = [None] * len(bare) if here is None else here.unbind(0)
    own: list[Params] = [{name: ts[n] for name, ts in leaves.items()} for n in range(len(bare))]
    return [None if bare[n] else op._replace(p=own[n], plan=None, here=flags[n]) for n in range(len(bare))]


def _cut(t: Tensor, at: _Rows, parts: Parts) -> Sequence[Tensor]:
    """A tensor's rows, part by part."""
    dim, each = at
    sizes = [len(rows) * each for rows in parts.rows]
    if parts.take is None:
        return t.split(sizes, dim)
    take = parts.take.to(t.device)
    if each > 1:
        take = (take[:, None] * each + torch.arange(each, device=t.device)).flatten()
    return t.index_select(dim, take).split(sizes, dim)


def _joined(module: Any, made: list[Any], parts: Parts) -> Any:
    """The parts' outputs as one, each row where it was."""
    columns, forms = zip(*map(pytree.tree_flatten, made), strict=True)
    path, kind = module._ll_path, type(module).__name__
    joined: list[Any] = []
    for n, column in enumerate(zip(*columns, strict=True)):
        if not isinstance(column[0], Tensor):
            if not isinstance(column[0], _PLAIN) or any(value != column[0] for value in column):
                raise UnsupportedError(f"{path!r} ({kind}): {_OUTPUT.format(type(column[0]).__name__)}")
            joined.append(column[0])
            continue
        dim = _output_dim(module, n)
        for t, rows in zip(column, parts.rows, strict=True):
            if t.ndim <= dim or t.shape[dim] != len(rows):
                raise not_rows(path, t, len(rows))
        whole = torch.cat(column, dim)
        joined.append(whole if parts.back is None else whole.index_select(dim, parts.back.to(whole.device)))
    return pytree.tree_unflatten(joined, forms[0])


_OUTPUT = "its output holds a {}, in which the rows of several adapters can't be told apart; leave it out with exclude_names"


def _of(rows: Sequence[int]) -> Within:
    made: list[tuple[Plan, Plan]] = []

    def within(plan: Plan) -> Plan:
        found = next((new for old, new in made if old is plan), None)
        if found is None:
            found = plan.only(rows)
            made.append((plan, found))
        return found

    return within


def narrowed(module: nn.Module, within: Within) -> dict[str, nn.Module | None]:
    """A module's children for a part's rows: copies of those in which rows have adapters of their own, the others themselves."""
    copies: dict[int, Any] = {}

    def narrow(ops: Sequence[Op]) -> tuple[Op, ...]:
        return tuple(op if op.plan is None else op._replace(plan=within(op.plan)) for op in ops)

    def visit(child: nn.Module) -> nn.Module:
        if id(child) in copies:
            return copies[id(child)]
        had, inside = child.__dict__, {name: c if c is None else visit(c) for name, c in child._modules.items()}
        ops, subs = had.get("_ll_ops", ()), had.get("_ll_subs", {})
        mixed = any(op.plan is not None for chain in (ops, *subs.values()) for op in chain)
        made = child
        if mixed or any(inside[name] is not c for name, c in child._modules.items()):
            made = twin(child, type(child))
            made.__dict__["_modules"] = inside
            if mixed:
                made.__dict__.update(_ll_ops=narrow(ops), _ll_subs={name: narrow(chain) for name, chain in subs.items()})
        copies[id(child)] = made
        return made

    children = {name: c if c is None else visit(c) for name, c in module._modules.items()}
    for made in copies.values():
        for name, value in made.__dict__.items():
            if isinstance(value, BINDABLE) and rebound(value, copies, 0) is not value:
                made.__dict__[name] = rebound(value, copies, 0)
    return children


# ------------------------------------------------------------------------------------------------------ where rows are
def _check_apart(module: Any) -> None:
    """Refuse a module in whose call rows meet."""
    for part in module.modules():
        together = isinstance(part, nn.modules.batchnorm._BatchNorm) and (part.training or part.running_mean is None)
        counts = isinstance(part, nn.modules.instancenorm._InstanceNorm) and part.training and part.track_running_stats
        if together or counts:
            raise UnsupportedError(
                f"{module._ll_path!r}: statistics of its {type(part).__name__} are the whole batch's, so its rows can't have adapters of "
                "their own; put that in eval mode, with running statistics, or leave the site out with exclude_names"
            )


def _places(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], flat: list[Any], counts: Sequence[int]) -> list[_Rows | None]:
    """Where each leaf of a call's arguments has its rows; None for what all rows share."""
    path = module._ll_path
    if isinstance(module, nn.MultiheadAttention):
        places = _of_attention(module, args, kwargs)
    elif isinstance(module, nn.RNNBase):
        places = _of_recurrent(module, args, kwargs, flat)
    else:
        places = _of_others(module, flat, counts[0])
    for t, at in zip(flat, places, strict=True):
        for rows in counts:
            if at is not None and (t.ndim <= at.dim or t.shape[at.dim] != rows * at.each):
                raise not_rows(path, t, rows)
    return places


def _of_attention(module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[_Rows | None]:
    names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal")
    given = [*zip(names, args, strict=False), *kwargs.items()]
    along = _Rows(0 if module.batch_first else 1)
    where = dict.fromkeys(names[:3], along) | {"key_padding_mask": _FIRST}
    for name, value in given:
        if name == "attn_mask" and value is not None and value.ndim == 3:
            where[name] = _Rows(0, module.num_heads)
        if name in names[:3] and value.ndim != 3:
            raise _unbatched(module, value)
    return [where.get(name) if isinstance(value, Tensor) else None for name, value in given]


def _of_recurrent(module: nn.RNNBase, args: tuple[Any, ...], kwargs: dict[str, Any], flat: list[Any]) -> list[_Rows | None]:
    x = args[0] if args else kwargs["input"]
    if isinstance(x, nn.utils.rnn.PackedSequence):
        raise UnsupportedError(f"{module._ll_path!r}: rows of a packed sequence can't have adapters of their own; give it padded")
    if x.ndim != 3:
        raise _unbatched(module, x)
    own = _Rows(0 if module.batch_first else 1)
    return [None if not isinstance(t, Tensor) else own if t is x else _Rows(1) for t in flat]


def _of_others(module: Any, flat: list[Any], rows: int) -> list[_Rows | None]:
    """Torch's layers take rows first in every tensor. Of a stranger the first tensor does; another may be shared by all rows."""
    tensors = [t for t in flat if isinstance(t, Tensor)]
    odd = next((value for value in flat if not isinstance(value, (Tensor, *_PLAIN))), None)
    if odd is not None or not tensors:
        what = "no tensor" if odd is None else f"a {type(odd).__name__}"
        raise UnsupportedError(f"{module._ll_path!r} ({type(module).__name__}): is given {what}, {_INPUT}")
    x, least = tensors[0], _least(module)
    if x.ndim < (least or 1):
        raise _unbatched(module, x)
    if x.shape[0] != rows:
        raise not_rows(module._ll_path, x, rows)
    if least:
        return [_FIRST if isinstance(t, Tensor) else None for t in flat]
    return [None if not isinstance(t, Tensor) else _FIRST if t is x else _of_stranger(module, t, x, rows) for t in flat]


_INPUT = "in which rows can't be told apart; leave it out with exclude_names, or call the model once per adapter"


def _of_stranger(module: Any, t: Tensor, x: Tensor, rows: int) -> _Rows | None:
    """Where a further tensor of an unknown module has its rows, x (rows, ...) being the first."""
    if t.ndim == 0 or (t.shape[0] == 1 != rows):
        return None
    inner = t.shape[0] in x.shape[1:]
    if inner != (t.shape[0] == rows):
        return None if inner else _FIRST
    raise UnsupportedError(
        f"{module._ll_path!r} ({type(module).__name__}): is given a tensor of shape {tuple(t.shape)} beside one of shape "
        f"{tuple(x.shape)}, of which it can't be told whether its first dimension is the {rows} rows; {_INPUT}"
    )


def _least(module: Any) -> int:
    """How many dimensions an input with rows has at least, where the module's class is known; 0 for a stranger's."""
    match module:
        case nn.modules.conv._ConvNd():
            return len(module.kernel_size) + 2
        case nn.LayerNorm() | nn.RMSNorm():
            return len(module.normalized_shape) + 1
        case nn.modules.instancenorm._InstanceNorm():
            return module._get_no_batch_dim() + 1
        case nn.Linear() | nn.Bilinear() | nn.GroupNorm() | nn.modules.batchnorm._NormBase():
            return 2
        case nn.Embedding():
            return 1
        case nn.EmbeddingBag():
            return 2
    return 0


def _unbatched(module: Any, x: Tensor) -> UnsupportedError:
    return UnsupportedError(
        f"{module._ll_path!r} ({type(module).__name__}): is given a tensor of shape {tuple(x.shape)}, which has no dimension of rows; "
        "give it a batch, or call the model once per adapter"
    )


def _output_dim(module: Any, n: int) -> int:
    """Where the n-th leaf of a module's output has its rows."""
    if isinstance(module, nn.MultiheadAttention):
        return 0 if module.batch_first or n else 1
    if isinstance(module, nn.RNNBase):
        return 0 if module.batch_first and not n else 1
    return 0
