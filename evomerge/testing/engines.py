"""A program that evaluates checkpoints, in plain Python: what stands in for an inference engine in tests."""

from __future__ import annotations

from pathlib import Path

# Its scores are a hash of the checkpoint's files and the item: others for every candidate that differs in a bit.
# A mode makes it go wrong in one way or another.
ENGINE = """
import hashlib, json, os, signal, subprocess, sys, time
from pathlib import Path

checkpoint, asked, given, mode = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
digest = hashlib.sha256(b"".join((checkpoint / name).read_bytes() for name in names))
items = [json.loads(line) for line in asked.read_text().splitlines()]
print("the engine prints")
outcomes = []
for item in items:
    one = digest.copy()
    one.update(item["text"].encode())
    values = {"score": int(one.hexdigest()[:13], 16) / 16**13, "tokens": len(item["text"])}
    outcomes.append({"id": item["id"], "values": values})

def leave_a_child():
    child = subprocess.Popen(["sleep", "600"])
    Path("pids").write_text(f"{os.getpid()} {child.pid}")

if mode == "weights":
    for outcome in outcomes:
        outcome["weight"] = outcome["values"]["tokens"]
if mode == "exit":
    print("first\\nRuntimeError: no room for the KV cache\\n", file=sys.stderr)
    sys.exit(3)
if mode == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "missing":
    del outcomes[1]
if mode == "twice":
    outcomes.append(outcomes[0])
if mode == "stranger":
    outcomes.append({"id": "stranger", "values": {"score": 1.0}})
if mode == "nan":
    outcomes[0]["values"]["score"] = float("nan")
if mode == "none":
    outcomes[0]["values"]["score"] = None
if mode == "words":
    outcomes[0]["values"]["score"] = "high"
if mode == "hang":
    leave_a_child()
    time.sleep(600)
if mode == "child":
    leave_a_child()
if mode == "environment":
    Path("environment").write_text(json.dumps(dict(os.environ)))
if mode != "nothing":
    lines = "".join(json.dumps(outcome) + "\\n" for outcome in reversed(outcomes))
    given.write_text(lines + ("an unfinished li" if mode == "garbage" else ""))
"""

EVALUATOR = """
import sys
from pathlib import Path

from evomerge import CommandEvaluator, Item

WORDS = ["alpha", "bravo", "carol", "delta", "eager", "fable", "gamma", "hotel"]


class Engine(CommandEvaluator):
    def load(self):
        return [
            Item(f"{task}-{word}", task, f"{task} {word}", {"word": word})
            for task in self.context.tasks for word in WORDS
        ]

    def command(self, checkpoint, items, outcomes):
        engine = self.context.options.get("program", sys.executable)
        return [engine, Path(__file__).with_name("engine.py"), checkpoint, items, outcomes, self.mode]

    @property
    def mode(self):
        file = self.context.folder / "mode"
        return file.read_text() if file.exists() else self.context.options.get("mode", "")
"""


def write(folder: Path) -> Path:
    """``engine.py`` and the evaluator ``engine_eval.py`` that runs it, in ``folder``; the evaluator's path."""
    (folder / "engine.py").write_text(ENGINE)
    (folder / "engine_eval.py").write_text(EVALUATOR)
    return folder / "engine_eval.py"
