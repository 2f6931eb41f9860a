"""Models with damaged bytes, or with valid bytes and wrong declarations."""

from collections.abc import Callable
from random import Random

import onnx

from fuzz.case import Case, Step
from fuzz.models import registered
from fuzz.mutate import mutate
from fuzz.seeds import archive

_ASK = {
    "iris": b"[[5.1, 3.5, 1.4, 0.2]]",
    "people": b'[{"age": 31, "city": "Bern", "visits": 2}]',
    "arrays": b'[{"x": [[1, 2, 3], [4, 5, 6]], "threshold": 1}]',
    "pictures": b'[{"image": "R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"}]',
}
SIZES = (-1, 0, 1, 3, 2**20, 2**31 - 1, 2**31, 2**62, -(2**63))
NAMES = ("", "x", "label", "é", "a b", "\u202e", "n" * 3000, "../x", "a\0b")


def damaged(random: Random) -> Case:
    """A model is registered under a new name, called and removed."""
    source = random.choice(sorted(_ASK))
    whole = registered()[source]
    way = random.choice(("bytes", "graph", "graph", "graph", "bundle"))
    if way == "graph":
        content, note = _changed(random, whole)
    elif way == "bytes":
        content, note = mutate(random, whole, registered()["arrays"]), "bytes"
    else:
        content, note = _bundle(random, whole), "bundle"
    name = f"fuzz-{random.randrange(2**32)}"
    json = (("content-type", "application/json"),)
    steps = (
        Step("PUT", f"/v1/models/{name}", (), content, "admin"),
        Step("GET", f"/v1/models/{name}", (), b"", "blue"),
        Step("POST", f"/v1/models/{name}/predict", json, _ASK[source], "blue"),
        Step("POST", f"/v1/models/{name}/validate", json, _ASK[source], "red"),
        Step("GET", "/v1/models", (), b"", "blue", must=(200,)),
        Step("DELETE", f"/v1/models/{name}/versions/1", (), b"", "admin"),
    )
    return Case("models", steps, note=note)


def _bundle(random: Random, whole: bytes) -> bytes:
    name = random.choice(("model.onnx", "a/model.onnx", "../model.onnx", "/model.onnx", "x.txt", "é.onnx"))
    members = {name: whole, random.choice(("data.bin", "second.onnx", "a/b", "batchserve.json")): b"{}" * 10}
    packed = archive(members)
    return mutate(random, packed, whole) if random.random() < 0.5 else packed


def _changed(random: Random, whole: bytes) -> tuple[bytes, str]:
    model = onnx.load_from_string(whole)
    notes = []
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        change = random.choice(CHANGES)
        try:
            change(random, model)
        except IndexError:  # an earlier change has left nothing to choose from
            continue
        notes.append(change.__name__.strip("_"))
    content: bytes = model.SerializeToString()
    return content, "+".join(sorted(set(notes)))


def _element_type(random: Random, model: onnx.ModelProto) -> None:
    value = random.choice([*model.graph.input, *model.graph.output])
    value.type.tensor_type.elem_type = random.choice(
        (0, 1, 2, 7, 8, 9, 10, 11, 14, 16, 17, 20, 23, 24, 25, 99, 2**31 - 1)
    )


def _dimensions(random: Random, model: onnx.ModelProto) -> None:
    shape = random.choice([*model.graph.input, *model.graph.output]).type.tensor_type.shape
    way = random.random()
    if way < 0.2:
        shape.dim.add().dim_value = random.choice(SIZES)
    elif way < 0.3:
        del shape.dim[:]
    elif way < 0.4:
        for _ in range(300):
            shape.dim.add().dim_param = random.choice(NAMES)
    elif shape.dim:
        random.choice(shape.dim).dim_value = random.choice(SIZES)


def _kind_of_value(random: Random, model: onnx.ModelProto) -> None:
    value = random.choice([*model.graph.input, *model.graph.output])
    kind = random.choice(("sequence_type", "map_type", "optional_type", "sparse_tensor_type", ""))
    value.ClearField("type")
    if kind:
        getattr(value.type, kind).SetInParent()


