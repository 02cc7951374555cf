"""Secrets never reach a record: run folders, spools, MLflow's parameters, tags and text files pass through here.

Three nets, each alone incomplete: known shapes (cloud and forge tokens, passwords in addresses), names that announce a
secret (`api_key`, `password`), and strings that look random. The values of environment variables with such names are
removed wherever they appear, but for what the program reads back from a record (`READ_BACK`): there they are refused. Long
hexadecimal strings stay: fingerprints and hashes are what a record is for.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from pipeline.errors import UsageError

HIDDEN = "<redacted>"
DECLARED_SECRETS = (
    "DDPM_PIPE_SECRETS"  # names of variables, joined by commas, that hold secrets whatever their names say
)
READ_BACK = ("path", "fingerprint", "storage")  # names in a record without whose values a run cannot be worked with
LEAST_CHARACTERS = 8  # of a secret in the environment: a shorter one would be found in half of all words

# `key` alone names many harmless things, so it counts with a companion only
SECRET_NAME = re.compile(r"(?i)passw(or)?d|passphrase|secret|credential|token|(api|access|private|signing)[_-]?key")
KNOWN_SHAPES = re.compile(
    r"(?:AKIA|ASIA)[A-Z0-9]{12,}"
    r"|hf_[A-Za-z0-9]{16,}"
    r"|gh[opsur]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}|glpat-[A-Za-z0-9_-]{16,}"
    r"|sk-[A-Za-z0-9_-]{20,}|xox[abeprs]-[A-Za-z0-9-]{10,}|dapi[a-f0-9]{32}|AIza[A-Za-z0-9_-]{30,}"
    r"|eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}(?:\.[A-Za-z0-9_-]*)?"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
)
USERINFO = re.compile(r"(?<=://)[^/\s@'\"]+@")
ASSIGNMENT = re.compile(
    r"(?i)(?<![\w-])([\w-]{0,40}?(?:passw(?:or)?d|passphrase|secret|credential|token|(?:api|access|private|signing)[_-]?key"
    r"|x-amz-signature)[\w-]{0,40}"
    r"[\"']?\s*[=:]\s*[\"']?)([^\s\"'&,;}]+)"
)
# words and small numbers, such as a region, a bucket or a user
PLAIN_NAME = re.compile(r"[a-z]+[0-9]{0,2}(?:[-_.][a-z]*[0-9]{0,2})*")
# longer ones are pictures in base64, not secrets
RANDOM_CANDIDATE = re.compile(r"(?<![A-Za-z0-9+/=_-])[A-Za-z0-9+/=_-]{20,512}(?![A-Za-z0-9+/=_-])")


def redact(text: str) -> str:
    """Return the text with everything that looks like a secret replaced by `<redacted>`."""
    for value in environment_secrets().values():
        text = text.replace(value, HIDDEN)
    return _without_shapes(text)


def _without_shapes(text: str) -> str:
    text = USERINFO.sub("", text)
    text = KNOWN_SHAPES.sub(HIDDEN, text)
    text = ASSIGNMENT.sub(lambda match: match[1] + HIDDEN, text)
    return RANDOM_CANDIDATE.sub(lambda match: HIDDEN if _looks_random(match[0]) else match[0], text)


def redact_value(name: str, value: str) -> str:
    """Return a named value ready to be recorded: hidden where its name announces a secret, else redacted as text."""
    last = name.rsplit(".", 1)[-1]
    return HIDDEN if value and value != "None" and SECRET_NAME.search(last) else redact(value)


def redact_tree(content: Any, name: str = "") -> Any:
    """Return nested plain data (mappings, lists, scalars) with every string redacted; numbers stay as they are.

    UsageError where a secret of the environment stands in a value that has to be read back.
    """
    if isinstance(content, Mapping):
        return {key: redact_tree(value, str(key)) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [redact_tree(value, name) for value in content]
    if not isinstance(content, str):
        return content
    return _read_back(name, content) if name in READ_BACK else redact_value(name, content)


def _read_back(name: str, value: str) -> str:
    """Return a value that the program works by later, in which nothing may be hidden that only looks like a secret of the environment."""
    value = _without_shapes(value)
    for variable, secret in environment_secrets().items():
        if secret in value and not _is_plain_name(variable, secret):
            raise UsageError(
                f"{name}: holds the value of the variable {variable}, which is secret, and runs are recorded with it; name the place "
                f"otherwise, or change {variable}"
            )
    return value


def public_uri(uri: str) -> str:
    """Return an address without user name and password."""
    return USERINFO.sub("", uri)


def one_line(error: Exception) -> str:
    """Return what an error says in a line, without secrets and short enough for a terminal."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
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
        if announces_secret(name, value) or (len(value) >= LEAST_CHARACTERS and name in declared)
    }


def _is_plain_name(variable: str, value: str) -> bool:
    """Whether a variable that was declared secret holds what is none, to all appearance: a region, a user, the id of a key."""
    return bool(PLAIN_NAME.fullmatch(value)) and (variable.endswith("_ID") or not SECRET_NAME.search(variable))


def _looks_random(word: str) -> bool:
    """Whether a word mixes upper case, lower case and digits as only generated tokens do.

    In random base64 about six of ten neighbours differ in kind (letter case, digit); in names and paths fewer than
    three do.
    """
    kinds = ["u" if c.isupper() else "l" if c.islower() else "d" if c.isdigit() else "" for c in word]
    kinds = [kind for kind in kinds if kind]
    if not {"u", "l", "d"} <= set(kinds):
        return False
    changes = sum(a != b for a, b in pairwise(kinds))
    entropy = -sum(n / len(word) * math.log2(n / len(word)) for n in Counter(word).values())
    return changes >= 0.45 * len(kinds) and entropy > 3.3
