"""Steer the same prompts along one direction in four ways: the whole answer, a floor, on a condition, with a stop.

    python examples/ways_to_steer.py demo-model
    python examples/ways_to_steer.py demo-model --figure ways.svg

"empathy" is extracted from the bundled pairs of the study, "distress" from the prompts below, at an earlier layer.
Every answer is greedy and traced: the projection of each of its tokens onto "empathy", after the steering.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from vllm import LLM, SamplingParams

from batch_jobs.engine.start_engine import model_location
from batch_jobs.report.figures.sheet import Drawing, Sheet
from batch_jobs.report.figures.style import SERIES, figure_look
from batch_jobs.texts.contrastive import load_pairs
from vllm_steer import (
    Readout,
    ReadoutResult,
    Steering,
    Watch,
    When,
    collect_readouts,
    extract_directions,
    register_directions,
    steer_config,
    steered,
)

# From these "distress" and its bound are made. They are not asked below.
DISTRESSED = (
    "My father died last week and I cannot stop crying.",
    "I lost my job today and I am terrified that we will lose the house.",
    "Nobody has called me for months. I feel so alone.",
    "The doctor said that it may be cancer and I am scared.",
    "My best friend betrayed me and it hurts so much.",
    "I failed again. I am worthless and exhausted.",
    "My little boy is in hospital and I am shaking.",
    "I panic every morning and I do not know how to go on.",
)
NEUTRAL = (
    "Which oil should I use for the chain of my bicycle?",
    "How many days does the month of March have?",
    "I want to paint the kitchen and need a list of tools.",
    "Explain how a refrigerator works.",
    "My train leaves at nine. Which platform is it?",
    "Give me the steps to plant tomatoes in a pot.",
    "What is the difference between a comet and an asteroid?",
    "Write a short note that the meeting moves to Tuesday.",
)
PROMPTS = {
    "distressed": (
        "My dog was run over this morning and I feel broken.",
        "My husband left me and I am so afraid of the nights.",
        "I was humiliated in front of everyone and I want to disappear.",
        "My mother does not recognise me any more and it breaks my heart.",
    ),
    "neutral": (
        "How do I boil an egg so that the yolk stays soft?",
        "Which planets have rings?",
        "Suggest a layout for a small vegetable garden.",
        "What does a carburettor do?",
    ),
}


def asked(*texts: str) -> list[list[dict[str, str]]]:
    """Each text as a chat of one user message."""
    return [[{"role": "user", "content": text}] for text in texts]


def register_distress(llm: LLM, layer: int) -> float:
    """Register the direction "distress"; the bound between the two sides that it was made from."""
    register_directions(
        llm, extract_directions(llm, asked(*DISTRESSED), asked(*NEUTRAL), [layer], name="distress", skip_first=1)
    )
    distressed, neutral = distress_of(llm, DISTRESSED, layer), distress_of(llm, NEUTRAL, layer)
    print(f"distress of its own prompts: from {min(distressed):.2f}, neutral ones up to {max(neutral):.2f}")
    bound = (min(distressed) + max(neutral)) / 2
    print(f"bound: {bound:.2f}")
    return bound


def distress_of(llm: LLM, prompts: Sequence[str], layer: int) -> list[float]:
    """The mean projection onto "distress" over each prompt, which is what ``When(over="prompt")`` compares."""
    readout = Readout([layer], span="prompt", project=["distress"], vectors=False)
    outputs = llm.chat(asked(*prompts), steered(SamplingParams(max_tokens=1), readout=readout), use_tqdm=False)
    return [reads[0].projections["distress"][layer] for reads in collect_readouts(llm, outputs)]


def figure(traces: dict[str, dict[str, list[ReadoutResult]]]) -> Drawing:
    """One panel a way: the mean projection of the answers that still run, token by token."""
    with figure_look():
        sheet = Sheet(len(traces), columns=3)
        for axes, (way, of_prompts) in zip(sheet.panels, traces.items(), strict=True):
            sheet.title(axes, way)
            for style, (kind, results) in zip(SERIES, of_prompts.items(), strict=False):
                longest = max(result.num_tokens for result in results)
                # blocks of eight tokens, so that the panel shows the level and not each word
                middles, levels = [], []
                for start in range(0, longest, 8):
                    values = np.concatenate([result.trace["empathy"][start : start + 8] for result in results])
                    middles.append(start + 3.5)
                    levels.append(float(values.mean()))
                sheet.line(axes, f"{kind} prompts", middles, levels, style)
            axes.set_xlabel("token of the answer")
        for axes in sheet.panels:
            axes.set_ylabel("projection onto empathy")
        lows, highs = zip(*(axes.get_ylim() for axes in sheet.panels), strict=True)
        for axes in sheet.panels:
            axes.set_ylim(min(lows), max(highs))
        return sheet.render()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id, local folder or demo-model")
    parser.add_argument("--layer", type=int, default=16, help="layer of empathy")
    parser.add_argument("--earlier-layer", type=int, default=10, help="layer of distress")
    parser.add_argument("--alpha", type=float, default=28.0)
    parser.add_argument("--floor", type=float, default=10.0, help="lowest projection that the clamp leaves")
    parser.add_argument("--stop-above", type=float, default=60.0, help="projection that ends an answer")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--figure", type=Path, help="an SVG file to draw")
    given = parser.parse_args()

    llm = LLM(
        model_location(given.model),
        dtype="float32",
        max_model_len=512,
        additional_config=steer_config(layers=[given.earlier_layer, given.layer]),
        kv_cache_memory_bytes=1 << 30,
        enforce_eager=True,
    )
    pairs = load_pairs(None)
    empathy = extract_directions(
        llm,
        [pair.positive for pair in pairs],
        [pair.negative for pair in pairs],
        [given.layer],
        name="empathy",
        skip_first=1,
    )
    register_directions(llm, empathy)
    bound = register_distress(llm, given.earlier_layer)
    for kind, prompts in PROMPTS.items():
        print(
            f"distress of the {kind} prompts:",
            *(f"{value:.2f}" for value in distress_of(llm, prompts, given.earlier_layer)),
        )

    response = Steering("empathy", given.alpha, span="response")
    floor = Steering("empathy", op="clamp", low=given.floor, span="response")
    if_distressed = replace(response, when=When("distress", above=bound, over="prompt"))
    trace = Readout([given.layer], span="response", trace=["empathy"], vectors=False)
    stop = replace(trace, stop=Watch("empathy", above=given.stop_above, patience=3))
    ways = {
        "plain": ([], trace),
        "response": ([response], trace),
        "clamp": ([floor], trace),
        "conditional": ([if_distressed], trace),
        "stop": ([response], stop),
    }

    # A prompt that is partly taken from the prefix cache is computed in other shapes, which gives other last bits.
    sampling = SamplingParams(max_tokens=given.max_tokens, temperature=0, skip_reading_prefix_cache=True)
    texts: dict[str, dict[str, list[str]]] = {}
    traces: dict[str, dict[str, list[ReadoutResult]]] = {}
    for way, (steering, readout) in ways.items():
        for kind, prompts in PROMPTS.items():
            outputs = llm.chat(asked(*prompts), steered(sampling, steering, readout), use_tqdm=False)
            results = [reads[0] for reads in collect_readouts(llm, outputs)]
            texts.setdefault(way, {})[kind] = [output.outputs[0].text for output in outputs]
            traces.setdefault(way, {})[kind] = results
            mean = np.mean([value for result in results for value in result.trace["empathy"]])
            unchanged = sum(
                text == plain and np.array_equal(result.trace["empathy"], before.trace["empathy"])
                for text, plain, result, before in zip(
                    texts[way][kind], texts["plain"][kind], results, traces["plain"][kind], strict=True
                )
            )
            stopped = sum(result.stopped is not None for result in results)
            print(f"{way:12s} {kind:11s} mean {mean:7.2f}  as plain {unchanged}/{len(prompts)}  stopped {stopped}")
            print(f"  {texts[way][kind][0]!r}")
    if given.figure is not None:
        given.figure.write_text(figure(traces).svg, encoding="utf-8")


if __name__ == "__main__":
    main()
