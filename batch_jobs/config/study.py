"""The study config: one typed schema, read from YAML."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    FiniteFloat,
    JsonValue,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from batch_jobs.config.concept import STUDY_NAME as STUDY_NAME  # re-exported
from batch_jobs.config.concept import Concept, empathy
from batch_jobs.config.cost import CostOptions
from batch_jobs.config.document import explain_faults, read_study_document
from batch_jobs.config.primary import Primary
from batch_jobs.config.steering import Controls, DirectionFile, without_file_paths
from batch_jobs.config.template_variables import template_variables
from batch_jobs.errors import StudyError as StudyError  # re-exported
from batch_jobs.files.documents import refuse_half_pairs
from vllm_steer import spans

DEMO_MODEL = "demo-model"
"""Value of `model` that means the small instruct model made by `vllm-steer demo-model`."""

Layer = Annotated[int, Field(ge=0)]
DirectionMethod = Literal["mean_difference", "logistic_regression", "pca"]
"""How a direction is made from the train readouts. The first is the paper's and is always made."""
SteeringDirection = Annotated[
    Annotated[DirectionMethod, Tag("method")] | Annotated[DirectionFile, Tag("entry")],
    Discriminator(lambda given: "method" if isinstance(given, str) else "entry"),
]
AlphaUnit = Literal["raw", "residual_norm", "separation"]


WORKING_FIELDS = ("engine", "rows_per_part", "max_attempts", "pairs", "scenarios", "cost")
"""Fields for how the work is done and where the texts are, and `cost`, on which nothing but `cost.json` depends."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if repeated := [value for place, value in enumerate(values) if value in values[:place]]:
        raise ValueError(f"{repeated} given more than once; give each value once")
    return values


class EngineOptions(_Section):
    """Options of the in-process vLLM engine, beyond model, dtype, seed and max_model_len."""

    enforce_eager: bool = False
    """True skips torch.compile and CUDA graphs: a faster start, slower steps."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of the device's memory; on the CPU build, share of RAM."""
    kv_cache_gib: float | None = Field(default=None, gt=0)
    """Memory for the KV cache, instead of the rest of gpu_memory_utilization: the same on any machine."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    max_num_seqs: int | None = Field(default=None, ge=1)
    max_num_batched_tokens: int | None = Field(default=None, ge=1)
    enable_prefix_caching: bool | None = None
    # left out where it is absent, so that folders of captured rows of before this field are found again
    block_size: int | None = Field(default=None, ge=1, exclude_if=lambda given: given is None)
    """Tokens of a KV block. Requests share whole blocks of equal beginnings, so smaller ones share more."""
    trust_remote_code: bool = False
    max_alpha: float | None = Field(default=None, gt=0)
    """Largest |α| (raw) that the engine accepts; None keeps the plugin's own bound."""
    # left out where it is the default, so that run directories of before this field are found again
    unproven_model: Literal["refuse", "experiment"] = Field(default="refuse", exclude_if=lambda one: one == "refuse")
    """As in ``steer_config``: what to do with a model whose layers were never compared with Hugging Face."""

    def engine_args(self) -> dict[str, Any]:
        """The options as vLLM engine arguments; those left at None keep vLLM's own default."""
        arguments = self.model_dump(exclude_none=True, exclude={"kv_cache_gib", "max_alpha", "unproven_model"})
        if self.kv_cache_gib is not None:
            arguments["kv_cache_memory_bytes"] = int(self.kv_cache_gib * 2**30)
        return arguments

    def steer_settings(self) -> dict[str, Any]:
        """The options for the plugin, as keyword arguments of `steer_config`."""
        given = {"unproven_model": self.unproven_model}
        return given if self.max_alpha is None else {**given, "max_alpha": self.max_alpha}


class Extraction(_Section):
    """The readouts of the contrastive texts from which the directions are made."""

    layers: tuple[Layer, ...] = Field(min_length=1)
    """Layers that get a direction (0-based decoder blocks)."""
    max_tokens: int = Field(default=512, ge=1)
    """Texts are cut to this many tokens (paper: 512)."""
    extract_offset: Literal[0, -1] = 0
    """0: the direction of layer ℓ is read at the output of block ℓ, where it also steers. -1: at the output
    of block ℓ-1, the paper's pairing (it read `hidden_states[ℓ]` and steered the output of block ℓ)."""

    _no_repeats = field_validator("layers")(_distinct)

    @model_validator(mode="after")
    def _offset_stays_in_the_model(self) -> Self:
        if min(self.layers) + self.extract_offset < 0:
            raise ValueError(
                "layer 0 with extract_offset -1 would read the embeddings, which are no block's output; "
                "leave layer 0 out or use extract_offset 0"
            )
        return self

    def readout_layer(self, layer: int) -> int:
        """The block whose output the direction labelled `layer` is made from."""
        return layer + self.extract_offset


