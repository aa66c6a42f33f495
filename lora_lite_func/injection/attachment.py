"""One adapter at one site: where its tensors are, and the dense weight that it makes of the layer's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .config import AdapterConfig, dropout_of
from .errors import ConfigError, UnsupportedError
from .hidden import Prompt
from .kinds import KINDS, matrix, restored
from .layers import autocasts
from .layout import FACTOR
from .lookup import keeping_padding
from .plan import Plan
from .spec import Params, Site, Variant

__all__ = [
    "Held",
    "Leaves",
    "Op",
    "check_bias",
    "check_dense",
    "check_dropout",
    "held_by",
    "hold",
    "leaves_at",
    "leaves_of",
    "merge_site",
    "parameters_of",
    "tensors_at",
    "unfolded",
]

_CHILD = "adapter"  # the name under which a bound site holds its adapters' tensors


class Op(NamedTuple):
    """One adapter at one site. `p` is None where the site itself holds the tensors (a bound model): its `slot`-th child.

    `prompt` is what the call knows of its prompt, where the site is a whole module; None in a bound model, whose calls tell it.
    With a `plan` the tensors are a stack's, and each row of the batch has its own member. `here` () bool, where it isn't None, says
    whether there is one: for a row of which that isn't known.
    """

    variant: Variant
    cfg: AdapterConfig
    site: Site
    p: Params | None
    dropout: float
    slot: int = 0
    prompt: Prompt | None = None
    plan: Plan | None = None
    here: Tensor | None = None


class Leaves(nn.Module):
    """The tensors of one adapter at one site of a bound model: trainable ones as parameters, frozen ones as buffers.

    What computes one of them (torch.nn.utils.parametrize, prune) is heeded in each call.
    """

    def __init__(self, tensors: Mapping[str, Tensor], trainable: Mapping[str, bool]) -> None:
        super().__init__()
        self.names = tuple(tensors)
        for name, tensor in tensors.items():
            if trainable[name]:
                self.register_parameter(name, nn.Parameter(tensor.detach()))
            else:
                self.register_buffer(name, tensor.detach())

    def forward(self) -> dict[str, Tensor]:
        """{lora_name: tensor}, as it is now: accelerate puts the module's own away again after the call."""
        return {name: getattr(self, name) for name in self.names}

    def tensors(self) -> dict[str, Tensor]:
        """{lora_name: tensor}, brought from where accelerate put them away, if it did, or made by what prunes them."""
        return self() if "_hf_hook" in self.__dict__ or self._forward_pre_hooks else Leaves.forward(self)


def parameters_of(module: nn.Module) -> dict[str, Tensor | None]:
    """A module's own parameters; of a replica that torch.nn.DataParallel made, which has none, the tensors that stand for them."""
    stand_ins: dict[str, Tensor | None] | None = module.__dict__.get("_former_parameters")
    return {**module._parameters, **stand_ins} if stand_ins else module._parameters  # type: ignore[return-value]


class Held(nn.ModuleList):
    """The child of a bound site with its adapters' tensors: no part of what the site goes through in its call."""


def leaves_at(site: Any, index: int) -> Leaves:
    """The tensors that a bound site holds for its `index`-th adapter."""
    return site._modules[_CHILD]._modules[str(index)]


def leaves_of(site: Any) -> Iterable[Leaves]:
    """The tensors of each adapter that a bound site holds."""
    return site._modules[_CHILD]._modules.values() if _CHILD in site._modules else ()


def held_by(module: Any) -> int:
    """How many adapters' tensors a bound site holds; 0 for any other module."""
    return len(module._modules.get(_CHILD, ())) if hasattr(type(module), "_ll_base") else 0


def hold(site: Any, leaves: Leaves) -> None:
    """Put one more adapter's tensors into a bound site.

    Raises:
        UnsupportedError: the layer has something of its own under the name needed.
    """
    if _CHILD not in site._modules:
        if hasattr(site, _CHILD):
            raise UnsupportedError(f"{type(site).__name__} has an attribute {_CHILD!r}, the name that a bound site needs for itself")
        site._modules[_CHILD] = Held()
    site._modules[_CHILD].append(leaves)


def tensors_at(op: Op, module: Any) -> Params:
    """The tensors of an adapter at a site."""
    if op.p is not None:
        return op.p
    leaves = leaves_at(module, op.slot)
    simple = leaves._parameters and not leaves._buffers and not leaves._modules and "_hf_hook" not in leaves.__dict__
    return leaves._parameters if simple else leaves.tensors()  # type: ignore[return-value]


def unfolded(p: Params, site: Site) -> tuple[Params, Site]:
    """A method's own tensors, and the site with the scale that is among them, if one is: a member of a mixed stack."""
    if FACTOR not in p:
        return p, site
    return {name: t for name, t in p.items() if name != FACTOR}, site.scaled(p[FACTOR])


