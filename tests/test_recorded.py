"""The same bytes for the same job, from one release to the next."""

import json
from pathlib import Path

import recorded
from service import running


def test_results_and_errors_lists_of_all_formats_are_the_recorded_bytes(tmp_path: Path) -> None:
    with running(tmp_path, chunk_records=recorded.CHUNK_RECORDS) as api:
        found = dict(recorded.digests(api))
    wanted = json.loads(recorded.DIGESTS.read_text())
    assert {name for name, digest in wanted.items() if found.get(name) != digest} == set()
    assert found.keys() == wanted.keys()
