"""Merging into a model that transformers loads whole. This is for folders whose names and tensors
aren't the model's own, as with experts, old names, heads tied to tables, and packed weights.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from ..api.apply import attachments_of
from ..api.merge import merged
from ..core.errors import LoraLiteError
from ..interop.open import open_adapter
from ..io.shards import Shards
from ..layers.kinds import module_and_name
from .merge_folders import check_finite, merged_into, others
from .whole_model import is_packed_folder, whole_model

__all__ = ["write_whole"]


def write_whole(
    shards: Shards, given: argparse.Namespace, target: Path, why: LoraLiteError
) -> list[str]:
    """Write the merged model as transformers saves it, and return the names of the merged
    parameters. A model whose weights are packed becomes a dense one.

    Args:
        shards: the base.
        given: the command's options: the adapter, how to read it, whether to replace a model that
            is there, and whether to merge values that aren't finite.
        target: a folder, which is made if it isn't there.
        why: the error of merging shard by shard, which is raised where this way fails too.

    Raises:
        LoraLiteError: `why`, or what is wrong with the adapter on the whole model.
    """
    along = others(shards.folder)
    model = whole_model(shards, given.adapter, why)
    params = open_adapter(given.adapter, model, component=given.component, rename=given.rename)
    check_finite(params, given.force)
    dense = merged(model, params, dequantize=is_packed_folder(shards))
    with merged_into(target, shards, given.force) as work:
        dense.save_pretrained(work)  # type: ignore[operator]
        for entry in along:
            if not (work / entry.name).exists() and not entry.name.endswith(".index.json"):
                shutil.copy(entry, work / entry.name)
    sites = (attachments[-1].site for attachments in attachments_of(params).values())
    return sorted(".".join(filter(None, module_and_name(site))) for site in sites)
