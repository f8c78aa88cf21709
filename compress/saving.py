"""A compressed model on disk: weights, processor, ledger and a model card; and back."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file

from compress import ledger
from compress.passes import METHODS
from compress.passes.base import Change, find_change
from compress.smaller import Smaller
from probe.anatomy import row_of
from probe.errors import LedgerError, LoadError
from probe.loading import load_processor
from probe.subject import Subject
from probe.subject import load as open_subject

CARD = "README.md"


def is_regular(smaller: Smaller) -> bool:
    """Whether transformers builds this shape from the configuration alone."""
    changes = [find_change(change["kind"]) for step in smaller.ledger for change in step.changes]
    return all(change.in_config for change in changes if change.shapes)


def hangs(smaller: Smaller) -> list[str]:
    """The passes whose effect hangs on the model while it runs, and is not in the weights."""
    return [step.title for step in smaller.ledger if any(find_change(c["kind"]).runs for c in step.changes)]


def loads_in_transformers(smaller: Smaller) -> str:
    """`yes`, `yes, without ...` where something takes effect through Sightline only, or `no: ...`."""
    if not is_regular(smaller):
        return "no: layers have shapes of their own, load it with Sightline"
    without = hangs(smaller)
    return f"yes, without {', '.join(dict.fromkeys(without))}" if without else "yes"


def save(smaller: Smaller, folder: Path | str, measured: Mapping[str, Any] | None = None) -> Path:
    """Writes the model, its processor, its ledger and its card; `measured` are lines for the card.

    All of it is written beside the folder first and moved there at the end, so that a disk that fills leaves no half model. Raises LedgerError
    when the folder cannot be written.
    """
    folder = Path(folder)
    try:
        above = folder.resolve().parent
        above.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=above, prefix=".sightline-") as beside:
            partial = Path(beside)
            # what is to be filled in by name is written under the names that modules have, not those of the hub
            smaller.model.save_pretrained(partial, save_original_format=is_regular(smaller))
            save_processor(smaller.processor, partial)
            ledger.write(partial, smaller.ledger, smaller.parents, is_regular(smaller))
            (partial / CARD).write_text(_card(smaller, measured or {}))
            folder.mkdir(exist_ok=True)
            for path in partial.iterdir():
                path.replace(folder / path.name)
    except (OSError, SafetensorError) as error:
        raise LedgerError(f"{folder} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    return folder


def save_processor(processor: Any, folder: Path) -> None:
    """`save_pretrained`, also for processors without their video part, over which it stumbles."""
    if "video_processor" not in getattr(processor, "get_attributes", list)() or processor.video_processor is not None:
        processor.save_pretrained(folder)
        return
    import json

    processor.tokenizer.save_pretrained(folder)
    settings = {key: value for key, value in processor.to_dict().items() if key != "video_processor"}
    (folder / "processor_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True, default=str) + "\n")
    if processor.chat_template:
        (folder / "chat_template.jinja").write_text(processor.chat_template)


def load(source: str | Path, dtype: torch.dtype | str | None = None, device: str | None = None, check: bool = True) -> Subject:
    """A model as `probe.load` opens it; one with a ledger with everything that was applied to it.

    Raises LedgerError for a ledger that is damaged or foreign.
    """
    folder = Path(source)
    found = ledger.read(folder) if folder.is_dir() else None
    if found is None:
        return open_subject(source, dtype, device, check=check)
    steps, parents, regular = found
    base = open_subject(folder, dtype, device, check=check) if regular else _rebuilt(folder, steps, dtype, device)
    smaller = Smaller(
        base.model, base.processor, base.anatomy, str(source), base.checks, ledger=steps, parents=parents
    )  # fmt: skip
    for change in changes_of(steps):
        if change.runs:
            change.carry_out(smaller)
    return smaller


def changes_of(steps: tuple[ledger.Step, ...]) -> list[Change]:
    """What a ledger's steps did, as changes that can be carried out again. Raises LedgerError for one that this version does not know."""
    try:
        return [
            find_change(change["kind"]).model_validate({k: v for k, v in change.items() if k != "kind"})
            for step in steps for change in step.changes
        ]  # fmt: skip
    except (KeyError, ValueError) as error:  # pydantic's errors and ours are both ValueErrors
        raise LedgerError(f"the ledger names a change that cannot be made again: {' '.join(str(error).split())}") from error


def _rebuilt(folder: Path, steps: tuple[ledger.Step, ...], dtype: torch.dtype | str | None, device: str | None) -> Subject:
    """A model whose layers have shapes of their own: built as configured, reshaped by the ledger, then given its weights."""
    target = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = dtype or (torch.bfloat16 if target.startswith("cuda") else torch.float32)
    config = transformers.AutoConfig.from_pretrained(folder)
    architecture = getattr(transformers, (config.architectures or [""])[0], transformers.AutoModelForImageTextToText)
    model = architecture._from_config(config)
    processor = load_processor(str(folder), False, None, bool(row_of(config).needs))
    smaller = Smaller.of(open_subject((model, processor), check=False), in_place=True)
    for change in changes_of(steps):
        if change.shapes and not change.in_config:
            change.carry_out(smaller)
    _fill(model, folder)
    model.to(target, kind if isinstance(kind, torch.dtype) else getattr(torch, kind))
    return smaller


def _fill(model: Any, folder: Path) -> None:
    weights: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        weights |= load_file(shard)
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise LedgerError(
            f"the weights in {folder} do not have the shapes that its ledger says: it is another model's"
        ) from error
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    if lost := [name for name in missing if name not in tied]:
        raise LoadError(f"{folder} has no weight {lost[0]}: the folder is incomplete")
    if unexpected:
        raise LedgerError(f"{folder} has the weight {unexpected[0]}, which its ledger knows nothing of: it is another model's")
    model.tie_weights()


def _card(smaller: Smaller, measured: Mapping[str, Any]) -> str:
    lines = [
        f"# {smaller.name}, compressed with Sightline", "", f"Made from {', '.join(f'`{p}`' for p in smaller.parents) or 'a model in memory'}.",
        f"Loads in plain transformers: **{loads_in_transformers(smaller)}**.", "", "## What was done", "",
    ]  # fmt: skip
    for step in smaller.ledger:
        lines.append(f"- **{step.title}**: {_told(step.settings)}")
        lines += [f"  - {_told({k: v for k, v in change.items() if k != 'kind'})}" for change in step.changes[:40]]
        if step.evidence:
            lines.append(f"  - on the evidence of {_told(step.evidence)}")
    if any(
        METHODS[c["method"]].text_conditioned for step in smaller.ledger for c in step.changes if c.get("method") in METHODS
    ):
        lines += [
            "",
            "What stays of a picture is chosen by the question asked of it: show the picture again with the next question.",
        ]
    if measured:
        lines += ["", "## What it cost", "", *(f"- {name}: {value}" for name, value in measured.items())]
    return "\n".join(lines) + "\n"


def _told(values: Mapping[str, Any]) -> str:
    text = ", ".join(f"{key} {value}" for key, value in values.items() if value not in (None, "", {}, []))
    return text if len(text) <= 400 else f"{text[:397]}..."
