"""diffusers' own files, converters and loaders against ours, on small models built from configs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import close, normal
from torch import Tensor

import lora_lite_func as ll
from lora_lite_func.interop.diffusion.families import ORIGINAL_NAMES
from lora_lite_func.interop.diffusion.names import ModelNames

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")
conversion: Any = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
pytestmark = pytest.mark.filterwarnings("ignore")


def noise(*shape: int, seed: int = 0, size: float = 0.3) -> Tensor:
    return size * normal(*shape, seed=seed, dtype=torch.float32)


def unet() -> Any:
    """The shape of SDXL's UNet: its blocks, two resnets a block, attention in some of them."""
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=2,
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
        transformer_layers_per_block=[1, 2],
        use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=36,
    ).eval()


def unet_inputs() -> dict[str, Any]:
    return {
        "sample": noise(2, 4, 8, 8, seed=1, size=1.0),
        "timestep": torch.tensor(3),
        "encoder_hidden_states": noise(2, 5, 12, seed=2, size=1.0),
        "added_cond_kwargs": {"text_embeds": noise(2, 12, seed=3), "time_ids": noise(2, 6, seed=4)},
    }


def flux() -> Any:
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=6,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    ).eval()


def pairs(sizes: dict[str, tuple[int, ...]], down: str, up: str, r: int = 2) -> dict[str, Tensor]:
    """Factors for layers of these weights' shapes."""
    found = {}
    for i, (name, shape) in enumerate(sizes.items()):
        found[f"{name}.{down}"] = noise(r, *shape[1:], seed=2 * i + 10)
        ones = [1] * (len(shape) - 2)
        found[f"{name}.{up}"] = noise(shape[0], r, *ones, seed=2 * i + 11)
    return found


def outputs(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs, return_dict=False)[0]
    return found


