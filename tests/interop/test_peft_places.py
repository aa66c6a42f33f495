"""PEFT's files of other layers than linear ones: convolutions, attention, parameters, whole
modules, learned biases, replaced rows.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from helpers import close, moved
from hypothesis import HealthCheck, given, settings
from peft_models import IDS, Mixed, base, load_file, loaded, saved
from torch import Tensor, nn

import lora_lite_func as ll

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")


def mixed() -> Mixed:
    """One layer of every kind."""
    torch.manual_seed(0)
    return Mixed().eval()


def both_ways(config: Any, model: nn.Module, folder: Path, x: Tensor) -> Any:
    """PEFT -> ours -> PEFT -> ours, the same outputs each time."""
    theirs = saved(config, model, folder / "theirs", x=x)
    assert (theirs - model(x)).abs().max() > 1e-3
    params = ll.from_peft(folder / "theirs", model)
    close(ll.apply(model, params, x), theirs, 1e-5)
    close(ll.merged(model, params)(x), theirs, 1e-5)
    written(params, model, folder / "ours", x)
    return params


def written(params: Any, model: nn.Module, folder: Path, x: Tensor) -> None:
    """Ours -> PEFT, and back."""
    ll.to_peft(params, model, folder)
    expected = ll.apply(model, params, x)
    close(loaded(model, folder, x), expected, 1e-5)
    close(ll.apply(model, ll.from_peft(folder, model), x), expected, 1e-5)


class Convs(nn.Module):
    """A convolution of 1, 2 or 3 dimensions, one of a single place, a head."""

    def __init__(self, dims: int, **how: Any) -> None:
        super().__init__()
        kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.conv, self.point = kind(4, 6, 3, padding=1, **how), kind(6, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.point(torch.tanh(self.conv(x))).flatten(2).mT)


CONVS: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "lora": (lambda **k: peft.LoraConfig(r=3, **k), (1, 2, 3)),
    "dora": (lambda **k: peft.LoraConfig(r=3, use_dora=True, **k), (1, 2, 3)),
    "loha": (lambda **k: peft.LoHaConfig(r=2, **k), (1, 2)),
    "hira": (lambda **k: peft.HiraConfig(r=2, **k), (1, 2, 3)),
    "adalora": (lambda **k: peft.AdaLoraConfig(init_r=2, total_step=9, **k), (2,)),
    "ia3": (lambda **k: peft.IA3Config(feedforward_modules=[], **k), (2, 3)),
    "ia3_ff": (lambda **k: peft.IA3Config(feedforward_modules=["conv"], **k), (2, 3)),
    "boft": (lambda **k: peft.BOFTConfig(boft_block_size=2, **k), (2,)),
    "hra": (lambda **k: peft.HRAConfig(r=2, **k), (2,)),
}


@pytest.mark.parametrize(
    ("name", "dims"), [(name, d) for name, (_, dims) in CONVS.items() for d in dims]
)
def test_convolutions(name: str, dims: int, tmp_path: Path) -> None:
    torch.manual_seed(dims)
    model, x = Convs(dims).eval(), torch.randn(2, 4, *[5] * dims)
    # PEFT's own layer fails on a kernel with one entry
    layers = ["conv", "head"] if (name, dims) == ("hira", 3) else ["conv", "point", "head"]
    both_ways(CONVS[name][0](target_modules=layers), model, tmp_path, x)


def test_dropout_that_convolutions_can_not_have_is_left_out_where_asked(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Convs(2).eval(), torch.randn(2, 4, 5, 5)
    saved(
        peft.LoraConfig(r=2, lora_dropout=0.1, target_modules=["conv", "head"]),
        model,
        tmp_path,
        x=x,
    )
    wet, dry = (ll.from_peft(tmp_path, model, ignore=ignore) for ignore in ((), "lora_dropout"))
    assert isinstance(wet, ll.Adapter)
    assert isinstance(dry, ll.Adapter)
    assert (wet.config.dropout, dry.config.dropout) == (0.1, 0.0)
    close(ll.apply(model, wet, x), ll.apply(model, dry, x), 1e-12)
    with pytest.raises(ll.UnsupportedError, match="'conv': dropout acts on features"):
        ll.apply(model.train(), wet, x)
    assert ll.apply(model, dry, x).requires_grad is False
    with pytest.raises(
        ll.CheckpointError,
        match="ignore: the adapter's outputs depend on 'lora_alpha'; dropout alone may be left out",
    ):
        ll.from_peft(tmp_path, model, ignore=("lora_alpha",))


def test_a_rotation_of_a_convolution(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Convs(2).eval(), torch.randn(2, 4, 5, 5)
    both_ways(
        peft.OFTConfig(oft_block_size=2, target_modules=["point", "head"]), model, tmp_path, x
    )
    saved(peft.OFTConfig(oft_block_size=2, target_modules=["conv"]), model, tmp_path, x=x)
    with pytest.raises(ll.CheckpointError, match="'conv': PEFT's OFT adds up the patches"):
        ll.from_peft(tmp_path, model)


def test_trainable_tokens_alone(tmp_path: Path) -> None:
    model = mixed()
    params = both_ways(
        peft.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[10, 2, 5]),
        model,
        tmp_path,
        IDS,
    )
    assert params.config.token_ids == (2, 5, 10)
    assert (tmp_path / "ours" / "adapter_config.json").read_text().count("TRAINABLE_TOKENS") == 1


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_leaves_embeddings_alone(start: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens", "back"], init_lora_weights=start)
    both_ways(config, mixed(), tmp_path, IDS)


def test_replaced_rows_and_a_head_that_shares_the_table(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Padded(tied=True).eval()  # of which PEFT changes the embedding alone
    tokens = peft.TrainableTokensConfig(target_modules=["e"], token_indices=[1, 3])
    params = both_ways(tokens, model, tmp_path / "plain", ALL)
    assert list(params) == ["e"]
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=20, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    gpt = transformers.GPT2LMHeadModel(config).eval()  # of which it changes the head as well
    made = peft.get_peft_model(
        copy.deepcopy(gpt),
        peft.LoraConfig(r=2, target_modules=["c_attn"], trainable_token_indices=[3, 7]),
    ).eval()
    with torch.no_grad():
        for p in made.parameters():
            p += 0.1 * p.requires_grad
    made.save_pretrained(tmp_path / "gpt")
    both = ll.from_peft(tmp_path / "gpt", gpt)
    close(ll.apply(gpt, both, ALL).logits, made(ALL).logits, 1e-5)
    ll.to_peft(both, gpt, tmp_path / "back")
    close(
        peft.PeftModel.from_pretrained(copy.deepcopy(gpt), tmp_path / "back").eval()(ALL).logits,
        made(ALL).logits,
        1e-5,
    )


# --------------------------------------------------------------------------------------- properties
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_lora_of_any_layers(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    draw = data.draw
    config: dict[str, Any] = {
        "r": draw(st.integers(1, 4)),
        "lora_alpha": draw(st.integers(1, 9)),
        "use_rslora": draw(st.booleans()),
    }
    modules = draw(st.sets(st.sampled_from(["embed_tokens", "conv", "fc", "back", "mha", "head"])))
    parameters = draw(
        st.sets(st.sampled_from(["experts.gate_up", "experts.down"]), min_size=0 if modules else 1)
    )
    # PEFT doesn't take these together
    modules -= {"fc"} if parameters or "mha" in modules else set()
    free = sorted({"norm", "head", "conv", "mha", "fc"} - modules)
    whole = draw(st.sets(st.sampled_from(free), max_size=2))
    config |= {"target_modules": sorted(modules), "modules_to_save": sorted(whole) or None}
    config |= {
        "bias": draw(st.sampled_from(["none", "lora_only", "all"])),
        "target_parameters": sorted(parameters) or None,
    }
    pattern = st.dictionaries(
        st.sampled_from(["mha", "conv", "experts.down", "back"]), st.integers(1, 4), max_size=2
    )
    config |= {
        "rank_pattern": dict(sorted(draw(pattern).items())),
        "alpha_pattern": dict(sorted(draw(pattern).items())),
    }
    if "embed_tokens" not in modules and draw(st.booleans()):
        config["trainable_token_indices"] = {
            "embed_tokens": sorted(draw(st.sets(st.integers(0, 10), min_size=1)))
        }
    if not parameters and "mha" not in modules:
        config["use_dora"] = draw(st.booleans())
    both_ways(peft.LoraConfig(**config), mixed(), tmp_path_factory.mktemp("peft"), IDS)


PLACES: dict[str, dict[str, Any]] = {
    "in": {"target_names": (), "target_parameters": ("mha.in_proj_weight",)},
    "out": {"target_names": (r"mha\.out_proj$",)},
    "both": {"target_names": (r"mha\.out_proj$",), "target_parameters": ("mha.in_proj_weight",)},
    "gate": {"target_names": (), "target_parameters": ("experts.gate_up",)},
    "down": {"target_names": (), "target_parameters": ("experts.down",)},
    "conv": {"target_kinds": ("conv",)},
    "table": {"target_kinds": ("embedding",)},
    "linear": {"target_names": ("back", "fc")},
}
METHODS = (ll.LoRAConfig, ll.PiSSAConfig)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_ours_on_any_layers(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    draw, model = data.draw, mixed()
    places = draw(st.lists(st.sampled_from(sorted(PLACES)), min_size=1, max_size=4, unique=True))
    if "both" in places:
        places = [p for p in places if p not in ("in", "out")]
    if "linear" in places and {"gate", "down", "in", "out", "both"} & set(places):
        places.remove("linear")  # these PEFT doesn't take together
    parts = []
    for i, place in enumerate(places):
        config = draw(st.sampled_from(METHODS))(
            r=draw(st.integers(1, 4)), alpha=float(draw(st.integers(1, 9))), **PLACES[place]
        )
        parts.append(moved(ll.init(model, config), seed=i))
    if draw(st.booleans()):
        where = draw(st.sampled_from([("back",), ("back", "head"), (r"mha\.out_proj$",)]))
        biased = [n for n in where if n != "head"]
        parts.append(moved(ll.init(model, ll.BitFitConfig(target_names=tuple(biased))), seed=7))
    if draw(st.booleans()):
        parts.append(
            moved(
                ll.init(model, ll.FullConfig(target_parameters=("norm.weight", "head.weight"))),
                seed=8,
            )
        )
    if "table" not in places and draw(st.booleans()):
        parts.append(moved(ll.init(model, ll.TokensConfig(token_ids=(3, 5))), seed=9))
    params = parts[0] if len(parts) == 1 else tuple(parts)
    written(params, model, tmp_path_factory.mktemp("peft"), IDS)


BIASED = [
    *(
        ll.DoRAConfig(r=2),
        ll.AdaLoRAConfig(r=2),
        ll.DeLoRAConfig(r=2, init="zero_B"),
        ll.MiSSConfig(r=2),
        ll.C3AConfig(block_size=4),
    ),
    *(
        ll.HRAConfig(r=2),
        ll.OFTConfig(block_size=4),
        ll.BOFTConfig(block_size=4, m=1),
        ll.VeRAConfig(r=2, target_names=("up",)),
    ),
    ll.DEFTConfig(r=2),
    *(ll.GraLoRAConfig(r=4, k=2), ll.RandLoRAConfig(r=4, target_names=("up",)), ll.LoRAConfig(r=2)),
]


@pytest.mark.parametrize("config", BIASED, ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("where", [("up",), ("down", "head")], ids=str)
def test_a_learned_bias_beside_any_method_that_has_it(
    config: ll.AdapterConfig, where: tuple[str, ...], tmp_path: Path
) -> None:
    model = base()
    shift = ll.BitFitConfig(target_names=where, exclude_names=())
    x = torch.randn(3, 16)
    written(
        (moved(ll.init(model, config)), moved(ll.init(model, shift), seed=2)), model, tmp_path, x
    )


@pytest.mark.parametrize("form", ["vector", "constant", "none"])
@pytest.mark.parametrize("bias", ["all", "glora_only"])
def test_a_learned_bias_that_glora_multiplies(form: str, bias: str, tmp_path: Path) -> None:
    model, x = base(), torch.randn(3, 16)
    config = peft.GloraConfig(
        r=2, config_D_E=form, bias=bias, target_modules=["up"], init_weights=False
    )
    right = saved(config, model, tmp_path, x=x)
    params = ll.from_peft(tmp_path, model)
    close(ll.apply(model, params, x), right, 1e-5)
    ll.to_peft(params, model, tmp_path / "ours")
    close(loaded(model, tmp_path / "ours", x), right, 1e-5)


# ----------------------------------------------------------------------------------------- refusals
class Padded(nn.Module):
    """An embedding with a padding row, tied to a head or not."""

    def __init__(self, zero: bool = True, tied: bool = False) -> None:
        super().__init__()
        self.e = nn.Embedding(7, 6, padding_idx=0)
        self.head = nn.Linear(6, 7)
        if not zero:
            nn.init.normal_(self.e.weight)
        if tied:
            self.head.weight = self.e.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.e(x))


ALL = torch.arange(7)[None]
ROWS = {
    "lora": (
        lambda: peft.LoraConfig(r=2, target_modules=["e"]),
        ll.LoRAConfig(r=2, target_kinds=("embedding",)),
    ),
    "hira": (
        lambda: peft.HiraConfig(r=2, target_modules=["e"]),
        ll.HiRAConfig(r=2, target_kinds=("embedding",)),
    ),
    "tokens": (
        lambda: peft.TrainableTokensConfig(target_modules=["e"], token_indices=[0, 3]),
        ll.TokensConfig(token_ids=(0, 3)),
    ),
    "dora": (
        lambda: peft.LoraConfig(r=2, use_dora=True, target_modules=["e"]),
        ll.DoRAConfig(r=2, target_kinds=("embedding",)),
    ),
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("zero", [True, False])
def test_a_padding_row_moves_with_its_table_alone(name: str, zero: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Padded(zero).eval()
    theirs = saved(ROWS[name][0](), model, tmp_path / "theirs", x=ALL)
    read = ll.from_peft(tmp_path / "theirs", model)
    stays = name == "hira" and zero
    assert list(read) == (["e"] if stays else ["e.weight"])
    close(ll.apply(model, read, ALL), theirs, 1e-5)
    close(ll.merged(model, read)(ALL), theirs, 1e-5)
    tied = Padded(zero, tied=True).eval()  # of which PEFT changes the embedding alone
    saved(ROWS[name][0](), tied, tmp_path / "tied", x=ALL)
    if not stays:
        with pytest.raises(ll.CheckpointError, match="'e': changes the row of id 0, padding"):
            ll.from_peft(tmp_path / "tied", tied)
    params = moved(ll.init(model, ROWS[name][1]))
    if name == "dora":
        with pytest.raises(ll.UnsupportedError, match="'e': PEFT's DoRA changes the padding row 0"):
            ll.to_peft(params, model, tmp_path / "ours")
    else:
        written(params, model, tmp_path / "ours", ALL)


def test_attention_beside_transposed_layers(tmp_path: Path) -> None:
    model = mixed()
    saved(peft.LoraConfig(r=2, target_modules=["fc", "mha"]), model, tmp_path / "theirs", x=IDS)
    with pytest.raises(
        ll.CheckpointError,
        match=r"stored transposed .'fc'., PEFT turns the update of attention's out_proj around",
    ):
        ll.from_peft(tmp_path / "theirs", model)
    params = ll.init(model, ll.LoRAConfig(r=2, target_names=("fc", r"mha\.out_proj$")))
    with pytest.raises(
        ll.UnsupportedError,
        match="'fc' is stored transposed, beside which PEFT takes no parameters",
    ):
        ll.to_peft(params, model, tmp_path / "ours")


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "bool": lambda t: t.to(torch.bool),
    "complex": lambda t: t.to(torch.complex64),
    "int": lambda t: t.to(torch.int64),
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
    "scalar": lambda t: t.flatten()[0],
    "none": lambda t: t[:0],
    "more": lambda t: t[None],
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_tensor_is_refused_in_every_place(wrong: str, tmp_path: Path) -> None:
    model = mixed()
    where: dict[str, Any] = {
        "target_modules": ["back", "mha", "conv"],
        "trainable_token_indices": {"embed_tokens": [2, 3]},
    }
    config = peft.LoraConfig(
        r=2, bias="all", modules_to_save=["head"], target_parameters=["experts.down"], **where
    )
    saved(config, model, tmp_path / "lora", x=IDS)
    saved(peft.LNTuningConfig(target_modules=["norm"]), model, tmp_path / "norm", x=IDS)
    for folder in (tmp_path / "lora", tmp_path / "norm"):
        tensors = load_file(folder)
        for key, t in tensors.items():
            with pytest.raises(
                ll.LoraLiteError,
                match=r"expected|found|don't fit|config says another|has no|make a module|is empty",
            ):
                ll.from_peft(
                    {**tensors, key: WRONG[wrong](t)}, model, config=folder / "adapter_config.json"
                )


def test_two_adapters_of_one_module_and_tensors_that_make_none(tmp_path: Path) -> None:
    model = base()
    saved(
        peft.IA3Config(target_modules=["up"], feedforward_modules=[]),
        model,
        tmp_path / "ia3",
        x=torch.randn(2, 16),
    )
    tensors, config = load_file(tmp_path / "ia3"), tmp_path / "ia3" / "adapter_config.json"
    key = "base_model.model.layers.0.up.ia3_l"
    with pytest.raises(ll.CheckpointError, match=r"tensors of two adapters for 'layers.0.up'"):
        ll.from_peft(
            {**tensors, key.replace(".up", ".up.base_layer"): tensors[key]}, model, config=config
        )
    saved(peft.HRAConfig(r=2, target_modules=["up"]), model, tmp_path / "hra", x=torch.randn(2, 16))
    tensors, config = load_file(tmp_path / "hra"), tmp_path / "hra" / "adapter_config.json"
    key = "base_model.model.layers.0.up.hra_u"
    with pytest.raises(
        ll.CheckpointError, match=r"'layers.0.up': .'hra_u': .32,.. don't make a module of HRA"
    ):
        ll.from_peft({**tensors, key: tensors[key].flatten()}, model, config=config)


def test_what_peft_can_not_hold_is_refused_by_name(tmp_path: Path) -> None:
    model = mixed()

    def refused(
        message: str,
        *configs: ll.AdapterConfig,
        on: nn.Module = model,
        kind: type[Exception] = ll.UnsupportedError,
    ) -> None:
        parts = [ll.init(on, c) for c in configs]
        with pytest.raises(kind, match=message):
            ll.to_peft(tuple(parts), on, tmp_path / "none")
        assert not (tmp_path / "none").exists()

    out = {"target_names": (r"mha\.out_proj$",)}
    experts: dict[str, Any] = {"target_names": (), "target_parameters": ("experts.down",)}
    linear, full = (
        ll.LoRAConfig(r=2, target_names=("back",)),
        {"target_names": (), "target_parameters": ("experts.down",)},
    )
    refused(
        r"'mha.out_proj': of PEFT's methods LoRA alone adapts attention", ll.HRAConfig(r=2, **out)
    )
    refused(r"'mha.out_proj': PEFT has no DoRA of attention", ll.DoRAConfig(r=2, **out))
    refused(
        r"'experts.down': PEFT has no DoRA of attention or of a parameter",
        ll.DoRAConfig(r=2, **experts),
    )
    refused(
        r"'experts.down': PEFT's LOHA adapts linear, conv1d, conv2d, this is parameter",
        ll.LoHaConfig(r=2, **experts),
    )
    refused(
        r"'conv': PEFT's GRALORA adapts linear, this is conv1d",
        ll.GraLoRAConfig(r=4, target_names=("conv",), target_kinds=("conv",)),
    )
    refused(
        r"'back' and its parameter 'back.weight'",
        linear,
        ll.LoRAConfig(r=2, target_names=(), target_parameters=("back.weight",)),
    )
    refused(
        r"'experts.down' has an adapter and is in a module",
        ll.LoRAConfig(r=2, **experts),
        ll.FullConfig(**full),
    )
    refused(
        r"'back': PEFT's IA3 has no learned biases",
        ll.IA3Config(target_names=("fc",)),
        ll.BitFitConfig(target_names=("back",)),
    )
    refused(
        r"'fc' is in a module that is kept whole",
        linear,
        ll.BitFitConfig(target_names=("fc",)),
        ll.FullConfig(target_parameters=("fc.weight",)),
    )
    refused(
        r"'embed_tokens': PEFT replaces rows beside a LoRA alone",
        ll.HRAConfig(r=2, target_names=("back",)),
        ll.TokensConfig(token_ids=(1,)),
    )
    refused(
        r"'head': PEFT keeps no whole modules beside",
        ll.TokensConfig(token_ids=(1,)),
        ll.FullConfig(target_parameters=("head.weight",)),
    )
    tied = Padded(tied=True)
    tied.config = SimpleNamespace(tie_word_embeddings=True)
    tied.get_input_embeddings = lambda: tied.e
    refused(r"'e': PEFT would replace rows of 'head' too", ll.TokensConfig(token_ids=(1,)), on=tied)
    refused(
        r"'e.weight' is 'head.weight' too",
        ll.LoRAConfig(r=2, target_names=(), target_parameters=("e.weight",)),
        on=Padded(tied=True),
    )
    refused(r"'': PEFT adapts what is inside a model", ll.LoRAConfig(r=2), on=nn.Linear(3, 4))
    refused(
        r"'': PEFT's keys|PEFT adapts what is inside",
        ll.LoRAConfig(r=2, target_names=(), target_parameters=("weight",)),
        on=nn.Linear(3, 4),
    )
    with pytest.raises(
        ll.CheckpointError, match=r"'experts.down': PEFT's keys count the parameters"
    ):
        ll.to_peft(ll.init(model, ll.LoRAConfig(r=2, **experts)), None, tmp_path / "none")
    unlike = moved(
        ll.init(Convs(2).eval(), ll.IA3FFConfig(target_names=("^conv$",), target_kinds=("conv",)))
    )
    with pytest.raises(
        ll.UnsupportedError, match="'conv': PEFT's IA3 has one gate per input channel"
    ):
        ll.to_peft(unlike, Convs(2), tmp_path / "none")


class Headed(nn.Module):
    """A table and a head that PEFT knows by name, the head with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens, self.lm_head = nn.Embedding(11, 8), nn.Linear(8, 11)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.embed_tokens(ids))


