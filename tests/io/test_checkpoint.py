"""Files: exact, atomic, and hostile until shown otherwise. A bad file is a CheckpointError that
names the file and the fault.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import optree
import pytest
import safetensors.torch
import torch
from helpers import leaves, moved, net
from hypothesis import given, settings
from torch import Tensor, nn

import lora_lite_func as ll
from lora_lite_func.core import registry as methods

KEY = "lora_lite_func"


def lora(**fields: Any) -> ll.Adapter:
    return moved(ll.init(net(depth=1), ll.LoRAConfig(**{"r": 2, **fields})))


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A good file."""
    ll.save(lora(), tmp_path / "good.safetensors")
    return tmp_path / "good.safetensors"


def described(file: Path) -> dict[str, Any]:
    """What a file says of itself."""
    with safetensors.safe_open(str(file), "pt") as f:
        found: dict[str, Any] = json.loads(f.metadata()[KEY])
    return found


def rewritten(
    file: Path, says: Any = None, tensors: dict[str, Tensor] | None = None, text: str | None = None
) -> Path:
    """A file with the same tensors and another description (or raw metadata text), or other
    tensors.
    """
    text = json.dumps(described(file) if says is None else says) if text is None else text
    bad = file.with_name("bad.safetensors")
    safetensors.torch.save_file(
        safetensors.torch.load_file(file) if tensors is None else tensors, bad, {KEY: text}
    )
    return bad


def refused(file: Path, message: str = "", **given: Any) -> None:
    """Loading it is a CheckpointError that names the file and says `message`."""
    with pytest.raises(ll.CheckpointError, match=f"{re.escape(str(file))}: .*{message}"):
        ll.load(file, **given)


# -------------------------------------------------------------------------------------------- exact
BITS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}


@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_every_bit_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    params = lora(dtype=dtype)
    size = torch.iinfo(BITS[dtype])
    gen = torch.Generator().manual_seed(0)

    def odd(t: Tensor) -> Tensor:
        # NaN payloads are among these bits
        bits = torch.randint(size.min, size.max, t.shape, generator=gen, dtype=torch.int64).to(
            BITS[dtype]
        )
        special = torch.tensor(
            [0.0, -0.0, float("inf"), -float("inf"), float("nan"), torch.finfo(dtype).tiny / 2],
            dtype=dtype,
        )
        bits.view(-1)[:6] = special.view(BITS[dtype])
        return bits.view(dtype)

    params = optree.tree_map(odd, params)
    ll.save(params, tmp_path / "a")
    again = ll.load(tmp_path / "a")
    for a, b in zip(leaves(again), leaves(params), strict=True):
        assert a.dtype == b.dtype == dtype
        assert torch.equal(a.view(BITS[dtype]), b.view(BITS[dtype]))


def test_everything_about_it_is_kept(tmp_path: Path) -> None:
    where = {
        "layers": (0,),
        "target_names": ("up", "dówn|down"),
        "rank_pattern": {"up": 3},
        "alpha_pattern": {"down": 1e-7},
    }
    cfg = ll.LoRAConfig(r=2, alpha=0.1, dropout=0.25, rslora=True, **where)
    params = ll.init(net(), cfg)
    ll.save(params, tmp_path / "a")
    again = ll.load(tmp_path / "a")
    assert dataclasses.asdict(again.config) == dataclasses.asdict(cfg)
    assert again.layout == params.layout
    assert [s.scaling for s in again.sites.values()] == [s.scaling for s in params.sites.values()]


def test_a_root_site_and_odd_names(tmp_path: Path) -> None:
    for model in (
        nn.Linear(3, 4),
        nn.ModuleDict({"ünï ": nn.Linear(3, 4), "lora_A": nn.Linear(3, 4)}),
    ):
        params = ll.init(model, ll.LoRAConfig(r=2))
        ll.save(params, tmp_path / "a")
        again = ll.load(tmp_path / "a", model)
        assert list(again) == list(params)
        assert all(torch.equal(a, b) for a, b in zip(leaves(again), leaves(params), strict=True))


