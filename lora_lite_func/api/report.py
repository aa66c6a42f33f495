"""What a dry run found, as a value that prints itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Report"]

_SHOWN = 8


@dataclass(frozen=True, kw_only=True, repr=False)
class Report:
    """What `ll.check` found; `print` it.

    Attributes:
        calls: {site: how often the example reached it}, by a call of the layer or through its
            adapted weight.
        weights: the sites whose adapted weight was taken, in a call of the layer that goes by it or
            without a call.
        reads: {site: the torch functions that took its bare weight without calling the layer};
            there the adapter is missed.
        escaped: the sites whose module, or tensors, the model uses through a reference that can't
            be followed to the adapted copy.
        tied: {site: other names of its tensors}; an adapter is its layer's own, it doesn't reach
            what is tied to it.
        shared: {site: other paths of the same module}; the adapter is in at each.
        effect: the largest |apply - base| over the outputs, or None for a config.
        difference: the largest |apply - merged| over the outputs, or None where they weren't
            compared.
        tolerance: what `difference` may be: half the digits of the narrowest dtype, of the largest
            output (1 at least).
        parts_at: the first site whose output differs, where `difference` is too large and a site's
            does.
        not_finite: the adapter's tensors that hold NaN or infinity.
        unmerged: why apply and merged weren't compared; "" where they were.
    """

    calls: Mapping[str, int]
    weights: tuple[str, ...]
    escaped: tuple[str, ...]
    reads: Mapping[str, tuple[str, ...]]
    tied: Mapping[str, tuple[str, ...]]
    shared: Mapping[str, tuple[str, ...]]
    effect: float | None = None
    difference: float | None = None
    tolerance: float | None = None
    parts_at: str | None = None
    not_finite: tuple[str, ...] = ()
    unmerged: str = ""

    @property
    def uncalled(self) -> tuple[str, ...]:
        """The sites that the example didn't reach."""
        return tuple(
            path for path, count in self.calls.items() if count == 0 and path not in self.weights
        )

    @property
    def repeated(self) -> dict[str, int]:
        """{site: times}, for the sites that were called more than once."""
        return {path: count for path, count in self.calls.items() if count > 1}

    @property
    def agrees(self) -> bool:
        """Whether apply and merged agree, as far as they were compared."""
        return (
            self.difference is None or self.tolerance is None or self.difference <= self.tolerance
        )

    @property
    def tells(self) -> bool:
        """Whether the comparison would have seen a missed adapter.

        It would where the adapter's effect is larger than what rounding may do.
        """
        return (
            self.effect is not None and self.tolerance is not None and self.effect > self.tolerance
        )

    @property
    def finite(self) -> bool:
        """Whether the adapter's tensors are finite, and so are its outputs where the base's are."""
        return not self.not_finite and (self.effect is None or math.isfinite(self.effect))

    @property
    def ok(self) -> bool:
        """Whether the adapter is in everywhere and does no harm.

        Every site was reached, none in a way that misses its adapter, apply and merged agree, and
        the adapter makes nothing NaN or infinite.
        """
        reached = not self.uncalled and not self.reads and not self.escaped
        return reached and self.agrees and self.finite

    def __repr__(self) -> str:
        return "\n".join(
            ["Report: " + ("ok" if self.ok else "not ok"), *("  " + line for line in self._lines())]
        )

    def _lines(self) -> list[str]:
        count, missed = len(self.calls), self.uncalled
        lines = [f"{count - len(missed)} of {count} sites reached"]
        if missed:
            lines.append(
                f"never reached by this example: {_some(missed)}; leave them out with "
                f"exclude_names, or give an example that does"
            )
        if self.weights:
            lines.append(f"reached through the adapted weight: {_some(self.weights)}")
        for path, functions in list(self.reads.items())[:_SHOWN]:
            lines.append(
                f"{path!r}: {', '.join(functions)} took its weight without calling it, so without "
                f"the adapter; call the layer there, or leave it out with exclude_names"
            )
        if self.escaped:
            lines.append(
                f"used as they were, without the adapter: {_some(self.escaped)}; something that "
                f"can't be followed refers to them (a large object, a global, a C++ one); let the "
                f"model reach them through its own attributes"
            )
        if self.repeated:
            lines.append(
                "called more than once: "
                + _some([f"{path} ({n} times)" for path, n in self.repeated.items()])
            )
        if self.not_finite:
            lines.append(f"NaN or infinity in {_some(self.not_finite)}")
        for path, names in list(self.tied.items())[:_SHOWN]:
            lines.append(
                f"{path!r} is tied to {_some(names)}, which this site's adapter doesn't reach"
            )
        for path, names in list(self.shared.items())[:_SHOWN]:
            lines.append(f"{path!r} is the same module as {_some(names)}, adapted there too")
        return lines + self._compared()

    def _compared(self) -> list[str]:
        lines = []
        if self.effect is not None and math.isfinite(self.effect):
            lines.append(f"it moves the output by at most {self.effect:.2e}")
        elif self.effect is not None:
            lines.append("it makes the output another size, NaN or infinite where the base's isn't")
        if self.unmerged:
            return [*lines, f"not compared with merged weights: {self.unmerged}"]
        where = f"; first at {self.parts_at!r}" if self.parts_at is not None else ""
        allowed = "allowed" if self.agrees else "too much, allowed"
        lines.append(
            f"apply and merged differ by at most {self.difference:.2e} ({allowed} "
            f"{self.tolerance:.2e}){where}"
        )
        if not self.tells:
            lines.append(
                "that says little: the adapter itself does no more here; check a trained one, or "
                "in a wider dtype"
            )
        return lines


def _some(names: tuple[str, ...] | list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
