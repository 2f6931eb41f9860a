"""Batch prediction without HTTP: a process that reaches storage and database registers models, submits inputs and
reads results itself, and a worker scores them. No server runs.

    from batchserve.direct import Direct

    with Direct.open() as direct:
        direct.register("iris", Path("iris.onnx"))
        job_id = direct.submit(Path("new.csv"), "iris")
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import uuid_utils

from batchserve import registry
from batchserve.access import DEFAULT_TENANT
from batchserve.admission import admit
from batchserve.db.connect import Database
from batchserve.domain import Job, ModelVersion, Options, ReadOptions, StoredInput
from batchserve.errors import ResultNotReady
from batchserve.formats import encoding_of, sniff
from batchserve.formats.encodings import Transcoder
from batchserve.jobs import contents, queries
from batchserve.quotas.account import Added, charge
from batchserve.registration import NewModel, register, require_name
from batchserve.runtime import open_database
from batchserve.scoring import unpacking
from batchserve.scoring.checks import check_input
from batchserve.settings import Settings
from batchserve.storage import Storage, input_key, open_storage
from batchserve.submission import (
    Queueing,
    Submission,
    clean_filename,
    create,
    default_options,
    naming_bytes,
    wanted_columns,
)

__all__ = ["Direct"]

_BLOCK = 2**20
"""Bytes that are read at once; the format of an input is detected from the first."""


class Direct:
    """Direct access to a storage and a database from a process on this host. For trusted models and inputs: they are
    read in this process, without limits on memory and time, API keys or quotas."""

    def __init__(self, database: Database, storage: Storage) -> None:
        self._database, self._storage = database, storage

    @classmethod
    @contextmanager
    def open(cls, settings: Settings | None = None) -> Iterator["Direct"]:
        """Opens the storage and database of the settings, by default of the environment.

        Raises SchemaOutdated or SchemaTooNew.
        """
        settings = settings or Settings()
        storage = open_storage(settings.storage)
        with open_database(settings) as database:
            yield cls(database, storage)

    def register(self, name: str, model: Path | bytes) -> ModelVersion:
        """Registers an ONNX model, or a zip of one and its external data; equal bytes return the existing version.
        Raises InvalidOptions for an invalid name, and ModelRefused.
        """
        require_name(name)
        content = model.read_bytes() if isinstance(model, Path) else model
        admitted = admit(content)
        digest = hashlib.sha256(content).hexdigest()
        new = NewModel(name, digest, len(content), admitted.signature, admitted.metadata, [admitted.model])
        return register(self._database, self._storage, new)

    def submit(
        self,
        file: Path,
        model: ModelVersion | str,
        options: Options | None = None,
        queueing: Queueing | None = None,
        *,
        read: ReadOptions = ReadOptions(),  # noqa: B008 - it is frozen
        tenant: str = DEFAULT_TENANT,
    ) -> str:
        """Stores an input and queues its job; returns the ID of the job. `model`: a version, or `name` or
        `name@version`.

        The input is checked as by the API; one that does not fit is not kept. Raises SchemaMismatch, InvalidInput,
        InvalidOptions, UnsupportedMedia, ModelNotFound and InsufficientStorage.
        """
        if isinstance(model, str):
            with self._database.read() as connection:
                model = registry.resolve(connection, model)
        job_id = str(uuid_utils.uuid7())
        columns = wanted_columns(model, options.columns if options else None)
        new = self._store(job_id, file, read, columns)
        options = options or default_options(new.format, model)
        submission = Submission(tenant, job_id, (new,), model, options, queueing or Queueing())
        try:
            check_input(submission.source(self._storage.address), model, options)
        except BaseException:
            self._storage.delete(new.key)
            raise
        with naming_bytes(self._database, undo=lambda: self._storage.delete(new.key)) as connection:
            now = self._database.moment(connection).wall
            create(connection, submission, now)
            charge(connection, tenant, Added(new.bytes or 0), now, is_enforced=False)
        return job_id

    def job(self, job_id: str) -> Job:
        """Raises JobNotFound."""
        with self._database.read() as connection:
            return queries.get(connection, job_id)

    def result(self, job_id: str) -> BinaryIO:
        """The result of a completed job, which never changes. Raises JobNotFound and ResultNotReady."""
        job = self.job(job_id)
        if job.result is None:
            raise ResultNotReady(f"job {job_id} is {job.state} and has no result")
        return contents.opened(self._database, self._storage, job.result.key)

    def _store(self, job_id: str, file: Path, read: ReadOptions, columns: frozenset[str]) -> StoredInput:
        with file.open("rb") as source:
            blocks = iter(partial(source.read, _BLOCK), b"")
            beginning = next(blocks, b"")
            if (encoding := encoding_of(beginning, read)) is not None:
                blocks = Transcoder(encoding).blocks(chain([beginning], blocks))
                beginning = next(blocks, b"")
            format, dialect = sniff(beginning, None, file.name, read, columns)
            with self._storage.create(input_key(job_id)) as writer:
                for block in chain([beginning], blocks):
                    writer.write(block)
                stored = writer.commit()
        filename = clean_filename(file.name)
        new = StoredInput(input_key(job_id), format.name, dialect, stored.bytes, stored.sha256, filename)
        return self._unpacked(new, read, columns) if format.name == "zip" else new

    def _unpacked(self, stored: StoredInput, read: ReadOptions, columns: frozenset[str]) -> StoredInput:
        """The table in a zip in the place of the zip, or that itself."""
        address, target = self._storage.address, input_key(str(uuid_utils.uuid7()))
        table: StoredInput | None = None
        is_images = False
        try:
            contents = unpacking.inspect(address, stored.key)
            task = unpacking.Unpacking(address, stored.key, target, read, columns, 2**62)
            table = None if contents.is_images else unpacking.unpack(task, contents)
            is_images = table is None
        finally:
            if not is_images:
                self._storage.delete(stored.key)
        return stored if table is None else replace(table, filename=stored.filename)