def test_shared_and_strided_tensors(tmp_path: Path) -> None:
    params = lora()
    shared = torch.randn(64, 64, dtype=torch.float64)
    views = optree.tree_map(lambda t: shared[: t.shape[1], : t.shape[0]].T, params)
    for each in (
        views,
        optree.tree_map(lambda t: t.requires_grad_(), copy.deepcopy(params)),
        ll.unstack(ll.stack([params, params]))[1],
    ):
        ll.save(each, tmp_path / "a")
        assert all(
            torch.equal(a, b)
            for a, b in zip(leaves(ll.load(tmp_path / "a")), leaves(each), strict=True)
        )


def test_what_is_loaded_does_not_hang_on_the_file(file: Path) -> None:
    again = ll.load(file)
    before = copy.deepcopy(again)
    file.write_bytes(b"\0" * file.stat().st_size)
    file.unlink()
    assert all(torch.equal(a, b) for a, b in zip(leaves(again), leaves(before), strict=True))


@pytest.mark.parametrize("name", ["a.safetensors", "ünïcode ✓", "no suffix", ".hidden", "a" * 200])
def test_paths(name: str, tmp_path: Path) -> None:
    for path in (name, Path(name), tmp_path / name, str(tmp_path / name)):
        ll.save(lora(), path)
        assert len(ll.load(path)) == 2
        assert os.listdir() == [name]
        os.unlink(name)


