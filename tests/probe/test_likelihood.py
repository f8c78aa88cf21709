"""score_options(): a prompt read once gives the numbers of prompt and option read anew, on every family."""

import numpy as np
import pytest
import torch

from probe import Example
from probe.errors import ExampleError, ReplayError
from probe.likelihood import cannot_share, score_options
from tests import toys

OPTIONS = [["yes", "no it is the cat", "three dogs", "red"], ["one", "two three in the picture ?"]]
REFUSED = {"qwen3_5"}


def largest(a, b) -> float:
    return max(
        float(np.abs(np.array(x) - np.array(y)).max())
        for p, q in zip(a, b, strict=True)
        for x, y in zip(p.log_probs, q.log_probs, strict=True)
    )


@pytest.mark.parametrize("family", [*toys.FAMILIES, "llama"])
def test_the_prompt_once_or_anew_for_each_option(toy, family):
    subject = toy(family)
    asked = toys.questions(subject)
    whole = score_options(subject, asked, OPTIONS, "whole")
    if family in REFUSED:
        with pytest.raises(ReplayError, match=r'keeps a running state .* score its options with method="whole"'):
            score_options(subject, asked, OPTIONS)
        return
    shared = score_options(subject, asked, OPTIONS)
    assert largest(whole, shared) < 1e-5
    assert [one.greedy for one in whole] == [one.greedy for one in shared]
    assert max(len(one) for one in shared[0].log_probs) > 2


def test_there_were_26_families(toy):
    assert len(toys.FAMILIES) + 1 == 26
    assert {family for family in toys.FAMILIES if cannot_share(toy(family))} == REFUSED


def test_a_batch_is_its_examples(toy, pair):
    subject = toy("qwen2_vl")
    together = score_options(subject, pair, OPTIONS)
    alone = [score_options(subject, [e], [o])[0] for e, o in zip(pair, OPTIONS, strict=True)]
    assert largest(together, alone) < 1e-5


def test_the_numbers_are_those_of_step_by_step_logits(toy, pair):
    """One token after the other, by plain forward passes on longer and longer prompts."""
    subject = toy("llava")
    found = score_options(subject, pair[:1], [["three dogs"]])[0].log_probs[0]
    inputs = subject.encode(pair[0]).inputs
    ids = subject.tokenizer.encode(" three dogs", add_special_tokens=False)
    assert len(ids) == len(found) == 3
    for step, token in enumerate(ids):
        before = torch.tensor([ids[:step]], dtype=torch.long)
        longer = {**inputs, "input_ids": torch.cat([inputs["input_ids"], before], 1)}
        longer["attention_mask"] = torch.ones_like(longer["input_ids"])
        with torch.no_grad():
            said = subject.model(**longer).logits[0, -1].log_softmax(-1)
        assert found[step] == pytest.approx(float(said[token]), abs=1e-5)


def test_a_word_that_changes_how_the_prompt_is_spelled(toy):
    """The prompt ends within a word, so that prompt and option share a token: it is read again, and counts as the option's."""
    subject = toy("llama")
    subject.tokenizer.chat_template, before = "{{ messages[0]['content'] }}", subject.tokenizer.chat_template
    try:
        asked = [Example("a", "what color is the\n"), Example("b", "a dog in the\n")]
        options = [["\n", "ball"], ["park", "red"]]
        with pytest.raises(ExampleError, match="an empty option"):
            score_options(subject, asked, options)
        options = [["cat", "ball"], ["park", "red"]]
        assert largest(score_options(subject, asked, options, "whole"), score_options(subject, asked, options)) < 1e-5
    finally:
        subject.tokenizer.chat_template = before


def test_prompts_of_different_length_are_reread_together(toy, pair, monkeypatch):
    """Where one example must read its last tokens again, the whole batch does, and the numbers stay."""
    import probe.likelihood as module

    subject = toy("internvl")
    plain = score_options(subject, pair, OPTIONS)
    spell = module._spell

    def longer(subject, encoded, number, offered):
        asked = spell(subject, encoded, number, offered)
        return module._reread(encoded.maps[number].tokens, asked, 3) if number == 0 else asked

    monkeypatch.setattr(module, "_spell", longer)
    assert largest(plain, score_options(subject, pair, OPTIONS)) < 1e-5
    assert largest(plain, score_options(subject, pair, OPTIONS, "whole")) < 1e-5


def test_nothing_is_left_behind(toy, pair):
    subject = toy("llava")
    before = subject.generate(pair, 3)
    score_options(subject, pair, OPTIONS)
    assert not subject.decoder._forward_hooks
    assert subject.generate(pair, 3) == before


@pytest.mark.parametrize(
    ("offered", "message"),
    [([], "has no options"), (["a", " "], "has an empty option"), (["a", "b", "a "], "offers 'a' twice: options must differ")],
)
def test_options_that_cannot_be_scored(toy, pair, offered, message):
    with pytest.raises(ExampleError, match=message):
        score_options(toy("llava"), pair[:1], [offered])
