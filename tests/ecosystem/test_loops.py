"""The loops and tools that models go to: Trainer, generate, a pipeline, accelerate, compile,
export, checkpointing, other devices.
"""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, merging
from families import FAMILIES, IDS
from helpers import close, leaves, moved, net, normal, same_state, snapshot
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint
from trainers import trainer

import lora_lite_func as ll

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Deterministic behavior was enabled"),
]
LORA = ll.LoRAConfig(r=4)
X = normal(5, 16, seed=0)


@pytest.fixture
def qwen3() -> Any:
    """A small causal language model with a tied head; nobody may write on it."""
    pytest.importorskip("transformers")
    model = FAMILIES["qwen3"].model
    model(IDS)
    before = snapshot(model)
    yield model
    for before_it, after_it in zip(before, snapshot(model), strict=True):
        # a checkpoint loaded into a bound model writes the same values on the shared storage
        if isinstance(before_it[-1], Tensor):
            before_it, after_it = (*before_it[:2], *before_it[3:]), (*after_it[:2], *after_it[3:])
        assert same_state((before_it,), (after_it,))


def adapter(
    model: nn.Module, size: float = 0.1, cfg: ll.AdapterConfig = LORA, seed: int = 1
) -> ll.Adapter:
    return moved(ll.init(model, cfg), seed, size)


# -------------------------------------------------------------------------------------- the Trainer
def test_trainer_saves_resumes_and_exports(qwen3: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    start = ll.init(qwen3, LORA)
    whole = ll.bind(qwen3, ll.init(qwen3, LORA))
    trainer(whole, tmp_path).train()
    resumed = ll.bind(qwen3, ll.init(qwen3, LORA))
    trainer(resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    found, expected = ll.unbind(resumed), ll.unbind(whole)
    assert all(torch.equal(a, b) for a, b in zip(leaves(found), leaves(expected), strict=True))
    assert all(not torch.equal(expected[p]["lora_B"], start[p]["lora_B"]) for p in start)
    ll.save(expected, tmp_path / "adapter.safetensors")
    exported = ll.load(tmp_path / "adapter.safetensors", qwen3)
    with torch.no_grad():
        assert torch.equal(ll.apply(qwen3, exported, IDS).logits, whole.eval()(IDS).logits)


def test_trainer_with_checkpointing_accumulation_and_bfloat16(qwen3: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    bound = ll.bind(qwen3, ll.init(qwen3, ll.HRAConfig(r=4)))
    before = [p.detach().clone() for p in bound.parameters() if p.requires_grad]
    trainer(
        bound,
        tmp_path,
        gradient_checkpointing=True,
        bf16=True,
        gradient_accumulation_steps=2,
        save_strategy="no",
        max_steps=2,
    ).train()
    assert all(
        not torch.equal(a, b)
        for a, b in zip(before, (p for p in bound.parameters() if p.requires_grad), strict=True)
    )


# --------------------------------------------------------------------------------------- generation
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 5},
    "beams": {"num_beams": 3},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "dynamic cache": {"do_sample": False, "cache_implementation": "dynamic"},
    "no cache": {"do_sample": False, "use_cache": False},
}


@pytest.mark.parametrize("way", WAYS)
def test_generate(qwen3: Any, way: str) -> None:
    params = adapter(qwen3)
    found = []
    for made in (ll.bind(qwen3, params), ll.merged(qwen3, params)):
        torch.manual_seed(0)
        found.append(made.generate(IDS[:, :4], max_new_tokens=6, min_new_tokens=6, **WAYS[way]))  # type: ignore[operator]
    assert torch.equal(*found)


def test_pipeline(qwen3: Any) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", eos_token="w2"
    )
    params = adapter(qwen3)
    texts = []
    for made in (ll.bind(qwen3, params), ll.merged(qwen3, params)):
        pipe = transformers.pipeline("text-generation", model=made, tokenizer=tokenizer)
        texts.append(pipe("w5 w6 w7", max_new_tokens=5, do_sample=False)[0]["generated_text"])
    assert texts[0] == texts[1] != "w5 w6 w7"


