"""One row per method: the whole cost of its general tests. What a method can't have is data here,
with the reason.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from new_method import MixConfig
from torch import Tensor, nn
from torch.func import functional_call

import lora_lite_func as ll
from lora_lite_func.core.registry import variant_for


@dataclass(frozen=True)
class Case:
    """A method and what the laws may expect of it.

    Attributes:
        name: how the test is called.
        config: keywords -> config; r is even and at most 8, every width is divisible by 4.
        exact: identity at the start is bit-exact in every dtype; else within `identity` (float32
            units) of the base.
        identity: tolerance of the identity where it isn't exact, in units of the dtype's epsilon;
            None where the method starts off the base by design.
        dead: trainable tensors whose gradient is zero at the start, and comes after one step.
        differentiable: the gradient is that of the function (False where the method detaches a part
            by design).
        linear: it adapts linear layers where nothing says otherwise.
        stacks: it adapts a parameter that is a stack of weights, one for each expert.
        noise: it draws at random in training mode.
        in_training: trainable tensors that act in training mode alone.
        alone: a site's start doesn't depend on which other sites there are.
        of_all: tensors whose sizes or starts depend on which other sites there are.
        calibration: model -> keywords of `ll.init`, where the start depends on data.
        update: (config, {lora_name: tensor}, site, x) -> what it adds to a layer's output, written
            by hand, of a method that no weight can stand for. It isn't merged.
    """

    name: str
    config: Callable[..., ll.AdapterConfig]
    exact: bool = True
    identity: float | None = 0.0
    dead: frozenset[str] = frozenset()
    differentiable: bool = True
    linear: bool = True
    stacks: bool = True
    noise: bool = False
    in_training: frozenset[str] = frozenset()
    alone: bool = True
    of_all: frozenset[str] = frozenset()
    calibration: Callable[[nn.Module], dict[str, Any]] | None = None
    update: Callable[[Any, Any, ll.Site, Tensor], Tensor] | None = None

    def __repr__(self) -> str:
        return self.name


def _fixed(cls: Any, **fixed: Any) -> Callable[..., ll.AdapterConfig]:
    return lambda **kw: cls(**{**fixed, **kw})


def _set(cls: Any, **fixed: Any) -> Callable[..., ll.AdapterConfig]:
    return lambda **kw: cls(**{**kw, **fixed})


def _norms(**kw: Any) -> ll.AdapterConfig:
    """The norms of the layers that the laws name."""
    names = {(): ("norm$",), ("up",): ("norm$",), ("down$",): ("norm$",)}
    given = kw.pop("target_names", ())
    given = (given,) if isinstance(given, str) else tuple(given)
    return (
        ll.LNTuningConfig(**kw)
        if "target_kinds" in kw
        else ll.LNTuningConfig(**kw, target_names=names.get(given, given))
    )


def _head_tokens(**kw: Any) -> ll.AdapterConfig:
    """Tokens of the linear layers that the laws name, or of the parameters alone where they name
    those.
    """
    kinds = () if "target_parameters" in kw else "linear"
    return ll.TokensConfig(**{"token_ids": (0, 2, 3), "target_kinds": kinds, **kw})


def _weights(**kw: Any) -> ll.AdapterConfig:
    """The weights of the layers that the laws name, as parameters."""
    every = r"(up|down|out_proj)\.weight$"
    names = {
        (): (every,),
        ("up",): (r"up\.weight$",),
        ("down$",): (r"down\.weight$",),
        (r"layers\.0\.",): (r"layers\.0\." + every,),
    }
    given = kw.pop("target_names", ())
    given = (given,) if isinstance(given, str) else tuple(given)
    return ll.FullConfig(keep_start=True, **{"target_parameters": names.get(given, given), **kw})


def _randlora(**kw: Any) -> ll.AdapterConfig:
    """Its random maps have entries of size 1, so that noise on lambda and gamma makes an update far
    larger than the weights.
    """
    return ll.RandLoRAConfig(**{**kw, "alpha": kw.get("alpha", 16.0) / 64})


def _bank(**kw: Any) -> ll.AdapterConfig:
    """A small bank of short vectors, of which the laws' sizes have room for several."""
    return ll.VBLoRAConfig(**{"num_vectors": 6, "vector_length": 4, **kw})


def _data(model: nn.Module) -> dict[str, Any]:
    """Two batches of what a model of tests/helpers.py (or one attention) takes."""
    attention = isinstance(model, nn.MultiheadAttention)
    width = model.embed_dim if attention else model.get_submodule("layers.0.up").in_features
    gen = torch.Generator().manual_seed(11)
    like = next(model.parameters())
    xs = [torch.randn(2, 20, width, generator=gen, dtype=torch.float64).to(like) for _ in range(2)]
    return {
        "calibration_data": [{"query": x, "key": x, "value": x} if attention else x for x in xs]
    }


