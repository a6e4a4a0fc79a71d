"""The database's tables: what cannot be read from the logs alone, and rows that can be rebuilt from them."""

from __future__ import annotations

from decimal import Decimal

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Index,
    Integer,
    LargeBinary,
    Numeric,
    String,
    Text,
    UniqueConstraint,
    false,
    true,
)
from sqlmodel import Field, SQLModel


def _big(*, nullable: bool = False) -> Column[int]:
    return Column(BigInteger, nullable=nullable)


def _money() -> Column[Decimal]:
    return Column(Numeric(20, 6), nullable=True)


class Checkpoint(SQLModel, table=True):
    """How far a processor has come in one partition, and its counts since the beginning."""

    __table_args__ = (UniqueConstraint("processor", "generation", "log", "partition"),)

    id: int | None = Field(default=None, primary_key=True)
    processor: str
    generation: int
    log: str
    partition: int
    offset: int = Field(default=0, sa_column=_big())
    clock: int = Field(default=0, sa_column=_big())
    as_of: int = Field(default=0, sa_column=_big())  # the greatest tick applied
    tick_offset: int = Field(default=0, sa_column=_big())  # next offset in the log `clock`
    commit: int = Field(default=0, sa_column=_big())  # raised by each commit: a second writer finds another number
    version: str = ""  # of settings and code, as recorded in the log `clock`
    changed_at: int = Field(default=-1, sa_column=_big())  # the commit number at which the version last changed
    committed_at: int = Field(default=0, sa_column=_big())  # wall time, for people
    lines: int = Field(default=0, sa_column=_big())
    processed: int = Field(default=0, sa_column=_big())
    quarantined: int = Field(default=0, sa_column=_big())
    ignored: int = Field(default=0, sa_column=_big())
    derived: int = Field(default=0, sa_column=_big())
    live: bool = Field(default=True, sa_column=Column(Boolean, nullable=False, server_default=true()))
    """Whether it is of the generation that is live; a run that holds one that no longer is cannot commit."""


class CommittedEnd(SQLModel, table=True):
    """Where our readers stop in a derived log."""

    __tablename__ = "committed_end"

    log: str = Field(primary_key=True)
    generation: int = Field(primary_key=True)
    partition: int = Field(primary_key=True)
    end: int = Field(sa_column=_big())


class LiveGeneration(SQLModel, table=True):
    """Which generation of a derived log is live; the first where there is no row."""

    __tablename__ = "live_generation"

    log: str = Field(primary_key=True)
    generation: int


class Replay(SQLModel, table=True):
    """A generation that a replay made or makes; `plan` (JSON) says of what."""

    generation: int = Field(sa_column=Column(Integer, primary_key=True, autoincrement=False))
    name: str
    state: str  # RUNNING, READY, LIVE, DISCARDED
    plan: str = Field(sa_column=Column(Text, nullable=False))
    created_at: int = Field(sa_column=_big())
    changed_at: int = Field(sa_column=_big())


class State(SQLModel, table=True):
    """A processor's state under one of its keys; `due` and `rank` find what is due without a scan."""

    __table_args__ = (Index("state_due", "checkpoint", "due", "rank"), {"sqlite_with_rowid": False})

    checkpoint: int = Field(primary_key=True)
    key: str = Field(sa_column=Column(String().with_variant(String(collation="C"), "postgresql"), primary_key=True))
    value: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    due: int | None = Field(default=None, sa_column=_big(nullable=True))
    rank: int | None = Field(default=None, sa_column=_big(nullable=True))


class FlowOwner(SQLModel, table=True):
    """The run that follows for a flow: a shift ends when it finds another run's id here."""

    __tablename__ = "flow_owner"

    flow: str = Field(primary_key=True)
    run_id: str
    since: int = Field(sa_column=_big())
    scheduled: int = Field(sa_column=_big())


class Contact(SQLModel, table=True):
    """Where to reach somebody. It is not in the log, so forgetting a person is deleting a row."""

    type: str = Field(primary_key=True)
    id: str = Field(primary_key=True)
    email: str
    unsubscribed: bool = False


class Delivery(SQLModel, table=True):
    """One EMAIL on its way: `event_id` makes it at most one."""

    __table_args__ = (Index("delivery_due", "state", "next_at"), Index("delivery_changed", "state", "changed_at"))

    event_id: str = Field(primary_key=True)
    state: str  # WAITING, CLAIMED, SENT, SUPPRESSED, FAILED, UNKNOWN
    log: str
    generation: int
    partition: int
    offset: int = Field(sa_column=_big())
    recipient_type: str
    recipient_id: str
    not_after: int = Field(sa_column=_big())
    next_at: int = Field(default=0, sa_column=_big())
    attempts: int = 0
    reason: str = ""
    changed_at: int = Field(sa_column=_big())
    cleared: bool = Field(default=False, sa_column=Column(Boolean, nullable=False, server_default=false()))
    """A person has released it: the brake does not count it again."""


