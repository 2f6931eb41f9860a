"""The services of docker-compose.yml, with names of hosts, ports and folders of this machine."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from seaweed import free_ports

ROOT = Path(__file__).resolve().parent.parent.parent


class Compose:
    """What the file says about each service. Its secrets are made by the script that makes those of the file."""

    def __init__(self, folder: Path, servers: str = "127.0.0.1", **hosts: str) -> None:
        """`folder` gets the secrets and the data. `servers`: the address of the database and the object store here;
        `hosts`: those of other hosts that the file names, with _ for -."""
        self.folder, self.servers = folder, servers
        self._hosts = {name.replace("_", "-"): address for name, address in hosts.items()}
        self.services: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
        self.api, self.postgres, self.s3 = free_ports(3)
        self._make_secrets()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.api}"

    def secret(self, name: str) -> Path:
        return self.folder / "deploy" / "secrets" / name

    def command(self, service: str) -> list[str]:
        """With the entry point, where the file has another one than the image."""
        described = self.services[service]
        return [self._here(word) for word in (*described.get("entrypoint", ()), *described["command"])]

    def environment(self, service: str) -> dict[str, str]:
        given: Mapping[str, Any] = self.services[service].get("environment", {})
        return {name: self._here(str(value)) for name, value in given.items()}

    def _here(self, text: str) -> str:
        names = {
            "/run/secrets": str(self.secret("")),
            "seaweedfs:8333": f"{self.servers}:{self.s3}",
            "@postgres/": f"@{self.servers}:{self.postgres}/",
            "-ip=seaweedfs": f"-ip={self.servers}",
            "0.0.0.0:9464": "127.0.0.1:0",  # of several workers on one host
            "-ip.bind=0.0.0.0": f"-ip.bind={self.servers}",
            "0.0.0.0": "127.0.0.1",  # noqa: S104 - which is replaced
            "=/data": f"={self.folder / 'objects'}",
            **{f"{name}:": f"{address}:" for name, address in self._hosts.items()},
        }
        if text == "8000":
            return str(self.api)
        for there, here in names.items():
            text = text.replace(there, here)
        return text

    def _make_secrets(self) -> None:
        script = self.folder / "deploy" / "secrets.sh"
        script.parent.mkdir()
        script.write_bytes((ROOT / "deploy" / "secrets.sh").read_bytes())
        subprocess.run(["sh", script], check=True)
        database = self.secret("database")
        database.chmod(0o600)
        database.write_text(self._here(database.read_text()))


def clean() -> dict[str, str]:
    """The environment of this process without settings of batchserve and of object stores."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("BATCHSERVE_", "AWS_"))}
