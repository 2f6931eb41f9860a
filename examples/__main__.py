"""`python -m examples [NAME ...]`: runs examples, each with its own server, and prints the outcome of each."""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from batchserve.client.child import serving
from batchserve.errors import Unavailable

FOLDER = Path(__file__).resolve().parent
NAMES = sorted(script.parent.name for script in FOLDER.glob("*/run.py"))
WITH_TORCH = {"animals", "imagenet", "one-row"}
TORCH = FOLDER.parent / ".venv-torch" / "bin" / "python"
WITHOUT_SERVER = {"direct", "night"}
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "passive",  # threads that spin while they wait are very slow on shared cores
    "ORT_DISABLE_TELEMETRY": "1",  # also for scripts that import onnxruntime themselves
}
TIMEOUT = 600.0
"""Time limit of one example, in seconds."""


def main() -> int:
    """The number of examples that failed."""
    parser = argparse.ArgumentParser(
        prog="python -m examples", description="Runs examples; other options are passed to their scripts."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(NAMES)}")
    parser.add_argument("--torch", metavar="PYTHON", help="has torch; default: that of `make`, else this one")
    chosen, arguments = parser.parse_known_args()
    if unknown := set(chosen.names) - set(NAMES):
        parser.error(f"there is no example {', '.join(sorted(unknown))}: {', '.join(NAMES)}")
    torch = chosen.torch or str(TORCH if TORCH.exists() else sys.executable)
    lines, failed = [], 0
    for name in chosen.names or NAMES:
        print(f"== {name}", flush=True)
        started = time.perf_counter()
        problem = run(name, torch if name in WITH_TORCH else sys.executable, arguments)
        failed += problem is not None
        lines.append(f"{name:10} {time.perf_counter() - started:6.1f} s  {problem or 'ok'}")
        print(flush=True)
    print("\n".join(lines))
    return failed


def run(name: str, python: str, arguments: list[str]) -> str | None:
    """Runs an example's script in an empty folder, with a server on an empty storage; returns what failed."""
    with tempfile.TemporaryDirectory(prefix=f"batchserve-{name}-") as temporary, ExitStack() as stack:
        work, log = Path(temporary, "work"), Path(temporary, "server.log")
        work.mkdir()
        settings = {"BATCHSERVE_STORAGE": str(Path(temporary, "storage")), "BATCHSERVE_DATABASE": ""}
        try:
            if name not in WITHOUT_SERVER:
                settings["BATCHSERVE_URL"] = stack.enter_context(serving(log, **settings))
            script = [python, str(FOLDER / name / "run.py"), *arguments]
            environment = ENVIRONMENT | os.environ | settings | {"PYTHONPATH": str(FOLDER.parent)}
            subprocess.run(script, check=True, cwd=work, env=environment, timeout=TIMEOUT)
        except (subprocess.SubprocessError, Unavailable) as error:
            if log.exists():
                print(*log.read_text().splitlines()[-20:], sep="\n", file=sys.stderr)
            return f"FAILED: {error}"
    return None


if __name__ == "__main__":
    sys.exit(main())
