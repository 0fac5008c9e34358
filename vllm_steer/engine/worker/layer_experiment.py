"""Finds a loaded model's decoder layers, and by experiment how each returns the residual stream.

Two forward passes of random tokens before the first request, without attention: every attention or state-space layer
returns zeros, so no token influences another. In the second pass each question changes one layer's output at one token,
so a single pass asks them all. Tokens that no question changes must stay as they were.

1. The decoder layers are the ModuleList that has as many members as the model has layers, each called once, in order,
   and each returning one of the forms of ``layer_classes.Convention``.
2. Where a layer returns two tensors (h, r): if the stream is h + r, then (r, h) changes nothing, since addition
   commutes in floating point, and noise on r does (``fused``). If the stream is h, it is the other way round
   (``first``).
3. A vector added to the stream after a layer changes the result: no layer is without effect.
4. With tensor parallelism all ranks hold the same h and r: none of them is a part of a sum.

In a deep model 2 and 3 are asked of the first, the middle and the last layer of each class.

It says nothing about whether a layer ends where Hugging Face's does; only a comparison can (``schema.Proof``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather
from vllm.model_executor.models.utils import PPMissingLayer

from vllm_steer.engine.layer_classes import Convention
from vllm_steer.engine.worker.silent_passes import SHALLOW, UNCHANGED_TOKENS, Passes, without_attention
from vllm_steer.errors import UnsupportedModel

Change = Callable[[torch.Tensor, torch.Tensor | None], None]
"""Changes one token's h and r (None where a layer returns one tensor), both (D,), in place."""
Form = Literal["pair", "first", "single", "batched"]

_REFUSE = "Use another model, or start the engine without steer_config."


@dataclass(frozen=True, slots=True)
class Layer:
    """What the experiment found about one decoder layer.

    Attributes:
        number: its place in the model, counted from 0.
        path: its class, with the Python module.
        convention: how it returns the stream, by its own answer or that of its class; None if there is neither.
        swapped: relative change of the result when h and r change places; None where it returns one tensor, and where
            it was not asked.
        noise: relative change of the result when noise is added to r; None likewise.
        pushed: relative change of the result when a vector is added to the stream; None where it was not asked.
    """

    number: int
    path: str
    convention: Convention | None
    swapped: float | None
    noise: float | None
    pushed: float | None


@dataclass(frozen=True, slots=True)
class Findings:
    """The record of one experiment.

    Attributes:
        layers: the decoder layers of this pipeline stage.
        num_layers: decoder layers of the whole model.
        repeated: relative change of the result at tokens that were not changed.
        unchanged: a relative change up to this one counts as none.
        changed: a relative change from this one on counts as one.
        seconds: how long it took.
    """

    layers: tuple[Layer, ...]
    num_layers: int
    repeated: float
    unchanged: float
    changed: float
    seconds: float

    @property
    def classes(self) -> frozenset[str]:
        """The classes of the layers."""
        return frozenset(layer.path for layer in self.layers)

    def as_json(self) -> dict[str, Any]:
        """The record as plain types."""
        return asdict(self)


def examine(model: nn.Module, runner: Any) -> tuple[dict[int, nn.Module], Findings]:
    """Find the decoder layers of a loaded model and how they return the stream.

    Args:
        model: the model, loaded and not yet called.
        runner: the classic runner, or the V2 runner's model state; its ``vllm_config`` and ``device`` are read.

    Returns:
        layer number -> decoder layer, for the layers of this pipeline stage; and the record.

    Raises:
        UnsupportedModel: the experiment gives no clear answer, or the answer is that no single stream leaves a layer.
    """
    begun = time.perf_counter()
    with torch.inference_mode(), without_attention(model):
        passes = Passes(model, runner)
        blocks, outputs, plain = _find_blocks(model, passes)
        layers, repeated = _ask(blocks, outputs, plain, passes)
    unchanged, changed = _thresholds(passes.dtype)
    seconds = round(time.perf_counter() - begun, 3)
    return blocks, Findings(layers, passes.num_layers, repeated, unchanged, changed, seconds)


