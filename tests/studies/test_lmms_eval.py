"""The model class for lmms-eval on a small base class of the same shape; lmms-eval itself is not installed here."""

from dataclasses import dataclass, field

import numpy as np
import pytest

from probe.errors import BackendError, StudyError
from probe.likelihood import score_options
from studies.tasks import lmms_eval
from studies.tasks.lmms_eval import example_of, model_class
from tests import toys


@dataclass
class Hook:
    kept: list = field(default_factory=list)

    def add_partial(self, kind, request, answer):
        self.kept.append((kind, request, answer))


class Base:
    """What lmms_eval.api.model.lmms gives its models: a cache hook and the documents of the tasks."""

    def __init__(self):
        self.cache_hook, self.task_dict = (
            Hook(),
            {"t": {"test": [{"picture": toys.picture(seed=i), "answer": "red"} for i in range(3)]}},
        )


@dataclass
class Request:
    args: tuple


def shown(doc):
    return [doc["picture"]]


@pytest.fixture
def model(toy):
    return model_class(Base)(subject=toy("llava"), batch_size="2")


def ask(number, text="what color is the ball ?", **options):
    return Request((text, {"max_new_tokens": 4, **options}, shown, number, "t", "test"))


def test_answers_are_those_of_the_subject_in_the_order_of_the_requests(model):
    found = model.generate_until([ask(0), ask(1, "<image>is there a dog ?"), ask(2)])
    alone = [
        model.subject.generate(example_of(model.subject, "x", text, shown(model.task_dict["t"]["test"][i])), 4)[0]
        for i, text in enumerate(["what color is the ball ?", "is there a dog ?", "what color is the ball ?"])
    ]
    assert found == alone
    assert [kind for kind, _, _ in model.cache_hook.kept] == ["generate_until"] * 3


def test_an_answer_ends_at_its_stop(model):
    whole = model.generate_until([ask(0)])[0]
    stop = whole[1:3]
    assert model.generate_until([ask(0, until=[stop, ""])])[0] == whole[: whole.index(stop)].strip()


def test_likelihoods_are_those_of_score_options(model):
    def target(doc):
        return doc["answer"]

    text = "what color is the ball ?"
    words = [" red", " blue green", " red", target]
    found = model.loglikelihood([Request((text, w, shown, i // 2, "t", "test")) for i, w in enumerate(words)])
    for k, number in enumerate((0, 0, 1, 1)):
        told = "red" if k == 3 else words[k].strip()
        example = example_of(model.subject, "x", text, shown(model.task_dict["t"]["test"][number]))
        expected = score_options(model.subject, [example], [[told]])[0]
        assert found[k][0] == pytest.approx(float(expected.by("sum")[0]), abs=1e-5)
        assert found[k][1] == expected.greedy[0]


def test_what_is_not_for_it_is_refused(model, toy):
    with pytest.raises(StudyError, match="sightline's are greedy"):
        model.generate_until([ask(0, temperature=0.7)])
    with pytest.raises(StudyError, match="unconditional ones"):
        model.loglikelihood([Request(("", "red"))])
    with pytest.raises(StudyError, match="one question at a time"):
        model.generate_until_multi_round([ask(0)])
    with pytest.raises(StudyError, match="shows int, which is no picture"):
        example_of(model.subject, "x", "what ?", [3])
    with pytest.raises(StudyError, match="not conv_template"):
        model_class(Base)(subject=toy("llava"), conv_template="x")
    heard = example_of(model.subject, "x", "what ?", [{"array": np.zeros(4), "sampling_rate": 8000}, "a.mp4", "b.png"])
    assert (len(heard.sounds), len(heard.videos), len(heard.images)) == (1, 1, 1)


def test_without_lmms_eval_it_says_what_to_install(monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(lmms_eval, "import_module", missing)
    with pytest.raises(BackendError, match=r"pip install .sightline.lmms."):
        lmms_eval.manifest()
    lmms_eval._class.cache_clear()
    with pytest.raises(BackendError, match=r"lmms_eval\.api\.model cannot be imported"):
        lmms_eval.Sightline  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lmms_eval.nothing  # noqa: B018
