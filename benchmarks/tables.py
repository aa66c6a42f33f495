"""Tables in the documents that follow from the code.

python -m benchmarks.tables     rewrites each where it stands

choice    what each method is good for, its start, its layers, rows, merging, PEFT's file
methods   what each method does, on which side of the layer, what its start reads, its paper
verbs     the public functions and classes that aren't configs, by their docstrings
"""

from __future__ import annotations

import argparse
import copy
import functools
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import lora_lite_func as ll
from lora_lite_func.interop.peft.methods import METHODS, TOKENS
from lora_lite_func.layers.kinds import KINDS
from lora_lite_func.variants import METHODS as OWN
from lora_lite_func.variants import FullConfig, TokensConfig

from .measure.results import put_between

__all__ = ["PAGES", "choice", "main", "methods", "own", "rewritten", "verbs"]

ROOT = Path(__file__).parent.parent
GUIDES = ROOT / "lora_lite_func" / "guides"


def choice() -> str:
    """What helps to choose: a row for each method, of its record and of its start on one layer."""
    rows = [
        f"As of version {ll.__version__}, {len(OWN)} methods.",
        "",
        "| config | good for | starts at | layers | rows | merges | PEFT file | cost |",
        "|---|---|---|---|---|---|---|---|",
    ]
    peft_types = _peft_types()
    for variant in own():
        kinds = ", ".join((f"**{variant.sites[0]}**", *variant.sites[1:]))
        pair = "LORA" if variant.low_rank_factors is not None else ""
        rows.append(
            f"| `ll.{variant.config.__name__}` | {variant.good_for} | {start_of(variant)} | "
            f"{kinds} | {_rows(variant)} | {'no' if variant.weight is None else 'yes'} | "
            f"{peft_types.get(variant.config, pair)} | {cost_of(variant)} |"
        )
    return "\n".join(rows)


def own() -> list[ll.Variant]:
    """The library's methods by name, without those that a program has registered."""
    return [variant for name, variant in ll.variants().items() if name in OWN]


def _peft_types() -> dict[type, str]:
    """{config: PEFT's types of file that hold it}."""
    found: dict[type, str] = {}
    for codec in METHODS.values():
        for cfg in codec.configs:
            both = [found[cfg]] if cfg in found else []
            found[cfg] = ", ".join([*both, codec.peft_type])
    return found | {TokensConfig: TOKENS.peft_type, FullConfig: "modules_to_save"}


def _rows(variant: ll.Variant) -> str:
    """How rows of a batch with adapters of their own go through a linear layer."""
    if variant.batched:
        return "fused" if variant.low_rank_factors is not None else "together"
    return "mapped"


class _One(nn.Module):
    """A layer, which is a block as well."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([layer])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers[0](x)
        return y


class _Decoder(nn.Module):
    """The model of transformers whose attention methods that act inside of it are seen on."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaModel

        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
        self.inner = LlamaModel(LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=_WIDTH))

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.inner(ids).last_hidden_state
        return y


_WIDTH, _TOKENS = 256, 512
_LAYERS: dict[str, Callable[[], nn.Module]] = {
    "embedding": lambda: nn.Embedding(_WIDTH, _WIDTH),
    "norm": lambda: nn.LayerNorm(_WIDTH),
}
"""By kind; every other kind has a linear layer."""
_NEEDED: dict[type, dict[str, Any]] = {
    TokensConfig: {"token_ids": (1, 2)},
    FullConfig: {"target_parameters": "weight"},
}
"""What a config has to be told, where it has no default."""


def start_of(variant: ll.Variant) -> str:
    """Where a method starts by default, seen on one layer: at the base, bit by bit, or not."""
    if KINDS[variant.sites[0]].called:
        return "elsewhere, by design"  # tokens are added, of which attention takes notice
    model, params, given = _on_one_layer(variant)
    with torch.no_grad():
        y, base = ll.apply(model, params, given), model(given)
    if torch.equal(y, base):
        return "the base"
    off = float((y - base).abs().max() / base.abs().max())
    if off < 1e-4:
        return "the base, rounded"
    return "near the base" if off < 0.05 else "elsewhere, by design"


def cost_of(variant: ll.Variant) -> str:
    """What a method's forward pass multiplies beside the layer, over what LoRA's does, at default
    sizes; nothing for a method without a place in a linear layer.
    """
    if variant.sites[0] not in ("linear", "module"):
        return ""
    return f"{_products(variant) / _products(ll.variants()['lora']):.2g}"


