"""Inputs that are read where their owners keep them, and chunks of several inputs"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0010"
down_revision: str | None = "0009"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    with op.batch_alter_table("inputs") as inputs:
        inputs.alter_column("key", existing_type=sa.String(length=255), type_=sa.String(length=2048))
        inputs.add_column(sa.Column("version", sa.String(length=255), nullable=True))
    op.add_column("jobs", sa.Column("inputs_bytes", sa.BigInteger(), nullable=True))
    op.add_column("chunks", sa.Column("inputs", sa.Integer(), server_default=sa.text("1"), nullable=False))


def downgrade() -> None:
    op.drop_column("chunks", "inputs")
    op.drop_column("jobs", "inputs_bytes")
    with op.batch_alter_table("inputs") as inputs:
        inputs.drop_column("version")
        inputs.alter_column("key", existing_type=sa.String(length=2048), type_=sa.String(length=255))
