"""What a person sees while a run trains: one live line on a terminal, one line per interval elsewhere."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class ProgressLine:
    """Progress of one run: loss, tokens/s, time left. Prints nothing on processes other than the first."""

    def __init__(self, name: str, done: int, total: int, *, shown: bool = True, console: Console | None = None):
        self._name, self._total, self._shown = name, total, shown
        self._console = Console(stderr=False) if console is None else console
        self._bar: Progress | None = None
        self._start, self._done_at_start = time.perf_counter(), done
        if shown and self._console.is_terminal:
            columns = (
                TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
                TextColumn("{task.fields[facts]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            )  # fmt: skip
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task(name, completed=done, total=total, facts="compiling")

    def __enter__(self) -> "ProgressLine":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, facts: str, *, line: bool) -> None:
        """Show that `step` updates are done; `line` = also where only whole lines are printed."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, facts=facts)
        elif self._shown and line:
            per_step = (time.perf_counter() - self._start) / max(1, step - self._done_at_start)
            left = int(per_step * (self._total - step))
            self._console.print(
                f"{self._name} {step}/{self._total}  {facts}  {left // 60}:{left % 60:02d} left", highlight=False
            )
            sys.stdout.flush()

    def say(self, text: str) -> None:
        """Print a line above the progress."""
        if self._shown:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)