def test_the_file_has_the_usual_rights(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    ll.save(lora(), tmp_path / "a")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


# ------------------------------------------------------------------------------------------- atomic
def _raising(error: BaseException) -> Callable[..., None]:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize("where", ["safetensors.torch.save_file", "os.replace", "os.chmod"])
@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), RuntimeError("broken"), KeyboardInterrupt("stopped")],
    ids=repr,
)
def test_a_failing_save_leaves_the_old_file(
    where: str, error: BaseException, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(where, _raising(error))
        interrupted = isinstance(error, KeyboardInterrupt)
        expected, message = (
            (KeyboardInterrupt, "stopped")
            if interrupted
            else (ll.CheckpointError, rf"can't write .*{file.name}: ")
        )
        with pytest.raises(expected, match=message):
            ll.save(lora(alpha=1), file)
    assert file.read_bytes() == before
    assert os.listdir() == [file.name]


def test_a_half_written_file_is_never_seen(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()

    def half(tensors: Any, filename: str, metadata: Any) -> None:
        Path(filename).write_bytes(before[: len(before) // 2])
        assert file.read_bytes() == before
        raise OSError("the disk went away")

    monkeypatch.setattr("safetensors.torch.save_file", half)
    with pytest.raises(ll.CheckpointError, match="the disk went away"):
        ll.save(lora(alpha=1), file)
    assert file.read_bytes() == before
    assert os.listdir() == [file.name]


def test_a_place_that_can_not_be_written(tmp_path: Path) -> None:
    with pytest.raises(ll.CheckpointError, match=r"save: can't write in .*nowhere: "):
        ll.save(lora(), tmp_path / "nowhere" / "a")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ll.CheckpointError, match=r"save: can't write .*folder: "):
        ll.save(lora(), tmp_path / "folder")
    assert os.listdir() == ["folder"]


def test_a_name_as_long_as_the_system_takes() -> None:
    Path("n" * 250).touch()
    ll.save(lora(), "n" * 250)
    assert len(ll.load("n" * 250)) == 2


@pytest.mark.parametrize("name", ["nul\0byte", "\ud800"], ids=["nul", "surrogate"])
def test_odd_paths_are_refused_with_words(name: str) -> None:
    for act in (lambda: ll.load(name), lambda: ll.save(lora(), name)):
        with pytest.raises(ll.CheckpointError, match=r"nul|surrogate|null|valid|such file"):
            act()


@pytest.mark.skipif(sys.platform == "win32", reason="symbolic links need rights there")
def test_a_link_stays_a_link(file: Path) -> None:
    Path("link").symlink_to(file.name)
    ll.save(lora(alpha=1), "link")
    assert Path("link").is_symlink()


@pytest.mark.skipif(sys.platform == "win32", reason="symbolic links need rights there")
def test_what_a_link_points_to_is_written(file: Path) -> None:
    Path("folder").mkdir()
    os.rename(file, "folder/real")
    Path("link").symlink_to("folder/real")
    ll.save(lora(alpha=1), "link")
    assert ll.load("folder/real").config.alpha == 1
    assert sorted(os.listdir()) == ["folder", "link"]
    assert os.listdir("folder") == ["real"]


def test_saving_leaves_the_process_mask_alone(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.umask", _raising(AssertionError("other threads see it")))
    ll.save(lora(), file)


# ------------------------------------------------------------------------------ what can't be saved
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: (p, (p, p)), "save: expected Adapters under names, found tuple under '1'"),
        (lambda p: {3: p}, "save: expected Adapters under names, found Adapter under 3"),
        (lambda p: {"a/b": p}, "save: expected names without '/', found 'a/b'"),
        (lambda p: (), "save: expected at least one Adapter"),
        (
            lambda p: None,
            "save: expected one Adapter, or a tuple, list or dict of them, found NoneType",
        ),
        (lambda p: net(), "save: expected one Adapter, .*, found Net"),
        (
            lambda p: ll.stack([ll.stack([p])]),
            r"'layers.0.down' lora_A: expected .*, found \(1, 1, 2, 24\)",
        ),
        (
            lambda p: ll.partition(p, lambda _, name: name == "lora_A")[0],
            "'layers.0.down' lora_B is absent: .*combine the parts",
        ),
        (
            lambda p: optree.tree_map(lambda t: 3, p),
            "save: 'layers.0.down' lora_A: expected a tensor of shape .*, found int",
        ),
        (
            lambda p: optree.tree_map(lambda t: None, p),
            "save: 'layers.0.down' lora_A: expected a tensor of shape .*, found NoneType",
        ),
        (lambda p: optree.tree_map(lambda t: t.to("meta"), p), "save: can't write a: .*meta"),
        (
            lambda p: optree.tree_map(lambda t: t.to_sparse(), p),
            "save: 'layers.0.down' lora_A has no storage .sparse",
        ),
    ],
)
def test_what_is_no_whole_adapter(make: Callable[[ll.Adapter], Any], message: str) -> None:
    with pytest.raises(ll.CheckpointError, match=message):
        ll.save(make(lora()), "a")
    assert os.listdir() == []


def test_saving_inside_a_transform_is_refused() -> None:
    with pytest.raises(ll.CheckpointError, match="save"):
        torch.func.vmap(lambda p: ll.save(p, "a"))(ll.stack([lora(), lora()]))


# ------------------------------------------------------------------------------ files that are none
def test_no_file_at_all(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "not a readable safetensors file: No such file")
    refused(tmp_path, "not a readable safetensors file")
    with pytest.raises(ll.CheckpointError, match="nowhere: "):
        ll.load("nowhere")


@pytest.mark.parametrize(
    "content",
    [b"", b"\0", b"\0" * 8, b"\xff" * 64, b"PK\x03\x04", b"{}", bytes(range(256))],
    ids=range(7),
)
def test_other_bytes(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(content)
    refused(tmp_path / "a", "not a readable safetensors file|no 'lora_lite_func' entry")


def test_truncated_anywhere(file: Path, tmp_path: Path) -> None:
    content = file.read_bytes()
    header = 8 + struct.unpack("<Q", content[:8])[0]
    for length in {
        *range(0, len(content), 37),
        *range(10),
        *range(header - 3, header + 4),
        len(content) - 1,
    }:
        (tmp_path / "a").write_bytes(content[:length])
        refused(tmp_path / "a", "not a readable safetensors file")
    (tmp_path / "a").write_bytes(content + b"\0")
    refused(tmp_path / "a", "not a readable safetensors file")


def test_a_file_of_something_else(file: Path, tmp_path: Path) -> None:
    for metadata in (None, {}, {"format": "pt"}):
        safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "a", metadata)
        refused(
            tmp_path / "a",
            "no 'lora_lite_func' entry in its metadata, so it isn't an adapter that ll.save wrote",
        )
    torch.save({"a": torch.ones(2)}, tmp_path / "a")
    refused(tmp_path / "a", "not a readable safetensors file")


# --------------------------------------------------------------------------- metadata that is wrong
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "metadata isn't JSON"),
        ("{", "metadata isn't JSON"),
        ("[" * 100_000, "metadata isn't JSON"),
        ('{"a":' * 100_000, "metadata isn't JSON"),
        ("9" * 5000, "metadata isn't JSON"),
        (
            '{"format":1,"format":1}',
            r"metadata isn't JSON: a key twice among \['format', 'format'\]",
        ),
        (
            '{"format":1,"config":{"r":1,"r":2}}',
            r"metadata isn't JSON: a key twice among \['r', 'r'\]",
        ),
        ('"text"', "metadata: expected an object, found str"),
        ("[]", "metadata: expected an object, found list"),
        ("NaN", "metadata: expected an object, found float"),
        ("null", "metadata: expected an object, found NoneType"),
        ("{}", "expected format version 1, found None"),
    ],
    ids=range(12),
)
def test_metadata_that_is_no_description(text: str, message: str, file: Path) -> None:
    refused(rewritten(file, text=text), message)


