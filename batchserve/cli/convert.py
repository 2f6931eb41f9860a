"""`batchserve convert`: converts a trained model to an ONNX graph."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console
from rich.markup import escape

from batchserve.cli.terminal import AsJson, print_json, say, table

if TYPE_CHECKING:
    from batchserve.conversion.parity import Parity
    from batchserve.conversion.values import Unequal

_ONNX = (".onnx", ".zip")
_TORCH = (".pt", ".pth", ".torchscript")
_IMG2FEAT = "img2feat:"


def convert(
    model: Annotated[
        Path,
        typer.Argument(
            exists=True,
            metavar="MODEL",
            help="A pickle that you trust, a file of skops, LightGBM, XGBoost, CatBoost; an MLflow folder; a network.",
        ),
    ],
    sample: Annotated[
        Path | None,
        typer.Option("--sample", exists=True, help="Records as the model takes them; for img2feat a folder of images."),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: MODEL.onnx next to it.")] = None,
    image: Annotated[
        str | None,
        typer.Option("--image", help="Image preprocessing: imagenet, img2feat,  img2feat:NETWORK, JSON, @FILE."),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option("--labels", exists=True, dir_okay=False, help="Names of the classes: one per line, or JSON."),
    ] = None,
    softmax: Annotated[
        bool, typer.Option("--softmax", help="The network gives scores: turn them into probabilities.")
    ] = False,
    weights: Annotated[
        Path | None,
        typer.Option("--weights", exists=True, dir_okay=False, help="Weights of img2feat:NETWORK, when offline."),
    ] = None,
    tolerance: Annotated[float, typer.Option(min=0.0, help="Allowed relative difference.")] = 1e-4,
    unequal: Annotated[
        str, typer.Option(help="Values answered otherwise than by the original: refuse, or row-error.")
    ] = "refuse",
    converters: Annotated[
        list[str] | None,
        typer.Option("--converters", metavar="MODULE", help="A module that registers converters with skl2onnx."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Convert a model to ONNX and verify its outputs: a pickled scikit-learn estimator, one on features of img2feat, or
    a PyTorch module. Or annotate a network in ONNX with its images and classes.
    Loading a pickle or a module runs its code: never do it with a file that you do not trust."""
    from batchserve.conversion.files import import_module_here
    from batchserve.conversion.parity import Parity
    from batchserve.errors import ParityFailed

    if unequal not in ("refuse", "row-error"):
        raise typer.BadParameter(f"is refuse or row-error, got {unequal}", param_hint="--unequal")
    for module in converters or ():
        import_module_here(module)
    target, names = output or model.with_suffix(".onnx"), _labels(labels) if labels is not None else None
    try:
        report = _report(model, sample, target, image, names, softmax, weights, tolerance, unequal)
    except ParityFailed as failed:
        print_parity(Parity.from_json(failed.extra["parity"]), as_json)
        say("[bold red]Error:[/] the outputs of the graph differ from the original; nothing was written.")
        raise typer.Exit(1) from None
    if report is not None:
        print_parity(report, as_json)
    say(f"Wrote [bold]{escape(str(target))}[/]. Register it: batchserve models add {escape(str(target))}")


def _report(
    model: Path,
    sample: Path | None,
    target: Path,
    image: str | None,
    labels: list[str] | None,
    softmax: bool,
    weights: Path | None,
    tolerance: float,
    unequal: str,
) -> "Parity | None":
    """Write the graph. None: no original to compare it with."""
    from batchserve import conversion

    network = image.removeprefix(_IMG2FEAT) if image is not None and image.startswith(_IMG2FEAT) else None
    if weights is not None and network is None:
        raise typer.BadParameter("it goes with --image img2feat:NETWORK", param_hint="--weights")
    if network is not None:
        if model.suffix in _ONNX + _TORCH:
            raise typer.BadParameter(
                f"img2feat:{network} goes before a pickled classifier; for a network itself use img2feat, got {model}",
                param_hint="--image",
            )
        return conversion.convert_img2feat(
            model, network, target, weights=weights, labels=labels, sample=sample, tolerance=tolerance
        ).report
    if model.suffix in _ONNX:
        if target == model:
            raise typer.BadParameter("name the file to write", param_hint="--output")
        conversion.annotate(model, target, image=_image(image), labels=labels, softmax=softmax)
        return None
    if model.suffix in _TORCH:
        return conversion.convert_torch(
            model, target, image=_image(image), labels=labels, softmax=softmax, sample=sample, tolerance=tolerance
        ).report
    for name, given in (("--image", image), ("--labels", labels), ("--softmax", softmax or None)):
        if given is not None:
            raise typer.BadParameter(
                "it is for networks (.onnx, .pt), and for estimators with --image img2feat:NETWORK", param_hint=name
            )
    if (sample is None and not model.is_dir()) or (sample is not None and sample.is_dir()):
        raise typer.BadParameter("name a file of records as the estimator takes them", param_hint="--sample")
    return conversion.convert(model, sample, target, tolerance=tolerance, unequal=cast("Unequal", unequal)).report


def _image(text: str | None) -> "str | dict[str, Any] | None":
    """The name of a preset, or the description in a text or a file."""
    if text is None:
        return None
    path = Path(text.removeprefix("@"))
    if not text.startswith(("@", "{")) and path.suffix != ".json":
        return text
    if not text.startswith("{") and not path.is_file():
        raise typer.BadParameter(f"there is no file {str(path)!r}", param_hint="--image")
    content = text if text.startswith("{") else _read(path, "--image")
    try:
        description = json.loads(content)
    except ValueError as error:
        raise typer.BadParameter(f"is not JSON: {error}", param_hint="--image") from None
    if not isinstance(description, dict):
        raise typer.BadParameter('must be an object, such as {"size": [224, 224]}', param_hint="--image")
    return description


def _labels(path: Path) -> list[str]:
    """Labels from a file: one per line, or a JSON list."""
    text = _read(path, "--labels")
    if not text.lstrip().startswith("["):
        return text.splitlines()
    try:
        return [str(label) for label in json.loads(text)]
    except ValueError as error:
        raise typer.BadParameter(f"{path} is not JSON: {error}", param_hint="--labels") from None


def _read(path: Path, option: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{path} cannot be read as text: {error}", param_hint=option) from None


def print_parity(report: "Parity", as_json: bool) -> None:
    if as_json:
        print_json(report.to_json())
    else:
        show_parity(Console(highlight=False), report)


def show_parity(console: Console, report: "Parity") -> None:
    """Prints how far the graph's outputs differ from the original's."""
    tried = f", {report.values_tried:,} values beyond them tried" if report.values_tried else ""
    title = f"Parity on {report.rows:,} records: {report.label_flips:,} labels differ{tried}"
    console.print(
        table(
            ("output", "original's", "mean difference", "99 % below", "max", "allowed"),
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
