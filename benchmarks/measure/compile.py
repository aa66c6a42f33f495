"""Forward and training step under torch.compile's default backend, over the compiled base, beside a
bound model's, PEFT's and eager; and how many graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import lora_lite_func as ll

from .harness import Result, Row, Suite, llama
from .peers import lora, lora_lite, peft_lora
from .train import embedded


def area(suite: Suite) -> Iterator[Row]:
    """A Llama of two layers, 512 tokens, LoRA r=8; the adapter is an argument of the compiled
    function.
    """
    base = llama(1 if suite.quick else 2, device=suite.device)
    x = embedded(base, 512, suite.device)
    adapters = [lora(base) for _ in range(4)]
    yield Row("graphs over 4 adapters", graphs(base, x.detach(), adapters), "graphs", 1)
    yield from _timed(suite, base, x, adapters[0])
    torch.compiler.reset()


def _timed(suite: Suite, base: Any, x: Tensor, params: ll.Adapter) -> Iterator[Row]:
    torch.compiler.reset()
    f = ll.functional(base, params)

    def with_adapter(p: Mapping[str, Mapping[str, Tensor]], x: Tensor) -> Tensor:
        return f(p, inputs_embeds=x).logits

    def without(x: Tensor) -> Tensor:
        return base(inputs_embeds=x).logits

    fast, bare = torch.compile(with_adapter, fullgraph=True), torch.compile(without, fullgraph=True)
    with torch.no_grad():
        calls: dict[str, Callable[[], Any]] = {
            "compiled base": lambda: bare(x),
            "ours": lambda: fast(params, x),
            "eager": lambda: with_adapter(params, x),
        }
        found = suite.compare(calls)
    yield _over_compiled_base("forward, 512 tokens", found)
    leaves = [t.requires_grad_() for at in params.values() for t in at.values()]
    calls = {
        "compiled base": lambda: torch.autograd.grad(bare(x).mean(), [x]),
        "ours": lambda: torch.autograd.grad(fast(params, x).mean(), [x, *leaves]),
        "bound": _compiled_step(ll.bind(base, params), x),
        "PEFT": _compiled_step(peft_lora(base), x),
        **_lite(suite, base, x),
        "eager": lambda: torch.autograd.grad(with_adapter(params, x).mean(), [x, *leaves]),
    }
    yield _over_compiled_base("training step, 512 tokens", suite.compare(calls))


def _lite(suite: Suite, base: Any, x: Tensor) -> dict[str, Callable[[], Any]]:
    """lora-lite's step, where there is a checkout of it."""
    model = lora_lite(base, suite.lora_lite)
    return {} if model is None else {"lora-lite": _compiled_step(model, x)}


def _compiled_step(model: Any, x: Tensor) -> Callable[[], Any]:
    """A compiled training step of a module that holds what it trains; one graph, or it raises."""
    call = torch.compile(lambda x: model(inputs_embeds=x).logits, fullgraph=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    return lambda: torch.autograd.grad(call(x).mean(), [x, *trained])


def _over_compiled_base(what: str, found: Result) -> Row:
    names = {"bound": "ours bound", "PEFT": "PEFT", "lora-lite": "lora-lite", "eager": "ours eager"}
    peers = {names[name]: found.ratios[name] for name in names if name in found.ratios}
    return Row(what, found.ratios["ours"], "compiled base", guard=found.guard, peers=peers)


def graphs(base: Any, x: Tensor, adapters: list[ll.Adapter]) -> int:
    """How many graphs a compiled apply makes over these adapters."""
    torch.compiler.reset()
    made = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        made.append(graph)
        return graph.forward

    call = torch.compile(
        lambda p, x: ll.apply(base, p, inputs_embeds=x).logits, backend=backend, fullgraph=True
    )
    for params in adapters:
        call(params, x)
    return len(made)
