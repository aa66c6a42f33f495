"""Adapter: an immutable Mapping path -> {lora_name: tensor}, and a pytree node.

`pytree.py` registers it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn, overload

import optree
import torch
from torch import Tensor

from .absent import ABSENT
from .config import AdapterConfig
from .errors import StructureError, nearest
from .layout import Layout
from .leaf_dtype import dtype_fits
from .shared import Once, regrouped, site_tensors
from .site import Site
from .site_tensors import SiteTensors
from .summary import render

__all__ = [
    "Adapter",
    "count_members",
    "keys",
    "leaves",
    "member",
    "rebuild",
    "replace",
]


if TYPE_CHECKING:
    _TensorTree = optree.PyTree[Tensor]  # so that optree's functions take an Adapter
else:
    _TensorTree = object


class Adapter(Mapping[str, Mapping[str, Tensor]], _TensorTree):  # type: ignore[misc]
    """Adapted sites, path -> {lora_name: tensor}, with the config and the sites as static data.

    `params["layers.0.up"]["lora_A"]` is a tensor; so is `params["layers.0.up", "lora_A"]`, by its
    key in the pytree. Of a stack, `params[2]` is the third member.

    Where a method's sites share a tensor (VB-LoRA's bank), each has it among its own here; the
    pytree has it once, at its key (".all", "lora_bank").

    Immutable; change it by tree algebra (`optree.tree_map`, `torch.utils._pytree.tree_map`,
    `ll.scale` ...). Two adapters with equal sites and equal method settings have equal tree
    structure, whatever patterns chose the sites.

    Attributes:
        config: the AdapterConfig.
        sites: {path: Site}.
        layout: all static data, as one value.
    """

    __slots__ = ("_data", "layout")

    _data: dict[str, dict[str, Tensor]]
    layout: Layout

    def __init__(self, layout: Layout, data: Mapping[str, Mapping[str, Tensor]]) -> None:
        data = regrouped(layout.shared, data)
        if data.keys() != layout.names.keys():
            odd = next(iter(data.keys() ^ layout.names.keys()))
            raise StructureError(
                f"site {odd!r} is in the {'data' if odd in data else 'layout'} alone"
            )
        for path, names in layout.names.items():
            if set(data[path]) != set(names):
                raise StructureError(
                    f"{path!r}: expected tensors {', '.join(names)}, found "
                    f"{', '.join(sorted(data[path])) or 'none'}"
                )
        object.__setattr__(self, "layout", layout)
        object.__setattr__(
            self,
            "_data",
            {
                path: {name: data[path][name] for name in names}
                for path, names in layout.names.items()
            },
        )

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(
            f"an Adapter is immutable, {name!r} can't be set; make another one by tree algebra"
        )

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"an Adapter is immutable, {name!r} can't be deleted")

    @property
    def config(self) -> AdapterConfig:
        """The method's config."""
        return self.layout.config

    @property
    def sites(self) -> Mapping[str, Site]:
        """{path: Site}."""
        return MappingProxyType(self.layout.sites)

    @overload
    def __getitem__(self, path: str) -> dict[str, Tensor]: ...
    @overload
    def __getitem__(self, path: tuple[str, str]) -> Tensor: ...
    @overload
    def __getitem__(self, path: int) -> Adapter: ...
    def __getitem__(
        self, path: str | tuple[str, str] | int
    ) -> dict[str, Tensor] | Tensor | Adapter:
        if isinstance(path, tuple) and len(path) == 2:
            site, name = path
            tensors = self[site]
            if name not in tensors:
                raise KeyError(f"no tensor {name!r} at {site!r}; {nearest(str(name), tensors)}")
            return tensors[name]
        if hasattr(path, "__index__") and not isinstance(path, bool):
            return member(self, path.__index__())
        try:
            held = site_tensors(self.layout.shared, self._data, path)  # type: ignore[arg-type]
            return SiteTensors(held)
        except (KeyError, TypeError):
            raise KeyError(f"no site {path!r}; {nearest(str(path), self._data)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.sites)

    def to(
        self,
        device: str | int | torch.device | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
    ) -> Adapter:
        """The adapter on a device, in a dtype: `params.to("cuda", torch.bfloat16)`. As `ll.cast`
        does, it leaves integers alone and keeps in float32 at least what its method wants so.

        Args:
            device: where its tensors go; None leaves them where they are.
            dtype: a floating dtype of 16 bits or more; None leaves theirs.
            non_blocking: as for tensors.

        Raises:
            StructureError: not a floating dtype of 16 bits or more.
        """
        if isinstance(device, torch.dtype) and dtype is None:
            device, dtype = None, device
        if dtype is not None and not dtype_fits(None, dtype):
            raise StructureError(f"to: expected a floating dtype of 16 bits or more, found {dtype}")
        once = Once()

        def moved(path: str, name: str) -> Any:
            leaf, spec = self._data[path][name], self.layout.specs[path][name]
            if not isinstance(leaf, Tensor):
                return leaf
            if dtype is None or not leaf.is_floating_point():
                wanted = leaf.dtype
            else:
                wanted = dtype if spec.dtype is None else torch.promote_types(dtype, spec.dtype)

            def move(t: Tensor) -> Tensor:
                return t.to(device=device, dtype=wanted, non_blocking=non_blocking)

            return move(leaf) if spec.trainable else once(move, leaf, key=wanted)

        return rebuild(self.layout, [moved(path, name) for path, name in keys(self)])

    def __len__(self) -> int:
        return len(self.layout.sites)

    def __contains__(self, path: object) -> bool:
        return path in self._data

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self) -> str:
        return render(self.layout.variant.name, self.sites, self._data, self.layout.specs)

    def __reduce__(self) -> tuple[Any, ...]:
        return rebuild, (self.layout, leaves(self))


