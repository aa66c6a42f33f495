"""Random composed models against dense oracles: `python tests/fuzz_models.py --count N --seed S`.

A model is a tree of blocks with shared and tied layers, hooks, containers, keyword arguments,
tuples, checkpoints and functional reads of weights. Adapters of one or two methods go in by every
verb, in several modes; the oracle is a model built the same way, its weights computed by hand from
the methods' formulas (`Adapter` leaves and the base's weights, no verb of the library).
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch_versions import checkpoints_in_vmap

import lora_lite_func as ll

WIDTH = 6
CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: ll.LoRAConfig(r=2, alpha=4),
    "dora": lambda: ll.DoRAConfig(r=2, alpha=4),
    "ia3": lambda: ll.IA3Config(),
    "loha": lambda: ll.LoHaConfig(r=2, alpha=4),
    "hira": lambda: ll.HiRAConfig(r=2, alpha=4),
}


# --------------------------------------------------------------------------------------- the models
class Call(nn.Module):
    """A block that calls its layers in one of several ways."""

    def __init__(self, rng: random.Random, shared: list[nn.Linear]) -> None:
        super().__init__()
        self.way = rng.choice(WAYS)
        self.first = rng.choice(shared) if shared and rng.random() < 0.3 else _linear(rng)
        self.second = _linear(rng)
        self.norm = nn.LayerNorm(WIDTH) if rng.random() < 0.5 else nn.Identity()
        self.seen: list[int] = []
        self.kept: dict[str, Any] = {}
        self.register_buffer("count", torch.zeros(3, dtype=torch.long))
        if self.way == "list":
            self.layers = [self.first, self.second]
        elif self.way == "closure":
            first, second = self.first, self.second
            self.run = lambda x: second(first(x))
        elif self.way == "hook":
            second = self.second
            self.first.register_forward_hook(_adding(self.first, second))
        elif self.way == "method hook":
            self.norm.register_forward_hook(self.after)
        elif self.way == "tied":
            self.second.weight = self.first.weight

    def after(self, module: nn.Module, args: Any, y: Tensor) -> Tensor:
        return y + self.second(args[0])

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, int]:
        self.seen.append(1)
        self.kept["last"] = x.shape
        if self.training:
            self.count += 1
        y = torch.tanh(self.body(self.norm(x)))
        return x + scale * y, len(self.seen)

    def body(self, x: Tensor) -> Tensor:
        if self.way == "list":
            return self.layers[1](self.layers[0](x))
        if self.way == "closure":
            y: Tensor = self.run(x)
            return y
        if self.way == "keyword":
            return self.second(input=self.first(x))
        if self.way == "functional":
            return F.linear(F.linear(x, self.first.weight, self.first.bias), self.second.weight)
        if self.way == "transposed":
            return self.first(x) @ self.second.weight.t()
        if self.way in ("hook", "method hook"):
            return self.first(x)
        if self.way == "checkpoint":
            return checkpoint(lambda h: self.second(self.first(h)), x, use_reentrant=False)
        return self.second(torch.tanh(self.first(x)))


WAYS = (
    "plain",
    "list",
    "closure",
    "keyword",
    "functional",
    "transposed",
    "hook",
    "method hook",
    "checkpoint",
    "tied",
)


def _linear(rng: random.Random) -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH, bias=rng.random() < 0.7)


def _adding(owner: nn.Module, other: nn.Module) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: Any, y: Tensor) -> Tensor:
        return y + other(args[0])

    return hook


class Model(nn.Module):
    """Blocks in a row, in a list, a dict or a sequence; some layers shared between them."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = random.Random(seed)
        shared: list[nn.Linear] = []
        made = []
        for _ in range(rng.randint(1, 3)):
            made.append(Call(rng, shared))
            if rng.random() < 0.5 and made[-1].way not in ("hook", "tied"):
                shared.append(made[-1].first)
        kind = rng.choice(("list", "dict"))
        self.blocks: Any
        if kind == "list":
            self.blocks = nn.ModuleList(made)
        else:
            self.blocks = nn.ModuleDict({f"b{i}": block for i, block in enumerate(made)})
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, *, scale: float = 0.5) -> Tensor:
        blocks = self.blocks.values() if isinstance(self.blocks, nn.ModuleDict) else self.blocks
        for block in blocks:
            x, times = block(x, scale=scale)
            assert times == 1 or self.training
        return self.head(x)


def build(seed: int) -> Model:
    torch.manual_seed(seed)
    return Model(seed).double().eval()


