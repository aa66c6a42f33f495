"""Type variables of a Variant and its functions: the config, and what `prepare` returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import AdapterConfig

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    ConfigT = TypeVar("ConfigT", bound=AdapterConfig, default=Any)
    DataT = TypeVar("DataT", default=Any)
    ConfigIn = TypeVar("ConfigIn", bound=AdapterConfig, contravariant=True)
    DataIn = TypeVar("DataIn", contravariant=True)
    DataOut = TypeVar("DataOut", covariant=True)
else:
    # Defaults of type variables are for a type checker alone, which brings typing_extensions.
    from typing import TypeVar

    ConfigT = TypeVar("ConfigT", bound=AdapterConfig)
    DataT = TypeVar("DataT")
    ConfigIn = TypeVar("ConfigIn", bound=AdapterConfig, contravariant=True)
    DataIn = TypeVar("DataIn", contravariant=True)
    DataOut = TypeVar("DataOut", covariant=True)

__all__ = ["ConfigIn", "ConfigT", "DataIn", "DataOut", "DataT"]
