"""Importing does nothing but define names, and imports inside the package point one way."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lora_lite_func as ll

PACKAGE = Path(ll.__file__).parent
FILES = {
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts): file
    for file in sorted(PACKAGE.rglob("*.py"))
}
RUNTIME = {"torch", "optree", "safetensors"}


def run(code: str) -> str:
    """A fresh interpreter with warnings as errors; what it printed."""
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=PACKAGE.parent, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


BEFORE_AND_AFTER = """
import os, sys, threading
TASKS = "/proc/self/task"
import torch, optree, safetensors, safetensors.torch
def state():
    return {
        "environment": dict(os.environ),
        "threads": threading.active_count(),
        "tasks": len(os.listdir(TASKS)) if os.path.isdir(TASKS) else 0,
        "random": torch.random.get_rng_state().tolist(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "grad": torch.is_grad_enabled(),
        "threads of torch": torch.get_num_threads(),
        "directory": os.getcwd(),
        "path": list(sys.path),
    }
before, modules = state(), set(sys.modules)
import lora_lite_func
changed = sorted(key for key, value in state().items() if before[key] != value)
packages = {name.split(".")[0] for name in set(sys.modules) - modules}
new = sorted(packages - set(sys.stdlib_module_names))
print(repr((changed, new, "torch._dynamo" in sys.modules)))
"""


@pytest.fixture(scope="module")
def seen() -> tuple[list[str], list[str], bool]:
    """What an import changed, which packages it loaded, whether it loaded torch's compiler."""
    found: tuple[list[str], list[str], bool] = ast.literal_eval(run(BEFORE_AND_AFTER))
    return found


def test_import_is_silent_and_changes_nothing_but_the_environment(
    seen: tuple[list[str], list[str], bool],
) -> None:
    changed, new, _ = seen
    assert set(changed) <= {"environment"}
    assert not {
        "transformers",
        "peft",
        "accelerate",
        "bitsandbytes",
        "matplotlib",
        "pandas",
        "scipy",
    } & set(new)


def test_import_loads_no_compiler_and_sets_no_variable(
    seen: tuple[list[str], list[str], bool],
) -> None:
    changed, new, compiler = seen
    assert changed == []
    assert new == ["lora_lite_func"]
    assert not compiler


@pytest.mark.parametrize(
    "order", ["torch.utils._cxx_pytree, lora_lite_func", "lora_lite_func, torch.utils._cxx_pytree"]
)
def test_both_of_torchs_pytrees_know_the_container(order: str) -> None:
    code = f"""
import {order}
import optree, torch, lora_lite_func as ll
import torch.utils._pytree as python, torch.utils._cxx_pytree as cxx
params = ll.init(torch.nn.Linear(4, 4), ll.LoRAConfig(r=2))
part, _ = ll.partition(params, lambda path, name: name == "lora_A")
for tree in (python, cxx, optree):
    assert isinstance(tree.tree_map(lambda t: t + 1, params), ll.Adapter)
    assert len(tree.tree_leaves(params)) == 2 and len(tree.tree_leaves(part)) == 1
print("fine")
"""
    assert run(code) == "fine\n"


# --------------------------------------------------------------------------------- the import graph
def _imports(name: str) -> tuple[set[str], set[str]]:
    """(modules of the package, top-level packages) that a file imports when it is imported."""
    inside: set[str] = set()
    outside: set[str] = set()
    is_package = FILES[name].name == "__init__.py"
    home = (
        name.split(".")[: None if is_package and name == "__init__" else -1]
        if name != "__init__"
        else []
    )
    pending: list[ast.AST] = [ast.parse(FILES[name].read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            # nothing outside is imported by it
            pending += [n for n in node.body if isinstance(n, ast.ImportFrom) and n.level]
            pending += node.orelse
            continue
        if isinstance(node, ast.Import):
            outside |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            outside.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            base = home[: len(home) - node.level + 1] + (
                node.module.split(".") if node.module else []
            )
            for alias in node.names:
                found = [
                    c
                    for c in (
                        ".".join([*base, alias.name]),
                        ".".join(base),
                        ".".join([*base, "__init__"]),
                    )
                    if c in FILES
                ]
                assert found, f"{name} imports {alias.name} from {'.'.join(base)}"
                inside.add(found[0])
        pending.extend(ast.iter_child_nodes(node))
    return inside, outside


GRAPH = {name: _imports(name)[0] for name in FILES}


def test_no_cycles() -> None:
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in done:
            for other in sorted(GRAPH[name]):
                visit(other, (*above, name))
            done.add(name)

    for name in GRAPH:
        visit(name, ())
    assert len(done) == len(FILES) > 100


PACKAGES: dict[str, set[str]] = {
    "core": set(),
    "kernels": {"core"},
    "layers": {"core"},
    "variants": {"core", "kernels"},
    "injection": {"core", "kernels", "layers"},
    "algebra": {"core", "kernels", "variants"},
    "io": {"core", "layers"},
    "interop": {"core", "variants", "layers", "injection", "algebra", "io"},
    "api": {"core", "layers", "injection", "algebra", "interop"},
    "cli": {"core", "layers", "injection", "algebra", "io", "api", "interop"},
}
"""What each package may import, beside itself."""


def test_packages_import_one_way() -> None:
    assert {name.partition(".")[0] for name in FILES if "." in name} == set(PACKAGES)
    for name, imported in GRAPH.items():
        package, dot, _ = name.partition(".")
        if not dot:
            continue  # the root gathers the surface
        found = {other.partition(".")[0] for other in imported}
        odd = found - PACKAGES[package] - {package}
        assert not odd, f"{name} imports {', '.join(sorted(odd))}"


def test_methods_do_not_import_methods() -> None:
    for name, imported in GRAPH.items():
        home, _, leaf = name.rpartition(".")
        if home == "variants" and leaf != "__init__":
            methods = {m for m in imported if re.match(r"variants\.[^_]", m)}
            assert not methods, f"{name} imports {sorted(methods)}"


def test_what_a_file_takes_from_another_is_in_its_all() -> None:
    for name, path in FILES.items():
        home = name.split(".")[:-1]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                other = ".".join(
                    [*home[: len(home) - node.level + 1], *(node.module or "").split(".")]
                ).strip(".")
                said = (
                    getattr(importlib.import_module(f"lora_lite_func.{other}"), "__all__", None)
                    if other in FILES
                    else None
                )
                odd = (
                    []
                    if said is None
                    else [alias.name for alias in node.names if alias.name not in said]
                )
                assert not odd, (
                    f"{name} takes {', '.join(odd)} from {other}, whose __all__ hasn't it"
                )


def test_only_declared_dependencies_are_imported_at_the_top() -> None:
    for name in FILES:
        outside = _imports(name)[1]
        odd = outside - RUNTIME - set(sys.stdlib_module_names)
        assert not odd, f"{name} imports {sorted(odd)}"


def test_the_surface_is_what_it_says() -> None:
    assert list(ll.__all__) == sorted(ll.__all__, key=lambda n: (n.islower(), n))
    assert all(getattr(ll, name).__doc__ for name in ll.__all__)
    assert {
        v.config.__name__
        for v in ll.variants().values()
        if v.config.__module__.startswith("lora_lite_func")
    } <= set(ll.__all__)
