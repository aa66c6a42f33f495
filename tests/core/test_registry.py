"""Methods that come on use: nobody can tell that they weren't there before."""

from __future__ import annotations

import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import lora_lite_func as ll
from lora_lite_func.core.registry import variant_named
from lora_lite_func.variants import METHODS

PROGRAMS = {
    "importing loads few": """
        files = [name for name in sys.modules if name.startswith("lora_lite_func.variants.")]
        assert not files, files
    """,
    "a name of the root": """
        assert ll.PiSSAConfig(r=2) == pickle.loads(pickle.dumps(ll.PiSSAConfig(r=2)))
        assert ll.PiSSAConfig.__module__ == "lora_lite_func"
        assert ll.lookup(ll.PiSSAConfig).name == "pissa"
    """,
    "a name in a file": """
        params = ll.load(FILE)
        assert params.layout.variant.name == "hra"
        assert type(params.config) is ll.HRAConfig
    """,
    "a pickled adapter": """
        params = pickle.loads(PICKLE)
        assert params.layout.variant is ll.variants()["hra"]
    """,
    "all of them": """
        assert list(ll.variants()) == sorted(METHODS)
        assert {v.config.__name__ for v in ll.variants().values()} <= set(ll.__all__)
    """,
    "a file imported by itself": """
        from lora_lite_func.variants.pissa import PiSSAConfig
        params = ll.init(torch.nn.Linear(4, 4), PiSSAConfig(r=2))
        assert params.layout.variant.name == "pissa"
        assert PiSSAConfig is ll.PiSSAConfig
    """,
    "a name that is taken": """
        for name in ("hra", "abba"):
            try:
                ll.register(dataclasses.replace(ll.variants()["lora"], name=name))
            except ll.ConfigError as error:
                assert "has that name or config already" in str(error), error
            else:
                raise AssertionError(name)
    """,
    "many threads at once": """
        found, start = [], threading.Barrier(16)
        def ask(i):
            start.wait()
            name, (_, config) = list(METHODS.items())[i % 4 * 9]
            known = variant_named(name) if i % 2 else ll.lookup(getattr(ll, config))
            found.append(known is not None and known.name == name)
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(16)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert found == [True] * 16, found
    """,
}


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the programs begin with."""
    params = ll.init(torch.nn.Linear(4, 4), ll.HRAConfig(r=2))
    file = tmp_path_factory.mktemp("registry") / "hra.safetensors"
    ll.save(params, file)
    return (
        "import dataclasses, pickle, sys, threading\n"
        "import torch\n"
        "import lora_lite_func as ll\n"
        "from lora_lite_func.core.registry import variant_named\n"
        "from lora_lite_func.variants import METHODS\n"
        f"FILE, PICKLE = {str(file)!r}, {pickle.dumps(params)!r}\n"
    )


@pytest.mark.parametrize("what", PROGRAMS)
def test_a_method_comes_on_use(what: str, facts: str) -> None:
    program = facts + textwrap.dedent(PROGRAMS[what])
    ran = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent.parent,
    )
    assert ran.returncode == 0, ran.stderr


def test_the_table_says_where_each_is() -> None:
    for name, (file, config) in METHODS.items():
        variant = variant_named(name)
        assert variant is not None
        assert variant.config is getattr(ll, config)
        assert variant.param_specs.__module__.startswith("lora_lite_func.variants.")
        module = sys.modules[f"lora_lite_func.variants.{file}"]
        assert vars(module)[config] is variant.config
