"""Alerts: which conditions are found, told how often, and that they reach a webhook through the one block to fill in."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storage.contacts import Entry, save_contacts
from storage.door import append_events, append_lines
from storage.settings import load_settings
from storage.store import Store
from storage.times import now
from tasks.alerts import KINDS, Alert, Watch, to_tell
from tasks.topology import build_topology
from tests.conftest import ROOT, afterlog
from tests.operations import Api, plain_environment, wait_for, webhook
from tests.smtp_server import refusing_port

Stores = Callable[..., Store]
TAX = {"subject": {"id": 7}, "verb": "SUBMIT_TAX", "object": {"id": 7}}


def watch(store: Store) -> Watch:
    return Watch(store, build_topology(store.settings))


def kinds(alerts: list[Alert]) -> list[str]:
    return sorted({alert.kind for alert in alerts})


def test_nothing_is_told_of_a_store_that_is_well(store: Store) -> None:
    append_events(store, "events", [{**TAX, "context": {"at": now()}}])
    assert watch(store).holding(now()) == []


def test_lag_grows_while_every_processor_is_dead(make_store: Stores) -> None:
    store = make_store(alert_lag="1h")
    append_lines(store, "events", [b'{"subject":{"id":1},"verb":"X","context":{"at":%d}}' % (now() - 7_200_000)])
    found = watch(store).holding(now())
    assert kinds(found) == ["lag"]
    assert {a.about for a in found} >= {"derive/events/0", "abandonment/events/0"}
    assert found[0].figures["seconds"] >= 7200
    assert "the limit is 3600 s" in found[0].sentence
    assert afterlog(store.home, "process", "--no-prefect").returncode == 0
    assert watch(store).holding(now()) == []


def test_a_log_that_is_never_silent_is_told_of_when_it_is(make_store: Stores) -> None:
    store = make_store(alert_silent={"events": "1h"})
    assert "nothing has come to log events ever" in watch(store).holding(now())[0].sentence
    append_events(store, "events", [{**TAX, "context": {"at": now()}}])
    assert watch(store).holding(now()) == []
    assert kinds(watch(store).holding(now() + 3_700_000)) == ["silent"]
    assert kinds(watch(store).holding(now() - 86_400_000)) == ["silent"]  # the wall clock was a day ahead then


def test_bad_lines_are_counted_over_what_was_read_since(make_store: Stores) -> None:
    store = make_store(alert_quarantine_lines=10, alert_quarantine=0.2)
    good = b'{"subject":{"id":1},"verb":"X","context":{"at":%d}}' % now()

    def read(*lines: bytes) -> list[Alert]:
        append_lines(store, "events", list(lines))
        assert afterlog(store.home, "process", "--no-prefect").returncode == 0
        return watching.holding(now())

    watching = watch(store)
    assert read(*[b"bad"] * 5) == []  # too few to say
    found = read(*[good] * 5)
    assert kinds(found) == ["quarantine"]
    assert found[0].figures == {"bad": 5, "lines": 10}
    assert read(*[good] * 9, b"bad") == []


def test_bad_lines_of_a_log_in_which_few_come_are_counted_over_several_runs(make_store: Stores) -> None:
    """A shift sees fewer of them than are needed to say something."""
    store = make_store(alert_quarantine_lines=10, alert_quarantine=0.2)

    def run(bad: int) -> list[Alert]:
        shift, other = watch(store), watch(store)
        append_lines(store, "events", [b"bad"] * bad)
        assert afterlog(store.home, "process", "--no-prefect").returncode == 0
        return [*shift.holding(now()), *other.holding(now())]

    assert run(6) == []
    [told] = run(6)
    assert (told.kind, told.figures) == ("quarantine", {"bad": 12, "lines": 12})
    assert run(6) == []
    with store.database.write() as connection:  # an older one, put back
        connection.exec_driver_sql("UPDATE checkpoint SET lines = 1, derived = 1, quarantined = 1")
    assert watch(store).holding(now()) == []
    with store.database.write() as connection:
        connection.exec_driver_sql("UPDATE checkpoint SET lines = 12, derived = 12, quarantined = 12")
    [told] = watch(store).holding(now())
    assert told.figures == {"bad": 11, "lines": 11}


def one_mail_due(store: Store) -> None:
    save_contacts(store.database, [Entry("CLIENT", "7", "seven@example.com", False)])
    append_events(store, "events", [{**TAX, "context": {"at": now()}}])
    assert afterlog(store.home, "process", "--no-prefect").returncode == 0


def test_a_mail_that_may_have_arrived_is_told_of(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    one_mail_due(store)
    monkeypatch.setenv("AFTERLOG_TEST_KILL", "mail-claimed:1")
    assert afterlog(store.home, "deliver", "--no-prefect").returncode != 0
    monkeypatch.delenv("AFTERLOG_TEST_KILL")
    afterlog(store.home, "deliver", "--no-prefect")
    found = watch(store).holding(now())
    assert kinds(found) == ["unknown"]
    assert found[0].figures == {"mails": 1}


def test_a_mail_that_waits_too_long_is_told_of(make_store: Stores) -> None:
    store = make_store(alert_mail_age="1h")
    one_mail_due(store)
    with refusing_port() as port:
        afterlog(store.home, "deliver", "--no-prefect", mail_url=f"smtp://127.0.0.1:{port}")
    assert watch(store).holding(now()) == []
    found = [a for a in watch(store).holding(now() + 3_700_000) if a.kind == "queue"]
    assert found[0].figures["mails"] == 1
    assert 3_700 <= found[0].figures["seconds"] <= 3_800  # type: ignore[operator]  # a figure may be a word too


def test_the_age_of_a_mail_hangs_on_no_setting_of_today(make_store: Stores) -> None:
    store = make_store(alert_mail_age="1h")
    one_mail_due(store)
    with refusing_port() as port:
        afterlog(store.home, "deliver", "--no-prefect", mail_url=f"smtp://127.0.0.1:{port}")
    longer = Store(load_settings(home=store.home, alert_mail_age="1h", not_after="48h"))
    assert watch(longer).holding(now()) == []
    shorter = Store(load_settings(home=store.home, alert_mail_age="1h", not_after="2h"))
    assert "queue" in kinds(watch(shorter).holding(now() + 3_700_000))


def test_a_clock_that_was_ahead_keeps_nobody_from_being_told(make_store: Stores) -> None:
    store, hour = make_store(alert_again="1h"), 3_600_000
    one = Alert("lag", "derive", "it lags")
    assert to_tell(store, [one], 100 * hour) == [one]
    assert to_tell(store, [one], 10 * hour) == [one]
    assert to_tell(store, [one], 10 * hour - 1_000) == []  # two who look at once
    assert to_tell(store, [one], 11 * hour) == [one]
    (store.home / "alerts.json").write_text('{"lag/derive": null}')
    assert to_tell(store, [one], 11 * hour) == [one]


def test_a_condition_is_told_when_it_begins_and_then_once_an_hour(make_store: Stores) -> None:
    store, hour = make_store(alert_again="1h"), 3_600_000
    one, other = Alert("lag", "derive", "it lags"), Alert("lag", "remind", "it lags")
    assert to_tell(store, [one], 0) == [one]
    assert to_tell(store, [one, other], 60_000) == [other]
    assert to_tell(store, [one, other], hour - 1) == []
    assert to_tell(store, [], hour) == []
    assert to_tell(store, [one, other], hour) == [one]
    (store.home / "alerts.json").write_text('{"lag/der')
    assert to_tell(store, [one], hour + 1) == [one]


def make_block(api: Api, url: str) -> None:
    """Fill in the block as a person does in the UI."""
    kind = api.get("/block_types/slug/custom-webhook")
    schema = api.post("/block_schemas/filter", block_schemas={"block_type_id": {"any_": [kind["id"]]}})[0]
    data = {"name": "alerts", "url": url, "json_data": {"subject": "{{subject}}", "text": "{{body}}"}}
    api.post(
        "/block_documents/", name="afterlog-alerts", data=data, block_type_id=kind["id"], block_schema_id=schema["id"]
    )


def apply(server: str, home: Path) -> list[str]:
    """What the command does, in this process."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from deployments.automations import apply_automations

    with temporary_settings({PREFECT_API_URL: server}):
        return asyncio.run(apply_automations(load_settings(home=home)))


