"""What single methods promise beside the laws: one product instead of several, shared starts, whole
parameters, ranks shared out anew.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, Case, start
from helpers import close, leaves, moved, net, seen_at
from torch import Tensor, nn
from torch.func import functional_call, grad

import lora_lite_func as ll
from lora_lite_func.core.registry import variant_for
from lora_lite_func.kernels.cost import dense_pays

DENSE = [case for case in CASES if variant_for(type(case.config(r=4))).dense is not None]


def rows(count: int, width: int = 16, seed: int = 5) -> Tensor:
    return torch.randn(
        count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


# ------------------------------------------------------------------- one product instead of several
@pytest.mark.parametrize("case", DENSE, ids=repr)
def test_many_tokens_go_through_one_product(case: Case) -> None:
    model, x = net(), rows(700)
    params = start(case, model, case.config(r=4))
    variant = params.layout.variant
    with torch.no_grad():
        if case.exact:
            assert torch.equal(ll.apply(model, params, x), model(x))
        params = moved(params)
        few = torch.cat([ll.apply(model, params, part) for part in x.split(2)])
        close(ll.apply(model, params, x), few, 1e-12)
        close(ll.bind(model, params)(x), few, 1e-12)
        assert (
            any(
                dense_pays(variant.dense(params.config, site, 700), site, 700, x.device)
                for site in params.sites.values()
            )
            or variant.name == "miss"
        )
    direct = grad(lambda p: ll.apply(model, p, x).square().mean())(params)
    through = grad(lambda p: functional_call(model, ll.merge(model, p), (x,)).square().mean())(
        params
    )
    close(ll.partition(direct)[0], ll.partition(through)[0], 1e-9)


def _shifted(frozen: Any, u: Tensor) -> Tensor:
    return frozen(u) + 1.0


def test_one_product_is_only_for_plain_layers_where_nothing_is_rounded() -> None:
    model, x = net(dtype=torch.float32), rows(700).float()
    params = moved(ll.init(model, ll.HiRAConfig(r=4, dropout=0.5)))
    with torch.no_grad():
        y = ll.apply(model, params, x)
        close(
            ll.apply(model.double(), ll.cast(params, torch.float64), x.double()), y.double(), 1e-5
        )
        model.float().train()
        assert not torch.equal(ll.apply(model, params, x), y)  # dropout acts on the phases' input
        model.eval()
        frozen = model.layers[0].up.forward
        model.layers[0].up.forward = functools.partial(_shifted, frozen)  # type: ignore[method-assign]
        few = torch.cat([ll.apply(model, params, part) for part in x.split(1)])
        assert (few - y).abs().max() > 0.1
        close(ll.apply(model, params, x), few, 1e-5)
        half = net(dtype=torch.bfloat16)
        small = ll.init(half, ll.HiRAConfig(r=4, dtype=torch.float32))
        nudged = moved(small, size=1e-2)
        assert (ll.apply(half, nudged, x.bfloat16()) - half(x.bfloat16())).abs().max() > 0


# ------------------------------------------------------------------------------------ shared starts
@pytest.mark.parametrize(
    "cfg",
    [
        ll.VeRAConfig(r=4),
        ll.RandLoRAConfig(r=4),
        ll.FourierFTConfig(n_frequency=9),
        ll.SHiRAConfig(r=2),
    ],
)
def test_sites_of_a_shape_share_their_frozen_start(cfg: ll.AdapterConfig, tmp_path: Path) -> None:
    params = ll.init(net(depth=3), cfg)

    def frozen(adapter: ll.Adapter) -> set[int]:
        return {t.data_ptr() for t in leaves(ll.partition(adapter)[1])}

    layout = params.layout
    drawn = {
        (name, site.d_out > site.d_in, layout.specs[p][name].shape)
        for p, site in params.sites.items()
        for name in params[p]
    }
    expected = {
        (n, n[:9] == "lora_rand" or wide, shape)
        for n, wide, shape in drawn
        if not layout.specs["layers.0.up"][n].trainable
    }
    assert len(frozen(params)) == len(expected) < 6  # two shapes, three sites each
    ll.save(params, tmp_path / "a.safetensors")
    assert len(frozen(ll.load(tmp_path / "a.safetensors"))) == len(expected)
    trained = leaves(ll.partition(params)[0])
    assert len({t.data_ptr() for t in trained}) == len(trained)


# --------------------------------------------------------------------------------- whole parameters
class Classifier(nn.Module):
    """A table, a norm and a head that is drawn anew for each model."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        body, head = (torch.Generator().manual_seed(s) for s in (0, seed))
        self.embed, self.up, self.norm, self.classifier = (
            nn.Embedding(11, 8),
            nn.Linear(8, 8),
            nn.LayerNorm(8),
            nn.Linear(8, 3),
        )
        self.double()
        with torch.no_grad():
            for name, p in self.named_parameters():
                p.copy_(
                    torch.randn(
                        p.shape,
                        generator=head if "classifier" in name else body,
                        dtype=torch.float64,
                    )
                )

    def forward(self, ids: Tensor) -> Tensor:
        return self.classifier(self.norm(torch.tanh(self.up(self.embed(ids)))).mean(-2))


