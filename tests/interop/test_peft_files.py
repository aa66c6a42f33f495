"""PEFT's files beside PEFT itself: what it saved gives its outputs here; what is written here loads
into it, whole, and gives ours.
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import safetensors.torch
import torch
from helpers import close, moved
from hypothesis import HealthCheck, given, settings
from peft_models import IDS, Mixed, X, base, load_file, loaded, peft, saved
from torch import nn

import lora_lite_func as ll

lora = pytest.importorskip("peft.tuners.lora")
BdLoraConfig, KasaConfig = lora.BdLoraConfig, lora.KasaConfig

# PEFT gives many warnings of its own; tests look for those about keys
pytestmark = pytest.mark.filterwarnings("ignore")

BOTH = ["up", "down"]


def both_ways(config: Any, model: nn.Module, folder: Path, tol: float = 1e-5, **how: Any) -> Any:
    """PEFT -> ours -> PEFT, the same outputs each time."""
    theirs = saved(config, model, folder / "theirs", **how)
    assert (theirs - model(X)).abs().max() > 1e-3
    params = ll.from_peft(folder / "theirs", model)
    close(ll.apply(model, params, X), theirs, tol)
    ll.to_peft(params, model, folder / "ours")
    close(loaded(model, folder / "ours"), theirs, tol)
    return params


CONFIGS = {
    "lora": lambda **k: peft.LoraConfig(r=4, lora_alpha=6, **k),
    "rslora": lambda **k: peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, **k),
    "dora": lambda **k: peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, **k),
    "lora_bias": lambda **k: peft.LoraConfig(r=4, lora_alpha=6, lora_bias=True, **k),
    "adalora": lambda **k: peft.AdaLoraConfig(init_r=4, lora_alpha=6, total_step=10, **k),
    "loha": lambda **k: peft.LoHaConfig(r=3, alpha=5, **k),
    "lokr": lambda **k: peft.LoKrConfig(r=2, alpha=5, **k),
    "lokr_full": lambda **k: peft.LoKrConfig(r=8, alpha=5, **k),
    "lokr_both": lambda **k: peft.LoKrConfig(
        r=1, alpha=5, decompose_both=True, decompose_factor=4, **k
    ),
    "hira": lambda **k: peft.HiraConfig(r=3, **k),
    "gralora": lambda **k: peft.GraloraConfig(r=4, alpha=6, **k),
    "gralora_hybrid": lambda **k: peft.GraloraConfig(r=4, alpha=6, hybrid_r=3, **k),
    "delora": lambda **k: peft.DeloraConfig(r=3, delora_lambda=4, **k),
    "miss": lambda **k: peft.MissConfig(r=5, **k),
    "miss_bat": lambda **k: peft.MissConfig(r=4, init_weights="bat", **k),
    "miss_mini": lambda **k: peft.MissConfig(r=4, mini_r=4, init_weights="mini", **k),
    "c3a": lambda **k: peft.C3AConfig(block_size=4, **k),
    "c3a_pattern": lambda **k: peft.C3AConfig(block_size=8, block_size_pattern={"up": 4}, **k),
    "ia3": lambda **k: peft.IA3Config(feedforward_modules=["down"], **k),
    "road": lambda **k: peft.RoadConfig(variant="road_2", group_size=8, **k),
    "hra": lambda **k: peft.HRAConfig(r=4, **k),
    "oft": lambda **k: peft.OFTConfig(oft_block_size=4, **k),
    "oft_exact": lambda **k: peft.OFTConfig(
        oft_block_size=8, use_cayley_neumann=False, block_share=True, **k
    ),
    "oft_adjusted": lambda **k: peft.OFTConfig(oft_block_size=16, **k),
    "oft_count": lambda **k: peft.OFTConfig(oft_block_size=0, r=4, **k),
    "boft": lambda **k: peft.BOFTConfig(boft_block_size=4, **k),
    "vera": lambda **k: peft.VeraConfig(r=5, **k),
    "randlora": lambda **k: peft.RandLoraConfig(r=5, randlora_alpha=1, **k),
    "fourierft": lambda **k: peft.FourierFTConfig(
        n_frequency=20, scaling=20.0, n_frequency_pattern={"up": 7}, **k
    ),
    "shira": lambda **k: peft.ShiraConfig(r=2, random_seed=1, **k),
    "mica": lambda **k: peft.LoraConfig(r=3, lora_alpha=6, init_lora_weights="mica", **k),
    "kasa": lambda **k: peft.LoraConfig(r=3, lora_alpha=6, kasa_config=KasaConfig(), **k),
    "tinylora": lambda **k: peft.TinyLoraConfig(r=3, u=4, **k),
    "tinylora_drawn": lambda **k: peft.TinyLoraConfig(r=20, u=4, save_projection=False, **k),
    "deft": lambda **k: peft.DeftConfig(r=3, alpha=6, **k),
    "deft_qr": lambda **k: peft.DeftConfig(r=3, alpha=6, decomposition_method="qr", **k),
    "para": lambda **k: peft.DeftConfig(r=3, para=True, **k),
    "psoft": lambda **k: peft.PsoftConfig(r=5, **k),
    "psoft_pissa": lambda **k: peft.PsoftConfig(
        r=5, ab_svd_init="pissa_init", psoft_mag_a=False, **k
    ),
    "peanut": lambda **k: peft.PeanutConfig(r=4, scaling=2.0, **k),
    "peanut_deep": lambda **k: peft.PeanutConfig(r=4, depth=2, act_fn="silu", **k),
    "waveft": lambda **k: peft.WaveFTConfig(
        n_frequency=30, scaling=15.0, n_frequency_pattern={"up": 7}, **k
    ),
    "glora": lambda **k: peft.GloraConfig(r=3, **k),
    "glora_vectors": lambda **k: peft.GloraConfig(
        config_A_B="vector", config_C="vector", config_D_E="vector", **k
    ),
    "glora_parts": lambda **k: peft.GloraConfig(config_A_B="none", config_D_E="none", **k),
    "bdlora": lambda **k: peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_bdlora=BdLoraConfig(
            target_modules_bd_a=["down"], target_modules_bd_b=["up"], nblocks=2
        ),
        **k,
    ),
    "pvera": lambda **k: peft.PveraConfig(r=5, **k),
    "frod": lambda **k: peft.FrodConfig(sparse_rate=0.1, **k),
    "adamss": lambda **k: peft.AdamssConfig(r=6, num_subspaces=3, subspace_rank=2, **k),
    "adamss_dynamic": lambda **k: peft.AdamssConfig(
        r=6, num_subspaces=3, subspace_rank=3, use_dynamic_rank=True, svd_threshold=0.9, **k
    ),
    "osf": lambda **k: peft.OSFConfig(**k),
    "osf_pattern": lambda **k: peft.OSFConfig(effective_rank=0.75, rank_pattern={"up": 5}, **k),
    "supertuning": lambda **k: peft.SupertuningConfig(sparsity=0.9, **k),
    "supertuning_smallest": lambda **k: peft.SupertuningConfig(
        sparsity=0.77, select_top=False, **k
    ),
    "unilora": lambda **k: peft.UniLoraConfig(r=3, theta_d_length=50, save_indices=True, **k),
    "lily": lambda **k: peft.LilyConfig(r=4, num_B=3, scaling=1.5, **k),
    "lily_strided": lambda **k: peft.LilyConfig(r=4, stride_A=2, **k),
    "vblora": lambda **k: peft.VBLoRAConfig(r=3, num_vectors=9, vector_length=8, topk=3, **k),
    "beft": lambda **k: peft.BeftConfig(**k),
    "ln_tuning": lambda **k: peft.LNTuningConfig(target_modules=["norm"]),
    "modules_to_save": lambda **k: peft.LoraConfig(
        r=4, modules_to_save=["head", "layers.1.norm"], **k
    ),
    "miss_to_save": lambda **k: peft.MissConfig(r=4, modules_to_save=["head"], **k),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_both_ways(name: str, tmp_path: Path) -> None:
    both_ways(CONFIGS[name](target_modules=BOTH), base(), tmp_path)


def test_a_module_trained_whole_that_a_file_has_lost_is_missed(tmp_path: Path) -> None:
    model = base()
    saved(CONFIGS["modules_to_save"](target_modules=BOTH), model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    safetensors.torch.save_file(
        {name: t for name, t in load_file(tmp_path).items() if ".head." not in name}, file
    )
    with pytest.raises(
        ll.CheckpointError,
        match=r"modules_to_save names 'head', which is 'head' of the model, and there is no "
        r"tensor of it",
    ):
        ll.from_peft(tmp_path, model)


def _lose(folder: Path, what: str) -> None:
    """A file without its tensors of that name."""
    kept = {name: t for name, t in load_file(folder).items() if what not in name}
    safetensors.torch.save_file(kept, folder / "adapter_model.safetensors")


def test_what_else_a_file_has_lost_is_missed(tmp_path: Path) -> None:
    saved(peft.LoraConfig(r=2, target_modules=BOTH, bias="all"), base(), tmp_path / "bias")
    _lose(tmp_path / "bias", "bias")
    with pytest.raises(
        ll.CheckpointError,
        match=r"bias is 'all', and there is no tensor of a bias, such as that of 'layers\.0\.norm'",
    ):
        ll.from_peft(tmp_path / "bias", base())
    saved(
        peft.LoraConfig(r=2, target_modules=["up"], target_parameters=["layers.1.down.weight"]),
        base(),
        tmp_path / "parameter",
    )
    _lose(tmp_path / "parameter", "layers.1.down")
    with pytest.raises(
        ll.CheckpointError,
        match=r"target_parameters name 'layers.1.down.weight', for which there is no tensor",
    ):
        ll.from_peft(tmp_path / "parameter", base())
    model = nn.Sequential()
    model.add_module("table", nn.Embedding(7, 6))
    model.add_module("up", nn.Linear(6, 6))
    saved(
        peft.LoraConfig(r=2, target_modules=["up"], trainable_token_indices={"table": [1, 3]}),
        model,
        tmp_path / "tokens",
        x=torch.tensor([[1, 3]]),
    )
    _lose(tmp_path / "tokens", "token")
    with pytest.raises(
        ll.CheckpointError,
        match="trainable_token_indices name tokens, and there is no tensor of them",
    ):
        ll.from_peft(tmp_path / "tokens", model)


@pytest.mark.parametrize("value", ["lora", "All", True, ["all"]])
def test_a_bias_that_peft_does_not_know_is_refused(tmp_path: Path, value: Any) -> None:
    saved(peft.LoraConfig(r=2, target_modules=BOTH), base(), tmp_path)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(said | {"bias": value}))
    with pytest.raises(
        ll.CheckpointError, match="bias: expected 'none' or 'all' or 'lora_only', found"
    ):
        ll.from_peft(tmp_path, base())


def in_order(patterns: dict[str, int]) -> dict[str, int]:
    """As the file has them: PEFT sorts the keys of its config, so the first match may be another
    one after loading.
    """
    return dict(sorted(patterns.items()))


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_lora_with_all_that_its_config_can_say(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    draw = data.draw
    paths = ["layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down"]
    pattern = st.sampled_from(
        ["up", "layers.1.up", "^layers.0.down", r"layers\.\d+\.up", "0.up", "down"]
    )
    config: dict[str, Any] = {
        "r": draw(st.integers(1, 5)),
        "lora_alpha": draw(st.integers(1, 20)),
        "use_rslora": draw(st.booleans()),
        "rank_pattern": draw(st.dictionaries(pattern, st.integers(1, 6), max_size=2).map(in_order)),
        "alpha_pattern": draw(
            st.dictionaries(pattern, st.integers(1, 30), max_size=2).map(in_order)
        ),
        "init_lora_weights": draw(st.sampled_from([True, False, "gaussian"])),
        "bias": draw(st.sampled_from(["none", "lora_only", "all"])),
        "lora_dropout": draw(st.sampled_from([0.0, 0.1])),
        "fan_in_fan_out": draw(st.booleans()),
    }
    config["target_modules"] = draw(
        st.sampled_from(
            [
                ["up"],
                BOTH,
                paths[1:],
                r".*\.(up|down)",
                r"layers\.[01]\.up",
                ["layers.0.up", "down"],
            ]
        )
    )
    if isinstance(config["target_modules"], list) and draw(st.booleans()):
        config["layers_to_transform"] = draw(st.sampled_from([0, [1], [0, 1]]))
        config["layers_pattern"] = "layers"
        config["target_modules"] = BOTH
    if draw(st.booleans()):
        config["exclude_modules"] = draw(st.sampled_from([["layers.0.down"], r".*0\.down"]))
    kind = draw(
        st.sampled_from(
            ["lora", "dora", "lora_bias"]
            if config["init_lora_weights"] != "gaussian"
            else ["lora", "dora"]
        )
    )
    config |= {"lora": {}, "dora": {"use_dora": True}, "lora_bias": {"lora_bias": True}}[kind]
    model, folder = base(), tmp_path_factory.mktemp("peft")
    safe = draw(st.booleans())
    theirs = saved(peft.LoraConfig(**config), model, folder / "theirs", safe_serialization=safe)
    assert (
        folder / "theirs" / ("adapter_model.safetensors" if safe else "adapter_model.bin")
    ).exists()
    params = ll.from_peft(folder / "theirs", model)
    close(ll.apply(model, params, X), theirs, 1e-5)
    close(ll.merged(model, params)(X), theirs, 1e-5)
    ll.to_peft(params, model, folder / "ours")
    close(loaded(model, folder / "ours"), theirs, 1e-5)


# ----------------------------------------------------------------------------- other kinds of layer


KINDS = {
    "embedding": {"target_modules": ["embed_tokens"]},
    "embedding_dora": {"target_modules": ["embed_tokens", "back"], "use_dora": True},
    "embedding_dropout": {"target_modules": ["embed_tokens", "back"], "lora_dropout": 0.1},
    "tokens": {"target_modules": ["back"], "trainable_token_indices": {"embed_tokens": [10, 2]}},
    "conv": {"target_modules": ["conv"]},
    "conv_rslora": {"target_modules": ["conv", "back"], "use_rslora": True},
    "conv_dora": {"target_modules": ["conv"], "use_dora": True},
    "transposed": {"target_modules": ["fc"], "fan_in_fan_out": True},
    "transposed_dora": {"target_modules": ["fc", "back"], "fan_in_fan_out": True, "use_dora": True},
    "attention": {"target_modules": ["mha"]},
    "attention_patterns": {
        "target_modules": ["mha", "back"],
        "rank_pattern": {"mha": 2},
        "alpha_pattern": {"^mha": 9},
        "use_rslora": True,
    },
    "attention_bias": {"target_modules": ["mha"], "bias": "lora_only"},
    "experts": {"target_modules": [], "target_parameters": ["experts.gate_up", "experts.down"]},
    "experts_patterns": {
        "target_modules": [],
        "target_parameters": ["experts.gate_up", "experts.down"],
        "rank_pattern": {"experts.down": 2},
    },
    "one_parameter": {"target_modules": ["back"], "target_parameters": ["experts.down"]},
    "stored_transposed": {
        "target_modules": [],
        "target_parameters": ["embed_tokens.weight", "fc.weight", "back.weight"],
    },
    "bias_all": {"target_modules": ["back"], "bias": "all"},
    "bias_all_of_everything": {
        "target_modules": ["back", "mha", "embed_tokens", "conv"],
        "target_parameters": ["experts.down", "experts.gate_up"],
        "bias": "all",
    },
    "bias_dora": {"target_modules": ["back", "conv"], "use_dora": True, "bias": "lora_only"},
    "whole_modules": {
        "target_modules": ["back"],
        "modules_to_save": ["head", "norm", "embed_tokens"],
    },
    "whole_attention": {"target_modules": ["back"], "modules_to_save": ["mha"]},
    "whole_experts": {"target_modules": ["back"], "modules_to_save": ["experts"], "bias": "all"},
    "whole_and_tokens": {
        "target_modules": ["mha"],
        "modules_to_save": ["head"],
        "trainable_token_indices": {"embed_tokens": [1, 3]},
    },
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_layer(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Mixed().eval()
    theirs = saved(
        peft.LoraConfig(r=3, lora_alpha=6, **KINDS[name]), model, tmp_path / "theirs", x=IDS
    )
    assert (theirs - model(IDS)).abs().max() > 1e-3
    params = ll.from_peft(tmp_path / "theirs", model)
    close(ll.apply(model, params, IDS), theirs, 1e-5)
    ll.to_peft(params, model, tmp_path / "ours")
    close(loaded(model, tmp_path / "ours", IDS), theirs, 1e-5)
    close(ll.apply(model, ll.from_peft(tmp_path / "ours", model), IDS), theirs, 1e-5)


# ------------------------------------------------------------------------------ ours, in their form
OURS = {
    "pissa": ll.PiSSAConfig(r=3),
    "olora": ll.OLoRAConfig(r=3),
    "delora": ll.DeLoRAConfig(r=3),
    "lora_patterns": ll.LoRAConfig(
        r=4, rank_pattern={"up": 2}, alpha_pattern={r"^layers\.1\.down$": 3.0}
    ),
    "rslora_patterns": ll.LoRAConfig(r=4, rslora=True, rank_pattern={"0.up": 2}),
    "orthogonal": ll.LoRAConfig(r=4, init_A="orthogonal"),
    "bfloat16": ll.LoRAConfig(r=4, dtype=torch.float32),
    "hira": ll.HiRAConfig(r=2, alpha=5.0),
    "adalora": ll.AdaLoRAConfig(r=4, rank_pattern={"up": 2}),
    "loha": ll.LoHaConfig(r=2),
    "ia3_ff": ll.IA3FFConfig(),
    "boft": ll.BOFTConfig(block_size=4, m=1),
    "vera": ll.VeRAConfig(r=6, target_names=("up",)),
    "lora_xs": ll.LoRAXSConfig(r=4),
    "osf": ll.OSFConfig(kept=0.8),
    "abba": ll.ABBAConfig(r=3),
    "lori": ll.LoRIConfig(r=3),
    "psoft": ll.PSOFTConfig(r=5),
    "peanut": ll.PEANuTConfig(r=4, depth=1),
    "glora": ll.GLoRAConfig(r=3),
    "glora_constants": ll.GLoRAConfig(weight_form="constant", prompt_form="none"),
    "bdlora": ll.BDLoRAConfig(r=4),
    "melora": ll.BDLoRAConfig(r=4, blocks_A=2),
    "qalora": ll.QALoRAConfig(r=4, group_size=4),
    "tinylora": ll.TinyLoRAConfig(r=3, u=5),
    "milora": ll.MiLoRAConfig(r=3),
    "mica": ll.MiCAConfig(r=3),
    "kasa": ll.KaSAConfig(r=3),
    "deft": ll.DEFTConfig(r=3),
    "deft_qr": ll.DEFTConfig(r=3, decomposition="qr"),
    "para": ll.DEFTConfig(r=3, para=True),
    "supertuning": ll.SHiRAConfig(mask="magnitude", fraction=0.07),
    "bitfit": ll.BitFitConfig(),
}


@pytest.mark.parametrize("name", OURS)
def test_what_is_written_loads_into_peft(name: str, tmp_path: Path) -> None:
    model = base()
    params = moved(ll.init(model, OURS[name]))
    ll.to_peft(params, model, tmp_path)
    y = ll.apply(model, params, X)
    close(loaded(model, tmp_path), y, 1e-5)
    close(ll.apply(model, ll.from_peft(tmp_path, model), X), y, 1e-5)


def test_several_parts_and_vera_as_a_lora(tmp_path: Path) -> None:
    model = base()
    up, down = ({"target_names": (n,)} for n in ("up", "down"))
    for parts in (
        (ll.IA3Config(**up), ll.IA3FFConfig(**down)),
        (ll.LoRAConfig(r=2, **up), ll.PiSSAConfig(r=3, **down)),
        (ll.LoRAConfig(r=2), ll.BitFitConfig(**up)),
        (ll.OFTConfig(block_size=4, **up), ll.OFTConfig(block_size=6, **down)),
    ):
        params = tuple(moved(ll.init(model, cfg), seed=i) for i, cfg in enumerate(parts))
        ll.to_peft(params, model, tmp_path)
        close(loaded(model, tmp_path), ll.apply(model, params, X), 1e-5)
    # layers of two shapes have unlike projections
    params = moved(ll.init(model, ll.VeRAConfig(r=6)))
    for as_lora in (False, True):
        ll.to_peft(params, model, tmp_path, as_lora=as_lora)
        close(loaded(model, tmp_path), ll.apply(model, params, X), 1e-5)
        close(ll.apply(model, ll.from_peft(tmp_path, model), X), ll.apply(model, params, X), 1e-5)
    apart = tuple(
        moved(ll.init(model, ll.VeRAConfig(r=r, target_names=(n,))))
        for r, n in ((2, "up"), (5, "down"))
    )
    ll.to_peft(apart, model, tmp_path)
    close(loaded(model, tmp_path), ll.apply(model, apart, X), 1e-5)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_starts_that_peft_takes_out_of_the_base(start: str, tmp_path: Path) -> None:
    model = base()
    theirs = saved(
        peft.LoraConfig(
            r=3, lora_alpha=4, target_modules=BOTH, init_lora_weights=start, use_rslora=True
        ),
        model,
        tmp_path,
    )
    params = ll.from_peft(tmp_path, model)
    close(ll.apply(model, params, X), theirs, 1e-5)
    with pytest.raises(ll.CheckpointError, match="give the base model"):
        ll.from_peft(tmp_path)


# ----------------------------------------------------------------------------------------- refusals
def changed(folder: Path, **fields: Any) -> Path:
    """The folder with other fields in its config."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return folder


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "NOVEL"}, "peft_type 'NOVEL' isn't read here"),
        ({"peft_type": "XLORA"}, r"an X-LoRA is more than an adapter; read it with ll.xlora_from"),
        ({"peft_type": 3}, "peft_type: expected a string"),
        ({"alora_invocation_tokens": ["1"]}, "alora_invocation_tokens: expected a list of token"),
        ({"layer_replication": [[0, 1]]}, "'layer_replication'"),
        ({"a_new_field": 1}, "'a_new_field' is 1"),
        ({"init_lora_weights": "corda"}, "init_lora_weights='corda' changes the base"),
        ({"r": 5}, "has rank 3, its config says another"),
        ({"lora_alpha": "x"}, "lora_alpha: expected a finite number"),
        ({"lora_alpha": 1e300}, "lora_alpha: expected a finite number"),
        ({"lora_dropout": 2.0}, "expected a probability"),
        ({"rank_pattern": [1]}, "rank_pattern: expected an object"),
        ({"alpha_pattern": {"(a+)+$": 3}}, "could take too long to match"),
        ({"alpha_pattern": {"(": 3}}, "could take too long|isn't a regular expression"),
        ({"target_modules": ["up"]}, "which its target_modules don't name"),
        ({"target_modules": ["up", "down", "head"]}, "'head', for which there is no tensor"),
        ({"target_modules": 3}, "target_modules: expected a list of names"),
        ({"use_dora": True}, "there is no lora_magnitude_vector"),
        ({"use_dora": "yes"}, "use_dora: expected true or false"),
        ({"layers_to_transform": [7]}, "which its target_modules don't name"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_what_can_not_be_honoured_is_refused_by_name(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = base()
    saved(peft.LoraConfig(r=3, target_modules=BOTH), model, tmp_path)
    with pytest.raises(ll.CheckpointError, match=message):
        ll.from_peft(changed(tmp_path, **fields), model)


def test_what_is_no_folder_of_an_adapter(tmp_path: Path) -> None:
    model = base()
    saved(peft.LoraConfig(r=3, target_modules=BOTH), model, tmp_path / "it")
    for name in ("someone/adapter", tmp_path / "its"):
        with pytest.raises(
            ll.CheckpointError, match=r"no such folder; what is on a hub is downloaded first"
        ):
            ll.from_peft(name, model)
    # the path may be that of the folder's other file
    assert ll.from_peft(tmp_path / "it" / "adapter_config.json", model).config.r == 3
    tensors = {
        key: t
        for key, t in load_file(tmp_path / "it").items()
        if key != "base_model.model.layers.0.up.lora_A.weight"
    }
    with pytest.raises(ll.CheckpointError, match=r"'layers.0.up': expected a pair"):
        ll.from_peft(tensors, config=tmp_path / "it" / "adapter_config.json")


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"]
)
def test_a_pipe_is_not_waited_for(name: str, tmp_path: Path) -> None:
    saved(peft.LoraConfig(r=3, target_modules=BOTH), base(), tmp_path)
    if name.startswith("adapter_model"):
        (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(ll.CheckpointError, match=rf"{name}: expected a file, found a pipe"):
        ll.from_peft(tmp_path)


def test_other_ways_to_give_it(tmp_path: Path) -> None:
    model = base()
    config = peft.LoraConfig(r=3, target_modules=BOTH)
    made = peft.get_peft_model(copy.deepcopy(model), config).eval()
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "lora_B" in name:
                p += 0.1
    # these keys have the adapter's name in them
    raw = {k: t for k, t in made.state_dict().items() if "lora_" in k}
    for state in (raw, peft.get_peft_model_state_dict(made)):
        close(ll.apply(model, ll.from_peft(state, model, config=config), X), made(X), 1e-5)
        close(ll.apply(model, ll.from_peft(state, config=config.to_dict()), X), made(X), 1e-5)
    made.save_pretrained(tmp_path)
    close(ll.apply(model, ll.from_peft(tmp_path / "adapter_model.safetensors"), X), made(X), 1e-5)
    with pytest.raises(ll.CheckpointError, match="give its config too"):
        ll.from_peft(raw, model)
    changed(tmp_path, a_new_field=1)
    close(ll.apply(model, ll.from_peft(tmp_path, ignore="a_new_field"), X), made(X), 1e-5)


# -------------------------------------------------------------------------- properties, all methods
@st.composite
def any_config(draw: st.DrawFn) -> Any:
    """A method of PEFT with options of its own, on layers of its choice."""
    rank, alpha, flag = st.integers(1, 6), st.integers(1, 20), st.booleans()
    ranks = st.dictionaries(st.sampled_from(["up", "layers.1.down"]), rank, max_size=2).map(
        in_order
    )
    alphas = st.dictionaries(st.sampled_from(["up", "layers.1.down"]), alpha, max_size=2).map(
        in_order
    )
    divisor = st.sampled_from([2, 4, 8])
    options: dict[Any, dict[str, Any]] = {
        peft.LoHaConfig: {
            "r": rank,
            "alpha": alpha,
            "rank_pattern": ranks,
            "alpha_pattern": alphas,
        },
        peft.LoKrConfig: {
            "r": rank,
            "alpha": alpha,
            "rank_pattern": ranks,
            "alpha_pattern": alphas,
            "decompose_both": flag,
            "decompose_factor": st.sampled_from([-1, 2, 4]),
        },
        peft.HiraConfig: {"r": rank, "rank_pattern": ranks},
        peft.DeloraConfig: {"r": rank, "rank_pattern": ranks, "delora_lambda": alpha},
        peft.AdaLoraConfig: {"init_r": rank, "lora_alpha": alpha, "total_step": st.just(9)},
        peft.GraloraConfig: {
            "r": st.sampled_from([4, 8]),
            "alpha": alpha,
            "gralora_k": st.sampled_from([2, 4]),
            "hybrid_r": st.integers(0, 3),
        },
        peft.MissConfig: {"r": rank},
        peft.C3AConfig: {"block_size": divisor},
        peft.OFTConfig: {
            "oft_block_size": st.integers(2, 9),
            "use_cayley_neumann": flag,
            "block_share": flag,
        },
        peft.BOFTConfig: {"boft_block_size": divisor},
        peft.HRAConfig: {"r": st.sampled_from([2, 4, 6])},
        peft.RoadConfig: {
            "variant": st.sampled_from(["road_1", "road_2", "road_4"]),
            "group_size": divisor,
        },
        peft.VeraConfig: {"r": rank},
        peft.RandLoraConfig: {"r": rank, "randlora_alpha": st.just(1)},
        peft.FourierFTConfig: {
            "n_frequency": st.integers(1, 40),
            "scaling": alpha,
            "random_loc_seed": st.integers(0, 99),
        },
        peft.ShiraConfig: {"r": st.integers(1, 3), "random_seed": st.integers(0, 99)},
    }
    cls = draw(st.sampled_from(list(options)))
    where = draw(
        st.sampled_from(
            [BOTH, ["up"], ["layers.0.down", "layers.1.up"], r".*layers\.[01]\.(up|down)"]
        )
    )
    return cls(
        target_modules=where, **{name: draw(strategy) for name, strategy in options[cls].items()}
    )


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(config=any_config(), bias=st.booleans(), half=st.booleans())
def test_any_method_both_ways(
    config: Any, bias: bool, half: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model, folder = base(bias), tmp_path_factory.mktemp("peft")
    theirs = saved(config, model, folder / "theirs")
    params = ll.from_peft(folder / "theirs", model)
    close(ll.apply(model, params, X), theirs, 1e-5)
    ll.to_peft(params, model, folder / "ours")
    close(loaded(model, folder / "ours"), theirs, 1e-5)
    if half:
        tensors = {
            k: t.to(torch.bfloat16) if t.is_floating_point() else t
            for k, t in load_file(folder / "theirs").items()
        }
        rounded = ll.from_peft(tensors, model, config=folder / "theirs" / "adapter_config.json")
        ll.to_peft(rounded, model, folder / "half")
        close(loaded(model, folder / "half"), ll.apply(model, rounded, X), 2e-2)
