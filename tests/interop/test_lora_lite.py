"""lora-lite's files, made here by hand from its formulas: the outputs are those of its hooks on the
base that it left.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers import close, normal
from torch import Tensor, nn

import lora_lite_func as ll

D_IN, D_OUT, R = 12, 8, 4
X = normal(5, D_IN, seed=0, dtype=torch.float32)
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


def model() -> nn.Module:
    """One layer under a path."""
    gen = torch.Generator().manual_seed(1)
    made = nn.ModuleDict({"block": nn.ModuleDict({"up": nn.Linear(D_IN, D_OUT)})})
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=gen))
    return made


def noise(*shape: int, seed: int = 2, size: float = 0.2) -> Tensor:
    """Seeded, as if trained."""
    return size * normal(*shape, seed=seed, dtype=torch.float32)


class Case:
    """A variant: config fields, tensors, the base weight that it leaves, and the layer's output."""

    def __init__(self, W: Tensor, b: Tensor) -> None:
        self.W, self.b, self.fields, self.left = W, b, {}, W

    def lora(self) -> dict[str, Tensor]:
        p = {"lora_A": noise(R, D_IN), "lora_B": noise(D_OUT, R, seed=3)}
        self.y = lambda x: x @ self.W.T + self.b + (6 / R) * x @ p["lora_A"].T @ p["lora_B"].T
        return p

    eva = lora

    def dora(self) -> dict[str, Tensor]:
        p = {**self.lora(), "lora_m": self.W.norm(dim=1) + noise(D_OUT, seed=4)}
        V = self.W + (6 / R) * p["lora_B"] @ p["lora_A"]
        self.y = lambda x: x @ (p["lora_m"][:, None] * V / V.norm(dim=1, keepdim=True)).T + self.b
        return p

    def pissa(self, over: float = 6 / R) -> dict[str, Tensor]:
        U, S, Vh = torch.linalg.svd(self.W, full_matrices=False)
        root = (S[:R] / over).sqrt()
        A, B = root[:, None] * Vh[:R], U[:, :R] * root
        self.left = self.W - (6 / R) * B @ A
        p = {"lora_A": A + noise(R, D_IN), "lora_B": B + noise(D_OUT, R, seed=3)}
        self.y = lambda x: x @ self.left.T + self.b + (6 / R) * x @ p["lora_A"].T @ p["lora_B"].T
        return p

    def pissa_early(self) -> dict[str, Tensor]:
        return self.pissa(1.0)

    def delora(self) -> dict[str, Tensor]:
        p = {**self.lora(), "lora_lambda": torch.tensor(3.0), "lora_wnorm": self.W.norm(dim=0)}
        self.fields = {"lambda0": 0.1}
        strength = p["lora_lambda"] / R / (p["lora_A"].norm(dim=1) * p["lora_B"].norm(dim=0))
        self.y = lambda x: (
            x @ self.W.T
            + self.b
            + (((x * p["lora_wnorm"]) @ p["lora_A"].T) * strength) @ p["lora_B"].T
        )
        return p

    def ia3(self) -> dict[str, Tensor]:
        g = 1 + noise(D_OUT)
        self.y = lambda x: (x @ self.W.T + self.b) * g
        return {"lora_g": g}

    def ia3_ff(self) -> dict[str, Tensor]:
        g = 1 + noise(D_IN)
        self.y = lambda x: (x * g) @ self.W.T + self.b
        return {"lora_g": g}

    def hra(self) -> dict[str, Tensor]:
        U = noise(R, D_IN, size=1.0)

        def y(x: Tensor) -> Tensor:
            for u in U.flip(0):
                x = x - 2 * (x @ u)[:, None] * u / (u @ u)
            return x @ self.W.T + self.b

        self.y = y
        return {"lora_U": U}

    def road(self) -> dict[str, Tensor]:
        theta, a = noise(D_OUT), 1 + noise(D_OUT, seed=5)
        self.fields = {"road_variant": "road_2", "group_size": 4}

        def y(x: Tensor) -> Tensor:
            h = (x @ self.W.T + self.b).view(-1, 2, 2)
            turned = torch.stack([-h[:, 1], h[:, 0]], dim=1).view(-1, D_OUT)
            return h.view(-1, D_OUT) * a * theta.cos() + turned * a * theta.sin()

        self.y = y
        return {"lora_road_theta": theta, "lora_road_alpha": a}

    def antipasto(self, basis: str = "V") -> dict[str, Tensor]:
        U, S, Vh = (
            t[..., :R] if i < 2 else t[:R]
            for i, t in enumerate(torch.linalg.svd(self.W, full_matrices=False))
        )
        self.left = self.W - (U * S) @ Vh
        self.fields = {"block_size": 2, "max_rotation_angle": 0.5, "rotate_basis": basis}
        d, T = noise(R, seed=6), noise(R // 2, 1, seed=7, size=1.0)
        blocks, limit = [], 2 * math.tan(0.25)
        for t in T[:, 0]:
            A = limit * torch.tanh(torch.tensor([[0.0, t / 2], [-t / 2, 0.0]]) / limit) / 2
            blocks.append(torch.linalg.solve(torch.eye(2) - A, torch.eye(2) + A))
        Rot = torch.block_diag(*blocks)
        left, right = (U, Rot @ Vh) if basis == "V" else (U @ Rot.T, Vh)
        self.y = lambda x: x @ self.left.T + self.b + ((x @ right.T) * (S + d)) @ left.T
        return {"lora_U": U, "lora_S": S, "lora_Vh": Vh, "lora_delta_s": d, "lora_rot_T": T}

    def antipasto_U(self) -> dict[str, Tensor]:
        return self.antipasto("U")


NAMES = [
    "lora",
    "eva",
    "dora",
    "pissa",
    "pissa_early",
    "delora",
    "ia3",
    "ia3_ff",
    "hra",
    "road",
    "antipasto",
    "antipasto_U",
]
ALONE = {"lora", "eva", "delora", "antipasto", "antipasto_U"}


def made(name: str, file: Path, base: nn.Module, prints: bool = True, **changes: Any) -> Case:
    """The file of a variant."""
    layer: Any = base.get_submodule("block.up")
    case = Case(layer.weight.detach(), layer.bias.detach())
    tensors = getattr(case, name)()
    variant = name if name in ("ia3_ff",) else name.partition("_")[0]
    common = {
        "r": R,
        "alpha": 6,
        "dtype": "float32",
        "target_roles": ["reader"],
        "target_names": [],
        "exclude_names": [],
        "layers": None,
    }
    metadata = {"cfg": json.dumps({"variant": variant, **common, **case.fields, **changes})}
    metadata["base_fp"] = (
        "{}"
        if not prints
        else json.dumps(
            {"block.up": f"{tuple(case.left.shape)}|{float(case.left.square().sum()):.6e}"}
        )
    )
    safetensors.torch.save_file(
        {f"block.up.{k}": t.contiguous() for k, t in tensors.items()}, file, metadata
    )
    return case


def outputs(base: nn.Module, params: ll.Adapter) -> Tensor:
    """Of the one layer."""
    bound: Any = ll.bind(base, params).get_submodule("block.up")
    with torch.no_grad():
        y: Tensor = bound(X)
    return y


@pytest.mark.parametrize("name", NAMES)
def test_the_outputs_are_lora_lites(name: str, tmp_path: Path) -> None:
    base = model()
    case = made(name, tmp_path / "a", base)
    close(outputs(base, ll.from_lora_lite(tmp_path / "a", base)), case.y(X), 1e-5)
    if name in ALONE:
        close(outputs(base, ll.from_lora_lite(tmp_path / "a")), case.y(X), 1e-5)
    else:
        with pytest.raises(ll.CheckpointError, match="give the base model too"):
            ll.from_lora_lite(tmp_path / "a")


@pytest.mark.parametrize("name", ["lora", "pissa", "antipasto", "dora"])
@pytest.mark.parametrize("printed", [True, False], ids=["fingerprint", "leaves"])
def test_another_base_is_found_out(name: str, printed: bool, tmp_path: Path) -> None:
    base = model()
    if not printed:  # newer versions write no fingerprint; frozen tensors tell of some variants
        name = {"lora": "delora", "dora": "antipasto_U"}.get(name, name)
    made(name, tmp_path / "a", base, prints=printed)
    if not printed and name == "pissa":
        assert isinstance(ll.from_lora_lite(tmp_path / "a", base), ll.Adapter)
        return
    with torch.no_grad():
        base.get_submodule("block.up").weight.mul_(1.1)
    with pytest.raises(ll.CheckpointError, match="another base"):
        ll.from_lora_lite(tmp_path / "a", base)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "lora_xs"}, "variant 'lora_xs' isn't read here"),
        ({"surprise": 3}, "'surprise' is 3, which has no counterpart"),
        ({"r": 0}, "r: expected a whole number"),
        ({"r": 2**40}, "r: expected a whole number"),
        ({"r": 3}, "expected shape"),
        ({"alpha": "six"}, "alpha: expected a finite number"),
        ({"variant_kwargs": [1]}, "variant_kwargs: expected an object"),
    ],
)
def test_what_is_not_understood_is_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    made("lora", tmp_path / "a", model(), **changes)
    with pytest.raises(ll.CheckpointError, match=message):
        ll.from_lora_lite(tmp_path / "a")


