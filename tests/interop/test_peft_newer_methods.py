"""What PEFT's files of newer methods ask for beyond both ways: settings, sharing, refusals."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers import close, moved, net
from peft_models import Experts, X, base, load_file, loaded, peft, saved
from torch import nn

import lora_lite_func as ll
from lora_lite_func.core.adapter import replace

lora = pytest.importorskip("peft.tuners.lora")
BdLoraConfig, KasaConfig = lora.BdLoraConfig, lora.KasaConfig

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own, of which there are many

BOTH = ["up", "down"]


def changed(folder: Path, **fields: Any) -> Path:
    """The folder with other fields in its config."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    return folder


def test_supra_is_entries_and_a_lora(tmp_path: Path) -> None:
    for alpha, scale in ((None, 2.0), (9.0, 3.0)):
        config = peft.SupertuningConfig(sparsity=0.9, r=3, lora_alpha=alpha, target_modules=BOTH)
        theirs = saved(config, base(), tmp_path)
        params = ll.from_peft(tmp_path, base())
        assert [type(p.config) for p in params] == [ll.SHiRAConfig, ll.LoRAConfig]
        assert params[1].sites["layers.0.up"].scaling == scale
        close(ll.apply(base(), params, X), theirs, 1e-5)


def test_supertuning_without_its_indices_is_refused(tmp_path: Path) -> None:
    """Entries of one size can be in any order, in which PEFT finds them again only by luck."""
    config = peft.SupertuningConfig(save_precomputed_indices=False, target_modules=BOTH)
    saved(config, base(), tmp_path)
    with pytest.raises(ll.CheckpointError, match="save it in PEFT with save_precomputed_indices"):
        ll.from_peft(tmp_path, base())


@pytest.mark.parametrize("tying", [0.25, 0.5, 0.75, 1.0])
def test_tied_tinylora_goes_both_ways(tying: float, tmp_path: Path) -> None:
    config = peft.TinyLoraConfig(r=3, u=4, weight_tying=tying, target_modules=BOTH)
    theirs = saved(config, base(), tmp_path / "theirs")
    params = ll.from_peft(tmp_path / "theirs", base())
    close(ll.apply(base(), params, X), theirs, 1e-5)
    ours = ll.init(base(), ll.TinyLoRAConfig(r=3, u=4, tying=tying))
    assert ours.layout.shared == params.layout.shared
    assert ll.num_params(ours) == ll.num_params(params) < 4 * 4
    ll.to_peft(params, base(), tmp_path / "ours")
    close(loaded(base(), tmp_path / "ours"), theirs, 1e-5)


def test_vectors_that_peft_would_tie_otherwise_are_refused(tmp_path: Path) -> None:
    parts = [
        moved(ll.init(base(), ll.TinyLoRAConfig(r=3, u=4, tying=1.0, target_names=name)), seed)
        for seed, name in enumerate(("up", "down$"))
    ]
    with pytest.raises(ll.UnsupportedError, match="has one vector for this layer and one before"):
        ll.to_peft(tuple(parts), base(), tmp_path)
    ll.to_peft(tuple(parts), base(), tmp_path, as_lora=True)
    close(loaded(base(), tmp_path), ll.apply(base(), tuple(parts), X), 1e-5)


def test_tinylora_of_embeddings_and_more_than_ten_layers(tmp_path: Path) -> None:
    """Its vectors are numbered in the model's order, which isn't that of their names."""
    model = nn.Sequential(nn.Embedding(7, 8), *(nn.Linear(8, 8) for _ in range(12)))
    names = [str(i) for i in range(13)]
    ids = torch.tensor([[1, 3, 6]])
    for save in (True, False):
        config = peft.TinyLoraConfig(r=2, u=3, save_projection=save, target_modules=names)
        theirs = saved(config, model, tmp_path / "theirs", x=ids)
        params = ll.from_peft(tmp_path / "theirs", model)
        close(ll.apply(model, params, ids), theirs, 1e-5)
        ll.to_peft(params, model, tmp_path / "ours")
        close(loaded(model, tmp_path / "ours", ids), theirs, 1e-5)


