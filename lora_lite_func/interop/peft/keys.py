"""Where PEFT keeps a site's tensors: the wrappers in its keys, and the config's names for
modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ...core.errors import CheckpointError, UnsupportedError, short_repr
from ...core.site import Site
from ...layers.kinds import KINDS
from ...layers.tied import embeddings_of
from .codec import Codec

__all__ = ["WRAPPED", "KeyMap", "attention", "elsewhere", "first_name", "key_map", "ties"]

WRAPPED = ".base_layer"


@dataclass
class KeyMap:
    """The places of a model's sites in a PEFT file.

    Attributes:
        names: {our path: what target_modules, target_parameters and the patterns call it}.
        parameters: the names among them that are bare parameters.
        wraps: {module path: wrappers around that module}.
        bare: {our path: what stands in front of its keys}, of bare parameters and attention's
            in_proj_weight.
    """

    names: dict[str, str] = field(default_factory=dict)
    parameters: list[str] = field(default_factory=list)
    wraps: dict[str, int] = field(default_factory=dict)
    bare: dict[str, str] = field(default_factory=dict)

    def inside(self, path: str, own: bool = True) -> str:
        """Return the path of a module behind all wrappers around it. Without `own`, only the
        wrappers around its parents count.
        """
        walked, key = "", ""
        for part in path.split("."):
            walked, key = (f"{walked}.{part}", f"{key}.{part}") if walked else (part, part)
            if own or walked != path:
                key += WRAPPED * self.wraps.get(walked, 0)
        return key

    def key(self, path: str) -> str:
        """Return what stands in front of the suffix in the keys of a site's tensors."""
        return self.bare[path] if path in self.bare else self.inside(path, own=False)


def attention(modules: Mapping[str, Any], path: str) -> str | None:
    """Return the path of the nn.MultiheadAttention whose in_proj_weight or out_proj this is, or
    None for any other path.
    """
    parent, _, leaf = path.rpartition(".")
    found = leaf in ("in_proj_weight", "out_proj") and isinstance(
        modules.get(parent), nn.MultiheadAttention
    )
    return parent if found else None


def ties(model: Any, table: Any) -> bool:
    """Tell whether PEFT replaces rows of the head too where it replaces them in this embedding.
    PEFT goes by what the model's config says alone.
    """
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    return bool(tied) and table is not None and embeddings_of(model, "input") is table


def elsewhere(modules: Mapping[str, Any], path: str) -> list[str]:
    """Return the other names of a parameter, under which other modules hold the same tensor."""
    parent, _, leaf = path.rpartition(".")
    tensor = None if parent not in modules else modules[parent]._parameters.get(leaf)
    if tensor is None:
        return []
    others = ((other, module) for other, module in modules.items() if module is not modules[parent])
    return [
        f"{other}.{name}" if other else name
        for other, module in others
        for name, t in module._parameters.items()
        if t is tensor
    ]


def first_name(modules: Mapping[str, Any], path: str) -> str:
    """Return the name of a parameter that comes first in the model, among all the names that it
    has.
    """
    names = {path, *elsewhere(modules, path)}
    parents = {name.rpartition(".")[0]: name for name in names}
    return next((parents[parent] for parent in modules if parent in parents), path)


def key_map(sites: Mapping[str, Site], modules: Mapping[str, Any], codec: Codec) -> KeyMap:
    """Find where these sites go in a PEFT file.

    Raises:
        CheckpointError: the model lacks a site, or a site can't be told without the model.
        UnsupportedError: this method of PEFT can't adapt a site, or can't name it without naming
            another.
    """
    made = KeyMap()
    held: dict[str, list[str]] = {}
    for path, site in sites.items():
        module, parent = attention(modules, path), path.rpartition(".")[0]
        bare = module is None and KINDS[site.kind].bare
        if (module is not None or bare) and "parameter" not in codec.kinds.split():
            raise UnsupportedError(
                f"to_peft: {path!r}: of PEFT's methods LoRA alone adapts "
                f"{'this' if bare else 'attention'}; merge it"
            )
        if not path or module == "" or (bare and not parent):
            raise UnsupportedError(
                f"to_peft: {path!r}: PEFT adapts what is inside a model, not its outermost "
                f"module; merge it"
            )
        made.names[path] = path if module is None else module
        if bare:
            held.setdefault(parent, []).append(path)
        elif module is None:
            made.wraps[path] = 1
        else:
            made.wraps |= {module: 1, f"{module}.out_proj": 1}
    for parent, paths in held.items():
        _parameters(made, parent, paths, modules)
    for path in sites:  # in_proj_weight is a tensor of the attention, not a module in it
        module = attention(modules, path)
        if module is not None and path.endswith("in_proj_weight"):
            made.bare[path] = made.inside(module, own=False)
    return made


def _parameters(made: KeyMap, parent: str, paths: list[str], modules: Mapping[str, Any]) -> None:
    """Note where the bare parameters of one module go. PEFT wraps the one registered first before
    the others, so it is innermost.

    Raises:
        CheckpointError: no model was given, or it lacks a parameter.
        UnsupportedError: PEFT can't adapt the module and its parameters both, or names one
            ambiguously.
    """
    if not modules:
        raise CheckpointError(
            f"to_peft: {paths[0]!r}: PEFT's keys count the parameters of a module; give the base "
            f"model"
        )
    if parent in made.wraps:
        raise UnsupportedError(
            f"to_peft: {parent!r} and its parameter {paths[0]!r} are both adapted; PEFT takes one "
            f"or the other"
        )
    own = (
        [f"{parent}.{name}" for name in modules[parent]._parameters if f"{parent}.{name}" in paths]
        if parent in modules
        else []
    )
    for path in paths:
        if path not in own:
            raise CheckpointError(f"to_peft: the model has no parameter {short_repr(path)}")
        _unmistakable(path, modules)
    for i, path in enumerate(own):
        made.bare[path] = made.inside(parent, own=False) + WRAPPED * (len(own) - 1 - i)
    made.wraps[parent] = len(own)
    made.parameters += paths


def _unmistakable(path: str, modules: Mapping[str, Any]) -> None:
    """Refuse a parameter whose name PEFT would find elsewhere too, or that two places hold, of
    which PEFT adapts one.
    """
    for other, module in modules.items():
        for name in module._parameters:
            full = f"{other}.{name}" if other else name
            if full.endswith("." + path):
                raise UnsupportedError(
                    f"to_peft: PEFT's target_parameters can't name {path!r} without {full!r}; "
                    f"merge it"
                )
    for full in elsewhere(modules, path):
        raise UnsupportedError(
            f"to_peft: {path!r} is {full!r} too, of which PEFT would adapt one; merge it"
        )
