"""A user's program, for the type checker alone: test_typing.py holds it to `mypy --strict`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import optree
import torch
import torch.utils._pytree as torch_pytree
from torch import Tensor, nn
from typing_extensions import assert_type

import lora_lite_func as ll


class Net(nn.Module):
    """The user's own model, with a method of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)

    def width(self) -> int:
        return self.up.out_features


# ---------------------------------- adapters
model = Net()
params = ll.init(model, ll.LoRAConfig(r=2, target_names="up", layers=None), seed=1)
assert_type(params, ll.Adapter)
assert_type(params["up"]["lora_A"], Tensor)
assert_type(params["up", "lora_A"], Tensor)
assert_type(ll.stack([params, params])[0], ll.Adapter)
assert_type(ll.scale(params, 0.5), ll.Adapter)
trainable, frozen = ll.partition(params)
assert_type(ll.combine(trainable, frozen), ll.Adapter)
for path, tensors in params.items():
    assert_type(path, str)
    assert_type(tensors, Mapping[str, Tensor])
assert_type(params.sites["up"].d_in, int)

# ---------------------------------- pytrees
halved = optree.tree_map(lambda t: t / 2, params)
y = ll.apply(model, halved, torch.ones(4))
flat, structure = optree.tree_flatten(params)
assert_type(flat, list[Tensor])
ll.bind(model, optree.tree_unflatten(structure, flat))
ll.apply(model, torch_pytree.tree_map(lambda t: t / 2, params), torch.ones(4))
grads = torch.func.grad(lambda p: ll.apply(model, p, torch.ones(4)).sum())(params)
ll.apply(model, grads, torch.ones(4))

# ---------------------------------- models' class
assert_type(ll.bind(model, params), Net)
assert_type(ll.prepared(model, [params]), Net)
assert_type(ll.merged(model, {"style": params}), Net)
assert_type(ll.bind(model, ll.rows(ll.stack([params]), [0])).width(), int)
assert_type(ll.merge(model, params), dict[str, Tensor])

# ---------------------------------- files
ll.save(params, Path("adapter.safetensors"))
ll.load("adapter.safetensors", model)


# ---------------------------------- a method of the user
@dataclass(frozen=True, kw_only=True)
class GainConfig(ll.AdapterConfig):
    """Its knob."""

    start: float = 1.0


def param_specs(cfg: GainConfig, site: ll.Site) -> dict[str, ll.ParamSpec]:
    """lora_gain (d_out,)."""
    return {"lora_gain": ll.ParamSpec((site.d_out,), "ones", dtype=torch.float32)}


def prepare(cfg: GainConfig, p: Mapping[str, Tensor], site: ll.Site, layer: ll.Layer) -> Tensor:
    """The gain at its start."""
    return p["lora_gain"] * cfg.start


def outputs(
    cfg: GainConfig, p: Mapping[str, Tensor], d: Tensor, x: Tensor, y: Tensor, site: ll.Site
) -> Tensor:
    """y times the gain; `d` is what `prepare` gives."""
    return (y * d).to(y.dtype)


def scale(cfg: GainConfig, p: Mapping[str, Tensor], c: float | Tensor) -> dict[str, Tensor]:
    """The gain moved along its line from 1."""
    return {"lora_gain": 1.0 + c * (p["lora_gain"] - 1.0)}


GAIN = ll.register(
    ll.Variant(
        name="gain",
        config=GainConfig,
        param_specs=param_specs,
        prepare=prepare,
        outputs=outputs,
        scale=scale,
    )
)
assert_type(GAIN, ll.Variant[GainConfig, Tensor])


# ---------------------------------- what the checker must refuse
def outputs_of_other_data(
    cfg: GainConfig, p: Mapping[str, Tensor], d: int, x: Tensor, y: Tensor, site: ll.Site
) -> Tensor:
    """`d` isn't what `prepare` gives."""
    return y


def outputs_without_site(
    cfg: GainConfig, p: Mapping[str, Tensor], d: Tensor, x: Tensor, y: Tensor
) -> Tensor:
    """An argument is missing."""
    return y


def refused() -> None:
    """Each line is an error; `warn_unused_ignores` says so where it is none."""
    ll.Variant(  # type: ignore[misc]
        name="a",
        config=GainConfig,
        param_specs=param_specs,
        prepare=prepare,
        outputs=outputs_of_other_data,
    )
    ll.Variant(
        name="a",
        config=GainConfig,
        param_specs=param_specs,
        prepare=prepare,
        outputs=outputs_without_site,  # type: ignore[arg-type]
    )
    ll.LoRAConfig(rank=2)  # type: ignore[call-arg]
    ll.scale(params, "half")  # type: ignore[arg-type]
    ll.bind(params, params)  # type: ignore[type-var]
