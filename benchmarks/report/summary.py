"""Tables of recorded runs, with the goals last, and the sections of the performance page.

    python -m benchmarks.report.summary DIR [--readme docs/performance.md]

DIR holds the records (see ``benchmarks/README.md``); goals without a record count as not measured. A plot of the
records is written to DIR. ``--readme`` rewrites the text between the two markers that name DIR. The output is Markdown.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.harness import record
from benchmarks.report.goals import Goal, Verdict, goals_of, verdicts
from benchmarks.report.plots import PANELS, draw
from benchmarks.report.tables import TABLES, Record, table

BEGIN, END = "<!-- measured on {}: begin, made by `make readme-performance` -->", "<!-- measured on {}: end -->"
"""Markers of a section; filled with the name of a folder of records."""
PICTURE = "cost.svg"


def records_in(folder: Path) -> dict[str, Record]:
    """File stem -> record, for all records in a folder."""
    return {path.stem: record.read(path) for path in sorted(folder.glob("*.json"))}


def section_of(folder: Path, readme: Path) -> str:
    """The section of ``readme`` on the records in ``folder``: the plot if there is one, and all tables."""
    picture = folder / PICTURE
    shown = f"![What it costs]({os.path.relpath(picture, readme.parent)})\n\n" if picture.exists() else ""
    return shown + all_tables(records_in(folder), goals_of(folder.name))


def all_tables(records: Mapping[str, Record], wanted: Sequence[Goal]) -> str:
    """The tables of all records, then the goals."""
    parts = [tables(records[name]) for name, tables in TABLES.items() if name in records]
    return "\n\n".join([*parts, goals(verdicts(records, wanted))])


def goals(found: Iterable[Verdict]) -> str:
    """The table of goals."""
    rows = [[one.state, one.goal.text, bound(one.goal), reached(one)] for one in found]
    return table(["goal", "", "bound", "measured"], rows)


def bound(goal: Goal) -> str:
    """The bound with its unit."""
    above = "" if goal.low is None else f", interval above {goal.low:g}"
    return f"{'≤' if goal.is_most else '≥'} {goal.bound:g} {goal.unit}".rstrip() + above


def reached(verdict: Verdict) -> str:
    """What was measured, with its interval if it is of more than one measurement; or a dash."""
    if verdict.measured is None:
        return "–"
    digits = 3 if verdict.goal.bound < 2 else 1
    said = f"{verdict.measured:.{digits}f}"
    if verdict.low < verdict.high or not verdict.goal.unit:
        said += f" ({verdict.low:.{digits}f} – {verdict.high:.{digits}f})"
    return f"{said} {verdict.goal.unit}".rstrip()


def rewritten(readme: str, name: str, text: str) -> str:
    """``readme`` with ``text`` between the markers of the records called ``name``.

    Raises:
        ValueError: ``readme`` lacks the markers.
    """
    begin, end = BEGIN.format(name), END.format(name)
    before, found_begin, rest = readme.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"the page lacks the lines {begin!r} and {end!r}, between which the section belongs.")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def main() -> None:
    """Print all tables, draw the plot, and rewrite the section of the page if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--readme", type=Path, default=None, help="rewrite the section of this file")
    arguments = parser.parse_args()
    records = records_in(arguments.folder)
    print(all_tables(records, goals_of(arguments.folder.resolve().name)))
    if not PANELS.keys().isdisjoint(records):
        draw(records, arguments.folder / PICTURE)
    if arguments.readme is not None:
        readme = arguments.readme.read_text(encoding="utf-8")
        text = rewritten(readme, arguments.folder.name, section_of(arguments.folder, arguments.readme))
        arguments.readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
