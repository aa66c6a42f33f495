"""A file for another reader: the message names it, or says what the file seems to be."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import lora_lite_func as ll

MODEL = nn.Sequential(nn.Linear(8, 8))
A, B = torch.randn(2, 8), torch.randn(8, 2)
KOHYA = {"lora_unet_0.lora_down.weight": A, "lora_unet_0.lora_up.weight": B}
PEFT = {"base_model.model.0.lora_A.weight": A, "base_model.model.0.lora_B.weight": B}
STARTS = {
    b"PK\x03\x04 and so on": "a file of torch.save",
    b"GGUF\x03\x00\x00\x00\x00\x00": "a GGUF file",
    b'{"a": 1}  ': "a JSON text",
    b"version https://git-lfs.github.com/spec/v1": "a pointer of Git LFS",
    b"<!DOCTYPE html>": "a web page",
    b"": "it is empty",
}


def test_the_other_reader_is_named(tmp_path: Path) -> None:
    own, kohya, theirs = (tmp_path / name for name in ("own", "kohya", "theirs"))
    ll.save(ll.init(MODEL, ll.LoRAConfig(r=2)), own)
    safetensors.torch.save_file(KOHYA, kohya)
    safetensors.torch.save_file(PEFT, theirs)
    with pytest.raises(ll.CheckpointError, match=r"isn't an adapter .*; ll\.from_diffusion reads"):
        ll.load(kohya)
    with pytest.raises(ll.CheckpointError, match=r"isn't an adapter .*; ll\.from_peft, with its"):
        ll.load(theirs)
    for file, reader in ((own, "load"), (kohya, "from_diffusion")):
        with pytest.raises(ll.CheckpointError, match=rf"found none; ll\.{reader} reads it"):
            ll.from_peft(file.rename(file.with_suffix(".safetensors")), MODEL)
        with pytest.raises(ll.CheckpointError, match=rf"of lora-lite; ll\.{reader} reads it"):
            ll.from_lora_lite(file.with_suffix(".safetensors"), MODEL)


@pytest.mark.parametrize("start", STARTS, ids=STARTS.values())
def test_what_a_file_seems_to_be(start: bytes, tmp_path: Path) -> None:
    file = tmp_path / "file.safetensors"
    file.write_bytes(start)
    for read in (ll.load, lambda path: ll.from_diffusion(path, MODEL), ll.from_lora_lite):
        with pytest.raises(ll.CheckpointError, match=f"not a readable .*{STARTS[start]}"):
            read(file)
