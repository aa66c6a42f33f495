"""Test-wide settings: hypothesis profiles (derandomised in CI), one thread per test process."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import language_model
import pytest
import torch

import lora_lite_func as ll

torch.set_num_threads(1)
ll.variants()  # all are known, so that tests which forget a method of theirs forget no other
hypothesis.settings.register_profile(
    "ci", derandomize=True, deadline=None, max_examples=10, print_blob=True
)
hypothesis.settings.register_profile("dev", deadline=None, max_examples=10)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small causal language model; nobody may write in it."""
    return language_model.write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Single-digit additions as JSON lines."""
    return language_model.write_sums(tmp_path_factory.mktemp("task") / "sums.jsonl")


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a program sets in the environment is undone afterwards."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
