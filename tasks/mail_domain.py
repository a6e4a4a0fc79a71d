"""A mail's domain beyond ASCII, `münchen.de`, as every mail server takes it: `xn--mnchen-3ya.de`."""

from __future__ import annotations

import unicodedata
from email.headerregistry import Address


def as_ascii(domain: str) -> str:
    """`domain` in ASCII, where it has one such form and that means the same; else as it is, for a server that takes more.

    Python knows the older rules (2003), by which `straße.de` would be `strasse.de`, somebody else's: what does not come back as
    it was is left alone.
    """
    if domain.isascii():
        return domain
    wanted = unicodedata.normalize("NFC", domain).lower()
    try:
        found = wanted.encode("idna")
        same = found.decode("idna") == wanted
    except UnicodeError:  # a label that is too long, say
        return domain
    return found.decode() if same and len(found) <= 253 else domain


def on_the_wire(address: Address) -> Address:
    """An address with a domain that every server takes; what else is beyond ASCII only some do, and those take any domain."""
    domain = as_ascii(address.domain) if address.username.isascii() else address.domain
    return Address(address.display_name, address.username, domain)
