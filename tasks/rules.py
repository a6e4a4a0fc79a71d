"""The rules in words: what made a processor give an event, told from the event itself and the settings then in force."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from storage.times import show, show_duration
from tasks.processors import abandonment, derive


def rule_of(event: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Why a derived event came about, in a sentence without its full stop.

    Args:
        event: the derived event.
        settings: the processor's, as written down in the log `clock`; empty where they are not known.
    """
    processor, _, rest = event["event"]["id"].partition("/")
    tell = _TELL.get(processor)
    return tell(event, settings) if tell else f"rule {rest.rpartition('/')[2]} of the processor {processor}"


def _derive(event: Mapping[str, Any], _settings: Mapping[str, Any]) -> str:
    template, to = event["object"].get("template"), event["object"]
    verb = next((rule.verb for rule in derive.RULES if rule.template == template), "its cause")
    return f"{verb} gives the email {template} to the {to.get('type')} {to.get('id')}"


def _abandonment(event: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    verb, obj, at = event["verb"]["type"], event["object"], event["context"]["at"]
    timeout = show_duration(settings["timeout"]) if "timeout" in settings else "the timeout"
    if verb == "ABANDONED_BASKET":
        count = len(obj["basket"])
        left = f"{count} item{'' if count == 1 else 's'} in the basket, and last there at {show(at)}"
        return f"{left}: more than {timeout} passed after that without an interaction"
    if verb == "RECOVERED_BASKET":
        within = show_duration(abandonment.RECOVER)
        worth = "unknown" if obj.get("value") is None else obj["value"]
        return f"ordered at {show(at)}, within {within} after the abandonment; worth {worth}"
    return f"an interaction of {show(at)}, within {timeout} after the last one known before: the customer was there"


def _anomalies(event: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    obj = event["object"]
    many = f"more than {settings['deviations']:g}" if "deviations" in settings else "too many"
    far = "beyond any measure" if obj["score"] is None else f"{obj['score']:.3g} standard deviations off, {many}"
    return (
        f"{obj['measure']} is {_short(obj['value'])}, {far}: mean {obj['mean']:.6g}, deviation {obj['std']:.6g}, "
        f"{obj['samples']} samples before it"
    )


def _remind(event: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    gap = show_duration(settings["gap"]) if "gap" in settings else "the gap"
    return f"an abandoned basket gives a reminder, unless its customer had one within {gap}"


def _quarantine(event: Mapping[str, Any], _settings: Mapping[str, Any]) -> str:
    return f"the judge refused the line: {event['object']['reason']}"


def _deliver(event: Mapping[str, Any], _settings: Mapping[str, Any]) -> str:
    reason = event["object"].get("reason")
    return f"{event['verb']}, {reason}" if reason else f"{event['verb']}: what became of the email"


def _short(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value).lower()  # true, as the event has it, and not True


_TELL = {
    "derive": _derive,
    "abandonment": _abandonment,
    "anomalies": _anomalies,
    "remind": _remind,
    "quarantine": _quarantine,
    "deliver": _deliver,
}
