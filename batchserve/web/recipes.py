"""How to do the same as a job did: by curl, on the command line, and in Python."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

import orjson

from batchserve.api.files import input_stem
from batchserve.domain import Job, StoredInput
from batchserve.formats import get_format

__all__ = ["Recipe", "recipe_of"]

_DEFAULTS: dict[str, Any] = {"passthrough": "unused", "on_row_error": "continue"}
_PACKED = (".xlsx", ".zip")
"""Suffixes of files that hold the table which was read."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """A file, a model, and the options that are not the defaults."""

    url: str
    needs_key: bool
    file: str
    target: str
    model: str
    options: Mapping[str, Any]
    reading: Mapping[str, str] = field(default_factory=dict)
    """How the file is read."""

    @property
    def texts(self) -> list[tuple[str, str]]:
        return [("curl", self.curl), ("Command line", self.command_line), ("Python", self.python)]

    @property
    def curl(self) -> str:
        key = ' -H "Authorization: Bearer $BATCHSERVE_API_KEY"' if self.needs_key else ""
        curl = f"curl -fsSg{key}"
        upload = f"{self.url}/v1/upload?{urlencode({'filename': self.file, 'model': self.model, **self.reading})}"
        body = orjson.dumps({"model": self.model, **self.options}).decode()
        predict, download = shlex.quote(f"{self.url}/v1/predict/"), shlex.quote(f"{self.url}/v1/download/")
        return (
            f"job=$({curl} -T {shlex.quote(_path(self.file))} {shlex.quote(upload)} | cut -d '\"' -f 4)\n"
            f"{curl} -H 'Content-Type: application/json' -d {shlex.quote(body)} {predict}\"$job\"\n"
            f"{curl} -o {shlex.quote(self.target)} {download}\"$job\"'?wait=60'"
        )

    @property
    def command_line(self) -> str:
        words = ["batchserve", "predict", _path(self.file), "--model", self.model, "-o", self.target]
        for name, value in {**self.options, **self.reading}.items():
            option = f"--{name.replace('_', '-')}"
            if name == "metadata":
                words += [f"{option}={key}={text}" for key, text in value.items()]
            else:
                words.append(f"{option}={value if isinstance(value, str) else orjson.dumps(value).decode()}")
        return f"BATCHSERVE_URL={shlex.quote(self.url)} {shlex.join(words)}"

    @property
    def python(self) -> str:
        given = {"model": self.model, **self.options, **self.reading}
        options = "".join(f", {name}={value!r}" for name, value in given.items())
        return (
            "from batchserve import Client\n\n"
            f"with Client({self.url!r}) as client:\n"
            f"    job = client.submit({_path(self.file)!r}{options})\n"
            "    job.wait()\n"
            f"    job.result().save({self.target!r})"
        )


def recipe_of(job: Job, url: str, needs_key: bool) -> Recipe | None:
    """None for a job that has no model yet, or whose model cannot be read any more; and for one of several inputs,
    which no client submits."""
    if job.model is None or job.options is None or job.inputs_total > 1:
        return None
    first = job.input
    file = first.filename or f"input{get_format(first.format).suffix}"
    target = f"{input_stem(file) or job.id}.predictions{get_format(job.options.format).suffix}"
    return Recipe(url, needs_key, file, target, job.model.reference, _options(job), _reading(first, file))


def _options(job: Job) -> dict[str, Any]:
    names = ("format", "passthrough", "columns", "key", "on_row_error", "max_errors", "top_k", "inputs")
    given = {name: getattr(job.options, name) for name in names}
    given |= {"priority": job.priority or None, "metadata": job.metadata or None}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in given.items()
        if value is not None and value != _DEFAULTS.get(name)
    }


def _reading(stored: StoredInput, file: str) -> dict[str, str]:
    dialect, reading = stored.dialect, {}
    if stored.format == "csv" and not file.lower().endswith(_PACKED):
        if dialect.delimiter != ",":
            reading["delimiter"] = "tab" if dialect.delimiter == "\t" else dialect.delimiter
        if dialect.decimal != ".":
            reading["decimal"] = dialect.decimal
    return reading


def _path(file: str) -> str:
    """A name that no command takes for an option."""
    return f"./{file}" if file.startswith("-") else file
