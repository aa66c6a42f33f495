"""Sets of adapters, beside the base and PEFT: mixed batches, many trained at once, per-sample
gradients, the optimizer, memory.

python -m benchmarks --only sets
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

import lora_lite_func as ll

from .harness import Row, Suite, llama
from .peers import PROJECTIONS

__all__ = ["area", "at_random", "peft_of", "stack_of"]


def stack_of(base: Any, ranks: list[int], seed: int = 0) -> ll.Adapter:
    """Adapters of those ranks as if trained."""
    gen = torch.Generator().manual_seed(seed)

    def noise(t: Tensor) -> Tensor:
        return t if t.ndim == 0 else 0.02 * torch.randn(t.shape, generator=gen)

    made = {r: ll.init(base, ll.LoRAConfig(r=r)) for r in set(ranks)}
    return ll.stack([pytree.tree_map(noise, made[r]) for r in ranks])


def peft_of(base: Any, count: int, r: int = 8) -> Any:
    """The base with `count` LoRA adapters of PEFT's, named "0", "1" ..."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=r, lora_alpha=16, target_modules=PROJECTIONS, init_lora_weights=False)
    model: Any = get_peft_model(copy.deepcopy(base), config, adapter_name="0")
    for i in range(1, count):
        model.add_adapter(str(i), config)
    return model.eval()