def leaves(params: Adapter) -> list[Any]:
    """All leaves in order, absent ones included."""
    # a list: not every torch compiles a generator that is left before its end
    return [leaf for tensors in params._data.values() for leaf in tensors.values()]


def keys(params: Adapter) -> list[tuple[str, str]]:
    """(path, lora_name) of every leaf, in the order of `leaves`."""
    return [(path, name) for path, names in params.layout.names.items() for name in names]


def rebuild(layout: Layout, children: Iterable[Any]) -> Adapter:
    """An adapter of these leaves, unchecked: transforms put ints, shapes and None among them."""
    new: Adapter = Adapter.__new__(Adapter)
    it = iter(children)
    object.__setattr__(new, "layout", layout)
    object.__setattr__(
        new,
        "_data",
        {path: {name: next(it) for name in names} for path, names in layout.names.items()},
    )
    return new


def replace(params: Adapter, data: Mapping[str, Mapping[str, Any]]) -> Adapter:
    """The same layout around other leaves, unchecked; what sites share may be given at them."""
    data = regrouped(params.layout.shared, data)
    return rebuild(
        params.layout,
        (data[path][name] for path, names in params.layout.names.items() for name in names),
    )


def count_members(stacked: Any, what: str) -> int:
    """How many adapters a stack has.

    Raises:
        StructureError: it isn't a stack; the message names the first leaf that shows it.
    """
    if not isinstance(stacked, Adapter):
        raise StructureError(f"{what}: expected an Adapter, found {type(stacked).__name__}")
    counts = set()
    for path, specs in stacked.layout.specs.items():
        for name, leaf in stacked._data[path].items():
            if leaf is ABSENT:
                continue
            expected = specs[name].shape
            fits = isinstance(leaf, Tensor) and leaf.ndim == len(expected) + 1
            if not fits or leaf.shape[1:] != expected:
                found = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
                shape = ", ".join(map(str, expected))
                raise StructureError(
                    f"{what}: {path!r} {name}: expected (K, {shape}), found {found}"
                )
            counts.add(leaf.shape[0])
    if len(counts) != 1:
        raise StructureError(
            f"{what}: expected one leading size, found {sorted(counts) or 'no tensors'}"
        )
    return counts.pop()


def member(stacked: Adapter, index: int) -> Adapter:
    """One adapter of a stack, as views, with its own layout.

    Raises:
        StructureError: not a stack.
        IndexError: it has no such member.
    """
    count = count_members(stacked, "a member of a stack")
    if not -count <= index < count:
        raise IndexError(f"expected a member 0 to {count - 1} of the stack, found {index}")
    layout = stacked.layout.member(index % count)
    found = []
    for path, names in layout.names.items():
        for name in names:
            t = stacked._data[path][name]
            if t is not ABSENT:
                t = t[index]
                for axis, size in enumerate(layout.specs[path][name].shape):
                    t = t if t.shape[axis] == size else t.narrow(axis, 0, size)
            found.append(t)
    return rebuild(layout, found)
