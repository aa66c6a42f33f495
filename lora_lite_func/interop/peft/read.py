"""from_peft: what PEFT saved, as adapters. PEFT itself isn't needed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..errors import CheckpointError, ConfigError, LoraLiteError, UnsupportedError, nearest, shown
from ..kinds import KINDS
from ..layout import Layout
from ..spec import ParamSpec, fits, leaf_dtype, lookup, site_for
from .folder import split, unpack
from .method import Method, Part, Place
from .places import check_padding, places_of
from .says import Says
from .table import METHODS
from .trained import beside

__all__ = ["assemble", "check_tensors", "from_peft"]


def from_peft(
    source: Any, model: nn.Module | None = None, *, config: Any = None, ignore: Iterable[str] = ()
) -> Adapter | tuple[Adapter, ...]:
    """An adapter that PEFT saved: `params = ll.from_peft("folder", model)`. Several where one file holds several things
    (a learned bias beside the factors, settings that differ by layer): a tuple, which `apply`, `bind` and `merge` take as it is.

    Nothing is dropped: what has no counterpart here is an error that names it.

    Args:
        source: a folder with adapter_config.json and adapter_model.safetensors (or .bin, read without running code), the file in it,
            or a state dict (then with `config`).
        model: the base. LoRA, LoHa, LoKr, AdaLoRA, HiRA and C3A can do without; methods whose tensors show one side of a layer only,
            or whose meaning hangs on the base weights (DoRA, PiSSA), can't. With it, keys that match nothing in it are refused.
        config: the config as a mapping, a path or PEFT's own object, where it isn't beside the tensors.
        ignore: fields of the config to leave out of account: those to which nothing here corresponds, and dropout, which here acts on
            what comes to a layer's call alone (`ignore="lora_dropout"` lets an adapter of convolutions be trained further).

    Raises:
        CheckpointError: an unreadable file, an unknown method, a field or key that can't be honoured, tensors missing or mis-shaped.
        UnsupportedError: the method can't adapt a layer here.
    """
    ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    says, tensors = unpack(source, config)
    kind = says.text("peft_type").upper()
    if kind not in METHODS:
        raise CheckpointError(f"{says.where}: peft_type {shown(kind)} isn't read here; {nearest(kind, METHODS, first=50)}")
    method = METHODS[kind]
    understood = method.understood.split()
    says.check([*understood, *method.ignored.split()], ignore)
    says = says.without(ignore, understood)
    check_tensors(tensors)
    sites, shared, rest = split(tensors, method.suffixes, method.shared)
    try:
        if not sites and not rest:
            raise CheckpointError(f"{says.where}: no tensor of a {kind} adapter beside it")
        if says.get("bias") not in (None, "none", "all", method.biased):
            raise says.refuse("bias", " or ".join(map(repr, filter(None, ("none", "all", method.biased)))))
        places = places_of(model, says, method, sites, shared)
        parts = [(place, part) for p, place in places.items() for part in _parts(says, method, place, _plain(sites[p]))]
        parts += beside(says, rest, model)
        for place, part in parts:
            check_padding(says, place, part)
        return assemble(parts)
    except (KeyError, IndexError) as error:
        raise CheckpointError(f"{says.where}: a module of this {kind} adapter lacks the tensor {shown(error.args[0])}") from None
    except ConfigError as error:
        raise CheckpointError(f"{says.where}: {error}") from None


def check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that no adapter has.

    Raises:
        CheckpointError: no strided tensor with its values, or of a dtype that isn't a floating one of 16 bits or more.
    """
    for key, t in tensors.items():
        if t.layout != torch.strided or t.is_meta:
            raise CheckpointError(f"{shown(key)}: expected a tensor with its values, found one {_form(t)}")
        if not (fits(None, t.dtype) or (key.endswith("indices") and not t.is_floating_point() and not t.is_complex())):
            raise CheckpointError(f"{shown(key)}: expected a floating tensor of 16 bits or more, found {t.dtype}")


def _form(t: Tensor) -> str:
    return "on the meta device" if t.is_meta else f"of layout {t.layout}"


