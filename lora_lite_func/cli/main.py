"""The command line: inspect, diff, convert, merge, check. Exit codes: 0 fine, 1 a difference or a fault in a file, 2 a wrong usage."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ..core.adapter import Adapter
from ..core.errors import CheckpointError, LoraLiteError
from ..interop.open import form_of, open_adapter
from ..interop.peft import to_peft
from ..io.checkpoint import load, save
from ..io.model_folder import Shards, meta_model
from .diff import difference
from .inspect import describe_raw, inspected, table
from .merge import bar, merge_folder

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    given = _parser().parse_args(arguments)
    try:
        found = given.run(given)
    except LoraLiteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    text, data, code = found
    print(json.dumps(data, indent=2) if given.json else text)
    return int(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lora_lite_func",
        description="Look at adapters, compare, convert and merge them.",
    )
    verbs = parser.add_subparsers(required=True, metavar="COMMAND")

    def verb(name: str, run: Any, what: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=what, description=what)
        made.add_argument("--json", action="store_true", help="print JSON")
        made.set_defaults(run=run)
        return made

    one = verb(
        "inspect",
        _inspect,
        "what an adapter is: method, config, sites, numbers of parameters, norms of its updates",
    )
    one.add_argument("file", help="a file of ll.save, or a PEFT folder")
    one.add_argument(
        "--model",
        metavar="FOLDER",
        help="the base, for PEFT methods whose files don't say both sides of a layer",
    )
    two = verb("diff", _diff, "how two adapters differ; exit code 1 if they do")
    two.add_argument("a")
    two.add_argument("b")
    two.add_argument("--model", metavar="FOLDER", help="the base, as in inspect")
    convert = verb("convert", _convert, "an adapter in another form")
    convert.add_argument("input", help="a file of ll.save, or a PEFT folder")
    convert.add_argument("output", help="a file (ll) or a folder (peft)")
    convert.add_argument("--to", choices=("peft", "ll"), required=True)
    convert.add_argument("--model", metavar="FOLDER", help="the base: a folder with safetensors")
    convert.add_argument(
        "--as-lora", action="store_true", help="write VeRA as the LoRA that it amounts to"
    )
    merge = verb(
        "merge", _merge, "a model's folder with an adapter merged in, a shard in memory at a time"
    )
    merge.add_argument("base", help="the model's folder, with safetensors")
    merge.add_argument("adapter", help="a file of ll.save, or a PEFT folder")
    merge.add_argument("output", help="a new or empty folder")
    merge.add_argument(
        "--force",
        action="store_true",
        help="replace files of the same names in a folder that isn't empty",
    )
    check = verb(
        "check",
        _check,
        "whether an adapter fits a model, by their sizes alone; exit code 1 if it doesn't",
    )
    check.add_argument("model", help="the model's folder, with safetensors")
    check.add_argument("adapter")
    return parser


Answer = tuple[str, Any, int]
"""(text, JSON, exit code)."""


def _opened(path: str, model: str | None) -> Any:
    if model is None:
        return open_adapter(path)
    shards = Shards(model)
    return open_adapter(path, lambda **how: meta_model(shards, **how))


def _inspect(given: argparse.Namespace) -> Answer:
    try:
        data = inspected(_opened(given.file, given.model))
    except CheckpointError as error:
        if (
            given.model is not None
            or form_of(given.file) != "peft"
            or "give the base model" not in str(error)
        ):
            raise
        data = describe_raw(given.file)
        return table(data) + f"\n{error} (--model)", data, 0
    return table(data), data, 0


def _diff(given: argparse.Namespace) -> Answer:
    lines, data = difference(_opened(given.a, given.model), _opened(given.b, given.model))
    return "\n".join(lines) or "no difference", data, 1 if lines else 0


def _convert(given: argparse.Namespace) -> Answer:
    params = _opened(given.input, given.model)
    if given.to == "ll":
        save(params, given.output)
        load(given.output)
    else:
        shards = None if given.model is None else Shards(given.model)
        tables = [s.path for a in _parts(params) for s in a.sites.values() if s.kind == "embedding"]
        to_peft(
            params,
            None if shards is None else meta_model(shards, embeddings=tables),
            given.output,
            as_lora=given.as_lora,
        )
    text = f"{given.input} -> {given.output} ({given.to})"
    return text, {"input": given.input, "output": given.output, "to": given.to}, 0


def _merge(given: argparse.Namespace) -> Answer:
    names = merge_folder(given.base, given.adapter, given.output, force=given.force, progress=bar)
    return (
        f"{len(names)} tensors merged into {given.output}",
        {"output": given.output, "merged": names},
        0,
    )


def _check(given: argparse.Namespace) -> Answer:
    params = _opened(given.adapter, given.model)
    sites = [path for a in _parts(params) for path in a]
    text = f"fits: {len(sites)} sites of {given.model}"
    return text, {"fits": True, "sites": sites}, 0


def _parts(params: Any) -> list[Adapter]:
    if isinstance(params, Adapter):
        return [params]
    return list(params.values() if isinstance(params, Mapping) else params)
