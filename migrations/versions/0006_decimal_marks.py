"""Decimal marks of inputs"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0006"
down_revision: str | None = "0005"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.add_column("inputs", sa.Column("decimal", sa.String(length=1), server_default=".", nullable=False))


def downgrade() -> None:
    op.drop_column("inputs", "decimal")
