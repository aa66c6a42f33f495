"""What an adapter costs a forward: `ll.apply`, a bound model and PEFT over the bare base, at 1 and at 512 tokens."""

from __future__ import annotations

import copy
from typing import Any

import torch

import lora_lite_func as ll

from .harness import compare, llama, machine


def peft_lora(base: Any, r: int) -> Any:
    """The same base under PEFT's LoRA on all seven projections."""
    from peft import LoraConfig, get_peft_model

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return get_peft_model(copy.deepcopy(base), LoraConfig(r=r, lora_alpha=16, target_modules=names)).eval()


def main(layers: int = 8, rounds: int = 31) -> dict[str, Any]:
    """Print and return the ratios."""
    torch.set_num_threads(2)
    base = llama(layers)
    params = ll.init(base, ll.LoRAConfig(r=8))
    bound = ll.bind(base, params)
    other = peft_lora(base, 8)
    out: dict[str, Any] = {"machine": machine()}
    with torch.no_grad():
        for tokens in (1, 512):
            ids = torch.randint(0, 1024, (1, tokens))
            calls = {
                "base": lambda ids=ids: base(ids),
                "apply": lambda ids=ids: ll.apply(base, params, ids),
                "bound": lambda ids=ids: bound(ids),
                "peft": lambda ids=ids: other(ids),
            }
            result = compare(calls, rounds=rounds, inner=5 if tokens == 1 else 1)
            out[f"forward, {tokens} tokens"] = {"ratios": result.ratios, "guard": result.guard, "void": result.void}
            text = "  ".join(f"{n} {r:.3f}" for n, r in result.ratios.items())
            print(f"{tokens:>4} tokens: {text}   (base {result.seconds['base'] * 1e3:.2f} ms, guard {result.guard:.3f})")
    return out


if __name__ == "__main__":
    main()
