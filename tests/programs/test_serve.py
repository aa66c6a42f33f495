"""The server loop: small, from the files to the table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from benchmarks.examples import serve, servers


def test_the_least_recently_used_goes() -> None:
    loaded: list[str] = []
    dropped: list[str] = []
    resident = servers.Resident(2, loaded.append, dropped.append)
    for names in (["a", "b"], ["a"], ["c", "c"], ["b", "c"]):
        resident.bring(names)
    assert loaded == ["a", "b", "c", "b"]
    assert dropped == ["b", "a"]
    assert list(resident.used) == ["c", "b"]
    assert len(resident.seconds) == 4


@pytest.mark.filterwarnings("ignore")
def test_every_server_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    serve.main(["--quick", "--json", str(tmp_path / "s.json")])
    text = capsys.readouterr().out
    assert "answers of the first batch that differ from their adapter's alone: 0" in text
    told = json.loads((tmp_path / "s.json").read_text())
    named = {served["name"]: served for served in told["servers"]}
    assert set(named) == {"base", "ll.Bank", "PEFT, set_adapter", "PEFT, adapter_names"}
    assert len(named["ll.Bank"]["seconds"]) == len(named["base"]["seconds"]) == 6
    assert 8 <= len(named["ll.Bank"]["misses"]) <= 24
    assert len(named["PEFT, set_adapter"]["seconds"]) == 3
    for name in named:
        assert name in text
