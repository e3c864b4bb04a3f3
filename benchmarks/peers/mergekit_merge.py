"""One merge by mergekit, to be run with the peers' Python: prints a line of JSON with what it cost.

    python mergekit_merge.py '{"config": {mergekit's configuration}, "out": "folder", "threads": 1}'

The time of the imports stands apart; the merge goes from the opened folders to the written checkpoint.
"""

import json
import resource
import sys
import time

began = time.process_time()
import torch  # noqa: E402
from mergekit.config import MergeConfiguration  # noqa: E402  # pyright: ignore[reportMissingImports]
from mergekit.merge import run_merge  # noqa: E402  # pyright: ignore[reportMissingImports]
from mergekit.options import MergeOptions  # noqa: E402  # pyright: ignore[reportMissingImports]

task = json.loads(sys.argv[1])
torch.set_num_threads(task["threads"])
imported = time.process_time() - began
options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True, random_seed=0)
began = time.process_time()
run_merge(MergeConfiguration.model_validate(task["config"]), task["out"], options)
seconds = time.process_time() - began
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "import_seconds": imported, "peak_bytes": peak}))
