"""Intake: turns a request for inputs that are read where their owners keep them, objects or the rows of a query, into a
queued job. Used by the API, by schedules, and by processes that write to the database themselves.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Annotated, Literal, Self

import polars as pl
import uuid_utils
from pydantic import BaseModel, ConfigDict, Field, model_validator

from batchserve import registry
from batchserve.db.connect import Database
from batchserve.domain import STEM, Dialect, ModelVersion, Query, ReadOptions, StoredInput, TableTarget, Target
from batchserve.errors import InvalidInput, InvalidLocation, InvalidOptions, TargetExists, UnsupportedMedia
from batchserve.formats import (
    FORMATS,
    RESULT_FORMATS,
    encoding_of,
    format_of_name,
    get_format,
    require_suffix_of_result,
    sniff,
)
from batchserve.idempotency import KeyedRequest
from batchserve.options import PredictOptions
from batchserve.postgres import Place, place_of
from batchserve.quotas.account import Added, charge
from batchserve.scoring.tables import FORMAT
from batchserve.settings import Settings
from batchserve.storage import query_key
from batchserve.storage.locations import (
    Found,
    any_within,
    as_reached,
    exists,
    find,
    is_external,
    name_of,
    open_at,
    root_of,
)
from batchserve.submission import Submission, clean_filename, create, wanted_columns
from batchserve.values import MAX_NAME, Plain

__all__ = ["InputLocations", "JobRequest", "OutputLocation", "Prepared", "prepare", "require_connections", "submit"]

_BEGINNING = 2**20
"""Bytes from which the format of the first input is recognised."""
_MOST_PATTERNS = 1000
_SHOWN = 5
_DATE = "{date}"
_FIELDS = (STEM, _DATE)
_DESCRIBED_WITHIN = 10.0
"""Seconds in which a database says which columns a query has."""

Address = Annotated[str, Field(min_length=1, max_length=2048), Plain]
_TABLE = r"^[A-Za-z0-9_-]{1,63}\.[^.]{1,63}\.[^.]{1,63}$"


class InputLocations(BaseModel):
    """Which inputs a job reads in place: `urls`, or `query` and `connection`."""

    model_config = ConfigDict(extra="forbid")

    urls: Annotated[list[Address], Field(min_length=1, max_length=_MOST_PATTERNS)] | None = Field(
        None,
        description="Addresses, `file:///folder/name` or `s3://bucket/key`, each of one object or with the patterns "
        "`*`, `?`, `[...]` and `**`. Those that match one are read in the order of their names; each object once.",
        examples=[["file:///data/in/2026-11-*.parquet"]],
    )
    delimiter: str | None = Field(
        None, max_length=8, description="Of CSV: `,`, `;`, `tab` or `|`. Default: recognised."
    )
    decimal: str | None = Field(None, max_length=8, description="Decimal mark of CSV: `.` (default) or `,`.")
    query: Annotated[str, Field(min_length=1, max_length=65_536), Plain] | None = Field(
        None,
        description="One SELECT, whose rows are the input. They are read once, when the job runs.",
        examples=["SELECT id, age, city FROM customers ORDER BY id"],
    )
    connection: Annotated[str, Field(max_length=63), Plain] | None = Field(
        None, description="The database of the query, by the name that an administrator has given to it."
    )

    @model_validator(mode="after")
    def _of_one_kind(self) -> Self:
        if (self.urls is None) == (self.query is None):
            raise ValueError("expected either urls, or query and connection")
        if (self.query is None) != (self.connection is None):
            raise ValueError("expected query and connection together")
        if self.query is not None and (self.delimiter or self.decimal):
            raise ValueError("delimiter and decimal are of texts, and not of a query")
        return self


class OutputLocation(BaseModel):
    """Where a job writes its result, instead of keeping it: `url` or `table`; or `archive`, how it keeps it."""

    model_config = ConfigDict(extra="forbid")

    url: Address | None = Field(
        None,
        description="Address of the result. With `{stem}`, one for each input, named after it; `{date}` is the day in "
        "UTC on which the job was submitted, as 2026-11-30.",
        examples=["file:///data/out/{date}/{stem}.parquet"],
    )
    archive: bool = Field(
        False,
        description="Instead of an address: keep one result for each input, named after it, in a ZIP to download.",
    )
    overwrite: bool = Field(False, description="Replace objects of that name. Otherwise the job is refused.")
    partition_by: Annotated[str, Plain] | None = Field(
        None,
        max_length=MAX_NAME,
        description="A column of the result in Parquet: `url` is an empty folder, and ends with a slash. Its files are "
        "in folders named after the values, as `country=CH/`.",
    )
    table: Annotated[str, Field(pattern=_TABLE), Plain] | None = Field(
        None,
        description="A table of a database that an administrator has named, as `connection.schema.name`. It is made if "
        "there is none; otherwise columns are matched by their names.",
        examples=["warehouse.public.scores"],
    )
    mode: Literal["append", "replace"] = Field(
        "append", description="Of a table: `replace` removes all rows that it has, in the same transaction."
    )

    @model_validator(mode="after")
    def _of_one_kind(self) -> Self:
        if [self.url is not None, self.archive, self.table is not None].count(True) != 1:
            raise ValueError("expected one of url, archive and table")
        if self.url is None and (self.overwrite or self.partition_by is not None):
            raise ValueError("overwrite and partition_by go with url only")
        if self.table is None and self.mode != "append":
            raise ValueError("mode goes with table only")
        return self


class JobRequest(PredictOptions):
    """A job over inputs that are read where they are."""

    input: InputLocations
    output: OutputLocation | None = Field(None, description="Default: the result is kept, and downloaded.")
    input_file: bool = Field(
        False, description="Add a column `input_file` with the address of the input of each record."
    )


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request whose inputs were found, and which is ready to be checked and queued."""

    submission: Submission
    sample: StoredInput | None = None
    """Of a query: a table with its columns and no row, which is checked in its place."""

    @property
    def checked(self) -> Submission:
        """The submission by what there is of its inputs already."""
        return self.submission if self.sample is None else replace(self.submission, inputs=(self.sample,))

    @property
    def first(self) -> str:
        """The first input, as errors name it."""
        return self.submission.inputs[0].key if self.sample is None else "the query"

    def queue(self, database: Database, request: KeyedRequest | None = None) -> None:
        """Raises QuotaExceeded, and StorageQuotaExceeded where no space is left for a result."""
        with database.write() as connection:
            now = database.moment(connection).wall
            create(connection, self.submission, now, request)
            charge(connection, self.submission.tenant, Added(queues=True), now)


