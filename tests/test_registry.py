"""Model versions and idempotency keys, on every kind of database."""

import asyncio
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from batchserve import idempotency, registry
from batchserve.db.connect import Database
from batchserve.domain import Column, InputTensor, ModelVersion, OutputTensor, Signature, StoredInput
from batchserve.errors import IdempotencyMismatch, ModelInUse, ModelNotFound
from batchserve.jobs import queries, requests

SIGNATURE = Signature(
    (InputTensor("X", "float32", (None, 2), (Column("a", "float32"), Column("é", "float32", nullable=True))),),
    (OutputTensor("label", "string", (None,), "label", ("cat", "dog")),),
    task="classification",
    records_per_second=1234.5,
    sample=({"a": 1.5, "é": None},),
    notes=("One was changed.",),
)


def add(database: Database, name: str, digest: str) -> ModelVersion:
    with database.write() as connection:
        return registry.add(connection, name, digest, 99, SIGNATURE, {"batchserve.task": "x"}, 5.0)


def resolve(database: Database, reference: str) -> ModelVersion:
    with database.read() as connection:
        return registry.resolve(connection, reference)


def delete(database: Database, model: ModelVersion) -> bool:
    """Whether another version still needs the artifact."""
    with database.write() as connection:
        registry.delete_if_unused(connection, model, 9.0)
        return registry.has_version(connection, model.digest)


# --- models ---


def test_a_version_is_read_as_it_was_written(database: Database) -> None:
    added = add(database, "iris", "d1")
    assert added == ModelVersion(added.id, "iris", 1, "d1", 99, SIGNATURE, {"batchserve.task": "x"}, 5.0)
    assert resolve(database, "iris@1") == added


def test_a_name_means_its_newest_version(database: Database) -> None:
    first, second, other = (
        add(database, "iris", "d1"),
        add(database, "iris", "d2"),
        add(database, "wine", "d1"),
    )
    assert [model.version for model in (first, second, other)] == [1, 2, 1]
    assert resolve(database, "iris") == second
    assert resolve(database, "iris@1") == first
    with database.read() as connection:
        assert registry.versions(connection, "iris") == [second, first]
        assert registry.newest_versions(connection) == [second, other]
        assert registry.find_digest(connection, "iris", "d1") == first
        assert registry.find_digest(connection, "wine", "d2") is None


@pytest.mark.parametrize("reference", ["rose", "iris@2", "iris@0", f"iris@{10**30}", "iris@", "iris@x", "iris@-1", ""])
def test_an_unknown_model_is_named(database: Database, reference: str) -> None:
    add(database, "iris", "d1")
    with pytest.raises(ModelNotFound, match=f"no model '{reference}'"):
        resolve(database, reference)


def test_an_unknown_model_is_refused_with_the_existing_ones(database: Database) -> None:
    with pytest.raises(ModelNotFound, match="none is registered yet"):
        resolve(database, "rose")
    delete(database, add(database, "gone", "d0"))
    add(database, "wine", "d1")
    add(database, "iris", "d1")
    with pytest.raises(ModelNotFound, match="registered are iris, wine"):
        resolve(database, "rose")
    with pytest.raises(ModelNotFound), database.read() as connection:
        registry.versions(connection, "gone")


def state(database: Database, reference: str) -> Hashable | None:
    return asyncio.run(registry.state(database, reference))


def test_the_state_of_a_reference_changes_with_the_version_that_it_means(database: Database) -> None:
    first = add(database, "iris", "d1")
    known = {reference: state(database, reference) for reference in ("iris", "iris@1", "iris@2", "wine")}
    add(database, "wine", "d3")
    second = add(database, "iris", "d2")
    changed = [reference for reference, before in known.items() if state(database, reference) != before]
    assert changed == ["iris", "iris@2", "wine"]
    newest = state(database, "iris")
    delete(database, first)
    assert state(database, "iris@1") != known["iris@1"]
    assert state(database, "iris") == newest
    delete(database, second)
    assert state(database, "iris") != newest


