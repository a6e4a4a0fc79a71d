"""Settings: `AFTERLOG_` environment variables over an optional `afterlog.toml`, typed and checked at start."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from storage.errors import UsageError

CONFIG = "AFTERLOG_CONFIG"
"""The environment variable that names another file than `afterlog.toml` in the working folder."""

_UNITS = {"ms": 1, "s": 1000, "m": 60_000, "min": 60_000, "h": 3_600_000, "d": 86_400_000}
_CENTURY = 36_525 * 86_400_000
"""More would lead to times that no log can name."""


def parse_duration(value: object) -> int:
    """Milliseconds of a length of time as a person writes it: `90`, `90s`, `30m`, `24h`, `1.5h`, `7d`, `20ms`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|min|m|h|d)?", str(value).strip())
    if isinstance(value, bool) or match is None:
        raise ValueError("expected a length of time such as 90s, 30m, 24h or 7d")
    millis = float(match[1]) * _UNITS[match[2] or "s"]
    if millis > _CENTURY:
        raise ValueError("expected a length of time of 100 years at most")
    return round(millis)


Duration = Annotated[int, BeforeValidator(parse_duration), Field(gt=0)]
"""Milliseconds inside; a person writes `30m`."""


def _named(folder: object) -> object:
    if not str(folder):
        raise ValueError("expected a folder")  # nothing would be the working folder, whatever that is
    return folder


class Expected(BaseModel):
    """A declared mean and deviation of a measure, which then needs no samples."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    mean: float
    std: float = Field(gt=0)


class AnomalySettings(BaseModel):
    """What is measured on which fields, and what counts as unexpected."""

    model_config = ConfigDict(extra="forbid", frozen=True)
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
    deviations: float = Field(default=2.0, gt=0)
    samples: int = Field(default=30, ge=2)
    expected: dict[str, Expected] = {}
    """By measure, or by `VERB measure` for one verb."""


class Settings(BaseSettings):
    """Everything that a person may set. Lengths of time are milliseconds inside."""

    model_config = SettingsConfigDict(
        env_prefix="AFTERLOG_",
        env_nested_delimiter="__",
        toml_file="afterlog.toml",
        extra="forbid",
        frozen=True,
        validate_default=False,  # a default Duration is milliseconds already
    )

    home: Annotated[Path, BeforeValidator(_named)] = Path("data")
    database_url: SecretStr | None = None
    partitions: int = Field(1, ge=1, le=1024)
    max_line: int = Field(1 << 20, ge=1024)
    ahead: Duration = 300_000
    segment_bytes: int = Field(64 << 20, ge=1)
    segment_daily: bool = True
    archive_url: SecretStr | None = None
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

    mail_url: SecretStr = SecretStr("file:outbox")
    mail_from: str = "Afterlog <afterlog@localhost>"
    mail_allow: tuple[str, ...] = ()
    """Only these recipients are mailed, where any are named: addresses, or `@domain`."""

    brake_factor: float = Field(5.0, ge=1)
    """Delivery stops itself where an hour would see more than so many times the usual mails ..."""
    brake_floor: int = Field(500, ge=1)
    """... and more than so many."""
    brake_silence: Duration = 600_000
    """A raw log without a new line for so long is silent: its producer may be dead ..."""
    brake_surge: float = Field(2.0, ge=1)
    """... and so many times the usual abandonments meanwhile are no lost customers, ..."""
    brake_surge_floor: int = Field(50, ge=1)
    """... where they are more than so many."""

    stuck_after: Duration = 60_000
    """A processor at work that commits nothing for so long, with something to do, is stuck."""
    dead_after: Duration = 180_000
    """Something to do that nobody is at for so long: its processor is dead."""

    settle: Duration = 2_000
    tick_every: Duration = 1_000
    poll: Duration = 20
    commit_bytes: int = Field(64 << 20, ge=1)
    commit_every: Duration = 2_000
    batch_bytes: int = Field(512 << 10, ge=1)
    spill_bytes: int = Field(1 << 20, ge=1)
    retry_delay: Duration = 1_000
    shift_every: Duration = 300_000
    shift_longest: Duration = 900_000
    cache_keys: int = Field(60_000, ge=1)

    crashed_after: Duration = 90_000
    """A run that gives no heartbeat for so long counts as dead. Heartbeats come every 30 s."""
    alert_lag: Duration = 300_000
    alert_silent: dict[str, Duration] = {}
    """By log, how long it is never silent: `{"events": "1h"}`."""
    alert_quarantine: float = Field(0.05, ge=0, le=1)
    alert_quarantine_lines: int = Field(100, ge=1)
    alert_mail_age: Duration = 3_600_000
    alert_every: Duration = 60_000
    alert_again: Duration = 3_600_000

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments first, then the environment, then the file."""
        toml = TomlConfigSettingsSource(settings_cls, _config())
        return init_settings, env_settings, toml

    @property
    def resolved_database_url(self) -> str:
        """The database's URL: what was set, else SQLite in HOME."""
        if self.database_url is not None:
            return self.database_url.get_secret_value()
        return f"sqlite:///{self.home.resolve() / 'afterlog.db'}"


def load_settings(**overrides: object) -> Settings:
    """The settings of this process, from the environment and `afterlog.toml` in the working folder.

    Raises:
        UsageError: a setting is unknown or does not fit; the sentence names it, what was found and what fits.
    """
    _check_names()
    if CONFIG in os.environ and not _config().is_file():
        raise UsageError(f"{CONFIG} names no file", found=str(_config()), do="Correct it, or leave it out")
    try:
        settings = Settings(**overrides)  # type: ignore[arg-type]  # pydantic checks them
    except ValidationError as error:
        first = error.errors()[0]
        name = "__".join(str(part) for part in first["loc"])
        raise UsageError(
            f"setting AFTERLOG_{name.upper()} (or `{name}` in afterlog.toml): {_plain(first['msg'])}",
            found=_shown(first["loc"][0], first["input"]),
            do="Correct it and start again",
        ) from error
    except SettingsError as error:
        raise UsageError(f"settings: {error}", do="Correct it and start again") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise UsageError(f"no TOML: {error}", where=str(_config()), do="Correct it and start again") from error
    home = str(settings.home.resolve())
    if settings.database_url is None and set(home) & set("?%"):  # the database's URL would mean something else by it
        raise UsageError("setting AFTERLOG_HOME: a ? or % in its name", where=home, do="Choose another folder")
    return settings


def _shown(name: int | str, value: object) -> str | None:
    """A setting's value as an error may quote it: no secret, and nothing of a name that is none, which may be one too."""
    field = Settings.model_fields.get(str(name))
    if field is None:
        return None
    return "a secret" if "SecretStr" in repr(field.annotation) else repr(value)[:200]


def _config() -> Path:
    return Path(os.environ.get(CONFIG, "afterlog.toml"))


def _check_names() -> None:
    """A misspelt variable would otherwise be silently without effect."""
    known = {f"AFTERLOG_{name.upper()}" for name in Settings.model_fields} | {CONFIG}
    for name in os.environ:
        if name.startswith("AFTERLOG_") and not name.startswith("AFTERLOG_TEST_") and name.split("__")[0] not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise UsageError(
                f"no such setting: {name}", do=f"Did you mean {near[0]}?" if near else "Remove it from the environment"
            )


def _plain(message: str) -> str:
    return message.removeprefix("Value error, ").replace("Extra inputs are not permitted", "no such setting")