def test_what_is_merged_is_saved_and_loaded_as_any_model(qwen3: Any, tmp_path: Path) -> None:
    params = adapter(qwen3)
    ll.merged(qwen3, params).save_pretrained(tmp_path)  # type: ignore[operator]
    loaded = type(qwen3).from_pretrained(tmp_path)
    with torch.no_grad():
        close(loaded(IDS).logits, ll.apply(qwen3, params, IDS).logits, 1e-5)


# --------------------------------------------------------------------------------------- accelerate
def test_accelerator_prepares_and_keeps_state(qwen3: Any, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    bound: Any = ll.bind(qwen3, ll.init(qwen3, LORA))
    optimizer = torch.optim.AdamW([p for p in bound.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer = accelerator.prepare(bound, optimizer)
    losses = []
    for step in range(3):
        if step == 2:
            accelerator.save_state(str(tmp_path))
        loss = model(IDS, labels=IDS).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    accelerator.load_state(str(tmp_path))
    assert model(IDS, labels=IDS).loss.item() == losses[2]
    assert isinstance(ll.unbind(accelerator.unwrap_model(model)), ll.Adapter)


PLACES: dict[str, dict[str, str]] = {
    "dispatched": {"model": "cpu", "lm_head": "cpu"},
    "a layer on disk": {
        **dict.fromkeys(
            ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"),
            "cpu",
        ),
        "model.layers.1": "disk",
    },
    "offloaded": {},
}


def placed(model: nn.Module, place: str, folder: Path) -> Any:
    """As accelerate leaves it there."""
    import accelerate

    if not PLACES[place]:
        return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    settings = {
        "device_map": PLACES[place],
        "main_device": "cpu",
        "force_hooks": True,
        "offload_dir": str(folder),
    }
    return accelerate.dispatch_model(model, **settings)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("order", ["bound first", "bound after"])
def test_accelerates_hooks_around_either(
    qwen3: Any, place: str, order: str, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    for cfg in (LORA, ll.DoRAConfig(r=4), ll.HRAConfig(r=4)):
        params = adapter(qwen3, cfg=cfg)
        folder = tmp_path / type(cfg).__name__
        with torch.no_grad():
            expected = ll.apply(qwen3, params, IDS).logits
            if order == "bound first":
                bound = placed(ll.bind(qwen3, params), place, folder)
                for _ in range(2):
                    close(bound(IDS).logits, expected, 1e-5)
                assert all(
                    torch.equal(a, b)
                    for a, b in zip(leaves(ll.unbind(bound)), leaves(params), strict=True)
                )
            else:
                model = placed(copy.deepcopy(qwen3), place, folder)
                close(ll.apply(model, params, IDS).logits, expected, 1e-5)
                close(ll.bind(model, params)(IDS).logits, expected, 1e-5)
                found = ll.check(model, params, IDS)
                assert found.ok, repr(found)
                assert ("offloaded" in found.unmerged) == (place != "dispatched")


# ------------------------------------------------------------------------------- compile and export
def test_the_default_backend() -> None:
    torch._dynamo.reset()
    model, x = net(depth=1, dtype=torch.float32), X.float()

    def gradient(params: ll.Adapter, x: Tensor) -> Any:
        return torch.func.grad_and_value(lambda p: ll.apply(model, p, x).square().sum())(params)

    every = torch.func.vmap(gradient, in_dims=(0, None))
    step = torch.compile(every, fullgraph=True)
    alike = [moved(ll.init(model, LORA), seed) for seed in range(3)]
    for i, some in enumerate((ll.stack(alike), ll.stack(alike[::-1]))):
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            close(step(some, x), every(some, x), 1e-5)
    torch._dynamo.reset()


class Exported(nn.Module):
    """What an export takes: the adapter's tensors as plain inputs, so that the program needs
    nothing of this library.
    """

    def __init__(self, model: nn.Module, layout: Any) -> None:
        super().__init__()
        self.model, self.layout = model, layout

    def forward(self, tensors: dict[str, dict[str, Tensor]], x: Tensor) -> Tensor:
        return ll.apply(self.model, ll.Adapter(self.layout, tensors), x)


def plain(params: ll.Adapter) -> dict[str, dict[str, Tensor]]:
    return {path: dict(tensors) for path, tensors in params.items()}


@pytest.mark.parametrize(
    "cfg",
    [LORA, ll.DoRAConfig(r=4), ll.PiSSAConfig(r=4), ll.OFTConfig(block_size=4)],
    ids=lambda c: type(c).__name__,
)
def test_an_exported_program_takes_any_adapter(cfg: ll.AdapterConfig, tmp_path: Path) -> None:
    model = net()
    first, second = adapter(model, cfg=cfg), adapter(model, cfg=cfg, seed=7)
    batch = torch.export.Dim("batch")
    shapes = {"tensors": {path: dict.fromkeys(ts) for path, ts in first.items()}, "x": {0: batch}}
    program = torch.export.export(
        Exported(model, first.layout), (plain(first), X), dynamic_shapes=shapes
    )
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    for params in (first, second):
        for x in (X, X[:3]):
            close(loaded(plain(params), x), ll.apply(model, params, x), 1e-12)


def test_a_bound_model_exports_with_its_adapter_inside(qwen3: Any, tmp_path: Path) -> None:
    bound = ll.bind(net(), adapter(net()))
    program = torch.export.export(bound, (X,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, tmp_path / "bound.pt2")
    close(torch.export.load(tmp_path / "bound.pt2").module()(X[:3]), bound(X[:3]), 1e-12)
    language = ll.bind(qwen3, adapter(qwen3))
    program = torch.export.export(language, (), {"input_ids": IDS, "use_cache": False})
    close(program.module()(input_ids=IDS, use_cache=False).logits, language(IDS).logits, 1e-6)  # type: ignore[operator]


# ------------------------------------------------------------------------------------ checkpointing
class Checkpointed(nn.Module):
    """Blocks under torch.utils.checkpoint."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.net, self.reentrant = net(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return self.net.head(x)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "cfg", [LORA, ll.DoRAConfig(r=4), ll.HRAConfig(r=4)], ids=lambda c: type(c).__name__
)
def test_torchs_checkpoint(reentrant: bool, cfg: ll.AdapterConfig) -> None:
    model = Checkpointed(reentrant)
    trainable, frozen = ll.partition(adapter(model, cfg=cfg))
    # the re-entrant kind gives no gradients unless an input requires one, as torch warns
    x = X.clone().requires_grad_()
    tensors = [t.requires_grad_() for t in leaves(trainable)]

    def loss(y: Tensor) -> Tensor:
        return y.square().sum()

    plain = model.net
    inner = ll.Adapter(
        _moved_into(trainable.layout, "net."),
        {path.removeprefix("net."): ts for path, ts in ll.combine(trainable, frozen).items()},
    )
    wanted = torch.autograd.grad(loss(ll.apply(plain, inner, x)), [*tensors, x])
    loss(ll.apply(model, ll.combine(trainable, frozen), x)).backward()
    close([t.grad for t in [*tensors, x]], wanted, 1e-12)
    bound = ll.bind(model, ll.combine(trainable, frozen))
    loss(bound(x)).backward()
    close(
        [p.grad for p in bound.parameters() if p.requires_grad],
        [t.grad for t in _as_bound(trainable)],
        1e-12,
    )


def _moved_into(layout: Any, prefix: str) -> Any:
    import dataclasses

    sites = [
        dataclasses.replace(site, path=path.removeprefix(prefix))
        for path, site in layout.sites.items()
    ]
    return type(layout)(layout.variant, layout.config, sites)


def _as_bound(trainable: ll.Adapter) -> list[Tensor]:
    """The trainable tensors in the order of a bound model's parameters: that of the model's
    modules.
    """
    paths = [name for name, _ in Checkpointed(False).named_modules() if name in trainable]
    return [t for path in paths for t in trainable[path].values() if isinstance(t, Tensor)]


def test_checkpoint_under_a_function_transform_is_refused_by_torch() -> None:
    model = Checkpointed(False)
    with pytest.raises(RuntimeError, match="saved tensor hooks"):
        torch.func.grad(lambda p: ll.apply(model, p, X).sum())(adapter(model))


# ------------------------------------------------------------------------------- devices, processes
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_the_meta_device_gives_shapes(case: Any) -> None:
    model = net(dtype=torch.bfloat16).to("meta")
    cfg = case.config(r=4)
    variant = ll.variants()[ll.init(net(), cfg).layout.variant.name]
    if "weight" in variant.needs_of(cfg):
        with pytest.raises(
            ll.UnsupportedError,
            match=r"'layers\.0\.up(\.weight)?': .* reads the weight, which is on the meta device",
        ):
            ll.init(model, cfg)
        return
    params = ll.init(model, cfg)
    assert {t.device.type for t in leaves(params)} == {"meta"}
    y = ll.apply(model, params, torch.empty(3, 16, dtype=torch.bfloat16, device="meta"))
    assert (y.shape, y.dtype, y.device.type) == ((3, 8), torch.bfloat16, "meta")
    with merging(case):
        assert {t.device.type for t in ll.merge(model, params).values()} == {"meta"}


class Across(nn.Module):
    """A model whose parts are on other devices, as a device map leaves it."""

    def __init__(self, devices: tuple[str, ...]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(16, 16, device=device) for device in devices)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = torch.tanh(part(x.to(part.weight.device)))
        return x


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.name in ("lora", "hra", "ia3", "oft_4", "vera", "fourierft", "bitfit")],
    ids=repr,
)
def test_each_sites_tensors_follow_its_weight(case: Any) -> None:
    model, cfg = Across(("cpu", "meta", "cpu")), case.config(r=4)
    params = ll.init(model, cfg)
    for path, tensors in params.items():
        assert {t.device for t in tensors.values()} == {model.get_submodule(path).weight.device}  # type: ignore[union-attr]
    bound = ll.bind(Across(("cpu", "meta")), ll.init(Across(("cpu", "meta")), cfg))
    assert bound(X.float()).device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_with_streams() -> None:
    model = Across(("cpu", "cuda"))
    params = adapter(model)
    x = X.float()
    dense = ll.merged(model, params)
    close(ll.apply(model, params, x).cpu(), dense(x).cpu(), 1e-5)
    whole = net(dtype=torch.float32).cuda()
    params = adapter(whole)
    expected = ll.apply(whole, params, x.cuda())
    with torch.cuda.stream(torch.cuda.Stream()):
        found = ll.apply(whole, params, x.cuda())
    torch.cuda.synchronize()
    close(found, expected, 1e-6)


def test_copies_and_pickles_of_a_bound_model(qwen3: Any, tmp_path: Path) -> None:
    params = adapter(qwen3, cfg=ll.PiSSAConfig(r=4))
    bound = ll.bind(qwen3, params)
    with torch.no_grad():
        expected = bound(IDS).logits
        torch.save(bound, tmp_path / "bound.pt")
        copies: list[Any] = [
            copy.deepcopy(bound),
            pickle.loads(pickle.dumps(bound)),
            torch.load(tmp_path / "bound.pt", weights_only=False),
        ]
        for other in copies:
            assert type(other) is type(qwen3)
            assert torch.equal(other(IDS).logits, expected)
            assert torch.equal(ll.apply(qwen3, ll.unbind(other), IDS).logits, expected)
            next(p for p in other.parameters() if p.requires_grad).add_(1.0)
        torch.save(bound.state_dict(), tmp_path / "state.pt")
        copies[0].load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        assert torch.equal(copies[0](IDS).logits, expected)
        assert torch.equal(bound(IDS).logits, expected)


def _in_another_process(pipe: Any) -> None:
    params, x = pipe.recv()
    pipe.send(ll.apply(net(), params, x).tolist())


def test_an_adapter_goes_to_a_spawned_process() -> None:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    params = adapter(net())
    process = context.Process(target=_in_another_process, args=(there,))
    process.start()
    here.send((params, X))
    assert here.poll(120)
    close(torch.tensor(here.recv(), dtype=torch.float64), ll.apply(net(), params, X), 1e-12)
    process.join(60)
    assert process.exitcode == 0


def test_data_parallel_takes_a_bound_model_and_is_refused_as_a_base() -> None:
    model = net()
    params = adapter(model)
    for verb in (ll.apply, ll.bind, ll.check):
        with pytest.raises(ll.UnsupportedError, match=r"DataParallel.*bind first, then wrap"):
            verb(nn.DataParallel(model), params, *([X] if verb is not ll.bind else []))
    assert torch.equal(nn.DataParallel(ll.bind(model, params))(X), ll.apply(model, params, X))


def test_a_tensor_of_a_site_cannot_be_taken_out_once_it_is_an_attribute() -> None:
    model = net()
    for cfg in (LORA, ll.FullConfig(target_parameters=(r"layers\.0\.up\.weight",))):
        layer = ll.bind(model, adapter(model, cfg=cfg)).layers[0].up
        stored = layer._parameters["weight"]
        del layer.weight  # a parameter, as ever
        layer.weight = stored.detach()  # as FullyShardedDataParallel sets its views
        with pytest.raises(
            ll.UnsupportedError,
            match=r"'layers\.0\.up' \(Linear\): its "
            r"weight.*FullyShardedDataParallel.*fully_shard\(ll\.bind",
        ):
            del layer.weight


class Mixed(nn.Module):
    """Layers of several kinds: lookups, convolutions, attention, recurrence, norms, plain linear
    ones.
    """

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(10, 16)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.rnn = nn.GRU(16, 16, batch_first=True)
        self.norm = nn.LayerNorm(16)
        self.linear = nn.Linear(16, 8)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.conv(self.emb(ids).mT).mT
        h = self.norm(self.rnn(self.attention(h, h, h)[0])[0])
        return self.linear(h)


KINDS_OF_SITES = [
    ll.LoRAConfig(r=2, target_names=("linear",)),
    ll.PiSSAConfig(r=2, target_names=("linear",)),
    ll.DoRAConfig(r=2, target_names=("linear",)),
    ll.HiRAConfig(r=2, target_names=("linear",)),
    ll.LoRAConfig(
        r=2,
        target_names=("emb", "conv", "linear", "out_proj"),
        target_kinds=("embedding", "conv", "linear"),
        exclude_names=(),
    ),
    ll.LoRAConfig(r=2, target_parameters=(r"attention\.in_proj_weight", r"rnn\.weight_hh_l0")),
    ll.FullConfig(target_parameters=(r"norm\.weight", r"norm\.bias", r"linear\.bias")),
    ll.BitFitConfig(target_names=("linear", "conv"), target_kinds=("linear", "conv")),
]


@pytest.mark.parametrize("cfg", KINDS_OF_SITES, ids=lambda cfg: type(cfg).__name__)
def test_replicas_of_data_parallel_do_what_the_module_does(
    cfg: ll.AdapterConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    replicating: Any = sys.modules["torch.nn.parallel.replicate"]

    def copied(tensors: Any, devices: Any, detach: bool) -> Any:
        return [[t.detach() * 1 if detach else t * 1 for t in tensors] for _ in devices]

    monkeypatch.setattr(replicating, "_broadcast_coalesced_reshape", copied)
    model, ids = Mixed().double().eval(), torch.arange(6).view(2, 3)
    params = moved(ll.init(model, cfg))
    for bound in (ll.bind(model, params), ll.prepared(model, params)):
        learned = [p for p in bound.parameters() if p.requires_grad]
        for replica in replicating.replicate(bound, [0, 1], detach=not learned):
            y, expected = replica(ids), bound(ids)
            close(y, expected, 1e-12)
            assert (y - model(ids)).abs().max() > 1e-4
            if learned:
                close(
                    torch.autograd.grad(y.sum(), learned),
                    torch.autograd.grad(expected.sum(), learned),
                    1e-12,
                )


def test_what_computes_an_adapters_tensor_is_heeded() -> None:
    model = net()
    params = adapter(model)
    path = "layers.0.up"
    pruned, halved = ll.bind(model, params), ll.bind(model, params)
    prune.l1_unstructured(pruned.get_submodule(path).adapter[0], "lora_A", 0.5)

    class Half(nn.Module):
        def forward(self, t: Tensor) -> Tensor:
            return t / 2

    parametrize.register_parametrization(halved.get_submodule(path).adapter[0], "lora_B", Half())
    for bound in (pruned, halved):
        for _ in range(2):  # a graph of its own each time
            y = bound(X)
            y.square().sum().backward()
        assert all(p.grad is not None for p in bound.parameters() if p.requires_grad)
        close(y, ll.apply(model, ll.unbind(bound), X), 1e-12)
        assert (y - ll.apply(model, params, X)).abs().max() > 1e-4
    assert (ll.unbind(pruned)[path]["lora_A"] == 0).double().mean() == 0.5
