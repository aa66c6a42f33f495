"""What a file's metadata says: diffusers writes PEFT's config, component by component.

lora_adapter_metadata   {"unet.r": 4, "unet.lora_alpha": 8, ..., "text_encoder.r": 4, ...};
                        without the component's name in a file of one model
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ...core.errors import CheckpointError, short_repr
from ...io.files import parse_json
from ..assembly import ModuleEntry, Part
from ..metadata import ConfigReader
from ..peft.methods import METHODS
from .keys import COMPONENTS, component_of

__all__ = ["KEY", "Declared"]

KEY = "lora_adapter_metadata"
# The roles of diffusers' files, under the names that PEFT's methods use.
_ROLES = {
    "down": "lora_A.weight",
    "up": "lora_B.weight",
    "up_bias": "lora_B.bias",
    "magnitude": "lora_magnitude_vector",
}


class Declared:
    """The PEFT configs that a file's metadata holds.

    Attributes:
        where: the file, for messages.
        readers: {component: config}. The component is "" where the metadata doesn't say which.
    """

    def __init__(self, metadata: Mapping[str, str], where: str) -> None:
        self.where = where
        self.readers: dict[str, ConfigReader] = {}
        text = metadata.get(KEY)
        says = {} if text is None else parse_json(text, f"{where}: {KEY}")
        if not isinstance(says, dict):
            raise CheckpointError(
                f"{where}: {KEY}: expected an object, found {short_repr(json.dumps(says))}"
            )
        fields: dict[str, dict[str, Any]] = {}
        for key, value in says.items():
            component, dot, field = key.partition(".")
            named = bool(dot) and component in COMPONENTS
            fields.setdefault(component if named else "", {})[field if named else key] = value
        for component, values in fields.items():
            name = f"{KEY}, {component}" if component else KEY
            self.readers[component] = _checked(ConfigReader(values, f"{where}: {name}"))

    def reader(self, start: str) -> ConfigReader | None:
        """Return the config for keys that begin with a component's prefix, or None where there is
        none.

        Raises:
            CheckpointError: the keys have no prefix, and there are configs of several components.
        """
        if not self.readers:
            return None
        own = [name for name in component_of(start)[1] if name in self.readers]
        if len(own) == 1:
            return self.readers[own[0]]
        if start or "" in self.readers:
            return self.readers.get("")
        if len(self.readers) > 1:
            raise CheckpointError(
                f"{self.where}: {KEY} speaks of {', '.join(sorted(self.readers))}, and keys don't "
                f"say of which they are; begin them with its name and a dot"
            )
        return next(iter(self.readers.values()))

    def parts(
        self, start: str, held: Mapping[str, Tensor], entry: ModuleEntry, alpha: float | None
    ) -> Sequence[Part] | None:
        """Return one module's parts as PEFT's config means its tensors, or None where there is no
        config. The config's patterns are matched against the name that the file gives the place,
        `entry.named`.

        Raises:
            CheckpointError: the config and the tensors disagree.
        """
        reader = self.reader(start)
        named = {_ROLES.get(role, role): t for role, t in held.items()}
        if reader is None or not any(role.startswith(("lora", "lokr", "hada")) for role in named):
            return None
        method = METHODS[_kind(reader)]
        odd = next((name for name in named if name not in method.suffixes), None)
        if odd is not None:
            raise CheckpointError(
                f"{reader.where}: a config of PEFT's {method.peft_type}, which has no "
                f"{short_repr(odd)}, as {short_repr(entry.path)} has"
            )
        said = reader.at("alpha_pattern", entry.named, reader.number(method.alpha, 8))
        if alpha is not None and alpha != said:
            raise CheckpointError(
                f"{short_repr(entry.path)}: its alpha is {alpha:g}, {reader.where} says another; "
                f"leave one of them out"
            )
        return method.read(reader, entry, named)


def _kind(reader: ConfigReader) -> str:
    """Return the config's method, which is LoRA where it doesn't say."""
    return reader.text("peft_type").upper() if "peft_type" in reader else "LORA"


def _checked(reader: ConfigReader) -> ConfigReader:
    """Return the config, if all that it says is understood.

    Raises:
        CheckpointError: it is of another method, or has a field that would be dropped in silence.
    """
    kind = _kind(reader)
    if kind not in ("LORA", "LOHA", "LOKR"):
        raise reader.refuse("peft_type", "LORA, LOHA or LOKR")
    method = METHODS[kind]
    reader.check([*method.understood.split(), *method.ignored.split()], ())
    return reader
