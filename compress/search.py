"""The free numbers of a recipe, and a search over them that survives being killed.

A recipe becomes a space where a value is `{low: 1, high: 8}` (whole numbers where both are; `log: true` for a scale by factors) or
`{choices: [...]}`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.recipe import Recipe, parse, read_yaml
from probe.errors import PassError, RecipeError

_RANGE, _CHOICES = frozenset({"low", "high", "log"}), frozenset({"choices"})


@dataclass(frozen=True)
class Free:
    """One free value: where it stands, and what it may be."""

    path: tuple[str | int, ...]
    low: float = 0
    high: float = 0
    log: bool = False
    choices: tuple[Any, ...] = ()

    @property
    def name(self) -> str:
        return ".".join(str(part) for part in self.path)

    def suggested(self, trial: Any) -> Any:
        """The value that an Optuna trial proposes."""
        if self.choices:  # as text, since a choice may be a list
            return json.loads(trial.suggest_categorical(self.name, [json.dumps(one) for one in self.choices]))
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(self.name, self.low, self.high, log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, log=self.log)


@dataclass(frozen=True)
class Space:
    """A recipe with free values."""

    text: Mapping[str, Any]
    free: tuple[Free, ...]
    where: str = "space"

    def recipe(self, values: Mapping[str, Any]) -> Recipe:
        """The recipe with every free value put in. Raises RecipeError where it is none."""
        text: Any = deepcopy(dict(self.text))
        for one in self.free:
            place = text
            for part in one.path[:-1]:
                place = place[part]
            place[one.path[-1]] = values[one.name]
        return parse(text, self.where)

    def asks(self) -> tuple[str, ...]:
        """The evidence that passes ask for with every free value at its first, or every one at its last."""
        ends = ({one.name: (one.choices or (one.low, one.high))[end] for one in self.free} for end in (0, -1))
        recipes = []
        for values in ends:
            with suppress(RecipeError):
                recipes.append(self.recipe(values))
        return tuple(dict.fromkeys(name for recipe in recipes for one in recipe.passes for name in one.asks()))

    def suggested(self, trial: Any) -> dict[str, Any]:
        return {one.name: one.suggested(trial) for one in self.free}


def read_space(source: str | Path) -> Space:
    """A space from a file. Raises RecipeError naming what is wrong and where."""
    return parse_space(read_yaml(source), str(source))


def parse_space(text: Any, where: str = "space") -> Space:
    """A space from the data that its YAML stands for; its first recipe is parsed at once, so that mistakes show before a search."""
    if not isinstance(text, Mapping):
        raise RecipeError(f"{where}: a space is a recipe, a mapping with a list of passes")
    free = tuple(_free(text, (), where))
    if not free:
        raise RecipeError(f"{where}: no value is free: write one as {{low: 4, high: 32}} or {{choices: [random, pooling]}}")
    space = Space(text, free, where)
    space.recipe({one.name: one.choices[0] if one.choices else one.low for one in free})
    return space


def _free(text: Any, path: tuple[str | int, ...], where: str) -> list[Free]:
    if isinstance(text, Mapping):
        keys = frozenset(text)
        if (keys <= _RANGE and keys & {"low", "high"}) or keys == _CHOICES:
            return [_checked(text, path, where)]
        return [one for key, value in text.items() for one in _free(value, (*path, str(key)), where)]
    if isinstance(text, Sequence) and not isinstance(text, str):
        return [one for number, value in enumerate(text) for one in _free(value, (*path, number), where)]
    return []


def _checked(text: Mapping[str, Any], path: tuple[str | int, ...], where: str) -> Free:
    place = f"{where}: {'.'.join(str(part) for part in path)}"
    if "choices" in text:
        choices = text["choices"]
        if not isinstance(choices, Sequence) or isinstance(choices, str) or not choices:
            raise RecipeError(f"{place}: choices is a list of at least one value")
        return Free(path, choices=tuple(choices))
    low: Any = text.get("low")
    high: Any = text.get("high")
    if not all(isinstance(end, int | float) and not isinstance(end, bool) for end in (low, high)) or low >= high:
        raise RecipeError(f"{place}: a range has numbers low and high, low below high, not {low!r} and {high!r}")
    if text.get("log") and low <= 0:
        raise RecipeError(f"{place}: a range by factors (log) begins above 0, not at {low!r}")
    return Free(path, low, high, bool(text.get("log", False)))


# --- the search ------------------------------------------------------------------------------------------------------

Evaluate = Callable[[Recipe], Sequence[float]]


@dataclass(frozen=True)
class Trial:
    """One point of a search: its values, what it was measured at (None where it was refused), and why it was refused."""

    number: int
    values: Mapping[str, Any]
    objectives: tuple[float, ...] | None
    refused: str = ""


def search(
    space: Space, evaluate: Evaluate, directions: Sequence[str], storage: Path, trials: int, seed: int = 0,
    advance: Callable[[int], None] = lambda n: None,
) -> list[Trial]:  # fmt: skip
    """`trials` points of a space, proposed by Optuna's TPE towards several objectives (`maximize`, `minimize`) at once.

    The storage (SQLite) keeps every finished point: asked again, the search goes on where it stopped, and a point that was under way is done
    again. A point that no model takes (PassError, RecipeError) counts as refused.
    """
    import optuna
    from optuna.trial import TrialState

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    store = optuna.storages.RDBStorage(f"sqlite:///{storage}")
    try:
        study = optuna.create_study(storage=store, study_name="search", directions=list(directions), load_if_exists=True)
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            study.tell(trial.number, state=TrialState.FAIL)
            study.enqueue_trial(trial.params)
        done = _finished(study)
        advance(len(done))
        while len(done) < trials:
            # A sampler of its own for each point: what it proposes follows from the seed and the history alone.
            study.sampler = optuna.samplers.TPESampler(seed=seed + len(done))
            _one(study, space, evaluate)
            done = _finished(study)
            advance(1)
        return done[:trials]
    finally:
        store.remove_session()
        store.engine.dispose()


def _one(study: Any, space: Space, evaluate: Evaluate) -> None:
    from optuna.trial import TrialState

    trial = study.ask()
    values = space.suggested(trial)
    trial.set_user_attr("values", values)
    try:
        found = [float(value) for value in evaluate(space.recipe(values))]
    except (PassError, RecipeError) as error:
        trial.set_user_attr("refused", str(error))
        study.tell(trial, state=TrialState.FAIL)
    else:
        study.tell(trial, found)


def _finished(study: Any) -> list[Trial]:
    found = []
    for trial in study.get_trials(deepcopy=False):
        refused = trial.user_attrs.get("refused", "")
        if trial.state.name == "COMPLETE" or refused:
            values = tuple(trial.values) if trial.state.name == "COMPLETE" else None
            found.append(Trial(trial.number, trial.user_attrs["values"], values, refused))
    return found
