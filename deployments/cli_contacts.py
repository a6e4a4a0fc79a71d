"""`afterlog contacts`: the address book."""

from __future__ import annotations

from pathlib import Path

from cyclopts import App

from deployments.console import say, show_table
from storage.contacts import forget_contact, list_contacts, read_contacts, save_contacts
from storage.errors import UsageError
from storage.settings import load_settings
from storage.store import Store

contacts = App(name="contacts", help="The address book: who is reached where, and who does not want to be.")


@contacts.command(name="import")
def import_(file: Path) -> None:
    """Add the entries of a CSV file with the columns type,id,email,unsubscribed, or replace those there are.

    A line that cannot be used, its email no address say, is named with its number, and then nothing of the file is taken.

    Args:
        file: the CSV file, in UTF-8, its first line the columns' names.
    """
    from tasks.mail import parse_address  # it composes mails too, and takes as long to load as most commands

    store = Store(load_settings())
    say(f"{save_contacts(store.database, read_contacts(file, parse_address))} contacts imported")


@contacts.command(name="list")
def list_() -> None:
    """Show the address book."""
    entries = list_contacts(Store(load_settings()).database)
    show_table("Contacts", ("type", "id", "email", "unsubscribed"), [(*e[:3], str(e[3]).lower()) for e in entries])


@contacts.command
def forget(type: str, id: str) -> None:
    """Delete an entry: nobody knows that address any more.

    Args:
        type: CUSTOMER, say.
        id: whose entry.
    """
    if not forget_contact(Store(load_settings()).database, type, id):
        raise UsageError("no such contact", found=f"{type} {id}", do="See: afterlog contacts list")
    say(f"{type} {id} is forgotten")
