"""What a method's start is made of besides what layers saw: dense weights, of the model and of a
reference, and what several of them say together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..core.config import AdapterConfig
from ..core.errors import ConfigError, UnsupportedError, nearest, short_repr
from ..core.method import Variant
from ..core.site import Site
from ..core.statistics import SiteStatistics
from ..injection.tree_copy import copy_tree
from ..layers.kinds import KINDS, facts, kind_of, matrix, module_and_name
from ..layers.targeting import Found
from ..layers.weights import dense_weight
from ..layers.whole_calls import TokenTable
from .recorder import EvalTensors

__all__ = ["Sources", "weight_of"]


def weight_of(variant: Variant, site: Site, module: Any) -> Tensor:
    """A site's dense weight (d_out, d_in), or (E, d_out, d_in) of a stack, float32 at least.

    Raises:
        UnsupportedError: it can't be read.
    """
    size = max(site.num_experts, 1) * site.d_in * site.d_out
    return matrix(dense_weight(module, variant.name, size, module_and_name(site)[1]), site)


class Sources:
    """Where the starts of one `init` come from."""

    def __init__(
        self,
        variant: Variant,
        cfg: AdapterConfig,
        found: Found,
        seen: Mapping[str, SiteStatistics],
        reference: Any,
    ) -> None:
        """Look at all sites, where their starts depend on each other.

        Raises:
            ConfigError: a reference is missing, given to a method that takes none, or no module.
            UnsupportedError: a weight can't be read.
        """
        self.variant, self.seen = variant, seen
        self.needs = variant.needs_of(cfg) if variant.init is not None else frozenset()
        self.reference = self._modules_of(reference)
        self.joint: Mapping[str, Any] = {}
        if variant.joint is not None:
            modules = {site.path: module for site, module in found}
            self.joint = variant.joint(
                cfg,
                [site for site, _ in found],
                lambda site: self._named_weight(site, modules[site.path]),
            )

    def _modules_of(self, reference: Any) -> dict[str, Any] | None:
        """The reference's modules by path, where the start needs one."""
        name = self.variant.name
        if "reference" not in self.needs:
            if reference is None:
                return None
            raise ConfigError(
                f"reference: {name} doesn't start from another model's weights; leave it out"
            )
        if reference is None:
            raise ConfigError(
                f"{name} starts from the difference to another model's dense weights; give the "
                f"model as it was before quantisation: ll.init(model, cfg, reference=dense_model)"
            )
        if not isinstance(reference, nn.Module):
            raise ConfigError(f"reference: expected an nn.Module, found {short_repr(reference)}")
        return dict(reference.named_modules(remove_duplicate=False))

    def _named_weight(self, site: Site, module: Any) -> Tensor:
        try:
            return weight_of(self.variant, site, module)
        except UnsupportedError as error:
            raise UnsupportedError(f"site {site.path!r}: {error}") from None

    def weight(self, site: Site, module: Any) -> Any:
        """The site's own weight, where the start needs it; of a whole call its TokenTable.

        Raises:
            UnsupportedError: it can't be read.
        """
        if "weight" not in self.needs:
            return None
        if KINDS[site.kind].called:
            return TokenTable(copy_tree(module, {}, EvalTensors()))
        return weight_of(self.variant, site, module)

    def referred(self, site: Site) -> Tensor | None:
        """The reference's weight of the same path, where the start needs it.

        Raises:
            ConfigError: the reference has no such layer, or one of another size.
            UnsupportedError: it can't be read.
        """
        if self.reference is None:
            return None
        path, name = module_and_name(site)
        module = self.reference.get(path)
        kind = KINDS[site.kind] if KINDS[site.kind].bare else kind_of(module)
        if not isinstance(getattr(module, name, None), Tensor) or kind is not KINDS[site.kind]:
            raise ConfigError(
                f"the reference has no layer of kind {site.kind!r} at this path; "
                f"{nearest(path, [p for p, m in self.reference.items() if hasattr(m, name)])}"
            )
        found = facts(kind, module, name, site.transposed)
        sizes = (found.num_experts, found.d_out, found.d_in)
        if sizes != (site.num_experts, site.d_out, site.d_in):
            raise ConfigError(
                f"expected a weight of {site.d_out} x {site.d_in} in the reference, found one of "
                f"{found.d_out} x {found.d_in}"
            )
        there = site.having(transposed=found.transposed, plus_one=found.plus_one)
        return weight_of(self.variant, there, module)

    def stats(self, site: Site, reference: Tensor | None) -> SiteStatistics | None:
        """What `init` gets besides the weight."""
        seen, joint = self.seen.get(site.path), self.joint.get(site.path)
        if reference is None and joint is None:
            return seen
        return dataclasses.replace(seen or SiteStatistics(0, 0), reference=reference, joint=joint)