def prepare(
    settings: Settings, tenant: str, model: ModelVersion, request: JobRequest, now: float, job_id: str | None = None
) -> Prepared:
    """Finds the inputs, and reads the beginning of the first. It blocks: not for an event loop.

    `now`: in seconds since the epoch, the moment of which `{date}` is the day. Raises InvalidLocation and
    LocationRefused for an address, InputNotFound where nothing matches one, InvalidInput, UnsupportedMedia and
    InvalidOptions for what is found, TargetExists, QueryRefused, and Unavailable for an object store or a database that
    is out of reach.
    """
    request.require_allowed(settings)
    job_id, sample = job_id or str(uuid_utils.uuid7()), None
    if request.input.urls is not None:
        found = _found(settings, tenant, request.input.urls)
        inputs = _stored(found, request.input, wanted_columns(model, request.columns))
    else:
        inputs = (StoredInput(query_key(job_id), FORMAT),)
        sample = _sample(settings, tenant, request.input, inputs[0])
    output = request.output
    target = None if output is None or output.url is None else _target(settings, tenant, output, output.url, now)
    table = None if output is None or output.table is None else _table(settings, tenant, output, output.table)
    if request.format is None and target is not None:
        request = request.model_copy(update={"format": _format_by(target)})
    submission = request.submission(tenant, job_id, inputs, model)
    archive = output is not None and output.archive
    chosen = replace(
        submission.options,
        input_file=request.input_file,
        target=target,
        archive=archive,
        table=table,
        query=_query(request.input),
    )
    if table is not None:
        chosen = replace(chosen, format=_format_for(table, request.format))
    if archive:
        _by_result([one.stem for one in inputs], inputs)
    if target is not None:
        _require_writable(target, settings.outputs_of(tenant), inputs, chosen.format)
    if request.input_file and sample is not None:
        raise InvalidOptions("input_file: the rows of a query are in no file")
    if request.input_file and RESULT_FORMATS[chosen.format].holds == "array":
        raise InvalidOptions(f"{chosen.format} holds one array, and no column input_file: request parquet or csv")
    # A result that is reused is where its own job has put it.
    is_kept = target is None and table is None
    queueing = replace(submission.queueing, reuse=submission.queueing.reuse and is_kept)
    return Prepared(replace(submission, options=chosen, queueing=queueing), sample)


