"""One merge by evomerge, from the opened folders to the written checkpoint: prints a line of JSON with what it cost.

    python evomerge_merge.py '{"recipe": {a recipe}, "out": "folder", "threads": 1, "durable": false}'

The counterpart of ``peers/mergekit_merge.py``, measured in the same way.
"""

import json
import resource
import sys
import threading
import time
from pathlib import Path

began = time.process_time()
import torch  # noqa: E402

from evomerge.merging import Merger, open_sources  # noqa: E402
from evomerge.methods import METHODS, fused  # noqa: E402, F401
from evomerge.recipe import Recipe  # noqa: E402

fused.kernels()
task = json.loads(sys.argv[1])
torch.set_num_threads(task["threads"])
imported = time.process_time() - began
most = {"anonymous": 0}
done = threading.Event()


def watch() -> None:
    """The most memory of the process's own: mapped files are the system's cache."""
    while not done.wait(0.005):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                most["anonymous"] = max(most["anonymous"], int(line.split()[1]) * 1024)


if task.get("watch"):
    threading.Thread(target=watch, daemon=True).start()
began = time.process_time()
recipe = Recipe.from_dict(task["recipe"])
Merger(open_sources(recipe)).stream(recipe, Path(task["out"]), durable=task["durable"])
seconds = time.process_time() - began
done.set()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "import_seconds": imported, "peak_bytes": peak, **most}))
