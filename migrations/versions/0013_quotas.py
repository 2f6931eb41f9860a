"""Quotas of tenants, and the retention of a job"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0013"
down_revision: str | None = "0012"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        "quotas",
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("jobs", sa.BigInteger(), nullable=True),
        sa.Column("bytes", sa.BigInteger(), nullable=True),
        sa.Column("rows_per_day", sa.BigInteger(), nullable=True),
        sa.Column("requests_per_second", sa.Float(), nullable=True),
        sa.Column("changed_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("tenant", name=op.f("pk_quotas")),
    )
    op.create_table(
        "accounts",
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("since", sa.Float(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=True),
        sa.Column("day", sa.Integer(), nullable=False),
        sa.Column("day_rows", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("tenant", name=op.f("pk_accounts")),
    )
    op.add_column("jobs", sa.Column("expires_in", sa.Float(), nullable=True))
    op.add_column("jobs", sa.Column("due_at", sa.Float(), nullable=True))
    is_due = sa.text("due_at IS NOT NULL")
    op.create_index(op.f("ix_jobs_due_at"), "jobs", ["due_at"], sqlite_where=is_due, postgresql_where=is_due)


def downgrade() -> None:
    op.drop_index(op.f("ix_jobs_due_at"), table_name="jobs")
    op.drop_column("jobs", "due_at")
    op.drop_column("jobs", "expires_in")
    op.drop_table("accounts")
    op.drop_table("quotas")
