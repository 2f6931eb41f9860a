"""The documentation says what the code does: settings, problems, routes, commands, options and links are compared."""

import ast
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from batchserve import errors
from batchserve.app import create_app
from batchserve.errors import BatchserveError
from batchserve.formats import FORMATS
from batchserve.options import PredictOptions
from batchserve.settings import Settings
from batchserve.variables import OF_CLIENTS
from website import reference

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("*.md")), *sorted(ROOT.glob("examples/**/README.md"))]
SHELLS = ("bash", "console")


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def section(text: str, heading: str) -> str:
    """The text under a heading, up to the next one of its level or above."""
    level = len(heading) - len(heading.lstrip("#"))
    found = re.search(rf"^{re.escape(heading)}$(.*?)(?=^#{{1,{level}}} |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"there is no heading {heading!r}"
    return found[1]


def rows(text: str) -> list[list[str]]:
    """The cells of all tables, without their heads."""
    lines = [line for line in text.splitlines() if line.lstrip().startswith("|")]
    cells = [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    heads = {index - 1 for index, row in enumerate(cells) if set(row[0]) == {"-"}}
    return [row for index, row in enumerate(cells) if index not in heads and set(row[0]) != {"-"}]


def code(cell: str) -> list[str]:
    """The texts in backticks."""
    return re.findall(r"`([^`]+)`", cell)


def fences(text: str) -> Iterator[tuple[str, str]]:
    """Language and content of each fence."""
    for indent, language, content in re.findall(r"^( *)```(\w*)\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL):
        yield language, re.sub(rf"^{indent}", "", content, flags=re.MULTILINE)


def without_fences(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)


# --- settings --------------------------------------------------------------------------------------------------------


def test_every_setting_is_documented_with_its_default_and_no_other() -> None:
    documented = {row[0]: row[1:] for row in rows(text_of("docs/settings.md").partition("## The command line")[0])}
    expected = {
        f"`BATCHSERVE_{name.upper()}`": [shown_default(field), field.description]
        for name, field in Settings.model_fields.items()
    }
    assert documented == expected


def shown_default(field: Any) -> str:
    if field.default_factory is not None:
        return "cores"
    if isinstance(field.default, dict):
        return f"`{json.dumps(field.default)}`"
    return "empty" if field.default in ("", None) else f"`{field.default}`"


NO_SETTINGS = {"BATCHSERVE_X", "BATCHSERVE_LAESE", "BATCHSERVE_SERVICE_HOST", "BATCHSERVE_PORT"}
"""Examples of variables that are none."""


def test_every_setting_that_a_page_names_exists() -> None:
    known = {f"BATCHSERVE_{name.upper()}" for name in Settings.model_fields} | OF_CLIENTS | NO_SETTINGS
    for page in PAGES:
        named = set(re.findall(r"BATCHSERVE_[A-Z_]*[A-Z]", page.read_text(encoding="utf-8")))
        assert {name.removesuffix("_FILE") for name in named} <= known, page.name


# --- REST ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def operations() -> dict[str, dict[str, Any]]:
    """Every operation of the OpenAPI document, by method and path. HEAD follows GET."""
    paths = create_app(Settings()).openapi()["paths"]
    return {
        f"{method.upper()} {path}": operation
        for path, methods in paths.items()
        for method, operation in methods.items()
        if method != "head"
    }


def test_every_route_is_documented_and_no_other(operations: dict[str, Any]) -> None:
    headings = re.findall(r"^### `([A-Z]+ /\S*)`$", text_of("docs/api.md"), re.MULTILINE)
    assert sorted(headings) == sorted(operations)


def test_every_parameter_of_a_route_is_in_its_section(operations: dict[str, Any]) -> None:
    options = set(PredictOptions.model_fields)
    for route, operation in operations.items():
        said = section(text_of("docs/api.md"), f"### `{route}`").lower()
        for parameter in operation.get("parameters", ()):
            if parameter["in"] != "path" and parameter["name"] not in options:
                assert f"`{parameter['name']}" in said, f"{route}: {parameter['name']}"


def test_every_option_of_predict_is_documented_and_no_other() -> None:
    said = section(text_of("docs/api.md"), "### `POST /v1/predict/{job_id}`")
    options = [code(row[0])[0] for row in rows(said) if len(row) == 3 and row[1] not in ("query", "header")]
    assert options == list(PredictOptions.model_fields)


def test_every_problem_is_documented_with_its_status_and_no_other() -> None:
    documented = [(int(row[0]), code(row[1])[0]) for row in rows(section(text_of("docs/api.md"), "## Problems"))]
    kinds = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, BatchserveError)}
    assert len(documented) == len(set(documented))
    assert set(documented) == {(kind.status, kind.code) for kind in kinds}


# --- formats ---------------------------------------------------------------------------------------------------------


def test_every_format_is_documented_with_its_media_type_and_suffix() -> None:
    table = rows(section(text_of("docs/formats.md"), "## Overview"))
    documented = {code(row[0])[0]: (code(row[1])[0], code(row[2])[0]) for row in table}
    assert documented == {name: (format.media_type, format.suffix) for name, format in FORMATS.items()}


def test_every_code_of_a_row_error_is_documented_and_no_other() -> None:
    documented = {code(row[0])[0] for row in rows(section(text_of("docs/formats.md"), "## Row errors"))}
    package = ROOT / "batchserve"
    sources = [source for room in ("formats", "inference", "scoring") for source in package.glob(f"{room}/*.py")]
    raised = {kind for source in sources for kind in _row_error_codes(source.read_text(encoding="utf-8"))}
    # A failure at one record has the code of the exception.
    assert documented == raised | {errors.ScoringFailed.code, errors.OutOfMemory.code}


def _row_error_codes(source: str) -> Iterator[str]:
    """Constant codes with which `RowError(record, code, ...)` is made, and those that are passed to it, in a pair or
    in an exception of the module."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Name("RowError"), args=[_, ast.Constant(str(found)), *_]):
                yield found
            case ast.Call(func=ast.Name("InvalidValue"), args=[ast.Constant(str(found)), _]):
                yield found
            case ast.Return(value=ast.Tuple([ast.Constant(None), ast.Tuple([ast.Constant(str(found)), _])])):
                yield found


# --- command line ----------------------------------------------------------------------------------------------------


def test_every_command_is_documented_with_its_options_and_no_other() -> None:
    text = text_of("docs/cli.md")
    there = {path: command for path, command, _ in reference.commands()}
    assert sorted(re.findall(r"^### `(batchserve [a-z -]+)`$", text, re.MULTILINE)) == sorted(there)
    for path, command in there.items():
        said = section(text, f"### `{path}`")
        options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert set(re.findall(r"`(--?[a-z][a-z-]*)`", said)) == {o for o in options if o.startswith("-")}, path


@pytest.mark.parametrize("page", reference.PAGES, ids=lambda page: page.name)
def test_what_is_generated_from_the_code_is_up_to_date(page: Path) -> None:
    """`make docs` writes it."""
    assert page.read_text(encoding="utf-8") == reference.filled(page)


def test_every_section_of_a_command_has_its_generated_table() -> None:
    text = text_of("docs/cli.md")
    for path, _, _ in reference.commands():
        assert section(text, f"### `{path}`").count("| argument, option |") == 1, path


def test_the_exit_codes_are_those_of_the_command_line() -> None:
    from batchserve.cli.terminal import EXIT_CODES, NO_ROW_SCORED

    documented = {int(row[0]) for row in rows(text_of("docs/cli.md")) if row[0].isdecimal()}
    assert documented == {0, 1, 2, *EXIT_CODES.values(), NO_ROW_SCORED, 130}


# --- pages -----------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors that a forge generates for the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", without_fences(page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_inside_the_project_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", without_fences(page.read_text(encoding="utf-8")))
    for link in links:
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_reached_from_the_readme() -> None:
    linked = {(ROOT / link).resolve() for link in re.findall(r"\]\((docs/[^)#]+\.md)", text_of("README.md"))}
    assert linked == set(DOCS.glob("*.md"))


def test_every_picture_of_a_page_exists_and_is_small() -> None:
    for page in PAGES:
        text = without_fences(page.read_text(encoding="utf-8"))
        for path in re.findall(r"""(?:!\[[^\]]*\]\(|src(?:set)?=")([^)\s"]+)""", text):
            assert "://" in path or (page.parent / path).stat().st_size < 100_000, path


def test_each_figure_of_the_first_screen_stands_in_its_proof() -> None:
    shown = rows(text_of("README.md").partition("## Getting started")[0])
    assert len(shown) == 3
    for figures, proof in shown:
        found = re.search(r"\]\((\S+)#(\S+)\)", proof)
        assert found, proof
        heading = found[2].replace("-", " ").capitalize()
        said = section(text_of(found[1]), f"## {heading}")
        for figure in re.findall(r"\d[\d.]*", " ".join(re.findall(r"\*\*(.+?)\*\*", figures))):
            assert re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d.])", said) or int(figure) == len(rows(said)), figure


def test_every_test_that_a_promise_names_exists() -> None:
    named = re.findall(r"`(test_\w+\.py)`", text_of("docs/promises.md"))
    assert named
    assert {name for name in named if not (ROOT / "tests" / name).is_file()} == set()


def test_every_test_that_the_table_of_faults_names_exists() -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)", section(text_of("docs/ray.md"), "## Tested"))
    assert named
    for file, name in named:
        assert f"def {name}(" in text_of(f"tests/{file}"), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_examples_are_well_formed(page: Path) -> None:
    """Only syntax is checked, of shell and Python; the output was pasted from a run."""
    for language, content in fences(page.read_text(encoding="utf-8")):
        if language == "python":
            compile(content, str(page), "exec")
        if language in SHELLS:
            checked = subprocess.run(
                ["bash", "-n"], check=False, input=commands_of(language, content), text=True, capture_output=True
            )
            assert checked.returncode == 0, checked.stderr


def commands_of(language: str, content: str) -> str:
    """The commands: in a console, the lines after `$ ` and their continuations after a backslash."""
    if language == "bash":
        return content
    typed, more = [], False
    for line in content.splitlines():
        if line.startswith("$ ") or more:
            typed.append(line.removeprefix("$ "))
        more = (line.startswith("$ ") or more) and line.endswith("\\")
    return "\n".join(typed)
