"""What is asked of the tensors that go into a file of ours, or come out of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..core.absent import ABSENT
from ..core.errors import CheckpointError, StructureError, nearest, short_repr
from ..core.layout import Layout
from ..core.leaf_dtype import dtype_fits
from ..core.stacked import LENGTH, PRESENT, Stacked, number_of
from ..layers.kinds import KINDS, misfit, module_and_name
from .manifest import Piece, joined

__all__ = [
    "check_keys",
    "check_model",
    "check_present",
    "check_shapes",
    "check_tensor",
    "check_values",
]


def check_keys(expected: set[str], found: set[str], count: int) -> None:
    """Check that a file's keys are those expected, and that no two of the `count` tensors share
    one.

    Raises:
        CheckpointError: two tensors have the same key, or keys are missing or unexpected.
    """
    if len(expected) != count:
        raise CheckpointError("two sites give tensors the same key")
    missing, odd = expected - found, found - expected
    if missing:
        raise CheckpointError(f"missing {len(missing)} tensors, first: {short_repr(min(missing))}")
    if odd:
        raise CheckpointError(
            f"{len(odd)} unexpected tensors, first: {short_repr(min(odd))}; "
            f"{nearest(min(odd), sorted(expected))}"
        )


def check_shapes(file: Any, piece: Piece, same: Mapping[str, str]) -> None:
    """Check the shapes of a piece's tensors by the file's header alone, before anything is read.

    Raises:
        CheckpointError: a tensor has another shape.
    """
    for path, names in piece.layout.names.items():
        for name in names:
            key = joined(piece.prefix, path, name)
            found, expected = (
                tuple(file.get_slice(same.get(key, key)).get_shape()),
                piece.shape(path, name),
            )
            if found != expected:
                raise CheckpointError(
                    f"{short_repr(path)} {name}: expected a tensor of shape {expected}, found "
                    f"{found}"
                )


def check_tensor(piece: Piece, path: str, name: str, leaf: Any) -> None:
    """Check that a leaf is a tensor of the shape and dtype that its method asks for.

    Raises:
        CheckpointError: the leaf is absent, isn't a tensor, or has another shape or dtype.
    """
    shape, least = piece.shape(path, name), piece.layout.specs[path][name].dtype
    if leaf is ABSENT:
        raise CheckpointError(
            f"{short_repr(path)} {name} is absent: this is one part of a partition; ll.combine "
            f"the parts first"
        )
    if not isinstance(leaf, Tensor) or tuple(leaf.shape) != shape:
        found = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
        raise CheckpointError(
            f"{short_repr(path)} {name}: expected a tensor of shape {shape}, found {found}"
        )
    if not dtype_fits(least, leaf.dtype):
        kind = f"{'floating' if least is None else least} tensor, found {leaf.dtype}"
        wide = (
            ""
            if least is not None and not least.is_floating_point
            else f"; {'16 bits' if least is None else least} at least"
        )
        raise CheckpointError(f"{short_repr(path)} {name}: expected a {kind}{wide}")


def check_values(layout: Layout, path: str, held: Mapping[str, Tensor]) -> None:
    """Check a site's frozen tensors with the method's own `validate`.

    Raises:
        CheckpointError: the method finds their values impossible.
    """
    if layout.variant.validate is None:
        return
    try:
        layout.variant.validate(layout.config, held, layout.sites[path])
    except StructureError as error:
        raise CheckpointError(f"{short_repr(path)} {error}") from None


def check_present(layout: Layout, path: str, held: Mapping[str, Tensor]) -> None:
    """Check that a stack's leaves `PRESENT` and `LENGTH` say of each member what its sites say.

    Raises:
        CheckpointError: one of them doesn't.
    """
    if not isinstance(layout, Stacked):
        return
    for name in (PRESENT, LENGTH):
        expected = [number_of(name, member.sites.get(path)) for member in layout.members]
        if name in held and held[name].tolist() != expected:
            raise CheckpointError(
                f"{short_repr(path)} {name}: expected {short_repr(expected)}, as its members have "
                f"the site, found {short_repr(held[name].tolist())}"
            )


def check_model(layout: Layout, model: nn.Module) -> None:
    """Check that a model has every site of a layout, with the same sizes.

    Raises:
        CheckpointError: `model` isn't a module, or a site is missing or differs.
    """
    if not isinstance(model, nn.Module):
        raise CheckpointError(
            f"expected an nn.Module to check it against, found {type(model).__name__}"
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, site in layout.sites.items():
        module: Any = modules.get(module_and_name(site)[0])
        kind = KINDS[site.kind]
        if module is None or not (kind.bare or kind.holds(module)):
            raise CheckpointError(
                f"{type(model).__name__} has no {kind.one} {short_repr(path)}; "
                f"{nearest(path, modules)}"
            )
        wrong = misfit(site, module)
        if wrong is not None:
            raise CheckpointError(
                f"site {short_repr(path)}: expected {wrong[0]}, the model has {wrong[1]}"
            )
