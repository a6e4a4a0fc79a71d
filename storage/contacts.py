"""The address book: who is reached where, and who does not want to be."""

from __future__ import annotations

import csv
import difflib
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import sqlalchemy as sa

from storage.database import Database
from storage.errors import AfterlogError, UsageError
from storage.tables import Contact

COLUMNS = ("type", "id", "email", "unsubscribed")
_SAID = {"1": True, "true": True, "yes": True, "y": True, "0": False, "false": False, "no": False, "n": False, "": None}
_UPSERT = sa.text(
    "INSERT INTO contact (type, id, email, unsubscribed) VALUES (:type, :id, :email, COALESCE(CAST(:unsubscribed AS BOOLEAN), FALSE)) "
    "ON CONFLICT (type, id) DO UPDATE SET email = excluded.email, "
    "unsubscribed = COALESCE(CAST(:unsubscribed AS BOOLEAN), contact.unsubscribed)"
)


class Entry(NamedTuple):
    """One line of the address book; `unsubscribed` is None where a file does not say: whoever was stays so."""

    type: str
    id: str
    email: str
    unsubscribed: bool | None


def read_contacts(path: Path, check: Callable[[str], str] = str) -> list[Entry]:
    """The entries of a CSV file (commas, semicolons or tabs) with the columns type, id, email and unsubscribed; `check` gives the address in a text, or raises AfterlogError.

    Raises:
        UsageError: a column is missing or a line cannot be used; nothing of the file was taken.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            names = file.readline()
            # What a spreadsheet puts between cells depends on its language. A pipe cannot be read again from its beginning.
            rows = csv.DictReader(chain([names], file), strict=True, delimiter=max(",;\t", key=names.count))
            rows.fieldnames = _columns(rows.fieldnames or [], str(path))
            entries = [_entry(row, check, f"{path}, line {rows.line_num}") for row in rows]
    except OSError as error:
        raise UsageError(f"cannot read the file: {error.strerror}", where=str(path)) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(
            f"no CSV in UTF-8: {error}", where=str(path), do="Save it as CSV UTF-8, as spreadsheets call it"
        ) from error
    _check_once(entries, str(path))
    return entries


def _check_once(entries: Iterable[Entry], where: str) -> None:
    """Make sure that nobody is there twice: which of the two addresses holds, nobody could tell."""
    seen: dict[tuple[str, str], Entry] = {}
    for entry in entries:
        other = seen.setdefault((entry.type, entry.id), entry)
        if other != entry:
            raise UsageError(
                f"{entry.type} {entry.id} is there twice, with another email or another `unsubscribed`", where=where,
                do="Leave the one that holds",
            )  # fmt: skip


def save_contacts(database: Database, entries: Iterable[Entry]) -> int:
    """Add entries, or replace those of the same type and id; gives how many."""
    rows = [entry._asdict() for entry in entries]
    if rows:
        with database.write() as connection:
            connection.execute(_UPSERT, rows)
    return len(rows)


def list_contacts(database: Database) -> list[Entry]:
    """The whole address book, by type and id."""
    wanted = sa.select(Contact.type, Contact.id, Contact.email, Contact.unsubscribed).order_by(Contact.type, Contact.id)  # type: ignore[call-overload]  # SQLModel's columns are plain values to the types
    with database.read() as connection:
        return [Entry(*row) for row in connection.execute(wanted)]


def forget_contact(database: Database, kind: str, ident: str) -> bool:
    """Delete an entry; says whether there was one."""
    gone = sa.delete(Contact).where(Contact.type == kind, Contact.id == ident)  # type: ignore[arg-type]  # SQLModel's columns are plain values to the types
    with database.write() as connection:
        return connection.execute(gone).rowcount > 0


def _columns(found: Sequence[str], where: str) -> list[str]:
    """The names of the columns, in small letters; ours all there and each once, and none that was meant to be one of them.

    A misspelt one would be passed over without a word, and whoever has unsubscribed would be mailed.
    """
    names, said = [name.strip().casefold() for name in found], ",".join(found) or "an empty file"
    for name in COLUMNS:
        if name in COLUMNS[:3] and name not in names:
            raise UsageError(f"no column {name!r}", where=where, found=said, expected=",".join(COLUMNS))
        if names.count(name) > 1:
            raise UsageError(f"the column {name!r} is there twice", where=where, found=said, do="Leave one of them")
    for name in names:
        near = difflib.get_close_matches(name, COLUMNS[3:], cutoff=0.75)
        if near and near[0] not in names:
            raise UsageError(
                f"no column {near[0]!r}, but one that looks like it",
                where=where,
                found=said,
                expected=",".join(COLUMNS),
                do=f"Call it {near[0]!r} if it is meant, else leave it out",
            )
    return names


def _entry(row: dict[str, str | None], check: Callable[[str], str], where: str) -> Entry:
    if None in row:  # where DictReader puts what is beyond the columns
        raise UsageError(
            "more cells than there are columns", where=where, do="Put a text that has a comma in it into quotes"
        )
    kind, ident, email = ((row[name] or "").strip() for name in COLUMNS[:3])
    if not kind or not ident or not email:
        raise UsageError("an entry without type, id or email", where=where, expected=",".join(COLUMNS))
    try:
        email = check(email)  # without the name that may stand before it: who compares addresses wants nothing else
    except AfterlogError as error:
        raise UsageError(f"no mail can reach this email: {error}", where=where) from error
    said = (row.get("unsubscribed") or "").strip().lower()
    if said not in _SAID:
        raise UsageError("unsubscribed is neither yes nor no", where=where, found=repr(said), expected="true or false")
    return Entry(kind, ident, email, _SAID[said])
