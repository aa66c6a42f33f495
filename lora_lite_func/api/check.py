"""check: a dry run on an example that tells what an adapter would miss there.

The recorder is an adapter that changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from ..algebra.flatten import Adapters
from ..core.config import AdapterConfig
from ..core.errors import ConfigError, LoraLiteError
from ..core.method import Variant, variant_for
from ..core.site import Params, Site
from ..injection.attachment import Attachment, everywhere
from ..injection.base_tensors import constant
from ..injection.tree_copy import copy_tree
from ..layers.kinds import KINDS
from ..layers.targeting import find
from .apply import attachments_of
from .check_method import verified
from .comparison import allowed, apart, run
from .merge import merged
from .recorder import eval_copy
from .report import Report

__all__ = ["check"]

_COMPUTED = ("weight_g", "weight_v", "weight_orig", "bias_orig")
"""The tensors from which torch's older norms compute the weight, before the layer's call begins."""


# ----------------------------------------------------------------------------------------- the verb
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
        recorder = _Recorder(
            {site.path: site for site, _ in find(model, variant_for(type(params)), params)}
        )
        recorder.run(model, {}, example)
        return recorder.report(
            model, unmerged="a config has no weights yet; check the adapter that init makes of it"
        )
    attachments = attachments_of(params)
    recorder = _Recorder({path: here[-1].site for path, here in attachments.items()})
    recorder.not_finite = _not_finite(attachments)
    recorder.run(model, attachments, example)
    # The output is made as `apply` makes it, without the recorder.
    y = run(copy_tree(model, attachments, eval_copy, refuse=False), example)
    bare = copy_tree(model, {}, eval_copy, refuse=False)
    effect, size, _ = apart(y, run(bare, example))
    if size < 0:
        return recorder.report(model, unmerged="the output holds no floating tensor")
    try:
        dense = merged(model, params)
    except ConfigError:
        # It is the method's own mistake.
        raise
    except LoraLiteError as error:
        return recorder.report(model, effect=effect, unmerged=str(error))
    difference, size, eps = apart(y, run(copy_tree(dense, {}, eval_copy), example))
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
    recorder: _Recorder,
    example: Any,
) -> str | None:
    """The first site, in the order of the calls, whose output is another in the dense model."""
    mine, theirs = _Recorder(recorder.sites, keep=True), _Recorder(recorder.sites, keep=True)
    mine.run(model, attachments, example)
    theirs.run(dense, {}, example)
    for (path, y), (other, z) in zip(mine.kept, theirs.kept, strict=False):
        difference, size, eps = apart(y, z)
        if path != other or difference > allowed(max(eps, recorder.eps), size):
            return path
    return None


# ------------------------------------------------------------------------------------- the recorder
class _Recorder(TorchFunctionMode):
    """Counts the calls of sites, and sees what takes a site's weight outside its call."""

    def __init__(self, sites: Mapping[str, Site], keep: bool = False) -> None:
        super().__init__()
        self.sites = sites
        self.calls = dict.fromkeys(sites, 0)
        self.inside = dict.fromkeys(sites, 0)
        self.reads: dict[str, dict[str, None]] = {}
        self.originals: dict[int, str] = {}
        self.escaped: dict[str, None] = {}
        self.by_weight: dict[str, None] = {}
        self.watched: dict[int, tuple[str, Tensor]] = {}
        self.eps = 0.0
        self.not_finite: tuple[str, ...] = ()
        self.keep = keep
        self.kept: list[tuple[str, Any]] = []

    def run(
        self, model: nn.Module, attachments: Mapping[str, list[Attachment]], example: Any
    ) -> Any:
        """Run the model with the attachments in it, watched, and return its output."""
        record = Variant(
            name="check",
            config=AdapterConfig,
            param_specs=lambda cfg, site: {},
            inputs=self._enter,
            outputs=self._leave,
            weight=self._weight,
        )
        cfg = AdapterConfig()
        tree = copy_tree(
            model,
            everywhere(
                model,
                {
                    path: [
                        *_strict(attachments.get(path, ())),
                        Attachment(record, cfg, site, {}, 0.0),
                    ]
                    for path, site in self.sites.items()
                },
            ),
            self._own,
            refuse=False,
        )
        with self:
            return run(tree, example)

    def _enter(self, cfg: AdapterConfig, p: Params, d: None, x: Tensor, site: Site) -> Tensor:
        """Note that a call of the site begins."""
        self.inside[site.path] += 1
        return x

    def _leave(
        self, cfg: AdapterConfig, p: Params, d: None, x: Tensor, y: Tensor, site: Site
    ) -> Tensor:
        """Note that a call of the site ends."""
        self.inside[site.path] -= 1
        self.calls[site.path] += 1
        if self.keep:
            self.kept.append((site.path, y.detach().clone()))
        return y

    def _weight(
        self, cfg: AdapterConfig, p: Params, site: Site, W: Tensor, b: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Note that the site's adapted weight is taken.

        How often it is taken says nothing of how often it is used.
        """
        self.by_weight[site.path] = None
        return W, b

    def _own(self, module: nn.Module, path: str) -> None:
        """Watch the tensors of a site.

        They become objects of their own, so that a use of what is tied to one isn't taken for a use
        of it.
        """
        originals = dict(module._parameters)
        eval_copy(module, path)
        for name, p in module._parameters.items():
            full = f"{path}.{name}" if path else name
            site = path.partition(".parametrizations.")[0]
            site = full if full in self.sites else site
            if type(p) in (Tensor, nn.Parameter):
                p = module._parameters[name] = constant(p, module)  # type: ignore[assignment, arg-type]
            if p is None or site not in self.sites or name in _COMPUTED:
                continue
            if originals[name] is not p:
                self.originals[id(originals[name])] = site
            if p.is_floating_point():
                self.eps = max(self.eps, torch.finfo(p.dtype).eps)
            self.watched[id(p)] = (site, p)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # A function that gives no tensor asks for a shape or a dtype, and uses no weight.
        if isinstance(out, Tensor):
            for value in (*args, *(kwargs or {}).values()):
                if id(value) in self.originals:
                    self.escaped[self.originals[id(value)]] = None
                path, _ = self.watched.get(id(value), (None, None))
                if path is not None and not self.inside[path]:
                    self.reads.setdefault(path, {})[_name(func)] = None
        return out

    def report(self, model: nn.Module, **found: Any) -> Report:
        """What was seen, with what is tied."""
        reads = {
            path: tuple(names) for path, names in self.reads.items() if path not in self.by_weight
        }
        tied, shared = _tied(model, self.sites)
        found.setdefault("not_finite", self.not_finite)
        return Report(
            calls=self.calls,
            weights=tuple(self.by_weight),
            escaped=tuple(self.escaped),
            reads=reads,
            tied=tied,
            shared=shared,
            **found,
        )


def _strict(attachments: Iterable[Attachment]) -> list[Attachment]:
    return [attachment._replace(variant=verified(attachment.variant)) for attachment in attachments]


def _name(func: Any) -> str:
    return resolve_name(func) or getattr(func, "__name__", repr(func))


# --------------------------------------------------------------------------- what is tied to a site
def _tied(
    model: nn.Module, sites: Mapping[str, Site]
) -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
    """What is tied to sites, and which sites are shared.

    It is ({site: names of other modules' parameters that are its own}, {site: other paths of its
    module}).
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    paths: dict[int, list[str]] = {}
    for path, module in modules.items():
        paths.setdefault(id(module), []).append(path)
    names: dict[Any, list[tuple[int, str]]] = {}
    owned: dict[str, list[Any]] = {path: [] for path in sites}
    for path, module in modules.items():
        for name, p in module._parameters.items():
            if p is None:
                continue
            full = f"{path}.{name}" if path else name
            names.setdefault(_identity(p), []).append((id(module), full))
            for site in {path, full} & owned.keys():
                owned[site].append((_identity(p), id(module)))
    tied = {
        site: tuple(n for key, home in keys for other, n in names[key] if other != home)
        for site, keys in owned.items()
    }
    shared = {
        site: tuple(p for p in paths.get(id(modules.get(site)), ()) if p != site) for site in sites
    }
    # A bare tensor is adapted under each of its names.
    own = {
        site: found for site, found in tied.items() if found and not KINDS[sites[site].kind].bare
    }
    return own, {site: found for site, found in shared.items() if found}


def _identity(p: Tensor) -> Any:
    """What two names of one tensor have in common.

    It is the tensor's storage, or the object for tensors without one.
    """
    try:
        where = p.data_ptr()
    except RuntimeError:
        where = 0
    return (where, p.shape, p.dtype) if where else id(p)
