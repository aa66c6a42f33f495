"""A bank serves what a dict of single adapters would, whatever is done to it and whoever still
holds what it was.
"""

from __future__ import annotations

import copy
import gc
import pickle
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.utils._pytree as pytree
from cases import CASES, Case
from helpers import Net, close, in_threads, leaves, moved, net, normal
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import lora_lite_func as ll
from lora_lite_func.core.torch_internals import shares_memory

MODEL = net(depth=1)
X = normal(4, 2, 16, seed=3)
NAMES = ("a", "b", "c", "d", "e")
KINDS: list[dict[str, Any]] = [
    {"r": 4},
    {"r": 4, "target_names": "up"},
    {"r": 2, "alpha": 4.0, "target_names": "down$"},
    {"r": 6, "alpha": 24.0},
    {"r": 3, "alpha": 1.0, "target_names": ("up", "head"), "exclude_names": ()},
]


def lora(seed: int = 0, model: Net = MODEL, **fields: Any) -> ll.Adapter:
    return moved(ll.init(model, ll.LoRAConfig(**{"r": 4, **fields})), seed)


def alone(several: Any, names: Any, x: Tensor = X, model: Net = MODEL) -> Tensor:
    """Each row by a call of its own."""
    own = [{} if name is None else several[name] for name in names]
    return torch.cat([ll.apply(model, p, x[i : i + 1]) for i, p in enumerate(own)])


def same(a: ll.Adapter, b: ll.Adapter) -> bool:
    return a.layout == b.layout and all(
        torch.equal(t, u) for t, u in zip(leaves(a), leaves(b), strict=True)
    )


# ----------------------------------------------------------------------------- against its oracle
class BankMachine(RuleBasedStateMachine):
    """Any sequence of changes, with values of it held over some of them."""

    def __init__(self) -> None:
        super().__init__()
        self.bank = ll.Bank(capacity=2)
        self.known: dict[str, ll.Adapter] = {}
        self.held: list[tuple[Any, Tensor]] = []
        self.count = 0

    def adapter(self, kind: int) -> ll.Adapter:
        self.count += 1
        return lora(self.count, **KINDS[kind])

    @rule(name=st.sampled_from(NAMES), kind=st.integers(0, len(KINDS) - 1))
    def put(self, name: str, kind: int) -> None:
        new = self.adapter(kind)
        (self.bank.replace if name in self.known else self.bank.add)(name, new)
        self.known[name] = new

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def drop(self, data: Any) -> None:
        name = data.draw(st.sampled_from(sorted(self.known)))
        self.bank.drop(name)
        del self.known[name]

    @precondition(lambda self: self.known)
    @rule(data=st.data(), how=st.sampled_from(["rows", "bound", "graph", "snapshot"]))
    def hold(self, data: Any, how: str) -> None:
        """Keep a value, and what it gives now."""
        names = data.draw(st.lists(st.sampled_from([None, *self.known]), min_size=4, max_size=4))
        rows, wanted = ll.rows(self.bank, names), alone(self.known, names)
        if how == "bound":
            bound = ll.bind(MODEL, rows)
            self.held.append((lambda: bound(X), wanted))
        elif how == "graph":
            x = X.clone().requires_grad_()
            y = ll.apply(MODEL, rows, x).square().sum()
            x2 = X.clone().requires_grad_()
            expected = torch.autograd.grad(alone(self.known, names, x2).square().sum(), x2)[0]
            self.held.append((lambda: torch.autograd.grad(y, x, retain_graph=True)[0], expected))
        elif how == "snapshot":
            snapshot = self.bank.snapshot()
            self.held.append((lambda: ll.apply(MODEL, ll.rows(snapshot, names), X), wanted))
        else:
            self.held.append((lambda: ll.apply(MODEL, rows, X), wanted))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def let_go(self, data: Any) -> None:
        self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        gc.collect()

    @invariant()
    def it_is_the_dict(self) -> None:
        assert set(self.bank) == set(self.known)
        assert len(self.bank) == len(self.known) <= self.bank.capacity
        for name, params in self.known.items():
            assert same(self.bank[name], params)

    @invariant()
    def what_was_taken_from_it_stays(self) -> None:
        for value, wanted in self.held:
            close(value(), wanted, 1e-10)


BankMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
TestBank = BankMachine.TestCase


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_every_method(case: Case) -> None:
    model, names = net(depth=2), ["b", None, "a", "b"]
    places = ("up", (), ("down$",))
    several = [
        moved(ll.init(model, case.config(r=4, target_names=places[i]), seed=i), i) for i in range(3)
    ]
    bank = ll.Bank({"a": several[0], "b": several[1]})
    close(
        ll.apply(model, ll.rows(bank, names), X),
        alone(dict(zip("ab", several, strict=False)), names, model=model),
        1e-10,
    )
    bank.replace("b", several[2])
    known = {"a": several[0], "b": several[2]}
    close(ll.apply(model, ll.rows(bank, names), X), alone(known, names, model=model), 1e-10)
    assert all(same(bank[name], params) for name, params in known.items())


# --------------------------------------------------------------------------------------- its memory
def memory(bank: ll.Bank) -> list[int]:
    return [t.data_ptr() for t in leaves(bank.snapshot()) if t.ndim > 1]


def test_a_change_writes_one_slot_where_it_is() -> None:
    bank = ll.Bank({name: lora(i) for i, name in enumerate(NAMES)}, capacity=5)
    before = memory(bank)
    for i in range(20):
        bank.replace("b", lora(i))
        bank.drop("c")
        bank.add("c", lora(i + 1))
    assert memory(bank) == before
    snapshot = bank.snapshot()
    for i in range(20):
        bank.replace("b", lora(i))
    assert memory(bank) != before  # the spare slot was used up while somebody held the memory
    known = {name: snapshot[ll.names(snapshot).index(name)] for name in "bc"}  # type: ignore[union-attr]
    assert same(known["b"], lora(19))
    assert same(known["c"], lora(20))


@pytest.mark.parametrize("verb", ["apply", "bind", "generate"])
def test_calls_that_are_over_hold_nothing(verb: str) -> None:
    """A server that answers batch by batch never makes its bank move."""
    model: Any = MODEL
    if verb == "generate":
        transformers = pytest.importorskip("transformers")
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                n_layer=1,
                n_head=2,
                n_embd=16,
                vocab_size=20,
                bos_token_id=1,
                eos_token_id=1,
                pad_token_id=0,
            )
        ).eval()
    several = [ll.init(model, ll.LoRAConfig(r=2), seed=i) for i in range(6)]

    def answer(names: list[str]) -> None:
        rows = ll.rows(bank, names)
        if verb == "apply":
            ll.apply(model, rows, X)
        elif verb == "bind":
            ll.bind(model, rows)(X)
        else:
            prompts = torch.ones(4, 3, dtype=torch.int64)
            ll.bind(model, rows).generate(
                prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=2
            )

    bank = ll.Bank({str(i): several[i] for i in range(4)}, capacity=4)
    before = memory(bank)
    gc.collect()
    gc.disable()
    try:
        for i in range(12):
            answer([str(i), str(i + 1), str(i), str(i + 3)])
            if verb == "generate":  # transformers leaves a cycle, which Python frees when it likes
                gc.collect()
            bank.drop(str(i))
            bank.add(str(i + 4), several[i % 6])
    finally:
        gc.enable()
    assert memory(bank) == before


@pytest.mark.parametrize("way", ["view", "alias", "parameter", "graph", "numpy"])
def test_whoever_holds_memory_is_seen(way: str) -> None:
    t = torch.zeros(4, 3)
    assert not shares_memory(t)
    held: Any = None
    if way == "view":
        held = t.data[1]
    elif way == "alias":
        held = t.data
    elif way == "parameter":
        held = torch.nn.Parameter(t.data.detach())
    elif way == "graph":
        held = t.data @ torch.ones(3, requires_grad=True)
    else:
        held = t.data.numpy()
    assert shares_memory(t)
    del held
    assert not shares_memory(t)


def test_a_tensor_taken_out_of_a_value_keeps_it() -> None:
    bank = ll.Bank({"a": lora(0)}, capacity=1)
    rows = ll.rows(bank, ["a"])
    t = rows.stack["layers.0.up"]["lora_A"][rows.ids.item()]
    before = t.clone()
    del rows
    for i in range(5):
        bank.replace("a", lora(i))
    assert torch.equal(t, before)


def test_it_grows_in_number_rank_sites_and_strengths() -> None:
    bank, known = ll.Bank(capacity=1), {}
    for i, kind in enumerate(KINDS):
        old = dict(known)
        rows = ll.rows(bank, [*old][:1] * 4) if old else None
        known[str(i)] = lora(i, **kind)
        bank.add(str(i), known[str(i)])
        names = [*known][-3:] + [None] * (4 - len([*known][-3:]))
        close(ll.apply(MODEL, ll.rows(bank, names), X), alone(known, names), 1e-10)
        if rows is not None:
            close(ll.apply(MODEL, rows, X), alone(old, [*old][:1] * 4), 1e-10)
    assert bank.capacity == 8
    stack = bank.stack()
    assert ll.names(stack) == tuple(known)
    assert all(same(stack[i], known[str(i)]) for i in range(len(known)))


