"""What the demo can still do with fewer neurons and heads, by how they were chosen: `python examples/narrow.py`.

Each row is one recipe, each column one score, calibrated on questions about scenes that are not asked (`words`: on their words alone). Prints a Markdown table: right answers in
percent, and the decoder's multiply-adds of reading a prompt beside the whole model's. Random is the mean over three seeds. A star: McNemar's exact test over the
same questions, corrected over the table (Benjamini-Hochberg, 5 %), tells it from the random choice of the first seed.
"""

import argparse

import numpy as np
import torch

from compress.calibration import Calibration
from compress.cost import mean_cost
from compress.measure import answer, encode_all
from compress.passes.width import Width
from compress.recipe import compress
from probe import load
from probe.analysis.stats import benjamini_hochberg, mcnemar
from studies.demo.data import SEED, examples

CUTS = {
    "a quarter of the neurons": Width(neurons=0.25),
    "half of the neurons": Width(neurons=0.5),
    "half, over all layers": Width(neurons=0.5, allocation="global"),
    "2 of 16 groups of heads": Width(heads=0.125, allocation="global"),
    "4 of 16 groups of heads": Width(heads=0.25, allocation="global"),
    "1 of 2 groups in each layer": Width(heads=0.5),
}
SCORES = {
    "flap": {"score": "flap"},
    "flap, words": {"score": "flap", "side": "textual"},
    "flap, bias": {"score": "flap", "compensate": True},
    "taylor": {"score": "taylor"},
    "magnitude": {"score": "magnitude"},
    **{f"random {seed}": {"score": "random", "seed": seed} for seed in range(3)},
}
SEEDS = tuple(name for name in SCORES if name.startswith("random"))
SHOWN = tuple(name for name in SCORES if name not in SEEDS)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=400)
    parser.add_argument("--calibration", type=int, default=64)
    parser.add_argument("--cuts", nargs="+", choices=list(CUTS), default=list(CUTS))
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    subject = load("demo", device="cpu")
    evidence = {"calibration": Calibration(tuple(examples(asked.calibration, seed=SEED + 1)))}
    batches, prompts = encode_all(subject, examples(asked.questions), 50), [subject.encode(one) for one in examples(4)]
    dense, reading = answer(subject, batches).right, mean_cost(subject, prompts).by_phase["prefill"]
    right: dict[tuple[str, str], np.ndarray] = {}
    flops = {}
    for cut in asked.cuts:
        for name, settings in SCORES.items():
            smaller = compress(subject, [CUTS[cut].model_copy(update=settings)], evidence)
            right[cut, name] = answer(smaller, batches).right
        flops[cut] = mean_cost(smaller, prompts).by_phase["prefill"] / reading
    keys = [(cut, name) for cut in asked.cuts for name in SHOWN]
    corrected = benjamini_hochberg(np.array([mcnemar(right[key], right[key[0], SEEDS[0]]) for key in keys]))
    stars = {key: " *" if p < 0.05 else "" for key, p in zip(keys, corrected, strict=True)}
    print(f"| {len(dense)} questions, {dense.mean():.1%} right before | multiply-adds | {' | '.join(SHOWN)} | random |")
    print("|---" * (len(SHOWN) + 3) + "|")
    for cut in asked.cuts:
        shares = [f"{right[cut, name].mean():.1%}{stars[cut, name]}" for name in SHOWN]
        chance = np.mean([right[cut, name].mean() for name in SEEDS])
        print(f"| {cut} | {flops[cut]:.0%} | {' | '.join(shares)} | {chance:.1%} |")


if __name__ == "__main__":
    main()
