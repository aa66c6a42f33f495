"""Layers that users have beside the plain ones: subclasses with calls of their own, computed and
pruned weights, bags, shared weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import close, leaves, moved, same_state, seeded, snapshot
from places import features
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import lora_lite_func as ll

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


class Doubling(nn.Linear):
    """A call that isn't a product with its weight alone."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(2.0 * input)


class Cosine(nn.Linear):
    """Nor is this: rows of the weight are normalised."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(F.normalize(input, dim=-1), F.normalize(self.weight, dim=-1))


class Product(nn.Linear):
    """This one is, in its own words."""

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.mT + self.bias


class Standardised(nn.Conv2d):
    """A convolution whose kernels are standardised in each call."""

    def forward(self, input: Tensor) -> Tensor:
        W = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(F.pad(input, [1, 1, 1, 1]), W, self.bias)


# ------------------------------------------------------------------------------- calls of their own
@pytest.mark.parametrize("cls", [Doubling, Cosine])
def test_a_call_that_is_no_product_is_adapted_around_or_by_its_weight_and_never_merged_wrongly(
    cls: Any,
) -> None:
    model, x = seeded(nn.Sequential(cls(8, 8))), features(3, 8)
    before = snapshot(model)
    around = moved(ll.init(model, ll.LoRAConfig(r=2)))
    A, B = around["0", "lora_A"], around["0", "lora_B"]
    close(ll.apply(model, around, x), model(x) + 8.0 * x @ A.mT @ B.mT, 1e-12)
    for merging in (
        lambda: ll.merge(model, around),
        lambda: ll.merged(model, around),
        lambda: ll.merge(ll.bind(model, around), around),
    ):
        with pytest.raises(
            ll.UnsupportedError,
            match=rf"'0' \({cls.__name__}\): its call isn't x W.*target_parameters='0.weight'",
        ):
            merging()
    report = ll.check(model, around, x)
    assert "its call isn't x W^T + b" in repr(report)
    inside = moved(ll.init(model, ll.LoRAConfig(r=2, target_parameters="0.weight")))
    close(ll.merged(model, inside)(x), ll.apply(model, inside, x), 1e-12)
    assert same_state(before, snapshot(model))


def test_a_product_in_other_words_merges() -> None:
    for dtype, tol in ((torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        model, x = seeded(nn.Sequential(Product(64, 64))).to(dtype), features(3, 64).to(dtype)
        params = moved(ll.init(model, ll.LoRAConfig(r=2)), size=0.02)
        close(ll.merged(model, params)(x), ll.apply(model, params, x), tol)


def test_a_convolution_of_its_own() -> None:
    model, x = seeded(nn.Sequential(Standardised(4, 8, 3))), features(2, 4, 5, 5)
    params = moved(ll.init(model, ll.LoRAConfig(r=2, target_kinds="conv")))
    y = ll.apply(model, params, x)
    assert (y - model(x)).abs().max() > 1e-3
    close(ll.merged(model, params)(x), y, 1e-12)
    stack = ll.stack([params, moved(params, 2)])
    close(
        ll.apply(model, ll.rows(stack, [1, 0]), x),
        torch.cat([ll.apply(model, stack[i], x[n : n + 1]) for n, i in enumerate((1, 0))]),
        1e-12,
    )


# --------------------------------------------------------------------------------- computed weights
Bake = Callable[[nn.Module], Any]

COMPUTED: dict[str, tuple[Callable[[nn.Module], nn.Module], str, Bake]] = {
    "weight_norm": (
        torch.nn.utils.weight_norm,
        r"torch.nn.utils.remove_weight_norm\(layer\)",
        torch.nn.utils.remove_weight_norm,
    ),
    "spectral_norm": (
        torch.nn.utils.spectral_norm,
        r"torch.nn.utils.remove_spectral_norm\(layer\)",
        torch.nn.utils.remove_spectral_norm,
    ),
    "pruned": (
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        r"torch.nn.utils.prune.remove\(layer, 'weight'\)",
        lambda layer: prune.remove(layer, "weight"),
    ),
    "parametrized": (
        parametrizations.weight_norm,
        r"torch.nn.utils.parametrize.remove_parametrizations\(layer, 'weight'\)",
        lambda layer: parametrize.remove_parametrizations(layer, "weight"),
    ),
}


@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.parametrize(
    "config", [ll.LoRAConfig, ll.PiSSAConfig, ll.DoRAConfig, ll.IA3Config, ll.HRAConfig]
)
def test_computed_weights_are_adapted_around_and_baked_before_merging(
    name: str, config: Any
) -> None:
    compute, advice, bake = COMPUTED[name]
    model, baked = (nn.Sequential(compute(seeded(nn.Linear(8, 8)))).eval() for _ in range(2))
    x = features(3, 8)
    for m in (model, baked):
        m(x)
    baked.load_state_dict(model.state_dict())
    before = snapshot(model)
    params = moved(ll.init(model, config(r=2)))
    y = ll.apply(model, params, x)
    close(ll.bind(model, params)(x), y, 1e-12)
    with pytest.raises(
        ll.UnsupportedError,
        match=rf"'0' .*its weight is computed, not a parameter, .*bake it in first \({advice}",
    ):
        ll.merge(model, params)
    assert ll.check(model, params, x).difference is None
    assert same_state(before, snapshot(model))
    bake(baked[0])
    close(ll.apply(baked, params, x), y, 1e-10)
    close(ll.merged(baked, params)(x), y, 1e-10)


@pytest.mark.parametrize("name", COMPUTED)
def test_computed_kernels_are_refused_with_the_way_out(name: str) -> None:
    compute, advice, bake = COMPUTED[name]
    model, x = nn.Sequential(compute(seeded(nn.Conv1d(4, 4, 1)))).eval(), features(2, 4, 3)
    params = moved(ll.init(model, ll.LoRAConfig(r=2, target_kinds="conv")))
    with pytest.raises(
        ll.UnsupportedError,
        match=rf"'0' .*its weight is computed, not a parameter, so nothing can stand.*\({advice}",
    ):
        ll.apply(model, params, x)
    bake(model[0])
    close(ll.merged(model, params)(x), ll.apply(model, params, x), 1e-12)


def test_a_pruned_bias_is_no_weight_that_is_read_past_the_layer() -> None:
    model = nn.Sequential(prune.l1_unstructured(seeded(nn.Linear(8, 8)), "bias", 0.5))
    report = ll.check(model, moved(ll.init(model, ll.IA3Config())), features(3, 8))
    assert not report.reads


def test_layers_in_training_for_integers() -> None:
    qat = pytest.importorskip("torch.ao.nn.qat")
    settings = pytest.importorskip("torch.ao.quantization")
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(qat.Linear(8, 8, qconfig=settings.get_default_qat_qconfig())).eval(),
        features(3, 8).float(),
    )
    model(x)
    around = moved(ll.init(model, ll.LoRAConfig(r=2)))
    assert (ll.apply(model, around, x) - model(x)).abs().max() > 1e-3
    before = snapshot(model)
    with pytest.raises(ll.UnsupportedError, match=r"'0' \(Linear\): its call isn't x W\^T \+ b"):
        ll.merge(model, around)
    assert same_state(before, snapshot(model))
    inside = moved(ll.init(model, ll.LoRAConfig(r=2, target_parameters="0.weight")))
    close(ll.merged(model, inside)(x), ll.apply(model, inside, x), 1e-6)


# ------------------------------------------------------------------------------------------- others
def test_layers_that_share_a_weight_or_are_one_layer() -> None:
    a, b = nn.Linear(8, 8), nn.Linear(8, 8)
    b.weight = a.weight
    x = features(3, 8)
    for model, count in (
        (seeded(nn.Sequential(a, nn.Tanh(), b)), 2),
        (seeded(nn.Sequential(a, nn.Tanh(), a)), 1),
    ):
        params = moved(ll.init(model, ll.LoRAConfig(r=2)))
        assert len(params) == count
        y = ll.apply(model, params, x)
        close(ll.merged(model, params)(x), y, 1e-12)
        close(ll.bind(model, params)(x), y, 1e-12)
        stack = ll.stack([params, moved(params, 2)])
        looped = torch.cat(
            [ll.apply(model, stack[i], x[n : n + 1]) for n, i in enumerate((1, 0, 1))]
        )
        close(ll.apply(model, ll.rows(stack, [1, 0, 1]), x), looped, 1e-12)


def test_cells_of_recurrent_layers() -> None:
    for kind in (nn.LSTMCell, nn.GRUCell, nn.RNNCell):
        model, x = seeded(kind(8, 8)), features(3, 8)
        params = moved(ll.init(model, ll.LoRAConfig(r=2, target_parameters="weight")))
        y = ll.apply(model, params, x)
        close(ll.merged(model, params)(x), y, 1e-12)
        stack = ll.stack([params, moved(params, 2)])
        looped = [leaves(ll.apply(model, stack[i], x[n : n + 1])) for n, i in enumerate((1, 0, 1))]
        for got, rows in zip(
            leaves(ll.apply(model, ll.rows(stack, [1, 0, 1]), x)),
            zip(*looped, strict=True),
            strict=True,
        ):
            close(got, torch.cat(rows), 1e-12)


@pytest.mark.parametrize(
    ("model", "config", "error", "message"),
    [
        (
            nn.Sequential(nn.LazyLinear(4)),
            {},
            ll.UnsupportedError,
            r"'0' \(LazyLinear\) is lazy and hasn't its sizes yet; call the model once",
        ),
        (
            nn.Sequential(nn.Identity(), nn.Linear(4, 4)),
            {"target_names": "^0$"},
            ll.TargetError,
            "'.0.' matched none of 1 linear",
        ),
        (
            nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64)),
            {},
            ll.UnsupportedError,
            "'0': its weight is complex",
        ),
    ],
)
def test_what_is_refused_by_name(
    model: nn.Module, config: dict[str, Any], error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        ll.init(model, ll.LoRAConfig(r=2, **config))


def test_a_lazy_layer_that_was_called_is_as_any_other() -> None:
    model, x = nn.Sequential(nn.LazyLinear(4), nn.LazyConv1d(4, 1)).double(), features(2, 3, 8)
    model[1](model[0](x))
    params = moved(ll.init(model, ll.LoRAConfig(r=2, target_kinds=("linear", "conv"))))
    assert set(params) == {"0", "1"}
    close(ll.merged(model, params)(x), ll.apply(model, params, x), 1e-12)


def test_a_layer_that_transformers_shares_out_is_refused() -> None:
    parallel = pytest.importorskip("transformers.distributed.tensor_parallel")
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    params = ll.init(model, ll.LoRAConfig(r=2))
    parallel.ColwiseParallel().install_forward(model[1], None)
    says = r"'1(\.weight)?' \(Linear\).*tp_plan.*parallelize_module.*full_tensor\(\)"
    attempts: list[Callable[[], object]] = [
        lambda: ll.init(model, ll.LoRAConfig(r=2)),
        lambda: ll.init(model, ll.FullConfig(target_parameters=(r"^1\.weight",))),
        lambda: ll.apply(model, params, torch.ones(2, 4)),
        lambda: ll.bind(model, params),
        lambda: ll.merge(model, params),
    ]
    for attempt in attempts:
        with pytest.raises(ll.UnsupportedError, match=says):
            attempt()
