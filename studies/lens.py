"""Which words does each position of what is shown become, and at which layer?

The logit lens over the positions of a picture, held against what is known to be there: how many patches of an object read as its
word (arXiv 2410.07149), whether confidence in a word tells present objects from absent ones, and what the model says of an object
after its word has been taken out of the picture's states (arXiv 2410.02762). Each claim stands beside its null.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from probe.analysis.lens import OTHER_PATCHES, OTHER_WORD, OWN, correspondence
from probe.edits import Erase
from probe.errors import DataError, ExampleError, StudyError, did_you_mean
from probe.example import Example, Region
from probe.points import layer_list
from probe.recorders import Confidence
from probe.spelling import SOURCES, Spelling, spell, word_direction
from probe.subject import Encoded, Subject
from probe.tracing import Trace, last_logits, trace
from probe.vocabulary import NORMS
from studies.demo.data import everything
from studies.objects import ABSENT, PRESENT, ROLES, Known, known, shown_by, vocabulary, words_of
from studies.run import Run, finite
from studies.study import Setting, Summary, describe, study
from studies.work import Rows, picked, read_units, refuse_nothing, sift

SCHEMA = pa.schema([
    *((name, pa.string()) for name in ("example", "what", "role", "word", "against", "norm", "text")),
    ("layer", pa.int32()), ("n", pa.int32()), ("present", pa.bool_()), ("hit", pa.bool_()),
    *((name, pa.float64()) for name in ("value", "before", "area")),
    ("first", pa.list_(pa.float64())), ("among", pa.list_(pa.float64())), ("texts", pa.list_(pa.string())),
])  # fmt: skip
DRAWN, PATCHES, SWEPT = 3, 8, 4  # examples whose words are drawn, patches of each, layers at which words are erased
AUTO = "auto"


@dataclass
class Plan:
    """What is read of each example; directions are made when they are first wanted."""

    subject: Subject
    words: dict[str, tuple[str, ...]]
    norm: str
    top: int
    complete: bool
    text_layer: int
    image_layers: tuple[int, ...]
    alpha: float
    direction: str
    question: str
    seed: int
    drawn: frozenset[str]
    spellings: dict[str, Spelling] = field(default_factory=dict)
    directions: dict[str, torch.Tensor] = field(default_factory=dict)

    def spelling(self, word: str) -> Spelling:
        if word not in self.spellings:
            self.spellings[word] = spell(self.subject, word)
        return self.spellings[word]

    def direction_of(self, word: str) -> torch.Tensor:
        if word not in self.directions:
            self.directions[word] = word_direction(self.subject, word, self.direction, self.text_layer)
        return self.directions[word]

    @property
    def read(self) -> list[tuple[str, str]]:
        """Every word that is read at every position, with its role."""
        return [(role, word) for role in ROLES for word in self.words[role]]

    def rng(self, example: Example, *more: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, *example.id.encode(), *"".join(more).encode()])


@study
def lens(
    setting: Setting,
    *,
    norm: str = "final",
    top: int = 5,
    complete: bool = False,
    words: int = 128,
    text_layer: int = 1,
    image_layer: int = 2,
    alpha: float = 1.5,
    direction: str = "state",
    question: str = "auto",
    sweep: bool = True,
) -> Summary:
    """Which words does each position of what is shown become, and at which layer?

    `norm` is the lens of the correspondence (`final`, or `none` as published for confidence, which is read both ways); `top` the likeliest
    tokens that count as read; `complete` says that an example's regions name all that is in its picture (in the bundled world they do);
    `words` the commonest labels that are read. A word is erased `alpha` times, at `image_layer` and, with `sweep`, at others, along
    `direction`: its `state` as it leaves `text_layer`, or its rows of the `embedding` or `unembedding`; `question` asks for an object ({}).
    """
    subject = setting.subject
    for name, value, allowed in (("norm", norm, NORMS), ("direction", direction, SOURCES)):
        if value not in allowed:
            raise StudyError(f"there is no {name} {value!r}{did_you_mean(value, allowed)}")
    if top < 1 or words < 1:
        raise StudyError(f"the lens needs at least one token and one word to look for, not top {top} and words {words}")
    if top > subject.vocabulary:
        raise StudyError(
            f"top {top} is more than the {subject.vocabulary} tokens of the vocabulary: every word would count as read"
        )
    if question != AUTO and "{}" not in question:
        raise StudyError(f"a question about an object has a place for its word ({{}}), unlike {question!r}")
    image_layer = min(image_layer, subject.n_layers - 1)
    layers = layer_list(sorted({image_layer, *(_spread(subject.n_layers - 1) if sweep else ())}), subject.n_layers)
    layer_list(text_layer, subject.n_layers)
    examples = setting.data.examples
    chosen = vocabulary(examples, words)
    plan = Plan(subject, chosen, norm, top, complete, text_layer, tuple(layers), alpha, direction, question, setting.seed,
                frozenset(example.id for example in examples[:DRAWN]))  # fmt: skip
    options = {"norm": norm, "top": top, "complete": complete, "text_layer": text_layer, "image_layers": layers, "alpha": alpha,
               "direction": direction, "question": question, "words": chosen}  # fmt: skip
    config = {"data": setting.data.name, "fingerprint": setting.data.fingerprint, "limit": len(setting.data),
              "batch": setting.batch, "padding": setting.padding, "seed": setting.seed, "image_layer": image_layer, **options}  # fmt: skip
    run = Run.open(setting.out, "lens", config, describe(subject), SCHEMA)
    with run.recorded():
        return _carry_out(setting, plan, run, image_layer)


def _spread(count: int) -> list[int]:
    """At most SWEPT of the first `count` layers, evenly spread; after a model's last layer nothing looks at the picture any more."""
    return [round(i * (count - 1) / (min(SWEPT, count) - 1)) for i in range(min(SWEPT, count))] if count > 1 else [0]


