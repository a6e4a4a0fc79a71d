"""Settings: `AFTERLOG_` environment variables over an optional `afterlog.toml`, typed and checked at start."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from storage.errors import UsageError
from storage.segment import check_log_name
from storage.settings_sources import PREFIX, Duration, Secret, convert, gather, merged

CONFIG = "AFTERLOG_CONFIG"
"""The environment variable that names another file than `afterlog.toml` in the working folder."""

Count = Annotated[int, Meta(ge=1)]
Factor = Annotated[float, Meta(ge=1, le=1e15)]
Positive = Annotated[float, Meta(gt=0, le=1e15)]
Finite = Annotated[float, Meta(ge=-1e15, le=1e15)]
"""Neither an infinity nor NaN: JSON, in which settings are recorded, has none of them."""


class Expected(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A declared mean and deviation of a measure, which then needs no samples."""

    mean: Finite
    std: Positive


class AnomalySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is measured on which fields, and what counts as unexpected."""

    measures: tuple[str, ...] = (
        "object.body.length",
        "object.body.whitespace",
        "object.body.symbol",
        "object.body.digit",
        "object.body.top_word",
        "object.body.json.length",
        "object.body.json.keys",
        "object.body.json.depth",
        "object.value",
        "object.item.price",
        "object.item.count",
        "order.total",
    )
    deviations: Positive = 2.0
    samples: Annotated[int, Meta(ge=2)] = 30
    expected: dict[str, Expected] = {}
    """By measure, or by `VERB measure` for one verb."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a person may set. Lengths of time are milliseconds inside."""

    home: Path = Path("data")
    database_url: Secret | None = None
    partitions: Annotated[int, Meta(ge=1, le=1024)] = 1
    max_line: Annotated[int, Meta(ge=1024)] = 1 << 20
    ahead: Duration = 300_000
    segment_bytes: Count = 64 << 20
    segment_daily: bool = True
    archive_url: Secret | None = None
    """Where sealed segments go: a folder, or a URL that fsspec knows, such as `s3://bucket/path`; `archive` in HOME by default."""
    live_window: Duration = 86_400_000
    """A sealed segment stays here for so long after its last line, also when the archive has it."""

    timeout: Duration = 1_800_000
    excluded_verbs: frozenset[str] = frozenset()
    not_after: Duration = 86_400_000
    reminder_gap: Duration = 86_400_000
    anomalies: AnomalySettings = AnomalySettings()
    processors: tuple[str, ...] = ()
    """Modules of processors of your own, each with a class `Processor`."""

    mail_url: Secret = Secret("file:outbox")
    mail_from: str = "Afterlog <afterlog@localhost>"
    mail_allow: tuple[str, ...] = ()
    """Only these recipients are mailed, where any are named: addresses, or `@domain`."""

    brake_factor: Factor = 5.0
    """Delivery stops itself where an hour would see more than so many times the usual mails ..."""
    brake_floor: Count = 500
    """... and more than so many."""
    brake_silence: Duration = 600_000
    """A raw log without a new line for so long is silent: its producer may be dead ..."""
    brake_surge: Factor = 2.0
    """... and so many times the usual abandonments meanwhile are no lost customers, ..."""
    brake_surge_floor: Count = 50
    """... where they are more than so many."""

    stuck_after: Duration = 60_000
    """A processor at work that commits nothing for so long, with something to do, is stuck."""
    dead_after: Duration = 180_000
    """Something to do that nobody is at for so long: its processor is dead."""

    settle: Duration = 2_000
    tick_every: Duration = 1_000
    poll: Duration = 20
    commit_bytes: Count = 64 << 20
    commit_every: Duration = 2_000
    batch_bytes: Count = 512 << 10
    spill_bytes: Count = 1 << 20
    retry_delay: Duration = 1_000
    shift_every: Duration = 300_000
    shift_longest: Duration = 900_000
    cache_keys: Count = 60_000

    crashed_after: Duration = 90_000
    """A run that gives no heartbeat for so long counts as dead. Heartbeats come every 30 s."""
    alert_lag: Duration = 300_000
    alert_silent: dict[str, Duration] = {}
    """By log, how long it is never silent: `{"events": "1h"}`."""
    alert_quarantine: Annotated[float, Meta(ge=0, le=1)] = 0.05
    alert_quarantine_lines: Count = 100
    alert_mail_age: Duration = 3_600_000
    alert_every: Duration = 60_000
    alert_again: Duration = 3_600_000

    @property
    def resolved_database_url(self) -> str:
        """The database's URL: what was set, else SQLite in HOME."""
        if self.database_url is not None:
            return self.database_url.reveal()
        return f"sqlite:///{self.home.resolve() / 'afterlog.db'}"


_FIELDS: dict[str, Any] = {field.name: field.type for field in msgspec.structs.fields(Settings)}


def load_settings(**overrides: object) -> Settings:
    """The settings of this process, from the environment and `afterlog.toml` in the working folder.

    Raises:
        UsageError: a setting is unknown or does not fit; the sentence names it, what was found and what fits.
    """
    _check_names()
    if CONFIG in os.environ and not _config().is_file():
        raise UsageError(f"{CONFIG} names no file", found=str(_config()), do="Correct it, or leave it out")
    given = merged(gather(_FIELDS, os.environ, _config()), overrides)
    settings = convert(Settings, _FIELDS, given)
    if settings.archive_url is not None and not settings.archive_url.reveal():  # else it would be the working folder
        raise UsageError(
            "setting AFTERLOG_ARCHIVE_URL: it is empty", do="Leave it out for the folder `archive` in HOME"
        )
    _check_silent(settings.alert_silent)
    _check_allow(settings.mail_allow)
    home = str(settings.home.resolve())
    if any("\ud800" <= each <= "\udfff" for each in home):  # the working folder's name
        raise UsageError("setting AFTERLOG_HOME: its name is not UTF-8", where=home, do="Choose another folder")
    if settings.database_url is None and set(home) & set("?%"):  # the database's URL would mean something else by it
        raise UsageError("setting AFTERLOG_HOME: a ? or % in its name", where=home, do="Choose another folder")
    return settings


def _check_silent(logs: Iterable[str]) -> None:
    """A log that there cannot be would keep every look for alerts from its end."""
    for log in logs:
        try:
            check_log_name(log)
        except UsageError as error:
            raise UsageError(f"setting AFTERLOG_ALERT_SILENT: {error}", do="Correct it and start again") from error


def _check_allow(recipients: Iterable[str]) -> None:
    """`example.com` is nobody: every mail would be suppressed, one by one, where a domain was meant."""
    for each in recipients:
        if not re.fullmatch(r"[^@\s<>]*@[^@\s<>]+", each):
            raise UsageError(
                "setting AFTERLOG_MAIL_ALLOW: no recipient", found=repr(each[:200]),
                expected="ann@example.com for one, @example.com for all of a domain", do="Correct it and start again",
            )  # fmt: skip


def _config() -> Path:
    return Path(os.environ.get(CONFIG, "afterlog.toml"))


def _check_names() -> None:
    """A misspelt variable would otherwise be silently without effect."""
    known = {f"{PREFIX}{name.upper()}" for name in _FIELDS} | {CONFIG}
    for variable in os.environ:
        name = variable.upper()  # as `gather` takes it
        if name.startswith(PREFIX) and not name.startswith(f"{PREFIX}TEST_") and name.split("__")[0] not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise UsageError(
                f"no such setting: {variable}",
                do=f"Did you mean {near[0]}?" if near else "Remove it from the environment",
            )
