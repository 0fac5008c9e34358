"""lm-eval's model `vllm-steer`: an engine in this process whose generations and log-likelihoods are steered alike.

Importing this module registers the model; `vllm-steer lm-eval` does so before it starts lm-eval's command line. lm-eval
has no entry points for models of other packages.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    maybe_truncate,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows

from batch_jobs.config.entry_text import parse_entries
from batch_jobs.engine.scored_spans import scored_entries
from batch_jobs.engine.start_engine import model_location, model_revision, set_engine_environment
from batch_jobs.harnesses.lm_eval_settings import STEER_SETTINGS, HookSettings, check_entries, refuse_steering_in
from vllm_steer import Direction, Steering, __version__
from vllm_steer.errors import SettingsError

_STAMP = "vllm-steer"
"""Key of a response cache that names the model and steering whose answers it holds."""


@dataclass(frozen=True)
class _Scored:
    """A text to score.

    Attributes:
        token_ids: context and continuation.
        scored: number of tokens of the continuation.
        context_len: tokens of the prompt in the generation that the continuation belongs to.
        start: see `scored_entries`.
    """

    token_ids: list[int]
    scored: int
    context_len: int
    start: int = 0


@register_model("vllm-steer")
class SteeredLM(TemplateLM):
    """A steered vLLM engine as lm-eval knows models.

    All requests have the same steering, whether they generate or score. `steer` changes it between two evaluations, so
    one engine serves a sweep.

    Args:
        pretrained: hub id, local folder or `demo-model`.
        layers: decoder blocks to hook; by default those of the directions.
        directions: direction file or files.
        steering: the entries: text such as `kind:8@16`, JSON, or objects; by default the model is not steered.
        span: the span of entries without one of their own.
        dtype, max_model_len, seed: as in vLLM; `max_length` is another name of `max_model_len`.
        max_gen_toks: most tokens of a generation whose task does not say it.
        add_bos_token: put the tokenizer's special tokens before each text; by default as the tokenizer does.
        prefix_token_id: the token before a text that is scored without a context.
        chat_template_args: variables of the chat template.
        show_progress: show vLLM's bars, beside lm-eval's own.
        kv_cache_gib: memory for the KV cache.
        batch_size, device: taken because lm-eval always gives them, and not used: vLLM forms batches itself, and its
            build and ``CUDA_VISIBLE_DEVICES`` decide the device.
        engine: any other argument of `vllm.LLM`, and the settings of `steer_config` in `STEER_SETTINGS`.

    Raises:
        SettingsError: an argument is empty or of another form.
        SteerError: directions or entries cannot be used.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        layers: object = None,
        directions: object = None,
        steering: object = None,
        span: object = None,
        dtype: str = "auto",
        max_model_len: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 1234,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        chat_template_args: dict[str, Any] | None = None,
        show_progress: bool = True,
        kv_cache_gib: float | None = None,
        batch_size: object = None,
        max_batch_size: object = None,
        device: object = None,
        **engine: Any,
    ) -> None:
        super().__init__()
        if max_batch_size is not None:
            raise SettingsError(f"max_batch_size is {max_batch_size!r}; allowed here: max_num_seqs. Use that.")
        if not isinstance(pretrained, str) or not pretrained:
            raise SettingsError(f"pretrained is {pretrained!r}; allowed: a hub id, a folder or demo-model. Give one.")
        if max_length is not None and max_model_len is not None:
            raise SettingsError("max_length and max_model_len were given; allowed: one of them. Leave the other out.")
        settings = HookSettings.parse(
            layers=layers,
            directions=directions,
            steering=steering,
            span=span,
            steer={name: engine.pop(name) for name in STEER_SETTINGS if name in engine},
        )
        if kv_cache_gib is not None:
            engine["kv_cache_memory_bytes"] = int(kv_cache_gib * 2**30)
        set_engine_environment()
        from vllm_steer import load_llm, register_directions

        self._layers, self._directions, self._entries = settings.layers, list(settings.directions), settings.entries
        self._location = model_location(pretrained)
        self.engine = load_llm(
            self._location,
            layers=settings.layers,
            steer=settings.steer,
            dtype=dtype,
            seed=seed,
            max_model_len=max_model_len or max_length,
            **engine,
        )
        register_directions(self.engine, self._directions)
        self.tokenizer = self.engine.get_tokenizer()
        self.max_length = int(self.engine.model_config.max_model_len)
        self.max_gen_toks = max_gen_toks
        self._add_bos_token = add_bos_token
        self._prefix_token_id = prefix_token_id
        self._chat_template_args = chat_template_args or {}
        self._show_progress = show_progress

    def steer(self, steering: object = None, span: str = "all") -> None:
        """Steer all later requests in another way; None leaves the model unsteered.

        Raises:
            SettingsError: `steering` is empty or of another form, or lm-eval keeps answers of another steering.
            SteerError: the engine cannot apply it.
        """
        entries = () if steering is None else parse_entries(steering, where="steering", span=span)
        self._entries = check_entries(entries, self._directions, self._layers)
        self._check_cache()

    def register(self, directions: Sequence[Direction]) -> None:
        """Register further directions, or replace those of the same name and layer.

        Raises:
            SteerError: see `vllm_steer.register_directions`.
        """
        from vllm_steer import register_directions

        register_directions(self.engine, directions)
        new = {one.key for one in directions}
        self._directions = [one for one in self._directions if one.key not in new] + list(directions)

    def close(self) -> None:
        """Shut the engine down."""
        from vllm_steer import close_llm

        close_llm(self.engine)
        del self.engine

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into the `config` of its results."""
        named = {name for entry in self._entries for name in entry.names}
        return {
            "steering": [entry.to_json() for entry in self._entries],
            "direction_hashes": {one.key: one.content_hash for one in self._directions if one.name in named},
            "model_revision": model_revision(self._location, self.engine),
            "vllm_steer_version": __version__,
        }

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Take lm-eval's response cache (`use_cache`), whose keys hold neither model nor steering.

        Raises:
            SettingsError: it holds answers of another model or steering.
        """
        super().set_cache_hook(cache_hook)
        self._check_cache()

    def _check_cache(self) -> None:
        kept = self.cache_hook.dbdict
        if kept is None:
            return
        told = json.dumps([self._location, self.get_model_info()], sort_keys=True)
        own = hashlib.sha256(told.encode()).hexdigest()
        if len(kept) == 0:
            kept[_STAMP] = own
        if kept.get(_STAMP) != own:
            raise SettingsError(
                "use_cache names a file with the answers of another model or steering, which lm-eval would take for "
                "these; allowed: a file for each of them. Give another one."
            )

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that is scored without a context."""
        if self._prefix_token_id is not None:
            return self._prefix_token_id
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in lm-eval's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **self._chat_template_args,
        )
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The tokens of a text. One that begins with the first token of all texts already gets no second one."""
        if not string:
            return []
        special = self._add_bos_token if add_special_tokens is None else add_special_tokens
        if has_bos_prefix(string, self.tokenizer.decode([self.prefix_token_id])):
            special = False
        own = kwargs if special is None else {**kwargs, "add_special_tokens": special}
        ids: list[int] = self.tokenizer(string, **own).input_ids
        return ids

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The steered continuation of each context.

        Raises:
            SettingsError: a task's generation arguments steer, or vLLM does not know one.
            SteerError: the engine cannot apply the steering.
        """
        prompts, params, stops = [], [], []
        for context, gen_kwargs in (request.args for request in requests):
            sampling, until, max_tokens = self._sampling(gen_kwargs)
            token_ids, max_tokens = maybe_truncate(
                self.tok_encode(context), max_gen_toks=max_tokens, max_model_len=self.max_length
            )
            prompts.append(token_ids)
            params.append(self._params({**sampling, "stop": until, "max_tokens": max_tokens}, self._entries))
            stops.append(until)
        texts = []
        for request, output, until in zip(requests, self._run(prompts, params, disable_tqdm), stops, strict=True):
            text = postprocess_generated_text(output.outputs[0].text, until, None)
            self.cache_hook.add_partial("generate_until", request.args, text)
            texts.append(text)
        return texts

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text, as generated from nothing but the prefix token.

        Raises:
            SteerError: the engine cannot apply the steering.
        """
        windows, counts = [], []
        for (text,) in (request.args for request in requests):
            own = list(self._windows(self.tok_encode(text)))
            windows += own
            counts.append(len(own))
        scores = iter(self._scores(windows, disable_tqdm))
        totals = []
        for request, count in zip(requests, counts, strict=True):
            total = sum(next(scores)[0] for _ in range(count))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
            totals.append(total)
        return totals

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        texts = []
        for _, context, continuation in requests:
            # one token of each request is generated, because vLLM asks for it
            context = context[max(0, len(context) + len(continuation) + 1 - self.max_length) :]
            if not context or len(context) + len(continuation) >= self.max_length:
                raise SettingsError(
                    f"a continuation has {len(continuation)} tokens and max_model_len is {self.max_length}; allowed: "
                    f"{self.max_length - 2} tokens, after one of its context. Raise max_model_len."
                )
            texts.append(_Scored(context + continuation, len(continuation), len(context)))
        scores = self._scores(texts, disable_tqdm)
        for (pair, _, _), score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, score)
        return scores

    def _windows(self, token_ids: list[int]) -> Iterator[_Scored]:
        """The parts in which a long text is scored. The text is generated from the prefix token, so that is all of its
        prompt, also for later parts."""
        windows = get_rolling_token_windows(
            token_list=token_ids, prefix_token=self.prefix_token_id, max_seq_len=self.max_length - 2, context_len=1
        )
        end = 0
        for sent, scored in windows:
            end += len(scored)
            yield _Scored([*sent, scored[-1]], len(scored), context_len=1, start=end - len(sent))

    def _scores(self, texts: Sequence[_Scored], disable_tqdm: bool) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation, whether each of its tokens is the most likely one) of each text."""
        scoring = {"temperature": 0.0, "max_tokens": 1, "prompt_logprobs": 1, "detokenize": False}
        params = [
            self._params(
                scoring, scored_entries(self._entries, text.context_len, len(text.token_ids), start=text.start)
            )
            for text in texts
        ]
        scores = []
        outputs = self._run([text.token_ids for text in texts], params, disable_tqdm)
        for text, output in zip(texts, outputs, strict=True):
            total, is_greedy = 0.0, True
            for token, told in list(zip(text.token_ids, output.prompt_logprobs, strict=True))[-text.scored :]:
                total += told[token].logprob
                is_greedy &= told[token].logprob >= max(one.logprob for one in told.values())
            scores.append((total, is_greedy))
        return scores

    def _sampling(self, gen_kwargs: dict[str, Any]) -> tuple[dict[str, Any], list[str], int]:
        """A task's generation arguments: fields of vLLM's sampling parameters, texts that end it, most tokens."""
        refuse_steering_in(gen_kwargs)
        known: dict[str, Any] = dict(normalize_gen_kwargs(gen_kwargs, default_max_gen_toks=self.max_gen_toks))
        until = handle_stop_sequences(known.pop("until", None), eos=self.tokenizer.decode([self.eot_token_id]))
        max_tokens = int(known.pop("max_gen_toks"))
        if not known.pop("do_sample", False):
            known["temperature"] = 0.0  # lm-eval 0.4.13 leaves it unset where a task gives neither, and vLLM's is 1
        # stop texts may be special tokens
        return {"skip_special_tokens": False, "spaces_between_special_tokens": False, **known}, until, max_tokens

    def _params(self, fields: dict[str, Any], entries: Sequence[Steering]) -> Any:
        from vllm_steer import steered

        try:
            return steered(fields, list(entries))
        except TypeError as error:
            raise SettingsError(
                f"gen_kwargs has a field that vLLM's sampling parameters lack ({error}); allowed: theirs. Leave it out."
            ) from None

    def _run(self, prompts: Sequence[list[int]], params: Sequence[Any], disable_tqdm: bool) -> Sequence[Any]:
        if not prompts:
            return []
        with _nothing_left_behind(self.engine):
            outputs: Sequence[Any] = self.engine.generate(
                [{"prompt_token_ids": token_ids} for token_ids in prompts],
                list(params),
                use_tqdm=self._show_progress and not disable_tqdm,
            )
        for output in outputs:
            if output.outputs[0].finish_reason == "error":
                raise SettingsError(
                    f"a request ended with an error: {output.outputs[0].stop_reason}. Use a smaller alpha."
                )
        return outputs


@contextmanager
def _nothing_left_behind(engine: Any) -> Iterator[None]:
    """After a refusal, abort the requests that were accepted before it."""
    from vllm_steer import abandon_requests

    try:
        yield
    except BaseException:
        abandon_requests(engine)
        raise