def test_what_tinylora_needs_the_model_for(tmp_path: Path) -> None:
    saved(peft.TinyLoraConfig(r=2, u=3, target_modules=BOTH), base(), tmp_path / "theirs")
    with pytest.raises(ll.CheckpointError, match="give the base model too"):
        ll.from_peft(tmp_path / "theirs")
    params = ll.init(base(), ll.TinyLoRAConfig(r=2, u=3))
    with pytest.raises(ll.CheckpointError, match="in the order of the model's modules"):
        ll.to_peft(params, None, tmp_path)
    ll.to_peft(params, base(), tmp_path, as_lora=True)  # a plain LoRA says its modules by name
    tensors = load_file(tmp_path / "theirs")
    del tensors["base_model.model.layers.0.up.tinylora_P"]
    safetensors.torch.save_file(tensors, tmp_path / "theirs" / "adapter_model.safetensors")
    with pytest.raises(ll.CheckpointError, match=r"'layers\.0\.up' has no tinylora_P"):
        ll.from_peft(tmp_path / "theirs", base())  # not drawn, for the file says that it is there
    several = ll.init(base(), ll.TinyLoRAConfig(r=2, u=3, rank_pattern={"up": 3}))
    with pytest.raises(ll.UnsupportedError, match="one TinyLoRA file has one r, found 2 beside 3"):
        ll.to_peft(several, base(), tmp_path)


def test_mica_keeps_its_frozen_factor(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=3, init_lora_weights="mica", target_modules=BOTH)
    saved(config, base(), tmp_path / "theirs")
    params = ll.from_peft(tmp_path / "theirs", base())
    assert isinstance(params.config, ll.MiCAConfig)
    ll.to_peft(params, base(), tmp_path / "ours")
    assert isinstance(ll.from_peft(tmp_path / "ours", base()).config, ll.MiCAConfig)


def test_qalora_is_read_by_its_shape(tmp_path: Path) -> None:
    """PEFT multiplies the groups' means by their number. On layers that aren't GPTQ's it leaves
    use_qalora out of account without a word, so its factors are whole there.
    """
    config = peft.LoraConfig(r=3, lora_alpha=6, use_qalora=True, target_modules=BOTH)
    theirs = saved(config, base(), tmp_path)
    plain = ll.from_peft(tmp_path, base())
    assert isinstance(plain.config, ll.LoRAConfig)
    close(ll.apply(base(), plain, X), theirs, 1e-5)
    with pytest.raises(ll.CheckpointError, match="whether its factors are whole is told by the"):
        ll.from_peft(tmp_path)
    gen = torch.Generator().manual_seed(0)
    A, B = torch.randn(3, 4, generator=gen), torch.randn(24, 3, generator=gen)
    home = "base_model.model.layers.0.up."
    held = {f"{home}lora_A.weight": A, f"{home}lora_B.weight": B}
    fields = {"use_qalora": True, "qalora_group_size": 4, "target_modules": r".*layers\.0\.up"}
    params = ll.from_peft(held, base(), config=config.to_dict() | fields)
    x = torch.randn(5, 16, generator=gen)
    means = torch.nn.functional.avg_pool1d(x, 4)
    expected = 2.0 * (16 / 4) * means @ A.mT @ B.mT
    layer = base().layers[0].up
    update = ll.merge(base(), params)["layers.0.up.weight"] - layer.weight
    close(x @ update.mT, expected, 1e-5)


def test_bdlora_is_read_by_its_shape_and_written_where_names_tell_its_sides(
    tmp_path: Path,
) -> None:
    blocks = BdLoraConfig(target_modules_bd_a=["down"], nblocks=4, match_strict=False)
    config = peft.LoraConfig(r=4, use_bdlora=blocks, target_modules=BOTH)
    theirs = saved(config, base(), tmp_path)
    parts = ll.from_peft(tmp_path, base())
    assert {type(p.config) for p in parts} == {ll.LoRAConfig, ll.BDLoRAConfig}
    close(ll.apply(base(), parts, X), theirs, 1e-5)
    with pytest.raises(ll.CheckpointError, match="give the base model too"):
        ll.from_peft(tmp_path)
    up = moved(ll.init(base(), ll.BDLoRAConfig(r=4, target_names="up")))
    down = moved(ll.init(base(), ll.BDLoRAConfig(r=4, blocks_A=2, blocks_B=1, target_names="down")))
    ll.to_peft((up, down), base(), tmp_path)
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    assert said["use_bdlora"] == {
        "target_modules_bd_a": ["down"],
        "target_modules_bd_b": ["up"],
        "nblocks": 2,
        "match_strict": True,
    }
    close(loaded(base(), tmp_path), ll.apply(base(), (up, down), X), 1e-5)
    plain = moved(ll.init(base(), ll.LoRAConfig(target_names="down")))
    ll.to_peft((up, plain), base(), tmp_path)
    assert "use_bdlora" not in json.loads((tmp_path / "adapter_config.json").read_text())
    close(loaded(base(), tmp_path), ll.apply(base(), (up, plain), X), 1e-5)


