"""What wrote the files here: run with version 0.1.0 (git checkout 2f66eda), and a folder."""

import pickle
import sys
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

import lora_lite_func as ll

assert ll.__version__ == "0.1.0"
out = Path(sys.argv[1])
out.mkdir(exist_ok=True)
noise = torch.Generator().manual_seed(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).eval()


def made(config):
    """An adapter that does something."""
    trainable, frozen = ll.partition(ll.init(model, config))
    move = lambda t: t + 0.1 * torch.randn(t.shape, generator=noise)  # noqa: E731
    return ll.combine(torch.utils._pytree.tree_map(move, trainable), frozen)


lora = made(ll.LoRAConfig(r=2, alpha=6, rank_pattern={"0": 1}, rslora=True))
ia3, pissa = made(ll.IA3Config()), made(ll.PiSSAConfig(r=2))
members = {"fr": made(ll.LoRAConfig(r=2, alpha=4)), "de": made(ll.LoRAConfig(r=3, alpha=1))}
stack = ll.stack(members)
same = ll.stack([made(ll.DoRAConfig(r=2)) for _ in range(2)])
named = {"a": pissa, "b": made(ll.SHiRAConfig(r=1))}
vera = made(ll.VeRAConfig(r=3))
x = torch.randn(3, 6, generator=noise)
alone = {"lora": lora, "ia3": ia3, "pissa": pissa, "vera": vera, "tuple": (lora, ia3)}
for name, params in (alone | {"stack": stack, "same": same, "dict": named}).items():
    ll.save(params, out / f"{name}.safetensors")
outputs = {name: ll.apply(model, params, x) for name, params in alone.items()}
outputs |= {f"stack.{i}": ll.apply(model, stack[i], x) for i in range(2)}
outputs |= {f"same.{i}": ll.apply(model, same[i], x) for i in range(2)}
outputs |= {f"dict.{name}": ll.apply(model, params, x) for name, params in named.items()}
expected = {f"y.{name}": y.detach() for name, y in outputs.items()} | {"x": x}
expected |= {f"model.{name}": t for name, t in model.state_dict().items()}
safetensors.torch.save_file(expected, out / "expected.safetensors")
config = ll.LoRAConfig(r=2, target_names=("0",))
pickled = {"adapter": lora, "stack": stack, "tuple": (lora, ia3), "config": config}
for name, value in pickled.items():
    (out / f"{name}.pickle").write_bytes(pickle.dumps(value))
