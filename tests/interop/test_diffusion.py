"""diffusers' and kohya's files, made here by hand: the merged weights are their formulas'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers import close, normal
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
    return normal(*shape, seed=seed, dtype=torch.float32)


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
        {**low_rank("kohya"), "lora_unet_x.surprise": noise(8, 1)},
        "unexpected tensor 'lora_unet_x.surprise'",
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


# ------------------------------------------------------------------------------ spellings, prefixes
FORMS = [
    ("lora_down.weight", "lora_up.weight"),
    ("lora_A.weight", "lora_B.weight"),
    ("lora_A.default.weight", "lora_B.default.weight"),
    ("lora_A", "lora_B"),
    ("lora.down.weight", "lora.up.weight"),
    ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
]


@pytest.mark.parametrize(("down", "up"), FORMS)
@pytest.mark.parametrize(
    "start", ["unet.", "lora_unet_", "diffusion_model.", "model.diffusion_model.", "lycoris_", ""]
)
def test_every_spelling_with_every_prefix(start: str, down: str, up: str) -> None:
    model = unet()
    name = start + (Q.replace(".", "_") if start.endswith("_") else Q)
    file = {f"{name}.{down}": noise(2, 8), f"{name}.{up}": noise(8, 2, seed=2)}
    for component in (None, "unet"):
        params = ll.from_diffusion(file, model, component=component)
        close(delta(model, params, Q), noise(8, 2, seed=2) @ noise(2, 8), 1e-6)


@pytest.mark.parametrize(
    ("down", "up"), [pair for pair in FORMS if "weight" in pair[1] and "default" not in pair[1]]
)
def test_a_learned_bias_in_every_spelling(down: str, up: str) -> None:
    model = unet()
    file = {f"unet.{Q}.{down}": noise(2, 8), f"unet.{Q}.{up}": noise(8, 2, seed=2)}
    file[f"unet.{Q}.{up.replace('weight', 'bias')}"] = noise(8, seed=3)
    parts = ll.from_diffusion(file, model, component="unet")
    assert [type(a.config) for a in parts] == [ll.LoRAConfig, ll.BitFitConfig]
    close(parts[1][Q]["lora_b"], noise(8, seed=3), 1e-6)


def test_an_older_text_encoders_attention() -> None:
    layer = nn.ModuleDict({"self_attn": nn.ModuleDict({"q_proj": nn.Linear(8, 8)})})
    model = nn.ModuleDict({"text_model": nn.ModuleDict({"layers": nn.ModuleList([layer])})})
    key = "text_encoder.text_model.layers.0.self_attn.to_q_lora"
    file = {f"{key}.down.weight": noise(2, 8), f"{key}.up.weight": noise(8, 2, seed=2)}
    path = "text_model.layers.0.self_attn.q_proj"
    params = ll.from_diffusion(file, model, component="text_encoder")
    close(delta(model, params, path), noise(8, 2, seed=2) @ noise(2, 8), 1e-6)


def test_a_path_that_begins_as_a_prefix_does() -> None:
    model = nn.ModuleDict({"transformer": nn.ModuleDict({"up": nn.Linear(8, 8)})})
    file = {
        "transformer.up.lora_A.weight": noise(2, 8),
        "transformer.up.lora_B.weight": noise(8, 2),
    }
    for component in (None, "transformer"):
        params = ll.from_diffusion(file, model, component=component)
        close(delta(model, params, "transformer.up"), noise(8, 2) @ noise(2, 8), 1e-6)


def diffusers_metadata(**fields: Any) -> dict[str, str]:
    return {
        "lora_adapter_metadata": json.dumps({k.replace("__", "."): v for k, v in fields.items()})
    }


def test_metadata_speaks_of_each_component(tmp_path: Path) -> None:
    """As save_lora_weights of diffusers writes it."""
    model, file = unet(), tmp_path / "a.safetensors"
    pair = {"lora_A.weight": noise(2, 8), "lora_B.weight": noise(8, 2, seed=2)}
    tensors = {f"{c}.{Q}.{n}": t.clone() for c in ("unet", "text_encoder") for n, t in pair.items()}
    says = {
        "unet__r": 2,
        "unet__lora_alpha": 6,
        "text_encoder__r": 2,
        "text_encoder__lora_alpha": 1,
    }
    safetensors.torch.save_file(tensors, file, diffusers_metadata(**says, unet__use_rslora=True))
    update = noise(8, 2, seed=2) @ noise(2, 8)
    for component, scale in (("unet", 6 / 2**0.5), ("text_encoder", 0.5)):
        params = ll.from_diffusion(file, model, component=component)
        close(delta(model, params, Q), scale * update, 1e-5)


@pytest.mark.parametrize(
    ("says", "message"),
    [
        ({"r": 2, "lora_alpha": 4, "surprise": 1}, "'surprise' is 1, which has no counterpart"),
        ({"r": 3, "lora_alpha": 4}, "has rank 2, its config says another"),
        ({"r": 2, "lora_alpha": 4, "init_lora_weights": "pissa"}, "pissa"),
        ({"r": 2, "lora_alpha": 4, "peft_type": "IA3"}, "peft_type: expected LORA, LOHA or LOKR"),
        ({"r": 2, "lora_alpha": 4, "use_dora": True}, "use_dora is set"),
        ([1], "expected an object"),
    ],
)
def test_metadata_that_means_something_else(says: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    tensors = {f"{Q}.lora_A.weight": noise(2, 8), f"{Q}.lora_B.weight": noise(8, 2)}
    safetensors.torch.save_file(tensors, file, {"lora_adapter_metadata": json.dumps(says)})
    model = unet()
    if "pissa" in message:  # starts out of the weight are subtracted, as from_peft does
        assert isinstance(ll.from_diffusion(file, model), ll.Adapter)
        return
    with pytest.raises(ll.CheckpointError, match=message):
        ll.from_diffusion(file, model)


def test_metadata_matches_the_names_of_its_own_file(tmp_path: Path) -> None:
    """A text encoder's pattern names text_model, which CLIPTextModel of transformers 5 hasn't; and
    metadata of a transformer is of ComfyUI's keys too."""
    layer = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "k_proj": nn.Linear(8, 8)})
    table = nn.ModuleDict({"token_embedding": nn.Embedding(5, 8)})
    model = nn.ModuleDict({"embeddings": table, "layers": nn.ModuleList([layer])})
    file, names = tmp_path / "a.safetensors", ("q_proj", "k_proj")
    tensors = {
        f"text_encoder.text_model.layers.0.{n}.{half}.weight": noise(*shape)
        for n in names
        for half, shape in (("lora_A", (2, 8)), ("lora_B", (8, 2)))
    }
    pattern = {"text_model.layers.0.k_proj": 6}
    says = {"text_encoder__r": 2, "text_encoder__lora_alpha": 1}
    says |= {"text_encoder__alpha_pattern": pattern}
    safetensors.torch.save_file(tensors, file, diffusers_metadata(**says))
    params = ll.from_diffusion(file, model, component="text_encoder")
    for name, scale in zip(names, (0.5, 3.0), strict=True):
        close(delta(model, params, f"layers.0.{name}"), scale * noise(8, 2) @ noise(2, 8), 1e-5)
    tensors = {f"diffusion_model.{Q}.lora_A.weight": noise(2, 8)}
    tensors |= {f"diffusion_model.{Q}.lora_B.weight": noise(8, 2)}
    says = {"transformer__r": 2, "transformer__lora_alpha": 6}
    safetensors.torch.save_file(tensors, file, diffusers_metadata(**says))
    close(delta(unet(), ll.from_diffusion(file, unet()), Q), 3 * noise(8, 2) @ noise(2, 8), 1e-5)


