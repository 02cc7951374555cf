"""Settings as people read them: docs/settings.md, JSON schemas for editors, and the file that `ddpm-pipe init` writes.

All are made from the schema classes. `python -m pipeline.config.settings_page` writes the files of docs/ anew.
"""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from textwrap import indent
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from pipeline.config import presets
from pipeline.config.cluster_profile import Profile
from pipeline.config.experiment import Experiment, load_experiment, read_by
from pipeline.config.yaml_files import Section, to_yaml
from pipeline.errors import UsageError
from pipeline.storage.durable import write_atomically
from pipeline.storage.next_command import typeable

DOCS = presets.PACKAGE.parent / "docs"  # of a checkout
EXPERIMENT_SCHEMA = "experiment.schema.json"
PROFILE_SCHEMA = "profile.schema.json"
BASE = {
    "type": "string",
    "default": None,
    "description": "A preset or a file whose settings apply where this one names none.",
}
HEAD = f"""\
# Settings

Made from the program's schema by `python -m pipeline.config.settings_page`; a test compares them.

`ddpm-pipe init [PRESET]` writes an experiment file with every setting and its description. A file may name less: the rest is as below, or
as in its `base`. `-s key=value` overrides one setting, such as `-s training.steps=1000`. Unknown keys are refused with the nearest known
name. What goes together is in [modes.md](modes.md).

Editors complete and check these files with the YAML language server and a schema, [{EXPERIMENT_SCHEMA}]({EXPERIMENT_SCHEMA}) or
[{PROFILE_SCHEMA}]({PROFILE_SCHEMA}). The first line of a file names it; `init` writes that line inside a checkout:

```yaml
# yaml-language-server: $schema=../docs/{EXPERIMENT_SCHEMA}
```
"""
Fields = dict[str, dict[str, Any]]


class _Untitled(GenerateJsonSchema):
    """Schemas without a title for each field, which would only repeat its name."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def schema_of(settings: type[Section]) -> dict[str, Any]:
    """Return the JSON schema of an experiment file or a profile."""
    schema = settings.model_json_schema(schema_generator=_Untitled)
    if settings is Experiment:
        schema["properties"] = {"base": BASE} | schema["properties"]
    return schema


def write_experiment(preset: str, folder: Path) -> Path:
    """Write a preset's experiment with every setting, commented, into a folder, and return the file's path.

    UsageError if the file exists, or there is no such preset.
    """
    found = presets.find("experiments", preset)
    path = folder / f"{found.stem}.yaml"
    if os.path.lexists(path):
        train = typeable(f"train {shlex.quote(path.name)}")
        raise UsageError(
            f"{path}: got a name that is taken, expected a new file. Train with it ({train}), or rename it"
        )
    head = f"# {found.stem}: every setting, with what it means, which values it takes, and its default if a file does not name it.\n"
    schema = DOCS / EXPERIMENT_SCHEMA
    if schema.is_file() and folder.is_relative_to(DOCS.parent):
        head = f"# yaml-language-server: $schema={os.path.relpath(schema, folder)}\n{head}"
    write_atomically(path, (head + _commented(load_experiment(found))).encode())
    return path


def _commented(experiment: Experiment) -> str:
    """Return the settings that the experiment's type of network reads, each below its description."""
    content, schema, kind = experiment.to_dict(), schema_of(Experiment), experiment.model.type
    read = read_by(kind)
    read["model"] |= {"type", "arguments"} if ":" in kind else {"type"}
    text = ""
    for name, about, fields in _sections(schema):
        values = content[name] if name else content
        known = {key: fields[key] for key in values if key in fields and key in read.get(name, fields)}
        lines = "".join(f"# {_described(schema, known[key])}\n{to_yaml({key: values[key]})}" for key in known)
        if name and known:
            text += f"\n# {about}\n{name}:\n{indent(lines, '  ')}"
        else:
            text += lines
    return text


def _described(schema: dict[str, Any], field: dict[str, Any]) -> str:
    return f"{field['description']} ({_values(schema, field)}; default: {_default(field)})"


def page() -> str:
    """Return docs/settings.md."""
    text = HEAD
    for title, settings in (("Experiment", Experiment), ("Cluster profile", Profile)):
        schema = schema_of(settings)
        text += f"\n## {title}\n"
        for name, about, fields in _sections(schema):
            heading = f"\n### {name}\n" if name else ""
            text += f"{heading}\n{about}\n\n| setting | values | default | what it is |\n|---|---|---|---|\n"
            for key, field in fields.items():
                key = f"{name}.{key}" if name else key
                text += f"| `{key}` | {_values(schema, field)} | `{_default(field)}` | {field['description']} |\n"
    return text


def _sections(schema: dict[str, Any]) -> list[tuple[str, str, Fields]]:
    """Return name, description and fields of each group of settings; first, without a name, those in no group."""
    alone: Fields = {}
    groups = []
    for name, field in schema["properties"].items():
        group = _resolved(schema, field)
        if "properties" in group:
            groups.append((name, _first_sentence(group), group["properties"]))
            continue
        alone[name] = field
        for form in field.get("oneOf", ()):
            alone |= {f"{name}.{key}": of for key, of in _resolved(schema, form).get("properties", {}).items()}
    return [("", _first_sentence(schema), alone), *groups]


def _first_sentence(schema: dict[str, Any]) -> str:
    return str(schema["description"]).partition("\n")[0]


def _resolved(schema: dict[str, Any], field: dict[str, Any]) -> dict[str, Any]:
    return schema["$defs"][field["$ref"].rpartition("/")[2]] if "$ref" in field else field


def _default(field: dict[str, Any]) -> str:
    if "default" not in field:
        return "{}" if field.get("type") == "object" else "required"
    value = field["default"]
    return value if isinstance(value, str) else json.dumps(value)


def _values(schema: dict[str, Any], field: dict[str, Any]) -> str:
    """Return the values that a setting takes, in words."""
    field = _resolved(schema, field)
    forms = field.get("anyOf") or field.get("oneOf")
    if forms:
        return " or ".join(_values(schema, form) for form in forms)
    if "enum" in field or "const" in field:
        return ", ".join(str(value) for value in field.get("enum") or [field["const"]])
    if "properties" in field:
        return f"{{{', '.join(field['properties'])}}}"
    if field["type"] == "array":
        inner = [_values(schema, item) for item in field.get("prefixItems", ())]
        return f"[{', '.join(inner)}]" if inner else f"list of {_values(schema, field['items'])}"
    words = {"string": "text", "boolean": "true, false", "object": "mapping"}
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f" {sign} {field[bound]:g}" for bound, sign in signs.items() if bound in field]
    return str(words.get(field["type"], field["type"])) + ",".join(bounds)


def documents() -> dict[Path, str]:
    """Return path and text of the files of docs/ that are made from the schema."""
    schemas: dict[Path, type[Section]] = {DOCS / EXPERIMENT_SCHEMA: Experiment, DOCS / PROFILE_SCHEMA: Profile}
    texts = {path: json.dumps(schema_of(settings), indent=1) + "\n" for path, settings in schemas.items()}
    return {DOCS / "settings.md": page()} | texts


if __name__ == "__main__":
    for path, text in documents().items():
        path.write_text(text)
