"""The `sightline` command. Heavy libraries are imported by the command that needs them, not before."""

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from probe.subject import Subject

from probe.errors import SightlineError, StudyError
from studies.study import STUDIES

app = typer.Typer(
    name="sightline", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="See how a multimodal language model uses what it is shown.",
)  # fmt: skip

EVIDENCE_DATA = "data that plans and calibration rest on (default: other scenes of the demo; of other data every second example, 64 at most)"
Model = Annotated[str, typer.Option("--model", "-m", help="demo, demo:NAME, a folder, or a hub id")]
DataName = Annotated[str, typer.Option("--data", "-d", help="demo, demo:text, a .jsonl, or a folder that datasets saved")]
Limit = Annotated[int | None, typer.Option("--limit", "-n", help="at most this many examples")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="the run's directory; asking again continues it")]
Seed = Annotated[int, typer.Option(help="seed of everything random")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; the GPU where there is one")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, float16; bfloat16 on a GPU, float32 on a CPU")]
DeviceMap = Annotated[str | None, typer.Option(help="auto, to spread the model over devices with accelerate")]
Json = Annotated[bool, typer.Option("--json", help="the last line of standard output is one JSON object")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress bars")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="run code that the model folder brings along")]
Batch = Annotated[int, typer.Option(min=1, help="examples in a forward pass")]
Padding = Annotated[Literal["left", "right"], typer.Option(help="where shorter prompts of a batch are filled up")]
Rounds = Annotated[int, typer.Option(min=0, help="how often answers are timed, in turns with the dense model; 0: not at all")]
Tokens = Annotated[int, typer.Option(min=2, help="how many tokens each timed answer has")]
Columns = Annotated[list[str] | None, typer.Option("--columns", help="FIELD=COLUMN for datasets; repeat it")]


@contextmanager
def _errors(debug: bool) -> Iterator[None]:
    """An error is one sentence on standard error and exit code 1; the traceback only with --debug."""
    try:
        yield
    except SightlineError as error:
        if debug:
            traceback.print_exc()
        typer.echo(f"sightline: {error}", err=True)
        raise typer.Exit(1) from error
    except (typer.Exit, SystemExit):
        raise
    except Exception as error:  # a library's own error: its first line, and the way to see the rest
        if debug:
            traceback.print_exc()
        first = (str(error).strip().splitlines() or [""])[0]
        typer.echo(f"sightline: {type(error).__name__}: {first} (--debug shows where)", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        typer.echo("sightline: stopped; asking again with the same --out continues", err=True)
        raise typer.Exit(1) from error


def _say(result: Any, as_json: bool, text: Callable[[], str]) -> None:
    typer.echo(json.dumps(result, default=str, allow_nan=False) if as_json else text())


def _quiet_libraries() -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler tells of itself otherwise
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _load(model: str, device: str | None, dtype: str | None, device_map: str | None, trust: bool) -> Any:
    _quiet_libraries()
    import torch
    from transformers.utils import logging

    from compress import ledger, saving
    from probe.errors import LoadError
    from probe.subject import load

    logging.disable_progress_bar()

    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype is not None and dtype not in kinds:
        raise LoadError(f"there is no dtype {dtype!r}: name {', '.join(kinds)}")
    try:
        if device:
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise LoadError(
            f"there is no device {device!r} here: name cpu, or cuda where there is a GPU (sightline doctor)"
        ) from error
    if (Path(model) / ledger.FILE).is_file():
        if device_map:
            raise LoadError(f"{model} is a compressed model, which is opened on one device: leave --device-map out")
        return saving.load(model, kinds[dtype] if dtype else None, device)
    return load(model, kinds[dtype] if dtype else None, device, device_map, trust)


def _load_data(data: str, limit: int | None, columns: list[str] | None, seed: int) -> Any:
    from studies.data import load_data

    if wrong := [item for item in columns or [] if "=" not in item]:
        raise StudyError(f"--columns maps a field to a column, prompt=question, not {wrong[0]!r}")
    return load_data(data, limit, dict(item.split("=", 1) for item in columns or []), seed)


@app.command()
def demo(out: Out = None, limit: Limit = 128, as_json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """The whole story on the bundled model: what it can do, and where what it sees reaches its answer."""
    with _errors(debug):
        _quiet_libraries()
        from studies.story import tell

        summary = tell(out, limit or 128, quiet, lambda text: typer.echo(text, err=as_json))
        _say(summary, as_json, lambda: f"\nreport: {summary['report']}")


@app.command()
def models(
    check: Annotated[str | None, typer.Option(help="verify this model instead: demo, a folder, or a hub id")] = None,
    device: Device = None, dtype: Dtype = None, device_map: DeviceMap = None, trust_remote_code: Trust = False,
    as_json: Json = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Families, and what works on each, as the contract tests found it; or what is verified on one model."""
    with _errors(debug):
        if check is not None:
            subject = _load(check, device, dtype, device_map, trust_remote_code)
            _say(_checked(subject), as_json, lambda: _checks_as_text(subject))
            return
        from compress.support import support as passes
        from probe.anatomy.support import support

        found = {row["family"]: row["passes"] for row in passes()}
        table = [{**row, "passes": found.get(row["family"], {})} for row in support()]
        _say(table, as_json, lambda: f"{_table_as_text(table)}\n\n{_passes_as_text(table)}")


def _checked(subject: "Subject") -> dict[str, Any]:
    checks = [{"check": check.name, "held": check.held, "seen": check.seen, "means": check.means} for check in subject.checks]
    return {"family": subject.anatomy.family, "model_type": subject.anatomy.model_type, "checks": checks}


def _checks_as_text(subject: "Subject") -> str:
    parts = ("layers", "final_norm", "embedding", "unembedding", "vision", "audio", "connector")
    return "\n".join([
        f"{subject.anatomy.family} ({subject.anatomy.model_type}), {subject.n_layers} layers; takes "
        f"{', '.join(subject.marks) or 'text only'}",
        *(f"  {part:<14}{getattr(subject.anatomy, part) or '-'}" for part in parts),
        *(f"  {'held' if check.held else 'FAILED':<8}{check.name:<10}{check.seen:<10}{check.means}" for check in subject.checks),
    ])  # fmt: skip


def _table_as_text(table: list[dict[str, Any]]) -> str:
    from probe.anatomy.support import reasons

    names = list(table[0]["capabilities"])
    short = {"pass": "yes", "not applicable": "-", "refused": "no"}
    widths = [max(len(name), 4) + 2 for name in names]
    rows = [f"{'family':<27}" + "".join(f"{name:<{width}}" for name, width in zip(names, widths, strict=True))]
    for row in table:
        verdicts = row["capabilities"].values()
        cells = "".join(f"{short[v.split(':')[0]]:<{width}}" for v, width in zip(verdicts, widths, strict=True))
        rows.append(f"{row['family']:<27}{cells}")
    notes = [
        f"{verdict}\n  ({len(places)} families)" if len(places) > 6 else f"{verdict}\n  ({'; '.join(places)})"
        for verdict, places in reasons(table)
    ]
    rest = "Any other family goes through the resolver, or is refused by name with the row to add."
    return "\n".join([*rows, "", *notes, "", rest])


def _passes_as_text(table: list[dict[str, Any]]) -> str:
    """Passes by family, each family by a letter."""
    rows = [row for row in table if row["passes"]]
    letters = "abcdefghijklmnopqrstuvwxyz"[: len(rows)]
    short = {"pass": "yes", "not applicable": "-", "refused": "no"}
    lines = [f"{'pass':<34}" + "".join(f"{letter:<5}" for letter in letters)]
    for name in rows[0]["passes"]:
        lines.append(f"{name:<34}" + "".join(f"{short[row['passes'][name].split(':')[0]]:<5}" for row in rows))
    names = ", ".join(f"{letter} {row['family']}" for letter, row in zip(letters, rows, strict=True))
    return "\n".join([*lines, "", names, "The reasons are in docs/compress/families.md, and in --json."])


@app.command()
def studies(as_json: Json = False) -> None:
    """The studies, each with its question."""
    table = [{"name": name, "question": question} for name, (_, question) in STUDIES.items()]
    _say(table, as_json, lambda: "\n".join(f"{row['name']:<20}{row['question']}" for row in table))


@app.command()
def trace(
    model: Annotated[str, typer.Argument(help="demo, demo:NAME, a folder, or a hub id")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="the question")],
    image: Annotated[list[Path] | None, typer.Option("--image", "-i", help="a picture; repeat it for several")] = None,
    video: Annotated[list[Path] | None, typer.Option("--video", "-v", help="a video file or a folder of frames")] = None,
    audio: Annotated[list[Path] | None, typer.Option("--audio", "-a", help="a WAV or FLAC file")] = None,
    frames: Annotated[int, typer.Option(min=1, help="how many frames of each video are shown, evenly chosen")] = 8,
    suffix: Annotated[str, typer.Option(help="an answer-format instruction after the question")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="at most this many tokens of answer")] = 32,
    out: Out = None, seed: Seed = 0, device: Device = None, dtype: Dtype = None, device_map: DeviceMap = None,
    trust_remote_code: Trust = False, as_json: Json = False, quiet: Quiet = False, debug: Debug = False,
) -> None:  # fmt: skip
    """One picture, one question: the answer, how the tokens lie, where attention goes, and the lens."""
    with _errors(debug):
        subject = _load(model, device, dtype, device_map, trust_remote_code)
        from probe.example import Example
        from probe.media import Video
        from studies.look import look

        videos = tuple(Video(path, frames) for path in video or ())
        example = Example("asked", prompt, tuple(image or ()), suffix=suffix, videos=videos, sounds=tuple(audio or ()))
        summary = look(subject, example, out, max_new_tokens)

        def text() -> str:
            runs = ", ".join(f"{s['segment']} {s['start']}-{s['stop'] - 1}" for s in summary["segments"])
            return (
                f"answer: {summary['answer']}\n{summary['n_positions']} positions: {runs}\nreport: {summary['run']}/report.md"
            )

        _say(summary, as_json, text)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def study(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="a study's name; `sightline studies` lists them")],
    model: Model = "demo", data: DataName = "demo", limit: Limit = None, batch: Batch = 8, padding: Padding = "left",
    columns: Columns = None, out: Out = None, seed: Seed = 0, device: Device = None, dtype: Dtype = None, device_map: DeviceMap = None,
    trust_remote_code: Trust = False, as_json: Json = False, quiet: Quiet = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Run a study. `sightline study NAME --help` shows its own options beside these; `sightline studies` lists the names."""
    if name == "--help":
        typer.echo(context.get_help())
        return
    with _errors(debug):
        from studies.options import parse
        from studies.study import Setting, find_study

        _quiet_libraries()
        function = find_study(name)
        options = parse(name, function, context.args)
        if name in ("speed", "backends", "analyses", "compressing"):  # they bring their own model and data
            summary = function(out=out, seed=seed, device=device, dtype=dtype, quiet=quiet, **options)
        else:
            found = _load_data(data, limit, columns, seed)
            subject = _load(model, device, dtype, device_map, trust_remote_code)
            summary = function(Setting(subject, found, out, seed, batch, quiet, padding), **options)
        _say(summary, as_json, lambda: f"report: {summary['run']}/report.md")


@app.command()
def measure(
    model: Model = "demo", data: DataName = "demo", limit: Limit = None,
    dense: Annotated[str | None, typer.Option(help="the model that it was made from: compares item by item, and in turns")] = None,
    batch: Batch = 8, rounds: Rounds = 24, tokens: Tokens = 16, columns: Columns = None, out: Out = None, seed: Seed = 0,
    device: Device = None, dtype: Dtype = None, device_map: DeviceMap = None, trust_remote_code: Trust = False, as_json: Json = False,
    quiet: Quiet = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Accuracy, latency, memory and cost of one model, beside the dense one where it is named."""
    with _errors(debug):
        found = _load_data(data, limit, columns, seed)
        subject = _load(model, device, dtype, device_map, trust_remote_code)
        other = _load(dense, device, dtype, device_map, trust_remote_code) if dense else None
        from studies.bench import Bench
        from studies.measuring import measure as measured
        from studies.points import sentence

        bench = Bench(other or subject, found, batch, rounds, tokens, seed=seed)
        result = measured(subject, other, bench, out, quiet)
        note = f"\n{result['note']}" if result["note"] else ""
        _say(result, as_json, lambda: f"{sentence(result)}{note}\nreport: {result['run']}/report.md")


@app.command()
def compress(
    recipe: Annotated[Path | None, typer.Argument(help="a recipe: passes in order, as YAML (docs/compress/recipes.md)")] = None,
    plan: Annotated[Literal["auto"] | None, typer.Option(help="auto: a recipe made from evidence, in place of one that is given")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="print the JSON schema of recipes, for editors, and stop")] = False,
    budget: Annotated[float, typer.Option(help="with --plan: the share of the dense model's cost that reading a prompt may take")] = 0.6,
    cost: Annotated[Literal["flops", "time"], typer.Option(help="with --plan: FLOPs, or the time that this machine takes")] = "flops",
    run: Annotated[list[Path] | None, typer.Option(help="with --plan: a run of information-flow or implicit-alignment to read; repeat it")] = None,
    evidence_data: Annotated[str, typer.Option(help=EVIDENCE_DATA)] = "",
    model: Model = "demo", data: DataName = "demo", limit: Limit = 64, out: Out = None, batch: Batch = 8, rounds: Rounds = 12,
    tokens: Tokens = 8, columns: Columns = None, seed: Seed = 0, device: Device = None, dtype: Dtype = None, trust_remote_code: Trust = False,
    as_json: Json = False, quiet: Quiet = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Apply a recipe, or one planned from evidence, save the smaller model with its ledger, and measure it briefly against the dense one."""
    with _errors(debug):
        _quiet_libraries()
        if schema:
            from compress.recipe import schema as recipe_schema

            typer.echo(json.dumps(recipe_schema(), indent=2))
            return
        if (recipe is None) == (plan is None):
            raise StudyError(
                "sightline compress takes a recipe, or --plan auto to make one from evidence (--schema prints what a recipe may say)"
            )
        if run and plan is None:
            raise StudyError("--run is read to make a plan: add --plan auto")
        from compress.recipe import read
        from compress.smaller import Smaller
        from studies.bench import Bench
        from studies.measuring import gather, make, refuse_folder
        from studies.planning import planned, set_apart, write
        from studies.points import sentence

        asked = read(recipe) if recipe else None
        folder = out or Path("runs") / "compress" / (asked.name if asked else "evidence-plan")
        refuse_folder(folder)
        found = _load_data(data, limit, columns, seed)
        subject = _load(model, device, dtype, None, trust_remote_code)
        if isinstance(subject, Smaller):
            raise StudyError(
                f"{model} is compressed already: put all passes into one recipe for {', '.join(subject.parents) or 'the dense model'}"
            )
        needs = asked is None or any(one.asks() for one in asked.passes)
        found, examples, whence = set_apart(found, evidence_data) if needs else (found, (), "")
        made = None if asked else planned(subject, examples, budget, run or (), seed, quiet, cost)
        asked = asked or (made.recipe if made else None)
        assert asked is not None
        bench = Bench(subject, found, batch, rounds, tokens, seed=seed)
        result = make(
            subject, asked, bench, folder, quiet, made.evidence if made else gather(subject, asked, examples, seed), whence
        )
        if made:
            write(made, folder, whence, run or ())
            result |= {"plan": made.told()}
        result |= {"evidence_from": whence} if needs else {}
        _say(result, as_json, lambda: (
            f"{sentence(result['measured'])}\nmodel: {result['model']}\nloads in plain transformers: {result['loads_in_transformers']}"
            + ("\nwhy each step: " + str(folder / "plan.md") if made else "")
        ))  # fmt: skip


@app.command()
def search(
    space: Annotated[Path, typer.Argument(help="a recipe with free values, {low: 4, high: 32} (docs/compress/search.md)")],
    model: Model = "demo", data: DataName = "demo", limit: Limit = None,
    cost: Annotated[Literal["flops", "prefill", "answer"], typer.Option(help="what is to be low while accuracy is high")] = "flops",
    trials: Annotated[int, typer.Option(min=1, help="how many points are tried, those of an earlier call included")] = 24,
    evidence_data: Annotated[str, typer.Option(help=EVIDENCE_DATA)] = "",
    batch: Batch = 8, rounds: Rounds = 12, tokens: Tokens = 8, columns: Columns = None, out: Out = None, seed: Seed = 0, device: Device = None,
    dtype: Dtype = None, trust_remote_code: Trust = False, as_json: Json = False, quiet: Quiet = False, debug: Debug = False,
) -> None:  # fmt: skip
    """The frontier of accuracy and cost over a recipe's free numbers; killed and asked again, it goes on."""
    with _errors(debug):
        _quiet_libraries()
        from compress.search import read_space

        asked = read_space(space)
        if cost != "flops" and not rounds:
            raise StudyError(f"--cost {cost} is measured: --rounds must be at least 1")
        found = _load_data(data, limit, columns, seed)
        subject = _load(model, device, dtype, None, trust_remote_code)
        from compress.evidence import gather
        from studies.bench import Bench
        from studies.planning import set_apart
        from studies.search import explore

        evidence, whence = None, ""
        if names := asked.asks():
            found, examples, whence = set_apart(found, evidence_data)
            evidence = gather(subject, examples, names, seed)
        result = explore(
            asked, Bench(subject, found, batch, rounds, tokens, seed=seed), out, trials, cost, quiet, evidence, whence
        )
        _say(result, as_json, lambda: f"on the frontier: {', '.join(result['frontier'])}\nreport: {result['run']}/report.md")


@app.command()
def doctor(as_json: Json = False, debug: Debug = False) -> None:
    """What this machine can do, and what is missing."""
    with _errors(debug):
        _quiet_libraries()
        from studies.doctor import examine

        findings = examine()
        _say(findings, as_json, lambda: "\n".join(f"{key:<22}{value}" for key, value in findings.items()))


def main() -> None:
    """Entry point of the `sightline` command."""
    try:
        app()
    except BrokenPipeError:  # a reader such as `head` went away
        sys.stderr.close()


if __name__ == "__main__":
    main()
