"""What a run is called and under which settings it works: for every flow, also one that must not reach the mail."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import partial

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.logging.handlers import PrefectConsoleHandler
from prefect.runtime import deployment, flow_run

from storage.errors import AfterlogError, UsageError
from storage.settings import Settings, load_settings

_LONGEST = 150


def run_settings() -> Settings:
    """The settings of this process, for a flow; from here on the run outlives the runner that started it.

    Raises:
        UsageError: a worker started it in a folder of its own, and HOME is relative to that.
    """
    _outlive_runner()
    settings = load_settings()
    if not settings.home.is_absolute() and deployment.id:  # in this order: Prefect may ask the server for the second
        raise UsageError(
            "HOME is relative, and a worker's run starts in a folder of its own", found=str(settings.home),
            do="Set AFTERLOG_HOME to an absolute path where the worker starts",
        )  # fmt: skip
    return settings


def rename(name: str, tags: Iterable[str] = ()) -> None:
    """Give the current run a name, and more tags. Where the server does not answer the run goes on as it was called."""
    shown = name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"
    try:
        with get_client(sync_client=True) as client:
            client.update_flow_run(flow_run.id, name=shown, tags=sorted({*flow_run.tags, *tags}) if tags else None)
    except Exception as error:  # noqa: BLE001  # whatever keeps the server from answering, the work comes first
        get_run_logger().warning("The run keeps its name: Prefect's server did not take another one (%r)", error)


def _in_a_sentence(record: logging.LogRecord) -> bool:
    """Have the run's log tell what was refused or failed once, in its sentence: Prefect's lines tell it twice, with a traceback.

    A fault of ours, and what a processor of somebody's own raised, keeps its traceback: that is another error, or a task's.
    """
    error = record.exc_info[1] if record.exc_info else None
    if not isinstance(error, AfterlogError):
        return True
    again = str(record.msg).startswith("Engine execution exited")
    record.msg, record.args, record.exc_info, record.exc_text = str(error), (), None, None
    return not again


def _outlive_runner() -> None:
    """Have the console fall silent where nobody reads it any more: a runner that was killed leaves a broken pipe behind.

    What Prefect writes with ends the process at the next line of its log instead, in the middle of the work.
    """
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    handlers = {handler for each in loggers if isinstance(each, logging.Logger) for handler in each.handlers}
    for console in (handler.console for handler in handlers if isinstance(handler, PrefectConsoleHandler)):
        console.on_broken_pipe = partial(setattr, console, "quiet", True)  # type: ignore[method-assign]  # meant to be replaced


# When this is imported: a flow may refuse before it asks for its settings.
logging.getLogger("prefect.flow_runs").addFilter(_in_a_sentence)
