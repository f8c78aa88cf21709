"""Two of the demo's eight decoder layers are removed, and the rest is taught by the whole model: `python examples/heal.py`.

The student learns from scenes of the kind that the demo was trained on, with the teacher's own answers; accuracy is measured on held-out scenes
before and after. `--out` saves the healed model with its ledger.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from compress import saving
from compress.distillation import Weights
from compress.healing import Losses, distil
from compress.measure import Answers, accuracy, answer, compare, encode_all
from compress.passes.layers import RemoveLayers
from compress.recipe import compress
from probe import Example, load
from studies.demo import picture, world
from studies.demo.data import SUFFIX, examples


def lessons(count: int, seed: int) -> list[Example]:
    """Questions about training scenes: combinations and handwriting that held-out scenes do not have."""
    rng, found = np.random.default_rng(seed), []
    while len(found) < count:
        scene = world.sample_scene(rng)
        if (question := world.ask(rng, scene)) is not None:
            found.append(Example(f"lesson-{len(found)}", question.text, (picture.draw(scene)[0],), suffix=SUFFIX))
    return found


def told(found: Answers) -> dict[str, float | None]:
    return {kind: share.value and round(share.value, 4) for kind, share in accuracy(found).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 5])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--questions", type=int, default=700)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--weights", type=float, nargs=4, default=[1.0, 1.0, 1.0, 0.5], help="answer response visual relation")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    teacher = load("demo", device="cpu")
    student = compress(teacher, [RemoveLayers(layers=tuple(asked.layers))])
    batches = encode_all(teacher, examples(asked.questions), 32)
    dense, before = answer(teacher, batches), answer(student, batches)
    start, used = time.perf_counter(), time.process_time()
    taught = lessons(asked.steps * asked.batch, asked.seed)

    def advance(losses: Losses) -> None:
        shown = " ".join(f"{name} {value:.3f}" for name, value in vars(losses).items())
        print(f"{time.perf_counter() - start:6.1f} s  {shown}", file=sys.stderr, flush=True)

    learned = distil(
        student, teacher, taught, asked.steps, asked.rate, asked.batch, weights=Weights(*asked.weights), seed=asked.seed,
        advance=advance,
    )  # fmt: skip
    seconds = {"wall": round(time.perf_counter() - start), "processor": round(time.process_time() - used)}
    after = answer(student, batches)
    if asked.out:
        saving.save(student, asked.out)
    print(json.dumps({
        "dense": told(dense), "before": told(before), "after": told(after), "seconds": seconds,
        "losses": [vars(learned[i]) for i in (0, -1)] if learned else [], "against_dense": compare(dense, after).told()["difference"],
        "against_before": compare(before, after).told()["difference"],
    }))  # fmt: skip


if __name__ == "__main__":
    main()
