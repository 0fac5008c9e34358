"""Figures of detection: by layer, against random directions, without empathy words, across models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from batch_jobs.directions.validate_layer import LayerValidation
from batch_jobs.directions.validation_file import Validation
from batch_jobs.report.figures.axes import block_axis, share_axis
from batch_jobs.report.figures.paper_figure import PaperFigure
from batch_jobs.report.figures.sheet import Sheet
from batch_jobs.report.figures.style import PALETTE, PUBLISHED, SERIES, Style
from batch_jobs.report.number_text import fixed
from batch_jobs.report.published import Published, published_model

ORIGINAL_EXTRACT_OFFSET = -1
"""The original read hidden state number ℓ for layer ℓ: the output of block ℓ - 1."""
BAG_OF_WORDS, LENGTH = Style("s4", "", "-."), Style("s5", "", ":")
_WIDE_PANEL = (4.6, 2.5)
_PANEL = (3.3, 2.3)
_BINS = np.linspace(0.0, 1.0, 21)


def auroc_figure(validation: Validation, extract_offset: int, published: Published | None) -> PaperFigure:
    """Draw figure 1: AUROC by block read, for the study's layers, the sweep and the published model, and of the texts'
    words and length, which no block changes."""
    layers = [validation.layers[layer] for layer in sorted(validation.layers)]
    blocks = [row.layer + extract_offset for row in layers]
    known = list(published.layers_of(published.random_baseline.model).values()) if published else []
    known_blocks = [row.layer + ORIGINAL_EXTRACT_OFFSET for row in known]
    sheet = Sheet(1, panel=_WIDE_PANEL)
    (axes,) = sheet.panels
    swept = len(validation.sweep) > len(layers)
    if swept:
        draw_sweep(sheet, axes, "every block", validation.sweep, Style("s3", "", "-"))
    low, high = [row.auroc_low for row in layers], [row.auroc_high for row in layers]
    accuracies = [row.accuracy_train_threshold for row in layers]
    style = Style("s1", "o", "" if swept else "-")
    sheet.line(axes, "AUROC", blocks, [row.auroc for row in layers], style, low=low, high=high)
    sheet.line(axes, "accuracy, train threshold", blocks, accuracies, SERIES[1])
    if known:
        sheet.line(axes, f"AUROC, {known[0].model}, published", known_blocks, [row.auroc for row in known], PUBLISHED)
    ends = [min([*blocks, *known_blocks, *validation.sweep]), max([*blocks, *known_blocks, *validation.sweep])]
    words = (validation.words.bag_of_words, validation.words.length)
    for name, estimate, line in zip(("bag of words", "length"), words, (BAG_OF_WORDS, LENGTH), strict=True):
        sheet.line(axes, f"{name} alone", ends, [estimate.auroc] * 2, line)
    chance_line(axes)
    floor = min(
        [*low, *accuracies, *(row.auroc_low for row in validation.sweep.values()), *(one.auroc for one in words)]
    )
    share_axis(axes, "share", floor)
    block_axis(axes)
    sheet.title(axes, "Detection on held-out texts")
    return PaperFigure(
        label="1",
        name="auroc-by-layer",
        title="AUROC by layer",
        drawing=sheet.render(),
        note="" if swept else "This run read the labelled layers only; validation.all_layers reads every block.",
    )


def pooling_figure(validation: Validation) -> PaperFigure:
    """Draw figure 1, second part: detection and residual norm under each pooling."""
    figure = PaperFigure(
        label="1b",
        name="pooling",
        title="With and without the first tokens",
        missing="This run read one pooling only.",
    )
    if len(validation.pooling) < 2:
        return figure
    sheet = Sheet(2, columns=2, panel=_PANEL)
    left, right = sheet.panels
    floor = 1.0
    for place, (skip, pooling) in enumerate(sorted(validation.pooling.items())):
        own = " (this study)" if skip == validation.skip_first else ""
        style = SERIES[place % len(SERIES)]
        draw_sweep(sheet, left, f"{pooling.label}{own}", pooling.blocks, style)
        floor = min(floor, *(row.auroc_low for row in pooling.blocks.values()))
        norms = dict(sorted(pooling.mean_residual_norms.items()))
        sheet.line(right, f"{pooling.label}{own}", list(norms), list(norms.values()), style)
    chance_line(left)
    share_axis(left, "AUROC", floor)
    right.set_ylabel("mean ‖h‖")
    right.set_ylim(bottom=0)
    sheet.title(left, "Detection")
    sheet.title(right, "Mean residual norm")
    for axes in sheet.panels:
        block_axis(axes)
    return figure.drawn(sheet.render())


def random_figure(validation: Validation, published: Published | None) -> PaperFigure:
    """Draw figure 2: AUROCs of random unit vectors and of the direction."""
    layer = validation.best_layer
    baseline = validation.random_baseline.get(layer)
    figure = PaperFigure(
        label="2",
        name="random-baseline",
        title="Random directions",
        missing="This run drew no random directions at its best layer.",
    )
    if baseline is None:
        return figure
    sheet = Sheet(2 if published else 1, columns=2, panel=_PANEL)
    auroc = validation.layers[layer].auroc
    _draw_random(sheet, sheet.panels[0], baseline.aurocs, auroc, baseline.percentile_95, SERIES[0])
    sheet.title(sheet.panels[0], f"This run, layer {layer}")
    if published is None:
        return figure.drawn(sheet.render())
    theirs, soft = published.random_baseline, Style("soft")
    _draw_random(sheet, sheet.panels[1], theirs.aurocs, theirs.probe_auroc, theirs.percentile_95, soft)
    sheet.title(sheet.panels[1], f"Published, layer {theirs.layer}")
    return figure.drawn(sheet.render())


def ablation_figure(validation: Validation, published: Published | None) -> PaperFigure:
    """Draw figure 3: detection by the direction and by a bag of words, before and after the concept's words in the
    positive test texts are replaced."""
    theirs = published.lexical_ablation if published else None
    ablation = validation.ablation
    figure = PaperFigure(
        label="3",
        name="lexical-ablation",
        title="Lexical ablation",
        missing="This run was made without lexical ablation (validation.lexical_ablation, concept.ablation_words).",
    )
    if ablation is None:
        return figure
    layers = sorted(ablation.layers)
    labels = [str(layer) for layer in layers] + ([f"{theirs.layer}\npubl."] if theirs else [])
    words = {"before": validation.words.bag_of_words}
    if ablation.words is not None:
        words["after"] = ablation.words.bag_of_words
    sheet = Sheet(2, columns=2, panel=_PANEL)
    aurocs, kept = sheet.panels
    for name, shift, hatched in (("before", -0.2, False), ("after", 0.2, True)):
        rows = [getattr(ablation.layers[layer], name) for layer in layers]
        xs = [place + shift for place in range(len(layers))]
        low, high = [row.auroc_low for row in rows], [row.auroc_high for row in rows]
        style = Style("s1", filled=not hatched)
        sheet.bars(aurocs, name, xs, [row.auroc for row in rows], style, width=0.36, low=low, high=high)
        if theirs is None:
            continue
        side = getattr(theirs, name)
        xs = [len(layers) + shift]
        sheet.bars(aurocs, f"{name}, published", xs, [side.auroc], Style("soft", filled=not hatched), width=0.36)
        if (alone := words.get(name)) is not None:
            xs, style = [len(layers) + 1 + shift], Style("s4", filled=not hatched)
            ends = {"low": [alone.low], "high": [alone.high]}
            sheet.bars(aurocs, f"{name}, bag of words", xs, [alone.auroc], style, width=0.36, **ends)
    # without separation before, there is no share to show
    parted = [place for place, layer in enumerate(layers) if ablation.layers[layer].before.separation]
    sides = [ablation.layers[layers[place]] for place in parted]
    shares = [side.after.separation / side.before.separation for side in sides]
    sheet.bars(kept, "separation kept", parted, shares, SERIES[2], width=0.5)
    if theirs is not None:
        share = theirs.after.separation / theirs.before.separation
        sheet.bars(kept, "separation kept, published", [len(layers)], [share], Style("soft"), width=0.5)
    for axes, names in ((aurocs, [*labels, "words"]), (kept, labels)):
        axes.set_xticks(range(len(names)), names)
        axes.set_xlabel("layer")
    share_axis(aurocs, "AUROC")
    sheet.title(aurocs, "AUROC before and after")
    kept.set_ylabel("separation after / before")
    sheet.title(kept, "Separation that is left")
    return figure.drawn(sheet.render())


def models_figure(model: str, validation: Validation, extract_offset: int, published: Published | None) -> PaperFigure:
    """Draw figure 4: AUROC by block read, of this run and of the paper's models."""
    if published is None:
        return PaperFigure(
            label="4",
            name="models",
            title="Layers across models",
            missing="The published models are about empathy; this run's concept is another. Figure 1 has its layers.",
        )
    sheet = Sheet(1, panel=_WIDE_PANEL)
    (axes,) = sheet.panels
    shown = {layer + extract_offset: validation.layers[layer] for layer in validation.layers}
    draw_models(sheet, axes, {f"{model}, this run": shown}, published)
    sheet.title(axes, "Detection across models")
    return PaperFigure(
        label="4",
        name="models",
        title="Layers across models",
        drawing=sheet.render(),
        note="The paper used this run\u2019s model too." if published_model(model) else "",
    )


