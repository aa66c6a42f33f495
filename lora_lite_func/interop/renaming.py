"""Finding a file's paths in a model whose modules have moved since, as the user says or by
themselves.

A path that the model lacks is looked for without the names of containers. Where a release of
transformers has put a language model into another module, or taken it out, its layers are the same.
What else transformers renames in older checkpoints, it renames here too.
So are those of a module that torch has wrapped, in the model or as the file was saved.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from ..core.errors import CheckpointError, ConfigError, nearest, short_repr

__all__ = ["Paths", "Rename"]

Rename = Mapping[str, str] | Callable[[str], str]
"""{old names: new names}, names of a path in a row, or what makes a new path of an old one."""

_CONTAINERS = frozenset({"model", "language_model", "text_model", "vision_model"})
_WRAPPERS = frozenset(
    {
        "_orig_mod",
        "module",
        "_module",
        "_fsdp_wrapped_module",
        "_checkpoint_wrapped_module",
        "base_model",
    }
)
"""What torch.compile, data parallelism, opacus, FSDP, checkpointing and PEFT put around modules."""
_OTHER_NAMES = {"block_sparse_moe": "mlp"}  # Mixtral's, before transformers 5


class Paths:
    """Where a file's paths are in a model.

    Args:
        model: the base.
        rename: what the caller says of paths that have moved.
    """

    def __init__(self, model: nn.Module, rename: Rename | None = None) -> None:
        if rename is not None and not callable(rename) and not isinstance(rename, Mapping):
            raise ConfigError(
                f"rename: expected a mapping of names or a function of a path, found "
                f"{short_repr(rename)}"
            )
        self.model, self.rename = model, rename
        self.known = {path for path, _ in model.named_modules(remove_duplicate=False)}
        self.known |= {path for path, _ in model.named_parameters(remove_duplicate=False)}
        self.by_core: dict[tuple[str, ...], list[str]] = {}
        for path in sorted(self.known):
            self.by_core.setdefault(_core(path), []).append(path)
        self.unused = set(rename) if isinstance(rename, Mapping) else set()

    def find(self, path: str) -> str:
        """Return a path's place in the model, or the path itself where nothing is known of it.

        Raises:
            CheckpointError: `rename` makes a path that the model lacks, or several places could be
                meant.
        """
        said = self.renamed(path)
        if said != path:
            return said
        if path in self.known or not path:
            return path
        today = self._as_transformers_loads_it(path)
        if today in self.known:
            return today
        moved = self.by_core.get(_core(today), [])
        if len(moved) > 1:
            raise CheckpointError(
                f"{type(self.model).__name__} has no {short_repr(path)}, which could be "
                f"{' or '.join(map(repr, moved))}; say which with "
                f"rename={{{path!r}: {moved[0]!r}}}"
            )
        return moved[0] if moved else path

    def _as_transformers_loads_it(self, path: str) -> str:
        """Return the path that transformers gives to a module of an older checkpoint."""
        key = f"{path}.weight"
        for renaming in self._renamings:
            key = renaming.rename_source_key(key)[0]
        return key.removesuffix(".weight")

    @functools.cached_property
    def _renamings(self) -> list[Any]:
        """What transformers renames in older checkpoints of this model."""
        model: Any = self.model
        if "transformers" not in sys.modules or not hasattr(model, "base_model_prefix"):
            return []
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightRenaming
        except ImportError:  # it is older than such renamings
            return []
        changes = get_model_conversion_mapping(model, add_legacy=False)
        return [change for change in changes if isinstance(change, WeightRenaming)]

    def renamed(self, path: str) -> str:
        """Return what `rename` makes of a path, or the path itself where `rename` says nothing.

        Raises:
            CheckpointError: the model lacks the path that `rename` makes.
        """
        said = self._said(path)
        if said != path and said not in self.known:
            raise CheckpointError(
                f"rename: {short_repr(path)} becomes {short_repr(said)}, which "
                f"{type(self.model).__name__} hasn't; {nearest(said, self.known)}"
            )
        return said

    def check_used(self, paths: Iterable[str]) -> None:
        """Refuse names to change that are in no path of the file.

        Raises:
            CheckpointError: the message gives the first of them.
        """
        if self.unused:
            name = min(self.unused)
            raise CheckpointError(
                f"rename: {name!r} is in none of the file's paths; {nearest(name, list(paths))}"
            )

    def _said(self, path: str) -> str:
        if self.rename is None:
            return path
        if isinstance(self.rename, Mapping):
            return self._by_names(path, self.rename)
        made = self.rename(path)
        if not isinstance(made, str):
            raise ConfigError(
                f"rename: expected a path for {short_repr(path)}, found {short_repr(made)}"
            )
        return made

    def _by_names(self, path: str, rename: Mapping[str, str]) -> str:
        """Return the path with the longest run of names in `rename` replaced at its first place."""
        for old in sorted(rename, key=len, reverse=True):
            before, found, after = f".{path}.".partition(f".{old}.")
            if found:
                self.unused.discard(old)
                parts = (before.strip("."), rename[old], after.strip("."))
                return ".".join(part for part in parts if part)
        return path


def _core(path: str) -> tuple[str, ...]:
    """Return the names of a path without those of containers and wrappers."""
    names = (_OTHER_NAMES.get(name, name) for name in path.split("."))
    return tuple(name for name in names if name not in _CONTAINERS | _WRAPPERS)
