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
from ...whole_change import whole_change
from ..codec import Codec, Written

__all__ = ["IA3"]


def read(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """Read ia3_l, which is (d_out, 1) for a gate on the output and (1, d_in) for one on the input
    of a feed-forward module. A convolution's gate is (1, channels, 1, ...); one of the inputs of a
    convolution in groups changes its weight by more than a gate does.

    Raises:
        ModelNeededError: no model was given.
    """
    site, gate = entry.known("IA3 has gates of one side of the layer alone"), held["ia3_l"]
    plain = gate.ndim == 2 and gate.shape[0] != gate.shape[1]
    forward = gate.shape[0] == 1 if plain else _feed_forward(reader, entry.pattern_path)
    if not forward:
        return [Part(IA3Config, {"lora_g": gate.flatten()})]
    gate, groups = gate.flatten(), getattr(entry.module, "groups", 1)
    if groups != 1 and gate.numel() == entry.module.in_channels:
        # The same entry of a kernel meets another channel in each group.
        W = entry.weight("IA3 of a convolution in groups")
        factors = (gate - 1.0).to(W).view(groups, -1).repeat_interleave(len(W) // groups, 0)
        change = W.unflatten(1, (factors.shape[1], -1)) * factors[:, :, None]
        return [whole_change(change.flatten(1), entry)]
    if gate.numel() and site.d_in % gate.numel() == 0:
        # PEFT has one gate for a channel, which holds for each entry of its kernel.
        gate = gate.repeat_interleave(site.d_in // gate.numel())
    return [Part(IA3FFConfig, {"lora_g": gate})]


def _feed_forward(reader: ConfigReader, path: str) -> bool:
    """Tell whether the config counts the module at this path among the feed-forward ones."""
    names = reader.get("feedforward_modules")
    if isinstance(names, str):
        return reader.matches("feedforward_modules", rf"(?:{names})\Z", names, path)
    return any(path.endswith(name) for name in reader.names("feedforward_modules"))


def write(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    """Write ia3_l as (d_out, 1) for a gate on the output and as (1, d_in) for one on the input,
    whose module the config then lists as feed-forward. A convolution's gate is (1, channels, 1,
    ...).

    Raises:
        CheckpointError: a convolution's shape needs the base model, and none was given.
        UnsupportedError: PEFT has no such gate on this kind of layer, or the gates of a channel's
            entries differ.
    """
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
    """Return one number per channel of a convolution in the shape (1, channels, 1, ...).

    Raises:
        CheckpointError: no model was given.
    """
    if path not in modules:
        raise CheckpointError(
            f"to_peft: {path!r}: PEFT's tensors of a convolution have its dimensions; give the "
            f"base model"
        )
    return t.view(1, -1, *(1 for _ in modules[path].weight.shape[2:]))


def _channels(path: str, gate: Tensor, module: Any) -> Tensor:
    """Turn a gate for each entry of a kernel into PEFT's (1, c, 1, ...), one for each input
    channel.

    Raises:
        UnsupportedError: the gates of a channel's entries differ, or can't be told by channel.
    """
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
    transposed=True,
    convolves=False,
)
