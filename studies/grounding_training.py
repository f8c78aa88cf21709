"""How the grounding study's mask head is trained: on fresh scenes of the bundled world, or on the selection split of other data."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image

from probe.analysis.grounding import box_mask
from probe.errors import DataError, SightlineError
from probe.example import Example, Region
from probe.grounding import find_targets
from probe.mask_head import MaskHead, mask_loss
from probe.subject import Subject
from studies.demo import picture, world
from studies.demo.data import SUFFIX
from studies.grounding_units import MASK_SIDE, Plan, Usable, read_targets
from studies.study import units

WIDTH, STAGES = 16, 2  # F-LMM has 64 and 4, for a thousand channels and 190 000 samples
BATCH, RATE, DECAY = 8, 2e-3, 0.01
SEED = 40_000  # far from the seeds of the world as a data set
KINDS = ("color", "thing", "count", "exist", "place", "relation", "compare")


def fresh_examples(count: int, seed: int) -> list[Example]:
    """Questions about scenes of the training split (its combinations, its handwriting), each about its own scene."""
    rng = np.random.default_rng(SEED + seed)
    made: list[Example] = []
    while len(made) < count:
        scene = world.sample_scene(rng)
        question = world.ask(rng, scene, KINDS)
        if question is None or not question.about:
            continue
        boxes = picture.draw(scene)[1]
        regions = tuple(Region(boxes[thing], f"{thing.colour} {thing.name}") for thing in question.about)
        made.append(
            Example(f"fresh-{len(made):05d}", question.text, (partial(_picture, scene),), suffix=SUFFIX, regions=regions)
        )
    return made


def _picture(scene: world.Scene) -> Image.Image:
    return picture.draw(scene)[0]


def train(subject: Subject, usables: Sequence[Usable], plan: Plan) -> tuple[MaskHead, list[float]]:
    """A mask head for the frozen model's word maps, and the mean loss of each epoch.

    The seed fixes weights and order; passes and batches are always the same ones, whatever the study's own are.
    """
    maps, masks = _dataset(subject, usables, plan)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        head = MaskHead(maps.shape[1], WIDTH, STAGES)
        steps = plan.epochs * -(-len(maps) // BATCH)
        optimiser = torch.optim.AdamW(head.parameters(), RATE, weight_decay=DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps + 1)
        losses = []
        for _ in range(plan.epochs):
            found = []
            for chosen in torch.randperm(len(maps)).split(BATCH):
                optimiser.zero_grad()
                loss = mask_loss(head(maps[chosen]), masks[chosen])
                loss.backward()
                optimiser.step()
                schedule.step()
                found.append(loss.item())
            losses.append(float(np.mean(found)))
    return head.eval(), losses


def _dataset(subject: Subject, usables: Sequence[Usable], plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    """Word maps (target channel row column) and the boxes that they should become (target row column)."""
    maps, masks = [], []
    for _, items in units(len(usables), BATCH):
        for read in read_targets(subject, [usables[i] for i in items], plan, "left", relative=False):
            maps.append(read.maps["word"].shared().raster(MASK_SIDE))
            masks.append(torch.from_numpy(box_mask(read.target.boxes, MASK_SIDE)).float())
    return torch.stack(maps), torch.stack(masks)


def training_set(subject: Subject, selection: Sequence[Usable], plan: Plan, world_data: bool) -> list[Usable]:
    """What the mask head learns from: fresh scenes for the bundled world, the selection split for any other data."""
    if not world_data:
        return list(selection[: plan.train_scenes])
    made = []
    for example in fresh_examples(plan.train_scenes, plan.seed):
        try:
            targets, _ = find_targets(subject, example, subject.encode(example).maps[0])
        except SightlineError:
            continue
        if targets:
            made.append(Usable(example, example.id, tuple(targets)))
    if not made:
        raise DataError("the mask head has nothing to learn from: pass --no-mask-head")
    return made