class ValidationOptions(_Section):
    """How the directions are validated, besides their held-out AUROC."""

    all_layers: bool = False
    """Read and validate every decoder block, not only those of `extract.layers`. Hooks them all."""
    random_directions: int = Field(default=100, ge=2)
    """Number of Gaussian unit vectors whose AUROC is the chance level for comparison (paper: 100)."""
    bootstrap: int = Field(default=2000, ge=100)
    """Number of resamples of the test pairs that tell how far the AUROCs of a direction and of a bag of words vary
    together, for the interval of their difference. AUROCs themselves have score intervals, which draw nothing."""
    lexical_ablation: bool = True
    """Also read the positive test texts with the concept's words replaced (paper: 41 keywords). Off by default for a
    concept without ablation words."""


class SplitSizes(_Section):
    """Numbers of pairs to make the directions and to validate them; ignored for pairs that are already split."""

    train: int = Field(default=35, ge=1)
    test: int = Field(default=15, ge=1)
    seed: int = 0


class SteeringGrid(_Section):
    """The grid: every scenario × layer × direction × α × sample is one row."""

    layers: tuple[Layer, ...] = Field(min_length=1)
    alphas: tuple[FiniteFloat, ...] = Field(min_length=1)
    """Must hold 0, the unsteered baseline that effects are measured against."""
    alpha_unit: AlphaUnit = "raw"
    """`residual_norm`: α in multiples of the layer's mean residual norm, so that one grid fits all layers and
    models. `separation`: α in multiples of what separates the sides of the train texts along the direction there."""
    scenarios: tuple[str, ...] = Field(min_length=1)
    directions: tuple[SteeringDirection, ...] = Field(default=("mean_difference",), min_length=1)
    """Which of the study's directions steer, and directions of files; several are compared side by side."""
    # left out of every dump when absent, so that a config without it keeps its hash and its run directory
    controls: Controls | None = Field(default=None, exclude_if=lambda given: given is None)
    """Random directions that go through the same grid."""
    samples: int = Field(default=5, ge=1)
    op: Literal["add", "ablate", "set"] = "add"
    span: str = "all"

    _no_repeats = field_validator("layers", "alphas", "scenarios", "directions")(_distinct)

    @field_validator("span")
    @classmethod
    def _is_a_span(cls, span: str) -> str:
        spans.check(span)
        return span

    @model_validator(mode="after")
    def _alphas_fit(self) -> Self:
        if 0.0 not in self.alphas:
            raise ValueError("alphas lack 0, the unsteered baseline that effects are measured against; add 0")
        if self.op == "ablate" and (set(self.alphas) - {0.0, 1.0} or self.alpha_unit != "raw"):
            raise ValueError("op ablate has no strength: use alphas [0, 1] (off, on) with alpha_unit raw")
        for entry in self.direction_files:
            if entry.layer not in (None, *self.layers):
                raise ValueError(
                    f"direction file {entry.name!r} is for layer {entry.layer}; steer.layers are {list(self.layers)}; "
                    "steer there too, or leave the entry out"
                )
        if idle := [layer for layer in self.layers if not self.directions_at(layer)]:
            raise ValueError(f"layers {idle} have no direction: every entry of directions is for another layer")
        return self

    @property
    def direction_files(self) -> tuple[DirectionFile, ...]:
        """The entries of `directions` that are files."""
        return tuple(entry for entry in self.directions if isinstance(entry, DirectionFile))

    def directions_at(self, layer: int) -> tuple[DirectionMethod | DirectionFile, ...]:
        """The entries of `directions` that steer at a layer."""
        return tuple(
            entry for entry in self.directions if not isinstance(entry, DirectionFile) or entry.layer in (None, layer)
        )


