"""What each of two processes does in tests/ecosystem/test_two_processes.py: started by
torch.distributed.run, it leaves its results in a folder.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers import moved, net
from torch import Tensor

import lora_lite_func as ll
from lora_lite_func.core.torch_internals import CALLS_SHARDED
from lora_lite_func.interop.bound_saves import AdapterSaver

ROWS, STEPS = 8, 5


def data() -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(3)
    return torch.randn(STEPS, ROWS, 16, generator=gen, dtype=torch.float64), torch.randn(
        ROWS, 8, generator=gen, dtype=torch.float64
    )


def adapter(seed: int = 0) -> ll.Adapter:
    return ll.init(net(depth=1), ll.LoRAConfig(r=4, init_A="gaussian"), seed=seed)


def trained(model: torch.nn.Module, rows: slice) -> list[Tensor]:
    """The model's outputs in training, on those rows of each batch."""
    xs, target = data()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    seen = []
    for x in xs:
        optimizer.zero_grad()
        y = model(x[rows])
        (y - target[rows]).square().mean().backward()
        optimizer.step()
        seen.append(y.detach())
    return seen


def members(ids: range) -> ll.Adapter:
    """A stack of those members, trained by rows, each on its own learning rate."""
    xs, target = data()
    trainable, frozen = ll.partition(ll.stack([adapter(i) for i in ids]))
    optimizer = ll.adamw(torch.tensor([1e-2 / (1 + i) for i in ids], dtype=torch.float64))
    state, who = optimizer.init(trainable), torch.arange(len(ids)).repeat_interleave(ROWS)
    model = net(depth=1)
    for x in xs:

        def loss(t: ll.Adapter, x: Tensor = x) -> Tensor:
            y = ll.apply(model, ll.rows(ll.combine(t, frozen), who), x.repeat(len(ids), 1))
            return (y.unflatten(0, (len(ids), ROWS)) - target).square().mean((1, 2)).sum()

        trainable, state = optimizer.update(torch.func.grad(loss)(trainable), state, trainable)
    return ll.combine(trainable, frozen)


METHODS = (
    ll.LoRAConfig(r=4),
    ll.DoRAConfig(r=4),
    ll.PiSSAConfig(r=4),
    ll.IA3Config(),
    ll.HRAConfig(r=4),
    ll.OFTConfig(block_size=4),
)


def adapted(model: torch.nn.Module, params: ll.Adapter) -> list[Tensor]:
    """The output and the gradients of a bound model, by name."""
    bound = ll.bind(model, params)
    named = {name: p for name, p in bound.named_parameters() if p.requires_grad}
    y = bound(data()[0][0, :6].view(2, 3, 16))
    return [y, *torch.autograd.grad(y.square().sum(), [named[name] for name in sorted(named)])]


def parallel(mesh: dist.device_mesh.DeviceMesh) -> tuple[list[list[Tensor]], list[str]]:
    """What adapters make of a model whose layers are shared out, and what is refused there."""
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    model, whole = net(depth=1), net(depth=1)
    plan = {"layers.0.up": ColwiseParallel(), "layers.0.down": RowwiseParallel()}
    parallelize_module(model, mesh, plan)
    made = []
    for cfg in METHODS:
        start = torch.utils._pytree.tree_leaves(ll.init(model, cfg))
        assert all(type(t) is Tensor for t in start)
        made.append([*start, *adapted(model, moved(ll.init(whole, cfg)))])
    params = ll.init(model, METHODS[0])
    stack = ll.stack([params, params])
    x = data()[0][0]
    tries: list[Callable[[], object]] = [
        lambda: ll.merged(model, params),
        lambda: ll.bind(model, params, linears=True),
        lambda: ll.init(model, ll.FullConfig(target_parameters=(r"up\.weight",))),
        lambda: ll.apply(model, ll.rows(stack, [0] * ROWS), x),
        lambda: ll.apply(model.train(), ll.init(model, ll.LoRAConfig(r=2, dropout=0.5)), x),
    ]
    return made, [refused(attempt) for attempt in tries]


def refused(attempt: Callable[[], object]) -> str:
    """What the library says to it."""
    try:
        attempt()
    except ll.UnsupportedError as error:
        return str(error)
    return "nothing"


def shared() -> ll.Adapter:
    """Layers with one vector for all of them."""
    return ll.init(net(depth=2), ll.TinyLoRAConfig(r=2, u=5, tying=1.0))


def apart(mesh: Any) -> str:
    """What is said to a tensor of several layers whose layers are sharded apart: by newer torch's
    fully_shard, else by the library.
    """
    from torch.distributed.fsdp import fully_shard

    bound: Any = ll.bind(net(depth=2), shared())
    try:
        for layer in bound.layers:
            fully_shard(layer, mesh=mesh)
        ll.unbind(bound)
    except ValueError as error:
        return str(error)
    return "nothing"


def work(folder: Path) -> None:
    """Both ways of spreading one run over processes, and a stack's members over processes."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    rank, world = dist.get_rank(), dist.get_world_size()
    own = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    found: dict[str, object] = {}

    bound = ll.bind(net(depth=1), adapter())
    found["ddp"] = trained(torch.nn.parallel.DistributedDataParallel(bound), own)

    count = 4 // world
    mine = members(range(rank * count, (rank + 1) * count))
    gathered: list[list[Tensor]] = [[] for _ in range(world)]
    dist.all_gather_object(gathered, torch.utils._pytree.tree_leaves(mine))
    found["members"] = [torch.cat(ts) for ts in zip(*gathered, strict=True)]

    sharded = ll.bind(net(depth=1), adapter())
    mesh = dist.device_mesh.init_device_mesh("cpu", (world,))
    for layer in sharded.layers:  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in sharded.parameters())
    found["fsdp"] = trained(sharded, own)
    AdapterSaver(sharded, "")(folder / "saved", is_main_process=rank == 0)

    together = ll.bind(net(depth=2), shared())
    fully_shard([*together.layers], mesh=mesh)  # type: ignore[misc]
    fully_shard(together, mesh=mesh)
    found["shared"] = trained(together, own)
    of_all: Any = ll.unbind(together)[".tied.0", "lora_v"]
    found["shared adapter"] = [of_all.full_tensor()]
    found["apart"] = apart(mesh)

    if CALLS_SHARDED:
        found["parallel"], found["parallel refusals"] = parallel(mesh)
    else:
        found["parallel refusals"] = [refused(lambda: parallel(mesh))]

    already = net(depth=1)
    fully_shard(already, mesh=mesh)
    found["refusal"] = refused(lambda: ll.bind(already, adapter()))
    torch.save(found, folder / f"{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        work(Path(sys.argv[1]))
    finally:
        dist.destroy_process_group()
