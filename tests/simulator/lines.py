"""What producers append: a few customers' doings, clients' taxes, late lines and bad ones, each with a tag of its own."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import orjson

_MINUTE, _DAY = 60_000, 86_400_000
_VERBS = ["ADDED_ITEM_TO_BASKET"] * 5 + [
    "VIEWED_ITEM",
    "REMOVED_ITEM_FROM_BASKET",
    "ORDERED",
    "ORDERED",
    "ORDER_COMPLETED",
]
_LATE = [0, 0, 0, 1, _MINUTE, 10 * _MINUTE, 31 * _MINUTE, _DAY, 8 * _DAY, 31 * _DAY]
_BAD = [
    b"", b"{", b"null", b'"\xff"', b"\x00\x00\x00", b'{"subject":{"id":true},"verb":"X","context":{"at":5}}',
    b'{"subject":{"id":1},"verb":"X"}', b'{"subject":{"id":1},"verb":"ADDED_ITEM_TO_BASKET","context":{"at":1}}',
]  # fmt: skip


class Lines:
    """Draws events; `tag` is in each good one, and tells it from all others."""

    def __init__(self, random: Random) -> None:
        self._random, self._tags = random, 0

    def event(self, wall: int) -> dict[str, Any]:
        """An event for the log to stamp."""
        pick = self._random.choice
        self._tags += 1
        at = wall - pick(_LATE)
        if self._random.random() < 0.2:
            obj: dict[str, Any] = {"id": pick([900, 901, "902", 903, 999]), "body": "x" * pick([1, 5, 400])}
            return {
                "subject": {"id": "UK"},
                "verb": "SUBMIT_TAX",
                "object": obj,
                "context": {"at": at, "tag": self._tags},
            }
        verb = pick(_VERBS)
        item = {"id": pick([3, 4, "3"]), "price": pick([5, 1.5, None]), "count": pick([1, 2, 0])}
        obj = {"type": "BASKET", "value": pick([12.5, None])} if verb == "ORDERED" else {"type": "ITEM", "item": item}
        subject = {"id": pick([1, 2, 3, "4", 5, "ä"]), "type": "CUSTOMER"}
        return {"subject": subject, "verb": verb, "object": obj, "context": {"at": at, "tag": self._tags}}

    def raw(self, wall: int) -> bytes:
        """A line as it is, good or bad; a good one may bring a stamp, which may be late, early or too far ahead."""
        pick = self._random.choice
        if self._random.random() < 0.2:
            return pick(_BAD)
        event = self.event(wall)
        stamp = pick([None, wall, wall - _MINUTE, wall + _MINUTE, wall - _DAY, wall + _DAY])
        if stamp is not None:
            event["event"] = {"inserted_at": stamp, "id": "mine"}
        return json.dumps(event, ensure_ascii=False).encode()


def tag_of(line: bytes) -> int | None:
    """The tag of a line; None where it has none, as one that is torn."""
    if b'"tag"' not in line:
        return None
    try:
        tag: int = orjson.loads(line)["context"]["tag"]
    except orjson.JSONDecodeError:
        return None
    return tag
