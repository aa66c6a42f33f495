"""PEFT's prompt learning: tensors of the whole model, whose keys name no module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ...core.adapter import Adapter
from ...core.errors import CheckpointError, UnsupportedError, short_repr
from ...core.registry import variant_for
from ...layers.targeting import find
from ...layers.whole_calls import has_encoder
from ..assembly import ModelNeededError, ModuleEntry
from ..metadata import ConfigReader
from .codec import Codec

__all__ = [
    "WRAPPER",
    "of_whole_model",
    "of_whole_model_keys",
    "only_one",
    "said_of_model",
    "whole_model_entry",
]

WRAPPER = "base_model."
"""What the keys of a model's own modules begin with, beside the method's."""

_TASKS = (
    ("ForSequenceClassification", "SEQ_CLS"),
    ("ForTokenClassification", "TOKEN_CLS"),
    ("ForQuestionAnswering", "QUESTION_ANS"),
    ("ForCausalLM", "CAUSAL_LM"),
    ("LMHeadModel", "CAUSAL_LM"),
)


def of_whole_model(
    tensors: Mapping[str, Tensor], names: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return (the method's own tensors, the others by the keys that other methods' files have)."""
    own = {name: tensors[name] for name in names if name in tensors}
    rest = {key: t for key, t in tensors.items() if key not in own}
    return own, {f"{WRAPPER}model.{key.removeprefix(WRAPPER)}": t for key, t in rest.items()}


def of_whole_model_keys(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under the keys of a file of prompt learning, from those of other methods."""
    return {
        WRAPPER + key.removeprefix(f"{WRAPPER}model.") if key.startswith(WRAPPER) else key: t
        for key, t in tensors.items()
    }


def whole_model_entry(model: Any, reader: ConfigReader, method: Codec) -> ModuleEntry:
    """Return the place in a model whose call a file of this method adapts.

    Raises:
        ModelNeededError: no model was given.
        UnsupportedError: it isn't a module.
        TargetError: it has no such place.
    """
    if model is None:
        raise ModelNeededError(
            f"{reader.where}: PEFT's {method.peft_type} is of a whole model, and its keys don't "
            f"say which module's call is adapted; give the base model too"
        )
    if not isinstance(model, nn.Module):
        raise UnsupportedError(f"expected an nn.Module for the base, found {type(model).__name__}")
    config = method.configs[0]()
    (site, module), *others = find(model, variant_for(method.configs[0]), config)
    if others:
        raise CheckpointError(
            f"{reader.where}: {type(model).__name__} has several models inside "
            f"({short_repr(site.path)}, {short_repr(others[0][0].path)}); read the file with one "
            f"of them"
        )
    return ModuleEntry(site.path, {}, site, module)


def only_one(
    adapters: Sequence[Adapter], modules: Mapping[str, Any], method: str
) -> tuple[Adapter, str]:
    """Return the one adapter of a file, and the path of its site.

    Raises:
        UnsupportedError: there are several, or it is of another model than PEFT would adapt.
    """
    paths = [path for adapter in adapters for path in adapter]
    if len(paths) != 1:
        raise UnsupportedError(
            f"to_peft: one file of PEFT's {method} is of one model's call, these adapters are of "
            f"{len(paths)} ({', '.join(map(repr, paths[:3]))}); write a folder for each"
        )
    adapter, path = adapters[0], paths[0]
    if "" in modules:
        cfg = type(adapter.config)()
        places = [site.path for site, _ in find(modules[""], adapter.layout.variant, cfg)]
        if places != [path]:
            raise UnsupportedError(
                f"to_peft: {path!r}: PEFT's {method} is of the model's own call ({places[0]!r}); "
                f"write it with the model inside as the base"
            )
    return adapter, path


def said_of_model(modules: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return the fields of a config that PEFT takes from the model."""
    model = modules.get("")
    if model is None:
        return {"num_transformer_submodules": 1}
    said: dict[str, Any] = {"num_transformer_submodules": 1, "task_type": _task(model)}
    layers = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    return said | ({"num_layers": layers} if isinstance(layers, int) else {})


def _task(model: Any) -> str:
    """Return what PEFT calls a model's task: by it PEFT chooses the wrapper that adds the
    tokens.
    """
    names = [cls.__name__ for cls in type(model).__mro__]
    for ending, task in _TASKS:
        if any(name.endswith(ending) for name in names):
            return task
    return "SEQ_2_SEQ_LM" if has_encoder(model) else "FEATURE_EXTRACTION"
