"""Records as Markdown tables, with one function per kind of record."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.harness.rounds import interval
from benchmarks.report.labels import HOOKS, WAYS

Record = Mapping[str, Any]
OP_DIMENSION = 3584  # Qwen2.5-7B's hidden size, which both forms of the benchmark measure


def overhead(measured: Record) -> str:
    """Throughput, latencies, start-up and memory, for ``overhead.json``."""
    setup, generated = measured["setup"], measured["generated"]
    names, ways = _ways(measured)
    largest = "64" if "64" in generated else max(generated, key=int)
    clocks = [generated[largest][clock] for clock in ("first_token", "inter_token")]
    latencies = [["plugin absent, ms", *(f"{1000 * figures['absent']['median']:.1f}" for figures in clocks)]]
    latencies += [[names[way], *(ratio(figures[way]) for figures in clocks)] for way in ways]
    return "\n\n".join([
        f"**Throughput against plain vLLM** ({setup['model']}, "
        f"{'random weights, ' if setup['load_format'] == 'dummy' else ''}{setup['dtype']}, "
        f"{'eager' if setup['eager'] else 'compiled'}; {_medians(measured)} and where that median lies with 95 % "
        "confidence; above 1 is faster than without the plugin):",
        _throughput(measured),
        f"**Time to first token and between tokens, {largest} requests at once** (above 1 is slower):",
        table(["requests", "first token", "between tokens"], latencies),
        "**Start-up and memory:**",
        _engines(measured),
        source(measured),
    ])  # fmt: skip


def overhead_one_start(measured: Record) -> str:
    """Throughput and engines, for ``overhead-one-start.json``."""
    return _more_of_it(
        "Before the op was compiled, at other numbers of requests too, in one life of each engine", measured
    )


def overhead_before(measured: Record) -> str:
    """Throughput and engines, for ``overhead-before.json``."""
    return _more_of_it(
        "The same before readouts were taken many at once and before the host left out launches that nothing asks for, "
        "at other numbers of requests too",
        measured,
    )


def _more_of_it(title: str, measured: Record) -> str:
    return "\n\n".join([
        f"**{title}** ({_medians(measured)}):", _throughput(measured), _engines(measured), source(measured)
    ])  # fmt: skip


def _ways(measured: Record) -> tuple[dict[str, str], list[str]]:
    """The labels of all ways, and those that were compared with plain vLLM."""
    layers = len(measured["setup"]["layers"])
    names = {name: label.format(layers=layers) for name, label in WAYS.items()}
    return names, [name for name in names if name != "absent" and name in measured["setup"]["ways"]]


def _columns(measured: Record) -> list[tuple[str, Mapping[str, Any]]]:
    """Title and throughput of every column."""
    generated, prefill = measured["generated"], measured["prefill"]
    return [
        *(
            (f"{n} × {generated[n]['max_tokens']} tokens", generated[n]["throughput"])
            for n in sorted(generated, key=int)
        ),
        *(
            (f"prefill, {n} × {measured['setup']['prefill_tokens']}", prefill[n]["throughput"])
            for n in sorted(prefill, key=int)
        ),
    ]


def _throughput(measured: Record) -> str:
    names, ways = _ways(measured)
    columns = _columns(measured)
    rows = [["plugin absent, tokens/s", *(f"{figures['absent']['median']:.0f}" for _, figures in columns)]]
    rows += [[names[way], *(ratio(figures[way]) for _, figures in columns)] for way in ways]
    return table(["requests", *(title for title, _ in columns)], rows)


def _engines(measured: Record) -> str:
    """Start-up time and memory of each engine."""
    names, _ = _ways(measured)
    engines = [
        [
            names[{"hooked": "idle", "all hooked": "idle, all layers"}.get(name, name)],
            "–" if engine["start_seconds"] is None else f"{engine['start_seconds']:.0f}",
            " / ".join(f"{engine['memory_gib'][kind]:.2f}" for kind in engine["memory_gib"]),
        ]
        for name, engine in measured["engines"].items()
    ]  # fmt: skip
    memory = " / ".join(next(iter(measured["engines"].values()))["memory_gib"])
    return table(["engine", "start, s", f"memory, GiB ({memory})"], engines)


def _medians(measured: Record) -> str:
    """Says over what the medians are taken."""
    setup, (_, ways) = measured["setup"], _ways(measured)
    counts = " / ".join(str(len(figures[ways[0]]["ratios"])) for _, figures in _columns(measured))
    if setup["starts"] == 1:
        return f"median of {counts} rounds"
    of_batch = dict(zip(setup["batches"], setup["rounds"], strict=True))
    rounds = [of_batch[batch] for batch in sorted(of_batch)] + [setup["prefill_rounds"]] * len(setup["prefill_batches"])
    each = " / ".join(map(str, rounds))
    return f"median over {counts} starts of all engines, each step the median of {each} rounds,"


def hooks(measured: Record) -> str:
    """Speed of the grid and of extraction against hooks, for ``hf-hooks.json``."""
    parts, form = [], measured["setup"]["form"]
    sizes = {
        "grid": f"grid: 15 conditions × 5 samples × {form['num_tokens']} tokens",
        "extraction": f"extraction: {form['texts']} texts × 5 layers",
    }
    for work, unit in (("grid", "tokens/s"), ("extraction", "texts/s")):
        to_paper, to_batched = measured[work]["figures"], measured[work]["figures_to_batched"]
        rows = [
            [HOOKS[way], f"{to_paper[way]['median']:.1f}", times(to_paper[way]), times(to_batched[way])]
            for way in HOOKS
            if way in to_paper
        ]
        header = [sizes[work], unit, "against the paper's way", "against batched hooks"]
        parts.append(table(header, rows))
    title = f"**Against forward hooks in Hugging Face transformers**, medians of {form['rounds']} rounds:"
    return "\n\n".join([title, *parts, source(measured)])


def op(measured: Record) -> str:
    """Time of one call of the op against a copy, for ``op.json``."""
    steps = [step for step in measured["steps"] if step["setting"]["dimension"] == OP_DIMENSION]
    ways = [way for way in steps[0]["figures"] if way != "copy"]
    rows = []
    for step in steps:
        found = step["figures"]
        row = [step["name"], f"{step['bytes'] / 1e6:.3f}", f"{1e6 * found['copy']['seconds']:.1f}"]
        rows.append([*row, *(f"{1e6 * found[way]['seconds']:.1f}" for way in ways)])
    return "\n\n".join([
        f"**The custom op alone**, hidden size {OP_DIMENSION}, microseconds a call beside those of a copy of as many "
        "bytes (other sizes are in the record):",
        table(["one layer's call", "MB that have to move", "copy", *ways], rows),
        source(measured),
    ])  # fmt: skip


def scale(measured: Record) -> str:
    """Speed by number of specs, of directions and of engines, and the driver's cost, for the records of its parts."""
    parts = ["**Scale** (a tiny random model, so that a cost of the plugin cannot hide behind the model's):"]
    for part, title in (("specs", "different specs in flight"), ("registered", "directions in the bank")):
        if part in measured:
            parts.append(_flatness(title, measured[part]))
    if "actors" in measured:
        actors = measured["actors"]["figures"].items()
        runs = [[name, f"{figure['median']:.1f}", times(figure)] for name, figure in actors]
        parts.append(table(["Ray actors, one core each", "rows/s", "against one"], runs))
    if "driver" in measured:
        driver = measured["driver"]
        parts.append(
            f"The driver takes {driver['driver_microseconds_a_row']:.0f} µs a row. {driver['gpus']} GPUs at "
            f"{driver['assumed_rows_a_second_a_gpu']:g} rows/s each, which is assumed, would keep its core busy for "
            f"{driver['driver_busy_share']:.1%} of the time."
        )
    return "\n\n".join([*parts, source(measured)])