def _data_and_loss(model: nn.Module) -> dict[str, Any]:
    return {
        **_data(model),
        "loss_fn": lambda y, batch: (y[0] if isinstance(y, tuple) else y).square().mean(),
    }


def _reference(model: nn.Module) -> dict[str, Any]:
    """The model with noise, as if it were what this one was quantised from."""
    gen, dense = torch.Generator().manual_seed(13), copy.deepcopy(model)
    with torch.no_grad():
        for p in dense.parameters():
            p += 0.05 * torch.randn(p.shape, generator=gen, dtype=torch.float64).to(p)
    return {"reference": dense}


def needs_data(case: Case) -> bool:
    """Whether the model has to run for the start."""
    cfg = case.config(r=4)
    return not variant_for(type(cfg)).needs_of(cfg) <= {"weight", "reference"}


def start(case: Case, model: nn.Module, cfg: ll.AdapterConfig, seed: int = 0) -> ll.Adapter:
    """`ll.init` with what the method's start depends on."""
    return ll.init(model, cfg, seed=seed, **(case.calibration(model) if case.calibration else {}))


def dense(case: Case, model: nn.Module, params: ll.Adapter, x: Tensor) -> Tensor:
    """The model's output by torch alone: on merged weights, or with what the case adds by hand."""
    update = case.update
    if update is None:
        return functional_call(model, ll.merge(model, params), (x,))

    def adding(path: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        held, site = params[path], params.sites[path]
        return lambda layer, args, y: y + update(params.config, held, site, args[0])

    handles = [model.get_submodule(path).register_forward_hook(adding(path)) for path in params]
    try:
        return model(x)
    finally:
        for handle in handles:
            handle.remove()


def merging(case: Case) -> AbstractContextManager[Any]:
    """Where a case is merged, or refused."""
    if case.update is None:
        return nullcontext()
    return pytest.raises(ll.UnsupportedError, match=r"has no dense equivalent")


def _experts(cfg: Any, p: Any, site: ll.Site, x: Tensor) -> Tensor:
    """s sum over e of g_e B_e A_e x, token by token and expert by expert, of MoE-LoRA and Arrow."""
    tokens = []
    for token in x.reshape(-1, site.d_in):
        logits = p["lora_route"] @ token if "lora_route" in p else (p["lora_proto"] @ token).abs()
        best = logits.argsort(descending=True)[: cfg.top_k]
        g = (logits[best] / cfg.temperature).softmax(0)
        B = p["lora_B"][best]
        A = p["lora_A"].expand(len(B), -1, -1) if p["lora_A"].ndim == 2 else p["lora_A"][best]
        each = [g[i] * B[i] @ (A[i] @ token) for i in range(len(B))]
        tokens.append(site.scaling * torch.stack(each).sum(0))
    return torch.stack(tokens).view(*x.shape[:-1], site.d_out)


def _shared_experts(cfg: Any, p: Any, site: ll.Site, x: Tensor) -> Tensor:
    """s sum over e of p_e B_e A x, token by token, of Lily."""
    tokens = []
    for token in x.reshape(-1, site.d_in):
        h = p["lora_A"] @ token
        gate = (p["lora_route"] @ h).softmax(0)
        B = sum(g * one for g, one in zip(gate, p["lora_B"], strict=True))
        tokens.append(site.scaling * B @ h)
    return torch.stack(tokens).view(*x.shape[:-1], site.d_out)


A = frozenset({"lora_A"})
W2 = frozenset({"lora_w2", "lora_w2_a", "lora_w2_b"})

CASES = (
    Case("lora", _fixed(ll.LoRAConfig), dead=A),
    Case("rslora", _fixed(ll.LoRAConfig, rslora=True, init_A="gaussian"), dead=A),
    Case("lora_orthogonal", _fixed(ll.LoRAConfig, init_A="orthogonal"), exact=False, identity=64.0),
    Case("pissa", _fixed(ll.PiSSAConfig)),
    Case("pissa_randomised", _fixed(ll.PiSSAConfig, svd_niter=2)),
    Case("milora", _fixed(ll.MiLoRAConfig)),
    Case("mica", _fixed(ll.MiCAConfig)),
    Case("osf", _fixed(ll.OSFConfig)),
    Case("kasa", _fixed(ll.KaSAConfig), exact=False, identity=None, dead=A | {"lora_d"}),
    Case("lora_xs", _fixed(ll.LoRAXSConfig)),
    Case("tinylora", _fixed(ll.TinyLoRAConfig, u=5)),
    Case("tinylora_tied", _fixed(ll.TinyLoRAConfig, u=5, tying=1.0)),
    Case("deft", _fixed(ll.DEFTConfig)),
    Case("deft_qr", _fixed(ll.DEFTConfig, decomposition="qr"), exact=False, identity=64.0),
    Case("para", _fixed(ll.DEFTConfig, para=True), exact=False, identity=None),
    Case("delora", _fixed(ll.DeLoRAConfig)),
    Case(
        "delora_zero_B",
        _fixed(ll.DeLoRAConfig, init="zero_B"),
        dead=frozenset({"lora_A", "lora_lambda"}),
    ),
    Case("ia3", _fixed(ll.IA3Config)),
    Case("ia3_ff", _fixed(ll.IA3FFConfig)),
    Case("dora", _fixed(ll.DoRAConfig), dead=A, differentiable=False),
    Case("dora_attached", _fixed(ll.DoRAConfig, detach_norm=False), dead=A),
    Case("hra", _fixed(ll.HRAConfig), exact=False, identity=16.0),
    Case("road_1", _fixed(ll.ROADConfig, group_size=4)),
    Case("road_2", _fixed(ll.ROADConfig, mode="road_2", group_size=8)),
    Case("road_4", _fixed(ll.ROADConfig, mode="road_4", group_size=4)),
    Case("olora", _fixed(ll.OLoRAConfig)),
    Case("loha", _fixed(ll.LoHaConfig), dead=frozenset({"lora_w1_a", "lora_w1_b", "lora_w2_a"})),
    Case("abba", _fixed(ll.ABBAConfig), dead=frozenset({"lora_w1_a", "lora_w1_b", "lora_w2_b"})),
    Case("lori", _fixed(ll.LoRIConfig)),
    Case("lokr", _fixed(ll.LoKrConfig), dead=W2),
    Case(
        "lokr_both",
        _set(ll.LoKrConfig, factor=8, decompose_both=True, r=2),
        dead=W2 | {"lora_w1_b"},
    ),
    Case("vera", _fixed(ll.VeRAConfig), dead=frozenset({"lora_vera_d"})),
    Case("oft_2", _fixed(ll.OFTConfig, block_size=2)),
    Case("oft_4", _fixed(ll.OFTConfig, block_size=4)),
    Case("oft_8", _fixed(ll.OFTConfig, block_size=8)),
    Case("oft_neumann", _fixed(ll.OFTConfig, block_size=4, cayley="neumann")),
    Case("oft_share", _fixed(ll.OFTConfig, block_size=4, block_share=True)),
    Case("boft", _fixed(ll.BOFTConfig, block_size=4)),
    Case("boft_2", _fixed(ll.BOFTConfig, block_size=2, m=3)),
    Case("pvera", _fixed(ll.PVeRAConfig, sample=True), dead=frozenset({"lora_d"}), noise=True),
    Case("velora", _fixed(ll.VeLoRAConfig, num_groups=3), dead=A),
    Case(
        "monteclora",
        _fixed(ll.MonteCLoRAConfig, noise=1e-4),
        noise=True,
        dead=A | {"lora_sigma", "lora_pi"},
        in_training=frozenset({"lora_sigma", "lora_pi"}),
    ),
    Case("adamss", _fixed(ll.AdaMSSConfig, num_subspaces=3, subspace_rank=2), dead=A),
    Case("frod", _fixed(ll.FRoDConfig, sparse_rate=0.1), alone=False),
    Case("adalora", _fixed(ll.AdaLoRAConfig), dead=A | {"lora_B"}),
    Case("bitfit", _fixed(ll.BitFitConfig)),
    Case("c3a", _fixed(ll.C3AConfig, block_size=4)),
    Case("c3a_1", _fixed(ll.C3AConfig, block_size=1)),
    Case("fourierft", _fixed(ll.FourierFTConfig, n_frequency=24)),
    Case("miss", _fixed(ll.MiSSConfig)),
    Case("miss_padded", _set(ll.MiSSConfig, r=7)),
    Case("miss_mini", _fixed(ll.MiSSConfig, mode="mini", mini_r=4)),
    Case("miss_bat", _fixed(ll.MiSSConfig, mode="bat")),
    Case("ssvd", _fixed(ll.SSVDConfig)),
    Case("ssvd_cayley", _fixed(ll.SSVDConfig, mode="cayley")),
    Case("antipasto", _set(ll.AntiPaSTOConfig, r=8)),
    Case("antipasto_U", _fixed(ll.AntiPaSTOConfig, block_size=2, basis="U", max_angle=0.5)),
    Case("antipasto_none", _fixed(ll.AntiPaSTOConfig, basis="none")),
    Case("randlora", _randlora, dead=frozenset({"lora_gamma"})),
    Case("gralora", _fixed(ll.GraLoRAConfig), dead=A),
    Case("gralora_hybrid", _fixed(ll.GraLoRAConfig, hybrid_r=3), dead=A | {"lora_A_whole"}),
    Case("shira_rand", _set(ll.SHiRAConfig, r=2)),
    Case("shira_struct", _set(ll.SHiRAConfig, r=2, mask="struct")),
    Case("shira_magnitude", _set(ll.SHiRAConfig, r=2, mask="magnitude")),
    Case("hira", _fixed(ll.HiRAConfig), dead=A),
    Case("psoft", _fixed(ll.PSOFTConfig)),
    Case("peanut", _fixed(ll.PEANuTConfig), dead=A),
    Case(
        "peanut_deep",
        _fixed(ll.PEANuTConfig, depth=2, activation="silu"),
        dead=A | {"lora_E", "lora_D"},
    ),
    Case("waveft", _fixed(ll.WaveFTConfig, n_frequency=24)),
    Case("glora", _fixed(ll.GLoRAConfig), dead=frozenset({"lora_A_u", "lora_B_u", "lora_C_u"})),
    Case(
        "glora_vector",
        _set(ll.GLoRAConfig, r=4, weight_form="vector", prompt_form="vector", bias_form="vector"),
    ),
    Case("bdlora", _fixed(ll.BDLoRAConfig), dead=A),
    Case("melora", _fixed(ll.BDLoRAConfig, blocks_A=2), dead=A),
    Case("qalora", _fixed(ll.QALoRAConfig, group_size=4), dead=A),
    Case("mora", _fixed(ll.MoRAConfig)),
    Case("mora_sharing", _fixed(ll.MoRAConfig, mode="sharing")),
    Case("moelora", _fixed(ll.MoELoRAConfig), dead=A | {"lora_route"}, update=_experts),
    Case(
        "moelora_top",
        _fixed(ll.MoELoRAConfig, experts=4, shared_A=False, top_k=2, temperature=0.5),
        dead=A | {"lora_route"},
        update=_experts,
    ),
    Case("arrow", _fixed(ll.ArrowConfig, experts=3, top_k=2), dead=A, update=_experts),
    Case(
        "lily",
        _fixed(ll.LilyConfig, experts=3, alpha=1.5),
        dead=A | {"lora_route"},
        update=_shared_experts,
    ),
    Case(
        "rasa",
        lambda **kw: ll.RaSAConfig(**{**kw, "r": max(kw.get("r", 8), 4)}),
        dead=frozenset({"lora_A", "lora_d", "lora_shared_A"}),
        of_all=frozenset({"lora_d", "lora_shared_A", "lora_shared_B"}),
    ),
    Case("unilora", _fixed(ll.UniLoRAConfig, length=24)),
    Case("vblora", _bank, exact=False, identity=None),  # near the base
    Case("vblora_exact", functools.partial(_bank, exact_start=True)),
    Case("poly", _fixed(ll.PolyConfig), dead=A | {"lora_logits"}),
    Case("mhr", _fixed(ll.PolyConfig, skills=3, splits=4), dead=A | {"lora_logits"}),
    Case("ln_tuning", _norms, linear=False),
    Case("tokens_of_a_head", _head_tokens, linear=False, stacks=False),
    Case("full", _weights, linear=False),
    Case("from_outside", _fixed(MixConfig), dead=frozenset({"lora_v"})),
)

CALIBRATED = (
    Case("eva", _fixed(ll.EVAConfig), dead=A, calibration=_data),
    Case(
        "eva_whitened",
        _fixed(ll.EVAConfig, center=True, whiten=True, rslora=True),
        dead=A,
        calibration=_data,
    ),
    Case("corda", _fixed(ll.CorDAConfig), calibration=_data),
    Case("corda_kpm", _fixed(ll.CorDAConfig, mode="kpm"), calibration=_data),
    Case("asvd", _fixed(ll.ASVDConfig), calibration=_data),
    Case("asvd_root", _fixed(ll.ASVDConfig, weighting="root"), calibration=_data),
    Case("shira_snip", _set(ll.SHiRAConfig, r=2, mask="snip"), calibration=_data_and_loss),
    Case("loftq", _fixed(ll.LoftQConfig), exact=False, identity=None, calibration=_reference),
    Case("lora_ga", _set(ll.LoRAGAConfig, r=2), calibration=_data_and_loss),
    Case(
        "lora_ga_random",
        _set(ll.LoRAGAConfig, r=2, direction="random", scale="gd"),
        calibration=_data_and_loss,
    ),
)
"""Methods whose start depends on data, or on another model."""

MERGED = tuple(case for case in CASES + CALIBRATED if case.update is None)
"""Methods for which a weight can stand."""
