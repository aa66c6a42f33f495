"""Which dtype a leaf gets, and which it may have."""

from __future__ import annotations

import torch

from .param_spec import ParamSpec

__all__ = ["dtype_fits", "leaf_dtype"]


def leaf_dtype(spec: ParamSpec, adapter_dtype: torch.dtype) -> torch.dtype:
    """The dtype that a tensor gets: the adapter's, or the spec's where that is wider or no floating
    dtype.
    """
    if spec.dtype is None:
        return adapter_dtype
    return (
        torch.promote_types(spec.dtype, adapter_dtype)
        if spec.dtype.is_floating_point
        else spec.dtype
    )


def dtype_fits(spec_dtype: torch.dtype | None, found: torch.dtype) -> bool:
    """Whether a tensor of dtype `found` can be a leaf with a spec of that dtype, as it is."""
    if spec_dtype is not None and not spec_dtype.is_floating_point:
        return found == spec_dtype
    if not found.is_floating_point or found.itemsize == 1:
        return False
    return spec_dtype is None or torch.promote_types(spec_dtype, found) == found
