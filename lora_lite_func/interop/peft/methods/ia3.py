"""PEFT's IA3: gates on outputs, and on the inputs of feed-forward modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ....core.adapter import Adapter
from ....core.errors import CheckpointError, UnsupportedError
from ....variants import (
    IA3Config,
    IA3FFConfig,
)
from ...assembly import ModuleEntry, Part
from ...metadata import ConfigReader
from ..codec import Codec, Written

__all__ = ["IA3"]


def read(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """ia3_l: (d_out, 1) on the output, (1, d_in) on the input of feed-forward modules; convolutions
    have (1, channels, 1 ...).
    """
    site, gate = entry.known("IA3 has gates of one side of the layer alone"), held["ia3_l"]
    plain = gate.ndim == 2 and gate.shape[0] != gate.shape[1]
    forward = gate.shape[0] == 1 if plain else _feed_forward(reader, entry.pattern_path)
    if not forward:
        return [Part(IA3Config, {"lora_g": gate.flatten()})]
    gate = gate.flatten()
    if gate.numel() and site.d_in % gate.numel() == 0:
        gate = gate.repeat_interleave(
            site.d_in // gate.numel()
        )  # a channel's gate for each entry of its kernel
    return [Part(IA3FFConfig, {"lora_g": gate})]


def _feed_forward(reader: ConfigReader, path: str) -> bool:
    names = reader.get("feedforward_modules")
    if isinstance(names, str):
        return reader.matches("feedforward_modules", rf"(?:{names})\Z", names, path)
    return any(path.endswith(name) for name in reader.names("feedforward_modules"))


def write(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    made = Written({"feedforward_modules": []}, {})
    for a in adapters:
        forward = isinstance(a.config, IA3FFConfig)
        for path, held in a.items():
            gate, site = held["lora_g"], a.sites[path]
            if site.kind == "conv":
                made.tensors[path] = {
                    "ia3_l": _channels(path, gate, modules.get(path))
                    if forward
                    else _wide(path, gate, modules)
                }
            elif site.kind == "linear":
                made.tensors[path] = {"ia3_l": gate[None] if forward else gate[:, None]}
            else:
                raise UnsupportedError(
                    f"to_peft: {path!r}: PEFT's IA3 has no such gate on a {site.kind}"
                )
            if forward:
                made.fields["feedforward_modules"].append(path)
    return made


def _wide(path: str, t: Tensor, modules: Mapping[str, Any]) -> Tensor:
    """A number per channel of a convolution as (1, channels, 1 ...)."""
    if path not in modules:
        raise CheckpointError(
            f"to_peft: {path!r}: PEFT's tensors of a convolution have its dimensions; give the "
            f"base model"
        )
    return t.view(1, -1, *(1 for _ in modules[path].weight.shape[2:]))


def _channels(path: str, gate: Tensor, module: Any) -> Tensor:
    """A gate per entry of a kernel as PEFT's one per input channel, (1, c, 1 ...)."""
    by_channel = (
        gate.unflatten(0, (module.weight.shape[1], -1)) if module is not None else gate[:, None]
    )
    if module is None or module.groups != 1 or not (by_channel == by_channel[:, :1]).all():
        raise UnsupportedError(
            f"to_peft: {path!r}: PEFT's IA3 has one gate per input channel, here each entry of "
            f"the kernel has its own"
        )
    return _wide(path, by_channel[:, 0], {path: module})


IA3 = Codec(
    peft_type="IA3",
    configs=(IA3Config, IA3FFConfig),
    suffixes=("ia3_l",),
    understood="feedforward_modules init_ia3_weights",
    read=read,
    write=write,
    kinds="linear conv2d conv3d",
)
