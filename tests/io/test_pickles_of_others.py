"""A .bin file takes no more memory than a few times its size, whatever it says of its tensors."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lora_lite_func as ll
from lora_lite_func.io.pickles import read_pickle

BASE = torch.arange(4096.0).view(64, 64)


def written(file: Path, value: Any) -> Path:
    torch.save(value, file)
    return file


HUGE = {
    "expanded": {"a": torch.zeros(1).expand(2**20, 2**10)},
    "strided": {"a": torch.zeros(64).as_strided((2**16, 2**16), (0, 0))},
    "overlapping": {"a": BASE.view(-1).as_strided((4000, 90), (1, 1))},
    "many views": {f"a{i}": BASE[:, 1:].mT for i in range(100)},
}


@pytest.mark.parametrize("name", HUGE)
def test_views_beyond_their_storage_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ll.CheckpointError, match=r"more than the file holds|views of each other"):
        read_pickle(written(tmp_path / "a.bin", HUGE[name]))


def test_views_that_a_file_may_hold(tmp_path: Path) -> None:
    tied = {"a": BASE, "b": BASE, "c": BASE.mT, "d": BASE[:32], "e": torch.zeros(0, 4)}
    found = read_pickle(written(tmp_path / "a.bin", tied))
    assert all(torch.equal(found[name], t) for name, t in tied.items())
    assert all(t.is_contiguous() for t in found.values())


class Allocates:
    """What unpickling makes a large bytearray of."""

    def __reduce__(self) -> Any:
        return bytearray, (2**33,)


@pytest.mark.parametrize("protocol", [2, 4])
def test_an_index_that_allocates_is_refused(protocol: int, tmp_path: Path) -> None:
    torch.save({"a": Allocates()}, tmp_path / "a.bin", pickle_protocol=protocol)
    with pytest.raises(ll.CheckpointError, match=r"its index makes a .*bytearray"):
        read_pickle(tmp_path / "a.bin")


def test_entries_that_overlap_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2**16)}, tmp_path / "a.bin")
    raw = (tmp_path / "a.bin").read_bytes()
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        names = archive.namelist()
        start = archive.start_dir
    end = raw.rindex(b"PK\x05\x06")
    central, tail = raw[start:end], bytearray(raw[raw.rindex(b"PK\x05\x06") :])
    central = raw[start : start + len(central)]
    doubled = central + central  # each entry twice, at the same place
    tail[8:12] = struct.pack("<HH", 2 * len(names), 2 * len(names))
    tail[12:20] = struct.pack("<II", len(doubled), start)
    (tmp_path / "b.bin").write_bytes(raw[:start] + doubled + bytes(tail))
    with pytest.raises(ll.CheckpointError, match=r"overlap|can't be read|not a readable"):
        read_pickle(tmp_path / "b.bin")


def test_a_damaged_index(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": 1})[:-3])
    with pytest.raises(ll.CheckpointError, match="its index is damaged"):
        read_pickle(tmp_path / "a.bin")


def test_values_that_are_no_tensors(tmp_path: Path) -> None:
    learned = {"a": torch.nn.Parameter(BASE.clone())}
    assert torch.equal(read_pickle(written(tmp_path / "a.bin", learned))["a"], BASE)
    wrong: list[Any] = [{"a": 1}, [BASE], {"a": {"b": BASE}}, {1: BASE}, BASE]
    for value in wrong:
        with pytest.raises(ll.CheckpointError, match="expected a flat mapping"):
            read_pickle(written(tmp_path / "a.bin", value))
    parts = [torch.ones(2), torch.ones(3)]
    nested: dict[str, Tensor] = {"a": torch.nested.nested_tensor(parts, layout=torch.jagged)}
    with pytest.raises(ll.CheckpointError, match="found a nested tensor under 'a'"):
        read_pickle(written(tmp_path / "a.bin", nested))
    sparse: dict[str, Tensor] = {"a": torch.eye(3).to_sparse()}
    with pytest.raises(ll.CheckpointError, match=r"claims shape|can't be read"):
        read_pickle(written(tmp_path / "a.bin", sparse))
