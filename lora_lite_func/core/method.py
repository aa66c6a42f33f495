"""Variant: one method as a record of pure functions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic

import torch
from torch import Tensor

from .config import AdapterConfig
from .param_spec import ParamSpec
from .phase_functions import (
    AttendFn,
    CalledOutputsFn,
    InputsFn,
    Layer,
    OutputsFn,
    PrepareFn,
    RouterFn,
    VirtualDecoderFn,
    VirtualFn,
    VirtualLabelsFn,
    VirtualLabelWeightsFn,
)
from .site import Site
from .start_functions import DirectionsFn, InitFn, JointFn, NeedsFn, ParamSpecsFn, PlanFn, ScalingFn
from .type_variables import ConfigT, DataT
from .update_functions import (
    DenseFn,
    FactorsFn,
    PenaltyFn,
    ProjectFn,
    ScaleFn,
    ValidateFn,
    WeightFn,
)

__all__ = ["MATRICES", "Layer", "ParamSpec", "Variant", "site_for"]

MATRICES = ("linear", "conv", "parameter")
"""Kinds of site that any method with `weight` can adapt."""


def _default_scaling(cfg: AdapterConfig, site: Site) -> float:
    return site.alpha / site.r


@dataclass(frozen=True, kw_only=True)
class Variant(Generic[ConfigT, DataT]):
    """One method: a record of pure functions, none of which may write on what it is given.

    The types of the functions say their arguments and shapes. Those of a call are in
    core/phase_functions.py, those of the start in core/start_functions.py, those of the weight in
    core/update_functions.py. A method needs `param_specs` and at least one of `inputs`, `outputs`,
    `weight`, `virtual` and `attend`.

    Attributes:
        name: how files and tables call it.
        config: its config class.
        param_specs: which tensors a site has.
        paper: authors, year, arXiv id.
        good_for: what it is good for, in at most six words, for tables.
        init: starts that the specs' own inits don't say.
        prepare: small tensors that the phases share, of the parameters alone.
        inputs: the phase before the frozen layer.
        outputs: the phase after it.
        router: by how much `outputs` shares tokens out among experts, for `ll.collect`.
        weight: the dense equivalent, for merging and for weights that are used uncalled.
        virtual: what stands in front of a whole call's own tokens; its sites are of kind "call" or
            "cache", and `r` is how many tokens it stands for.
        attend: the phase inside an attention; its sites are of kind "attention".
        virtual_labels: labels of virtual tokens, where a call's labels are given; None counts none.
        virtual_label_weights: a config -> by how much the loss of a causal model counts each of
            these, a function like `virtual_labels`; None where they count as the call's own do.
        virtual_decoder: a config -> what stands in front of what an encoder-decoder model decodes,
            a function like `virtual`; None where nothing does.
        additive: `weight` adds the same update to any W: W' - W doesn't depend on W, nor b' - b on
            b.
        validate: a check of frozen tensors' values, for what a file says.
        dense: whether, for so many tokens, a product with `weight`'s W' costs less than the frozen
            layer and the phases. Plain dense layers then take it where nothing would be rounded
            away; without it they never do.
        scale: the adapter at another strength, for `ll.scale`.
        project: the nearest tensors that a constraint of the method allows, for `ll.project`.
        penalty: what the method adds to the loss, for `ll.penalty`.
        scaling: the scale of a site's update, alpha / r by default.
        needs: what `init` may need: a subset of {"weight", "inputs", "activity", "gradients",
            "pairs", "reference"}.
        needs_by: which of these it needs under a config; None for all.
        directions: whose activity is recorded, where `init` needs the "activity".
        plan: a config made anew from what all sites saw.
        joint: what the weights of several sites say together, for `init`.
        sites: kinds of site that the method can adapt, first the one that it takes when the config
            names none. By default `MATRICES` for a method with `weight` whose start needs no data,
            else linear layers; a `weight` that always moves the bias has to name its kinds.
        low_rank_factors: the update as a factor pair. A plain linear layer then takes that instead
            of the phases; `ll.combine_adapters` and other libraries' files take it too.
        phases_in_training: whether in training mode the phases do what neither `weight` nor
            `low_rank_factors` says (noise, a gradient of its own), or config -> whether they do.
            Plain layers run them there, and a weight that is used without a call is refused there.
        phases_always: config -> whether they do so in either mode.
        called_outputs: `outputs` by calls of the factors, for tools that hook modules
            (`ll.bind(..., linears=True)`).
        check_rows: (config, whether by token) refuses a config under which the change of a row, or
            of a token, depends on others that may have other adapters, with UnsupportedError.
        check_calls: refuses a config under which gradients reach the factors beside those calls,
            with UnsupportedError.
        batched: the phases take several members at once as they are, leaves (m, ...) and x (m, n,
            ..., d_in), where `site.scale` may be (m,). Otherwise they are mapped over the members.
        adds: `outputs` adds the same to any y, so that updates of several members can be summed. It
            is so for an `additive` method whose only phase is `outputs`.
        has_phases: whether it can act around a layer's call; otherwise it goes by the weight.
        reads_prompt: whether it edits tokens of the prompt in the hidden states of whole modules.
    """

    name: str
    config: type[ConfigT]
    param_specs: ParamSpecsFn[ConfigT]
    paper: str = ""
    good_for: str = ""
    init: InitFn[ConfigT] | None = None
    prepare: PrepareFn[ConfigT, DataT] | None = None
    inputs: InputsFn[ConfigT, DataT] | None = None
    outputs: OutputsFn[ConfigT, DataT] | None = None
    router: RouterFn[ConfigT, DataT] | None = None
    weight: WeightFn[ConfigT] | None = None
    virtual: VirtualFn[ConfigT] | None = None
    virtual_labels: VirtualLabelsFn[ConfigT] | None = None
    virtual_label_weights: VirtualLabelWeightsFn[ConfigT] | None = None
    virtual_decoder: VirtualDecoderFn[ConfigT] | None = None
    attend: AttendFn[ConfigT] | None = None
    additive: bool = False
    validate: ValidateFn[ConfigT] | None = None
    dense: DenseFn[ConfigT] | None = None
    scale: ScaleFn[ConfigT] | None = None
    project: ProjectFn[ConfigT] | None = None
    penalty: PenaltyFn[ConfigT] | None = None
    scaling: ScalingFn[ConfigT] = _default_scaling
    needs: frozenset[str] = frozenset()
    needs_by: NeedsFn[ConfigT] | None = None
    directions: DirectionsFn[ConfigT] | None = None
    plan: PlanFn[ConfigT] | None = None
    joint: JointFn[ConfigT] | None = None
    sites: tuple[str, ...] = ()
    low_rank_factors: FactorsFn[ConfigT] | None = None
    called_outputs: CalledOutputsFn[ConfigT, DataT] | None = None
    check_rows: Callable[[ConfigT, bool], None] | None = None
    check_calls: Callable[[ConfigT], None] | None = None
    phases_in_training: bool | Callable[[ConfigT], bool] = False
    phases_always: Callable[[ConfigT], bool] | None = None
    batched: bool = False
    adds: bool = False
    has_phases: bool = field(init=False, compare=False)
    reads_prompt: bool = field(init=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.needs, set):
            object.__setattr__(self, "needs", frozenset(self.needs))
        if not self.sites:
            anywhere = self.weight is not None and set(self.needs) <= {"weight", "reference"}
            object.__setattr__(self, "sites", MATRICES if anywhere else MATRICES[:1])
        if isinstance(self.sites, (set, frozenset)):  # unordered: linear layers go first
            ordered = sorted(self.sites, key=lambda kind: (kind != "linear", kind))
            object.__setattr__(self, "sites", tuple(ordered))
        phases = (self.inputs, self.outputs, self.virtual, self.attend)
        has_phases = any(phase is not None for phase in phases)
        object.__setattr__(self, "has_phases", has_phases)
        if self.additive and self.outputs is not None and self.inputs is None:
            object.__setattr__(self, "adds", True)
        object.__setattr__(self, "reads_prompt", self.sites[:1] == ("module",))

    def needs_of(self, cfg: ConfigT) -> frozenset[str]:
        """What init needs under a config."""
        return self.needs if self.needs_by is None else self.needs_by(cfg)

    def label_weights_of(self, cfg: ConfigT) -> VirtualLabelsFn[ConfigT] | None:
        """What weighs the labels of virtual tokens under a config; None where nothing does."""
        weights = self.virtual_label_weights
        return None if weights is None else weights(cfg)

    def decoder_tokens_of(self, cfg: ConfigT) -> VirtualFn[ConfigT] | None:
        """What makes virtual tokens for a decoder under a config; None where nothing does."""
        return None if self.virtual_decoder is None else self.virtual_decoder(cfg)

    def beyond_weight(self, cfg: ConfigT, training: bool) -> bool:
        """Whether under a config the phases do more in this mode than the weight says."""
        if self.phases_always is not None and self.phases_always(cfg):
            return True
        more = self.phases_in_training
        return training and (more if isinstance(more, bool) else more(cfg))

    @property
    def factor(self) -> ScalingFn[ConfigT]:
        """What versions before 0.2.0 called `scaling`."""
        return self.scaling

    @property
    def factors(self) -> FactorsFn[ConfigT] | None:
        """What versions before 0.2.0 called `low_rank_factors`."""
        return self.low_rank_factors

    @property
    def leading(self) -> bool:
        """What versions before 0.2.0 called `batched`."""
        return self.batched


_OLD_KEYWORDS = {"factor": "scaling", "factors": "low_rank_factors", "leading": "batched"}
"""What versions before 0.2.0 called fields of a Variant; still taken as keywords."""


def _with_old_keywords(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def take(self: Variant, **fields: object) -> None:
        for old, new in _OLD_KEYWORDS.items():
            if old in fields:
                if new in fields:
                    raise TypeError(
                        f"Variant: {old!r} is the old name of {new!r}; give one of them"
                    )
                fields[new] = fields.pop(old)
        init(self, **fields)

    return take


Variant.__init__ = _with_old_keywords(Variant.__init__)  # type: ignore[method-assign]


def site_for(
    variant: Variant, cfg: AdapterConfig, site: Site, scale_tensors: dict[float, Tensor]
) -> Site:
    """The Site under a config, with its scale, and the scale as a tensor, which sites of one scale
    share through `scale_tensors`.
    """
    scaling = float(variant.scaling(cfg, site))
    if scaling not in scale_tensors:
        scale_tensors[scaling] = torch.tensor(scaling, dtype=torch.float64, device="cpu")
    return site.having(scaling=scaling, scale_tensor=scale_tensors[scaling])
