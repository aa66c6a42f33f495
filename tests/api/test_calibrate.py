"""Statistics of what layers see, and the starts made of them: each against sums and formulas
written out by hand.
"""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CALIBRATED, Case, needs_data, start
from families import FAMILIES
from helpers import Net, close, leaves, moved, net, same_state, seen_at, snapshot
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

import lora_lite_func as ll

UP = "layers.1.up"
FROM_DATA = [case for case in CALIBRATED if needs_data(case)]


def data(
    count: int = 3,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    shape: tuple[int, ...] = (2, 8, 16),
) -> list[Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(shape, generator=gen, dtype=torch.float64) + 0.5).to(dtype)
        for _ in range(count)
    ]


def mean_square(y: Any, batch: Any) -> Tensor:
    return y.square().mean()


@pytest.mark.parametrize(
    "cfg", [ll.EVAConfig(r=4), ll.CorDAConfig(r=4)], ids=lambda cfg: type(cfg).__name__
)
def test_the_input_of_a_pair_is_the_batch(cfg: ll.AdapterConfig) -> None:
    model, xs = net(), data()
    wanted = leaves(ll.init(model, cfg, calibration_data=xs))
    joined, labels = torch.cat(xs), torch.arange(6)
    pairs: list[Any] = [
        [(x, torch.ones(2)) for x in xs],
        [({"x": x}, 1) for x in xs],
        [[(x,), None] for x in xs],
    ]
    for batches in (*pairs, DataLoader(TensorDataset(joined, labels), batch_size=2)):
        close(leaves(ll.init(model, cfg, calibration_data=batches)), wanted, 1e-12)
    attention = Attention()  # which takes two
    tokens, mask = data(1, shape=(2, 5, 8))[0], torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    apart = ll.init(
        attention, cfg, calibration_data=[{"hidden": tokens, "attention_mask": mask.bool()}]
    )
    assert ll.init(attention, cfg, calibration_data=[(tokens, mask)]).keys() == apart.keys()


class Attention(nn.Module):
    """q, k and v read one input; o reads another. Tokens may be padding."""

    def __init__(self, width: int = 8, labels: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (
            nn.Linear(width, width, dtype=torch.float64) for _ in range(4)
        )

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        scores = self.q(hidden) @ self.k(hidden).mT
        if attention_mask is not None:
            scores = scores.masked_fill(attention_mask[:, None] == 0, float("-inf"))
        return self.o(scores.softmax(-1) @ self.v(hidden))


# ----------------------------------------------------------------------------------------- the sums
def test_sums_are_those_of_the_collected_inputs() -> None:
    model = net()
    found = ll.calibrate(model, ll.EVAConfig(r=4), data())
    assert sorted(found) == sorted(ll.init(model, ll.LoRAConfig()))
    for path in found:
        X = seen_at(net(), path, data())
        seen = found[path]
        assert seen.count == len(X) == 48
        close(
            (seen.mean, seen.magnitude, seen.second),
            (X.mean(0), X.abs().mean(0), X.mT @ X / len(X)),
            1e-12,
        )


@pytest.mark.parametrize("case", FROM_DATA, ids=repr)
def test_streaming_equals_one_large_batch(case: Case) -> None:
    model, cfg, parts = net(), case.config(r=4), data()
    streamed = ll.calibrate(model, cfg, parts, loss_fn=mean_square)
    at_once = ll.calibrate(model, cfg, [torch.cat(parts)], loss_fn=mean_square)
    for path in streamed:
        a, b = streamed[path], at_once[path]
        assert (a.batches, b.batches, a.calls, b.calls) == (3, 1, 3, 1)
        if a.moments is not None:
            close((a.mean, a.magnitude, a.second), (b.mean, b.magnitude, b.second), 1e-12)
        if a.slope is not None:
            close(a.gradient, b.gradient, 1e-12)


@pytest.mark.parametrize("case", FROM_DATA, ids=repr)
def test_shards_add_up_to_the_whole(case: Case) -> None:
    model, cfg, batches = net(), case.config(r=4), data(5)
    whole = ll.calibrate(model, cfg, batches, loss_fn=mean_square)
    first, second = (
        ll.calibrate(model, cfg, shard, loss_fn=mean_square) for shard in (batches[:2], batches[2:])
    )
    both = first + pickle.loads(pickle.dumps(second))
    for path in whole:
        assert (both[path].batches, both[path].calls) == (5, 5)
        if whole[path].moments is not None:
            assert both[path].count == whole[path].count
            close(both[path].second, whole[path].second, 1e-12)
        if whole[path].slope is not None:
            close(both[path].gradient, whole[path].gradient, 1e-12)
    direct = ll.init(model, cfg, calibration_data=batches, loss_fn=mean_square)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            leaves(ll.init(model, cfg, calibration_data=whole)), leaves(direct), strict=True
        )
    )