def class_path(module: nn.Module) -> str:
    """The class of a module with its Python module, because Hugging Face and vLLM use the same class names."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


Outputs = dict[int, tuple[Form, torch.Tensor, torch.Tensor | None]]
"""Layer number -> the form of its output, h and r (None where it returns one tensor), both (T, D)."""


def _find_blocks(model: nn.Module, passes: Passes) -> tuple[dict[int, nn.Module], Outputs, torch.Tensor]:
    """The decoder layers of this stage by number, what each returned in a first pass, and that pass's result."""
    lists = [
        {number: block for number, block in enumerate(module) if not isinstance(block, PPMissingLayer)}
        for module in language_model(model).modules()
        if isinstance(module, nn.ModuleList) and len(module) == passes.num_layers
    ]
    calls: list[tuple[nn.Module, Form | None, object]] = []

    def record(block: nn.Module, args: object, output: object) -> None:
        form = _form(output, passes)
        calls.append((block, form, _described(output) if form is None else _copied(output)))

    with _hooks({id(block): block for blocks in lists for block in blocks.values()}.values(), record):
        plain = passes.run()
    reasons = []
    for blocks in filter(None, lists):
        members = set(map(id, blocks.values()))
        called = [call for call in calls if id(call[0]) in members]
        if [id(block) for block, _, _ in called] != [*map(id, blocks.values())]:
            reasons.append(
                f"the {len(blocks)} modules of a list, {class_path(next(iter(blocks.values())))} first, were called "
                f"{len(called)} times, not once each in order"
            )
            continue
        unknown = [f"{class_path(block)} returns {output}" for block, form, output in called if form is None]
        if unknown:
            reasons.append(unknown[0])
            continue
        outputs: Any = {number: (form, *output) for number, (_, form, output) in zip(blocks, called, strict=True)}  # type: ignore[misc]
        return blocks, outputs, plain
    found = "; ".join(reasons) or f"no list of {passes.num_layers} modules is in {class_path(language_model(model))}"
    raise UnsupportedModel(
        f"no decoder layers were found: {found}; allowed: one list of layers, each of which runs once per token and "
        f"returns one stream of {passes.hidden_size} elements. {_REFUSE}"
    )


def language_model(model: nn.Module) -> nn.Module:
    """The part of a model that generates text: the model itself, unless it is a wrapper for images or sound."""
    while hasattr(model, "get_language_model"):
        inner: nn.Module = model.get_language_model()  # type: ignore[operator]
        if inner is model:
            break
        model = inner
    return model


