"""What a server refuses: this one mail, or whoever sends it, which would be every mail.

Most servers tell of a sender that they do not want, or of a relay that they are not, only when they hear of the first
recipient. The reply's first number is then the same as of a mailbox that is not there; its enhanced code (RFC 3463) is not.
"""

from __future__ import annotations

import re

_AUTHENTICATION = {530, 534, 535, 538}  # of the session: another login cures them for every message
_TOO_LARGE = 552
_ENHANCED = re.compile(rb"(?:^|#)5\.(\d{1,3})\.(\d{1,3})(?!\d)")
_SENDER = {(1, 7), (1, 8)}  # its address is none, or its domain is not there
_PROTOCOL, _POLICY = 5, 7
_NOT_AUTHENTIC = range(
    20, 28
)  # 5.7.20 to 5.7.27: SPF, DKIM, reverse DNS (RFC 7372), a domain that takes no mail (RFC 7505)


def is_for_good(step: str, code: int, text: bytes) -> bool:
    """Whether a refusal is of this one mail, at whatever time it is tried again; `step` is MAIL, RCPT, DATA, or else the message.

    What is refused of the sender, or by policy before the message was seen, costs none of them: they wait until somebody has
    mended it, or are too old.
    """
    if code // 100 != 5 or code in _AUTHENTICATION:
        return False
    if step == "MAIL":
        return code == _TOO_LARGE
    found = _ENHANCED.search(text)
    subject, detail = (int(found[1]), int(found[2])) if found else (0, 0)
    if step in ("RCPT", "DATA"):
        return (subject, detail) not in _SENDER and subject not in (_PROTOCOL, _POLICY)
    return not (subject == _POLICY and detail in _NOT_AUTHENTIC)
