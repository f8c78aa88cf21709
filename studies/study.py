"""What a study is: a typed function that asks one question of a model, and the table of them."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probe.errors import StudyError, did_you_mean

if TYPE_CHECKING:
    from probe.subject import Side, Subject
    from studies.data import Data

Summary = dict[str, Any]

# name: (module, the question). The function has the study's name; its docstring begins with the question.
STUDIES: dict[str, tuple[str, str]] = {
    "information-flow": (
        "studies.information_flow", "Where, in which layers, does what the model saw reach its answer?",
    ),
    "implicit-alignment": (
        "studies.implicit_alignment",
        "Are perceptual and textual tokens implicitly aligned inside the language model, and does that predict what it can do?",
    ),
    "attention-shift": (
        "studies.attention_shift",
        "Does attention to the words before and after what is shown move alike through the layers?",
    ),
    "attention-sinks": (
        "studies.attention_sinks",
        "Which tokens of what is shown are sinks, and does it matter where their attention goes?",
    ),
    "image-attention": (
        "studies.image_attention",
        "Does a model that looks away from the picture say what is not there?",
    ),
    "modality-importance": ("studies.modality_importance", "Which modality does each answer need?"),
    "routing": ("studies.routing", "Do experts specialise by modality?"),
    "patching": ("studies.patching", "Which positions, at which layers, carry the fact that was changed?"),
    "pope": ("studies.pope", "Does the model say that things are there which are not?"),
    "multiple-choice": (
        "studies.multiple_choice", "Does the model choose right, by what it writes and by what it finds likely?",
    ),
    "lens": ("studies.lens", "Which words does each position of what is shown become, and at which layer?"),
    "relevance": ("studies.relevance", "Which positions does the answer depend on, by attention and by gradient?"),
    "grounding": ("studies.grounding", "Does the attention of a word find the pixels that it is about?"),
    "similarity": ("studies.similarity", "Do layers, modalities and models represent the same examples alike?"),
    "probing": ("studies.probing", "At which layer can each fact of a scene be read, and from which tokens?"),
    "vision-layers": (
        "studies.vision_layers", "Which layers of the vision tower carry which facts, and what does merging levels give?",
    ),
    "subnetworks": (
        "studies.subnetworks", "Which weights does the model need, and do tasks and modalities need the same ones?",
    ),
    "tradeoffs": (
        "studies.tradeoffs", "What does each step of compression cost in accuracy, and what does it save?",
    ),
    "layer-skipping": (
        "studies.layer_skipping", "Which layers do visual tokens need, which do words, and does a score tell before one tries?",
    ),
    "token-reduction": ("studies.token_reduction", "Which visual tokens can go, and which way of choosing them is best?"),
    "before-after": ("studies.before_after", "What does compression change inside a model?"),
    "masks": ("studies.masks", "What does each attention mask do to a model that was trained without it?"),
    "speed": ("studies.speed", "What do tracing and replaying cost, next to a plain forward pass and to the naive way?"),
    "compressing": (
        "studies.compressing", "Does compression save the time that its FLOPs promise, and what does choosing cost?",
    ),
    "analyses": ("studies.analyses", "What do the analyses cost, next to the forward passes that they read?"),
    "backends": ("studies.backends", "What does it cost to read the same points through nnsight or TransformerLens?"),
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What every study is given: the model, the data, where to write, and how."""

    subject: "Subject"
    data: "Data"
    out: Path | None = None
    seed: int = 0
    batch: int = 8
    quiet: bool = True
    padding: "Side" = "left"  # of the passes that are read; answers are always generated from batches padded on the left


def study(function: Callable[..., Summary]) -> Callable[..., Summary]:
    """Marks a study. Raises StudyError where the table and the function disagree, so that neither can rot."""
    name = function.__name__.replace("_", "-")
    module, question = STUDIES.get(name, ("", ""))
    if module != function.__module__ or not (function.__doc__ or "").startswith(question):
        raise StudyError(f"the study {name!r} is not in studies/study.py with the question that its docstring begins with")
    return function


def find_study(name: str) -> Callable[..., Summary]:
    """The function of a study. Raises StudyError with the nearest name."""
    if name not in STUDIES:
        raise StudyError(f"there is no study {name!r}{did_you_mean(name, STUDIES)}")
    found: Callable[..., Summary] = getattr(import_module(STUDIES[name][0]), name.replace("-", "_"))
    return found


@contextmanager
def progress(title: str, total: int, quiet: bool, unit: str = "examples") -> Iterator[Callable[[int], None]]:
    """A bar on standard error with rate and time left; `advance(n)` moves it. Where `total` was too much, the work that is done is all of it."""
    if quiet:
        yield lambda n: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit), TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total, rate="")
        start = time.perf_counter()

        def advance(n: int) -> None:
            bar.advance(task, n)
            done = bar.tasks[0].completed
            bar.update(task, rate=f"{done / max(1e-9, time.perf_counter() - start):.1f}/s")

        yield advance
        bar.update(task, total=bar.tasks[0].completed)


def units(count: int, size: int) -> list[tuple[str, range]]:
    """Work cut into units of `size` items: a key and the items of each."""
    return [
        (f"{start:06d}-{min(count, start + size):06d}", range(start, min(count, start + size)))
        for start in range(0, count, size)
    ]


def describe(subject: "Subject") -> dict[str, Any]:
    """What identifies a model in run.json: its name, architecture, shape, and a fingerprint of some of its weights."""
    from hashlib import sha256

    digest = sha256()
    for name, weight in subject.model.named_parameters():
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        if not weight.is_meta:
            digest.update(weight.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return {
        "name": subject.name, "family": subject.anatomy.family, "model_type": subject.anatomy.model_type,
        "layers": subject.n_layers, "heads": subject.n_heads, "dtype": str(subject.dtype).removeprefix("torch."),
        "fingerprint": digest.hexdigest()[:16],
    }  # fmt: skip