LOW_RANK = {
    "lora_xs": ll.LoRAXSConfig(r=4),
    "tinylora": ll.TinyLoRAConfig(r=3, u=5),
    "kasa": ll.KaSAConfig(r=3),
    "psoft": ll.PSOFTConfig(r=4),
    "bdlora": ll.BDLoRAConfig(r=4),
    "qalora": ll.QALoRAConfig(r=4, group_size=4),
    "lori": ll.LoRIConfig(r=3),
}


@pytest.mark.parametrize("name", LOW_RANK)
def test_a_pair_of_factors_is_a_lora_wherever_one_is_written(name: str, tmp_path: Path) -> None:
    params = moved(ll.init(base(), LOW_RANK[name]))
    ll.to_peft(params, base(), tmp_path / "peft", as_lora=True)
    plain = ll.from_peft(tmp_path / "peft")
    assert isinstance(plain.config, ll.LoRAConfig)
    close(ll.apply(base(), plain, X), ll.apply(base(), params, X), 1e-5)
    file = tmp_path / "kohya.safetensors"
    ll.to_diffusion(params, base(), file, component="unet", style="kohya")
    again = ll.from_diffusion(file, base(), component="unet")
    close(ll.apply(base(), again, X), ll.apply(base(), params, X), 1e-5)


def test_methods_with_factors_share_a_file(tmp_path: Path) -> None:
    parts = (
        moved(ll.init(base(), ll.PSOFTConfig(r=4, target_names="up"))),
        moved(ll.init(base(), ll.MiLoRAConfig(r=2, target_names="down"))),
    )
    ll.to_peft(parts, base(), tmp_path)
    close(loaded(base(), tmp_path), ll.apply(base(), parts, X), 1e-5)


def test_psoft_goes_by_the_directions_of_this_base(tmp_path: Path) -> None:
    saved(peft.PsoftConfig(r=3, target_modules=BOTH), base(), tmp_path / "theirs")
    params = ll.from_peft(tmp_path / "theirs", base())
    with pytest.raises(ll.CheckpointError, match="give the base"):
        ll.from_peft(tmp_path / "theirs")
    # a decomposition elsewhere may turn a pair of directions around
    held = params["layers.0.up"]
    turn = torch.tensor([1.0, -1.0, 1.0])
    rows, columns = torch.triu_indices(3, 3, 1)
    turned = {
        "lora_U": held["lora_U"] * turn,
        "lora_Vh": held["lora_Vh"] * turn[:, None],
        "lora_q": held["lora_q"] * turn[rows] * turn[columns],
    }
    other = replace(params, {**params, "layers.0.up": {**held, **turned}})
    close(ll.apply(base(), other, X), ll.apply(base(), params, X), 1e-6)
    ll.to_peft(other, base(), tmp_path / "ours")
    close(loaded(base(), tmp_path / "ours"), ll.apply(base(), params, X), 1e-5)
    with pytest.raises(ll.UnsupportedError, match="directions aren't those of this one's"):
        ll.to_peft(params, net(seed=5, dtype=torch.float32), tmp_path / "ours")
    flat = base()
    with torch.no_grad():
        flat.layers[0].up.weight.copy_(torch.eye(24, 16))
    with pytest.raises(ll.CheckpointError, match="equal but for rounding"):
        ll.from_peft(tmp_path / "theirs", flat)


