"""Heads and neurons cut out: the same answers as when they are silenced, caches, saved models, costs, and what is refused."""

import json
import subprocess
import sys
from functools import cache

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from compress import saving
from compress.cost import cost
from compress.passes.removal import HideUnits, RemoveHeads, RemoveNeurons
from compress.passes.width import Width
from compress.recipe import compress
from compress.smaller import Smaller
from compress.structure import units_of
from probe import load
from probe.errors import PassError
from probe.tracing import last_logits
from tests import toys

FAMILIES = (
    "llava", "qwen2_vl", "qwen3_vl", "internvl", "smolvlm", "gemma3", "mllama", "qwen2_audio", "phi4_multimodal", "qwen3_5",
)  # fmt: skip
# In toys of two head groups and 64 neurons in each of 4 layers.
EVEN = {"heads": {"heads": 0.5}, "neurons": {"neurons": 0.3}}
UNEVEN = {"heads": {"heads": 0.3, "allocation": "global"}, "neurons": {"neurons": 0.3, "allocation": "global", "round_to": 1}}
CASES = [
    (family, kind, name)
    for family in FAMILIES
    for kind in ("heads", "neurons")
    for name in ("even", "uneven")
    if (family, kind) != ("phi4_multimodal", "heads") and (family, kind, name) != ("qwen3_5", "heads", "uneven")
]  # fmt: skip  (one map makes Phi-4's queries, keys and values; one layer of Qwen3.5's has heads)
# Whether plain transformers builds the even shape: Qwen2-VL divides its width by its heads, Mllama's and Qwen3.5's layers differ.
UNTOLD = {("qwen2_vl", "heads"), ("mllama", "heads"), ("qwen3_5", "heads")}


def settings(kind, name):
    return {"score": "magnitude", **(EVEN if name == "even" else UNEVEN)[kind]}


@cache
def subject_of(family):
    return load(toys.build(family))


@cache
def made(family, kind, name):
    return compress(subject_of(family), [Width(**settings(kind, name))])


@cache
def encoded(family):
    subject = subject_of(family)
    return subject.encode(toys.questions(subject) if family != "phi4_multimodal" else toys.pair(subject, media=False))


def gone(smaller):
    return {int(layer): units for change in smaller.ledger[-1].changes for layer, units in change["units"].items()}


seen = []


@pytest.mark.parametrize(("family", "kind", "name"), CASES)
def test_what_is_cut_is_what_is_silenced(family, kind, name):
    subject, smaller = subject_of(family), made(family, kind, name)
    twin = compress(subject, [Width(**settings(kind, name), simulated=True)], in_place=True)
    try:
        silenced = last_logits(twin, encoded(family))
    finally:
        twin.detach()
    plain = last_logits(subject, encoded(family))
    torch.testing.assert_close(last_logits(smaller, encoded(family)), silenced, atol=1e-5, rtol=1e-5)
    assert (silenced - plain).abs().max() > 1e-2
    seen.append((family, kind, name))


def test_how_many_were_compared():
    assert seen == CASES
    assert len(seen) == 37


@pytest.mark.parametrize(("family", "kind", "name"), CASES)
def test_counts_are_those_asked_for(family, kind, name):
    before, after = (units_of(one, kind)[0] for one in (subject_of(family), made(family, kind, name)))
    counts = [(before[layer].count, after[layer].count) for layer in before]
    if name == "even":
        assert counts == [(2, 1) if kind == "heads" else (64, 48)] * len(before)  # 64 - 19 = 45, and then the next eight
    else:
        assert sum(old - new for old, new in counts) == int(0.3 * sum(old for old, _ in counts))
    told = (kind, name) == (kind, "even") and (family, kind) not in UNTOLD
    assert saving.is_regular(made(family, kind, name)) == told
    config = made(family, kind, name).config.get_text_config()
    if kind == "neurons":
        assert config.intermediate_size == (48 if told else 64)
    else:
        assert (config.num_attention_heads, config.num_key_value_heads) == ((2, 1) if told else (4, 2))


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen3_5"])
def test_nothing_asked_is_nothing_done(family):
    subject = subject_of(family)
    smaller = compress(subject, [Width()])
    assert smaller.ledger == ()
    assert torch.equal(last_logits(smaller, encoded(family)), last_logits(subject, encoded(family)))


# --- on disk ---------------------------------------------------------------------------------------------------------

LOAD = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoModelForImageTextToText, AutoModelForCausalLM
torch.set_num_threads(1)
done = []
for folder in map(Path, sys.argv[2:]):
    want = torch.load(folder / "want.pt", weights_only=True)
    if sys.argv[1] == "plain":
        kind = AutoModelForCausalLM if want["words"] else AutoModelForImageTextToText
        model = kind.from_pretrained(folder)
        with torch.no_grad():
            logits = model(**want["inputs"], use_cache=False).logits[:, -1]
            said = model.generate(**want["inputs"], max_new_tokens=4, do_sample=False)
        assert "compress" not in sys.modules
    else:
        from compress.saving import load
        from probe.tracing import last_logits
        subject = load(folder, device="cpu", check=False)
        assert len(subject.ledger) == 1
        with torch.no_grad():
            logits = subject.model(**want["inputs"], use_cache=False).logits[:, -1]
            said = subject.model.generate(**want["inputs"], max_new_tokens=4, do_sample=False)
    gap = (logits - want["logits"]).abs().max().item()
    done.append([folder.name, gap, torch.equal(said, want["said"])])
print(json.dumps(done))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Every case saved, with what it says to one batch."""
    root = tmp_path_factory.mktemp("width")
    for family, kind, name in CASES:
        smaller, inputs = made(family, kind, name), encoded(family).inputs
        folder = saving.save(smaller, root / f"{family}-{kind}-{name}")
        with torch.no_grad():
            logits = smaller.model(**inputs, use_cache=False).logits[:, -1]
            said = smaller.model.generate(**inputs, max_new_tokens=4, do_sample=False)
        want = {"inputs": inputs, "logits": logits, "said": said, "words": family == "phi4_multimodal"}
        torch.save(want, folder / "want.pt")
    return root


def fresh(how, folders):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", LOAD, how, *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_fresh_process_loads_what_was_saved(folders):
    found = fresh("sightline", sorted(folders.iterdir()))
    assert len(found) == len(CASES)
    assert [(name, gap) for name, gap, said in found if gap > 1e-5 or not said] == []


def test_plain_transformers_loads_what_its_configuration_says(folders):
    regular = [f"{family}-{kind}-{name}" for family, kind, name in CASES if saving.is_regular(made(family, kind, name))]
    found = fresh("plain", [folders / name for name in regular])
    assert len(found) == 16
    assert [(name, gap) for name, gap, said in found if gap > 1e-5 or not said] == []
    assert "**yes**" in (folders / regular[0] / "README.md").read_text()
    assert "no: layers have shapes of their own" in (folders / "qwen2_vl-heads-even" / "README.md").read_text()
