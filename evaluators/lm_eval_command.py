"""lm-evaluation-harness tasks, run by its own command line on a written checkpoint: for vLLM and its other engines.

    evaluate:
      with: evaluators/lm_eval_command.py
      model: vllm                    # what --model takes: hf (default), vllm, ...
      model_args: {dtype: bfloat16, gpu_memory_utilization: 0.8}     # beyond `pretrained`, which is the candidate
      engine_batch_size: auto        # what --batch_size takes; the experiment's batch_size by default
      include_path: tasks
      tasks: {add: {}, gsm5: {task: gsm8k, num_fewshot: 5, limit: 2000}}

Tasks, their options, items, splits and metrics are those of evaluators/harness.py, which says what there is. So are the
requests: prompts and few-shot examples are made by the same code, examples never come from items of the study, and only
the items that are asked for are run. The command (`python -m lm_eval run`) is given these requests as tasks of their
own, one for each kind (log-likelihoods, whole texts, generation), and evomerge takes the metrics from what it logs.

A start of lm-eval alone costs about 15 seconds of processor time, and the engine's own start comes on top: where a
resident model will do, evaluators/harness.py is faster. With `model: hf` in float32 the log-likelihoods are its own to
about 1e-5; other engines and types have other last digits. `dtype` of model_args takes the place of the experiment's
compute_dtype. Chat templates are rendered by the checkpoint's tokenizer before the requests are written.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from evomerge import (
    CandidateError,
    CommandEvaluator,
    EvaluatorContext,
    EvaluatorError,
    HarnessEvaluator,
    Item,
    Outcome,
    Target,
)

LOGLIKELIHOOD, ROLLING, GENERATE = "loglikelihood", "loglikelihood_rolling", "generate_until"


class LmEvalCommand(HarnessEvaluator, CommandEvaluator):
    """lm-eval's command line; see the top of this file for what an experiment may say."""

    own_options = ("model", "model_args", "engine_batch_size")

    def __init__(self, context: EvaluatorContext):
        super().__init__(context)
        options = context.options
        self._model = options.get("model", "hf")
        self._model_args = options.get("model_args", {})
        self._batch = options.get("engine_batch_size", context.batch_size)
        if not isinstance(self._model, str) or not self._model:
            raise EvaluatorError(f"must be a name that lm-eval knows, such as hf or vllm, not {self._model!r}",
                                 where="evaluate.model")  # fmt: skip
        if not isinstance(self._model_args, Mapping):
            raise EvaluatorError("must be a mapping, such as {dtype: bfloat16}", where="evaluate.model_args")
        for key in ("pretrained", "tokenizer", "peft"):
            if key in self._model_args:
                raise EvaluatorError(f"{key} is the candidate's own", where=f"evaluate.model_args.{key}")
        self._instances: dict[str, list[Any]] = {}  # lm-eval's requests of each item
        self._device = "cpu"

    def prepare(self, target: Target | None, items: Sequence[Item]) -> None:
        super().prepare(target, items)
        self.check(items)
        self._instances = {}

    def evaluate(self, target: Target, item_ids: Sequence[str]) -> list[Outcome]:
        self._device = target.device
        if not self._instances:
            self._make_instances(target.checkpoint)
        return super().evaluate(target, item_ids)

    def _make_instances(self, checkpoint: Path | None) -> None:
        """The requests of all items, once: a chat template needs a tokenizer, which comes with the first candidate."""
        tokenizer = None
        if any(task.options.get("apply_chat_template") for task in self.tasks.values()):
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
        for name, task in self.tasks.items():
            mine = [item for item in self.items.values() if item.task == name]
            self._instances |= task.instances(mine, tokenizer)

    def command(self, checkpoint: Path, items: Path, outcomes: Path) -> Sequence[str]:
        tasks = _folder(items)
        names = sorted(file.stem for file in tasks.glob("*.yaml"))
        device = ["--device", self._device] if self._model == "hf" else []
        return [
            sys.executable, "-m", "lm_eval", "run",
            "--model", self._model,
            "--model_args", json.dumps({"pretrained": str(checkpoint), **self._model_args}),
            "--batch_size", str(self._batch), *device,
            "--tasks", ",".join(names), "--include_path", str(tasks),
            "--output_path", str(outcomes.with_suffix("")), "--log_samples",
        ]  # fmt: skip

    def environment(self) -> Mapping[str, str]:
        return {"LMEVAL_LOG_LEVEL": "WARNING"}

    def write_items(self, items: Sequence[Item], file: Path) -> None:
        """A task for each kind of request (and settings of generation), each request a document of it."""
        tasks = _folder(file)
        tasks.mkdir()
        groups: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
        for item in items:
            for n, instance in enumerate(self._instances[item.id]):
                kind, arguments = instance.request_type, instance.args
                settings = arguments[1] if kind == GENERATE else {}
                context, target = ("", arguments[0]) if kind == ROLLING else (arguments[0], arguments[1])
                document = {"id": f"{n}:{item.id}", "context": context, "target": "" if kind == GENERATE else target}
                groups[kind, json.dumps(settings, sort_keys=True)].append(document)
        for number, ((kind, settings), documents) in enumerate(groups.items()):
            name = f"evomerge_{number}_{kind}"
            with (tasks / f"{name}.jsonl").open("w", encoding="utf-8") as lines:
                lines.writelines(json.dumps(document) + "\n" for document in documents)
            (tasks / f"{name}.yaml").write_text(yaml.safe_dump(_task(name, kind, json.loads(settings), tasks)))

    def read_outcomes(self, file: Path) -> list[Outcome]:
        answers: dict[str, dict[int, Any]] = defaultdict(dict)
        for kind, sample in _samples(file):
            number, _, item_id = sample["doc"]["id"].partition(":")
            instance = self._instances[item_id][int(number)]
            asked = sample["arguments"]["gen_args_0"]["arg_0"]
            if asked != instance.args[0]:
                raise CandidateError("error", f"lm-eval asked {asked[-80:]!r} instead of {instance.args[0][-80:]!r}")
            answers[item_id][int(number)] = _answer(kind, sample["resps"][0][0])
        outcomes = []
        for item_id, found in answers.items():
            instances = self._instances[item_id]
            if len(found) != len(instances):
                raise CandidateError("incomplete", f"lm-eval answered {len(found)} of {len(instances)} requests")
            in_order = [found[n] for n in range(len(instances))]
            outcomes.append(self.tasks[self.items[item_id].task].outcome(item_id, instances, in_order))
        return outcomes


