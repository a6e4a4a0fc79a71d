"""The deployments, once: the runner registers them, and `prefect.yaml` is written from them for workers.

`python -m deployments.definitions > deployments/prefect.yaml` writes that file anew, with the period of shifts that the
settings say; a test holds the one in the repository equal to this table.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import yaml  # type: ignore[import-untyped]  # it brings no types
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.deployments.runner import RunnerDeployment
from prefect.flows import Flow
from prefect.schedules import Cron
from prefect.types.entrypoint import EntrypointType

from flows.archive import archive
from flows.brake import brake
from flows.process import process
from flows.quarantine import quarantine_retry
from flows.react import react
from flows.replay import replay
from flows.why import why
from storage.settings import Settings, load_settings

WORK_POOL = "afterlog"
SHIFT, DAILY, BY_HAND = "shift", "daily", "by-hand"
DAILY_AT = Cron("17 0 * * *", timezone="UTC")  # after midnight, when segments have rolled
# Two of a kind overlap while they hand over. More would be a pile: the newest of them goes.
AT_ONCE = ConcurrencyLimitConfig(limit=2, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW)
_SHIFTS = "Follows the logs until its successor takes over. "
_HEAD = """\
# For a process work pool and its workers, against any Prefect server; docs/operating.md tells how.
# Written by `python -m deployments.definitions` from the table there: change that, not this.
"""


@dataclass(frozen=True)
class Definition:
    """One deployment. Shifts come as often as the settings say, daily ones once a day; the others when somebody runs them."""

    flow: Flow[Any, Any]
    name: str
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def is_shift(self) -> bool:
        """Whether it runs on the schedule of shifts."""
        return self.name == SHIFT

    @property
    def full_name(self) -> str:
        """What Prefect knows it by: `process/shift`."""
        return f"{self.flow.name}/{self.name}"

    @property
    def tags(self) -> list[str]:
        """What automations and filters know it by."""
        return ["afterlog", self.name]

    @property
    def description(self) -> str:
        """What the UI shows beside it."""
        return (_SHIFTS if self.is_shift else "") + (self.flow.description or "")

    @property
    def entrypoint(self) -> str:
        """Where a worker finds the flow: a module, so that the folder does not matter."""
        return f"{self.flow.__module__}.{self.flow.fn.__name__}"


DEFINITIONS = (
    Definition(process, SHIFT, {"shift": True}),
    Definition(react, SHIFT, {"shift": True}),
    Definition(process, BY_HAND),
    Definition(react, BY_HAND),
    Definition(archive, DAILY),
    Definition(brake, BY_HAND),
    Definition(quarantine_retry, BY_HAND),
    Definition(replay, BY_HAND),
    Definition(why, BY_HAND),
)


async def build(definition: Definition, settings: Settings, *, paused: bool = False) -> RunnerDeployment:
    """A definition as the runner registers it; its schedule stands still where it is `paused`."""
    built = await definition.flow.ato_deployment(
        definition.name,
        parameters=definition.parameters,
        tags=definition.tags,
        description=definition.description,
        entrypoint_type=EntrypointType.MODULE_PATH,
        interval=timedelta(milliseconds=settings.shift_every) if definition.is_shift else None,
        schedule=DAILY_AT if definition.name == DAILY else None,
        concurrency_limit=AT_ONCE if definition.is_shift else None,
    )
    for schedule in built.schedules or []:
        schedule.active = not paused
    return built


def to_yaml(settings: Settings) -> str:
    """All definitions as a `prefect.yaml`."""
    document = {
        "name": "afterlog",
        "pull": [],  # the worker's own Python has Afterlog installed
        "deployments": [_entry(definition, settings) for definition in DEFINITIONS],
    }
    return _HEAD + str(yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=118))


def _entry(definition: Definition, settings: Settings) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": definition.name,
        "entrypoint": definition.entrypoint,
        "description": definition.description,
        "tags": definition.tags,
        "parameters": definition.parameters,
        "work_pool": {"name": WORK_POOL},
    }
    if definition.is_shift:
        seconds = settings.shift_every / 1000
        entry["schedules"] = [{"interval": int(seconds) if seconds.is_integer() else seconds}]
        entry["concurrency_limit"] = {
            "limit": AT_ONCE.limit,
            "collision_strategy": ConcurrencyLimitStrategy.CANCEL_NEW.value,
        }
    elif definition.name == DAILY:
        entry["schedules"] = [{"cron": DAILY_AT.cron, "timezone": DAILY_AT.timezone}]
    return entry


if __name__ == "__main__":
    sys.stdout.write(to_yaml(load_settings()))
