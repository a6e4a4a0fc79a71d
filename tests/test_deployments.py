"""Two ways to run, one definition: `afterlog up` and a worker of a process work pool do the same."""

from __future__ import annotations

import importlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from storage.errors import UsageError
from storage.settings import load_settings
from tests.conftest import afterlog, log_bytes
from tests.operations import PATIENCE, PREFECT, PREFECT_YAML, Api, plain_environment, prefect_server, wait_for

SAME = (
    "name", "description", "tags", "parameters", "parameter_openapi_schema", "enforce_parameter_schema", "entrypoint",
    "paused", "concurrency_limit", "concurrency_options", "infra_overrides", "job_variables",
)  # fmt: skip
SEED = (PREFECT_YAML.parent / "seed.jsonl").read_bytes()
NAMES = {
    "process/shift", "react/shift", "process/by-hand", "react/by-hand", "brake/by-hand", "quarantine-retry/by-hand",
    "replay/by-hand",
    "why/by-hand", "archive/daily",
}  # fmt: skip


def as_registered(deployment: dict[str, Any]) -> dict[str, Any]:
    """What must be equal, whichever way it was registered."""
    schedules = [(s["schedule"].get("interval") or s["schedule"]["cron"], s["active"]) for s in deployment["schedules"]]
    limit = (deployment.get("global_concurrency_limit") or {}).get("limit")
    return {key: deployment.get(key) for key in SAME} | {"schedules": schedules, "limit": limit}


def test_prefect_yaml_is_what_the_table_of_deployments_gives() -> None:
    from deployments.definitions import to_yaml

    assert PREFECT_YAML.read_text() == to_yaml(load_settings())


def test_the_period_of_shifts_is_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    from deployments.definitions import to_yaml

    assert to_yaml(load_settings(shift_every="90s")).count("- interval: 90\n") == 2


def test_a_crashed_run_of_any_deployment_is_run_again() -> None:
    from deployments.automations import _for_runs
    from deployments.definitions import DEFINITIONS

    again = next(each for each in _for_runs(load_settings()) if each.name.endswith("run again"))
    tags = again.trigger.match_related["prefect.resource.id"]
    assert {f"prefect.tag.{definition.name}" for definition in DEFINITIONS} <= set(tags)


def run_by_hand(api: Api, home: Path) -> tuple[Any, list[str]]:
    """Run the seed through `process/by-hand`: what the run is in the end, and the ids of all that was derived.

    Not the derived bytes, nor what the run is called: a runner starts a shift at once, whose ticks are of today, and which
    may leave nothing for the run by hand.
    """
    run = api.finished(api.start("process/by-hand", as_of="log-end"))
    lines = [line for log in ("reactions", "baskets", "anomalies", "quarantine") for line in lines_of(home, log)]
    return [run[key] for key in ("state_type", "parameters")], [line["event"]["id"] for line in lines]


def lines_of(home: Path, log: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log_bytes(home, log).splitlines()]


@pytest.fixture
def server_of_its_own(tmp_path: Path) -> Iterator[str]:
    with prefect_server(load_settings(home=tmp_path / "server")) as url:
        yield url


def hear_interrupts() -> None:
    """A process that ignores SIGINT, as one of a shell's in the background does, hands that on, and a worker would never end."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.long
def test_a_runner_and_a_worker_register_the_same_and_do_the_same(server_of_its_own: str, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    api = Api(server_of_its_own)
    found = []
    for way in ("runner", "worker"):
        home = tmp_path / way
        assert afterlog(home, "append", "events", stdin=SEED).returncode == 0
        env = plain_environment(home, PREFECT_API_URL=server_of_its_own, PREFECT_HOME=str(tmp_path / "prefect"))
        env["AFTERLOG_SHIFT_LONGEST"] = (
            "8s"  # a worker that is to end waits for the shift that its schedule began meanwhile
        )
        command = [sys.executable, "-m", "deployments.serve"]
        if way == "worker":
            pool = [*PREFECT, "work-pool", "create", "afterlog", "--type", "process"]
            deploy = [*PREFECT, "deploy", "--all", "--prefect-file", str(PREFECT_YAML)]
            for step in (pool, deploy):
                done = subprocess.run(step, cwd=elsewhere, env=env, capture_output=True, text=True, check=False)
                assert done.returncode == 0, done.stdout + done.stderr
            command = [*PREFECT, "worker", "start", "--pool", "afterlog", "--type", "process"]
        with (tmp_path / f"{way}.log").open("wb") as output:
            process = subprocess.Popen(
                command, cwd=elsewhere, env=env, stdout=output, stderr=subprocess.STDOUT, preexec_fn=hear_interrupts
            )
        try:
            wait_for(lambda: set(api.deployments()) == NAMES, every=0.5)
            run, derived = run_by_hand(api, home)
            registered = api.deployments()
        finally:
            process.terminate()
            process.wait(PATIENCE)
            print("\n".join((tmp_path / f"{way}.log").read_text().splitlines()[-20:]))  # for who reads of a failure
        found.append(({name: as_registered(d) for name, d in registered.items()}, run, derived))
        assert bool(registered["process/shift"]["work_pool_name"]) == (way == "worker")
    runner, worker = found
    assert runner[1:] == worker[1:]
    assert runner[1][0] == "COMPLETED"
    assert runner[2] == ["derive/events:0:1803/order-confirmed", "abandonment/events:0:3186/abandoned"]
    for name in NAMES:
        assert json.dumps(runner[0][name], sort_keys=True) == json.dumps(worker[0][name], sort_keys=True)
    assert runner[0]["process/shift"]["schedules"] == [(300.0, True)]
    assert runner[0]["react/shift"]["limit"] == 2
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("process", ()), ("react", ()), ("archive", ()), ("replay", ()), ("why", ("events:0:0",)),
        ("brake", ("pause", "wrong template")), ("quarantine", ("events:0:0",)),
    ],
)  # fmt: skip
def test_a_worker_whose_home_is_relative_is_told_so_and_makes_none(
    name: str, arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(f"flows.{name}")
    flow = getattr(module, "quarantine_retry" if name == "quarantine" else name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", "a deployment's")
    with pytest.raises(UsageError, match=r"HOME is relative.*Set AFTERLOG_HOME to an absolute path"):
        flow.fn(*arguments)
    assert list(tmp_path.iterdir()) == []
