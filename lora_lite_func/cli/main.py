"""The command line: init, targets, methods, inspect, diff, convert, merge, check.

The exit code is 0 if all is well, 1 for a difference or a fault in a file, and 2 for a wrong usage.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, TextIO

from ..core.errors import LoraLiteError, printable
from . import check, convert, diff, init, inspect, merge, methods, targets

__all__ = ["main"]

_VERBS = {
    "methods": methods,
    "targets": targets,
    "init": init,
    "inspect": inspect,
    "diff": diff,
    "convert": convert,
    "merge": merge,
    "check": check,
}
"""Each has HELP, EXAMPLES, add_arguments(parser) and run(given) -> Answer."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    given = _parser().parse_args(arguments)
    try:
        text, data, code = given.run(given)
        _say(_json(data) if given.json else text, sys.stdout)
    except LoraLiteError as error:
        if given.json:
            _say(_json({"error": str(error)}), sys.stdout)
        _say(f"error: {printable(str(error))}", sys.stderr)
        return 1
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:
        _say("interrupted", sys.stderr)
        return 130
    return int(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lora_lite_func",
        description="Make adapters, look at them, compare, convert and merge them.",
        epilog=_examples("".join(verb.EXAMPLES.splitlines(True)[0] for verb in _VERBS.values())),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, verb in _VERBS.items():
        made = verbs.add_parser(
            name,
            help=verb.HELP,
            description=textwrap.fill(verb.HELP, 100),
            epilog=_examples(verb.EXAMPLES),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.add_argument(
            "--json",
            action="store_true",
            help='print JSON; numbers that are none are "NaN", "Infinity" and "-Infinity"',
        )
        verb.add_arguments(made)
        made.set_defaults(run=verb.run)
    return parser


def _examples(lines: str) -> str:
    return "examples:\n" + textwrap.indent(lines, "  ")


def _json(data: Any) -> str:
    return json.dumps(_finite(data), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    """Return the data with words in place of the numbers that JSON lacks."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _say(text: str, stream: TextIO) -> None:
    """Print text, with escapes for the characters that the stream's encoding lacks."""
    encoding = stream.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