@pytest.mark.parametrize(
    ("config", "fields", "match"),
    [
        ("PsoftConfig", {"psoft_orth": False}, "psoft_orth: expected true, found False"),
        ("PsoftConfig", {"psoft_svd": "lowrank"}, "psoft_svd: expected 'full'"),
        ("PsoftConfig", {"use_cayley_neumann": True}, "'use_cayley_neumann' is True"),
        ("PsoftConfig", {"ab_svd_init": "other"}, "ab_svd_init: expected 'psoft_init' or"),
        ("WaveFTConfig", {"wavelet_family": "db4"}, "wavelet_family: expected 'db1', Haar's"),
        ("WaveFTConfig", {"use_idwt": False}, "use_idwt: expected true, found False"),
        ("PeanutConfig", {"act_fn": "mish"}, "PEANuTConfig.activation: expected one of 'relu'"),
        ("PeanutConfig", {"depth": 1}, r"lacks the tensor 'peanut_encoders\.0\.weight'"),
        ("GloraConfig", {"config_A_B": "vector"}, "differing: 'lora_A_"),
        ("DeftConfig", {"decomposition_method": "svd"}, "decomposition_method: expected 'relu' or"),
    ],
)
def test_what_a_file_cannot_mean_here_is_refused(
    config: str, fields: dict[str, Any], match: str, tmp_path: Path
) -> None:
    sizes = {"n_frequency": 9} if config == "WaveFTConfig" else {"r": 3}
    saved(getattr(peft, config)(target_modules=BOTH, **sizes), base(), tmp_path)
    with pytest.raises(ll.CheckpointError, match=match):
        ll.from_peft(changed(tmp_path, **fields), base())


@pytest.mark.parametrize(
    ("cfg", "match"),
    [
        (ll.WaveFTConfig(n_frequency=9, dropout=0.1), "PEFT's WaveFT drops no inputs"),
        (ll.WaveFTConfig(n_frequency=9, alpha=0.0), "a WaveFT of alpha=0 has no coefficients"),
        (ll.WaveFTConfig(n_frequency=9), "PEFT draws WaveFT's places from its own seed"),
        (ll.PEANuTConfig(r=2, rank_pattern={"up": 3}), r"one PEANuT file has one r, .* \[2, 3\]"),
        (ll.MoRAConfig(), "PEFT has no one form for mora"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, ll.AdapterConfig) else "",
)
def test_what_peft_has_no_form_for_is_refused(
    cfg: ll.AdapterConfig, match: str, tmp_path: Path
) -> None:
    with pytest.raises(ll.UnsupportedError, match=match):
        ll.to_peft(ll.init(base(), cfg), base(), tmp_path)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"lora_dropout": 0.1}, r"lora_dropout with kasa_config isn't read; .*ignore="),
        ({"use_dora": True}, "use_dora with kasa_config isn't read"),
    ],
)
def test_what_kasa_is_not_read_with(fields: dict[str, Any], match: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=3, kasa_config=KasaConfig(gamma=0.5), target_modules=BOTH)
    theirs = saved(config, base(), tmp_path)
    with pytest.raises(ll.CheckpointError, match=match):
        ll.from_peft(changed(tmp_path, **fields), base())
    if "lora_dropout" in fields:
        params = ll.from_peft(tmp_path, base(), ignore="lora_dropout")
        close(ll.apply(base(), params, X), theirs, 1e-5)
        assert (params.config.beta, params.config.gamma) == (1e-4, 0.5)
    changed(tmp_path, lora_dropout=0.0, use_dora=False)
    with pytest.raises(ll.CheckpointError, match="give the base model too"):
        ll.from_peft(tmp_path)  # its directions are the base's


def test_deft_at_another_strength_or_with_dropout_has_no_form(tmp_path: Path) -> None:
    params = moved(ll.init(base(), ll.DEFTConfig(r=3)))
    with pytest.raises(ll.UnsupportedError, match=r"PEFT's DEFT has no strength, found 0\.5"):
        ll.to_peft(ll.scale(params, 0.5), base(), tmp_path)
    with pytest.raises(ll.CheckpointError, match="depends on the base weight; give the base"):
        ll.to_peft(params, None, tmp_path)
    saved(peft.DeftConfig(r=3, deft_dropout=0.1, target_modules=BOTH), base(), tmp_path)
    with pytest.raises(ll.CheckpointError, match=r"'deft_dropout' is 0\.1"):
        ll.from_peft(tmp_path, base())


def test_unilora_without_its_indices_is_refused(tmp_path: Path) -> None:
    """PEFT draws them again, with numpy and of all targets' sizes."""
    saved(peft.UniLoraConfig(r=3, target_modules=BOTH), base(), tmp_path)
    with pytest.raises(ll.CheckpointError, match="save it in PEFT with save_indices=True"):
        ll.from_peft(tmp_path, base())


