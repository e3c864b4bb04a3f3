"""Evaluators that run a program of their own on a written checkpoint: the door for vLLM and the like."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from evomerge.errors import CandidateError, EvaluatorError
from evomerge.evaluation import Evaluator, EvaluatorContext, Item, Outcome, Target
from evomerge.pools import one_line, worker_environment

SUPERVISE = Path(__file__).with_name("supervise.py")
DETAIL_LIMIT = 20_000  # characters of what a program printed that are kept
REASON_LIMIT = 200


class CommandEvaluator(Evaluator):
    """An evaluator that runs a program on every candidate, written to disk as a Hugging Face checkpoint.

    Yours to write: ``load`` (the items) and ``command`` (the program and its arguments). The program reads the items
    that are asked for from a JSONL file, one {"id", "task", "text", "data"} a line in the order of their ids, and
    writes one {"id": ..., "values": {metric: number}, "weight": number (may be left out)} for each, in any order.
    Override ``write_items`` and ``read_outcomes`` for a program with formats of its own.

    The program starts in the experiment's folder, with the worker's environment. It is killed, with all that it
    started, when the time limit passes, when its worker dies, and when it has ended itself. An exit status other than
    0, and outcomes that are missing, not finite or unreadable, fail the candidate: the reason has the last line of what
    the program wrote to standard error, the trial's detail the rest.
    """

    needs: Literal["model", "checkpoint"] = "checkpoint"

    def __init__(self, context: EvaluatorContext):
        super().__init__(context)
        self.items: dict[str, Item] = {}  # the study's, by id, once prepared

    def command(self, checkpoint: Path, items: Path, outcomes: Path) -> Sequence[str]:
        """The program and its arguments, each a string of its own: no shell sees them.

        A function of its arguments alone; it is also called before there is any checkpoint.
        """
        raise NotImplementedError

    def environment(self) -> Mapping[str, str]:
        """Variables that the program needs beyond those of the worker."""
        return {}

    def write_items(self, items: Sequence[Item], file: Path) -> None:
        """What the program reads."""
        with file.open("w", encoding="utf-8") as lines:
            for item in items:
                line = {"id": item.id, "task": item.task, "text": item.text, "data": dict(item.data)}
                lines.write(json.dumps(line, ensure_ascii=False) + "\n")

    def read_outcomes(self, file: Path) -> list[Outcome]:
        """What the program wrote, in any order.

        Raises:
            CandidateError: it is not there, or not readable.
        """
        if not file.is_file():
            raise CandidateError("incomplete", f"the program wrote no outcomes ({file.name})")
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        return [_outcome(line, n) for n, line in enumerate(lines, 1) if line.strip()]

    def prepare(self, target: Target | None, items: Sequence[Item]) -> None:
        self.items = {item.id: item for item in items}
        program, *_ = self._argv(Path("checkpoint"), Path("items"), Path("outcomes"))
        path = self._environment().get("PATH")
        if shutil.which(self.context.folder / program if "/" in program else program, path=path) is None:
            raise EvaluatorError(
                f"there is no program {program!r} that can be run", remedy="Install it on every machine with workers."
            )

    def evaluate(self, target: Target, item_ids: Sequence[str]) -> list[Outcome]:
        checkpoint, scratch = target.checkpoint, target.scratch
        assert checkpoint is not None
        assert scratch is not None
        asked, given = scratch / "items.jsonl", scratch / "outcomes.jsonl"
        try:
            self.write_items([self.items[i] for i in sorted(item_ids)], asked)
        except OSError as error:
            raise CandidateError("error", f"the items could not be written to {scratch}: {error}") from error
        argv = self._argv(checkpoint, asked, given)
        printed = self._run(argv, scratch)
        try:
            return _in_order(self.read_outcomes(given), item_ids)
        except CandidateError as error:
            raise CandidateError(error.kind, error.reason, printed[-DETAIL_LIMIT:]) from error

    def _argv(self, checkpoint: Path, items: Path, outcomes: Path) -> list[str]:
        argv = self.command(checkpoint, items, outcomes)
        if isinstance(argv, str) or not argv:
            raise EvaluatorError(
                f"command() must give a list of strings, but gave {argv!r:.200}",
                remedy="One string for the program and one for each argument; no shell takes them apart.",
            )
        return [os.fspath(part) if isinstance(part, os.PathLike) else str(part) for part in argv]

    def _environment(self) -> dict[str, str]:
        import torch

        # Also in a process that is no worker (`evomerge evaluate`): an engine finds the same settings everywhere.
        return {**os.environ, **worker_environment(torch.get_num_threads()), **self.environment()}

    def _run(self, argv: Sequence[str], scratch: Path) -> str:
        """Run the program to its end; what it printed. CandidateError unless its exit status is 0."""
        status, out, err = (scratch / name for name in ("status", "stdout", "stderr"))
        command = [sys.executable, "-I", "-S", str(SUPERVISE), str(status), *argv]
        with (
            out.open("wb") as stdout,
            err.open("wb") as stderr,
            _supervised(command, stdout, stderr, self._environment(), self.context.folder) as process,
        ):
            process.wait()
        printed = f"standard error of {argv[0]}:\n{_end_of(err)}\nstandard output:\n{_end_of(out)}"
        ended = status.read_text() if status.exists() else "its supervisor was killed"
        if ended != "0":
            last = one_line("\n".join(reversed(_end_of(err).splitlines())), REASON_LIMIT)
            reason = f"{Path(argv[0]).name} {_how_it_ended(ended)}{': ' if last else ''}{last}"
            raise CandidateError("error", reason, printed[-DETAIL_LIMIT:])
        return printed


@contextmanager
def _supervised(
    command: Sequence[str], stdout: Any, stderr: Any, environment: Mapping[str, str], folder: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """supervise.py at work. Its standard input is the lifeline: the kernel closes it if we are killed."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=stderr,
        env=dict(environment),
        cwd=folder,
        start_new_session=True,  # a kill of the worker's process group must leave it the time to kill the program
    )
    assert process.stdin is not None
    try:
        yield process
    finally:
        process.stdin.close()
        process.wait()


