"""What a run tells in the UI: one markdown artifact with the counts of every processor."""

from __future__ import annotations

from collections.abc import Sequence

from prefect.artifacts import create_markdown_artifact

from tasks.deliver import DeliverySummary
from tasks.process import Summary


def counts_table(summaries: Sequence[Summary]) -> str:
    """The counts of DESIGN 4 as a markdown table: read = processed + quarantined + ignored."""
    head = "| processor | read | processed | quarantined | ignored | derived | bytes |\n|---|--:|--:|--:|--:|--:|--:|\n"
    return head + "".join(
        f"| {s.processor} | {s.lines} | {s.processed} | {s.quarantined} | {s.ignored} | {s.derived} | {s.bytes} |\n"
        for s in summaries
    )


def mail_table(summary: DeliverySummary) -> str:
    """What became of mails, and why some were not sent."""
    states = "".join(f"| {state} | {count} |\n" for state, count in sorted(summary.states.items()) if count)
    reasons = "".join(f"| {reason} | {count} |\n" for reason, count in summary.reasons.most_common(20))
    text = f"{summary.taken_in} taken in, {summary.waiting} waiting, {summary.retries} to be tried again\n\n"
    text += f"**Mails are held:** {summary.held}\n\n" if summary.held else ""
    text += f"| mails | |\n|---|--:|\n{states}\n" if states else ""
    return text + (f"| why not | |\n|---|--:|\n{reasons}" if reasons else "")


def publish(key: str, title: str, parts: Sequence[str]) -> None:
    """Show the parts as one artifact of the current run."""
    create_markdown_artifact(key=key, markdown="\n\n".join([f"## {title}", *parts]), description=title)
