"""Reading and writing PEFT's files without PEFT."""

from __future__ import annotations

from .read import from_peft
from .write import to_peft

__all__ = ["from_peft", "to_peft"]
