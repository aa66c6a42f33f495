"""Files of LyCORIS' methods that multiply the weight, and keys of other tools: merged weights are
those of the formulas, written out here.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import close, normal
from torch import Tensor, nn

import lora_lite_func as ll


def noise(*shape: int, seed: int = 1) -> Tensor:
    return normal(*shape, seed=seed, dtype=torch.float32)


class Modulated(nn.Module):
    """A block that holds its modulation itself, as Wan's do."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation, self.q = nn.Parameter(noise(1, 6, 8)), nn.Linear(8, 8)


def little() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "up": nn.Linear(8, 6),
            "bare": nn.Linear(8, 6, bias=False),
            "conv": nn.Conv2d(4, 6, 3),
            "blocks": nn.ModuleList([Modulated()]),
        }
    )


def weight(model: nn.Module, path: str) -> Tensor:
    return model.get_parameter(f"{path}.weight").detach()


def merged(model: nn.Module, path: str, **tensors: Tensor) -> Tensor:
    """The weight with the tensors of one module of a file merged in."""
    file = {f"lora_unet_{path}.{name.replace('__', '.')}": t for name, t in tensors.items()}
    return ll.merge(model, ll.from_diffusion(file, model))[f"{path}.weight"]


@pytest.mark.parametrize("path", ["up", "bare", "conv"])
def test_gates_of_outputs_and_inputs(path: str) -> None:
    model = little()
    W, ones = weight(model, path), (1,) * (weight(model, path).ndim - 2)
    g, h = noise(6, seed=2), noise(W.shape[1], seed=3)
    out, into = (torch.tensor(n) for n in (0, 1))
    close(merged(model, path, weight=g, on_input=out), W * (1 + g).view(-1, 1, *ones), 1e-5)
    close(merged(model, path, weight=h, on_input=into), W * (1 + h).view(1, -1, *ones), 1e-5)
    wide = h.view(1, -1, *ones)
    close(merged(model, path, weight=wide, on_input=into), W * (1 + wide), 1e-5)
    file = {f"lora_unet_{path}.weight": g, f"lora_unet_{path}.on_input": out}
    assert list(ll.merge(model, ll.from_diffusion(file, model))) == [f"{path}.weight"]


def test_glora_of_linear_layers_and_convolutions() -> None:
    model = little()
    W, alpha = weight(model, "up"), torch.tensor(1.0)
    a1, a2, b1, b2 = noise(8, 2), noise(2, 8, seed=2), noise(6, 2, seed=3), noise(2, 8, seed=4)
    factors = {"a1__weight": a1, "a2__weight": a2, "b1__weight": b1, "b2__weight": b2}
    close(merged(model, "up", alpha=alpha, **factors), W + (W @ a1 @ a2 + b1 @ b2) / 2, 1e-5)
    W = weight(model, "conv")
    a1, a2, b2 = noise(4, 2, 1, 1), noise(2, 4, 1, 1, seed=2), noise(2, 4, 3, 3, seed=4)
    turned = torch.einsum("ockl,cr,ri->oikl", W, a1.flatten(1), a2.flatten(1))
    factors = {"a1__weight": a1, "a2__weight": a2, "b1__weight": b1[..., None, None]}
    expected = W + turned + (b1 @ b2.flatten(1)).view_as(W)
    close(merged(model, "conv", b2__weight=b2, **factors), expected, 1e-5)


def rotations(blocks: Tensor, bound: float = 0.0) -> Tensor:
    """(I + Q) (I - Q)^-1 of blocks (..., b, b), with |Q| at most `bound`."""
    Q = blocks - blocks.mT
    if bound and Q.norm() > bound:
        Q = Q * (bound / Q.norm())
    one = torch.eye(blocks.shape[-1])
    return (one + Q) @ torch.linalg.inv(one - Q)


@pytest.mark.parametrize("path", ["up", "conv"])
def test_rotations_in_blocks(path: str) -> None:
    model, blocks, scale = little(), noise(3, 2, 2), noise(6, 1, seed=4).abs() + 0.5
    W, none = weight(model, path), torch.tensor(0.0)

    def turned(R: Tensor) -> Tensor:
        return (R.mT @ W.reshape(3, 2, -1)).reshape(W.shape)

    close(merged(model, path, oft_blocks=blocks, alpha=none), turned(rotations(blocks)), 1e-5)
    bound = torch.tensor(0.05)
    expected = turned(rotations(blocks, 6 * 0.05))
    close(merged(model, path, oft_blocks=blocks, alpha=bound), expected, 1e-5)
    rescale = scale.view(-1, *(1,) * (W.ndim - 1))
    expected = rescale * turned(rotations(blocks))
    close(merged(model, path, oft_blocks=blocks, alpha=none, rescale=rescale), expected, 1e-5)


