"""The keys of a PEFT file: which module a tensor is of, and whose."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from ...core.errors import CheckpointError, short_repr

__all__ = ["split"]

_OUTER = re.compile(r"^(?:(?:_orig_mod|_?module|_fsdp_wrapped_module)\.)+(?=base_model\.)")
"""What torch's, and opacus's, wrappers around a PEFT model leave in front of its keys."""
_WRAPPERS = (".modules_to_save", "trainable_tokens_delta")
"""What PEFT puts its adapter's name behind, of no method's own."""
_PREFIX, _SHARED = "base_model.model.", "base_model."


_MANGLED = re.compile(r"_((?:embedding_)?[AB](?:\.weight|\.bias)?|magnitude_vector(?:\.weight)?)$")
"""What PEFT before 0.18 made of the ends of keys where the adapter's name was "lora"."""


def _one_adapter(
    tensors: Mapping[str, Tensor], endings: Sequence[str]
) -> tuple[dict[str, Tensor], str]:
    """Return (the tensors of one adapter, its name in their keys). The name is in a state dict that
    was never saved: beside the method's suffix, where no module's name can be. It is "default"
    where there is none. Another adapter's name beside keys without one is left out: older releases
    of PEFT also save what has the saved adapter's name as a part of its own.

    Raises:
        CheckpointError: there are several.
    """
    halves = (ending.rpartition(".") for ending in endings)
    forms = (
        rf"{re.escape(head + dot)}NAME\.{tail}" if dot else rf"{tail}\.NAME"
        for head, dot, tail in halves
    )
    between = re.compile(rf".*\.(?:{'|'.join(forms)})".replace("NAME", r"([^.]+)"))
    own, strays, names = tuple(f".{e}" for e in endings), set(), set()
    for key in tensors:
        match = None if key.endswith(own) else between.fullmatch(key)
        if match is None:
            continue
        at = next(n for n in range(1, len(match.groups()) + 1) if match[n])
        if key[: match.start(at) - 1] + key[match.end(at) :] in tensors:
            strays.add(key)
        else:
            names.add(match[at])
    if len(names) > 1:
        raise CheckpointError(
            f"tensors of the adapters {', '.join(sorted(map(short_repr, names)))}; take one's "
            f"(peft.get_peft_model_state_dict(model, adapter_name=...))"
        )
    one = {key: t for key, t in tensors.items() if key not in strays}
    return one, names.pop() if names else "default"


def _ending(key: str, endings: Iterable[str], named: str) -> tuple[str, str | None]:
    """Return (the key without an adapter's name, the method's suffix that it ends with)."""
    front, _, last = key.rpartition(".")
    for candidate in (key, key.removesuffix(named), f"{front.removesuffix(named)}.{last}"):
        found = next((e for e in endings if candidate.endswith("." + e)), None)
        if found is not None:
            return candidate, found
    for name in _WRAPPERS:
        key = key.replace(f"{name}{named}.", f"{name}.")
        key = key.removesuffix(named) if key.endswith(name + named) else key
    return key, None


def split(
    tensors: Mapping[str, Tensor], suffixes: Iterable[str], shared: Iterable[str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], dict[str, Tensor]]:
    """Return ({path: {suffix: tensor}}, {shared name: tensor}, the rest by stripped key).

    A shared name that ends with a dot stands for all that begin with it.

    The longest suffix at a key's end counts, so a module may be called anything. The keys of a
    state dict that was never saved may still have an adapter's name (`default`) in them.

    Raises:
        CheckpointError: two keys mean the same tensor, or there are several adapters.
    """
    endings = sorted(suffixes, key=len, reverse=True)
    if "lora_A.weight" in endings and not any("lora_" in key for key in tensors):
        tensors = {_MANGLED.sub(r".lora_\1", key): t for key, t in tensors.items()}
    tensors, name = _one_adapter(tensors, endings)
    named = f".{name}"
    sites: dict[str, dict[str, Tensor]] = {}
    common: dict[str, Tensor] = {}
    rest: dict[str, Tensor] = {}
    names = {name for name in shared if not name.endswith(".")}
    beginnings = tuple(name for name in shared if name.endswith("."))
    for full, t in tensors.items():
        key = _OUTER.sub("", full)
        outer = key.removeprefix(_SHARED)
        bare = outer.removesuffix(named)
        if bare in names or bare.startswith(beginnings):
            common[bare] = t
            continue
        stripped, ending = _ending(key.removeprefix(_PREFIX), endings, named)
        target, name = (
            (rest, stripped)
            if ending is None
            else (sites.setdefault(stripped[: -len(ending) - 1], {}), ending)
        )
        if name in target:
            raise CheckpointError(f"two tensors for {short_repr(stripped)}")
        target[name] = t
    return sites, common, rest
