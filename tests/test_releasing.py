"""The checks of commits and releases in .ci, on temporary repositories."""

import importlib.util
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("message", "fault"),
    [
        ("Refuse truncated Parquet at upload\n\nIts footer was read only by the worker.\n", None),
        ("Refuse truncated Parquet\n\n# Please enter the commit message\n", "a body that says why"),
        ("Refuse truncated Parquet", "a body that says why"),
        ("Refuse it\nat once\n", "an empty line"),
        ("Refuse truncated Parquet.\n\nWhy.\n", "full stop"),
        (f"Refuse {'x' * 70}\n\nWhy.\n", "at most 72 characters, got 77"),
        ("truncated Parquet\n\nWhy.\n", "begins with a verb"),
        ("", "begins with a verb"),
    ],
)
def test_a_commit_has_a_short_subject_and_a_body(message: str, fault: str | None) -> None:
    found = script("commit_subject").fault(message)
    assert found is None if fault is None else fault in found


def test_the_hooks_run_programs_that_exist() -> None:
    entries = re.findall(r"entry: (\S+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert set(entries) == {".venv/bin/ruff", ".ci/commit_subject.py", "make"}
    assert (ROOT / ".ci" / "commit_subject.py").stat().st_mode & 0o100


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository that is ready for version 0.2.0."""
    (tmp_path / "batchserve").mkdir()
    (tmp_path / "batchserve" / "__init__.py").write_text('__version__ = "0.2.0"\n')
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## [Unreleased]\n\n## [0.2.0] - 2027-01-31\n\n- A line.\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "Release 0.2.0")
    return tmp_path


def git(folder: Path, *arguments: str) -> None:
    who = ("-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True)


def test_a_release_that_is_ready_has_no_faults(repository: Path) -> None:
    assert list(script("release").faults("0.2.0", repository)) == []


@pytest.mark.parametrize(
    ("version", "file", "old", "new", "fault"),
    [
        ("0.2.0", "batchserve/__init__.py", "0.2.0", "0.1.0", "expected __version__ 0.2.0, got 0.1.0"),
        ("0.2.0", "CHANGELOG.md", "[0.2.0] - 2027-01-31", "[0.2.0]", "## [0.2.0] - YYYY-MM-DD"),
        ("0.2.0", "CHANGELOG.md", "[Unreleased]\n", "[Unreleased]\n\n- Late.\n", "an empty section"),
        ("0.2", "CHANGELOG.md", "", "", "a version such as"),
    ],
)
def test_a_release_names_what_is_missing(
    repository: Path, version: str, file: str, old: str, new: str, fault: str
) -> None:
    path = repository / file
    path.write_text(path.read_text().replace(old, new, 1))
    git(repository, "commit", "--quiet", "--all", "--allow-empty", "--message", "Change it")
    found = list(script("release").faults(version, repository))
    assert len(found) == 1
    assert fault in found[0]


def test_a_release_needs_its_changes_committed_and_its_tag_free(repository: Path) -> None:
    (repository / "left").write_text("behind")
    git(repository, "tag", "v0.2.0")
    committed, free = script("release").faults("0.2.0", repository)
    assert "not committed" in committed
    assert "take the next version" in free
