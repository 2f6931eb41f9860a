"""Conversion of a PyTorch module to an equivalent ONNX graph for any number of records."""

import inspect
import io
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import onnx

from batchserve.conversion.conversion import Conversion, check_parity, serialize, tidy, with_facts
from batchserve.conversion.estimator import Task
from batchserve.conversion.network import (
    Image,
    append_softmax,
    check_labels,
    image_facts,
    image_input,
    preprocessing,
    texts,
)
from batchserve.conversion.parity import Answers, compare
from batchserve.conversion.sample import Array, as_frame, listed, sentence
from batchserve.domain import Column, DType, Preprocessing
from batchserve.errors import ConversionFailed, ScoringFailed
from batchserve.inference.distances import distances
from batchserve.inference.kernels import Arrays, Session
from batchserve.inference.session import open_session

if TYPE_CHECKING:
    import torch

INSTALL = "Install it with: pip install 'batchserve[torch]'"
OPSET = 17
TRACED = 2
"""Records to trace the graph with: a single one would hide which axes have size 1 by chance."""
MADE_UP = 8
"""Records to verify a conversion with, when none are given."""
COUNTS = (1, 3)
"""Other numbers of records for which the graph must match the module."""

_FROZEN = (
    "Take sizes from x.shape or x.size() as they are (int(...), len(...), range(...) and Python loops freeze them), or "
    "compile that part with torch.jit.script."
)


def export_torch(
    module: "torch.nn.Module",
    example: Any,
    output: Path | str | None = None,
    *,
    image: Image | None = None,
    labels: Sequence[object] | None = None,
    softmax: bool = False,
    columns: Sequence[str] | None = None,
    task: Task | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    tolerance: float = 1e-4,
    target_opset: int = OPSET,
) -> Conversion:
    """Export a PyTorch module to ONNX, and verify on `example` that both give the same outputs.

    `example`: what the module is called with: a tensor, several of them, or a dict of its keyword arguments, as torch
    or NumPy arrays. Axis 0 of the first is the record axis; an input whose axis 0 differs, or that has none, is shared
    by all records. The graph takes any number of records, which is tried with 1, 2 and 3.
    `image`: how images become an input: a preset of PRESETS, or what docs/models.md says of `batchserve.image`.
    `labels`: the classes, in the order of the values of the first output, which holds scores or probabilities.
    `softmax`: the first output holds scores, and gives way to the probabilities that softmax makes of them.
    `columns`: names for the columns of the only input [N, k], by which a table fills it.
    `input_names`: default: the names of the arguments of `forward`. `output_names`: the keys of a dict, else `output`.
    `dynamic`: axes beside the record axis whose size is free, as in {"image": {2: "height", 3: "width"}}.

    Raises ConversionFailed, for one when the number of records is built into the graph, and ParityFailed as `convert`
    does. The module is left as it was, in its mode for training or evaluation. With `output` the graph is written
    there, after it passed.
    """
    require_torch()
    with quietly(), evaluating(module):
        call = make_call(module, example, input_names, image is not None)
        names = _output_names(call.outputs(call.count), output_names)
        graph = trace(call, names, dynamic or {}, target_opset, softmax=softmax, tolerance=tolerance)
        answers, numbers = _answers(graph, call, call.count, softmax)
    first = next(iter(numbers))
    if labels is not None:
        check_labels(first, _width(answers[first]), labels)
    report = compare(
        Answers(None, _flat(numbers)),
        Answers(None, _flat(answers)),
        rows=np.arange(call.count),
        methods=dict.fromkeys(numbers, "forward"),
        tolerance=tolerance,
    )
    check_parity(report, "Pass a larger tolerance if you accept this.")
    task = task or ("classification" if labels is not None else None)
    pictured = image_input(graph, image) if image is not None else None
    named = _named(graph, columns) if columns is not None else ()
    facts = {
        "task": task,
        "labels": texts(labels) if labels is not None else None,
        "image": image_facts(pictured) if pictured is not None else None,
        "columns": [{"name": c.name, "dtype": c.dtype, "input": graph.graph.input[0].name} for c in named] or None,
        "parity": report.to_json(),
        "versions": {name: version(name) for name in ("onnx", "torch")},
    }
    taken = pictured.columns if pictured is not None else named
    conversion = Conversion(serialize(with_facts(graph, facts)), report, taken or (), task)
    if output is not None:
        conversion.save(output)
    return conversion


def require_torch() -> None:
    if find_spec("torch") is None:
        raise ConversionFailed(f"The export needs torch. {INSTALL}")


