"""What this machine can do, and what is missing."""

import os
import platform
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_EXTRAS = {
    "torchvision": "only for transformers' own video processors; pictures do not need it",
    "nnsight": "pip install 'sightline[backends]': reading points through nnsight",
    "transformer_lens": "pip install 'sightline[backends]': reading points through TransformerLens",
    "av": "pip install 'sightline[video]': video files",
    "soundfile": "pip install 'sightline[audio]': sound files",
    "lmms_eval": "pip install 'sightline[lmms]': the tasks of lmms-eval",
}


def examine() -> dict[str, Any]:
    """Versions, devices, free memory and disk, the demo models, one traced forward pass, and missing extras."""
    import torch
    import transformers

    findings: dict[str, Any] = {
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        "cpu": f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads", "gpu": _gpus(),
        "memory": _memory(), "disk": f"{shutil.disk_usage(Path.cwd()).free / 2**30:.0f} GiB free here",
    }  # fmt: skip
    findings["demo models"] = _demo_models()
    findings["tracing"] = _one_trace()
    for module, purpose in _EXTRAS.items():
        if find_spec(module) is None:
            findings[f"missing: {module}"] = purpose
    return findings


def _gpus() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none: everything runs on the CPU"
    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return "; ".join(f"{p.name}, {p.total_memory / 2**30:.0f} GiB" for p in names)


def _memory() -> str:
    import psutil

    memory = psutil.virtual_memory()
    return f"{memory.available / 2**30:.0f} of {memory.total / 2**30:.0f} GiB free"


def _demo_models() -> str:
    folder = Path(__file__).parent / "demo" / "checkpoints"
    found = sorted(path.parent.name for path in folder.glob("*/model.safetensors"))
    return ", ".join(found) if found else "none: python -m studies.demo.train makes them"


def _one_trace() -> str:
    """Traces one bundled picture and compares the logits with those of a plain forward pass."""
    import torch

    from probe.errors import SightlineError
    from probe.recorders import Mass
    from probe.subject import load
    from probe.tracing import last_logits, trace
    from studies.demo.data import examples

    try:
        subject = load("demo")
        encoded = subject.encode(examples(1))
        same = torch.equal(trace(subject, encoded, [Mass()]).logits, last_logits(subject, encoded))
    except SightlineError as error:
        return f"failed: {error}"
    return (
        "a traced forward pass gives the plain one's logits, bit for bit"
        if same
        else "failed: a traced forward pass changes the logits"
    )
