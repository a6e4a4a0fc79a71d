"""Commit numbers of 64 bits, and when a backup was put back

A commit every 20 ms uses up 32 bits in 16 months; SQLite never minded, PostgreSQL would.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = '0002'
down_revision = '0001'
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table('checkpoint', schema=None) as batch_op:
        batch_op.alter_column('commit', existing_type=sa.Integer(), type_=sa.BigInteger(), existing_nullable=False)
        batch_op.alter_column('changed_at', existing_type=sa.Integer(), type_=sa.BigInteger(), existing_nullable=False)

    op.create_table('restored',
    sa.Column('at', sa.BigInteger(), nullable=False),
    sa.Column('ends', sa.String(), nullable=False),
    sa.PrimaryKeyConstraint('at')
    )


def downgrade() -> None:
    op.drop_table('restored')
    with op.batch_alter_table('checkpoint', schema=None) as batch_op:
        batch_op.alter_column('changed_at', existing_type=sa.BigInteger(), type_=sa.Integer(), existing_nullable=False)
        batch_op.alter_column('commit', existing_type=sa.BigInteger(), type_=sa.Integer(), existing_nullable=False)
