"""From a module's name in a file to the places of a model that it means."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from ...core.errors import CheckpointError, nearest, short_repr
from ...layers.kinds import facts, kind_of
from ...layers.weights import stored
from ..renaming import Paths, Rename
from .families import ORIGINAL_NAMES
from .unet_names import unet_names

__all__ = ["ModelNames", "Target"]

_WRAPPED = re.compile(r"(^|\.)(?:processor|_orig_mod)\.")
_NEST = "text_model."
_CLIP = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


class Target(NamedTuple):
    """A place of the model that a module of a file means, or part of what it means.

    Attributes:
        path: the place's module, or its bare parameter.
        rows: which of the file's output rows are the place's own, in order, as (first, last + 1);
            () where all are.
    """

    path: str
    rows: tuple[tuple[int, int], ...] = ()


class ModelNames:
    """The names that a model's places can have in a file. These are their paths, the names of the
    original release, and both with underscores for dots, as kohya's scripts write them.
    """

    def __init__(self, model: nn.Module, rename: Rename | None = None) -> None:
        self.paths = Paths(model, rename)
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.widths = dict(_places(self.modules))
        self.dotted: dict[str, tuple[Target, ...]] = {path: (Target(path),) for path in self.widths}
        for name, targets in self._aliases():
            self.dotted.setdefault(name, targets)
        self.flat: dict[str, list[tuple[Target, ...]]] = {}
        for name, targets in self.dotted.items():
            means = self.flat.setdefault(name.replace(".", "_"), [])
            if targets not in means:
                means.append(targets)

    def find(self, name: str) -> tuple[Target, ...] | None:
        """Return the places that a name means, or None if there are none.

        Raises:
            CheckpointError: the name can mean several.
        """
        said = self.paths.renamed(name)
        if said != name:
            return (Target(said),)
        plain = _WRAPPED.sub(r"\1", name)
        for text in (name, plain):
            if text in self.dotted:
                return self.dotted[text]
        flat = plain.replace(".", "_")
        means = self.flat.get(flat) or self.flat.get(flat.rstrip("_"), [])  # some tools leave a _
        if len(means) > 1:
            paths = " or ".join(targets[0].path for targets in means)
            raise CheckpointError(f"{short_repr(name)} could be {paths}; its key doesn't say")
        if means:
            return means[0]
        return (Target(name),) if self.modules.get(name) is not None and name else None

    def hint(self, name: str) -> str:
        """Return what a message adds about a name that means nothing: the nearest path of the
        model.
        """
        known = self.widths if "." in name else [path.replace(".", "_") for path in self.widths]
        return nearest(name, known or self.widths)

    # ------------------------------------------------------------------------------------- aliases
    def _aliases(self) -> Iterator[tuple[str, tuple[Target, ...]]]:
        for path in self.widths:
            for name in _older(path, self.modules):
                yield name, (Target(path),)
        yield from ((name, (Target(path),)) for name, path in unet_names(self.widths).items())
        numbered: dict[str, dict[str, str]] = {}
        for path in self.widths:
            number = next((part for part in path.split(".") if part.isdecimal()), "")
            numbered.setdefault(path.replace(f".{number}.", ".#.", 1), {})[number] = path
        for family in ORIGINAL_NAMES:
            for original, parts in family.items():
                first = parts[0].removeprefix("~")
                plain = {"": first} if first in self.widths else {}
                for number in numbered.get(first, {}) if "#" in first else plain:
                    paths = [part.replace("#", number) for part in parts]
                    if all(path.removeprefix("~") in self.widths for path in paths):
                        yield original.replace("#", number), self._stacked(paths)

    def _stacked(self, paths: list[str]) -> tuple[Target, ...]:
        """Share out the rows of one fused layer, in order."""
        if len(paths) == 1 and not paths[0].startswith("~"):
            return (Target(paths[0]),)
        found, row = [], 0
        for path in paths:
            bare = path.removeprefix("~")
            middle, end = row + self.widths[bare] // 2, row + self.widths[bare]
            swapped = ((middle, end), (row, middle))
            found.append(Target(bare, swapped if bare != path else ((row, end),)))
            row = end
        return tuple(found)


def _places(modules: dict[str, nn.Module]) -> Iterator[tuple[str, int]]:
    """Return (path, rows) of the modules with a weight and of the bare parameters."""
    for path, module in modules.items():
        kind = kind_of(module)
        if path and kind is not None and isinstance(stored(module, "weight"), Tensor):
            yield path, facts(kind, module).d_out
        for name, tensor in module._parameters.items():
            if tensor is not None and name not in ("weight", "bias"):
                yield f"{path}.{name}" if path else name, tensor.shape[0] if tensor.ndim else 1


def _older(path: str, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Return the names that older releases of the same libraries gave to a place."""
    names = [path]
    if path.startswith(_NEST):
        names.append(path[len(_NEST) :])
    elif "embeddings.token_embedding" in modules:
        # CLIPTextModel of transformers 5 holds its modules itself, and older files nest them.
        names.append(_NEST + path)
    for name in names:
        yield name
        if name.endswith(".to_out.0"):
            yield name[: -len(".0")]
        for old, new in _CLIP.items():
            if name.endswith(f".self_attn.{new}"):
                yield name[: -len(new)] + old
