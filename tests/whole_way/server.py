"""Starts command lines quickly: imports what they need once, and forks a process for each.

    python server.py        reads requests, one JSON object a line, and answers each with one when its process has ended

A request names arguments, cwd, environment, and the files that standard output and error go to. The answer has the exit
code, and the names of the model classes' modules that the process came to load.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback

PRELOADED = [
    "scipy.stats", "sqlalchemy.dialects.sqlite", "tokenizers", "safetensors.torch", "transformers", "evomerge.cli",
    "evomerge.exporting", "evomerge.leaderboard", "evomerge.methods", "evomerge.rescoring", "evomerge.showing",
    "evomerge.spec", "evomerge.worker",
]  # fmt: skip


def model_modules() -> list[str]:
    """Loaded modules that define a model of transformers'."""
    return sorted(m for m in sys.modules if m.startswith("transformers.models.") and ".modeling_" in m)


def child(request: dict, answer: int) -> None:
    """The process of one command line; never returns."""
    code = 1
    try:
        os.setsid()
        os.chdir(request["cwd"])
        os.environ.update(request["environment"])
        for number, path in ((1, request["out"]), (2, request["err"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.argv = ["evomerge", *request["arguments"]]
        importlib.import_module("evomerge.cli").main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(answer, json.dumps(model_modules()).encode())
        os._exit(code)


def main() -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    assert not model_modules()
    for line in sys.stdin:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            child(json.loads(line), writing)
        os.close(writing)
        with os.fdopen(reading) as answer:
            loaded = answer.read()
        _, status = os.waitpid(pid, 0)
        reply = {"code": os.waitstatus_to_exitcode(status), "model_modules": json.loads(loaded or "[]")}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
