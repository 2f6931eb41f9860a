"""nginx as the limit of transfers: PUT into a folder, GET by sendfile."""

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import environments
from benchmarks.environments import Unavailable

# As root, the workers need root's rights on the folder.
CONFIGURATION = """
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log; {user}
events {{ }}
http {{
  access_log off; sendfile on; tcp_nopush on; client_max_body_size 0;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  server {{ listen 127.0.0.1:{port}; root {folder}/files; location / {{ dav_methods PUT DELETE; }} }}
}}
"""


@contextmanager
def available(folder: Path, say: Callable[[str], None]) -> Iterator[str | None]:
    """The address of an nginx that keeps its files for the block; None if nginx is not available."""
    try:
        program = environments.nginx(folder)
    except Unavailable as error:
        say(f"nginx: {error}")
        yield None
        return
    with TemporaryDirectory(dir=folder) as name, serving(program, Path(name) / "nginx") as url:
        yield url


@contextmanager
def serving(program: Path, folder: Path) -> Iterator[str]:
    """The address of an nginx that keeps its files in `folder`. Raises Unavailable when it does not start."""
    (folder / "files").mkdir(parents=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    configuration = folder / "nginx.conf"
    user = "user root;" if os.geteuid() == 0 else ""
    configuration.write_text(CONFIGURATION.format(folder=folder, port=port, user=user))
    command = [str(program), "-p", str(folder), "-e", str(folder / "error.log"), "-c", str(configuration)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            _wait(process, port, folder / "error.log")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def _wait(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    for _ in range(100):
        if process.poll() is not None:
            break
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise Unavailable(f"nginx did not start: {log.read_text() if log.exists() else 'no log'}")