def _set(*keys: Any) -> Callable[[dict[str, Any]], None]:
    """A change of a description: the last of `keys` is the new value (or `del`)."""

    def change(says: dict[str, Any]) -> None:
        *path, last, value = keys
        for key in path:
            says = says[key]
        if value is del_:
            del says[last]
        else:
            says[last] = value

    return change


del_ = object()
SITE = (
    "a site should be .path, kind, d_in, d_out, bias, r, alpha, stack, transposed, plus_one., found"
)
SITES = "expected a list of sites, found"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("format", 2), "expected format version 1, found 2; a newer release may read it"),
        (_set("format", "1"), "expected format version 1, found '1'"),
        (_set("format", None), "expected format version 1, found None"),
        (_set("format", [[]]), "expected format version 1"),
        (_set("variant", del_), "should have format, variant, config, sites; odd: 'variant'"),
        (_set("sites", del_), "odd: 'sites'"),
        (_set("more", 1), "odd: 'more'"),
        (
            _set("variant", "loora"),
            "unknown variant 'loora'; did you mean 'lora'. ll.register adds one",
        ),
        (_set("variant", ["lora"]), r"unknown variant \['lora'\]"),
        (_set("variant", None), "unknown variant None"),
        (_set("variant", "os.system"), "unknown variant 'os.system'"),
        (_set("variant", "ia3"), "config: IA3Config has no field 'rslora'"),
        (
            _set("config", None),
            "config: LoRAConfig: expected a mapping of field names, found NoneType",
        ),
        (_set("config", []), "config: LoRAConfig: expected a mapping of field names, found list"),
        (_set("config", "r", "2"), "config: LoRAConfig.r: expected int, found '2'"),
        (_set("config", "r", True), "config: LoRAConfig.r: expected int, found True"),
        (_set("config", "r", 2.0), "config: LoRAConfig.r: expected int, found 2.0"),
        (_set("config", "r", 0), "config: LoRAConfig.r: expected at least 1"),
        (_set("config", "r", 10**400), "config: LoRAConfig.r: expected at most"),
        (_set("config", "r", 2**62), "config: LoRAConfig.r: expected at most"),
        (
            _set("config", "r", 4),
            "site 'layers.0.down': r=2, alpha=16.0 isn't what its config can give",
        ),
        (
            _set("config", "alpha", 8.0),
            "site 'layers.0.down': r=2, alpha=16.0 isn't what its config can give",
        ),
        (_set("config", "r", [[[[]]]]), "config: LoRAConfig.r: expected int"),
        (
            _set("config", "alpha", float("inf")),
            "config: LoRAConfig.alpha: expected a finite number",
        ),
        (_set("config", "alpha", {"a": 1}), "config: LoRAConfig.alpha: expected float"),
        (
            _set("config", "aplha", 1),
            "config: LoRAConfig has no field 'aplha'; did you mean 'alpha'",
        ),
        (_set("config", "__class__", "x"), "config: LoRAConfig has no field '__class__'"),
        (
            _set("config", "target_names", ["("]),
            "config: LoRAConfig.target_names: '.' is not a regular expression",
        ),
        (
            _set("config", "rank_pattern", [["up"]]),
            r"config: LoRAConfig.rank_pattern\[0\]: expected 2 values",
        ),
        (
            _set("config", "dtype", "int8"),
            "config: LoRAConfig.dtype: expected a floating torch.dtype",
        ),
        (
            _set("config", "dtype", "load"),
            "config: LoRAConfig.dtype: expected a floating torch.dtype, found 'load'",
        ),
        (_set("config", "dropout", 2.0), "config: LoRAConfig.dropout: expected a probability"),
        (_set("sites", None), f"{SITES} None"),
        (_set("sites", {}), f"{SITES} {{}}"),
        (_set("sites", [3]), f"{SITE} 3"),
        (_set("sites", [[]]), SITE),
        (_set("sites", []), SITES),
        (_set("sites", 0, 0, 3), SITE),
        (_set("sites", 0, 0, "other"), "missing 2 tensors, first: 'other.lora_A'"),
        (_set("sites", 0, 0, ""), "missing 2 tensors, first: 'lora_A'"),
        (_set("sites", 0, 0, "\ud800"), "missing 2 tensors"),
        (_set("sites", 0, 0, "layers.0.up"), "site 'layers.0.up' is listed twice"),
        (_set("sites", 0, 1, "module"), "site 'layers.0.down': lora can't adapt a 'module'"),
        (_set("sites", 0, 1, "cnov"), "site 'layers.0.down': lora can't adapt a 'cnov'"),
        (_set("sites", 0, 1, ["linear"]), SITE),
        (_set("sites", 0, 2, -24), SITE),
        (_set("sites", 0, 2, 0), SITE),
        (_set("sites", 0, 2, 2**40), SITE),
        (_set("sites", 0, 2, 10**300), SITE),
        (_set("sites", 0, 2, 24.0), SITE),
        (_set("sites", 0, 2, True), SITE),
        (_set("sites", 0, 3, "16"), SITE),
        (_set("sites", 0, 4, 1), SITE),
        (_set("sites", 0, 4, None), SITE),
        (_set("sites", 0, 5, 2.0), SITE),
        (_set("sites", 0, 5, 0), SITE),
        (
            _set("sites", 0, 5, 4),
            "site 'layers.0.down': r=4, alpha=16.0 isn't what its config can give",
        ),
        (_set("sites", 0, 6, 16), SITE),
        (_set("sites", 0, 6, float("nan")), SITE),
        (
            _set("sites", 0, 6, -16.0),
            "site 'layers.0.down': r=2, alpha=-16.0 isn't what its config can give",
        ),
        (_set("sites", 0, 7, -1), SITE),
        (_set("sites", 0, 7, 2**40), SITE),
        (_set("sites", 0, 7, False), SITE),
        (_set("sites", 0, 8, 1), SITE),
        (_set("sites", 0, 9, None), SITE),
        (
            _set("sites", 0, 9, True),
            "site 'layers.0.down': 1 . a weight is a norm's gain alone, found a linear place",
        ),
        (_set("sites", 0, 7, 2**30), r"'layers.0.down': a linear place is no stack"),
        (
            _set("sites", 0, 2, 25),
            r"'layers.0.down' lora_A: expected a tensor of shape \(2, 25\), found \(2, 24\)",
        ),
    ],
    ids=range(68),
)
def test_a_wrong_description(
    change: Callable[[dict[str, Any]], None], message: str, file: Path
) -> None:
    says = described(file)
    change(says)
    refused(rewritten(file, says), message)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(_set("config", "cls", 1), id="a field called cls: TypeError"),
        pytest.param(_set("config", "alpha", 10**400), id="alpha too large: OverflowError"),
        pytest.param(
            _set("config", "target_names", ["a{99999999999999999999}"]),
            id="repeat count: OverflowError",
        ),
        pytest.param(_set("config", "target_names", ["(" * 3000]), id="nesting: RecursionError"),
        pytest.param(
            _set("config", "dtype", "has_mps"), id="deprecated attribute of torch: a warning"
        ),
        pytest.param(
            _set("config", "alpha_pattern", [["up", float("nan")]]),
            id="alpha_pattern NaN: loads, and gives NaN",
        ),
        pytest.param(
            _set("config", "alpha", del_), id="no alpha: loads with the default, another strength"
        ),
        pytest.param(_set("format", True), id="format true: loads"),
        pytest.param(_set("format", 1.0), id="format 1.0: loads"),
    ],
)
def test_a_hostile_description(change: Callable[[dict[str, Any]], None], file: Path) -> None:
    says = described(file)
    change(says)
    refused(rewritten(file, says))


