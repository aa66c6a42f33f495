"""Merging into a model that transformers loads whole: where its folder has other names and tensors
than the model itself, as for experts, old names, and heads tied to tables.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from ..api.apply import attachments_of
from ..api.merge import merged
from ..core.errors import LoraLiteError
from ..interop.open import open_adapter
from ..io.model_folder import Shards
from ..layers.kinds import module_and_name
from .merge_folders import check_finite, merged_into, others
from .opening import whole_model

__all__ = ["write_whole"]


def write_whole(
    shards: Shards, adapter: str, target: Path, *, force: bool, why: LoraLiteError
) -> list[str]:
    """Write the merged model as transformers saves it; returns the merged parameters' names.

    Args:
        shards: the base.
        adapter: a file of `ll.save`, or a PEFT folder.
        target: a folder, made if it isn't there.
        force: replace files of a model that is there; merge values that aren't finite.
        why: what was said of merging shard by shard, raised where this can't be done either.

    Raises:
        LoraLiteError: `why`, or what is wrong with the adapter on the whole model.
    """
    along = others(shards.folder)
    model = whole_model(shards, adapter, why)
    params = open_adapter(adapter, model)
    check_finite(params, force)
    dense = merged(model, params)
    with merged_into(target, shards, force) as work:
        dense.save_pretrained(work)  # type: ignore[operator]
        for entry in along:
            if not (work / entry.name).exists() and not entry.name.endswith(".index.json"):
                shutil.copyfile(entry, work / entry.name)
    sites = (attachments[-1].site for attachments in attachments_of(params).values())
    return sorted(".".join(filter(None, module_and_name(site))) for site in sites)
