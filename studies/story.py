"""The main job on the bundled models: what they can do, and where what `demo` sees reaches its answer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from probe.analysis.stats import wilson
from probe.subject import load
from studies.data import load_data
from studies.demo.data import chance
from studies.demo.score import accuracy
from studies.information_flow import information_flow
from studies.look import look
from studies.study import Setting, progress

TOLD = {"demo:text": "demo:text", "demo:frozen": "demo", "demo": "demo"}


def tell(out: Path | None, limit: int, quiet: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Accuracy of the three models on held-out scenes, the information-flow study, and one question looked at.

    Returns the summary: accuracies, the runs, and the path of the report.
    """
    accuracies = {}
    say(f"Held-out accuracy ({limit} questions; unseen combinations, unseen handwriting)")
    for name, source in TOLD.items():
        subject, data = load(name), load_data(source, limit)
        with progress(name, len(data), quiet) as advance:
            kinds = accuracy(subject, data.examples, advance=advance)
        hits, n = kinds["all"]
        low, high = wilson(hits, n)
        accuracies[name] = {"accuracy": hits / n, "low": low, "high": high, "n": n, "chance": chance(list(data.examples)),
                            "kinds": {kind: h / m for kind, (h, m) in kinds.items() if kind != "all"}}  # fmt: skip
        say(f"  {name:<12} {hits / n:6.1%}  [{low:.1%}, {high:.1%}]   chance {accuracies[name]['chance']:.1%}")
    subject, data = load("demo"), load_data("demo", limit)
    flow = information_flow(Setting(subject, data, out and out / "information-flow", quiet=quiet))
    example = next(e for e in data.examples if e.tags["kind"] == "color")
    seen = look(subject, example, out and out / "trace")
    say(
        f"\nWhere, in which layers, does what the model saw reach its answer? ({flow['n']} questions, {flow['n_correct']} right)"
    )
    for name, curve in flow["flows"].items():
        change, layer = min(zip(curve["mean"], curve["layers"], strict=True))
        say(f"  {name:<20} {change:7.1f} % at layer {layer}")
    if flow["cutoff_layer"]:
        low, high = (layer - 1 for layer in flow["cutoff_interval"])
        say(
            f"  the image is read up to layer {flow['cutoff_layer'] - 1} [{low}, {high}]; without it {flow['no_image_accuracy']:.1%} are right"
        )
    say(f"\none question looked at: {seen['run']}/report.md")
    return {"accuracy": accuracies, "information_flow": flow["run"], "trace": seen["run"], "report": f"{flow['run']}/report.md"}
