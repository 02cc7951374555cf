"""Secrets: refused where they would come into a record, hidden in text that leaves.

A run's records hold exact values, because they are read back. So nothing secret may come in: `refuse_secrets` looks at settings files and
command lines before anything is spent. Text that leaves (logs, MLflow, a job's metadata, messages of libraries) passes through `redact`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.errors import UsageError

HIDDEN = "<redacted>"
DECLARED_SECRETS = (
    "DDPM_PIPE_SECRETS"  # names of variables, joined by commas, that hold secrets whatever their names say
)
LEAST_CHARACTERS = 8  # of a secret in the environment: a shorter one would be found in half of all words
LEAST_EQUAL = 12  # of a setting that is refused because it equals one: shorter ones are region names and the like

# `key` alone names many harmless things, so it counts with a companion only
_WORDS = r"(?:passw(?:or)?d|passphrase|secret|credentials?|token|(?:api|access|private|signing)[_-]?key)"
SECRET_NAME = re.compile(rf"(?i){_WORDS}")
# the last word of a setting's name announces a secret: `hub_token`, not `token_mixer`; a number is none
_SECRET_SETTING = re.compile(rf"(?i)[\w-]*{_WORDS}")
_PLAIN_VALUE = re.compile(r"(?i)[-+.\de]*|true|false|null|none")
# the full form of each kind of key, as a word of its own: a part of a path or of a longer name is none
KNOWN_SHAPES = re.compile(
    r"(?<![\w/.-])(?:"
    r"(?:AKIA|ASIA)[A-Z0-9]{16}"
    r"|hf_[A-Za-z0-9]{34}"
    r"|gh[opsur]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59}|glpat-[A-Za-z0-9_-]{20}"
    r"|sk-(?:proj-|svcacct-|ant-)[A-Za-z0-9_-]{40,}|sk-[A-Za-z0-9]{48}"
    r"|xox[abeprs]-[0-9]{8,}-[A-Za-z0-9-]{10,}|dapi[a-f0-9]{32}|AIza[A-Za-z0-9_-]{35}"
    r"|eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"
    r")(?![\w/-])"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
)
USERINFO = re.compile(r"(?<=://)[^/\s@'\"]+@")
CREDENTIALS = re.compile(r"://[^/\s@:'\"]*:[^/\s@'\"]+@|(?i:[?&](?:x-amz-signature|x-goog-signature|sig)=[^&\s]+)")
ASSIGNMENT = re.compile(
    rf"(?i)(?<![\w-])([\w-]{{0,40}}?(?:{_WORDS}|x-amz-signature)[\"']?\s*[=:]\s*[\"']?)([^\s\"'&,;}}]+)"
)


def redact(text: str) -> str:
    """Return the text with everything that is a secret by its form, its name or the environment replaced by `<redacted>`."""
    for value in environment_secrets().values():
        text = text.replace(value, HIDDEN)
    text = USERINFO.sub("", text)
    text = KNOWN_SHAPES.sub(HIDDEN, text)
    return ASSIGNMENT.sub(lambda match: match[0] if _PLAIN_VALUE.fullmatch(match[2]) else match[1] + HIDDEN, text)


def redact_value(name: str, value: str) -> str:
    """Return a named value as it may leave: hidden where the end of its name announces a secret, else redacted as text."""
    announced = _SECRET_SETTING.fullmatch(name.rpartition(".")[2]) and not _PLAIN_VALUE.fullmatch(value)
    return HIDDEN if announced else redact(value)


def refuse_secrets(content: Any, where: str) -> None:
    """Refuse nested plain data of a user's (settings, words of a command line) in which a secret stands.

    Secrets are: credentials inside an address, a key by its full form, and a value of at least 12 characters that equals a variable of
    the environment which is named like a secret or declared one. Raises UsageError, which does not repeat the value.
    """
    secrets = {value: name for name, value in environment_secrets().items() if len(value) >= LEAST_EQUAL}
    for name, value in _strings(content):
        at = f"{where}: {name}" if name else where
        if CREDENTIALS.search(value):
            raise UsageError(
                f"{at}: the address holds credentials, and runs are recorded with their settings; leave them out and set the variables "
                "of its service, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (for a cluster: their names in forward_env)"
            )
        if KNOWN_SHAPES.search(value):
            raise UsageError(
                f"{at}: the value has the form of a secret key, and runs are recorded with their settings; put it into a variable of "
                "the environment (for a cluster: its name in forward_env)"
            )
        if variable := secrets.get(value) or secrets.get(value.partition("=")[2]):
            raise UsageError(
                f"{at}: the value is that of the variable {variable}, which is secret, and runs are recorded with their settings; choose "
                f"another value, or change {variable}"
            )


def _strings(content: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted name, string) for all strings of nested plain data."""
    if isinstance(content, str):
        yield name, content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _strings(value, f"{name}.{key}" if name else str(key))
    elif isinstance(content, list | tuple):
        for value in content:
            yield from _strings(value, name)


def public_uri(uri: str) -> str:
    """Return an address without user name and password."""
    return USERINFO.sub("", uri)


_DATABASE_SAYS = re.compile(r"\((?:\w+\.)+\w*Error\) ")


def one_line(error: Exception) -> str:
    """Return what an error says in a line, without secrets and short enough for a terminal."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    # SQLAlchemy puts what its session did above what the database said
    text = next((line for line in lines if _DATABASE_SAYS.match(line)), lines[0])
    _, wrapped, cause = text.rpartition("(Caused by ")  # of a failed HTTP request only the cause is of interest
    if wrapped:
        kind, _, detail = cause.partition("(")
        text = f"{kind}: {detail.rpartition(': ')[2]}".rstrip("\"')")
    return redact(text)[:300]


def announces_secret(name: str, value: str) -> bool:
    """Whether a variable holds a secret by its name; not where it says where one is kept, nor where it is a plain word."""
    return bool(
        SECRET_NAME.search(name)
        and not name.endswith(("_PATH", "_FILE", "_DIR"))
        and len(value) >= LEAST_CHARACTERS
        and not value.isalpha()
    )


def environment_secrets() -> dict[str, str]:
    """Return the environment variables that hold secrets, by their names or because a profile says so."""
    declared = set(os.environ.get(DECLARED_SECRETS, "").split(","))
    return {
        name: value
        for name, value in os.environ.items()
        if name != DECLARED_SECRETS
        and (announces_secret(name, value) or (len(value) >= LEAST_CHARACTERS and name in declared))
    }
