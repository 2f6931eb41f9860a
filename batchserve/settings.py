"""The only reader of the environment. Every setting is `BATCHSERVE_<NAME>`; docs/settings.md lists them all."""

import ipaddress
import os
import re
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import SettingsConfigDict

from batchserve.variables import VariableSettings

Seconds = Annotated[float, Field(gt=0)]
Bytes = Annotated[int, Field(gt=0)]
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_PROVIDER = re.compile(r"[a-z]+")
_ALLOWED_HOST = re.compile(r"\*|(\*\.)?\w[\w-]*(\.\w[\w-]*)*|\[?[0-9a-fA-F:]*:[0-9a-fA-F:.]*\]?", re.ASCII)
_PREFIX = re.compile(r"(file:///|s3://[a-z0-9][a-z0-9.-]+/)([^*?\[\]\0]*/)?")
_ADDRESS = re.compile(r"(\w[\w.-]*|\[[0-9a-fA-F:.]+\]):[0-9]{1,5}", re.ASCII)
_DATABASE = re.compile(r"postgres(ql)?(\+psycopg)?://\S+")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,63}")
_PARTS = 9_000
_OBJECT_BYTES = _PARTS * 8 * 2**20
"""Longest object whose length is not known before."""
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds_of(text: str) -> float:
    """Seconds of `90`, `90s`, `15m`, `2h` or `1d`. Raises ValueError."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([smhd]?)", text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a duration; expected for example 90s, 15m, 2h or 30d")
    return float(match[1]) * _UNITS[match[2]]


def networks_of(text: str) -> tuple[Network, ...]:
    """The networks that a text names. Raises ValueError."""
    return tuple(ipaddress.ip_network(entry.strip()) for entry in text.split(",") if entry.strip())


def _duration(given: Any) -> Any:
    if not isinstance(given, str):
        return given
    return seconds_of(given) if given.strip() else None


def _name_networks(text: str) -> str:
    networks_of(text)
    return text


def _name_hosts(hosts: str) -> str:
    for entry in filter(None, map(str.strip, hosts.split(","))):
        if not _ALLOWED_HOST.fullmatch(entry):
            raise ValueError(
                f"{entry!r} is not a host; expected a name or an address as a browser sends it, without scheme, "
                "port and final dot; *.example.com for all below a name; or *"
            )
    return hosts


def _name_providers(providers: str) -> str:
    named = [name.strip().lower() for name in providers.split(",")]
    if not all(map(_PROVIDER.fullmatch, named)) or len(set(named)) < len(named):
        raise ValueError(f"{providers!r} does not name providers of ONNX Runtime; expected names such as 'cuda,cpu'")
    return ",".join(named)


Hosts = Annotated[str, AfterValidator(_name_hosts)]
Providers = Annotated[str, AfterValidator(_name_providers)]
Networks = Annotated[str, AfterValidator(_name_networks)]
"""Networks as CIDRs, separated by commas."""
Kept = Annotated[Seconds | None, BeforeValidator(_duration)]
"""A duration as text (`30d`) or in seconds; None or an empty text means unlimited."""


def _prefixes(given: dict[str, list[str]]) -> dict[str, list[str]]:
    for prefix in (prefix for prefixes in given.values() for prefix in prefixes):
        if not _PREFIX.fullmatch(prefix) or not {"..", "."}.isdisjoint(prefix.split("/")):
            raise ValueError(f"{prefix!r} is not a prefix; expected file:///folder/ or s3://bucket/prefix/")
    return given


Prefixes = Annotated[dict[str, list[str]], AfterValidator(_prefixes)]
"""Prefixes of addresses by tenant; those of `*` are for all."""


def host_and_port(address: str) -> tuple[str, int] | None:
    """Of an address as `metrics_address` has it; None of an empty one."""
    host, _, port = address.rpartition(":")
    return (host.strip("[]"), int(port)) if port else None


def _require_port(address: str) -> str:
    if address and not (_ADDRESS.fullmatch(address) and int(address.rpartition(":")[2]) <= 65535):
        raise ValueError(f"{address!r} is not an address; expected a host and a port: 127.0.0.1:9464 or [::1]:9464")
    return address


Address = Annotated[str, AfterValidator(_require_port)]
"""A host and a port."""


def _connections(given: dict[str, dict[str, SecretStr]]) -> dict[str, dict[str, SecretStr]]:
    for name, address in (named for connections in given.values() for named in connections.items()):
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not a name of a connection; expected letters, digits, _ and -")
        if not _DATABASE.fullmatch(address.get_secret_value()):  # which is never shown: it may have a password
            raise ValueError(f"the address of {name!r} is not one; expected postgresql://user:password@host/database")
    return given


Connections = Annotated[dict[str, dict[str, SecretStr]], AfterValidator(_connections)]
"""Addresses of databases by tenant and name; those of `*` are for all."""


def _resolved(address: str) -> str:
    return address if "://" in address else str(Path(address).resolve())


class Settings(VariableSettings):
    """Configuration of one process. Relative paths are resolved against the working directory once, at startup."""

    model_config = SettingsConfigDict(
        env_prefix="BATCHSERVE_", env_file=".env", extra="ignore", frozen=True, validate_default=True
    )

    storage: Annotated[str, AfterValidator(_resolved)] = Field(
        "storage", description="Folder for inputs, parts, results and models, or a bucket: `s3://bucket/prefix`."
    )
    database: str = Field(
        "", description="SQLAlchemy address of the database. Empty: `batchserve.db` in the storage folder (SQLite)."
    )
    engine: str = Field(
        "local",
        description="Engine that runs chunks: `local` (scoring processes of this host), or `ray://HOST:PORT` (a Ray "
        "cluster's).",
    )
    ray_reserved: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {"CPU": 1},
        description="Resources of Ray that a host needs and that the engine occupies there, as JSON: `CPU`, `GPU`, "
        "custom ones.",
    )
    ray_hosts: int = Field(
        0,
        ge=0,
        description="Hosts with these resources that a worker asks Ray's autoscaler for, as long as it runs (0: none).",
    )

    allowed_hosts: Hosts = Field(
        "",
        description="Hosts accepted in requests besides loopback: `a.example,*.b.example`; `*` accepts any.",
    )
    metrics_address: Address = Field(
        "",
        description="Address (`host:port`) at which `batchserve worker` answers `/metrics` and `/livez`. Empty: none.",
    )

    processes: int = Field(
        default_factory=lambda: os.cpu_count() or 1,
        ge=1,
        description="Number of scoring processes. Default: the number of cores.",
    )
    process_memory: Bytes = Field(
        1536 * 2**20, description="Memory limit of one scoring process, in bytes (Linux: RLIMIT_DATA)."
    )
    process_nice: int = Field(
        10, ge=0, le=19, description="Niceness of scoring processes, so that the API stays responsive while they work."
    )
    inline_bytes: int = Field(
        64 * 2**10,
        ge=0,
        le=2**20,
        description="Bytes up to which an input or a result is kept in the database, in the transaction of its job.",
    )
    direct_seconds: float = Field(
        0.05,
        ge=0,
        allow_inf_nan=False,
        description="Expected scoring time up to which a small job is done within the call that submits it (0: never).",
    )
    chunk_bytes: Bytes = Field(16 * 2**20, description="Most input bytes in a chunk (one record may be longer).")
    chunk_records: int = Field(131_072, ge=1, description="Most records in a chunk.")
    chunk_seconds: Seconds = Field(
        2.0, description="Target scoring time of one chunk; slow models get chunks of fewer records."
    )
    chunk_timeout: Seconds = Field(600.0, description="Scoring time after which the process of a chunk is killed.")
    admission_timeout: Seconds = Field(60.0, description="Time limit for the admission of a model.")
    online_timeout: Seconds = Field(30.0, description="Time limit for an online prediction.")
    online_wait: Seconds = Field(
        15.0, description="Longest wait of a check, registration or online prediction for a process (503 after it)."
    )
    online_calls: int = Field(
        64,
        ge=1,
        description="Most online predictions of one tenant that wait or run; as many checks and conversions (429).",
    )
    providers: Providers = Field(
        "cpu",
        description="Execution providers of ONNX Runtime on this host, the preferred first: `cuda,cpu`. A model "
        "version keeps that which its admission found to answer like the processor.",
    )
    sessions: int = Field(8, ge=1, description="Most models that one scoring process keeps loaded.")

    lease: Seconds = Field(30.0, description="Seconds without a heartbeat after which another worker may claim a job.")
    heartbeat: Seconds = Field(10.0, description="Renewal interval of leases.")
    rescue: Seconds = Field(5.0, description="Polling interval for jobs whose worker died.")
    grace: Seconds = Field(20.0, description="Seconds after SIGTERM in which a worker may finish its chunks.")
    active_jobs: int = Field(
        64, ge=1, description="Jobs that one worker runs concurrently, plus one of each tenant that has none running."
    )
    poll: Seconds = Field(1.0, description="Polling interval for new jobs and cancel requests.")
    schedule_grace: Seconds = Field(
        900.0, description="Seconds by which a tick of a schedule may be late, and for which it is tried again."
    )
    crashes: int = Field(
        3, ge=1, description="Crashes on the same chunk, or without progress, after which a job fails."
    )
    cancel_grace: Seconds = Field(
        3.0, description="Seconds that a cancelled chunk may keep running before it is killed."
    )

    input_prefixes: Prefixes = Field(
        {},
        description='Where jobs may read inputs in place, as JSON: `{"team": ["file:///data/in/", '
        '"s3://bucket/in/"]}`; `*` for every tenant.',
    )
    output_prefixes: Prefixes = Field(
        {}, description="Where jobs may write results besides the storage, as JSON in the same form."
    )
    job_inputs: int = Field(10_000, ge=1, description="Most inputs of one job.")
    tables: Connections = Field(
        {},
        description="Databases of PostgreSQL that jobs may query and write to, by tenant and name, as JSON: "
        '`{"team": {"warehouse": "postgresql://user:password@host/database"}}`; `*` for every tenant.',
    )
    query_timeout: Seconds = Field(
        600.0, description="Time limit for a query whose rows are the input of a job, and for their transfer."
    )

    upload_bytes: Bytes = Field(64 * 2**30, description="Longest input, in bytes, after decompression.")
    model_bytes: Bytes = Field(2 * 2**30, description="Longest model artifact, in bytes.")
    upload_life: Seconds = Field(
        21_600.0,
        le=86_400,
        description="Seconds within which a direct upload to the bucket is completed; then what was sent is removed.",
    )
    online_bytes: Bytes = Field(16 * 2**20, description="Longest body of an online prediction, in bytes.")
    head_timeout: Seconds = Field(
        15.0, description="Seconds to receive the head of a request before its connection is closed."
    )
    body_idle: Seconds = Field(15.0, description="Seconds that a body may stall before the request is aborted.")
    body_rate: int = Field(
        1024, ge=0, description="Lowest average rate of a body, in bytes per second, after its first minute."
    )
    send_idle: Seconds = Field(
        60.0, description="Seconds without reading its response after which a client is disconnected."
    )
    send_bytes: Bytes = Field(
        256 * 2**20, description="Most unread response bytes of all clients; beyond, the most idle are disconnected."
    )
    redirect_downloads: bool = Field(
        False,
        description="Redirect downloads of results and inputs to signed URLs of the bucket, unless a request decides.",
    )
    image_pixels: int = Field(
        64 * 2**20, ge=1, description="Pixels of the largest image that is decoded; larger ones are row errors."
    )
    decompression_ratio: int = Field(
        200, ge=1, description="Largest growth of a gzip or zstd body beyond its first 64 MiB."
    )
    free_bytes: int = Field(
        256 * 2**20, ge=0, description="Free space that uploads must leave on the storage's disk (507 below it)."
    )
    idempotency_hours: float = Field(24.0, gt=0, description="Hours that an Idempotency-Key is remembered.")
    keep_inputs: Kept = Field(
        None,
        description="Retention of an input after the end of its job, or unused: `7d`, `12h`. Empty: for ever.",
    )
    keep_results: Kept = Field(
        None, description="Retention of the bytes of a job after its end; then it is expired. Empty: for ever."
    )
    keep_rows: Kept = Field(
        None, description="Retention of the row of an expired job, from its expiry. Empty: for ever."
    )
    keep_audit: Kept = Field(
        365 * 86400.0, description="Retention of an entry of the audit log, of a year by default. Empty: for ever."
    )
    keep_ticks: Kept = Field(
        90 * 86400.0, description="Retention of the ticks of a schedule, of 90 days by default. Empty: for ever."
    )
    sweep_age: Seconds = Field(
        3600.0, description="Seconds after which unreferenced bytes are removed; longer than any request takes."
    )

    webhook_networks: Networks = Field(
        "", description="CIDRs that webhooks may reach besides public addresses, also by http."
    )
    webhook_timeout: Seconds = Field(15.0, le=60, description="Seconds for an attempt to deliver a webhook, in total.")
    keep_webhooks: Kept = Field(30 * 86400.0, description="Retention of deliveries of webhooks. Empty: for ever.")

    log_format: Literal["auto", "console", "json"] = Field(
        "auto", description="`json`, `console`, or `auto`: console on a terminal."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Log level: debug, info, warning or error."
    )
    access_log: Literal["off", "debug", "info"] = Field(
        "off", description="Level of a line for each request that is answered: debug or info; or `off`: none."
    )

    @field_validator("database")
    @classmethod
    def _embed_in_a_folder_only(cls, database: str, others: ValidationInfo) -> str:
        storage = others.data.get("storage", "")
        if not database and "://" in storage:
            raise ValueError(
                f"the storage {storage} is not a folder and cannot hold an embedded database: set BATCHSERVE_DATABASE"
            )
        return database

    @field_validator("upload_bytes")
    @classmethod
    def _fit_into_an_object(cls, most: int, others: ValidationInfo) -> int:
        if "://" in others.data.get("storage", "") and most > _OBJECT_BYTES:
            raise ValueError(
                f"{most} is too long for an object store, which takes an upload in {_PARTS:,} parts of 8 MiB: expected "
                f"at most {_OBJECT_BYTES}"
            )
        return most

    @field_validator("heartbeat")
    @classmethod
    def _leave_time_for_a_second_heartbeat(cls, heartbeat: float, others: ValidationInfo) -> float:
        lease = others.data.get("lease")
        if lease is not None and heartbeat > lease / 2:
            raise ValueError(
                f"{heartbeat:g} s is too long for a BATCHSERVE_LEASE of {lease:g} s: expected at most half of it, "
                "so that one heartbeat may fail"
            )
        return heartbeat

    def inputs_of(self, tenant: str) -> tuple[str, ...]:
        """The prefixes from which jobs of a tenant may read inputs in place."""
        return _of_tenant(self.input_prefixes, tenant)

    def outputs_of(self, tenant: str) -> tuple[str, ...]:
        """The prefixes to which jobs of a tenant may write results."""
        return _of_tenant(self.output_prefixes, tenant)

    def connections_of(self, tenant: str) -> dict[str, SecretStr]:
        """The databases that jobs of a tenant may query and write to, by their names."""
        return {**self.tables.get("*", {}), **self.tables.get(tenant, {})}

    @property
    def execution_providers(self) -> tuple[str, ...]:
        return tuple(self.providers.split(","))

    @property
    def process_threads(self) -> int:
        """Cores for each scoring process while all of them are busy."""
        return max(1, (os.cpu_count() or 1) // self.processes)

    @cached_property
    def database_url(self) -> str:
        """`database`, or the embedded SQLite file in the storage folder."""
        if self.database:
            return self.database
        return f"sqlite:///{Path(self.storage) / 'batchserve.db'}"


def _of_tenant(prefixes: dict[str, list[str]], tenant: str) -> tuple[str, ...]:
    return (*prefixes.get(tenant, ()), *(prefixes.get("*", ()) if tenant != "*" else ()))
