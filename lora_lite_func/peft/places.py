"""From the paths in PEFT's keys to the places of a model: modules, parameters under their wrappers, learned biases, replaced tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, UnsupportedError, nearest, shown
from ..kinds import KINDS, facts, kind_of, matrix
from ..layers import held, refuse_uncopyable, stored
from ..spec import Site
from ..variants import BitFitConfig, DoRAConfig, FullConfig, HiRAConfig, LoRAConfig, TokensConfig
from .homes import WRAPPED, attention, elsewhere, ties
from .method import Method, Part, Place
from .says import Says

__all__ = ["adaptable", "beside", "check_padding", "places_of"]


def places_of(model: Any, says: Says, method: Method, sites: Mapping[str, Any], shared: Mapping[str, Tensor]) -> dict[str, Place]:
    """{path in the file: Place}.

    Raises:
        CheckpointError: nothing there, modules that the config doesn't name, or that the model hasn't; a named one without tensors.
    """
    if model is None:
        _check_targeted(says, {path: path for path in sites})
        if method.sizes is None:
            return {path: Place(path, shared) for path in sites}
        return {path: Place(path, shared, _sized(path, method.sizes(path, own), own)) for path, own in sites.items()}
    if not isinstance(model, nn.Module):
        raise UnsupportedError(f"expected an nn.Module for the base, found {type(model).__name__}")
    modules = dict(model.named_modules(remove_duplicate=False))
    where = {path: _resolved(modules, says, path) for path in sites}
    bare = {path for path, found in where.items() if found not in modules}
    _check_targeted(says, {path: found for path, found in where.items() if path not in bare})
    known = adaptable(model, where.values())
    if len(known) != len(where):
        twice = next(found for found, n in Counter(where.values()).items() if n > 1)
        raise CheckpointError(f"{says.where}: tensors of two adapters for {shown(twice)}")
    missing = next((p for p in _targeted(model, says) if p not in sites and p not in where.values()), None)
    if missing is not None and method.suffixes and method.peft_type != "ADALORA":  # which leaves out what it pruned
        raise CheckpointError(f"{says.where}: target_modules name {shown(missing)}, for which there is no tensor")
    places = {path: Place(found, shared, *known[found]) for path, found in where.items()}
    start = str(says.get("init_lora_weights")) if method.peft_type == "LORA" else ""
    for place in places.values():  # PEFT changes one of two places here, or both where the start was meant for one
        if KINDS[place.kind].bare or (place.kind == "linear" and start in ("pissa", "olora")):
            _refuse_tied(says, modules, place.path if KINDS[place.kind].bare else f"{place.path}.weight")
    for place in places.values():
        home = attention(modules, place.path)
        if home is not None:  # PEFT (0.21 at least) adds out_proj's update twice in each call, so its adapters were trained that way
            place.named, place.times = home, 2.0 if place.path.endswith("out_proj") else 1.0
    across = next((f"{p.path!r}" for p in places.values() if p.kind == "linear" and p.site is not None and p.site.transposed), "its config")
    if (says.flag("fan_in_fan_out") or across != "its config") and any(place.named for place in places.values()):
        raise CheckpointError(
            f"{says.where}: where layers are stored transposed ({across}), PEFT turns the update of attention's out_proj around"
        )
    return places


def _refuse_tied(says: Says, modules: Mapping[str, Any], path: str, known: Mapping[str, Tensor] | None = None) -> None:
    """Refuse a change of a parameter that is held elsewhere too, as PEFT changes it in one place; equal copies in all places are one.

    Raises:
        CheckpointError: with both names.
    """
    known = known or {}
    for other in elsewhere(modules, path):
        if path not in known or other not in known or not torch.equal(known[path], known[other]):
            raise CheckpointError(
                f"{says.where}: changes {shown(path)}, which is {shown(other)} too: PEFT doesn't change both alike, and here they are one "
                "tensor; untie them in the model first (layer.weight = nn.Parameter(layer.weight.detach().clone()))"
            )


def _sized(path: str, sizes: tuple[int, int], names: Iterable[str]) -> Site:
    """A site as its tensors alone tell it.

    Raises:
        CheckpointError: of no size.
    """
    if min(sizes) < 1:
        raise CheckpointError(f"{shown(path)}: its tensors are those of a layer {sizes[0]} -> {sizes[1]}")
    table = any("embedding" in name for name in names)
    return Site(path, *sizes, kind="embedding", transposed=True) if table else Site(path, *sizes)


def _check_targeted(says: Says, where: Mapping[str, str]) -> None:
    for path, found in where.items():
        if says.targeted(path) is False and says.targeted(path.partition(WRAPPED)[0]) is False:
            raise CheckpointError(f"{says.where}: tensors for {shown(found)}, which its target_modules don't name")


def _resolved(modules: Mapping[str, nn.Module], says: Says, path: str) -> str:
    """Our path of what a key's path means: a module, or a parameter of it."""
    home = path
    while home.endswith(WRAPPED):
        home = home.removesuffix(WRAPPED)
    names = says.names("target_parameters")
    if home in modules and names:
        full = [f"{home}.{name}" for name in modules[home]._parameters]
        wanted = [p for p in full if any(p == n or p.endswith("." + n) for n in names)]
        depth = (len(path) - len(home)) // len(WRAPPED)
        if depth < len(wanted):
            return wanted[len(wanted) - 1 - depth]  # the first one registered is wrapped first, so it is innermost
    if path in modules:
        return f"{path}.in_proj_weight" if isinstance(modules[path], nn.MultiheadAttention) else path
    return path.replace(WRAPPED, "")  # an attention's out_proj inside its wrapper


