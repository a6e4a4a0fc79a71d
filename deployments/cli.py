"""The command line: `afterlog`."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from contextlib import suppress
from typing import Any

from cyclopts import App, CycloptsError, Parameter, UnusedCliTokensError

from deployments.cli_arguments import Whole, check_port, utf8
from deployments.console import say
from deployments.refusals import from_prefect, from_system, give_up_output, open_closed
from storage import steps
from storage.errors import AfterlogError, UsageError


def _version() -> str:
    from importlib.metadata import version  # only --version should wait for it

    return version("afterlog")


app = App(
    name="afterlog",
    help="An append-only log of events, and everything that comes after. Settings: AFTERLOG_* or afterlog.toml.",
    version=_version,
    version_flags=["--version"],
    default_parameter=Parameter(validator=utf8),
)
# Named, not imported: reading a log should not wait for what delivers mail.
app.command("deployments.cli_logs:append", help="Append the lines of a file to a log, exactly as they are.")
app.command("deployments.cli_logs:read", help="Write the raw lines of a log to standard output.")
app.command("deployments.cli_work:process", help="Run every processor on raw logs, to their ends.")
app.command(
    "deployments.cli_work:deliver", help="Run the processors on derived logs, then deliver every mail that is due."
)
app.command("deployments.cli_contacts:contacts", name="contacts", help="The address book.")
app.command(
    "deployments.cli_status:status",
    help="Show how far each processor has come, whether it is stuck or dead, and the mails.",
)
app.command("deployments.cli_why:why", help="Show why something happened, back to the raw bytes.")
app.command("deployments.cli_why:why_not", help="Show what stands between a customer and a mail.")
app.command("deployments.cli_basket:basket", help="Show a customer's basket as it is, or as it was at any time.")
app.command("deployments.cli_brake:pause", help="Hold all mails until `afterlog resume deliver`.")
app.command("deployments.cli_brake:resume", help="Send mails again, what was held first.")
app.command(
    "deployments.cli_deliveries:deliveries", name="deliveries", help="Mails: list, resolve those in doubt, drop."
)
app.command("deployments.cli_quarantine:quarantine", name="quarantine", help="Lines that were no events: list, retry.")
app.command(
    "deployments.cli_replay:replay",
    help="Run processors again over the past, beside what is live, and show the difference.",
)
app.command(
    "deployments.cli_replay:replays", name="replays", help="What replays made: list, show, promote, discard, roll back."
)
app.command("deployments.cli_backup:backup", help="Write a backup of the database and the logs, while everything runs.")
app.command(
    "deployments.cli_backup:restore", help="Put a backup back; nothing of a log is lost, nobody is mailed twice."
)
app.command(
    "deployments.cli_archive:archive", help="Put sealed segments into the archive, and remove here what is old."
)
app.command("deployments.cli_archive:verify", help="Check every sealed byte, and name the place of whatever is wrong.")
app.command("deployments.cli_automations:automations", name="automations", help="What Prefect's server does by itself.")


@app.command
def up(*, port: Whole = 4200) -> None:
    """Run everything on this machine: Prefect's server and UI, the deployments and their runner, until Ctrl-C.

    Args:
        port: where the UI and the API listen, on 127.0.0.1.
    """
    from deployments.up import run_until_stopped  # only this command needs it

    run_until_stopped(port)


@app.command
def demo(*, once: bool = False, port: Whole | None = None) -> None:
    """Show it all on an example log: `up`, a mail server, baskets left behind, and live events until Ctrl-C.

    Args:
        once: end after everything was shown once.
        port: where the UI listens; a free port where it is left out.
    """
    if port is not None:
        check_port(port)  # a server that cannot start is waited for, and the example log written before that
    from deployments.demo import run_demo  # only this command needs it

    run_demo(once=once, port=port)


def main(arguments: list[str] | None = None) -> None:
    """Run one command and end the process: 0 done, 1 the work failed, 2 wrong usage or settings."""
    open_closed()
    steps.arm_from_environment()
    os.umask(0o077)  # whatever is made here and by what it starts is for its owner only
    for kind in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(kind) is not signal.SIG_IGN:  # nohup, say
            signal.signal(kind, _interrupt)
    sys.exit(_run(arguments))


def _run(arguments: list[str] | None) -> int:
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()  # here, where it is no news that the reader has gone
    except UsageError as error:
        say(f"afterlog: {error}")
        return 2
    except AfterlogError as error:
        say(f"afterlog: {error}")
        return error.exit_code
    except CycloptsError as error:
        extra = isinstance(error, UnusedCliTokensError)
        say(f"afterlog: {f'nothing here takes {shlex.join(error.unused_tokens or [])}' if extra else error}")
        say(f"Try: {' '.join(['afterlog', *(error.command_chain or ())])} --help")
        return 2
    except BrokenPipeError:
        give_up_output()  # whoever read us has gone, `head` say
        return 0
    except OSError as error:
        told = from_system(error)
        with suppress(OSError):  # it may be the terminal that is gone
            say(f"afterlog: {told}")
        return told.exit_code
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # what is no refusal of Prefect's keeps its traceback
        refused = from_prefect(error)
        if refused is None:
            raise
        say(f"afterlog: {refused}")
        return refused.exit_code
    return 0


def _interrupt(_signal: int, _frame: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