def test_shards_that_do_not_belong_together_are_refused() -> None:
    model = net()
    some, other = (
        ll.calibrate(model, ll.EVAConfig(target_names=name), data()) for name in ("up", "down")
    )
    with pytest.raises(ll.StructureError, match=r"site 'layers.0.down' is in the second alone"):
        some + other
    gradients = ll.calibrate(model, ll.LoRAGAConfig(target_names="up"), data(), loss_fn=mean_square)
    with pytest.raises(ll.StructureError, match="has inputs in one of the two alone"):
        some + gradients
    with pytest.raises(KeyError, match=r"no site 'layers.0.upp'; did you mean 'layers.0.up'"):
        some["layers.0.upp"]


def test_layers_with_one_input_share_one_sum() -> None:
    model = Attention()
    found = ll.calibrate(model, ll.EVAConfig(r=2), data(shape=(2, 5, 8)))
    assert found["q"].moments is found["k"].moments is found["v"].moments
    assert found["q"].moments is not found["o"].moments
    twice = found + found
    assert twice["q"].moments is twice["v"].moments
    assert twice["q"].count == 60


def test_layers_with_one_past_and_two_presents_do_not_share() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Linear(4, 4, dtype=torch.float64) for _ in range(2))

        def forward(self, x: Tensor, far: bool, in_place: bool = False) -> Tensor:
            x = x * 1.0
            y = self.a(x)
            return y + self.b(x.mul_(2.0) if in_place else x + 1.0 if far else x)

    model = Fork()
    x = data(1, shape=(6, 4))[0]
    batches = [(x, False), (x, True), (x, False)]
    found = ll.calibrate(model, ll.EVAConfig(r=2), batches)
    close(found["a"].mean, x.mean(0), 1e-12)
    close(found["b"].mean, x.mean(0) + 1.0 / 3.0, 1e-12)
    found = ll.calibrate(model, ll.EVAConfig(r=2), [(x, False, True)])
    close(found["b"].mean, 2.0 * x.mean(0), 1e-12)
    with pytest.raises(
        ll.UnsupportedError, match="site 'a': the model changes its input in place afterwards"
    ):
        ll.calibrate(
            model,
            ll.LoRAGAConfig(r=2),
            [{"x": x, "far": False, "in_place": True}],
            loss_fn=mean_square,
        )


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_padding_does_not_count(dtype: torch.dtype) -> None:
    model = Attention()
    hidden = data(1, shape=(3, 5, 8))[0]
    mask = (torch.arange(5) < torch.tensor([5, 2, 3])[:, None]).to(dtype)
    padded = torch.where(mask[..., None] > 0, hidden, torch.tensor(1e6, dtype=torch.float64))
    batch = {"hidden": padded, "attention_mask": mask, "labels": torch.zeros(3)}
    found = ll.calibrate(model, ll.EVAConfig(r=2), [batch])
    rows = hidden[mask > 0]
    assert found["q"].count == len(rows) == 10
    close(found["q"].second, rows.mT @ rows / 10, 1e-12)
    alone = [{"hidden": h[None, : int(m.sum())]} for h, m in zip(hidden, mask, strict=True)]
    close(found["o"].second, ll.calibrate(model, ll.EVAConfig(r=2), alone)["o"].second, 1e-10)


def test_padding_does_not_count_in_flattened_tokens() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(8, 8, dtype=torch.float64)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.up(x.flatten(0, 1))

    x, mask = data(1, shape=(2, 3, 8))[0], torch.tensor([[1, 1, 0], [1, 0, 0]])
    found = ll.calibrate(Flat(), ll.EVAConfig(r=2), [{"x": x, "attention_mask": mask}])
    assert found["up"].count == 3
    close(found["up"].mean, x[mask > 0].mean(0), 1e-12)


# ---------------------------------------------------------------------------------------- gradients
def test_gradient_is_autograds_of_the_weight() -> None:
    model, batches = net(), data()
    found = ll.calibrate(model, ll.LoRAGAConfig(r=4), batches, loss_fn=mean_square)
    for path in found:
        weight = model.get_submodule(path).weight
        expected = sum(
            torch.autograd.grad(model(x).square().mean(), weight)[0] for x in batches
        ) / len(batches)
        close(found[path].gradient / expected.norm(), expected / expected.norm(), 1e-12)
        assert (
            found[path].gradient / expected.norm() - expected / expected.norm()
        ).abs().max() < 1e-12


def test_gradient_of_a_layer_called_twice_is_the_sum() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.inner(x).relu_())

    model, x = Twice(), data(1, shape=(20, 8))[0]
    found = ll.calibrate(model, ll.LoRAGAConfig(r=2), [x], loss_fn=mean_square)
    expected = torch.autograd.grad(model(x).square().mean(), model.inner.weight)[0]
    assert found["inner"].calls == 2
    close(found["inner"].gradient / expected.norm(), expected / expected.norm(), 1e-12)


