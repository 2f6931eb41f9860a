"""What notebooks show: jobs, models and results as HTML, and bars without widgets."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from batchserve import Client
from batchserve.client import Model
from batchserve.client.bars import Bars
from batchserve.client.views import JobView

HOSTILE = "<script src='http://elsewhere/x.js'></script>"
JOB: dict[str, Any] = {
    "id": "j1",
    "state": "failed",
    "progress": 0.5,
    "model": {"name": "iris", "version": 1},
    "rows": {"total": 2_000, "ok": 999, "failed": 1},
    "error": {"code": "invalid-input", "message": HOSTILE},
    "result": None,
}
MODEL: dict[str, Any] = {
    "name": "iris",
    "version": 3,
    "digest": "ab" * 32,
    "task": "classification",
    "columns": [{"name": HOSTILE, "dtype": "float32", "nullable": False}],
    "result_columns": {"prediction": "String"},
}


def test_a_job_shows_its_state_rows_and_error_and_escapes_them() -> None:
    shown = JobView(JOB)._repr_html_()
    assert "<script" not in shown
    assert "&lt;script" in shown
    for part in ("j1", "failed", "iris@1", "2,000", "50%"):
        assert part in shown


def test_a_model_shows_what_it_takes_and_gives_and_escapes_it() -> None:
    shown = Model(MODEL)._repr_html_()
    assert "<script" not in shown
    for part in ("iris@3", "classification", "&lt;script", "float32", "prediction", "String"):
        assert part in shown


def test_jobs_models_and_results_of_a_server_are_shown(server: str, iris: pd.DataFrame, iris_onnx: Path) -> None:
    with Client(server) as client:
        assert "classification" in client.models.add(iris_onnx, name="iris")._repr_html_()
        job = client.submit(iris, model="iris").wait()
        assert f"Job {job.id}" in job._repr_html_()
        shown = job.result()._repr_html_()
    for part in (f"Result of job {job.id}", "arrows", "150"):
        assert part in shown


class Notebook:
    """IPython, as far as bars use it: an output cell that is shown once and updated."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shown: list[str] = []
        self.updates: list[str] = []
        ipython, display = ModuleType("IPython"), ModuleType("IPython.display")
        shell = type("ZMQInteractiveShell", (), {})()
        ipython.get_ipython = lambda: shell  # type: ignore[attr-defined]
        display.HTML = lambda text: text  # type: ignore[attr-defined]
        display.display = self._display  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "IPython", ipython)
        monkeypatch.setitem(sys.modules, "IPython.display", display)
        monkeypatch.setitem(sys.modules, "ipywidgets", None)

    def _display(self, text: str, *, display_id: bool) -> SimpleNamespace:
        assert display_id
        self.shown.append(text)
        return SimpleNamespace(update=self.updates.append)


def test_a_notebook_shows_one_cell_of_bars_without_widgets(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = Notebook(monkeypatch)
    with Bars() as bars:
        bars.upload(500, 1000)
        bars.scoring(JobView(JOB | {"state": HOSTILE, "rows": {"total": None}}))
    assert len(notebook.shown) == 1
    last = notebook.updates[-1]
    assert 'value="0.5"' in last
    assert "upload" in last
    assert "scoring" in last
    assert "<script" not in last


def test_bars_that_are_off_show_nothing_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = Notebook(monkeypatch)
    with Bars(False) as bars:
        bars.upload(500, 1000)
    assert notebook.shown == []
