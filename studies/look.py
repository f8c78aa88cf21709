"""One example, looked at closely: what `sightline trace` shows."""

import itertools
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from probe.example import Example
from probe.generation import Generation, trace_generation
from probe.media import Clip, Wave
from probe.plots import look as plots
from probe.plots import media as film
from probe.recorders import Lens, Mass, Recorder, Rows
from probe.subject import Opened, Subject
from probe.tokens import Grid, TokenMap
from probe.tracing import Trace
from studies.run import Run
from studies.study import describe

SCHEMA = pa.schema([
    ("what", pa.string()), ("layer", pa.int32()), ("head", pa.int32()), ("group", pa.string()), ("value", pa.float64()),
    ("position", pa.int32()), ("segment", pa.string()), ("text", pa.string()), ("rank", pa.int32()),
])  # fmt: skip


Drawn = tuple[Any, Any, str]  # for paper, for a page, and a sentence


def look(subject: Subject, example: Example, out: Path | None, max_new_tokens: int = 32) -> dict[str, Any]:
    """Traces one example and writes a Run with its figures; the summary has `run answer n_positions segments`."""
    encoded = subject.encode(example)
    token_map = encoded.maps[0]
    record: list[Recorder] = [Mass(rows=("last",)), Rows("last", cross=token_map.crossed is not None), Lens(top=5)]
    made = trace_generation(subject, encoded, record, max_new_tokens=max_new_tokens)
    found, answer = made.steps[0], made.texts[0]
    media = subject.open_media(example)
    asked = {
        "prompt": example.prompt, "suffix": example.suffix, "images": [_identity(image) for image in media.pictures],
        "videos": [[_identity(frame) for frame in clip.frames] for clip in media.videos],
        "sounds": [sha256(wave.samples.tobytes()).hexdigest()[:16] for wave in media.sounds], "max_new_tokens": max_new_tokens,
    }  # fmt: skip
    run = Run.open(out, "trace", asked, describe(subject), SCHEMA)
    with run.recorded():
        run.write("all", [*_rows(subject, found, token_map), *_written_rows(subject, made)])
        lines = ["# One question, looked at", "", f"> {example.prompt}", "", f"`{subject.name}` answers **{answer}**.", ""]
        lines += _unknown_words(subject, token_map)
        lines += [f"{note[0].upper()}{note[1:]}.\n" for note in encoded.notes]
        lines += _figures(run, subject, media, found, token_map)
        lines += _written(run, subject, made)
        spans = [{"segment": name, "start": start, "stop": stop} for name, start, stop in token_map.spans()]
        summary = {"run": str(run.folder), "answer": answer, "n_positions": len(token_map), "segments": spans}
        run.finish(summary, "\n".join(lines) + "\n")
    return summary


def _identity(picture: Image.Image) -> str:
    """A picture by its content: the same picture is the same wherever it comes from."""
    return f"{picture.width}x{picture.height}:{sha256(picture.tobytes()).hexdigest()[:16]}"


def _unknown_words(subject: Subject, token_map: TokenMap) -> list[str]:
    """Words of the question that the tokenizer had to spell out are words that a small model has never read."""
    question = token_map.positions("question")
    if not subject.name.startswith("demo") or not len(question):
        return []
    words = "".join(token_map.spellings[p] for p in question).split()
    if len(question) <= len(words):
        return []
    return [
        "The demo models know the words of their small world only; this question holds others, so the answer means little.",
        "",
    ]


def _rows(subject: Subject, found: Trace, token_map: TokenMap) -> list[dict[str, Any]]:
    mass, lens = found["mass"], found["lens_top_ids"]
    rows: list[dict[str, Any]] = [
        {"what": "mass", "layer": layer, "head": head, "group": group, "value": float(mass.tensor[i, 0, head, 0, j])}
        for i, layer in enumerate(mass.labels["layer"])
        for head in range(mass.tensor.shape[2])
        for j, group in enumerate(mass.labels["column_group"])
    ]
    rows += [
        {"what": "lens", "layer": layer, "rank": rank, "value": float(found["lens_top_probs"].tensor[i, 0, 0, rank]),
         "text": subject.tokenizer.decode([int(lens.tensor[i, 0, 0, rank])])}
        for i, layer in enumerate(lens.labels["layer"]) for rank in range(lens.tensor.shape[-1])
    ]  # fmt: skip
    rows += [
        {"what": "token", "position": position, "segment": segment, "text": text}
        for position, (segment, text) in enumerate(zip(token_map.segments, token_map.spellings, strict=True))
    ]
    return rows


