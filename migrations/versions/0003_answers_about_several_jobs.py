"""Idempotency keys remember an answer about several jobs; equal jobs are found however many others there are"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0003"
down_revision: str | None = "0002"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    with op.batch_alter_table("idempotency_keys", schema=None) as batch_op:
        batch_op.add_column(sa.Column("answer", sa.Text(), nullable=True))
        batch_op.alter_column("job_id", existing_type=sa.String(length=36), nullable=True)
    op.create_index(op.f("ix_jobs_tenant_request_digest_id"), "jobs", ["tenant", "request_digest", "id"], unique=False)
    op.drop_index(op.f("ix_jobs_request_digest"), "jobs")


def downgrade() -> None:
    op.create_index(op.f("ix_jobs_request_digest"), "jobs", ["request_digest"], unique=False)
    op.drop_index(op.f("ix_jobs_tenant_request_digest_id"), "jobs")
    op.execute("DELETE FROM idempotency_keys WHERE job_id IS NULL")
    with op.batch_alter_table("idempotency_keys", schema=None) as batch_op:
        batch_op.alter_column("job_id", existing_type=sa.String(length=36), nullable=False)
        batch_op.drop_column("answer")
