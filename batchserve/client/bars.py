"""Progress bars: on stderr of a terminal, in a cell of a notebook."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from batchserve.client.notebook import Cell, is_notebook
from batchserve.client.views import FilesProgress, JobView

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


_NOTEBOOK_PAUSE = 0.1
"""Seconds between two updates of a cell."""


class Bars:
    """A bar for each stage of a prediction. Every method does nothing when bars are off."""

    def __init__(self, shown: bool | None = None) -> None:
        """`shown`: None means on in a terminal (stderr) or a notebook."""
        self._shown = (sys.stderr.isatty() or is_notebook()) if shown is None else shown
        self._progress: Progress | None = None
        self._cell: Cell | None = None
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, float] = {}
        self._updated: dict[str, float] = {}

    def __enter__(self) -> Self:
        if self._shown and is_notebook():
            self._cell = Cell()
        elif self._shown:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

            self._progress = Progress(
                TextColumn("{task.description:<9}"),
                BarColumn(bar_width=36),
                TaskProgressColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def upload(self, done: int, total: int | None) -> None:
        self._bytes("upload", done, total)

    def download(self, done: int, total: int | None) -> None:
        self._bytes("download", done, total)

    def scoring(self, job: JobView) -> None:
        """Shows the job's state, rows and speed as reported by the server."""
        rows = job.rows
        done, total = (rows.get("ok") or 0) + (rows.get("failed") or 0), rows.get("total")
        notes = [f"{done:,}/{total:,} rows" if total is not None else job.state]
        if job.data.get("rows_per_s"):
            notes.append(f"{job.data['rows_per_s']:,.0f} rows/s")
        if not job.finished and job.data.get("eta_s"):
            notes.append(f"{job.data['eta_s']:.0f} s left")
        if rows.get("failed"):
            notes.append(f"{rows['failed']:,} failed")
        self._show("scoring", job.progress, 1.0, ", ".join(notes))

    def files(self, progress: FilesProgress) -> None:
        """Shows many files as one."""
        notes = [f"{progress.done:,}/{progress.total:,} files", f"{progress.rows:,} rows"]
        if progress.failed:
            notes.append(f"{progress.failed:,} failed")
        self._show("files", progress.share, 1.0, ", ".join(notes))

    def _bytes(self, stage: str, done: int, total: int | None) -> None:
        elapsed = time.monotonic() - self._started.setdefault(stage, time.monotonic())
        rate = f", {done / elapsed / 1e6:,.0f} MB/s" if elapsed > 0.05 else ""
        self._show(stage, done, total, f"{done / 1e6:,.1f} MB{rate}")

    def _show(self, stage: str, done: float, total: float | None, note: str) -> None:
        if self._cell is not None and self._is_due(stage, done, total):
            self._cell.show(stage, done, total, note)
        if self._progress is None:
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total, note=note)
        self._progress.update(self._tasks[stage], completed=done, total=total, note=note)

    def _is_due(self, stage: str, done: float, total: float | None) -> bool:
        """Whether a notebook is to show it: ten times a second, and the first and last of a stage."""
        now = time.monotonic()
        if stage in self._updated and done != total and now - self._updated[stage] < _NOTEBOOK_PAUSE:
            return False
        self._updated[stage] = now
        return True
