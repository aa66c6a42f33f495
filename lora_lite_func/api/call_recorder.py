"""CallRecorder: which sites are called, and what takes a weight outside its layer's call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from ..core.config import AdapterConfig
from ..core.method import Variant
from ..core.site import Params, Site
from ..injection.attachment import Attachment, everywhere
from ..injection.base_tensors import constant
from ..injection.tree_copy import copy_tree
from ..layers.kinds import KINDS
from ..layers.weights import is_packed
from .check_method import verified
from .comparison import run
from .recorder import EvalTensors
from .report import Report

__all__ = ["CallRecorder"]

_COMPUTED = ("weight_g", "weight_v", "weight_orig", "bias_orig")
"""The tensors from which torch's older norms compute the weight, before the layer's call begins."""


class CallRecorder(TorchFunctionMode):
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
            _Watched(self),
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

    def watch(
        self, module: nn.Module, path: str, originals: Mapping[str, nn.Parameter | None]
    ) -> None:
        """Watch the tensors of a site's copy.

        They become objects of their own, so that a use of what is tied to one isn't taken for a use
        of it.

        Args:
            module: the copy.
            path: of the module.
            originals: the module's own parameters.
        """
        for name, p in module._parameters.items():
            full = f"{path}.{name}" if path else name
            site = path.partition(".parametrizations.")[0]
            site = full if full in self.sites else site
            if p is not None and not is_packed(p):
                p = module._parameters[name] = constant(p, module)  # type: ignore[assignment]
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


class _Watched(EvalTensors):
    """A copy's tensors in eval mode, watched by a recorder."""

    def __init__(self, recorder: CallRecorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __call__(self, copy: nn.Module, path: str) -> None:
        originals = dict(copy._parameters)
        super().__call__(copy, path)
        self.recorder.watch(copy, path, originals)


def _strict(attachments: Iterable[Attachment]) -> list[Attachment]:
    return [attachment._replace(variant=verified(attachment.variant)) for attachment in attachments]


def _name(func: Any) -> str:
    return resolve_name(func) or getattr(func, "__name__", repr(func))


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
        site: tuple(n for key, holder in keys for other, n in names[key] if other != holder)
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
