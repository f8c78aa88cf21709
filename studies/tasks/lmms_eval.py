"""Sightline's models in lmms-eval: a model class for its `--model sightline`, with compressed and in-memory models as well.

Written to the interface of lmms-eval 0.7.3 (`lmms_eval.api.model.lmms`: `generate_until`, `loglikelihood`, `generate_until_multi_round`; requests with
`args`; "simple" models). lmms-eval itself is not among the project's dependencies and was not run: the tests put a small base
class of the same shape in its place. `pip install "sightline[lmms]"` brings it, and
`python -m lmms_eval --model sightline --model_args pretrained=demo --tasks pope` is then the command.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from probe.errors import BackendError, StudyError
from probe.example import Example
from probe.likelihood import Method, cannot_share, score_options
from probe.subject import Subject, load

_VIDEOS = (".mp4", ".avi", ".webm", ".mkv", ".mov")
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def manifest() -> Any:
    """What lmms-eval asks of the entry point `lmms_eval.models`: the model's name and the path of its class."""
    return _imported("lmms_eval.models.registry_v2").ModelManifest(
        model_id="sightline", simple_class_path="studies.tasks.lmms_eval.Sightline"
    )


def __getattr__(name: str) -> Any:
    if name == "Sightline":  # lmms-eval looks it up by this name; its base class is imported no sooner
        return _class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def _class() -> type:
    return model_class(_imported("lmms_eval.api.model").lmms)