def test_full_brings_a_new_head_back_in_one_file(tmp_path: Path) -> None:
    model, ids = Classifier(1), torch.arange(10).view(2, 5)
    lora = moved(ll.init(model, ll.LoRAConfig(r=2)))
    whole = ll.init(
        model, ll.FullConfig(target_parameters=(r"^classifier\.", "norm", r"embed\.weight"))
    )
    assert sorted(whole) == [
        "classifier.bias",
        "classifier.weight",
        "embed.weight",
        "norm.bias",
        "norm.weight",
    ]
    assert torch.equal(ll.apply(model, whole, ids), model(ids))
    whole = moved(whole)
    y = ll.apply(model, (lora, whole), ids)
    ll.save((lora, whole), tmp_path / "a.safetensors")
    close(ll.apply(Classifier(2), ll.load(tmp_path / "a.safetensors"), ids), y, 1e-12)
    held = {
        path: p["lora_W"].mT if whole.sites[path].transposed else p["lora_W"]
        for path, p in whole.items()
    }
    tensors = {
        path: t.reshape(dict(model.named_parameters())[path].shape) for path, t in held.items()
    }
    close(ll.apply(model, whole, ids), functional_call(model, tensors, (ids,)), 1e-12)
    with pytest.raises(ll.UnsupportedError, match=r"use FullConfig\(keep_start=True\)"):
        ll.scale(whole, 0.5)


def test_full_without_a_name_is_refused() -> None:
    with pytest.raises(
        ll.TargetError, match="full adapts bare parameters alone; name them in target_parameters"
    ):
        ll.init(net(), ll.FullConfig())


def test_ln_tuning_trains_the_norms_as_they_are() -> None:
    model, x = net(), rows(6)
    params = moved(ll.init(model, ll.LNTuningConfig()))
    assert sorted(params) == ["layers.0.norm", "layers.1.norm"]
    by_hand = {
        f"{path}.{name}": getattr(model.get_submodule(path), name) + p[f"lora_ln_{name[0]}"]
        for path, p in params.items()
        for name in ("weight", "bias")
    }
    close(ll.apply(model, params, x), functional_call(model, by_hand, (x,)), 1e-12)
    found = grad(lambda p: ll.apply(model, p, x).square().sum())(params)
    through = grad(lambda w: functional_call(model, w, (x,)).square().sum())(by_hand)
    for path in params:
        for name in ("weight", "bias"):
            close(found[path][f"lora_ln_{name[0]}"], through[f"{path}.{name}"], 1e-10)


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_ln_tuning_agrees_with_peft() -> None:
    peft: Any = pytest.importorskip("peft")
    model, x = net(), rows(6)
    params = moved(ll.init(model, ll.LNTuningConfig()))
    other = peft.get_peft_model(net(), peft.LNTuningConfig(target_modules=["norm"]))
    theirs = {n: p for n, p in other.named_parameters() if "ln_tuning_layers" in n}
    with torch.no_grad():
        for name, p in theirs.items():
            path = name.removeprefix("base_model.model.").partition(".ln_tuning_layers")[0]
            p.add_(params[path][f"lora_ln_{name.rpartition('.')[2][0]}"])
    y = other(x)
    close(y, ll.apply(model, params, x), 1e-12)
    y.square().sum().backward()
    found = grad(lambda p: ll.apply(model, p, x).square().sum())(params)
    for name, p in theirs.items():
        path = name.removeprefix("base_model.model.").partition(".ln_tuning_layers")[0]
        close(p.grad, found[path][f"lora_ln_{name.rpartition('.')[2][0]}"], 1e-10)


# ---------------------------------------------------------------------------- ranks shared out anew
@pytest.mark.parametrize("center", [False, True])
def test_eva_shares_ranks_out_by_explained_variance(center: bool, tmp_path: Path) -> None:
    model, batches = net(width=16, inner=8, depth=3), [rows(40, seed=s) for s in range(3)]
    with torch.no_grad():
        model.layers[1].norm.weight.mul_(torch.linspace(2, 0, 16))
    cfg = ll.EVAConfig(r=4, alpha=8.0, rho=2.0, center=center)
    params = ll.init(model, cfg, calibration_data=batches)
    shares = []
    for path in ll.init(model, ll.LoRAConfig()):
        X = seen_at(copy.deepcopy(model), path, batches)
        values = torch.linalg.svdvals(X - X.mean(0) if center else X).square()
        shares += [(float(v / values.sum()), path) for v in values[:8]]
    best = [path for _, path in sorted(shares, reverse=True)[: 4 * 6]]
    expected = {path: best.count(path) for path in dict.fromkeys(best)}
    assert {path: site.r for path, site in params.sites.items()} == expected
    assert len(set(expected.values())) > 1
    assert {site.scaling for site in params.sites.values()} == {2.0}
    plain = ll.init(model, ll.EVAConfig(r=8, center=center), calibration_data=batches)
    for path, p in params.items():
        close(p["lora_A"], plain[path]["lora_A"][: expected[path]], 1e-10)
    ll.save(params, tmp_path / "a.safetensors")
    assert ll.load(tmp_path / "a.safetensors", model).sites == params.sites