def _targeted(model: nn.Module, says: Says) -> list[str]:
    """The modules that PEFT would surely adapt."""
    saved = says.names("modules_to_save")
    kinds = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)
    found = [path for path, module in model.named_modules() if isinstance(module, kinds) and says.targeted(path)]
    return [p for p in found if not _in_one_of(saved, p)]


def adaptable(model: nn.Module, paths: Iterable[str]) -> dict[str, tuple[Site, Any]]:
    """{path: (Site, module)} of these modules and parameters of a model.

    Raises:
        CheckpointError: a path that the model hasn't.
        UnsupportedError: a layer that can't be adapted.
    """
    refuse_uncopyable(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, tuple[Site, Any]] = {}
    for path in paths:
        module, kind, name = modules.get(path), None, "weight"
        if module is None:
            home, _, name = path.rpartition(".")
            module = modules.get(home)
            tensor = None if module is None else module._parameters.get(name)
            kind = KINDS["parameter" if tensor is None or tensor.ndim > 1 else "vector"]
            if module is None or tensor is None:
                raise CheckpointError(f"{type(model).__name__} has no module {shown(path)}; {nearest(path, modules)}")
        else:
            kind = kind_of(module)
        if kind is None:
            raise UnsupportedError(f"{shown(path)}: this {type(module).__name__} can't be adapted here")
        f = facts(kind, module, name)
        bias = not kind.bare and isinstance(stored(module, "bias"), Tensor)
        found[path] = Site(path, f.d_in, f.d_out, bias, kind.name, stack=f.stack, transposed=f.transposed, plus_one=f.plus_one), module
    return found