def test_a_failure_leaves_it_as_it_was() -> None:
    bank = ll.Bank({"a": lora(0), "b": lora(1)}, capacity=2)
    known = {name: bank[name] for name in bank}
    bad: list[tuple[Any, str]] = [
        (ll.cast(lora(2), torch.float32), r"differs at .* take ll\.cast\(adapter, torch\.float64"),
        (lora(2, dropout=0.5), r"has other settings: dropout=0\.5"),
        (lora(2, model=net(depth=1, width=8)), "differs at 'layers.0.down': d_out=8"),
        (ll.partition(lora(2))[1], r"one part of a partition"),
        (ll.stack([lora(2), lora(3)]), "a stack of 2 adapters"),
        (ll.init(MODEL, ll.IA3Config()), "is 'ia3', the first 'lora'"),
        (3, "expected an Adapter, found int"),
    ]
    for adapter, message in bad:
        with pytest.raises(ll.StructureError, match=message):
            bank.replace("a", adapter)
        with pytest.raises(ll.StructureError, match=message):
            bank.add("c", adapter)
    for adapter, message in bad[3:5]:
        with pytest.raises(ll.StructureError, match=message):
            ll.Bank({"a": adapter})
    assert bank.capacity == 2
    assert list(bank) == ["a", "b"]
    assert all(same(bank[name], params) for name, params in known.items())


# --------------------------------------------------------------------------------- beside its calls
def test_threads_see_whole_adapters() -> None:
    versions = [{name: lora(10 * v + i) for i, name in enumerate("abcd")} for v in range(4)]
    bank = ll.Bank(versions[0], capacity=4)
    names = ["a", "b", "c", "d"]
    wanted = torch.stack([alone(version, names) for version in versions])  # (versions, rows, ...)

    def work(number: int) -> None:
        for step in range(60):
            if number < 2:
                bank.replace(
                    names[(step + number) % 4], versions[step % 4][names[(step + number) % 4]]
                )
            else:
                with torch.set_grad_enabled(number % 2 == 0):
                    y = ll.apply(MODEL, ll.rows(bank, names), X)
                off = (y - wanted).abs().flatten(2).amax(2)  # (versions, rows)
                assert (off.amin(0) < 1e-10).all()

    in_threads(5, work)


def test_inference_mode_and_graphs() -> None:
    with torch.inference_mode():
        bank = ll.Bank({"a": lora(0)}, capacity=1)
        bank.add("b", lora(1))
        ll.apply(MODEL, ll.rows(bank, ["a"] * 4), X)
    x = X.clone().requires_grad_()
    y = ll.apply(MODEL, ll.rows(bank, ["b"] * 4), x)
    with torch.inference_mode():
        for i in range(4):
            bank.replace("b", lora(2 + i))
    again = X.clone().requires_grad_()
    close(
        torch.autograd.grad(y.square().sum(), x),
        torch.autograd.grad(ll.apply(MODEL, lora(1), again).square().sum(), again),
        1e-10,
    )
    assert not any(t.requires_grad for t in leaves(bank.snapshot()))
    live = pytree.tree_map(lambda t: t.requires_grad_(), lora(9))
    bank.replace("b", live)
    assert not any(t.requires_grad for t in leaves(bank.snapshot()))


def test_one_graph_serves_a_bank_that_changes() -> None:
    bank, counter = ll.Bank({name: lora(i) for i, name in enumerate("abc")}), CompileCounter()
    step = torch.compile(
        lambda stack, ids, x: ll.apply(MODEL, ll.rows(stack, ids), x),
        backend=counter,
        fullgraph=True,
    )
    for i in range(4):
        rows = ll.rows(bank, ["c", "a", None, "b"])
        known = {name: bank[name] for name in bank}
        close(step(rows.stack, rows.ids, X), alone(known, ["c", "a", None, "b"]), 1e-10)
        bank.replace("abc"[i % 3], lora(20 + i))
    assert counter.frame_count == 1


