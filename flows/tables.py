"""The tables in the UI: the latest abandoned baskets, anomalies and mails, as people read them.

A mail's recipient is shown by type and id, never by address: what Prefect keeps would outlive a person who is forgotten.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

import sqlalchemy as sa

from flows.markdown import cell, line_of
from storage.mails import CLAIMED, UNKNOWN, WAITING
from storage.store import DELIVERIES, Store
from storage.tables import Delivery
from storage.times import show, show_duration
from tasks.latest import latest_events, parse

ROWS = 20
_LOOK_BACK = 10 * ROWS  # outcomes lie between the abandonments that are shown
_DELIVERY: sa.Table = Delivery.__table__  # type: ignore[attr-defined]  # SQLModel hides it from the types
_LARGEST = Decimal(10) ** 12  # beyond it a price is a fault in the data, no amount to show

Row = dict[str, str]


def abandoned_baskets(store: Store) -> list[Row]:
    """The latest abandoned baskets, and what the log has shown of them since."""
    events = latest_events(store, "baskets", _LOOK_BACK)
    outcomes = {_at(event, "context", "abandonment"): _outcome(event) for event in events}
    left = [event for event in events if verb_of(event) == "ABANDONED_BASKET"][:ROWS]
    return [_basket_row(event, outcomes.get(_at(event, "event", "id"), "")) for event in left]


def anomalies(store: Store) -> list[Row]:
    """The latest anomalies: what was measured, what was expected, and why that is odd, in a sentence."""
    return [_anomaly_row(event) for event in latest_events(store, "anomalies", ROWS)]


def mails(store: Store) -> list[Row]:
    """The mails that wait for the server or for a person, then those decided last; each with its reason."""
    waiting = [row for state in (UNKNOWN, CLAIMED, WAITING) for row in _outbox(store, _DELIVERY.c.state == state)][
        :ROWS
    ]
    open_rows = [_mail_row(store, row, row["changed_at"]) for row in waiting]
    decided = latest_events(store, DELIVERIES, ROWS)
    ids = [_at(event, "object", "id") for event in decided]
    rows = {row["event_id"]: row for row in _outbox(store, _DELIVERY.c.event_id.in_(ids))}
    for event, ident in zip(decided, ids, strict=True):
        row = rows.pop(ident, None)  # what it was before it was settled is no state of today
        if row is not None and row not in waiting and len(open_rows) < ROWS:
            state, reason = verb_of(event), _at(event, "object", "reason") or ""
            open_rows.append(_mail_row(store, {**row, "state": state, "reason": reason}, _stamp_of(event)))
    return open_rows


def verb_of(event: Mapping[str, Any]) -> str:
    """The verb of an event, a string or an object with a type."""
    verb = event.get("verb")
    return str(verb.get("type", "")) if isinstance(verb, Mapping) else str(verb)


def basket_value(items: Iterable[Any]) -> Decimal | None:
    """What a basket's items cost, exactly; None where a price or a count is missing or no number."""
    total = Decimal(0)
    for item in items:
        price, count = _number(item, "price"), _number(item, "count", 1)
        if price is None or count is None:
            return None
        total += price * count
    return total


def _basket_row(event: Mapping[str, Any], outcome: str) -> Row:
    items = _at(event, "object", "basket") or []
    value = basket_value(items)
    last = _at(event, "context", "at")
    return {
        "customer": cell(_at(event, "subject", "id"), 30),
        "items": cell(", ".join(map(_item, items)), 38),
        "value": "not known" if value is None else f"{value:,.2f}",
        "idle for": show_duration(_stamp_of(event) - last),
        "since then": outcome,
        "left at": _minute(last),
    }


def _outcome(event: Mapping[str, Any]) -> str:
    if verb_of(event) == "ABANDONMENT_RETRACTED":
        return "was there after all"
    value = _at(event, "object", "value")
    return "ordered" if not isinstance(value, int | float) else f"ordered for {value:,.2f}"


def _anomaly_row(event: Mapping[str, Any]) -> Row:
    odd, cause = _at(event, "object") or {}, _at(event, "context", "caused_by") or {}
    body = _at(cause, "object", "body")
    return {
        "measure": cell(odd.get("measure"), 40),
        "value": _shown(odd.get("value")),
        "expected": f"{_shown(odd.get('mean'))} ± {_shown(odd.get('std'))}",
        "the sentence": cell(f"{_why(odd)}: {verb_of(cause)} by {_at(cause, 'subject', 'id')}", 90),
        "its text": cell(body, 60) if isinstance(body, str) else "",
        "at": _minute(_stamp_of(event)),
    }


def _why(odd: Mapping[str, Any]) -> str:
    value, mean, score = odd.get("value"), odd.get("mean"), odd.get("score")
    if not isinstance(value, int | float) or not isinstance(mean, int | float) or isinstance(value, bool):
        return "no usable number"
    side = "above" if value > mean else "below"
    if isinstance(score, int | float):
        return f"{score:,.1f} deviations {side} the mean"
    return f"{side} the mean, and all before were the same"


def _outbox(store: Store, condition: Any) -> list[dict[str, Any]]:
    wanted = sa.select(_DELIVERY).where(condition).order_by(_DELIVERY.c.next_at).limit(ROWS)
    with store.database.read() as connection:
        return [dict(row) for row in connection.execute(wanted).mappings()]


def _mail_row(store: Store, row: Mapping[str, Any], at: int) -> Row:
    reader = store.reader(row["log"], row["partition"], row["generation"])
    try:
        email = parse(reader.line(row["offset"])) or {}
    finally:
        reader.close()
    state = str(row["state"])
    return {
        "to": cell(f"{row['recipient_type']} {row['recipient_id']}", 40),
        "what": cell(_at(email, "object", "template") or row["event_id"], 40),
        "state": state,
        "why": cell(row["reason"]) or _WHY.get(state, ""),
        "at": _minute(at),
    }


_WHY = {"SENT": "accepted by the mail server", WAITING: "not tried yet", CLAIMED: "being sent"}


def _item(item: Any) -> str:
    count = _number(item, "count", 1)
    name = _at(item, "name") or f"item {_at(item, 'id')}"
    return f"{count.normalize():f} × {line_of(name, 40)}" if count is not None and count != 1 else line_of(name, 40)


def _number(item: Any, name: str, default: int | None = None) -> Decimal | None:
    value = item.get(name, default) if isinstance(item, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    number = Decimal(str(value))
    return number if abs(number) < _LARGEST else None


def _shown(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return cell(value, 30)
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:,.3g}"


def _at(value: Any, *path: str) -> Any:
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _stamp_of(event: Mapping[str, Any]) -> int:
    return int(_at(event, "event", "inserted_at") or 0)


def _minute(millis: int) -> str:
    """A time to the minute, without its year: short enough for a narrow window."""
    return show(millis)[5:16].replace("T", " ")