def _figures(run: Run, subject: Subject, media: Opened, found: Trace, token_map: TokenMap) -> list[str]:
    lines: list[str] = []

    def add(name: str, paper: Any, page: Any, sentence: str) -> None:
        run.figure(name, paper, page)
        lines.extend([f"![{name}](figures/{name}.png)", "", sentence, ""])

    spans = token_map.spans()
    add(
        "tokens", plots.tokens_figure(spans), plots.tokens_page(spans), f"How the {len(token_map)} positions of the prompt lie."
    )
    rows = found["rows"].tensor[:, 0].mean(1)[:, 0].numpy()  # layer key: the last row, heads averaged
    layers = found["rows"].labels["layer"]
    space = token_map.crossed or token_map  # where the picture's keys are
    drawn: tuple[tuple[str, list[Any], Callable[..., Drawn]], ...] = (
        ("image", media.pictures, _on_picture), ("video", media.videos, _on_clip), ("audio", media.sounds, _on_sound)
    )  # fmt: skip
    for kind, shown, draw in drawn:
        for index, medium in enumerate(shown):
            grid = next((g for g in reversed(space.grids) if (g.kind, g.picture) == (kind, index)), None)
            if grid is None:
                lines.extend([f"The positions of {kind} {index} have no known place in it, so there is no overlay.", ""])
                continue
            bands = [
                (_named([layers[i] for i in band]), rows[list(band)].mean(0)[grid.positions]) for band in _bands(len(rows))
            ]
            if kind == "image":
                lines.extend(_cropped(medium, [g for g in space.grids if (g.kind, g.picture) == (kind, index)], index))
            name = {"image": "attention", "video": "attention-clip", "audio": "attention-sound"}[kind]
            add(f"{name}-{index}" if index else name, *draw(medium, grid, bands))
    mass = found["mass"]
    by_layer = mass.tensor[:, 0].mean(1)[:, 0].numpy()
    by_layer, groups = _filled(by_layer, mass.labels["column_group"])
    add("mass", plots.mass_figure(by_layer, groups), plots.mass_page(by_layer, groups),
        "How the attention of the last position is shared among the segments, heads averaged.")  # fmt: skip
    ids, probs = found["lens_top_ids"].tensor[:, 0, 0], found["lens_top_probs"].tensor[:, 0, 0].numpy()
    words = [[_printable(subject.tokenizer.decode([int(token)])) for token in layer] for layer in ids]
    add("lens", plots.lens_figure(words, probs), plots.lens_page(words, probs),
        "The logit lens: what the final norm and the unembedding make of each layer at the last position.")  # fmt: skip
    return lines


