"""Lily's mixtures over a token, a row and a batch, what shares its factors, and PEFT's layer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from helpers import close, moved, net, normal
from peft_layers import Tiny, compare, peft
from peft_models import base, load_file, saved
from safetensors.torch import save_file
from torch import Tensor, nn

import lora_lite_func as ll

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own, of which there are many

Gate = Literal["token", "row", "batch"]
AXES: dict[Gate, tuple[int, ...]] = {"token": (), "row": (1,), "batch": (0, 1)}
X = normal(3, 5, 16, seed=1)


def layer() -> nn.Module:
    return torch.nn.Linear(16, 24, dtype=torch.float64)


@pytest.mark.parametrize("gate", AXES)
def test_each_gate_is_a_mean_over_its_tokens(gate: Gate) -> None:
    model = layer()
    params = moved(ll.init(model, ll.LilyConfig(r=4, experts=3, gate=gate, alpha=0.5)), size=0.5)
    p = params[""]
    h = X @ p["lora_A"].mT
    g = (h @ p["lora_route"].mT).softmax(-1)
    if AXES[gate]:
        g = g.mean(AXES[gate], keepdim=True).expand_as(g)
    wanted = model(X) + 0.5 * torch.einsum("nte,ntr,eor->nto", g, h, p["lora_B"])
    close(ll.apply(model, params, X), wanted, 1e-12)
    (found,) = ll.collect(model, params, X)[1].values()
    close(found, g, 1e-12)


def test_rows_that_would_depend_on_each_other_are_refused() -> None:
    model, ids = layer(), [1, 0, -1]
    several = {
        gate: [moved(ll.init(model, ll.LilyConfig(r=4, gate=gate)), i) for i in (1, 2)]
        for gate in AXES
    }
    for gate in ("token", "row"):
        members = several[gate]
        alone = [
            ll.apply(model, members[i] if i >= 0 else {}, X[n : n + 1]) for n, i in enumerate(ids)
        ]
        close(ll.apply(model, ll.rows(ll.stack(members), ids), X), torch.cat(alone), 1e-12)
    with pytest.raises(ll.UnsupportedError, match="gate='batch' the change of a token depends on"):
        ll.apply(model, ll.rows(ll.stack(several["batch"]), ids), X)
    mask = torch.ones(3, 5)
    for gate in ("row", "batch"):
        with pytest.raises(ll.UnsupportedError, match="give gate='token', or call the model once"):
            ll.apply(model, ll.activated(several[gate][0], mask), X)
    close(
        ll.apply(model, ll.activated(several["token"][0], mask), X),
        ll.apply(model, several["token"][0], X),
        1e-12,
    )


def test_a_token_goes_alone_as_in_its_sequence() -> None:
    """What decoding by steps is; the mean over a batch isn't so."""
    model = layer()
    for gate, alike in (("token", True), ("batch", False)):
        params = moved(ll.init(model, ll.LilyConfig(r=4, gate=gate)), size=0.5)
        whole, last = ll.apply(model, params, X), ll.apply(model, params, X[:, -1:])
        assert ((whole[:, -1:] - last).abs().max() < 1e-12) == alike


def test_layers_in_a_row_share_A() -> None:
    model = net(depth=5)
    params = ll.init(model, ll.LilyConfig(r=4, stride=2))
    ups = [params[f"layers.{i}.up"] for i in range(5)]
    assert [ups[0]["lora_A"] is up["lora_A"] for up in ups] == [True, True, False, False, False]
    assert ups[2]["lora_A"] is ups[3]["lora_A"]
    assert all(up["lora_B"] is ups[0]["lora_B"] for up in ups)
    assert params["layers.0.down"]["lora_B"] is not ups[0]["lora_B"]
    own = ll.init(model, ll.LilyConfig(r=4))
    assert not any("lora_A" in shared for shared in own.layout.shared.values())


def test_pefts_layer() -> None:
    """PEFT's output for a sample depends on the others of its batch; ours needn't."""

    def take(site: Any, p: dict[str, Tensor]) -> dict[str, Tensor]:
        B = p["lily_B"].unflatten(0, (2, 3)).mT
        return {"lora_A": p["lily_A"], "lora_B": B, "lora_route": p["lily_router"]}

    compare(
        Tiny(), peft.LilyConfig(r=3, scaling=1.5), ll.LilyConfig(r=3, alpha=1.5, gate="batch"), take
    )
    model = base()
    made = peft.get_peft_model(copy.deepcopy(model), peft.LilyConfig(r=3, target_modules=["up"]))
    with torch.no_grad():
        for p in made.parameters():
            p += 0.1 * torch.randn(p.shape) if p.requires_grad else 0.0
    x = torch.randn(4, 6, 16)
    assert (made(x)[:1] - made(x[:1])).abs().max() > 1e-4, "PEFT's samples stand alone now"


def test_what_pefts_file_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = base()
    for cfg, match in (
        (ll.LilyConfig(r=4), "mixes by the mean over a whole batch .* found gate='token'"),
        (ll.LilyConfig(r=4, gate="batch", dropout=0.1), "dropout=0.1; its outputs would be"),
    ):
        with pytest.raises(ll.UnsupportedError, match=match):
            ll.to_peft(ll.init(model, cfg), model, tmp_path)
    with pytest.raises(ll.CheckpointError, match="in the order of the model's modules; give"):
        ll.to_peft(ll.init(model, ll.LilyConfig(r=4, gate="batch", stride=2)), None, tmp_path)
    parts = tuple(
        moved(ll.init(model, ll.LilyConfig(r=4, gate="batch", layers=(i,))), i) for i in (0, 1)
    )
    with pytest.raises(ll.UnsupportedError, match=r"has one lora_B for 'layers\.0\.up' and"):
        ll.to_peft(parts, model, tmp_path)


def test_a_file_whose_shared_factors_differ_is_refused(tmp_path: Path) -> None:
    saved(peft.LilyConfig(r=3, target_modules=["up", "down"]), base(), tmp_path)
    held = load_file(tmp_path)
    held["base_model.model.layers.1.up.lily_B.weight"] += 1.0
    save_file(held, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ll.CheckpointError, match=r"has one for this site and .* two that differ"):
        ll.from_peft(tmp_path, base())
