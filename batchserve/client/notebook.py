"""Output in notebooks: facts as a table, bars in one cell. HTML without scripts, widgets or external resources."""

import sys
from collections.abc import Mapping
from html import escape
from typing import Any


def is_notebook() -> bool:
    """Whether this program runs in a notebook, where output is HTML."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and type(ipython.get_ipython()).__name__ == "ZMQInteractiveShell"


def facts_html(title: str, facts: Mapping[str, object]) -> str:
    """A table of names and values, all escaped; None is left out."""
    rows = "".join(
        f'<tr><th style="text-align:left">{escape(name)}</th><td style="text-align:left">{escape(str(value))}</td></tr>'
        for name, value in facts.items()
        if value is not None
    )
    return f"<table><caption>{escape(title)}</caption>{rows}</table>"


class Cell:
    """Bars in one output cell, which is updated in place."""

    def __init__(self) -> None:
        self._bars: dict[str, str] = {}
        self._handle: Any = None

    def show(self, stage: str, done: float, total: float | None, note: str) -> None:
        share = f' value="{done / total:g}"' if total else ""
        self._bars[stage] = (
            f"<tr><td>{escape(stage)}</td><td><progress{share}></progress></td>"
            f'<td style="text-align:left">{escape(note)}</td></tr>'
        )
        from IPython.display import HTML, display

        html = HTML(f"<table>{''.join(self._bars.values())}</table>")
        if self._handle is None:
            self._handle = display(html, display_id=True)
        else:
            self._handle.update(html)
