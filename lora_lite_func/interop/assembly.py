"""Building adapters from what another library's file says, module by module."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.adapter import Adapter
from ..core.config import AdapterConfig
from ..core.errors import CheckpointError, UnsupportedError, short_repr
from ..core.layout import Layout
from ..core.leaf_dtype import dtype_fits, leaf_dtype
from ..core.method import ParamSpec, site_for
from ..core.registry import variant_for
from ..core.site import Site
from ..io.checks import check_values
from ..layers.kinds import KINDS, matrix, module_and_name
from ..layers.weights import dense_weight

__all__ = [
    "ModelNeededError",
    "ModuleEntry",
    "Part",
    "assemble",
    "check_tensors",
    "common_dtype",
    "widened",
]

_BYTES = ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")


class ModelNeededError(CheckpointError):
    """Raised where a file's meaning depends on the base model, and none was given."""


@dataclass
class ModuleEntry:
    """A module that a file has tensors for.

    Attributes:
        path: its path in the base model.
        shared: the tensors that all modules of the file share.
        site: its dimensions, if a model was given.
        module: the module itself, if a model was given.
        times: what PEFT multiplies the update by here, beyond what its config says.
        named: the name that the config's patterns use for it, where that isn't its path; otherwise
            "".
        unheard: whether PEFT never calls its adapter.
        index, count: its number among the file's modules, in the order of the model, and how many
            there are.
        among: the file's modules, in that order.
    """

    path: str
    shared: Mapping[str, Tensor]
    site: Site | None = None
    module: Any = None
    times: float = 1.0
    named: str = ""
    unheard: bool = False
    index: int = 0
    count: int = 1
    among: Sequence[ModuleEntry] = field(default=(), repr=False, compare=False)

    @property
    def pattern_path(self) -> str:
        """The path that the config's patterns are matched against."""
        return self.named or self.path

    @property
    def kind(self) -> str:
        """The kind of layer, which is linear where no model says otherwise."""
        return "linear" if self.site is None else self.site.kind

    def known(self, why: str) -> Site:
        """Return the module's dimensions.

        Raises:
            ModelNeededError: no model was given.
        """
        if self.site is None:
            raise ModelNeededError(
                f"{short_repr(self.path)}: {why}, which the file doesn't say; give the base "
                f"model too"
            )
        return self.site

    def weight(self, method: str) -> Tensor:
        """Return the dense base weight (d_out, d_in), in float32 at least.

        Raises:
            ModelNeededError: no model was given.
            UnsupportedError: the weight is packed.
        """
        site = self.site
        if site is None or self.module is None:
            raise ModelNeededError(
                f"{short_repr(self.path)}: {method} depends on the base weight; give the base "
                f"model too"
            )
        size = max(site.num_experts, 1) * site.d_in * site.d_out
        return matrix(dense_weight(self.module, method, size, module_and_name(site)[1]), site)


@dataclass
class Part:
    """What the tensors of one module say, in our terms.

    Attributes:
        config: the class of our config.
        fields: its settings. Modules with equal ones become one adapter.
        leaves: {lora_name: tensor}. Those left out start as the method starts them.
        r, alpha: the site's own.
        sited: settings that are kept path by path, as {field: value}.
        order: parts of a lower order are applied first.
    """

    config: type[AdapterConfig]
    leaves: dict[str, Tensor]
    fields: dict[str, Any] = field(default_factory=dict)
    r: int = 8
    alpha: float = 16.0
    order: int = 0
    sited: dict[str, Any] = field(default_factory=dict)


def widened(t: Tensor) -> Tensor:
    """Return a tensor of 8-bit floats as the same values in float32, and any other tensor
    as it is.
    """
    return t.float() if str(t.dtype).removeprefix("torch.") in _BYTES and not t.is_meta else t