def draw_models(
    sheet: Sheet, axes: Axes, ours: Mapping[str, dict[int, LayerValidation]], published: Published | None
) -> None:
    """Draw AUROC by block read, a line a run; the paper's models, where given, are soft and differ by their marks.

    `ours`: name -> block read -> validation.
    """
    for place, (name, blocks) in enumerate(ours.items()):
        draw_sweep(sheet, axes, name, blocks, SERIES[place % len(SERIES)])
    known = {model: published.layers_of(model) for model in published.models()} if published else {}
    for place, (model, rows) in enumerate(known.items()):
        style = SERIES[(len(ours) + place) % len(SERIES)]
        line = Style("soft", style.marker, style.line, style.filled)
        blocks_read = [layer + ORIGINAL_EXTRACT_OFFSET for layer in rows]
        sheet.line(axes, f"{model}, published", blocks_read, [row.auroc for row in rows.values()], line)
    chance_line(axes)
    share_axis(axes, "AUROC", min(row.auroc_low for blocks in ours.values() for row in blocks.values()))
    block_axis(axes)


def draw_sweep(sheet: Sheet, axes: Axes, name: str, blocks: dict[int, LayerValidation], style: Style) -> None:
    """Draw the AUROC of every block, with its interval as a band."""
    rows = dict(sorted(blocks.items()))
    low, high = [row.auroc_low for row in rows.values()], [row.auroc_high for row in rows.values()]
    sheet.line(axes, name, list(rows), [row.auroc for row in rows.values()], style, low=low, high=high, band=True)


def _draw_random(
    sheet: Sheet, axes: Axes, aurocs: Sequence[float], own: float, percentile_95: float, style: Style
) -> None:
    sheet.record(axes, "random direction", range(len(aurocs)), aurocs)
    sheet.record(axes, "the direction", [0], [own])
    colour = PALETTE[style.colour]
    axes.hist(aurocs, bins=_BINS.tolist(), color=colour, alpha=0.45, edgecolor=colour, linewidth=0.6)
    axes.axvline(percentile_95, color=PALETTE["ink"], linestyle=":", linewidth=1.2, label="95th percentile")
    axes.axvline(own, color=PALETTE["s2"], linewidth=2.0, label="the direction")
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("AUROC")
    axes.set_ylabel("random directions")
    sheet.say(
        axes,
        f"{len(aurocs)} random directions, mean {fixed(float(np.mean(aurocs)), 3)}, 95th percentile "
        f"{fixed(percentile_95, 3)}, the direction {fixed(own, 3)}",
    )


def chance_line(axes: Axes) -> None:
    """Draw a dashed line at the AUROC of chance, 0.5."""
    axes.axhline(0.5, color=PALETTE["soft"], linestyle="--", linewidth=1.0)