def convert_torch(
    path: Path,
    output: Path | None = None,
    *,
    image: Image | None = None,
    sample: Path | None = None,
    labels: Sequence[object] | None = None,
    softmax: bool = False,
    tolerance: float = 1e-4,
) -> Conversion:
    """`export_torch` of the module in a file, see `load_module`. The example is noise in the size of the images, or
    the numbers of a file of records, whose columns the graph is to take by name."""
    module = load_module(path)
    if image is not None:
        example, columns = _noise(preprocessing(image)), None
    elif sample is not None:
        frame, named = as_frame(sample)
        example, columns = frame.to_numpy(np.float32), list(frame.columns) if named else None
    else:
        raise ConversionFailed("Specify what the module takes: images, or a sample of records.")
    return export_torch(
        module, example, output, image=image, labels=labels, softmax=softmax, columns=columns, tolerance=tolerance
    )


def _noise(image: Preprocessing) -> Array:
    """A few random image inputs, float32, in the size and layout that the module takes."""
    if image.size is None:
        raise ConversionFailed('The images need a size, as in {"size": [224, 224]}.')
    channels = 1 if image.order == "gray" else 3
    shape = (channels, *image.size) if image.layout == "nchw" else (*image.size, channels)
    noise = np.random.default_rng(0).standard_normal((MADE_UP, *shape), dtype=np.float32)
    return noise.reshape(MADE_UP, -1) if image.layout == "flat" else noise


def load_module(path: Path) -> "torch.nn.Module":
    """The module of a TorchScript file, or of one that torch.save wrote of a whole module. Runs code: trust the file.

    Raises ConversionFailed for anything else, such as a file of weights alone.
    """
    require_torch()
    import torch

    with quietly():
        try:
            module = torch.jit.load(path, map_location="cpu")
        except RuntimeError:
            try:
                module = torch.load(path, map_location="cpu", weights_only=False)
            except Exception as error:  # a pickle may raise anything
                raise ConversionFailed(f"{path} could not be loaded by torch: {sentence(error)}") from error
    if not isinstance(module, torch.nn.Module):
        raise ConversionFailed(
            f"{path} holds a {type(module).__name__} and no module: build the network in Python, load its weights, "
            "and pass it to batchserve.export_torch."
        )
    return module


