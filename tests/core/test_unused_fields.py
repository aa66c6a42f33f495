"""Fields that every config has and a method may have no use for: its docstring says so, rightly."""

from __future__ import annotations

import pytest
from cases import CALIBRATED, CASES, Case

from lora_lite_func.core.layout import Layout
from lora_lite_func.core.registry import variant_for
from lora_lite_func.core.site import Site

UNUSED = {
    "r and alpha have no part": {"r", "alpha"},
    "r has no part": {"r"},
    "alpha has no part": {"alpha"},
}
OURS = [case for case in (*CASES, *CALIBRATED) if case.name != "from_outside"]
every = pytest.mark.parametrize("case", OURS, ids=repr)


def unused(case: Case) -> set[str]:
    """What the config's docstring says."""
    doc = " ".join((type(case.config(r=4)).__doc__ or "").split())
    return next((fields for said, fields in UNUSED.items() if said in doc), set())


def static(case: Case, **fields: float) -> tuple[object, ...]:
    """All that a site's shapes and scale say."""
    cfg = case.config(**{"r": 4, **fields})
    variant = variant_for(type(cfg))
    kind = variant.sites[0]
    site = Site("0", 64, 64, True, kind, cfg.r, cfg.alpha, 1.0, transposed=kind == "embedding")
    site = site.having(scaling=variant.scaling(cfg, site))
    return Layout(variant, cfg, [site]).specs, site.scaling


@every
@pytest.mark.parametrize("field", ["r", "alpha"])
def test_a_field_without_part_changes_nothing(case: Case, field: str) -> None:
    if field in unused(case):
        specs = static(case)[0]
        assert static(case, **{field: 8})[0] == specs


@every
def test_a_rank_that_counts_changes_shapes(case: Case) -> None:
    if "r" not in unused(case):
        cfg = case.config(r=2)
        if cfg.r == 2 and case.config(r=4).r == 4:  # not where the case fixes it
            assert static(case, r=2)[0] != static(case, r=4)[0]
