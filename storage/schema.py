"""Which schema this program works with, for those who look before they import what it takes to migrate."""

from __future__ import annotations

HEAD = "0006"  # the newest migration; a test holds it against the scripts
