"""trace_generation(): prefill and decode give the numbers of one full pass, token by token."""

import pytest
import torch

from probe import Ablate, Example, Knockout, Lens, Mass, Patch, Patterns, Residual, Rows, trace
from probe.attention import Call
from probe.errors import EditError, ExampleError
from probe.generation import Generation, trace_generation
from tests import toys
from tests.oracles.generation import in_one_pass

RECORD = [Mass(("last",)), Rows("last"), Lens(top=3), Residual("resid_post", positions="last")]
EDITS = {
    "nothing": [],
    "the picture hidden from what writes": [Knockout("last", "image", [1, 2])],
    "the picture hidden from the answer alone": [Knockout("answer", "media")],
    "the answer hidden from itself": [Knockout("answer", "answer")],
    "a block skipped": [Ablate("mlp_out", [1], "text")],
    "a width's mean from elsewhere": [Ablate("attn_out", [2], "real", "mean", reference=torch.linspace(-1, 1, 32))],
}


@pytest.fixture
def llava(toy):
    """A LLaVA that never ends an answer by itself."""
    subject = toy("llava")
    ends = subject.model.generation_config.eos_token_id
    subject.model.generation_config.eos_token_id = None
    yield subject
    subject.model.generation_config.eos_token_id = ends


def same(made: Generation, full: dict[str, torch.Tensor], tolerance: float = 2e-5) -> None:
    assert {"mass", "entropy", "sink", "rows", "lens_top_ids", "lens_top_probs", "states"} <= full.keys()
    for name, expected in full.items():
        torch.testing.assert_close(made[name].tensor, expected, atol=tolerance, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_every_step_is_that_of_one_full_pass(llava, pair, edit):
    made = trace_generation(llava, pair, RECORD, edit, 5)
    assert made.tokens.shape == (2, 5)
    same(made, in_one_pass(llava, made, RECORD, edit))


def test_an_ablation_of_what_writes_takes_each_position_in_its_turn(llava, pair):
    made = trace_generation(llava, pair, RECORD, [Ablate("z", [0], "last", heads=[0, 2])], 4)
    prompt = len(made.encoded.maps[0]) - 4
    whole = [Ablate("z", [0], range(prompt - 1, prompt + 3), heads=[0, 2])]
    same(made, in_one_pass(llava, made, RECORD, whole))


def test_edits_change_what_is_written_and_nothing_else_does(llava, pair):
    plain = trace_generation(llava, pair, max_new_tokens=5)
    assert list(plain.texts) == llava.generate(pair, 5)
    assert torch.equal(trace_generation(llava, pair, RECORD, max_new_tokens=5).tokens, plain.tokens)
    hidden = trace_generation(llava, pair, edit=[Knockout("text", "image")], max_new_tokens=5)
    assert (hidden.steps[0].logits - plain.steps[0].logits).abs().max() > 1e-3
    assert (hidden.steps[3].logits - plain.steps[3].logits).abs().max() > 1e-3


def test_the_prompts_pass_is_a_trace_and_goes_on_with_the_last_position_only(llava, pair):
    record = [Mass(("question", "last"), columns=("image", "answer")), Rows("question"), Patterns([0])]
    made = trace_generation(llava, pair, record, max_new_tokens=3)
    plain = trace(llava, pair, record)
    for name in ("mass", "rows", "patterns"):
        torch.testing.assert_close(made.steps[0][name].tensor, plain[name].tensor, atol=1e-6, rtol=0)
    assert [set(step.records) for step in made.steps[1:]] == [{"mass", "entropy", "sink"}] * 2
    assert made["mass"].tensor.shape == (3, llava.n_layers, 2, llava.n_heads, 1, 2)
    assert made.steps[2]["mass"].at(row_group="last", column_group="answer").min() > 0
    with pytest.raises(EditError, match="did not record 'rows'"):
        made["rows"]


def test_a_patch_is_for_the_prompt(llava, pair):
    value = torch.zeros(1, 32)
    made = trace_generation(llava, pair, [Residual(positions="last")], [Patch("resid_post", 1, "last", value)], 3)
    states = made["states"]
    assert states.tensor[0, states.labels["layer"].index(1)].abs().max() == 0
    assert states.tensor[1:, states.labels["layer"].index(1)].abs().min(-1).values.max() > 0


def test_an_answer_that_has_ended_records_nothing_more(llava, pair):
    free = trace_generation(llava, pair, max_new_tokens=5).tokens
    end = next(int(t) for t in free[0, :3] if t not in free[1])  # the first answer ends, the second goes on
    llava.model.generation_config.eos_token_id = end
    llava.model.generation_config.pad_token_id = 0
    made = trace_generation(llava, pair, RECORD, max_new_tokens=5)
    written = free[0].tolist().index(end) + 1
    assert made.tokens[0].tolist() == [*free[0, :written].tolist(), *[-1] * (5 - written)]
    assert made.tokens[1].tolist() == free[1].tolist()
    assert made["mass"].tensor[written:, :, 0].abs().max() == 0
    assert made["mass"].tensor[written:, :, 1].sum(-1).min() > 0.99
    assert made.encoded.maps[0].segments[-(5 - written) :] == ("pad",) * (5 - written)
    assert len(made.encoded.maps[0].positions("answer")) == written


def test_keys_that_a_sliding_window_has_forgotten_have_no_weight(toy, monkeypatch):
    subject, short = toy("gemma3"), []
    run = Call.run
    total = len(subject.encode(toys.questions(subject)).maps[0])

    def counted(call: Call):
        short.append(call.key.shape[2] < total)
        return run(call)

    monkeypatch.setattr(Call, "run", counted)
    made = trace_generation(subject, toys.questions(subject), [Rows("last")], max_new_tokens=3)
    assert sum(short) > 0
    assert made["rows"].tensor.shape[-1] == total + 2
    torch.testing.assert_close(made["rows"].tensor.sum(-1), torch.ones(made["rows"].tensor.shape[:-1]), atol=1e-5, rtol=0)


def test_what_cannot_be_written_token_by_token_is_refused(llava, pair):
    with pytest.raises(EditError, match="an ablation by mean over 'last' would need the tokens that are not written yet"):
        trace_generation(llava, pair, edit=[Ablate("resid_post", [0], "last", "mean")])
    with pytest.raises(ExampleError, match="padded on the left"):
        trace_generation(llava, llava.encode(pair, "right"))


def hooks(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_the_model_is_as_it_was(llava, pair):
    llava.generate(pair, 1)  # transformers hangs hooks of its own on the first call
    before, attached = {name: value.clone() for name, value in llava.model.state_dict().items()}, hooks(llava.model)
    with pytest.raises(EditError):
        trace_generation(llava, Example("a", "what ?"), edit=[Knockout("text", "image", [99])])
    trace_generation(llava, pair, RECORD, [Knockout("last", "image")], 2)
    assert llava.model.config._attn_implementation == "sdpa"
    assert hooks(llava.model) == attached
    assert all(torch.equal(before[name], value) for name, value in llava.model.state_dict().items())
