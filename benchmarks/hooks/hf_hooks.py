"""Steering and reading with Hugging Face `transformers` and forward hooks, as in research code, written with care.

Uses `torch.inference_mode` and the model's own (fused) attention, without copies and without Python per token beyond
that of `generate`. It does not use `torch.compile`: hooks break its graphs, and the research code does without it.

Shape suffixes: B rows of a batch, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import AutoModelForCausalLM

Means = Mapping[int, npt.NDArray[np.float32]]
"""Layer -> (D,) mean of that block's output over the tokens of a text."""


class HookedModel:
    """A Hugging Face causal language model whose decoder blocks hooks can steer and read.

    Args:
        model: folder of a checkpoint.
        dtype: of its weights and arithmetic.
        device: "cpu" or "cuda".
    """

    def __init__(self, model: str, dtype: torch.dtype, device: str) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, device_map=device).eval()
        self._body = self._model.get_decoder()
        # Once loaded, vLLM gives some transformers classes a __call__ that reads this attribute.
        self._body.do_not_compile = True
        self._device = device

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        alphas: Sequence[float],
        direction_D: npt.NDArray[np.float32],
        layer: int,
        *,
        num_tokens: int,
        use_cache: bool = True,
    ) -> int:
        """Sample `num_tokens` tokens for each prompt, all as one batch; returns the number of new tokens.

        Each row's α·direction is added to every token at the output of block `layer`. Rows of one batch may differ in
        α; prompts of different lengths are padded on the left.
        """
        tokens_BT, mask_BT = self._padded(prompts, on_the_left=True)
        with self._steered(alphas, direction_D, layer):
            output_BT = self._model.generate(
                input_ids=tokens_BT,
                attention_mask=mask_BT,
                do_sample=True,
                temperature=0.7,
                top_k=0,
                top_p=1.0,
                min_new_tokens=num_tokens,
                max_new_tokens=num_tokens,
                use_cache=use_cache,
                pad_token_id=0,
            )
        num_new: int = output_BT.cpu()[:, tokens_BT.shape[1] :].numel()  # the copy to the host waits for the device
        return num_new

    @torch.inference_mode()
    def read_alone(self, prompt: Sequence[int], layers: Sequence[int]) -> Means:
        """Read one text the paper's way: run the whole model, keep all hidden states, and take the means afterwards."""
        tokens_BT = torch.tensor([list(prompt)], device=self._device)
        states = self._model(input_ids=tokens_BT, output_hidden_states=True).hidden_states
        # hidden_states[k] is the output of block k-1, except that the last one has passed the final norm.
        return {layer: states[layer + 1][0].float().mean(dim=0).cpu().numpy() for layer in layers}

    @torch.inference_mode()
    def read_batch(
        self,
        prompts: Sequence[Sequence[int]],
        layers: Sequence[int],
        *,
        alphas: Sequence[float] = (),
        direction_D: npt.NDArray[np.float32] | None = None,
        steered_layer: int = 0,
    ) -> list[Means]:
        """Read texts as one padded batch: hooks keep the masked means at `layers`, without head and KV cache.

        With a direction, α·direction is added at the output of block `steered_layer`, and reading comes after it.
        """
        tokens_BT, mask_BT = self._padded(prompts, on_the_left=False)
        weights_BT = mask_BT / mask_BT.sum(dim=1, keepdim=True)
        means: dict[int, npt.NDArray[np.float32]] = {}

        def reader(layer: int) -> Any:
            def read(_block: nn.Module, _arguments: object, output: Any) -> None:
                means[layer] = torch.einsum("btd,bt->bd", _hidden(output).float(), weights_BT).cpu().numpy()

            return read

        with self._steered(alphas, direction_D, steered_layer):  # first, since hooks run in the order of registration
            handles = [self._body.layers[layer].register_forward_hook(reader(layer)) for layer in layers]
            try:
                self._body(input_ids=tokens_BT, attention_mask=mask_BT, use_cache=False)
            finally:
                for handle in handles:
                    handle.remove()
        return [{layer: means[layer][row] for layer in layers} for row in range(len(prompts))]

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """Compute in float32 inside the block, with the same weights."""
        own = self._model.dtype
        self._model.float()
        try:
            yield
        finally:
            self._model.to(own)  # restores the same bits

    @contextmanager
    def _steered(
        self, alphas: Sequence[float], direction_D: npt.NDArray[np.float32] | None, layer: int
    ) -> Iterator[None]:
        if direction_D is None:
            yield
            return
        delta_B1D = torch.outer(torch.tensor(alphas), torch.as_tensor(direction_D)).unsqueeze(1)
        delta_B1D = delta_B1D.to(self._device, self._model.dtype)

        def steer(_block: nn.Module, _arguments: object, output: Any) -> Any:
            _hidden(output).add_(delta_B1D)
            return output

        handle = self._body.layers[layer].register_forward_hook(steer)
        try:
            yield
        finally:
            handle.remove()

    def _padded(self, prompts: Sequence[Sequence[int]], *, on_the_left: bool) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(map(len, prompts))
        tokens_BT = torch.zeros((len(prompts), longest), dtype=torch.int64)
        mask_BT = torch.zeros_like(tokens_BT)
        for row, prompt in enumerate(prompts):
            place = slice(longest - len(prompt), None) if on_the_left else slice(len(prompt))
            tokens_BT[row, place] = torch.tensor(list(prompt))
            mask_BT[row, place] = 1
        return tokens_BT.to(self._device), mask_BT.to(self._device)


def _hidden(output: Any) -> torch.Tensor:
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
