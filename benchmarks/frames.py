"""How much memory the client takes for a table of millions of rows, on its way in and out, beyond the table itself.

    python -m benchmarks.frames [rows]

Each case runs in a process of its own against one server; it prints the table's size, the result's, and the peak.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa

from batchserve import Client
from batchserve.client.child import serving
from batchserve.conversion import convert

ROWS = 10_000_000
CASES = ("polars", "pandas", "reader")
_BLOCK = 500_000


def main() -> None:
    if sys.argv[1:2] == ["--case"]:
        case, url, count = sys.argv[2:]
        print(json.dumps(measure(case, url, int(count))))
        return
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else ROWS
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder) / "log", BATCHSERVE_STORAGE=folder) as url:
        register(url, Path(folder))
        for case in CASES:
            print(json.dumps(measured(case, url, rows)), flush=True)


def register(url: str, folder: Path) -> None:
    """The model `double`, which takes one column."""
    from sklearn.linear_model import LinearRegression

    frame = pd.DataFrame({"x": [0.0, 1.0, 2.0]})
    convert(LinearRegression().fit(frame, 2 * frame["x"]), frame, folder / "double.onnx")
    with Client(url) as client:
        client.models.add(folder / "double.onnx", name="double")


def measured(case: str, url: str, rows: int) -> dict[str, Any]:
    """The figures of one case, from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.frames", "--case", case, url, str(rows)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def measure(case: str, url: str, rows: int) -> dict[str, Any]:
    """The figures of one case, in this process."""
    with Client(url) as client:
        small = _frame(100)  # so that the libraries are loaded before
        client.predict(small.to_pandas() if case == "pandas" else small, model="double", passthrough="all")
        frame = _frame(0 if case == "reader" else rows)
        data = frame.to_pandas() if case == "pandas" else frame
        before = _memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        started = time.monotonic()
        height, size = _streamed(client, rows) if case == "reader" else _predicted(client, data)
        assert height == rows
        return {
            "case": case,
            "rows": rows,
            "seconds": round(time.monotonic() - started, 1),
            "result_mb": size // 10**6,
            "peak_mb": (_memory("VmHWM") - before) // 10**6,
        }


def _predicted(client: Client, data: Any) -> tuple[int, int]:
    """Rows and bytes of the result of a frame."""
    out = client.predict(data, model="double", passthrough="all", reuse=False)
    assert (out["id"] == data["id"]).all()
    return len(out), int(out.memory_usage(deep=True).sum() if isinstance(out, pd.DataFrame) else out.estimated_size())


def _streamed(client: Client, rows: int) -> tuple[int, int]:
    """The same where neither the table nor its result is ever in memory."""
    schema = _frame(1).to_arrow().schema
    batches = (batch for block in _blocks(rows) for batch in block.to_arrow().cast(schema).to_batches())
    reader = pa.RecordBatchReader.from_batches(schema, batches)
    job = client.submit(reader, model="double", passthrough="all", reuse=False).wait()
    height, size = 0, 0
    for frame in job.result().iter_frames():
        height, size = height + frame.height, size + int(frame.estimated_size())
    return height, size


def _frame(rows: int, start: int = 0) -> pl.DataFrame:
    id = pl.Series("id", np.arange(start, start + rows))
    return pl.DataFrame([pl.Series("x", np.arange(rows) % 1000 / 7), id, (id % 977).cast(pl.String).alias("name")])


def _blocks(rows: int) -> Iterator[pl.DataFrame]:
    for start in range(0, rows, _BLOCK):
        yield _frame(min(_BLOCK, rows - start), start)


def _memory(name: str) -> int:
    """Bytes, by a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
