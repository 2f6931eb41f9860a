"""Alembic environment: migrates the given connection, or the database of the settings."""

from alembic import context
from sqlalchemy import Connection

from batchserve.db.connect import Database
from batchserve.db.tables import metadata
from batchserve.settings import Settings


def run(connection: Connection) -> None:
    context.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    run(given)
else:  # started by the command `alembic`, for authors of migrations
    with Database(Settings().database_url).write() as opened:
        run(opened)