def test_no_pattern_of_a_file_is_run(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ll.save(lora(rank_pattern={"up": 4}, alpha_pattern={"up": 3}, target_names="up|down"), file)
    monkeypatch.setattr("re.search", _raising(AssertionError("a hostile one never ends")))
    site = ll.load(file).sites["layers.0.up"]
    assert (site.r, site.alpha, site.scaling) == (4, 3.0, 0.75)


def test_a_tensor_narrower_than_its_method_allows_is_not_saved() -> None:
    params = optree.tree_map(lambda t: t.bfloat16(), ll.init(net(), ll.IA3Config()))
    with pytest.raises(
        ll.CheckpointError,
        match=(
            r"save: 'layers.0.down' lora_g: expected a torch.float32 tensor, found "
            r"torch.bfloat16"
        ),
    ):
        ll.save(params, "a")


def test_a_required_field_that_is_missing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "_REGISTRY", dict(methods._REGISTRY))
    config = dataclasses.make_dataclass(
        "TheirConfig", [("size", "int")], bases=(ll.AdapterConfig,), frozen=True, kw_only=True
    )
    ll.register(
        ll.Variant(
            name="theirs",
            config=config,
            param_specs=lambda cfg, site: {"lora_g": ll.ParamSpec((site.d_out,))},
        )
    )
    ll.save(ll.init(net(depth=1), config(size=3)), file)
    says = described(file)
    del says["config"]["size"]
    refused(rewritten(file, says), "config: .*size")


