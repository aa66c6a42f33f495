"""check: a dry run on an example that tells what an adapter would miss there.

The recorder is an adapter that changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..algebra.flatten import Adapters
from ..core.config import AdapterConfig
from ..core.errors import ConfigError, LoraLiteError
from ..core.registry import variant_for
from ..injection.attachment import Attachment
from ..injection.call_result import without_cache
from ..injection.tree_copy import copy_tree
from ..layers.targeting import find
from .apply import attachments_of
from .call_recorder import CallRecorder
from .comparison import allowed, apart, run
from .merge import merged
from .recorder import EvalTensors
from .report import Report

__all__ = ["check"]


def check(
    model: nn.Module, params: Adapters | AdapterConfig, /, *args: Any, **kwargs: Any
) -> Report:
    """What an adapter reaches and misses on an example: `print(ll.check(model, params, x))`.

    Runs copies of the model on the example, in eval mode: nothing is written on it. Tells which
    sites are never called, or several times, whose weight is read without calling the layer (there
    the adapter is missed) or is tied to another's, and whether `apply` agrees with `merged`, and
    from which site on it doesn't. A config, before `init`, is checked for its sites alone. What a
    method's phases give is held to what `ll.Variant` says of them, so a method of your own is best
    checked first.

    Args:
        model: the frozen base.
        params: what `apply` takes, or a config.
        *args: the model's own positional arguments.
        **kwargs: the model's own keyword arguments.

    Raises:
        TargetError: a config's pattern, role or layer index selects nothing.
        StructureError: a site isn't in the model, or a tensor has the wrong shape.
        UnsupportedError: the model can't be copied, or the method can't adapt a chosen layer.
        ConfigError: a phase of a method gives something of another shape or dtype than it should;
            with the site.
    """
    example = (args, kwargs)
    if isinstance(params, AdapterConfig):
        recorder = CallRecorder(
            {site.path: site for site, _ in find(model, variant_for(type(params)), params)}
        )
        recorder.run(model, {}, example)
        return recorder.report(
            model, unmerged="a config has no weights yet; check the adapter that init makes of it"
        )
    attachments = attachments_of(params)
    recorder = CallRecorder({path: here[-1].site for path, here in attachments.items()})
    recorder.not_finite = _not_finite(attachments)
    recorder.run(model, attachments, example)
    # The output is made as `apply` makes it, without the recorder.
    y = run(copy_tree(model, attachments, EvalTensors(), refuse=False), example)
    bare = copy_tree(model, {}, EvalTensors(), refuse=False)
    bare_y = run(bare, example)
    if any(a.variant.virtual is not None for here in attachments.values() for a in here):
        # Its cache holds virtual tokens too, so it is of another size than the base's.
        y, bare_y = without_cache(y), without_cache(bare_y)
    effect, size, _ = apart(y, bare_y)
    if size < 0:
        return recorder.report(model, unmerged="the output holds no floating tensor")
    try:
        dense = merged(model, params)
    except ConfigError:
        # It is the method's own mistake.
        raise
    except LoraLiteError as error:
        return recorder.report(model, effect=effect, unmerged=str(error))
    difference, size, eps = apart(y, run(copy_tree(dense, {}, EvalTensors()), example))
    tolerance = allowed(max(eps, recorder.eps), size)
    where = (
        None
        if difference <= tolerance
        else _first_apart(model, dense, attachments, recorder, example)
    )
    return recorder.report(
        model, effect=effect, difference=difference, tolerance=tolerance, parts_at=where
    )


def _not_finite(attachments: Mapping[str, list[Attachment]]) -> tuple[str, ...]:
    """The names of the adapters' tensors that hold NaN or infinity."""
    return tuple(
        f"{path}.{name}" if path else name
        for path, here in attachments.items()
        for attachment in here
        for name, t in (attachment.p or {}).items()
        if t.is_floating_point() and not t.is_meta and not t.isfinite().all()
    )


def _first_apart(
    model: nn.Module,
    dense: nn.Module,
    attachments: Mapping[str, list[Attachment]],
    recorder: CallRecorder,
    example: Any,
) -> str | None:
    """The first site, in the order of the calls, whose output is another in the dense model."""
    mine, theirs = CallRecorder(recorder.sites, keep=True), CallRecorder(recorder.sites, keep=True)
    mine.run(model, attachments, example)
    theirs.run(dense, {}, example)
    for (path, y), (other, z) in zip(mine.kept, theirs.kept, strict=False):
        difference, size, eps = apart(y, z)
        if path != other or difference > allowed(max(eps, recorder.eps), size):
            return path
    return None
