"""The mechanisms, each with the edit that removes it and the tests that must fail without it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mutant:
    """`before` occurs exactly once in `file`; replacing it by `after` removes the mechanism.

    `tests`: the tests that pytest runs, at least one of which must fail.
    """

    mechanism: str
    file: str
    before: str
    after: str
    tests: tuple[str, ...]
    on_postgres: bool = False
    """Whether these tests need PostgreSQL."""


LOCAL, DISK = "batchserve/storage/local.py", "batchserve/storage/disk.py"
WORKER, JOB_RUN = "batchserve/worker/__init__.py", "batchserve/worker/job_run.py"
WAITS = "batchserve/worker/waits.py"
BLOCKS, STREAMED = "batchserve/storage/blocks.py", "batchserve/storage/streamed.py"
DOWNLOAD, FILES = "batchserve/api/download.py", "batchserve/api/files.py"
QUERIES, REQUESTS, PLAN = "batchserve/jobs/queries.py", "batchserve/jobs/requests.py", "batchserve/jobs/plan.py"
EXECUTION, STATEMENTS = "batchserve/jobs/execution.py", "batchserve/jobs/statements.py"
CONNECT, ENGINE, BODIES = "batchserve/db/connect.py", "batchserve/engines/local.py", "batchserve/api/bodies.py"
RUN, ARRAYS, IMAGES = "batchserve/inference/run.py", "batchserve/inference/arrays.py", "batchserve/inference/images.py"
PLAIN, PLAIN_CSV = "batchserve/scoring/plain_records.py", "batchserve/scoring/plain_csv.py"
DIRECT, PLAIN_JSON = "batchserve/scoring/direct.py", "batchserve/scoring/plain_json.py"
TURNS, GROUPS = "batchserve/service/turns.py", "batchserve/service/groups.py"
LISTS, ORIGIN = "batchserve/jobs/lists.py", "batchserve/api/origin.py"
CSV, TABLE = "batchserve/formats/csv_records.py", "batchserve/formats/csv_table.py"
PROCESS, INTERACTIVE = "batchserve/engines/process.py", "batchserve/engines/interactive.py"
JSON, JSONL = "batchserve/formats/json.py", "batchserve/formats/jsonl.py"
LINES, SCHEMA = "batchserve/formats/json_table.py", "batchserve/formats/schema.py"
ARCHIVE, FORMS = "batchserve/formats/wire/archive.py", "batchserve/api/forms.py"
CONDITIONAL, PROBLEMS = "batchserve/api/conditional.py", "batchserve/api/problems.py"
CODEC, OPTIONS = "batchserve/db/codec.py", "batchserve/options.py"
PROTOCOL, WIRE = "batchserve/cli/protocol.py", "tests/test_wire.py"
DOMAINS, INDEPENDENCE = "batchserve/inference/domains.py", "batchserve/admission/independence.py"
PACKED, ENCODINGS = "batchserve/formats/packed.py", "batchserve/formats/encodings.py"
NEWLINES = "batchserve/formats/kernels/newlines.py"
FIELDS, MATRICES = "batchserve/formats/kernels/fields.py", "batchserve/formats/matrices.py"
DIALECT, EXCEL = "batchserve/formats/csv_dialect.py", "batchserve/formats/excel.py"
PANDAS, CHILD = "batchserve/client/pandas_table.py", "batchserve/client/child.py"
ACCOUNT, QUOTAS = "batchserve/quotas/account.py", "tests/test_quotas.py"
CONTENTS = "batchserve/jobs/contents.py"
UPLOADS, DIRECT_UPLOADS = "batchserve/jobs/uploads.py", "batchserve/api/direct_uploads.py"
TICKS = "batchserve/timetable/ticks.py"
LOCATIONS, PLANNING = "batchserve/storage/locations.py", "batchserve/scoring/planning.py"
HOOKS, OUTGOING = "batchserve/webhooks/deliveries.py", "batchserve/webhooks/outgoing.py"
ROOM = "batchserve/webhooks/room.py"
LOAD = "batchserve/postgres/load.py"
FOREST, COLUMNS = "batchserve/inference/kernels/forest.py", "batchserve/inference/kernels/columns.py"
MANY, FOLDERS = "batchserve/client/many.py", "tests/test_folders.py"

MUTANTS = (
    # Durability
    Mutant(
        "an object is synced before it has its name", LOCAL, "            os.fsync(self._fd)\n", "",
        ("tests/test_storage.py",),
    ),
    Mutant(
        "the name of an object is synced", LOCAL,
        "                sync_folder(self._target.parent)\n", "                pass\n",
        ("tests/test_storage.py",),
    ),
    Mutant(
        "a new folder is synced into its parent", DISK,
        "        folder.mkdir()\n    sync_folder(folder.parent)\n", "        folder.mkdir()\n",
        ("tests/test_storage.py",),
    ),
    Mutant(
        "a file whose fsync failed is discarded", LOCAL, "            os.fsync(self._fd)\n",
        "            with suppress(OSError):\n                os.fsync(self._fd)\n", ("tests/test_storage.py",),
    ),
    Mutant(
        "commits reach the disk (synchronous=FULL)", CONNECT, '"synchronous=FULL"', '"synchronous=NORMAL"',
        ("tests/test_migrations.py",),
    ),
    Mutant(
        "a write transaction holds the lock from its beginning", CONNECT, '"BEGIN IMMEDIATE"', '"BEGIN"',
        ("tests/test_migrations.py", "tests/test_jobs.py"),
    ),
    Mutant(
        "bytes without a row are removed when an upload fails", "batchserve/api/upload.py",
        "        if not received.kept and not is_in_row(received.input.key):\n", "        if False:\n",
        ("tests/test_api_upload.py",),
    ),
    Mutant(
        "a negative zero of JSON passes through as 0", "batchserve/formats/json_matrices.py",
        '    return b"-0," in kept or b"-0\\n" in kept\n', "    return False\n", ("tests/test_matrices_scored.py",),
    ),
    Mutant(
        "a failed piece of a group commit is undone alone", "batchserve/db/writer.py",
        '        driver.execute("ROLLBACK TO piece")\n', "", ("tests/test_writer.py",),
    ),
    Mutant(
        "pieces are written alone when one has ended their transaction", "batchserve/db/writer.py",
        "        if not driver.in_transaction:", "        if False:", ("tests/test_writer.py",),
    ),
    Mutant(
        "a small job that would fail is left to the worker", "batchserve/scoring/small.py",
        "    if rows.failed and (limited or rows.failed == chunk.records):\n", "    if False:\n",
        ("tests/test_direct_scoring.py",),
    ),
    Mutant(
        "a small job that crashes its process is queued", "batchserve/service/__init__.py",
        "        except (ScoringCrashed, ScoringTimeout, OutOfMemory):\n            await self.check",
        "        except ScoringTimeout:\n            await self.check", ("tests/test_direct_scoring.py",),
    ),
    Mutant(
        "contents in rows end with the last job that needs them", "batchserve/jobs/contents.py",
        "unnamed = asked - named_inputs(connection, asked - of_results)", "unnamed = asked",
        ("tests/test_contents.py",),
    ),
    Mutant(
        "contents in rows are removed with their job", "batchserve/jobs/contents.py",
        "        _delete(connection, unnamed & keys)\n", "", ("tests/test_contents.py",),
    ),
    Mutant(
        "bytes are removed only after a certain rollback", "batchserve/submission.py",
        "            committing = True\n", "", ("tests/test_api_upload.py", "tests/test_api_models.py"),
    ),
    Mutant(
        "the sweep keeps recent objects", "batchserve/upkeep/sweep.py",
        "partials=remove_partials(storage, before),\n        uploads=orphans.remove(",
        "partials=0,\n        uploads=_Orphans(database, storage, 0.0, now).remove(",
        ("tests/test_sweep.py",),
    ),
    # Results
    Mutant(
        "a stale attempt writes nothing", STATEMENTS,
        "jobs.c.state == JobState.RUNNING, jobs.c.attempt == attempt)\n", "jobs.c.state == JobState.RUNNING)\n",
        ("tests/test_jobs.py",),
    ),
    Mutant(
        "a stale attempt ends no job", EXECUTION,
        "jobs.c.state == JobState.RUNNING, jobs.c.attempt == bindparam(\"mine\"))\n",
        "jobs.c.state == JobState.RUNNING)\n",
        ("tests/test_jobs.py",),
    ),
    Mutant(
        "each end of a job has its event", "batchserve/jobs/ends.py",
        "    _ADD_EVENTS.send(connection, *events_of)\n", "    pass\n", ("tests/test_jobs.py",),
    ),
    Mutant(
        "a chunk is committed once", PLAN,
        ".where(*_of(job_id, scored.chunk), chunks.c.attempt.is_(None))", ".where(*_of(job_id, scored.chunk))",
        ("tests/test_jobs.py",),
    ),
    Mutant(
        "the commit of a chunk may be repeated", PLAN,
        "            return\n        raise _lost(job_id, scored.chunk)",
        "            pass\n        raise _lost(job_id, scored.chunk)", ("tests/test_jobs.py",),
    ),
    Mutant(
        "no job is rescued at the end of an outage", WORKER, "max(self._next_rescue, now + self._settings.lease)",
        "self._next_rescue", ("tests/test_database_outages.py",),
    ),
    Mutant(
        "a job completes only when all chunks are done", EXECUTION,
        "    jobs.c.chunks_done == jobs.c.chunks_total,\n", "", ("tests/test_jobs.py",),
    ),
    Mutant(
        "a job completes only when rows and records agree", EXECUTION,
        "    jobs.c.rows_ok + jobs.c.rows_failed == jobs.c.rows_planned,\n", "", ("tests/test_jobs.py",),
    ),
    Mutant(
        "the rows of an output are counted", "batchserve/inference/run.py",
        "    check_count(outputs, wanted)\n", "",
        ("tests/test_worker.py", "tests/test_api_predict.py", "tests/test_bad_input.py"),
    ),
    Mutant(
        "a record alone has the answer that it has among others", RUN,
        '"rows": signature.multiple', '"rows": 1', ("tests/test_one_answer.py",),
    ),
    Mutant(
        "progress never decreases", PLAN,
        '"progress": case((jobs.c.progress < progress, progress), else_=jobs.c.progress)', '"progress": progress',
        ("tests/test_jobs.py",),
    ),
    Mutant(
        "results of grouped records return to the order of the input", RUN, "        placed[name][order] = array\n",
        "        placed[name][: len(array)] = array\n", ("tests/test_images.py", "tests/test_tensors.py"),
    ),
    Mutant(
        "a broken image fails alone", IMAGES, "            self._blank[record] = True\n            self.errors",
        "            raise\n            self.errors", ("tests/test_images.py",),
    ),
    Mutant(
        "a record that needs too much memory fails alone", RUN,
        '    except MemoryError as error:\n        raise out_of_memory("the input', '    except KeyError as error:\n'
        '        raise out_of_memory("the input', ("tests/test_hostile.py",),
    ),
    Mutant(
        "three records that do not fit into memory are scored one at a time", "batchserve/admission/batching.py",
        "            if 1 not in runs:\n                raise\n", "            raise\n",
        ("tests/test_model_memory.py",),
    ),
    Mutant(
        "different records are made where a sample has too few", "batchserve/admission/variations.py",
        "_varied(feed) if len(seen) < RECORDS else ():\n", "():\n", ("tests/test_independence.py",),
    ),
    Mutant(
        "two threads are taken where they give the answers of one", "batchserve/admission/tuning.py",
        "            if all(map(identical, alone, _answers(tuned, session, feed))):\n", "            if alone:\n",
        ("tests/test_one_answer.py",),
    ),
    Mutant(
        "the axis of the records is found by its name", "batchserve/admission/record_axes.py",
        "    return [found for found in own.values() if found.axis]\n", "    return []\n",
        ("tests/test_record_axes.py",),
    ),
    Mutant(
        "integers beyond the range of an array are errors", ARRAYS,
        "    return np.logical_or(values < bounds.min, values > bounds.max)\n",
        "    return np.zeros(values.shape, bool)\n", ("tests/test_tensors.py", "tests/test_signature.py"),
    ),
    Mutant(
        "a member of an archive matches its checksum", ARCHIVE, "    if zlib.crc32(data) != member.CRC:\n",
        "    if False:\n", ("tests/test_formats_images.py",),
    ),
    # Visibility and protocol
    Mutant(
        "a request sees every commit before it", "batchserve/api/auth.py", "call_soon(self._end_turn)",
        "call_soon(int)", ("tests/test_keys.py",),
    ),
    Mutant(
        "a poll sees every commit", "batchserve/db/cache.py", " or kept[1] != version", "",
        ("tests/test_api_jobs.py",),
    ),
    Mutant(
        "a key is stored in the transaction of the work", "batchserve/idempotency.py",
        "        if self.key is not None:\n", "        if False:\n", ("tests/test_api_predict.py",),
    ),
    Mutant(
        "a body shorter than announced never becomes an input", BODIES,
        "        if declared is not None and declared != self._received:\n", "        if False:\n",
        ("tests/test_bad_input.py",),
    ),
    Mutant(
        "a body that does not match its digest never becomes an input", BODIES,
        "            if self._hash is not None and expected != self._hash.digest():\n", "            if False:\n",
        ("tests/test_api_upload.py",),
    ),
    Mutant(
        "a form without its end never becomes an input", FORMS, "        if not self._ended:\n", "        if False:\n",
        ("tests/test_api_upload.py",),
    ),
    Mutant(
        "no two files of a form have the same name", FORMS, "        while name in taken:\n", "        while False:\n",
        ("tests/test_api_upload.py",),
    ),
    Mutant(
        "the key of a request about several jobs is stored", "batchserve/api/predict_uploaded.py",
        "    if key is not None:\n", "    if False:\n", ("tests/test_accumulate.py",),
    ),
    # Recovery and concurrency
    Mutant(
        "a lease of another boot has lapsed", EXECUTION,
        "or_(jobs.c.lease_until < now.steady, jobs.c.lease_clock != now.clock)", "jobs.c.lease_until < now.steady",
        ("tests/test_jobs.py", "tests/test_worker.py"),
    ),
    Mutant(
        "leases are renewed", "batchserve/worker/leases.py",
        "execution.renew_lease_if_mine(connection, run.id, run.attempt, self._settings.lease, now)", "pass",
        ("tests/test_worker_turns.py",),
    ),
    Mutant(
        "jobs of dead workers are rescued", WORKER,
        "            self._guarded(partial(_rescue, self._runtime, self._clock))\n", "",
        ("tests/test_worker_turns.py",),
    ),
    Mutant(
        "a chunk is halved before its last try", JOB_RUN, "crashes == most - 1 and chunk.records > 1",
        "crashes < 0 and chunk.records > 1", ("tests/test_worker_turns.py",),
    ),
    Mutant(
        "a cancelled chunk that does not end is killed", JOB_RUN,
        "        if (not job.calls or overdue) and", "        if not job.calls and",
        ("tests/test_worker_turns.py",),
    ),
    Mutant(
        "a call that takes too long is killed", ENGINE, "wait([pipe, process.sentinel], call.timeout)",
        "wait([pipe, process.sentinel], None)", ("tests/test_engine.py",),
    ),
    Mutant(
        "an interactive call that takes too long is killed", INTERACTIVE,
        "call_later(seconds, self._expire, seconds)", "call_later(1e6, self._expire, seconds)",
        ("tests/test_interactive.py",),
    ),
    Mutant(
        "what comes between two calls is no answer", INTERACTIVE,
        "            self.kill()  # no call waits", "            pass  # no call waits",
        ("tests/test_interactive.py",),
    ),
    Mutant(
        "the processes of jobs have a higher niceness", PROCESS,
        "    os.nice(limits.nice)\n", "", ("tests/test_engine.py",),
    ),
    Mutant(
        "one chunk of each job in turn", WORKER, "            self._turns.rotate(-1)\n", "",
        ("tests/test_worker_turns.py",),
    ),
    Mutant(
        "a worker without a process claims no job", WORKER, "        if window and not self._stopping.is_set():\n",
        "        if not self._stopping.is_set():\n", ("tests/test_worker_turns.py",),
    ),
    Mutant(
        "the jobs of a worker without a process go to others", WORKER,
        "        self._guarded(self._release_if_incapable)\n", "", ("tests/test_worker_turns.py",),
    ),
    # Bounds
    Mutant(
        "a scoring process has limited memory", PROCESS,
        "            resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))\n", "            pass\n",
        ("tests/test_engine.py",),
    ),
    Mutant(
        "a job waits while the disk is full", WAITS,
        "return error if isinstance(error, InsufficientStorage) else outage_of(error)", "return outage_of(error)",
        ("tests/test_worker_turns.py",),
    ),
    Mutant(
        "a job waits while the storage does not respond", WAITS,
        "return error if isinstance(error, InsufficientStorage) else outage_of(error)",
        "return error if isinstance(error, InsufficientStorage) else None", ("tests/test_outages.py",),
    ),
    Mutant(
        "a chunk that meets an outage is put back", JOB_RUN,
        "        if error is not None and delay_of(error) is not None:\n            job.pending",
        "        if False:\n            job.pending",
        ("tests/test_outages.py",),
    ),
    Mutant(
        "uploads leave free space", BODIES,
        "    if free is not None and free < runtime.settings.free_bytes:\n", "    if False:\n",
        ("tests/test_api_upload.py",),
    ),
    Mutant(
        "a body that stalls is aborted", BODIES, "asyncio.timeout(self._settings.body_idle)",
        "asyncio.timeout(None)", ("tests/test_bad_input.py",),
    ),
    Mutant(
        "a body that trickles is aborted", BODIES, "        self._check_rate(self._waited)\n", "",
        ("tests/test_bad_input.py",),
    ),
    # Connections
    Mutant("bytes outside of a body are counted", PROTOCOL, "        self._spent += len(piece)\n", "", (WIRE,)),
    Mutant(
        "the length of a target is limited", PROTOCOL,
        "        if len(self.url) > TARGET_BYTES:\n", "        if False:\n",
        (WIRE,),
    ),
    Mutant(
        "trailers do not become headers", PROTOCOL, "        if self._chunked or self._replays:  # a trailer",
        "        if self._replays:  # a trailer", (f"{WIRE}::test_a_trailer_never_becomes_a_header",),
    ),
    Mutant(
        "a request for which no file can be opened is refused", PROBLEMS,
        "error.errno in (errno.EMFILE, errno.ENFILE):", "False:",
        (f"{WIRE}::test_without_a_free_descriptor_the_server_neither_spins_nor_ends",),
    ),
    Mutant(
        "a connection goes on after an unexpected error", PROBLEMS,
        'if begun or scope["type"] != "http":', "if True:",
        (f"{WIRE}::test_a_connection_goes_on_after_an_unexpected_error",),
    ),
    Mutant(
        "a request names exactly one host", PROTOCOL, 'if self._hosts > 1 or (self._hosts == 0 and version == "1.1"):',
        "if False:", (f"{WIRE}::test_a_request_that_servers_could_frame_differently_is_refused_and_closed",),
    ),
    Mutant(
        "pipelined requests wait for their turn", PROTOCOL, "            if self.pipeline:\n",
        "            if False:\n", (f"{WIRE}::test_pipelined_requests_are_answered_in_their_order",),
    ),
    Mutant(
        "a client that reads nothing is disconnected", PROTOCOL,
        "        elif now - self.progress >= self.limits.send_idle:\n",
        "        elif False:\n", (f"{WIRE}::test_a_client_that_reads_nothing_is_disconnected_and_a_slow_one_is_not",),
    ),
    Mutant(
        "unread responses are limited in total", PROTOCOL,
        "        if waiting <= self.send_bytes:\n            return\n",
        "        return\n",
        (f"{WIRE}::test_unread_responses_are_bounded_in_total_and_their_memory_is_freed",),
    ),
    Mutant(
        "idle connections are closed for new ones", PROTOCOL, "[: max(excess, 0)]", "[:0]",
        (f"{WIRE}::test_idle_connections_are_closed_for_new_ones_and_busy_ones_are_not",),
    ),
    Mutant(
        "as many connections are closed as are too many", PROTOCOL, "if len(idle) < excess:", "if not idle:",
        (f"{WIRE}::test_a_connection_beyond_the_limit_gets_503_with_retry_after",),
    ),
    Mutant(
        "a stream ends when its key is revoked", "batchserve/service/following.py", " and await allowed()", "",
        ("tests/test_keys.py::test_streams_and_long_polls_end_when_their_key_is_revoked",),
    ),
    Mutant(
        "a key that only reads changes nothing", "batchserve/api/auth.py",
        "if not caller.may_change and not", "if False and not",
        ("tests/test_keys.py::test_a_reader_gets_what_a_user_reads_and_may_do_nothing_else",),
    ),
    Mutant(
        "a cancel without effect is not recorded", REQUESTS, "return job if ended or requested else None", "return job",
        ("tests/test_audit.py::test_what_has_no_effect_is_not_recorded",),
    ),
    Mutant(
        "an admin key of a tenant reads its entries only", "batchserve/audit.py",
        "if tenant == EVERY_TENANT else", "if True else",
        ("tests/test_audit.py::test_the_log_is_for_admin_keys_and_each_sees_its_tenant",),
    ),
    Mutant(
        "the length of a body is limited", BODIES, "        if decoded > self._limit:\n", "        if False:\n",
        ("tests/test_api_upload.py",),
    ),
    Mutant(
        "the expansion of a compressed body is limited", BODIES,
        "decoded > self._received * self._settings.decompression_ratio", "False", ("tests/test_api_upload.py",),
    ),
    Mutant(
        "the expansion of an archive is limited", ARCHIVE,
        "    if size > max(_RATIO_FREE, _MAX_RATIO * directory.stop):\n", "    if False:\n",
        ("tests/test_hostile.py", "tests/test_formats_images.py"),
    ),
    Mutant(
        "duplicate names in an archive are refused", ARCHIVE, "    if len(counted) < len(hashes):\n", "    if False:\n",
        ("tests/test_formats_images.py",),
    ),
    Mutant(
        "the pixels of an image are limited", IMAGES, "    if width * height > most:\n", "    if False:\n",
        ("tests/test_images.py",),
    ),
    Mutant(
        "records without an array share one blank", ARRAYS, "np.concatenate([values, blank])",
        "np.concatenate([values, *[blank] * len(good)])", ("tests/test_tensors.py",),
    ),
    Mutant(
        "a tenant leaves one process to others", TURNS, "max(1, slots - 1)", "slots", ("tests/test_turns.py",),
    ),
    Mutant(
        "the tenant with the fewest running calls comes next", TURNS,
        "min(able, key=lambda name: self._running[name])", "able[0]", ("tests/test_turns.py",),
    ),
    Mutant(
        "after a failed run each item runs alone", GROUPS,
        "[error if len(items) == 1 else GroupFailed() for _ in items]", "[error for _ in items]",
        ("tests/test_groups.py",),
    ),
    Mutant(
        "a group has a bounded number of items", GROUPS, "len(taken) >= GROUP_ITEMS or ", "", ("tests/test_groups.py",),
    ),
    Mutant(
        "a group has a bounded number of bytes", GROUPS, " or size + queue[0].size > GROUP_BYTES", "",
        ("tests/test_groups.py",),
    ),
    Mutant(
        "a group takes an item of each tenant in turn", GROUPS, "places.append(place)", "places.appendleft(place)",
        ("tests/test_groups.py",),
    ),
    Mutant(
        "the timer of items that have gone asks for no others", GROUPS,
        "            line.stop_looking()  # or it would ask", "            pass  # or it would ask",
        ("tests/test_groups.py",),
    ),
    Mutant(
        "a head is sent with its body", "batchserve/cli/joined.py", "            self._pending += data\n",
        "            self.flush()\n            self._transport.write(data)\n", (WIRE,),
    ),
    Mutant(
        "nothing is written for a client that has left", "batchserve/cli/joined.py",
        "            if not self._transport.is_closing():  # its client", "            if True:  # its client", (WIRE,),
    ),
    Mutant(
        "loops of several threads read at the same time", CONNECT, "        except Busy:  # a loop",
        "        except ZeroDivisionError:  # a loop", ("tests/test_database.py",),
    ),
    Mutant(
        "a run without callers is killed", GROUPS, "            item.group.task.cancel()\n", "            pass\n",
        ("tests/test_groups.py",),
    ),
    Mutant(
        "a key that a record has twice is no plain one", PLAIN,
        "    if body.count(b\":\") != len(names) * len(records):\n        return False\n", "",
        ("tests/test_plain_records.py",),
    ),
    Mutant(
        "an integer that would be rounded twice is no plain number", PLAIN, "-_EXACT <= value <= _EXACT", "True",
        ("tests/test_plain_records.py",),
    ),
    Mutant(
        "a negative zero keeps its sign", PLAIN_CSV, "b\"-0\" in text and _LOST_SIGN", "False and _LOST_SIGN",
        ("tests/test_plain.py",),
    ),
    Mutant(
        "a text that becomes the middle of two float32s is rounded once", PLAIN_CSV,
        "if middle.any() and", "if False and",
        ("tests/test_plain.py",),
    ),
    Mutant(
        "an integer is rounded once", PLAIN_CSV, "isinstance(value, int) and -_EXACT <= value <= _EXACT", "True",
        ("tests/test_plain.py",),
    ),
    Mutant(
        "a missing number that the model needs is a row error", PLAIN_CSV, "if missing[:, needed].any():", "if False:",
        ("tests/test_plain.py",),
    ),
    Mutant(
        "tiny numbers have fewer bits", PLAIN_CSV, " or ((size < _SMALLEST) & (size != 0)).any()", "",
        ("tests/test_plain.py",),
    ),
    Mutant(
        "numbers beyond float32 are row errors", PLAIN_CSV, "size.max() >= _LARGEST or ", "False or ",
        ("tests/test_plain.py",),
    ),
    Mutant(
        "integers beyond their type are row errors", PLAIN_CSV,
        "return array.astype(kind) if fits else None", "return array.astype(kind)",
        ("tests/test_plain.py",),
    ),
    Mutant(
        "quoted fields are no plain texts", PLAIN_CSV, ".replace(b'\"', b\"\")", "",
        ("tests/test_plain.py",),
    ),
    Mutant(
        "polars drops a byte order mark below the header", PLAIN_CSV, " and not body.startswith(_BOM)", "",
        ("tests/test_plain.py",),
    ),
    Mutant(
        "words of JSON are no numbers", PLAIN_CSV, "others and b\"\".join(numbers)", "False and b\"\".join(numbers)",
        ("tests/test_plain.py",),
    ),
    Mutant(
        "each record has as many fields as the header", PLAIN_CSV,
        "rows is not None and set(map(len, rows)) == {plan.numbers}", "rows is not None",
        ("tests/test_plain.py",),
    ),
    Mutant(
        "numbers that are none are null in CSV", PLAIN_CSV, "matrix.dtype.kind == \"f\" and not", "False and not",
        ("tests/test_plain.py",),
    ),
    Mutant(
        "an answer that is to be finite is a row error in JSON, too", PLAIN_JSON,
        "any(without_answer(self.signature, outputs, failed))", "False",
        ("tests/test_plain.py",),
    ),
    Mutant(
        "a line of NDJSON is one record", PLAIN,
        "[orjson.loads(line) for line in content.removesuffix(b\"\\n\").split(b\"\\n\", _MOST_RECORDS)]",
        "orjson.loads(b\"[%b]\" % b\",\".join(content.splitlines()))",
        ("tests/test_plain.py",),
    ),
    Mutant(
        "labels that need quotation marks get them", PLAIN_CSV,
        "not all(_is_plain_label", "False and not all(_is_plain_label",
        ("tests/test_plain.py",),
    ),
    Mutant(
        "an input of several chunks is not scored at once", DIRECT,
        "plain.chunk.records > task.limits.records", "False",
        ("tests/test_plain.py",),
    ),
    Mutant(
        "a model whose answers depend on others scores each input by itself", PLAIN_CSV, " or varies(signature)", "",
        ("tests/test_plain.py",),
    ),
    Mutant(
        "the calls of a tenant in progress are limited", TURNS, "taken >= self._most", "False",
        ("tests/test_turns.py",),
    ),
    Mutant(
        "a call ends when its client disconnects", "batchserve/service/calls.py",
        "        if self._leaving is not None:\n", "        if False:\n", ("tests/test_turns.py",),
    ),
    Mutant(
        "a queue is counted once for all requests", "batchserve/service/places.py",
        "count.version == self._database.version_from_thread()", "False", ("tests/test_places.py",),
    ),
    Mutant(
        "a queue position may change by time alone", "batchserve/service/places.py",
        "        return not due and", "        return",
        ("tests/test_places.py",),
    ),
    Mutant(
        "the position of one job reads a limited number of jobs", QUERIES,
        "*guards).limit(bindparam(\"most\"))", "*guards)",
        ("tests/test_places.py",),
    ),
    Mutant(
        "event streams read only after a commit", "batchserve/service/following.py",
        "same = version is not None and", "same = False and", ("tests/test_places.py",),
    ),
    Mutant(
        "a page of jobs is bounded in bytes", "batchserve/api/job_list.py",
        "if page and size > PAGE_BYTES:", "if False:",
        ("tests/test_places.py",),
    ),
    Mutant(
        "a list has the jobs of its tenant", LISTS,
        "        return [[jobs.c.tenant == tenant, *part] for part in parts]\n", "        return parts\n",
        ("tests/test_lists.py",),
    ),
    Mutant(
        "a page begins behind the last job of the one before, also among jobs of one moment", LISTS,
        "key < place if place[0] < until else moment < until]", "moment < min(until, place[0])]",
        ("tests/test_lists.py",),
    ),
    Mutant(
        "each state of a list is read by its index", LISTS,
        "[[jobs.c.state == state] for state in states] or [[]]", "[[jobs.c.state.in_(states)]] if states else [[]]",
        ("tests/test_lists.py",),
    ),
    Mutant(
        "each tenant queues its own uploads", QUERIES,
        "        query = query.where(jobs.c.tenant == tenant)\n    return sorted(", "        pass\n    return sorted(",
        ("tests/test_accumulate.py",),
    ),
    # HTTP
    Mutant(
        "If-Match compares strongly", CONDITIONAL, "(etag in wanted and not _is_weak(etag))", "etag in wanted",
        ("tests/test_http.py",),
    ),
    Mutant(
        "a change that a precondition forbids is not made", CONDITIONAL,
        "    if _unmet(request, etag, None, exists=exists) is not None:\n", "    if False:\n", ("tests/test_http.py",),
    ),
    Mutant(
        "Allow lists the methods of all routes of a path", PROBLEMS,
        "    if error.status_code == 405:\n", "    if False:\n", ("tests/test_http.py",),
    ),
    Mutant(
        "a gzip body of many members is not copied for each", BODIES,
        "                self._slice = self._SLICE\n", "", ("tests/test_http.py",),
    ),
    Mutant(
        "a zstd body of many frames is not copied for each", BODIES,
        "    _SLICE = 1024\n", "    _SLICE = BLOCK\n", ("tests/test_http.py",),
    ),
    Mutant(
        "a response links to the operations on its resource", "batchserve/app.py", "        add_links(document)\n", "",
        ("tests/test_openapi.py",),
    ),
    # Web browsers
    Mutant(
        "a host must be allowed", ORIGIN, "            self._hosts.require(host)\n", "            pass\n",
        ("tests/test_origin.py",),
    ),
    Mutant(
        "an origin must be that of the request", ORIGIN, "        if origin is not None:\n", "        if False:\n",
        ("tests/test_origin.py",),
    ),
    Mutant(
        "the Sec-Fetch-Site of a browser is checked", ORIGIN, "        if site is not None and",
        "        if False and", ("tests/test_origin.py",),
    ),
    Mutant(
        "a header that decides must be unique", ORIGIN, "        if len(headers) != len(scope",
        "        if 0 and len(scope", ("tests/test_origin.py",),
    ),
    Mutant(
        "responses carry the headers that restrict them to their origin", ORIGIN,
        ", *seal]", "]", ("tests/test_origin.py",),
    ),
    Mutant(
        "no redirect repeats a host", "batchserve/app.py", "redirect_slashes=False,  #", "redirect_slashes=True,  #",
        ("tests/test_origin.py",),
    ),
    # Full disks
    Mutant(
        "writes that free space may use the reserve", CONNECT,
        "            return self._in_reserve(self._reserve, act, error)\n", "            raise\n",
        ("tests/test_reserve.py",),
    ),
    Mutant(
        "the reserve is refilled", CONNECT, "            reserve.refill()\n", "", ("tests/test_reserve.py",),
    ),
    Mutant(
        "requests that need space wait for the reserve", BODIES, "    if not runtime.database.refill_reserve():\n",
        "    if False:\n", ("tests/test_reserve.py",),
    ),
    # Records and values
    Mutant(
        "a quotation mark that is never closed is refused", CSV,
        "    if (window.final or endless) and (at :=", "    if False and (at :=", ("tests/test_records.py",),
    ),
    Mutant(
        "a quoted field that ends in the middle of a text over several lines is refused", CSV,
        "    if not found.by_parity and (field :=", "    if False and (field :=", ("tests/test_records.py",),
    ),
    Mutant(
        "a field full of records is refused", CSV, "    if columns < 2 or not len(long):\n", "    if True:\n",
        ("tests/test_records.py",),
    ),
    Mutant(
        "a carriage return alone ends no line of CSV", CSV, "    if not has_lone_returns(array, found.lines):\n",
        "    if True:\n", ("tests/test_records.py",),
    ),
    Mutant(
        "a carriage return alone ends no line of NDJSON", JSONL, '    if b"\\r" in window.data:\n', "    if False:\n",
        ("tests/test_records.py",),
    ),
    Mutant(
        "a line of spaces is not a record", LINES, "    if blank := [", "    if blank := False and [",
        ("tests/test_records.py",),
    ),
    Mutant(
        "a malformed element that holds others is refused", JSON,
        "        _check_elements(lines, chunk, reading.errors)\n", "", ("tests/test_records.py",),
    ),
    Mutant(
        "a number too large for its type is an error of its record", SCHEMA,
        "    if target.is_float() and reaches_limits(cast):\n        finite", "    if False:\n        finite",
        ("tests/test_one_answer.py",),
    ),
    Mutant(
        "values that polars reads as infinity are read again as text", TABLE,
        "        return None  # polars reads infinity", "        pass  #", ("tests/test_one_answer.py",),
    ),
    Mutant(
        "a number too large for an array is an error of its record", ARRAYS,
        "        return _too_large(values, target)\n", "        return np.zeros(values.shape, bool)\n",
        ("tests/test_one_answer.py",),
    ),
    Mutant(
        "an errors list counts records in the whole input", "batchserve/scoring/results.py",
        '{"record": first_record + error.record}', '{"record": error.record}',
        ("tests/test_api_download.py",),
    ),
    Mutant(
        "a panic of polars is a named error", "batchserve/scoring/faults.py",
        "PANICS = (pl.exceptions.PolarsError, pl.exceptions.PanicException)", "PANICS = (ZeroDivisionError,)",
        ("tests/test_damaged.py::test_times_beyond_the_calendar_pass_through_or_fail_the_job_with_a_named_error",),
    ),
    Mutant(
        "a row group that chunks cut is fetched once", "batchserve/formats/parquet.py",
        "fetch = _keep_excerpt if is_cut and", "fetch = _keep_excerpt if False and", ("tests/test_ranged.py",),
    ),
    Mutant(
        "of an object without a file a chunk fetches its row groups", "batchserve/formats/parquet.py",
        "        return source.stored\n", "        return io.BytesIO(source.read())\n", ("tests/test_ranged.py",),
    ),
    Mutant(
        "the nesting in a Parquet footer is limited", "batchserve/formats/wire/thrift.py",
        '        if depth > _DEPTH:\n            raise ThriftError("values',
        '        if False:\n            raise ThriftError("values',
        ("tests/test_damaged.py",),
    ),
    Mutant(
        "an output of unknown elements is refused", "batchserve/inference/session.py",
        "        if not _GIVEN.fullmatch(output.type):\n", "        if False:\n", ("tests/test_admission.py",),
    ),
    # Rows
    Mutant(
        "JSON that cannot be read back is not written",
        CODEC,
        "ensure_ascii=False, allow_nan=False)\n        orjson.loads(text)\n",
        "ensure_ascii=False)\n",
        ("tests/test_unreadable.py",),
    ),
    Mutant(
        "a text that cannot be read back is not written",
        CODEC,
        "    if isinstance(value, str):\n        _require_text(value)\n    return value\n",
        "    return value\n",
        ("tests/test_unreadable.py",),
    ),
    Mutant(
        "invalid JSON is read as a value",
        CODEC,
        "    except ValueError:\n        return UNREADABLE\n",
        "    except ZeroDivisionError:\n        return UNREADABLE\n",
        ("tests/test_unreadable.py",),
    ),
    Mutant(
        "a list leaves out what cannot be read",
        STATEMENTS,
        "        with suppress(UnreadableRow):\n            yield job_from_row(row)\n",
        "        yield job_from_row(row)\n",
        ("tests/test_unreadable.py",),
    ),
    Mutant(
        "a claim ends a job that cannot be read",
        EXECUTION,
        "            finish(connection, ending(jobs.c.id == row[\"id\"]), JobState.FAILED, now, values)\n",
        "            raise\n",
        ("tests/test_unreadable.py",),
    ),
    Mutant(
        "a predict is read back before it is committed",
        REQUESTS,
        "    rows.require_written(values)\n",
        "",
        ("tests/test_unreadable.py",),
    ),
    Mutant(
        "a job that cannot be started blocks no other",
        WORKER,
        "self._begin_or_fail(job)\n",
        "self._begin(job)\n",
        ("tests/test_unreadable.py",),
    ),
    Mutant(
        "a worker counts claims that fail",
        WORKER,
        "            self._failed_claims += 1\n",
        "",
        ("tests/test_unreadable.py",),
    ),
    Mutant(
        "an error that quotes odd input can be encoded",
        "batchserve/api/problems.py",
        "orjson.dumps(presentable(body))",
        "orjson.dumps(body)",
        ("tests/test_options_property.py",),
    ),
    Mutant(
        "max_errors is finite",
        OPTIONS,
        "        le=MAX_COUNT,\n        allow_inf_nan=False,\n",
        "",
        ("tests/test_options_property.py",),
    ),
    Mutant(
        "run_after is limited to the calendar",
        OPTIONS,
        "not RUN_AFTER[0] <= moment < RUN_AFTER[1]",
        "False",
        ("tests/test_options_property.py",),
    ),
    Mutant(
        "metadata is bounded in bytes",
        OPTIONS,
        "        if size > METADATA_BYTES:\n",
        "        if False:\n",
        ("tests/test_options_property.py",),
    ),
    # Clocks
    Mutant(
        "a jump of the wall clock is detected", "batchserve/clock.py", "<= TOLERANCE else counted",
        "<= 1e99 else counted", ("tests/test_clock.py",),
    ),
    Mutant(
        "nothing expires by a clock that has jumped", "batchserve/upkeep/retention.py",
        "return 0.0 if keep is None or keep > settled", "return 0.0 if keep is None", ("tests/test_clock.py",),
    ),
    Mutant(
        "no key is forgotten by a clock that has jumped", WORKER, "if clocks.settled_for(connection, now) >= kept:",
        "if clocks.settled_for(connection, now) >= 0:", ("tests/test_clock.py",),
    ),
    # Values that training has not seen
    Mutant(
        "an unknown category is an error of its record", DOMAINS,
        "    if domain.categories is not None:\n        _find", "    if False:\n        _find",
        ("tests/test_categories.py",),
    ),
    Mutant(
        "an infinite number that the original refuses is an error of its record", DOMAINS,
        "    if series.dtype.is_float() and not domain.infinite:\n        far(",
        "    if False:\n        far(", ("tests/test_categories.py",),
    ),
    Mutant(
        "an empty text that the original refuses is an error of its record", DOMAINS,
        "    if series.dtype == pl.String() and not domain.empty:\n", "    if False:\n", ("tests/test_categories.py",),
    ),
    Mutant(
        "a model that makes up an answer is not converted", "batchserve/conversion/values.py",
        "        raise ParityFailed(str(refused), parity=report.to_json()) from None\n", "        del report\n",
        ("tests/test_categories.py",),
    ),
    Mutant(
        "a category that a split does not name goes the other way", FOREST,
        "            known = values[np.minimum(places, len(values) - 1)] == column\n",
        "            known = places < len(values)\n", ("tests/test_tree_categories.py",),
    ),
    Mutant(
        "a missing category goes where its split sends it", FOREST,
        "        through = [starts[sets[nodes.missing[sets]]] + known[nodes.missing[sets]] + 1]\n",
        "        through = []\n", ("tests/test_tree_categories.py",),
    ),
    Mutant(
        "a category has the code that its graph gives it", COLUMNS,
        "np.where(keys[places] == column, codes[places], np.float32(self.default))", "codes[places]",
        ("tests/test_tree_categories.py",),
    ),
    # Independence of records
    Mutant(
        "records are proved not to influence each other", INDEPENDENCE,
        "    if _mixes(session, feed, least, batch):\n        return True\n", "", ("tests/test_independence.py",),
    ),
    Mutant(
        "records are compared with themselves alone", INDEPENDENCE, "    return batch is None and any(",
        "    return False and any(", ("tests/test_independence.py",),
    ),
    # Files as they are
    Mutant(
        "the delimiter of a CSV is recognised", DIALECT,
        "    return next((mark for mark in best if _is_table(widths[mark])), best[0])\n", '    return ","\n',
        ("tests/test_files.py",),
    ),
    Mutant(
        "the columns of the model decide between delimiters", DIALECT, " if found[mark] == max(found.values())]", "]",
        ("tests/test_files.py",),
    ),
    Mutant(
        "a text in an unknown encoding is refused with the option", ENCODINGS,
        "    if not _is_utf8(header) or is_foreign:\n", "    if False:\n", ("tests/test_files.py",),
    ),
    Mutant(
        "a byte order mark names the encoding", ENCODINGS, "if prefix.startswith(mark)), None)", "if False), None)",
        ("tests/test_files.py",),
    ),
    Mutant(
        "a zip of one table is that table", PACKED,
        "count.named[0] if count.tables or (count.unclear == count.files == 1) else None", "None",
        ("tests/test_files.py",),
    ),
    Mutant(
        "a zip of a table among others is refused", PACKED, "    _require_one_kind(count)\n    return", "    return",
        ("tests/test_files.py",),
    ),
    Mutant(
        "the expansion of a zip of a table is limited", PACKED, "                if size > most:\n",
        "                if False:\n", ("tests/test_files.py",),
    ),
    Mutant(
        "a workbook names each column once", EXCEL, "    if twice:\n", "    if False:\n", ("tests/test_files.py",),
    ),
    Mutant(
        "all rows of a workbook decide the types of its columns", EXCEL,
        "book.load_sheet(chosen, schema_sample_rows=None)", "book.load_sheet(chosen, schema_sample_rows=10)",
        ("tests/test_files.py",),
    ),
    Mutant(
        "a job of which no row could be scored fails", "batchserve/worker/active_job.py",
        "            if not (failed and self.planned and failed == self.rows_planned):\n", "            if True:\n",
        ("tests/test_api_predict.py::test_a_job_of_which_no_record_could_be_scored_fails_unless_that_is_allowed",),
    ),
    # Compiled reading
    Mutant(
        "a short number midway between two float32s is left to polars", FIELDS,
        "                            if double_bits(real) & BELOW_SINGLE == MIDPOINT:\n",
        "                            if False:\n", ("tests/test_matrices.py",),
    ),
    Mutant(
        "a long number midway between two float32s is left to polars", FIELDS,
        "                                good &= double_bits(real) & BELOW_SINGLE != MIDPOINT\n",
        "                                pass\n", ("tests/test_matrices.py",),
    ),
    Mutant(
        "a long number is computed with all bits of its power of ten", FIELDS,
        "    if upper & low_nine == low_nine:\n", "    if False:\n", ("tests/test_matrices.py",),
    ),
    Mutant(
        "a long number midway between two float64s becomes the even one", FIELDS,
        "        mantissa &= ~one  # halfway", "        mantissa &= ~U(0)  # halfway", ("tests/test_matrices.py",),
    ),
    Mutant(
        "a number too small for a float64 with all digits is left to polars", FIELDS, "    if power <= 0:\n",
        "    if power <= -1000:\n", ("tests/test_matrices.py",),
    ),
    Mutant(
        "an integer of more than 2^53 is left to polars", FIELDS,
        "                            good &= found == 1 and number < EXACT\n",
        "                            good &= found == 1\n", ("tests/test_matrices.py",),
    ),
    Mutant(
        "a number that has wrapped around is left to polars", FIELDS,
        "        digits += digits != 0 or number != U(0)  #", "        digits += number != U(0)  #",
        ("tests/test_matrices.py",),
    ),
    Mutant(
        "a number near to the limits of float32 is left to polars", FIELDS,
        "good &= real == 0.0 or SMALLEST <= real <= LARGEST", "good &= True", ("tests/test_matrices.py",),
    ),
    Mutant(
        "a text with a quotation mark is left to polars", FIELDS, "            odd |= quotes & there\n",
        "            pass\n", ("tests/test_matrices.py",),
    ),
    Mutant(
        "a text with carriage returns in its lines is left to polars", MATRICES,
        '            and state["returns"] == (state["lines"] if layout.after == b"\\r" else 0)\n', "",
        ("tests/test_matrices.py",),
    ),
    Mutant(
        "a text that is not UTF-8 is left to polars", MATRICES,
        '            and (not state["high"] or _is_utf8(text[:stop]))\n', "", ("tests/test_matrices.py",),
    ),
    Mutant(
        "records of which many are odd are left to polars at once", FIELDS,
        "                if bad == U(len(flagged)):\n                    return False\n",
        "                if bad == U(len(flagged)):\n                    bad -= one\n",
        ("tests/test_matrices.py",),
    ),
    Mutant(
        "an integer beyond its type is left to polars", FIELDS,
        "                            if whole_number < columns[column, LOW] or whole_number > columns[column, HIGH]:\n",
        "                            if False:\n", ("tests/test_matrices.py",),
    ),
    Mutant(
        "lines are counted only up to a quotation mark", NEWLINES,
        "            odd |= (begins & (newlines | returns)) | (equal_mask(text, at, QUOTE) & there)\n",
        "            odd |= begins & (newlines | returns)\n", ("tests/test_lines.py",),
    ),
    Mutant(
        "lines are counted only up to a blank one", NEWLINES,
        "            odd |= (begins & (newlines | returns)) | (equal_mask(text, at, QUOTE) & there)\n",
        "            odd |= equal_mask(text, at, QUOTE) & there\n", ("tests/test_lines.py",),
    ),
    Mutant(
        "lines are counted only up to a carriage return in one", NEWLINES,
        "        odd |= ((returns << one) | returned) & ~newlines & there\n", "        pass\n",
        ("tests/test_lines.py",),
    ),
    Mutant(
        "lines are counted only up to one that is no object", NEWLINES,
        "            odd |= begins & ~equal_mask(text, at, BRACE)\n", "            pass\n", ("tests/test_lines.py",),
    ),
    Mutant(
        'a short number with a leading zero is no JSON', FIELDS,
        '                        faulty |= whole == U(0) or (whole > one and text[first] == ZERO)\n',
        '                        pass\n', ("tests/test_matrices.py",),
    ),
    Mutant(
        'a long number with a leading zero is no JSON', FIELDS,
        '    if is_json and (whole == U(0) or (leads and whole > one)):\n',
        '    if False:\n', ("tests/test_matrices.py",),
    ),
    Mutant(
        'a short number that ends with a point is no JSON', FIELDS,
        '                        faulty = is_json and behind == U(0)\n',
        '                        faulty = False\n', ("tests/test_matrices.py",),
    ),
    Mutant(
        'a long number without digits behind its point is no JSON', FIELDS,
        '        if at == behind and (is_json or whole == U(0)):\n',
        '        if at == behind and whole == U(0):\n', ("tests/test_matrices.py",),
    ),
    Mutant(
        'a text with a control character is no JSON', FIELDS,
        'while at < last and text[at] != QUOTE and text[at] >= C(32):',
        'while at < last and text[at] != QUOTE:', ("tests/test_matrices.py",),
    ),
    Mutant(
        'a JSON text with a backslash is left to polars', FIELDS,
        '            odd |= equal_mask(text, at, BACKSLASH) & there\n',
        '            pass\n', ("tests/test_matrices.py",),
    ),
    Mutant(
        'a text in JSON that is kept is no number', FIELDS,
        '                        elif found != columns[column, KEEP]:\n',
        '                        elif found == 0:\n', ("tests/test_matrices.py",),
    ),
    Mutant(
        'a chunk of JSON with a broken record is left to polars', MATRICES,
        '    if any(error.column is None for error in slow.errors):\n        return None\n',
        '', ("tests/test_matrices.py",),
    ),
    Mutant(
        'commas in the texts of JSON separate nothing', FIELDS,
        '            found &= ~inside\n',
        '            pass\n', ("tests/test_matrices.py",),
    ),
    # Tables and servers of the client
    Mutant(
        "nullable integers keep all their digits", PANDAS,
        "        values = pl.Series(name, column.to_numpy(dtype.numpy_dtype, na_value=dtype.numpy_dtype.type(0)))\n",
        "        values = pl.Series(name, column.astype(float).to_numpy())\n", ("tests/test_frames.py",),
    ),
    Mutant(
        "a result of pandas has the index of its table", PANDAS, "        frame.index = self._frame.index\n", "",
        ("tests/test_frames.py",),
    ),
    Mutant(
        "times keep their zone", PANDAS,
        'column.dt.tz_convert("UTC").dt.tz_localize(None)', "column.dt.tz_localize(None)",
        ("tests/test_frames.py",),
    ),
    Mutant(
        "a local server ends with the program that started it", CHILD, ' "--until-stdin-closes",', "",
        ("tests/test_local.py",),
    ),
    Mutant(
        "a local server ends with its block", CHILD,
        "        self._server.stop()\n        self._folder.cleanup()\n", "        pass\n", ("tests/test_local.py",),
    ),
    # Many files
    Mutant(
        "a file that has changed is scored again", MANY,
        "if known is None or (known.input.sha256, known.asked) != (read.sha256, self._asked):", "if known is None:",
        (f"{FOLDERS}::test_only_a_file_that_has_changed_is_sent_again_even_if_size_and_time_are_the_same",),
    ),
    Mutant(
        "the bytes of a file are those that were compared", MANY, ', "Content-Digest": f"sha-256=:{digest}:"}', "}",
        (f"{FOLDERS}::test_a_file_that_changes_between_two_reads_is_read_again",),
    ),
    Mutant(
        "a file has one key until it has a job", MANY,
        '"Idempotency-Key": entry.key', '"Idempotency-Key": str(uuid.uuid4())',
        (f"{FOLDERS}::test_an_answer_that_is_lost_makes_no_second_job",),
    ),
    Mutant(
        "a status that may hide a change is not trusted", "batchserve/client/ledger.py",
        " and begun - before[1] >= settled * 1e9", "",
        (f"{FOLDERS}::test_a_file_that_has_just_changed_is_read_again_whatever_its_status_says",),
    ),
    Mutant(
        "a saved result is synced before it has its name", "batchserve/client/writing.py",
        "            await wire.call(functools.partial(_sync, file))\n", "",
        (f"{FOLDERS}::test_a_result_is_synced_before_it_has_its_name_and_its_folder_behind",),
    ),
    # Storages whose objects are not files
    Mutant(
        "blocks of objects are kept up to a limit", BLOCKS, "while self._bytes > self._most and", "while False and",
        ("tests/test_s3.py",),
    ),
    Mutant(
        "a reader that goes on reads ahead", BLOCKS, "_LONGEST_RUN) if goes_on else 1", "1)", ("tests/test_s3.py",),
    ),
    Mutant(
        "a writer waits for a slow store", STREAMED, "Queue(max(1, ahead // 2))", "Queue()", ("tests/test_s3.py",),
    ),
    Mutant(
        "an error of a store ends its writer", STREAMED,
        "            if self._error is not None:\n                raise self._error\n            try:\n",
        "            try:\n", ("tests/test_s3.py",),
    ),
    Mutant(
        "downloads are redirected only when that is asked for", DOWNLOAD, 'return wanted and request.method == "GET"',
        'return request.method == "GET"', ("tests/test_api_download.py",),
    ),
    Mutant(
        "a download from elsewhere begins with its first bytes", FILES,
        "                start = message\n                return\n", "                pass\n",
        ("tests/test_outages.py",),
    ),
    # Direct uploads
    Mutant(
        "what was sent by one request is copied before it is read", DIRECT_UPLOADS,
        "uploads.sent_object(upload), input_key(upload.id if upload.multipart else str(uuid_utils.uuid7()))",
        "(uploads.sent_object(upload),) * 2", ("tests/test_direct_uploads.py",),
    ),
    Mutant(
        "the length of a direct upload is compared", DIRECT_UPLOADS, "if sent != upload.bytes:", "if False:",
        ("tests/test_direct_uploads.py",),
    ),
    Mutant(
        "the digest of a direct upload is compared", DIRECT_UPLOADS, "if sha256 is not None and", "if False and",
        ("tests/test_direct_uploads.py",),
    ),
    Mutant(
        "an expired direct upload is refused", DIRECT_UPLOADS, "if now > upload.expires_at:", "if False:",
        ("tests/test_direct_uploads.py",),
    ),
    Mutant(
        "a direct upload ends in the transaction of its job", DIRECT_UPLOADS,
        "def end(connection: Connection, _: float) -> None:\n        uploads.end(connection, upload_id)",
        "def end(connection: Connection, _: float) -> None:\n        pass", ("tests/test_direct_uploads.py",),
    ),
    Mutant(
        "a direct upload is found by its tenant alone", UPLOADS,
        'if row is None or tenant not in (row["tenant"], EVERY_TENANT):', "if row is None:",
        ("tests/test_direct_uploads.py",),
    ),
    Mutant(
        "what was sent for a direct upload is kept until it expires", "batchserve/upkeep/sweep.py",
        '    "uploads/": _needed_uploads,', '    "uploads/": _none_needed,', ("tests/test_direct_uploads.py",),
    ),
    # Inputs and results where they are
    Mutant(
        "an address lies within a prefix by whole components", LOCATIONS,
        "self.fixed[: len(root.parts)] == root.parts", '"".join(self.fixed).startswith("".join(root.parts))',
        ("tests/test_locations.py",),
    ),
    Mutant(
        "an encoded component is checked as what it means", LOCATIONS,
        'if part in ("", ".", "..") or "/" in part or "\\0" in part:', 'if part == "":', ("tests/test_locations.py",),
    ),
    Mutant(
        "a link on the way to an input is refused", "batchserve/storage/folders.py",
        "_FOLDER | os.O_NOFOLLOW", "_FOLDER", ("tests/test_locations.py",),
    ),
    Mutant(
        "an input is read in the version that was found", LOCATIONS,
        "    if _version(os.fstat(source.fileno()), _depth(version)) != version:", "    if False:",
        ("tests/test_locations.py",),
    ),
    Mutant(
        "a result elsewhere replaces nothing by itself", LOCAL,
        "        if not self._replaces:", "        if False:", ("tests/test_locations.py",),
    ),
    Mutant(
        "no two inputs of a job have one result", "batchserve/intake.py", "        if result in named:",
        "        if False:", ("tests/test_locations.py",),
    ),
    Mutant(
        "a call of the client has the key that it is given", "batchserve/client/transport.py", "    if key is None:",
        "    if True:", ("tests/test_client.py",),
    ),
    Mutant(
        "the address of a result says its format", "batchserve/intake.py",
        "    if request.format is None and target is not None:", "    if False:", ("tests/test_locations.py",),
    ),
    Mutant(
        "all inputs are compared before anything is scored", "batchserve/worker/active_job.py",
        "None if self.is_compared else self._comparison", "None if True else self._comparison",
        ("tests/test_locations.py",),
    ),
    Mutant(
        "where chunks of several inputs end does not depend on how many a call plans", PLANNING,
        "    if is_open and not task.is_last and chunks[-1].inputs < MOST_TOGETHER:", "    if False:",
        ("tests/test_planning.py",),
    ),
    # Schedules
    Mutant(
        "the transaction that queues the job of a tick ends the tick", "batchserve/schedules/claim.py",
        "ticks.end_if_mine(connection, self.tick, state, now, job_ids=job_ids, error=error)", "pass",
        ("tests/test_scheduler.py",),
    ),
    Mutant(
        "a process that has lost its claim of a tick queues nothing", TICKS,
        'raise LeaseLost(f"another process has claimed or ended tick {tick.id}")', "return",
        ("tests/test_scheduler.py",),
    ),
    Mutant(
        "a claim of a tick is prolonged while it runs", TICKS,
        "connection.execute(update(ticks).where(*mine).values(try_at=until))", "pass", ("tests/test_scheduler.py",),
    ),
    Mutant(
        "a tick is claimed by one process", TICKS,
        "as_read = (ticks.c.id == tick.id, ticks.c.attempt == tick.attempt, _PENDING, _is_free(now))\n    claimed",
        "as_read = (ticks.c.id == tick.id,)\n    claimed", ("tests/test_scheduler.py",),
    ),
    Mutant(
        "a tick does not overlap the job of an earlier one", TICKS, "return None if row is None else f",
        "return None and f",
        ("tests/test_scheduler.py",),
    ),
    Mutant(
        "a schedule goes on after its clock was set back", "batchserve/timetable/schedules.py",
        "or_(schedules.c.next_at <= now, schedules.c.planned_at > now + _TOLERANCE)", "or_(schedules.c.next_at <= now)",
        ("tests/test_scheduler.py",),
    ),
    Mutant(
        "a schedule is found by its tenant alone", "batchserve/timetable/schedules.py",
        "select(*_READ).where(is_it, *_guards(tenant))", "select(*_READ).where(is_it)", ("tests/test_scheduler.py",),
    ),
    Mutant(
        "a repeated time of the day runs once", "batchserve/cron.py", "if (moment := found.timestamp()) > last:",
        "if (moment := found.timestamp()):", ("tests/test_cron.py",),
    ),
    Mutant(
        "a missed tick is caught up as its schedule says", "batchserve/schedules/planning.py", "if at < now - grace:",
        "if False:", ("tests/test_scheduler.py",),
    ),
    Mutant(
        "a tick that meets an outage is tried again", "batchserve/schedules/firing.py",
        "if is_passing(error) and",
        "if False and", ("tests/test_scheduler.py",),
    ),
    # Webhooks
    Mutant(
        "a delivery is written with the end of its job", "batchserve/jobs/ends.py",
        "outbox.add(connection, heard, state, now)", "pass", ("tests/test_webhooks.py",),
    ),
    Mutant(
        "a claimed delivery is put off for a lease", HOOKS,
        '"due_at": now.steady + lease, "due_clock": now.clock}', '"due_at": 0.0, "due_clock": now.clock}',
        ("tests/test_webhooks.py",),
    ),
    Mutant(
        "a late failure of an attempt does not count", HOOKS, ' or claimed.attempt != row["attempts"]:', ":",
        ("tests/test_webhooks.py::test_a_late_success_counts_and_a_late_failure_does_not",),
    ),
    Mutant(
        "410 disables a webhook", HOOKS, "if outcome.status == _GONE_STATUS and claimed.endpoint_id is not None:",
        "if False:", ("tests/test_webhooks.py::test_410_disables_the_endpoint_and_gives_up_what_is_on_its_way",),
    ),
    Mutant(
        "a delivery is seen by its tenant alone", HOOKS,
        'if row is None or tenant not in (row["tenant"], EVERY_TENANT):', "if row is None:",
        ("tests/test_webhooks.py::test_another_tenants_webhook_looks_exactly_like_a_missing_one",),
    ),
    Mutant(
        "a webhook is seen by its tenant alone", "batchserve/webhooks/endpoints.py",
        'if row is None or tenant not in (row["tenant"], EVERY_TENANT):', "if row is None:",
        ("tests/test_webhooks.py::test_another_tenants_webhook_looks_exactly_like_a_missing_one",),
    ),
    Mutant(
        "few attempts at a time are made to one receiver", ROOM, "target in self.full_targets or ", "",
        ("tests/test_webhooks.py::test_few_attempts_at_a_time_are_made_to_one_target_and_for_one_tenant",),
    ),
    Mutant(
        "what has failed leaves room for what has not", ROOM, "if is_full or (is_slow and self.is_slow_full):",
        "if is_full:", ("tests/test_webhooks.py::test_what_has_failed_leaves_room_for_what_has_not",),
    ),
    Mutant(
        "all addresses of a host are checked", OUTGOING,
        "if not all(is_allowed(one, self._networks) for one in addresses):",
        "if not any(is_allowed(one, self._networks) for one in addresses):",
        ("tests/test_webhook_requests.py::test_a_host_with_any_address_that_is_not_public_is_not_connected_to",),
    ),
    Mutant(
        "http is for allowed networks alone", OUTGOING,
        'if address.scheme == "http" and not all(', "if False and not all(",
        ("tests/test_webhook_requests.py::test_http_is_for_allowed_networks_alone",),
    ),
    Mutant(
        "the certificate of a receiver is that of its name", OUTGOING,
        'server_hostname=address.host.rstrip(".")', 'server_hostname="127.0.0.1"',
        ("tests/test_webhook_requests.py",),
    ),
    Mutant(
        "an address of IPv6 is judged by that which it stands for", "batchserve/webhooks/addresses.py",
        "if address in _NAT64[0] or address in _COMPATIBLE:", "if False:",
        ("tests/test_webhook_addresses.py",),
    ),
    # Quotas
    Mutant(
        "no more jobs are queued than a quota allows", ACCOUNT,
        "if quota.jobs is not None and added.queues and jobs_used >= quota.jobs:", "if False:", (QUOTAS,),
    ),
    Mutant(
        "no more bytes are stored than a quota allows", ACCOUNT, "if quota.bytes is not None and _is_too_much(",
        "if False and _is_too_much(", (QUOTAS,),
    ),
    Mutant(
        "no more rows are planned in a day than a quota allows", ACCOUNT,
        "if quota.rows_per_day is not None and _is_too_much(", "if False and _is_too_much(", (QUOTAS,),
    ),
    Mutant(
        "rows are charged once although their commit is repeated", "batchserve/worker/metering.py",
        "        if added:\n", "        if True:\n", (QUOTAS,),
    ),
    Mutant(
        "requests beyond the quota of a second are refused", "batchserve/quotas/limits.py", "if left < 1.0:",
        "if False:", (QUOTAS,),
    ),
    Mutant(
        "removed bytes are given back", CONTENTS, "        account.give_back(connection, freed)\n", "",
        ("tests/test_quotas_account.py",),
    ),
    Mutant(
        "an object that another job references is not given back", CONTENTS,
        "for key in unnamed & sizes.keys()):", "for key in sizes.keys()):", ("tests/test_quotas_account.py",),
    ),
    Mutant(
        "a new account is not kept at once", ACCOUNT, 'if kept is not None or abs(now - row["since"]) >= SETTLES:',
        "if True:", ("tests/test_quotas_account.py",),
    ),
    Mutant(
        "a job with its own retention is due after it", "batchserve/jobs/ends.py",
        "ending_undated(*guards).values(due_at=_ENDED_AT + jobs.c.expires_in)",
        "ending_undated(*guards).values(due_at=_ENDED_AT)", ("tests/test_expires_in.py",),
    ),
    Mutant(
        "a longer retention than that of the settings is refused", "batchserve/options.py",
        "if self.expires_in is not None and most is not None and self.expires_in > most:", "if False:",
        ("tests/test_expires_in.py",),
    ),
    # Metrics
    Mutant(
        "a deleted job keeps what it has counted for", REQUESTS,
        "    totals.note_gone(connection, [job_id], with_rows=True)\n    if not changed(", "    if not changed(",
        ("tests/test_jobs.py",),
    ),
    Mutant(
        "an expired job keeps its end in the counters", "batchserve/jobs/expiry.py",
        "    totals.note_gone(connection, ids, with_rows=False)\n", "", ("tests/test_jobs.py",),
    ),
    Mutant(
        "a worker that does not announce itself is not alive", "batchserve/jobs/workers.py",
        "and_(workers.c.until >= now.steady, workers.c.clock == now.clock)", "and_(workers.c.clock == now.clock)",
        ("tests/test_metrics.py",),
    ),
    Mutant(
        "cached answers are counted by their route", "batchserve/api/cache.py", 'scope["template"] = _TEMPLATE', "pass",
        ("tests/test_metrics.py",),
    ),
    Mutant(
        "models have a bounded number of series", "batchserve/metrics.py", "len(self._known) >= self._most", "False",
        ("tests/test_metrics.py",),
    ),
    # Signals
    Mutant(
        "a malformed request ID is replaced", "batchserve/correlation.py",
        "if given is not None and _REQUEST_ID.fullmatch(given):", "if given is not None:", ("tests/test_requests.py",),
    ),
    Mutant(
        "a job is stored with the request that queues it", REQUESTS,
        'return {"request_id": asked_by.request_id, "traceparent": asked_by.traceparent}', "return {}",
        ("tests/test_jobs.py",),
    ),
    Mutant(
        "lines about a job name the request that queued it", "batchserve/logs.py",
        "if request_id is None else", "if True else", ("tests/test_requests.py",),
    ),
    Mutant(
        "the access log has no query", "batchserve/api/requests.py", 'raw.partition(b"?")[0]',
        '(raw + b"?" + scope["query_string"])', ("tests/test_requests.py",),
    ),
    Mutant(
        "the span of a job is linked to that of its upload", "batchserve/worker/job_trace.py",
        "links=(job.upload_traceparent, asked_by.traceparent)", "links=()", ("tests/test_tracing.py",),
    ),
    Mutant(
        "a misspelt variable stops the start", "batchserve/variables.py", "    if faults:\n", "    if False:\n",
        ("tests/test_variables.py::test_variables_that_nobody_reads_are_refused",),
    ),
    Mutant(
        "passwords of settings are not shown", "batchserve/variables.py",
        '_PASSWORD.sub(rf"\\1{_HIDDEN}", value)', "value", ("tests/test_variables.py",),
    ),
    # Databases of others
    Mutant(
        "rows that go into a table are counted in the transaction that shows them", LOAD,
        "if self._staged() != expected:", "if False:", ("tests/test_table_loads.py",), on_postgres=True,
    ),
    Mutant(
        "a job is noted where its rows go, in their transaction", LOAD,
        "INSERT INTO {} (job_id, target, mode, rows) VALUES (%s, %s, %s, %s) ON CONFLICT DO NOTHING",
        "SELECT %s::text, %s::text, %s::text, %s::bigint /* {} */",
        ("tests/test_table_loads.py",), on_postgres=True,
    ),
    Mutant(
        "attempts at a job take turns with its table", LOAD,
        "if connection.execute(_TURN, [_subject(job_id)]).fetchone() != (True,):", "if False:",
        ("tests/test_table_loads.py",), on_postgres=True,
    ),
    Mutant(
        "the columns of a table are compared again when it takes rows", LOAD,
        "!= [(c.name, c.type) for c in columns]", "is None", ("tests/test_table_loads.py",), on_postgres=True,
    ),
    Mutant(
        "a query only reads", "batchserve/postgres/query.py", "IsolationLevel.REPEATABLE_READ, True",
        "IsolationLevel.REPEATABLE_READ, False", ("tests/test_queries.py",), on_postgres=True,
    ),
    Mutant(
        "the rows of a query are read once", "batchserve/worker/metering.py",
        "if execution.keep_input_if_mine(connection, job_id, attempt, stored):", "if False:",
        ("tests/test_queries.py",), on_postgres=True,
    ),
)  # fmt: skip