def apply_by_command(server: str, home: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-m", "deployments.cli", "automations", "apply"], cwd=home.parent, capture_output=True,
        text=True, check=False, env=plain_environment(home, PREFECT_API_URL=server),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()


@pytest.mark.long
def test_every_alert_reaches_the_block_and_applying_twice_leaves_one_of_each(
    home: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = Api(server)
    first = apply_by_command(server, home)
    assert len(first) == 3
    assert first[-1] == "no alerts leave Prefect: there is no notification block 'afterlog-alerts'"
    with webhook() as (url, posted):
        make_block(api, url)
        assert len(apply(server, home)) == 2 + len(KINDS)
        assert apply(server, home) == []
        automations = api.post("/automations/filter")
        try:
            names = [automation["name"] for automation in automations]
            assert len(names) == len(set(names)) == 4 + len(KINDS)
            _off_stays_off(server, home, api)
            _two_shifts_and_a_run_that_fails(home, monkeypatch)
            wait_for(lambda: _subject(posted, "a log that is silent"))
            wait_for(lambda: _subject(posted, "process failed"))
        finally:
            for automation in automations:  # other tests have this server too
                api.delete(f"/automations/{automation['id']}")
    silent = _subject(posted, "a log that is silent")
    assert len(silent) == 1  # of two shifts that looked each second
    assert silent[0]["text"].startswith("nothing has come to log events since ")
    assert "as-of lies ahead" in _subject(posted, "process failed")[0]["text"]
    assert "/runs/flow-run/" in _subject(posted, "process failed")[0]["text"]


def _two_shifts_and_a_run_that_fails(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As deployments run them, which carry the tag; here in this process."""
    from prefect import tags

    from flows.process import process
    from flows.react import react

    one_mail_due(Store(load_settings(home=home)))
    for name, value in (("EVERY", "1s"), ("SILENT", '{"events": "1ms"}')):
        monkeypatch.setenv(f"AFTERLOG_ALERT_{name}", value)
    monkeypatch.setenv("AFTERLOG_SHIFT_LONGEST", "3s")
    with tags("afterlog"):
        process(shift=True)
        react(shift=True)
        assert process(as_of=now() + 86_400_000, return_state=True).is_failed()


def _subject(posted: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    return [one for one in posted if one["subject"] == f"Afterlog: {text}"]


def _off_stays_off(server: str, home: Path, api: Api) -> None:
    lag = next(a for a in api.post("/automations/filter") if a["name"].endswith("a processor that lags"))
    api.patch(f"/automations/{lag['id']}", enabled=False)
    assert apply_by_command(server, home) == ["nothing to change"]
    assert api.get(f"/automations/{lag['id']}")["enabled"] is False


def test_without_a_server_the_command_says_so(tmp_path: Path) -> None:
    env = {**plain_environment(tmp_path / "home"), "HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "deployments.cli", "automations", "apply"], cwd=ROOT, env=env, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("afterlog: no Prefect server is set or found. Start `afterlog up`")
    assert time.monotonic() - begun < 60
