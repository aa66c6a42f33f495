"""The functional relatives beside us: jax-lorax and qwix, each probed in an environment of its own.

python -m benchmarks.measure.others [--lorax PYTHON] [--qwix PYTHON] [--report benchmarks/README.md]

The two don't install together (they need other releases of JAX), hence an interpreter each:
    python -m venv lorax
    lorax/bin/pip install jax-lorax==0.3.1 jax==0.4.24 jaxlib==0.4.24
    lorax/bin/pip install 'plum-dispatch<2.5' 'numpy<2' 'scipy<1.13'
    python -m venv qwix && qwix/bin/pip install qwix==0.1.8 flax
Every row is a program that was run; a library without an interpreter has no column.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lora_lite_func as ll

from .results import put_between

__all__ = ["main", "table"]

LAYERS, WIDTH, ROWS, RANK = 8, 512, 512, 8
START, END = "<!-- others: rendered by benchmarks/measure/others.py -->", "<!-- end of others -->"
WHAT = {
    "version": "version",
    "methods": "adapter methods",
    "identity": "LoRA before any training, off the base by at most",
    "vmap": "three adapters by the framework's own vmap, off a loop by at most",
}

_SHARED = f"""
import json
import jax, jax.numpy as jnp
L, D, N, R = {LAYERS}, {WIDTH}, {ROWS}, {RANK}
x = jax.random.normal(jax.random.PRNGKey(1), (N, D))
def say(**found):
    print(json.dumps({{k: v if isinstance(v, str) else float(v) for k, v in found.items()}}))
def methods(module):
    names = [name for name, value in vars(module).items() if isinstance(value, type)]
    return str(sum(name.startswith("Lora") and not name.endswith("Rule") for name in names))
"""

PROGRAMS = {
    "lorax": _SHARED
    + """
import lorax, importlib.metadata
W = [jax.random.normal(jax.random.PRNGKey(i), (D, D)) / D**0.5 for i in range(L)]
def f(W, x):
    for w in W:
        x = jnp.tanh(x @ w)
    return x
spec = lorax.simple_spec(W, decision_fn=lambda path, p: R)
made = [lorax.init_lora(W, spec, jax.random.PRNGKey(s)) for s in range(3)]
g = lorax.lora(f)
of = lambda factors: [type(v)(w, a, b, alpha=v.alpha) for v, w, (a, b) in zip(made[0], W, factors)]
moved = [[(v.a + 0.01, v.b + 0.01) for v in m] for m in made]
stack = jax.tree_util.tree_map(lambda *t: jnp.stack(t), *moved)
each = jnp.stack([g(of(m), x) for m in moved])
say(version=importlib.metadata.version("jax-lorax"), methods=methods(lorax),
    identity=jnp.abs(g(made[0], x) - f(W, x)).max(),
    vmap=jnp.abs(jax.vmap(lambda m: g(of(m), x))(stack) - each).max())
""",
    "qwix": _SHARED
    + """
import qwix, importlib.metadata
from flax import nnx
class Net(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(D, D, use_bias=False, rngs=rngs) for _ in range(L)])
    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x
net = Net(nnx.Rngs(0))
provider = qwix.LoraProvider(module_path=".*", rank=R, alpha=16.0)
adapted = qwix.apply_lora_to_model(net, provider, x, rngs=nnx.Rngs(1))
graph, own, rest = nnx.split(adapted, nnx.LoRAParam, ...)
moved = [jax.tree_util.tree_map(lambda t: t + 0.01 * (i + 1), own) for i in range(3)]
call = lambda p: nnx.merge(graph, p, rest)(x)
stack = jax.tree_util.tree_map(lambda *t: jnp.stack(t), *moved)
each = jnp.stack([call(p) for p in moved])
say(version=importlib.metadata.version("qwix"), methods=methods(qwix),
    identity=jnp.abs(call(own) - net(x)).max(),
    vmap=jnp.abs(jax.vmap(call)(stack) - each).max())
""",
}


def ours() -> dict[str, Any]:
    """The same of this library."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(part for _ in range(LAYERS) for part in (nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh()))
    ).requires_grad_(False)
    x, cfg = torch.randn(ROWS, WIDTH), ll.LoRAConfig(r=RANK)
    made = [
        torch.utils._pytree.tree_map(lambda t: t + 0.01, ll.init(net, cfg, seed=s))
        for s in range(3)
    ]
    with torch.no_grad():
        each = torch.stack([ll.apply(net, p, x) for p in made])
        mapped = torch.func.vmap(lambda p: ll.apply(net, p, x))(ll.stack(made))
        identity = (ll.apply(net, ll.init(net, cfg), x) - net(x)).abs().max().item()
    return {
        "version": ll.__version__,
        "methods": str(len(ll.variants())),
        "identity": identity,
        "vmap": (mapped - each).abs().max().item(),
    }


def probed(python: str, name: str) -> dict[str, Any]:
    """What a library's program printed, run by the interpreter that has it.

    Raises:
        RuntimeError: the program failed; with the end of what it said.
    """
    done = subprocess.run(
        [python, "-c", PROGRAMS[name]], capture_output=True, text=True, timeout=600, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{name} by {python}: {done.stderr.strip().splitlines()[-1:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def table(columns: dict[str, dict[str, Any]]) -> str:
    """The rows as markdown."""
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for key, what in WHAT.items():
        lines.append(
            f"| {what} | {' | '.join(_shown(column[key]) for column in columns.values())} |"
        )
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.1g}"


def main(argv: Sequence[str] | None = None) -> None:
    """Probe what is there, print the table, write it where it is kept."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.measure.others",
        description=__doc__.splitlines()[0] if __doc__ else "",
    )
    parser.add_argument("--lorax", metavar="PYTHON", help="an interpreter that has jax-lorax")
    parser.add_argument("--qwix", metavar="PYTHON", help="an interpreter that has qwix")
    parser.add_argument(
        "--report", type=Path, metavar="PAGE", help="put the table between its marks there"
    )
    given = parser.parse_args(argv)
    torch.set_num_threads(2)
    columns = {"here": ours()}
    for name, python in (("lorax", given.lorax), ("qwix", given.qwix)):
        if python:
            columns[name] = probed(python, name)
        else:
            print(f"{name}: no interpreter given, no column")
    made = table(columns)
    print(made)
    if given.report:
        text = given.report.read_text(encoding="utf-8")
        given.report.write_text(put_between(text, START, END, made), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
