"""What the server does by itself: dead runs are marked crashed and started again, and alerts reach people.

Applied as code, by name and as often as one likes: what is there already and is the same stays untouched. An automation that
a person has switched off in the UI stays off.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from uuid import UUID

from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ActionTypes, ChangeFlowRunState, SendNotification
from prefect.events.schemas.automations import Automation, AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification

from deployments.grace import NOT_HEARD_OF
from storage.errors import UsageError
from storage.settings import Settings
from tasks.alerts import BLOCK, KINDS

PREFIX = "Afterlog: "
TRIES = 3
_RUNS = "prefect.flow-run."
_PAGE = 200


async def apply_automations(settings: Settings) -> list[str]:
    """Make the automations on the server what they should be; gives a line for each that was made, changed or left out.

    Raises:
        UsageError: the block cannot notify.
    """
    async with get_client() as client:
        await client.raise_for_api_version_mismatch()  # where no Prefect answers, it says so
        block = await _find_block(client)
        wanted = [*_for_runs(settings), *(_for_alerts(settings, block) if block else ())]
        found: dict[str, list[Automation]] = {}
        for automation in await client.read_automations(limit=_PAGE):
            found.setdefault(automation.name, []).append(automation)
        lines = []
        for automation in wanted:
            lines += await _apply(client, automation, found.get(automation.name, []))
    if block is None:
        lines.append(f"no alerts leave Prefect: there is no notification block {BLOCK!r}")
    return lines


async def _apply(client: PrefectClient, wanted: AutomationCore, found: list[Automation]) -> list[str]:
    for double in found[1:]:
        await client.delete_automation(double.id)
    if not found:
        await client.create_automation(wanted)
        return [f"automation made: {wanted.name}"]
    wanted.enabled = found[0].enabled
    if AutomationCore.model_validate(found[0].model_dump()) == wanted:
        return []
    await client.update_automation(found[0].id, AutomationCore.model_validate(wanted.model_dump()))
    return [f"automation changed: {wanted.name}"]


async def _find_block(client: PrefectClient) -> UUID | None:
    """The block that alerts go to, if somebody has made it."""
    offset = 0
    while page := await client.read_block_documents(offset=offset, limit=_PAGE, include_secrets=False):
        for document in page:
            if document.name == BLOCK:
                capabilities = document.block_schema.capabilities if document.block_schema else []
                if "notify" not in capabilities:
                    kind = document.block_type.name if document.block_type else "another kind"
                    raise UsageError(
                        f"Prefect's block {BLOCK!r} cannot notify", found=kind, expected="a notification block",
                        do="Delete it, and make one of type Slack Webhook, Custom Webhook, Email or the like",
                    )  # fmt: skip
                return document.id
        offset += len(page)
    return None


def _for_runs(settings: Settings) -> Iterator[AutomationCore]:
    """Dead runs: marked, and started again."""
    yield _automation(
        NOT_HEARD_OF.removeprefix(PREFIX),
        f"Marks a run Crashed when nothing was heard of it for {settings.crashed_after // 1000} s: its process was killed.",
        EventTrigger(
            after={f"{_RUNS}heartbeat"},
            expect={f"{_RUNS}*"},  # whatever the state is called
            match=ResourceSpecification({"prefect.resource.id": f"{_RUNS}*"}),
            match_related=_tagged("afterlog"),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(milliseconds=settings.crashed_after),
        ),
        ChangeFlowRunState(
            name="Crashed",
            state=StateType.CRASHED,
            force=False,
            message="Nothing was heard of it: its process died, or its machine.",
        ),
    )
    yield _automation(
        "a crashed run is run again",
        f"At most {TRIES} times; a run goes on at its checkpoints, and a shift that is late gives way to its successor.",
        _on_runs(
            {f"{_RUNS}Crashed"},
            _tagged("shift", "by-hand", "daily"),
            **{"prefect.run-count": [str(n) for n in range(TRIES)]},
        ),
        ChangeFlowRunState(
            name="AwaitingRetry",
            state=StateType.SCHEDULED,
            force=False,
            message="Crashed, and is run again by an automation",
        ),
    )


def _for_alerts(settings: Settings, block: UUID) -> Iterator[AutomationCore]:
    """What people are told."""

    def tell(subject: str, body: str) -> SendNotification:
        return SendNotification(block_document_id=block, subject=f"Afterlog: {subject}", body=body)

    yield _automation(
        "tell of a run that failed or crashed",
        f"To the block {BLOCK}.",
        _on_runs({f"{_RUNS}{state}" for state in ("Failed", "TimedOut", "Crashed")}, _tagged("afterlog")),
        tell(
            "{{ flow.name }} {{ flow_run.state.name | lower }}",
            "Run {{ flow_run.name }} of {{ flow.name }}: {{ flow_run.state.message }}\n{{ flow_run | ui_url }}",
        ),
    )
    quiet = 3 * settings.shift_every
    yield _automation(
        "tell when no run starts",
        f"To the block {BLOCK}, when no run has started for {quiet // 1000} s: the runner or the worker is dead.",
        EventTrigger(
            expect={f"{_RUNS}Running"},
            match=ResourceSpecification({"prefect.resource.id": f"{_RUNS}*"}),
            match_related=_tagged("shift"),
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(milliseconds=quiet),
        ),
        tell(
            "no run starts", f"No shift has started for {quiet // 60_000} minutes: is the runner, or the worker, alive?"
        ),
    )
    for kind, title in KINDS.items():
        yield _automation(
            f"tell of {title}",
            f"To the block {BLOCK}.",
            EventTrigger(
                expect={f"afterlog.{kind}"},
                match=ResourceSpecification({"prefect.resource.id": "afterlog.*"}),
                posture=Posture.Reactive,
                threshold=1,
            ),
            tell(title, "{{ event.payload.sentence }}"),
        )


def _automation(title: str, description: str, trigger: EventTrigger, action: ActionTypes) -> AutomationCore:
    return AutomationCore(
        name=PREFIX + title, description=description, trigger=trigger, actions=[action], tags=["afterlog"]
    )


def _on_runs(events: set[str], related: ResourceSpecification, **labels: list[str]) -> EventTrigger:
    return EventTrigger(
        expect=events,
        match=ResourceSpecification({"prefect.resource.id": f"{_RUNS}*", **labels}),
        match_related=related,
        for_each={"prefect.resource.id"},
        posture=Posture.Reactive,
        threshold=1,
    )


def _tagged(*tags: str) -> ResourceSpecification:
    return ResourceSpecification(
        {"prefect.resource.role": "tag", "prefect.resource.id": [f"prefect.tag.{tag}" for tag in tags]}
    )