def _imported(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise BackendError(f'{module} cannot be imported ({error}): pip install "sightline[lmms]"') from error


def model_class(base: type) -> type:
    """The model class on lmms-eval's own base class."""

    class Sightline(base):  # type: ignore[misc, valid-type]
        """A Sightline Subject as an lmms-eval model. `subject` is one that is in memory (a compressed one, say)."""

        def __init__(
            self, pretrained: str = "demo", batch_size: int | str = 1, device: str | None = None, dtype: str | None = None,
            subject: Subject | None = None, **rest: Any,
        ) -> None:  # fmt: skip
            super().__init__()
            if unknown := {name: value for name, value in rest.items() if name not in ("max_batch_size", "device_map")}:
                raise StudyError(
                    f"the model sightline takes pretrained, batch_size, device and dtype, not {', '.join(unknown)}"
                )
            kind = getattr(torch, dtype) if dtype else None
            self.subject = subject or load(pretrained, device=device, dtype=kind, device_map=rest.get("device_map"))
            self.batch_size = int(batch_size)

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            found: dict[int, str] = {}
            for group in _batches([_Asked(i, self, request.args) for i, request in enumerate(requests)], self.batch_size):
                longest = max(asked.tokens for asked in group)
                told = self.subject.generate([asked.example for asked in group], longest)
                for asked, text in zip(group, told, strict=True):
                    found[asked.number] = answer = _cut(text, asked.until)
                    self.cache_hook.add_partial("generate_until", (asked.context, asked.options), answer)
            return [found[i] for i in sorted(found)]

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            asked = [_Continued(i, self, request.args) for i, request in enumerate(requests)]
            found: dict[int, tuple[float, bool]] = {}
            groups: dict[Any, list[_Continued]] = {}
            for one in asked:
                groups.setdefault(one.key, []).append(one)
            method: Method = "whole" if cannot_share(self.subject) else "prefix"
            for group in groups.values():
                words = list(dict.fromkeys(one.words for one in group))
                told = score_options(self.subject, [group[0].example], [words], method)[0]
                for one in group:
                    at = words.index(one.words)
                    found[one.number] = (float(told.by("sum")[at]), told.greedy[at])
            return [found[i] for i in sorted(found)]

        def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
            raise StudyError("the model sightline answers one question at a time: tasks of several rounds are not for it")

    Sightline.__module__ = __name__
    return Sightline


# --- requests --------------------------------------------------------------------------------------------------------


class _Asked:
    """One request for an answer: (context, generation options, doc_to_visual, doc_id, task, split)."""

    def __init__(self, number: int, model: Any, args: tuple[Any, ...]) -> None:
        self.number = number
        self.context, self.options, doc_to_visual, doc_id, task, split = args
        if (
            self.options.get("do_sample")
            or (self.options.get("temperature") or 0) > 0
            or (self.options.get("num_beams") or 1) > 1
        ):
            raise StudyError(
                f"the task {task} wants answers drawn by chance or by beams: sightline's are greedy (temperature=0)"
            )
        self.tokens = int(self.options.get("max_new_tokens", 128))
        until = self.options.get("until") or []
        self.until = [until] if isinstance(until, str) else list(until)
        self.example = example_of(
            model.subject, f"{task}-{split}-{doc_id}-{number}", self.context, _shown(model, doc_to_visual, doc_id, task, split)
        )


class _Continued:
    """One request for a likelihood: (context, continuation or doc_to_target, doc_to_visual, doc_id, task, split)."""

    def __init__(self, number: int, model: Any, args: tuple[Any, ...]) -> None:
        self.number = number
        if len(args) != 6 or not str(args[0]).strip():
            raise StudyError(
                "a likelihood is that of words after a question: unconditional ones (acc_mutual_info) are not measured"
            )
        context, words, doc_to_visual, doc_id, task, split = args
        told = words(model.task_dict[task][split][doc_id]) if callable(words) else words
        self.words = str(told).strip()
        self.key = (context, doc_id, task, split)
        self.example = example_of(
            model.subject, f"{task}-{split}-{doc_id}", context, _shown(model, doc_to_visual, doc_id, task, split)
        )


def _shown(model: Any, doc_to_visual: Callable[[Any], Any] | None, doc_id: Any, task: str, split: str) -> list[Any]:
    found = doc_to_visual(model.task_dict[task][split][doc_id]) if doc_to_visual is not None else None
    return [] if found is None else list(found) if isinstance(found, list | tuple) else [found]


def example_of(subject: Subject, name: str, context: str, shown: Iterable[Any]) -> Example:
    """A request as an Example: pictures, paths of pictures, clips or sounds, and `{"array", "sampling_rate"}`. Raises StudyError for others."""
    images: list[Any] = []
    videos: list[Any] = []
    sounds: list[Any] = []
    for one in shown:
        if isinstance(one, Image.Image):
            images.append(one.convert("RGB"))
        elif isinstance(one, dict) and {"array", "sampling_rate"} <= one.keys():
            sounds.append((np.asarray(one["array"], dtype=np.float32), int(one["sampling_rate"])))
        elif isinstance(one, str | Path) and Path(one).suffix.lower() in (*_VIDEOS, *_PICTURES, ".wav", ".flac"):
            ending = Path(one).suffix.lower()
            (videos if ending in _VIDEOS else images if ending in _PICTURES else sounds).append(Path(one))
        else:
            raise StudyError(f"a task shows {type(one).__name__}, which is no picture, clip or sound that is known here")
    words = context
    if "<image>" not in subject.marks.values():  # lmms-eval's own mark; the chat template puts pictures first
        words = words.replace("<image>", "").strip()
    return Example(name, words, tuple(images), videos=tuple(videos), sounds=tuple(sounds))


def _batches(asked: Sequence[_Asked], size: int) -> list[list[_Asked]]:
    """Requests in their order, cut where the kinds of media change: a batch shows all its questions the same kinds."""
    groups: list[list[_Asked]] = []
    for one in asked:
        same = groups and len(groups[-1]) < size and _kinds(groups[-1][0]) == _kinds(one) and groups[-1][0].tokens == one.tokens
        if same:
            groups[-1].append(one)
        else:
            groups.append([one])
    return groups


def _kinds(asked: _Asked) -> tuple[bool, ...]:
    return tuple(map(bool, asked.example.media.values()))


def _cut(text: str, until: Sequence[str]) -> str:
    """The answer up to the first of its stops."""
    ends = [text.find(stop) for stop in until if stop and stop in text]
    return text[: min(ends)].strip() if ends else text
