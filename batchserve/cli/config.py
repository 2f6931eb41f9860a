"""`batchserve config`: the settings in force."""

from batchserve.cli.server import Database, Storage, settings_of
from batchserve.cli.terminal import AsJson, print_json, print_rows


def config(storage: Storage = None, database: Database = None, as_json: AsJson = False) -> None:
    """Print the settings in force and where each is from, without passwords."""
    found = settings_of(storage, database).in_force()
    if as_json:
        print_json([{"variable": one.variable, "value": one.value, "source": one.source} for one in found])
    else:
        print_rows(("variable", "value", "source"), [(one.variable, one.shown, one.source) for one in found])