class Decision(SQLModel, table=True):
    """What a person decided about a mail; whoever holds the lock of `deliver` carries it out."""

    event_id: str = Field(primary_key=True)
    state: str  # SENT, FAILED, SUPPRESSED, or WAITING: once more
    at: int = Field(sa_column=_big())


class Brake(SQLModel, table=True):
    """Whether delivery may claim mails: PAUSED by a person, STOPPED by itself, else RUNNING."""

    name: str = Field(primary_key=True)
    state: str
    reason: str
    since: int = Field(sa_column=_big())


class Tally(SQLModel, table=True):
    """How many of something there were in ten minutes, by the clock of the log; `bucket` is their beginning."""

    what: str = Field(primary_key=True)
    bucket: int = Field(sa_column=Column(BigInteger, primary_key=True, autoincrement=False))
    count: int


class Failure(SQLModel, table=True):
    """A processor's last failure, and how many there were since its last commit before them."""

    processor: str = Field(primary_key=True)
    at: int = Field(sa_column=_big())
    times: int
    reason: str


class Retried(SQLModel, table=True):
    """A quarantined line that was appended again: where it was, and where it is now (-1: not known, see `state`)."""

    log: str = Field(primary_key=True)
    partition: int = Field(sa_column=Column(Integer, primary_key=True, autoincrement=False))
    offset: int = Field(sa_column=Column(BigInteger, primary_key=True, autoincrement=False))
    state: str  # BEGUN, DONE
    at: int = Field(sa_column=_big())
    to_partition: int = -1
    to_offset: int = Field(default=-1, sa_column=_big())


class Restored(SQLModel, table=True):
    """A moment at which a backup was put back, and how far the raw logs went then (JSON, by `log/partition`)."""

    at: int = Field(sa_column=Column(BigInteger, primary_key=True, autoincrement=False))
    ends: str


class WrittenBy(SQLModel, table=True):
    """The run that wrote a derived log from an offset on, until another one did."""

    __tablename__ = "written_by"

    log: str = Field(primary_key=True)
    generation: int = Field(sa_column=Column(Integer, primary_key=True, autoincrement=False))
    partition: int = Field(sa_column=Column(Integer, primary_key=True, autoincrement=False))
    start: int = Field(sa_column=Column(BigInteger, primary_key=True, autoincrement=False))
    run: str
    flow_run_id: str  # Prefect's; empty where Prefect does not know the run
    since: int = Field(sa_column=_big())  # when it first wrote


class Settled(SQLModel, table=True):
    """What `deliver` has read of an abandonment since it was flagged: retracted or recovered."""

    abandonment: str = Field(primary_key=True)
    verb: str = Field(primary_key=True)
    event_id: str


class Customer(SQLModel, table=True):
    """A customer as the log last showed them."""

    key: str = Field(primary_key=True)
    first_at: int = Field(sa_column=_big())
    last_at: int = Field(sa_column=_big())
    set_by: str


class CatalogueItem(SQLModel, table=True):
    """An item as the log last showed it."""

    __tablename__ = "item"

    key: str = Field(primary_key=True)
    name: str | None = None
    price: Decimal | None = Field(default=None, sa_column=_money())
    set_by: str


class Order(SQLModel, table=True):
    """One ORDERED event."""

    __tablename__ = "orders"
    __table_args__ = (Index("orders_customer", "customer", "at"),)

    id: str = Field(primary_key=True)
    customer: str
    at: int = Field(sa_column=_big())
    value: Decimal | None = Field(default=None, sa_column=_money())
    set_by: str


class OrderLine(SQLModel, table=True):
    """One item of an order."""

    __tablename__ = "order_line"

    order_id: str = Field(primary_key=True)
    position: int = Field(primary_key=True)
    item: str
    name: str | None = None
    price: Decimal | None = Field(default=None, sa_column=_money())
    count: float
    set_by: str


class BasketLine(SQLModel, table=True):
    """One item of a customer's current basket."""

    __tablename__ = "basket_line"

    customer: str = Field(primary_key=True)
    item: str = Field(primary_key=True)
    name: str | None = None
    price: Decimal | None = Field(default=None, sa_column=_money())
    count: float
    set_by: str
