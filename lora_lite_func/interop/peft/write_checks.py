"""What one folder of PEFT can't hold, refused before anything is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...core.absent import ABSENT
from ...core.adapter import Adapter
from ...core.errors import CheckpointError, UnsupportedError, short_repr
from ...core.site import Site
from ...layers.kinds import KINDS
from ...variants import FullConfig
from .codec import Codec
from .unlike_layers import unlike

__all__ = ["check_whole", "checked_sites"]


def checked_sites(
    adapters: list[Adapter], method: Codec, modules: Mapping[str, Any]
) -> dict[str, Site]:
    """Return the method's own sites.

    Raises:
        UnsupportedError: two adapters are on one site, or this method of PEFT doesn't adapt its
            kind of layer.
    """
    paths = [path for a in adapters for path in a]
    for path in paths:
        if (
            modules
            and path not in modules
            and not any(KINDS[a.sites[path].kind].bare for a in adapters if path in a)
        ):
            raise CheckpointError(
                f"to_peft: {type(modules['']).__name__} has no module {short_repr(path)}"
            )
    if len(set(paths)) != len(paths):
        twice = next(p for p, n in Counter(paths).items() if n > 1)
        raise UnsupportedError(
            f"to_peft: {twice!r} has two adapters; PEFT keeps one per folder. Write a folder for "
            f"each, or merge one first"
        )
    sites = {path: site for a in adapters for path, site in a.sites.items()}
    for path, site in sites.items():
        kind = site.kind
        if kind == "conv" and path in modules:
            kind = f"conv{modules[path].weight.ndim - 2}d"
        if not any(
            kind == k or (site.kind == "conv" == kind and k.startswith("conv"))
            for k in method.kinds.split()
        ):
            raise UnsupportedError(
                f"to_peft: {path!r}: PEFT's {method.peft_type} adapts "
                f"{method.kinds.replace(' ', ', ')}, this is {kind}; merge it"
            )
        if kind == "linear" and site.transposed and not method.transposed:
            raise UnsupportedError(
                f"to_peft: {path!r}: PEFT's {method.peft_type} takes no layer that is stored "
                f"transposed, as transformers' Conv1D is; merge it"
            )
        if isinstance(modules.get(path), nn.EmbeddingBag):
            raise UnsupportedError(
                f"to_peft: {path!r}: PEFT adapts no nn.EmbeddingBag; merge it, or use an "
                f"nn.Embedding"
            )
        reason = unlike(path, modules, method, written=True)
        if reason is not None:
            raise UnsupportedError(f"to_peft: {path!r}: {reason}merge it (ll.merge)")
    return sites


def check_whole(adapters: list[Adapter]) -> None:
    """Refuse what isn't a whole adapter: nothing but weights, a part of a partition, a stack.

    Raises:
        CheckpointError: with the place.
    """
    if all(isinstance(a.config, FullConfig) for a in adapters):
        raise CheckpointError(
            "to_peft: expected an adapter, found none; PEFT keeps parameters trained whole "
            "(FullConfig) beside one alone"
        )
    for a in adapters:
        for path, held in a._data.items():
            for name, t in held.items():
                if (
                    t is ABSENT
                    or not isinstance(t, Tensor)
                    or tuple(t.shape) != a.layout.specs[path][name].shape
                ):
                    raise CheckpointError(
                        f"to_peft: {path!r} {name}: expected a tensor of shape "
                        f"{a.layout.specs[path][name].shape}; write a whole adapter, "
                        "not a part of a partition, and a stack's members (ll.unstack) one by one"
                    )
