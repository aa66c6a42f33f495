"""Newcomers' mistakes: each is refused at once, with what came and what was expected."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import moved, net
from torch import nn

import lora_lite_func as ll

MODEL = net(dtype=torch.float32)
X = torch.randn(4, 16)
CFG = ll.LoRAConfig(r=4)
PARAMS = ll.init(MODEL, CFG)
STACK = ll.stack([PARAMS, ll.init(MODEL, CFG, seed=1), ll.init(MODEL, CFG, seed=2)])
OTHER = ll.init(net(dtype=torch.float32, depth=1), CFG)
ADAMW = ll.adamw(1e-3)
STATE = ADAMW.init(PARAMS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ll.apply(nn.Linear, PARAMS, X),
            "expected an nn.Module, found the class Linear itself; give an instance",
        ),
        (lambda: ll.apply(None, PARAMS, X), "expected an nn.Module, found NoneType"),
        (lambda: ll.bind(nn.Linear, PARAMS), "the class Linear itself"),
        (lambda: ll.merge(nn.Linear, PARAMS), "the class Linear itself"),
        (lambda: ll.merged(MODEL.state_dict(), PARAMS), "expected an nn.Module, found OrderedDict"),
        (lambda: ll.init(nn.Linear, CFG), "the class Linear itself"),
        (lambda: ll.check(nn.Linear, PARAMS, X), "the class Linear itself"),
        (lambda: ll.calibrate(nn.Linear, ll.EVAConfig(), [X]), "the class Linear itself"),
    ],
)
def test_what_is_no_model(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ll.UnsupportedError, match=message):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: ll.apply(PARAMS, MODEL, X),
        lambda: ll.bind(PARAMS, MODEL),
        lambda: ll.merge(PARAMS, MODEL),
        lambda: ll.merged(PARAMS, MODEL),
    ],
)
def test_model_and_adapter_swapped(call: Callable[[], Any]) -> None:
    with pytest.raises(
        ll.StructureError,
        match=r"expected an Adapter.*found Net; the model comes first, then its adapter",
    ):
        call()


@pytest.mark.parametrize(
    "call", [lambda: ll.init(MODEL, ll.LoRAConfig), lambda: ll.targets(MODEL, ll.LoRAConfig)]
)
def test_a_config_class(call: Callable[[], Any]) -> None:
    with pytest.raises(ll.ConfigError, match="give an instance of the config's class"):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ll.unbind(PARAMS), "expected a module made by ll.bind, found Adapter"),
        (lambda: ll.summary(MODEL), "summary: expected an Adapter, found Net"),
        (
            lambda: ll.per_sample_grads(PARAMS, MODEL, lambda y, b: y.sum(1), X),
            "per_sample_grads: expected an Adapter",
        ),
        (
            lambda: ll.functional_call(MODEL, PARAMS, X, base=3),
            "base: expected .parameter or buffer name: tensor., found int",
        ),
        (
            lambda: ll.functional_call(MODEL, PARAMS, X, base={"head.weight": "x"}),
            "base 'head.weight': expected a tensor, found str",
        ),
        (lambda: ll.rows(STACK, {0: 1, 1: 2}), "rows: expected a sequence of ids, found dict"),
        (lambda: ll.rows(STACK, {0, 1}), "rows: expected a sequence of ids, found set"),
        (
            lambda: ll.update(STACK, None, PARAMS),
            "update: expected a member's number or name, found NoneType",
        ),
        (
            lambda: ll.update(STACK, 1.0, PARAMS),
            "update: expected a member's number or name, found float",
        ),
        (
            lambda: ll.concatenate(None),
            "concatenate: expected a sequence of stacks, found NoneType",
        ),
        (
            lambda: ll.concatenate(STACK),
            "concatenate: expected a sequence of stacks, found Adapter",
        ),
        (
            lambda: ll.combine_adapters([PARAMS, PARAMS], "ab"),
            "combine_adapters: expected finite weights, found 'a'",
        ),
        (
            lambda: ll.combine_adapters([PARAMS, PARAMS], [1.0, float("nan")]),
            "combine_adapters: expected finite weights, found nan",
        ),
        (
            lambda: ADAMW.update(PARAMS, PARAMS, STATE),
            "expected update.grads, state, trainable., found Adapter for the state",
        ),
        (
            lambda: ADAMW.update(None, STATE, PARAMS),
            "adamw: gradients: expected an Adapter, found NoneType",
        ),
        (
            lambda: ADAMW.update(PARAMS, STATE, STACK),
            r"adamw: gradients: 'layers.0.down' lora_A: expected shape \(3, 4, 24\), found \(4, 24",
        ),
        (
            lambda: ADAMW.update(STACK, STATE, PARAMS),
            r"adamw: gradients: 'layers.0.down' lora_A: expected shape \(4, 24\), found \(3, 4, 24",
        ),
        (
            lambda: ADAMW.update(OTHER, STATE, PARAMS),
            "adamw: gradients: 'layers.1.down' lora_A is in the adapter alone",
        ),
        (
            lambda: ADAMW.update(PARAMS, STATE, OTHER),
            "adamw: gradients: 'layers.1.down' lora_A is in these alone",
        ),
        (
            lambda: ll.clip_grads(PARAMS, torch.ones(3)),
            "clip_grads: max_norm: 'layers.0.down' lora_A: expected .K, 4, 24., found .4, 24.",
        ),
        (
            lambda: ll.clip_grads(STACK, torch.ones(2)),
            "clip_grads: max_norm: expected one number or 3",
        ),
    ],
)
def test_what_does_not_fit(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ll.StructureError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ll.scale(PARAMS, "1"),
            "scale: strength: expected a number or a tensor, found '1'",
        ),
        (
            lambda: ll.scale(PARAMS, float("nan")),
            "scale: strength: expected a finite number, found nan",
        ),
        (
            lambda: ll.scale(PARAMS, None),
            "scale: strength: expected a number or a tensor, found None",
        ),
        (
            lambda: ll.scale(STACK, [1.0, 2.0, 3.0]),
            r"scale: strength: expected a number or a tensor, found \[1",
        ),
        (
            lambda: ll.scale(STACK, np.ones(3)),
            "scale: strength: expected a number or a tensor, found array",
        ),
        (lambda: ll.scale(PARAMS, 1j), "scale: strength: expected a number or a tensor, found 1j"),
        (
            lambda: ll.scale(PARAMS, torch.tensor(1j)),
            "scale: strength: expected real numbers, found torch.complex64",
        ),
        (lambda: ll.adamw("1"), "adamw: lr: expected a number or a tensor, found '1'"),
        (lambda: ll.adamw([1e-3] * 3), "adamw: lr: expected a number or a tensor"),
        (lambda: ll.adamw(-1e-3), "adamw: lr: expected a number of at least 0, found -0.001"),
        (lambda: ll.adamw(float("nan")), "adamw: lr: expected a number of at least 0, found nan"),
        (lambda: ll.adamw(1e-3, betas=0.9), "adamw: betas: expected two numbers, found 0.9"),
        (
            lambda: ll.adamw(1e-3, betas=(1.5, 0.9)),
            r"adamw: betas: expected a probability in \[0, 1\), found 1.5",
        ),
        (
            lambda: ll.adamw(1e-3, eps=-1.0),
            "adamw: eps: expected a number of at least 0, found -1.0",
        ),
        (
            lambda: ll.adamw(1e-3, weight_decay=-1.0),
            "adamw: weight_decay: expected a number of at least 0, found -1.0",
        ),
        (
            lambda: ADAMW.update(PARAMS, STATE, PARAMS, lr="a"),
            "adamw: lr: expected a number or a tensor, found 'a'",
        ),
        (
            lambda: ll.clip_grads(PARAMS, None),
            "clip_grads: max_norm: expected a number or a tensor, found None",
        ),
        (
            lambda: ll.clip_grads(PARAMS, -1.0),
            "clip_grads: max_norm: expected a number of at least 0, found -1.0",
        ),
        (lambda: ll.register(ll.LoRAConfig), "register: expected a Variant, found <class"),
        (
            lambda: ll.init(MODEL, ll.LoRAConfig(r=10**9)),
            r"'layers.0.up': lora asks for 4e\+10 numbers, lora_A \(1000000000, 16\), .* lower",
        ),
        (
            lambda: ll.init(MODEL, ll.LilyConfig(experts=2**31)),
            r"lily asks for .* lower its sizes",
        ),
        (lambda: ll.scale(PARAMS, True), "scale: strength: expected a number or a tensor, found T"),
        (lambda: ll.scale(PARAMS, 10**400), "scale: strength: expected a number or a tensor, fou"),
        (lambda: ll.bind(MODEL, PARAMS, linears="no"), "bind: linears: expected True or False"),
        (lambda: ll.merge(MODEL, PARAMS, dequantize=1), "merge: dequantize: expected True or Fal"),
        (lambda: ll.num_params(PARAMS, trainable_only=None), "trainable_only: expected True or"),
        (lambda: ll.partition(PARAMS, False), "partition: keep: expected a function, found False"),
        (lambda: ll.partition(PARAMS, ()), r"partition: keep: expected a function, found \(\)"),
        (lambda: ll.grad("x"), "grad: loss: expected a function, found 'x'"),
        (lambda: ll.grad(len, 1.5), "grad: argnums: expected int, found 1.5"),
        (lambda: ll.grad(len, 0, None), "grad: has_aux: expected True or False, found None"),
        (
            lambda: ll.per_sample_grads(MODEL, PARAMS, None, X),
            "per_sample_grads: loss_fn: expected a function, found None",
        ),
        (
            lambda: ll.calibrate(MODEL, ll.EVAConfig(r=2), [X], loss_fn="mean"),
            "calibration data: loss_fn: expected a function, found 'mean'",
        ),
        (lambda: ll.rows(STACK, [0], flattened=None), "rows: flattened: expected a sequence of te"),
        (lambda: ll.rows(STACK, [0], flattened=(1,)), "rows: flattened: expected texts, found 1"),
        (lambda: ll.combine_adapters(3), "combine_adapters: expected a sequence of adapters"),
        (
            lambda: ll.combine_adapters([PARAMS], how="ties", density=None),
            "combine_adapters: density: expected a finite number, found None",
        ),
        (
            lambda: ll.combine_adapters([PARAMS], how="dare_linear", seed="x"),
            "combine_adapters: seed: expected int, found 'x'",
        ),
        (
            lambda: ll.activated(PARAMS, torch.ones(4, 1), goes_on=1),
            "activated: goes_on: expected True or False, found 1",
        ),
        (
            lambda: ll.invoked(torch.ones(1, 3), "ab"),
            "invoked: invocation_tokens: expected a sequence of ids, found 'ab'",
        ),
        (
            lambda: ll.invoked(torch.ones(1, 3), [-1]),
            r"_tokens\[0\]: expected at least 0",
        ),
        (
            lambda: ll.masked_by(ll.init(MODEL, ll.LoRIConfig(r=2)), "0.1"),
            "masked_by: fraction: expected a finite number, found '0.1'",
        ),
        (
            lambda: ll.load_balance(torch.ones(2, 3), top_k=1.0),
            "load_balance: top_k: expected int, found 1.0",
        ),
        (
            lambda: ll.xlora(MODEL, [PARAMS, PARAMS], hidden_size=16, temperature="1"),
            "xlora: temperature: expected a finite number, found '1'",
        ),
        (
            lambda: ll.xlora(MODEL, [PARAMS, PARAMS], hidden_size=0),
            "xlora: hidden_size: expected at least 1, found 0",
        ),
        (
            lambda: ll.xlora(MODEL, [PARAMS, PARAMS], hidden_size=16, seed=1.5),
            "xlora: seed: expected int, found 1.5",
        ),
        (
            lambda: ll.xlora(MODEL, [PARAMS, PARAMS], hidden_size=16, strength=None),
            "xlora: strength: expected a finite number, found None",
        ),
    ],
)
def test_what_can_not_be_meant(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ll.ConfigError, match=message):
        call()


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (("layers.0.up", "lora_C"), "no tensor 'lora_C' at 'layers.0.up'; did you mean 'lora_"),
        (("a", "b", "c"), "no site"),
        (slice(0, 2), "no site slice"),
        (True, "no site True"),
        (1.0, "no site 1.0"),
    ],
)
def test_keys_that_are_none(key: Any, message: str) -> None:
    with pytest.raises(KeyError, match=message):
        STACK[key]


@pytest.mark.parametrize("path", [None, 3, 1.5, [], torch.ones(1), ""])
def test_what_is_no_path(path: Any) -> None:
    """An empty path is none either: it would be the folder that the program happens to be in."""
    calls: dict[str, Callable[[], Any]] = {
        "load": lambda: ll.load(path),
        "save": lambda: ll.save(PARAMS, path),
        "to_peft": lambda: ll.to_peft(PARAMS, MODEL, path),
        "from_peft": lambda: ll.from_peft(path, MODEL),
        "from_lora_lite": lambda: ll.from_lora_lite(path),
        "from_diffusion": lambda: ll.from_diffusion(path, MODEL),
        "to_diffusion": lambda: ll.to_diffusion(PARAMS, MODEL, path, component="unet"),
        "xlora_to_peft": lambda: ll.xlora_to_peft(
            ll.xlora(MODEL, [PARAMS, PARAMS], hidden_size=16), MODEL, path
        ),
    }
    for name, call in calls.items():
        with pytest.raises(ll.CheckpointError, match=rf"{name}: expected a path"):
            call()


def test_what_is_no_device(tmp_path: Path) -> None:
    ll.save(PARAMS, tmp_path / "a.safetensors")
    for device in ("x", object(), "cpu:-3"):
        with pytest.raises(ll.CheckpointError, match="load: device: can't put tensors on"):
            ll.load(tmp_path / "a.safetensors", device=device)  # type: ignore[arg-type]


def test_what_is_no_router_head_or_member() -> None:
    x = ll.xlora(MODEL, [PARAMS, PARAMS], hidden_size=16)
    for head in (None, {}, {"0.weight": torch.ones(2, 16)}, [1]):
        with pytest.raises(ll.StructureError, match=r"xlora: head: expected tensors 0\.weight"):
            x.having(head)  # type: ignore[arg-type]
    with pytest.raises(ll.StructureError, match=r"'0\.bias': expected a tensor of shape \(2,\)"):
        x.having({**x.head, "0.bias": torch.ones(3)})
    with pytest.raises(ll.StructureError, match=r"expected probabilities \(\.\.\., E\), found str"):
        ll.load_balance({"a": "x"})  # type: ignore[dict-item]
    with pytest.raises(ll.StructureError, match=r"expected shape \(4, 24\), found \(3, 4, 24\)"):
        ll.update(STACK, 0, STACK)


def test_numbers_of_numpy_and_torch_are_numbers(tmp_path: Path) -> None:
    ll.save(STACK, tmp_path / "stack.safetensors")
    for one in (np.int64(1), torch.tensor(1)):
        for member in (STACK[one], ll.load(tmp_path / "stack.safetensors", member=one)):
            assert torch.equal(member["layers.0.up", "lora_A"], STACK["layers.0.up", "lora_A"][1])
        assert ll.num_members(ll.update(STACK, one, PARAMS)) == 3
    half = ll.scale(PARAMS, np.float32(0.5))
    assert torch.equal(
        half["layers.0.up", "lora_B"], ll.scale(PARAMS, 0.5)["layers.0.up", "lora_B"]
    )


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(
        ll.CheckpointError, match=r"it is a folder without model\.safetensors; ll\.from_peft"
    ):
        ll.load(tmp_path)


def test_clipping_nothing() -> None:
    frozen = ll.partition(PARAMS)[1]
    same, norm = ll.clip_grads(frozen, 1.0)
    assert norm == 0
    assert not list(torch.utils._pytree.tree_leaves(same))


def test_a_table_on_the_meta_device() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.up = nn.Embedding(11, 8), nn.Linear(8, 6)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.up(self.table(ids))
            return out

    ids = torch.randint(0, 11, (3, 6))
    for cfg in (
        ll.DoRAConfig(r=2, target_kinds=("embedding", "linear"), exclude_names=()),
        ll.LoReFTConfig(r=2, target_names="up"),
    ):
        model = Words()
        params = ll.init(model, cfg)
        there = torch.utils._pytree.tree_map(lambda t: t.to("meta"), params)
        assert ll.apply(copy.deepcopy(model).to("meta"), there, ids.to("meta")).shape == (3, 6, 6)
        program = torch.export.export(ll.bind(model, params), (ids,))
        assert torch.allclose(program.module()(ids), ll.apply(model, params, ids), atol=1e-6)


def test_gradients_that_would_not_come_through() -> None:
    for make, instead in ((ll.bind, r"use ll\.apply"), (ll.merged, r"use ll\.functional_call")):
        with pytest.raises(ll.UnsupportedError, match=f"makes parameters of its own.*{instead}"):
            torch.func.grad(lambda p, make=make: make(MODEL, p)(X).sum())(PARAMS)
        with pytest.raises(ll.UnsupportedError, match=f"makes parameters of its own.*{instead}"):
            torch.func.vmap(torch.func.grad(lambda p, make=make: make(MODEL, p)(X).sum()))(STACK)
        each = torch.func.vmap(lambda p, make=make: make(MODEL, p)(X))(STACK)
        assert torch.allclose(each[1], ll.apply(MODEL, STACK[1], X), atol=1e-5)


def test_tensors_without_values() -> None:
    gone = torch.utils._pytree.tree_map(lambda t: t.to("meta"), PARAMS)
    for call in (
        lambda: ll.apply(MODEL, gone, X),
        lambda: ll.bind(MODEL, gone),
        lambda: ll.merge(MODEL, gone),
    ):
        with pytest.raises(
            ll.StructureError,
            match="the adapter's tensors are on the meta device, so they have no values",
        ):
            call()


def test_what_inference_mode_made_is_trained_as_a_copy() -> None:
    model, x = net(), torch.ones(2, 16, dtype=torch.float64)
    with torch.inference_mode():
        params = moved(ll.init(model, ll.LoRAConfig(r=2)))
        y = ll.bind(model, params)(x)
    with pytest.raises(ll.UnsupportedError, match=r"'layers.0.down' lora_A was made under torch"):
        ll.bind(model, params)
    bound = ll.bind(model, torch.utils._pytree.tree_map(torch.clone, params))
    assert torch.equal(bound(x), y)
    bound(x).sum().backward()
    assert torch.equal(ll.prepared(model, params)(x), y)
