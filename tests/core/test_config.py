"""Configs: refused while they are built, equal by what the maths depends on, the same after JSON,
pickle and copies.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import re
import types
import typing
import warnings
from collections.abc import Callable
from typing import Any, Literal

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given

import lora_lite_func as ll
from lora_lite_func.core.config import from_dict, record, to_dict

METHODS = tuple(ll.variants().values())
every = pytest.mark.parametrize("cls", [v.config for v in METHODS], ids=[v.name for v in METHODS])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outsider(ll.AdapterConfig):
    """A config of somebody else's method."""

    widths: tuple[int, ...] = (1, 2)
    mode: Literal["a", "b"] = "a"
    note: str = record("")


# --------------------------------------------------------------------------------------- strategies
def _values(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type that every method takes: even ints, floats inside (0, 1)."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return st.none() | _values(next(a for a in args if a is not type(None)))
    if origin is Literal:
        return st.sampled_from(args)
    if origin is tuple and args[1] is Ellipsis:
        return st.lists(_values(args[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(_values, args))
    if hint is torch.dtype:
        return st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])
    return {
        int: st.integers(1, 64).map(lambda n: 2 * n),
        float: st.floats(0.01, 0.99),
        bool: st.booleans(),
        str: st.text(max_size=8).map(re.escape),
    }[hint]


@st.composite
def configs(draw: Any, cls: Any) -> Any:
    """A config with some of its fields set; what the method itself refuses is drawn again."""
    hints = typing.get_type_hints(cls)
    names = draw(st.lists(st.sampled_from([f.name for f in dataclasses.fields(cls)]), unique=True))
    made = _made(cls, **{name: draw(_values(hints[name])) for name in names})
    assume(made is not None)
    return made


def _made(cls: Any, **fields: Any) -> Any:
    try:
        return cls(**fields)
    except ll.ConfigError:
        return None


# ----------------------------------------------------------------------------------------- refusals
def test_unknown_field_names_the_nearest() -> None:
    with pytest.raises(
        ll.ConfigError, match=r"LoRAConfig has no field 'aplha'; did you mean 'alpha'\?"
    ):
        ll.LoRAConfig(aplha=16)
    with pytest.raises(
        ll.ConfigError,
        match=r"PiSSAConfig has no field 'rslora'; there are: 'r', 'alpha'.*'svd_niter'",
    ):
        ll.PiSSAConfig(rslora=True)
    with pytest.raises(ll.ConfigError, match="LoRAConfig has no field 'self'"):
        ll.LoRAConfig(self=1)


def test_a_field_called_cls_is_unknown_like_any_other() -> None:
    with pytest.raises(ll.ConfigError, match="LoRAConfig has no field 'cls'"):
        ll.LoRAConfig(cls=1)


@every
def test_keywords_only(cls: Any) -> None:
    with pytest.raises(
        ll.ConfigError,
        match=rf"{cls.__name__} takes keywords only, found 1 positional; fields: r, alpha",
    ):
        cls(8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": True}, "LoRAConfig.r: expected int, found True"),
        ({"r": 8.0}, "LoRAConfig.r: expected int, found 8.0"),
        ({"r": "8"}, "LoRAConfig.r: expected int, found '8'"),
        ({"r": None}, "LoRAConfig.r: expected int, found None"),
        ({"r": torch.tensor(8)}, r"LoRAConfig.r: expected int, found tensor\(8\)"),
        ({"r": 0}, "LoRAConfig.r: expected at least 1, found 0"),
        ({"r": -4}, "LoRAConfig.r: expected at least 1, found -4"),
        ({"r": 2**31}, "LoRAConfig.r: expected at most 2147483647, found 2147483648"),
        ({"r": 10**5000}, "LoRAConfig.r: expected at most 2147483647, found a huge int"),
        (
            {"rank_pattern": {"q": 2**40}},
            r"LoRAConfig.rank_pattern\['q'\]: expected at most 2147483647",
        ),
        ({"alpha": False}, "LoRAConfig.alpha: expected float, found False"),
        ({"alpha": "16"}, "LoRAConfig.alpha: expected float, found '16'"),
        ({"alpha": 1j}, "LoRAConfig.alpha: expected float"),
        ({"alpha": float("nan")}, "LoRAConfig.alpha: expected a finite number, found nan"),
        ({"alpha": float("inf")}, "LoRAConfig.alpha: expected a finite number, found inf"),
        ({"rslora": 1}, "LoRAConfig.rslora: expected bool, found 1"),
        ({"rslora": None}, "LoRAConfig.rslora: expected bool, found None"),
        ({"dropout": 1.0}, r"LoRAConfig.dropout: expected a probability in \[0, 1\), found 1.0"),
        ({"dropout": float("nan")}, "LoRAConfig.dropout: expected a finite number"),
        (
            {"init_A": "Kaiming"},
            "LoRAConfig.init_A: expected one of 'kaiming', 'gaussian', 'orthogonal', found "
            "'Kaiming'",
        ),
        ({"init_A": ["kaiming"]}, "LoRAConfig.init_A: expected one of"),
        ({"init_A": "orthogonal", "r": 3}, "expected an even r"),
        ({"init_A": "orthogonal", "rank_pattern": {"q": 5}}, "expected an even r"),
        (
            {"dtype": "flaot32"},
            "LoRAConfig.dtype: expected a floating torch.dtype, found 'flaot32'",
        ),
        (
            {"dtype": torch.int8},
            "LoRAConfig.dtype: expected a floating torch.dtype, found torch.int8",
        ),
        ({"dtype": torch.complex64}, "LoRAConfig.dtype: expected a floating torch.dtype"),
        ({"dtype": "nn"}, "LoRAConfig.dtype: expected a floating torch.dtype, found 'nn'"),
        ({"dtype": 32}, "LoRAConfig.dtype: expected a floating torch.dtype, found 32"),
        ({"target_names": None}, "LoRAConfig.target_names: expected a sequence, found None"),
        ({"target_names": b"q"}, "LoRAConfig.target_names: expected a sequence"),
        ({"target_names": ("q", 3)}, r"LoRAConfig.target_names\[1\]: expected str, found 3"),
        ({"target_names": {"q": 1}}, r"LoRAConfig.target_names\[0\]: expected str"),
        (
            {"target_names": ("(q",)},
            r"LoRAConfig.target_names: '\(q' is not a regular expression: missing \)",
        ),
        (
            {"exclude_names": ("*",)},
            "LoRAConfig.exclude_names: .* is not a regular expression: nothing to repeat",
        ),
        (
            {"target_roles": ("reeder",)},
            r"LoRAConfig.target_roles\[0\]: expected one of 'reader', 'writer', 'inner', found "
            r"'reeder'",
        ),
        ({"layers": 3}, "LoRAConfig.layers: expected a sequence, found 3"),
        ({"layers": "0-3"}, "LoRAConfig.layers: expected a sequence, found '0-3'"),
        ({"layers": (0, True)}, r"LoRAConfig.layers\[1\]: expected int, found True"),
        ({"layers": (0.0,)}, r"LoRAConfig.layers\[0\]: expected int, found 0.0"),
        ({"rank_pattern": {"q": 4.0}}, r"LoRAConfig.rank_pattern\[0\]: expected int, found 4.0"),
        (
            {"rank_pattern": {"q": 0}},
            r"LoRAConfig.rank_pattern\['q'\]: expected at least 1, found 0",
        ),
        ({"rank_pattern": {"q(": 4}}, "LoRAConfig.rank_pattern: .* is not a regular expression"),
        ({"rank_pattern": [("q", 4, 5)]}, r"LoRAConfig.rank_pattern\[0\]: expected 2 values"),
        ({"rank_pattern": "q"}, "LoRAConfig.rank_pattern: expected a sequence, found 'q'"),
        ({"alpha_pattern": {3: 4.0}}, r"LoRAConfig.alpha_pattern\[0\]: expected str, found 3"),
        ({"alpha_pattern": {"[": 4.0}}, "LoRAConfig.alpha_pattern: .* is not a regular expression"),
    ],
)
def test_a_wrong_value_is_named_with_its_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ll.ConfigError, match=message):
        ll.LoRAConfig(**fields)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ll.PiSSAConfig(alpha=0), "PiSSAConfig.alpha: .* expected a positive number"),
        (
            lambda: ll.PiSSAConfig(alpha_pattern={"q": -1}),
            "PiSSAConfig.alpha: .* expected a positive number",
        ),
        (
            lambda: ll.LoRAConfig(alpha=-1e308),
            r"LoRAConfig.alpha: expected at most 1e\+30, found -1e\+308",
        ),
        (
            lambda: ll.MoELoRAConfig(experts=2**70),
            "MoELoRAConfig.experts: expected an int of 64 bits, found 1180591620717411303424",
        ),
        (
            lambda: ll.ABBAConfig(svd_niter=10**9),
            "ABBAConfig.svd_niter: expected None or at least 0 and at most 1000, found 1000000000",
        ),
        (
            lambda: ll.PiSSAConfig(svd_niter=-1),
            "PiSSAConfig.svd_niter: expected None or at least 0 and at most 1000, found -1",
        ),
        (lambda: ll.DeLoRAConfig(lambda0=0), "DeLoRAConfig.lambda0: expected a positive strength"),
        (lambda: ll.HRAConfig(r=3), "HRAConfig.r: .* expected even, found 3"),
        (lambda: ll.HRAConfig(rank_pattern={"q": 5}), "HRAConfig.r: .* expected even, found 5"),
        (
            lambda: ll.ROADConfig(group_size=0),
            "ROADConfig.group_size: expected an even number, found 0",
        ),
        (
            lambda: ll.ROADConfig(group_size=7),
            "ROADConfig.group_size: expected an even number, found 7",
        ),
        (
            lambda: ll.ROADConfig(mode="road_3"),
            "ROADConfig.mode: expected one of 'road_1', 'road_2', 'road_4', found 'road_3'",
        ),
        (
            lambda: from_dict(ll.LoRAConfig, ["r"]),
            "LoRAConfig: expected a mapping of field names, found list",
        ),
        (
            lambda: from_dict(ll.LoRAConfig, {3: 4}),
            "LoRAConfig: expected a mapping of field names, found dict",
        ),
    ],
)
def test_methods_refuse_their_own(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ll.ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("cls", "fields"),
    [
        pytest.param(ll.LoRAConfig, {"alpha": 10**400}, id="alpha too large: OverflowError"),
        pytest.param(
            ll.LoRAConfig,
            {"target_names": ("a{99999999999999999999}",)},
            id="repeat count: OverflowError",
        ),
        pytest.param(ll.LoRAConfig, {"target_names": ("(" * 3000,)}, id="nesting: RecursionError"),
        pytest.param(ll.LoRAConfig, {"target_names": {"q", 1}}, id="set of mixed types: TypeError"),
        pytest.param(
            ll.LoRAConfig, {"dtype": "has_mps"}, id="deprecated attribute of torch: a warning"
        ),
        pytest.param(
            ll.LoRAConfig, {"alpha_pattern": {"q": float("nan")}}, id="alpha_pattern nan: accepted"
        ),
        pytest.param(
            ll.LoRAConfig, {"alpha_pattern": {"q": float("inf")}}, id="alpha_pattern inf: accepted"
        ),
        pytest.param(ll.DeLoRAConfig, {"lambda0": float("nan")}, id="lambda0 nan: accepted"),
        pytest.param(ll.DeLoRAConfig, {"lambda0": float("inf")}, id="lambda0 inf: accepted"),
    ],
)
def test_hostile_values_are_config_errors(cls: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(ll.ConfigError, match=next(iter(fields))):
        cls(**fields)


def test_a_pattern_that_python_warns_about_warns_nobody() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ll.LoRAConfig(target_names=("[[q]",)).target_names == ("[[q]",)


def test_a_role_may_stand_alone_like_a_name() -> None:
    assert ll.LoRAConfig(target_roles="reader").target_roles == ("reader",)
    with pytest.raises(ll.ConfigError, match=r"target_roles\[0\]: expected one of 'reader'"):
        ll.LoRAConfig(target_roles="raeder")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, "float8_e5m2"])
