"""What each method costs: a forward of 512 tokens by `ll.apply`, `ll.prepared` and PEFT over the
bare base, and what is kept for the backward pass.

python -m benchmarks.measure.methods [name ...]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import optree
import torch
from torch import Tensor

import lora_lite_func as ll

from . import results
from .harness import Result, Row, Suite, llama, saved, token_ids
from .peers import lora_lite, noisy, peft_adapted

HIDDEN, LAYERS, TOKENS = 512, 4, 512

OURS: dict[str, dict[str, Any]] = {
    "c3a": {"block_size": 16},
    "gralora": {"k": 2},
    "ssvd": {"r": 64},
    "antipasto": {"r": 64},
    "full": {"target_parameters": r"_proj\.weight$"},
    "tokens": {"token_ids": range(64), "target_names": r"embed_tokens$"},
}
"""Sizes and places other than a config's own: a circulant block has to divide 1376 and 512."""

PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "adalora": ("AdaLoraConfig", {"init_r": 8, "total_step": 100}),
    "boft": ("BOFTConfig", {"boft_block_size": 4, "boft_n_butterfly_factor": 2}),
    "c3a": ("C3AConfig", {"block_size": 16}),
    "delora": ("DeloraConfig", {"r": 8}),
    "dora": ("LoraConfig", {"r": 8, "use_dora": True}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 1000}),
    "gralora": ("GraloraConfig", {"r": 8, "gralora_k": 2}),
    "hira": ("HiraConfig", {"r": 8}),
    "hra": ("HRAConfig", {"r": 8}),
    "ia3": ("IA3Config", {"feedforward_modules": []}),
    "loha": ("LoHaConfig", {"r": 8}),
    "lokr": ("LoKrConfig", {"r": 8}),
    "lora": ("LoraConfig", {"r": 8}),
    "miss": ("MissConfig", {"r": 64}),
    "oft": ("OFTConfig", {"r": 0, "oft_block_size": 32, "use_cayley_neumann": False}),
    "randlora": ("RandLoraConfig", {"r": 32}),
    "road": ("RoadConfig", {}),
    "shira": ("ShiraConfig", {"r": 8}),
    "vera": ("VeraConfig", {"r": 256}),
}
"""PEFT's config of the same method at the same size, where it has one."""


def start(base: Any, name: str, ids: Tensor) -> ll.Adapter:
    """A method's adapter as if trained: its start with noise, so that nothing is zero."""
    cfg = ll.variants()[name].config(**OURS.get(name, {}))
    needs = ll.variants()[name].needs_of(cfg)
    given: dict[str, Any] = {"calibration_data": [ids]} if needs & {"inputs", "gradients"} else {}
    if "pairs" in needs:
        given["calibration_data"] = [(ids, ids.flip(-1))]
    if "gradients" in needs:
        given["loss_fn"] = lambda out, batch: out.logits.square().mean()
    return noisy(ll.init(base, cfg, **given))


def measure(suite: Suite, base: Any, name: str, ids: Tensor) -> tuple[Result, int]:
    """(ratios over the base, bytes saved for backward)."""
    params = start(base, name, ids)
    once = ll.prepared(base, params)
    calls = {
        "base": lambda: base(ids),
        "ours": lambda: ll.apply(base, params, ids),
        "prepared": lambda: once(ids),
    }
    if name in PEFT:
        config, fields = PEFT[name]
        other = peft_adapted(base, config, **fields)
        calls["PEFT"] = lambda: other(ids)
    lite = lora_lite(base, suite.lora_lite, method=name)
    if lite is not None:
        calls["lora-lite"] = lambda: lite(ids)
    with torch.no_grad():
        result = suite.compare(calls)
    live = optree.tree_map(lambda t: t.clone().requires_grad_(), ll.partition(params)[0])
    whole = ll.combine(live, ll.partition(params)[1])
    held = [*base.parameters(), *base.buffers(), *optree.tree_leaves(whole)]
    return result, saved(lambda: ll.apply(base, whole, ids).logits, held)


_FREE = {"antipasto", "vera", "ssvd", "randlora"}
"""Methods whose sizes alone cost more than the target."""


_FASTER = {"hra": 7.0, "boft": 1.5, "loha": 1.5, "lokr": 1.5, "fourierft": 1.5}
"""At least so many times as fast as PEFT's."""


def area(suite: Suite, names: Sequence[str] = ()) -> Iterator[Row]:
    """Of every method the forward of 512 tokens over the base, prepared too, PEFT's over ours, and
    what is saved over LoRA's. A method that can't be made for this model is said to be left out.
    """
    base = llama(1 if suite.quick else LAYERS, HIDDEN, device=suite.device)
    ids = token_ids(TOKENS, suite.device)
    reference = 0
    for name in dict.fromkeys(("lora", *(names or ll.variants()))):
        try:
            result, kept = measure(suite, base, name, ids)
        except ll.LoraLiteError as error:
            print(f"left out {name}: {error}", file=sys.stderr)
            continue
        reference, ratios = reference or kept, result.ratios
        yield Row(
            f"{name}, {TOKENS} tokens",
            ratios["ours"],
            "base",
            None if name in _FREE else 1.15,
            guard=result.guard,
            peers=result.peers("prepared", "PEFT", "lora-lite"),
        )
        if name in _FASTER:
            faster = result.over("PEFT", "ours")
            yield Row(
                f"{name}, PEFT's time over ours",
                faster,
                "ours",
                _FASTER[name],
                at_least=True,
                guard=result.guard,
            )
        yield Row(f"{name}, saved bytes", kept / reference, "LoRA's", 1.4)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the methods that are named, or all, and print their rows."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.measure.methods",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="name", help="(default: every method)")
    given = parser.parse_args(arguments)
    torch.set_num_threads(2)
    print(results.HEADER)
    for row in area(Suite(), given.names):
        print(results.line("methods", row), flush=True)


if __name__ == "__main__":
    main()
