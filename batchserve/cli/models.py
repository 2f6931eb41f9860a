"""`batchserve models ...`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from batchserve.cli.terminal import AsJson, moment, print_facts, print_json, print_rows, say, size
from batchserve.client import Client, Model
from batchserve.client.bars import Bars

app = typer.Typer(help="Models: registered versions of ONNX graphs.", no_args_is_help=True)

Reference = Annotated[str, typer.Argument(metavar="NAME[@VERSION]", help="The model.")]


@app.command("list")
def list_models(
    search: Annotated[
        str | None, typer.Option("--search", "-s", metavar="TEXT", help="Only with this in the name.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the newest version of every model."""
    with Client() as client:
        models = client.models.list(q=search)
    if as_json:
        print_json([model.data for model in models])
        return
    print_rows(
        ("name", "version", "task", "columns", "digest", "registered"),
        [
            (
                model.name,
                model.version,
                model.data["task"],
                len(model.columns),
                model.digest[:12],
                moment(model.data["created_at"]),
            )
            for model in models
        ],
    )


@app.command()
def show(reference: Reference, as_json: AsJson = False) -> None:
    """Show the inputs and outputs of a model."""
    with Client() as client:
        model = client.models.get(reference)
    if as_json:
        print_json(model.data)
        return
    print_facts(
        {
            "model": f"{model.name}@{model.version}",
            "task": model.data["task"],
            "digest": model.digest,
            "size": size(model.data["bytes"]),
            "registered": moment(model.data["created_at"]),
            "rows/s": model.data["records_per_second"],
            **{f"takes {column['name']}": column["dtype"] for column in model.columns},
            **{f"takes {tensor['name']}": _array(tensor) for tensor in _arrays(model)},
            **{f"gives {name}": dtype for name, dtype in model.data["result_columns"].items()},
            "notes": " ".join(model.data["notes"]) or None,
        }
    )


@app.command()
def add(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="An .onnx file or a zip bundle.")],
    name: Annotated[str | None, typer.Option("--name", help="Default: the file's name without its suffix.")] = None,
    as_json: AsJson = False,
) -> None:
    """Register a model; equal bytes return the existing version."""
    with Client() as client, Bars() as bars:
        model = client.models.add(file, name=name or file.stem, on_upload=bars.upload)
    if as_json:
        print_json(model.data)
    columns = f"{len(model.columns)} column{'s' if len(model.columns) > 1 else ''}"
    arrays = [f"{tensor['name']} {_array(tensor)}" for tensor in _arrays(model)]
    takes = ", ".join(([columns] if model.columns else []) + arrays)
    say(f"Model [bold]{escape(model.name)}@{model.version}[/] takes {escape(takes)}.")
    for note in model.data["notes"]:
        say(f"  {escape(note)}")


@app.command("rm")
def remove(reference: Annotated[str, typer.Argument(metavar="NAME@VERSION", help="The version to remove.")]) -> None:
    """Remove a version that no unfinished job uses."""
    if "@" not in reference:
        raise typer.BadParameter(f"name a version, as in {reference}@1", param_hint="NAME@VERSION")
    with Client() as client:
        client.models.remove(reference)
    say(f"Model {escape(reference)} is removed.")


def _arrays(model: Model) -> list[dict[str, Any]]:
    """The inputs of the graph without named columns: they take arrays, or columns in file order."""
    return [tensor for tensor in model.signature["inputs"] if tensor["columns"] is None]


def _array(tensor: Mapping[str, Any]) -> str:
    return f"{tensor['dtype']} [{', '.join('N' if size is None else str(size) for size in tensor['shape'])}]"