def test_rotations_in_stages() -> None:
    """BOFT's first stage pairs neighbours, the second those that are two apart."""
    model = nn.ModuleDict({"up": nn.Linear(3, 8)})
    W, blocks = weight(model, "up"), noise(2, 4, 2, 2)
    R = rotations(blocks)
    expected = W.clone()
    for stage, k in enumerate((1, 2)):
        rows = expected.clone()
        pairs = [(i, i + k) for i in range(8) if i // k % 2 == 0]
        for block, (i, j) in enumerate(pairs):
            expected[[i, j]] = R[stage, block] @ rows[[i, j]]
    close(merged(model, "up", oft_blocks=blocks), expected, 1e-5)


def test_magnitudes_of_inputs() -> None:
    """LyCORIS' wd_on_out=False, over any update: of a convolution one for each channel."""
    model = little()
    for path, down, up in (
        ("up", noise(2, 8), noise(6, 2, seed=2)),
        ("conv", noise(2, 4, 3, 3), noise(6, 2, 1, 1, seed=2)),
    ):
        W = weight(model, path)
        V = W + (up.flatten(1) @ down.flatten(1)).view_as(W)
        ones = (1,) * (W.ndim - 2)
        norm = V.transpose(0, 1).flatten(1).norm(dim=1).view(1, -1, *ones)
        m = noise(1, W.shape[1], *ones, seed=3).abs() + 0.5
        factors = {"lora_down__weight": down, "lora_up__weight": up}
        close(merged(model, path, dora_scale=m, **factors), m * V / norm, 1e-5)


QKV = "lora_unet_double_blocks_0_img_attn_qkv"
REFUSED: dict[str, tuple[str, dict[str, Tensor]]] = {
    "a rotation of several layers": (
        "OFT mixes the rows of a layer that is several",
        {f"{QKV}.oft_blocks": noise(12, 2, 2)},
    ),
    "magnitudes of several layers' inputs": (
        "scales the inputs .* of a layer that is several",
        {
            f"{QKV}.lora_down.weight": noise(2, 8),
            f"{QKV}.lora_up.weight": noise(24, 2),
            f"{QKV}.dora_scale": noise(1, 8),
        },
    ),
    "blocks of another size": (
        "oft_blocks: expected 16 entries",
        {"lora_unet_transformer_blocks_0_attn_to_q.oft_blocks": noise(3, 2, 2)},
    ),
    "blocks that aren't square": (
        r"expected blocks \(n, b, b\)",
        {"lora_unet_transformer_blocks_0_attn_to_q.oft_blocks": noise(4, 2, 3)},
    ),
    "a gate of another size": (
        "weight: expected 8 entries",
        {
            "lora_unet_transformer_blocks_0_attn_to_q.weight": noise(5),
            "lora_unet_transformer_blocks_0_attn_to_q.on_input": torch.tensor(0),
        },
    ),
    "a gate that is missing": (
        "lacks gate",
        {"lora_unet_transformer_blocks_0_attn_to_q.on_input": torch.tensor(0)},
    ),
    "a weight alone": (
        "unexpected tensor",
        {"lora_unet_transformer_blocks_0_attn_to_q.weight": noise(8)},
    ),
    "magnitudes beside a rotation": (
        "has magnitudes .* beside oft",
        {
            "lora_unet_transformer_blocks_0_attn_to_q.oft_blocks": noise(4, 2, 2),
            "lora_unet_transformer_blocks_0_attn_to_q.dora_scale": noise(8, 1),
        },
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_update_is_refused(name: str) -> None:
    message, file = REFUSED[name]
    attention = {f"to_{n}": nn.Linear(8, 8) for n in "qkv"}
    block = nn.ModuleDict({"attn": nn.ModuleDict(attention)})
    model = nn.ModuleDict({"transformer_blocks": nn.ModuleList([block])})
    with pytest.raises(ll.LoraLiteError, match=message):
        ll.from_diffusion(file, model)


KEYS: dict[str, Callable[[str], str]] = {
    "an underscore at the end (SimpleTuner)": lambda flat: f"lora_unet_{flat}_",
    "HunyuanVideo's trainer": lambda flat: f"Hunyuan_video_I2V_lora_{flat}",
    "OneTrainer": lambda flat: f"lora_transformer_{flat}",
}


@pytest.mark.parametrize("tool", KEYS)
def test_names_that_tools_give(tool: str) -> None:
    model, down, up = little(), noise(2, 8), noise(8, 2, seed=2)
    name = KEYS[tool]("blocks_0_q")
    file = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    params = ll.from_diffusion(file, model, component="transformer")
    W = weight(model, "blocks.0.q")
    close(ll.merge(model, params)["blocks.0.q.weight"], W + up @ down, 1e-5)


def test_the_change_of_a_modulation() -> None:
    """Wan's distilled files say diff_m of the block that holds it."""
    model, change = little(), noise(1, 6, 8, seed=5)
    params = ll.from_diffusion({"diffusion_model.blocks.0.diff_m": change}, model)
    expected = model.get_parameter("blocks.0.modulation").detach() + change
    close(ll.merge(model, params)["blocks.0.modulation"], expected, 1e-6)


def test_a_prefix_that_is_unknown_is_told_how_to_be_taken_off() -> None:
    model, down, up = little(), noise(2, 8), noise(6, 2)
    file = {"mine.up.lora_down.weight": down, "mine.up.lora_up.weight": up}
    with pytest.raises(ll.CheckpointError, match="rename= says how"):
        ll.from_diffusion(file, model)
    params = ll.from_diffusion(file, model, rename=lambda name: name.removeprefix("mine."))
    close(ll.merge(model, params)["up.weight"], weight(model, "up") + up @ down, 1e-5)


@pytest.mark.parametrize("groups", [2, 4])
def test_a_pair_of_a_convolution_in_groups(groups: int) -> None:
    """LyCORIS' makes a weight of this convolution: its kernels see the inputs of one group."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"conv": nn.Conv2d(4, 8, 3, groups=groups)})
    down, up = noise(2, 4 // groups, 3, 3), noise(8, 2, 1, 1, seed=2)
    change = torch.einsum("or,rikl->oikl", up.flatten(1), down) / 2
    file = {"lora_down__weight": down, "lora_up__weight": up, "alpha": torch.tensor(1.0)}
    close(merged(model, "conv", **file), weight(model, "conv") + change, 1e-5)
