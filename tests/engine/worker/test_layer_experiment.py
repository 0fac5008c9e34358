"""The experiment at start-up is right about every kind of decoder layer, and silent where there is no answer.

Toy models stand in for vLLM's here. `tests/engine/exact/test_parity.py` compares the answers for real ones with what
the comparison with Hugging Face shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.sequence import IntermediateTensors

from vllm_steer.engine.layer_classes import LAYER_CLASSES, Convention, LayerClass
from vllm_steer.engine.worker import layer_experiment, silent_passes
from vllm_steer.engine.worker.hooked_layers import conventions
from vllm_steer.engine.worker.layer_experiment import Findings, Layer, examine
from vllm_steer.errors import UnsupportedModel

SIZE, BLOCKS, VOCAB = 16, 5, 50
Output = Any


class Attention(nn.Module, AttentionLayerBase):
    """Mixes all tokens; without a cache it returns what happened to be in memory, as vLLM's does."""

    def forward(self, x_TD: torch.Tensor, output: torch.Tensor | None = None) -> torch.Tensor | None:
        garbage = torch.randn(x_TD.shape, generator=torch.Generator().manual_seed(id(object()) % 10**6)) * 1e6
        mixed = x_TD.mean(dim=0) + garbage.to(x_TD.dtype)
        if output is not None:
            output.copy_(mixed)
            return None
        return mixed

    def get_attn_backend(self) -> Any:
        raise NotImplementedError

    def get_kv_cache_spec(self, vllm_config: Any) -> Any:
        raise NotImplementedError


class Block(nn.Module):
    """A decoder layer: its addition to the stream, from attention and a matrix."""

    def __init__(self, into_buffer: bool = False) -> None:
        super().__init__()
        self.attention = Attention()
        self.mlp = nn.Linear(SIZE, SIZE, bias=False)
        self.into_buffer = into_buffer

    def addition(self, stream_TD: torch.Tensor) -> torch.Tensor:
        normed = nn.functional.rms_norm(stream_TD, (SIZE,))
        if self.into_buffer:
            attended = torch.empty_like(normed)
            self.attention(normed, output=attended)
        else:
            attended = self.attention(normed)
        added: torch.Tensor = attended + self.mlp(normed)
        return added


class Fused(Block):
    def forward(self, h_TD: torch.Tensor, r_TD: torch.Tensor | None) -> Output:
        r_TD = h_TD if r_TD is None else h_TD + r_TD
        return self.addition(r_TD), r_TD


class First(Block):
    def forward(self, h_TD: torch.Tensor, r_TD: torch.Tensor | None) -> Output:
        return h_TD + self.addition(h_TD), h_TD.clone()


class FirstAlone(Block):
    def forward(self, h_TD: torch.Tensor, r_TD: torch.Tensor | None) -> Output:
        return h_TD + self.addition(h_TD), None


class Single(Block):
    def forward(self, h_TD: torch.Tensor, r_TD: torch.Tensor | None) -> Output:
        return h_TD + self.addition(h_TD)


class Batched(Block):
    def forward(self, h_TD: torch.Tensor, r_TD: torch.Tensor | None) -> Output:
        return (h_TD + self.addition(h_TD))[None]


class ByHalves(Block):
    """The stream is h + r / 2, which is neither."""

    def forward(self, h_TD: torch.Tensor, r_TD: torch.Tensor | None) -> Output:
        stream = h_TD if r_TD is None else h_TD + r_TD / 2
        return self.addition(stream), 2 * stream


class Streams(Block):
    """Four streams, as a layer with hyper-connections returns them."""

    def forward(self, h_TD: torch.Tensor, r_TD: torch.Tensor | None) -> Output:
        return h_TD.expand(4, *h_TD.shape[-2:])


