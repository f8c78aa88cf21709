"""A generation the slow way: prompt and answer in one full pass, without a cache."""

from dataclasses import replace

from torch import Tensor

from probe import Knockout, Lens, Mass, Residual, Rows, Subject, trace
from probe.edits import Edit
from probe.generation import Generation
from probe.recorders import Recorder

# Which dimension of a record tells the written tokens apart, in the full pass.
_STEP = {"mass": 3, "entropy": 3, "sink": 3, "rows": 3, "lens_top_ids": 2, "lens_top_probs": 2, "states": 2}


def in_one_pass(
    subject: Subject, made: Generation, record: list[Recorder], edit: list[Edit]
) -> dict[str, Tensor]:  # fmt: skip
    """What each written token's position records in a full pass over prompt and answer, `step` first, as in a Generation.

    Recorders and knock-outs of `last` become those of every position that writes a token.
    """
    steps = made.tokens.shape[1]
    prompt = len(made.encoded.maps[0]) - steps
    named = {f"token {step}": [prompt - 1 + step] for step in range(steps)}
    written = range(prompt - 1, prompt - 1 + steps)
    encoded = made.encoded.with_maps([m.with_groups(**named, written=written) for m in made.encoded.maps])
    asked: list[Recorder] = []
    for one in record:
        if isinstance(one, Mass):
            asked.append(replace(one, rows=tuple(named), columns=made.steps[0]["mass"].labels["column_group"]))
        else:
            assert isinstance(one, Rows | Lens | Residual)
            asked.append(replace(one, positions="written"))
    cuts = [replace(one, rows="written") if isinstance(one, Knockout) and one.rows == "last" else one for one in edit]
    found = trace(subject, encoded, asked, cuts)
    full = {}
    for name in found.records:
        if name in _STEP:
            tensor = found[name].tensor.movedim(_STEP[name], 0).unsqueeze(_STEP[name] + 1)
            full[name] = tensor[..., :-1] if name == "rows" else tensor  # nobody looks at the token that is written last
    return full
