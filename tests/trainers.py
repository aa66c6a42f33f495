"""A Trainer of transformers, for a few steps of a small language model on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

DATA = [
    {"input_ids": row, "labels": row}
    for row in torch.randint(3, 64, (16, 8), generator=torch.Generator().manual_seed(0))
]


def trainer(bound: nn.Module, folder: Path, **settings: Any) -> Any:
    """A Trainer for four steps that saves after every second one; the settings override it."""
    import transformers

    known = {
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 100,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = transformers.TrainingArguments(str(folder), **{**known, **settings})
    return transformers.Trainer(bound, args, train_dataset=DATA, eval_dataset=DATA)