def _carry_out(setting: Setting, plan: Plan, run: Run, image_layer: int) -> Summary:
    from studies.lens_report import figures, report, summarise

    rows = read_units(setting, run, "lens", lambda examples: unit(setting, plan, examples))
    refuse_nothing(rows, len(set(picked(rows, what="object")["example"].to_pylist())))
    summary = finite(summarise(rows, plan, image_layer, setting.seed))
    summary["run"] = str(run.folder)
    figures(run, rows, summary)
    run.finish(summary, report(summary, setting, plan))
    return summary


# --- one unit of work ------------------------------------------------------------------------------------------------


def unit(setting: Setting, plan: Plan, examples: list[Example]) -> Rows:
    """All rows of some examples; one that cannot be read is a row that says why."""
    usable, rows = sift(examples, lambda example: _check(plan, example))
    if not usable:
        return rows
    facts = [known(example, plan.words, plan.complete) for example in usable]
    encoded = plan.subject.encode(usable, setting.padding)
    ids = tuple(plan.spelling(word).ids for _, word in plan.read)
    other = next(norm for norm in NORMS if norm != plan.norm)
    asked = tuple(ids for _ in usable)
    found = trace(plan.subject, encoded, [Confidence(asked, top=plan.top, norm=plan.norm), Confidence(asked, norm=other)])
    for i, (example, fact) in enumerate(zip(usable, facts, strict=True)):
        place = found["confidence_positions"].tensor[i].numpy()
        place = place[place >= 0]
        rows += _object_rows(plan, encoded, found, i, example, fact, place)
        for norm, name in ((plan.norm, "confidence_log_prob"), (other, "confidence_log_prob.1")):
            read = found[name].tensor[:, i, : len(place)].numpy()
            rows += _confidence_rows(plan, encoded, i, example, fact, norm, read, place)
    return rows + _erased_rows(setting, plan, usable, facts)


def _check(plan: Plan, example: Example) -> None:
    """Raises the reason for which an example's objects cannot be looked for."""
    fact = known(example, plan.words, plan.complete)
    if not fact.regions:
        raise DataError(f"example {example.id!r} has no labelled region, so that nothing is known of its picture")
    token_map = plan.subject.encode(example).maps[0]
    if token_map.crossed is not None:
        raise ExampleError(
            f"the picture of example {example.id!r} is not in the sequence of this {plan.subject.anatomy.family} model"
        )
    if not len(shown_by(token_map, fact.regions)):
        raise DataError(f"no position of the picture of example {example.id!r} shows one of its regions")


def _object_rows(plan: Plan, encoded: Encoded, found: Trace, i: int, example: Example, fact: Known, place: np.ndarray) -> Rows:
    """For each object and each word of its label, the share of patches that read as it, beside its nulls."""
    token_map = encoded.maps[i]
    ids = found["confidence_top_ids"].tensor[:, i, : len(place)].numpy()
    rows: Rows = []
    for region in fact.regions:
        patches = np.searchsorted(place, shown_by(token_map, [region]))
        if not len(patches):
            continue
        for role, words in words_of(region.label).items():
            for word in words:
                own = {
                    "example": example.id,
                    "what": "object",
                    "role": role,
                    "word": word,
                    "text": region.label,
                    "n": len(patches),
                }
                rng = plan.rng(example, region.label, word)
                arms = [(OWN, patches, word)]
                if absent := sorted(fact.absent[role]):
                    arms.append((OTHER_WORD, patches, str(rng.choice(absent))))
                carriers = [r for r in fact.regions if word in words_of(r.label)[role]]
                elsewhere = np.setdiff1d(np.arange(len(place)), np.searchsorted(place, shown_by(token_map, carriers)))
                if len(elsewhere) >= len(patches):
                    arms.append((OTHER_PATCHES, rng.choice(elsewhere, len(patches), replace=False), word))
                for against, where, what in arms:
                    shares = correspondence(ids, where, plan.spelling(what).ids)
                    rows.append({**own, "against": against, "first": shares.first.tolist(), "among": shares.among.tolist()})
    if example.id in plan.drawn:
        rows += _drawn_rows(plan, found, i, example, fact.regions, token_map, place)
    return rows