# --------------------------------------------------------------------------- tensors that are wrong
def _first(change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def act(tensors: dict[str, Tensor]) -> None:
        tensors["layers.0.down.lora_A"] = change(tensors["layers.0.down.lora_A"])

    return act


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("layers.0.up.lora_B"), "missing 1 tensors, first: 'layers.0.up.lora_B'"),
        (lambda t: t.clear(), "it lists 2 sites, but holds 0 tensors; every site has at least one"),
        (
            lambda t: t.update({"layers.0.upp.lora_B": torch.ones(1)}),
            "1 unexpected tensors, first: 'layers.0.upp.lora_B'; did you mean",
        ),
        (lambda t: t.update({"": torch.ones(1)}), "1 unexpected tensors, first: ''"),
        (
            _first(lambda t: t.mT.contiguous()),
            r"'layers.0.down' lora_A: expected a tensor of shape \(2, 24\), found \(24, 2\)",
        ),
        (_first(lambda t: t[0].clone()), r"expected a tensor of shape \(2, 24\), found \(24,\)"),
        (_first(lambda t: t[:0].clone()), r"expected a tensor of shape \(2, 24\), found \(0, 24\)"),
        (
            _first(lambda t: t[None].clone()),
            r"expected a tensor of shape \(2, 24\), found \(1, 2, 24\)",
        ),
        (
            _first(lambda t: t.long()),
            "'layers.0.down' lora_A: expected a floating tensor, found torch.int64",
        ),
        (_first(lambda t: t.bool()), "expected a floating tensor, found torch.bool"),
        (
            _first(lambda t: t.to(torch.complex64)),
            "expected a floating tensor, found torch.complex64",
        ),
    ],
    ids=range(11),
)
def test_wrong_tensors(
    change: Callable[[dict[str, Tensor]], Any], message: str, file: Path
) -> None:
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    refused(rewritten(file, tensors=tensors), message)


def test_a_tensor_narrower_than_its_method_allows(tmp_path: Path) -> None:
    ll.save(ll.init(net(), ll.IA3Config()), tmp_path / "a")
    narrow = {k: v.bfloat16() for k, v in safetensors.torch.load_file(tmp_path / "a").items()}
    refused(rewritten(tmp_path / "a", tensors=narrow), "lora_g.*float32.*bfloat16")


def test_a_tensor_nothing_computes_in(file: Path) -> None:
    narrow = {k: v.to(torch.float8_e4m3fn) for k, v in safetensors.torch.load_file(file).items()}
    refused(rewritten(file, tensors=narrow), "lora_A.*float8")


# ------------------------------------------------------------------------------ the model it is for
def test_another_model(file: Path) -> None:
    assert len(ll.load(file, net(depth=3))) == 2
    refused(
        file, r"site 'layers.0.down': expected 24 -> 16, the model has 24 -> 8", model=net(width=8)
    )
    refused(
        file,
        r"Sequential has no linear-like module 'layers.0.down'",
        model=nn.Sequential(nn.Linear(24, 16)),
    )
    refused(file, r"ReLU has no linear-like module 'layers.0.down'", model=nn.ReLU())
    model = net(depth=1)
    model.layers[0].down = nn.Identity()
    refused(
        file,
        r"Net has no linear-like module 'layers.0.down'; did you mean 'layers.0.down'|Net has no",
        model=model,
    )