class Toy(nn.Module):
    """A language model of toy layers.

    Args:
        kinds: the class of each layer.
        decoy: the model holds another list of as many modules before its layers.
    """

    def __init__(self, kinds: list[type[Block]], decoy: bool = False, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(VOCAB, SIZE)
        if decoy:
            self.projections = nn.ModuleList(nn.Linear(SIZE, SIZE) for _ in kinds)
        self.layers = nn.ModuleList(kind() for kind in kinds)
        self.is_last_stage = True

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, intermediate_tensors: Any, inputs_embeds: Any
    ) -> Any:
        before = intermediate_tensors
        h_TD, r_TD = (
            (self.embedding(input_ids), None) if before is None else (before["hidden_states"], before["residual"])
        )
        for layer in self.layers:
            if not isinstance(layer, PPMissingLayer):
                h_TD, r_TD = self.step(layer, h_TD, r_TD)
        if not self.is_last_stage:
            return IntermediateTensors({"hidden_states": h_TD, "residual": r_TD})
        last = self.layers[-1]
        stream = h_TD + r_TD if isinstance(last, Fused) else h_TD
        return nn.functional.rms_norm(stream, (SIZE,))

    def step(self, layer: nn.Module, h_TD: torch.Tensor, r_TD: torch.Tensor | None) -> Any:
        output = layer(h_TD, r_TD)
        if isinstance(output, tuple):
            return output
        return (output[0] if output.ndim == 3 else output), None

    def make_empty_intermediate_tensors(self, batch_size: int, dtype: torch.dtype, device: Any) -> Any:
        names = ("hidden_states", "residual")
        return IntermediateTensors({name: torch.zeros(batch_size, SIZE, dtype=dtype) for name in names})


class Wrapper(nn.Module):
    """A wrapper for images, with a tower of as many blocks in front of the language model."""

    def __init__(self, language: Toy) -> None:
        super().__init__()
        self.tower = nn.ModuleList(Single() for _ in language.layers)
        self.language = language

    def get_language_model(self) -> nn.Module:
        return self.language

    def forward(self, **inputs: Any) -> Any:
        return self.language(**inputs)


@pytest.fixture(autouse=True)
def stage(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands in for vLLM's forward context and for the group of pipeline stages, by default of one."""
    group = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    monkeypatch.setattr(silent_passes, "set_forward_context", lambda *args, **kwargs: nullcontext())
    monkeypatch.setattr(silent_passes, "get_pp_group", lambda: group)
    monkeypatch.setattr(layer_experiment, "get_tensor_model_parallel_world_size", lambda: 1)
    return group


def runner(blocks: int = BLOCKS, most_tokens: int = 64, dtype: torch.dtype = torch.float32) -> Any:
    model_config = SimpleNamespace(
        dtype=dtype,
        max_model_len=32,
        uses_mrope=False,
        get_total_num_hidden_layers=lambda: blocks,
        get_hidden_size=lambda: SIZE,
        get_vocab_size=lambda: VOCAB,
    )
    scheduler_config = SimpleNamespace(max_num_batched_tokens=most_tokens)
    config = SimpleNamespace(model_config=model_config, scheduler_config=scheduler_config, lora_config=None)
    return SimpleNamespace(vllm_config=config, device=torch.device("cpu"))


def answers(model: nn.Module, **given: Any) -> list[Convention | None]:
    """The conventions found, layer by layer."""
    _, findings = examine(model, runner(**given))
    return [layer.convention for layer in findings.layers]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(Fused, "fused"), (First, "first"), (FirstAlone, "first"), (Single, "single"), (Batched, "batched")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_way_to_return_the_stream_is_recognised(
    kind: type[Block], expected: Convention, dtype: torch.dtype
) -> None:
    assert answers(Toy([kind] * BLOCKS).to(dtype), dtype=dtype) == [expected] * BLOCKS


def test_attention_that_writes_into_a_buffer_is_silenced_too() -> None:
    model = Toy([Fused] * BLOCKS)
    for layer in model.layers:
        layer.into_buffer = True
    assert answers(model) == ["fused"] * BLOCKS


def test_attention_is_as_it_was_afterwards() -> None:
    model = Toy([Fused] * BLOCKS)
    examine(model, runner())
    assert all("forward" not in vars(layer.attention) for layer in model.layers)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_hybrid_has_an_answer_for_each_layer() -> None:
    kinds: list[type[Block]] = [First, Single, FirstAlone, Single, First]
    assert answers(Toy(kinds)) == ["first", "single", "first", "single", "first"]


def test_of_a_deep_model_the_first_the_middle_and_the_last_layer_are_asked() -> None:
    _, findings = examine(Toy([Fused] * 30), runner(30, most_tokens=8))
    assert [layer.convention for layer in findings.layers] == ["fused"] * 30
    assert [layer.number for layer in findings.layers if layer.swapped is not None] == [0, 15, 29]


@pytest.mark.parametrize("make", [lambda: Toy([Fused] * BLOCKS, decoy=True), lambda: Wrapper(Toy([Fused] * BLOCKS))])
def test_another_list_of_as_many_modules_is_not_taken_for_the_layers(make: Callable[[], nn.Module]) -> None:
    blocks, _ = examine(make(), runner())
    assert all(isinstance(block, Fused) for block in blocks.values())
    assert [*blocks] == [*range(BLOCKS)]


class Twice(Toy):
    def step(self, layer: nn.Module, h_TD: torch.Tensor, r_TD: torch.Tensor | None) -> Any:
        return super().step(layer, *super().step(layer, h_TD, r_TD))


class Backwards(Toy):
    def forward(self, input_ids: torch.Tensor, **others: Any) -> Any:
        h_TD, r_TD = self.embedding(input_ids), None
        for layer in reversed(self.layers):
            h_TD, r_TD = self.step(layer, h_TD, r_TD)
        return h_TD + r_TD


@pytest.mark.parametrize(
    ("model", "blocks", "says"),
    [
        (Twice([Fused] * BLOCKS), BLOCKS, "were called 10 times, not once each in order"),
        (Backwards([Fused] * BLOCKS), BLOCKS, "not once each in order"),
        (Toy([Streams] * BLOCKS), BLOCKS, r"Streams returns a tensor of shape \[4, 32, 16\]"),
        (Toy([Fused] * BLOCKS), BLOCKS + 1, "no list of 6 modules"),
    ],
    ids=["run twice", "another order", "many streams", "another number"],
)
def test_a_model_whose_layers_are_not_found_is_refused(model: nn.Module, blocks: int, says: str) -> None:
    with pytest.raises(UnsupportedModel, match=says):
        examine(model, runner(blocks))


def test_a_stream_that_is_neither_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="neither their sum nor the first"):
        examine(Toy([ByHalves] * BLOCKS), runner())


