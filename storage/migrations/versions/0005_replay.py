"""Generations: which one of a log is live, which checkpoint counts, and the replays that made them"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = '0005'
down_revision = '0004'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column('checkpoint', sa.Column('live', sa.Boolean(), server_default=sa.true(), nullable=False))
    op.drop_table('live_generation')  # it never held a row: nothing could be promoted
    op.create_table('live_generation',
    sa.Column('log', sa.String(), nullable=False),
    sa.Column('generation', sa.Integer(), nullable=False),
    sa.PrimaryKeyConstraint('log')
    )
    op.create_table('replay',
    sa.Column('generation', sa.Integer(), autoincrement=False, nullable=False),
    sa.Column('name', sa.String(), nullable=False),
    sa.Column('state', sa.String(), nullable=False),
    sa.Column('plan', sa.Text(), nullable=False),
    sa.Column('created_at', sa.BigInteger(), nullable=False),
    sa.Column('changed_at', sa.BigInteger(), nullable=False),
    sa.PrimaryKeyConstraint('generation')
    )


def downgrade() -> None:
    op.drop_table('replay')
    op.drop_table('live_generation')
    op.create_table('live_generation',
    sa.Column('processor', sa.String(), nullable=False),
    sa.Column('generation', sa.Integer(), nullable=False),
    sa.PrimaryKeyConstraint('processor')
    )
    with op.batch_alter_table('checkpoint', schema=None) as batch_op:
        batch_op.drop_column('live')
