"""A file's tensors, module by module, and the places of the model that each module means."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ...core.errors import CheckpointError, short_repr
from ..assembly import check_tensors, widened
from .keys import COMPONENTS, FOREIGN, GATED, component_of, split_role
from .names import ModelNames, Target

__all__ = ["FileModule", "gathered"]

_PEFT = "base_model.model."
_NUMBERS = ("alpha", "on_input")
"""Roles of tensors that hold one number."""


@dataclass
class FileModule:
    """A module of a file.

    Attributes:
        name: its name in the file's keys.
        start: the prefix of its keys that names the component; "" if none does.
        targets: the places that it means.
        held: {role: tensor}.
    """

    name: str
    start: str
    targets: tuple[Target, ...]
    held: dict[str, Tensor] = field(default_factory=dict)


def gathered(
    tensors: Mapping[str, Tensor], component: str | None, names: ModelNames
) -> list[FileModule]:
    """Return the modules of a file that belong to a component.

    Raises:
        CheckpointError: a key isn't understood or means no place, or two keys mean the same.
    """
    found: dict[tuple[Target, ...], FileModule] = {}
    components: dict[str, None] = {}  # a dict keeps the order
    lost: list[str] = []
    gated = {key.removesuffix(GATED) for key in map(str, tensors) if key.endswith(GATED)}
    for key, t in tensors.items():
        if not isinstance(key, str) or not isinstance(t, Tensor):
            raise CheckpointError(f"expected names and tensors, found {short_repr(key)}")
        start, owners = component_of(key)
        components.setdefault(owners[0] if owners else "")
        if component is not None and start and owners and component not in owners:
            continue  # it is another component's key
        name, role = _split(key, gated)
        bare = name[len(start) :] if len(start) < len(name) else name
        targets = names.find(bare) or names.find(name)
        if targets is None:
            lost.append(bare)
            continue
        module = found.setdefault(targets, FileModule(bare, start, targets))
        if role in module.held:
            raise CheckpointError(
                f"two tensors {role} for {short_repr(targets[0].path)}, {short_repr(key)} the "
                f"second; name the component whose keys should be read, or leave one out"
            )
        module.held[role] = t if role in _NUMBERS else _plain(key, t)
    if lost:
        raise CheckpointError(_unplaced(lost[0], names, component, components))
    if not found:
        raise CheckpointError(_nothing(component, components))
    _check_once(found.values())
    return list(found.values())


def _plain(key: str, t: Tensor) -> Tensor:
    t = widened(t)
    check_tensors({key: t})
    return t.detach()


def _split(key: str, gated: Container[str]) -> tuple[str, str]:
    """Return (the module's part of a key, the tensor's role). In the modules that are gated, a
    weight is LyCORIS' gate.

    Raises:
        CheckpointError: the key is of another method, of PEFT's own files, or of no adapter.
    """
    if key.startswith(_PEFT):
        raise CheckpointError(
            f"{short_repr(key)} is a key of PEFT's, whose alpha is in an "
            f"adapter_config.json; ll.from_peft reads the folder of both. If alpha is the rank, "
            f"take {_PEFT!r} off the keys"
        )
    found = split_role(key)
    if found is not None:
        return found
    parent, _, leaf = key.rpartition(".")
    if leaf == "weight" and parent in gated:
        return parent, "gate"
    if leaf == "diff_m":  # Wan's blocks hold it themselves
        return f"{parent}.modulation", "diff"
    if key.startswith("bundle_emb.") or ".string_to_param" in key:
        raise CheckpointError(
            f"{short_repr(key)} is an embedding of new words (textual inversion), no "
            f"adapter's; leave such keys out of the state dict and load them in the pipeline"
        )
    method = next((what for end, what in FOREIGN.items() if key.endswith(f".{end}")), None)
    if method is not None:
        raise CheckpointError(
            f"{short_repr(key)} is a tensor of {method}, which isn't read here; merge it "
            f"into the model with the tool that made it"
        )
    raise CheckpointError(
        f"unexpected tensor {short_repr(key)}; read are LoRA, DoRA, LoHa, LoKr, IA3, "
        f"GLoRA, OFT, diff, diff_b and the changes of norms"
    )


def _unplaced(
    name: str, names: ModelNames, component: str | None, components: Iterable[str]
) -> str:
    text = (
        f"the model has no module for {short_repr(name)}; {names.hint(name)} Where names have "
        f"moved, or begin with another tool's prefix, rename= says how (a mapping or a function)."
    )
    several = [known for known in components if known]
    if component is None and len(several) > 1:
        text += (
            f" The file has keys of {', '.join(several)}: say which of them this model is, "
            f"component={short_repr(several[0])}"
        )
    return text


def _nothing(component: str | None, components: Iterable[str]) -> str:
    if component is None:
        return "holds no tensors"
    known = [name for name in components if name]
    others = f"; it has keys of {', '.join(known)}" if known else ""
    return f"holds no tensors of {component}{others} (known are {', '.join(COMPONENTS)})"


def _check_once(modules: Iterable[FileModule]) -> None:
    """Refuse a place that two modules of the file mean, such as a fused layer and one of
    its parts.
    """
    known: dict[str, str] = {}
    for module in modules:
        for target in module.targets:
            other = known.setdefault(target.path, module.name)
            if other != module.name:
                raise CheckpointError(
                    f"{short_repr(other)} and {short_repr(module.name)} both change "
                    f"{short_repr(target.path)}; leave the keys of one of them out"
                )
