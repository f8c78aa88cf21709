"""Trains the demo models: `python -m studies.demo.train` (all of them), or some of them by name.

1. `text`: the language model alone, on text twins.
2. `frozen`: that language model untouched, a CLIP tower and a connector learn to speak to it.
3. `joint`: everything tuned together, on pictures and a share of text twins.
4. `video`: the untouched language model again, with the tower and the connector of `frozen` tuned on clips.
5. `audio`: the untouched language model again, with an audio tower and a connector, on sounds.

What made them learn, and what did not, is in studies/LOG.md.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

from probe.subject import load
from studies.demo import build
from studies.demo.data import chance, examples
from studies.demo.lessons import fit_facts, teach_tower, train
from studies.demo.pupil import Pupil
from studies.demo.score import accuracy
from studies.demo.senses import stacks
from studies.demo.stages import STAGES

CHECKPOINTS = Path(__file__).parent / "checkpoints"
QUESTIONS, CARD_SEED = 1400, 50_000
PROCESSORS = {"video": build.clip_processor, "audio": build.sound_processor}  # the others have LLaVA's
TELLINGS = {"text": "text", "video": "clip", "audio": "sound"}  # the others are shown pictures


def make(
    name: str, out: Path, seed: int, device: torch.device, steps: int | None, fuse: bool, go_on: bool, eyes: Path
) -> None:  # fmt: skip
    """Trains one model from the ones that it stands on, and saves it as a Hugging Face folder of half-precision weights.

    With `go_on` the model saved under this name is taken up, and only its last stage is run.
    """
    processor = PROCESSORS.get(name, build.processor)()
    tokenizer, stages = processor.tokenizer, STAGES[name]
    if steps:
        stages = tuple(replace(stage, steps=steps, tower_steps=min(steps, stage.tower_steps)) for stage in stages)
    torch.manual_seed(seed)
    model = _model(name, out, processor.tokenizer, go_on, eyes)
    pupil = Pupil(model).to(device)
    if fuse:
        _compile(model)
    began = time.time()
    for number, stage in list(enumerate(stages))[-1 if go_on else 0 :]:
        if stage.align:
            fit_facts(pupil, tokenizer, device, stage.moving, min(250, stage.steps))
        if stage.tower_steps:
            teach_tower(pupil, tokenizer, device, stage)
        train(stage, pupil, tokenizer, seed + number, device, out / name / "along")  # each stage draws scenes of its own
    minutes = (time.time() - began) / 60 + (_card(out)[_card_name(name)]["minutes"] if go_on else 0.0)
    for layer in (layer for stack in stacks(model) for layer in stack):
        layer.__dict__.pop("forward", None)
    model.half().save_pretrained(out / name)
    build.save(tokenizer if name == "text" else processor, out / name)
    entry = {
        "stages": [vars(stage) for stage in stages], "seed": seed, "minutes": round(minutes, 1), "device": device.type,
        "threads": torch.get_num_threads(), "parameters": sum(p.numel() for p in model.parameters()),
    }  # fmt: skip
    _write_card(out, _card(out) | {_card_name(name): entry})
    measure(name, out, device)


def _compile(model: Any) -> None:
    """Fuses each layer's element-wise work, which is most of the time of so narrow a model (40 % less per step on a CPU)."""
    for layer in (layer for stack in stacks(model) for layer in stack):
        layer.forward = torch.compile(layer.forward, dynamic=True)


def _model(name: str, out: Path, tokenizer: Any, go_on: bool, eyes: Path) -> Any:
    """The model that a name's stages begin with: new weights, or those of the model that it stands on."""
    if go_on or name == "joint":
        source = out / (name if go_on else "frozen")
        kind = getattr(transformers, json.loads((source / "config.json").read_text())["architectures"][0])
        model = kind.from_pretrained(source, dtype=torch.float32)
    else:
        model = _new(name, tokenizer, eyes)
    if name in ("text", "joint"):
        return model
    return freeze(model, LlamaForCausalLM.from_pretrained(out / "text", dtype=torch.float32))


def _new(name: str, tokenizer: Any, eyes: Path) -> Any:
    match name:
        case "text":
            return build.language_model(len(tokenizer))
        case "video":
            donor = LlavaForConditionalGeneration.from_pretrained(eyes, dtype=torch.float32)
            return build.llava_next_video(donor, tokenizer.video_token_id)
        case "audio":
            return build.qwen2_audio(len(tokenizer), tokenizer.audio_token_id)
    return build.llava(len(tokenizer), tokenizer.image_token_id)


def freeze(model: Any, teacher: LlamaForCausalLM) -> Any:
    """The model with the language model of a teacher, which training leaves as it is."""
    model.model.language_model.load_state_dict(teacher.model.state_dict())
    model.lm_head.load_state_dict(teacher.lm_head.state_dict())
    model.model.language_model.requires_grad_(False)
    model.lm_head.requires_grad_(False)
    return model


def measure(name: str, out: Path, device: torch.device) -> None:
    """States on the card what the saved model answers on held-out scenes, through its real processor."""
    items = examples(QUESTIONS, TELLINGS.get(name, "picture"), seed=CARD_SEED)
    found = accuracy(load(out / name, device=str(device)), items)
    card = _card(out)
    card[_card_name(name)] |= {
        "questions": QUESTIONS, "chance": round(chance(items), 4), "accuracy": {k: round(h / n, 4) for k, (h, n) in found.items()},
    }  # fmt: skip
    _write_card(out, card)
    print(json.dumps(card, indent=1))


def _write_card(out: Path, card: dict[str, Any]) -> None:
    (out / "card.json").write_text(json.dumps(card, indent=1) + "\n")


def _card(out: Path) -> dict[str, Any]:
    card = out / "card.json"
    return json.loads(card.read_text()) if card.is_file() else {}


def _card_name(name: str) -> str:
    return "demo" if name == "joint" else f"demo:{name}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--out", type=Path, default=CHECKPOINTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="fewer steps, to try the machinery")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--go-on", action="store_true", help="take up the saved model and run its last stage only")
    parser.add_argument("--measure", action="store_true", help="train nothing: measure the saved models again for the card")
    parser.add_argument("--eyes", type=Path, help="the LLaVA whose tower and connector `video` begins with (OUT/frozen)")
    parser.add_argument("--no-compile", action="store_true", help="where torch.compile finds no C++ compiler")
    options = parser.parse_args()
    for name in options.models:
        if options.measure:
            measure(name, options.out, torch.device(options.device))
            continue
        make(
            name,
            options.out,
            options.seed,
            torch.device(options.device),
            options.steps,
            not options.no_compile,
            options.go_on,
            options.eyes or options.out / "frozen",
        )


if __name__ == "__main__":
    main()