def test_a_dtype_that_nothing_computes_in_is_refused(dtype: Any) -> None:
    with pytest.raises(
        ll.ConfigError, match=r"expected a floating torch.dtype, found .*float8.*; 16 bits at least"
    ):
        ll.LoRAConfig(dtype=dtype)


def test_a_config_read_back_spells_out_every_field() -> None:
    written = to_dict(ll.LoRAConfig())
    del written["alpha"], written["rslora"]
    with pytest.raises(
        ll.ConfigError, match="LoRAConfig: expected every field, missing: alpha, rslora"
    ):
        from_dict(ll.LoRAConfig, written)


def test_a_field_that_was_added_since_may_be_missing() -> None:
    written = to_dict(ll.LoKrConfig(r=4))
    del written["w1_shapes"]
    assert from_dict(ll.LoKrConfig, written) == ll.LoKrConfig(r=4)


def test_a_message_repeats_no_long_value() -> None:
    for fields in (
        {"r": "9" * 10**6},
        {"target_names": "(" + "a" * 10**6},
        {"x" * 10**6: 1},
        {"alpha": 10**5000},
    ):
        with pytest.raises(ll.ConfigError, match="LoRAConfig") as caught:
            ll.LoRAConfig(**fields)
        assert len(str(caught.value)) < 1000