def test_a_model_that_is_none(file: Path) -> None:
    refused(file, "expected an nn.Module to check it against, found int", model=3)


# --------------------------------------------------------------------------------------------- fuzz
FRAGMENTS = [
    b"",
    b"0",
    b"-1",
    b"1e400",
    b"null",
    b"true",
    b"[]",
    b"{}",
    b'""',
    b'\\"',
    b"NaN",
    b"[" * 40,
    b"(",
    b"\\",
    b'"F16"',
    b"\xff",
]


def _originals(folder: Path) -> Iterator[bytes]:
    configs = (
        ll.LoRAConfig(r=2, rank_pattern={"up": 4}),
        ll.PiSSAConfig(r=2),
        ll.ROADConfig(group_size=8),
        ll.DeLoRAConfig(r=2),
    )
    for cfg in configs:
        ll.save(ll.init(net(depth=1), cfg), folder / "original")
        yield (folder / "original").read_bytes()


@st.composite
def mutations(draw: Any) -> Callable[[bytes], bytes]:
    """A change of a file's bytes: some anywhere, some in a header whose length is made to fit, or a
    cut.
    """
    kind = draw(st.sampled_from(["bytes", "header", "header", "cut", "insert"]))
    place = st.tuples(
        st.floats(0, 1, exclude_max=True), st.integers(0, 6), st.sampled_from(FRAGMENTS)
    )
    places = draw(st.lists(place, min_size=1, max_size=3))
    values = draw(st.binary(min_size=3, max_size=8))

    def mutate(content: bytes) -> bytes:
        size = struct.unpack("<Q", content[:8])[0]
        header, body = content[8 : 8 + size], content[8 + size :]
        where = int(places[0][0] * len(content))
        if kind == "cut":
            return content[:where]
        if kind == "insert":
            return content[:where] + values + content[where:]
        if kind == "bytes":
            changed = bytearray(content)
            for (place, _, _), value in zip(places, values, strict=False):
                changed[int(place * len(content))] = value
            return bytes(changed)
        for place, length, fragment in places:
            at = int(place * len(header))
            header = header[:at] + fragment + header[at + length :]
        return struct.pack("<Q", len(header)) + header + body

    return mutate


@settings(max_examples=200)
@given(mutate=mutations())
@pytest.mark.filterwarnings("ignore:Possible:FutureWarning")
def test_mutated_files_load_or_are_refused(
    mutate: Callable[[bytes], bytes], tmp_path_factory: Any
) -> None:
    folder = tmp_path_factory.getbasetemp()
    if not _ORIGINALS:
        _ORIGINALS.extend(_originals(folder))
    for content in _ORIGINALS:
        (folder / "mutated").write_bytes(mutate(content))
        try:
            found = ll.load(folder / "mutated")
        except ll.CheckpointError as error:
            fault = str(error)
            assert fault.startswith(str(folder / "mutated"))
        else:
            assert all(
                t.shape == found.layout.specs[path][name].shape
                for path, ts in found.items()
                for name, t in ts.items()
            )


_ORIGINALS: list[bytes] = []


# ------------------------------------------------------------------------------ several, and stacks
def equal(a: Any, b: Any) -> bool:
    """Bit-equal, in the same structure."""
    return type(a) is type(b) and all(
        torch.equal(u, v) for u, v in zip(leaves(a), leaves(b), strict=True)
    )


@pytest.mark.parametrize("container", [tuple, list, dict])
def test_several_in_one_file(container: Any, tmp_path: Path) -> None:
    model = net(depth=1)
    parts = [lora(), moved(ll.init(model, ll.IA3Config())), ll.stack([lora(), lora()])]
    several = (
        dict(zip(("a", "b", "c"), parts, strict=True)) if container is dict else container(parts)
    )
    ll.save(several, tmp_path / "a")
    again = ll.load(tmp_path / "a", model)
    assert type(again) is container
    assert list(again) == list(several) if container is dict else True
    pairs = (
        zip(again.values(), parts, strict=True)
        if container is dict
        else zip(again, parts, strict=True)
    )
    assert all(equal(a, b) and a.layout == b.layout for a, b in pairs)
    assert equal(ll.load(tmp_path / "a", member="b" if container is dict else 1), parts[1])
    assert equal(ll.load(tmp_path / "a", member=-1), parts[2])
    with pytest.raises(ll.CheckpointError, match="holds no 'nobody'"):
        ll.load(tmp_path / "a", member="nobody")