def submit(database: Database, settings: Settings, tenant: str, request: JobRequest, job_id: str | None = None) -> str:
    """Queues a job, and returns its ID. What a check of the first input would find, the job itself reports.

    Raises ModelNotFound, and what `prepare` raises.
    """
    with database.read() as connection:
        model = registry.resolve(connection, request.model)
        now = database.moment(connection).wall
    prepared = prepare(settings, tenant, model, request, now, job_id)
    prepared.queue(database)
    return prepared.submission.job_id


def _found(settings: Settings, tenant: str, patterns: Sequence[str]) -> list[Found]:
    """The objects in order, each once."""
    allowed, most = settings.inputs_of(tenant), settings.job_inputs
    found: dict[str, Found] = {}
    for pattern in patterns:
        for one in find(pattern, allowed, most):
            found.setdefault(one.url, one)
        if len(found) > most:
            raise InvalidLocation(f"the addresses name more than {most} objects; expected at most {most} in a job")
    return list(found.values())


def _stored(found: Sequence[Found], wanted: InputLocations, columns: frozenset[str]) -> tuple[StoredInput, ...]:
    first, read = found[0], ReadOptions(wanted.delimiter, wanted.decimal)
    format, dialect = _recognised(first, read, columns)
    _require_one_format(found, format)
    return tuple(
        StoredInput(
            one.url,
            format,
            dialect,
            one.bytes,
            None,
            clean_filename(name_of(one.url)),
            owned=False,
            version=one.version,
        )
        for one in found
    )


def _recognised(first: Found, read: ReadOptions, columns: frozenset[str]) -> tuple[str, Dialect]:
    """The format and dialect of the first input, which are those of all."""
    with open_at(first.url, first.version) as source:
        beginning = source.read(_BEGINNING)
    try:
        encoding = encoding_of(beginning, read)
        format, dialect = sniff(beginning, None, name_of(first.url), read, columns)
    except (InvalidInput, UnsupportedMedia) as error:
        raise type(error)(f"{first.url} cannot be read in place: {error.detail}") from error
    if encoding is not None:
        raise InvalidInput(
            f"{first.url} is a text in {encoding}; only UTF-8 is read in place: convert it, or upload it"
        )
    if format.name == "zip" and not first.url.endswith(".zip"):
        raise UnsupportedMedia(f"{first.url} cannot be read in place: it is an archive or a workbook: upload it")
    return format.name, dialect


def _require_one_format(found: Sequence[Found], format: str) -> None:
    """Raises InvalidInput when names say that another input has another format."""
    for one in found:
        own = format_of_name(name_of(one.url))
        if own is not None and own != format and FORMATS[own].family != FORMATS[format].family:
            raise InvalidInput(
                f"the inputs of a job have one format: {found[0].url} is {format}, and {one.url} is {own}"
            )


def _by_result(results: Iterable[str], inputs: Sequence[StoredInput]) -> dict[str, StoredInput]:
    """The inputs by the names of their results. Raises InvalidLocation for two with one name."""
    named: dict[str, StoredInput] = {}
    for result, one in zip(results, inputs, strict=False):
        if result in named:
            raise InvalidLocation(f"{named[result].key} and {one.key} would both have the result {result}")
        named[result] = one
    return named


