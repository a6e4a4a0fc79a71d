"""`afterlog basket`: a customer's basket as it was."""

from __future__ import annotations

import os

from deployments.console import say, show_json, show_table
from storage.settings import load_settings
from storage.store import Store
from storage.times import parse_moment, show
from tasks.time_machine import Basket, basket_at
from tasks.topology import build_topology

ITEMS = ("item", "name", "count", "price")
MADE_BY = ("place", "verb", "item", "count", "happened", "known")


def basket(customer: str, *, at: str | None = None, known_at: str | None = None, json: bool = False) -> None:
    """Show the basket of a customer as it is, or as it was, with the events that made it.

    Args:
        customer: their id.
        at: as of what had happened by this time, in the order in which it happened: milliseconds or RFC 3339.
        known_at: as of what the log had taken by this time: what Afterlog went by then.
        json: one JSON document on standard output.
    """
    settings = load_settings()
    found = basket_at(
        Store(settings), build_topology(settings), customer, at=_moment(at, "--at"),
        known_at=_moment(known_at, "--known-at"), processes=processors(),
    )  # fmt: skip
    if json:
        show_json(found)
    else:
        _show(found)


def processors() -> int:
    """How many processes may look through a large log at a time."""
    return min(len(os.sched_getaffinity(0)), 8)


def _moment(text: str | None, option: str) -> int | None:
    return None if text is None else parse_moment(text, option)


def _show(found: Basket) -> None:
    moments = [
        f"{word} by {show(time)}"
        for word, time in (("happened", found.at), ("known", found.known_at))
        if time is not None
    ]
    title = f"Basket of {found.customer}, {' and '.join(moments) or 'as it is'}"
    rows = [[item.get(name, "") for name in ("id", "name", "count", "price")] for item in found.items]
    show_table(title, ITEMS, rows)
    made = [
        (each.place, each.verb, each.item or "", "" if each.count is None else each.count, show(each.at), show(each.known_at))
        for each in found.made_by
    ]  # fmt: skip
    if made:
        print()
        show_table("Made by", MADE_BY, made)
    if not found.items:
        say(
            "The basket is empty"
            + ("" if made or found.notes else ": nothing was put in it" + (" by then" if moments else ""))
        )
    for note in found.notes:
        say(note)
