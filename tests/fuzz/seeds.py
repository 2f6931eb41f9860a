"""Valid inputs of every format, from which the damaged ones are generated."""

import base64
import gzip
import io
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

import numpy as np
import polars as pl
from packing import zstd
from PIL import Image

from fuzz.case import Headers
from fuzz.models import COLUMNS, flowers

TABLES = ("csv", "jsonl", "json", "parquet", "arrow", "arrows")
MEDIA_TYPES = {
    "csv": "text/csv",
    "tsv": "text/tab-separated-values",
    "jsonl": "application/x-ndjson",
    "json": "application/json",
    "parquet": "application/vnd.apache.parquet",
    "arrow": "application/vnd.apache.arrow.file",
    "arrows": "application/vnd.apache.arrow.stream",
    "npy": "application/x-npy",
    "npz": "application/x-npz",
    "zip": "application/zip",
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "gif": "image/gif",
}


@dataclass(frozen=True, slots=True)
class Seed:
    model: str
    format: str
    data: bytes


@cache
def seeds() -> tuple[Seed, ...]:
    iris = pl.DataFrame(
        [{"id": i, **dict(zip(COLUMNS, row, strict=True))} for i, (row, _) in enumerate(flowers()[:30])]
    )
    people = pl.DataFrame(
        {
            "age": [None if i % 5 == 0 else 20.5 + i for i in range(12)],
            "city": ['Bern, "BE"', "Biel\nBienne", "Genève"] * 4,
            "visits": range(12),
        }
    )
    arrays = np.arange(30, dtype=np.float32).reshape(5, 2, 3)
    lists = pl.DataFrame({"x": arrays.tolist(), "threshold": [2.0] * 5})
    matrix = iris.select(COLUMNS).to_numpy().astype(np.float32)
    photos = pl.DataFrame({"image": [base64.b64encode(picture("png", i)).decode() for i in range(3)]})
    members = {f"a/{i}.{kind}": picture(kind, i) for i, kind in enumerate(("png", "jpeg", "webp", "gif"))}
    return (
        *(Seed("iris", format, table(iris, format)) for format in TABLES),
        *(Seed("people", format, table(people, format)) for format in TABLES),
        *(Seed("arrays", format, table(lists, format)) for format in TABLES[1:]),
        *(Seed("pictures", kind, picture(kind, 1)) for kind in ("png", "jpeg", "webp", "gif")),
        Seed("iris", "tsv", iris.write_csv(separator="\t").encode()),
        Seed("iris", "json", json.dumps({"data": matrix[:5].astype(float).round(1).tolist()}).encode()),
        Seed("iris", "npy", npy(matrix)),
        Seed("iris", "npz", npz({"input": matrix})),
        Seed("arrays", "npy", npy(arrays)),
        Seed("arrays", "npz", npz({"x": arrays, "threshold": np.float32(1)})),
        Seed("pictures", "zip", archive(members)),
        Seed("pictures", "csv", photos.write_csv().encode()),
    )


def table(frame: pl.DataFrame, format: str) -> bytes:
    target = io.BytesIO()
    writers: dict[str, Callable[[io.BytesIO], object]] = {
        "csv": frame.write_csv,
        "jsonl": frame.write_ndjson,
        "json": frame.write_json,
        "parquet": frame.write_parquet,
        "arrow": frame.write_ipc,
        "arrows": frame.write_ipc_stream,
    }
    writers[format](target)
    return target.getvalue()


def npy(array: np.ndarray) -> bytes:
    target = io.BytesIO()
    np.save(target, array)
    return target.getvalue()


def npz(arrays: Mapping[str, Any]) -> bytes:
    target = io.BytesIO()
    np.savez(target, **arrays)
    return target.getvalue()


def picture(kind: str, shade: int) -> bytes:
    target = io.BytesIO()
    Image.new("RGB", (9, 7), (40 * shade % 256, 90, 200)).save(target, kind)
    return target.getvalue()


def archive(members: Mapping[str, bytes]) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as made:
        for name, data in members.items():
            made.writestr(name, data)
    return target.getvalue()


def form(parts: Sequence[tuple[str, bytes]], boundary: str = "edge") -> bytes:
    whole = b"".join(
        f'--{boundary}\r\ncontent-disposition: form-data; name="f"; filename="{name}"\r\n\r\n'.encode() + data + b"\r\n"
        for name, data in parts
    )
    return whole + f"--{boundary}--\r\n".encode()


def wrapped(random: Random, format: str, data: bytes) -> tuple[Headers, bytes]:
    """One of the ways in which the same input may be sent."""
    way = random.choices(("plain", "typed", "gzip", "zstd", "quiet", "form"), (4, 3, 1, 1, 1, 1))[0]
    typed: Headers = (("content-type", MEDIA_TYPES[format]),)
    if way == "form":
        name = f"input.{'jpg' if format == 'jpeg' else format}"
        return (("content-type", "multipart/form-data; boundary=edge"),), form([(name, data)])
    if way in ("gzip", "zstd"):
        packed = gzip.compress(data, mtime=0) if way == "gzip" else zstd.compress(data)
        return (*typed, ("content-encoding", way)), packed
    if way == "quiet":
        return (typed if format == "tsv" else ()), gzip.compress(data, mtime=0)
    return (typed if way == "typed" or format in ("tsv", "json") else ()), data
