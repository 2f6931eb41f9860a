"""The examples and their pages. `make examples` runs the examples, also in continuous integration."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import examples.__main__

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = sorted(script.parent for script in (ROOT / "examples").glob("*/run.py"))


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def output_in(readme: str) -> str:
    """The content of the first text fence of a README."""
    found = re.search(r"^prints.*?^```text\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    assert found, "the README does not say what the example prints"
    return found[1]


def printed_words(script: Path) -> Iterator[str]:
    """The words that every run of a script prints, regardless of its figures."""
    for node in ast.walk(ast.parse(text_of(script))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            for text in node.args:
                for part in text.values if isinstance(text, ast.JoinedStr) else [text]:
                    if isinstance(part, ast.Constant):
                        yield from re.findall(r"[A-Za-z][\w' ]{4,}\w", str(part.value))


def test_the_eight_examples_exist() -> None:
    names = [folder.name for folder in FOLDERS]
    assert names == ["animals", "direct", "flights", "imagenet", "iris", "night", "one-row", "sentiment"]


def test_every_example_is_listed_and_no_other() -> None:
    table = text_of(ROOT / "examples" / "README.md")
    listed = re.findall(r"^\| \[([\w-]+)\]\(([\w-]+)/README\.md\) \|", table, re.MULTILINE)
    assert sorted(listed) == [(folder.name, folder.name) for folder in FOLDERS]


def test_the_makefile_lists_the_examples_that_need_pytorch() -> None:
    found = re.search(r"^WITH_TORCH := (.*)$", text_of(ROOT / "Makefile"), re.MULTILINE)
    assert found
    assert set(found[1].split()) == examples.__main__.WITH_TORCH


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md", "CONTRIBUTING.md"])
def test_the_pages_that_newcomers_read_lead_to_the_examples(page: str) -> None:
    assert re.search(r"\]\((\.\./)?examples/README\.md\)|make examples", text_of(ROOT / page))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_readme_of_an_example_has_its_command_and_its_output(folder: Path) -> None:
    readme = text_of(folder / "README.md")
    assert readme.startswith(f"# {folder.name}\n")
    assert f"```bash\nmake examples ONLY={folder.name}\n```" in readme
    assert "[run.py](run.py)" in readme
    shown = output_in(readme)
    missing = [words for script in folder.glob("*.py") for words in printed_words(script) if words not in shown]
    assert missing == []


def test_an_unknown_example_is_refused_with_the_existing_ones() -> None:
    command = [sys.executable, "-m", "examples", "iris", "tulips"]
    told = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 2
    assert "there is no example tulips" in told.stderr
    assert "iris" in told.stderr
