"""evomerge: find the best way to merge fine-tuned checkpoints of one base model."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# pyright: reportUnsupportedDunderAll=false
# name -> module. Imported on first use, so that `import evomerge` stays instant and needs no torch.
_PUBLIC = {
    "CommandEvaluator": "evomerge.commands",
    "Evaluator": "evomerge.evaluation",
    "EvaluatorContext": "evomerge.evaluation",
    "Item": "evomerge.evaluation",
    "Likelihoods": "evomerge.evaluation",
    "Outcome": "evomerge.evaluation",
    "Predictions": "evomerge.evaluation",
    "Target": "evomerge.evaluation",
    "TaskSpec": "evomerge.evaluation",
    "CandidateError": "evomerge.errors",
    "EvomergeError": "evomerge.errors",
    "UserError": "evomerge.errors",
    "EvaluatorError": "evomerge.errors",
    "HarnessEvaluator": "evomerge.harness_evaluator",
    "HarnessTask": "evomerge.harness_task",
    "harness_tasks": "evomerge.harness_task",
    "LOSSES": "evomerge.losses",
    "Loss": "evomerge.losses",
    "METHODS": "evomerge.methods",
    "merge_state_dicts": "evomerge.methods",
    "LowRank": "evomerge.methods.base",
    "Method": "evomerge.methods.base",
    "Param": "evomerge.methods.base",
    "TensorInfo": "evomerge.methods.base",
    "answer_predictions": "evomerge.predicting",
    "prompt_predictions": "evomerge.predicting",
    "token_predictions": "evomerge.predicting",
    "Questionnaire": "evomerge.questions",
    "answer_loglikelihood": "evomerge.questions",
    "Question": "evomerge.scoring",
    "Scored": "evomerge.scoring",
    "generate": "evomerge.scoring",
    "loglikelihoods": "evomerge.scoring",
    "Recipe": "evomerge.recipe",
    "GradientSearcher": "evomerge.searchers.base",
    "Searcher": "evomerge.searchers.base",
    "Told": "evomerge.searchers.base",
    "keyed_generator": "evomerge.searchers.base",
    "Space": "evomerge.space",
}

__all__ = [  # a plain list, for tools that read it without running it; held equal to _PUBLIC by a test
    "LOSSES",
    "METHODS",
    "CandidateError",
    "CommandEvaluator",
    "Evaluator",
    "EvaluatorContext",
    "EvaluatorError",
    "EvomergeError",
    "GradientSearcher",
    "HarnessEvaluator",
    "HarnessTask",
    "Item",
    "Likelihoods",
    "Loss",
    "LowRank",
    "Method",
    "Outcome",
    "Param",
    "Predictions",
    "Question",
    "Questionnaire",
    "Recipe",
    "Scored",
    "Searcher",
    "Space",
    "Target",
    "TaskSpec",
    "TensorInfo",
    "Told",
    "UserError",
    "__version__",
    "answer_loglikelihood",
    "answer_predictions",
    "generate",
    "harness_tasks",
    "keyed_generator",
    "loglikelihoods",
    "merge_state_dicts",
    "prompt_predictions",
    "token_predictions",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'evomerge' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
