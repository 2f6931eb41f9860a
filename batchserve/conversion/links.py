"""Graphs one behind the other: what the one gives is what the next one takes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import compose, version_converter

from batchserve.conversion.conversion import Conversion, opsets, serialize, set_opsets, tidy, with_facts, write
from batchserve.conversion.sample import listed
from batchserve.errors import ConversionFailed

Link = Conversion | onnx.ModelProto | bytes | Path | str


def chain(*links: Link, output: Path | str | None = None) -> bytes:
    """One graph of several, in their order: preparation, model, decision. Gives the bytes of the new file.

    Each link is a Conversion, a ModelProto, its bytes, or a path. Outputs of a link fill the inputs of the next one by
    their names; where there is one of each, or as many of both, by their order. The columns, the image and the sample
    of the first link, and the task, the labels and the targets of the last link that has any, are those of the whole.

    Raises ConversionFailed.
    """
    if len(links) < 2:
        raise ConversionFailed(f"A chain has two links or more, got {len(links)}.")
    graphs = [_read(link) for link in links]
    versions: dict[str, int] = {}
    for graph in graphs:
        for domain, version in opsets(graph).items():
            versions[domain] = max(version, versions.get(domain, 0))
    facts = _facts(graphs)
    for graph in graphs:
        del graph.metadata_props[:]  # each has its own, of which only one can stay
    whole = _versioned(graphs[0], versions)
    for place, graph in enumerate(graphs[1:], start=1):
        whole = _join(whole, _versioned(graph, versions), place)
    data = serialize(with_facts(tidy(whole), facts))
    if output is not None:
        write(data, Path(output))
    return data


def _read(link: Link) -> onnx.ModelProto:
    if isinstance(link, onnx.ModelProto):
        copy = onnx.ModelProto()
        copy.CopyFrom(link)
        return copy
    if isinstance(link, Conversion | bytes):
        return onnx.load_model_from_string(link.onnx if isinstance(link, Conversion) else link)
    try:
        return onnx.load(str(link))
    except Exception as error:  # onnx raises what its readers raise
        raise ConversionFailed(f"{link} could not be read as ONNX.") from error


def _versioned(graph: onnx.ModelProto, versions: dict[str, int]) -> onnx.ModelProto:
    """In the newest operator set that any link has: the same set, or one that the converter of ONNX leads to."""
    own = opsets(graph)
    if "" in own and own[""] != versions[""]:
        try:
            graph = version_converter.convert_version(graph, versions[""])
        except Exception as error:  # it raises what its adapters raise
            raise ConversionFailed(
                f"A link has operator set {own['']} and another one {versions['']}, and the first cannot be lifted: "
                "export both with the same (target_opset)."
            ) from error
    set_opsets(graph, versions)
    return tidy(graph)


def _join(first: onnx.ModelProto, second: onnx.ModelProto, place: int) -> onnx.ModelProto:
    given = [tensor.name for tensor in first.graph.output]
    taken = [tensor.name for tensor in second.graph.input]
    if set(taken) <= set(given):
        pairs = [(name, name) for name in taken]
    elif len(taken) == len(given):
        pairs = list(zip(given, taken, strict=True))
    else:
        raise ConversionFailed(
            f"Link {place} gives {listed(given)} and the next one takes {listed(taken)}: name them alike, or give as "
            "many as are taken."
        )
    prefix = f"link{place}/"
    second = compose.add_prefix(second, prefix, rename_outputs=False)
    clash = {tensor.name for tensor in second.graph.output} & _names(first)
    if clash:
        first = compose.add_prefix(first, f"before{place}/", rename_inputs=False)
        pairs = [(f"before{place}/{left}", right) for left, right in pairs]
    first.ir_version = second.ir_version = min(first.ir_version, second.ir_version)
    try:
        merged: onnx.ModelProto = compose.merge_models(
            first,
            second,
            [(left, f"{prefix}{right}") for left, right in pairs],
            outputs=[tensor.name for tensor in second.graph.output],
        )
    except ValueError as error:
        raise ConversionFailed(f"Links {place} and {place + 1} do not fit: {error}") from error
    return merged


def _names(graph: onnx.ModelProto) -> set[str]:
    return {name for node in graph.graph.node for name in node.output}


_OF_FIRST = ("columns", "image", "sample")
_OF_LAST = ("task", "labels", "targets")


def _facts(graphs: Sequence[onnx.ModelProto]) -> dict[str, Any]:
    said = [
        {
            entry.key.removeprefix("batchserve."): json.loads(entry.value)
            for entry in graph.metadata_props
            if entry.key.startswith("batchserve.")
        }
        for graph in graphs
    ]
    facts = {name: said[0].get(name) for name in _OF_FIRST}
    for link in said:
        facts |= {name: link[name] for name in _OF_LAST if name in link}
    return facts