# ------------------------------------------------------------------------------ batches of any form
def test_forms_of_a_batch() -> None:
    model, cfg, xs = net(), ll.EVAConfig(r=4), data(4, shape=(8, 16))
    expected = ll.calibrate(model, cfg, xs)
    rows = TensorDataset(torch.cat(xs), torch.zeros(32))
    forms: dict[str, tuple[Any, Any]] = {
        "generator": ((x for x in xs), None),
        "tuples": ([(x,) for x in xs], None),
        "lists": ([[x] for x in xs], None),
        "mappings": ([{"x": x, "labels": 0} for x in xs], None),
        "input and target": ([(x, x) for x in xs], mean_square),
        "input as a mapping, and target": ([({"x": x}, x) for x in xs], mean_square),
        "input as a tuple, and target": ([((x,), x) for x in xs], mean_square),
        "DataLoader of tensors": (DataLoader(torch.cat(xs), batch_size=8), None),
        "DataLoader of pairs": (DataLoader(rows, batch_size=8), mean_square),
    }
    for name, (batches, loss_fn) in forms.items():
        found = ll.calibrate(model, cfg, batches, loss_fn=loss_fn)
        for path in expected:
            assert torch.equal(found[path].second, expected[path].second), name


def test_labels_go_to_a_forward_that_takes_them_and_the_loss_gets_the_batch() -> None:
    class WithLabels(Net):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
            y = super().forward(x)
            return y if labels is None else (y - labels).square().mean()

    model = WithLabels().double()
    x, labels = data(1)[0], torch.ones(8, dtype=torch.float64)
    inside = ll.calibrate(
        model, ll.LoRAGAConfig(r=4), [{"x": x, "labels": labels}], loss_fn=lambda loss, batch: loss
    )
    outside = ll.calibrate(
        model,
        ll.LoRAGAConfig(r=4),
        [(x, labels)],
        loss_fn=lambda y, batch: (y - batch[1]).square().mean(),
    )
    for path in inside:
        assert torch.equal(inside[path].gradient, outside[path].gradient)


# ------------------------------------------------------------------------------- nothing is written
@pytest.mark.parametrize("case", FROM_DATA, ids=repr)
def test_the_model_is_never_written_and_runs_in_eval_mode(case: Case) -> None:
    model = (
        nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(0.9), nn.Linear(16, 16))
        .double()
        .train()
    )
    cfg, batches = case.config(r=2), data(2, shape=(20, 16))
    before, state = snapshot(model), torch.random.get_rng_state()
    params = ll.init(model, cfg, calibration_data=batches, loss_fn=mean_square)
    assert same_state(before, snapshot(model))
    assert torch.equal(state, torch.random.get_rng_state())

    def fails(y: Tensor, batch: Tensor) -> Tensor:
        raise ZeroDivisionError("inside the loss")

    if cfg.__class__ is ll.LoRAGAConfig:
        with pytest.raises(ZeroDivisionError, match="inside the loss"):
            ll.init(model, cfg, calibration_data=batches, loss_fn=fails)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ll.init(
            model,
            cfg,
            calibration_data=[torch.ones(3, 5, dtype=torch.float64)],
            loss_fn=mean_square,
        )
    assert same_state(before, snapshot(model))
    model.eval()
    again = ll.init(model, cfg, calibration_data=batches, loss_fn=mean_square)
    assert all(torch.equal(a, b) for a, b in zip(leaves(params), leaves(again), strict=True))


