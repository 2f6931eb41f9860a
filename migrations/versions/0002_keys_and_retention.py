"""API keys, and the tenants of jobs and of idempotency keys; inputs that are removed, and holds"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0002"
down_revision: str | None = "0001"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        "keys",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("tenant", sa.String(length=64), nullable=False),
        sa.Column("scope", sa.String(length=16), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("prefix", sa.String(length=16), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("revoked_at", sa.Float(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_keys")),
        sa.UniqueConstraint("digest", name=op.f("uq_keys_digest")),
    )
    # Never in a batch, which makes the table anew: dropping the old one would empty the tables that refer to it.
    op.add_column("jobs", sa.Column("input_removed_at", sa.Float(), nullable=True))
    op.add_column("jobs", sa.Column("tenant", sa.String(length=64), server_default="default", nullable=False))
    op.add_column("models", sa.Column("artifact_sha256", sa.String(length=64), nullable=True))
    op.drop_index(op.f("ix_jobs_state_priority_queued_at"), "jobs")
    op.create_index("ix_jobs_turn", "jobs", ["state", "tenant", sa.text("priority DESC"), "queued_at"], unique=False)
    op.create_index(op.f("ix_jobs_tenant_id"), "jobs", ["tenant", "id"], unique=False)

    op.create_table(
        "holds",
        sa.Column("name", sa.String(length=32), nullable=False),
        sa.Column("until", sa.Float(), nullable=False),
        sa.Column("clock", sa.String(length=64), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_holds")),
    )

    with op.batch_alter_table("idempotency_keys", schema=None) as batch_op:
        batch_op.add_column(sa.Column("tenant", sa.String(length=64), server_default="default", nullable=False))
        batch_op.drop_constraint(batch_op.f("pk_idempotency_keys"), type_="primary")
        batch_op.create_primary_key(batch_op.f("pk_idempotency_keys"), ["tenant", "key"])


def downgrade() -> None:
    op.execute("DELETE FROM idempotency_keys")  # two tenants may have used the same one
    with op.batch_alter_table("idempotency_keys", schema=None) as batch_op:
        batch_op.drop_constraint(batch_op.f("pk_idempotency_keys"), type_="primary")
        batch_op.create_primary_key(batch_op.f("pk_idempotency_keys"), ["key"])
        batch_op.drop_column("tenant")

    op.drop_table("holds")
    op.drop_column("jobs", "input_removed_at")
    op.drop_index(op.f("ix_jobs_tenant_id"), "jobs")
    op.drop_index("ix_jobs_turn", "jobs")
    op.create_index(op.f("ix_jobs_state_priority_queued_at"), "jobs", ["state", "priority", "queued_at"], unique=False)
    op.drop_column("models", "artifact_sha256")
    op.drop_column("jobs", "tenant")

    op.drop_table("keys")
