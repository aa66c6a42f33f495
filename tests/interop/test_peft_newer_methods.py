"""What PEFT's files of newer methods ask for beyond both ways: settings, sharing, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import close, moved
from peft_models import X, base, loaded, peft, saved
from torch import nn

import lora_lite_func as ll

KasaConfig = pytest.importorskip("peft.tuners.lora").KasaConfig

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


@pytest.mark.parametrize("tying", [0.25, 0.5, 1.0])
def test_tied_tinylora_is_read_untied_by_request(tying: float, tmp_path: Path) -> None:
    """Its outputs are the same; trained on, its vectors would go their own ways."""
    config = peft.TinyLoraConfig(r=3, u=4, weight_tying=tying, target_modules=BOTH)
    theirs = saved(config, base(), tmp_path)
    with pytest.raises(ll.CheckpointError, match=r"'weight_tying' is .* ignore=.'weight_tying',"):
        ll.from_peft(tmp_path, base())
    params = ll.from_peft(tmp_path, base(), ignore="weight_tying")
    close(ll.apply(base(), params, X), theirs, 1e-5)


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
    saved(peft.TinyLoraConfig(r=2, u=3, target_modules=BOTH), base(), tmp_path)
    with pytest.raises(ll.CheckpointError, match="give the base model too"):
        ll.from_peft(tmp_path)
    params = ll.init(base(), ll.TinyLoRAConfig(r=2, u=3))
    with pytest.raises(ll.CheckpointError, match="in the order of the model's modules"):
        ll.to_peft(params, None, tmp_path)
    ll.to_peft(params, base(), tmp_path, as_lora=True)  # a plain LoRA says its modules by name
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


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"lora_dropout": 0.1}, r"lora_dropout with kasa_config isn't read; .*ignore="),
        ({"use_dora": True}, "use_dora with kasa_config isn't read"),
    ],
)
def test_what_kasa_is_not_read_with(fields: dict[str, Any], match: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=3, kasa_config=KasaConfig(), target_modules=BOTH)
    theirs = saved(config, base(), tmp_path)
    with pytest.raises(ll.CheckpointError, match=match):
        ll.from_peft(changed(tmp_path, **fields), base())
    if "lora_dropout" in fields:
        params = ll.from_peft(tmp_path, base(), ignore="lora_dropout")
        close(ll.apply(base(), params, X), theirs, 1e-5)
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