def _how_it_ended(status: str) -> str:
    if not status.lstrip("-").isdigit():
        return f"was {status}" if status.startswith("not") else f"ended, and {status}"
    if int(status) >= 0:
        return f"exited with status {status}"
    number = -int(status)
    memory = " (possibly because the machine was out of memory)" if number == signal.SIGKILL else ""
    return f"was ended by signal {number}, {signal.strsignal(number) or 'unknown'}{memory}"


def _end_of(file: Path) -> str:
    with file.open("rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - DETAIL_LIMIT // 2))
        return stream.read().decode(errors="replace")


def _outcome(line: str, number: int) -> Outcome:
    """One line of a program's outcomes; CandidateError if it is not one."""
    try:
        data = json.loads(line)
        if set(data) - {"id", "values", "weight"} or not isinstance(data["id"], str):
            raise ValueError
        return Outcome(data["id"], dict(data["values"]), data.get("weight", 1.0))
    except (ValueError, TypeError, KeyError):
        raise CandidateError(
            "error", f'line {number} of the program\'s outcomes is not {{"id", "values", "weight"}}: {line:.80}'
        ) from None


def _in_order(outcomes: Sequence[Outcome], item_ids: Sequence[str]) -> list[Outcome]:
    """One outcome for each id, in the order of ``item_ids``; CandidateError if one is missing, double or a stranger."""
    found: dict[str, Outcome] = {}
    for outcome in outcomes:
        if outcome.item_id in found:
            raise CandidateError("incomplete", f"the program gave two outcomes for item {outcome.item_id}")
        found[outcome.item_id] = outcome
    strangers = [i for i in found if i not in set(item_ids)]
    if strangers:
        raise CandidateError("incomplete", f"the program gave item {strangers[0]}, which was not asked for")
    missing = [i for i in item_ids if i not in found]
    if missing:
        share = f"{len(missing)} of {len(item_ids)} items"
        raise CandidateError("incomplete", f"the program gave no outcome for {share}, such as {missing[0]}")
    return [found[i] for i in item_ids]
