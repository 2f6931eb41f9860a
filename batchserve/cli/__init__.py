"""The command line. Data goes to stdout; messages, bars and errors go to stderr.

Exit codes: 0 ok, 1 error, 2 wrong usage, 3 the job failed, 4 the API key was refused, 5 timeout while waiting, 6 the
job was cancelled, 7 the job failed since no record could be scored, 130 Ctrl-C.
"""

import os
import sys
from typing import Annotated

import typer

from batchserve import __version__
from batchserve.cli import (
    audit,
    backup,
    config,
    convert,
    demo,
    doctor,
    files,
    jobs,
    keys,
    locations,
    models,
    move,
    quotas,
    schedules,
    server,
    webhooks,
)
from batchserve.cli.terminal import exit_code, print_error, print_json, wants_json, with_reason
from batchserve.errors import BatchserveError
from batchserve.secrets import take_from_files

app = typer.Typer(
    help="Asynchronous batch prediction: a file of inputs and an ONNX model give a file of predictions.",
    epilog="BATCHSERVE_URL and BATCHSERVE_API_KEY select the server and the key. Start with: batchserve demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo.demo)
app.command()(server.serve)
app.command()(server.worker)
app.command()(server.migrate)
app.command()(config.config)
app.command()(doctor.doctor)
app.command()(doctor.mend)
app.command()(backup.backup)
app.command()(backup.restore)
app.command()(move.migrate_to)
app.command()(files.upload)
app.command()(jobs.predict)
jobs.app.command()(locations.create)
app.add_typer(jobs.app, name="jobs")
app.add_typer(schedules.app, name="schedules")
app.add_typer(models.app, name="models")
app.add_typer(keys.app, name="keys")
app.add_typer(webhooks.app, name="webhooks")
app.add_typer(quotas.app, name="quotas")
app.command()(quotas.usage)
app.command()(audit.audit)
app.command()(convert.convert)
app.command()(server.version)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"batchserve {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[  # noqa: ARG001 - its callback shows it
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """What every command has before its name."""
    take_from_files(os.environ)


def main() -> None:
    """Runs the command that the arguments name, and exits with its code."""
    try:
        app()
    except BatchserveError as error:
        error = with_reason(error)
        if wants_json():
            print_json({"error": error.to_json()})
        print_error(error)
        sys.exit(exit_code(error))
    except OSError as error:
        print_error(error)
        sys.exit(1)