def ours(model: Any, params: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = ll.apply(model, params, **inputs, return_dict=False)[0]
    return found


ORIGINAL = {  # of SDXL's UNet: the original name, and the module of diffusers that holds its shape
    "input_blocks_0_0": "conv_in",
    "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
    "input_blocks_2_0_emb_layers_1": "down_blocks.0.resnets.1.time_emb_proj",
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks_5_1_proj_in": "down_blocks.1.attentions.1.proj_in",
    "input_blocks_4_1_transformer_blocks_1_attn1_to_q": (
        "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"
    ),
    "middle_block_0_out_layers_3": "mid_block.resnets.0.conv2",
    "middle_block_1_transformer_blocks_0_attn2_to_k": (
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    ),
    "middle_block_2_in_layers_2": "mid_block.resnets.1.conv1",
    "output_blocks_1_1_transformer_blocks_0_ff_net_0_proj": (
        "up_blocks.0.attentions.1.transformer_blocks.0.ff.net.0.proj"
    ),
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks_4_0_in_layers_2": "up_blocks.1.resnets.1.conv1",
    "time_embed_0": "time_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
    "out_2": "conv_out",
}


def test_the_original_names_of_a_unet_are_those_of_diffusers_converter() -> None:
    model, r = unet(), 2
    shapes = {
        f"lora_unet_{n}": tuple(model.get_parameter(f"{p}.weight").shape)
        for n, p in ORIGINAL.items()
    }
    file = pairs(shapes, "lora_down.weight", "lora_up.weight", r)
    # where alphas differ, diffusers (0.42) gives attention the commonest, so that is its own here
    alpha = {n: 1.0 if "attn" in n else 1.0 + i % 3 for i, n in enumerate(shapes)}
    file |= {f"{name}.alpha": torch.tensor(value) for name, value in alpha.items()}
    params = ll.from_diffusion(file, model, component="unet")
    assert isinstance(params, ll.Adapter)
    assert set(params) == set(ORIGINAL.values())
    mixin = diffusers.loaders.StableDiffusionXLLoraLoaderMixin
    theirs, alphas = mixin.lora_state_dict(copy.deepcopy(file), unet_config=model.config)
    loaded = unet()
    loaded.load_lora_adapter(theirs, network_alphas=alphas, prefix="unet")
    y = ours(model, params, **unet_inputs())
    close(y, outputs(loaded, **unet_inputs()), 1e-4)
    assert (y - outputs(model, **unet_inputs())).abs().max() > 1e-2


def test_fused_layers_of_flux_are_shared_out_as_diffusers_does() -> None:
    with torch.device("meta"):  # the converter knows Flux's own sizes alone
        model = diffusers.FluxTransformer2DModel(
            num_layers=1, num_single_layers=1, guidance_embeds=True
        )
    D, r = 3072, 2
    sizes = {
        "double_blocks_0_img_attn_qkv": (3 * D, D),
        "double_blocks_0_txt_attn_qkv": (3 * D, D),
        "double_blocks_0_img_attn_proj": (D, D),
        "double_blocks_0_txt_mlp_2": (D, 4 * D),
        "double_blocks_0_img_mod_lin": (6 * D, D),
        "single_blocks_0_linear1": (7 * D, D),
        "single_blocks_0_linear2": (D, 5 * D),
        "single_blocks_0_modulation_lin": (3 * D, D),
        "final_layer_adaLN_modulation_1": (2 * D, D),
        "final_layer_linear": (64, D),
        "img_in": (D, 64),
        "vector_in_in_layer": (D, 768),
    }
    file = pairs(
        {f"lora_unet_{n}": s for n, s in sizes.items()}, "lora_down.weight", "lora_up.weight", r
    )
    theirs = diffusers.loaders.FluxLoraLoaderMixin.lora_state_dict(copy.deepcopy(file))
    params = ll.from_diffusion(file, model)
    assert isinstance(params, ll.Adapter)
    expected = {k.removeprefix("transformer."): t for k, t in theirs.items()}
    assert {k.rpartition(".lora_")[0] for k in expected} == set(params)
    for path, held in params.items():
        for name in ("lora_A", "lora_B"):
            assert torch.equal(held[name], expected[f"{path}.{name}.weight"]), (path, name)


@pytest.mark.parametrize("shape", ["lora", "loha", "lokr", "diff", "dora"])
def test_any_update_of_a_fused_layer_is_the_fused_layers(shape: str) -> None:
    """q, k and v of one layer, and the swapped halves of another: rows of the fused update."""
    model = flux()
    d = 16
    sizes = {
        "double_blocks.1.img_attn.qkv": (3 * d, d),
        "final_layer.adaLN_modulation.1": (2 * d, d),
    }
    file: dict[str, Tensor] = {}
    whole: dict[str, Tensor] = {}
    for name, (o, i) in sizes.items():
        key = f"diffusion_model.{name}"
        if shape in ("lora", "dora"):
            file |= pairs({key: (o, i)}, "lora_A.weight", "lora_B.weight")
            whole[name] = file[f"{key}.lora_B.weight"] @ file[f"{key}.lora_A.weight"]
        elif shape == "loha":
            w = {
                f"w{j}_{s}": noise(*((o, 2) if s == "a" else (2, i)), seed=j)
                for j in (1, 2)
                for s in "ab"
            }
            file |= {f"{key}.hada_{n}": t for n, t in w.items()}
            whole[name] = (w["w1_a"] @ w["w1_b"]) * (w["w2_a"] @ w["w2_b"])
        elif shape == "lokr":
            w1, a, b = noise(4, 4, seed=5), noise(o // 4, 1, seed=6), noise(1, i // 4, seed=7)
            file |= {f"{key}.lokr_w1": w1, f"{key}.lokr_w2_a": a, f"{key}.lokr_w2_b": b}
            whole[name] = torch.kron(w1, a @ b)
        else:
            file[f"{key}.diff"] = whole[name] = noise(o, i, seed=8)
            file[f"{key}.diff_b"] = noise(o, seed=9)
    parts = {
        "transformer_blocks.1.attn.to_q": ("double_blocks.1.img_attn.qkv", [slice(0, d)]),
        "transformer_blocks.1.attn.to_k": ("double_blocks.1.img_attn.qkv", [slice(d, 2 * d)]),
        "transformer_blocks.1.attn.to_v": ("double_blocks.1.img_attn.qkv", [slice(2 * d, 3 * d)]),
        "norm_out.linear": ("final_layer.adaLN_modulation.1", [slice(d, 2 * d), slice(0, d)]),
    }
    if shape == "dora":
        for name, (o, _) in sizes.items():
            file[f"diffusion_model.{name}.dora_scale"] = 0.5 + noise(o, 1, seed=o).abs()
    params = ll.from_diffusion(file, model)
    merged = ll.merge(model, params)
    for path, (name, rows) in parts.items():
        W = model.get_parameter(f"{path}.weight").detach()
        expected = W + torch.cat([whole[name][piece] for piece in rows])
        if shape == "dora":
            m = torch.cat([file[f"diffusion_model.{name}.dora_scale"][piece] for piece in rows])
            expected = m * expected / expected.norm(dim=1, keepdim=True)
        close(merged[f"{path}.weight"], expected, 1e-5)
        if shape == "diff":
            shift = torch.cat([file[f"diffusion_model.{name}.diff_b"][piece] for piece in rows])
            bias = model.get_parameter(f"{path}.bias").detach()
            close(merged[f"{path}.bias"], bias + shift, 1e-6)


SMALL: dict[str, dict[str, Any]] = {
    "FluxTransformer2DModel": {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True},
    "Flux2Transformer2DModel": {"num_layers": 1, "num_single_layers": 1},
    "HunyuanVideoTransformer3DModel": {"num_layers": 1, "num_single_layers": 1},
    "SD3Transformer2DModel": {
        "num_layers": 2, "dual_attention_layers": (0,), "qk_norm": "rms_norm",
    },
    "WanTransformer3DModel": {"num_layers": 1, "image_dim": 16, "added_kv_proj_dim": 5120},
    "ZImageTransformer2DModel": {"n_layers": 1, "n_refiner_layers": 1},
    "ChromaTransformer2DModel": {"num_layers": 1, "num_single_layers": 1},
    "Lumina2Transformer2DModel": {"num_layers": 1, "num_refiner_layers": 1},
    "LTX2VideoTransformer3DModel": {"num_layers": 1},
    "Krea2Transformer2DModel": {
        "num_layers": 1, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1,
    },
    "Ideogram4Transformer2DModel": {"num_layers": 1},
    "CosmosTransformer3DModel": {"num_layers": 1},
    "AceStepTransformer1DModel": {"num_hidden_layers": 1},
}  # fmt: skip


def test_every_original_name_is_some_models() -> None:
    found: set[str] = set()
    with torch.device("meta"):
        for name, how in SMALL.items():
            known = ModelNames(getattr(diffusers, name)(**how))
            found |= {n for f in ORIGINAL_NAMES for n in f if known.find(n.replace("#", "0"))}
    assert found == {name for family in ORIGINAL_NAMES for name in family}


CONVERTERS = {
    "Krea2Transformer2DModel": ("krea2", "blocks.0.attn.wq"),
    "CosmosTransformer3DModel": ("anima", "blocks.0.self_attn.q_proj"),
    "LTX2VideoTransformer3DModel": ("ltx2", "adaln_single.linear"),
    "AceStepTransformer1DModel": ("ace_step", "layers.0.self_attn.q_proj"),
}
"""{model: (its converter in diffusers, a name of its original release)}."""


@pytest.mark.parametrize("name", CONVERTERS)
def test_newer_models_have_the_names_that_diffusers_converter_knows(name: str) -> None:
    converter, example = CONVERTERS[name]
    convert = getattr(conversion, f"_convert_non_diffusers_{converter}_lora_to_diffusers")
    with torch.device("meta"):
        known = ModelNames(getattr(diffusers, name)(**SMALL[name]))
    family = next(f for f in ORIGINAL_NAMES if example.replace(".0.", ".#.") in f)
    start = "base_model.model." if converter == "ace_step" else "diffusion_model."
    compared = 0
    for row in family:
        original = row.replace("#", "0")
        ((target,),) = [known.find(original) or ()]
        key = f"{start}{original}.lora_A.weight"
        (theirs,) = convert({key: torch.zeros(2, 4)})
        if target.path in known.modules:  # they convert no parameters that stand alone
            assert theirs == f"transformer.{target.path}.lora_A.weight"
            compared += 1
    assert compared >= 8


def test_wan_as_diffusers_reads_it() -> None:
    torch.manual_seed(0)
    how: dict[str, Any] = {
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12,
        "in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32,
        "num_layers": 2, "image_dim": 16, "added_kv_proj_dim": 24,
    }  # fmt: skip
    model = diffusers.WanTransformer3DModel(**how).eval()
    inner = {
        "self_attn.q": (24, 24), "self_attn.o": (24, 24), "cross_attn.k": (24, 24),
        "cross_attn.k_img": (24, 24), "cross_attn.v_img": (24, 24),
        "ffn.0": (32, 24), "ffn.2": (24, 32),
    }  # fmt: skip
    sizes = {f"diffusion_model.blocks.{i}.{n}": s for i in (0, 1) for n, s in inner.items()}
    file = pairs(sizes, "lora_A.weight", "lora_B.weight")
    file |= {
        f"{name}.diff_b": noise(shape[0], seed=5) for name, shape in sizes.items() if "ffn" in name
    }
    file |= pairs(
        {"diffusion_model.time_projection.1": (144, 24)}, "lora_A.weight", "lora_B.weight"
    )
    theirs = diffusers.loaders.WanLoraLoaderMixin.lora_state_dict(copy.deepcopy(file))
    loaded = copy.deepcopy(model)
    loaded.load_lora_adapter(theirs, prefix="transformer")
    inputs = {
        "hidden_states": noise(1, 4, 1, 4, 4, seed=1, size=1.0),
        "timestep": torch.tensor([3]),
        "encoder_hidden_states": noise(1, 5, 16, seed=2, size=1.0),
        "encoder_hidden_states_image": noise(1, 3, 16, seed=3, size=1.0),
    }
    params = ll.from_diffusion(file, model, component="transformer")
    close(ours(model, params, **inputs), outputs(loaded, **inputs), 1e-4)


def test_what_a_model_of_diffusers_saves_itself(tmp_path: Path) -> None:
    """save_lora_adapter: ranks and strengths by pattern, rsLoRA and DoRA in its metadata."""
    from peft import LoraConfig

    for settings in (
        {"r": 4, "lora_alpha": 3, "rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_k": 5}},
        {"r": 4, "lora_alpha": 3, "use_rslora": True},
        {"r": 2, "lora_alpha": 6, "use_dora": True},
        {"r": 2, "lora_alpha": 6, "lora_bias": True},
    ):
        model = unet()
        wrapped = copy.deepcopy(model)
        config = LoraConfig(
            target_modules=["to_q", "to_k", "conv1"], init_lora_weights=False, **settings
        )
        wrapped.add_adapter(config)
        wrapped.save_lora_adapter(tmp_path, safe_serialization=True)
        params = ll.from_diffusion(tmp_path, model)
        close(ours(model, params, **unet_inputs()), outputs(wrapped, **unet_inputs()), 2e-4)


def text_encoder() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=12,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.CLIPTextModel(config).eval()


@pytest.mark.parametrize(
    "start",
    ["lora_te_text_model_", "lora_te1_text_model_", "text_encoders.clip_l.transformer.text_model."],
)
def test_a_text_encoder_of_kohya_as_diffusers_reads_it(start: str) -> None:
    encoder, ids = text_encoder(), torch.tensor([[1, 7, 9, 2]])
    inner = {"self_attn.q_proj": (16, 16), "self_attn.out_proj": (16, 16), "mlp.fc1": (24, 16)}
    dotted = {f"encoder.layers.{i}.{n}": s for i in (0, 1) for n, s in inner.items()}
    flat = not start.endswith(".")
    file = pairs(
        {start + (n.replace(".", "_") if flat else n): s for n, s in dotted.items()},
        "lora_down.weight",
        "lora_up.weight",
    )
    file |= {k.replace("lora_down.weight", "alpha"): torch.tensor(1.0) for k in file if "down" in k}
    params = ll.from_diffusion(file, encoder, component="text_encoder")
    with torch.no_grad():
        y = ll.apply(encoder, params, ids)[0]
    if flat:
        theirs, alphas = diffusers.loaders.StableDiffusionLoraLoaderMixin.lora_state_dict(
            copy.deepcopy(file)
        )
        loaded = text_encoder()
        diffusers.loaders.StableDiffusionLoraLoaderMixin.load_lora_into_text_encoder(
            theirs, alphas, loaded
        )
        with torch.no_grad():
            close(y, loaded(ids)[0], 1e-4)
    delta = ll.merge(encoder, params)["encoder.layers.1.mlp.fc1.weight"] - encoder.get_parameter(
        "encoder.layers.1.mlp.fc1.weight"
    )
    name = start + ("encoder_layers_1_mlp_fc1" if flat else "encoder.layers.1.mlp.fc1")
    close(
        delta.detach(),
        0.5 * file[f"{name}.lora_up.weight"] @ file[f"{name}.lora_down.weight"],
        1e-5,
    )


# ------------------------------------------------------------------------------------------ writing
def shaken(params: Any, seed: int = 0) -> Any:
    """Every trained tensor with noise."""
    gen = torch.Generator().manual_seed(seed)
    trained, frozen = ll.partition(params)
    moved = torch.utils._pytree.tree_map(
        lambda t: t + 0.2 * torch.randn(t.shape, generator=gen).to(t), trained
    )
    return ll.combine(moved, frozen)


TARGETS: dict[str, Any] = {
    "target_names": (r"to_k$", r"to_out\.0$", r"conv1$", "time_embedding"),
    "target_kinds": ("linear", "conv"),
}
WRITTEN = {
    "lora": ll.LoRAConfig(
        r=4, alpha=3, rank_pattern={"to_k": 2}, alpha_pattern={"0.conv1": 5}, **TARGETS
    ),
    "rslora": ll.LoRAConfig(r=4, alpha=3, rslora=True, **TARGETS),
    "dora": ll.DoRAConfig(r=2, alpha=6, **TARGETS),
    "pissa": ll.PiSSAConfig(r=2, alpha=6, **TARGETS),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_diffusers_loads_what_is_written(name: str, tmp_path: Path) -> None:
    model, file = unet(), tmp_path / "pytorch_lora_weights.safetensors"
    params = shaken(ll.init(model, WRITTEN[name]))
    ll.to_diffusion(params, model, file, component="unet")
    loaded = unet()
    loaded.load_lora_adapter(str(tmp_path), prefix="unet", use_safetensors=True)
    y = outputs(loaded, **unet_inputs())
    close(ours(model, params, **unet_inputs()), y, 2e-4)
    close(ours(model, ll.from_diffusion(file, model), **unet_inputs()), y, 2e-4)


def test_diffusers_loads_lokr_as_it_is_written(tmp_path: Path) -> None:
    model = unet()
    for cfg in (
        ll.LoKrConfig(r=1, alpha=3, target_names=("to_k$", "proj_in")),
        ll.LoKrConfig(r=2, alpha=3, factor=2, target_names="to_k$"),
    ):
        params = shaken(ll.init(model, cfg))
        ll.to_diffusion(
            params, model, tmp_path / "pytorch_lora_weights.safetensors", component="unet"
        )
        loaded = unet()
        loaded.load_lora_adapter(str(tmp_path), prefix="unet", use_safetensors=True)
        y = outputs(loaded, **unet_inputs())
        close(ours(model, params, **unet_inputs()), y, 2e-4)
        close(ours(model, ll.from_diffusion(tmp_path, model), **unet_inputs()), y, 2e-4)


def test_two_components_in_one_file(tmp_path: Path) -> None:
    """As a pipeline's save_lora_weights writes them; diffusers loads each into its model."""
    models = {"unet": unet(), "text_encoder": text_encoder()}
    params = {
        "unet": shaken(ll.init(models["unet"], WRITTEN["lora"])),
        "text_encoder": shaken(
            ll.init(models["text_encoder"], ll.LoRAConfig(r=2, alpha=5, target_names="_proj$"))
        ),
    }
    file, ids = tmp_path / "a.safetensors", torch.tensor([[1, 7, 9, 2]])
    ll.to_diffusion(params, models, file)
    mixin = diffusers.loaders.StableDiffusionLoraLoaderMixin
    theirs, alphas, metadata = mixin.lora_state_dict(
        tmp_path, weight_name="a.safetensors", return_lora_metadata=True
    )
    model, encoder = unet(), text_encoder()
    mixin.load_lora_into_unet(theirs, alphas, model, metadata=metadata)
    mixin.load_lora_into_text_encoder(theirs, alphas, encoder, metadata=metadata)
    close(
        ours(models["unet"], params["unet"], **unet_inputs()), outputs(model, **unet_inputs()), 2e-4
    )
    with torch.no_grad():
        expected = encoder(ids)[0]
        close(ll.apply(models["text_encoder"], params["text_encoder"], ids)[0], expected, 1e-4)
        again = ll.from_diffusion(file, models["text_encoder"], component="text_encoder")
        close(ll.apply(models["text_encoder"], again, ids)[0], expected, 1e-4)


def test_diffusers_reads_kohyas_style(tmp_path: Path) -> None:
    models = {"unet": unet(), "text_encoder": text_encoder()}
    cfg = ll.LoRAConfig(
        r=2, alpha=3, target_names=(r"to_k$", "conv1", "_proj$"), target_kinds=("linear", "conv")
    )
    params = {name: shaken(ll.init(model, cfg)) for name, model in models.items() if name == "unet"}
    params["text_encoder"] = shaken(
        ll.init(models["text_encoder"], ll.LoRAConfig(r=2, alpha=3, target_names="fc1"))
    )
    file, ids = tmp_path / "a.safetensors", torch.tensor([[1, 7, 9, 2]])
    ll.to_diffusion(params, models, file, style="kohya")
    mixin = diffusers.loaders.StableDiffusionLoraLoaderMixin
    theirs, alphas = mixin.lora_state_dict(
        tmp_path, weight_name="a.safetensors", unet_config=models["unet"].config
    )
    model, encoder = unet(), text_encoder()
    mixin.load_lora_into_unet(theirs, alphas, model)
    mixin.load_lora_into_text_encoder(theirs, alphas, encoder)
    close(
        ours(models["unet"], params["unet"], **unet_inputs()), outputs(model, **unet_inputs()), 2e-4
    )
    with torch.no_grad():
        close(
            ll.apply(models["text_encoder"], params["text_encoder"], ids)[0], encoder(ids)[0], 1e-4
        )


def test_diffusers_reads_kohyas_style_of_a_transformer(tmp_path: Path) -> None:
    model = flux()
    params = shaken(
        ll.init(model, ll.LoRAConfig(r=2, alpha=3, target_names=(r"attn\.to_[qkv]$", "add_k_proj")))
    )
    ll.to_diffusion(
        params, model, tmp_path / "a.safetensors", component="transformer", style="kohya"
    )
    theirs = diffusers.loaders.FluxLoraLoaderMixin.lora_state_dict(
        tmp_path, weight_name="a.safetensors"
    )
    for key, t in theirs.items():
        path, _, name = key.removeprefix("transformer.").removesuffix(".weight").rpartition(".")
        expected = params[path][name] * (1.5 if name == "lora_A" else 1.0)
        close(t, expected, 1e-6)
    assert len(theirs) == 2 * len(params)
