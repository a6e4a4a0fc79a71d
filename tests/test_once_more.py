"""What a person decided after a backup was put back is no older than it: a mail to be sent once more is sent."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from storage import steps
from storage.restore import mark_restored
from storage.store import Store
from tasks.settle import resolve
from tests import test_deliver
from tests.smtp_server import SmtpServer
from tests.test_deliver import deliver, row, run_of


def test_a_decision_that_only_the_log_knows_is_carried_out_where_it_came_after_the_restore(
    make_store: Callable[..., Store],
) -> None:
    def die(step: str) -> None:
        if step == "outcome-logged":
            raise OSError("died")

    with SmtpServer() as server:
        store = make_store(mail_url=server.url)
        mark_restored(store.database, store, run_of(store).topology.derived_logs())
        mail = test_deliver.TestPermanentAndUnknown()._in_doubt(store)
        steps.arm(die)
        try:
            with pytest.raises(OSError, match="died"):
                resolve(store, mail.event_id, sent=False, again=True)
        finally:
            steps.arm(None)
        assert row(store)["state"] == "UNKNOWN"
        assert deliver(store).states == {"SENT": 1}
        assert len(server.inbox) == 1