def _name(random: Random, model: onnx.ModelProto) -> None:
    node = random.choice(model.graph.node)
    if random.random() < 0.3:
        node.name = random.choice(NAMES)
    else:
        random.choice([*model.graph.input, *model.graph.output]).name = random.choice(NAMES)
    if random.random() < 0.3 and node.output:
        node.output[0] = random.choice(NAMES)


def _input_name_everywhere(random: Random, model: onnx.ModelProto) -> None:
    old, new = model.graph.input[0].name, random.choice(NAMES)
    model.graph.input[0].name = new
    for node in model.graph.node:
        for at, name in enumerate(node.input):
            if name == old:
                node.input[at] = new


def _twice(random: Random, model: onnx.ModelProto) -> None:
    values = random.choice((model.graph.input, model.graph.output, model.graph.node))
    values.append(random.choice(values))  # type: ignore[arg-type]


def _removed(random: Random, model: onnx.ModelProto) -> None:
    values = random.choice((model.graph.input, model.graph.output, model.graph.node, model.graph.initializer))
    if len(values):
        del values[random.randrange(len(values))]


def _operator(random: Random, model: onnx.ModelProto) -> None:
    node = random.choice(model.graph.node)
    if random.random() < 0.5:
        node.op_type = random.choice(("", "Nope", "If", "Loop", "Identity", "RandomNormal", "Upsample", "Scan", "é"))
    else:
        node.domain = random.choice(("ai.onnx.ml", "com.microsoft", "evil", "\u202e", "ai.onnx.preview.training"))


def _attribute(random: Random, model: onnx.ModelProto) -> None:
    nodes = [node for node in model.graph.node if node.attribute]
    if not nodes:
        return
    node = random.choice(nodes)
    attribute = random.choice(node.attribute)
    way = random.random()
    if way < 0.3:
        node.attribute.remove(attribute)
    elif way < 0.5:
        attribute.type = random.choice(onnx.AttributeProto.AttributeType.values())  # type: ignore[assignment]
    elif way < 0.7:
        attribute.i = random.choice(SIZES)
        attribute.f = random.choice((float("nan"), float("inf"), 1e38, -1.0))
    else:
        attribute.ints.append(random.choice(SIZES))
        attribute.floats.append(float("nan"))
        attribute.strings.append(b"\xff\xfe")


def _version(random: Random, model: onnx.ModelProto) -> None:
    number = random.choice((0, 1, 7, 99, 2**31, 2**62, -1))
    if random.random() < 0.5 or not model.opset_import:
        model.ir_version = number
    else:
        random.choice(model.opset_import).version = number


def _property(random: Random, model: onnx.ModelProto) -> None:
    key = random.choice(("batchserve.image", "batchserve.labels", "batchserve.columns", "batchserve.task",
                         "batchserve.mode", "batchserve.nullable", "batchserve.parity", "x", ""))  # fmt: skip
    value = random.choice(("", "{}", "[]", "null", "NaN", '{"size": [-1, 1e9]}', "[" * 3000, '["a", "a"]', '[1, null]',
                           '{"mean": [NaN]}', '{"scale": 1e400}', '{"a": "\\ud800"}', "x" * 70000, "\u202e", '"x"',
                           "1e400",
                           '{"resize": "stretch", "size": [65537, 4]}', '["\\ud800"]'))  # fmt: skip
    model.metadata_props.add(key=key, value=value)


def _constant(random: Random, model: onnx.ModelProto) -> None:
    tensor = random.choice(model.graph.initializer) if model.graph.initializer else model.graph.initializer.add()
    way = random.random()
    if way < 0.3:
        tensor.raw_data = tensor.raw_data[: len(tensor.raw_data) // 2]
    elif way < 0.6:
        tensor.dims.append(random.choice(SIZES))
    elif way < 0.8:
        tensor.data_type = random.choice((0, 1, 8, 9, 16, 23, 99))
    else:
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=random.choice(("/etc/passwd", "../x", "data.bin", "")))


CHANGES: tuple[Callable[[Random, onnx.ModelProto], None], ...] = (
    _element_type, _element_type, _dimensions, _dimensions, _kind_of_value, _name, _input_name_everywhere, _twice,
    _removed, _operator, _attribute, _version, _property, _property, _constant,
)  # fmt: skip
