"""PEFT's AdaMSS, which is read alone: its files lack the clusters, so they are found again as PEFT
finds them, by scikit-learn, and held to what the file says of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ....core.errors import CheckpointError, short_repr
from ....variants import AdaMSSConfig, BitFitConfig
from ...assembly import ModuleEntry, Part
from ...metadata import ConfigReader
from ..codec import Codec

__all__ = ["ADAMSS"]

_MOST = 64  # subspaces that a file may have
_N = "adamss_newB"
_STEPS, _SEED = 10, 123456789  # of PEFT's k-means
_SAME = 1e-4  # how far directions found again on the very base may be off
_MERGE = "merge it in PEFT where it was trained"


def read(reader: ConfigReader, entry: ModuleEntry, held: Mapping[str, Tensor]) -> list[Part]:
    """Read adamss_A.i (q, r) and adamss_B.i (outputs of the cluster, q) for each cluster i, and
    adamss_newB (r, d_in), or (r, d_in + 1) where the bias is a column. What moves the bias is a
    learned shift of the output here.

    Raises:
        CheckpointError: the base isn't the one that it was trained on, its clusters aren't found
            again, or scikit-learn is missing.
        ModelNeededError: no model was given.
    """
    whole, N = _with_bias(entry), held[_N]
    count = sum(name.startswith("adamss_A.") for name in held)
    A = [held[f"adamss_A.{i}"] for i in range(count)]
    B = [held[f"adamss_B.{i}"] for i in range(count)]
    U, found = _directions(whole, N.shape[0], reader.whole("random_seed", 0, 0))
    if found.shape != N.shape or not float((found - N.float()).abs().max()) < _SAME:
        raise CheckpointError(
            f"{short_repr(entry.path)}: an AdaMSS file doesn't hold its clusters, which follow "
            f"from the weights that it was trained on, and these are others; {_MERGE}"
        )
    cluster = _clusters(reader, U, count)
    if [int((cluster == i).sum()) for i in range(count)] != [len(b) for b in B]:
        raise CheckpointError(
            f"{short_repr(entry.path)}: k-means finds clusters of other sizes than the file's, "
            f"which doesn't hold them; {_MERGE}"
        )
    q, d_in = max(len(a) for a in A), entry.known("AdaMSS").d_in
    # a subspace of fewer directions has rows of zeros
    whole_A = torch.stack([torch.cat([a, a.new_zeros(q - len(a), a.shape[1])]) for a in A])
    whole_B = B[0].new_zeros(len(cluster), q)
    for i, b in enumerate(B):
        whole_B[cluster == i, : b.shape[1]] = b
    leaves = {"lora_A": whole_A, "lora_B": whole_B, "lora_N": N[:, :d_in]}
    leaves["lora_cluster"] = cluster.to(torch.float32)
    parts = [Part(AdaMSSConfig, leaves, {"num_subspaces": count, "subspace_rank": q}, len(N))]
    if N.shape[1] > d_in:
        shift = torch.einsum("oq,oq->o", whole_B, whole_A[cluster] @ N[:, d_in])
        parts.append(Part(BitFitConfig, {"lora_b": shift}, order=1))
    return parts


def _with_bias(entry: ModuleEntry) -> Tensor:
    """Return the weight, with the bias as a last column where there is one, in float32."""
    W = entry.weight("AdaMSS's clusters").float()
    bias = getattr(entry.module, "bias", None)
    return W if bias is None else torch.cat([W, bias.detach().float()[:, None]], dim=1)


def _directions(whole: Tensor, r: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return (U (d_out, r), V^T (r, columns)) as PEFT decomposes a weight."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        U, _, V = torch.svd_lowrank(whole.cpu(), q=min(r, *whole.shape), niter=2)
    return U, V.mT


def _clusters(reader: ConfigReader, U: Tensor, count: int) -> Tensor:
    """Return the cluster (d_out,) of each output as PEFT's k-means finds it.

    Raises:
        CheckpointError: scikit-learn is missing.
    """
    try:
        cluster: Any = importlib.import_module("sklearn.cluster")
    except ImportError:
        raise CheckpointError(
            f"{reader.where}: an AdaMSS file doesn't hold its clusters, which PEFT finds again by "
            f"scikit-learn; install it (pip install scikit-learn), or {_MERGE}"
        ) from None
    made = cluster.KMeans(count, init="random", n_init=1, max_iter=_STEPS, random_state=_SEED)
    return torch.from_numpy(made.fit_predict(U.numpy().astype("float32"))).long()


ADAMSS = Codec(
    peft_type="ADAMSS",
    configs=(),
    suffixes=(_N, *(f"adamss_{name}.{i}" for name in "AB" for i in range(_MOST))),
    understood="r num_subspaces subspace_rank random_seed use_dynamic_rank svd_threshold",
    ignored="use_asa asa_target_subspaces init_warmup final_warmup mask_interval "
    "asa_importance_beta asa_uncertainty_beta asa_schedule_exponent",
    read=read,
)