def test_other_files_are_refused(tmp_path: Path) -> None:
    ll.save(ll.init(model(), ll.LoRAConfig(r=2)), tmp_path / "a")
    with pytest.raises(ll.CheckpointError, match="isn't a file of lora-lite"):
        ll.from_lora_lite(tmp_path / "a")


def test_what_was_trained_goes_on_as_it_did(tmp_path: Path) -> None:
    """Tensors as the optimizer's state knows them, and the gradients of lora-lite's forward."""
    base = model()
    made("antipasto", tmp_path / "a", base)
    params = ll.from_lora_lite(tmp_path / "a", base)
    held = safetensors.torch.load_file(tmp_path / "a")
    assert torch.equal(params["block.up"]["lora_rot"], held["block.up.lora_rot_T"])
    made("dora", tmp_path / "a", base)
    params = ll.from_lora_lite(tmp_path / "a", base)
    layer: Any = base.get_submodule("block.up")
    p = {n: t.clone().requires_grad_() for n, t in params["block.up"].items()}

    def norm(p: Any) -> Tensor:
        W: Tensor = layer.weight.detach()
        return (W + (6 / R) * (p["lora_B"] @ p["lora_A"]).detach()).norm(dim=1)

    x = X @ layer.weight.detach().T + (6 / R) * X @ p["lora_A"].T @ p["lora_B"].T
    theirs = torch.autograd.grad(
        (p["lora_m"] / norm(p) * x).square().sum(), [p["lora_A"], p["lora_m"]]
    )

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = base.get_submodule("block")

        def forward(self, x: Tensor) -> Any:
            return self.block.get_submodule("up")(x)

    def loss(leaves: Any) -> Tensor:
        y: Tensor = ll.apply(Whole(), leaves, X) - layer.bias.detach()
        return y.square().sum()

    ours = torch.func.grad(loss)(params)["block.up"]
    close(ours["lora_A"], theirs[0], 1e-4)
    close(ours["lora_m"], theirs[1], 1e-4)


def test_a_file_of_an_earlier_version_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ll.CheckpointError, match=r"earlier versions of lora-lite wrote \.pt: old = "
    ):
        ll.from_lora_lite(tmp_path / "adapter.pt")
