"""The flow `why`: the answer of `afterlog why` as an artifact, with the runs that did it linked."""

from __future__ import annotations

from typing import Annotated

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from pydantic import Field

from flows.markdown import escape
from flows.run_name import run_settings
from storage.store import Store
from tasks.evidence import Evidence, WrittenBy
from tasks.topology import build_topology
from tasks.why import Why
from tasks.why import why as answer_why
from tasks.why_text import rows_of, sentence

_LONGEST = 20_000
Ident = Annotated[
    str,
    Field(
        min_length=1, max_length=2_000, title="ID",
        examples=["abandonment/events:0:2210/abandoned", "derive/events:0:5130/tax-received", "events:0:5130"],
    ),
]  # fmt: skip


@flow(name="why", flow_run_name="why {ident}", log_prints=False)
def why(ident: Ident) -> str:
    """Tell why something happened: the chain back to the raw bytes, the rules and settings that fired, the runs, the mail.

    Args:
        ident: the id of an email, a delivery, an abandonment, an anomaly or any other derived event (its event.id); a
            Message-ID; or a place such as events:0:5130.
    """
    settings = run_settings()
    evidence = Evidence(Store(settings), build_topology(settings))
    try:
        found = answer_why(evidence, ident)
    finally:
        evidence.close()
    said = sentence(found)
    create_markdown_artifact(_page(found, said), key="why", description=f"Why {found.asked}"[:200])
    get_run_logger().info("%s: %s", ident, said)
    return said


def _page(found: Why, said: str) -> str:
    rows = [[escape(cell, _LONGEST) for cell in row] for row in rows_of(found)]
    lines = ["| place | what | value |", "| --- | --- | --- |", *(f"| {' | '.join(row)} |" for row in rows)]
    # By the path alone, which holds wherever the UI is served.
    runs = [f"- [{escape(run.run, 200)}](/runs/flow-run/{run.flow_run_id})" for run in _runs(found) if run.flow_run_id]
    return "\n".join([f"**{escape(said, 2_000)}**", "", *lines, "", *(["**Runs**", "", *runs] if runs else [])])


def _runs(found: Why) -> list[WrittenBy]:
    """The runs that had a part in it, each once."""
    runs = [step.run for step in (*found.chain, *found.came_of_it)]
    runs += [outcome.run for outcome in found.sending.outcomes] if found.sending else []
    return list({run.flow_run_id: run for run in runs if run is not None}.values())
