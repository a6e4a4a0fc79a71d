"""Where settings come from, which wins, and what a person may write."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.errors import UsageError
from storage.settings import Settings, load_settings
from storage.settings_sources import Secret

DAY = 86_400_000


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_nothing_set_gives_the_defaults() -> None:
    assert load_settings() == Settings()
    assert load_settings().resolved_database_url == f"sqlite:///{Path.cwd()}/data/afterlog.db"


def test_an_argument_wins_over_the_environment_and_that_over_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("afterlog.toml").write_text(
        'timeout = "1m"\nsettle = "1m"\npoll = "1m"\n[anomalies]\nsamples = 7\ndeviations = 3'
    )
    monkeypatch.setenv("AFTERLOG_TIMEOUT", "2m")
    monkeypatch.setenv("AFTERLOG_SETTLE", "2m")
    monkeypatch.setenv("AFTERLOG_ANOMALIES__SAMPLES", "8")
    found = load_settings(timeout="3m")
    assert (found.timeout, found.settle, found.poll) == (180_000, 120_000, 60_000)
    assert (found.anomalies.samples, found.anomalies.deviations) == (8, 3.0)


def test_an_archive_without_a_name_is_not_the_working_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFTERLOG_ARCHIVE_URL", "")
    with pytest.raises(UsageError, match="AFTERLOG_ARCHIVE_URL: it is empty"):
        load_settings()


def test_a_home_in_ones_own_folder_is_the_same_without_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("afterlog.toml").write_text('home = "~/data"')
    assert load_settings().home == tmp_path / "data"
    Path("afterlog.toml").write_text('home = "~no.such.person/data"')
    with pytest.raises(UsageError, match=r"AFTERLOG_HOME .*: expected a folder: "):
        load_settings()


def test_a_part_wins_over_its_whole_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFTERLOG_ANOMALIES__MEASURES", '["object.value"]')
    monkeypatch.setenv("AFTERLOG_ANOMALIES", '{"samples": 5, "measures": []}')
    monkeypatch.setenv("AFTERLOG_ALERT_SILENT__EVENTS", "1h")
    found = load_settings()
    assert (found.anomalies.samples, found.anomalies.measures) == (5, ("object.value",))
    assert found.alert_silent == {"events": 3_600_000}


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("timeout", "90", 90_000), ("timeout", "1.5h", 5_400_000), ("timeout", " 7 d ", 7 * DAY), ("poll", "20ms", 20),
        ("timeout", "30min", 1_800_000), ("partitions", "4", 4), ("brake_factor", "2.5", 2.5), ("brake_factor", "3", 3.0),
        ("segment_daily", "false", False), ("segment_daily", "off", False), ("segment_daily", "1", True),
        ("segment_daily", "Yes", True), ("excluded_verbs", '["A", "B"]', frozenset({"A", "B"})),
        ("processors", '["vip"]', ("vip",)), ("alert_silent", '{"events": "1h"}', {"events": 3_600_000}),
        ("mail_from", "[a]", "[a]"), ("home", "there", Path("there")), ("mail_url", "smtp://h", Secret("smtp://h")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("variable", ["AFTERLOG_{}", "afterlog_{}"])
def test_what_a_person_writes_in_the_environment(
    name: str, text: str, value: object, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable[0] == "A":
        name = name.upper()
    monkeypatch.setenv(variable.format(name), text)
    found = getattr(load_settings(), name.lower())
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            "partitions = 2000",
            ["AFTERLOG_PARTITIONS (or `partitions` in afterlog.toml): expected a whole number <= 1024", "2000"],
        ),
        ("partitions = 2.5", ["AFTERLOG_PARTITIONS", "expected a whole number", "2.5"]),
        ("segment_daily = 'maybe'", ["AFTERLOG_SEGMENT_DAILY", "'maybe'"]),
        ("brake_factor = nan", ["AFTERLOG_BRAKE_FACTOR", "nan"]),
        ("brake_factor = inf", ["AFTERLOG_BRAKE_FACTOR", "inf"]),
        ("[anomalies]\ndeviations = inf", ["AFTERLOG_ANOMALIES__DEVIATIONS", "inf"]),
        ('[anomalies.expected."object.value"]\nmean = nan\nstd = 1', ["AFTERLOG_ANOMALIES__EXPECTED", "nan"]),
        ('[anomalies.expected."object.value"]\nmean = -inf\nstd = 1', ["AFTERLOG_ANOMALIES__EXPECTED", "inf"]),
        ('[alert_silent]\nEvents = "1h"', ["AFTERLOG_ALERT_SILENT", "'Events'", "lower-case letters"]),
        ("alert_quarantine = 1.5", ["AFTERLOG_ALERT_QUARANTINE", "expected a number <= 1.0", "1.5"]),
        ("timeout = true", ["AFTERLOG_TIMEOUT", "expected a length of time"]),
        ("timeout = '0.1ms'", ["AFTERLOG_TIMEOUT", "greater than 0", "'0.1ms'"]),
        ("processors = 'vip'", ["AFTERLOG_PROCESSORS", "expected a list; found", "'vip'"]),
        ("processors = [1]", ["AFTERLOG_PROCESSORS", "expected a text; found"]),
        ("[alert_silent]\nevents = 'soon'", ["AFTERLOG_ALERT_SILENT__EVENTS (or `alert_silent.events`", "'soon'"]),
        ("[anomalies.expected.length]\nmean = 1\nstd = 0", ["AFTERLOG_ANOMALIES__EXPECTED (", "expected a number > 0"]),
        ("[anomalies.expected.length]\nmen = 1\nstd = 1", ["AFTERLOG_ANOMALIES__EXPECTED__MEN", "no such setting"]),
        ("[anomalies.expected.length]\nmean = 1", ["AFTERLOG_ANOMALIES__EXPECTED", "missing required field `std`"]),
        ("anomalies = 3", ["AFTERLOG_ANOMALIES", "expected a table; found"]),
        ("home = 3", ["AFTERLOG_HOME", "expected a text", "found 3"]),
        ("mail_url = 31415", ["AFTERLOG_MAIL_URL", "expected a text", "found a secret"]),
    ],
)
def test_what_does_not_fit_is_named_with_its_place_and_what_fits(text: str, parts: list[str]) -> None:
    Path("afterlog.toml").write_text(text)
    with pytest.raises(UsageError) as caught:
        load_settings()
    for part in [*parts, "Correct it and start again"]:
        assert part in str(caught.value)
    assert "31415" not in str(caught.value)


def test_a_list_in_the_environment_that_is_no_json_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFTERLOG_ANOMALIES__MEASURES", "[oops")
    with pytest.raises(UsageError, match=r"AFTERLOG_ANOMALIES__MEASURES .*: expected JSON, such as .*; found '\[oops'"):
        load_settings()


def test_a_part_of_a_secret_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFTERLOG_MAIL_URL__X", "[hunter2")
    with pytest.raises(UsageError, match=r"AFTERLOG_MAIL_URL .*: expected a text; found a secret") as caught:
        load_settings()
    assert "hunter2" not in str(caught.value)


def test_a_secret_shows_itself_to_nobody_but_who_asks_for_it() -> None:
    secret = load_settings(mail_url="smtp://ann:hunter2@h").mail_url
    assert secret.reveal() == "smtp://ann:hunter2@h"
    assert "hunter2" not in f"{secret} {secret!r} {load_settings(mail_url=secret)}"
    assert load_settings(mail_url=secret).mail_url == secret


@pytest.mark.parametrize("name", ["AFTERLOG_TIMOUT", "afterlog_timout", "Afterlog_Timout"])
def test_a_misspelt_variable_is_told_however_it_is_written(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("afterlog_timeout", "7m")
    assert load_settings().timeout == 420_000
    monkeypatch.setenv(name, "5m")
    with pytest.raises(UsageError, match=f"no such setting: {name}. Did you mean AFTERLOG_TIMEOUT?"):
        load_settings()


@pytest.mark.parametrize("name", ["HOME", "MAIL_FROM", "MAIL_URL", "PROCESSORS", "ALERT_SILENT__EVENTS"])
def test_a_variable_that_is_not_utf_8_is_refused_without_being_shown(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(f"AFTERLOG_{name}", "secret\udcff")
    with pytest.raises(UsageError, match=f"setting AFTERLOG_{name} .*: it is not UTF-8. Correct it") as raised:
        load_settings()
    assert "secret" not in str(raised.value)


def test_a_working_folder_whose_name_is_not_utf_8_is_no_place_for_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path("caf\udce9")
    folder.mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(UsageError, match="setting AFTERLOG_HOME: its name is not UTF-8"):
        load_settings()


@pytest.mark.parametrize("entry", ["example.com", "ann@", "@", "", "Ann <ann@example.com>", " @example.com", "a@b@c"])
def test_a_recipient_that_nobody_has_is_refused(entry: str) -> None:
    with pytest.raises(
        UsageError, match=r"setting AFTERLOG_MAIL_ALLOW: no recipient; found .*, expected ann@example.com"
    ):
        load_settings(mail_allow=("@example.org", entry))
    assert load_settings(mail_allow=["ann@example.com", "@example.org"]).mail_allow == (
        "ann@example.com",
        "@example.org",
    )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("timout = '45m'", r"`timout` in afterlog.toml\): no such setting. Did you mean `timeout`\?"),
        ("TIMEOUT = '45m'", r"`TIMEOUT` in afterlog.toml\): no such setting. Did you mean `timeout`\?"),
        ("colour = 'red'", r"`colour` in afterlog.toml\): no such setting. Remove it"),
    ],
)
def test_a_misspelt_name_in_the_file_is_told_with_the_right_one(text: str, sentence: str) -> None:
    Path("afterlog.toml").write_text(text)
    with pytest.raises(UsageError, match=sentence):
        load_settings()
