"""Valid inputs for probe runs: a model's sample records, or generated ones."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from math import prod
from typing import Any

import numpy as np
import orjson
import polars as pl
from onnx import ModelProto, NodeProto, TensorProto

from batchserve.domain import InputTensor, Signature
from batchserve.errors import BatchserveError, OutOfMemory
from batchserve.formats.schema import numpy_type
from batchserve.inference.binding import Binding, bind
from batchserve.inference.images import Images, image_size, images_of_array
from batchserve.inference.inputs import Batchwise, build_inputs
from batchserve.inference.kernels import Arrays, Session

__all__ = ["EXAMPLES", "PROBE_BYTES", "Feed", "feeds", "run_within_memory"]

EXAMPLES = 16
"""Different records in a feed, unless they are large."""
FREE_SIZES = (8, 224, 64, 32, 128, 3, 1)
"""Guesses for a dimension that the graph leaves open."""
_IMAGE_SIZE = 224
"""The first guess where images may be of any size: a smaller one would be scored unusually fast."""
PROBE_BYTES = 64 * 2**20
"""Most bytes of generated inputs of one run, unless three records take more."""

Fill = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


@dataclass(frozen=True)
class Feed:
    """Valid inputs: a few different records that can be repeated, and the values shared by all records."""

    arrays: Arrays
    shared: Arrays = field(default_factory=dict)

    def take(self, indices: np.ndarray) -> Arrays:
        return {name: array[indices % len(array)] for name, array in self.arrays.items()} | self.shared

    def first(self, count: int) -> Arrays:
        return self.take(np.arange(count))

    def varied(self, count: int) -> Arrays:
        """Records that all differ in their numbers: repeated ones would be scored unusually fast."""
        random = np.random.default_rng(0)
        inputs = self.first(count)
        for name, array in inputs.items():
            if name in self.arrays and array.dtype.kind == "f" and array.ndim == 2:
                noise = random.standard_normal(array.shape, dtype=np.float32)
                inputs[name] = (array + noise * self.arrays[name].std(axis=0)).astype(array.dtype)
        return inputs

    def examples(self) -> int:
        return min((len(array) for array in self.arrays.values()), default=1)

    def bytes_per_record(self) -> int:
        return max(1, sum(array.nbytes // len(array) for array in self.arrays.values()))


def feeds(model: ModelProto, inputs: tuple[InputTensor, ...], metadata: Mapping[str, Any]) -> Iterator[Feed]:
    recorded = _recorded_feed(inputs, metadata)
    if recorded is not None:
        yield recorded
    texts = _known_texts(model)
    sizes: tuple[int, ...] = FREE_SIZES if any(None in tensor.shape[1:] for tensor in inputs) else FREE_SIZES[:1]
    if any(tensor.image is not None for tensor in inputs):
        sizes = tuple(sorted(sizes, key=lambda size: size != _IMAGE_SIZE))
    fills: tuple[Fill, ...] = (
        lambda random, shape: random.standard_normal(shape, dtype=np.float32),
        lambda _, shape: np.zeros(shape, np.float32),
        lambda _, shape: np.ones(shape, np.float32),
    )
    for size, fill, turn in product(sizes, fills, range(1 + max((len(lists) for lists in texts.values()), default=0))):
        random = np.random.default_rng(0)
        elements = sum(prod(extent or size for extent in tensor.shape[1:]) for tensor in inputs)
        examples = max(3, min(EXAMPLES, PROBE_BYTES // (8 * elements)))
        arrays: Arrays = {}
        shared: Arrays = {}
        for place, tensor in enumerate(inputs):
            if tensor.image is not None:
                arrays[tensor.name] = _made_up_images(tensor, examples, image_size(tensor, size), random, fill)
                continue
            shape = tuple(extent or size for extent in tensor.shape[1 if tensor.per_record else 0 :])
            shape = (examples, *shape) if tensor.per_record else shape
            lists = texts.get(tensor.name, [])
            words = lists[(place + turn) % len(lists)] if lists else ["a"]
            target = arrays if tensor.per_record else shared
            target[tensor.name] = _made_up(tensor, shape, words, random, fill)
        yield Feed(arrays, shared)


def run_within_memory(session: Session, feed: Feed, records: int, least: int = 1) -> tuple[int, Arrays]:
    """A run of so many records, or of half, a quarter and so on, down to `least`, as memory allows. Raises OutOfMemory
    and ScoringFailed."""
    while True:
        try:
            return records, session.run(feed.first(records))
        except OutOfMemory:
            if records == least:
                raise
            records = max(least, records // 2)


def _made_up_images(
    tensor: InputTensor, count: int, size: tuple[int, int], random: np.random.Generator, fill: Fill
) -> np.ndarray:
    """Pixels around a middle gray, prepared as those of real images are."""
    pixels = np.clip(128 + 64 * fill(random, (count, *size, 3)), 0, 255).astype(np.uint8)
    return images_of_array(pixels, tensor).take(np.arange(count))


def _made_up(
    tensor: InputTensor,
    shape: tuple[int, ...],
    words: list[str],
    random: np.random.Generator,
    fill: Fill,
) -> np.ndarray:
    if tensor.dtype == "string":
        chosen = np.arange(prod(shape)) % len(words)
        return np.array(words, dtype=object)[chosen].reshape(shape)
    values = np.asarray(fill(random, shape))
    if not tensor.dtype.startswith("float"):
        values = np.asarray(values > 0)
    return values.astype(numpy_type(tensor.dtype))


def _recorded_feed(inputs: tuple[InputTensor, ...], metadata: Mapping[str, Any]) -> Feed | None:
    """The complete records that came with the model, of the commonest size; None when there are none, or they do not
    fill its inputs."""
    records = metadata.get("sample")
    signature = Signature(inputs, ())
    if not records:
        return None
    try:
        nested = [tensor.name for tensor in inputs if tensor.columns is None]
        names = [*(column.name for column in signature.columns), *nested]
        table = pl.DataFrame([_recorded(name, records, as_text=name in nested) for name in names])
        binding = bind(signature, names, holds_arrays=lambda name: name in nested)
        arrays = _built(signature, binding, table)
        if not arrays:  # no record is complete: perhaps the model handles missing values
            arrays = _built(_all_nullable(signature), binding, table)
    except (BatchserveError, pl.exceptions.PolarsError, AttributeError, TypeError):
        return None
    if not arrays:
        return None
    shared = {tensor.name: arrays.pop(tensor.name) for tensor in inputs if not tensor.per_record}
    return Feed(arrays, shared)


def _recorded(name: str, records: list[Any], *, as_text: bool) -> pl.Series:
    """The values of a column; those that are arrays as JSON text, as in a CSV."""
    values = [record.get(name) for record in records]
    if as_text:
        texts = [None if value is None else orjson.dumps(value).decode() for value in values]
        return pl.Series(name, texts, dtype=pl.String())
    return pl.Series(name, values, strict=False)


def _built(signature: Signature, binding: Binding, table: pl.DataFrame) -> Arrays:
    """The inputs of the records that can be scored, of the commonest size among them; {} where there are none."""
    inputs, faulty, _ = build_inputs(signature, binding, table)
    for images in inputs.values():
        if isinstance(images, Images):
            faulty[[error.record for error in images.check()]] = True
    varied = [one.shapes for one in inputs.values() if not isinstance(one, np.ndarray)]
    shapes = np.hstack([np.empty((table.height, 0), int), *varied])
    whole = np.flatnonzero(~faulty)
    if not len(whole):
        return {}
    sizes, which, counts = np.unique(shapes[whole], axis=0, return_inverse=True, return_counts=True)
    chosen = whole[which.reshape(-1) == counts.argmax()] if sizes.shape[1] else whole
    shared = {tensor.name for tensor in signature.inputs if not tensor.per_record}
    return {name: _taken(array, None if name in shared else chosen) for name, array in inputs.items()}


def _taken(array: np.ndarray | Batchwise, records: np.ndarray | None) -> np.ndarray:
    if not isinstance(array, np.ndarray):
        return array.take(np.arange(len(array.shapes)) if records is None else records)
    return array if records is None else array[records]


def _all_nullable(signature: Signature) -> Signature:
    return replace(
        signature,
        inputs=tuple(
            replace(
                tensor,
                columns=tensor.columns and tuple(replace(column, nullable=True) for column in tensor.columns),
                nullable=True,
            )
            for tensor in signature.inputs
        ),
    )


def _known_texts(model: ModelProto) -> dict[str, list[list[str]]]:
    """The lists of words that encoders know, for each text input that reaches them."""
    readers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    texts: dict[str, list[list[str]]] = {}
    for entry in model.graph.input:
        if entry.type.tensor_type.elem_type != TensorProto.STRING:
            continue
        seen = {entry.name}
        queue = [entry.name]
        for name in queue:
            for node in readers.get(name, ()):
                words = _words(node)
                if words:
                    texts.setdefault(entry.name, []).append(words)
                    continue
                fresh = [output for output in node.output if output not in seen]
                seen.update(fresh)
                queue.extend(fresh)
    return texts


def _words(node: NodeProto) -> list[str]:
    for attribute in node.attribute:
        if attribute.name in ("cats_strings", "keys_strings") and attribute.strings:
            return [word.decode(errors="replace") for word in attribute.strings]
    return []
