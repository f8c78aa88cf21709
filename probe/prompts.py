"""Prompts: what the chat template writes around an example, and which characters of it are what."""

from typing import Any

from jinja2 import TemplateError

from probe.anatomy import Anatomy
from probe.errors import ExampleError
from probe.example import Example
from probe.mapping import Rendered

_NOUN = {"image": "picture", "video": "video", "audio": "sound"}


def marks_of(processor: Any, anatomy: Anatomy) -> dict[str, str]:
    """The text that stands for a picture, a video and a sound in a prompt, for each kind that the model takes."""
    tokenizer = getattr(processor, "tokenizer", processor)
    found: dict[str, str] = {}
    takes = {"image": anatomy.vision, "video": anatomy.vision and anatomy.row.videos, "audio": anatomy.audio}
    ids = {"image": anatomy.image_token_id, "video": anatomy.video_token_id, "audio": anatomy.audio_token_id}
    parts = {"image": "image_processor", "video": "image_processor", "audio": "feature_extractor"}
    for kind in (kind for kind, taken in takes.items() if taken and hasattr(processor, parts[kind])):
        if kind == "image" and anatomy.row.mark:
            found[kind] = str(getattr(processor, anatomy.row.mark))
        elif (own := getattr(processor, f"{kind}_token", None)) is not None:
            found[kind] = str(own)
        elif ids[kind] is not None:
            found[kind] = str(tokenizer.convert_ids_to_tokens(ids[kind]))
    return found


def render(name: str, processor: Any, anatomy: Anatomy, marks: dict[str, str], example: Example) -> Rendered:
    """The prompt as the model will read it, before placeholders grow, and which characters are which segment.

    Raises ExampleError when media and their places in the prompt do not match, or a model is shown what it cannot take.
    """
    _refuse_what_it_cannot_take(name, anatomy, marks, example)
    body = "\n".join(part for part in (example.context, example.prompt, example.options, example.suffix) if part)
    placed = _placed(body, marks, example)
    tokenizer = getattr(processor, "tokenizer", processor)
    template = getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
    if not template:
        return _plain(body, placed, anatomy, marks, example)
    messages = _messages(body, placed, anatomy, marks, example)
    try:
        # The tokenizer's own method: a processor's may ask for parts (a video processor) that are not installed.
        asked, text = (
            tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=begun)
            for begun in (False, True)
        )
    except TemplateError as error:
        raise ExampleError(f"the chat template of {name} refuses example {example.id!r}: {error}") from error
    for kind, shown in example.media.items():
        if kind in marks and anatomy.row.places != "unmarked" and text.count(marks[kind]) != len(shown):
            raise ExampleError(
                f"the chat template of {name} made {text.count(marks[kind])} places for the {len(shown)} {_NOUN[kind]}(s) of "
                f"example {example.id!r}: write {marks[kind]} in the prompt where each belongs"
            )
    stop = len(asked) if text.startswith(asked) else len(text)  # what opens the answer holds no part of the question
    return located(text, example, tuple(marks.values()), True, stop)


def _refuse_what_it_cannot_take(name: str, anatomy: Anatomy, marks: dict[str, str], example: Example) -> None:
    for kind, shown in example.media.items():
        if not shown or kind in marks:
            continue
        if anatomy.row.needs:
            raise ExampleError(
                f"example {example.id!r} comes with {len(shown)} {_NOUN[kind]}(s), for which a {anatomy.family} model needs "
                f"{anatomy.row.needs}"
            )
        takes = " and ".join(f"{_NOUN[other]}s" for other in marks)
        what = f"takes {takes} only" if takes else "is a text-only model"
        raise ExampleError(
            f"{name} {what} ({anatomy.model_type}): example {example.id!r} shows it {len(shown)} {_NOUN[kind]}(s), which it "
            f"has no way to take in"
        )


