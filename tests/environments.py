"""Empty environments of Python, away from that of the tests, and what is installed into them."""

import subprocess
import sys
from pathlib import Path

__all__ = ["CLIENT", "client_wheel", "install", "new_environment", "run"]

ROOT = Path(__file__).resolve().parent.parent
CLIENT = ROOT / "packaging" / "client"
"""The project of the client alone."""


def run(*command: str, cwd: Path | None = None) -> str:
    """What a command prints. Fails the test with its messages where it fails."""
    done = subprocess.run(command, cwd=cwd, check=False, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def new_environment(folder: Path) -> Path:
    """The interpreter of a new environment, which has nothing, pip included."""
    run(sys.executable, "-m", "venv", "--without-pip", str(folder))
    return folder / "bin" / "python"


def install(python: Path, *what: str | Path) -> None:
    """`what`: arguments of `pip install`."""
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python))
    run(*pip, "install", "--quiet", *map(str, what))


def client_wheel(folder: Path) -> Path:
    """Builds the wheel of the client alone."""
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(CLIENT))
    (built,) = folder.glob("*.whl")
    return built