def _folder(items: Path) -> Path:
    """Where the tasks of an items file are."""
    return items.with_suffix("")


def _task(name: str, kind: str, settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """An lm-eval task whose requests are its documents, as they are."""
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": kind,
        "doc_to_text": "" if kind == ROLLING else "context",  # the name of a column, not a template
        "doc_to_target": "target",
        "target_delimiter": "",
        "num_fewshot": 0,
        "metric_list": [{"metric": "bypass"}],  # answers are all that is wanted
    }
    return task | ({"generation_kwargs": settings} if kind == GENERATE else {})


def _samples(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(kind, sample) of all that lm-eval logged."""
    logs = sorted(file.with_suffix("").rglob("samples_*.jsonl"))
    if not logs:
        raise CandidateError("incomplete", "lm-eval logged no samples")
    for log in logs:
        kind = next(k for k in (ROLLING, LOGLIKELIHOOD, GENERATE) if f"_{k}_" in log.name)
        for line in log.read_text(encoding="utf-8").splitlines():
            yield kind, json.loads(line)


def _answer(kind: str, response: Any) -> Any:
    """One answer as evomerge's engine gives it. lm-eval writes all of them as text."""
    if kind == LOGLIKELIHOOD:
        return float(response[0]), response[1] == "True"
    return float(response) if kind == ROLLING else response
