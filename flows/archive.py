"""The flow `archive`, once a day: sealed segments go to the archive, and what is old and done with goes from here."""

from __future__ import annotations

from prefect import flow, get_run_logger
from prefect.artifacts import create_markdown_artifact

from flows.markdown import escape, run_link, table
from flows.run_name import rename
from flows.running import open_run
from tasks.archive import Archived, archive_all


@flow(name="archive", flow_run_name="archive", log_prints=False, retries=2, retry_delay_seconds=20)
def archive() -> list[Archived]:
    """Put sealed segments into the archive, and remove here what is older than the live window and behind every checkpoint.

    Each is read back from the archive and compared before anything is removed. Readers see no difference.
    """
    with open_run("archive") as run:
        done = archive_all(run.store, run.topology, run.holder, run.stop)
        shown = run.store.archive.remote.shown
    logger = get_run_logger()
    for each in done:
        if each.put or each.removed:
            logger.info("%s: %s", each.name, _words(each))
        if each.waits_for:
            logger.warning("%s: old segments stay here until %s has read them", each.name, each.waits_for)
    put, removed = sum(d.put for d in done), sum(d.removed for d in done)
    rename(f"archive: {put:,} archived, {removed:,} removed here" if put or removed else "archive: nothing new")
    columns = ("log", "archived", "removed here", "events", "bytes", "bytes archived", "waits for")
    rows = [(d.name, d.put, d.removed, d.events, d.raw_bytes, d.archived_bytes, d.waits_for or "-") for d in done]
    text = f"## Archive\n\nTo {escape(shown, 200)}, by {run_link()}.\n\n{table(columns, rows)}"
    create_markdown_artifact(text, key="archive", description="What went to the archive")
    return done


def _words(done: Archived) -> str:
    return (
        f"{done.put:,} segments archived ({done.events:,} events, {done.raw_bytes:,} bytes in {done.archived_bytes:,}), "
        f"{done.removed:,} removed here"
    )