def _drawn_rows(
    plan: Plan, found: Trace, i: int, example: Example, regions: Sequence[Region], token_map: Any, place: np.ndarray
) -> Rows:
    """What some patches of the first object read as, layer by layer, for a figure."""
    region = next(r for r in regions if len(shown_by(token_map, [r])))
    patches = np.searchsorted(place, shown_by(token_map, [region]))[:PATCHES]
    ids, probs = found["confidence_top_ids"].tensor, found["confidence_top_probs"].tensor
    return [
        {"example": example.id, "what": "drawn", "text": region.label, "layer": layer,
         "texts": [plan.subject.tokenizer.decode([int(token)]).strip() for token in ids[layer, i, patches, 0]],
         "first": probs[layer, i, patches, 0].double().tolist()}
        for layer in range(len(ids))
    ]  # fmt: skip


def _confidence_rows(
    plan: Plan, encoded: Encoded, i: int, example: Example, fact: Known, norm: str, read: np.ndarray, place: np.ndarray
) -> Rows:
    """Internal confidence in each word that is known to fit or not, and where a fitting one is read best. `read` (layer position word)."""
    rows: Rows = []
    for number, (role, word) in enumerate(plan.read):
        if word not in fact.present[role] | fact.absent[role]:
            continue
        layer, best = (int(index) for index in np.unravel_index(read[:, :, number].argmax(), read.shape[:2]))
        row = {"example": example.id, "what": "confidence", "role": role, "word": word, "norm": norm, "layer": layer,
               "value": float(np.exp(read[layer, best, number])), "present": word in fact.present[role]}  # fmt: skip
        own = [region for region in fact.regions if word in words_of(region.label)[role]]
        if own:
            inside = shown_by(encoded.maps[i], own)
            row |= {"area": len(inside) / len(place), "hit": bool(np.isin(place[best], inside))}
        rows.append(row)
    return rows


# --- erasing ---------------------------------------------------------------------------------------------------------


def _erased_rows(setting: Setting, plan: Plan, examples: list[Example], facts: list[Known]) -> Rows:
    """What the model says to a question for an object before and after its word, or another one, has left the picture's states."""
    chosen = [_chosen(plan, example, fact) for example, fact in zip(examples, facts, strict=True)]
    in_vain = plan.subject.encode(
        [_question(plan, e, arms.get(ABSENT, arms[OWN])) for e, arms in zip(examples, chosen, strict=True)], setting.padding
    )
    encoded = plan.subject.encode(
        [_question(plan, e, arms[OWN]) for e, arms in zip(examples, chosen, strict=True)], setting.padding
    )
    says = [{a: plan.subject.first_tokens([a, a.capitalize()], e) for a in ("yes", "no")} for e in encoded.examples]
    before = _yes(last_logits(plan.subject, encoded), says)
    rows: Rows = [
        {"example": example.id, "what": "in vain", "word": arms[ABSENT], "value": value}
        for example, arms, value in zip(examples, chosen, _yes(last_logits(plan.subject, in_vain), says), strict=True) if ABSENT in arms
    ]  # fmt: skip
    for layer in plan.image_layers:
        for against in (OWN, PRESENT, ABSENT):
            if not any(against in arms for arms in chosen):
                continue
            directions = torch.stack([plan.direction_of(arms.get(against, arms[OWN]))[None] for arms in chosen])
            logits = trace(plan.subject, encoded, edit=[Erase(layer, "image", directions, plan.alpha)]).logits
            after = _yes(logits, says)
            rows += [
                {"example": example.id, "what": "erased", "role": "noun", "word": arms[OWN], "text": arms[against], "against": against,
                 "layer": layer, "before": was, "value": now}
                for example, arms, was, now in zip(examples, chosen, before, after, strict=True) if against in arms
            ]  # fmt: skip
    return rows


def _chosen(plan: Plan, example: Example, fact: Known) -> dict[str, str]:
    """The object that is asked for, another one that is there, and one that is not, as far as they are known."""
    rng = plan.rng(example, "erase")
    boxed = sorted({word for region in fact.regions for word in words_of(region.label)["noun"]})
    own = str(rng.choice(boxed))
    made = {OWN: own}
    for name, words in ((PRESENT, sorted(set(boxed) - {own})), (ABSENT, sorted(fact.absent["noun"]))):
        if words:
            made[name] = str(rng.choice(words))
    return made


def _question(plan: Plan, example: Example, word: str) -> Example:
    """The same picture and a question for an object, in the words of the bundled world for a model of it."""
    demo = everything(example) is not None
    form = plan.question if plan.question != AUTO else ("is there a {} ?" if demo else "Is there a {} in the image?")
    suffix = example.suffix if demo else "Answer yes or no."
    return replace(example, prompt=form.replace("{}", word), context="", options="", suffix=suffix, answer="yes")


def _yes(logits: torch.Tensor, says: Sequence[dict[str, list[int]]]) -> list[float]:
    """The log-odds of yes against no, in nats, each in lower case and capitalised: a probability near 1 would hide a change."""
    return [
        float(row[sorted(set(tokens["yes"]))].logsumexp(0) - row[sorted(set(tokens["no"]))].logsumexp(0))
        for row, tokens in zip(logits, says, strict=True)
    ]