def _flatness(title: str, part: Mapping[str, Any]) -> str:
    """A part of ``scale.json`` in which a number grows and nothing should become slower."""
    walls, admission, memory = part["figures_by_wall"], part["admission_microseconds"], part["rss_mib"]
    rows = [
        [
            f"{int(name):,}",
            f"{figure['median']:.0f}",
            ratio(figure, 3),
            ratio(walls[name], 3),
            f"{admission[name]:.1f} µs",
            f"{memory[name]:,.0f} MiB",
        ]
        for name, figure in part["figures"].items()
    ]
    return table([title, "requests per CPU s", "against one", "by wall time", "admission", "memory"], rows)


def peers(measured: Record) -> str:
    """The fate and the throughput of every peer, for ``peers.json``."""
    rows = []
    for peer in measured["peers"]:
        figures = peer["figures"] or {}
        ratios = [ratio(figures[way]) if way in figures else "–" for way in (peer["peer"], "vllm-steer")]
        rows.append([peer["peer"], _came_of(peer), *ratios])
    return "\n\n".join([
        "**Peers beside this vLLM**, throughput against plain vLLM:",
        table(["peer", "what came of it", "the peer", "vllm-steer, same work"], rows),
        source(measured),
    ])  # fmt: skip


def cached(measured: Record) -> str:
    """The cost of readouts on a cached prompt, for ``cached.json``."""
    rows = [
        [name, f"{1000 * one['median']:.0f} ms", ratio(one, 3), "–" if one["goal"] is None else f"≤ {one['goal']}"]
        for name, one in measured["ways"].items()
    ]
    tokens = max(one["cached_tokens"] for one in measured["ways"].values())
    return "\n\n".join([
        f"**Readouts on a prompt with {tokens:,} cached tokens**, time of a request against a plain one:",
        table(["request", "time", "ratio", "goal"], rows),
        source(measured),
    ])  # fmt: skip


