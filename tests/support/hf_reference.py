"""Steering and readout written directly on `transformers`: one request at a time, forward hooks, no tricks.

Nothing here comes from the package under test. A steering entry is a plain dict::

    {"layer": 2, "vector": (D,) array, "alpha": 5.0, "op": "add", "span": "all"}

where "relative", "keep_norm", "low", "high" and "when" may follow, the last as {"layer", "vector", "above" or "below"}
and perhaps {"over": "prompt"}, which is decided by passes over the prompt alone before anything else,

and entries are applied in the order given, at the output of decoder block `layer`, to the tokens of their span: a
token is a *prompt* token when its position is below the prompt length, a *generated* one otherwise.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.functional import pad
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from tests.support.span_reference import positions
from tests.support.tiny_models import hf_class

Entry = dict[str, Any]


@dataclass(frozen=True)
class ReferenceRun:
    """One request's greedy continuation, or the replay of a given one.

    Attributes:
        tokens: generated ids, the last of which was never fed back.
        choices: the model's best id at every step; `tokens` differ from it only where they were given.
        top2_gaps: logit of the best token minus that of the second best, at every step.
        logprobs: log-probability of each of `tokens`.
        streams: block index -> float32 (T, D) residual stream after the steering of that block, for the prompt and all
            tokens fed back.
        held: for each entry with a condition, the positions of its span at which it held; of one over the prompt,
            whether it held.
    """

    tokens: list[int]
    choices: list[int]
    top2_gaps: list[float]
    logprobs: list[float]
    prompt_len: int
    streams: dict[int, npt.NDArray[np.float32]]
    held: list[set[int] | bool]

    def first(self, count: int) -> ReferenceRun:
        """The same run, ended after its first `count` tokens."""
        return ReferenceRun(
            tokens=self.tokens[:count],
            choices=self.choices[:count],
            top2_gaps=self.top2_gaps[:count],
            logprobs=self.logprobs[:count],
            prompt_len=self.prompt_len,
            streams={layer: stream[: self.prompt_len + count - 1] for layer, stream in self.streams.items()},
            held=self.held,
        )

    def rows(self, layer: int, span: str, skip_first: int = 0) -> npt.NDArray[np.float64]:
        """float64 (t, D): the rows of the stream at `layer` that a readout over `span` averages."""
        return self.streams[layer].astype(np.float64)[self.places(span, skip_first)]

    def places(self, span: str, skip_first: int = 0) -> list[int]:
        """The positions that a readout over `span` covers."""
        held = positions(span, self.prompt_len, len(next(iter(self.streams.values()))))
        return [one for one in sorted(held) if one >= skip_first]

    def mean(self, layer: int, span: str, skip_first: int = 0) -> npt.NDArray[np.float64]:
        """float64 (D,): the mean of `rows`."""
        return self.rows(layer, span, skip_first).mean(axis=0)


def placeholders(config: Any) -> list[int]:
    """The ids of the tokens that stand for pictures and films, by a model's config."""
    names = ("image_token_id", "image_token_index", "video_token_id")
    return [one for one in (getattr(config, name, None) for name in names) if one is not None]


def _steer(hidden: torch.Tensor, entry: Entry) -> torch.Tensor:
    direction = torch.as_tensor(np.asarray(entry["vector"], dtype=np.float32))
    along = (hidden @ direction).unsqueeze(-1)
    lengths = hidden.square().sum(-1, keepdim=True).sqrt()
    unit = lengths if entry.get("relative", False) else torch.ones_like(lengths)
    alpha = entry.get("alpha", 1.0)
    match entry.get("op", "add"):
        case "add":
            steered = hidden + alpha * unit * direction
        case "ablate":
            steered = hidden - alpha * along * direction
        case "set":
            steered = hidden - along * direction + alpha * unit * direction
        case "scale":
            steered = hidden - along * direction + alpha * along * direction
        case "clamp":
            wanted = along
            if entry.get("low") is not None:
                wanted = torch.maximum(wanted, entry["low"] * unit)
            if entry.get("high") is not None:
                wanted = torch.minimum(wanted, entry["high"] * unit)
            steered = hidden - along * direction + wanted * direction
        case other:
            raise ValueError(f"the reference does not know the op {other!r}")
    if entry.get("keep_norm", False):
        steered = steered / steered.square().sum(-1, keepdim=True).sqrt() * lengths
    return steered


