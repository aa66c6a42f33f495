"""PEFT's OFT: block-diagonal rotations of the inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ....core.adapter import Adapter
from ....core.errors import CheckpointError, UnsupportedError, short_repr
from ....core.site import Site
from ....variants import OFTConfig
from ....variants.oft import project
from ...assembly import ModuleEntry, Part
from ...metadata import ConfigReader
from ..codec import Codec, Written
from .config_fields import of_config

__all__ = ["OFT"]


def read(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """Read oft_R.weight (n, b (b - 1) / 2), the upper triangles of n blocks, or an embedding's
    oft_embedding_R.weight. With PEFT's exact Cayley transform the blocks turn the other way than
    ours, with its series the same way. COFT's bound is put on the blocks once.

    Raises:
        CheckpointError: a convolution's patches overlap, the numbers don't fit the layer, or the
            series has another length.
        ModelNeededError: no model was given.
    """
    site = entry.known("OFT acts on inputs alone")
    table = "oft_embedding_R.weight" in held
    q = held["oft_embedding_R.weight" if table else "oft_R.weight"]
    if _overlaps(entry.module):
        raise CheckpointError(
            f"{short_repr(entry.path)}: PEFT's OFT adds up the patches of a convolution's input, "
            f"which isn't a rotation of them"
        )
    block = int((1 + (1 + 8 * q.shape[-1]) ** 0.5) / 2)
    share, series = reader.flag("block_share"), reader.flag("use_cayley_neumann", True)
    width = site.d_out if table else site.d_in
    if block * (block - 1) // 2 != q.shape[-1] or width % block:
        raise CheckpointError(
            f"{short_repr(entry.path)}: {q.shape[-1]} numbers aren't the upper triangle of a "
            f"block that divides {width}"
        )
    if series and reader.whole("num_cayley_neumann_terms", 5) != 5:
        raise reader.refuse("num_cayley_neumann_terms", "5, the one length of the series here")
    fields: dict[str, Any] = {
        "block_size": block,
        "cayley": "neumann" if series else "exact",
        "block_share": share,
    }
    if reader.flag("coft"):
        # PEFT shortens the stored blocks in each call, which changes nothing the second time.
        fields["coft_eps"] = reader.number("eps", OFTConfig.coft_eps)
        q = project(OFTConfig(**fields), {"lora_oft_q": q})["lora_oft_q"]
    if table:
        # A table's rows turn the other way than a layer's inputs.
        entry.site, series = _as_rows(site), not series
        entry.path = entry.site.path
    return [Part(OFTConfig, {"lora_oft_q": q if series else -q}, fields)]


def _as_rows(site: Site) -> Site:
    """Return the site of an embedding's table (ids, features) as a stored matrix, whose d_in is the
    features.
    """
    return dataclasses.replace(
        site,
        path=f"{site.path}.weight",
        d_in=site.d_out,
        d_out=site.d_in,
        kind="parameter",
        transposed=False,
    )


def _overlaps(module: Any) -> bool:
    """Tell whether a module is a convolution whose kernel sees more than one place. PEFT rotates
    its patches and folds them back, where they add up.
    """
    size = getattr(module, "kernel_size", ())
    return isinstance(size, tuple) and any(n != 1 for n in size)


def write(adapters: Sequence[Adapter], modules: Mapping[str, Any]) -> Written:
    """Write oft_R.weight (n, b (b - 1) / 2). The config says one block size for all sites, or one
    number of blocks.

    Raises:
        UnsupportedError: a convolution's patches overlap, the adapters differ in a setting, or
            neither number fits all sites.
    """
    wide = next((path for a in adapters for path in a if _overlaps(modules.get(path))), None)
    if wide is not None:
        raise UnsupportedError(
            f"to_peft: {wide!r}: PEFT's OFT of a convolution isn't a rotation of its input; "
            f"merge it"
        )
    said = of_config(adapters, "cayley", "block_share", method="OFT")
    sign = 1.0 if said["cayley"] == "neumann" else -1.0
    blocks = {path: (a.sites[path].d_in, a.config.block_size) for a in adapters for path in a}  # type: ignore[attr-defined]
    tensors = {
        path: {"oft_R.weight": sign * held["lora_oft_q"]}
        for a in adapters
        for path, held in a.items()
    }
    fields = {
        "use_cayley_neumann": sign > 0,
        "block_share": said["block_share"],
        "r": 0,
        "oft_block_size": 0,
        "coft": False,
    }
    sizes, counts = {b for _, b in blocks.values()}, {d // b for d, b in blocks.values()}
    for size in range(max(sizes), 0, -1):  # it may be none of theirs: 7 is 6 of 24 and 8 of 16
        if all(_adjusted(d, size) == b for d, b in blocks.values()):
            return Written(fields | {"oft_block_size": size}, tensors)
    if len(counts) == 1:
        return Written(fields | {"r": counts.pop()}, tensors)
    raise UnsupportedError(
        f"to_peft: one OFT file has one block size or one count, these sites have "
        f"{sorted(sizes)}; write a folder for each"
    )


def _adjusted(width: int, size: int) -> int:
    """Return the block size that PEFT takes where `size` doesn't divide `width`: the nearest one
    that does, and of two equally near ones the smaller.
    """
    if size >= width:
        return width
    above = next(b for b in range(size, width + 1) if width % b == 0)
    below = next(b for b in range(size, 0, -1) if width % b == 0)
    return below if size - below <= above - size else above


OFT = Codec(
    peft_type="OFT",
    configs=(OFTConfig,),
    suffixes=("oft_R.weight", "oft_embedding_R.weight"),
    understood="r oft_block_size block_share use_cayley_neumann num_cayley_neumann_terms",
    read=read,
    write=write,
    ignored="eps module_dropout coft",
    kinds="linear conv2d",
    biased="oft_only",
)