def admission(measured: Record) -> str:
    """What requests cost the host beyond plain ones, for ``admission.json``."""
    kinds: Mapping[str, Any] = measured["stages"]
    stages = dict.fromkeys(stage for own in kinds.values() for stage in own)
    rows = [
        [stage, *(f"{own[stage]['microseconds']:.1f}" if stage in own else "–" for own in kinds.values())]
        for stage in stages
    ]
    return "\n\n".join([
        "**Host work of one request beyond a plain one**, CPU microseconds of each stage:",
        table(["stage", *kinds], rows),
        source(measured),
    ])  # fmt: skip


def capture(measured: Record) -> str:
    """Throughput of reading rows and means, for ``capture.json``."""
    rows = [[name, f"{one['median']:.0f}", ratio(one, 3)] for name, one in measured["ways"].items()]
    setup = measured["setup"]
    return "\n\n".join([
        f"**Capture of {setup['tokens']:,} tokens at {len(setup['layers'])} layers**, prompt tokens per second:",
        table(["way", "tokens/s", "ratio to mean"], rows),
        source(measured),
    ])  # fmt: skip


def builds(measured: Record) -> str:
    """Two builds of the package at the same work, for ``builds.json``."""
    names = [name for name in next(iter(measured["kinds"].values())) if name != "before"]
    rows = [[kind, *(ratio(ways[name], 3) for name in names)] for kind, ways in measured["kinds"].items()]
    setup = measured["setup"]
    return "\n\n".join([
        f"**This build against that of {setup['before']}**, throughput of the same work at {len(setup['layers'])} "
        "layers, in one run; above 1 is faster:",
        table(["work", *names], rows),
        source(measured),
    ])  # fmt: skip


def server(measured: Record) -> str:
    """A server under load, for ``server.json``."""
    found, setup = measured["figures"], measured["setup"]
    refused = sum(count for status, count in found["statuses"].items() if status != "200")
    rows = [
        ["mixed against unsteered requests alone, tokens/s", ratio(found["mixed"], 3)],
        ["unsteered replies equal to a stock server's", f"{found['unsteered_equal_to_stock']} of {found['unsteered']}"],
        ["invalid requests, refused", str(refused)],
        ["server errors", str(found["server_errors"])],
    ]
    return "\n\n".join([
        f"**A server under {setup['clients']} clients**, {setup['requests']:,} requests: unsteered, steered each with "
        "its own α, with a readout, and invalid ones:",
        table(["", "measured"], rows),
        source(measured),
    ])  # fmt: skip


