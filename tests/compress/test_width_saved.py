"""Narrowed models on disk: a fresh process loads them, plain transformers where their configuration says their shape."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from compress import saving
from compress.calibration import Calibration
from compress.passes.experts import Experts
from compress.passes.width import Width
from compress.recipe import compress
from tests import toys

EVEN = {"heads": 0.5, "neurons": 0.3}
UNEVEN = {"heads": 0.3, "neurons": 0.3, "allocation": "global", "round_to": 1}
PLAIN = ("llava", "qwen3_vl", "internvl", "smolvlm", "gemma3", "qwen2_audio", "qwen3_vl_moe")
LEDGER = ("llava", "qwen2_vl", "gemma3", "mllama", "phi4_multimodal", "qwen3_vl_moe")
LOAD = """
import json, sys
from pathlib import Path
import torch, transformers
torch.set_num_threads(1)
done = []
for how, folder in (argument.split("=") for argument in sys.argv[1:]):
    folder = Path(folder)
    want = torch.load(folder / "want.pt", weights_only=True)
    if how == "plain":
        name = json.loads((folder / "config.json").read_text())["architectures"][0]
        model = getattr(transformers, name).from_pretrained(folder)
        assert "compress" not in sys.modules
    else:
        from compress.saving import load
        model = load(folder, device="cpu", check=False).model
    with torch.no_grad():
        logits = model(**want["inputs"], use_cache=False).logits[:, -1]
        said = model.generate(**want["inputs"], max_new_tokens=4, do_sample=False)
    done.append([folder.name, (logits - want["logits"]).abs().max().item(), torch.equal(said, want["said"])])
print(json.dumps(done))
"""


def made(subject, family, even):
    if family == "qwen3_vl_moe":
        examples = tuple(replace(e, answer="red") for e in toys.pair(subject))
        one = Experts(count=1) if even else Experts(share=0.45, allocation="global")  # 7 of 16
        return compress(subject, [one], {"calibration": Calibration(examples)})
    settings = {
        name: value for name, value in (EVEN if even else UNEVEN).items() if (family, name) != ("phi4_multimodal", "heads")
    }
    return compress(subject, [Width(score="magnitude", **settings)])


@pytest.fixture(scope="module")
def folders(toy, tmp_path_factory):
    """What is loaded, by how: folders of narrowed models, each with what it says to one batch."""
    root = tmp_path_factory.mktemp("width")
    found = []
    for how, families in (("plain", PLAIN), ("ledger", LEDGER)):
        for family in families:
            smaller = made(toy(family), family, how == "plain")
            assert saving.is_regular(smaller) == (how == "plain")
            words = family == "phi4_multimodal"
            inputs = smaller.encode(toys.pair(smaller, media=False) if words else toys.pair(smaller)).inputs
            folder = saving.save(smaller, root / f"{how}-{family}")
            with torch.no_grad():
                logits = smaller.model(**inputs, use_cache=False).logits[:, -1]
                said = smaller.model.generate(**inputs, max_new_tokens=4, do_sample=False)
            torch.save({"inputs": inputs, "logits": logits, "said": said}, folder / "want.pt")
            found.append((how, folder))
    return found


def test_a_fresh_process_loads_what_was_saved(folders):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOAD, *(f"{how}={folder}" for how, folder in folders)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert [(name, gap) for name, gap, said in found if gap > 1e-5 or not said] == []
    assert len(found) == len(PLAIN) + len(LEDGER) == 13


def test_cards_say_how_they_load(folders):
    cards = {how: (folder / "README.md").read_text() for how, folder in folders}
    assert "Loads in plain transformers: **yes**." in cards["plain"]
    assert "**no: layers have shapes of their own, load it with Sightline**" in cards["ledger"]