def test_buffers_that_a_forward_writes_are_the_copys_own() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
            self.register_buffer("running", torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.running.add_(x.mean(0))
            return self.inner(x)

    model = Counts().eval()
    before = snapshot(model)
    ll.calibrate(model, ll.EVAConfig(r=2), data(2, dtype=torch.float32, shape=(5, 8)))
    assert same_state(before, snapshot(model))


@pytest.mark.parametrize("case", FROM_DATA, ids=repr)
@pytest.mark.parametrize("around", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_the_callers_grad_mode_does_not_matter(case: Case, around: Callable[[], Any]) -> None:
    model, cfg = net(), case.config(r=4)
    expected = start(case, model, cfg)
    with around():
        found = ll.init(model, cfg, calibration_data=data(1), loss_fn=mean_square)
        again = start(case, model, cfg)
    assert sorted(found) == sorted(expected)
    assert all(torch.equal(a, b) for a, b in zip(leaves(again), leaves(expected), strict=True))


@pytest.mark.parametrize("case", FROM_DATA, ids=repr)
def test_half_precision_models_are_summed_in_float32(case: Case) -> None:
    model, cfg = net(dtype=torch.bfloat16), case.config(r=4)
    found = ll.calibrate(model, cfg, data(2, dtype=torch.bfloat16), loss_fn=mean_square)
    for seen in found.values():
        assert (seen.slope if seen.moments is None else seen.second).dtype == torch.float32
    params = ll.init(model, cfg, calibration_data=found)
    specs = params.layout.specs
    assert {
        t.dtype
        for path, ts in params.items()
        for name, t in ts.items()
        if specs[path][name].dtype is None
    } == {torch.bfloat16}
    x = data(1, seed=5, dtype=torch.bfloat16)[0]
    assert torch.equal(ll.apply(model, params, x), model(x))


def test_autocast_does_not_reach_the_sums() -> None:
    model, xs = net(dtype=torch.float32), data(2, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = ll.calibrate(model, ll.EVAConfig(r=4), xs)
    X = seen_at(model, "layers.0.up", xs)
    close(found["layers.0.up"].second, X.mT @ X / len(X), 1e-6)


@pytest.mark.parametrize("cfg", [ll.EVAConfig(r=4), ll.LoRAGAConfig(r=4)])
def test_a_bound_model_is_calibrated_with_its_adapter_in(cfg: ll.AdapterConfig) -> None:
    model = net()
    bound = ll.bind(model, ll.init(model, ll.IA3Config()))
    on_bound = ll.init(bound, cfg, calibration_data=data(), loss_fn=mean_square)
    on_model = ll.init(model, cfg, calibration_data=data(), loss_fn=mean_square)
    assert all(p.grad is None for p in bound.parameters())
    close(leaves(on_bound), leaves(on_model), 1e-9)  # IA3 starts as the identity
    moved_on = ll.calibrate(
        ll.bind(model, moved(ll.init(model, ll.IA3Config()))), ll.EVAConfig(), data()
    )
    assert (
        moved_on[UP].second - ll.calibrate(model, ll.EVAConfig(), data())[UP].second
    ).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------- errors
def test_missing_data_and_bad_data_are_named() -> None:
    model, eva, ga = net(), ll.EVAConfig(r=4), ll.LoRAGAConfig(r=2)
    with pytest.raises(
        ll.ConfigError, match="eva starts from the layers' inputs: give calibration_data"
    ):
        ll.init(model, eva)
    with pytest.raises(
        ll.ConfigError, match="lora_ga starts from gradients: give calibration_data and loss_fn"
    ):
        ll.init(model, ga)
    with pytest.raises(
        ll.ConfigError, match=r"lora_ga starts from gradients: give loss_fn, \(output, batch\)"
    ):
        ll.init(model, ga, calibration_data=data())
    for call in (
        lambda: ll.init(model, ll.PiSSAConfig(), calibration_data=data()),
        lambda: ll.calibrate(model, ll.PiSSAConfig(), data()),
    ):
        with pytest.raises(ll.ConfigError, match="pissa takes no calibration data"):
            call()
    for empty in ([], iter(())):
        with pytest.raises(ll.ConfigError, match="expected at least one batch, found none"):
            ll.init(model, eva, calibration_data=empty)
    for one in (data()[0], {"x": data()[0]}, "text", 3):
        with pytest.raises(
            ll.ConfigError, match=f"expected an iterable of batches, found {type(one).__name__}"
        ):
            ll.init(model, eva, calibration_data=one)
    with pytest.raises(
        ll.ConfigError,
        match=r"Net.forward can't take a batch of 3 in a tuple: .*a pair is \(input, target\)",
    ):
        ll.init(model, eva, calibration_data=[(data()[0], 1, 2)])
    with pytest.raises(ll.ConfigError, match=r"Net.forward can't take a batch of a mapping with z"):
        ll.init(model, eva, calibration_data=[{"z": data()[0]}])
    with pytest.raises(ll.ConfigError, match="an empty tuple is no batch"):
        ll.init(model, ga, calibration_data=[()], loss_fn=mean_square)


def test_sites_without_data_are_named() -> None:
    class Half(Net):
        def forward(self, x: Tensor) -> Tensor:
            self.layers[1](x.detach())
            return self.head(self.layers[0](x))

    model = Half().double()
    x = data()
    with pytest.raises(
        ll.ConfigError, match=r"site 'layers.1.up': no gradient of the loss reached it"
    ):
        ll.init(model, ll.LoRAGAConfig(r=2), calibration_data=x, loss_fn=mean_square)
    for case in FROM_DATA:
        if "eva" not in case.name:
            continue
        with pytest.raises(
            ll.ConfigError, match=r"site 'layers.0.up': EVA finds 8 directions .* found 3"
        ):
            ll.init(
                model, case.config(r=8), calibration_data=[torch.ones(3, 16, dtype=torch.float64)]
            )
    with pytest.raises(
        ll.ConfigError, match=r"site 'layers.0.up': CorDA finds 8 directions .* found 3"
    ):
        ll.init(model, ll.CorDAConfig(), calibration_data=[torch.ones(3, 16, dtype=torch.float64)])
    with pytest.raises(
        ll.ConfigError,
        match=r"site 'layers.\d.\w+': LoRA-GA takes 2r = 8 directions of the gradient, found [123]",
    ):
        ll.init(net(), ll.LoRAGAConfig(r=4), calibration_data=[x[0][0, :3]], loss_fn=mean_square)
    Half.forward = lambda self, x: self.head(self.layers[0](x))  # type: ignore[method-assign]
    with pytest.raises(
        ll.ConfigError, match=r"site 'layers.1.up': no batch of the calibration data reached it"
    ):
        ll.init(model, ll.EVAConfig(r=2), calibration_data=x)
    nothing = [{"x": x[0], "attention_mask": torch.zeros(2, 8)}]
    Half.forward = lambda self, x, attention_mask: Net.forward(self, x)  # type: ignore[method-assign]
    with pytest.raises(
        ll.ConfigError, match=r"site 'layers.0.up': every token of the calibration data was masked"
    ):
        ll.init(model, ll.EVAConfig(r=2), calibration_data=nothing)
    Half.forward = Net.forward  # type: ignore[method-assign]
    with pytest.raises(
        ll.ConfigError,
        match=r"site 'layers.0.up': its inputs on the calibration data aren't all finite",
    ):
        ll.init(model, ll.EVAConfig(r=2), calibration_data=[x[0] * float("inf")])
    with pytest.raises(
        ll.ConfigError, match="site 'up': EVA: every input of the calibration data is zero here"
    ):
        ll.init(Sole(), ll.EVAConfig(r=2), calibration_data=[torch.zeros(5, 8)])


class Sole(nn.Module):
    """One layer that sees its input as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)


def test_bad_losses_and_foreign_statistics_are_named() -> None:
    model, ga, x = net(), ll.LoRAGAConfig(r=2), data()
    for loss_fn, match in (
        (lambda y, batch: y, r"expected a scalar tensor, found a tensor of shape \(2, 8, 8\)"),
        (lambda y, batch: 1.0, "expected a scalar tensor, found a float"),
        (lambda y, batch: y.detach().sum(), "its result depends on none of the chosen layers"),
    ):
        with pytest.raises(ll.ConfigError, match=match):
            ll.init(model, ga, calibration_data=x, loss_fn=loss_fn)
    found = ll.calibrate(model, ll.EVAConfig(r=2, target_names="up"), x)
    with pytest.raises(ll.ConfigError, match=r"site 'layers.0.down': the statistics haven't it"):
        ll.init(model, ll.EVAConfig(r=2), calibration_data=found)
    with pytest.raises(ll.ConfigError, match="expected statistics of 8 inputs, found 16"):
        ll.init(net(width=8), ll.EVAConfig(r=2, target_names="up"), calibration_data=found)
    with pytest.raises(ll.ConfigError, match="no gradient of the loss reached it"):
        ll.init(model, ll.LoRAGAConfig(r=2, target_names="up"), calibration_data=found)
    gradients = ll.calibrate(model, ll.LoRAGAConfig(r=2, target_names="up"), x, loss_fn=mean_square)
    with pytest.raises(ll.ConfigError, match="these statistics are of gradients alone"):
        ll.init(model, ll.EVAConfig(r=2, target_names="up"), calibration_data=gradients)
    with pytest.raises(ll.ConfigError, match="these statistics have no gradient"):
        found[UP].gradient  # noqa: B018
    for config, match in (
        (lambda: ll.CorDAConfig(alpha=0.0), "CorDAConfig.alpha: the start divides by it"),
        (lambda: ll.ASVDConfig(alpha=-1.0), "ASVDConfig.alpha: the start divides by it"),
        (lambda: ll.ASVDConfig(power=-1.0), "ASVDConfig.power: expected at least 0"),
        (lambda: ll.LoRAGAConfig(gamma=0.0), "LoRAGAConfig.gamma: expected a positive number"),
        (lambda: ll.LoRAGAConfig(scale="gd", alpha=0.0), "LoRAGAConfig.alpha: 'gd' divides by it"),
        (lambda: ll.EVAConfig(dropout=1.0), "EVAConfig.dropout: expected a probability"),
    ):
        with pytest.raises(ll.ConfigError, match=match):
            config()
    for cfg in (
        ll.EVAConfig(r=17),
        ll.CorDAConfig(r=17),
        ll.ASVDConfig(r=17),
        ll.LoRAGAConfig(r=9),
    ):
        with pytest.raises(ll.UnsupportedError, match="expected a rank of at most"):
            ll.init(model, cfg, calibration_data=x, loss_fn=mean_square)


# ------------------------------------------------------------------------------------------ oracles
def _span(A: Tensor) -> Tensor:
    """The projector onto the rows' span."""
    Q = torch.linalg.qr(A.mT)[0]
    return Q @ Q.mT


@pytest.mark.parametrize("center", [False, True])
def test_eva_starts_at_the_right_singular_vectors_of_the_inputs(center: bool) -> None:
    model = net()
    params, white = (
        ll.init(model, ll.EVAConfig(r=4, center=center, whiten=w), calibration_data=data())
        for w in (False, True)
    )
    for path in params:
        X = seen_at(net(), path, data())
        X = X - X.mean(0) if center else X
        V = torch.linalg.svd(X)[2][:4]
        A = params[path]["lora_A"]
        close(_span(A), _span(V), 1e-9)
        close((A @ V.mT).abs(), torch.eye(4, dtype=torch.float64), 1e-6)
        assert (A.gather(1, A.abs().argmax(1, keepdim=True)) > 0).all()
        assert not params[path]["lora_B"].any()
        H = X @ white[path]["lora_A"].mT
        close(H.mT @ H / len(H), torch.eye(4, dtype=torch.float64), 1e-9)


def _inverse_form(M: Tensor, W: Tensor, chosen: slice, s: float) -> tuple[Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(W @ M, full_matrices=False)
    A = torch.diag((S[chosen] / s).sqrt()) @ Vh[chosen] @ torch.linalg.inv(M)
    return A, U[:, chosen] @ torch.diag((S[chosen] / s).sqrt())


def test_weighted_starts_are_their_dense_formulas() -> None:
    model, batches = net(), data(12)
    for path in ll.init(model, ll.LoRAConfig()):
        module: Any = model.get_submodule(path)
        W, X = module.weight.detach(), seen_at(net(), path, batches)
        C = X.mT @ X / len(X)
        eye = torch.eye(len(C), dtype=torch.float64)
        damped = C + 0.01 * C.diagonal().mean() * eye
        k = min(W.shape)
        for cfg, M, chosen in (
            (ll.CorDAConfig(r=4, alpha=6.0), damped, slice(0, 4)),
            (ll.CorDAConfig(r=4, alpha=6.0, mode="kpm"), damped, slice(k - 4, k)),
            (ll.ASVDConfig(r=4, alpha=6.0), torch.diag(X.abs().mean(0) ** 0.5 + 1e-6), slice(0, 4)),
            (ll.ASVDConfig(r=4, alpha=6.0, power=0.0), eye, slice(0, 4)),
            (
                ll.ASVDConfig(r=4, alpha=6.0, weighting="root"),
                torch.linalg.cholesky(C + 1e-12 * eye),
                slice(0, 4),
            ),
        ):
            params = ll.init(model, cfg, calibration_data=batches)[path]
            A, B = _inverse_form(M, W, chosen, 1.5)
            signs = (params["lora_B"] * B).sum(0).sign()  # a singular pair's joint sign is free
            close(params["lora_B"] * signs, B, 1e-6)
            close(params["lora_A"] * signs[:, None], A, 1e-6)
            assert torch.equal(params["lora_A"], params["lora_A0"])
            assert torch.equal(params["lora_B"], params["lora_B0"])


WEIGHTED = (
    ll.CorDAConfig(r=4),
    ll.CorDAConfig(r=4, mode="kpm"),
    ll.ASVDConfig(r=4),
    ll.ASVDConfig(r=4, weighting="root"),
)


@pytest.mark.parametrize("cfg", WEIGHTED)
def test_weights_of_low_rank_give_finite_starts(cfg: ll.AdapterConfig) -> None:
    model = Sole()
    for kept in (0, 1, 8):
        with torch.no_grad():
            model.up.weight[kept:] = 0.0
            model.up.weight[:, 7] = 0.0
        for x in (
            data(1, dtype=torch.float32, shape=(5, 8))[0],
            data(1, dtype=torch.float32, shape=(40, 8))[0],
        ):
            params = ll.init(model, cfg, calibration_data=[x])
            assert all(t.isfinite().all() for t in leaves(params))
            assert torch.equal(ll.apply(model, params, x), model(x))
            assert max(t.abs().max() for t in leaves(params)) < 10.0
        torch.manual_seed(0)
        model = Sole()


def test_the_root_of_the_second_moment_has_the_least_output_error() -> None:
    model, batches = (
        net(),
        [x * torch.linspace(0.1, 4.0, 16, dtype=torch.float64) for x in data(12)],
    )
    errors: dict[str, float] = {}
    for name, cfg in {
        "pissa": ll.PiSSAConfig(r=4),
        "corda": ll.CorDAConfig(r=4),
        "asvd": ll.ASVDConfig(r=4),
        "root": ll.ASVDConfig(r=4, weighting="root"),
    }.items():
        params = ll.init(model, cfg, **({} if name == "pissa" else {"calibration_data": batches}))
        W, X = model.get_submodule(UP).weight.detach(), seen_at(net(), UP, batches)  # type: ignore[operator]
        low = params.sites[UP].scaling * params[UP]["lora_B0"] @ params[UP]["lora_A0"]
        errors[name] = float((X @ (W - low).mT).norm() / (X @ W.mT).norm())
    U, _, _ = torch.linalg.svd(W @ X.mT, full_matrices=False)
    best = float((X @ (W - U[:, :4] @ U[:, :4].mT @ W).mT).norm() / (X @ W.mT).norm())
    assert errors["root"] == min(errors.values())
    assert errors["root"] < errors["corda"] < errors["pissa"]
    assert abs(errors["root"] - best) < 1e-9


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr", "random"])
@pytest.mark.parametrize("scale", ["stable", "gd", "unit"])
def test_lora_gas_first_step_is_the_best_low_rank_step(direction: Any, scale: Any) -> None:
    model, batches = net(), data()
    cfg = ll.LoRAGAConfig(r=3, alpha=6.0, direction=direction, scale=scale)
    params = ll.init(model, cfg, calibration_data=batches, loss_fn=mean_square)
    trainable, frozen = ll.partition(params)
    grads = torch.func.grad(
        lambda t: (
            sum(mean_square(ll.apply(model, ll.combine(t, frozen), x), x) for x in batches) / 3
        )
    )(trainable)
    for path, site in params.items():
        G = torch.autograd.grad(
            sum(model(x).square().mean() for x in batches) / 3, model.get_submodule(path).weight
        )[0]
        U, S, Vh = torch.linalg.svd(G, full_matrices=False)
        best = U[:, :6] @ torch.diag(S[:6]) @ Vh[:6]
        A, B, size = (
            site["lora_A"],
            site["lora_B"],
            {"stable": site["lora_B"].shape[0] ** 0.25 / 4.0, "gd": 0.5, "unit": 1.0}[scale],
        )
        # d(B A) of a gradient step, s = 2
        step = grads[path]["lora_B"] @ A + B @ grads[path]["lora_A"]
        assert (
            float(nn.functional.cosine_similarity(step.flatten(), best.flatten(), dim=0))
            > 1.0 - 1e-9
        )
        assert float((step - 2.0 * size**2 * best).norm() / best.norm()) < 1e-8
        gram = torch.eye(3, dtype=torch.float64) * size**2
        close(A @ A.mT, gram, 1e-10)
        close(B.mT @ B, gram, 1e-10)


def test_random_halves_follow_the_seed() -> None:
    model, cfg = net(), ll.LoRAGAConfig(r=3, direction="random")
    made = [
        ll.init(model, cfg, seed=s, calibration_data=data(), loss_fn=mean_square)[UP]["lora_A"]
        for s in (0, 0, 1, 2)
    ]
    assert torch.equal(made[0], made[1])
    assert not (torch.equal(made[0], made[2]) and torch.equal(made[0], made[3]))


def test_a_layer_without_a_dense_weight_starts_from_its_inputs() -> None:
    class Packed(nn.Module):
        """int8 rows with scales: a call, but no dense weight."""

        def __init__(self, dense: nn.Linear) -> None:
            super().__init__()
            self.in_features, self.out_features, self.bias = (
                dense.in_features,
                dense.out_features,
                None,
            )
            weight = dense.weight.detach()
            self.register_buffer("scales", weight.abs().amax(1) / 127)
            self.weight = nn.Parameter(
                (weight / self.scales[:, None]).round().to(torch.int8), requires_grad=False
            )

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(
                x, self.weight.to(x.dtype) * self.scales[:, None].to(x.dtype)
            )

    model = nn.Sequential(Packed(nn.Linear(16, 16)), nn.Tanh(), Packed(nn.Linear(16, 16)))
    x = data(2, dtype=torch.float32)
    for cfg in (ll.EVAConfig(r=4), ll.LoRAGAConfig(r=4)):
        params = ll.init(model, cfg, calibration_data=x, loss_fn=mean_square)
        assert torch.equal(ll.apply(model, params, x[0]), model(x[0]))
    dense: Any = nn.Sequential(
        *(nn.Linear(16, 16, bias=False) if isinstance(m, Packed) else m for m in model)
    )
    weights = {
        f"{i}.weight": (model[i].weight * model[i].scales[:, None]).requires_grad_() for i in (0, 2)
    }
    found = ll.calibrate(model, ll.LoRAGAConfig(r=4), x[:1], loss_fn=mean_square)
    expected = torch.autograd.grad(
        functional_call(dense, weights, (x[0],)).square().mean(), list(weights.values())
    )
    close([found[i].gradient for i in ("0", "2")], list(expected), 1e-6)
    with torch.no_grad():
        for i in (0, 2):
            dense[i].weight.copy_(weights[f"{i}.weight"])
    # the start is made from the values that the layer multiplies by
    one, other = (ll.init(m, ll.CorDAConfig(r=16), calibration_data=x) for m in (model, dense))
    close(
        one["0", "lora_B0"] @ one["0", "lora_A0"],
        other["0", "lora_B0"] @ other["0", "lora_A0"],
        1e-4,
    )


def test_a_packed_layer_keeps_its_mode() -> None:
    class Repacks(nn.Linear):
        """Like bitsandbytes' 4-bit layer on some CPUs: in eval mode its first call rewrites the
        weight.
        """

        def forward(self, x: Tensor) -> Tensor:
            if not self.training:
                self.weight.data = -self.weight.data
            return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)

    model = nn.Sequential(Repacks(16, 16), nn.Dropout(), nn.Linear(16, 16))
    model[0].weight = nn.Parameter(
        torch.randint(-9, 9, (16, 16), dtype=torch.int8), requires_grad=False
    )
    before, x = snapshot(model), data(2, dtype=torch.float32, shape=(40, 16))
    for cfg in (ll.EVAConfig(r=4), ll.LoRAGAConfig(r=4)):
        first, second = (
            ll.init(model, cfg, calibration_data=x, loss_fn=mean_square) for _ in range(2)
        )
        # equal, since dropout is off
        assert all(torch.equal(a, b) for a, b in zip(leaves(first), leaves(second), strict=True))
    assert same_state(before, snapshot(model))


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("kind", ["Linear8bitLt", "LinearNF4"])
def test_bitsandbytes_layers(kind: str) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    options: dict[str, Any] = (
        {"has_fp16_weights": False} if kind == "Linear8bitLt" else {"compute_dtype": torch.float32}
    )
    model = nn.Sequential(*(getattr(bnb.nn, kind)(64, 64, **options) for _ in range(2))).to("cpu")
    x = data(2, dtype=torch.float32, shape=(40, 64))
    y = model(x[0])
    for cfg in (ll.EVAConfig(r=4), ll.LoRAGAConfig(r=4)):
        params = ll.init(model, cfg, calibration_data=x, loss_fn=mean_square)
        assert torch.equal(model(x[0]), y)
        assert torch.equal(ll.apply(model, params, x[0]), y)
    assert torch.equal(
        ll.apply(model, ll.init(model, ll.CorDAConfig(r=4), calibration_data=x), x[0]), y
    )


# ------------------------------------------------------------------------------ a real architecture
@pytest.mark.filterwarnings("ignore::FutureWarning:transformers.*")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_language_model_with_padding_and_labels() -> None:
    pytest.importorskip("transformers")
    model = FAMILIES["qwen3"].fresh().train()
    ids, mask = torch.randint(0, 64, (3, 10)), torch.ones(3, 10, dtype=torch.int64)
    mask[1, 6:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    before = snapshot(model)
    found = ll.calibrate(model, ll.EVAConfig(r=4), [batch])
    assert {seen.count for seen in found.values()} == {26}
    # q, k, v share one; gate and up another
    assert len({id(seen.moments) for seen in found.values()}) == 8
    cfg = ll.LoRAGAConfig(r=4)
    slopes = ll.calibrate(model, cfg, [batch], loss_fn=lambda out, batch: out.loss)
    params = ll.init(model, cfg, calibration_data=slopes)
    assert same_state(before, snapshot(model))
    assert torch.equal(ll.apply(model, params, **batch).logits, model(**batch).logits)
    weights = {path: model.get_submodule(path).weight for path in slopes}
    for (path, weight), g in zip(
        weights.items(),
        torch.autograd.grad(model(**batch).loss, list(weights.values())),
        strict=True,
    ):
        assert g.shape == weight.shape
        close(slopes[path].gradient / g.norm(), g / g.norm(), 1e-6)


@pytest.mark.parametrize("given", ["batches", "statistics"])
def test_a_start_from_data_looks_for_its_sites_once(
    given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cfg = net(), ll.CorDAConfig(r=4)
    seen = data() if given == "batches" else ll.calibrate(model, cfg, data())
    looked = []
    for home in ("init", "calibrate"):
        module = importlib.import_module(f"lora_lite_func.api.{home}")
        find = module.find
        monkeypatch.setattr(module, "find", lambda *args, f=find: looked.append(args) or f(*args))
    ll.init(model, cfg, calibration_data=seen)
    assert len(looked) == 1
