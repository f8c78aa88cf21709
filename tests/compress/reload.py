"""Run as a process of its own: loads saved models and says which of them do not say what they said before they were saved."""

import json
import sys
from pathlib import Path

import torch

from compress.saving import load
from probe.tracing import last_logits
from tests.compress.cases import shown

STEPS = 4


def differs(folder: Path) -> str:
    """What is not as it was, empty where everything is. `want.json` beside the weights holds logits, words, and whether clips are shown."""
    want = json.loads((folder / "want.json").read_text())
    model = load(folder, device="cpu", check=False)
    encoded = model.encode(shown(model, want["clips"]))
    gap = float((last_logits(model, encoded) - torch.tensor(want["logits"])).abs().max())
    if gap > 1e-5:
        return f"logits differ by {gap:.2g}"
    return "" if model.generate(encoded, STEPS) == want["said"] else "it says something else"


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({folder: differs(Path(folder)) for folder in sys.argv[1:]}))