@pytest.mark.parametrize("h", [9, 300])
def test_vblora_of_chosen_vectors_alone(h: int, tmp_path: Path) -> None:
    """PEFT can't train such a file on; here the chosen vectors are."""
    config = peft.VBLoRAConfig(
        r=3, num_vectors=h, vector_length=8, save_only_topk_weights=True, target_modules=BOTH
    )
    theirs = saved(config, base(), tmp_path)
    params = ll.from_peft(tmp_path, base())
    close(ll.apply(base(), params, X), theirs, 1e-5)
    grads = ll.grad(lambda p: ll.apply(base(), p, X).square().sum())(params)
    logits = grads["layers.0.up", "lora_logits_A"]
    assert ((logits != 0).sum(-1) == 2).all()


SHARING = {
    "vblora": ll.VBLoRAConfig(r=3, num_vectors=9, vector_length=8),
    "unilora": ll.UniLoRAConfig(r=3, length=50, exact_start=False),
}


@pytest.mark.parametrize("name", SHARING)
def test_our_own_of_what_layers_share(name: str, tmp_path: Path) -> None:
    params = moved(ll.init(base(), SHARING[name]))
    ll.to_peft(params, base(), tmp_path / "a")
    said = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert said["peft_type"] == name.upper()
    close(loaded(base(), tmp_path / "a"), ll.apply(base(), params, X), 1e-5)
    for other in (
        ll.scale(params, 0.5),
        ll.init(base(), dataclasses.replace(SHARING[name], exact_start=True)),
    ):
        ll.to_peft(other, base(), tmp_path / "b")  # the plain LoRA that it is
        said = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
        assert said["peft_type"] == "LORA"
        close(loaded(base(), tmp_path / "b"), ll.apply(base(), other, X), 1e-5)


def noisy(size: float) -> nn.Module:
    """The base with noise on its weights."""
    model, gen = base(), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p += size * torch.randn(p.shape, generator=gen)
    return model


def test_adamss_is_read_on_its_own_base_alone(tmp_path: Path) -> None:
    """PEFT clusters anew as it loads, and says nothing where the clusters are others."""
    config = peft.AdamssConfig(r=6, num_subspaces=3, target_modules=BOTH)
    theirs = saved(config, base(), tmp_path)
    other = noisy(0.1)
    close(loaded(base(), tmp_path), theirs, 1e-5)
    with pytest.raises(ll.CheckpointError, match="doesn't hold its clusters, which follow from"):
        ll.from_peft(tmp_path, other)
    with pytest.raises(ll.CheckpointError, match="give the base model too"):
        ll.from_peft(tmp_path)
    params = ll.from_peft(tmp_path, base())
    assert [type(p.config) for p in params] == [ll.AdaMSSConfig, ll.BitFitConfig]
    ll.to_peft(params[0], base(), tmp_path / "lora")
    assert type(ll.from_peft(tmp_path / "lora", base()).config) is ll.LoRAConfig


def test_frod_needs_its_basis_and_is_written_where_peft_finds_the_same(tmp_path: Path) -> None:
    settings = {"sparse_rate": 0.1, "target_modules": BOTH}
    saved(peft.FrodConfig(save_projection=False, **settings), base(), tmp_path / "theirs")
    with pytest.raises(ll.CheckpointError, match="save it in PEFT with save_projection=True"):
        ll.from_peft(tmp_path / "theirs", base())
    params = moved(ll.init(base(), ll.FRoDConfig(sparse_rate=0.1)))
    ll.to_peft(params, base(), tmp_path / "ours")
    close(loaded(base(), tmp_path / "ours"), ll.apply(base(), params, X), 1e-4)
    with pytest.raises(ll.UnsupportedError, match="finds another basis than this adapter's"):
        ll.to_peft(params, noisy(0.1), tmp_path / "other")
    half = ll.init(base(), ll.FRoDConfig(sparse_rate=0.1, layers=(0,)))
    both = moved(ll.init(base(), ll.FRoDConfig(sparse_rate=0.1, layers=(1,))))
    with pytest.raises(ll.UnsupportedError, match="finds another basis"):
        ll.to_peft((half, both), base(), tmp_path / "halves")


