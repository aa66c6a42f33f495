"""Test-wide settings: hypothesis profiles (derandomised in CI), one thread per test process."""

from __future__ import annotations

import os

import hypothesis
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile(
    "ci", derandomize=True, deadline=None, max_examples=10, print_blob=True
)
hypothesis.settings.register_profile("dev", deadline=None, max_examples=10)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")