def _placed(body: str, marks: dict[str, str], example: Example) -> bool:
    """Whether the prompt itself says where its media go. Raises ExampleError where it says so wrongly."""
    any_placed = False
    for kind, mark in marks.items():
        places, shown = body.count(mark), len(example.media[kind])
        if places and places != shown:
            raise ExampleError(
                f"the prompt of example {example.id!r} has {places} places for {_NOUN[kind]}s ({mark}) but {shown} "
                f"{_NOUN[kind]}(s) came with it"
            )
        any_placed |= bool(places)
    return any_placed


def _plain(body: str, placed: bool, anatomy: Anatomy, marks: dict[str, str], example: Example) -> Rendered:
    """Without a chat template: the body itself, with marks first where the family's own examples put them there."""
    wanted = [marks[kind] for kind, shown in example.media.items() for _ in shown]
    if wanted and not placed and anatomy.row.places == "marked":
        raise ExampleError(
            f"the prompt of example {example.id!r} has no place for its picture, and the model no chat template "
            f"to make one: write {wanted[0]} where the picture belongs"
        )
    lead = "".join(wanted) if not placed and anatomy.row.places == "first" else ""
    return located(lead + body, example, tuple(marks.values()), False, len(lead + body))


def _messages(body: str, placed: bool, anatomy: Anatomy, marks: dict[str, str], example: Example) -> list[dict[str, Any]]:
    content: Any = [] if placed else [{"type": kind} for kind, shown in example.media.items() for _ in shown]
    for kind, piece in _pieces(body, marks):
        content += [{"type": kind}] if kind else []
        content += [{"type": "text", "text": piece}] if piece.strip() else []
    system: Any = [{"type": "text", "text": example.system}]
    if not marks:  # templates of text-only models expect plain strings
        content, system = body, example.system
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if example.system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _pieces(body: str, marks: dict[Any, str]) -> list[tuple[Any, str]]:
    """The body cut at its marks: (kind of the mark before it, text)."""
    pieces: list[tuple[Any, str]] = [("", body)]
    for kind, mark in marks.items():
        cut: list[tuple[Any, str]] = []
        for before, text in pieces:
            first, *rest = text.split(mark)
            cut += [(before, first), *((kind, piece) for piece in rest)]
        pieces = cut
    return pieces


def located(text: str, example: Example, marks: tuple[str, ...], chat: bool, stop: int) -> Rendered:
    """Finds the parts of the example in the prompt's first `stop` characters, last occurrence first: a template stands around.

    A part with places for pictures inside it is found piece by piece. Raises ExampleError where a template rewrites a
    part, so that nobody knows which positions it has.
    """
    spans: list[tuple[str, int, int]] = []
    end, tail = stop, 0
    parts = (
        ("suffix", example.suffix),
        ("options", example.options),
        ("question", example.prompt),
        ("context", example.context),
    )
    for name, part in parts:
        for _, piece in reversed(_pieces(part, dict(enumerate(marks)))):
            piece = piece.strip()
            if not piece:
                continue
            start = text.rfind(piece, 0, end)
            if start < 0:
                raise ExampleError(
                    f"the chat template rewrites the {name} of example {example.id!r}: {piece[:60]!r} is not in the prompt"
                )
            spans.append((name, start, start + len(piece)))
            tail, end = max(tail, start + len(piece)), start
    if chat and tail < len(text):
        spans.append(("header", tail, len(text)))
    if chat:
        spans += _system(text, example, end)
    return Rendered(text, tuple(spans))


def _system(text: str, example: Example, end: int) -> list[tuple[str, int, int]]:
    """System words: those of the example, or whatever a template puts before the first turn by itself."""
    if example.system:
        start = text.find(example.system, 0, end)
        return [("system", start, start + len(example.system))] if start >= 0 else []
    return [("system", 0, _first_turn(text, end))]


def _first_turn(text: str, end: int) -> int:
    marks = [
        text.find(mark, 0, end)
        for mark in (
            "USER:",
            "<|im_start|>user",
            "[INST]",
            "<start_of_turn>user",
            "<|start_header_id|>user",
            "User:",
            "<|user|>",
        )
    ]
    found = [mark for mark in marks if mark >= 0]
    return min(found) if found else 0
