"""The command line: what it prints and writes, what it refuses, and what memory merging takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers import close, leaves, moved, net, normal
from torch import nn

import lora_lite_func as ll
from lora_lite_func.cli.main import main

X = normal(3, 16, seed=0, dtype=torch.float32)


@pytest.fixture
def model() -> nn.Module:
    return net(dtype=torch.float32)


@pytest.fixture
def base(model: nn.Module, tmp_path: Path) -> Path:
    """The model's folder: two shards with an index, a config, a tokenizer."""
    return written(model, tmp_path / "base")


def written(model: nn.Module, folder: Path, shards: int = 2) -> Path:
    """A model as a folder of shards."""
    folder.mkdir()
    names = list(model.state_dict())
    files = {
        name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors"
        for i, name in enumerate(names)
    }
    for file in sorted(set(files.values())):
        held = {n: model.state_dict()[n].contiguous() for n in names if files[n] == file}
        safetensors.torch.save_file(held, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": files})
    )
    (folder / "config.json").write_text('{"model_type": "net"}')
    (folder / "tokenizer.json").write_text("{}")
    return folder


def saved(model: nn.Module, file: Path, config: ll.AdapterConfig | None = None) -> ll.Adapter:
    """An adapter that does something, in a file."""
    params = moved(ll.init(model, config or ll.LoRAConfig(r=4)))
    ll.save(params, file)
    return params


