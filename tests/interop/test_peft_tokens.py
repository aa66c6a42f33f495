"""PEFT's trainable tokens and stored tables, on models that share a table and on others."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import close, moved
from peft_models import IDS, load_file, peft
from torch import Tensor, nn

import lora_lite_func as ll

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::peft", "ignore:::torch")

SMALL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def gpt2(**more: Any) -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, **SMALL, **more)
    )


def opt() -> nn.Module:
    return transformers.OPTForCausalLM(
        transformers.OPTConfig(
            vocab_size=20,
            hidden_size=16,
            num_hidden_layers=1,
            ffn_dim=8,
            num_attention_heads=2,
            word_embed_proj_dim=16,
            pad_token_id=1,
        )
    )


def t5() -> nn.Module:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=8, num_layers=1, num_heads=2)
    )


def bart() -> nn.Module:
    return transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            vocab_size=20,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_ffn_dim=8,
            decoder_ffn_dim=8,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            max_position_embeddings=20,
            decoder_start_token_id=2,
            **SMALL,
        )
    )


def gemma3() -> nn.Module:
    return transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(
            vocab_size=20,
            hidden_size=16,
            num_hidden_layers=1,
            intermediate_size=8,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            **SMALL,
        )
    )


def llama(tie: bool = False) -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=20,
            hidden_size=16,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=tie,
            **SMALL,
        )
    )


def with_logits(model: nn.Module, x: Tensor) -> Callable[..., Tensor]:
    """What the model says of these ids, and of the same ones to a decoder where it has one."""
    more = {"decoder_input_ids": x.flip(1)} if model.config.is_encoder_decoder else {}
    return lambda call: call(input_ids=x, **more).logits


def noisy(model: nn.Module) -> nn.Module:
    gen = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.3 * torch.randn(p.shape, generator=gen)
    return model


def both_ways(model: nn.Module, config: Any, folder: Path, **how: Any) -> Any:
    """PEFT's file gives PEFT's outputs here, what is written of it gives them in PEFT."""
    said = with_logits(model, IDS)
    made = noisy(peft.get_peft_model(copy.deepcopy(model), config)).eval()
    right = said(made)
    made.save_pretrained(folder, **how)
    params = ll.from_peft(folder, model)
    close(said(lambda **x: ll.apply(model, params, **x)), right, 1e-5)
    close(said(ll.merged(model, params)), right, 1e-5)
    ll.to_peft(params, model, folder / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder / "ours").eval()
    close(said(again), right, 1e-5)
    assert load_file(folder / "ours").keys() <= load_file(folder).keys()
    return params


TIED = {"gpt2": gpt2, "opt": opt, "t5": t5, "bart": bart, "gemma3": gemma3}


@pytest.mark.parametrize("name", TIED)
def test_tokens_of_a_table_that_others_share(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TIED[name]().eval()
    # OPT's padding id 1 is among them, and PEFT moves its row
    tokens = both_ways(model, peft.TrainableTokensConfig(token_indices=[9, 1, 5]), tmp_path / "1")
    (path,) = tokens
    assert path.endswith(".weight")
    assert tokens.config.token_ids == (1, 5, 9)
    config = peft.LoraConfig(
        r=2,
        target_modules="all-linear",
        trainable_token_indices=[9, 1, 5],
        lora_dropout=0.1,
    )
    both = both_ways(model, config, tmp_path / "2")
    assert [type(a.config) for a in both] == [ll.LoRAConfig, ll.TokensConfig]


def test_tokens_of_a_table_and_of_a_head_of_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = llama().eval()
    tokens = {"embed_tokens": [5, 6], "lm_head": [7, 5, 2]}
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=tokens)
    params = both_ways(model, config, tmp_path / "both")
    assert sorted(path for a in params[1:] for path in a) == ["lm_head", "model.embed_tokens"]
    alone = peft.TrainableTokensConfig(token_indices=[3], target_modules=["lm_head"])
    assert list(both_ways(model, alone, tmp_path / "head")) == ["lm_head"]


def test_a_table_and_a_head_that_share_it_with_ids_of_their_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = llama(tie=True).eval()
    tokens = {"embed_tokens": [5, 6], "lm_head": [7, 5, 2]}
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=tokens)
    both_ways(model, config, tmp_path)
    rows = ll.init(model, ll.TokensConfig(token_ids=(5, 6), target_names=("embed_tokens",)))
    with pytest.raises(
        ll.UnsupportedError, match=r"'model.embed_tokens': PEFT would replace rows of 'lm_head' too"
    ):
        ll.to_peft(rows, model, tmp_path / "ours")


# ----------------------------------------------------------------------------------- stored tables
def resized(seed: int, tie: bool) -> nn.Module:
    """A vocabulary that grew; the new rows are drawn anew in every process."""
    torch.manual_seed(0)
    model = llama(tie)
    torch.manual_seed(seed)
    model.resize_token_embeddings(23)
    return model.eval()


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("tokens", [None, [20, 21, 22]])
def test_tables_of_a_resized_base_are_those_of_the_file(
    tie: bool, tokens: Any, tmp_path: Path
) -> None:
    x = torch.tensor([[3, 20, 5, 22], [1, 21, 19, 4]])
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=tokens)
    made = noisy(peft.get_peft_model(resized(1, tie), config)).eval()
    made.save_pretrained(tmp_path, save_embedding_layers=True)
    right, other = made(x).logits, resized(2, tie)
    params = ll.from_peft(tmp_path, other)
    close(ll.apply(other, params, x).logits, right, 1e-5)
    close(ll.merged(other, params)(x).logits, right, 1e-5)
    tables = [a for a in params if isinstance(a.config, ll.FullConfig)]
    assert tables
    assert all(a.config.frozen for a in tables)
    ll.to_peft(params, other, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(resized(3, tie), tmp_path / "ours").eval()
    close(again(x).logits, right, 1e-5)
    with pytest.raises(ll.CheckpointError, match=r"23 rows in the file and 20 .*resize_token_emb"):
        ll.from_peft(tmp_path, llama(tie))


# ------------------------------------------------------------------------------- ours, tied, saved
OURS = {
    "tokens": lambda table: ll.TokensConfig(token_ids=(18, 19), target_parameters=table),
    "lora": lambda table: ll.LoRAConfig(r=2, target_parameters=table),
    "full": lambda table: ll.FullConfig(target_parameters=table),
}


@pytest.mark.parametrize("name", OURS)
def test_adapters_of_a_tied_table_are_saved_bound_and_merged(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = llama(tie=True).eval()
    config = OURS[name]("model.embed_tokens.weight")
    params = moved(ll.init(model, config))
    right = ll.apply(model, params, IDS).logits
    assert not torch.equal(right, model(IDS).logits)
    bound = ll.bind(model, params)
    bound.save_pretrained(tmp_path / "bound")
    close(bound(IDS).logits, right, 1e-5)
    assert model._tied_weights_keys == type(model)._tied_weights_keys
    ll.merged(model, params).save_pretrained(tmp_path / "merged")
    again = type(model).from_pretrained(tmp_path / "merged").eval()
    close(again(IDS).logits, right, 1e-5)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    beside = moved(ll.init(model, ll.LoRAConfig(r=2, target_names="q_proj")))
    both = (beside, params)
    if name == "lora":  # PEFT adapts a tied parameter in one of its places
        with pytest.raises(ll.UnsupportedError, match="of which PEFT would adapt one; merge it"):
            ll.to_peft(both, model, tmp_path / "peft")
        return
    ll.to_peft(both, model, tmp_path / "peft")
    made = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "peft").eval()
    close(made(IDS).logits, ll.apply(model, both, IDS).logits, 1e-5)


def test_a_table_whose_rows_are_scaled(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = gemma3().eval()
    model.model.embed_tokens.padding_idx = None  # whose row would move in one of two places
    for name, config in {
        "hira": peft.HiraConfig(r=2, target_modules=["embed_tokens"]),
        "lora": peft.LoraConfig(r=2, target_modules=["embed_tokens"]),
    }.items():
        params = both_ways(model, config, tmp_path / name)
        assert list(params) == ["model.embed_tokens"]


def test_tokens_beside_adalora(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = peft.AdaLoraConfig(
        init_r=4, total_step=10, target_modules=["q_proj"], trainable_token_indices=[3, 9]
    )
    params = both_ways(llama(tie=True).eval(), config, tmp_path)
    assert [type(a.config) for a in params] == [ll.AdaLoRAConfig, ll.TokensConfig]


# ------------------------------------------------------------------------------------ tied adapters
@pytest.mark.parametrize("pad", [None, 0])
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_adapters_that_are_tied_as_their_tables_are(
    target: str, pad: int | None, tmp_path: Path
) -> None:
    """The head's gradient moves the padding row too, and then the table is one site."""
    torch.manual_seed(0)
    model = llama(tie=True).eval()
    model.model.embed_tokens.padding_idx = pad
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", target], ensure_weight_tying=True, init_lora_weights=False
    )
    said = with_logits(model, IDS)
    made = noisy(peft.get_peft_model(copy.deepcopy(model), config)).eval()
    head, table = made.base_model.model.lm_head, made.base_model.model.model.embed_tokens
    with torch.no_grad():  # one in training, and the noise is of each alone
        head.lora_A["default"].weight.copy_(table.lora_embedding_B["default"].mT)
        head.lora_B["default"].weight.copy_(table.lora_embedding_A["default"].mT)
    right = said(made)
    made.save_pretrained(tmp_path)
    params = ll.from_peft(tmp_path, model)
    close(said(lambda **x: ll.apply(model, params, **x)), right, 1e-5)
    close(said(ll.merged(model, params)), right, 1e-5)
    tables = [path for path in params if "q_proj" not in path]
    whole = ["model.embed_tokens.weight"]
    assert tables == (["lm_head", "model.embed_tokens"] if pad is None else whole)


def test_rows_of_a_tied_head_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = llama(tie=True).eval()
    config = peft.TrainableTokensConfig(token_indices=[3, 5], target_modules=["lm_head"])
    assert list(both_ways(model, config, tmp_path)) == ["lm_head"]


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_a_stored_head_has_lost_already(start: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = llama().eval()
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "embed_tokens", "lm_head"], init_lora_weights=start
    )
    said = with_logits(model, IDS)
    made = noisy(peft.get_peft_model(copy.deepcopy(model), config)).eval()
    with torch.no_grad():
        made.base_model.model.model.embed_tokens.lora_embedding_A["default"][:, 0] = 0.0
    right = said(made)
    made.save_pretrained(tmp_path)
    params = ll.from_peft(tmp_path, model)
    close(said(lambda **x: ll.apply(model, params, **x)), right, 1e-5)
    close(said(ll.merged(model, params)), right, 1e-5)
