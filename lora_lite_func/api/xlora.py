"""X-LoRA: trained LoRAs that a classifier mixes for each token, by what the base makes of the text.

    h = the base's last hidden states (N, T, d), in a first pass without adapters
    w = softmax(head(h) / t), (N, T, E) or (N, T, S, E): for each token, or for each of the S layers
    y = the model with sum over e of w_e s_e B_e A_e x added at each layer, in a second pass

Paper: Buehler and Buehler 2024, arXiv 2402.07148. Nothing here is a method of its own: the second
pass is `ll.mixed`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..algebra.mixed import Mixed, mixed
from ..algebra.stack import stack as stacked
from ..core.adapter import Adapter, count_members
from ..core.arguments import flag, number, whole
from ..core.config import probability
from ..core.errors import ConfigError, StructureError, short_repr
from ..core.nodes import register_node
from ..core.random import generator, kaiming
from ..layers.refusals import check_model
from .apply import apply
from .hidden_states import hidden_states
from .xlora_steps import generate

__all__ = ["XLoRA", "XLoRASettings", "module_order", "xlora"]


@dataclass(frozen=True, kw_only=True)
class XLoRASettings:
    """How an X-LoRA's classifier weighs the experts.

    Attributes:
        sites: the paths of the adapted layers, in the order of the classifier's outputs.
        layerwise: whether each layer has weights of its own.
        softmax: whether weights are a softmax of the classifier's outputs, rather than these.
        temperature: what the outputs are divided by before the softmax.
        top_k: how many experts a token has; the others' weights are zero. None for all.
        softmax_top_k: whether the weights that are left go through another softmax.
        strength: what all weights are multiplied by.
        dropout: probability of dropping a hidden unit of the classifier, in training mode only.
    """

    sites: tuple[str, ...]
    layerwise: bool = False
    softmax: bool = True
    temperature: float = 1.0
    top_k: int | None = None
    softmax_top_k: bool = False
    strength: float = 1.0
    dropout: float = 0.0


class XLoRA:
    """A stack of trained LoRAs and the classifier that mixes them. A pytree node around both; what
    is trained is `head`.

    Attributes:
        stack: the experts, every leaf (E, ...).
        head: {"0.weight": (width, d), "0.bias": (width,), ...}, the classifier's linear layers.
        settings: how it weighs the experts.
    """

    __slots__ = ("head", "settings", "stack")

    def __init__(self, stack: Adapter, head: Mapping[str, Tensor], settings: XLoRASettings) -> None:
        self.stack, self.head, self.settings = stack, dict(head), settings

    def having(self, head: Mapping[str, Tensor]) -> XLoRA:
        """The same experts with other tensors of the classifier.

        Raises:
            StructureError: they aren't those of `head` by name and shape.
        """
        if not isinstance(head, Mapping) or head.keys() != self.head.keys():
            raise StructureError(
                f"xlora: head: expected tensors {', '.join(self.head)}, found {short_repr(head)}"
            )
        for name, t in self.head.items():
            found = getattr(head[name], "shape", None)
            if found != t.shape:
                raise StructureError(
                    f"xlora: head: {name!r}: expected a tensor of shape {tuple(t.shape)}, found "
                    f"{type(head[name]).__name__ if found is None else tuple(found)}"
                )
        return XLoRA(self.stack, head, self.settings)

    def __call__(self, model: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        """The model's output in two passes, of which the first is the base's. Pure as `ll.apply`.

        Args:
            model: the frozen base; never written.
            *args: the model's own positional arguments.
            **kwargs: the model's own keyword arguments.

        Raises:
            StructureError: the model gives no hidden states, or ones of another width.
        """
        return apply(model, self.mixed(model, *args, **kwargs), *args, **kwargs)

    def mixed(self, model: nn.Module, /, *args: Any, **kwargs: Any) -> Mixed:
        """The experts with this input's weights, as `ll.apply` and `ll.bind` take them: the first
        pass alone.

        Raises:
            StructureError: as a call.
        """
        return mixed(self.stack, self.weights(hidden_states(model, args, kwargs), model.training))

    def weights(self, hidden: Tensor, training: bool = False) -> Tensor | dict[str, Tensor]:
        """The experts' weights (N, T, E) for hidden states (N, T, d), or {path: weights} where each
        layer has its own.

        Args:
            hidden: the base's last hidden states.
            training: whether the classifier drops hidden units.

        Raises:
            StructureError: hidden states of another width.
        """
        said, count = self.settings, count_members(self.stack, "XLoRA")
        width = self.head["0.weight"].shape[1]
        if hidden.shape[-1] != width:
            raise StructureError(
                f"XLoRA: the classifier takes hidden states (N, T, {width}), found "
                f"{tuple(hidden.shape)}"
            )
        logits = _classified(self.head, hidden, said.dropout if training else 0.0)
        logits = logits.unflatten(-1, (-1, count))  # (N, T, S or 1, E)
        w = (logits / said.temperature).softmax(-1) if said.softmax else logits
        if said.top_k is not None:
            w = _best(w, said.top_k, said.softmax_top_k)
        w = w * said.strength
        if not said.layerwise:
            return w.squeeze(-2)
        return {path: w[..., i, :] for i, path in enumerate(said.sites)}

    def generate(self, model: Any, /, *args: Any, **kwargs: Any) -> Any:
        """`model.generate(*args, **kwargs)` with the experts in. Each step is two passes, of one
        token each where a cache is used: the base's pass has a cache of its own. With beams it goes
        without a cache.

        Args:
            model: a transformers model; never written.
            *args: what its `generate` takes.
            **kwargs: likewise.

        Raises:
            UnsupportedError: a cache that the base's can't follow (a static one, or one that is cut
                back); give use_cache=False.
        """
        return generate(
            lambda hidden: mixed(self.stack, self.weights(hidden, model.training)),
            model,
            args,
            kwargs,
        )

    def __repr__(self) -> str:
        return f"XLoRA({self.settings})\n{self.stack!r}"


def xlora(
    model: nn.Module,
    experts: Adapter | Iterable[Adapter] | Mapping[str, Adapter],
    *,
    layerwise: bool = False,
    depth: int = 1,
    width: int = 2048,
    dropout: float = 0.0,
    temperature: float = 1.0,
    top_k: int | None = None,
    strength: float = 1.0,
    hidden_size: int | None = None,
    seed: int = 0,
) -> XLoRA:
    """Trained LoRAs with a new classifier that mixes them for each token: `x = ll.xlora(model, [p1,
    p2]); y = x(model, input_ids)`.

    Pure, like an adapter: `ll.grad(lambda head: loss(x.having(head)(model, input_ids)))(x.head)`
    trains the classifier. It starts with equal weights for all experts. Buehler and Buehler 2024,
    arXiv 2402.07148.

    Args:
        model: the frozen base, whose output has `hidden_states` when asked (transformers' models).
        experts: adapters as `ll.stack` takes them, or a stack, of a method whose updates can be
            summed (`ll.mixed`).
        layerwise: whether each adapted layer has weights of its own.
        depth: how many linear layers the classifier has.
        width: its hidden width, where depth is more than 1.
        dropout: probability of dropping a hidden unit, in training mode only.
        temperature: what its outputs are divided by before the softmax.
        top_k: how many experts a token has; None for all. The others' weights are zero, and those
            that are left don't change.
        strength: what all weights are multiplied by.
        hidden_size: the width of the hidden states; by default what the model's config says.
        seed: of the classifier's hidden layers; the last one starts at zero.

    Raises:
        ConfigError: a number out of range, or a model that doesn't say its hidden size.
        StructureError: experts that don't stack.
        UnsupportedError: experts whose updates can't be summed.
    """
    check_model(model)
    probability(number(dropout, "xlora: dropout"), "xlora: dropout")
    one = isinstance(experts, Adapter)
    stack: Adapter = experts if isinstance(experts, Adapter) else stacked(experts)
    count = count_members(stack, "xlora" if one else "stack")
    mixed(stack, torch.zeros(1, count))  # refuses what can't be summed
    flag(layerwise, "xlora: layerwise")
    whole(depth, "xlora: depth", least=1)
    whole(width, "xlora: width", least=1)
    for name, size in (("top_k", top_k), ("hidden_size", hidden_size)):
        if size is not None:
            whole(size, f"xlora: {name}", least=1)
    whole(seed, "xlora: seed")
    for name, value in (("temperature", temperature), ("strength", strength)):
        number(value, f"xlora: {name}")
    if top_k is not None and top_k > count:
        raise ConfigError(f"xlora: top_k: expected at most {count}, the experts, found {top_k}")
    if temperature <= 0.0:
        raise ConfigError(f"xlora: temperature: expected more than 0, found {temperature}")
    sites = module_order(model, stack)
    settings = XLoRASettings(
        sites=sites,
        layerwise=layerwise,
        temperature=temperature,
        top_k=top_k,
        strength=strength,
        dropout=dropout,
    )
    widths = [_hidden_size(model) if hidden_size is None else hidden_size]
    widths += [width] * (depth - 1) + [count * (len(sites) if layerwise else 1)]
    return XLoRA(stack, dict(_head(widths, model, seed)), settings)


def module_order(model: nn.Module, params: Adapter) -> tuple[str, ...]:
    """The paths of the sites in the order of the model's modules.

    Raises:
        StructureError: a site isn't in the model.
    """
    found = tuple(name for name, _ in model.named_modules(remove_duplicate=False) if name in params)
    missing = next((path for path in params if path not in found), None)
    if missing is not None:
        raise StructureError(f"xlora: the model has no module at site {missing!r}")
    return found


# --------------------------------------------------------------------------------- the classifier
def _head(sizes: list[int], model: nn.Module, seed: int) -> Iterator[tuple[str, Tensor]]:
    """The classifier's tensors, float32, on the model's device."""
    like = next(model.parameters())
    for i, (d_in, d_out) in enumerate(itertools.pairwise(sizes)):
        W = kaiming((d_out, d_in), generator(seed, "", f"{i}.weight"))
        last = i == len(sizes) - 2
        yield f"{i}.weight", (torch.zeros_like(W) if last else W).to(like.device)
        yield f"{i}.bias", torch.zeros_like(W[:, 0]).to(like.device)


def _hidden_size(model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    text = getattr(config, "get_text_config", None)
    size = getattr(text() if callable(text) else config, "hidden_size", None)
    if type(size) is not int:
        raise ConfigError(
            "xlora: the model's config says no hidden_size; give hidden_size=, the width of its "
            "hidden states"
        )
    return size


def _classified(head: Mapping[str, Tensor], h: Tensor, dropout: float) -> Tensor:
    """The classifier's outputs (N, T, S E)."""
    depth = len(head) // 2
    h = h.to(head["0.weight"].dtype)
    for i in range(depth):
        h = F.linear(h, head[f"{i}.weight"], head[f"{i}.bias"])
        if i < depth - 1:
            h = F.dropout(h.relu(), dropout, training=dropout > 0.0)
    return h


def _best(w: Tensor, top_k: int, softmax: bool) -> Tensor:
    """The top_k largest weights, as they are or after a softmax among them; zero elsewhere."""
    best = w.topk(top_k, dim=-1)
    values = best.values.softmax(-1) if softmax else best.values
    return torch.zeros_like(w).scatter(-1, best.indices, values)


def _flatten(x: XLoRA) -> tuple[list[Any], tuple[XLoRASettings, tuple[str, ...]]]:
    return [x.stack, *x.head.values()], (x.settings, tuple(x.head))


def _unflatten(children: Iterable[Any], static: tuple[XLoRASettings, tuple[str, ...]]) -> XLoRA:
    stack, *tensors = children
    return XLoRA(stack, dict(zip(static[1], tensors, strict=True)), static[0])


register_node(XLoRA, _flatten, _unflatten)
