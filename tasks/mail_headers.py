"""How the headers of a mail are written: as the standard library does, but for those where that writes another thing than was meant.

Its folding of a long header leaves a name's quotes out, so that a comma in it begins another sender; and it loses the space
between two words that it encodes one by one.
"""

from __future__ import annotations

import functools
import re
from email.header import Header
from email.headerregistry import (
    BaseHeader,
    HeaderRegistry,
    UniqueSingleAddressHeader,
    UniqueUnstructuredHeader,
    UnstructuredHeader,
)
from email.policy import SMTP, Policy

EVENT_ID_HEADER = "X-Afterlog-Event-Id"
_LONGEST = 75  # characters of a line with encoded words
_WORDS = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+(?: [A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+)*")
"""What a name may be without quotes."""


class _OneLineHeader(UnstructuredHeader, BaseHeader):
    """A header on one line, as folding turns a long word into encoded words that nobody can search for."""

    def fold(self, *, policy: Policy) -> str:
        return f"{self.name}: {self}{policy.linesep}"


class _Text(UniqueUnstructuredHeader, BaseHeader):  # type: ignore[misc]  # so says its documentation
    """A text for people: as it is where it is ASCII, else encoded as one, spaces and all."""

    def fold(self, *, policy: Policy) -> str:
        return f"{self.name}: {_encoded(str(self), self.name, policy)}{policy.linesep}"


class _Sender(UniqueSingleAddressHeader, BaseHeader):  # type: ignore[misc]  # likewise
    """One address, its name in quotes or encoded."""

    def fold(self, *, policy: Policy) -> str:
        name, address = self.address.display_name, self.address.addr_spec
        if not name:
            return f"{self.name}: {address}{policy.linesep}"
        shown = name if _WORDS.fullmatch(name) else '"' + re.sub(r'(["\\])', r"\\\1", name) + '"'
        if not name.isascii():
            shown = _encoded(name, self.name, policy)
        fits = len(f"{self.name}: {shown}".rpartition(policy.linesep)[2]) + len(address) < _LONGEST
        return f"{self.name}: {shown}{'' if fits else policy.linesep} <{address}>{policy.linesep}"


def _encoded(text: str, header: str, policy: Policy) -> str:
    """`text` as it is where it is ASCII, else in encoded words, a line each, behind the header's name."""
    return text if text.isascii() else Header(text, "utf-8", _LONGEST, header).encode(linesep=policy.linesep)


class _Registry(HeaderRegistry):
    """The standard library's, which makes a class for each header of each mail: here once for each name."""

    @functools.cache  # noqa: B019  # there is one registry
    def __getitem__(self, name: str) -> type[BaseHeader]:
        return super().__getitem__(name)


@functools.cache
def header_policy() -> Policy:
    """The policy of every message that is composed."""
    registry = _Registry()
    registry.map_to_type(EVENT_ID_HEADER, _OneLineHeader)
    registry.map_to_type("Message-ID", _OneLineHeader)
    registry.map_to_type("Subject", _Text)
    registry.map_to_type("From", _Sender)
    return SMTP.clone(header_factory=registry)
