"""from_peft: what PEFT saved, as adapters. PEFT itself isn't needed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..adapter import Adapter
from ..errors import CheckpointError, ConfigError, UnsupportedError, nearest, shown
from ..layout import Layout
from ..spec import Site, fits, leaf_dtype, lookup, site_for
from ..targets import find
from ..variants import BitFitConfig, LoRAConfig
from .folder import split, unpack
from .method import Method, Part, Place
from .says import Says
from .table import METHODS

__all__ = ["assemble", "from_peft"]


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
        ignore: fields of the config to leave out of account though nothing here corresponds to them (a setting of training).

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
    says.check([*method.understood.split(), *method.ignored.split()], ignore)
    sites, shared, rest = split(tensors, method.suffixes, method.shared)
    try:
        places = _places(model, says, method, sites, shared)
        parts = {p: [*method.read(says, place, _complete(says, p, sites[p]))] for p, place in places.items()}
        extra = {place.path: (place, part) for place, part in _biases(says, method, rest, model)}
        return assemble(parts, places, extra)
    except (KeyError, IndexError) as error:
        raise CheckpointError(f"{says.where}: a module of this {kind} adapter lacks the tensor {shown(error.args[0])}") from None
    except ConfigError as error:
        raise CheckpointError(f"{says.where}: {error}") from None


def _complete(says: Says, path: str, held: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    for name, t in held.items():
        if not t.is_floating_point() and not name.endswith("indices"):
            raise CheckpointError(f"{shown(path)} {name}: expected a floating tensor, found {t.dtype}")
    return {name.removesuffix(".weight") if name == "lora_magnitude_vector.weight" else name: t for name, t in held.items()}


# ------------------------------------------------------------------------------------------------------------- modules
def _places(model: Any, says: Says, method: Method, sites: Mapping[str, Any], shared: Mapping[str, Tensor]) -> dict[str, Place]:
    if not sites:
        raise CheckpointError(f"{says.where}: no tensor of a {method.peft_type} adapter beside it")
    for path in sites:
        if says.targeted(path) is False:
            raise CheckpointError(f"{says.where}: tensors for {shown(path)}, which its target_modules don't name")
    if model is None:
        if method.sizes is None:
            return {path: Place(path, shared) for path in sites}
        return {path: Place(path, shared, _site(path, *method.sizes(held))) for path, held in sites.items()}
    known = adaptable(model, sites)
    missing = [p for p in _targeted(model, says) if p not in sites]
    if missing and method.peft_type != "ADALORA":  # which leaves out what it pruned
        raise CheckpointError(f"{says.where}: target_modules name {shown(missing[0])}, for which there is no tensor")
    return {path: Place(path, shared, *known[path]) for path in sites}


def _site(path: str, d_in: int, d_out: int) -> Site:
    return Site(path, d_in, d_out)


def _targeted(model: nn.Module, says: Says) -> list[str]:
    kinds = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)
    saved = says.names("modules_to_save")
    found = [path for path, module in model.named_modules() if isinstance(module, kinds) and says.targeted(path)]
    return [p for p in found if not any(f".{p}.".find(f".{s}.") >= 0 for s in saved)]


def adaptable(model: nn.Module, paths: Iterable[str]) -> dict[str, tuple[Site, nn.Module]]:
    """{path: (Site, module)} of these paths in a model.

    Raises:
        CheckpointError: a path that the model hasn't.
        UnsupportedError: a layer that can't be adapted.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedError(f"expected an nn.Module for the base, found {type(model).__name__}")
    paths, modules = list(paths), dict(model.named_modules(remove_duplicate=False))
    for path in paths:
        if path not in modules:
            raise CheckpointError(f"{type(model).__name__} has no module {shown(path)}; {nearest(path, modules)}")
    exact = rf"^(?:{'|'.join(map(re.escape, paths))})$"
    found = find(model, lookup(LoRAConfig), LoRAConfig(target_names=(exact,), exclude_names=()))
    known = {site.path: (site, module) for site, module in found}
    for path in paths:
        if path not in known:
            raise UnsupportedError(f"{shown(path)}: this {type(modules[path]).__name__} can't be adapted here")
    return known


# -------------------------------------------------------------------------------------------------------------- biases
def _biases(says: Says, method: Method, rest: Mapping[str, Tensor], model: Any) -> list[tuple[Place, Part]]:
    """Learned biases of the base (bias="all" or "lora_only"): kept as the difference from the base's."""
    learned = says.get("bias", "none") not in ("none", None)
    found: dict[str, Tensor] = {}
    for key, t in rest.items():
        path = key.removesuffix(".bias").removesuffix(".base_layer")
        if not key.endswith(".bias") or not learned:
            raise CheckpointError(f"{says.where}: unexpected tensor {shown(key)}; nothing here corresponds to it")
        found[path] = t
    if not found:
        return []
    if model is None:
        raise CheckpointError(f"{says.where}: bias={shown(says['bias'])} replaces biases of the base; give the base model too")
    parts = []
    for path, (site, module) in adaptable(model, found).items():
        base: Any = module.bias
        if base is None or base.shape != found[path].shape:
            raise CheckpointError(f"{says.where}: {shown(path)} has no bias of shape {tuple(found[path].shape)}")
        shift = found[path] - base.detach().to(found[path].dtype)
        parts.append((Place(path, {}, site, module), Part(BitFitConfig, {"lora_b": shift}, order=2)))
    return parts


# ------------------------------------------------------------------------------------------------------------ adapters
def assemble(
    parts: Mapping[str, Sequence[Part]], places: Mapping[str, Place], extra: Mapping[str, tuple[Place, Part]] | None = None
) -> Adapter | tuple[Adapter, ...]:
    """Adapters of parts with equal settings, in order; one alone as itself.

    Raises:
        CheckpointError: there are none, or a tensor doesn't fit.
    """
    groups: dict[Any, list[tuple[Place, Part]]] = {}
    listed = [(places[path], part) for path, some in parts.items() for part in some]
    for place, part in [*listed, *(extra or {}).values()]:
        groups.setdefault((part.order, part.config, tuple(sorted(part.fields.items()))), []).append((place, part))
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
    cfg = config(r=r, alpha=alpha, **where, **group[0][1].fields)
    variant, twins, sites, data = lookup(config), {}, [], {}  # type: ignore[var-annotated]
    for place, part in group:
        s = place.known(f"{variant.name} needs both sizes of a layer")
        sites.append(site_for(variant, cfg, s.path, s.d_in, s.d_out, r=part.r, alpha=part.alpha, bias=s.bias, kind=s.kind, twins=twins))
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
        fitted[name] = t.detach().to(leaf_dtype(_Least(layout.least[path][name]), t.dtype)).contiguous()  # type: ignore[arg-type]
    return fitted


class _Least:
    """What `leaf_dtype` reads of a spec."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype


def _patterns(values: Mapping[str, Any]) -> tuple[Any, tuple[tuple[str, Any], ...]]:
    """The commonest value, and a pattern for every other one."""
    every = list(values.values())
    common = max(dict.fromkeys(every), key=every.count)
    others: dict[Any, list[str]] = {}
    for path, value in values.items():
        if value != common:
            others.setdefault(value, []).append(re.escape(path))
    return common, tuple((f"^(?:{'|'.join(paths)})$", value) for value, paths in others.items())
