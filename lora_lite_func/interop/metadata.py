"""What an adapter_config.json says, read with suspicion: typed access to fields, and PEFT's rules
of matching.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..core.config_values import LARGEST
from ..core.errors import CheckpointError, short_repr
from .patterns import bounded, literal

__all__ = ["ConfigReader"]

_NEUTRAL: tuple[Any, ...] = (None, False, 0, 0.0, "", "none", [], {})
"""Values of a field that say nothing."""

_ABOUT = (
    "peft_type",
    "peft_version",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "task_type",
    "runtime_config",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "fan_in_fan_out",
    "bias",
    "modules_to_save",
    "init_weights",
    "megatron_core",
    "ensure_weight_tying",
    "progressbar",
)
"""Fields of the file's origin and of its modules, and of starts that are over."""

# The largest number that is accepted. The comparison with it refuses NaN too.
_LARGEST = 10**30


class ConfigReader(Mapping[str, Any]):
    """The fields of a config.

    Attributes:
        where: the file, for messages.
    """

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, Mapping) or not all(isinstance(k, str) for k in values):
            raise CheckpointError(
                f"{where}: expected an object of fields, found {type(values).__name__}"
            )
        self.values_, self.where = dict(values), where

    def __getitem__(self, name: str) -> Any:
        return self.values_[name]

    def __iter__(self) -> Any:
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)

    def refuse(self, name: str, expected: str) -> CheckpointError:
        """Return the error for a field that doesn't say what it should."""
        return CheckpointError(
            f"{self.where}: {name}: expected {expected}, found {short_repr(self.get(name))}"
        )

    def check(
        self, understood: Iterable[str], ignore: Iterable[str], unread: Iterable[str] = ()
    ) -> None:
        """Refuse a field that says something and isn't understood, because it would be dropped in
        silence.

        Args:
            understood: fields that are honoured, or have no part in a loaded adapter.
            ignore: fields that the caller leaves out of account.
            unread: fields that outputs depend on, whatever the caller says of them.

        Raises:
            CheckpointError: the message names the field, and how to read the file all the same.
        """
        known = {*_ABOUT, *understood, *ignore}.difference(unread)
        for name, value in self.items():
            if name in known or any(type(value) is type(n) and value == n for n in _NEUTRAL):
                continue
            said = f"{self.where}: {short_repr(name)} is {short_repr(value)}"
            if name in unread:
                raise CheckpointError(
                    f"{said}, on which outputs depend, and which isn't read here; merge the "
                    f"adapter in PEFT (merge_and_unload) and take the merged model"
                )
            raise CheckpointError(
                f"{said}, which has no counterpart here; if the adapter's outputs don't depend "
                f"on it (a setting of training), read it with ignore=({short_repr(name)},)"
            )

    def without(
        self, ignore: Iterable[str], understood: Iterable[str], kept: Iterable[str] = ()
    ) -> ConfigReader:
        """Return the config with some fields left out.

        Args:
            ignore: the fields that the caller leaves out of account.
            understood: fields that outputs depend on.
            kept: fields of training, which stay: what they did to the stored values is done.

        Raises:
            CheckpointError: the adapter's outputs depend on one of the fields.
        """
        wrong = next(
            (name for name in ignore if name in understood and not name.endswith("dropout")), None
        )
        if wrong is not None:
            raise CheckpointError(
                f"{self.where}: ignore: the adapter's outputs depend on {short_repr(wrong)}; "
                f"dropout alone may be left out"
            )
        left = set(ignore).difference(kept)
        return ConfigReader(
            {name: value for name, value in self.items() if name not in left}, self.where
        )

    def text(self, name: str) -> str:
        """Return a field that must be a string.

        Raises:
            CheckpointError: the field is anything else.
        """
        if not isinstance(self.get(name), str):
            raise self.refuse(name, "a string")
        return str(self[name])

    def flag(self, name: str, default: bool = False) -> bool:
        """Return a field that must be true or false. A null counts as the default.

        Raises:
            CheckpointError: the field is anything else.
        """
        value = self.get(name, default)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refuse(name, "true or false")
        return value

    def whole(self, name: str, default: int, least: int = 1) -> int:
        """Return a field that must be a whole number of at least `least`.

        Raises:
            CheckpointError: the field is anything else.
        """
        value = self.get(name, default)
        if type(value) is not int or not least <= value <= LARGEST:
            raise self.refuse(name, f"a whole number from {least} to {LARGEST}")
        return value

    def number(self, name: str, default: float) -> float:
        """Return a field that must be a finite number.

        Raises:
            CheckpointError: the field is anything else.
        """
        return self._number(name, self.get(name, default))

    def _number(self, name: str, value: Any) -> float:
        if type(value) not in (int, float) or not abs(value) <= _LARGEST:
            raise self.refuse(name, "a finite number")
        return float(value)

    def names(self, name: str) -> list[str]:
        """Return a field that must be a list of names. A string counts as a list of one.

        Raises:
            CheckpointError: the field is anything else.
        """
        value = self.get(name) or []
        value = [value] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise self.refuse(name, "a list of names")
        return value

    def ids(self, name: str) -> tuple[int, ...]:
        """Return a field that must be a list of whole numbers of at least 0, or null.

        Raises:
            CheckpointError: the field is anything else.
        """
        value = self.get(name)
        value = [] if value is None else value
        if not isinstance(value, list) or not all(type(v) is int and v >= 0 for v in value):
            raise self.refuse(name, "a list of token ids")
        return tuple(value)

    def at(self, pattern: str, path: str, default: float, *, dotted: bool = False) -> float:
        """Return a number that may differ from module to module. The first key of `pattern` that
        PEFT matches to the path gives it, and otherwise it is the default.

        Args:
            pattern: the field with {key: number}.
            path: the module's path.
            default: the number where no key matches.
            dotted: whether the key must stand behind a dot, as in the patterns of C3A and
                FourierFT.
        """
        table = self.get(pattern) or {}
        if not isinstance(table, Mapping):
            raise self.refuse(pattern, "an object of module names and numbers")
        for key, value in table.items():
            front = r".*\." if dotted else r"(.*\.)?"
            if self.matches(pattern, rf"{front}(?:{key})$", key, path):
                return self._number(pattern, value)
        return default

    def matches(self, name: str, whole: str, written: str, path: str) -> bool:
        """Tell whether a pattern of the file matches a path. Patterns that could run for hours are
        refused.

        Raises:
            CheckpointError: it isn't a pattern, or one that could take too long.
        """
        if not bounded(written):
            raise CheckpointError(
                f"{self.where}: {name}: {short_repr(written)} could take too long to match; "
                f"write the modules' names out"
            )
        try:
            return re.match(whole, path) is not None
        except (re.error, OverflowError, RecursionError) as error:
            raise CheckpointError(
                f"{self.where}: {name}: {short_repr(written)} isn't a regular expression: {error}"
            ) from None

    # -------------------------------------------------------------------------------------- targets
    def targeted(self, path: str) -> bool | None:
        """Tell whether PEFT would adapt the module at a path. The result is None where that depends
        on the model ("all-linear", defaults by model type), or where a pattern could take too long
        to tell.
        """
        targets, excluded = self.get("target_modules"), self.get("exclude_modules")
        if isinstance(excluded, str) and not bounded(excluded):
            return None
        if self._listed("exclude_modules", path):
            return False
        if targets is None or (isinstance(targets, str) and targets == "all-linear"):
            return None
        if isinstance(targets, str) and not bounded(targets):
            return None
        if not self._listed("target_modules", path):
            return False
        if not all(literal(name) for name in self.names("layers_pattern")):
            return None
        if isinstance(targets, str) or path in self.names("target_modules"):
            return True  # layers are chosen among what the ends of paths name
        return self._in_layers(path)

    def _listed(self, name: str, path: str) -> bool:
        value = self.get(name)
        if isinstance(value, str):
            return self.matches(name, rf"(?:{value})\Z", value, path)
        return any(path == entry or path.endswith("." + entry) for entry in self.names(name))

    def _in_layers(self, path: str) -> bool | None:
        """Tell whether a path is in one of the layers that the config names. Releases of PEFT take
        the first or the last number of a path, and some want a dot before the list of layers; the
        result is None where that makes a difference.
        """
        wanted = self.get("layers_to_transform")
        if wanted is None or wanted == []:
            return True
        numbers = wanted if isinstance(wanted, list) else [wanted]
        if not all(type(n) is int for n in numbers):
            raise self.refuse("layers_to_transform", "layer numbers")
        parts = path.split(".")
        names = self.names("layers_pattern")
        found = set()
        for i in range(1, len(parts) - 1):
            above = "." + ".".join(parts[:i])
            if parts[i].isdecimal() and (
                not names or any(above.endswith("." + name) for name in names)
            ):
                found |= {int(parts[i]) in numbers} | ({False} if i == 1 and not names else set())
        return (found.pop() if len(found) == 1 else None) if found else False