def test_a_model_of_which_nothing_can_be_said_is_refused() -> None:
    broken = Toy([Fused] * BLOCKS)
    nn.init.constant_(broken.embedding.weight, float("nan"))
    with pytest.raises(UnsupportedModel, match="says nothing: its result is not finite"):
        examine(broken, runner())


class WithoutEffect(Toy):
    def step(self, layer: nn.Module, h_TD: torch.Tensor, r_TD: torch.Tensor | None) -> Any:
        output = layer(h_TD, r_TD)
        return (h_TD if layer is self.layers[1] else output), None


def test_a_layer_without_effect_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"layer 1.* changes the result by 0"):
        examine(WithoutEffect([Single] * BLOCKS), runner())


class BreaksAtTheSecondPass(Toy):
    """The result is NaN at some tokens from the second pass on."""

    def __init__(self, broken: slice) -> None:
        super().__init__([Single] * BLOCKS)
        self.broken, self.passes = broken, 0

    def forward(self, **inputs: Any) -> Any:
        result = super().forward(**inputs)
        self.passes += 1
        if self.passes > 1:
            result[self.broken] = float("nan")
        return result


@pytest.mark.parametrize(
    ("broken", "says"),
    [(slice(-1, None), "tokens that were not changed"), (slice(0, 1), "changes the result by nan")],
)
def test_a_result_that_is_no_number_is_no_answer(broken: slice, says: str) -> None:
    with pytest.raises(UnsupportedModel, match=says):
        examine(BreaksAtTheSecondPass(broken), runner())


class Mixing(Toy):
    def step(self, layer: nn.Module, h_TD: torch.Tensor, r_TD: torch.Tensor | None) -> Any:
        output = layer(h_TD, r_TD)
        return output + output.mean(dim=0), None


def test_tokens_that_influence_each_other_say_nothing() -> None:
    with pytest.raises(UnsupportedModel, match="tokens that were not changed gave results"):
        examine(Mixing([Single] * BLOCKS), runner())


