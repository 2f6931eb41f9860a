"""The tables as SQLAlchemy Core. Alembic's migrations create them; tests/test_migrations.py keeps the two equal.

Times are seconds since the epoch. JSON columns hold what is only ever read whole. Values are checked when they are
written (`db.codec`).
"""

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
    false,
    text,
    true,
)

from batchserve.db.codec import Number, Words

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

models = Table(
    "models",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", Words(128), nullable=False),
    Column("version", Integer, nullable=False),
    Column("digest", Words(64), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("signature", Text, nullable=False),
    Column("metadata", JSON, nullable=False),
    Column("created_at", Number, nullable=False),
    Column("deleted_at", Number),
    # Of the stored artifact: the upload as repaired at admission. Null for a model of an older release.
    Column("artifact_sha256", Words(64)),
    UniqueConstraint("name", "version"),
    Index(None, "name", "digest"),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", Words(36), primary_key=True),
    Column("state", Words(16), nullable=False),
    Column("reason", Words(64)),
    Column("model_id", Integer, ForeignKey("models.id")),
    # Number of its inputs (table inputs).
    Column("inputs_total", Integer, nullable=False, server_default=text("1")),
    # The request, fixed at predict.
    Column("options", JSON, nullable=False),
    Column("request_digest", Words(64)),
    Column("metadata", JSON, nullable=False),
    Column("priority", Integer, nullable=False, server_default=text("0")),
    Column("run_after", Number),
    # Its lease: the worker, and the expiry.
    Column("attempt", Integer, nullable=False, server_default=text("0")),
    Column("crashes", Integer, nullable=False, server_default=text("0")),
    Column("worker", Words(64)),
    Column("lease_until", Number),
    Column("lease_clock", Words(64)),
    Column("cancel_requested_at", Number),
    # Progress of planning and scoring.
    Column("planned", Boolean, nullable=False, server_default=false()),
    Column("rows_planned", BigInteger, nullable=False, server_default=text("0")),
    Column("rows_ok", BigInteger, nullable=False, server_default=text("0")),
    Column("rows_failed", BigInteger, nullable=False, server_default=text("0")),
    Column("chunks_total", Integer, nullable=False, server_default=text("0")),
    Column("chunks_done", Integer, nullable=False, server_default=text("0")),
    Column("progress", Number, nullable=False, server_default=text("0")),
    # The result, final when the state is completed.
    Column("result_key", Words(255)),
    Column("result_bytes", BigInteger),
    Column("result_sha256", Words(64)),
    Column("errors_key", Words(255)),
    Column("errors_bytes", BigInteger),
    Column("reused_from", Words(36)),
    Column("error", JSON),
    # Facts about its rows besides their counts, merged from its chunks.
    Column("facts", JSON),
    Column("created_at", Number, nullable=False),
    Column("queued_at", Number),
    Column("started_at", Number),
    Column("finished_at", Number),
    # When all bytes were removed, and those of the input, possibly earlier.
    Column("expires_at", Number),
    Column("input_removed_at", Number),
    # Visibility.
    Column("tenant", Words(64), nullable=False, server_default="default"),
    # Of its inputs together. Null: unknown before they are read.
    Column("inputs_bytes", BigInteger),
    # The address that its end is sent to.
    Column("webhook", Words(2048)),
    # Its own retention in seconds, and when it is over: `finished_at` plus that.
    Column("expires_in", Number),
    Column("due_at", Number),
    # The request that queued it, and the spans of its upload and of that request (W3C Trace Context).
    Column("request_id", Words(128)),
    Column("upload_traceparent", Words(64)),
    Column("traceparent", Words(64)),
    Index(None, "tenant", "id"),
    Index(None, "tenant", "request_digest", "id"),
    # The lists of jobs (jobs.lists) in a state, and of a version.
    Index(None, "tenant", "state", "id", "model_id"),
    Index(None, "model_id", "tenant", "id"),
    Index(None, "result_key"),
    # Few jobs have their own retention.
    Index(None, "due_at", sqlite_where=text("due_at IS NOT NULL"), postgresql_where=text("due_at IS NOT NULL")),
)

# The queue of each tenant in order: a claim reads no more jobs than it takes.
Index("ix_jobs_turn", jobs.c.state, jobs.c.tenant, jobs.c.priority.desc(), jobs.c.queued_at)

# The lists of those that have finished.
Index(
    "ix_jobs_finished",
    *(jobs.c[name] for name in ("tenant", "state", "finished_at", "id", "model_id")),
    sqlite_where=jobs.c.finished_at.is_not(None),
    postgresql_where=jobs.c.finished_at.is_not(None),
)

# Inputs of jobs, in order. Several may reference one object: it is removed with the last of them.
inputs = Table(
    "inputs",
    metadata,
    Column("job_id", Words(36), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    # In the storage; or, of what is read where its owner keeps it, the address.
    Column("key", Words(2048), nullable=False),
    # Null: unknown before the job has read it.
    Column("bytes", BigInteger),
    Column("sha256", Words(64)),
    Column("format", Words(16), nullable=False),
    Column("delimiter", Words(1), nullable=False),
    Column("filename", Words(255)),
    # Whether its bytes are removed with the jobs that reference it; others are borrowed.
    Column("owned", Boolean, nullable=False, server_default=true()),
    Column("decimal", Words(1), nullable=False, server_default="."),
    # Of what is read where its owner keeps it.
    Column("version", Words(255)),
    Index(None, "key"),
)

# Inputs that clients send to the object store themselves. Each has the ID of its job, which is created when its bytes
# are verified; then the row is deleted.
direct_uploads = Table(
    "direct_uploads",
    metadata,
    Column("id", Words(36), primary_key=True),
    Column("tenant", Words(64), nullable=False),
    # As announced.
    Column("bytes", BigInteger, nullable=False),
    Column("expires_at", Number, nullable=False),
    # The store's ID of a multipart upload; null for one that is sent by a single request.
    Column("multipart", Text),
    Index(None, "expires_at"),
)

# The bytes of small inputs and results, by key. Rows of `inputs` and `jobs` reference them.
contents = Table(
    "contents",
    metadata,
    Column("key", Words(255), primary_key=True),
    Column("content", LargeBinary, nullable=False),
)

chunks = Table(
    "chunks",
    metadata,
    Column("job_id", Words(36), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("first_record", BigInteger, primary_key=True, autoincrement=False),
    Column("records", BigInteger, nullable=False),
    # The number of its input, and the position in it.
    Column("input", Integer, nullable=False, server_default=text("0")),
    Column("start", BigInteger, nullable=False),
    Column("stop", BigInteger, nullable=False),
    Column("crashes", Integer, nullable=False, server_default=text("0")),
    # The attempt whose part is committed; null while the chunk is not scored.
    Column("attempt", Integer),
    Column("part_bytes", BigInteger),
    Column("part_sha256", Words(64)),
    Column("rows_failed", BigInteger),
    Column("errors_bytes", BigInteger),
    Column("facts", JSON),
    # Number of whole inputs in it, from its input on.
    Column("inputs", Integer, nullable=False, server_default=text("1")),
)

attempts = Table(
    "attempts",
    metadata,
    Column("job_id", Words(36), ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("worker", Words(64), nullable=False),
    Column("started_at", Number, nullable=False),
    # Rows done by earlier attempts, to compute the speed of this one.
    Column("rows_before", BigInteger, nullable=False, server_default=text("0")),
    Column("finished_at", Number),
    Column("outcome", Words(16)),
    Column("error", JSON),
)

# An outbox: one row for each end of a job, written in its transaction and read in the order of the IDs, which are never
# reused. Kept for a while, and no longer than the job.
events = Table(
    "events",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("job_id", Words(36), ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("tenant", Words(64), nullable=False),
    # The end state of the job.
    Column("state", Words(16), nullable=False),
    Column("at", Number, nullable=False),
    Index(None, "job_id"),
    sqlite_autoincrement=True,
)

# Who did what, in the order of the IDs, which are never reused. It names what it is about, which may be deleted.
audit = Table(
    "audit",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("at", Number, nullable=False),
    Column("tenant", Words(64), nullable=False),
    # The name of the API key.
    Column("key", Words(64), nullable=False),
    Column("action", Words(16), nullable=False),
    Column("kind", Words(16), nullable=False),
    Column("subject", Words(255), nullable=False),
    Index(None, "tenant", "id"),
    Index(None, "subject", "id"),
    sqlite_autoincrement=True,
)

# Requests that are repeated at the times of a cron text.
schedules = Table(
    "schedules",
    metadata,
    Column("id", Words(36), primary_key=True),
    Column("tenant", Words(64), nullable=False),
    Column("name", Words(64), nullable=False),
    Column("cron", Words(512), nullable=False),
    Column("time_zone", Words(64), nullable=False),
    Column("action", Words(16), nullable=False),
    Column("request", JSON, nullable=False),
    Column("catch_up", Words(16), nullable=False),
    Column("catch_up_limit", Integer, nullable=False),
    Column("overlap", Words(16), nullable=False),
    Column("created_at", Number, nullable=False),
    Column("changed_at", Number, nullable=False),
    Column("paused_at", Number),
    # Its next tick, and when that was computed. Null: none, or it is paused.
    Column("next_at", Number),
    Column("planned_at", Number, nullable=False),
    # Runs on request so far.
    Column("runs", Integer, nullable=False, server_default=text("0")),
    UniqueConstraint("tenant", "name"),
    Index(None, "next_at"),
)

# One row for each time of a schedule, and for each run on request, in the order of the IDs, which are never reused.
ticks = Table(
    "ticks",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("schedule_id", Words(36), ForeignKey("schedules.id", ondelete="CASCADE"), nullable=False),
    # The time that it is for; and 0, or the number of a run on request.
    Column("at", Number, nullable=False),
    Column("run", Integer, nullable=False, server_default=text("0")),
    Column("late", Boolean, nullable=False, server_default=false()),
    Column("state", Words(16), nullable=False),
    # Tries so far; and when a pending one may be tried by any process.
    Column("attempt", Integer, nullable=False, server_default=text("0")),
    Column("try_at", Number, nullable=False),
    # Number of its jobs (table tick_jobs), and whether all of them had ended at the last look.
    Column("jobs", Integer, nullable=False, server_default=text("0")),
    Column("settled", Boolean, nullable=False, server_default=false()),
    Column("error", JSON),
    Column("created_at", Number, nullable=False),
    Column("ended_at", Number),
    UniqueConstraint("schedule_id", "at", "run"),
    Index(None, "schedule_id", "settled"),
    Index(None, "state", "try_at"),
    sqlite_autoincrement=True,
)

# The jobs that a tick has queued, which may be deleted.
tick_jobs = Table(
    "tick_jobs",
    metadata,
    Column("tick_id", Integer, ForeignKey("ticks.id", ondelete="CASCADE"), primary_key=True, autoincrement=False),
    Column("job_id", Words(36), primary_key=True),
)

# Where the ends of a tenant's jobs are sent to.
webhook_endpoints = Table(
    "webhook_endpoints",
    metadata,
    Column("id", Words(36), primary_key=True),
    Column("tenant", Words(64), nullable=False),
    Column("url", Words(2048), nullable=False),
    # Types of events and families of types, such as job.*
    Column("events", JSON, nullable=False),
    Column("description", Words(255), nullable=False),
    Column("enabled", Boolean, nullable=False),
    # Why it was disabled, if not by a request.
    Column("reason", Words(64)),
    Column("created_at", Number, nullable=False),
    # The first of the deliveries that have failed since the last one that succeeded.
    Column("failing_since", Number),
    Index(None, "tenant", "id"),
)

# What requests to an endpoint are signed by, or to the addresses of a tenant's jobs: then without an endpoint.
webhook_secrets = Table(
    "webhook_secrets",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("tenant", Words(64), nullable=False),
    Column("endpoint_id", Words(36), ForeignKey("webhook_endpoints.id", ondelete="CASCADE")),
    Column("secret", Words(128), nullable=False),
    Column("created_at", Number, nullable=False),
    # Of a replaced one: until then requests are signed by it, too.
    Column("expires_at", Number),
    Index(None, "endpoint_id"),
    Index(None, "tenant", "endpoint_id"),
)

# Events of jobs on their way to an endpoint or an address, written in the transaction of the event. The ID identifies
# the message in all attempts.
webhook_deliveries = Table(
    "webhook_deliveries",
    metadata,
    Column("id", Words(36), primary_key=True),
    Column("tenant", Words(64), nullable=False),
    Column("endpoint_id", Words(36), ForeignKey("webhook_endpoints.id", ondelete="CASCADE")),
    # The job may be deleted.
    Column("job_id", Words(36)),
    Column("event", Words(64), nullable=False),
    # The address on the job; null: that of the endpoint.
    Column("url", Words(2048)),
    # What few attempts at a time are made to: the endpoint, or the host and port of the address.
    Column("target", Words(300), nullable=False),
    Column("body", Text, nullable=False),
    Column("state", Words(16), nullable=False),
    # The number of the latest attempt, which is the fencing token, and of the last one before it was sent again.
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    Column("attempts_before", Integer, nullable=False, server_default=text("0")),
    # When it is to be tried, on the clock of leases: a claim puts it off. Of another clock: now.
    Column("due_at", Number, nullable=False),
    Column("due_clock", Words(64), nullable=False),
    Column("created_at", Number, nullable=False),
    Column("ended_at", Number),
    Index(None, "state", "due_clock", "due_at"),
    Index(None, "tenant", "id"),
    Index(None, "endpoint_id", "id"),
    Index(None, "ended_at"),
)

webhook_attempts = Table(
    "webhook_attempts",
    metadata,
    Column("delivery_id", Words(36), ForeignKey("webhook_deliveries.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("at", Number, nullable=False),
    Column("seconds", Number, nullable=False),
    # Of the response, and its beginning; or why there was none.
    Column("status", Integer),
    Column("response", Text, nullable=False),
    Column("error", Words(255)),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("key", Words(255), nullable=False),
    Column("fingerprint", Words(64), nullable=False),
    # The job of the response; of one about several jobs, the response itself.
    Column("job_id", Words(36)),
    Column("status", Integer, nullable=False),
    Column("created_at", Number, nullable=False),
    Column("tenant", Words(64), nullable=False, server_default="default"),
    Column("answer", Text),
    PrimaryKeyConstraint("tenant", "key"),
    Index(None, "created_at"),
)

keys = Table(
    "keys",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", Words(128), nullable=False),
    Column("tenant", Words(64), nullable=False),
    Column("scope", Words(16), nullable=False),
    # SHA-256 of the key, which itself is not stored; and its first characters, for display.
    Column("digest", Words(64), nullable=False),
    Column("prefix", Words(16), nullable=False),
    Column("created_at", Number, nullable=False),
    Column("revoked_at", Number),
    UniqueConstraint("digest"),
)

holds = Table(
    "holds",
    metadata,
    Column("name", Words(32), primary_key=True),
    # On the clock of leases.
    Column("until", Number, nullable=False),
    Column("clock", Words(64), nullable=False),
)

# What jobs that are gone have added to the counters of /metrics: amounts by name, summed up from time to time.
totals = Table(
    "totals",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("name", Words(32), nullable=False),
    Column("amount", BigInteger, nullable=False),
    sqlite_autoincrement=True,
)

# The workers, each until the moment, on the clock of leases, by which it announces itself again.
workers = Table(
    "workers",
    metadata,
    Column("name", Words(64), primary_key=True),
    # Scoring processes for chunks.
    Column("processes", Integer, nullable=False),
    Column("started_at", Number, nullable=False),
    Column("until", Number, nullable=False),
    Column("clock", Words(64), nullable=False),
)

# One row: both clocks at the latest reading, the seconds counted until then, and the count since which they have
# agreed.
clock = Table(
    "clock",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("boot", Words(64), nullable=False),
    Column("steady", Number, nullable=False),
    Column("wall", Number, nullable=False),
    Column("counted", Number, nullable=False),
    Column("settled", Number, nullable=False),
)

# The limits of tenants, null where there is none. The row of the tenant * is for each that has none of its own.
quotas = Table(
    "quotas",
    metadata,
    Column("tenant", Words(64), primary_key=True),
    Column("jobs", BigInteger),
    Column("bytes", BigInteger),
    Column("rows_per_day", BigInteger),
    Column("requests_per_second", Number),
    Column("changed_at", Number, nullable=False),
)

# What a tenant with a quota uses. The row is the lock of all that adds to it (quotas.account).
accounts = Table(
    "accounts",
    metadata,
    Column("tenant", Words(64), primary_key=True),
    # Of the row: the counts begin some time later, and are null until then.
    Column("since", Number, nullable=False),
    Column("bytes", BigInteger),
    # Rows of the day, a number of days since the epoch.
    Column("day", Integer, nullable=False),
    Column("day_rows", BigInteger),
)
