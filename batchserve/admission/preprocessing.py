"""From the metadata of a model to the Preprocessing of its images."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from math import isfinite, prod
from typing import Any, NoReturn

from pydantic import TypeAdapter, ValidationError

from batchserve.domain import Column, InputTensor, Preprocessing
from batchserve.errors import ModelRefused
from batchserve.inference.images import tables
from batchserve.inference.unfilled import listed, shape_text

__all__ = ["COLUMN", "read_preprocessing", "with_images"]

COLUMN = "image"
"""The column that fills an input of images."""
_CHANNELS = {"rgb": 3, "bgr": 3, "gray": 1}
_MOST = 2**16
"""Most pixels of a side: more than any network takes, and no product of two overflows."""
_FIELDS = {field.name for field in fields(Preprocessing)}


def with_images(inputs: Sequence[InputTensor], entry: Mapping[str, Any]) -> tuple[InputTensor, ...]:
    """The inputs of a graph, one of which takes images as the metadata entry `batchserve.image` says.

    Raises ModelRefused when the entry is invalid, or contradicts the graph.
    """
    name = entry.get("input", _only_input(inputs))
    tensor = next((tensor for tensor in inputs if tensor.name == name), None)
    if tensor is None:
        _refuse(f"the graph has no input {name!r}; it has {listed([tensor.name for tensor in inputs])}")
    if tensor.columns and tensor.columns[0].name != tensor.name:
        _refuse(f"batchserve.columns names columns for the same input, {name!r}")
    spec = read_preprocessing({field: value for field, value in entry.items() if field != "input"})
    spec = _fitted(spec, tensor)
    image = replace(tensor, columns=(Column(COLUMN, "image"),), image=spec)
    return tuple(image if other is tensor else other for other in inputs)


def read_preprocessing(entry: Mapping[str, Any]) -> Preprocessing:
    """The Preprocessing that a JSON object describes; a field that is absent has its default. Raises ModelRefused."""
    if unknown := sorted(set(entry) - _FIELDS):
        _refuse(f"unknown field {', '.join(map(repr, unknown))}; known are {', '.join(sorted(_FIELDS))}")
    try:
        spec = TypeAdapter(Preprocessing).validate_json(json.dumps(entry), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        _refuse(f"{place}: {first['msg'][0].lower()}{first['msg'][1:]}, got {first['input']!r}")
    _check(spec)
    return spec


def _check(spec: Preprocessing) -> None:
    channels = _CHANNELS[spec.order]
    sides = (*(spec.size or ()), *((spec.shortest,) if spec.shortest is not None else ()))
    if not all(1 <= side <= _MOST for side in sides):
        _refuse(f"size and shortest must be 1 to {_MOST}, got {', '.join(map(str, sides))}")
    if spec.shortest is not None and spec.resize != "crop":
        _refuse("shortest is only for resize 'crop'")
    if not spec.antialias and spec.filter not in ("bilinear", "nearest"):
        _refuse(f"without antialias the filter is bilinear or nearest, got {spec.filter!r}")
    for name, numbers in (("mean", spec.mean), ("std", spec.std)):
        if len(numbers) not in (0, 1, channels):
            _refuse(f"{name} must have 1 number or {channels}, one for each channel, got {len(numbers)}")
    if not all(map(isfinite, (spec.scale, *spec.mean, *spec.std))):
        _refuse("scale, mean and std must be finite")
    if not all(spec.std):
        _refuse("std must not be 0")


def _fitted(spec: Preprocessing, tensor: InputTensor) -> Preprocessing:
    """The Preprocessing with the size of the graph's input. Raises ModelRefused when they contradict each other."""
    if tensor.dtype in ("string", "bool") or not tensor.per_record:
        _refuse(f"input {tensor.name!r} takes {tensor.dtype}, not images: expected numbers with a record axis")
    channels = _CHANNELS[spec.order]
    shape = tensor.shape
    if spec.layout == "flat":
        if len(shape) != 2 or spec.size is None:
            _refuse(
                f"layout 'flat' is for inputs [N, values], with a size; input {tensor.name!r} is {shape_text(shape)}"
            )
        expected: tuple[int | None, ...] = (prod(spec.size) * channels,)
    elif len(shape) == 3 and channels == 1:
        expected = spec.size or (None, None)
    elif len(shape) == 4:
        size = spec.size or (None, None)
        expected = (channels, *size) if spec.layout == "nchw" else (*size, channels)
    else:
        _refuse(
            f"layout {spec.layout!r} is for inputs of 4 axes (or 3, of gray images); "
            f"input {tensor.name!r} is {shape_text(shape)}"
        )
    if any(None not in (want, have) and want != have for want, have in zip(expected, shape[1:], strict=True)):
        _refuse(
            f"images in order {spec.order!r}, layout {spec.layout!r} and size {spec.size and list(spec.size)} are "
            f"{shape_text((None, *expected))}, but input {tensor.name!r} is {shape_text(shape)}"
        )
    try:
        tables(spec, tensor.dtype)
    except OverflowError as error:
        _refuse(f"{error}: check scale, mean and std")
    if spec.size is None and spec.layout != "flat":
        first = 2 if len(shape) == 4 and spec.layout == "nchw" else 1
        height, width = shape[first], shape[first + 1]
        spec = replace(spec, size=(height, width) if height and width else None)
    if spec.resize and spec.size is None:
        _refuse(f"resize {spec.resize!r} needs a size, because height and width of the graph are dynamic")
    return spec


def _only_input(inputs: Sequence[InputTensor]) -> str:
    candidates = [tensor.name for tensor in inputs if len(tensor.shape) == 4] or [tensor.name for tensor in inputs]
    if len(candidates) != 1:
        _refuse(
            f"input: name the one that takes the images; the graph has {listed([tensor.name for tensor in inputs])}"
        )
    return candidates[0]


def _refuse(reason: str) -> NoReturn:
    raise ModelRefused(f"batchserve.image: {reason}")