def start(measured: Record) -> str:
    """The second start of an engine, for ``start.json``."""
    rows = [[name, f"{one['median']:.1f}", ratio(one, 3)] for name, one in measured["figures"].items()]
    return "\n\n".join([
        f"**Second start of a compiled engine**, {measured['setup']['layers']} layers configured, from the start of "
        "the process to the engine being ready; above 1 is slower:",
        table(["plugin", "seconds", "ratio to absent"], rows),
        source(measured),
    ])  # fmt: skip


def idle_op(measured: Record) -> str:
    """The op in an idle engine, for ``idle-op.json``."""
    setup = measured["setup"]
    rows = [[name, f"{1000 / one['median']:.2f}", ratio(one, 4)] for name, one in measured["figures"].items()]
    return "\n\n".join([
        f"**A decode step of {setup['requests']} plain requests**, {setup['layers']} layers configured, in one engine "
        "with the op and with a function in its place that does nothing, step by step in turn; below 1 is slower:",
        table(["", "ms", "speed, to without"], rows),
        source(measured),
    ])  # fmt: skip


def demo(measured: Record) -> str:
    """The demo study, for ``demo.json``."""
    seconds = ", ".join(f"{one:.0f}" for one in measured["seconds"])
    return f"**The demo study**, from its configuration to the report, each run: {seconds} s.\n\n{source(measured)}"


def score(measured: Record) -> str:
    """Offline scoring, for ``score.json``."""
    found, setup = measured["figures"], measured["setup"]
    rows = [
        [
            f"{setup['rows']:,} of {setup['characters_a_row']:.0f} characters",
            f"{found['seconds']:.1f}",
            f"{found['cpu_seconds']:.1f}",
            f"{found['peak_gib']:.2f}",
        ]
    ]
    return "\n\n".join([
        "**Offline scoring:**",
        table(["rows", "seconds", "CPU seconds", "GiB, all processes at once"], rows),
        source(measured),
    ])  # fmt: skip


def grid_scale(measured: Record) -> str:
    """The driver by the size of a grid, for ``grid-scale.json``."""
    rows = [
        [f"{int(size):,}", f"{one['run']['peak_mib']:.0f}", f"{one['resume']['peak_mib']:.0f}",
         f"{one['resume']['resume_seconds']:.1f}"]
        for size, one in measured["grids"].items()
    ]  # fmt: skip
    return "\n\n".join([
        "**Grids by their number of rows**, with an engine that answers at once, killed at 99.9 % and resumed:",
        table(["rows", "driver, peak MiB", "after the resume", "seconds from the resume to the first new row"], rows),
        source(measured),
    ])  # fmt: skip


def _came_of(peer: Mapping[str, Any]) -> str:
    for step, verb in (("runs", "steer"), ("imports", "import"), ("resolves", "install")):
        if answer := peer[step]:
            return peer["remark"] or step if answer == "yes" else f"does not {verb}: {answer}"
    return str(peer["remark"])


def ratio(figure: Mapping[str, Any], digits: int = 2) -> str:
    """A figure's ratio with its 95 % interval, whose ends have `digits` decimals; it has three or as many."""
    low, high = interval(figure["ratios"])
    return f"{figure['ratio']:.{max(digits, 3)}f} ({low:.{digits}f} – {high:.{digits}f})"


def times(figure: Mapping[str, Any]) -> str:
    """A figure's ratio as a factor."""
    return f"{figure['ratio']:.3g} ×"


def source(measured: Record) -> str:
    """The machine, the versions, the date and the command of a record."""
    setup = measured["setup"]
    return (
        f"{setup['hardware']}, {setup['memory_gib']} GiB; vLLM {setup['vllm']}, torch {setup['torch']}, "
        f"vllm-steer {setup['vllm-steer']}; {setup['date']}: `{setup['command']}`."
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
    cells = [list(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


TABLES: dict[str, Callable[[Record], str]] = {
    "overhead": overhead, "overhead-one-start": overhead_one_start, "overhead-before": overhead_before,
    "hf-hooks": hooks, "op": op, "scale": scale, "scale-ray": scale, "peers": peers,
    "builds": builds, "builds-all-layers": builds, "idle-op": idle_op, "start": start, "server": server,
    "admission": admission,
    "cached": cached, "capture": capture, "demo": demo, "score": score, "grid-scale": grid_scale,
}  # fmt: skip
