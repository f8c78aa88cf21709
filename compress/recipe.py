"""Recipe: passes in order, as plain YAML.

name: half
passes:
- remove-layers: {layers: [5]}
- tokens: {method: pooling, budget: {keep: 16}}
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from compress.passes.base import Evidence, Pass, apply, find_pass, refuse_order, titles
from compress.smaller import Smaller
from probe.errors import PassError, RecipeError, did_you_mean
from probe.subject import Subject

_FIELDS = ("name", "about", "seed", "passes")


@dataclass(frozen=True)
class Recipe:
    """An ordered list of passes with a name, and what it is about."""

    passes: tuple[Pass, ...]
    name: str = "recipe"
    about: str = ""
    seed: int = 0

    def dumped(self) -> str:
        """The recipe as YAML."""
        text: dict[str, Any] = {"name": self.name, **({"about": self.about} if self.about else {}), "seed": self.seed}
        return yaml.safe_dump({**text, "passes": self.steps()}, sort_keys=False, width=120)

    def steps(self) -> list[dict[str, dict[str, Any]]]:
        """Each pass by its title, with the settings that are not the default ones and the seed that it was given."""
        return [{one.title: {**one.model_dump(mode="json", exclude_defaults=True), **_own_seed(one)}} for one in self.passes]


def _own_seed(one: Pass) -> dict[str, int]:
    """A seed that was given to a pass, be it 0: it is not the recipe's."""
    return {"seed": getattr(one, "seed", 0)} if "seed" in one.model_fields_set else {}


def read(source: str | Path) -> Recipe:
    """A recipe from a file.

    Raises RecipeError naming what is wrong, where, and the nearest name.
    """
    return parse(read_yaml(source), str(source))


def read_yaml(source: str | Path) -> Any:
    """What a YAML file holds. Raises RecipeError for one that cannot be read or is not YAML."""
    path = Path(source)
    try:
        return yaml.safe_load(path.read_text())
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror or error}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {' '.join(str(error).split())}") from error


def parse(text: Any, where: str = "recipe") -> Recipe:
    """A recipe from the data that its YAML stands for."""
    if not isinstance(text, Mapping):
        raise RecipeError(f"{where}: a recipe is a mapping with a list of passes")
    for key in text:
        if key not in _FIELDS:
            raise RecipeError(f"{where}: there is no field {key!r}{did_you_mean(str(key), _FIELDS)}")
    steps = text.get("passes")
    if not isinstance(steps, Sequence) or isinstance(steps, str):
        raise RecipeError(f"{where}: passes is a list, each entry a pass with its settings")
    passes = [_pass(step, f"{where}: passes.{number}") for number, step in enumerate(steps)]
    seen: list[str] = []
    for number, one in enumerate(passes):
        try:
            refuse_order(seen, one)
        except PassError as error:
            raise RecipeError(f"{where}: passes.{number}: {error}") from error
        seen.append(one.title)
    seed = text.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise RecipeError(f"{where}: seed is a whole number, not {seed!r}")
    return Recipe(tuple(passes), str(text.get("name", "recipe")), str(text.get("about", "")), seed)


def _pass(step: Any, where: str) -> Pass:
    if isinstance(step, str):
        step = {step: {}}
    if not isinstance(step, Mapping) or len(step) != 1:
        raise RecipeError(f"{where}: an entry is one pass with its settings, as in `- tokens: {{method: random}}`")
    title, settings = next(iter(step.items()))
    try:
        kind = find_pass(str(title))
        return kind.model_validate(settings or {})
    except PassError as error:
        raise RecipeError(f"{where}: {error}") from error
    except ValidationError as error:
        raise RecipeError(f"{where}.{title}{_first(error, find_pass(str(title)))}") from error


def _first(error: ValidationError, kind: type[Pass]) -> str:
    """The first complaint, with the nearest name where one is unknown."""
    every = error.errors()
    first = next((one for one in every if one["type"] == "extra_forbidden"), every[0])
    place = "".join(f".{part}" for part in first["loc"])
    if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
        return f": there is no setting {first['loc'][0]!r}{did_you_mean(str(first['loc'][0]), kind.model_fields)}"
    return f"{place}: {first['msg']}"


def schema() -> dict[str, Any]:
    """The JSON schema of recipes, for editors."""
    choices = [
        {
            "type": "object", "properties": {title: {**kind.model_json_schema(), "description": (kind.__doc__ or "").split("\n")[0]}},
            "required": [title], "additionalProperties": False,
        }
        for title, kind in sorted(titles().items())
    ]  # fmt: skip
    fields = {"name": {"type": "string"}, "about": {"type": "string"}, "seed": {"type": "integer"}}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Sightline recipe", "type": "object",
        "properties": {**fields, "passes": {"type": "array", "items": {"oneOf": choices}}}, "required": ["passes"],
        "additionalProperties": False,
    }  # fmt: skip


def compress(
    subject: Subject, recipe: Recipe | Sequence[Pass], evidence: Evidence | None = None, in_place: bool = False
) -> Smaller:  # fmt: skip
    """A smaller subject: a copy of the model (or the model itself, `in_place`) with every pass of a recipe applied.

    Raises PassError for a pass that the model has no place for; what was attached until then is taken off again.
    """
    smaller = Smaller.of(subject, in_place)
    passes, seed = (recipe.passes, recipe.seed) if isinstance(recipe, Recipe) else (tuple(recipe), 0)
    try:
        for one in passes:
            apply(smaller, one, evidence, seed)
    except Exception:
        smaller.detach()
        raise
    return smaller
