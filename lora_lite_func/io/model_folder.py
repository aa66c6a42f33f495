"""A model's folder as safetensors shards, and a meta model made of their headers alone."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from ..core.errors import CheckpointError, short_repr
from .files import read_json

__all__ = ["INDEX", "Shards", "meta_model"]

INDEX = "model.safetensors.index.json"
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_TRANSPOSED_MODELS = (
    "gpt2",
    "openai-gpt",
    "imagegpt",
    "decision_transformer",
)  # model types whose linear layers are Conv1D


class Shards(Mapping[str, str]):
    """{tensor name: file name} of a model's folder.

    Attributes:
        folder: where.
        files: the shards' names, in order.
        shapes: {tensor name: (shape, dtype as the file says it)}.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(os.fsdecode(folder))
        try:
            names = sorted(entry.name for entry in self.folder.iterdir() if entry.is_file())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.folder}: not a readable folder: {error}") from None
        self.files = _files(self.folder, names)
        self.home: dict[str, str] = {}
        self.shapes: dict[str, tuple[tuple[int, ...], str]] = {}
        self.metadata: dict[str, dict[str, str]] = {}
        for file in self.files:
            with self.open(file) as opened:
                self.metadata[file] = dict(opened.metadata() or {})
                for name in opened.keys():  # noqa: SIM118
                    if name in self.home:
                        raise CheckpointError(
                            f"{self.folder}: {short_repr(name)} is in {self.home[name]} and in "
                            f"{file}"
                        )
                    piece = opened.get_slice(name)
                    self.home[name], self.shapes[name] = (
                        file,
                        (tuple(piece.get_shape()), str(piece.get_dtype())),
                    )

        self._check_index(names)

    def _check_index(self, names: list[str]) -> None:
        """Refuse a folder whose index names tensors that its files haven't."""
        if INDEX in names:
            placed = read_json(self.folder / INDEX)["weight_map"]
            lost = [name for name in placed if name not in self.home]
            if lost:
                raise CheckpointError(
                    f"{self.folder / INDEX}: {short_repr(lost[0])} isn't in {placed[lost[0]]}"
                )

    def __getitem__(self, name: str) -> str:
        return self.home[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.home)

    def __len__(self) -> int:
        return len(self.home)

    def open(self, file: str) -> Any:
        """A shard, opened for reading.

        Raises:
            CheckpointError: it isn't readable.
        """
        try:
            return safetensors.safe_open(str(self.folder / file), framework="pt")
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise CheckpointError(
                f"{self.folder / file}: not a readable safetensors file: {error}"
            ) from error

    def read(self, name: str) -> Tensor:
        """One tensor."""
        with self.open(self.home[name]) as opened:
            tensor: Tensor = opened.get_tensor(name)
            return tensor

    def config(self) -> dict[str, Any]:
        """What its config.json says; nothing if there is none.

        Raises:
            CheckpointError: it isn't readable.
        """
        if not (self.folder / "config.json").is_file():
            return {}
        says = read_json(self.folder / "config.json")
        return says if isinstance(says, dict) else {}


def _files(folder: Path, names: list[str]) -> list[str]:
    """The shards: those that the index names, which must be files of this folder; else all there
    are, adapters aside.
    """
    if INDEX in names:
        index = read_json(folder / INDEX)
        placed = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(placed, dict) or not placed:
            raise CheckpointError(f"{folder / INDEX}: expected a weight_map of tensors and files")
        for file in placed.values():
            if (
                not isinstance(file, str)
                or not re.fullmatch(r"[\w.-]+\.safetensors", file)
                or file not in names
            ):
                raise CheckpointError(
                    f"{folder / INDEX}: {short_repr(file)} isn't a safetensors file in this folder"
                )
        return list(dict.fromkeys(placed.values()))
    found = [n for n in names if n.endswith(".safetensors") and not n.startswith(("adapter_", "."))]
    if not found:
        raise CheckpointError(f"{folder}: expected a model's safetensors files, found none")
    return found


# ----------------------------------------------------------------------------------------- skeleton
class _Lazy(Mapping[str, Tensor]):
    """Tensors of a module, read when asked for."""

    def __init__(self, shards: Shards, prefix: str) -> None:
        self.shards, self.prefix = shards, prefix

    def __getitem__(self, name: str) -> Tensor:
        return self.shards.read(self.prefix + name)

    def __iter__(self) -> Iterator[str]:
        return (n.removeprefix(self.prefix) for n in self.shards if n.startswith(self.prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class _Transposed(nn.Module):
    """A linear layer stored (in, out), as transformers' Conv1D."""

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
    """A module tree with the folder's weights on the meta device (biases and gains for real), that
    reads a weight when it is asked for.

    Args:
        shards: the folder.
        transposed: linear layers are stored (in, out); by default what the model's type says.
        embeddings: paths of matrices that are tables.
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
            continue  # packed weights and bookkeeping: no site can be there
        weight = (*shards.shapes.get(f"{path}.weight" if path else "weight", ((), ""))[0],)
        home = _at(
            root,
            path,
            weight,
            transposed and path not in tables,
            path in tables,
            (upwards or {}).get(path, 0),
        )
        if home is None or (hasattr(home, leaf) and leaf not in home._parameters):
            raise CheckpointError(
                f"{shards.folder}: {short_repr(name)} can't be a tensor of a module"
            )
        value = (
            shards.read(name)
            if len(shape) < 2
            else torch.empty(shape, dtype=_FLOATS[kind], device="meta")
        )
        home.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
        hook = SimpleNamespace(
            weights_map=_Lazy(shards, path + "." if path else ""), execution_device="cpu"
        )
        home.__dict__["_hf_hook"] = hook  # where an offloaded weight is looked for
    return root


def _at(
    root: nn.Module, path: str, weight: tuple[int, ...], transposed: bool, table: bool, upwards: int
) -> nn.Module | None:
    """The module at a path, made on the way; None where a tensor is."""
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
    """The layer that a weight of this shape belongs to."""
    if len(weight) == 2:
        if transposed:
            return _Transposed(weight)
        if table:
            return nn.Embedding.from_pretrained(
                torch.empty(weight, device="meta")
            )  # drawing there imports the compiler
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