def _target(settings: Settings, tenant: str, output: OutputLocation, address: str, now: float) -> Target:
    url = address.replace(_DATE, datetime.fromtimestamp(now, UTC).date().isoformat())
    if set("{}*?[]") & set(url.replace(STEM, "")):
        raise InvalidLocation(
            f"{address} is not an address of a result; expected one with {' and '.join(_FIELDS)} only"
        )
    root = root_of(url.replace(STEM, "x"), settings.outputs_of(tenant))
    if (output.partition_by is not None) != url.endswith("/"):
        raise InvalidLocation(f"{address}: an address that ends with a slash goes with partition_by, and no other")
    if output.partition_by is not None and (STEM in url or output.overwrite):
        raise InvalidLocation(f"{address}: with partition_by there is neither {STEM} nor overwrite")
    if output.partition_by is None:
        require_suffix_of_result(name_of(url.replace(STEM, "x")))
    return Target(url, root, output.overwrite, output.partition_by)


def _format_by(target: Target) -> str | None:
    """The format that the address of a result says."""
    if target.partition_by is not None:
        return "parquet"
    own = format_of_name(target.url)
    return own if own in RESULT_FORMATS else None


def _require_writable(target: Target, allowed: Sequence[str], inputs: Sequence[StoredInput], format: str) -> None:
    """Raises InvalidLocation for results of one name, TargetExists for those that are there."""
    if target.partition_by is not None:
        if format != "parquet":
            raise InvalidOptions(f"partition_by is for results in parquet, and this one is {format}: request parquet")
        if any_within(target.url, target.root):
            raise TargetExists(f"{target.url} has objects already: name an empty folder")
        return
    named = _by_result(target.urls(inputs), inputs)
    for url in named:
        root_of(url, allowed)  # whatever the name of the input
    own = format_of_name(target.url)
    if own is not None and own != format:
        raise InvalidLocation(
            f"{target.url} looks like {own}, and the result is {format}: give it the suffix of its format"
        )
    if target.overwrite:
        _require_no_input(named, inputs)
        return
    there = [url for url in named if exists(url, target.root)]
    if there:
        more = f" and {len(there) - _SHOWN} more" if len(there) > _SHOWN else ""
        raise TargetExists(f"{', '.join(there[:_SHOWN])}{more} exist and are not replaced: remove them, or overwrite")


def _require_no_input(results: Collection[str], inputs: Sequence[StoredInput]) -> None:
    """Raises InvalidLocation for a result in whose place is an input."""
    read = set(as_reached(one.key for one in inputs if is_external(one.key)))
    for url, reached in zip(results, as_reached(results), strict=True):
        if reached in read:
            raise InvalidLocation(f"{url} is an input of the job, and would be replaced by its result")


# --- databases -------------------------------------------------------------------------------------------------------


def _place(settings: Settings, tenant: str, name: str) -> Place:
    addresses = settings.connections_of(tenant)
    return place_of(name, {name: address.get_secret_value() for name, address in addresses.items()})


def require_connections(settings: Settings, tenant: str, request: JobRequest) -> None:
    """Raises LocationRefused for a database that the tenant may not use."""
    table = None if request.output is None else request.output.table
    for name in (request.input.connection, table and table.partition(".")[0]):
        if name is not None:
            _place(settings, tenant, name)


def _query(wanted: InputLocations) -> Query | None:
    return None if wanted.query is None or wanted.connection is None else Query(wanted.connection, wanted.query)


def _sample(settings: Settings, tenant: str, wanted: InputLocations, stored: StoredInput) -> StoredInput:
    """A table with the columns of the query. Raises QueryRefused, LocationRefused and Unavailable."""
    query = _query(wanted)
    assert query is not None, "an input has urls or a query"
    place = _place(settings, tenant, query.connection)
    from batchserve.postgres.query import columns_of_query  # psycopg is an extra

    schema = columns_of_query(place, query.text, _DESCRIBED_WITHIN)
    return replace(stored, content=get_format(FORMAT).write(pl.DataFrame(schema=schema)))


def _table(settings: Settings, tenant: str, output: OutputLocation, name: str) -> TableTarget:
    connection, schema, table = name.split(".")
    _place(settings, tenant, connection)
    return TableTarget(connection, schema, table, output.mode)


def _format_for(table: TableTarget, wanted: str | None) -> str:
    """The format of the parts."""
    if wanted not in (None, FORMAT):
        raise InvalidOptions(f"{table.shown}: rows go into a table with their types, and have no format {wanted}")
    return FORMAT