class Sampling(_Section):
    """How completions are sampled; named as in vLLM's SamplingParams."""

    temperature: float = Field(default=0.7, ge=0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    """0 considers all tokens."""
    repetition_penalty: float = Field(default=1.0, gt=0, le=2)
    max_tokens: int = Field(default=200, ge=1)


class Study(_Section):
    """One study. Everything that changes a number in its results is here or in the texts it names."""

    name: str = Field(pattern=STUDY_NAME)
    concept: Concept = empathy()
    """What the directions are named for and how completions are scored: `empathy`, or a section."""
    model: str = Field(min_length=1)
    """Hub id, local path, or `demo-model`."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "bfloat16"
    max_model_len: int = Field(default=2048, ge=2)
    seed: int = Field(default=0, ge=0)
    engine: EngineOptions = EngineOptions()
    prompt_format: Literal["chat", "raw"] = "chat"
    """`chat`: the steering prompt is one user turn of the model's chat template; `raw`: the text alone, as in
    the paper. The contrastive texts are always read alone."""
    # left out of every dump when empty, so that a config without it keeps its hash and its run directory
    chat_template_kwargs: dict[str, JsonValue] = Field(default_factory=dict, exclude_if=lambda given: not given)
    """Variables for the model's chat template, e.g. `{enable_thinking: false}` for a model that thinks by default. A
    template ignores variables that it does not use."""
    skip_first: int = Field(default=0, ge=0)
    """Leading tokens left out of every readout mean. 1 drops the attention sink that dominates many models'
    mean."""
    pairs: Path | None = None
    """None: the bundled pairs. A .jsonl file: split by `split`. A directory: its train_pairs.jsonl and
    test_pairs.jsonl."""
    scenarios: Path | None = None
    """None: the bundled scenarios. Otherwise a JSON list of them."""
    extract: Extraction
    split: SplitSizes = SplitSizes()
    validation: ValidationOptions = ValidationOptions()
    steer: SteeringGrid
    sampling: Sampling = Sampling()
    primary: Primary | None = Field(default=None, exclude_if=lambda given: given is None)
    """The hypothesis that is stated before anything is generated, and written to provenance.json."""
    cost: CostOptions | None = Field(default=None, exclude_if=lambda given: given is None)
    """What steering costs: perplexity of neutral texts and plain questions under every steering; None leaves it out."""
    likelihood: bool = True
    """Read every completion once more without steering, for its log-likelihood under the unsteered model and its
    projection onto the direction. Costs one prefill per row."""
    rows_per_part: int = Field(default=1024, ge=1)
    """Rows generated as one batch and stored as one part, which is what a crash can lose. A larger part keeps the
    engine's batch fuller."""
    max_attempts: int = Field(default=3, ge=1)
    """How often a row that breaks its engine is tried before its error is stored instead."""

    @field_validator("chat_template_kwargs")
    @classmethod
    def _template_variables_only(cls, given: dict[str, JsonValue]) -> dict[str, JsonValue]:
        return template_variables(given)

    @model_validator(mode="after")
    def _the_ablation_has_words(self) -> Self:
        if self.validation.lexical_ablation and not self.concept.has_ablation_words:
            if "lexical_ablation" in self.validation.model_fields_set:
                raise ValueError(
                    f"validation.lexical_ablation is true, but the concept {self.concept.name!r} has no "
                    "ablation_words; give concept.ablation_words, or leave lexical_ablation out"
                )
            self.__dict__["validation"] = self.validation.model_copy(update={"lexical_ablation": False})
        return self

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        if self.chat_template_kwargs and self.prompt_format == "raw":
            raise ValueError(
                f"chat_template_kwargs is {self.chat_template_kwargs!r} with prompt_format raw, which uses no chat "
                "template; set prompt_format: chat or leave chat_template_kwargs out"
            )
        if missing := sorted(set(self.steer.layers) - set(self.extract.layers)):
            raise ValueError(
                f"steer.layers {missing} have no direction: extract.layers are {list(self.extract.layers)}; "
                "steer only at extracted layers, or extract these too"
            )
        focus = self.concept.focus_scenario
        if focus is not None and focus not in self.steer.scenarios:
            raise ValueError(
                f"concept.focus_scenario is {focus!r}; allowed: one of steer.scenarios, {list(self.steer.scenarios)}"
            )
        if self.extract.max_tokens >= self.max_model_len:
            raise ValueError(
                f"extract.max_tokens is {self.extract.max_tokens}; allowed: less than max_model_len, "
                f"{self.max_model_len}"
            )
        if self.skip_first >= self.extract.max_tokens:
            raise ValueError(
                f"skip_first is {self.skip_first}; allowed: less than extract.max_tokens, {self.extract.max_tokens}"
            )
        self._check_direction_names()
        if self.primary is not None:
            self._check_primary(self.primary)
        return self

    def _check_direction_names(self) -> None:
        own = [self.direction_name(method) for method in get_args(DirectionMethod)]
        for place, entry in enumerate(self.steer.direction_files):
            taken = [*own, *(other.name for other in self.steer.direction_files[:place])]
            if entry.name in taken:
                raise ValueError(
                    f"steer.directions names a file's direction {entry.name!r}, which is taken; the names {taken} are "
                    "in use, so give it another one"
                )

    def _check_primary(self, primary: Primary) -> None:
        grid = self.steer
        if primary.layer not in grid.layers:
            raise ValueError(f"primary.layer is {primary.layer}; allowed: one of steer.layers, {list(grid.layers)}")
        names = [self.direction_name(entry) for entry in grid.directions_at(primary.layer)]
        if primary.direction not in names:
            raise ValueError(
                f"primary.direction is {primary.direction!r}; allowed: what steers at layer {primary.layer}, {names}"
            )
        if strangers := [name for name in primary.scenarios or () if name not in grid.scenarios]:
            raise ValueError(f"primary.scenarios {strangers} are not steered; allowed: {list(grid.scenarios)}")
        if grid.op != "add" or not any(alpha > 0 and -alpha in grid.alphas for alpha in grid.alphas):
            raise ValueError(
                "primary.outcome delta compares +α with -α: it needs steer.op add and an α in steer.alphas with both "
                "signs"
            )

    def hooked_layers(self, num_layers: int) -> tuple[int, ...]:
        """Layers that need a hook in a model of `num_layers` blocks: all labelled layers, for norms and steering, and
        the blocks read for them; with `validation.all_layers` every block.

        Raises:
            StudyError: the model lacks a layer.
        """
        labelled = set(self.extract.layers)
        if lacking := sorted(layer for layer in labelled if layer >= num_layers):
            raise StudyError(
                f"extract.layers {lacking} do not exist: {self.model} has {num_layers} decoder blocks; allowed: "
                f"0 to {num_layers - 1}."
            )
        if self.validation.all_layers:
            return tuple(range(num_layers))
        return tuple(sorted(labelled | {self.extract.readout_layer(layer) for layer in labelled}))

    def direction_name(self, method: DirectionMethod | DirectionFile) -> str:
        """Name of the directions made by `method`: the concept's alone for the paper's method, else
        `<concept>-<method>`. A direction file has its own."""
        if isinstance(method, DirectionFile):
            return method.name
        name = self.concept.name
        return name if method == "mean_difference" else f"{name}-{method.replace('_', '-')}"

    @property
    def num_steering_directions(self) -> int:
        """Directions, controls included, that an engine holds at a time, one for each name and layer."""
        controls = self.steer.controls.random if self.steer.controls else 0
        return sum(len(self.steer.directions_at(layer)) for layer in self.steer.layers) * (1 + controls)

    @property
    def identity(self) -> dict[str, Any]:
        """The fields that a run's results depend on: all but WORKING_FIELDS. `pipeline` adds the content of the
        texts and of the direction files."""
        return without_file_paths(self.model_dump(mode="json", exclude=set(WORKING_FIELDS)))

    def canonical_json(self) -> str:
        """The config as JSON with defaults filled in and keys sorted: equal studies give equal text."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, ensure_ascii=False)

    @property
    def config_hash(self) -> str:
        """First 16 hex digits of the sha256 of `canonical_json`."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()[:16]


def load_study(path: Path, *, overrides: Mapping[str, Any] | None = None) -> Study:
    """Read and check a study's YAML. Relative `pairs` and `scenarios` paths are resolved against the YAML's own
    folder.

    A YAML may name another one as its `base`, by a path relative to its own folder: its own fields replace the
    base's, section by section. `overrides` replaces top-level fields (the command line's options; paths in it are
    used unchanged).

    Raises:
        StudyError: the config is unusable; the message names file, field, what was got and what is allowed.
    """
    document = {**read_study_document(path, ", ".join(Study.model_fields)), **(overrides or {})}
    # checks the options and the folders' names; the content of the files is already checked
    refuse_half_pairs(document, f"{path}", advice="give text, or a path, in UTF-8")
    try:
        return Study.model_validate(document)
    except ValidationError as error:
        raise StudyError(f"{path}: {explain_faults(error, Study)}") from error
