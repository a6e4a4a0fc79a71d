"""Keys of state in the order of their code points

What is due at the same moment is taken in the order of the keys: Python's, in memory, and so the database's, whatever language it was
made for. SQLite knows no other.
"""

from __future__ import annotations

from alembic import op

revision = '0006'
down_revision = '0005'
branch_labels = None
depends_on = None


def upgrade() -> None:
    if op.get_bind().dialect.name == 'postgresql':
        op.execute('ALTER TABLE state ALTER COLUMN key TYPE VARCHAR COLLATE "C"')


def downgrade() -> None:
    if op.get_bind().dialect.name == 'postgresql':
        op.execute('ALTER TABLE state ALTER COLUMN key TYPE VARCHAR COLLATE "default"')