def _class_of(model_dir: Path) -> Any:
    """The class that a checkpoint names, which for a multimodal one is not the text model its config stands for."""
    for name in AutoConfig.from_pretrained(model_dir).architectures or ():
        with suppress(KeyError):
            return hf_class(name)
    return AutoModelForCausalLM  # vLLM's own name of a class that transformers knows by the type of its config


def _looks_at_prompt(entry: Entry) -> bool:
    return "when" in entry and entry["when"].get("over") == "prompt"


class Reference:
    """A float32 Hugging Face model with a forward hook on every decoder block of its text model."""

    def __init__(self, model_dir: Path) -> None:
        # Parity is about arithmetic, not about kernels, so compare with the plain attention.
        self.model: PreTrainedModel = (
            _class_of(model_dir).from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager").eval()
        )
        body = self.model.get_decoder()
        body = getattr(body, "model", body)  # Llama 4's decoder is its whole causal model
        # An engine in this process that runs the same class gives it a __call__ for compilation, which reads this.
        body.do_not_compile = True
        blocks = next(getattr(body, name) for name in ("layers", "h", "blocks") if hasattr(body, name))
        # Layers with a recurrence have a convolution before it, and each family keeps such states in its own way: these
        # read the whole text again at every step.
        self._has_cache = not any(isinstance(module, nn.Conv1d) for module in body.modules())
        for layer, block in enumerate(blocks):
            block.register_forward_hook(self._hook_for(layer))
        self.num_layers = len(blocks)
        self._entries: Sequence[Entry] = ()
        self._prompt_len = 0
        self._start = 0
        self._seen: dict[int, list[torch.Tensor]] = {}
        self._steering: Sequence[Entry] = ()
        self._held: defaultdict[int, set[int]] = defaultdict(set)
        self._pictures: dict[tuple[int, ...], Mapping[str, torch.Tensor]] = {}
        self._never: list[int] = []

    def show(self, prompt_ids: Sequence[int], inputs: Mapping[str, torch.Tensor]) -> None:
        """Show the model pictures: from now on it gets `inputs` besides the ids of this prompt.

        Args:
            inputs: what the checkpoint's processor returns for the pictures.
        """
        self._pictures[tuple(prompt_ids)] = inputs
        # Transformers looks for a picture behind each placeholder, so none may be generated.
        self._never = placeholders(self.model.config)
        self._has_cache = False  # beside a cache, some models go on at the positions of the last picture they saw

    def _hook_for(self, layer: int) -> Any:
        def hook(_block: nn.Module, _args: object, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            end = self._start + hidden.shape[1]
            for entry in self._entries:
                if entry["layer"] != layer:
                    continue
                held = positions(entry.get("span", "all"), self._prompt_len, end)
                chosen = torch.tensor([one in held for one in range(self._start, end)])
                if (when := entry.get("when")) is not None:
                    seen = hidden[0] if when["layer"] == layer else self._seen[when["layer"]][-1]
                    along = seen @ torch.as_tensor(when["vector"])
                    chosen &= along > when["above"] if "above" in when else along < when["below"]
                    self._held[id(entry)] |= {self._start + int(one) for one in chosen.nonzero()[:, 0]}
                hidden = torch.where(chosen[None, :, None], _steer(hidden, entry), hidden)
            self._seen.setdefault(layer, []).append(hidden[0].clone())
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook

    def _forward(self, token_ids: Sequence[int], cache: DynamicCache | None) -> torch.Tensor:
        """Feed `token_ids` after what `cache` holds, or as the whole text; float32 (len(token_ids), V) logits."""
        if cache is None:
            self._start, self._seen, self._held = 0, {}, defaultdict(set)
        else:
            self._start = cache.get_seq_length()
        ids = torch.tensor([list(token_ids)])
        shown = self._pictures.get(tuple(token_ids[: self._prompt_len]), {})
        after = len(token_ids) - self._prompt_len
        # The kind of each token, of picture or text, is the processor's; generated tokens are text.
        inputs = {name: pad(one, (0, after)) if name.endswith("token_type_ids") else one for name, one in shown.items()}
        logits = self.model(input_ids=ids, past_key_values=cache, use_cache=cache is not None, **inputs).logits
        return logits[0].float()

    @torch.inference_mode()
    def decided(self, prompt_ids: Sequence[int], steering: Sequence[Entry]) -> list[Entry]:
        """All entries but those whose condition over the prompt fails; without such conditions, which then hold.

        One condition after another, by its layer: what later ones gate does not reach that layer's prompt tokens.
        """
        decided: list[Entry | None] = list(steering)
        over = [(e["when"]["layer"], at) for at, e in enumerate(steering) if _looks_at_prompt(e)]
        for layer, at in sorted(over):
            left = {other for one, other in over if decided[other] is steering[other]}
            self._entries = [e for number, e in enumerate(decided) if e is not None and number not in left]
            self._prompt_len = len(prompt_ids)
            self._forward(prompt_ids, None)
            when = steering[at]["when"]
            mean = float((self._seen[layer][-1] @ torch.as_tensor(when["vector"])).double().mean())
            holds = mean > when["above"] if "above" in when else mean < when["below"]
            decided[at] = steering[at] | {"when": None, "number": at} if holds else None
        return [entry for entry in decided if entry is not None]

    def _begin(self, prompt_ids: Sequence[int], steering: Sequence[Entry]) -> DynamicCache | None:
        self._entries = self.decided(prompt_ids, steering)
        self._steering = steering
        self._prompt_len, self._seen, self._held = len(prompt_ids), {}, defaultdict(set)
        return DynamicCache(config=self.model.config) if self._has_cache else None

    def _finish(self, tokens: list[int], logits: list[torch.Tensor]) -> ReferenceRun:
        among = [row.index_fill(0, torch.tensor(self._never, dtype=torch.long), -torch.inf) for row in logits]
        top2 = [row.topk(2).values for row in among]
        return ReferenceRun(
            tokens=tokens,
            choices=[int(row.argmax()) for row in among],
            top2_gaps=[float(best - second) for best, second in top2],
            logprobs=[float(row.log_softmax(-1)[token]) for row, token in zip(logits, tokens, strict=True)],
            prompt_len=self._prompt_len,
            streams={layer: torch.cat(parts).numpy() for layer, parts in self._seen.items()},
            held=[self._held_by(number) for number, entry in enumerate(self._steering) if "when" in entry],
        )

    def _held_by(self, number: int) -> set[int] | bool:
        if not _looks_at_prompt(self._steering[number]):
            return self._held[id(self._steering[number])]
        return any(one.get("number") == number for one in self._entries)

    @torch.inference_mode()
    def generate(self, prompt_ids: Sequence[int], max_tokens: int, steering: Sequence[Entry] = ()) -> ReferenceRun:
        """Greedy continuation of exactly `max_tokens` tokens (end-of-sequence does not stop it)."""
        cache = self._begin(prompt_ids, steering)
        fed: Sequence[int] = prompt_ids
        tokens: list[int] = []
        logits: list[torch.Tensor] = []
        for _ in range(max_tokens):
            logits.append(self._forward(fed, cache)[-1])
            tokens.append(int(logits[-1].argmax()))
            fed = [*prompt_ids, *tokens] if cache is None else tokens[-1:]
        return self._finish(tokens, logits)

    def confirm(self, prompt_ids: Sequence[int], tokens: Sequence[int], steering: Sequence[Entry] = ()) -> ReferenceRun:
        """`generate` in one pass, from a guess of its tokens, for models in which its many passes take long.

        The run has the reference's own choice after each beginning of `tokens`: it chooses all of them only if
        `generate` gives them. After the first that it does not choose, the run is of no use.
        """
        run = self.replay(prompt_ids, tokens, steering)
        return replace(run, tokens=run.choices)

    @torch.inference_mode()
    def replay(self, prompt_ids: Sequence[int], tokens: Sequence[int], steering: Sequence[Entry] = ()) -> ReferenceRun:
        """The run in which the given `tokens` were generated, for sampled outputs."""
        cache = self._begin(prompt_ids, steering)
        logits = self._forward([*prompt_ids, *tokens[:-1]], cache)
        return self._finish(list(tokens), list(logits[len(prompt_ids) - 1 :]))