def _parts(says: Says, method: Method, place: Place, held: Mapping[str, Tensor]) -> Sequence[Part]:
    """One module's parts; tensors whose shapes make no sense together are refused with them, whatever it was that didn't work."""
    shapes = {name: tuple(t.shape) for name, t in held.items()}
    try:
        if not all(shapes.values()):
            raise ValueError("a number alone is no tensor of a module")
        return method.read(says, place, held)
    except LoraLiteError:
        raise
    except (ArithmeticError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{says.where}: {shown(place.path)}: {shapes} don't make a module of {method.peft_type}: {shown(str(error))}"
        ) from error


def _plain(held: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors under the names of today's files."""
    return {name.removesuffix(".weight") if name == "lora_magnitude_vector.weight" else name: t for name, t in held.items()}


# ------------------------------------------------------------------------------------------------------------ adapters
def assemble(parts: Iterable[tuple[Place, Part]]) -> Adapter | tuple[Adapter, ...]:
    """Adapters of parts with equal settings, in order; one alone as itself.

    Raises:
        CheckpointError: there are none, or a tensor doesn't fit.
    """
    groups: dict[Any, list[tuple[Place, Part]]] = {}
    for place, part in parts:
        groups.setdefault((part.order, part.config, repr(sorted(part.fields.items()))), []).append((place, part))
    made = [_adapter(list(group)) for _, group in sorted(groups.items(), key=lambda item: item[0][0])]
    if not made:
        raise CheckpointError("the file holds no adapter")
    return made[0] if len(made) == 1 else tuple(made)


def _adapter(group: list[tuple[Place, Part]]) -> Adapter:
    config = group[0][1].config
    rows = {place.path: part for place, part in group}
    r, rank_pattern = _patterns({p: part.r for p, part in rows.items()})
    alpha, alpha_pattern = _patterns({p: part.alpha for p, part in rows.items()})
    names = tuple(f"^{re.escape(p)}$" for p in rows)
    where: dict[str, Any] = {"target_names": names, "exclude_names": (), "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}
    bare = tuple(n for n, (place, _) in zip(names, group, strict=True) if KINDS[place.kind].bare)
    where |= {"target_parameters": bare, "target_names": tuple(n for n in names if n not in bare)}
    where["target_kinds"] = tuple(sorted({place.kind for place, _ in group if not KINDS[place.kind].bare}))
    cfg = config(r=r, alpha=alpha, **where, **group[0][1].fields)
    variant, twins, sites, data = lookup(config), {}, [], {}  # type: ignore[var-annotated]
    for place, part in group:
        s = place.known(f"{variant.name} needs both sizes of a layer")
        if s.kind not in variant.sites:
            raise UnsupportedError(f"{s.path!r}: {variant.name} adapts {', '.join(variant.sites)}, this is of kind {s.kind!r}")
        sites.append(site_for(variant, cfg, dataclasses.replace(s, r=part.r, alpha=part.alpha), twins))
        data[s.path] = part.leaves
    layout = Layout(variant, cfg, sites)
    return Adapter(layout, {path: _fitted(layout, path, data[path]) for path in data})


def _fitted(layout: Layout, path: str, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The leaves in the dtypes and shapes that the method asks for."""
    expected, fitted = layout.expected[path], {}
    odd = leaves.keys() ^ expected.keys()
    if odd:
        raise CheckpointError(f"{shown(path)}: expected the tensors of {', '.join(expected)}, differing: {shown(min(odd))}")
    for name, t in leaves.items():
        if tuple(t.shape) != expected[name]:
            raise CheckpointError(f"{shown(path)} {name}: expected shape {expected[name]}, found {tuple(t.shape)}")
        if not fits(None, t.dtype):
            raise CheckpointError(f"{shown(path)} {name}: expected a floating tensor of 16 bits or more, found {t.dtype}")
        fitted[name] = t.detach().to(leaf_dtype(ParamSpec((), dtype=layout.least[path][name]), t.dtype)).contiguous()
    return fitted


def _patterns(values: Mapping[str, Any]) -> tuple[Any, tuple[tuple[str, Any], ...]]:
    """The commonest value, and a pattern for every other one."""
    every = list(values.values())
    common = max(dict.fromkeys(every), key=every.count)
    others: dict[Any, list[str]] = {}
    for path, value in values.items():
        if value != common:
            others.setdefault(value, []).append(re.escape(path))
    return common, tuple((f"^(?:{'|'.join(paths)})$", value) for value, paths in others.items())