def test_an_error_is_also_the_builtin() -> None:
    with pytest.raises(ValueError, match="did you mean"):
        ll.LoRAConfig(aplha=1)
    with pytest.raises(ll.LoraLiteError, match="did you mean"):
        ll.LoRAConfig(aplha=1)


# ----------------------------------------------------------------------------------------- coercion
def test_what_is_meant_is_taken() -> None:
    cfg = ll.LoRAConfig(
        alpha=4,
        dtype="torch.bfloat16",
        target_names="q_proj",
        exclude_names=["a", "b"],
        target_roles=["reader"],
        layers=range(3),
        rank_pattern={"q": 4},
        alpha_pattern=[["q", 2]],
    )
    assert (cfg.alpha, type(cfg.alpha)) == (4.0, float)
    assert cfg.dtype is torch.bfloat16
    assert cfg.target_names == ("q_proj",)
    assert cfg.exclude_names == ("a", "b")
    assert cfg.target_roles == ("reader",)
    assert cfg.layers == (0, 1, 2)
    assert cfg.rank_pattern == (("q", 4),)
    assert cfg.alpha_pattern == (("q", 2.0),)
    assert type(cfg.alpha_pattern[0][1]) is float
    assert ll.LoRAConfig(target_names={"b", "a"}).target_names == ("a", "b")
    assert ll.LoRAConfig(layers=[-1]).layers == (-1,)
    assert ll.LoRAConfig(dtype="float16").dtype is torch.float16


