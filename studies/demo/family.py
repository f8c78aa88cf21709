"""The demo models as a family: one frozen language model that sees, hears and reads, and what it was along training."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from probe.errors import LoadError
from probe.subject import Subject, load

CHECKPOINTS = Path(__file__).parent / "checkpoints"
# The model and the data set of each modality; all of them hold the language model of demo:text, untouched.
MODALITIES = {
    "image": ("demo:frozen", "demo"), "video": ("demo:video", "demo:video"), "audio": ("demo:audio", "demo:audio"),
    "text": ("demo:text", "demo:text"),
}  # fmt: skip


def steps() -> list[int]:
    """The steps of its training before which demo:frozen was saved."""
    return sorted(
        int(path.stem.removeprefix("step-")) for path in (CHECKPOINTS / "frozen" / "along").glob("step-*.safetensors")
    )


def members() -> list[str]:
    """demo:frozen along its training (`demo:frozen@100`), as it is, and the jointly tuned model: what can be compared."""
    return [*(f"demo:frozen@{step}" for step in steps()), "demo:frozen", "demo"]


def load_member(name: str, device: str | None = None, dtype: torch.dtype | None = None) -> Subject:
    """A model by name; `demo:frozen@STEP` is the one that training had by then.

    Raises LoadError for a step that was not saved.
    """
    if not name.startswith("demo:frozen@"):
        return load(name, device=device, dtype=dtype)
    step = name.removeprefix("demo:frozen@")
    if not step.isdigit() or int(step) not in steps():
        raise LoadError(
            f"demo:frozen was not saved at step {step!r} of its training: name one of {', '.join(map(str, steps()))}"
        )
    subject = load("demo:frozen", device=device, dtype=dtype)
    trained = load_file(CHECKPOINTS / "frozen" / "along" / f"step-{int(step):05d}.safetensors")
    missing = subject.model.load_state_dict(trained, strict=False).unexpected_keys
    assert not missing, missing
    subject.name = name
    return subject
