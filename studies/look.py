"""One example, looked at closely: what `sightline trace` shows."""

import itertools
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from probe.example import Example, Picture, open_picture
from probe.plots import look as plots
from probe.recorders import Lens, Mass, Rows
from probe.subject import Subject
from probe.tokens import Grid, TokenMap
from probe.tracing import Trace, trace
from studies.run import Run
from studies.study import describe

SCHEMA = pa.schema([
    ("what", pa.string()), ("layer", pa.int32()), ("head", pa.int32()), ("group", pa.string()), ("value", pa.float64()),
    ("position", pa.int32()), ("segment", pa.string()), ("text", pa.string()), ("rank", pa.int32()),
])  # fmt: skip


def look(subject: Subject, example: Example, out: Path | None, max_new_tokens: int = 32) -> dict[str, Any]:
    """Traces one example and writes a Run with its figures; the summary has `run answer n_positions segments`."""
    encoded = subject.encode(example)
    answer = subject.generate(encoded, max_new_tokens)[0]
    token_map = encoded.maps[0]
    found = trace(subject, encoded, [Mass(rows=("last",)), Rows("last"), Lens(top=5)])
    asked = {"prompt": example.prompt, "suffix": example.suffix, "images": [_identity(image) for image in example.images],
             "max_new_tokens": max_new_tokens}  # fmt: skip
    run = Run.open(out, "trace", asked, describe(subject), SCHEMA)
    with run.recorded():
        run.write("all", _rows(subject, found, token_map))
        lines = ["# One question, looked at", "", f"> {example.prompt}", "", f"`{subject.name}` answers **{answer}**.", ""]
        lines += _unknown_words(subject, token_map)
        lines += _figures(run, subject, example, found, token_map)
        spans = [{"segment": name, "start": start, "stop": stop} for name, start, stop in token_map.spans()]
        summary = {"run": str(run.folder), "answer": answer, "n_positions": len(token_map), "segments": spans}
        run.finish(summary, "\n".join(lines) + "\n")
    return summary


def _identity(image: Picture) -> str:
    """A picture by its content: the same picture is the same wherever it comes from."""
    opened = open_picture(image)
    return f"{opened.width}x{opened.height}:{sha256(opened.tobytes()).hexdigest()[:16]}"


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


def _figures(run: Run, subject: Subject, example: Example, found: Trace, token_map: TokenMap) -> list[str]:
    lines: list[str] = []

    def add(name: str, paper: Any, page: Any, sentence: str) -> None:
        run.figure(name, paper, page)
        lines.extend([f"![{name}](figures/{name}.png)", "", sentence, ""])

    spans = token_map.spans()
    add(
        "tokens", plots.tokens_figure(spans), plots.tokens_page(spans), f"How the {len(token_map)} positions of the prompt lie."
    )
    rows = found["rows"].tensor[:, 0].mean(1)[:, 0].numpy()  # layer key: the last row, heads averaged
    for index, image in enumerate(example.images):
        grid = next((g for g in reversed(token_map.grids) if g.picture == index), None)
        if grid is None:
            lines.extend([f"The positions of picture {index} have no known place in it, so there is no overlay.", ""])
            continue
        picture = open_picture(image)
        panels = [
            (f"layers {band[0]} to {band[-1]}", plots.overlay(picture, grid, _on_grid(rows[list(band)].mean(0), grid)))
            for band in _bands(len(rows))
        ]
        name = "attention" if index == 0 else f"attention-{index}"
        add(name, plots.overlay_figure(picture, panels), plots.overlay_page(picture, panels),
            "Where the position that answers looks in the picture: attention averaged over heads and over a third of the layers, "
            "each panel scaled by its own maximum.")  # fmt: skip
    mass = found["mass"]
    by_layer = mass.tensor[:, 0].mean(1)[:, 0].numpy()
    groups = mass.labels["column_group"]
    add("mass", plots.mass_figure(by_layer, groups), plots.mass_page(by_layer, groups),
        "How the attention of the last position is shared among the segments, heads averaged.")  # fmt: skip
    ids, probs = found["lens_top_ids"].tensor[:, 0, 0], found["lens_top_probs"].tensor[:, 0, 0].numpy()
    words = [[_printable(subject.tokenizer.decode([int(token)])) for token in layer] for layer in ids]
    add("lens", plots.lens_figure(words, probs), plots.lens_page(words, probs),
        "The logit lens: what the final norm and the unembedding make of each layer at the last position.")  # fmt: skip
    return lines


def _printable(token: str) -> str:
    """A token as a figure can show it: control characters and pieces of a character become a dot."""
    return "".join(c if c.isprintable() and c != "\N{REPLACEMENT CHARACTER}" else "·" for c in token.strip()) or "·"


def _on_grid(row: np.ndarray, grid: Grid) -> np.ndarray:
    return row[grid.positions].mean(0)


def _bands(n_layers: int) -> list[range]:
    """Early, middle and late thirds of the layers."""
    edges = np.linspace(0, n_layers, min(3, n_layers) + 1).round().astype(int)
    return [range(a, b) for a, b in itertools.pairwise(edges)]
