"""PEFT's OSF: the minor singular directions of the weight, trained. It is read alone."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ....variants import MiLoRAConfig
from ...assembly import ModuleEntry, Part
from ...metadata import ConfigReader
from ..codec import Codec
from .lora_starts import first_leaves

__all__ = ["OSF"]

_U, _S, _V = (f"osf_svd_params.{name}_low" for name in "USV")


def read(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """Read U_low (d_out, k), S_low (k,) and V_low (k, d_in), which replace the k smallest singular
    triplets of the weight. PEFT's optimizers leave the free subspace (its hooks project gradients,
    not steps), so what is read is a MiLoRA, which has no such bounds.

    Raises:
        ModelNeededError: no model was given.
    """
    k = held[_S].shape[0]
    start = first_leaves(entry, MiLoRAConfig(r=k, alpha=float(k)), "OSF")
    frozen = {name: start[name] for name in ("lora_A0", "lora_B0")}
    leaves = {"lora_A": held[_S][:, None] * held[_V], "lora_B": held[_U], **frozen}
    return [Part(MiLoRAConfig, leaves, {}, k, float(k))]


OSF = Codec(
    peft_type="OSF",
    configs=(),
    suffixes=(_U, _S, _V),
    understood="effective_rank rank_pattern target_svd_config",
    read=read,
)