# ----------------------------------------------------------------------------------------- the rest
def test_a_snapshot_is_a_stack_with_free_places(tmp_path: Path) -> None:
    bank = ll.Bank({"a": lora(0, r=6), "b": lora(1, target_names="up")}, capacity=3)
    bank.drop("a")
    snapshot = bank.snapshot()
    assert sorted(ll.names(snapshot) or ()) == ["", "", "", "b"]
    for value in (pickle.loads(pickle.dumps(snapshot)), copy.deepcopy(snapshot)):
        close(ll.apply(MODEL, ll.rows(value, ["b"] * 4), X), alone(bank, ["b"] * 4), 1e-10)
        assert value.layout == snapshot.layout
    y = torch.func.vmap(lambda p: ll.apply(MODEL, p, X))(snapshot)
    for i, name in enumerate(ll.names(snapshot) or ()):
        close(y[i], alone(bank, [name or None] * 4), 1e-10)
    with pytest.raises(ll.CheckpointError, match=r"free places, which no file keeps; save bank\."):
        ll.save(snapshot, tmp_path / "no")
    ll.save(bank.stack(), tmp_path / "stack")
    assert same(ll.load(tmp_path / "stack", member="b"), bank["b"])
    for name in ("", "a"):
        with pytest.raises(ll.StructureError, match=f"rows: no member '{name}'"):
            ll.rows(bank, [name])
    close(
        ll.apply(MODEL, ll.rows(ll.update(snapshot, "b", lora(5)), ["b"] * 4), X),
        ll.apply(MODEL, lora(5), X),
        1e-10,
    )


def test_what_a_bank_is_not() -> None:
    for capacity in (0, 1.5, True):
        with pytest.raises(ll.StructureError, match="capacity: expected a positive int"):
            ll.Bank(capacity=capacity)  # type: ignore[arg-type]
    for given in (lora(), [lora()]):
        with pytest.raises(ll.StructureError, match=r"Bank: expected \{name: adapter\}"):
            ll.Bank(given)  # type: ignore[arg-type]
    bank = ll.Bank({"french": lora()})
    for call, message in (
        (lambda: ll.rows(ll.Bank(), []), r"Bank: it is empty; bank\.add"),
        (lambda: bank.add("french", lora()), r"'french' is there already; bank\.replace"),
        (lambda: bank.add("", lora()), "expected a name, found ''"),
        (lambda: bank.add(3, lora()), "expected a name, found 3"),
        (lambda: bank.replace("frensh", lora()), "no member 'frensh'; did you mean 'french'"),
        (lambda: bank.drop("german"), "no member 'german'"),
        (lambda: bank["german"], "no member 'german'"),
        (lambda: ll.rows(bank, ["german"]), "no member 'german'"),
    ):
        with pytest.raises(ll.StructureError, match=message):
            call()

    def change(t: Tensor) -> Tensor:
        bank.replace("french", pytree.tree_map(lambda u: u * t, lora()))
        return t

    with pytest.raises(ll.UnsupportedError, match=r"no transform .* take ll\.update"):
        torch.func.grad(change)(torch.tensor(1.0))
    assert repr(bank) == "Bank(1 of 8: french)"


# ---------------------------------------------------------------------------------------- its files
def test_files_go_straight_into_a_slot(tmp_path: Path) -> None:
    own, other = lora(0, r=2), lora(1, target_names="up")
    ll.save(own, tmp_path / "own.safetensors")
    ll.to_peft(other, MODEL, tmp_path / "peft")
    bank = ll.Bank()
    ll.load_into(bank, "own", tmp_path / "own.safetensors", MODEL)
    ll.load_into(bank, "other", tmp_path / "peft", MODEL)
    names = ["own", "other", None, "own"]
    close(
        ll.apply(MODEL, ll.rows(bank, names), X), alone({"own": own, "other": other}, names), 1e-10
    )
    ll.save(other, tmp_path / "own.safetensors")  # the bank has its own memory
    assert same(bank["own"], own)
    ll.load_into(bank, "own", tmp_path / "own.safetensors")
    assert same(bank["own"], other)


def test_files_that_no_slot_takes(tmp_path: Path) -> None:
    bank = ll.Bank({"a": lora(0)})
    file = tmp_path / "f"
    ll.save((lora(1), lora(2)), file)
    with pytest.raises(ll.CheckpointError, match="holds 2 adapters, and a place in a bank"):
        ll.load_into(bank, "a", file)
    ll.save(ll.stack([lora(1), lora(2)]), file)
    with pytest.raises(ll.StructureError, match="a stack of 2 adapters"):
        ll.load_into(bank, "a", file)
    ll.save(lora(1), file)
    with pytest.raises(ll.CheckpointError, match=r"expected .*, the model has"):
        ll.load_into(bank, "a", file, net(depth=1, width=8))
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ll.CheckpointError, match="not a readable safetensors file"):
        ll.load_into(bank, "a", file)
    with pytest.raises(ll.StructureError, match="load_into: expected a Bank, found dict"):
        ll.load_into({}, "a", file)  # type: ignore[arg-type]
    assert same(bank["a"], lora(0))
