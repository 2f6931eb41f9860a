"""A model too large for one file, uploaded as a zip archive: model.onnx beside the files that hold its tensors."""

import json
import stat
from io import BytesIO
from math import prod
from typing import IO
from zipfile import ZipFile, ZipInfo

from onnx import ModelProto, TensorProto, helper

from batchserve.admission.graph import is_external, parse, tensors
from batchserve.errors import ModelRefused
from batchserve.formats.wire.archive import DAMAGED

__all__ = ["MAX_MODEL_BYTES", "is_bundle", "unpack"]

MAX_MODEL_BYTES = 1_900_000_000
"""A protobuf message, and so a model in memory, ends at 2 GiB."""
_MANIFEST = "batchserve.json"
_RATIO = 50
_UNSUSPICIOUS = 64 * 2**20
_BLOCK = 1 << 20


def is_bundle(data: bytes) -> bool:
    return data.startswith(b"PK\x03\x04")


def unpack(data: bytes) -> ModelProto:
    """The model of an archive, with the tensors of its other files inside, and the entries of `batchserve.json` as
    metadata. Nothing is written to disk.

    Raises ModelRefused for an archive that is broken, that tries to reach outside of itself, or that grows too large.
    """
    try:
        with ZipFile(BytesIO(data)) as archive:
            members = _members(archive)
            files = _read_all(archive, members)
    except DAMAGED as error:
        raise ModelRefused(f"the zip archive cannot be read: {error}") from error
    names = [name for name in files if name.endswith(".onnx")]
    if len(names) != 1:
        raise ModelRefused(f"expected a zip archive with one .onnx file, got {len(names)} among {sorted(files)[:20]}")
    model = parse(files.pop(names[0]))
    _add_manifest(model, files.pop(_MANIFEST, None))
    _inline(model, files)
    return model


def _members(archive: ZipFile) -> list[ZipInfo]:
    members = archive.infolist()
    names: set[str] = set()
    for member in members:
        name = member.orig_filename
        kind = stat.S_IFMT(member.external_attr >> 16)
        if not name or name in (".", "..") or any(sign in name for sign in "/\\\0:"):
            raise ModelRefused(f"the zip archive has a member {name!r}: only plain file names are accepted, no folders")
        if kind not in (0, stat.S_IFREG):
            raise ModelRefused(f"the zip archive has a member {name!r} that is a link or a device")
        if member.flag_bits & 0x1:
            raise ModelRefused(f"the zip archive has a member {name!r} that is encrypted")
        if name in names:
            raise ModelRefused(f"the zip archive has two members {name!r}")
        names.add(name)
    return members


def _read_all(archive: ZipFile, members: list[ZipInfo]) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    total = 0
    for member in members:
        with archive.open(member) as source:
            files[member.filename] = _read(source, member, MAX_MODEL_BYTES - total)
        total += len(files[member.filename])
    return files


def _read(source: IO[bytes], member: ZipInfo, room: int) -> bytes:
    """The bytes of a member, counted while they come: what the archive says of its own sizes is not believed."""
    content = bytearray()
    while block := source.read(_BLOCK):
        content += block
        if len(content) > room:
            raise ModelRefused(f"the zip archive holds more than {MAX_MODEL_BYTES:,} bytes")
        if len(content) > _UNSUSPICIOUS and len(content) > _RATIO * member.compress_size:
            raise ModelRefused(f"the zip archive's member {member.filename!r} grows more than {_RATIO} times")
    return bytes(content)


def _add_manifest(model: ModelProto, manifest: bytes | None) -> None:
    if manifest is None:
        return
    try:
        entries = json.loads(manifest)
    except (ValueError, RecursionError) as error:
        raise ModelRefused(f"{_MANIFEST} is not JSON: {error}") from error
    if not isinstance(entries, dict):
        raise ModelRefused(f"{_MANIFEST} must be an object, such as {{'labels': ['no', 'yes']}}")
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    metadata |= {f"batchserve.{key}": json.dumps(value) for key, value in entries.items()}
    helper.set_model_props(model, metadata)


def _inline(model: ModelProto, files: dict[str, bytes]) -> None:
    total = 0
    for tensor in tensors(model):
        if not is_external(tensor):
            continue
        values = _slice(tensor, files)
        total += len(values)
        if total > MAX_MODEL_BYTES:
            raise ModelRefused(f"the tensors of the model hold more than {MAX_MODEL_BYTES:,} bytes")
        tensor.raw_data = values
        tensor.ClearField("external_data")
        tensor.data_location = TensorProto.DEFAULT


def _slice(tensor: TensorProto, files: dict[str, bytes]) -> bytes:
    place = {entry.key: entry.value for entry in tensor.external_data}
    location = place.get("location", "").removeprefix("./")
    if location not in files:
        raise ModelRefused(f"tensor {tensor.name!r} is stored in {location!r}, which is not in the zip archive")
    content = files[location]
    try:
        offset = int(place.get("offset", "0"))
        length = int(place.get("length", str(len(content) - offset)))
        expected = prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (ValueError, KeyError, TypeError) as error:
        raise ModelRefused(f"tensor {tensor.name!r} has an invalid location: {place}") from error
    packed = tensor.data_type in (TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1)
    inside = 0 <= offset <= offset + length <= len(content)
    if not inside or (length != expected and not packed):
        raise ModelRefused(
            f"tensor {tensor.name!r} needs {expected} bytes and takes {length} from {offset} of {location!r}, "
            f"which has {len(content)}"
        )
    return content[offset : offset + length]
