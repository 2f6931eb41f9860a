"""Checks of pyproject.toml, constraints.txt and the layout of the code."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import batchserve

ROOT = Path(__file__).resolve().parent.parent


def constraints() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def declared_dependencies() -> list[Requirement]:
    """All requirements of the installed distribution, including those of the extras."""
    requirements = metadata.requires("batchserve")
    assert requirements is not None
    return [Requirement(requirement) for requirement in requirements]


def test_the_distribution_has_the_version_of_the_package() -> None:
    assert metadata.version("batchserve") == batchserve.__version__


def test_constraints_are_exact_and_name_no_place() -> None:
    for requirement in constraints():
        assert requirement.url is None
        assert [specifier.operator for specifier in requirement.specifier] == ["=="], requirement
    assert not re.search(r"://|^-", (ROOT / "constraints.txt").read_text(), re.MULTILINE)


def test_constraints_meet_every_declared_dependency() -> None:
    pinned = {canonicalize_name(r.name): next(iter(r.specifier)).version for r in constraints()}
    for requirement in declared_dependencies():
        name = canonicalize_name(requirement.name)
        if name != "batchserve":
            assert requirement.specifier.contains(pinned[name]), requirement


def test_what_is_installed_is_what_is_pinned() -> None:
    for requirement in constraints():
        installed = list(metadata.distributions(name=requirement.name))
        assert all(requirement.specifier.contains(distribution.version) for distribution in installed), requirement


@pytest.mark.torch  # the environment that has everything
def test_every_pin_is_of_something_that_is_installed() -> None:
    assert [
        requirement.name for requirement in constraints() if not list(metadata.distributions(name=requirement.name))
    ] == []


def test_every_documented_extra_exists() -> None:
    extras = metadata.metadata("batchserve").get_all("Provides-Extra")
    assert extras is not None
    assert set(extras) == {
        "sklearn", "fast", "excel", "postgres", "s3", "otel", "ray", "torch", "img2feat", "demo", "docs", "dev",
        "dev-ray", "dev-torch",
    }  # fmt: skip


def test_protobuf_7_is_never_installed_with_scikit_learn() -> None:
    """protobuf 7 breaks the conversion of HistGradientBoosting."""
    protobuf = {str(r.marker): str(r.specifier) for r in declared_dependencies() if r.name == "protobuf"}
    with_scikit_learn = {str(r.marker) for r in declared_dependencies() if r.name == "scikit-learn"}
    assert 'extra == "sklearn"' in with_scikit_learn
    assert protobuf == dict.fromkeys(with_scikit_learn, "<7")


@pytest.mark.parametrize(
    ("name", "floor"),
    [
        ("starlette", "1.3.1"),
        ("python-multipart", "0.0.31"),
        ("onnx", "1.21"),
        ("onnxruntime", "1.28.1"),
        ("pillow", "12.3"),
    ],
)
def test_no_release_with_a_known_vulnerability_is_allowed(name: str, floor: str) -> None:
    assert Version(metadata.version(name)) >= Version(floor)
    declared = next(r for r in declared_dependencies() if r.name == name and r.marker is None)
    lowest = next(s.version for s in declared.specifier if s.operator == ">=")
    assert Version(lowest) >= Version(floor)


def test_the_data_directory_is_ignored_except_for_its_readme() -> None:
    lines = (ROOT / ".gitignore").read_text().splitlines()
    assert lines.index("/storage/*") < lines.index("!/storage/README.md")
    assert (ROOT / "storage" / "README.md").is_file()
    excluded = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["sdist"]
    assert "/storage/*" in excluded["exclude"]


def test_loading_onnxruntime_leaves_no_telemetry_behind(tmp_path: Path) -> None:
    """onnxruntime >= 1.29 writes a device ID to HOME and sends telemetry, unless that is disabled before its import."""
    command = [sys.executable, "-c", "import batchserve.inference.session, onnxruntime"]
    subprocess.run(command, env={"HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}, cwd=ROOT, check=True)
    assert list(tmp_path.iterdir()) == []


# --- layers and sizes ------------------------------------------------------------------------------------------------


def layers() -> list[str]:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    return list(next(contract["layers"] for contract in contracts if contract["type"] == "layers"))


def test_contributing_names_the_layers_that_are_checked() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    chain = next(block for block in re.findall(r"```\n(.*?)```", text, re.DOTALL) if block.startswith("cli >"))
    assert [layer.strip() for layer in chain.split(">")] == layers()


def test_the_architecture_page_describes_the_layers_that_are_checked() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text.partition("## Layers")[2].partition("`client` is outside")[0]
    described = re.findall(r"^\| (.+?) \| .+ \|$", table, re.MULTILINE)[1:]
    assert [layer.replace("\\|", "|") for layer in described] == layers()


MOST_LINES = {"module": 500, "class": 250, "function": 60}
LONGER = {
    "batchserve/domain.py": "the terms of the domain, one after the other",
    "batchserve/cli/protocol.py:Protocol": "one state machine, of one connection",
    "batchserve/cli/jobs.py:predict": "its options, each with its help",
    "batchserve/cli/server.py:serve": "its options, each with its help",
    "batchserve/formats/kernels/fields.py:read_fields": "as several functions it is four times as slow",
    "batchserve/conversion/torch.py:export_torch": "half of it says what its parameters mean",
}
"""What may be longer, with the reason."""


def sizes() -> Iterator[tuple[str, str, int]]:
    for path in sorted((ROOT / "batchserve").rglob("*.py")):
        text, place = path.read_text(), path.relative_to(ROOT).as_posix()
        yield "module", place, len(text.splitlines())
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                kind = "class" if isinstance(node, ast.ClassDef) else "function"
                yield kind, f"{place}:{node.name}", (node.end_lineno or 0) - node.lineno + 1


def test_modules_classes_and_functions_stay_within_their_limits() -> None:
    longer = {place: (kind, lines) for kind, place, lines in sizes() if lines > MOST_LINES[kind]}
    assert {place: size for place, size in longer.items() if place not in LONGER} == {}
    assert set(LONGER) - set(longer) == set(), "these are no longer exceptions"
