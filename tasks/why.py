"""Why something happened: the chain from it to the raw bytes, with the rule, settings and run of each step.

A derived event names its source, and that its own: the chain is read from the logs, what fired from the log `clock`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from storage.errors import AfterlogError, UsageError
from storage.event import HEAD, MAX_DERIVED_DEPTH, Rejected
from storage.judge import judge
from storage.manifest import place_before
from storage.store import DELIVERIES
from storage.subject import subject_events
from storage.times import show
from tasks.evidence import Event, Evidence, Place, WrittenBy, as_json, check_text, parse_event
from tasks.processors import abandonment
from tasks.rules import rule_of
from tasks.time_machine import counts, settings_at
from tasks.why_sent import Sending, mail_of, sending_of

_PLACE = re.compile(r"([a-z0-9][a-z0-9_.-]*):([0-9]{1,1000}):([0-9]{1,1000})")  # Python reads no longer numbers
_MESSAGE_ID = re.compile(r"<?([0-9a-f]{64})(?:@[^>\s]*)?>?")


@dataclass(frozen=True)
class Step:
    """One event of the chain. Times in milliseconds; of a raw line only `place`, `line` and what the judge says is known.

    `line` is verbatim, bytes that are no UTF-8 as `\\xNN`; `known_at` is the clock of a derived event, -1 for a raw line.
    `settings`, `code` (SHA-256) and `version` (where the log `clock` says so) are those in force.
    """

    place: str
    id: str
    verb: str
    at: int
    known_at: int
    line: str
    rule: str = ""
    shown_by: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    code: str = ""
    version: str = ""
    run: WrittenBy | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Why:
    """The answer: `chain` begins with what was asked for and ends with the raw line."""

    asked: str
    chain: list[Step]
    sending: Sending | None
    came_of_it: list[Step]


def why(evidence: Evidence, ident: str) -> Why:
    """Why there is the event `ident`: an `event.id`, a Message-ID, or a place such as `events:0:5130`.

    Raises:
        UsageError: nothing is known of it.
    """
    place, line = find(evidence, ident.strip())
    generation, chain = place.generation, [step(evidence, place, line)]
    sending = sending_of(evidence, place, parse_event(line)) if chain[0].verb == "EMAIL" else None
    while (source := _source(evidence, place, line)) is not None:
        place, carried = source, line
        try:
            line = evidence.line(place)
        except AfterlogError as error:
            left = "; what it carries of it is in caused_by" if b'"caused_by":' in carried else ""
            chain[-1].notes.append(f"its cause cannot be read ({error}){left}")
            break
        chain.append(step(evidence, place, line, _check_carried(carried, line)))
    return Why(ident, chain, sending, _came_of(evidence, chain[0], generation))


def find(evidence: Evidence, ident: str) -> tuple[Place, bytes]:
    """Where the event lies that a person means, and its line.

    Raises:
        UsageError: there is none.
    """
    if match := _PLACE.fullmatch(check_text(ident)):
        place = Place(match[1], int(match[2]), int(match[3]))
        return place, evidence.line(place)
    if match := _MESSAGE_ID.fullmatch(ident):
        ident = mail_of(evidence, match[1])
    log = evidence.log_of(ident.partition("/")[0])
    cause = _PLACE.search(ident)
    partition = int(cause[2]) if cause else None  # a derived event has the partition of its cause
    others = evidence.others(log)
    mails = evidence.look.rows("SELECT generation FROM delivery WHERE event_id = :id", id=ident)
    queued = mails[0]["generation"] if mails else 0
    for generation in (0, *sorted(others, key=lambda other: other != queued)):  # what is live, and what the mail was of
        found = [
            (place, line) for place, line in evidence.lines_with(log, as_json(ident), partition, generation)
            if parse_event(line)["event"]["id"] == ident
        ]  # fmt: skip
        if found:
            return found[-1]  # a log that has lost its end may give an id a second time
    if queued and queued not in (evidence.generation_of(log), *others):
        raise UsageError("the event of this mail is gone", found=f"generation {queued} of {log}, which was discarded")
    raise UsageError("no such event", found=repr(ident), do=f"See: afterlog read {log}")


def step(evidence: Evidence, place: Place, line: bytes, notes: list[str] | None = None) -> Step:
    """What is known of the line at a place."""
    text, notes = line.decode(errors="backslashreplace"), notes or []
    processor = evidence.processor_of(place.log)
    if not processor:
        try:
            event = judge(line, place.offset, 0, MAX_DERIVED_DEPTH)
        except Rejected as error:
            return Step(str(place), "", "", -1, -1, text, notes=[*notes, f"no event: {error}"])
        return Step(str(place), "", event.verb, event.at, -1, text, notes=notes)
    found, source = parse_event(line), _source(evidence, place, line)
    generation = evidence.generation_at(place)
    shown_by, shown_at = _shown_by(evidence, found, source, generation)
    run = evidence.written_by(place)
    version = evidence.version(processor, shown_at, generation, run) if shown_at and place.log != DELIVERIES else None
    settings = version.settings if version else {}
    verb = found["verb"]
    return Step(
        str(place), found["event"]["id"], verb if isinstance(verb, str) else verb["type"], found["context"]["at"],
        found["event"]["inserted_at"], text, rule_of(found, settings) if found["event"]["id"] else "", shown_by, settings,
        version.code if version else "", f"clock:0:{version.offset}" if version else "", run,
        [*notes, *_notes(evidence, found, place)],
    )  # fmt: skip


def _source(evidence: Evidence, place: Place, line: bytes) -> Place | None:
    """Where the cause lies. A derived one is of the generation that was read: that of the event's own, or what was live then."""
    if not evidence.processor_of(place.log):
        return None
    source = parse_event(line)["context"].get("source")
    if not source:
        return None
    log, spot = source["log"], (source["log"], source["partition"], source["offset"])
    if not evidence.processor_of(log):
        return Place(*spot)
    live = evidence.generation_of(log)
    if place.log == DELIVERIES:
        named = source.get("generation", 1)
        return Place(*spot, 0 if named == live else named)
    places = [Place(*spot, 0 if generation == live else generation) for generation in (live, *evidence.others(log))]
    places.sort(key=lambda each: each.generation != place.generation)
    return next((each for each in places if _is_carried(evidence, line, each)), places[0])


