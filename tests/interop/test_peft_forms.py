"""What PEFT's configs can ask of a method: read right, or refused with a way out."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import close, normal
from peft_models import peft, saved
from torch import Tensor, nn

import lora_lite_func as ll

pytestmark = pytest.mark.filterwarnings("ignore:::peft", "ignore:::torch", "ignore:::transformers")


class Convs(nn.Module):
    """Convolutions of two and of one dimension, whose channels have several divisors."""

    def __init__(self) -> None:
        super().__init__()
        self.two = nn.Conv2d(6, 12, 3, padding=1)
        self.point = nn.Conv2d(12, 6, 1)
        self.one = nn.Conv1d(6, 8, 3)
        self.narrow = nn.Conv1d(8, 12, 1)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.point(torch.tanh(self.two(x))).flatten(2)
        return self.head(torch.tanh(self.narrow(self.one(h))).mean(-1))


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.head = nn.Embedding(10, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.e(x))


def linears() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8)).eval()


X = normal(3, 12, seed=1, dtype=torch.float32)
PICTURES = normal(2, 6, 5, 5, seed=1, dtype=torch.float32)
IDS = torch.arange(10)[None]
LYCORIS = {
    "full": {"r": 8},
    "low": {"r": 1},
    "both": {"r": 1, "decompose_both": True},
    "effective": {"r": 1, "use_effective_conv2d": True},
    "factor": {"r": 2, "decompose_factor": 4},
}
TWO = ["two", "point", "head"]


def read(config: Any, model: nn.Module, folder: Path, x: Tensor, **how: Any) -> Any:
    """PEFT's file, whose outputs here are PEFT's."""
    torch.manual_seed(0)
    theirs = saved(config, model, folder, x=x)
    params = ll.from_peft(folder, model, **how)
    close(ll.apply(model, params, x), theirs, 1e-5)
    close(ll.merged(model, params)(x), theirs, 1e-5)
    return params


@pytest.mark.parametrize("name", LYCORIS)
def test_lokr_of_convolutions(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Convs().eval()
    config = peft.LoKrConfig(target_modules=TWO, init_weights=False, **LYCORIS[name])
    params = read(config, model, tmp_path / "two", PICTURES)
    with pytest.raises(ll.UnsupportedError, match="PEFT"):
        ll.to_peft(params, model, tmp_path / "ours")
    config = peft.LoKrConfig(target_modules=["one", "narrow"], init_weights=False, **LYCORIS[name])
    if name == "effective":
        return  # PEFT itself fails on these
    if LYCORIS[name]["r"] == 1:
        read(config, model, tmp_path / "one", PICTURES)
        return
    saved(config, model, tmp_path / "one", x=PICTURES)
    with pytest.raises(ll.CheckpointError, match="'one': PEFT's LoKr of this convolution isn't"):
        ll.from_peft(tmp_path / "one", model)
    config = peft.LoKrConfig(target_modules=["narrow"], init_weights=False, **LYCORIS[name])
    read(config, model, tmp_path / "narrow", PICTURES)


@pytest.mark.parametrize("effective", [False, True])
def test_loha_of_convolutions(effective: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Convs().eval()
    config = peft.LoHaConfig(
        r=3,
        target_modules=[*TWO, "one", "narrow"],
        init_weights=False,
        use_effective_conv2d=effective,
    )
    params = read(config, model, tmp_path, PICTURES)
    ll.to_peft(params, model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    close(again(PICTURES), ll.apply(model, params, PICTURES), 1e-5)


@pytest.mark.parametrize("cayley", [False, True])
@pytest.mark.parametrize("share", [False, True])
def test_oft_of_a_table(cayley: bool, share: bool, tmp_path: Path) -> None:
    model = Table().eval()
    config = peft.OFTConfig(
        target_modules=["e", "head"],
        oft_block_size=4,
        use_cayley_neumann=cayley,
        block_share=share,
    )
    params = read(config, model, tmp_path, IDS)
    assert sorted(params) == ["e.weight", "head"]
    tied = Table()
    tied.head = nn.Linear(8, 10, bias=False)
    tied.head.weight = tied.e.weight
    saved(peft.OFTConfig(target_modules=["e"], oft_block_size=4), tied, tmp_path / "tied", x=IDS)
    with pytest.raises(ll.CheckpointError, match=r"changes 'e.weight', which is 'head.weight' too"):
        ll.from_peft(tmp_path / "tied", tied)


def test_randlora_of_a_rank_above_a_dimension(tmp_path: Path) -> None:
    config = peft.RandLoraConfig(target_modules=["0", "2"])  # r = 32
    params = read(config, linears(), tmp_path, X)
    ll.to_peft(params, linears(), tmp_path / "ours")


# ----------------------------------------------------------------------------------------- starts
def starts() -> dict[str, dict[str, Any]]:
    from peft.tuners.lora import config

    return {
        "mica": {"init_lora_weights": "mica"},
        "MiCA": {"init_lora_weights": "MiCA"},
        "OLoRA": {"init_lora_weights": "OLoRA"},
        "velora": {"velora_config": config.VeloraConfig(num_groups=2)},
        "monteclora": {"monteclora_config": config.MontecloraConfig(num_samples=2)},
    }


@pytest.mark.parametrize("name", ["mica", "MiCA", "OLoRA", "velora", "monteclora"])
def test_starts_and_trainings_that_leave_a_plain_lora(name: str, tmp_path: Path) -> None:
    if not hasattr(peft.tuners.lora.config, "MontecloraConfig"):
        pytest.skip("this PEFT has not all of them")
    read(peft.LoraConfig(r=4, target_modules=["0"], **starts()[name]), linears(), tmp_path, X)


DROPOUTS = {
    "loha": lambda: peft.LoHaConfig(
        r=2, rank_dropout=0.1, module_dropout=0.1, target_modules=["0"]
    ),
    "lokr": lambda: peft.LoKrConfig(
        r=2, rank_dropout=0.1, module_dropout=0.1, rank_dropout_scale=True, target_modules=["0"]
    ),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, module_dropout=0.1, target_modules=["0"]),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, boft_dropout=0.1, target_modules=["0"]),
    "delora": lambda: peft.DeloraConfig(r=2, module_dropout=0.1, target_modules=["0"]),
    "hira": lambda: peft.HiraConfig(r=2, hira_dropout=0.1, target_modules=["0"]),
}


@pytest.mark.parametrize("name", DROPOUTS)
def test_dropouts_of_training_alone_are_nothing_to_outputs(name: str, tmp_path: Path) -> None:
    read(DROPOUTS[name](), linears(), tmp_path, X)


UNREAD = {
    "apply_GS": lambda: peft.HRAConfig(
        r=2, apply_GS=True, init_weights=False, target_modules=["0"]
    ),
    "layer_replication": lambda: peft.LoraConfig(r=2, target_modules=["0"]),
}


@pytest.mark.parametrize("name", UNREAD)
def test_what_outputs_depend_on_is_never_ignored(name: str, tmp_path: Path) -> None:
    model = linears()
    peft.get_peft_model(copy.deepcopy(model), UNREAD[name]()).save_pretrained(tmp_path)
    if name == "layer_replication":  # PEFT replicates layers of language models alone
        file = tmp_path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {name: [[0, 1]]}))
    for ignore in ((), (name,)):
        with pytest.raises(
            ll.CheckpointError, match=rf"'{name}' is .*outputs depend.*merge_and_unload"
        ) as error:
            ll.from_peft(tmp_path, model, ignore=ignore)
        assert "ignore=" not in str(error.value)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("ignore", [(), ("coft",)])
def test_cofts_bound_is_met_whatever_is_stored(
    share: bool, ignore: tuple[str, ...], tmp_path: Path
) -> None:
    config = peft.OFTConfig(
        oft_block_size=4, coft=True, eps=0.2, block_share=share, target_modules=["0"]
    )
    model = linears()
    made = peft.get_peft_model(copy.deepcopy(model), config).eval()
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in made.parameters():
            if p.requires_grad:
                p += torch.randn(p.shape, generator=gen) * 0.3
    made.save_pretrained(tmp_path)  # as after a step: PEFT shortens the blocks in the next call
    with torch.no_grad():
        expected = made(X)
    params = ll.from_peft(tmp_path, model, ignore=ignore)
    assert isinstance(params, ll.Adapter)
    assert params.config.coft_eps == 0.2  # type: ignore[attr-defined]
    close(ll.apply(model, params, X), expected, 1e-5)
    assert (expected - model(X)).abs().max() > 1e-3


@pytest.mark.parametrize(
    "pattern", [r"(?!.*\.2$).*", r".*\.(?:0)", r"^(?!net\.0).*$", r"(.*.*)*x|.*.*.*.*.*.*z"]
)
def test_modules_left_out_by_a_pattern(pattern: str, tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("net", linears())
    config = peft.LoraConfig(r=2, target_modules=["0", "2"], exclude_modules=pattern)
    read(config, model, tmp_path, X)


# ------------------------------------------------------------------------------ parameters, memory
def test_a_transposed_weight_named_in_target_parameters(tmp_path: Path) -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(16, 12), nn.Tanh(), Conv1D(8, 16))
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["0.weight", "2.weight"])
    params = read(config, model, tmp_path, X)
    with pytest.raises(
        ll.StructureError, match=r"site '0.weight': expected 12 -> 16, found Linear"
    ):
        ll.apply(linears(), params, X)


def test_a_state_dict_shares_no_memory_with_the_live_model() -> None:
    made = peft.get_peft_model(linears(), peft.LoraConfig(r=2, target_modules=["0"]))
    live = peft.get_peft_model_state_dict(made)
    params = ll.from_peft(live, linears(), config=made.peft_config["default"])
    before = params["0"]["lora_A"].clone()
    with torch.no_grad():
        for t in live.values():
            t.zero_()
    assert torch.equal(params["0"]["lora_A"], before)


def test_a_model_with_pefts_layers_is_no_base(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = linears()
    config = peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"])
    theirs = saved(config, model, tmp_path, x=X)
    made = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    close(made(X), theirs, 1e-6)
    params = ll.init(model, ll.LoRAConfig(r=2))
    for base in (made, made.base_model, made.get_base_model()):
        for act in (
            lambda base=base: ll.init(base, ll.LoRAConfig(r=2)),
            lambda base=base: ll.from_peft(tmp_path, base),
            lambda base=base: ll.apply(base, params, X),
            lambda base=base: ll.bind(base, params),
        ):
            with pytest.raises(
                ll.UnsupportedError, match=r"\(\w+\) is PEFT's, .*unload.*ll.from_peft\(folder"
            ):
                act()
    bare = made.unload()
    close(ll.apply(bare, ll.from_peft(tmp_path, bare), X), theirs, 1e-5)


# ------------------------------------------------------------------------------ running statistics
class Normed(nn.Module):
    """A convolution, a batch norm, a norm with statistics alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)
        self.bare, self.head = nn.BatchNorm2d(4, affine=False), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bare(torch.relu(self.norm(self.conv(x)))).mean((2, 3)))


