"""Reading YAML and checking it against a schema, with every complaint in one line that names the field and the remedy."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Hashable
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator

from pipeline.errors import UsageError, nearest
from pipeline.redaction import refuse_secrets

MAX_BYTES = 1 << 20
MOST_SHOWN = 200  # characters of a wrong value in a message
TEXT = ".sampling.labels"  # class names: YAML would read 010 as 8, and no as false


class Section(BaseModel):
    """A frozen group of settings in which unknown keys and numbers that are not finite are refused.

    The string below a field describes it in one line (settings_page.py).
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, content: Any) -> Any:
        known = list(cls.model_fields)
        forbidden = cls.model_config["extra"] == "forbid"  # other programs' files may hold more
        for key in content if forbidden and isinstance(content, dict) else ():
            if key not in known:
                raise ValueError(f"unknown key {key!r}{nearest(str(key), known)}; known here: {', '.join(known)}")
        return content


Place = Annotated[str, AfterValidator(os.path.expanduser)]  # a path or an address; `~` is the user's home directory

SectionT = TypeVar("SectionT", bound=Section)


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and aliases (a few of which can expand to gigabytes), and reads 1e-4 as a number."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.constructor.ConstructorError(
                None, None, "aliases (*name) are not supported; write the value out", mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[Hashable, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "keys must be plain words", key_node.start_mark)
            if key in seen:
                problem = f"key {key!r} appears twice (first on line {seen[key]}); keep one"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen[key] = line
        return super().construct_mapping(node, deep)


# YAML 1.1 takes 1e-4 for a word, since it has no point; every reader of a learning rate takes it for a number
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str, where: str, key: str = "") -> Any:
    """Return the plain data of one YAML document, the value of the setting `key` if given; `where` names it in errors (UsageError)."""
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _keep_text(node, key)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UsageError(f"{where}, line {line}: {error.problem or 'not valid YAML'}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not valid YAML: {' '.join(str(error).split())[:200]}") from None
    finally:
        if loader is not None:
            loader.dispose()


class _Dumper(yaml.SafeDumper):
    """A line for each setting, and a list on one line."""


_Dumper.add_representer(
    list, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)
)


def to_yaml(content: dict[str, Any]) -> str:
    """Return settings as people write them in a file."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, default_flow_style=False, width=110, allow_unicode=True)


def is_text(key: str) -> bool:
    """Whether a setting, by its dotted name, is text however it is spelled."""
    return f".{key}".endswith(TEXT)


def parse_setting(key: str, text: str, where: str) -> Any:
    """Return the value that is typed for a setting: read as YAML, but of a setting that is text as it stands, unless quoted."""
    text = text.strip()
    return text if is_text(key) and text[:1] not in ("'", '"', "[", "{") else parse_yaml(text, where, key)


def _keep_text(node: yaml.Node, key: str) -> None:
    """Make the values of settings that are text strings, wherever they stand in a document: alone, in lists, in an axis of a sweep."""
    if isinstance(node, yaml.ScalarNode) and is_text(key):
        node.tag = "tag:yaml.org,2002:str"
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _keep_text(item, key)
    elif isinstance(node, yaml.MappingNode):
        for key_node, value in node.value:
            inner = key_node.value if isinstance(key_node, yaml.ScalarNode) else ""
            _keep_text(value, key if is_text(key) else f"{key}.{inner}")


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds (an empty file is an empty mapping)."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML file") from None
    if len(data) > MAX_BYTES:
        raise UsageError(
            f"{path}: {len(data)} bytes is too large for a settings file (at most {MAX_BYTES}); is it the right file?"
        )
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not a text file in UTF-8; give the path of a YAML file") from None
    content = parse_yaml(text, str(path))
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(
            f"{path}: expected a mapping of settings, got {type(content).__name__}; write lines such as 'seed: 0'"
        )
    refuse_secrets(content, str(path))
    return content


def parse_override(assignment: str) -> tuple[str, Any]:
    """Return key and value of one `-s dotted.key=value`; the value is read as YAML."""
    key, equals, text = assignment.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UsageError(f"-s {assignment!r}: expected key=value, such as -s training.steps=1000")
    return key, parse_setting(key, text, f"-s {key}")


def set_value(content: dict[str, Any], key: str, value: Any) -> None:
    """Put a value at a dotted key of nested settings."""
    *parents, last = key.split(".")
    node = content
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise UsageError(f"{key}: {parent!r} is a single value, not a group of settings")
        node = child
    node[last] = value


def validate(schema: type[SectionT], content: dict[str, Any], where: str) -> SectionT:
    """Return the settings as a checked object; the first fault becomes a UsageError naming field, value and remedy."""
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        raise UsageError(f"{where}: {_explain(error)}") from None


def _explain(error: ValidationError) -> str:
    """Return one line for the first fault, unknown keys before others (a misspelt key often causes the rest)."""
    faults = sorted(error.errors(include_url=False), key=lambda e: "unknown key" not in e["msg"])
    setting = tuple(takewhile(_is_named, faults[0]["loc"]))
    of_setting = [fault for fault in faults if fault["loc"][: len(setting)] == setting]
    # each member of a union has a fault of its own: the one that got furthest is of the form that was written
    fault = max(of_setting, key=lambda fault: len(fault["loc"]))
    field = ".".join(str(part) for part in fault["loc"] if _is_named(part))
    others = len(faults) - len(of_setting)
    rest = f" (and {others} more)" if others else ""
    if fault["type"] == "missing":
        return f"{field} is missing; it has no default{rest}"
    got = fault.get("input")
    if fault["type"] == "value_error":
        return f"{field + ': ' if field else ''}{fault['msg'].removeprefix('Value error, ')}{rest}"
    shown = "a number that is not finite" if isinstance(got, float) and not math.isfinite(got) else repr(got)
    shown = shown if len(shown) <= MOST_SHOWN else f"{shown[:MOST_SHOWN]}..."
    return f"{field}: got {shown}, expected {_expected(fault['type'], fault.get('ctx', {}))}{rest}"


def _is_named(part: int | str) -> bool:
    """Whether a part of a fault's location is the name or place of a setting, not a tag that pydantic gives to the member of a union."""
    return isinstance(part, int) or not re.fullmatch(r"(constrained-)?(int|float|str)|.*[)\]]", part)


def _expected(kind: str, context: dict[str, Any]) -> str:
    """Return what a setting must be, by the kind of pydantic's fault and its figures."""
    compared = {"greater_than": "above {gt}", "greater_than_equal": "at least {ge}", "less_than": "below {lt}"}
    compared |= {"less_than_equal": "at most {le}", "too_short": "at least {min_length} in the list"}
    compared |= {
        "literal_error": "{expected}",
        "enum": "{expected}",
        "string_too_short": "at least {min_length} characters",
    }
    compared |= {"too_long": "{max_length} in the list", "string_pattern_mismatch": "text of the form {pattern}"}
    if kind in compared:
        return compared[kind].format(**context)
    words = {"int": "a whole number", "float": "a number", "finite": "a finite number", "bool": "true or false"}
    words |= {"string": "text", "tuple": "a list, such as [1, 2]", "list": "a list, such as [1, 2]"}
    return words.get(kind.partition("_")[0], "a group of settings")


def flatten(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one level of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
