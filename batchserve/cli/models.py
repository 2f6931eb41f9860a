"""`batchserve models ...` and `batchserve convert`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from batchserve.cli.terminal import AsJson, moment, print_facts, print_json, print_rows, say, size, table
from batchserve.client import Client
from batchserve.client.bars import Bars

if TYPE_CHECKING:
    from batchserve.inference.parity import Parity

app = typer.Typer(help="Models: registered versions of ONNX graphs.", no_args_is_help=True)

Reference = Annotated[str, typer.Argument(metavar="NAME[@VERSION]", help="The model.")]


@app.command("list")
def list_models(as_json: AsJson = False) -> None:
    """List the newest version of every model."""
    with Client() as client:
        models = client.models.list()
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
    """Show what a model takes and gives."""
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
    """Register a model; equal bytes give the version there is."""
    with Client() as client, Bars() as bars:
        model = client.models.add(file, name=name or file.stem, on_upload=bars.upload)
    if as_json:
        print_json(model.data)
    say(f"Model [bold]{escape(model.name)}@{model.version}[/] takes {len(model.columns) or 'any'} columns.")
    for note in model.data["notes"]:
        say(f"  {escape(note)}")


@app.command("rm")
def remove(reference: Annotated[str, typer.Argument(metavar="NAME@VERSION", help="The version to remove.")]) -> None:
    """Remove a version that no unfinished job uses."""
    if "@" not in reference:
        raise typer.BadParameter(f"say which version, as in {reference}@1", param_hint="NAME@VERSION")
    with Client() as client:
        client.models.remove(reference)
    say(f"Model {escape(reference)} is removed.")


def convert(
    model: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, metavar="MODEL.joblib", help="A pickle that you trust.")
    ],
    sample: Annotated[
        Path, typer.Option("--sample", exists=True, dir_okay=False, help="Records as the estimator takes them.")
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: MODEL.onnx beside it.")] = None,
    tolerance: Annotated[float, typer.Option(min=0.0, help="Relative difference that is allowed.")] = 1e-4,
    as_json: AsJson = False,
) -> None:
    """Convert a scikit-learn estimator to ONNX, and prove that both answer alike. Unpickles: never run it on a file
    that you do not trust."""
    from batchserve.errors import ParityFailed
    from batchserve.inference.convert import convert as to_onnx
    from batchserve.inference.parity import Parity

    target = output or model.with_suffix(".onnx")
    try:
        report = to_onnx(model, sample, target, tolerance=tolerance).report
    except ParityFailed as failed:
        print_parity(Parity.from_json(failed.extra["parity"]), as_json)
        say("[bold red]Error:[/] the graph does not answer like the estimator; nothing was written.")
        raise typer.Exit(1) from None
    print_parity(report, as_json)
    say(f"Wrote [bold]{escape(str(target))}[/]. Register it: batchserve models add {escape(str(target))}")


def print_parity(report: "Parity", as_json: bool) -> None:
    if as_json:
        print_json(report.to_json())
    else:
        show_parity(Console(highlight=False), report)


def show_parity(console: Console, report: "Parity") -> None:
    """How far the graph's answers are from the estimator's."""
    title = f"Parity on {report.rows:,} records: {report.label_flips:,} labels differ"
    console.print(
        table(
            ("output", "estimator's", "mean difference", "99 % below", "max", "allowed"),
            [
                (d.output, d.method, f"{d.mean_relative:.1e}", f"{d.p99_relative:.1e}", f"{d.max_relative:.1e}",
                 f"{report.tolerance:.1e}")
                for d in report.differences
            ],
            title=title,
        )
    )  # fmt: skip
    for worst in report.worst:
        console.print(f"  record {worst.row}, {worst.output}: expected {worst.expected}, got {worst.got}", markup=False)
    for note in report.notes:
        console.print(f"  {note}", markup=False)
