"""Requirements of the benchmarks outside of the project: environments for the peers, and nginx, in one folder."""

import hashlib
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"
INSTALL_TIMEOUT = 600


class Unavailable(Exception):
    """A peer or tool is not available on this machine, or failed; the message has the reason."""


def python_with(folder: Path, name: str, requirements: Sequence[str], *, pinned: bool) -> Path:
    """The Python of a virtual environment with these requirements, made on first use.

    With `pinned` the versions are those of constraints.txt, where it names them. Raises Unavailable.
    """
    home = _home(folder, name, requirements, pinned=pinned)
    ready, python = home / ".ready", home / "bin" / "python"
    if not ready.exists():
        constraints = ["--constraint", str(CONSTRAINTS)] if pinned else []
        run([sys.executable, "-m", "venv", "--clear", str(home)], folder)
        run([str(python), "-m", "pip", "install", "--quiet", *constraints, *requirements], folder)
        ready.touch()
    return python


def versions(folder: Path, name: str, requirements: Sequence[str], *, pinned: bool) -> dict[str, str]:
    """The versions installed in that environment for these requirements; empty if it does not exist."""
    home = _home(folder, name, requirements, pinned=pinned)
    path = [str(packages) for packages in home.glob("lib/python*/site-packages")]
    wanted = [re.split(r"[\[=<>]", requirement)[0] for requirement in requirements]
    found = {distribution.name.lower(): distribution.version for distribution in distributions(path=path)}
    return {name: found[name] for name in wanted if name in found}


def nginx(folder: Path) -> Path:
    """The program, as installed or unpacked from Debian's package. Raises Unavailable."""
    if found := shutil.which("nginx"):
        return Path(found)
    home = folder / "environments" / "nginx"
    if not (home / "usr/sbin/nginx").exists():
        if not shutil.which("dpkg-deb"):
            raise Unavailable("nginx is not installed")
        home.mkdir(parents=True, exist_ok=True)
        run(["apt-get", "download", "nginx"], home)
        run(["dpkg-deb", "--extract", *map(str, home.glob("*.deb")), "."], home)
    return home / "usr/sbin/nginx"


def _home(folder: Path, name: str, requirements: Sequence[str], *, pinned: bool) -> Path:
    digest = hashlib.sha256(repr((sorted(requirements), pinned, platform.python_version())).encode()).hexdigest()[:8]
    return folder / "environments" / f"{name}-{digest}"


def run(command: Sequence[str], folder: Path) -> None:
    """Raises Unavailable with the last line of what the command said if it fails."""
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=INSTALL_TIMEOUT)
    except (OSError, subprocess.SubprocessError) as error:
        said = last_line(getattr(error, "stderr", None) or str(error))
        raise Unavailable(f"{command[0]} failed: {said}") from error


def last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]