@functools.cache
def _products(variant: ll.Variant) -> int:
    model, params, given = _on_one_layer(variant)
    counted = []
    for call in (lambda: ll.apply(model, params, given), lambda: model(given)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call()
        counted.append(counter.get_total_flops())
    return int(counted[0] - counted[1])


@functools.cache
def _on_one_layer(variant: ll.Variant) -> tuple[nn.Module, ll.Adapter, Tensor]:
    """(a model of one layer, the method's start on it by default, an input)."""
    gen = torch.Generator().manual_seed(0)
    kind = variant.sites[0]
    layer = _LAYERS.get(kind, lambda: nn.Linear(_WIDTH, _WIDTH))
    model = (_Decoder() if KINDS[kind].attends else _One(layer())).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=gen) * _WIDTH**-0.5)
    cfg = variant.config(**_NEEDED.get(variant.config, {}))
    params = ll.init(model, cfg, **_sources(variant.needs_of(cfg), model, gen))
    ids = torch.arange(_TOKENS).view(2, -1) % _WIDTH
    x = torch.randn(2, _TOKENS // 2, _WIDTH, generator=gen)
    return model, params, ids if kind == "embedding" or KINDS[kind].attends else x


def _sources(needs: frozenset[str], model: nn.Module, gen: torch.Generator) -> dict[str, Any]:
    """Keywords of `ll.init` with what a start is made of."""
    found: dict[str, Any] = {}
    batches = [torch.randn(64, 8, _WIDTH, generator=gen) for _ in range(2)]
    if "pairs" in needs:
        found["calibration_data"] = [(batches[0], batches[1])]
    elif needs & {"inputs", "activity", "gradients"}:
        found["calibration_data"] = batches
    if "gradients" in needs:
        found["loss_fn"] = lambda y, batch: y.square().mean()
    if "reference" in needs:
        found["reference"] = copy.deepcopy(model)
        with torch.no_grad():
            for p in found["reference"].parameters():
                p += 0.01 * torch.randn(p.shape, generator=gen)
    return found


def methods() -> str:
    """Config, name, what it does, on which side it acts, what it reads, paper."""
    rows = ["| config | name | what | acts on | reads | paper |", "|---|---|---|---|---|---|"]
    for variant in own():
        doc = sys.modules[variant.param_specs.__module__].__doc__ or ""
        what = doc.partition("\n")[0].rstrip(".").split(": ", 1)[-1]
        sides = (
            ("input", variant.inputs),
            ("output", variant.outputs),
            ("whole call", variant.virtual),
            ("attention", variant.attend),
        )
        acts_on = " and ".join(side for side, phase in sides if phase is not None) or "weight"
        reads = ", ".join(sorted(variant.needs)) or "nothing"
        rows.append(
            f"| `ll.{variant.config.__name__}` | `{variant.name}` | {what} | {acts_on} | {reads} | "
            f"{variant.paper} |"
        )
    return "\n".join(rows)


def verbs() -> str:
    """Every public name that isn't a method's config: the first sentence of its docstring, and the
    guide that uses it first.
    """
    configs = {variant.config.__name__ for variant in own()}
    guides = {page: (GUIDES / page).read_text(encoding="utf-8") for page in _guides_in_order()}
    rows = ["| name | what | see |", "|---|---|---|"]
    for name in sorted(set(ll.__all__) - configs, key=lambda n: (n.lower(), n)):
        text = " ".join((inspect.getdoc(getattr(ll, name)) or "").partition("\n\n")[0].split())
        first = re.split(r"(?<=[.;])\s", text)[0].rstrip(".;:").replace("|", r"\|")
        page = next((p for p, words in guides.items() if re.search(rf"\bll\.{name}\b", words)), "")
        see = f"[{page.removesuffix('.md').replace('_', ' ')}]({page})" if page else ""
        rows.append(f"| `ll.{name}` | {first} | {see} |")
    return "\n".join(rows)


def _guides_in_order() -> list[str]:
    """The pages as the index of the guides lists them."""
    index = (GUIDES / "README.md").read_text(encoding="utf-8")
    return list(dict.fromkeys(re.findall(r"\]\((\w+\.md)\)", index.partition("<!--")[0])))


PAGES: dict[str, Callable[[], str]] = {"choice": choice, "methods": methods, "verbs": verbs}
"""What stands between the marks `NAME: rendered by benchmarks/tables.py` and `end of NAME`."""


def rewritten(text: str) -> str:
    """A page with its tables as the code says them."""
    for name, render in PAGES.items():
        begin, end = f"<!-- {name}: rendered by benchmarks/tables.py -->", f"<!-- end of {name} -->"
        if begin in text:
            text = put_between(text, begin, end, render())
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Rewrite the pages that are named, or all that have such a table."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("pages", nargs="*", type=Path, help="(default: every page that has one)")
    given = parser.parse_args(arguments)
    pages = [
        page
        for folder in ("lora_lite_func", "benchmarks")
        for page in (ROOT / folder).rglob("*.md")
    ]
    for page in given.pages or [ROOT / "README.md", *sorted(pages)]:
        text = page.read_text(encoding="utf-8")
        made = rewritten(text)
        if made != text:
            page.write_text(made, encoding="utf-8")
            print(page)


if __name__ == "__main__":
    main()
