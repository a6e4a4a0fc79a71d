"""`afterlog why` and `afterlog why-not`: answers from the logs and the database, without Prefect."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from deployments.cli_basket import processors
from deployments.console import say, show_json, show_table
from storage.settings import Settings, load_settings
from storage.store import Store
from tasks.evidence import Evidence
from tasks.topology import build_topology
from tasks.why import why as answer_why
from tasks.why_not import why_not as answer_why_not
from tasks.why_text import rows_of, sentence


def why(id: str, *, json: bool = False) -> None:
    """Show why something happened: the chain back to the raw bytes, the rules and settings that fired, the runs, the mail.

    Args:
        id: of an email, a delivery, an abandonment, an anomaly or any other derived event (its event.id); a Message-ID; or a
            place such as events:0:5130.
        json: one JSON document on standard output.
    """
    with _evidence() as evidence:
        found = answer_why(evidence, id)
    if json:
        show_json(found)
        return
    show_table(f"Why {id}", ("place", "what", "value"), rows_of(found))
    say(sentence(found))


def why_not(customer: str, *, json: bool = False) -> None:
    """Show what stands between a customer and a mail about their basket.

    Args:
        customer: their id.
        json: one JSON document on standard output.
    """
    with _evidence() as evidence:
        found = answer_why_not(evidence, customer, processes=processors())
    if json:
        show_json(found)
        return
    rows = [(c.what, "no" if c.stands_in_the_way else "ok", c.detail, c.place) for c in found.checks]
    if rows:
        show_table(f"Why no mail to {customer}", ("what", "", "detail", "place"), rows)
    say(f"{customer}: {found.answer}")


def ui_url(settings: Settings) -> str:
    """Where Prefect's UI is served, as far as that is known without asking anybody; empty where it is not."""
    if url := os.environ.get("PREFECT_UI_URL"):
        return url.rstrip("/")
    api = os.environ.get("PREFECT_API_URL", "")
    if not api:
        try:
            api = (settings.home.resolve() / "prefect" / "api-url").read_text().strip()  # as `afterlog up` writes it
        except OSError:
            return ""
    return api.rstrip("/").removesuffix("/api")


@contextmanager
def _evidence() -> Iterator[Evidence]:
    settings = load_settings()
    evidence = Evidence(Store(settings), build_topology(settings), ui_url(settings))
    try:
        yield evidence
    finally:
        evidence.close()