def test_pvera_of_unlike_shapes_is_no_one_file(tmp_path: Path) -> None:
    params = moved(ll.init(base(), ll.PVeRAConfig(r=4)))
    with pytest.raises(
        ll.UnsupportedError, match=r"differ by shape; write a folder for each shape"
    ):
        ll.to_peft(params, base(), tmp_path)
    ll.to_peft(params, base(), tmp_path, as_lora=True)
    close(loaded(base(), tmp_path), ll.apply(base().eval(), params, X), 1e-5)


def test_pvera_draws_at_inference_as_peft_does(tmp_path: Path) -> None:
    layer, x = nn.Sequential(nn.Linear(16, 8)), X[:1].expand(20_000, -1)
    config = peft.PveraConfig(r=4, sample_at_inference=True, target_modules=["0"])
    theirs = saved(config, layer, tmp_path / "theirs", x=x)
    params = ll.from_peft(tmp_path / "theirs", layer)
    torch.manual_seed(0)
    ours = ll.apply(layer.eval(), params, x)
    close(ours.mean(0), theirs.mean(0), 0.03)
    close(ours.std(0) / theirs.std(0), torch.ones(8), 0.05)
    ll.to_peft(params, layer, tmp_path / "ours")
    close(loaded(layer, tmp_path / "ours", x).std(0) / theirs.std(0), torch.ones(8), 0.05)


def test_what_training_adds_to_a_lora_is_left_out_of_it(tmp_path: Path) -> None:
    """Outside of training they are the plain LoRA that they are read as, and written as."""
    for more, ours in (
        ({"monteclora_config": lora.MontecloraConfig(buffer_size=1)}, ll.MonteCLoRAConfig(r=3)),
        ({"velora_config": lora.VeloraConfig(num_groups=4)}, ll.VeLoRAConfig(r=3)),
    ):
        config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=BOTH, **more)
        theirs = saved(config, base(), tmp_path / "theirs")
        params = ll.from_peft(tmp_path / "theirs", base())
        assert type(params.config) is ll.LoRAConfig
        close(ll.apply(base(), params, X), theirs, 1e-5)
        own = moved(ll.init(base(), ours))
        ll.to_peft(own, base(), tmp_path / "ours")
        close(loaded(base(), tmp_path / "ours"), ll.apply(base(), own, X), 1e-5)


@pytest.mark.parametrize(
    "config",
    [ll.DEFTConfig(r=3), ll.PSOFTConfig(r=4), ll.FRoDConfig(), ll.DoRAConfig(r=2)],
    ids=lambda c: type(c).__name__,
)
def test_a_bound_model_is_a_base_as_its_own_base_is(
    config: ll.AdapterConfig, tmp_path: Path
) -> None:
    model = base()
    params = moved(ll.init(model, config))
    ll.to_peft(params, model, tmp_path / "base")
    ll.to_peft(params, ll.bind(model, params), tmp_path / "bound")
    expected, found = load_file(tmp_path / "base"), load_file(tmp_path / "bound")
    assert all(torch.equal(t, expected[key]) for key, t in found.items())


def test_frod_of_layers_that_peft_takes_for_one(tmp_path: Path) -> None:
    stacks = {f"{name}.layers": nn.ModuleList([nn.Linear(6, 6)]) for name in ("encode", "decode")}
    model = nn.Module()
    for name, layers in stacks.items():
        home = nn.Module()
        home.layers = nn.ModuleList(nn.ModuleDict({"fc": layer}) for layer in layers)
        model.add_module(name.partition(".")[0], home)
    params = ll.init(model, ll.FRoDConfig())
    with pytest.raises(
        ll.UnsupportedError, match=r"'encode\.layers\.0\.fc': PEFT takes another layer"
    ):
        ll.to_peft(params, model, tmp_path)


def test_factors_of_stacked_experts_of_any_method(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"experts": Experts()})
    x = torch.randn(2, 3, 8)
    for config in (ll.DeLoRAConfig, ll.KaSAConfig, ll.OSFConfig, ll.AdaMSSConfig):
        cfg = config(r=2, target_parameters=(r"gate_up$", r"down$"))
        params = moved(ll.init(model, cfg), size=0.1)
        ll.to_peft(params, model, tmp_path / config.__name__)
        made = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / config.__name__)
        expected = ll.merged(model, params)["experts"](x)
        close(made.eval().base_model.model["experts"](x), expected, 1e-4)
        summed = ll.merged(model, ll.add(params))["experts"](x)
        close(summed, expected, 1e-4)
