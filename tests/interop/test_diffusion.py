"""diffusers' and kohya's files, made here by hand: the merged weights are their formulas'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers import close
from torch import Tensor, nn

import lora_lite_func as ll


def unet() -> nn.Module:
    """A little of a UNet: names with underscores and numbers in them, a convolution."""
    torch.manual_seed(0)
    attention = nn.ModuleDict({"to_q": nn.Linear(8, 8), "to_out": nn.ModuleList([nn.Linear(8, 8)])})
    block = nn.ModuleDict({"attn1": attention, "conv_in": nn.Conv2d(4, 8, 3)})
    return nn.ModuleDict({"down_blocks": nn.ModuleList([block])})


Q, OUT, CONV = "down_blocks.0.attn1.to_q", "down_blocks.0.attn1.to_out.0", "down_blocks.0.conv_in"


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def delta(model: nn.Module, params: Any, path: str) -> Tensor:
    """W' - W."""
    return (
        ll.merge(model, params)[f"{path}.weight"] - model.get_parameter(f"{path}.weight").detach()
    )


def low_rank(style: str) -> dict[str, Tensor]:
    """The same factors in each style."""
    down, up = noise(2, 8), noise(8, 2, seed=2)
    if style == "kohya":
        flat = f"lora_unet_{Q.replace('.', '_')}"
        return {
            f"{flat}.lora_down.weight": down,
            f"{flat}.lora_up.weight": up,
            f"{flat}.alpha": torch.tensor(1.0),
        }
    if style == "diffusers":
        return {
            f"unet.{Q}.lora_A.weight": down,
            f"unet.{Q}.lora_B.weight": up,
            f"unet.{Q}.alpha": torch.tensor(1.0),
        }
    if style == "older":
        return {
            f"unet.{Q}.lora.down.weight": down,
            f"unet.{Q}.lora.up.weight": up,
            f"unet.{Q}.lora.alpha": torch.tensor(1.0),
        }
    processor = Q.replace("to_q", "processor.to_q_lora")
    return {
        f"unet.{processor}.down.weight": down,
        f"unet.{processor}.up.weight": up,
        f"unet.{processor}.alpha": torch.tensor(1.0),
    }


@pytest.mark.parametrize("style", ["kohya", "diffusers", "processor"])
def test_lora_in_every_style(style: str, tmp_path: Path) -> None:
    model, tensors = unet(), low_rank(style)
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    for source in (tensors, tmp_path / "a.safetensors"):
        params = ll.from_diffusion(source, model)
        close(delta(model, params, Q), 0.5 * noise(8, 2, seed=2) @ noise(2, 8), 1e-6)
    without = {k: t for k, t in tensors.items() if not k.endswith("alpha")}
    close(
        delta(model, ll.from_diffusion(without, model), Q), noise(8, 2, seed=2) @ noise(2, 8), 1e-6
    )


def test_convolutions_loha_and_lokr() -> None:
    model = unet()
    conv, out = (f"lora_unet_{p.replace('.', '_')}" for p in (CONV, OUT))
    tensors = {
        f"{conv}.lora_down.weight": noise(2, 4, 3, 3),
        f"{conv}.lora_up.weight": noise(8, 2, 1, 1, seed=2),
    }
    expected = (noise(8, 2, seed=2) @ noise(2, 36)).view(8, 4, 3, 3)
    close(delta(model, ll.from_diffusion(tensors, model), CONV), expected, 1e-6)
    shapes = {"w1_a": (8, 2), "w1_b": (2, 8), "w2_a": (8, 2), "w2_b": (2, 8)}
    w = {name: noise(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    tensors = {f"{out}.hada_{n}": t for n, t in w.items()} | {f"{out}.alpha": torch.tensor(4.0)}
    close(
        delta(model, ll.from_diffusion(tensors, model), OUT),
        2 * (w["w1_a"] @ w["w1_b"]) * (w["w2_a"] @ w["w2_b"]),
        1e-5,
    )
    full = {
        f"{out}.lokr_w1": noise(2, 2),
        f"{out}.lokr_w2": noise(4, 4, seed=2),
        f"{out}.alpha": torch.tensor(3.0),
    }
    close(
        delta(model, ll.from_diffusion(full, model), OUT),
        torch.kron(noise(2, 2), noise(4, 4, seed=2)),
        1e-5,
    )
    low = {
        f"{out}.lokr_w1": noise(2, 2),
        f"{out}.lokr_w2_a": noise(4, 1),
        f"{out}.lokr_w2_b": noise(1, 4),
        f"{out}.alpha": torch.tensor(3.0),
    }
    close(
        delta(model, ll.from_diffusion(low, model), OUT),
        3 * torch.kron(noise(2, 2), noise(4, 1) @ noise(1, 4)),
        1e-5,
    )


def test_components_and_refusals() -> None:
    model = unet()
    other = {k.replace("lora_unet_", "lora_te_"): t for k, t in low_rank("kohya").items()}
    both = {**low_rank("kohya"), **other}
    close(
        delta(model, ll.from_diffusion(both, model, component="unet"), Q),
        0.5 * noise(8, 2, seed=2) @ noise(2, 8),
        1e-6,
    )

    def refused(
        tensors: dict[str, Tensor], message: str, base: nn.Module = model, **how: Any
    ) -> None:
        with pytest.raises(ll.CheckpointError, match=message):
            ll.from_diffusion(tensors, base, **how)

    refused(both, "two tensors down")
    refused(both, "component: expected one of", component="vae")
    refused({}, "holds no tensors")
    refused(
        {**low_rank("kohya"), "lora_unet_x.dora_scale": noise(8, 1)},
        "unexpected tensor 'x.dora_scale'",
    )
    refused(
        {k.replace("to_q", "to_z"): t for k, t in low_rank("kohya").items()},
        "no module for '.*to_z'; did you mean",
    )
    twins = nn.ModuleDict(
        {"a_b": nn.ModuleDict({"c": nn.Linear(8, 8)}), "a": nn.ModuleDict({"b_c": nn.Linear(8, 8)})}
    )
    refused(
        {
            "lora_unet_a_b_c.lora_down.weight": noise(2, 8),
            "lora_unet_a_b_c.lora_up.weight": noise(8, 2),
        },
        "could be",
        twins,
    )
    half = {k: t for k, t in low_rank("kohya").items() if "up" not in k}
    refused(half, "up")
    refused({k: t[:1] if "up" in k else t for k, t in low_rank("kohya").items()}, "expected shape")


@pytest.mark.parametrize(
    "alpha",
    [
        torch.tensor(1 + 2j),
        torch.tensor(1.0, device="meta"),
        torch.ones(2),
        torch.tensor(float("nan")),
    ],
    ids=str,
)
def test_an_alpha_that_is_no_number(alpha: torch.Tensor) -> None:
    model = torch.nn.ModuleDict({"up": torch.nn.Linear(4, 6)})
    tensors = {"up.lora_down.weight": torch.ones(2, 4), "up.lora_up.weight": torch.ones(6, 2)}
    assert (
        ll.from_diffusion(tensors | {"up.alpha": torch.tensor(1)}, model).sites["up"].alpha == 1.0
    )
    with pytest.raises(ll.CheckpointError, match="'up': alpha: expected a"):
        ll.from_diffusion(tensors | {"up.alpha": alpha}, model)
    with pytest.raises(
        ll.CheckpointError, match=r"'up.lora_up.weight': expected a floating tensor"
    ):
        ll.from_diffusion(
            tensors | {"up.lora_up.weight": torch.ones(6, 2, dtype=torch.bool)}, model
        )