def test_a_batch_norm_that_was_trained_beside(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Normed().eval()
    config = peft.LoraConfig(
        r=2,
        target_modules=["conv"],
        modules_to_save=["norm", "bare", "head"],
        init_lora_weights=False,
    )
    made = peft.get_peft_model(copy.deepcopy(model), config)
    for _ in range(4):
        made.train()(PICTURES)  # moves the copies' statistics
    right = made.eval()(PICTURES)
    made.save_pretrained(tmp_path)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    params = ll.from_peft(tmp_path, model)
    close(ll.apply(model, params, PICTURES), right, 1e-5)
    close(ll.bind(model, params)(PICTURES), right, 1e-5)
    dense = ll.merged(model, params)
    close(dense(PICTURES), right, 1e-5)
    assert dense.norm.num_batches_tracked == 4
    assert dense.norm.num_batches_tracked.dtype == torch.int64
    ll.to_peft(params, model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
    close(again(PICTURES), right, 1e-5)
    assert again.base_model.model.norm.modules_to_save["default"].num_batches_tracked == 4
    ll.save(params, tmp_path / "file")
    close(ll.apply(model, ll.load(tmp_path / "file", model), PICTURES), right, 1e-5)
    before = [t.clone() for a in params for held in a.values() for t in held.values()]
    ll.apply(model.train(), params, PICTURES)  # batch statistics; nothing is written
    after = [t for a in params for held in a.values() for t in held.values()]
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