@contextmanager
def _hooks(blocks: Iterable[nn.Module], hook: Callable[..., Any]) -> Iterator[None]:
    handles = [block.register_forward_hook(hook) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _form(output: object, passes: Passes) -> Form | None:
    """The form of a layer's output; None if it is none from which the stream can be taken."""
    shape = (passes.num_tokens, passes.hidden_size)
    match output:
        case torch.Tensor() if output.shape == shape:
            return "single"
        case torch.Tensor() if output.shape == (1, *shape):
            return "batched"
        case (torch.Tensor() as h, None) if h.shape == shape:
            return "first"
        case (torch.Tensor() as h, torch.Tensor() as r) if h.shape == r.shape == shape:
            return "pair"
    return None


def _described(output: object) -> str:
    if isinstance(output, torch.Tensor):
        return f"a tensor of shape {list(output.shape)}"
    if isinstance(output, tuple | list):
        return f"{len(output)} values, ({', '.join(map(_described, output))})"
    return type(output).__name__


@dataclass(frozen=True, slots=True)
class _Question:
    """A change of one layer's output at one token."""

    number: int
    what: Literal["swapped", "noise", "pushed"]


def _questions(blocks: Mapping[int, nn.Module], outputs: Outputs, passes: Passes) -> list[_Question]:
    # What the last layer of a stage returns is complete in the next stage only.
    asked = [*blocks] if passes.is_last_stage else [*blocks][:-1]
    if passes.num_layers > SHALLOW:
        by_class: dict[str, list[int]] = {}
        for number in asked:
            by_class.setdefault(class_path(blocks[number]), []).append(number)
        asked = sorted({of[place] for of in by_class.values() for place in (0, len(of) // 2, -1)})
    questions = []
    for number in asked:
        if outputs[number][0] == "pair":
            questions += [_Question(number, "swapped"), _Question(number, "noise")]
        questions.append(_Question(number, "pushed"))
    return questions


def _ask(
    blocks: Mapping[int, nn.Module], outputs: Outputs, plain: torch.Tensor, passes: Passes
) -> tuple[tuple[Layer, ...], float]:
    """Ask the questions of this module's docstring; the answers, and the change at tokens that were not changed."""
    unchanged, changed = _thresholds(passes.dtype)
    if not plain.isfinite().all() or not plain.norm(dim=1).min() > 0:
        raise UnsupportedModel(
            "the experiment on its decoder layers says nothing: its result is not finite, or 0; allowed: other values. "
            + _REFUSE
        )
    _refuse_partial_sums(blocks, outputs, passes)
    both = (tensor for _, *pair in outputs.values() for tensor in pair if tensor is not None)
    noise_D = passes.noise_D * max(float(tensor.float().norm(dim=1).median()) for tensor in both)
    changes: dict[str, Change] = {"swapped": _swap, "noise": _add_to_r(noise_D), "pushed": _add_to_h(noise_D)}
    questions = _questions(blocks, outputs, passes)
    answers: dict[_Question, float] = {}
    repeats = []
    at_once = passes.num_tokens - UNCHANGED_TOKENS
    for chunk in (questions[start : start + at_once] for start in range(0, len(questions), at_once)):
        acts: dict[int, list[tuple[int, Change]]] = {}
        for row, question in enumerate(chunk):
            acts.setdefault(id(blocks[question.number]), []).append((row, changes[question.what]))
        with _hooks([block for block in blocks.values() if id(block) in acts], _changer(acts)):
            differs = _relative_change(passes.run(), plain)
        repeats.append(differs[len(chunk) :].max())
        answers.update(zip(chunk, differs.tolist(), strict=False))
    repeated = float(torch.stack(repeats).max()) if repeats else 0.0
    if not repeated <= unchanged:  # NaN is refused too
        raise UnsupportedModel(
            "the experiment on its decoder layers says nothing: tokens that were not changed gave results that differ "
            f"by {repeated:.2g} of their size; allowed: up to {unchanged:g}. {_REFUSE}"
        )
    layers = []
    for number, block in blocks.items():
        measured = {what: answers.get(_Question(number, what)) for what in ("swapped", "noise", "pushed")}
        layer = Layer(number, class_path(block), None, **measured)
        if layer.pushed is not None and not layer.pushed >= changed:
            raise UnsupportedModel(
                f"a vector added to the output of layer {number}, a {layer.path}, changes the result by "
                f"{layer.pushed:.2g} of its size; allowed: {changed:g} or more. Its output is not the stream that the "
                f"model goes on with. {_REFUSE}"
            )
        form = outputs[number][0]
        layers.append(replace(layer, convention=_convention(layer, unchanged, changed) if form == "pair" else form))
    return tuple(_with_answers_of_class(layers)), repeated


def _with_answers_of_class(layers: Sequence[Layer]) -> Iterator[Layer]:
    """Give layers that were not asked the answer of their class, if it is the same for all that were."""
    for layer in layers:
        answers = {one.convention for one in layers if one.path == layer.path} - {None}
        yield replace(layer, convention=answers.pop()) if layer.convention is None and len(answers) == 1 else layer


def _swap(h_D: torch.Tensor, r_D: torch.Tensor | None) -> None:
    assert r_D is not None
    kept_D = h_D.clone()
    h_D.copy_(r_D)
    r_D.copy_(kept_D)


def _add_to_r(noise_D: torch.Tensor) -> Change:
    def disturb(h_D: torch.Tensor, r_D: torch.Tensor | None) -> None:
        assert r_D is not None
        r_D += noise_D

    return disturb


def _add_to_h(noise_D: torch.Tensor) -> Change:
    def push(h_D: torch.Tensor, r_D: torch.Tensor | None) -> None:
        h_D += noise_D

    return push


def _convention(layer: Layer, unchanged: float, changed: float) -> Convention | None:
    if layer.swapped is None or layer.noise is None:
        return None
    if layer.swapped <= unchanged and layer.noise >= changed:
        return "fused"
    if layer.noise <= unchanged and layer.swapped >= changed:
        return "first"
    raise UnsupportedModel(
        f"layer {layer.number}, a {layer.path}, returns two tensors. The result changes by {layer.swapped:.2g} of its "
        f"size when they change places and by {layer.noise:.2g} with noise on the second; allowed: one of the two up "
        f"to {unchanged:g} and the other {changed:g} or more. So the stream is neither their sum nor the first. "
        f"{_REFUSE}"
    )


def _thresholds(dtype: torch.dtype) -> tuple[float, float]:
    """Up to which relative change a result counts as unchanged, and from which on as changed.

    Changes are as large as the stream, so a real one is of the order of 1; swapping is exact in any dtype. What lies
    between is the rounding of 32 or of 16 bits that layers behind amplify.
    """
    return (1e-4, 1e-3) if dtype == torch.float32 else (2e-2, 5e-2)


def _copied(output: object) -> tuple[torch.Tensor, torch.Tensor | None]:
    h_TD, r_TD = _both(output)
    return h_TD.clone(), None if r_TD is None else r_TD.clone()


def _changer(acts: Mapping[int, Sequence[tuple[int, Change]]]) -> Callable[..., Any]:
    def change(block: nn.Module, args: object, output: object) -> object:
        h_TD, r_TD = _copied(output)
        for row, act in acts[id(block)]:
            act(h_TD[row], None if r_TD is None else r_TD[row])
        if isinstance(output, tuple):
            return h_TD, r_TD
        assert isinstance(output, torch.Tensor)
        return h_TD.view_as(output)

    return change


def _both(output: object) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(h, r) of a layer's output of a known form, each (T, D); r is None where the layer returns one tensor."""
    if isinstance(output, tuple):
        h_TD, r_TD = output
        return h_TD, r_TD
    assert isinstance(output, torch.Tensor)
    return (output[0] if output.ndim == 3 else output), None


def _relative_change(result: torch.Tensor, plain: torch.Tensor) -> torch.Tensor:
    change_T: torch.Tensor = (result - plain).norm(dim=1) / plain.norm(dim=1)
    return change_T


def _refuse_partial_sums(blocks: Mapping[int, nn.Module], outputs: Outputs, passes: Passes) -> None:
    ranks = get_tensor_model_parallel_world_size()
    if ranks == 1:
        return
    for number, block in blocks.items():
        for tensor in outputs[number][1:]:
            if tensor is None:
                continue
            along_T = tensor.float() @ passes.noise_D
            all_RT = tensor_model_parallel_all_gather(along_T[None], dim=0)
            off = float((all_RT - all_RT[0]).abs().max() / tensor.float().norm(dim=1).max())
            if off > _thresholds(passes.dtype)[0]:
                raise UnsupportedModel(
                    f"layer {number}, a {class_path(block)}, returns other values on each tensor-parallel rank, which "
                    f"differ by {off:.2g} of their size: parts of a sum that a later layer completes; allowed: "
                    "tensor_parallel_size=1. Set it to 1, or start the engine without steer_config."
                )
