"""The counts of a run as Markdown: what each processor read and made of it, how far it is behind, and the mails."""

from __future__ import annotations

from flows.markdown import escape, run_link, table
from flows.naming import Done, ended, why_not
from storage.times import now, show, show_duration
from tasks.deliver import DeliverySummary
from tasks.run import Run
from tasks.status import STUCK, ProcessorStatus, read_status


def counts_markdown(run: Run, flow: str, done: Done, *, at_work: bool) -> str:
    """What the run did, processor by processor (DESIGN 4), and how things stand since the beginning."""
    heading = f"## {escape(ended(run, flow, done), 200)}"
    parts = [
        heading,
        f"As it was at {show(now())[:19]} UTC, with {run_link()} at work." if at_work else f"By {run_link()}.",
    ]
    parts += [f"**{escape(name)} failed**: {escape(reason, 500)}" for name, reason in done.failures.items()]
    parts += [f"Note: {escape(note, 500)}" for note in run.notes]
    if any(s.lines or s.derived for s in done.summaries):
        parts.append(_counts(done))
    parts += map(_mails, done.mails)
    parts.append(_standing(run))
    return "\n\n".join(parts)


def lag_by_processor(run: Run) -> list[ProcessorStatus]:
    """Each processor's place in its log, and how far that is from the log's end, in bytes and milliseconds."""
    return read_status(run.store, run.topology).processors


def _counts(done: Done) -> str:
    columns = ("processor", "read", "processed", "quarantined", "ignored", "derived", "bytes")
    rows = [
        (s.processor, s.lines, s.processed, s.quarantined, s.ignored, s.derived, s.bytes)
        for s in done.summaries
        if s.lines or s.derived
    ]
    return f"### In this run\n\n{table(columns, rows)}\n\nread = processed + quarantined + ignored by rule"


def _mails(mails: DeliverySummary) -> str:
    """What became of mails, and why some were not sent."""
    head = f"### Mails\n\n{mails.taken_in:,} taken in, {mails.waiting:,} waiting, {mails.retries:,} to be tried again"
    if mails.held:
        head += f"\n\n**Mails are held:** {escape(mails.held, 500)}"
    states = [(state, count) for state, count in sorted(mails.states.items()) if count]
    reasons = why_not(mails, 20)
    parts = [head, *([table(("state", "mails"), states)] if states else [])]
    return "\n\n".join([*parts, *([table(("why not", "mails"), reasons)] if reasons else [])])


def _standing(run: Run) -> str:
    columns = ("processor", "at", "behind", "read", "processed", "quarantined", "ignored", "derived")
    rows = [
        (p.processor, f"{p.log}/{p.partition} {p.offset:,}", _behind(p), p.read, p.processed, p.quarantined, p.ignored,
         p.derived)
        for p in lag_by_processor(run)
    ]  # fmt: skip
    return f"### Since the beginning\n\n{table(columns, rows)}"


def _behind(status: ProcessorStatus) -> str:
    if not status.lag_ms:
        return "not known" if status.state == STUCK else "none"  # its log cannot be read, or has lost its end
    return f"{f'{status.lag_bytes:,} bytes' if status.lag_bytes else 'a tick'}, {show_duration(status.lag_ms)}"
