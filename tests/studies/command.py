"""The command as tests run it: here, or in a process of its own that can be killed, forked off one that has imported what every command imports."""

import contextlib
import io
import json
import multiprocessing
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from typer.testing import CliRunner


def last_line(asked: list[str]) -> Any:
    """What `sightline ASKED --json` prints at last, once it has ended well."""
    from studies.cli import app

    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.strip().splitlines()[-1])


def start(arguments: list[str], said: Path) -> BaseProcess:
    """Begins `sightline ARGUMENTS`; the last line that it prints is left in the file `said`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["tests.studies.command", "transformers", "pandas", "matplotlib.pyplot", "studies.information_flow"]
    )
    process = context.Process(target=_run, args=(arguments, said))
    process.start()
    return process


def _run(arguments: list[str], said: Path) -> None:
    from studies.cli import app

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        app(arguments, standalone_mode=False)
    said.write_text(json.dumps(json.loads(printed.getvalue().splitlines()[-1])))