# ------------------------------------------------------------------------------------------------- beside the method's own
def beside(says: Says, rest: Mapping[str, Tensor], model: Any) -> list[tuple[Place, Part]]:
    """What a file holds beside its method's tensors: learned biases (bias="all", "lora_only"), replaced token embeddings.

    Raises:
        CheckpointError: a tensor that is neither, one that needs the model and there is none, or none of a module that was trained whole.
    """
    learned, saved = says.get("bias", "none") not in ("none", None), says.names("modules_to_save")
    modules = dict(model.named_modules(remove_duplicate=False)) if isinstance(model, nn.Module) else {}
    tying = says.flag("ensure_weight_tying")  # PEFT keeps a copy of what shares a tensor with a module trained whole, too
    whole: dict[str, Tensor] = {}
    biases: dict[str, Tensor] = {}
    tokens: dict[str, Tensor] = {}
    for key, t in rest.items():
        path, _, name = key.rpartition(".")
        bare = path.removesuffix(WRAPPED) if _has(model, path.removesuffix(WRAPPED)) else path.replace(WRAPPED, "")
        if ".original_module." in key and _in_one_of(saved, path):
            pass  # bias="all" keeps what a copy replaces, too
        elif _in_one_of(saved, path) or (tying and any(_in_one_of(saved, other.rpartition(".")[0]) for other in elsewhere(modules, key))):
            whole[key.replace(".modules_to_save.", ".")] = t
        elif name == "bias" and learned:
            biases[bare] = t
        elif name == "trainable_tokens_delta":
            tokens[path.removesuffix(".token_adapter")] = t
        elif name in ("weight", "bias") and _is_the_base(model, bare, name, t):
            pass  # PEFT copies an embedding that it adapts into the file, and the head beside it
        else:
            raise CheckpointError(f"{says.where}: unexpected tensor {shown(key)}; {_unknown(model, path, bare)}")
    if (whole or biases or tokens) and not isinstance(model, nn.Module):
        raise CheckpointError(f"{says.where}: {shown(next(iter(rest)))} replaces a tensor of the base; give the base model too")
    _check_saved(says, saved, whole, model)
    known = adaptable(model, [*whole, *biases]) if whole or biases else {}
    for path in whole:
        _refuse_tied(says, modules, path, whole)
    found = [_whole(says, path, t, *known[path]) for path, t in whole.items()]
    found += [_bias(says, path, t, *known[path]) for path, t in biases.items()]
    return found + [part for path, t in tokens.items() for part in _tokens(says, path, t, model)]


def _check_saved(says: Says, saved: Iterable[str], whole: Iterable[str], model: Any) -> None:
    """Refuse a file that has lost a module which its config says was trained whole.

    Raises:
        CheckpointError: with the module.
    """
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    meant = [path for path, module in modules if path and module.state_dict()]
    for name in saved:
        paths = [path for path in meant if path.endswith(name)]
        if paths and not any(f"{key}.".startswith(f"{path}.") for key in whole for path in paths):
            raise CheckpointError(
                f"{says.where}: modules_to_save names {name!r}, which is {paths[0]!r} of the model, and there is no tensor of it; take the "
                "whole folder, or the name out of the config if the base's own is meant"
            )


def _has(model: Any, path: str) -> bool:
    return isinstance(model, nn.Module) and path in dict(model.named_modules(remove_duplicate=False))


def _in_one_of(names: list[str], path: str) -> bool:
    """Whether a module is in one that PEFT finds by the end of its name."""
    parts = path.split(".")
    return any(".".join(parts[: i + 1]).endswith(name) for i in range(len(parts)) for name in names)


def _is_the_base(model: Any, path: str, name: str, t: Tensor) -> bool:
    module = dict(model.named_modules()).get(path) if isinstance(model, nn.Module) else None
    base = None if module is None else stored(module, name)
    return isinstance(base, Tensor) and base.shape == t.shape and torch.equal(held(module, name).to(t), t)


def _unknown(model: Any, path: str, bare: str) -> str:
    """What to say of a tensor that isn't the base's own."""
    if not path.endswith(WRAPPED):
        return "nothing here corresponds to it"
    if not isinstance(model, nn.Module):
        return "if it is PEFT's copy of the base's, give the base model too"
    return f"it isn't what {shown(bare)} of this model has: a copy of another base, or of one that was trained or resized"


def _whole(says: Says, path: str, t: Tensor, site: Site, module: Any) -> tuple[Place, Part]:
    """A parameter that was trained whole (modules_to_save): it takes the base's place before anything else is applied."""
    base = module._parameters[path.rpartition(".")[2]]
    if base.shape != t.shape:
        raise CheckpointError(f"{says.where}: {shown(path)}: expected shape {tuple(base.shape)}, found {tuple(t.shape)}")
    return Place(path, {}, site, module), Part(FullConfig, {"lora_W": matrix(t, site)}, order=-1)