def check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that no adapter has.

    Raises:
        CheckpointError: a tensor isn't strided or lacks its values, or its dtype isn't a floating
            one of 16 bits or more.
    """
    for key, t in tensors.items():
        if t.layout != torch.strided or t.is_meta:
            raise CheckpointError(
                f"{short_repr(key)}: expected a tensor with its values, found one {_form(t)}"
            )
        if not (
            dtype_fits(None, t.dtype)
            or (_counts(key) and not t.is_floating_point() and not t.is_complex())
        ):
            raise CheckpointError(
                f"{short_repr(key)}: expected a floating tensor of 16 bits or more, found {t.dtype}"
            )


def _counts(key: str) -> bool:
    """Tell whether a tensor of this name holds whole numbers: indices, or sizes."""
    return any("indices" in part or part.endswith("_size") for part in key.split("."))


def _form(t: Tensor) -> str:
    return "on the meta device" if t.is_meta else f"of layout {t.layout}"


# ----------------------------------------------------------------------------------------- adapters
def assemble(parts: Iterable[tuple[ModuleEntry, Part]]) -> Adapter | tuple[Adapter, ...]:
    """Make adapters of the parts, one for all parts with equal settings, in order. A single adapter
    is returned as itself.

    Raises:
        CheckpointError: there are no parts, or a tensor doesn't fit.
    """
    groups: dict[Any, list[tuple[ModuleEntry, Part]]] = {}
    # A second part with the same settings on one path goes into an adapter of its own.
    times: Counter[Any] = Counter()
    for entry, part in parts:
        kind = (part.order, part.config, repr(sorted(part.fields.items())))
        here = (*kind, entry.path)
        groups.setdefault((*kind, times[here]), []).append((entry, part))
        times[here] += 1
    made = [
        _adapter(list(group)) for _, group in sorted(groups.items(), key=lambda item: item[0][0])
    ]
    if not made:
        raise CheckpointError("the file holds no adapter")
    return made[0] if len(made) == 1 else tuple(made)


def _adapter(group: list[tuple[ModuleEntry, Part]]) -> Adapter:
    config = group[0][1].config
    rows = {entry.path: part for entry, part in group}
    r, rank_pattern = _patterns({p: part.r for p, part in rows.items()})
    alpha, alpha_pattern = _patterns({p: part.alpha for p, part in rows.items()})
    names = tuple(f"^{re.escape(p)}$" for p in rows)
    where: dict[str, Any] = {
        "target_names": names,
        "exclude_names": (),
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }
    bare = tuple(n for n, (entry, _) in zip(names, group, strict=True) if KINDS[entry.kind].bare)
    where |= {"target_parameters": bare, "target_names": tuple(n for n in names if n not in bare)}
    where["target_kinds"] = tuple(
        sorted({entry.kind for entry, _ in group if not KINDS[entry.kind].bare})
    )
    sited: dict[str, Any] = {}
    for path, part in rows.items():
        for name, value in part.sited.items():
            sited.setdefault(name, {})[path] = value
    cfg = config(r=r, alpha=alpha, **where, **group[0][1].fields, **sited)
    variant, scale_tensors, sites, data = variant_for(config), {}, [], {}  # type: ignore[var-annotated]
    for entry, part in group:
        s = entry.known(f"{variant.name} needs both sizes of a layer")
        if s.kind not in variant.sites:
            raise UnsupportedError(
                f"{s.path!r}: {variant.name} adapts {', '.join(variant.sites)}, this is of kind "
                f"{s.kind!r}"
            )
        sites.append(
            site_for(
                variant, cfg, dataclasses.replace(s, r=part.r, alpha=part.alpha), scale_tensors
            )
        )
        data[s.path] = part.leaves
    layout = Layout(variant, cfg, sites)
    fitted = {path: _fitted(layout, path, data[path]) for path in data}
    _check_shared(layout, fitted)
    return Adapter(layout, fitted)


def _check_shared(layout: Layout, data: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Refuse tensors that differ where the method has one for several sites.

    Raises:
        CheckpointError: with the sites.
    """
    first: dict[tuple[str, str], str] = {}
    for path, groups in layout.shared.items():
        for name, group in groups.items():
            known = first.setdefault((group, name), path)
            if not torch.equal(data[path][name], data[known][name]):
                raise CheckpointError(
                    f"{short_repr(path)} {name}: {layout.variant.name} has one for this site and "
                    f"{short_repr(known)}, and the file has two that differ"
                )


def _fitted(layout: Layout, path: str, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the leaves in the dtypes and shapes that the method asks for."""
    expected, fitted = layout.specs[path], {}
    odd = leaves.keys() ^ expected.keys()
    if odd:
        raise CheckpointError(
            f"{short_repr(path)}: expected the tensors of {', '.join(expected)}, differing: "
            f"{short_repr(min(odd))}"
        )
    common = common_dtype(t for name, t in leaves.items() if expected[name].dtype is None)
    for name, t in leaves.items():
        if tuple(t.shape) != expected[name].shape:
            raise CheckpointError(
                f"{short_repr(path)} {name}: expected shape {expected[name].shape}, found "
                f"{tuple(t.shape)}"
            )
        if not dtype_fits(None, t.dtype):
            raise CheckpointError(
                f"{short_repr(path)} {name}: expected a floating tensor of 16 bits or more, "
                f"found {t.dtype}"
            )
        least = expected[name].dtype
        wanted = leaf_dtype(ParamSpec((), dtype=least), t.dtype if least else common or t.dtype)
        fitted[name] = t.detach().to(wanted).contiguous()
    check_values(layout, path, fitted)
    return fitted


def common_dtype(tensors: Iterable[Tensor]) -> torch.dtype | None:
    """Return the narrowest dtype that holds all of these tensors, or None where there are none.
    Factors of two different 16-bit kinds couldn't be multiplied.
    """
    dtypes = [t.dtype for t in tensors if dtype_fits(None, t.dtype)]
    return functools.reduce(torch.promote_types, dtypes) if dtypes else None


def _patterns(values: Mapping[str, Any]) -> tuple[Any, tuple[tuple[str, Any], ...]]:
    """Return the commonest value, and a pattern for every other one."""
    every = list(values.values())
    common = max(dict.fromkeys(every), key=every.count)
    others: dict[Any, list[str]] = {}
    for path, value in values.items():
        if value != common:
            others.setdefault(value, []).append(re.escape(path))
    return common, tuple((f"^(?:{'|'.join(paths)})$", value) for value, paths in others.items())