def said(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> Any:
    """The JSON that a command prints."""
    assert main([*arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def converted(source: Path, output: Path, form: str, base: Path) -> int:
    """The exit code of convert, with the base model given."""
    return main(["convert", str(source), str(output), "--to", form, "--model", str(base)])


def state(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model's folder."""
    return {
        k: t
        for file in sorted(folder.glob("*.safetensors"))
        for k, t in safetensors.torch.load_file(file).items()
    }


def test_inspect(model: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params = saved(model, tmp_path / "a", ll.LoRAConfig(r=4, alpha=6, rank_pattern={"up": 2}))
    data = said(capsys, "inspect", str(tmp_path / "a"))
    assert (data["method"], data["config"]["alpha"], len(data["sites"])) == ("lora", 6.0, 4)
    assert data["trainable"] == ll.num_params(params)
    for row in data["sites"]:
        p = params[row["site"]]
        expected = (params.sites[row["site"]].scaling * p["lora_B"] @ p["lora_A"]).norm().item()
        assert row["norm"] == pytest.approx(expected, rel=1e-5)
    assert main(["inspect", str(tmp_path / "a")]) == 0
    text = capsys.readouterr().out
    assert "lora: 4 sites" in text
    assert "layers.1.down" in text


def test_diff(model: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    params = saved(model, tmp_path / "a")
    saved(model, tmp_path / "b")
    assert said(capsys, "diff", str(tmp_path / "a"), str(tmp_path / "b")) == {}
    ll.save(ll.scale(params, 2.0), tmp_path / "b")
    found = said(capsys, "diff", str(tmp_path / "a"), str(tmp_path / "b"), code=1)
    assert list(found[""]) == ["tensors"]
    assert found[""]["tensors"]["layers.0.up.lora_B"]["relative"] == pytest.approx(1.0)
    saved(model, tmp_path / "b", ll.IA3Config(target_names=("up",)))
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    text = capsys.readouterr().out
    assert "method: 'lora' / 'ia3'" in text
    assert "site layers.0.down: in the first alone" in text


@pytest.mark.parametrize(
    "method",
    [ll.LoRAConfig(r=4), ll.DoRAConfig(r=4), ll.PiSSAConfig(r=4), ll.OFTConfig(block_size=4)],
    ids=str,
)
def test_convert_there_and_back(
    method: ll.AdapterConfig, model: nn.Module, base: Path, tmp_path: Path
) -> None:
    y = ll.apply(model, saved(model, tmp_path / "a", method), X)
    assert converted(tmp_path / "a", tmp_path / "peft", "peft", base) == 0
    assert converted(tmp_path / "peft", tmp_path / "b", "ll", base) == 0
    close(ll.apply(model, ll.load(tmp_path / "b", model), X), y, 1e-5)


METHODS = [
    ll.LoRAConfig(r=4),
    ll.IA3Config(),
    ll.DoRAConfig(r=4),
    ll.HRAConfig(r=4),
    ll.ROADConfig(group_size=8),
    ll.BitFitConfig(),
    ll.PiSSAConfig(r=4),
]


@pytest.mark.parametrize("config", METHODS, ids=lambda c: type(c).__name__)
def test_merge_is_merge(
    config: ll.AdapterConfig, model: nn.Module, base: Path, tmp_path: Path
) -> None:
    params = saved(model, tmp_path / "a", config)
    assert main(["merge", str(base), str(tmp_path / "a"), str(tmp_path / "out")]) == 0
    expected = ll.merged(model, params).state_dict()
    found = state(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, t in found.items():
        close(t, expected[name], 1e-6)
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == sorted(
        f.name for f in base.iterdir()
    )
    assert (tmp_path / "out" / "config.json").read_text() == (base / "config.json").read_text()


def test_merge_of_kernels_of_both_directions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2),
        nn.ConvTranspose2d(8, 4, 2, 2, groups=2),
        nn.ConvTranspose1d(4, 4, 3),
        nn.Conv1d(4, 4, 3),
    )
    folder = written(model, tmp_path / "kernels")
    for config in (
        ll.LoRAConfig(r=2, target_kinds="conv"),
        ll.IA3Config(target_kinds="conv"),
        ll.DoRAConfig(r=2, target_parameters="1.weight"),
    ):
        params = saved(model, tmp_path / "a", config)
        assert (
            main(["merge", str(folder), str(tmp_path / "a"), str(tmp_path / "out"), "--force"]) == 0
        )
        expected = ll.merged(model, params).state_dict()
        close(
            state(tmp_path / "out"),
            {name: expected[name] for name in state(tmp_path / "out")},
            1e-6,
        )


def test_merge_of_a_peft_folder(model: nn.Module, base: Path, tmp_path: Path) -> None:
    for config in (ll.LoRAConfig(r=4), ll.DoRAConfig(r=2), ll.IA3Config()):
        params = moved(ll.init(model, config))
        ll.to_peft(params, model, tmp_path / "peft")
        assert (
            main(["merge", str(base), str(tmp_path / "peft"), str(tmp_path / "out"), "--force"])
            == 0
        )
        expected = ll.merged(model, params).state_dict()
        for name, t in state(tmp_path / "out").items():
            close(t, expected[name], 1e-5)


def test_merge_refuses(
    model: nn.Module, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = saved(model, tmp_path / "a")

    def refused(out: Path, message: str, *more: str, adapter: str = "a") -> None:
        before = sorted(tmp_path.rglob("*"))
        assert main(["merge", str(base), str(tmp_path / adapter), str(out), *more]) == 1
        assert message in capsys.readouterr().err
        assert sorted(tmp_path.rglob("*")) == before

    refused(base, "is the base itself")
    refused(base, "is the base itself", "--force")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("irreplaceable")
    refused(tmp_path / "full", "isn't empty")
    refused(tmp_path / "nowhere" / "out", "not a readable safetensors file", adapter="none")
    other = net(dtype=torch.float32, width=8)
    saved(other, tmp_path / "b")
    refused(tmp_path / "out", "the model has", adapter="b")
    ll.save(moved(ll.init(net(dtype=torch.float32, depth=3), ll.LoRAConfig(r=2))), tmp_path / "c")
    refused(tmp_path / "out", "layers.2", adapter="c")
    for bad in (
        "../../evil.safetensors",
        "/tmp/evil.safetensors",
        "sub/dir.safetensors",
        "..",
        7,
        "gone.safetensors",
    ):
        index = base / "model.safetensors.index.json"
        kept = index.read_text()
        index.write_text(json.dumps({"weight_map": {"layers.0.up.weight": bad}}))
        refused(tmp_path / "out", "isn't a safetensors file in this folder")
        index.write_text(kept)
    assert (tmp_path / "full" / "thesis.tex").read_text() == "irreplaceable"
    assert params


def test_merge_copies_nothing_from_elsewhere(
    model: nn.Module, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(model, tmp_path / "a")
    (tmp_path / "secret").write_text("mine")
    (base / "notes.txt").symlink_to(tmp_path / "secret")
    assert main(["merge", str(base), str(tmp_path / "a"), str(tmp_path / "out")]) == 1
    assert "notes.txt: a link that leads out of its folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    cache = tmp_path / "cache" / "snapshots" / "main"  # as the hub's cache lays a model out
    (tmp_path / "cache" / "blobs").mkdir(parents=True)
    cache.mkdir(parents=True)
    for i, file in enumerate(f for f in base.iterdir() if not f.is_symlink()):
        blob = tmp_path / "cache" / "blobs" / str(i)
        blob.write_bytes(file.read_bytes())
        (cache / file.name).symlink_to(Path("..") / ".." / "blobs" / str(i))
    assert main(["merge", str(cache), str(tmp_path / "a"), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert main(["merge", str(cache), str(tmp_path / "a"), "\0"]) == 1
    assert "null byte" in capsys.readouterr().err


def test_an_interrupted_merge_leaves_nothing(
    model: nn.Module, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(model, tmp_path / "a")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    assert main(["merge", str(base), str(tmp_path / "a"), str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out").exists()


def test_check(
    model: nn.Module, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(model, tmp_path / "a")
    assert said(capsys, "check", str(base), str(tmp_path / "a"))["fits"]
    saved(net(dtype=torch.float32, inner=20), tmp_path / "b")
    assert main(["check", str(base), str(tmp_path / "b")]) == 1
    assert "the model has 24 -> 16" in capsys.readouterr().err


def test_a_folder_that_holds_no_adapter(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", base):
        assert main(["inspect", str(folder)]) == 1
        assert "a folder without adapter_config.json" in capsys.readouterr().err


def test_a_converted_adapter_differs_in_nothing_that_counts(
    model: nn.Module, base: Path, tmp_path: Path
) -> None:
    for config in (
        ll.LoRAConfig(r=4, rank_pattern={"up": 2}),
        ll.HRAConfig(r=4),
        ll.DoRAConfig(r=2),
    ):
        saved(model, tmp_path / "a", config)
        assert converted(tmp_path / "a", tmp_path / "peft", "peft", base) == 0
        assert (
            main(["diff", str(tmp_path / "a"), str(tmp_path / "peft"), "--model", str(base)]) == 0
        )
    changed = ll.init(model, ll.LoRAConfig(r=4, alpha=3.0))
    ll.save(ll.init(model, ll.LoRAConfig(r=4)), tmp_path / "a")
    ll.save(changed, tmp_path / "b")
    assert main(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 1


class Reader(nn.Module):
    """An embedding, a convolution, a linear layer, stacked parameters and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 16)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16, 16)
        self.experts = nn.ParameterDict({"up": torch.randn(3, 16, 16) / 4})
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 9, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.embed(ids)
        h = h + self.conv(h.mT).mT + self.fc(h)
        return self.head(self.norm(h + torch.einsum("eoi,bti->bto", self.experts["up"], h)))


PARTS = {
    "embedding": (ll.LoRAConfig(r=2, target_kinds=("embedding",)),),
    "conv": (ll.LoRAConfig(r=2, target_kinds=("conv",)),),
    "parameters": (ll.LoRAConfig(r=2, target_names=(), target_parameters=("experts.up",)),),
    "tokens": (ll.TokensConfig(token_ids=(3, 5)),),
    "tokens_and_lora": (
        ll.LoRAConfig(r=2, target_names=("fc",)),
        ll.TokensConfig(token_ids=(3, 5)),
    ),
    "whole": (
        ll.LoRAConfig(r=2, target_names=("fc",)),
        ll.FullConfig(target_parameters=("head.weight", "norm.bias")),
    ),
    "bias": (ll.DoRAConfig(r=2, target_names=("fc",)), ll.BitFitConfig(target_names=("fc",))),
}


@pytest.mark.parametrize("name", PARTS)
def test_other_kinds_convert_and_merge(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model, ids = Reader().eval(), torch.arange(9)[None]
    base = written(model, tmp_path / "base")
    parts = tuple(moved(ll.init(model, config), seed=i) for i, config in enumerate(PARTS[name]))
    ll.save(parts, tmp_path / "a")
    y = ll.apply(model, parts, ids)
    assert converted(tmp_path / "a", tmp_path / "peft", "peft", base) == 0
    close(ll.apply(model, ll.from_peft(tmp_path / "peft", model), ids), y, 1e-5)
    assert main(["check", str(base), str(tmp_path / "peft")]) == 0
    assert main(["inspect", str(tmp_path / "peft"), "--model", str(base)]) == 0
    for adapter in ("a", "peft"):
        assert (
            main(["merge", str(base), str(tmp_path / adapter), str(tmp_path / "out"), "--force"])
            == 0
        )
        fresh = Reader().eval()
        fresh.load_state_dict(state(tmp_path / "out"))
        close(fresh(ids), y, 1e-5)


def test_a_table_keeps_its_kind_without_a_model(tmp_path: Path) -> None:
    model, ids = Reader().eval(), torch.arange(9)[None]
    params = moved(ll.init(model, ll.LoRAConfig(r=2, target_kinds=("embedding",))))
    ll.to_peft(params, model, tmp_path)
    close(ll.apply(model, ll.from_peft(tmp_path), ids), ll.apply(model, params, ids), 1e-6)


SAYS: list[tuple[dict[str, Any], bool]] = [
    ({"tie_word_embeddings": True, "architectures": ["GPT2LMHeadModel"], "vocab_size": 9}, True),
    ({"tie_word_embeddings": True}, True),
    ({"architectures": ["XForCausalLM"]}, True),
    # a table of positions
    ({"tie_word_embeddings": True, "architectures": ["XForCausalLM"], "vocab_size": 8}, False),
    ({"tie_word_embeddings": False, "architectures": ["XForCausalLM"]}, False),
    ({"tie_word_embeddings": True, "architectures": ["BertModel"]}, False),
    ({"model_type": "net"}, False),
]


@pytest.mark.parametrize(("says", "refused"), SAYS)
def test_a_table_that_the_head_shares_is_not_merged(
    says: dict[str, Any], refused: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(9, 16), "fc": nn.Linear(16, 16)})
    base = written(model, tmp_path / "base")
    (base / "config.json").write_text(json.dumps(says))
    saved(model, tmp_path / "a", ll.LoRAConfig(r=2, target_kinds=("embedding",)))
    assert main(["merge", str(base), str(tmp_path / "a"), str(tmp_path / "out")]) == int(refused)
    assert ("one tensor for this table and the model's head" in capsys.readouterr().err) == refused
    whole = ll.LoRAConfig(r=2, target_names=(), target_parameters=("embed.weight",))
    saved(model, tmp_path / "a", whole)
    assert main(["merge", str(base), str(tmp_path / "a"), str(tmp_path / "out"), "--force"]) == 0


@pytest.mark.parametrize(
    "arguments",
    [[], ["explode"], ["inspect"], ["convert", "a", "b"], ["convert", "a", "b", "--to", "onnx"]],
)
def test_a_wrong_usage_is_explained(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "usage: python -m lora_lite_func" in capsys.readouterr().err


PEAK = """
import resource, sys
from lora_lite_func.cli.main import main
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert main(["merge", *sys.argv[1:]]) == 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_merging_takes_the_memory_of_a_shard(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(32)))  # 128 MiB in 16 shards of 8
    base = written(model, tmp_path / "base", shards=16)
    saved(model, tmp_path / "a", ll.LoRAConfig(r=2))
    command = [sys.executable, "-c", PEAK, str(base), str(tmp_path / "a"), str(tmp_path / "out")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=Path(ll.__file__).parent.parent
    )
    assert int(done.stdout.split()[-1]) < 50 * 1024, done.stdout  # KiB: a few shards, not the model
    assert leaves(ll.load(tmp_path / "a"))
