"""Servers of adapters on the disk: an LRU of resident ones around an `ll.Bank`, and around PEFT's
load, set and delete.
"""

from __future__ import annotations

import copy
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lora_lite_func as ll

__all__ = ["BankServer", "PeftServer", "Request", "Resident", "answer"]


@dataclass(frozen=True)
class Request:
    """A prompt (T,) of token ids, and the name of the adapter that is to answer it."""

    adapter: str
    prompt: Tensor


def answer(model: Any, requests: Sequence[Request], new_tokens: int) -> Tensor:
    """The tokens that a model answers, (N, new_tokens), all prompts in one batch."""
    prompts = torch.stack([request.prompt for request in requests])
    done = model.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
        use_cache=True,
    )
    return done[:, prompts.shape[1] :]


class Resident:
    """Which adapters are in memory: the least recently used one goes when another has to come.

    Attributes:
        seconds: how long each miss took, from the disk to where it can be used.
    """

    def __init__(self, room: int, load: Callable[[str], None], drop: Callable[[str], None]) -> None:
        self.room, self.load, self.drop = room, load, drop
        self.used: OrderedDict[str, None] = OrderedDict()
        self.seconds: list[float] = []

    def bring(self, names: Sequence[str]) -> None:
        """Bring in what a batch needs; there must be room for all of it."""
        for name in dict.fromkeys(names):
            if name in self.used:
                self.used.move_to_end(name)
        for name in dict.fromkeys(names):
            if name in self.used:
                continue
            begin = time.perf_counter()
            if len(self.used) == self.room:
                self.drop(self.used.popitem(last=False)[0])
            self.load(name)
            self.used[name] = None
            self.seconds.append(time.perf_counter() - begin)


class BankServer:
    """Batches that mix adapters, by `ll.rows` of a bank."""

    def __init__(self, model: Any, files: Path, room: int) -> None:
        self.model, self.bank = model, ll.Bank(capacity=room)
        self.resident = Resident(
            room,
            lambda name: ll.load_into(self.bank, name, files / f"{name}.safetensors", model),
            self.bank.drop,
        )

    def __call__(self, requests: Sequence[Request], new_tokens: int) -> Tensor:
        """The answers to a batch, in order."""
        names = [request.adapter for request in requests]
        self.resident.bring(names)
        return answer(ll.bind(self.model, ll.rows(self.bank, names)), requests, new_tokens)


class PeftServer:
    """PEFT's way with adapters that come and go: load_adapter, set_adapter, delete_adapter. A batch
    is answered adapter by adapter, or in one piece by `adapter_names`.
    """

    def __init__(self, model: Any, folders: Path, room: int, mixed: bool) -> None:
        import peft

        self.mixed = mixed
        base, first = copy.deepcopy(model), next(folders.iterdir())
        self.model: Any = peft.PeftModel.from_pretrained(base, str(first), adapter_name="first")
        self.model.eval()
        self.resident = Resident(
            room,
            lambda name: self.model.load_adapter(str(folders / name), adapter_name=name),
            self.model.delete_adapter,
        )

    def __call__(self, requests: Sequence[Request], new_tokens: int) -> Tensor:
        """The answers to a batch, in order."""
        names = [request.adapter for request in requests]
        self.resident.bring(names)
        if self.mixed:
            return self._mixed(requests, new_tokens)
        answers: list[Any] = [None] * len(requests)
        for name in dict.fromkeys(names):
            rows = [i for i, other in enumerate(names) if other == name]
            self.model.set_adapter(name)
            done = answer(self.model, [requests[i] for i in rows], new_tokens)
            for i, tokens in zip(rows, done, strict=True):
                answers[i] = tokens
        return torch.stack(answers)

    def _mixed(self, requests: Sequence[Request], new_tokens: int) -> Tensor:
        names = [request.adapter for request in requests]
        generate = self.model.generate
        by_name = _WithNames(lambda **given: generate(adapter_names=names, **given))
        return answer(by_name, requests, new_tokens)


@dataclass(frozen=True)
class _WithNames:
    """What `answer` takes for a model."""

    generate: Callable[..., Tensor]
