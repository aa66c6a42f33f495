"""A model made of the shards in a folder. It stands on the meta device and needs their headers
alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import CheckpointError, short_repr
from .shards import Shards

__all__ = ["meta_model"]

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_TRANSPOSED_MODELS = (
    "gpt2",
    "openai-gpt",
    "imagegpt",
    "decision_transformer",
)  # model types whose linear layers are Conv1D


class _Lazy(Mapping[str, Tensor]):
    """The tensors of a module, each read when it is asked for."""

    def __init__(self, shards: Shards, prefix: str) -> None:
        self.shards, self.prefix = shards, prefix

    def __getitem__(self, name: str) -> Tensor:
        return self.shards.read(self.prefix + name)

    def __iter__(self) -> Iterator[str]:
        return (n.removeprefix(self.prefix) for n in self.shards if n.startswith(self.prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class _Transposed(nn.Module):
    """A linear layer that is stored as (in, out), as transformers' Conv1D is."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.nx, self.nf = shape


def meta_model(
    shards: Shards,
    *,
    transposed: bool | None = None,
    embeddings: Iterable[str] = (),
    upwards: Mapping[str, int] | None = None,
) -> nn.Module:
    """Make a module tree with the folder's weights on the meta device. Biases and gains are real,
    and a weight is read when it is asked for.

    Args:
        shards: the folder.
        transposed: whether linear layers are stored as (in, out); by default the model's type
            tells.
        embeddings: the paths of matrices that are tables.
        upwards: {path: output channels} of transposed convolutions, whose kernels look like others.

    Raises:
        CheckpointError: a name that can't be a module's, or a dtype that no weight here has.
    """
    if transposed is None:
        transposed = shards.config().get("model_type") in _TRANSPOSED_MODELS
    tables = set(embeddings)
    root = nn.Module()
    for name, (shape, kind) in shards.shapes.items():
        path, _, leaf = name.rpartition(".")
        if any(not part or part.startswith("_") for part in name.split(".")) or kind not in _FLOATS:
            continue  # no site can be on packed weights or bookkeeping
        weight = (*shards.shapes.get(f"{path}.weight" if path else "weight", ((), ""))[0],)
        module = _at(
            root,
            path,
            weight,
            transposed and path not in tables,
            path in tables,
            (upwards or {}).get(path, 0),
        )
        if module is None or (hasattr(module, leaf) and leaf not in module._parameters):
            raise CheckpointError(
                f"{shards.folder}: {short_repr(name)} can't be a tensor of a module"
            )
        value = (
            shards.read(name)
            if len(shape) < 2
            else torch.empty(shape, dtype=_FLOATS[kind], device="meta")
        )
        module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
        hook = SimpleNamespace(
            weights_map=_Lazy(shards, path + "." if path else ""), execution_device="cpu"
        )
        module.__dict__["_hf_hook"] = hook  # weights are looked for there when a model is offloaded
    return root


def _at(
    root: nn.Module, path: str, weight: tuple[int, ...], transposed: bool, table: bool, upwards: int
) -> nn.Module | None:
    """Return the module at a path, and make it where it is missing. The result is None where a
    tensor stands on the way.
    """
    here = root
    parts = path.split(".") if path else []
    for i, part in enumerate(parts):
        child = here._modules.get(part)
        if child is None:
            if hasattr(here, part):
                return None
            child = (
                _made(weight, transposed, table, upwards) if i == len(parts) - 1 else nn.Module()
            )
            here.add_module(part, child)
        here = child
    return here


def _made(weight: tuple[int, ...], transposed: bool, table: bool, upwards: int) -> nn.Module:
    """Make the layer that a weight of this shape belongs to."""
    if len(weight) == 2:
        if transposed:
            return _Transposed(weight)
        if table:
            # A plain nn.Embedding would draw its values, and drawing on the meta device imports the
            # compiler.
            return nn.Embedding.from_pretrained(torch.empty(weight, device="meta"))
        return nn.Linear(weight[1], weight[0], bias=False, device="meta")
    if len(weight) in (3, 4, 5):
        if upwards and upwards % weight[1] == 0:
            turned: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[
                len(weight) - 3
            ]
            return turned(
                weight[0],
                upwards,
                weight[2:],
                groups=upwards // weight[1],
                bias=False,
                device="meta",
            )
        kinds = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
        return kinds[len(weight)](weight[1], weight[0], weight[2:], bias=False, device="meta")  # type: ignore[arg-type]
    return nn.LayerNorm(weight, bias=False, device="meta") if weight else nn.Module()