def test_an_unknown_version_is_refused_with_the_existing_ones(database: Database) -> None:
    add(database, "wine", "d0")
    delete(database, add(database, "iris", "d1"))
    add(database, "iris", "d2")
    with pytest.raises(ModelNotFound, match=r"no model 'iris@9'; iris has version 2\Z"):
        resolve(database, "iris@9")
    add(database, "iris", "d3")
    with pytest.raises(ModelNotFound, match=r"no model 'iris@1'; iris has versions 2, 3\Z"):
        resolve(database, "iris@1")


def test_a_deleted_version_is_gone_and_its_number_is_never_used_again(database: Database) -> None:
    first, second = add(database, "iris", "d1"), add(database, "iris", "d2")
    delete(database, second)
    assert resolve(database, "iris") == first
    with pytest.raises(ModelNotFound):
        resolve(database, "iris@2")
    with database.read() as connection:
        assert registry.find_digest(connection, "iris", "d2") is None
    assert add(database, "iris", "d2").version == 3


def test_an_artifact_is_removed_with_the_last_version_that_has_it(database: Database) -> None:
    iris, wine = add(database, "iris", "d1"), add(database, "wine", "d1")
    assert delete(database, iris) is True
    assert delete(database, wine) is False


def test_a_version_that_an_unfinished_job_uses_is_not_deleted(database: Database) -> None:
    model = add(database, "iris", "d1")
    with database.write() as connection:
        requests.create(connection, "1", [StoredInput("inputs/1", "csv")], model, 1.0)
    with pytest.raises(ModelInUse, match="iris@1 is used by 1 unfinished job"):
        delete(database, model)
    with database.write() as connection:
        requests.request_cancel(connection, "1", 2.0)
    delete(database, model)
    with database.read() as connection:
        job = queries.get(connection, "1")
    assert job.model == model  # the row of a finished job still says what scored it


def test_signatures_are_read_by_many_threads_while_others_are_forgotten(database: Database) -> None:
    """Parsed signatures are cached, and evicted when there are too many."""
    names = [f"m{number}" for number in range(300)]
    with database.write() as connection:
        for name in names:
            signature = replace(SIGNATURE, notes=(name,))
            registry.add(connection, name, name, 1, signature, {}, 5.0)

    def read(offset: int) -> int:
        right = 0
        for name in names[offset:] + names[:offset]:
            right += resolve(database, name).signature.notes == (name,)
        return right

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read, (0, 75, 150, 225))) == [300] * 4


# --- idempotency keys ---


def test_a_repeated_key_gets_the_first_response(database: Database) -> None:
    content = idempotency.fingerprint("POST", "/v1/upload", "a" * 64)
    with database.write() as connection:
        assert idempotency.recall(connection, "k", content) is None
        idempotency.remember(connection, "k", content, "job", 201, 10.0)
    with database.read() as connection:
        assert idempotency.recall(connection, "k", content) == idempotency.Remembered("job", 201)
        assert idempotency.recall(connection, "other", content) is None


def test_a_key_that_comes_with_other_content_is_refused(database: Database) -> None:
    with database.write() as connection:
        idempotency.remember(connection, "k", idempotency.fingerprint("a"), "job", 201, 10.0)
    with pytest.raises(IdempotencyMismatch, match="send a new key"), database.read() as connection:
        idempotency.recall(connection, "k", idempotency.fingerprint("b"))


def test_a_fingerprint_separates_its_parts() -> None:
    assert idempotency.fingerprint("ab", "c") != idempotency.fingerprint("a", "bc")
    assert idempotency.fingerprint("a", "b") == idempotency.fingerprint("a", "b")


def test_a_key_is_forgotten_with_the_work_that_was_undone(database: Database) -> None:
    def undone() -> None:
        with database.write() as connection:
            idempotency.remember(connection, "k", "f", "job", 201, 10.0)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        undone()
    with database.read() as connection:
        assert idempotency.recall(connection, "k", "f") is None


def test_old_keys_are_forgotten(database: Database) -> None:
    with database.write() as connection:
        for name, now in [("a", 1.0), ("b", 2.0), ("c", 3.0)]:
            idempotency.remember(connection, name, "f", "job", 201, now)
        assert idempotency.forget_older(connection, 3.0) == 2
        assert idempotency.recall(connection, "a", "f") is None
        assert idempotency.recall(connection, "c", "f") is not None
