"""LoReFT and DiReFT: the formula token by token, positions, prompts, whole modules as sites,
generation.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import pickle
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis.strategies as st
import pytest
import torch
from families import FAMILIES
from helpers import close, leaves, moved, net, normal, same_state, snapshot
from hypothesis import given
from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import lora_lite_func as ll

CONFIGS = (ll.LoReFTConfig, ll.DiReFTConfig)
every = pytest.mark.parametrize("config", CONFIGS)


def edited(params: ll.Adapter, path: str, h: Tensor, prompt: list[bool]) -> Tensor:
    """The paper's edit of h (T, d), one token at a time."""
    cfg: Any = params.config
    p = params[path]
    where = [t for t, on in enumerate(prompt) if on]
    n = len(where)
    first, last = (
        (cfg.first, cfg.last)
        if n >= cfg.first + cfg.last
        else (min(cfg.first, n // 2), min(cfg.last, n - n // 2))
    )
    out = h.clone()
    for place, token in enumerate(where):
        both = [i for i, here in ((0, place < first), (-1, place >= n - last)) if here]
        assert len(both) < 2
        for i in both:
            if "lora_A" in p:
                out[token] += p["lora_B"][i] @ (p["lora_A"][i] @ h[token] + p["lora_b"][i])
            else:
                M, M0 = p["lora_R"][i], p["lora_R0"][i]
                R, R0 = (torch.linalg.inv(torch.linalg.cholesky(m @ m.mT)) @ m for m in (M, M0))
                W = p["lora_W"][i] + R0
                out[token] += R.mT @ (W @ h[token] + p["lora_b"][i] - R @ h[token])
    return out


class Blocks(nn.Module):
    """Two blocks in a list; what they return is chosen by `wrap`."""

    def __init__(self, width: int, wrap: Any = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Wrapped(width, wrap) for _ in range(2))

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            y = layer(x, keep=True)
            x = (
                y
                if isinstance(y, Tensor)
                else next(iter(y.values()))
                if isinstance(y, dict)
                else y[0]
            )
        return x


class Pair(NamedTuple):
    state: Tensor
    rest: str


class Wrapped(nn.Module):
    def __init__(self, width: int, wrap: Any) -> None:
        super().__init__()
        self.up, self.wrap = nn.Linear(width, width), wrap

    def forward(self, x: Tensor, keep: bool = False) -> Any:
        y = x + torch.tanh(self.up(x))
        return self.wrap(y) if self.wrap else y


WRAPS = (
    None,
    lambda y: (y, "cache"),
    lambda y: [y, None],
    lambda y: {"last_hidden_state": y, "more": 1},
    lambda y: Pair(y, "rest"),
)


def blocks(wrap: Any = None, width: int = 8) -> Blocks:
    torch.manual_seed(0)
    return Blocks(width, wrap).double().eval()


@every
@given(
    first=st.integers(0, 3),
    last=st.integers(0, 3),
    tied=st.booleans(),
    tokens=st.integers(1, 7),
    r=st.integers(1, 4),
    data=st.data(),
)
def test_the_formula_token_by_token(
    config: Any, first: int, last: int, tied: bool, tokens: int, r: int, data: st.DataObject
) -> None:
    if first + last == 0:
        with pytest.raises(ll.ConfigError, match="one of them more, found first=0, last=0"):
            config(first=0, last=0)
        return
    model = blocks()
    params = moved(ll.init(model, config(r=r, first=first, last=last, tied=tied)), size=0.3)
    assert list(params) == ["layers.0", "layers.1"]
    x = torch.randn(2, tokens, 8, dtype=torch.float64)
    mask = torch.tensor(
        [data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)) for _ in range(2)]
    )
    expected = []
    for h, prompt in zip(x, mask.tolist(), strict=True):
        for path, layer in zip(params, model.layers, strict=True):
            h = edited(params, path, layer(h), prompt)
        expected.append(h)
    y = torch.stack(expected).detach()
    close(ll.apply(model, ll.prompted(params, mask), x), y, 1e-9)
    close(ll.apply(model, params, x, attention_mask=mask.long()), y, 1e-9)
    close(ll.apply(model, params, x, mask.long()), y, 1e-9)
    close(ll.bind(model, params)(x, attention_mask=mask.long()), y, 1e-9)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_identity_at_init_in_every_dtype(config: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    model = blocks().to(dtype)
    x = torch.randn(3, 5, 8, dtype=torch.float64).to(dtype)
    params = ll.init(model, config(r=3, tied=False))
    assert torch.equal(ll.apply(model, params, x), model(x))
    assert torch.equal(ll.apply(model, ll.cast(params, torch.bfloat16), x), model(x))
    ll.save(params, tmp_path / "a.safetensors")
    again = ll.load(tmp_path / "a.safetensors", model)
    assert again.layout == params.layout
    assert torch.equal(ll.apply(model, again, x), model(x))


@every
@pytest.mark.parametrize("wrap", WRAPS)
def test_what_blocks_return(config: Any, wrap: Any) -> None:
    params, x = moved(ll.init(blocks(), config(r=2))), torch.randn(2, 5, 8, dtype=torch.float64)
    close(ll.apply(blocks(wrap), params, x), ll.apply(blocks(), params, x), 1e-12)
    layer = blocks(wrap).layers[0]
    one = moved(ll.init(layer, config(r=2, target_names=("^$",), exclude_names=())))
    assert type(ll.apply(layer, one, x)) is type(layer(x))


@every
def test_transforms_and_threads_of_the_contract(config: Any) -> None:
    model, x = blocks(), torch.randn(4, 6, 8, dtype=torch.float64)
    start = ll.init(model, config(r=2))
    before = snapshot(model)

    def loss(p: Any, x: Tensor) -> Tensor:
        return ll.apply(model, p, x).square().sum()

    dead = {"lora_A", "lora_b", "lora_R0"} if config is ll.DiReFTConfig else {"lora_R0"}
    g = grad(loss)(start, x)
    assert all(
        (t.abs().max() > 0) == (name not in dead)
        for names in g.values()
        for name, t in names.items()
    )
    several = [moved(start, seed) for seed in (1, 2)]
    stacked = ll.stack(several)
    close(
        vmap(lambda p: ll.apply(model, p, x))(stacked),
        torch.stack([ll.apply(model, p, x) for p in several]),
        1e-12,
    )
    close(
        vmap(grad(loss), in_dims=(0, None))(stacked, x),
        ll.stack([grad(loss)(p, x) for p in several]),
        1e-10,
    )
    params = several[0]
    per_row = vmap(grad(loss), in_dims=(None, 0))(params, x)
    close(per_row, ll.stack([grad(loss)(params, u) for u in x]), 1e-10)
    trainable, frozen = ll.partition(params)
    tangent = pytree.tree_map(torch.randn_like, trainable)

    def f(t: Any) -> Tensor:
        return ll.apply(model, ll.combine(t, frozen), x)

    slope = jvp(f, (trainable,), (tangent,))[1]
    ahead, behind = (
        f(pytree.tree_map(lambda t, v, h=h: t + h * v, trainable, tangent)) for h in (1e-5, -1e-5)
    )
    close(slope, (ahead - behind) / 2e-5, 1e-6)
    for c in (0.0, 1.0):
        close(
            ll.apply(model, ll.scale(params, c), x),
            model(x) if c == 0 else ll.apply(model, params, x),
            1e-12,
        )
    bound = ll.bind(ll.bind(model, params), start)
    for twin in (copy.deepcopy(bound), pickle.loads(pickle.dumps(bound))):
        assert torch.equal(twin(x), ll.apply(model, params, x))
    assert all(
        torch.equal(a, b)
        for a, b in zip(leaves(ll.unbind(bound)), leaves((params, start)), strict=True)
    )
    torch._dynamo.reset()
    compiled = torch.compile(lambda p, x: ll.apply(model, p, x), fullgraph=True, backend="eager")
    close(compiled(params, x), ll.apply(model, params, x), 1e-12)
    assert same_state(before, snapshot(model))
    for shape in ((8,), (3, 8), (2, 3, 4, 8), (2, 0, 8)):
        assert ll.apply(model, params, torch.randn(*shape, dtype=torch.float64)).shape == shape


def test_with_another_method_at_the_same_layer() -> None:
    model, x = net(), torch.randn(2, 5, 16, dtype=torch.float64)
    lora = moved(ll.init(model, ll.LoRAConfig(r=2)))
    reft = moved(ll.init(model, ll.LoReFTConfig(r=2, target_names=("up$",), first=1, last=0)))
    assert {(path, site.d_out) for path, site in reft.sites.items()} == {
        ("layers.0.up", 24),
        ("layers.1.up", 24),
    }
    both = ll.apply(model, (lora, reft), x)
    close(both, ll.apply(ll.merged(model, lora), reft, x), 1e-12)
    assert (both - ll.apply(model, lora, x)).abs().max() > 1e-3
    close(both, ll.bind(model, (lora, reft))(x), 1e-12)


def test_what_is_refused() -> None:
    model, x = blocks(), torch.randn(2, 5, 8, dtype=torch.float64)
    params = ll.init(model, ll.LoReFTConfig(r=2))
    with pytest.raises(
        ll.UnsupportedError,
        match=r"'layers\.0': the prompt's mask is \(2, 4\), the hidden state here has tokens "
        r"\(2, 5\)",
    ):
        ll.apply(model, ll.prompted(params, torch.ones(2, 4)), x)
    with pytest.raises(ll.StructureError, match="expected a mask"):
        ll.prompted(params, [1, 1])  # type: ignore[arg-type]
    with pytest.raises(ll.UnsupportedError, match=r"'layers\.0'.*loreft"):
        ll.merge(model, params)
    with pytest.raises(ll.UnsupportedError, match="rank"):
        ll.init(model, ll.LoReFTConfig(r=9))
    wide = blocks(lambda y: (y.sum(), y))
    with pytest.raises(
        ll.UnsupportedError, match=r"'layers\.0': expected a hidden state \(\.\.\., 8\) first"
    ):
        ll.apply(wide, params, x)


@every
def test_generation_edits_the_prompt_alone(config: Any) -> None:
    pytest.importorskip("transformers")
    model = FAMILIES["llama"].fresh()
    params = moved(ll.init(model, config(r=4, first=2, last=1, tied=False)), size=0.3)
    ids, mask = torch.randint(3, 50, (3, 7)), torch.ones(3, 7, dtype=torch.long)
    mask[0, :3] = 0  # padded on the left
    how = {
        "attention_mask": mask,
        "max_new_tokens": 6,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    generated = ll.bind(model, params).generate(ids, **how)
    sequence = ids
    with torch.no_grad():  # without a cache, the prompt told
        for done in range(6):
            attention = torch.cat([mask, mask.new_ones(3, done)], 1)
            told = ll.prompted(params, torch.cat([mask, mask.new_zeros(3, done)], 1))
            logits = ll.apply(model, told, input_ids=sequence, attention_mask=attention).logits[
                :, -1
            ]
            sequence = torch.cat([sequence, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(generated, sequence)
    alone = [
        ll.bind(model, params).generate(
            ids[i : i + 1], **{**how, "attention_mask": mask[i : i + 1]}
        )
        for i in range(3)
    ]
    assert torch.equal(generated, torch.cat(alone))  # without padding a model may be given no mask
    ids_of = torch.tensor([1, -1, 0])
    stack = ll.stack([params, moved(params, 7)])
    for beams in (1, 3):
        how["num_beams"] = beams
        mixed = ll.bind(model, ll.rows(stack, ids_of.repeat_interleave(beams))).generate(ids, **how)
        for i, member in enumerate(ids_of.tolist()):
            one = model if member < 0 else ll.bind(model, stack[member])
            assert torch.equal(
                mixed[i : i + 1],
                one.generate(ids[i : i + 1], **{**how, "attention_mask": mask[i : i + 1]}),
            )
    how["num_beams"] = 1
    assert not torch.equal(generated, model.generate(ids, **how))


@pytest.mark.parametrize("cfg", [ll.LoReFTConfig, ll.DiReFTConfig])
def test_blocks_that_are_lists_of_layers_are_bound(cfg: Any) -> None:
    blocks = nn.Sequential(
        *(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(2))
    ).double()
    params = moved(ll.init(blocks, cfg(r=4, first=2, last=2, target_names=(r"^\d$",))))
    x = normal(3, 10, 16, seed=0)
    y = ll.apply(blocks, params, x)
    for bound in (
        ll.bind(blocks, params),
        ll.prepared(blocks, params),
        copy.deepcopy(ll.bind(blocks, params)),
    ):
        close(bound(x), y, 1e-12)
        assert (len(bound[0]), bound[0][-1].__class__) == (2, nn.Tanh)
        close(torch.compile(bound, fullgraph=True, backend="eager")(x), y, 1e-12)


# ------------------------------------------------------------------------- whose prompt, which call
class Stack(nn.Module):
    """Blocks that may be checkpointed, after a model inside, if there is one."""

    def __init__(self, inner: nn.Module | None = None, reentrant: bool | None = None) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant
        self.blocks = nn.ModuleList(Wrapped(8, None) for _ in range(2))
        self.calls = 0

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        self.calls += 1
        if self.inner is not None:
            x = self.inner(x, attention_mask=attention_mask)
        for block in self.blocks:
            if self.reentrant is None:
                x = block(x)
            else:
                x = checkpoint(lambda h, b=block: b(h) * 1.0, x, use_reentrant=self.reentrant)
        return x


def _gradient(model: nn.Module, *masks: Tensor | None) -> Tensor:
    """Of the sum over several calls, differentiated together after the last."""
    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(3), requires_grad=True)
    losses = [model(x, attention_mask=m).square().sum() * (i + 1) for i, m in enumerate(masks)]
    sum(losses).backward()  # type: ignore[union-attr]
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@every
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_block_finds_the_prompt_of_its_call(config: Any, reentrant: bool) -> None:
    torch.manual_seed(0)
    model = Stack()
    params = moved(ll.init(model, config(r=2, first=1, last=1)), size=0.3)
    masks = (
        torch.tensor([[1] * 4 + [0] * 2, [1] * 6]),
        None,
        torch.tensor([[1] * 2 + [0] * 4] * 2),
    )
    right = _gradient(ll.bind(model, params), *masks)
    model.reentrant = reentrant
    bound = ll.bind(model, params)
    close(_gradient(bound, *masks), right, 1e-6)
    assert bound.calls == 3  # what a call notes on its model stays noted
    assert model.calls == 0
    for made in (copy.deepcopy(bound), pickle.loads(pickle.dumps(bound))):
        made.zero_grad()
        close(_gradient(made, *masks), right, 1e-6)


@every
def test_a_bound_model_inside_another(config: Any) -> None:
    torch.manual_seed(0)
    inner = Stack()
    first = moved(ll.init(inner, config(r=2)), size=0.3)
    outer = Stack(ll.bind(inner, first))
    chosen = config(r=2, target_names=(r"^blocks\.\d$",))
    params = moved(ll.init(outer, chosen), size=0.3)
    x, mask = torch.randn(2, 6, 8), torch.tensor([[1] * 3 + [0] * 3, [1] * 5 + [0]])
    y = ll.apply(inner, ll.prompted(first, mask), x)
    y = ll.apply(Blocked(outer.blocks), ll.prompted(params, mask), y)
    close(ll.apply(outer, params, x, attention_mask=mask), y, 1e-6)
    close(ll.bind(outer, params)(x, attention_mask=mask), y, 1e-6)


class Blocked(nn.Module):
    """The blocks of another model alone."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_a_block_called_alone_does_not_know_its_prompt() -> None:
    bound = ll.bind(Stack(), ll.init(Stack(), ll.LoReFTConfig(r=2)))
    with pytest.raises(ll.UnsupportedError, match=r"'blocks\.0': it is called outside of a call"):
        bound.blocks[0](torch.randn(2, 6, 8))


def test_threads_have_their_own_prompts() -> None:
    torch.manual_seed(0)
    model = Stack(reentrant=False)
    params = moved(ll.init(model, ll.DiReFTConfig(r=2)), size=0.3)
    bound, x = ll.bind(model, params), torch.randn(2, 6, 8)
    masks = [(torch.arange(6) < n).long().expand(2, 6) for n in range(1, 7)]
    right = [ll.apply(model, ll.prompted(params, mask), x) for mask in masks]
    with ThreadPoolExecutor(3) as pool:
        for made, y in zip(
            pool.map(lambda mask: bound(x, attention_mask=mask), masks * 5), right * 5, strict=True
        ):
            close(made, y, 1e-6)


ENCODED: dict[str, tuple[str, str]] = {
    "t5": (r"encoder\.block\.\d+$", r"decoder\.block\.\d+$"),
    "bart": (r"encoder\.layers\.\d+$", r"decoder\.layers\.\d+$"),
}


def _encoder_decoder(name: str) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name == "t5":
        sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4}
        cfg = transformers.T5Config(vocab_size=64, decoder_start_token_id=0, **sizes)
        return transformers.T5ForConditionalGeneration(cfg).eval()
    layers = {f"{part}_layers": 2 for part in ("encoder", "decoder")}
    widths = {f"{part}_ffn_dim": 32 for part in ("encoder", "decoder")}
    heads = {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
    cfg = transformers.BartConfig(vocab_size=64, d_model=16, **layers, **widths, **heads)
    return transformers.BartForConditionalGeneration(cfg).eval()


@pytest.mark.parametrize("name", ENCODED)
@pytest.mark.parametrize("decoder", [False, True])
def test_an_encoder_and_a_decoder_have_their_own_masks(name: str, decoder: bool) -> None:
    model = _encoder_decoder(name)
    chosen = ll.DiReFTConfig(r=2, first=1, last=1, target_names=(ENCODED[name][decoder],))
    params = moved(ll.init(model, chosen), size=0.3)
    ids, tokens = torch.randint(3, 64, (2, 6)), torch.randint(3, 64, (2, 6))
    mask = torch.tensor([[1] * 6, [1] * 3 + [0] * 3])
    bound = ll.bind(model, params)
    for of_decoder in (None, torch.tensor([[1] * 4 + [0] * 2, [1] * 6])):
        given = {
            "input_ids": ids,
            "attention_mask": mask,
            "decoder_input_ids": tokens,
            "decoder_attention_mask": of_decoder,
        }
        own = torch.ones_like(mask) if of_decoder is None else of_decoder
        told = ll.prompted(params, own if decoder else mask)
        right = ll.apply(model, told, **given).logits
        close(ll.apply(model, params, **given).logits, right, 1e-6)
        close(bound(**given).logits, right, 1e-6)
    generated = bound.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    sequence = torch.full((2, 1), model.config.decoder_start_token_id)
    for _ in range(generated.shape[1] - 1):
        begun = torch.zeros_like(sequence)
        begun[:, 0] = 1
        logits = ll.apply(
            model,
            ll.prompted(params, begun if decoder else mask),
            input_ids=ids,
            attention_mask=mask,
            decoder_input_ids=sequence,
        ).logits
        sequence = torch.cat([sequence, logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(generated[:, 1], sequence[:, 1])
    assert torch.equal(generated, sequence) or bool(
        (generated == 2).any() or (generated == 1).any()
    )


# ---------------------------------------------------------------------- masks of parts, odd results
class Masked(nn.Module):
    """Hands its mask to a part by a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.part = Stack()

    def forward(self, x: Tensor, tokens: Tensor | None, added: bool = False) -> Tensor:
        mask = tokens.float().log() if added and tokens is not None else tokens
        y: Tensor = self.part(x, mask)
        return y


@every
def test_a_part_that_is_given_a_mask_has_its_prompt(config: Any) -> None:
    torch.manual_seed(0)
    model = Masked()
    chosen = config(r=2, first=1, last=1)
    params = moved(ll.init(model, chosen), size=0.3)
    x, mask = torch.randn(2, 6, 8), torch.tensor([[1] * 3 + [0] * 3, [1] * 5 + [0]])
    y = ll.apply(model, ll.prompted(params, mask), x, None)
    assert (y - ll.apply(model, params, x, None)).abs().max() > 1e-3
    for made in (
        ll.apply(model, params, x, mask),
        ll.bind(model, params)(x, mask),
        ll.apply(model, ll.rows(ll.stack([params, params]), [0, 1]), x, mask),
    ):
        close(made, y, 1e-6)
    # a mask that is added is made for the layers, and says nothing
    close(
        ll.bind(model, params)(x, mask, added=True),
        ll.apply(model, params, x, None),
        1e-6,
    )


class Result(collections.OrderedDict[str, Any]):
    """A result whose constructor asks for something."""

    def __init__(self, title: str, **members: Any) -> None:
        super().__init__(**members)
        self.title = title


class Named(NamedTuple):
    h: Tensor
    more: int


class Listed(list[Any]):
    """A list of a class of its own."""


RESULTS: dict[str, tuple[Any, Any]] = {
    "named tuple": (lambda h: Named(h, 1), lambda r: r.h),
    "own list": (lambda h: Listed([h, 1]), lambda r: r[0]),
    "own dict": (lambda h: Result("a", h=h), lambda r: r["h"] if r.title == "a" else None),
    "default dict": (
        lambda h: collections.defaultdict(int, h=h),
        lambda r: r["h"] + r["nothing"],
    ),
    "user dict": (lambda h: collections.UserDict(h=h), lambda r: r["h"]),
    "view": (lambda h: types.MappingProxyType({"h": h}), lambda r: r["h"]),
}


class Tokens(nn.Module):
    """A model that embeds tokens and gives a result of any class; a stack of blocks, likewise."""

    def __init__(self, wrap: Any, unwrap: Any) -> None:
        super().__init__()
        self.table, self.blocks = nn.Embedding(10, 8), nn.ModuleList(Given(wrap) for _ in range(2))
        self.wrap, self.unwrap = wrap, unwrap
        self.config = types.SimpleNamespace(use_cache=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None) -> Any:
        x = self.table(input_ids) if inputs_embeds is None else inputs_embeds
        for block in self.blocks:
            x = self.unwrap(block(x))
        return self.wrap(x.cumsum(1))


class Given(nn.Module):
    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.layer, self.wrap = nn.Linear(8, 8), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(torch.tanh(self.layer(x)))


@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.parametrize("cfg", [ll.LoReFTConfig(r=2), ll.PromptTuningConfig(r=3)])
def test_results_of_every_class_keep_it(name: str, cfg: ll.AdapterConfig) -> None:
    wrap, unwrap = RESULTS[name]
    torch.manual_seed(0)
    plain, odd = Tokens(lambda h: h, lambda h: h), Tokens(wrap, unwrap)
    odd.load_state_dict(plain.state_dict())
    ids = torch.randint(0, 10, (2, 5))
    params = moved(ll.init(plain, cfg), size=0.3)
    y = ll.apply(plain, params, ids)
    assert y.shape == (2, 5, 8)
    for made in (ll.apply(odd, params, ids), ll.bind(odd, params)(ids)):
        assert type(made) is type(odd(ids))
        close(unwrap(made), y, 1e-6)


def test_a_result_in_which_tokens_cannot_be_found_is_refused() -> None:
    @dataclasses.dataclass
    class Record:
        h: Tensor

    odd = Tokens(lambda h: h, lambda h: h)
    odd.wrap = Record
    params = ll.init(odd, ll.PromptTuningConfig(r=3))
    with pytest.raises(ll.UnsupportedError, match="with virtual tokens is a Record"):
        ll.apply(odd, params, torch.randint(0, 10, (2, 5)))