def _is_carried(evidence: Evidence, derived: bytes, cause: Place) -> bool:
    try:
        return not _check_carried(derived, evidence.line(cause))
    except AfterlogError:
        return False


def _check_carried(derived: bytes, cause: bytes) -> list[str]:
    """Whether a derived event carries the bytes that now lie where it says that its cause lies."""
    if b'"caused_by":' not in derived:
        return []
    same = sha256(cause).hexdigest().encode() in derived if len(cause) > HEAD else cause in derived
    return [] if same else ["the bytes here are other ones than the event carries as its cause"]


def _shown_by(evidence: Evidence, found: Event, source: Place | None, generation: int) -> tuple[str, Place | None]:
    """What showed it, where that is not the cause itself; and where its processor stood then."""
    if source is None or found["verb"] != {"type": "ABANDONED_BASKET"}:
        return "", source
    clock, key, last = found["event"]["inserted_at"], str(found["subject"]["id"]), found["context"]["at"]
    log, partition, offset = source.log, source.partition, source.offset
    ticks = evidence.ticks(source)
    tick, first = ticks.at(clock, offset), ticks.at(clock)
    ticks.close()
    begin = offset + 1 + len(evidence.line(source))
    if tick == first:  # no tick before it has this clock, so whatever has it got it from a stamp
        begin = max(begin, place_before(evidence.store.directory(log, partition), clock)[0])
    for event in subject_events(evidence.store, log, partition, key, start=begin, until=clock):
        at = Place(log, partition, event.offset)
        if event.clock < clock or (tick is not None and event.offset >= tick.end):
            continue  # a tick and an event may have one clock: whatever came first has shown it
        version = evidence.version("abandonment", at, generation)
        settings = settings_at([version] if version else [], event.offset, abandonment.Settings())
        if event.clock > last + settings.timeout and counts(event, settings):
            return f"the customer's next event, {at}, of {show(clock)}", at
    if tick is None:
        return f"what was known by {show(clock)}: neither a tick nor an event of that moment is found", source
    return f"the tick clock:0:{tick.offset} of {show(tick.as_of)}", Place(log, partition, tick.end)


def _notes(evidence: Evidence, found: Event, place: Place) -> list[str]:
    closes, live = found["context"].get("abandonment"), evidence.generation_of(place.log)
    notes = [f"of the abandonment {closes}"] if closes else []
    if place.generation not in (0, live):
        notes.append(f"of generation {place.generation}, which is not live: generation {live} of {place.log} is")
    return notes


def _came_of(evidence: Evidence, first: Step, generation: int) -> list[Step]:
    """The events that name `first` as their cause, in the logs of those who read its log; in its own generation."""
    log = first.place.partition(":")[0]
    cause, found = first.id or first.place, []
    for processor in evidence.topology.all():
        if processor.reads == log and processor.writes is not None:
            mine = evidence.lines_with(
                processor.writes, as_json(f"{processor.name}/{cause}/"), int(first.place.split(":")[1]), generation
            )
            found += [step(evidence, place, line) for place, line in mine if _caused_by(line, first.place)]
    closed = evidence.lines_with(log, as_json(first.id), None, generation) if first.verb == "ABANDONED_BASKET" else ()
    for place, line in closed:
        if parse_event(line)["context"].get("abandonment") == first.id:
            found.append(step(evidence, place, line))
    return found


def _caused_by(line: bytes, place: str) -> bool:
    source = parse_event(line)["context"].get("source") or {}
    return f"{source.get('log')}:{source.get('partition')}:{source.get('offset')}" == place
