"""Secrets: refused in settings and command lines, redacted in exported text.

A run's records have exact values, because they are read back. So `refuse_secrets` checks settings files and command lines before work
starts. Exported text (logs, MLflow, a job's metadata, messages of libraries) passes through `redact`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.errors import UsageError

HIDDEN = "<redacted>"
DECLARED_SECRETS = "DDPM_PIPE_SECRETS"  # names of further secret variables, joined by commas
LEAST_CHARACTERS = 8  # of a secret in the environment; shorter ones occur in ordinary words
LEAST_EQUAL = 12  # of a setting that is refused because it equals one; shorter ones are region names and the like

# `key` counts only with a companion, since many harmless names contain it
_WORDS = r"(?:passw(?:or)?d|passphrase|secret|credentials?|token|(?:api|access|private|signing)[_-]?key)"
SECRET_NAME = re.compile(rf"(?i){_WORDS}|webhook")
# the last word of a setting's name marks a secret: `hub_token`, not `token_mixer`; numbers are not secrets
_SECRET_SETTING = re.compile(rf"(?i)[\w-]*{_WORDS}")
_PLAIN_VALUE = re.compile(r"(?i)[-+.\de]*|true|false|null|none")
# the full form of each kind of key, as a whole word, not as part of a path or longer name
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
    """Return the text with secrets, known by form, name or environment, replaced by `<redacted>`; names that are not UTF-8 are escaped."""
    text = text.encode(errors="backslashreplace").decode()
    for value in environment_secrets().values():
        text = text.replace(value, HIDDEN)
    text = USERINFO.sub("", text)
    text = KNOWN_SHAPES.sub(HIDDEN, text)
    return ASSIGNMENT.sub(lambda match: match[0] if _PLAIN_VALUE.fullmatch(match[2]) else match[1] + HIDDEN, text)


def redact_value(name: str, value: str) -> str:
    """Return a named value for export: hidden if the end of its name marks a secret, else redacted as text."""
    announced = _SECRET_SETTING.fullmatch(name.rpartition(".")[2]) and not _PLAIN_VALUE.fullmatch(value)
    return HIDDEN if announced else redact(value)


def refuse_secrets(content: Any, where: str) -> None:
    """Raise UsageError if nested plain data (settings, words of a command line) contains a secret; the message does not repeat it.

    Secrets are credentials inside an address, keys by their full form, and values of at least 12 characters that equal an environment
    variable which is named like a secret or declared as one.
    """
    secrets = {value: name for name, value in environment_secrets().items() if len(value) >= LEAST_EQUAL}
    for name, value in _strings(content):
        at = f"{where}: {name}" if name else where
        if CREDENTIALS.search(value):
            raise UsageError(
                f"{at}: the address contains credentials, and runs are recorded with their settings; leave them out and set the variables "
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
    """Return an error's message in one short line, without secrets."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    # SQLAlchemy puts a message about its session above that of the database
    text = next((line for line in lines if _DATABASE_SAYS.match(line)), lines[0])
    _, wrapped, cause = text.rpartition("(Caused by ")  # of a failed HTTP request, keep only the cause
    if wrapped:
        kind, _, detail = cause.partition("(")
        text = f"{kind}: {detail.rpartition(': ')[2]}".rstrip("\"')")
    return redact(text)[:300]


def announces_secret(name: str, value: str) -> bool:
    """Whether a variable is a secret by its name; not if it names a path, or its value is a plain word."""
    return bool(
        SECRET_NAME.search(name)
        and not name.endswith(("_PATH", "_FILE", "_DIR"))
        and len(value) >= LEAST_CHARACTERS
        and not value.isalpha()
    )


def environment_secrets() -> dict[str, str]:
    """Return the secret environment variables, by name or because a profile declares them."""
    declared = set(os.environ.get(DECLARED_SECRETS, "").split(","))
    return {
        name: value
        for name, value in os.environ.items()
        if name != DECLARED_SECRETS
        and (announces_secret(name, value) or (len(value) >= LEAST_CHARACTERS and name in declared))
    }