def test_a_part_of_a_sum_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_experiment, "get_tensor_model_parallel_world_size", lambda: 2)
    # A stand-in for a second rank, which holds the same or the rest of the sum.
    monkeypatch.setattr(layer_experiment, "tensor_model_parallel_all_gather", lambda x, dim: torch.cat([x, x]))
    assert answers(Toy([Fused] * BLOCKS)) == ["fused"] * BLOCKS
    monkeypatch.setattr(layer_experiment, "tensor_model_parallel_all_gather", lambda x, dim: torch.cat([x, 1 - x]))
    with pytest.raises(UnsupportedModel, match="parts of a sum"):
        examine(Toy([Fused] * BLOCKS), runner())


def pipeline_stage(stage: SimpleNamespace, first: bool, last: bool, held: range) -> Toy:
    stage.is_first_rank, stage.is_last_rank = first, last
    model = Toy([Fused] * BLOCKS)
    model.is_last_stage = last
    for number in set(range(BLOCKS)) - set(held):
        model.layers[number] = PPMissingLayer()
    return model


def test_a_pipeline_stage_answers_for_its_own_layers(stage: SimpleNamespace) -> None:
    blocks, first = examine(pipeline_stage(stage, True, False, range(3)), runner())
    assert [*blocks] == [0, 1, 2]
    # What the last layer of a stage returns is complete in the next one only; it is taken to be like its class.
    assert [layer.convention for layer in first.layers] == ["fused"] * 3
    assert first.layers[-1].swapped is None
    blocks, last = examine(pipeline_stage(stage, False, True, range(3, 5)), runner())
    assert [*blocks] == [3, 4]
    assert [layer.convention for layer in last.layers] == ["fused"] * 2


def test_a_pipeline_stage_of_one_layer_leaves_the_answer_to_the_table(
    stage: SimpleNamespace, in_the_table: Callable[..., None]
) -> None:
    _, findings = examine(pipeline_stage(stage, True, False, range(1)), runner())
    assert [layer.convention for layer in findings.layers] == [None]
    in_the_table(Fused, "fused")
    assert conventions(findings, allow_unproven=False) == ({0: "fused"}, "parity")


@pytest.fixture
def in_the_table(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """`in_the_table(cls, convention)` adds a class to the table."""

    def add(kind: type[Block], convention: Convention) -> None:
        path = f"{kind.__module__}.{kind.__qualname__}"
        monkeypatch.setitem(LAYER_CLASSES, path, LayerClass(path, convention, ()))

    return add


def found(*kinds: type[Block]) -> Findings:
    return examine(Toy([*kinds] * BLOCKS), runner(BLOCKS * len(kinds)))[1]


def test_a_table_that_says_otherwise_is_refused(in_the_table: Callable[..., None]) -> None:
    in_the_table(Fused, "first")
    with pytest.raises(UnsupportedModel, match=r"as 'fused' in the experiment .* and as 'first' in the table"):
        conventions(found(Fused), allow_unproven=True)


def test_a_class_that_is_not_in_the_table_needs_leave(in_the_table: Callable[..., None]) -> None:
    in_the_table(First, "first")
    assert conventions(found(First), allow_unproven=False) == (dict.fromkeys(range(BLOCKS), "first"), "parity")
    mixed = found(First, Single)
    with pytest.raises(UnsupportedModel, match=r"Single, .* never compared .*'single'.*unproven_model='experiment'"):
        conventions(mixed, allow_unproven=False)
    how, proof = conventions(mixed, allow_unproven=True)
    assert (how[0], how[1], proof) == ("first", "single", "experiment")


def test_a_layer_of_which_nobody_speaks_is_refused() -> None:
    layers = tuple(Layer(i, "some.Layer", how, None, None, 1.0) for i, how in enumerate(("single", "first", None)))
    with pytest.raises(UnsupportedModel, match=r"layer 2, .* to another pipeline stage"):
        conventions(Findings(layers, 3, 0.0, 1e-4, 1e-3, 0.0), allow_unproven=True)  # type: ignore[arg-type]