def test_a_member_of_a_stack_is_read_alone(tmp_path: Path) -> None:
    members = [moved(lora(), seed=i) for i in range(5)]
    ll.save(ll.stack(members), tmp_path / "a")
    assert equal(ll.load(tmp_path / "a"), ll.stack(members))
    for i in (0, 3, -1):
        assert equal(ll.load(tmp_path / "a", net(depth=1), member=i), members[i])
    for bad in (5, -6, "x", True):
        with pytest.raises(ll.CheckpointError, match="a stack of 5, found"):
            ll.load(tmp_path / "a", member=bad)
    ll.save(lora(), tmp_path / "b")
    with pytest.raises(ll.CheckpointError, match="holds one adapter, found 0"):
        ll.load(tmp_path / "b", member=0)


def test_a_device_of_choice(file: Path) -> None:
    assert {t.device.type for t in leaves(ll.load(file, device="meta"))} == {"meta"}


def test_frozen_tensors_that_share_memory_are_stored_once(tmp_path: Path) -> None:
    model = net(depth=3)
    params = ll.init(model, ll.VeRAConfig(r=64, target_names=("up",)))
    first = params["layers.0.up"]
    shared = {
        path: {n: first[n] if n in ("lora_vera_A", "lora_vera_B") else t for n, t in held.items()}
        for path, held in params.items()
    }
    params = ll.Adapter(params.layout, shared)
    ll.save(params, tmp_path / "a")
    assert (tmp_path / "a").stat().st_size < 1.5 * sum(t.nbytes for t in first.values())
    again = ll.load(tmp_path / "a")
    assert equal(again, params)
    assert (
        again["layers.0.up", "lora_vera_A"].data_ptr()
        == again["layers.2.up", "lora_vera_A"].data_ptr()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stack": 0}, "stack: expected how many"),
        ({"stack": 2}, r"expected a tensor of shape \(2, 2, 24\)"),
        ({"stack": 2**40}, "stack: expected how many"),
        ({"same": {"x": "layers.0.up.lora_A"}}, "unexpected tensors, first: 'x'"),
        ({"same": {"layers.0.up.lora_A": "layers.0.down.lora_A"}}, "same: expected pairs"),
        ({"same": [1]}, "same: expected pairs"),
        ({"parts": []}, "several parts: expected format, parts"),
    ],
)
def test_what_a_file_says_of_stacks_and_shared_tensors_is_checked(
    change: dict[str, Any], message: str, file: Path
) -> None:
    refused(rewritten(file, described(file) | change), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ["0", "0"]}, "names: expected different names"),
        ({"names": ["0", "2"]}, "names: expected different names"),
        ({"names": ["0"]}, "as many names as parts"),
        ({"as": "set"}, "several parts: expected format"),
        ({"as": ["dict"]}, "several parts: expected format"),
        ({"parts": {}}, "as many names as parts"),
        ({"parts": [1, 2]}, "its metadata: expected an object, found int"),
        ({"format": 2}, "expected format version 1, found 2"),
    ],
)
def test_what_a_file_says_of_several_is_checked(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    ll.save((lora(), lora()), tmp_path / "good")
    refused(rewritten(tmp_path / "good", described(tmp_path / "good") | change), message)


def test_a_stack_of_unlike_members(tmp_path: Path) -> None:
    members = {"a": lora(), "b": lora(r=3, alpha=5.0), "c": lora(r=1), "d": lora()}
    stack = ll.stack(members)
    ll.save(stack, tmp_path / "s")
    again = ll.load(tmp_path / "s", net(depth=1))
    assert equal(again, stack)
    assert again.layout == stack.layout
    for (name, member), back in zip(members.items(), ll.unstack(again), strict=True):
        assert equal(back, member)
        assert equal(ll.load(tmp_path / "s", member=name), member)
    assert ll.load(tmp_path / "s", member=1).sites == members["b"].sites
    says = described(tmp_path / "s")
    for change, message in (
        ({"which": [0, 9, 0, 0]}, "which: expected"),
        ({"labels": ["a"]}, "labels: expected a name for each"),
        ({"members": [1, 2, 3, 4]}, "its metadata: expected an object"),
        ({"members": []}, "which: expected"),
    ):
        refused(rewritten(tmp_path / "s", says | change), message)
