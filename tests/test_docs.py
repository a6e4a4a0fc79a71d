"""What README and docs show is what happens: their console blocks run, and their Python too."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from storage.settings import Settings
from tests.conftest import ROOT, afterlog

README = (ROOT / "README.md").read_text()
PROCESSORS = (ROOT / "docs" / "processors.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_console_blocks_of_the_readme_print_what_they_show(tmp_path: Path) -> None:
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    command = bin_folder / "afterlog"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m deployments.cli "$@"\n')
    command.chmod(0o755)
    env = {k: v for k, v in os.environ.items() if not k.startswith("AFTERLOG_")}
    env |= {"AFTERLOG_HOME": str(tmp_path / "home"), "PATH": f"{bin_folder}:{os.environ['PATH']}"}
    for step in re.split(r"^\$ ", "".join(blocks(README, "console")), flags=re.MULTILINE)[1:]:
        line, _, shown = step.partition("\n")
        done = subprocess.run(
            ["sh", "-c", f"{line} 2>&1"], cwd=ROOT, env=env, capture_output=True, text=True, check=True, timeout=60
        )
        assert done.stdout == shown


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
    known = {name.upper() for name in Settings.model_fields} - {"ANOMALIES"}
    assert known <= named
    assert {n for n in named if "__" not in n} <= known


def test_the_readme_names_every_command() -> None:
    shown = afterlog(ROOT / "nowhere", "--help").stdout.decode()
    for name in ("append", "read", "process", "deliver", "contacts", "status", "automations", "up", "demo"):
        assert re.search(rf"^│ {name}\b", shown, re.MULTILINE)


def test_the_processor_of_the_docs_runs_beside_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vip.py").write_text(blocks(PROCESSORS, "python")[0])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    order = b'{"subject":{"id":7,"type":"CUSTOMER"},"verb":"ORDERED","context":{"at":1650549837170}}\n'
    home = tmp_path / "home"
    settings = {"processors": '["vip"]'}
    assert afterlog(home, "append", "events", stdin=order * 3, **settings).returncode == 0
    done = afterlog(home, "process", "--as-of", "log-end", "--no-prefect", **settings)
    assert done.returncode == 0, done.stderr.decode()
    assert b"vip\t3\t3\t0\t0\t1\t261" in done.stdout
    assert b'"verb":"BECAME_VIP"' in afterlog(home, "read", "vips", **settings).stdout


def test_the_settings_of_the_docs_are_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from storage.settings import load_settings

    (tmp_path / "afterlog.toml").write_text(blocks(PROCESSORS, "toml")[0])
    tomllib.loads(blocks(PROCESSORS, "toml")[0])
    monkeypatch.chdir(tmp_path)
    assert load_settings().anomalies.expected["SUBMIT_TAX object.body.length"].mean == 10


def test_every_decision_is_in_the_list() -> None:
    folder = ROOT / "docs" / "decisions"
    listed = set(re.findall(r"\((\d{4}-[a-z-]+\.md)\)", (folder / "README.md").read_text()))
    assert listed == {path.name for path in folder.glob("0*.md")}
