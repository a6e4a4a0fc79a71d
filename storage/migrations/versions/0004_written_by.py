"""Which run wrote which stretch of a derived log"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = '0004'
down_revision = '0003'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table('written_by',
    sa.Column('log', sa.String(), nullable=False),
    sa.Column('generation', sa.Integer(), autoincrement=False, nullable=False),
    sa.Column('partition', sa.Integer(), autoincrement=False, nullable=False),
    sa.Column('start', sa.BigInteger(), autoincrement=False, nullable=False),
    sa.Column('run', sa.String(), nullable=False),
    sa.Column('flow_run_id', sa.String(), nullable=False),
    sa.Column('since', sa.BigInteger(), nullable=False),
    sa.PrimaryKeyConstraint('log', 'generation', 'partition', 'start')
    )


def downgrade() -> None:
    op.drop_table('written_by')