def mixed(suite: Suite) -> Iterator[Row]:
    """64 rows x 1 token: 1, 8 and 64 adapters, sorted and not; PEFT's mixed batch."""
    base, rows = llama(8), 64
    stack, order = (
        stack_of(base, [8] * 64),
        torch.randperm(64, generator=torch.Generator().manual_seed(0)),
    )
    other, ids = peft_of(base, 64), torch.randint(0, 1024, (rows, 1))
    eight = ll.stack([stack[i] for i in range(8)])
    one = ll.bind(base, ll.rows(ll.stack([stack[0]]), [0] * rows))
    bound = {
        "K=8": ll.bind(base, ll.rows(eight, torch.arange(rows) // 8)),
        "K=64": ll.bind(base, ll.rows(stack, range(rows))),
    }
    bound["K=64 unsorted"] = ll.bind(base, ll.rows(stack, order))
    names = [str(i) for i in range(rows)]
    with torch.no_grad():
        calls: dict[str, Callable[[], Any]] = {"base": lambda: base(ids), "K=1": lambda: one(ids)}
        calls |= {name: lambda model=model: model(ids) for name, model in bound.items()}
        calls["PEFT K=64"] = lambda: other(input_ids=ids, adapter_names=names)
        result = suite.compare(calls)
    peers = {"PEFT": result.ratios["PEFT K=64"]}
    yield Row(
        "64 rows x 1 token, 64 adapters",
        result.ratios["K=64"],
        "base",
        1.15,
        guard=result.guard,
        peers=peers,
    )
    yield Row("64 rows x 1 token, 8 adapters", result.ratios["K=8"], "base", guard=result.guard)
    yield Row("64 rows x 1 token, 1 adapter", result.ratios["K=1"], "base", guard=result.guard)
    yield Row(
        "64 adapters",
        result.over("PEFT K=64", "K=64"),
        "PEFT's time over ours",
        5.0,
        at_least=True,
        guard=result.guard,
    )
    yield Row(
        "64 adapters",
        result.over("K=64", "K=1"),
        "one adapter in 64 rows",
        1.05,
        guard=result.guard,
    )
    yield Row(
        "unsorted rows",
        result.over("K=64 unsorted", "K=64"),
        "sorted rows",
        1.03,
        guard=result.guard,
    )


def ragged(suite: Suite) -> Iterator[Row]:
    """64 rows of 16 adapters at random, 1 to 10 rows each, trained with 16 tokens; beside 4 rows
    each in order.
    """
    base, count, rows = llama(4), 16, 64
    stack, who = stack_of(base, [8] * count), at_random(count, rows)
    even = ll.bind(base, ll.rows(stack, torch.arange(rows) // 4))
    mixed = ll.bind(base, ll.rows(stack, who))
    ids, limit = torch.randint(0, 1024, (rows, 16)), _Base(base)
    result = suite.compare(
        {
            "base": lambda: limit(ids),
            "even": lambda: _step(even, ids),
            "random": lambda: _step(mixed, ids),
        }
    )
    what = "train 16 adapters, 64 rows x 16 tokens"
    yield Row(f"{what}, 4 rows each", result.ratios["even"], "base", guard=result.guard)
    yield Row(f"{what}, at random", result.ratios["random"], "base", guard=result.guard)


def at_random(members: int, rows: int) -> Tensor:
    """The member of each row (rows,), always the same."""
    return torch.randint(0, members, (rows,), generator=torch.Generator().manual_seed(0))


def ranks(suite: Suite) -> Iterator[Row]:
    """16 adapters of ranks 4 to 64 in one batch over 16 of the mean rank; 64 rows x 16 tokens."""
    base, wide = llama(4), [4, 8, 16, 64] * 4
    mean = sum(wide) // len(wide)
    ids, who = torch.randint(0, 1024, (64, 16)), torch.arange(64) // 4
    uniform = ll.bind(base, ll.rows(stack_of(base, [mean] * 16), who))
    several = ll.bind(base, ll.rows(stack_of(base, wide), who))
    with torch.no_grad():
        result = suite.compare({"uniform": lambda: uniform(ids), "mixed": lambda: several(ids)})
    yield Row(
        "ranks 4 to 64 in one batch",
        result.ratios["mixed"],
        "16 adapters of the mean rank",
        1.10,
        guard=result.guard,
    )


def _step(model: Any, ids: Tensor) -> None:
    """A forward and a backward on a language model's loss."""
    for p in model.parameters():
        p.grad = None
    logits = model(ids).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()


class _Base:
    """The frozen base's step: gradients of activations alone, the limit of any adapter's."""

    def __init__(self, base: Any) -> None:
        self.base = base

    def __call__(self, ids: Tensor) -> None:
        x = self.base.get_input_embeddings()(ids).detach().requires_grad_()
        logits = self.base(inputs_embeds=x).logits
        torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
        ).backward()


def train(suite: Suite) -> Iterator[Row]:
    """16 adapters x 16 tokens at once, against the base's one step and 16 steps of PEFT's."""
    base, count = llama(4), 16
    ids = torch.randint(0, 1024, (count, 16))
    bound, other, limit = (
        ll.bind(base, ll.rows(stack_of(base, [8] * count), range(count))),
        peft_of(base, 1).train(),
        _Base(base),
    )

    def after_another() -> None:
        for row in ids:
            _step(other, row[None])

    calls = {
        "base": lambda: limit(ids),
        "K=16 at once": lambda: _step(bound, ids),
        "16 PEFT steps": after_another,
    }
    result = suite.compare(calls)
    yield Row(
        "train 16 adapters x 16 tokens at once",
        result.ratios["K=16 at once"],
        "base",
        1.15,
        guard=result.guard,
    )
    faster = result.over("16 PEFT steps", "K=16 at once")
    yield Row(
        "train 16 adapters x 16 tokens at once",
        faster,
        "16 PEFT steps over it",
        3.5,
        at_least=True,
        guard=result.guard,
    )


def optimizer(suite: Suite) -> Iterator[Row]:
    """AdamW on 64 adapters: one fused on the stack, ours as a function, 64 objects."""
    base, count = llama(4), 64
    stack = stack_of(base, [8] * count)
    leaves = [t.clone().requires_grad_() for t in pytree.tree_leaves(stack)]
    alone = [
        [t[i].clone().requires_grad_() for t in pytree.tree_leaves(stack)] for i in range(count)
    ]
    for t in (*leaves, *(t for ts in alone for t in ts)):
        t.grad = torch.randn_like(t)
    one, many = torch.optim.AdamW(leaves, fused=True), [torch.optim.AdamW(ts) for ts in alone]
    pure = ll.adamw(1e-3)
    state = pure.init(stack)

    def all_of_them() -> None:
        for o in many:
            o.step()

    calls = {
        "one fused": one.step,
        "ll.adamw": lambda: pure.update(stack, state, stack),
        "64 AdamW": all_of_them,
    }
    result = suite.compare(calls)
    yield Row(
        "one fused AdamW on 64 adapters",
        result.ratios["64 AdamW"],
        "64 AdamW over it",
        8.0,
        at_least=True,
        guard=result.guard,
    )
    yield Row(
        "ll.adamw on 64 adapters",
        result.over("64 AdamW", "ll.adamw"),
        "64 AdamW over it",
        at_least=True,
        guard=result.guard,
    )
    yield Row("tensors of 64 adapters", len(leaves) / len(alone[0]), "tensors of one", 1.0)


def samples(suite: Suite) -> Iterator[Row]:
    """Gradients of 16 and 64 samples of 32 tokens, against the batch's one gradient and against one
    after another.
    """
    base = llama(4)
    params = stack_of(base, [8])[0]

    def losses(y: Any, ids: Tensor) -> Tensor:
        own = torch.nn.functional.cross_entropy(
            y.logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none"
        )
        return own.mean(1)

    bound = ll.bind(base, params)
    for count in (16, 64):
        ids = torch.randint(0, 1024, (count, 32))

        def loop(ids: Tensor = ids) -> None:
            for row in ids:
                _step(bound, row[None])

        calls = {
            "batch": lambda ids=ids: _step(bound, ids),
            "per sample": lambda ids=ids: ll.per_sample_grads(base, params, losses, ids),
            "loop": loop,
        }
        result = suite.compare(calls)
        what = f"per-sample gradients, {count} x 32 tokens"
        yield Row(
            what, result.ratios["per sample"], "the batch's gradient", 1.05, guard=result.guard
        )
        yield Row(
            what, result.over("per sample", "loop"), f"{count} backwards", 0.6, guard=result.guard
        )


def graphs(suite: Suite) -> Iterator[Row]:
    """Graphs that torch.compile makes over 8 mixes of a batch."""
    from torch._dynamo.testing import CompileCounter

    base, counter = llama(2), CompileCounter()
    stack, ids = stack_of(base, [8] * 16), torch.randint(0, 1024, (16, 4))
    step = torch.compile(
        lambda s, who, ids: ll.apply(base, ll.rows(s, who), ids).logits,
        fullgraph=True,
        backend=counter,
    )
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(8):
            step(stack, torch.randint(-1, 16, (16,), generator=gen), ids)
    yield Row("compile, 8 mixes of a batch", counter.frame_count, "graphs", 1.0)


def memory(suite: Suite) -> Iterator[Row]:
    """Bytes of 64 adapters bound in rows, over 64 times one's; storages of the base that the bound
    model doesn't share.
    """
    base = llama(4)
    stack = stack_of(base, [8] * 64)
    bound = ll.bind(base, ll.rows(stack, range(64)))
    mine = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in base.parameters()}
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*bound.parameters()]
    }
    own = sum(n for at, n in held.items() if at not in mine)
    one = sum(t.nbytes for t in pytree.tree_leaves(stack[0]))
    yield Row("64 adapters in rows", own / (64 * one), "64 x an adapter's bytes", 1.0)
    yield Row(
        "storages of the base that it doesn't share", len(mine.keys() - held.keys()), "tensors", 0.0
    )


def area(suite: Suite) -> Iterator[Row]:
    """Every figure."""
    for part in (mixed, ragged, ranks, train, optimizer, samples, graphs, memory):
        yield from part(suite)
