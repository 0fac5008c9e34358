"""Progress of a blocking `LLM.generate`: rows done, tokens per second and time left, on a terminal or as plain
log lines.

vLLM reports a request only when it has ended. In one mixed batch most rows end together, so a bar of finished rows
stands still and then jumps. The token counters in the engine's statistics move at every step.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from batch_jobs.engine.start_engine import Engine


class Progress(Protocol):
    """Receives a job's progress and warnings."""

    def watch(self, engine: Engine, title: str, work: Work) -> AbstractContextManager[None]:
        """Context manager that shows the engine's progress while its body blocks in `generate`."""
        ...

    def warn(self, message: str) -> None:
        """Show the user a message that does not stop the job."""
        ...


POLL_SECONDS = 0.5
LOG_SECONDS = 15.0


@dataclass(frozen=True)
class Work:
    """The amount of work in a batch."""

    rows: int
    prompt_tokens: int
    max_new_tokens: int
    """Upper bound for one row."""

    @property
    def prefill_only(self) -> bool:
        """Whether each row generates one token only, so that prompt tokens measure the progress."""
        return self.max_new_tokens == 1


@dataclass(frozen=True)
class Counters:
    """Running totals of the engine since the process started; progress is the difference of two."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    finished_rows: int = 0
    finished_tokens: int = 0
    """Generated tokens of the finished rows."""

    @classmethod
    def of(cls, engine: Engine) -> Counters:
        """Read the engine's statistics, which must be on (`disable_log_stats=False`)."""
        totals: dict[str, float] = {}
        for metric in engine.get_metrics():
            amount = getattr(metric, "sum", getattr(metric, "value", 0))
            totals[metric.name] = totals.get(metric.name, 0) + amount
        return cls(
            prompt_tokens=int(totals.get("vllm:prompt_tokens", 0)),
            generated_tokens=int(totals.get("vllm:generation_tokens", 0)),
            finished_rows=int(totals.get("vllm:request_success", 0)),
            finished_tokens=int(totals.get("vllm:request_generation_tokens", 0)),
        )

    def since(self, start: Counters) -> Counters:
        """The increase since `start`."""
        return Counters(
            self.prompt_tokens - start.prompt_tokens,
            self.generated_tokens - start.generated_tokens,
            self.finished_rows - start.finished_rows,
            self.finished_tokens - start.finished_tokens,
        )


def tokens_done_and_due(done: Counters, work: Work) -> tuple[int, int]:
    """Tokens done and tokens expected in total.

    The total assumes that every unfinished row runs to its limit. It falls as rows end early, so the time left is an
    upper bound.
    """
    if work.prefill_only:
        return min(done.prompt_tokens, work.prompt_tokens), work.prompt_tokens
    unfinished = max(work.rows - done.finished_rows, 0)
    due = max(done.finished_tokens + unfinished * work.max_new_tokens, done.generated_tokens, 1)
    return done.generated_tokens, due


def rows_of_session(done: int, rows: int, earlier: int) -> str:
    """Rows done of this session's, and how many were stored before it."""
    return f"{done}/{rows} rows" + (f" ({earlier} stored before)" if earlier else "")


def time_left(done: int, due: int, elapsed: float) -> str:
    """Time for what is left at the average pace so far. Nothing that was done before `elapsed` began may be counted."""
    return f"{(due - done) * elapsed / done:.0f} s left" if done else "time left unknown"


@dataclass
class SessionLine:
    """The progress of a session of many batches, in one line after each batch, at most every 15 s."""

    tell: Callable[[str], None]
    """Shows a line to the user."""
    rows: int
    """Rows that this session has to do."""
    earlier: int
    """Rows that were stored before it."""
    done: int = 0
    began: float = field(default_factory=lambda: time.monotonic())
    shown: float = field(default_factory=lambda: time.monotonic())

    def stored(self, rows: int) -> None:
        """Count a batch that is now on disk."""
        self.done += rows
        now = time.monotonic()
        if now - self.shown >= LOG_SECONDS and self.done < self.rows:
            self.shown = now
            self.tell(f"All batches: {self._text(now - self.began)}")

    def _text(self, elapsed: float) -> str:
        counted = rows_of_session(self.done, self.rows, self.earlier)
        return f"{counted}, {self.done / max(elapsed, 1e-6):.1f} rows/s, {time_left(self.done, self.rows, elapsed)}"


@dataclass(frozen=True)
class ConsoleProgress:
    """Progress on the console of this process."""

    console: Console
    quiet: bool = False
    """Show no progress, for logs; warnings still show."""

    def watch(self, engine: Engine, title: str, work: Work) -> AbstractContextManager[None]:
        """See `Progress.watch`; `engine_progress` unless `quiet`."""
        return nullcontext() if self.quiet else engine_progress(engine, self.console, title, work)

    def tell(self, message: str) -> None:
        """Print a line, unless `quiet`."""
        if not self.quiet:
            self.console.print(message, highlight=False, markup=False)

    def warn(self, message: str) -> None:
        """Print the message in yellow, also if `quiet`."""
        self.console.print(message, style="yellow", markup=False, highlight=False)


@contextmanager
def engine_progress(engine: Engine, console: Console, title: str, work: Work) -> Iterator[None]:
    """Show the engine's progress while the body blocks in `generate`: a bar on a terminal, elsewhere a line every 15 s
    and one at the end."""
    start, began = Counters.of(engine), time.monotonic()
    ended = threading.Event()
    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[rows]}/" + str(work.rows) + " rows"),
        TextColumn("{task.fields[speed]:.0f} tokens/s"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    task = bar.add_task(title, total=1, rows=0, speed=0.0)

    def show() -> str:
        done = Counters.of(engine).since(start)
        elapsed = max(time.monotonic() - began, 1e-6)
        tokens, due = tokens_done_and_due(done, work)
        bar.update(task, completed=tokens, total=due, rows=done.finished_rows, speed=tokens / elapsed)
        rows = f"{done.finished_rows}/{work.rows} rows"
        return f"{title}: {rows}, {tokens / elapsed:.0f} tokens/s, {elapsed:.0f} s, {time_left(tokens, due, elapsed)}"

    def watch() -> None:
        next_line = began + LOG_SECONDS
        while not ended.wait(POLL_SECONDS):
            line = show()
            if not console.is_terminal and time.monotonic() >= next_line:
                next_line += LOG_SECONDS
                console.print(line, highlight=False)

    watcher = threading.Thread(target=watch, name="engine-progress", daemon=True)
    with bar:
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()
            line = show()
    if not console.is_terminal:
        console.print(line, highlight=False)