# -------------------------------------------------------------------------------------- the oracle
def dense(W: Tensor, b: Tensor | None, cfg: Any, p: Any) -> tuple[Tensor, Tensor | None]:
    """W and b with one adapter in, by the method's formula."""
    name = type(cfg).__name__
    if name == "IA3Config":
        return p["lora_g"][:, None] * W, None if b is None else p["lora_g"] * b
    s = cfg.alpha / cfg.r
    if name == "LoHaConfig":
        one, two = (p[f"lora_w{i}_a"] @ p[f"lora_w{i}_b"] for i in (1, 2))
        return W + s * one * two, b
    delta = s * (p["lora_B"] @ p["lora_A"])
    if name == "HiRAConfig":
        return W + W * delta, b
    if name == "DoRAConfig":
        V = W + delta
        return (p["lora_m"] / V.norm(dim=1).detach())[:, None] * V, b
    return W + delta, b


def oracle(seed: int, base: Model, adapters: list[Any], training: bool, x: Tensor) -> Tensor:
    """The output of a model made anew, on weights that are computed by hand."""
    model = build(seed).train(training)
    model.load_state_dict(base.state_dict())
    weights: dict[str, Tensor] = {}
    for module in model.modules():
        if isinstance(module, Call):
            module.way = "keyword" if module.way == "checkpoint" else module.way
            if module.way == "tied":
                module.second.weight = nn.Parameter(module.first.weight.detach().clone())
    for params in adapters:
        for path, p in params.items():
            layer = model.get_submodule(path)
            assert isinstance(layer, nn.Linear)
            W, b = weights.get(f"{path}.weight"), weights.get(f"{path}.bias")
            W, b = dense(
                layer.weight.detach() if W is None else W,
                (None if layer.bias is None else layer.bias.detach()) if b is None else b,
                params.config,
                p,
            )
            weights[f"{path}.weight"] = W
            if b is not None:
                weights[f"{path}.bias"] = b
    y: Tensor = torch.func.functional_call(model, weights, (x,), tie_weights=False)
    return y


# ---------------------------------------------------------------------------------------- the cases
def noisy(params: ll.Adapter, rng: torch.Generator) -> ll.Adapter:
    trainable, frozen = ll.partition(params)
    moved = torch.utils._pytree.tree_map(
        lambda t: t + 0.3 * torch.randn(t.shape, generator=rng, dtype=torch.float64).to(t.dtype),
        trainable,
    )
    return ll.combine(moved, frozen)


def state(model: nn.Module) -> list[Any]:
    found: list[Any] = [t.clone() for t in model.state_dict().values()]
    for module in model.modules():
        if isinstance(module, Call):
            found.append((len(module.seen), dict(module.kept), len(module._forward_hooks)))
    return found


def same_state(a: list[Any], b: list[Any]) -> bool:
    return all(
        torch.equal(u, v) if isinstance(u, Tensor) else u == v for u, v in zip(a, b, strict=True)
    )


def off(a: Tensor, b: Tensor) -> float:
    a, b = a.detach(), b.detach()
    return float(((a - b).abs() / (1 + b.abs())).max())


VERBS = ("apply", "bind", "prepared", "merged", "rows", "bound rows", "base")
MODES = ("eval", "train", "grad", "vmap", "autocast", "pair", "compile")


def run(seed: int) -> str:
    """One case: "ok", "refused", or what is wrong."""
    rng, gen = random.Random(seed), torch.Generator().manual_seed(seed)
    model = build(seed)
    x = torch.randn(4, WIDTH, generator=gen, dtype=torch.float64)
    verb = rng.choice(VERBS)
    mode = rng.choice(MODES[:-1]) if rng.random() < 0.99 else "compile"
    name = rng.choice(list(CONFIGS))
    ways = [module.way for module in model.modules() if isinstance(module, Call)]
    if mode == "vmap" and "checkpoint" in ways and not checkpoints_in_vmap():
        return "refused: by torch"
    case = f"seed {seed}: {name}, {verb}, {mode}, {ways}"
    cfg = CONFIGS[name]()
    try:
        start = ll.init(model, cfg)
        params = noisy(start, gen)
        adapters = [params]
        if mode == "pair":
            adapters.append(noisy(ll.init(model, ll.LoRAConfig(r=2, alpha=4)), gen))
        model.train(mode == "train")
        before = state(model)
        found, wanted = _both(seed, model, adapters, verb, mode, x, gen)
        if not same_state(before, state(model)):
            return f"{case}: the base was written"
    except (ll.UnsupportedError, ll.StructureError) as error:
        return f"refused: {str(error)[:80]}"
    except Exception as error:
        return f"{case}: {type(error).__name__}: {str(error)[:200]}"
    tolerance = 0.1 if mode == "autocast" else 1e-8
    for a, b in zip(found, wanted, strict=True):
        if off(a.double(), b) > tolerance:
            return f"{case}: off by {off(a.double(), b):.1e}"
    return "ok"


