"""The brake of delivery, what people decide about mails, failures, and lines that were tried again"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = '0003'
down_revision = '0002'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table('brake',
    sa.Column('name', sa.String(), nullable=False),
    sa.Column('state', sa.String(), nullable=False),
    sa.Column('reason', sa.String(), nullable=False),
    sa.Column('since', sa.BigInteger(), nullable=False),
    sa.PrimaryKeyConstraint('name')
    )
    op.create_table('decision',
    sa.Column('event_id', sa.String(), nullable=False),
    sa.Column('state', sa.String(), nullable=False),
    sa.Column('at', sa.BigInteger(), nullable=False),
    sa.PrimaryKeyConstraint('event_id')
    )
    op.create_table('tally',
    sa.Column('what', sa.String(), nullable=False),
    sa.Column('bucket', sa.BigInteger(), autoincrement=False, nullable=False),
    sa.Column('count', sa.Integer(), nullable=False),
    sa.PrimaryKeyConstraint('what', 'bucket')
    )
    op.create_table('failure',
    sa.Column('processor', sa.String(), nullable=False),
    sa.Column('at', sa.BigInteger(), nullable=False),
    sa.Column('times', sa.Integer(), nullable=False),
    sa.Column('reason', sa.String(), nullable=False),
    sa.PrimaryKeyConstraint('processor')
    )
    op.create_table('retried',
    sa.Column('log', sa.String(), nullable=False),
    sa.Column('partition', sa.Integer(), autoincrement=False, nullable=False),
    sa.Column('offset', sa.BigInteger(), autoincrement=False, nullable=False),
    sa.Column('state', sa.String(), nullable=False),
    sa.Column('at', sa.BigInteger(), nullable=False),
    sa.Column('to_partition', sa.Integer(), nullable=False),
    sa.Column('to_offset', sa.BigInteger(), nullable=False),
    sa.PrimaryKeyConstraint('log', 'partition', 'offset')
    )
    op.add_column('delivery', sa.Column('cleared', sa.Boolean(), server_default=sa.false(), nullable=False))
    op.create_index('delivery_changed', 'delivery', ['state', 'changed_at'], unique=False)


def downgrade() -> None:
    op.drop_index('delivery_changed', 'delivery')
    with op.batch_alter_table('delivery', schema=None) as batch_op:
        batch_op.drop_column('cleared')
    for table in ('retried', 'failure', 'tally', 'decision', 'brake'):
        op.drop_table(table)
