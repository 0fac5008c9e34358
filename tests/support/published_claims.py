"""The page about the paper's claims, made from the claims that the report shows."""

from __future__ import annotations

from pathlib import Path

from batch_jobs.report.claims import read_claims

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "published-claims.md"
BEGIN, END = "<!-- made by python -m tests.support.published_claims -->\n\n", "\n<!-- end -->"


def table() -> str:
    """The claims as a Markdown table."""
    rows = [f"| {row.claim} ({row.where}) | {row.data} | {row.reproduce} |" for row in read_claims()]
    return "\n".join(["| claim | public data | to reproduce |", "|---|---|---|", *rows, ""])


if __name__ == "__main__":
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}{table()}{END}{rest.partition(END)[2]}", encoding="utf-8")