def _bias(says: Says, path: str, learned: Tensor, site: Site, module: Any) -> tuple[Place, Part]:
    """Kept as the difference from the base's, which a BitFit adds."""
    base = stored(module, "bias")
    if not isinstance(base, Tensor) or base.shape != learned.shape:
        raise CheckpointError(f"{says.where}: {shown(path)} has no bias of shape {tuple(learned.shape)}")
    return Place(path, {}, site, module), Part(BitFitConfig, {"lora_b": learned - base.detach().to(learned)}, order=2)


def _tokens(says: Says, path: str, rows: Tensor, model: nn.Module) -> list[tuple[Place, Part]]:
    """New rows of an embedding, as what is added to them; with a head that shares its table, as a LoRA of each that picks those rows."""
    listed: Any = says.get("trainable_token_indices") or says.get("token_indices")
    if isinstance(listed, Mapping):
        listed = next((ids for name, ids in listed.items() if path == name or path.endswith("." + name)), None)
    site, module = adaptable(model, [path])[path]
    many = rows.shape[0] if rows.ndim == 2 else 0
    if not isinstance(listed, list) or len(listed) != many or not all(type(i) is int and 0 <= i < site.d_in for i in listed):
        raise says.refuse("trainable_token_indices", f"{many} token ids below {site.d_in} for {path!r}")
    if site.kind != "embedding" or rows.shape != (len(listed), site.d_out) or len(set(listed)) != len(listed):
        raise CheckpointError(f"{says.where}: {shown(path)}: rows of shape {tuple(rows.shape)} don't fit this {type(module).__name__}")
    ids, order = torch.tensor(listed).sort()
    change = rows[order] - held(module)[ids].to(rows)  # (n, dim)
    shared = [path for path, m in model.named_modules() if m is not module and stored(m, "weight") is stored(module, "weight")]
    if not shared or not ties(model, module):
        leaves = {"lora_rows": change, "lora_ids": ids.to(torch.float32)}
        return [(Place(path, {}, site, module), Part(TokensConfig, leaves, {"token_ids": tuple(ids.tolist())}, order=3))]
    picks = torch.zeros(many, site.d_in, dtype=rows.dtype).scatter(1, ids[:, None], 1.0)  # (n, num)
    pairs = {path: {"lora_A": picks, "lora_B": change.mT}} | {key: {"lora_A": change, "lora_B": picks.mT} for key in shared}
    known = adaptable(model, pairs)
    fields = {"dropout": 0.0, "rslora": False}
    return [(Place(p, {}, *known[p]), Part(LoRAConfig, pair, fields, many, float(many), order=3)) for p, pair in pairs.items()]


def check_padding(says: Says, place: Place, part: Part) -> None:
    """Refuse what moves an embedding's padding row, which stays as it is here.

    Raises:
        CheckpointError: with the id.
    """
    padding = getattr(place.module, "padding_idx", None) if place.kind == "embedding" else None
    A, ids, table = part.leaves.get("lora_A"), part.leaves.get("lora_ids"), stored(place.module, "weight")
    if padding is None or not isinstance(table, Tensor) or (A is not None and (A.ndim != 2 or A.shape[1] != len(table))):
        return  # a misfit is refused where it is fitted
    if ids is not None:
        moved = bool((part.leaves["lora_rows"][ids == padding] != 0).any())
    elif A is None:
        moved = False
    else:
        update, row = bool((A[:, padding] != 0).any()), bool((table[padding] != 0).any())
        moved = {HiRAConfig: update and row, DoRAConfig: update or row}.get(part.config, update)
    if moved:
        raise CheckpointError(f"{says.where}: {shown(place.path)}: changes the row of id {padding}, padding, which stays as it is here")
