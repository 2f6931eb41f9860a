"""Typed views of the server's descriptions of jobs and models."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from batchserve.client.notebook import facts_html

J = TypeVar("J", bound="JobView")

FINISHED = frozenset({"completed", "failed", "cancelled", "expired"})


class View:
    """Something on the server, as of the last response."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self._data = dict(data)

    @property
    def data(self) -> dict[str, Any]:
        """The whole description."""
        return self._data

    @property
    def id(self) -> str:
        return str(self.data["id"])


class JobView(View):
    """A job as of the last response."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.id!r}, state={self.state!r}, progress={self.progress:.0%})"

    def _repr_html_(self) -> str:
        rows, error = self.rows, self.error or {}
        counts = ", ".join(f"{count:,} {name}" for name, count in rows.items() if count is not None)
        reason = error.get("message") or error.get("detail")
        facts = {"state": self.state, "model": self.model, "progress": f"{self.progress:.0%}", "rows": counts or None}
        return facts_html(f"Job {self.id}", facts | {"error": reason})

    @property
    def state(self) -> str:
        """uploaded, queued, running, completed, failed, cancelled or expired."""
        return str(self.data["state"])

    @property
    def finished(self) -> bool:
        return self.state in FINISHED

    @property
    def progress(self) -> float:
        """0.0 to 1.0; 1.0 only in a finished state."""
        return float(self.data.get("progress") or 0.0)

    @property
    def rows(self) -> dict[str, int | None]:
        """`total`, `ok` and `failed`; `total` is None while unknown."""
        return dict(self.data.get("rows") or {})

    @property
    def error(self) -> dict[str, Any] | None:
        """Why the job failed: `code`, `message` and more."""
        return self.data.get("error")

    @property
    def model(self) -> str | None:
        """The version that scores, as `name@version`."""
        model = self.data.get("model")
        return f"{model['name']}@{model['version']}" if model else None

    @property
    def request_id(self) -> str | None:
        """The ID of the request that queued it, as in the logs of server and worker."""
        return self.data.get("request_id")

    @property
    def metadata(self) -> dict[str, str]:
        return dict(self.data.get("metadata") or {})


@dataclass(frozen=True, slots=True)
class Queued(Generic[J]):
    """The outcome of one call that queues uploaded inputs."""

    jobs: list[J]
    """Jobs that were queued, or completed from an equal job, in the order of their upload."""
    completed: int
    """Number of already completed ones."""
    refused: list[dict[str, Any]]
    """Jobs that stay uploaded because they do not fit: `id` and `problem` (`code`, `detail`) of each."""


@dataclass(frozen=True, slots=True)
class FilesProgress:
    """How far many files have come."""

    done: int
    total: int
    rows: int
    """Of the files that are done, `failed` of them without a prediction."""
    failed: int
    share: float
    """0.0 to 1.0, by the sizes of the files."""


@dataclass(frozen=True, slots=True)
class Model:
    """A registered model version. `data` is the whole description."""

    data: Mapping[str, Any]

    def _repr_html_(self) -> str:
        takes = ", ".join(f"{column['name']} ({column['dtype']})" for column in self.columns)
        gives = ", ".join(f"{name} ({kind})" for name, kind in self.data["result_columns"].items())
        facts = {"task": self.data.get("task"), "takes": takes or "columns in file order, or arrays", "gives": gives}
        return facts_html(f"Model {self.name}@{self.version}", facts | {"digest": self.digest})

    @property
    def name(self) -> str:
        return str(self.data["name"])

    @property
    def version(self) -> int:
        return int(self.data["version"])

    @property
    def digest(self) -> str:
        """SHA-256 of the artifact, in hexadecimal."""
        return str(self.data["digest"])

    @property
    def columns(self) -> list[dict[str, Any]]:
        """The columns that it takes by name: `name`, `dtype`, `nullable`. Empty: any, in file order."""
        return list(self.data["columns"])

    @property
    def signature(self) -> dict[str, Any]:
        """Its inputs (`columns`, `inputs`), outputs (`outputs`, `result_columns`, `labels`) and `task`."""
        names = ("task", "columns", "inputs", "outputs", "result_columns", "labels")
        return {name: self.data[name] for name in names}