# ------------------------------------------------------------------------------------------------ the dense equivalent
def check_bias(module: Any, op: Op, b: Tensor | None) -> None:
    """Refuse a merged bias that has no place.

    Raises:
        UnsupportedError: the layer has no parameter for it.
    """
    if b is not None and "bias" not in parameters_of(module):
        raise UnsupportedError(
            f"{op.site.path!r} ({type(module).__name__}): {op.variant.name} merges into a bias, and this layer has no "
            "parameter for one; leave it out with exclude_names, or keep the adapter unmerged"
        )


def check_dropout(module: Any, ops: Iterable[Op]) -> None:
    """Refuse to leave dropout out of training where a weight stands for the method: there is no branch whose input could be dropped.

    Raises:
        UnsupportedError: with the field that asks for it.
    """
    for op in ops if module.training else ():
        if dropout_of(op.cfg):
            raise UnsupportedError(
                f"{op.site.path!r}: {dropout_of(op.cfg)} acts on features that come to a layer's call, and in this model the weight itself "
                "is used here; set it to 0, leave the layer out with exclude_names, or put the model in eval mode"
            )


def check_dense(op: Op) -> None:
    """Refuse a method that no weight can stand for, and rows, which one weight can't serve.

    Raises:
        UnsupportedError: it has no dense equivalent, or another adapter for each row.
    """
    if op.variant.weight is None and not op.variant.has_phases:
        raise UnsupportedError(f"{op.site.path!r}: {op.variant.name} has neither `inputs`, `outputs` nor `weight` in its Variant")
    if op.variant.weight is None:
        raise UnsupportedError(f"{op.site.path!r}: {op.variant.name} has no dense equivalent, so it can't be merged there")
    if op.plan is not None:
        raise UnsupportedError(
            f"{op.site.path!r}: the weight itself is used here, one for the whole batch, so its rows can't have adapters of their own; "
            "leave it out with exclude_names, or call the model once per adapter"
        )


def merge_site(module: Any, ops: Iterable[Op], W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The weight (as it is stored) and bias with the adapters in, summed in float32 at least, returned in the weight's dtype.

    Raises:
        UnsupportedError: a method has no dense equivalent, or the weight isn't at hand (packed, offloaded).
    """
    if autocasts(W.device.type):  # merging isn't the layer's call
        with torch.autocast(W.device.type, enabled=False):
            return merge_site(module, ops, W, b)
    dtype = W.dtype
    core = torch.promote_types(dtype, torch.float32)
    start = None if b is None else b.to(core).reshape(-1)  # a norm's may have several dimensions
    new, bias = W.to(core), start
    for op in ops:
        check_dense(op)
        M, moved = _dense(op, tensors_at(op, module), matrix(new, op.site), bias)
        M = restored(M, new, op.site)
        if op.here is not None:
            M = torch.where(op.here, M, new)
            moved = moved if moved is bias or moved is None else torch.where(op.here, moved, 0.0 if bias is None else bias)
        new, bias = M, moved
    if KINDS[op.site.kind].one_hot:
        if bias is not None:  # every row has it: a one-hot vector's entries sum to one
            new, bias = restored(matrix(new, op.site) + bias[:, None], new, op.site), None
        new = keeping_padding(module, W, new)
    if bias is start or bias is None:
        return new.to(dtype), b
    shape = b.shape if b is not None else W.shape if op.site.d_in == 1 else bias.shape
    return new.to(dtype), bias.reshape(shape).to(dtype)


def _dense(op: Op, p: Params, M: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The variant's dense equivalent on (d_out, d_in), or on each matrix of a stack."""
    weight: Any = op.variant.weight
    p, site = unfolded(p, op.site)
    if not site.stack:
        return _checked(op, weight(op.cfg, p, site, M, b), M)
    return torch.func.vmap(lambda p, M: _checked(op, weight(op.cfg, p, site, M, None), M)[0])(dict(p), M), b


def _checked(op: Op, made: Any, M: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a variant's `weight` gave, if it is the dense equivalent that it should be.

    Raises:
        ConfigError: another type or shape.
        UnsupportedError: a bias where none can be.
    """
    where, size = f"{op.site.path!r}: {op.variant.name}", M.shape[:1]
    if not isinstance(made, tuple) or len(made) != 2:
        raise ConfigError(f"{where}.weight gave {type(made).__name__}, expected (W', b')")
    for name, new, shape in (("W'", made[0], M.shape), ("b'", made[1], size)):
        if (new is not None or name == "W'") and (not isinstance(new, Tensor) or new.shape != shape):
            found = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise ConfigError(f"{where}.weight gave {found} for {name} {tuple(shape)}")
    if made[1] is not None and KINDS[op.site.kind].bare:
        raise UnsupportedError(
            f"{where} moves a bias, which a bare parameter hasn't; choose other parameters (a method that always moves one says in its "
            "`sites` what it can adapt)"
        )
    return made
