"""What README and docs show is what happens: their console blocks run, and their Python too."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from storage.errors import UsageError
from storage.settings import Settings, load_settings
from tasks.alerts import KINDS
from tasks.topology import build_topology
from tests.conftest import ROOT, afterlog
from tests.operations import PATIENCE

README = (ROOT / "README.md").read_text()
PROCESSORS = (ROOT / "docs" / "processors.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def check_console(text: str, folder: Path, home: Path) -> None:
    """Run the console blocks of `text` in `folder`, in one shell, and hold what each command prints against what is shown."""
    bin_folder = home.with_name("bin")
    bin_folder.mkdir()
    command = bin_folder / "afterlog"
    command.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}:$PYTHONPATH" exec {sys.executable} -P -m deployments.cli "$@"\n')
    command.chmod(0o755)
    env = {k: v for k, v in os.environ.items() if not k.startswith("AFTERLOG_") and k != "PYTHONPATH"}
    env |= {"AFTERLOG_HOME": str(home), "PATH": f"{bin_folder}:{os.environ['PATH']}"}
    steps = [s.partition("\n") for s in re.split(r"^\$ ", "".join(blocks(text, "console")), flags=re.MULTILINE)[1:]]
    assert steps
    script = "".join(f"echo '$ {number}'\n{line} 2>&1 || exit 1\n" for number, (line, _, _) in enumerate(steps))
    done = subprocess.run(
        ["sh", "-c", script], cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    assert re.split(r"^\$ \d+\n", done.stdout, flags=re.MULTILINE)[1:] == [shown for _, _, shown in steps]
    assert (done.returncode, done.stderr) == (0, "")


def test_the_console_blocks_of_the_readme_print_what_they_show(tmp_path: Path) -> None:
    check_console(README, ROOT, tmp_path / "home")


def test_the_python_block_of_the_readme_runs(tmp_path: Path) -> None:
    env = {**os.environ, "AFTERLOG_HOME": str(tmp_path / "home")}
    code = "\n".join(blocks(README, "python"))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "[(0, 0)]\n"


def test_the_readme_names_every_setting_and_no_other() -> None:
    table = README.split("## Settings")[1].split("## The house")[0]
    named = set(
        re.findall(r"\b[A-Z][A-Z_]{3,}\b", "".join(line.split("|")[1] for line in table.splitlines() if "|" in line))
    )
    known = {name.upper() for name in Settings.__struct_fields__} - {"ANOMALIES"}
    assert known <= named
    assert {n for n in named if "__" not in n} <= known


def test_the_readme_names_every_command(tmp_path: Path) -> None:
    shown = afterlog(tmp_path, "--help").stdout.decode()
    commands = set(re.findall(r"^│ ([a-z][a-z-]+)", shown, re.MULTILINE))
    assert {"append", "read", "process", "why-not", "up"} <= commands
    assert not {name for name in commands if not re.search(rf"`(afterlog )?{name}\b", README)}


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder outside the repository with the processor of the docs, and its test, as a newcomer saves them."""
    folder = tmp_path / "a folder of mine"
    folder.mkdir()
    code, test = blocks(PROCESSORS, "python")
    assert len(code.splitlines()) < 30
    (folder / "vip.py").write_text(code)
    (folder / "test_vip.py").write_text(test)
    return folder


def test_the_processor_of_the_docs_does_what_the_docs_show(own: Path, tmp_path: Path) -> None:
    check_console(PROCESSORS, own, tmp_path / "home")


def test_the_test_of_the_docs_passes_and_fails_where_the_processor_is_wrong(own: Path) -> None:
    def run() -> int:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_vip.py"]
        return subprocess.run(command, cwd=own, capture_output=True, check=False, timeout=PATIENCE).returncode

    assert run() == 0
    (own / "vip.py").write_text((own / "vip.py").read_text().replace('["orders"] == 3', '["orders"] == 2'))
    assert run() == 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (('"vip", "events"', '"derive", "events"'), "a second processor called 'derive'"),
        (('"vip", "events"', '"deliver", "events"'), "a second processor called 'deliver'"),
        (('"vip", "events"', '"promotion", "events"'), "the name 'promotion' is taken"),
        (('"vip", "events"', '"archive", "events"'), "the name 'archive' is taken"),
        (('"vip", "events"', '"alerts", "events"'), "the name 'alerts' is taken"),
        (('"vip", "events"', '"replay-12", "events"'), "the name 'replay-12' is taken"),
        (
            ('"vip", "events"', '"../vip", "events"'),
            "no name for a processor; found '../vip', expected lower-case letters",
        ),
        (('"vip", "events"', '"", "events"'), "no name for a processor; found ''"),
        (('"vips"', '"baskets"'), "the log baskets is written already"),
        (('"vips"', '"events"'), "the log events is written already"),
        (('"vips"', '"clock"'), "the log clock is written already"),
        (('"vips"', '"../vips"'), "no name for a log"),
    ],
)
def test_a_processor_that_takes_what_is_another_s_is_refused(
    own: Path, monkeypatch: pytest.MonkeyPatch, change: tuple[str, str], sentence: str
) -> None:
    (own / "vip.py").write_text((own / "vip.py").read_text().replace(*change))
    monkeypatch.syspath_prepend(own)
    sys.modules.pop("vip", None)
    with pytest.raises(UsageError, match=sentence):
        build_topology(load_settings(processors=("vip",)))
    sys.modules.pop("vip", None)


