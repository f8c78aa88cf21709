"""Every error that Sightline raises on purpose, drawn once. Each has a page in docs/errors.

SightlineError
├── LoadError      (OSError)      a model folder that cannot be opened
├── AnatomyError   (LookupError)  an architecture that is not understood
├── ExampleError   (ValueError)   a prompt, picture or region that cannot be used
├── TokenError     (ValueError)   positions that do not fit the picture
├── EditError      (ValueError)   an edit or recorder that the model has no place for
├── BackendError   (RuntimeError) a library that cannot read what was asked for
├── ReplayError    (RuntimeError) a sweep that cannot be replayed exactly
├── DataError      (ValueError)   a data set with a defect
├── StoreError     (OSError)      recorded tensors that cannot be written or read back
├── PassError      (ValueError)   a compression pass that this model, or this order, has no place for
├── RecipeError    (ValueError)   a recipe that cannot be read
├── LedgerError    (OSError)      a compressed model whose ledger is damaged or foreign
├── StudyError     (ValueError)   a study asked for something that it does not have
└── RunError       (OSError)      a run directory that cannot be written or continued
"""


class SightlineError(Exception):
    """The root: its text is one sentence that says what was wrong and what would be right."""


class LoadError(SightlineError, OSError):
    """A model cannot be opened."""


class AnatomyError(SightlineError, LookupError):
    """A part of an architecture was not found, or does not behave as its name says."""


class ExampleError(SightlineError, ValueError):
    """An example cannot be put to the model."""


class TokenError(SightlineError, ValueError):
    """The positions of a prompt and the grid of its media do not fit."""


class EditError(SightlineError, ValueError):
    """An edit or a recorder names something that the model does not have."""


class BackendError(SightlineError, RuntimeError):
    """A backend is missing, does not take this architecture, or has no such point or edit."""


class ReplayError(SightlineError, RuntimeError):
    """A sweep cannot be replayed exactly on this architecture."""


class DataError(SightlineError, ValueError):
    """A data set has a defect."""


class StoreError(SightlineError, OSError):
    """Recorded tensors cannot be written, or are not where the index says, or would not fit."""


class PassError(SightlineError, ValueError):
    """A compression pass asks for what the model lacks, misses its target, or comes in a forbidden order."""


class RecipeError(SightlineError, ValueError):
    """A recipe cannot be read."""


class LedgerError(SightlineError, OSError):
    """The ledger of a compressed model is damaged, or another program's."""


class StudyError(SightlineError, ValueError):
    """A study was asked for something that it does not have."""


class RunError(SightlineError, OSError):
    """A run directory cannot be written or continued."""


def did_you_mean(word: str, known: object) -> str:
    """` (did you mean X?)` for a near miss, the list of what there is otherwise."""
    from difflib import get_close_matches

    names = sorted(str(name) for name in known)  # type: ignore[attr-defined]
    close = get_close_matches(word, names, 1, 0.6)
    return f" (did you mean {close[0]!r}?)" if close else f" (there is {', '.join(names)})"
