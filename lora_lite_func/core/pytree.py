"""Adapter as a pytree node of torch.utils._pytree (exported programs too) and of optree."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from typing import Any

from .absent import ABSENT
from .adapter import Adapter, keys, leaves, rebuild
from .layout import Layout, from_json, to_json
from .nodes import register_node
from .site_tensors import SiteTensors

__all__ = ["register_adapter"]

_Absent = type(ABSENT)


def _flatten(params: Adapter) -> tuple[list[Any], Layout]:
    return leaves(params), params.layout


def _unflatten(children: Iterable[Any], layout: Layout) -> Adapter:
    return rebuild(layout, children)


def _dumped(layout: Layout) -> str:
    """The layout as text for exported programs. AOTInductor puts it into C++ as a raw string, which
    a closing bracket before a quotation mark would end.
    """
    return json.dumps(to_json(layout)).replace(")", r"\u0029")


def _read_back(says: Any) -> Layout:
    """The layout of an exported program; those of before 0.2.0 have JSON types for the text."""
    return from_json(json.loads(says) if isinstance(says, str) else says)


def _flatten_site(site: SiteTensors) -> tuple[list[Any], tuple[str, ...]]:
    return list(site.values()), tuple(site)


def _unflatten_site(children: Iterable[Any], names: tuple[str, ...]) -> SiteTensors:
    return SiteTensors(zip(names, children, strict=True))


@functools.cache
def register_adapter() -> None:
    """Make Adapter, its sites' tensors and ABSENT nodes, in every namespace of optree; once."""
    register_node(
        Adapter,
        _flatten,
        _unflatten,
        keys,
        serialized_type_name="lora_lite_func.Adapter",
        to_dumpable_context=_dumped,
        from_dumpable_context=_read_back,
    )
    register_node(
        _Absent,
        lambda _: ([], None),
        lambda _children, _static: ABSENT,
        lambda _: (),
        serialized_type_name="lora_lite_func.Absent",
    )
    register_node(
        SiteTensors,
        _flatten_site,
        _unflatten_site,
        tuple,
        serialized_type_name="lora_lite_func.SiteTensors",
    )