def test_every_alert_is_in_the_table_of_alerts() -> None:
    table = (ROOT / "docs" / "operating.md").read_text().partition("| alert |")[2].partition("\n\n")[0]
    told = {line.split("|")[1].strip() for line in table.splitlines()[2:]}
    assert set(KINDS.values()) <= told
    named = set(re.findall(r"\b[A-Z][A-Z_]{3,}\b", table)) - {"UNKNOWN"}
    assert named <= {name.upper() for name in Settings.__struct_fields__}


def test_the_settings_of_the_docs_are_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "afterlog.toml").write_text(blocks(PROCESSORS, "toml")[0])
    tomllib.loads(blocks(PROCESSORS, "toml")[0])
    monkeypatch.chdir(tmp_path)
    assert load_settings().anomalies.expected["SUBMIT_TAX object.body.length"].mean == 10


def test_going_live_as_the_docs_say_mails_nobody_about_a_basket_of_weeks_ago(tmp_path: Path) -> None:
    """The one tick at the end brings the reminder forth today: that it is held and dropped is all that keeps it back."""
    page = (ROOT / "docs" / "operating.md").read_text()
    steps = re.findall(r"^ +\$ afterlog (.*)$", page.partition("## Going live")[2].partition("\n## ")[0], re.MULTILINE)
    assert len(steps) == 6
    left, now = 20 * 86_400_000, int(time.time() * 1000)
    history = [basket_event(1, now - left), basket_event(2, now - 60_000)]
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(event) + "\n" for event in history))
    (tmp_path / "contacts.csv").write_text("type,id,email\nCUSTOMER,1,ann@example.com\nCUSTOMER,2,bob@example.com\n")
    home = tmp_path / "home"
    afterlog(home, "contacts", "import", str(tmp_path / "contacts.csv"))
    for step in steps:
        done = afterlog(home, *(str(tmp_path / word) if word == "history.jsonl" else word for word in step.split()))
        assert done.returncode == 0, done.stderr
    mails = json.loads(afterlog(home, "deliveries", "list", "--json").stdout)
    assert [(m["recipient_id"], m["state"], m["reason"]) for m in mails] == [("1", "SUPPRESSED", "dropped by a person")]
    afterlog(home, "deliver", "--no-prefect")
    assert not list(home.glob("outbox/*"))


def test_a_mail_server_is_tried_as_the_docs_say(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "operating.md").read_text().partition("3. **Try the mail server**")[2]
    lines = re.findall(r"^ {7}(\S.*)$", page.partition("\n4. ")[0], re.MULTILINE)
    given = {"HOME=/tmp/try": f"HOME={tmp_path}", "smtps://user:password@mail.example.com:465": "file:outbox"}
    script = "\n".join(lines)
    for place, there in given.items():
        assert place in script
        script = script.replace(place, there)
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-ec", script], env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\bSENT\b.*CUSTOMER 1\b", done.stdout.splitlines()[-1]), done.stdout
    [mail] = (tmp_path / "outbox").iterdir()
    assert "To: you@example.com" in mail.read_text()


def basket_event(customer: int, at: int) -> dict[str, object]:
    return {
        "subject": {"id": customer, "type": "CUSTOMER"},
        "verb": {"type": "ADDED_ITEM_TO_BASKET"},
        "object": {"type": "ITEM", "item": {"id": 3, "name": "Lemon", "price": 5, "count": 2}},
        "context": {"at": at},
        "event": {"inserted_at": at},
    }


@pytest.mark.parametrize(
    "page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/decisions/*.md")])
)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        there = page.parent / name if name else page
        assert there.exists(), target
        titles = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_decision_is_in_the_list() -> None:
    folder = ROOT / "docs" / "decisions"
    listed = set(re.findall(r"\((\d{4}-[a-z-]+\.md)\)", (folder / "README.md").read_text()))
    assert listed == {path.name for path in folder.glob("0*.md")}
