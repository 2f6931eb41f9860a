"""The parts of pages that are generated from the code: the options of each command, the settings and the metrics.

They are between two comments, in the section of which they are. The rest of these pages is written by hand.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import typer

from batchserve.cli import app
from batchserve.metrics import FAMILIES, Family
from batchserve.settings import Settings

__all__ = ["PAGES", "commands", "filled"]

_DOCS = Path(__file__).resolve().parent.parent / "docs"
_BEGIN, _END = "<!-- generated from the code: make docs -->", "<!-- end -->"
_PART = re.compile(rf"{re.escape(_BEGIN)}\n.*?{re.escape(_END)}", re.DOTALL)
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_FIRST_SETTINGS = {
    "Addresses": "storage",
    "Scoring": "processes",
    "Worker": "lease",
    "Limits": "upload_bytes",
    "Webhooks": "webhook_networks",
    "Logs": "log_format",
}
"""The sections of settings, and the first setting of each."""
_METRICS = {"The whole service": "service", "A process": "process"}
"""The sections of metrics, and whose values they are."""
_KINDS = {
    "str": "TEXT", "path": "PATH", "file": "FILE", "dir": "FOLDER", "int": "NUMBER", "int range": "NUMBER",
    "float range": "NUMBER", "list[str]": "",
}  # fmt: skip
"""What stands for a value, by its type as Typer names it."""


def filled(page: Path) -> str:
    """The text of a page, with its generated parts as they should be. Raises KeyError where a section has no command or
    settings."""
    text, part_of = page.read_text(encoding="utf-8"), PAGES[page]()

    def generated(match: re.Match[str]) -> str:
        heading = _HEADING.findall(text, 0, match.start())[-1]
        return f"{_BEGIN}\n\n{part_of[heading.strip('`')]}\n\n{_END}"

    return _PART.sub(generated, text)


def commands() -> Iterator[tuple[str, Any, Any]]:
    """Path, command and context of each command."""

    def inside(command: Any, path: str, above: Any) -> Iterator[tuple[str, Any, Any]]:
        context = typer.Context(command, info_name=path.rpartition(" ")[2], parent=above)
        if not hasattr(command, "commands"):
            yield path, command, context
            return
        for name, inner in command.commands.items():
            yield from inside(inner, f"{path} {name}", context)

    return inside(typer.main.get_command(app), "batchserve", None)


def _parts_of_commands() -> dict[str, str]:
    return {path: _part_of_command(command, context) for path, command, context in commands()}


def _part_of_command(command: Any, context: Any) -> str:
    rows = [_row(parameter, context) for parameter in command.params if not parameter.hidden]
    return _table(("argument, option", "", "default"), rows)


def _row(parameter: Any, context: Any) -> list[str]:
    shown, told = parameter.get_help_record(context)
    text, _, facts = told.partition("  [")
    names = [name for name in (*parameter.opts, *parameter.secondary_opts) if name.startswith("-")]
    names.sort(key=lambda name: not name.startswith("--"))
    value = shown.rpartition(max(names, key=len))[2].strip() if names else parameter.metavar or parameter.name.upper()
    if value.startswith("<"):
        value = _KINDS.get(value[1:-1], value[1:-1])
    default = re.search(r"default: ([^;\]]+)", facts)
    otherwise = "required" if "required" in facts else ""
    if default is not None:
        otherwise = f"`--{default[1]}`" if parameter.secondary_opts else f"`{default[1]}`"
    codes = ", ".join(f"`{name}`" for name in names)
    return [f"{codes} `{value}`".strip() if value else codes, text.replace("*", r"\*"), otherwise]


def _parts_of_settings() -> dict[str, str]:
    rows: dict[str, list[list[str]]] = {heading: [] for heading in _FIRST_SETTINGS}
    section = ""
    for name, field in Settings.model_fields.items():
        section = next((heading for heading, first in _FIRST_SETTINGS.items() if first == name), section)
        rows[section].append([f"`BATCHSERVE_{name.upper()}`", _default(field), field.description or ""])
    return {heading: _table(("variable", "default", "description"), found) for heading, found in rows.items()}


def _parts_of_metrics() -> dict[str, str]:
    head = ("name", "type", "labels", "")
    return {
        heading: _table(head, [_row_of_family(family) for family in FAMILIES if family.of == of])
        for heading, of in _METRICS.items()
    }


def _row_of_family(family: Family) -> list[str]:
    return [f"`{family.name}`", family.kind, ", ".join(f"`{label}`" for label in family.labels), family.help]


def _default(field: Any) -> str:
    if field.default_factory is not None:
        return "cores"
    if field.default in ("", None):
        return "empty"
    return f"`{json.dumps(field.default) if isinstance(field.default, dict) else field.default}`"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [_line(head), "|---" * len(head) + "|", *map(_line, rows)]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    escaped = (cell.replace("|", r"\|") for cell in cells)
    return "|" + "|".join(f" {cell} " if cell else " " for cell in escaped) + "|"


PAGES: dict[Path, Callable[[], dict[str, str]]] = {
    _DOCS / "cli.md": _parts_of_commands,
    _DOCS / "metrics.md": _parts_of_metrics,
    _DOCS / "settings.md": _parts_of_settings,
}
"""The pages with generated parts, and what makes these by the headings of their sections."""
