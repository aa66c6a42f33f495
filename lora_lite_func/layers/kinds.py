"""The kinds of site, as a table: how each is recognised, its size, its weight as methods see it.

Methods see a matrix (d_out, d_in), or (E, d_out, d_in) for E experts, however it is stored:

    linear      nn.Linear and whatever has in_features, out_features and weight; transformers'
                Conv1D, which is stored (d_in, d_out)
    conv        W.flatten(1): (out channels, in channels / groups * kernel entries); of a transposed
                one, stored (in channels, out channels / groups, ...), a row per output channel too
    embedding   the linear map from one-hot ids: the table's transpose, (features, number of ids)
    norm        the gain as a column, (features, 1); of Gemma's norms 1 + the stored one
    parameter   a bare tensor of two or more dimensions; one of three is a stack of experts, unless
                it is a kernel
    vector      a bare tensor of one dimension or none, as a column
    module      any module whose output is a hidden state: no weight, d_in = d_out = its width
    call        the whole call of a model that embeds tokens: no weight, d_in = d_out = their width
    cache       the same of a model with a key-value cache: d_in its layers, d_out a layer's keys
    attention   an attention module of transformers, between softmax and output projection: no
                weight, d_in the width of what comes to it, d_out that of all heads
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ..core.config import DEFAULT_EXCLUDE
from ..core.site import Site
from ..core.torch_internals import first_of
from .attention import attention_size, is_attention
from .key_cache import cache_size, takes_cache
from .norms import uses_one_plus
from .recognise import (
    conv_size,
    embedding_size,
    is_conv,
    is_embedding,
    is_linear,
    is_module,
    is_norm,
    is_transposed_conv,
    is_transposed_linear,
    linear_size,
    looks_up_itself,
    norm_size,
)
from .weights import own_tensor
from .whole_calls import takes_tokens, token_size

__all__ = [
    "KINDS",
    "Facts",
    "Kind",
    "facts",
    "kind_of",
    "matrix",
    "misfit",
    "module_and_name",
    "restored",
]


class Facts(NamedTuple):
    """What a Site says of the place itself."""

    d_in: int
    d_out: int
    num_experts: int = 0
    transposed: bool = False
    plus_one: bool = False


@dataclass(frozen=True)
class Kind:
    """A row of the table.

    Attributes:
        name: as configs and files have it.
        one: what messages call it.
        words: what they call several of them.
        holds: whether a module is one.
        size: module -> (d_in, d_out); None where it can't be read.
        by_weight: whether a module's weight must be substituted, as methods' phases wouldn't fit
            around its call; None where it never has to be.
        transposed: whether a module stores the transpose.
        hides: which of the default exclusions are meant for this kind.
        bare: whether it is a tensor, not a module.
        one_hot: whether its call takes ids, whose one-hot vectors the matrix multiplies.
        whole: whether it is a whole module, whose weights aren't its own.
        listed: where no pattern chooses, only members of an nn.ModuleList (a model's blocks) are
            candidates; what is adapted is the hidden state in its output.
        called: whether its whole call is adapted, arguments and result; where no pattern chooses,
            only the outermost ones are candidates.
        attends: whether it is adapted inside its attention.
    """

    name: str
    one: str
    words: str
    holds: Callable[[Any], bool]
    size: Callable[[Any], tuple[int, int] | None]
    by_weight: Callable[[Any], bool] | None = lambda module: True
    transposed: Callable[[Any], bool] = lambda module: False
    hides: tuple[str, ...] = ()
    bare: bool = False
    whole: bool = False
    listed: bool = False
    called: bool = False
    attends: bool = False
    one_hot: bool = False


def _never(module: Any) -> bool:
    return False


def _unknown(module: Any) -> None:
    return None


KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            "linear",
            "linear-like module",
            "linear-like layers",
            is_linear,
            linear_size,
            None,
            is_transposed_linear,
            DEFAULT_EXCLUDE,
        ),
        Kind(
            "conv",
            "convolution",
            "convolutions",
            is_conv,
            conv_size,
            transposed=is_transposed_conv,
            hides=DEFAULT_EXCLUDE[:1],
        ),
        Kind(
            "embedding",
            "embedding",
            "embeddings",
            is_embedding,
            embedding_size,
            looks_up_itself,
            is_embedding,
            one_hot=True,
        ),
        Kind("norm", "norm", "norms", is_norm, norm_size),
        Kind("parameter", "parameter", "parameters", _never, _unknown, bare=True),
        Kind("vector", "parameter", "parameters of one dimension", _never, _unknown, bare=True),
        Kind("module", "module", "modules", is_module, _unknown, None, whole=True, listed=True),
        Kind(
            "call",
            "model that embeds tokens",
            "models that embed tokens (get_input_embeddings, inputs_embeds)",
            takes_tokens,
            token_size,
            None,
            whole=True,
            called=True,
        ),
        Kind(
            "cache",
            "model with a key-value cache",
            "models with a key-value cache",
            takes_cache,
            cache_size,
            None,
            whole=True,
            called=True,
        ),
        Kind(
            "attention",
            "attention module of transformers",
            "attention modules of transformers (k_proj, v_proj, o_proj)",
            is_attention,
            attention_size,
            None,
            whole=True,
            attends=True,
        ),
    )
}


def kind_of(module: Any) -> Kind | None:
    """The kind of a module with a weight; None for any other."""
    return first_of(
        (kind for kind in KINDS.values() if not kind.whole and kind.holds(module)), None
    )


# --------------------------------------------------------------------------------- the place itself
def module_and_name(site: Site) -> tuple[str, str]:
    """(path of the module, name of the tensor in it) of a site."""
    if KINDS[site.kind].bare:
        path, _, name = site.path.rpartition(".")
        return path, name
    return site.path, "weight"


def facts(kind: Kind, module: Any, name: str = "weight", transposed: bool = False) -> Facts:
    """Dimensions and storage of a module's weight, or of its bare tensor `name`."""
    if not kind.bare:
        d_in, d_out = kind.size(module) or (0, 0)
        return Facts(
            d_in, d_out, 0, kind.transposed(module), kind.name == "norm" and uses_one_plus(module)
        )
    layer_kind = kind_of(module) if name == "weight" else None
    if layer_kind is not None:
        # A layer's weight that is named in full is seen as the layer's.
        return facts(layer_kind, module)
    tensor = own_tensor(module, name)
    shape = () if tensor is None else tuple(tensor.shape)
    if len(shape) not in (2, 3):
        rows = shape[0] if shape else 1
        return Facts(math.prod(shape) // max(rows, 1), rows)
    transposed = transposed or bool(getattr(module, "is_transposed", False))
    d_out, d_in = reversed(shape[-2:]) if transposed else shape[-2:]
    return Facts(d_in, d_out, shape[0] if len(shape) == 3 else 0, transposed)


def misfit(site: Site, module: Any) -> tuple[str, str] | None:
    """(what was expected, what the module has) where a site doesn't fit; None where it does."""
    kind = KINDS[site.kind]
    if kind.bare:
        return _misfit_tensor(site, module)
    found = kind.size(module)
    if found == (site.d_in, site.d_out) or (found is None and kind.listed):
        if site.transposed == kind.transposed(module):
            return None
        stored_as = "transposed" if site.transposed else "as it is"
        return (
            f"{site.d_in} -> {site.d_out}, stored {stored_as}",
            "it as it is" if site.transposed else "transposed",
        )
    return (
        f"{site.d_in} -> {site.d_out}",
        f"no {kind.name} layer" if found is None else f"{found[0]} -> {found[1]}",
    )


def _misfit_tensor(site: Site, module: Any) -> tuple[str, str] | None:
    name = module_and_name(site)[1]
    tensor = own_tensor(module, name)
    if tensor is not None and tensor.numel() == max(site.num_experts, 1) * site.d_in * site.d_out:
        shape = (site.d_in, site.d_out) if site.transposed else (site.d_out, site.d_in)
        turned = tuple(tensor.shape) == shape[::-1] != shape  # of the transposed shape
        if not (site.num_experts or turned) or tuple(tensor.shape) == (site.num_experts, *shape):
            return None
    expected = (
        f"{site.num_experts} x {site.d_in} -> {site.d_out}"
        if site.num_experts
        else f"{site.d_in} -> {site.d_out}"
    )
    return (
        expected,
        f"no parameter {name!r}" if tensor is None else f"{name} of shape {tuple(tensor.shape)}",
    )


# ---------------------------------------------------------------------------------- the matrix view
def matrix(W: Tensor, site: Site) -> Tensor:
    """A stored tensor as methods see it, (d_out, d_in) or (E, d_out, d_in); a view if it can be."""
    if site.transposed:
        W = _rows_of_outputs(W, site) if W.ndim > 2 and not site.num_experts else W.mT
    elif not site.num_experts and W.shape != (site.d_out, site.d_in):
        W = W.reshape(site.d_out, site.d_in)
    return W + 1.0 if site.plus_one else W


def restored(M: Tensor, W: Tensor, site: Site) -> Tensor:
    """A matrix in the form of the stored tensor W that it came from; exactly W where it is
    unchanged.
    """
    if site.plus_one:
        return W + (M - matrix(W, site)).reshape(W.shape)
    if site.transposed and W.ndim > 2 and not site.num_experts:
        groups = site.d_out // W.shape[1]
        return (
            M.reshape(groups, W.shape[1], -1, math.prod(W.shape[2:]))
            .transpose(1, 2)
            .reshape(W.shape)
        )
    return (M.mT if site.transposed else M).reshape(W.shape)


def _rows_of_outputs(W: Tensor, site: Site) -> Tensor:
    """A transposed convolution's kernel as (d_out, d_in): its groups of (in, out, entries) become
    groups of (out, in, entries).
    """
    groups = site.d_out // W.shape[1]
    return (
        W.reshape(groups, -1, W.shape[1], math.prod(W.shape[2:]))
        .transpose(1, 2)
        .reshape(site.d_out, site.d_in)
    )
