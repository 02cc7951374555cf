"""Whom `ddpm-pipe serve` answers: this machine's own programs and pages, where it listens for them alone."""

from __future__ import annotations

import pytest

from pipeline.runs.serve import refusal

ANSWERED = [
    ("127.0.0.1", "127.0.0.1:8000", None),
    ("127.0.0.1", "localhost:8000", "none"),  # typed into a browser
    ("127.0.0.1", "127.0.0.1:8000", "same-origin"),  # the page's own picture
    ("127.0.0.1", "localhost:8000", "same-site"),  # a notebook's on this machine
    ("127.0.0.2", "127.0.0.2:8000", None),
    ("::1", "[::1]:8000", None),
    ("0.0.0.0", "gallery.example:8000", None),  # open to others on purpose
]
REFUSED = [
    ("127.0.0.1", "evil.example:8000", None, "Host 'evil.example'"),
    ("127.0.0.2", "evil.example:8000", None, "Host 'evil.example'"),
    ("localhost", "evil.example", None, "Host 'evil.example'"),
    ("::1", "evil.example", None, "Host 'evil.example'"),
    ("127.0.0.1", None, None, "Host ''"),
    ("127.0.0.1", "[", None, "Host ''"),
    ("127.0.0.1", "127.0.0.1.evil.example", None, "Host '127.0.0.1.evil.example'"),
    ("127.0.0.1", "127.0.0.1:8000", "cross-site", "another site"),
    ("0.0.0.0", "gallery.example:8000", "cross-site", "another site"),
]


@pytest.mark.parametrize(("host", "asked", "site"), ANSWERED)
def test_it_answers(host: str, asked: str, site: str | None) -> None:
    assert refusal(host, asked, site) is None


@pytest.mark.parametrize(("host", "asked", "site", "why"), REFUSED)
def test_it_refuses(host: str, asked: str | None, site: str | None, why: str) -> None:
    assert why in str(refusal(host, asked, site))
