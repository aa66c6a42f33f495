"""Tools that hook modules, on the factors of a bound model as linear layers that are called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import close, moved, net, normal
from torch import Tensor, nn

import lora_lite_func as ll

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),  # opacus' own
]
X = normal(6, 16, seed=0)
LABELS = torch.tensor([0, 1, 2, 3, 4, 5])


@pytest.fixture
def made() -> tuple[nn.Module, ll.Adapter, nn.Module]:
    """A model, an adapter of it, and the two bound for such tools."""
    model = net(depth=1)
    params = moved(ll.init(model, ll.LoRAConfig(r=2)))
    return model, params, ll.bind(model, params, linears=True)


def by_sample(model: nn.Module, params: ll.Adapter) -> Any:
    """Each sample's gradient, by torch.func."""

    def loss(p: ll.Adapter, x: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(ll.apply(model, p, x), label)

    return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(params, X, LABELS)


def test_opacus_sees_each_samples_gradient(made: tuple[nn.Module, ll.Adapter, nn.Module]) -> None:
    opacus = pytest.importorskip("opacus")
    model, params, bound = made
    F.cross_entropy(opacus.GradSampleModule(bound.train())(X), LABELS).backward()
    for path, tensors in by_sample(model, params).items():
        for name, wanted in tensors.items():
            factor: Any = bound.get_submodule(f"{path}.adapter.0.{name}")
            close(factor.weight.grad_sample, wanted, 1e-12)


def test_the_engine_of_torchjd_gives_the_gramian(
    made: tuple[nn.Module, ll.Adapter, nn.Module],
) -> None:
    autogram = pytest.importorskip("torchjd.autogram")
    model, params, bound = made
    engine = autogram.Engine(bound, batch_dim=0)
    gramian = engine.compute_gramian(F.cross_entropy(bound(X), LABELS, reduction="none"))
    each = by_sample(model, params)
    J = torch.cat([t.flatten(1) for path in each for t in each[path].values()], dim=1)
    close(gramian, J @ J.mT, 1e-12)


def test_curvlinops_finds_the_kronecker_factors(
    made: tuple[nn.Module, ll.Adapter, nn.Module],
) -> None:
    curvlinops = pytest.importorskip("curvlinops")
    bound = made[2]
    weights = [p for p in bound.parameters() if p.requires_grad]
    operator = curvlinops.KFACLinearOperator(
        bound,
        nn.CrossEntropyLoss(),
        weights,
        [(X[:1], LABELS[:1])],
        fisher_type="empirical",
        check_deterministic=False,
    )
    found = operator @ torch.eye(sum(map(Tensor.numel, weights)), dtype=torch.float64)
    F.cross_entropy(bound(X[:1]), LABELS[:1]).backward()
    grads = [p.grad.flatten() for p in weights if p.grad is not None]
    # of one sample the factors are exact: each layer's block is the square of its gradient
    close(found, torch.block_diag(*(g[:, None] * g for g in grads)), 1e-12)
