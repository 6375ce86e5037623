"""The JSON Schema of recipes, for editors: what `recipe_file` reads, its words and its defaults."""

from typing import Any

from lpsparse.recipes.file import SHELL, Recipe
from lpsparse.steps.base import Step, about_of
from lpsparse.steps.table import COMMANDS, RECIPE_WORDS, step_of

# YAML 1.1, which we read, takes 4e-3 for text; editors take it for a number.
_EXPONENT = r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"
_FRACTION = r"^(0?\.[0-9]+|0|1(\.0+)?)$"  # in quotes, to keep a last 0
_CHAIN = {  # what the chain of steps gives
    "model": "Model that the step takes, or the out of an earlier step. Default: what was made before it.",
    "out": "Name of the result, a folder in the recipe's out. Default: the step's number and name.",
    "data": "File or folder of data, or hub data set id. Default: the recipe's data.",
}


def recipe_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a whole recipe. What two settings mean together it knows in part alone:
    `lpsparse recipe check` knows the rest."""
    top = Recipe.model_json_schema()
    words = {name: _reference(name, step_of(name)) for name in RECIPE_WORDS}
    steps = {
        "type": "array",
        "minItems": 1,
        "description": "What is done, one step after the other.",
        "items": {
            "type": "object",
            "minProperties": 1,
            "maxProperties": 1,
            "additionalProperties": False,
            "properties": words,
        },
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "lpsparse recipe",
        "description": top["description"],
        "type": "object",
        "additionalProperties": False,
        "required": top["required"],
        "properties": {name: _loose(node) for name, node in top["properties"].items()} | {"steps": steps},
        "$defs": {name: _step(name, step_of(name)) for name in RECIPE_WORDS},
    }


def _reference(name: str, kind: type[Step]) -> dict[str, Any]:
    """A step may stand without settings where it needs none."""
    step = {"$ref": f"#/$defs/{name}"}
    node = step if _needed(kind) or name in _RULES else {"anyOf": [step, {"type": "null"}]}
    return {"description": COMMANDS[name].help, **node}


def _needed(kind: type[Step]) -> list[str]:
    fields = kind.model_fields.items()
    return [info.alias or name for name, info in fields if info.is_required() and name not in _CHAIN]


def _step(name: str, kind: type[Step]) -> dict[str, Any]:
    found = kind.model_json_schema()["properties"]
    properties = {key: _loose(node) for key, node in found.items() if key != "dry_run"}
    for key in _CHAIN.keys() & properties.keys():
        properties[key] = {"type": "string", "not": _EXPANDED, "description": _CHAIN[key]}
    for key, value in kind.fixed.items():
        properties[key] = {**properties[key], "const": value}
    spellings = {
        spelling: key
        for field, info in kind.model_fields.items()
        for key in [info.alias or field]
        for name in (field, *about_of(info).aliases)
        for spelling in {name, name.replace("_", "-")} - {key}
        if key in properties
    }
    return {
        "description": COMMANDS[name].help,
        "type": "object",
        "additionalProperties": False,
        "required": _needed(kind),
        "properties": properties,
        # Not among the properties, so that an editor offers each setting once.
        "patternProperties": {
            f"^{spelling}$": {"$ref": f"#/$defs/{name}/properties/{key}"}
            for spelling, key in sorted(spellings.items())
        },
        **_RULES.get(name, {}),
    }


def _loose(node: dict[str, Any]) -> dict[str, Any]:
    """One setting, in all the forms that the reader takes."""
    about = {key: node[key] for key in ("description", "default") if key in node}
    kinds: list[dict[str, Any]] = node.get("anyOf") or [
        {key: value for key, value in node.items() if key not in about}
    ]
    digits = any(kind.get("type") == "number" for kind in kinds)
    forms: list[dict[str, Any]] = []
    for kind in kinds:
        form = {key: value for key, value in kind.items() if key not in ("title", "format")}
        if form == {"type": "string"}:
            form |= {"pattern": _FRACTION} if digits else {"not": _EXPANDED}
        forms.append(form)
        if form.get("type") == "number":
            forms.append({"type": "string", "pattern": _EXPONENT})
        if form.get("type") == "array":
            item = form["items"]
            forms += [item] if item.get("type") != "string" else []
            forms.append({"type": "string", "not": _EXPANDED})  # several, with commas
    return {**about, **(forms[0] if len(forms) == 1 else {"anyOf": forms})}


def _given(*keys: str) -> dict[str, Any]:
    """One of these spellings stands there, and is not null."""
    value = {"not": {"type": "null"}}
    return {"anyOf": [{"required": [key], "properties": {key: value}} for key in keys]}


_EXPANDED = {"pattern": SHELL.pattern}
_TARGET = ("target_sparsity", "target-sparsity")
_RULES: dict[str, dict[str, Any]] = {
    "prune": {
        "oneOf": [
            _given("sparsity"),
            _given("below"),
            _given("n_m", "n-m"),
            {"required": ["gap"], "properties": {"gap": {"const": True}}},
        ]
    },
    "finetune": {
        "if": {"required": ["method"], "properties": {"method": {"not": {"enum": ["lp", "dense"]}}}},
        "then": _given(*_TARGET),
    },
    "recover": {"not": _given(*_TARGET)},
}
