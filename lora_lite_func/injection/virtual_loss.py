"""The loss of a call in which labels of virtual tokens count more or less than the row's own.

The model has made its loss, a mean over labels. What is added is the difference that the weights
make at the virtual tokens alone, so whatever else the model's loss has stays in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..core.errors import UnsupportedError
from ..layers.whole_calls import predicts_next
from .attachment import Attachment
from .results import mapping_with
from .virtual_arguments import Given

__all__ = ["check_weighted", "weighted"]


def check_weighted(attachments: Sequence[Attachment], module: Any, given: Given) -> None:
    """Refuse weights of labels where it isn't known what the loss makes of them.

    Args:
        attachments: the adapters with virtual tokens, innermost first.
        module: the model.
        given: the call's arguments.

    Raises:
        UnsupportedError: another kind of model; or labels of two adapters, of which the outer one's
            are weighted.
    """
    if given.get("labels") is None:
        return
    labelled = ""
    for attachment in attachments:
        site, variant = attachment.site, attachment.variant
        if variant.label_weights_of(attachment.cfg) is not None:
            if not predicts_next(module):
                raise UnsupportedError(
                    f"{site.path!r}: {variant.name} weighs its labels, which is known of models "
                    f"that predict each token from those before it alone; let them count alike"
                )
            if labelled:
                raise UnsupportedError(
                    f"{site.path!r}: {variant.name} weighs its labels, and {labelled} inside has "
                    f"labels too, so how many there are isn't known; put it first, or let its "
                    f"labels count alike"
                )
        if variant.virtual_labels is not None:
            labelled = variant.name


def weighted(result: Any, weights: Tensor, given: Given, path: str) -> Any:
    """A causal model's result with the weights in its loss.

    Args:
        result: of the call, with virtual tokens in front of each row's own.
        weights: (N, P), by how much the labels of virtual tokens count.
        given: the call's arguments, labels (N, P + T) among them.
        path: of the site, for messages.

    Raises:
        UnsupportedError: the result hasn't the logits of all tokens.
    """
    named = isinstance(result, Mapping)
    loss, logits = (result["loss"], result.get("logits")) if named else result[:2]
    labels, count = given["labels"], given.get("num_items_in_batch")
    if logits is None or logits.shape[1] != labels.shape[1]:
        raise UnsupportedError(
            f"{path!r}: its labels are weighted, which takes the logits of all {labels.shape[1]} "
            f"tokens, and the call doesn't give them; let the labels count alike, or let the model "
            f"give its logits"
        )
    slots = weights.shape[1]
    if count is None:
        count = (labels[:, 1:] != -100).sum()
    predicted = logits[:, : slots - 1].float().transpose(1, 2)  # (N, vocabulary, P - 1)
    each = F.cross_entropy(predicted, labels[:, 1:slots], reduction="none")  # 0 without a label
    loss = loss + (each * (weights[:, 1:] - 1.0)).sum() / count
    return mapping_with(result, {**result, "loss": loss}) if named else (loss, *result[1:])
