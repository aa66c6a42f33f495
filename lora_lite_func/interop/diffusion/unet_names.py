"""The names of Stable Diffusion's own UNet, which kohya's scripts use for SDXL, for the modules of
diffusers' UNet. input_blocks, middle_block and output_blocks count what diffusers nests.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

__all__ = ["unet_names"]

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_TOP = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def unet_names(paths: Iterable[str]) -> dict[str, str]:
    """Return {original name: path} of a UNet's modules, or {} for another model.

    Args:
        paths: the paths of its modules with a weight.
    """
    known = list(paths)
    blocks = _members(known)
    if not {"down_blocks", "mid_block", "up_blocks"} <= {path.partition(".")[0] for path in known}:
        return {}
    parents = dict(_block_parents(blocks))
    found = {name: path for name, path in _TOP.items() if path in set(known)}
    for path in known:
        parent = next((h for h in _above(path) if h in parents), None)
        if parent is not None:
            inner = path[len(parent) + 1 :]
            original = next((n for n, ours in _RESNET.items() if ours == inner), inner)
            found[f"{parents[parent]}.{original}" if original else parents[parent]] = path
    return found


def _above(path: str) -> Iterator[str]:
    """Yield the path and the modules that hold it, innermost first."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def _members(paths: Iterable[str]) -> Mapping[str, list[int]]:
    """Return {list of modules: its numbers, in order}, such as "down_blocks.1.resnets": [0, 1]."""
    found: dict[str, set[int]] = {}
    for path in paths:
        for above in _above(path):
            parent, _, number = above.rpartition(".")
            if number.isdecimal():
                found.setdefault(parent, set()).add(int(number))
    return {parent: sorted(numbers) for parent, numbers in found.items()}


def _block_parents(blocks: Mapping[str, list[int]]) -> Iterator[tuple[str, str]]:
    """Yield (path of a resnet, an attention or a sampler, its original name)."""
    yield from (
        ("mid_block.resnets.0", "middle_block.0"),
        ("mid_block.attentions.0", "middle_block.1"),
        ("mid_block.resnets.1", "middle_block.2"),
    )
    # input_blocks.0 is the first convolution.
    count = 1
    for i in blocks.get("down_blocks", ()):
        for j in blocks.get(f"down_blocks.{i}.resnets", ()):
            yield f"down_blocks.{i}.resnets.{j}", f"input_blocks.{count}.0"
            yield f"down_blocks.{i}.attentions.{j}", f"input_blocks.{count}.1"
            count += 1
        if f"down_blocks.{i}.downsamplers" in blocks:
            yield f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{count}.0.op"
            count += 1
    count = 0
    for i in blocks.get("up_blocks", ()):
        attends = f"up_blocks.{i}.attentions" in blocks
        for j in blocks.get(f"up_blocks.{i}.resnets", ()):
            yield f"up_blocks.{i}.resnets.{j}", f"output_blocks.{count}.0"
            yield f"up_blocks.{i}.attentions.{j}", f"output_blocks.{count}.1"
            count += 1
        sampler = f"output_blocks.{count - 1}.{2 if attends else 1}.conv"
        yield f"up_blocks.{i}.upsamplers.0.conv", sampler
