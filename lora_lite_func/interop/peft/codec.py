"""What it takes to read and write one of PEFT's methods: a record of pure functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ...core.adapter import Adapter
from ...core.config import AdapterConfig
from ...core.errors import UnsupportedError
from ..assembly import ModuleEntry, Part
from ..metadata import ConfigReader

__all__ = ["Codec", "Written"]


@dataclass
class Written:
    """An adapter as PEFT's files have it.

    Attributes:
        fields: the fields of adapter_config.json.
        tensors: {path: {suffix: tensor}}.
        shared: {name: tensor} of the whole model.
        ranks: {path: r}, where the method has ranks.
        alphas: {path: alpha}, where the method has them.
    """

    fields: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]
    shared: dict[str, Tensor] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)


def _read_alone(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    """Refuse to write.

    Raises:
        UnsupportedError: always.
    """
    names = ", ".join(a.layout.variant.name for a in adapters)
    raise UnsupportedError(f"to_peft: PEFT's files of {names} are read alone; merge it (ll.merge)")


@dataclass(frozen=True, kw_only=True)
class Codec:
    """One of PEFT's methods.

    Attributes:
        peft_type: its name in a config.
        configs: our methods that a file of this type is for.
        suffixes: what a module's keys end with.
        understood: the fields of the config that `read` honours.
        read: (reader, entry, {suffix: tensor}) -> parts.
        write: (adapters, {path: module}) -> Written. The adapters' configs are among `configs`, or
            `is_pair` for LoRA's, and their sites differ. Left out where files are read alone.
        sizes: (path, {suffix: tensor}) -> (d_in, d_out), where the tensors alone tell; None where
            they don't.
        shared: the names of tensors that stand beside the modules; one that ends with a dot is the
            beginning of several.
        rank, alpha: the config's fields with the numbers that `rank_pattern` and `alpha_pattern`
            override.
        ignored: fields that have no part in a loaded adapter, because they are of its start or of
            training alone.
        unread: fields that outputs depend on and that nothing here corresponds to.
        leftovers: whole parts of keys that mark the state of a training, which may be left in the
            file.
        kinds: the kinds of layer that PEFT adapts with it.
        transposed: whether PEFT adapts linear layers that are stored as (d_in, d_out) with it.
        convolves: whether PEFT runs a convolution of its own with it, which pads with zeros.
        undilated: whether that convolution leaves out the layer's dilation.
        biased: what its `bias` field says where the adapted layers' own biases are learned; ""
            where it has no such field.
        bias_gain: {suffix: tensor} of a layer -> what it multiplies the layer's bias by, which a
            learned bias is multiplied by too; None where the bias stays as it is.
        holds: tells which adapters of `configs` a file can hold as they are; None for all.
        structure: (adapters, Written, {path: module}): writes into it what PEFT knows beyond the
            tensors that other tools read too; None where there is no such thing.
        takes_shifts: (adapters, {path: shift}, {path: module}) -> whether `write` takes these
            learned shifts of outputs too; None where it takes none.
        token_prefix: what stands in front of `trainable_tokens_delta` in the keys of replaced rows;
            None where PEFT replaces no rows beside this method.
        keeps_modules: whether PEFT keeps modules trained whole beside it.
        stacks_experts: whether pairs of single experts are read where a model stacks them.
        prunes: whether a targeted module may have no tensors.
        unsaid: why a file of nothing but shared tensors can't be read, and the way out; "" where
            there is no such file.
        rewrites_base: reader -> whether PEFT changes the base's weights as it loads the file.
        of_whole_model: whether its tensors are of a whole model, under keys that name no module;
            `suffixes` are the keys then.
        names_ending: whether its target_modules is the last name of modules, and not a pattern.
    """

    peft_type: str
    configs: tuple[type[AdapterConfig], ...]
    suffixes: tuple[str, ...]
    understood: str
    read: Callable[[ConfigReader, ModuleEntry, Mapping[str, Tensor]], Sequence[Part]]
    write: Callable[[Sequence[Adapter], Mapping[str, Any]], Written] = _read_alone
    sizes: Callable[[str, Mapping[str, Tensor]], tuple[int, int]] | None = None
    shared: tuple[str, ...] = ()
    rank: str = "r"
    alpha: str = "lora_alpha"
    ignored: str = ""
    unread: str = ""
    leftovers: tuple[str, ...] = ()
    kinds: str = "linear"
    transposed: bool = False
    convolves: bool = True
    undilated: bool = False
    biased: str = ""
    bias_gain: Callable[[Mapping[str, Tensor]], Tensor] | None = None
    holds: Callable[[Adapter], bool] | None = None
    structure: Callable[[Sequence[Adapter], Written, Mapping[str, Any]], None] | None = None
    takes_shifts: (
        Callable[[Sequence[Adapter], Mapping[str, Tensor], Mapping[str, Any]], bool] | None
    ) = None
    token_prefix: str | None = None
    keeps_modules: bool = True
    stacks_experts: bool = False
    prunes: bool = False
    unsaid: str = ""
    rewrites_base: Callable[[ConfigReader], bool] | None = None
    of_whole_model: bool = False
    names_ending: bool = False

    def is_for(self, adapter: Adapter) -> bool:
        """Tell whether an adapter's natural form is a file of this type."""
        return isinstance(adapter.config, self.configs) and (
            self.holds is None or self.holds(adapter)
        )
