"""Whether inputs fit a model, by their beginnings."""

from collections.abc import Sequence
from dataclasses import replace

from batchserve.domain import ModelVersion, Options
from batchserve.errors import BatchserveError, InvalidInput, InvalidOptions
from batchserve.inference.matching import match_input, with_names
from batchserve.scoring.faults import by_name
from batchserve.scoring.inputs import Input, header_of


@by_name
def check_input(task: Input, model: ModelVersion, options: Options) -> None:
    """Checks the beginning of an input against the model. Raises SchemaMismatch or InvalidInput, in the first second
    instead of an hour later."""
    match = match_input(header_of(replace(task, dialect=with_names(task.dialect, model, options))), model, options)
    match.check()
    match.require_writable()


def check_inputs(tasks: Sequence[tuple[Input, Options]], model: ModelVersion) -> list[BatchserveError | None]:
    """The problem of each of several inputs, if any. Raises InvalidOptions when the options do not suit the model."""

    def problem(task: Input, options: Options) -> BatchserveError | None:
        try:
            check_input(task, model, options)
        except InvalidOptions:
            raise
        except BatchserveError as error:
            return error
        except OSError as error:
            return InvalidInput(f"the stored input cannot be read: {error.strerror}")
        return None

    return [problem(task, options) for task, options in tasks]