def test_the_first_matching_pattern_wins() -> None:
    cfg = ll.LoRAConfig(r=8, alpha=1, rank_pattern={r"\.0\.": 2, "up": 4}, alpha_pattern={"up$": 3})
    assert [cfg.rank_at(p) for p in ("layers.0.up", "layers.1.up", "layers.1.down")] == [2, 4, 8]
    assert [cfg.alpha_at(p) for p in ("layers.0.up", "layers.1.upper")] == [3.0, 1.0]


# ------------------------------------------------------------------------------------------- values
@every
def test_frozen(cls: Any) -> None:
    cfg = cls()
    for change in (
        lambda: setattr(cfg, "r", 4),
        lambda: setattr(cfg, "new", 4),
        lambda: delattr(cfg, "r"),
    ):
        with pytest.raises(
            dataclasses.FrozenInstanceError, match=r"cannot (assign to|delete) field"
        ):
            change()


@every
@given(data=st.data())
def test_the_same_after_json_pickle_copy_and_replace(cls: Any, data: st.DataObject) -> None:
    cfg = data.draw(configs(cls))
    written = json.dumps(to_dict(cfg))
    again = from_dict(cls, json.loads(written))
    assert json.dumps(to_dict(again)) == written
    for twin in (
        again,
        pickle.loads(pickle.dumps(cfg)),
        copy.copy(cfg),
        copy.deepcopy(cfg),
        dataclasses.replace(cfg),
    ):
        assert type(twin) is cls
        assert twin == cfg
        assert hash(twin) == hash(cfg)
        assert dataclasses.astuple(twin) == dataclasses.astuple(cfg)


