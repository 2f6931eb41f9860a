"""What is known of the memory that a run of a graph takes, without running it."""

from math import prod

from onnx import ModelProto, TensorProto, ValueInfoProto, helper, shape_inference

from batchserve.admission import graph

__all__ = ["known_need"]

_MOST = 256 * 2**20
"""Bytes of a model beyond which nothing is inferred: that takes several times as many, and memory is short."""


def known_need(model: ModelProto) -> str:
    """A sentence on the largest value of a run of as few records as the graph takes, as far as its shapes say so; ""
    where they do not."""
    if model.ByteSize() > _MOST:
        return ""
    single = ModelProto()
    single.CopyFrom(model)
    records = 1
    for entry in graph.inputs(single):
        axes = entry.type.tensor_type.shape.dim
        if axes and axes[0].dim_value <= 0:
            axes[0].dim_value = 1
        records = max(records, axes[0].dim_value if axes else 1)
    try:
        inferred = shape_inference.infer_shapes(single, data_prop=True)
    except Exception:  # noqa: BLE001 - whatever a strange graph leads onnx into, the need is unknown
        return ""
    values = {entry.name: _bytes(entry) for entry in (*inferred.graph.value_info, *inferred.graph.output)}
    name, size = max(values.items(), key=lambda value: value[1], default=("", 0))
    run = "a single record" if records == 1 else f"{records} records"
    return f" Its largest value, {name!r}, takes {size:,} bytes in a run of {run}." if size else ""


def _bytes(entry: ValueInfoProto) -> int:
    """0: unknown."""
    kind = entry.type.tensor_type
    sizes = [size.dim_value for size in kind.shape.dim]
    if not kind.HasField("shape") or not kind.elem_type or kind.elem_type == TensorProto.STRING:
        return 0
    return int(prod(sizes)) * helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize
