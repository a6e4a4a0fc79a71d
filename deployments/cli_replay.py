"""`afterlog replay` and `afterlog replays`: the past again, and what becomes of it."""

from __future__ import annotations

import json
import os
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from deployments.console import say, show_table
from deployments.server import use_prefect
from storage.errors import UsageError
from storage.generations import find_replay, list_replays
from storage.settings import Settings, load_settings
from storage.store import Store
from storage.times import show
from tasks import promote as promotion
from tasks.impact import Comparison, compare
from tasks.replay import drop_replay, run_replay, start
from tasks.replay_plan import Planned, Request, changed_settings, check_place, describe, parse_ticks, read_plan
from tasks.topology import Topology, build_topology

replays = App(name="replays", help="Generations that replays made: list, show, promote, discard, rollback.")


def replay(
    processors: list[str] | None = None,
    *,
    from_: Annotated[str, Parameter(name="--from")] = "all",
    to: str = "all",
    set_: Annotated[list[str] | None, Parameter(name="--set")] = None,
    as_of: str = "recorded",
    name: str = "",
    decide: Literal["compare", "ask"] = "compare",
    prefect: Annotated[bool, Parameter(negative="--no-prefect")] = True,
) -> None:
    """Run processors again over the past, into a new generation beside the live one, and show how it differs.

    Nothing that is live changes, and nothing can be mailed. Who reads what they write is replayed with them.

    Args:
        processors: their names; those that `--set` touches, or all, where they are left out.
        from_: compare from here on, an offset or an RFC 3339 time.
        to: compare up to here.
        set_: a setting for the whole of the past, `timeout=45m`; may be given several times.
        as_of: recorded (the recorded ticks), or one tick at the end instead: log-end, RFC 3339, milliseconds since 1970.
        name: what to call it. The name of one that was interrupted goes on with it.
        decide: compare only, or ask in Prefect's UI with the difference in view: yes promotes, no discards.
        prefect: run as a Prefect flow run; --no-prefect does the same work in this process.
    """
    settings = load_settings()
    wanted = _pairs(set_ or [])
    request = Request(tuple(processors or ()), from_, to, wanted, parse_ticks(as_of), name)
    if prefect:
        _check(settings, request)
        use_prefect(settings)
        from prefect import tags  # after the environment: Prefect reads it at import

        from flows.replay import replay as flow

        with tags("afterlog", "cli"):
            show_comparison(flow(processors or [], from_, to, wanted, as_of, name, decide))
        return
    if decide == "ask":
        raise UsageError("--decide ask asks in Prefect's UI, so it does not go with --no-prefect")
    _replay_here(settings, request)


def _check(settings: Settings, request: Request) -> None:
    """Refuse what can never be, before a server is started for it, whose runs tell a mistake with a traceback."""
    topology = build_topology(settings)
    changed_settings(topology, request.settings)
    for processor in request.processors:
        topology.make(processor)
    for option, text in (("--from", request.from_), ("--to", request.to)):
        check_place(option, text)


def _replay_here(settings: Settings, request: Request) -> None:
    store, topology, holder = Store(settings), build_topology(settings), f"afterlog replay, process {os.getpid()}"
    planned, resumed = start(store, topology, request, holder)
    say(
        f"{'going on with ' if resumed else ''}generation {planned.generation} ({planned.row.name}): {describe(planned)}"
    )
    done = run_replay(planned, store, topology, holder)
    for note in done.notes:
        say(note)
    show_comparison(compare(store, topology, done.planned))
    say(
        f"`afterlog replays promote {planned.row.name}` makes it live, `afterlog replays discard {planned.row.name}` drops it"
    )


@replays.command(name="list")
def list_() -> None:
    """Every replay that there was, and what became of it."""
    rows = [
        (row.generation, row.name, row.state, show(row.created_at), describe(read_plan(row)))
        for row in list_replays(Store(load_settings()).database)
    ]
    show_table("Replays", ("generation", "name", "state", "created", "what"), rows)


@replays.command(name="show")
def show_(which: str) -> None:
    """How a replay's generation differs from what was live when it was made.

    Args:
        which: its name, or its generation's number.
    """
    store, topology, planned = _open(which)
    say(f"generation {planned.generation} ({planned.row.name}) is {planned.row.state}: {describe(planned)}")
    if planned.row.state == "DISCARDED":
        raise UsageError("it was discarded: there is nothing left to compare", where=f"generation {planned.generation}")
    show_comparison(compare(store, topology, planned))


@replays.command
def discard(which: str) -> None:
    """Drop a replay and everything that it made; nothing that is live changes.

    Args:
        which: its name, or its generation's number.
    """
    generation = drop_replay(Store(load_settings()), which, _holder("discard"))
    say(f"generation {generation} is gone")


@replays.command
def promote(which: str) -> None:
    """Make a replay's generation live: it catches up, and in one transaction everybody goes on with it.

    Args:
        which: its name, or its generation's number.
    """
    settings = load_settings()
    _tell(promotion.promote(Store(settings), build_topology(settings), which, _holder("promote")))


@replays.command
def rollback(which: str) -> None:
    """Make live again what was live before a replay was promoted. What was delivered meanwhile stays delivered.

    Args:
        which: its name, or its generation's number.
    """
    settings = load_settings()
    _tell(promotion.rollback(Store(settings), build_topology(settings), which, _holder("rollback")))


def _holder(what: str) -> str:
    return f"afterlog replays {what}, process {os.getpid()}"


def _tell(moved: promotion.Moved) -> None:
    live = ", ".join(f"{log} generation {generation}" for log, generation in moved.live.items())
    say(f"live is now {live}; the schedule waited for {moved.seconds:.2f} s")
    say(
        f"{moved.queued} mails were queued by the difference"
        + f", {moved.too_soon} left out as too soon after another" * bool(moved.too_soon)
    )
    for note in moved.notes:
        say(note)


def _open(which: str) -> tuple[Store, Topology, Planned]:
    settings = load_settings()
    store = Store(settings)
    return store, build_topology(settings), read_plan(find_replay(store.database, which))


def _pairs(texts: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError("--set needs NAME=VALUE", found=repr(text), expected="timeout=45m, say")
        try:
            found[name.strip().lower()] = json.loads(value) if value.lstrip()[:1] in ("[", "{") else value.strip()
        except json.JSONDecodeError as error:
            raise UsageError(f"--set {name} is no JSON: {error}", found=repr(value[:100])) from error
    return found


def show_comparison(found: Comparison) -> None:
    """Print how two generations differ, and whose inbox that would change."""
    rows = [(d.log, d.old, d.new, d.same, d.added, d.removed, d.changed) for d in found.logs]
    show_table("By event.id", ("log", "live", "replayed", "same", "added", "removed", "changed"), rows)
    examples = [
        (
            d.log,
            e.kind,
            e.id,
            e.who,
            "" if e.old_at is None else show(e.old_at),
            "" if e.new_at is None else show(e.new_at),
        )
        for d in found.logs
        for e in d.examples
    ]
    if examples:
        show_table("Examples", ("log", "kind", "event", "who", "live at", "replayed at"), examples)
    if found.impact is not None:
        i = found.impact
        say(
            f"mails: {i.mails_added} more, {i.mails_removed} fewer (of which {i.sent_already} were sent already); {i.people}"
        )
        for label, names in (("newly mailed", i.newly), ("no longer mailed", i.no_longer)):
            if names:
                say(f"{label}: {', '.join(names)}")