@contextmanager
def quietly() -> Iterator[None]:
    """Suppresses output and warnings of networks and exporters; the verification shows what matters."""
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def evaluating(module: "torch.nn.Module") -> Iterator[None]:
    """The module in evaluation mode, without gradients; restored afterwards."""
    import torch

    modes = [(part, part.training) for part in module.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    module.eval()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # attention as one operator, which ONNX does not have
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for part, training in modes:
            part.training = training


# --- how the module is called ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModuleCall:
    """A module and its call arguments, by the names of the graph's inputs, in their order."""

    module: "torch.nn.Module"
    inputs: "dict[str, torch.Tensor]"
    keywords: tuple[str, ...] | None
    """The names of `forward`'s arguments, when it is called by name."""
    count: int

    def shares(self, name: str) -> bool:
        """Whether the input is one value for all records."""
        tensor = self.inputs[name]
        return tensor.ndim == 0 or len(tensor) != self.count

    def take(self, count: int) -> "dict[str, torch.Tensor]":
        """The inputs for so many records, repeating the example's."""
        import torch

        rows = torch.arange(count) % self.count
        return {name: x if self.shares(name) else x[rows.to(x.device)] for name, x in self.inputs.items()}

    def arguments(self, count: int) -> "tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]":
        tensors = tuple(self.take(count).values())
        return (tensors, {}) if self.keywords is None else ((), dict(zip(self.keywords, tensors, strict=True)))

    def resized(self, axes: Mapping[str, Mapping[int, str]], factor: float) -> "ModuleCall":
        """The same call with these axes of its inputs that many times as long."""
        inputs = dict(self.inputs)
        for name in axes.keys() & inputs.keys():
            for axis in axes[name]:
                places = np.arange(max(1, int(inputs[name].shape[axis] * factor))) % inputs[name].shape[axis]
                inputs[name] = inputs[name][(slice(None),) * axis + (places,)]
        return replace(self, inputs=inputs)

    def outputs(self, count: int) -> Arrays:
        """Outputs of the module for so many records. Raises ConversionFailed when it fails."""
        positional, named = self.arguments(count)
        try:
            found = self.module(*positional, **named)
        except Exception as error:  # modules raise any type
            raise ConversionFailed(f"The module itself does not take {count} records: {sentence(error)}") from error
        arrays = {name: tensor.detach().cpu().numpy() for name, tensor in _tensors("output", found)}
        for name, array in arrays.items():
            if array.ndim == 0 or len(array) != count:
                raise ConversionFailed(
                    f"The module's {name} has shape {list(array.shape)} for {count} records: each needs one row."
                )
        return arrays


def make_call(
    module: "torch.nn.Module", example: Any, input_names: Sequence[str] | None = None, takes_images: bool = False
) -> ModuleCall:
    """Raises ConversionFailed for an example without records, and for names that do not fit it."""
    import torch

    if isinstance(example, Mapping):
        keywords = tuple(example)
        values = list(example.values())
    else:
        keywords = None
        values = list(example) if isinstance(example, list | tuple) else [example]
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    tensors = [torch.as_tensor(value).to(device) for value in values]
    if not tensors or tensors[0].ndim == 0 or not len(tensors[0]):
        raise ConversionFailed("The example has no records: axis 0 of its first tensor is the record axis.")
    names = list(input_names or keywords or (["image"] if takes_images else _parameters(module, len(tensors))))
    if len(names) != len(tensors):
        raise ConversionFailed(f"The example has {len(tensors)} tensors, and {len(names)} names: {listed(names)}.")
    return ModuleCall(module, dict(zip(names, tensors, strict=True)), keywords, len(tensors[0]))


def _parameters(module: "torch.nn.Module", count: int) -> list[str]:
    """What `forward` calls its first arguments, where it names them."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    known = [name for name, p in inspect.signature(module.forward).parameters.items() if p.kind in kinds]
    return known[:count] if len(known) >= count else [f"input_{index}" for index in range(count)]


def _tensors(name: str, value: Any) -> "Iterator[tuple[str, torch.Tensor]]":
    """The tensors in a module's output, named by their keys or positions."""
    import torch

    match value:
        case torch.Tensor():
            yield name, value
        case None:
            pass
        case Mapping():
            for key, item in value.items():
                yield from _tensors(str(key), item)
        case tuple() | list():
            for index, item in enumerate(value):
                yield from _tensors(name if len(value) == 1 else f"{name}_{index}", item)
        case _:
            raise ConversionFailed(
                f"The module gives a {type(value).__name__}; tensors, and tuples, lists and dicts of them are exported."
            )


def _output_names(outputs: Arrays, names: Sequence[str] | None) -> list[str]:
    if names is not None and len(names) != len(outputs):
        raise ConversionFailed(f"The module has {len(outputs)} outputs, and {len(names)} names: {listed(names)}.")
    return list(names or outputs)


# --- the graph -------------------------------------------------------------------------------------------------------


def trace(
    call: ModuleCall,
    names: Sequence[str],
    dynamic: Mapping[str, Mapping[int, str]],
    opset: int = OPSET,
    *,
    softmax: bool = False,
    tolerance: float = 1e-4,
) -> onnx.ModelProto:
    """The graph of a module that is in its mode for evaluation, with all weights inside. `names` are its outputs.

    Raises ConversionFailed, also when it matches the module only for the traced number of records or sizes of `dynamic`
    axes.
    """
    unknown = dynamic.keys() - call.inputs.keys() - set(names)
    if unknown:
        raise ConversionFailed(f"There is no input {listed(sorted(unknown))}: the inputs are {listed(call.inputs)}.")
    axes = {name: dict(dynamic.get(name, {})) for name in (*call.inputs, *names)}
    for name, free in axes.items():
        if name not in call.inputs or not call.shares(name):
            free[0] = "records"
    graph = _export(call, names, axes, opset)
    if softmax:
        append_softmax(graph)
    session = _session(graph)

    def difference(other: ModuleCall, count: int) -> str | None:
        return _difference(session, graph, other, count, softmax, tolerance)

    if not difference(call, TRACED):  # otherwise it never agrees, and the report shows by how much
        _check_counts(call, difference)
        _check_sizes(call, difference, dynamic)
    return graph


def _export(
    call: ModuleCall, names: Sequence[str], axes: Mapping[str, Mapping[int, str]], opset: int
) -> onnx.ModelProto:
    import torch

    positional, named = call.arguments(TRACED)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        try:
            torch.onnx.export(
                call.module,
                positional,
                str(path),
                kwargs=named or None,
                input_names=list(call.inputs),
                output_names=list(names),
                dynamic_axes=axes,
                opset_version=opset,
                dynamo=False,
            )
        except Exception as error:  # the exporter raises any type
            raise ConversionFailed(f"torch.onnx could not export the module: {sentence(error)}") from error
        graph: onnx.ModelProto = onnx.load(path)  # with the tensors that torch wrote to separate files
    if len(graph.graph.output) != len(names):
        raise ConversionFailed(f"The module has {len(names)} outputs, the graph {len(graph.graph.output)}.")
    return tidy(graph)


def _check_counts(call: ModuleCall, difference: Callable[[ModuleCall, int], str | None]) -> None:
    """Raises ConversionFailed when the graph matches the module only for the traced number of records."""
    for count in COUNTS:
        if reason := difference(call, count):
            raise ConversionFailed(
                f"The number of records is built into the graph: traced with {TRACED}, for {count} {reason}. {_FROZEN}"
            )


def _check_sizes(
    call: ModuleCall, difference: Callable[[ModuleCall, int], str | None], dynamic: Mapping[str, Mapping[int, str]]
) -> None:
    """Raises ConversionFailed when the graph agrees with the module only for the sizes of the example. Sizes that the
    module does not take itself are not tried."""
    names = listed(dict.fromkeys(name for axes in dynamic.values() for name in axes.values()))
    for factor in (2, 0.5) if dynamic else ():
        other = call.resized(dynamic, factor)
        try:
            other.outputs(TRACED)
        except ConversionFailed:
            continue
        if reason := difference(other, TRACED):
            raise ConversionFailed(
                f"The size of {names} is built into the graph: {factor} times it, {reason}. {_FROZEN}"
            )


def _difference(
    session: Session, graph: onnx.ModelProto, call: ModuleCall, count: int, softmax: bool, tolerance: float
) -> str | None:
    """How the graph's outputs for so many records differ from the module's, in words."""
    expected = _with_softmax(call.outputs(count), softmax)
    try:
        got = _run(session, graph, call, count)
    except ScoringFailed as error:
        return f"it does not run: {(error.detail or '').rstrip('.')}"
    for name, values in _renamed(expected, graph).items():
        if got[name].shape != values.shape:
            return f"output {name!r} has shape {list(got[name].shape)} instead of {list(values.shape)}"
        if values.size and (distances(values, got[name])[1] > tolerance).mean() > 0.01:
            return f"output {name!r} has other values"
    return None


def _answers(graph: onnx.ModelProto, call: ModuleCall, count: int, softmax: bool) -> tuple[Arrays, Arrays]:
    """Outputs of the graph and the module for so many records, by the graph's names."""
    try:
        got = _run(_session(graph), graph, call, count)
    except ScoringFailed as error:
        raise ConversionFailed(f"ONNX Runtime does not run the exported graph: {error.detail}") from error
    return got, _renamed(_with_softmax(call.outputs(count), softmax), graph)


def _session(graph: onnx.ModelProto) -> Session:
    try:
        return open_session(serialize(graph))
    except ScoringFailed as error:
        raise ConversionFailed(f"ONNX Runtime does not load the exported graph: {error.detail}") from error


def _run(session: Session, graph: onnx.ModelProto, call: ModuleCall, count: int) -> Arrays:
    kept = {entry.name for entry in graph.graph.input}  # the exporter drops an input that nothing depends on
    feeds = {name: x.detach().cpu().numpy() for name, x in call.take(count).items() if name in kept}
    return session.run(feeds)


def _renamed(outputs: Arrays, graph: onnx.ModelProto) -> Arrays:
    return dict(zip((entry.name for entry in graph.graph.output), outputs.values(), strict=True))


def _with_softmax(outputs: Arrays, softmax: bool) -> Arrays:
    if not softmax:
        return outputs
    name, scores = next(iter(outputs.items()))
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return outputs | {name: powers / powers.sum(axis=1, keepdims=True)}


# --- the report ------------------------------------------------------------------------------------------------------


def _width(array: Array) -> int:
    return array.shape[-1] if array.ndim > 1 else 1


def _flat(arrays: Arrays) -> Arrays:
    return {name: array.reshape(len(array), -1) for name, array in arrays.items()}


def _named(graph: onnx.ModelProto, columns: Sequence[str]) -> tuple[Column, ...]:
    """The columns of the only input, by these names."""
    entries = list(graph.graph.input)
    shape = entries[0].type.tensor_type.shape.dim
    if len(entries) != 1 or len(shape) != 2 or shape[1].dim_value != len(columns):
        names = listed(entry.name for entry in entries)
        raise ConversionFailed(f"columns are for one input [N, {len(columns)}], and the graph has {names}.")
    kind = onnx.helper.tensor_dtype_to_np_dtype(entries[0].type.tensor_type.elem_type).name
    return tuple(Column(str(name), cast("DType", kind)) for name in columns)
