"""What a forward keeps for its backward, in bytes over the base's; and what K bound adapters hold
of memory that isn't the base's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

import lora_lite_func as ll

from .harness import Row, Suite, llama, saved
from .peers import PROJECTIONS, lora, lora_lite, noisy, peft_adapted, peft_lora
from .train import embedded


def area(suite: Suite) -> Iterator[Row]:
    """Saved bytes at 512 tokens of LoRA, of its dropout, of HRA and DoRA; the storage census of 16
    adapters.
    """
    base = llama(1 if suite.quick else 4, device=suite.device)
    x = embedded(base, 512, suite.device)
    bare = _kept(base, x)
    plain, wet = _ours(base, lora(base), x), _ours(base, lora(base, dropout=0.1), x, train=True)
    peft = _kept(peft_lora(base), x)
    peers = {"PEFT": peft / bare, **_lite(suite, base, x, "lora", bare)}
    yield Row("LoRA r=8, saved bytes", plain / bare, "base", 1.33, peers=peers)
    yield Row(
        "LoRA dropout 0.1, saved bytes",
        wet / plain,
        "without",
        1.02,
        peers={"PEFT": _kept(peft_lora(base, lora_dropout=0.1).train(), x) / peft},
    )
    names = tuple(PROJECTIONS)
    for name, config, target, theirs in (
        ("HRA", ll.HRAConfig(r=8, target_names=names), 1.0, ("HRAConfig", {"r": 8})),
        (
            "DoRA",
            ll.DoRAConfig(r=8, target_names=names),
            1.4,
            ("LoraConfig", {"r": 8, "use_dora": True}),
        ),
    ):
        kept = _ours(base, noisy(ll.init(base, config)), x)
        other = _kept(peft_adapted(base, theirs[0], **theirs[1]), x)
        yield Row(
            f"{name} r=8, saved bytes",
            kept / plain,
            "our LoRA",
            target,
            peers={"PEFT": other / plain, **_lite(suite, base, x, name.lower(), plain)},
        )
    yield _census(base)


def _ours(base: Any, params: ll.Adapter, x: Tensor, train: bool = False) -> int:
    return _kept(ll.bind(base, params).train(train), x)


def _kept(model: Any, x: Tensor) -> int:
    return saved(lambda: model(inputs_embeds=x).logits, [*model.parameters(), *model.buffers(), x])


def _lite(suite: Suite, base: Any, x: Tensor, method: str, over: int) -> dict[str, float]:
    """lora-lite's figure, where there is a checkout of it."""
    model = lora_lite(base, suite.lora_lite, method=method)
    return {} if model is None else {"lora-lite": _kept(model, x) / over}


def own_bytes(models: Iterable[torch.nn.Module], base: torch.nn.Module) -> int:
    """Bytes in distinct storages that the models hold and the base doesn't; buffers that a copy has
    for itself don't count.
    """
    shared = {p.untyped_storage().data_ptr() for p in base.parameters()}
    found = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
        for m in models
        for p in m.parameters()
    }
    return sum(size for start, size in found.items() if start not in shared)


def _census(base: torch.nn.Module, count: int = 16) -> Row:
    adapters = [lora(base) for _ in range(count)]
    size = sum(t.nbytes for at in adapters[0].values() for t in at.values())
    held = own_bytes([ll.bind(base, params) for params in adapters], base)
    return Row(
        f"{count} bound adapters, bytes that aren't the base's",
        held / (count * size),
        "adapters' own",
        1.0,
    )