def _filled(mass: np.ndarray, groups: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Without the groups that have no mass anywhere: a prompt has no answer yet."""
    kept = [i for i in range(len(groups)) if mass[:, i].any()]
    return mass[:, kept], [groups[i] for i in kept]


SHOWN = 24  # written tokens that one figure has room for


def _words(subject: Subject, made: Generation) -> list[str]:
    return [_printable(subject.tokenizer.decode([int(token)])) for token in made.tokens[0] if token >= 0]


def _written_rows(subject: Subject, made: Generation) -> list[dict[str, Any]]:
    """For each written token, what its position looked at in each layer, heads averaged."""
    mass = made["mass"]
    shares = mass.tensor[:, :, 0].mean(2)[:, :, 0]  # step layer group
    return [
        {"what": "written", "position": step, "text": word, "layer": layer, "group": group, "value": float(shares[step, i, j])}
        for step, word in enumerate(_words(subject, made))
        for i, layer in enumerate(mass.labels["layer"]) for j, group in enumerate(mass.labels["column_group"])
    ]  # fmt: skip


def _written(run: Run, subject: Subject, made: Generation) -> list[str]:
    """The answer, token by token."""
    words = _words(subject, made)[:SHOWN]
    mass = made["mass"].tensor[: len(words), :, 0].mean((1, 2))[:, 0].numpy()  # step group
    mass, groups = _filled(mass, made["mass"].labels["column_group"])
    ids, probs = (made[f"lens_top_{name}"].tensor[: len(words), :, 0, 0, 0].T for name in ("ids", "probs"))
    grid = [[_printable(subject.tokenizer.decode([int(token)])) for token in layer] for layer in ids]
    run.figure(
        "answer", plots.answer_figure(words, mass, groups, grid, probs.numpy()),
        plots.answer_page(words, mass, groups, grid, probs.numpy()),
    )  # fmt: skip
    cut = "" if len(words) == len(_words(subject, made)) else f" (the first {SHOWN} tokens)"
    return [
        "![answer](figures/answer.png)", "",
        f"The answer token by token{cut}: below, what each layer would have written there; above, what the position that writes the "
        f"token looks at, heads and layers averaged.", "",
    ]  # fmt: skip


def _printable(token: str) -> str:
    """A token as a figure can show it: control characters and pieces of a character become a dot."""
    return "".join(c if c.isprintable() and c != "\N{REPLACEMENT CHARACTER}" else "·" for c in token.strip()) or "·"


LOST = 0.1  # share of a picture that is worth a word when the processor cuts it away


def _cropped(picture: Image.Image, grids: Sequence[Grid], index: int) -> list[str]:
    """A sentence where the model never saw a large share of the picture."""
    left, top = (max(0.0, min(grid.area[side] for grid in grids)) for side in (0, 1))
    right, bottom = (
        min(float(end), max(grid.area[side] for grid in grids)) for side, end in ((2, picture.width), (3, picture.height))
    )
    lost = 1 - max(0.0, right - left) * max(0.0, bottom - top) / (picture.width * picture.height)
    if lost < LOST:
        return []
    return [
        f"The processor's crop cut away {lost:.0%} of picture {index}: the model saw columns {left:.0f} to {right:.0f} of {picture.width} and rows "
        f"{top:.0f} to {bottom:.0f} of {picture.height}, and nothing of the rest.", "",
    ]  # fmt: skip


def _on_picture(picture: Image.Image, grid: Grid, bands: film.Bands) -> Drawn:
    panels = [(f"{name} (to {weights[0].max():.1%})", plots.overlay(picture, grid, weights[0])) for name, weights in bands]
    return plots.overlay_figure(picture, panels), plots.overlay_page(picture, panels), (
        "Where the position that answers looks in the picture: attention averaged over heads and over a third of the layers. Each panel is scaled "
        "apart, dark for none and bright for its own maximum, which its title says as the share of all attention that the brightest patch has."
    )  # fmt: skip


def _on_clip(clip: Clip, grid: Grid, bands: film.Bands) -> Drawn:
    return film.clip_figure(clip, grid, bands), film.clip_page(clip, grid, bands), (
        "Where the position that answers looks in the clip: attention averaged over heads and over a third of the layers, "
        "each row scaled by its own maximum; above each frame its time and its share of the row."
    )  # fmt: skip


def _on_sound(wave: Wave, grid: Grid, bands: film.Bands) -> Drawn:
    return film.sound_figure(wave, grid, bands), film.sound_page(wave, grid, bands), (
        "What the position that answers listens to: attention averaged over heads and over a third of the layers, position "
        "by position of the sound, above its wave form."
    )  # fmt: skip


def _named(layers: list[int]) -> str:
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"


def _bands(n_layers: int) -> list[range]:
    """Early, middle and late thirds of the layers."""
    edges = np.linspace(0, n_layers, min(3, n_layers) + 1).round().astype(int)
    return [range(a, b) for a, b in itertools.pairwise(edges)]
