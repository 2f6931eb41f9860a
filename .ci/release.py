#!/usr/bin/env python3
"""Checks that a release is ready to be tagged: `.ci/release.py 0.2.0`. Prints what is missing and exits with 1."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_VERSION = re.compile(r"\d+\.\d+\.\d+(rc\d+)?")


def faults(version: str, root: Path = ROOT) -> Iterator[str]:
    """The reasons why the tag `v{version}` cannot be set."""
    if not _VERSION.fullmatch(version):
        yield f"expected a version such as 1.2.3 or 1.2.3rc1, got {version!r}"
        return
    package = re.search(r'^__version__ = "(.+)"$', (root / "batchserve/__init__.py").read_text(), re.MULTILINE)
    if package is None or package[1] != version:
        yield f"batchserve/__init__.py: expected __version__ {version}, got {package and package[1]}"
    changelog = (root / "CHANGELOG.md").read_text()
    if not re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changelog, re.MULTILINE):
        yield f"CHANGELOG.md: expected a heading '## [{version}] - YYYY-MM-DD'"
    unreleased = re.search(r"^## \[Unreleased\]\n(.*?)(?=^## \[|\Z)", changelog, re.MULTILINE | re.DOTALL)
    if unreleased is None or unreleased[1].strip():
        yield "CHANGELOG.md: expected an empty section '## [Unreleased]' above it"
    if _git(root, "status", "--porcelain"):
        yield "the working tree has changes that are not committed"
    if _git(root, "tag", "--list", f"v{version}"):
        yield f"the tag v{version} exists already: a release never changes, take the next version"


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: .ci/release.py VERSION")
    if found := list(faults(sys.argv[1])):
        sys.exit("\n".join(found))
    print(f"ready: git tag -a v{sys.argv[1]} -m v{sys.argv[1]}")


if __name__ == "__main__":
    main()
