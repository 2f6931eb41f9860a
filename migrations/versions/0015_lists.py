"""Indices of lists"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0015"
down_revision: str | None = "0014"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

_FINISHED = sa.text("finished_at IS NOT NULL")


def upgrade() -> None:
    op.create_index(op.f("ix_jobs_tenant_state_id_model_id"), "jobs", ["tenant", "state", "id", "model_id"])
    op.create_index(op.f("ix_jobs_model_id_tenant_id"), "jobs", ["model_id", "tenant", "id"])
    op.drop_index(op.f("ix_jobs_model_id"), "jobs")
    columns = ["tenant", "state", "finished_at", "id", "model_id"]
    op.create_index("ix_jobs_finished", "jobs", columns, sqlite_where=_FINISHED, postgresql_where=_FINISHED)
    op.create_index(op.f("ix_audit_subject_id"), "audit", ["subject", "id"])


def downgrade() -> None:
    op.drop_index(op.f("ix_audit_subject_id"), "audit")
    op.drop_index("ix_jobs_finished", "jobs")
    op.create_index(op.f("ix_jobs_model_id"), "jobs", ["model_id"])
    op.drop_index(op.f("ix_jobs_model_id_tenant_id"), "jobs")
    op.drop_index(op.f("ix_jobs_tenant_state_id_model_id"), "jobs")
