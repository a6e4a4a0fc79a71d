"""A password is in the environment or the settings file, and nowhere else: no output, no file. Of `up` see test_unattended."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from storage.contacts import Entry, save_contacts
from storage.times import now
from tests.conftest import ROOT, afterlog
from tests.helpers import open_store
from tests.smtp_server import SmtpServer

SECRET = "hunter2marked"
WRONG = "hunter3marked"
MARK = b"marked"


def mail_url(server: SmtpServer, password: str = SECRET) -> str:
    return server.url.replace("://", f"://ann:{password}@")


def submission(client: int, ago: int = 0) -> bytes:
    event = {"subject": {"id": "UK"}, "verb": "SUBMIT_TAX", "object": {"id": client}, "context": {"at": now() - ago}}
    return json.dumps(event).encode() + b"\n"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A HOME that knows the addresses of a few clients."""
    home = tmp_path / "home"
    store = open_store(home)
    save_contacts(store.database, [Entry("CLIENT", str(id), f"c{id}@example.com", False) for id in range(5)])
    store.database.dispose()
    return home


def marked_files(folder: Path) -> list[str]:
    """The files in which a password stands."""
    return [str(path) for path in folder.rglob("*") if path.is_file() and MARK in path.read_bytes()]


@pytest.mark.parametrize("fate", ["sent", "refused login", "unknown certificate"])
def test_no_command_shows_or_keeps_the_mail_password_whatever_becomes_of_a_mail(home: Path, fate: str) -> None:
    with SmtpServer(tls="implicit", login=("ann", SECRET)) as server:
        url = mail_url(server, WRONG if fate == "refused login" else SECRET)
        if fate == "unknown certificate":
            url = url.partition("?")[0]
        outputs = []
        for command in (
            ("append", "events"),
            ("process", "--as-of", "log-end", "--no-prefect"),
            ("deliver", "--no-prefect"),
            ("status", "--json"),
            ("read", "deliveries"),
        ):
            done = afterlog(home, *command, stdin=submission(1), mail_url=url)
            assert done.returncode == 0, done.stderr.decode()
            outputs.append(done.stdout + done.stderr)
        assert len(server.inbox) == (1 if fate == "sent" else 0)
    expected = {
        "sent": b"SENT\t1",
        "refused login": b"login refused with 535; check user and password",
        "unknown certificate": b"certificate not accepted (self-signed certificate); name a private CA with ?cafile=PATH",
    }
    assert expected[fate] in outputs[2]
    assert [output for output in outputs if MARK in output] == []
    assert marked_files(home) == []


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        (
            f"postgresql+none://ann:{SECRET}@127.0.0.1/db",
            "AFTERLOG_DATABASE_URL: no URL of a database that Afterlog knows: it is of another kind",
        ),
        (
            f"ann:{SECRET}@127.0.0.1",
            "AFTERLOG_DATABASE_URL: no URL of a database that Afterlog knows: it cannot be read",
        ),
        (
            f"mysql://ann:{SECRET}@127.0.0.1/db",
            "AFTERLOG_DATABASE_URL: no URL of a database that Afterlog knows: it is of another kind",
        ),
        (
            f"postgresql://ann:{SECRET}@h:{SECRET}/db",
            "AFTERLOG_DATABASE_URL: no URL of a database that Afterlog knows: it cannot be read",
        ),
        (
            f"postgresql://ann:a@{SECRET}/b@h/db",
            "AFTERLOG_DATABASE_URL: no URL of a database that Afterlog knows: an @ in a password is written %40, a / %2F",
        ),
        (f"sqlite:////nowhere/at/all.db?password={SECRET}", "sqlite:////nowhere/at/all.db: the database refused"),
    ],
)
def test_a_database_url_that_does_not_work_is_told_without_its_password(
    tmp_path: Path, url: str, sentence: str
) -> None:
    done = afterlog(tmp_path / "home", "status", database_url=url)
    assert done.returncode in (1, 2)
    assert sentence in done.stderr.decode()
    assert b"Traceback" not in done.stderr
    assert MARK not in done.stdout + done.stderr
    assert marked_files(tmp_path) == []


@pytest.mark.parametrize(
    "toml",
    [
        f'mail_urls = "smtp://ann:{SECRET}@h"',
        f'[mail_url]\npassword = "{SECRET}"',
        f'[database]\nurl = "postgresql://ann:{SECRET}@h"',
        f'mail_url = "smtp://ann:{SECRET}@h',
        f'database_url = ["postgresql://ann:{SECRET}@h"]',
    ],
)
def test_a_wrong_settings_file_is_told_without_what_it_says(tmp_path: Path, toml: str) -> None:
    (tmp_path / "afterlog.toml").write_text(toml)
    done = afterlog(tmp_path / "home", "status", config=str(tmp_path / "afterlog.toml"))
    assert done.returncode == 2
    assert re.search(rb"Correct it|no such setting", done.stderr)
    assert MARK not in done.stdout + done.stderr


PROFILES = """
active = "ours"
[profiles.ours]
PREFECT_API_URL = "http://127.0.0.1:9/api"
PREFECT_API_KEY = "pnu_key"
PREFECT_API_AUTH_STRING = "ann:secret"
"""
ASKED = """
from deployments.server import use_prefect
from storage.settings import load_settings
use_prefect(load_settings())
from prefect.settings import get_current_settings
api = get_current_settings().api
print(api.url, *(secret and secret.get_secret_value() for secret in (api.key, api.auth_string)))
"""


@pytest.mark.parametrize(
    ("own", "used"),
    [
        ({}, "http://127.0.0.1:9/api pnu_key ann:secret"),
        ({"PREFECT_API_KEY": "another"}, "http://127.0.0.1:9/api another ann:secret"),
        ({"PREFECT_SERVER_API_AUTH_STRING": "ours:own"}, "http://127.0.0.1:9/api pnu_key ann:secret"),
        ({"PREFECT_API_URL": "http://127.0.0.1:7/api"}, "http://127.0.0.1:7/api None None"),
    ],
)
def test_key_and_password_of_a_person_s_profile_go_with_its_server_and_with_no_other(
    tmp_path: Path, own: dict[str, str], used: str
) -> None:
    (tmp_path / ".prefect").mkdir()
    (tmp_path / ".prefect" / "profiles.toml").write_text(PROFILES)
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "AFTERLOG_"))}
    env |= {"HOME": str(tmp_path), "AFTERLOG_HOME": str(tmp_path / "home"), **own}
    done = subprocess.run([sys.executable, "-c", ASKED], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == used, done.stderr
