"""Checks that a site's input begins with the batch's rows, or with its rows and tokens."""

from __future__ import annotations

from torch import Tensor

from ..core.errors import StructureError, UnsupportedError

__all__ = ["batch_axes", "not_rows", "untraceable"]


def batch_axes(x: Tensor, shape: tuple[int, ...], path: str, features: bool = True) -> Tensor:
    """A site's input, checked to have the rows and tokens of a batch for its first two dimensions.

    Args:
        x: what came to the site.
        shape: (N, T).
        path: the path of the site, for the message.
        features: whether x has features after the tokens, which ids have not.

    Raises:
        StructureError: they aren't, or another dimension has the same length as the tokens, so that
            nothing tells which of the two is the tokens'.
    """
    if x.shape[:2] == shape and x.ndim >= 2 + features and shape[1] not in x.shape[2:-1]:
        return x
    rows, tokens = shape
    if x.shape[:2] == shape and x.ndim >= 2 + features:
        why = f"has another dimension of {tokens} beside the tokens'"
    elif x.ndim and x.shape[0] == rows * tokens != rows:
        why = (
            "may have its tokens flattened, in an order that can't be told from it (if that is "
            f"row by row, say so: rows(..., flattened=[{path!r}]))"
        )
    else:
        why = "hasn't these tokens (pooled, cut to the last ones, or of another step)"
    raise StructureError(
        f"site {path!r}: adapters for {rows} x {tokens} tokens expect an input ({rows}, {tokens}, "
        f"features), found shape {tuple(x.shape)}, which {why}. Leave it out with exclude_names, "
        f"give adapters for rows, or call the model once per adapter"
    )


def not_rows(path: str, x: Tensor, rows: int) -> StructureError:
    """The error for a tensor whose first dimension isn't the rows."""
    found = x.shape[0] if x.ndim else 0
    hint = ""
    if found and rows and found % rows == 0:
        hint = (
            f", {found // rows} for each of them; where all of the batch was repeated in place "
            f"(beams, several sequences per prompt), "
            f"repeat each id: ids.repeat_interleave({found // rows}); where this layer alone "
            f"sees tokens flattened, row by row, say so: rows(..., flattened=[{path!r}])"
        )
    return StructureError(
        f"site {path!r}: rows expects an input whose first dimension is the {rows} rows of the "
        f"batch, found shape {tuple(x.shape)}{hint}. A layer that mixes rows (routed experts, "
        f"flattened tokens, time first) can't tell them apart: leave it out with exclude_names, "
        f"or call the model once per adapter"
    )


def untraceable(where: str = "") -> UnsupportedError:
    """The error for a call under torch.jit.trace, which can't record vmap."""
    return UnsupportedError(
        f"{where}torch.jit.trace has no record for rows with adapters of their own (it knows no "
        f"vmap); use torch.export.export or torch.compile, or trace one adapter"
    )
