"""The tree-structured Parzen estimator: Optuna's.

Bergstra et al., "Algorithms for Hyper-Parameter Optimization" (2011), section 4; in Optuna 5 multivariate, with the
constant liar: trials that are still open count among the bad ones, so that parallel proposals spread.
"""

from __future__ import annotations

from typing import Any

from evomerge.searchers.optuna_study import OptunaSearcher


class TPESearcher(OptunaSearcher):
    """Optuna's TPESampler by ask and tell."""

    name = "tpe"
    summary = "Optuna's tree-structured Parzen estimator; keeps up to `window` workers busy"

    def sampler(self, seed: int) -> Any:
        return self._optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=self.options["n_startup"], group=self.conditional
        )
