"""Methods on single matrices by fusion-bench, to be run with the peers' Python: prints a line of JSON.

    python fusion_bench_merge.py '{"tensors": "file.safetensors", "method": "wudi", "steps": 20, "threads": 1}'

The file holds task vectors as ``{expert}/{matrix}``. Printed are the CPU seconds of each matrix; the
imports stand apart, reading does not count. fusion-bench's own messages go to standard error.
"""

import contextlib
import json
import sys
import time

began = time.process_time()
import torch  # noqa: E402
from fusion_bench.method.isotropic_merging.iso_utils import iso_c  # noqa: E402  # pyright: ignore[reportMissingImports]
from fusion_bench.method.task_singular_vector.utils.TSVM_utils import (  # noqa: E402  # pyright: ignore[reportMissingImports]
    compute_and_sum_svd_mem_reduction,
)
from fusion_bench.method.wudi.wudi import wudi_merging  # noqa: E402  # pyright: ignore[reportMissingImports]
from safetensors.torch import load_file  # noqa: E402

task = json.loads(sys.argv[1])
torch.set_num_threads(task["threads"])
methods = {
    "wudi": lambda vectors: wudi_merging(vectors, accelerator="cpu", iter_num=task["steps"]),
    "iso_c": lambda vectors: iso_c(vectors, accelerator="cpu"),
    "tsv_m": lambda vectors: compute_and_sum_svd_mem_reduction(vectors, accelerator=torch.device("cpu")),
}
imported = time.process_time() - began
tensors = load_file(task["tensors"])
names = sorted({name.partition("/")[2] for name in tensors})
experts = sorted({name.partition("/")[0] for name in tensors})
seconds = {}
with contextlib.redirect_stdout(sys.stderr):
    for name in names:
        vectors = [{name: tensors[f"{expert}/{name}"]} for expert in experts]
        began = time.process_time()
        methods[task["method"]](vectors)
        seconds[name] = time.process_time() - began
print(json.dumps({"seconds": seconds, "import_seconds": imported}))