def _both(
    seed: int,
    model: Model,
    adapters: list[Any],
    verb: str,
    mode: str,
    x: Tensor,
    gen: torch.Generator,
) -> tuple[list[Tensor], list[Tensor]]:
    """(what the library gives, what is right), for outputs or gradients."""
    training = mode == "train"
    params: Any = adapters[0] if len(adapters) == 1 else tuple(adapters)
    right = [oracle(seed, model, adapters, training, x)]
    if verb in ("rows", "bound rows"):
        other = noisy(adapters[0], gen)
        ids = torch.randint(-1, 2, (len(x),), generator=gen)
        stacked = ll.rows(ll.stack([adapters[0], other]), ids)
        outs = [oracle(seed, model, chosen, training, x) for chosen in ([], [adapters[0]], [other])]
        right = [torch.stack([outs[i + 1][row] for row, i in enumerate(ids.tolist())])]
        if mode == "pair":
            return [], []
        call = _caller("apply" if verb == "rows" else "bind", model, stacked, mode)
        return ([], []) if mode in ("vmap", "grad") else ([call(x)], right)
    if verb == "base":
        names = [n for n, _ in model.named_parameters() if "first.weight" in n]
        changed = {n: torch.randn(WIDTH, WIDTH, generator=gen, dtype=torch.float64) for n in names}
        moved = build(seed).train(training)
        moved.load_state_dict(model.state_dict())
        for n, t in changed.items():
            moved.get_parameter(n).data.copy_(t)
        right = [oracle(seed, moved, adapters, training, x)]
        return [ll.functional_call(model, params, (x,), base=changed)], right
    if mode == "grad" and verb in ("apply", "bind"):
        return _gradients(seed, model, adapters[0], verb, x)
    call = _caller(verb, model, params, mode)
    if mode == "vmap":
        return [torch.func.vmap(call)(x)], right
    return [call(x)], right


def _caller(verb: str, model: Model, params: Any, mode: str) -> Callable[[Tensor], Tensor]:
    if verb == "apply":
        call: Any = lambda x: ll.apply(model, params, x)  # noqa: E731
    else:
        call = getattr(ll, verb)(model, params)
        call.train(mode == "train")
    if mode == "compile":
        torch._dynamo.reset()
        return torch.compile(call, backend="eager")  # type: ignore[no-any-return]
    if mode == "autocast":
        model.float()

        def cast(x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y: Tensor = call(x)
            return y

        model.double()
        return cast
    return call  # type: ignore[no-any-return]


def _gradients(
    seed: int, model: Model, params: ll.Adapter, verb: str, x: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    tree = torch.utils._pytree
    trainable, frozen = ll.partition(params)
    leaves, spec = tree.tree_flatten(trainable)
    own = [t.detach().clone().requires_grad_() for t in leaves]
    filled = ll.combine(tree.tree_unflatten(own, spec), frozen)
    wanted = torch.autograd.grad(
        oracle(seed, model, [filled], False, x).square().sum(), own, allow_unused=True
    )
    if verb == "apply":
        y = ll.apply(model, filled, x)
        found = torch.autograd.grad(y.square().sum(), own, allow_unused=True)
    else:
        bound = ll.bind(model, params)
        bound(x).square().sum().backward()
        with_grad = {id(p): p for p in bound.parameters() if p.requires_grad}
        grads = {p.data_ptr(): p.grad for p in with_grad.values()}
        found = tuple(grads.get(t.data_ptr()) for t in leaves)
    pairs = [
        (torch.zeros(()) if a is None else a, torch.zeros(()).double() if b is None else b)
        for a, b in zip(found, wanted, strict=True)
    ]
    return [a for a, _ in pairs], [b for _, b in pairs]


def many(count: int, seed: int) -> tuple[int, int, list[str]]:
    """(right ones, refused ones, what is wrong)."""
    results = [run(seed + i) for i in range(count)]
    wrong = [r for r in results if r != "ok" and not r.startswith("refused")]
    return results.count("ok"), len(results) - results.count("ok") - len(wrong), wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    right, refused, wrong = many(asked.count, asked.seed)
    print(*wrong, sep="\n")
    print(f"{right} right, {refused} refused, {len(wrong)} wrong")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