def test_eva_leaves_a_site_alone_that_explains_less_than_the_others() -> None:
    model = net(width=16, inner=16, depth=2)
    # every input of the first layer on a line
    one = torch.linspace(-1, 1, 60, dtype=torch.float64)[:, None] * rows(1)
    with torch.no_grad():
        model.layers[0].norm = nn.Identity()
        model.layers[0].down.weight.mul_(1e-3)
    params = ll.init(model, ll.EVAConfig(r=1, rho=3.0), calibration_data=[one])
    assert sum(site.r for site in params.sites.values()) == 4
    assert ll.apply(model, params, one).shape == (60, 8)
    with pytest.raises(
        ll.ConfigError,
        match=r"EVAConfig.rho: a rank grows at most by this factor, expected at least 1, found 0.5",
    ):
        ll.EVAConfig(rho=0.5)
    with pytest.raises(
        ll.ConfigError,
        match="EVA finds 3 directions in the inputs, expected at least as many tokens, found 2",
    ):
        ll.init(model, ll.EVAConfig(r=1, rho=3.0), calibration_data=[one[:2]])


# ------------------------------------------------------------------------------- masks, constraints
@pytest.mark.parametrize("mask", ["grad", "snip"])
def test_shira_masks_follow_the_gradient(mask: Any) -> None:
    model, batches = net(), [rows(20, seed=s) for s in range(2)]
    cfg = ll.SHiRAConfig(r=2, mask=mask)
    params = ll.init(
        model, cfg, calibration_data=batches, loss_fn=lambda y, batch: y.square().mean()
    )
    copied = copy.deepcopy(model)
    sum(copied(batch).square().mean() for batch in batches).backward()  # type: ignore[union-attr]
    for path, p in params.items():
        W = copied.get_submodule(path).weight
        score = (W.grad if mask == "grad" else W * W.grad).abs().detach()
        chosen = score[p["lora_idx"][0].long(), p["lora_idx"][1].long()]
        assert chosen.min() >= score.flatten().sort(descending=True).values[chosen.numel() - 1]
    with pytest.raises(
        ll.ConfigError, match="shira starts from gradients: give calibration_data and loss_fn"
    ):
        ll.init(model, cfg)
    with pytest.raises(ll.ConfigError, match="shira takes no calibration data"):
        ll.init(model, ll.SHiRAConfig(r=2), calibration_data=batches)
    # a random mask reads no weight
    assert ll.init(model.to("meta"), ll.SHiRAConfig(r=2))["layers.0.up"]["lora_v"].is_meta


def test_projected_rotations_are_no_longer_than_the_bound() -> None:
    model, x = net(), rows(5)
    params = moved(ll.init(model, ll.OFTConfig(block_size=4, coft_eps=0.05)), size=1.0)
    near = ll.project(params)
    for path, p in near.items():
        n = len(p["lora_oft_q"])
        long = (2 * params[path]["lora_oft_q"].square().sum(-1)).sqrt() > 0.05 / n**0.5
        lengths = (2 * p["lora_oft_q"].square().sum(-1)).sqrt()
        close(lengths[long], torch.full_like(lengths[long], 0.05 / n**0.5), 1e-12)
    close(ll.project(near), near, 1e-12)
    close(ll.project(ll.stack([params, near])), ll.stack([near, near]), 1e-12)
    assert (ll.apply(model, near, x) - model(x)).abs().max() < (
        ll.apply(model, params, x) - model(x)
    ).abs().max()
    with pytest.raises(
        ll.UnsupportedError,
        match="lora has no constraint that its parameters could be projected to",
    ):
        ll.project(ll.init(model, ll.LoRAConfig()))


@pytest.mark.parametrize("share", [False, True])
def test_dropped_blocks_arent_rotated(share: bool) -> None:
    layer = nn.Linear(16, 16, bias=False, dtype=torch.float64)
    torch.nn.init.eye_(layer.weight)
    model = nn.Sequential(layer)
    params = moved(
        ll.init(model, ll.OFTConfig(block_size=4, block_dropout=0.5, block_share=share)), size=0.5
    )
    x = rows(600)
    assert torch.equal(ll.apply(model.eval(), params, x), ll.apply(model, params, x))
    whole = ll.apply(model, params, x)
    model.train()
    kept = 0
    for seed in range(20):
        torch.manual_seed(seed)
        y = ll.apply(model, params, x)
        for block in range(4):
            part = slice(4 * block, 4 * block + 4)
            dropped, turned = ((y[:, part] - z[:, part]).abs().max() < 1e-9 for z in (x, whole))
            assert bool(dropped) != bool(turned)
            kept += int(turned)
    assert 20 < kept < 60
