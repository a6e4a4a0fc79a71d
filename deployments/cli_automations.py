"""`afterlog automations`: what Prefect's server does by itself, applied as code."""

from __future__ import annotations

import asyncio
import os

from cyclopts import App

from deployments.console import say
from deployments.server import client_environment, find_server
from storage.errors import AfterlogError
from storage.settings import load_settings
from storage.store import Store

automations = App(name="automations", help="What Prefect's server does by itself: crashed runs, alerts.")


@automations.command
def apply() -> None:
    """Make the automations on the server what they should be; `afterlog up` does so at each start.

    Again after the notification block `afterlog-alerts` was made, or a setting was changed.
    """
    settings = load_settings()
    Store(settings)  # HOME is made, and Prefect's folder goes into it
    url = find_server(settings)
    if url is None:
        raise AfterlogError("no Prefect server is set or found", do="Start `afterlog up`, or set PREFECT_API_URL")
    os.environ.update(client_environment(settings, url))
    from deployments.automations import apply_automations  # after the environment: Prefect reads it at import

    for line in asyncio.run(apply_automations(settings)) or ["nothing to change"]:
        say(line)