def test_an_alpha_that_the_metadata_contradicts(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    safetensors.torch.save_file(
        low_rank("diffusers"), file, diffusers_metadata(unet__r=2, unet__lora_alpha=4)
    )
    with pytest.raises(ll.CheckpointError, match=r"its alpha is 1, .* says another"):
        ll.from_diffusion(file, unet())


# --------------------------------------------------------------------------------- more of LyCORIS
def test_factors_of_kernels() -> None:
    """CP factors of LoCon, LoHa and LoKr: a small kernel between factors of single entries."""
    model, c = unet(), f"lora_unet_{CONV.replace('.', '_')}"
    tucker = lambda t, a, b: torch.einsum("ijxy,ip,jc->pcxy", t, a, b)  # noqa: E731
    t, a, b = noise(2, 2, 3, 3), noise(2, 8, seed=2), noise(2, 4, seed=3)
    file = {
        f"{c}.lora_mid.weight": t,
        f"{c}.lora_up.weight": a.mT[:, :, None, None],
        f"{c}.lora_down.weight": b[:, :, None, None],
        f"{c}.alpha": torch.tensor(1.0),
    }
    close(delta(model, ll.from_diffusion(file, model), CONV), 0.5 * tucker(t, a, b), 1e-5)
    hada = {"t1": t, "w1_a": a, "w1_b": b, "t2": t.flip(0), "w2_a": 2 * a, "w2_b": b.flip(0)}
    file = {f"{c}.hada_{n}": v for n, v in hada.items()}
    expected = tucker(t, a, b) * tucker(t.flip(0), 2 * a, b.flip(0))
    close(delta(model, ll.from_diffusion(file, model), CONV), expected, 1e-5)
    w1, a, b = noise(2, 2, seed=5), noise(1, 4, seed=6), noise(1, 2, seed=7)
    t = noise(1, 1, 3, 3, seed=8)
    file = {f"{c}.lokr_w1": w1, f"{c}.lokr_t2": t, f"{c}.lokr_w2_a": a, f"{c}.lokr_w2_b": b}
    expected = torch.kron(w1[:, :, None, None], tucker(t, a, b))
    close(delta(model, ll.from_diffusion(file, model), CONV), expected, 1e-5)


@pytest.mark.parametrize("w1", [(2, 2), (4, 1), (8, 4), (1, 2)], ids=str)
def test_lokr_of_a_convolution_splits_its_channels(w1: tuple[int, int]) -> None:
    model, c = unet(), f"lora_unet_{CONV.replace('.', '_')}"
    W1, W2 = noise(*w1), noise(8 // w1[0], 4 // w1[1], 3, 3, seed=2)
    params = ll.from_diffusion({f"{c}.lokr_w1": W1, f"{c}.lokr_w2": W2}, model)
    close(delta(model, params, CONV), torch.kron(W1[:, :, None, None], W2), 1e-5)
    assert isinstance(params, ll.Adapter)
    close(delta(model, ll.scale(params, 0.5), CONV), torch.kron(W1[:, :, None, None], W2) / 2, 1e-5)


def test_lokr_with_factors_that_ours_would_not_have() -> None:
    """Both of low rank, whole beside low rank, ranks above half the factor's size."""
    model, o = unet(), f"lora_unet_{OUT.replace('.', '_')}"
    a1, b1, a2, b2 = noise(2, 3), noise(3, 2, seed=2), noise(4, 3, seed=3), noise(3, 4, seed=4)
    file = {
        f"{o}.lokr_{n}": t
        for n, t in zip(("w1_a", "w1_b", "w2_a", "w2_b"), (a1, b1, a2, b2), strict=True)
    }
    file[f"{o}.alpha"] = torch.tensor(6.0)
    close(delta(model, ll.from_diffusion(file, model), OUT), 2 * torch.kron(a1 @ b1, a2 @ b2), 1e-5)
    file = {
        f"{o}.lokr_w1_a": a1,
        f"{o}.lokr_w1_b": b1,
        f"{o}.lokr_w2": a2 @ b2,
        f"{o}.alpha": torch.tensor(6.0),
    }
    close(delta(model, ll.from_diffusion(file, model), OUT), 2 * torch.kron(a1 @ b1, a2 @ b2), 1e-5)


def test_magnitudes_over_every_update() -> None:
    """DoRA over LoRA is a DoRA; over LoHa and LoKr, and of inputs, the whole change."""
    model, q, m = unet(), f"lora_unet_{Q.replace('.', '_')}", 0.5 + noise(8, 1, seed=9).abs()
    W = model.get_parameter(f"{Q}.weight").detach()
    w = {
        f"hada_w{i}_{s}": noise(*((8, 2) if s == "a" else (2, 8)), seed=i)
        for i in (1, 2)
        for s in "ab"
    }
    updates = {
        "lora": (
            {"lora_down.weight": noise(2, 8), "lora_up.weight": noise(8, 2)},
            noise(8, 2) @ noise(2, 8),
        ),
        "loha": (w, (w["hada_w1_a"] @ w["hada_w1_b"]) * (w["hada_w2_a"] @ w["hada_w2_b"])),
        "lokr": (
            {"lokr_w1": noise(2, 2), "lokr_w2": noise(4, 4)},
            torch.kron(noise(2, 2), noise(4, 4)),
        ),
    }
    for name, (tensors, update) in updates.items():
        file = {f"{q}.{n}": t for n, t in tensors.items()} | {f"{q}.dora_scale": m}
        params = ll.from_diffusion(file, model)
        V = W + update
        close(delta(model, params, Q), m * V / V.norm(dim=1, keepdim=True) - W, 1e-5)
        assert isinstance(params, ll.Adapter)
        assert (params.layout.variant.name == "dora") == (name == "lora")
        of_inputs = ll.from_diffusion(file | {f"{q}.dora_scale": m.mT}, model)
        close(delta(model, of_inputs, Q), m.mT * V / V.norm(dim=0, keepdim=True) - W, 1e-5)


def test_changes_of_weights_biases_norms_and_parameters() -> None:
    """diff, diff_b, w_norm, b_norm, set_weight, on everything that has a method."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.modulation = nn.Parameter(noise(1, 6, 8))

    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"up": nn.Linear(8, 8), "conv": nn.Conv2d(4, 8, 3), "norm": nn.LayerNorm(8),
         "rms": nn.RMSNorm(8), "words": nn.Embedding(5, 8), "table": Table()}
    )  # fmt: skip
    file = {
        "diffusion_model.up.diff": noise(8, 8),
        "diffusion_model.up.diff_b": noise(8, seed=2),
        "diffusion_model.conv.diff": noise(8, 4, 3, 3, seed=3),
        "lora_unet_norm.w_norm": noise(8, seed=4),
        "lora_unet_norm.b_norm": noise(8, seed=5),
        "diffusion_model.rms.diff": noise(8, seed=6),
        "diffusion_model.words.diff": noise(5, 8, seed=7),
        "diffusion_model.table.modulation.diff": noise(1, 6, 8, seed=8),
    }
    merged = ll.merge(model, ll.from_diffusion(file, model))
    state = {name: t.detach() for name, t in model.named_parameters()}
    changed = {
        "up.weight": noise(8, 8), "up.bias": noise(8, seed=2),
        "conv.weight": noise(8, 4, 3, 3, seed=3), "norm.weight": noise(8, seed=4),
        "norm.bias": noise(8, seed=5), "rms.weight": noise(8, seed=6),
        "words.weight": noise(5, 8, seed=7), "table.modulation": noise(1, 6, 8, seed=8),
    }  # fmt: skip
    for name, t in changed.items():
        close(merged[name].detach(), state[name] + t, 1e-5)
    params = ll.from_diffusion({"diffusion_model.up.set_weight": noise(8, 8)}, model)
    close(ll.merge(model, params)["up.weight"], noise(8, 8), 1e-6)
    for role, t, message in (
        ("up.diff", noise(8, 7), "diff: expected 64 entries"),
        ("up.diff_b", noise(7), "diff_b: expected 8 entries"),
        ("rms.diff_b", noise(8), "this RMSNorm has none"),
        ("table.modulation.diff", noise(6, 4), "diff: expected 48 entries"),
    ):
        with pytest.raises(ll.CheckpointError, match=message):
            ll.from_diffusion({f"diffusion_model.{role}": t}, model)


def test_an_update_and_its_bias_and_a_shift_add_up() -> None:
    model, q = unet(), f"diffusion_model.{Q}"
    file = {
        f"{q}.lora_A.weight": noise(2, 8),
        f"{q}.lora_B.weight": noise(8, 2),
        f"{q}.alpha": torch.tensor(1),
    }
    file |= {f"{q}.lora_B.bias": noise(8, seed=3), f"{q}.diff_b": noise(8, seed=4)}
    merged = ll.merge(model, ll.from_diffusion(file, model))
    bias = model.get_parameter(f"{Q}.bias").detach()
    close(merged[f"{Q}.bias"], bias + 0.5 * noise(8, seed=3) + noise(8, seed=4), 1e-5)


# --------------------------------------------------------------------------------- from the field
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_tensors_of_8_bits_are_widened(dtype: torch.dtype) -> None:
    model = unet()
    file = {k: t.to(dtype) if t.ndim else t for k, t in low_rank("kohya").items()}
    wide = {k: t.float() for k, t in file.items()}
    for a, b in zip(*(ll.from_diffusion(f, model)[Q].values() for f in (file, wide)), strict=True):
        assert torch.equal(a, b)


def test_files_from_the_field() -> None:
    model = unet()
    pair = low_rank("kohya")
    mixed = {
        k: t.half() if "lora_down" in k else t.bfloat16() if "lora_up" in k else t
        for k, t in pair.items()
    }
    close(
        delta(model, ll.from_diffusion(mixed, model), Q),
        0.5 * noise(8, 2, seed=2) @ noise(2, 8),
        0.05,
    )
    params = ll.from_diffusion(mixed, model)
    assert {t.dtype for t in params[Q].values()} == {torch.float32}
    q = f"lora_unet_{Q.replace('.', '_')}"
    kron = {f"{q}.lokr_w1": noise(2, 2).half(), f"{q}.lokr_w2": noise(4, 4).bfloat16()}
    layer: Any = ll.bind(model, ll.from_diffusion(kron, model)).get_submodule(Q)
    assert layer(noise(3, 8)).dtype == torch.float32
    for message, file in {
        "is 0, which kohya's scripts": pair | {f"{q}.alpha": torch.tensor(0.0)},
        "textual inversion": pair | {"bundle_emb.word.string_to_param.*": noise(1, 8)},
        "ll.from_peft reads the folder": {f"base_model.model.{Q}.lora_A.weight": noise(2, 8)},
        "is a tensor of AdaLoRA": {f"{q}.lora_E": noise(2, 1)},
        "is a tensor of LyCORIS' use_scalar": pair | {f"{q}.scalar": torch.tensor(1.0)},
        "has a1 and lacks a2": {f"{q}.a1.weight": noise(8, 2)},
        "lacks its factors": {f"{q}.alpha": torch.tensor(1.0)},
        "lacks down": {f"{q}.lora_up.weight": noise(8, 2)},
        "lacks hada_w2_b": {f"{q}.hada_{n}": noise(8, 8) for n in ("w1_a", "w1_b", "w2_a")},
        "lacks lokr_w2_b": {f"{q}.lokr_w1": noise(2, 2), f"{q}.lokr_w2_a": noise(4, 1)},
        r"found those of \(2 \* 2, 2 \* 4\)": {
            f"{q}.lokr_w1": noise(2, 2),
            f"{q}.lokr_w2": noise(2, 4),
        },
        "has magnitudes .* lacks the factors": {f"{q}.dora_scale": noise(8, 1)},
        "has factors of both lora and lokr": pair | {f"{q}.lokr_w1": noise(2, 2)},
        "say which of them this model is, component='unet'": pair
        | {"lora_te1_x.lora_down.weight": noise(2, 8)},
        "both change": {
            **{
                f"unet.{Q}.{n}": t
                for n, t in (("lora_A.weight", noise(2, 8)), ("lora_B.weight", noise(8, 2)))
            },
            f"unet.{Q}.weight.diff": noise(8, 8),
        },
    }.items():
        if "both change" in message:
            with pytest.raises(ll.CheckpointError, match="no module for"):
                ll.from_diffusion(file, model)
            continue
        with pytest.raises(ll.CheckpointError, match=message):
            ll.from_diffusion(file, model)


def test_what_is_opened(tmp_path: Path) -> None:
    model, update = unet(), 0.5 * noise(8, 2, seed=2) @ noise(2, 8)
    safetensors.torch.save_file(
        low_rank("diffusers"), tmp_path / "pytorch_lora_weights.safetensors"
    )
    torch.save(low_rank("older"), tmp_path / "old.bin")
    for source in (tmp_path, tmp_path / "old.bin"):
        close(delta(model, ll.from_diffusion(source, model), Q), update, 1e-6)
    (tmp_path / "peft").mkdir()
    with pytest.raises(ll.CheckpointError, match="name the file in it"):
        ll.from_diffusion(tmp_path / "peft", model)
    (tmp_path / "peft" / "adapter_config.json").write_text("{}")
    with pytest.raises(ll.CheckpointError, match=r"ll.from_peft reads PEFT's"):
        ll.from_diffusion(tmp_path / "peft", model)
    ll.save(ll.init(model, ll.LoRAConfig(r=2, target_names="to_q")), tmp_path / "own")
    with pytest.raises(ll.CheckpointError, match=r"ll.load reads it"):
        ll.from_diffusion(tmp_path / "own", model)
    with pytest.raises(
        ll.CheckpointError, match=r"holds no tensors of text_encoder; it has keys of unet"
    ):
        ll.from_diffusion(low_rank("kohya"), model, component="text_encoder")


# ------------------------------------------------------------------------------------------ writing
class Little(nn.Module):
    """A linear layer, a convolution and a norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.conv, self.norm = nn.Linear(8, 12), nn.Conv2d(4, 8, 3), nn.LayerNorm(8)


BOTH = {"target_kinds": ("linear", "conv")}
KOHYA = {
    "lora": ll.LoRAConfig(r=2, alpha=3, rank_pattern={"conv": 4}, **BOTH),
    "rslora": ll.LoRAConfig(r=4, alpha=3, rslora=True, **BOTH),
    "silent": ll.LoRAConfig(r=2, alpha=0, **BOTH),
    "dora": ll.DoRAConfig(r=2, alpha=3, **BOTH),
    "pissa": ll.PiSSAConfig(r=2, alpha=3, **BOTH),
    "loha": ll.LoHaConfig(r=2, alpha=3, **BOTH),
    "silent loha": ll.LoHaConfig(r=2, alpha=0, **BOTH),
    "lokr": ll.LoKrConfig(r=1, alpha=3),
    "lokr of channels": ll.LoKrConfig(r=1, alpha=3, w1_shapes={"conv": (2, 2)}, **BOTH),
    "whole lokr": ll.LoKrConfig(r=99, w1_shapes={"conv": (2, 4)}, **BOTH),
    "diff": ll.LoKrConfig(r=99, factor=1, **BOTH),
    "bitfit": ll.BitFitConfig(target_kinds=("linear", "conv", "norm")),
    "ln_tuning": ll.LNTuningConfig(),
}


def shaken(params: Any) -> Any:
    """Every trained tensor with noise."""
    trained, frozen = ll.partition(params)
    leaves, tree = torch.utils._pytree.tree_flatten(trained)
    moved = [t + noise(*t.shape, seed=i).to(t) for i, t in enumerate(leaves)]
    return ll.combine(torch.utils._pytree.tree_unflatten(moved, tree), frozen)


@pytest.mark.parametrize("name", KOHYA)
def test_kohyas_style_reads_back_as_the_same_model(name: str, tmp_path: Path) -> None:
    model, file = Little(), tmp_path / "a.safetensors"
    params = shaken(ll.init(model, KOHYA[name]))
    ll.to_diffusion(params, model, file, component="unet", style="kohya")
    expected, found = (ll.merge(model, p) for p in (params, ll.from_diffusion(file, model)))
    changed = {
        k
        for k, t in expected.items()
        if "silent" in name or not torch.equal(t, model.get_parameter(k))
    }
    assert changed <= found.keys()
    for key in changed:
        close(found[key].detach(), expected[key].detach(), 2e-5)


def test_an_adapter_and_its_biases_in_one_file(tmp_path: Path) -> None:
    model, file = Little(), tmp_path / "a.safetensors"
    params = (
        shaken(ll.init(model, ll.LoRAConfig(r=2, **BOTH))),
        shaken(ll.init(model, ll.BitFitConfig(target_names="up"))),
        shaken(ll.init(model, ll.LNTuningConfig())),
    )
    for style in ("kohya", "diffusers"):
        given = params if style == "kohya" else params[:2]
        if style == "diffusers":  # lora_B.bias beside every pair
            given = (given[0], shaken(ll.init(model, ll.BitFitConfig(**BOTH))))
        ll.to_diffusion(given, model, file, component="unet", style=style)
        expected, found = (ll.merge(model, p) for p in (given, ll.from_diffusion(file, model)))
        assert expected.keys() == found.keys()
        for key, t in expected.items():
            close(found[key].detach(), t.detach(), 2e-5)


def test_what_no_file_holds_is_refused(tmp_path: Path) -> None:
    model, file = Little(), tmp_path / "a.safetensors"
    lora = ll.init(model, ll.LoRAConfig(r=2))

    def refused(error: Any, message: str, params: Any, base: Any = model, **how: Any) -> None:
        with pytest.raises(error, match=message):
            ll.to_diffusion(params, base, file, **({"component": "unet"} | how))
        assert not file.exists()

    refused(
        ll.UnsupportedError, "no form for hra", ll.init(model, ll.HRAConfig(r=2)), style="kohya"
    )
    loha = ll.init(model, ll.LoHaConfig(r=2))
    refused(ll.UnsupportedError, "LoRA, DoRA and LoKr alone, this is loha", loha)
    refused(ll.UnsupportedError, "PEFT has no one form", (lora, loha))
    refused(ll.UnsupportedError, "'up' has two adapters of its weight", (lora, loha), style="kohya")
    refused(ll.ConfigError, "style: did you mean 'kohya'", lora, style="kohja")
    refused(ll.ConfigError, "component: did you mean 'unet'", lora, component="unett")
    refused(ll.ConfigError, "give the component", lora, component=None)
    refused(ll.ConfigError, "of several components", lora, {"unet": model})
    refused(ll.CheckpointError, "unet: expected the base", {"unet": lora}, {}, component=None)
    refused(ll.StructureError, "a stack of 2 adapters", ll.stack([lora, lora]), style="kohya")
    given = ll.init(model, ll.LoKrConfig(w1_shapes={"up": (6, 1)}))
    refused(ll.UnsupportedError, r"PEFT splits every layer by one factor, .* found \(6, 1\)", given)
    lokr = ll.init(model, ll.LoKrConfig(r=99, **BOTH))
    refused(ll.UnsupportedError, "LyCORIS splits the 4 channels", lokr, style="kohya")
    with torch.no_grad():
        twins = nn.ModuleDict(
            {
                "a_b": nn.ModuleDict({"c": nn.Linear(4, 4)}),
                "a": nn.ModuleDict({"b_c": nn.Linear(4, 4)}),
            }
        )
    both = ll.init(twins, ll.LoRAConfig(r=2))
    refused(ll.CheckpointError, "are one name with underscores", both, twins, style="kohya")
