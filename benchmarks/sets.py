"""Sets of adapters: mixed batches, many trained at once, per-sample gradients, the optimizer, memory; beside the base and PEFT.

python -m benchmarks.sets [--rounds 21] [--only mixed ranks train optimizer samples graphs memory]
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

import lora_lite_func as ll

from .harness import Result, compare, llama

__all__ = ["AREAS", "main"]

Rows = dict[str, Any]
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


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

    config = LoraConfig(r=r, lora_alpha=16, target_modules=list(MODULES), init_lora_weights=False)
    model: Any = get_peft_model(copy.deepcopy(base), config, adapter_name="0")
    for i in range(1, count):
        model.add_adapter(str(i), config)
    return model.eval()


def shown(title: str, result: Result) -> Rows:
    """Print a row of ratios and give it back."""
    text = "  ".join(f"{n} {r:.3f}" for n, r in result.ratios.items())
    first = next(iter(result.seconds.values()))
    print(f"{title}: {text}   (first {first * 1e3:.1f} ms, guard {result.guard:.3f}{', VOID' if result.void else ''})", flush=True)
    return {"ratios": dict(result.ratios), "guard": result.guard, "void": result.void}


def mixed(rounds: int) -> Rows:
    """64 rows x 1 token: 1, 8 and 64 adapters, sorted and not; PEFT's mixed batch."""
    base, rows = llama(8), 64
    stack, order = stack_of(base, [8] * 64), torch.randperm(64, generator=torch.Generator().manual_seed(0))
    other, ids = peft_of(base, 64), torch.randint(0, 1024, (rows, 1))
    eight = ll.stack([stack[i] for i in range(8)])
    one = ll.bind(base, ll.rows(ll.stack([stack[0]]), [0] * rows))
    bound = {"K=8": ll.bind(base, ll.rows(eight, torch.arange(rows) // 8)), "K=64": ll.bind(base, ll.rows(stack, range(rows)))}
    bound["K=64 unsorted"] = ll.bind(base, ll.rows(stack, order))
    names = [str(i) for i in range(rows)]
    with torch.no_grad():
        calls: dict[str, Callable[[], Any]] = {"base": lambda: base(ids), "K=1": lambda: one(ids)}
        calls |= {name: lambda model=model: model(ids) for name, model in bound.items()}
        calls["PEFT K=64"] = lambda: other(input_ids=ids, adapter_names=names)
        return shown("mixed batch, 64 rows x 1 token", compare(calls, rounds=rounds))


def ranks(rounds: int) -> Rows:
    """16 adapters of ranks 4 to 64 in one batch against 16 of the mean rank; 64 rows x 16 tokens."""
    base, wide = llama(4), [4, 8, 16, 64] * 4
    mean = sum(wide) // len(wide)
    ids, who = torch.randint(0, 1024, (64, 16)), torch.arange(64) // 4
    uniform = ll.bind(base, ll.rows(stack_of(base, [mean] * 16), who))
    several = ll.bind(base, ll.rows(stack_of(base, wide), who))
    with torch.no_grad():
        return shown("ranks 4 to 64 in one batch", compare({"uniform": lambda: uniform(ids), "mixed": lambda: several(ids)}, rounds=rounds))


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
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()


def train(rounds: int) -> Rows:
    """16 adapters x 16 tokens at once, against the base's one step and 16 steps of PEFT's."""
    base, count = llama(4), 16
    ids = torch.randint(0, 1024, (count, 16))
    bound, other, limit = ll.bind(base, ll.rows(stack_of(base, [8] * count), range(count))), peft_of(base, 1).train(), _Base(base)

    def after_another() -> None:
        for row in ids:
            _step(other, row[None])

    calls = {"base": lambda: limit(ids), "K=16 at once": lambda: _step(bound, ids), "16 PEFT steps": after_another}
    return shown("train 16 adapters x 16 tokens", compare(calls, rounds=rounds))


def optimizer(rounds: int) -> Rows:
    """AdamW on 64 adapters: one fused on the stack, ours as a function, 64 objects."""
    base, count = llama(4), 64
    stack = stack_of(base, [8] * count)
    leaves = [t.clone().requires_grad_() for t in pytree.tree_leaves(stack)]
    alone = [[t[i].clone().requires_grad_() for t in pytree.tree_leaves(stack)] for i in range(count)]
    for t in (*leaves, *(t for ts in alone for t in ts)):
        t.grad = torch.randn_like(t)
    one, many = torch.optim.AdamW(leaves, fused=True), [torch.optim.AdamW(ts) for ts in alone]
    pure = ll.adamw(1e-3)
    state = pure.init(stack)

    def all_of_them() -> None:
        for o in many:
            o.step()

    calls = {"one fused": one.step, "ll.adamw": lambda: pure.update(stack, state, stack), "64 AdamW": all_of_them}
    made = shown(f"optimizer, 64 adapters, {len(leaves)} tensors", compare(calls, rounds=rounds))
    return made | {"tensors": len(leaves), "tensors of one adapter": len(alone[0])}


def samples(rounds: int) -> Rows:
    """Gradients of 16 and 64 samples of 32 tokens, against the batch's one gradient and against one after another."""
    base, out = llama(4), {}
    params = stack_of(base, [8])[0]

    def losses(y: Any, ids: Tensor) -> Tensor:
        own = torch.nn.functional.cross_entropy(y.logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
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
        out[count] = shown(f"per-sample gradients, {count} x 32 tokens", compare(calls, rounds=rounds))
    return out


def graphs(rounds: int) -> Rows:
    """Graphs that torch.compile makes over 8 mixes of a batch."""
    from torch._dynamo.testing import CompileCounter

    base, counter = llama(2), CompileCounter()
    stack, ids = stack_of(base, [8] * 16), torch.randint(0, 1024, (16, 4))
    step = torch.compile(lambda s, who, ids: ll.apply(base, ll.rows(s, who), ids).logits, fullgraph=True, backend=counter)
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(8):
            step(stack, torch.randint(-1, 16, (16,), generator=gen), ids)
    print(f"graphs over 8 mixes: {counter.frame_count}", flush=True)
    return {"graphs over 8 mixes": counter.frame_count}


def memory(rounds: int) -> Rows:
    """Bytes of 64 adapters bound in rows, over 64 times one's; storages of the base that the bound model doesn't share."""
    base = llama(4)
    stack = stack_of(base, [8] * 64)
    bound = ll.bind(base, ll.rows(stack, range(64)))
    mine = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in base.parameters()}
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*bound.parameters()]}
    own = sum(n for at, n in held.items() if at not in mine)
    one = sum(t.nbytes for t in pytree.tree_leaves(stack[0]))
    print(
        f"memory of 64 adapters in rows: {own / (64 * one):.3f} x 64 adapters; base storages not shared: {len(mine.keys() - held.keys())}"
    )
    return {"ratio": own / (64 * one), "base storages not shared": len(mine.keys() - held.keys())}


AREAS: dict[str, Callable[[int], Rows]] = {area.__name__: area for area in (mixed, ranks, train, optimizer, samples, graphs, memory)}


def main(rounds: int = 21, only: list[str] | None = None) -> Rows:
    """Print and return the ratios of the areas asked for."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    return {name: area(rounds) for name, area in AREAS.items() if not only or name in only}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--only", nargs="*", choices=list(AREAS))
    given = parser.parse_args()
    main(given.rounds, given.only)