def test_the_base_layers_that_a_file_has_copies_of_are_known_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Headed().eval()
    theirs = saved(
        peft.LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"]), model, tmp_path, x=IDS
    )
    assert {key.rpartition(".")[2] for key in load_file(tmp_path) if ".base_layer." in key} == {
        "weight",
        "bias",
    }
    close(ll.apply(model, ll.from_peft(tmp_path, model), IDS), theirs, 1e-5)
    other = copy.deepcopy(model)
    with torch.no_grad():  # as after a resize: PEFT loads the file's copies in place of these
        for p in other.parameters():
            p += torch.randn_like(p)
    close(ll.apply(other, ll.from_peft(tmp_path, other), IDS), theirs, 1e-5)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(other), tmp_path).eval()
    close(again(IDS), theirs, 1e-5)
    with pytest.raises(ll.CheckpointError, match=r"'\w+.base_layer.weight'.*give the base model"):
        ll.from_peft(tmp_path)


FULL_HEAD = ll.FullConfig(target_parameters=("head.weight",))
TIED = {
    "target_parameters": {"target_modules": ["back"], "target_parameters": ["head.weight"]},
    "pissa": {"target_modules": ["head"], "init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("name", TIED)
def test_what_peft_replaces_in_one_of_two_places_that_share_it_is_refused(
    name: str, tmp_path: Path
) -> None:
    model = mixed()
    theirs = saved(peft.LoraConfig(r=3, **TIED[name]), model, tmp_path, x=IDS)
    close(ll.apply(model, ll.from_peft(tmp_path, model), IDS), theirs, 1e-5)
    model.head.weight = model.embed_tokens.weight
    with pytest.raises(
        ll.CheckpointError,
        match=r"'(head|embed_tokens)\.weight', which is '(embed_tokens|head)\.weight' too.*untie "
        r"them",
    ):
        ll.from_peft(tmp_path, model)


@pytest.mark.parametrize(
    "names", [["head"], ["embed_tokens"], ["head", "embed_tokens"], ["head", "norm"]]
)
def test_what_peft_trains_whole_in_one_of_two_places_that_share_it(
    names: list[str], tmp_path: Path
) -> None:
    """Its copy is the module's alone: the other place keeps the base's table."""
    model = mixed()
    model.head.weight = model.embed_tokens.weight
    config = peft.LoraConfig(r=3, target_modules=["back"], modules_to_save=names)
    theirs = saved(config, model, tmp_path, x=IDS)
    params = ll.from_peft(tmp_path, model)
    close(ll.apply(model, params, IDS), theirs, 1e-5)
    close(ll.merged(model, params)(IDS), theirs, 1e-5)


@pytest.mark.parametrize(
    "says",
    [
        {"modules_to_save": ["head", "embed_tokens"]},
        {"modules_to_save": ["head"], "ensure_weight_tying": True},
    ],
)
def test_equal_copies_of_a_tied_tensor_are_one(says: dict[str, Any], tmp_path: Path) -> None:
    model = mixed()
    model.head.weight = model.embed_tokens.weight
    ll.to_peft(
        (ll.init(model, ll.LoRAConfig(r=2, target_names=("back",))), ll.init(model, FULL_HEAD)),
        model,
        tmp_path,
    )
    tensors = load_file(tmp_path)
    new = torch.randn_like(tensors["base_model.model.head.weight"])
    tensors |= {f"base_model.model.{name}.weight": new.clone() for name in ("head", "embed_tokens")}
    config = tmp_path / "adapter_config.json"
    params = ll.from_peft(tensors, model, config=json.loads(config.read_text()) | says)
    dense = ll.merged(model, params)
    assert torch.equal(dense.head.weight, new)
    assert dense.head.weight is dense.embed_tokens.weight


def test_a_tied_parameter_trained_whole_goes_to_peft_in_both_places(tmp_path: Path) -> None:
    model = mixed()
    model.head.weight = model.embed_tokens.weight
    written(
        (
            moved(ll.init(model, ll.LoRAConfig(r=2, target_names=("back",)))),
            moved(ll.init(model, FULL_HEAD)),
        ),
        model,
        tmp_path,
        IDS,
    )


class Heads(nn.Module):
    """Modules under the name that PEFT gives its first adapter."""

    def __init__(self) -> None:
        super().__init__()
        pair = {"default": nn.Linear(8, 8), "other": nn.Linear(8, 8)}
        self.heads = nn.ModuleDict({name: nn.Sequential(layer) for name, layer in pair.items()})
        self.default = nn.Linear(8, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.heads["default"](x) + self.heads["other"](x)
        return self.out(self.default(h))


@pytest.mark.parametrize("targets", [r".*\.0|default", "default", r".*\.0"])
def test_modules_called_default(targets: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Heads().eval(), torch.randn(3, 8)
    config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=targets)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    expected = theirs(x)
    raw = {k: t for k, t in theirs.state_dict().items() if "lora_" in k}
    for source, how in (
        (tmp_path / "theirs", {}),
        (raw, {"config": tmp_path / "theirs" / "adapter_config.json"}),
    ):
        params = ll.from_peft(source, model, **how)
        torch.testing.assert_close(ll.apply(model, params, x), expected)
    ll.to_peft(params, model, tmp_path / "ours")
    again = ll.from_peft(tmp_path / "ours", model)
    torch.testing.assert_close(ll.apply(model, again, x), expected)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(loaded(x), expected)
