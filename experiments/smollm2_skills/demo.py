"""`make demo`: prepare, search, leaderboard, export, and a second opinion on the export. A second run reuses it all.

Every step is a command that one can type; this file only strings them together and says at the end what was found.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
EXPERIMENT = HERE / "experiment.yaml"
OUTPUT = HERE / "output"
MERGED = OUTPUT / "merged"
EXIT_FAILURES = 3


def say(text: str) -> None:
    print(text, flush=True)


def shown(path: Path) -> str:
    """``path`` as one would type it from here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def step(title: str, *command: str | Path, accept: tuple[int, ...] = (0,)) -> None:
    """Run a command with its output on this terminal; ends the demo if it fails."""
    words = [shown(c) if isinstance(c, Path) else c for c in command]
    say(f"\n== {title}\n$ {' '.join(words)}")
    process = subprocess.Popen([*python(command[0]), *words[1:]])
    while process.poll() is None:
        with contextlib.suppress(KeyboardInterrupt):  # the step has heard of it, too, and ends in its own way
            process.wait()
    code = process.returncode
    if code not in accept:
        say(f"\nThe demo stopped at this step (exit code {code}). Run `make demo` again to go on from here.")
        sys.exit(code)


def python(program: str | Path) -> list[str]:
    """How to start ``program`` with this Python: evomerge, or a script."""
    return [sys.executable, "-m", "evomerge.cli"] if program == "evomerge" else [sys.executable, str(program)]


def read(*arguments: str | Path) -> str:
    """The output of an evomerge command."""
    command = [*python("evomerge"), *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def exported_recipe() -> str | None:
    """The hash of the recipe behind a complete export, if there is one."""
    from evomerge.exporting import is_complete_export
    from evomerge.recipe import Recipe

    return Recipe.load(MERGED / "recipe.yaml").hash if is_complete_export(MERGED) else None


def winning_recipe() -> str:
    """The hash of the recipe that `evomerge export --trial best` would write."""
    from evomerge.launch import open_study
    from evomerge.showing import resolve_subject

    return resolve_subject(open_study(str(EXPERIMENT), None), "best")[1].hash


def main() -> None:
    began = time.monotonic()
    say("evomerge demo: which merge of three experts of SmolLM2-135M is best at all three of their skills?")
    step("1/5  the base model, converted from an installed package", HERE / "build.py", "base")
    step("     the tasks, from an installed package and generators", HERE / "build.py", "data")
    step("2/5  the search", "evomerge", "run", EXPERIMENT, accept=(0, EXIT_FAILURES))
    OUTPUT.mkdir(exist_ok=True)
    for form in ("md", "json"):
        (OUTPUT / f"leaderboard.{form}").write_text(read("leaderboard", EXPERIMENT, "--format", form))
    say(f"\n== 3/5  the leaderboard is in {shown(OUTPUT / 'leaderboard.md')}")
    if exported_recipe() == winning_recipe():
        say(f"\n== 4/5  the winner is exported already: {shown(MERGED)}")
    else:
        step("4/5  the winner as a checkpoint", "evomerge", "export", EXPERIMENT, "--out", next_folder())
    step(
        "5/5  the checkpoint, loaded by plain transformers in a new process, on the test items",
        "evomerge", "evaluate", MERGED, EXPERIMENT, "--split", "test", "--compare",
    )  # fmt: skip
    summary(time.monotonic() - began)


def next_folder() -> Path:
    """Where the winner goes. An export of an earlier winner is kept, under its recipe's name."""
    old = exported_recipe()
    if old is not None:
        MERGED.rename(OUTPUT / f"merged-{old[:8]}")
    return MERGED


def summary(seconds: float) -> None:
    board = json.loads((OUTPUT / "leaderboard.json").read_text())
    say(f"\n== what was found, after {seconds / 60:.1f} minutes\n")
    say(board["verdict"])
    say(
        f"\nThe merged model:    {shown(MERGED)}\n"
        f"The leaderboard:     {shown(OUTPUT / 'leaderboard.md')}\n"
        f"The study:           {shown(HERE / 'evomerge.db')}\n"
        f"Search on:           .venv/bin/evomerge resume {shown(EXPERIMENT)} --budget +20"
    )


if __name__ == "__main__":
    main()