@every
@given(data=st.data())
def test_equality_is_about_the_maths(cls: Any, data: st.DataObject) -> None:
    cfg = data.draw(configs(cls))
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        now = {g.name: getattr(cfg, g.name) for g in dataclasses.fields(cls)}
        other = _made(cls, **{**now, f.name: data.draw(_values(hints[f.name]), label=f.name)})
        if other is None:
            continue
        if f.compare:
            assert (other == cfg) == (getattr(other, f.name) == getattr(cfg, f.name)), f.name
        else:
            assert other == cfg, f.name
            assert hash(other) == hash(cfg), f.name
    provenance = {
        "dtype",
        "target_names",
        "exclude_names",
        "target_roles",
        "layers",
        "rank_pattern",
        "alpha_pattern",
    }
    assert provenance <= {f.name for f in dataclasses.fields(cls) if not f.compare}


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("rank", "it is 'r' here"),
        ("target_modules", r"it is 'target_names' here, regular expressions: r'\\.q_proj\$'"),
        ("layers_to_transform", "it is 'layers' here"),
        ("use_dora", "ll.DoRAConfig"),
        ("init_lora_weights", "ll.PiSSAConfig"),
        ("modules_to_save", "ll.FullConfig"),
        ("lora_alpha", "did you mean 'alpha'"),
    ],
)
def test_another_library_s_word_for_a_field_is_answered_with_the_one_here(
    name: str, hint: str
) -> None:
    with pytest.raises(ll.ConfigError, match=f"LoRAConfig has no field '{name}'; .*{hint}"):
        ll.LoRAConfig(**{name: 1})


def test_replace_checks_again() -> None:
    with pytest.raises(ll.ConfigError, match=r"LoRAConfig\.r: expected at least 1, found 0"):
        dataclasses.replace(ll.LoRAConfig(), r=0)
    with pytest.raises(ll.ConfigError, match="has no field 'rank'"):
        dataclasses.replace(ll.LoRAConfig(), rank=0)


def test_configs_of_different_methods_differ() -> None:
    assert ll.IA3Config() != ll.IA3FFConfig()
    assert len({v.config() for v in METHODS}) == len(METHODS)


# ---------------------------------------------------------------------------------------- outsiders
@given(data=st.data())
def test_an_outsiders_subclass_is_held_to_the_same(data: st.DataObject) -> None:
    cfg = data.draw(configs(Outsider))
    again = from_dict(Outsider, json.loads(json.dumps(to_dict(cfg))))
    assert again == cfg
    assert hash(again) == hash(cfg)
    assert again.widths == cfg.widths
    assert Outsider(note="here") == Outsider(note="there")


def test_an_outsiders_fields_are_checked() -> None:
    assert Outsider(widths=[3]).widths == (3,)
    with pytest.raises(
        ll.ConfigError, match=r"Outsider has no field 'width'; did you mean 'widths'\?"
    ):
        Outsider(width=3)
    with pytest.raises(ll.ConfigError, match=r"Outsider.widths\[0\]: expected int, found '3'"):
        Outsider(widths=["3"])
    with pytest.raises(
        ll.ConfigError, match=r"Outsider\.mode: expected one of 'a', 'b', found 'c'"
    ):
        Outsider(mode="c")
    with pytest.raises(
        ll.ConfigError, match="no variant is registered for Outsider; there are: 'ABBAConfig'"
    ):
        ll.init(torch.nn.Linear(2, 2), Outsider())
