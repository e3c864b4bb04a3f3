"""What mergekit's methods (version 0.1.5) and evomerge's have in common: parameters, defaults, and their translation.

A table of counterparts; ``mergekit_yaml.py`` reads by it and ``mergekit_writing.py`` writes by it. What one of the two
cannot say is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NoReturn

from evomerge.errors import SpecError

REQUIRED: Any = object()  # in the place of a default
SMALLEST_DIFFERENCE = 1e-6  # what mergekit's nearswap takes a smaller one for
SCE_FLOOR = 1e-6  # below it mergekit's sce lets all models count the same
ZERO_SUM = 1e-6  # mergekit's nuslerp goes half way where the weights sum to less

Values = Mapping[str, Any]
Fail = Callable[[str, str], NoReturn]  # (mergekit's parameter, what is wrong)
Read = Callable[[list[float], Values, Fail], tuple[list[float], dict[str, Any]]]
Write = Callable[[Sequence[float], Values], dict[str, Any]]


@dataclass(frozen=True)
class Counterpart:
    """A method that both have.

    Attributes:
        read: mergekit's (weights, values) as evomerge's (weights, parameters).
        write: evomerge's (weights, parameters) as mergekit's values; SpecError for what mergekit cannot say.
        shared: parameters of the merge as a whole, with mergekit's defaults.
        per_model: those that a model may have of its own, with mergekit's defaults. evomerge has one for all models.
        weight: what mergekit calls a model's weight; "" where it has none, and all count the same.
        weight_default: of that.
        idle: parameters that mergekit declares and that do not change the merge.
        base: what a base_model is. needed: where the task vectors start; origin: the same, if there is one; model: one
            of the models that are merged; first: the first of the two.
    """

    read: Read
    write: Write
    shared: Values = field(default_factory=dict)
    per_model: Values = field(default_factory=dict)
    weight: str = "weight"
    weight_default: Any = REQUIRED
    idle: Sequence[str] = ()
    base: str = "needed"

    @property
    def parameters(self) -> tuple[str, ...]:
        """What a configuration of this method may have."""
        return (*([self.weight] if self.weight else ()), *self.shared, *self.per_model, *self.idle)


def refuse(what: str) -> SpecError:
    return SpecError(f"mergekit cannot say {what}", remedy="Keep the recipe.yaml; `evomerge merge` reads it.")


def _flag(values: Values, key: str, fail: Fail) -> bool:
    if not isinstance(values[key], bool):
        fail(key, f"it must be true or false, but is {values[key]!r}")
    return values[key]


# --- task vectors, thinned out or not


def _task_vectors(*, elects: bool, rescales_by: str = "", shared: Values, per_model: Values) -> Counterpart:
    """A method of mergekit's generalized task arithmetic.

    Args:
        elects: it elects signs as TIES does.
        rescales_by: evomerge's default of ``rescale`` (mergekit restores the L1 norm); "" where evomerge does not.
    """

    def read(weights: list[float], values: Values, fail: Fail) -> tuple[list[float], dict[str, Any]]:
        params: dict[str, Any] = {"scale": float(values["lambda"])}
        if elects:
            params |= {"normalize": values["normalize"], "mode": "sum"}
        elif values["normalize"] and abs(sum(weights)) >= 1e-8:
            weights = [weight / sum(weights) for weight in weights]
        params |= {key: float(values[key]) for key in per_model}
        drops = params.get("density") != 1
        if rescales_by:
            params["rescale"] = "l1"
            if not values["rescale"] and drops:
                fail("rescale", "a random drop without rescaling is not supported")
        elif values.get("rescale") and drops:
            fail("rescale", "restoring the L1 norm of the task vector is not supported here")
        return weights, params

    def write(weights: Sequence[float], params: Values) -> dict[str, Any]:
        found: dict[str, Any] = {"lambda": params["scale"], "normalize": params.get("normalize", False)}
        drops = params.get("density", 1) != 1
        if elects and not params["normalize"] and params["mode"] == "mean":
            raise refuse("the mean over the experts that agree (mode: mean)")
        if params.get("scope", "tensor") != "tensor" and drops:
            raise refuse("thresholds over the whole model (scope: model)")
        if "epsilon" in params and drops and params["density"] + params["epsilon"] >= 1:
            raise refuse("probabilities up to 1 (density + epsilon)")
        found |= {key: params[key] for key in per_model}
        if rescales_by:
            if params["rescale"] != "l1" and drops:
                raise refuse(f"the paper's own rescaling by 1 / {rescales_by} (rescale: {rescales_by})")
            found["rescale"] = True
        return found

    return Counterpart(read, write, {"lambda": 1.0} | dict(shared), per_model, idle=("int8_mask",))


# --- methods whose models all count the same


def _unweighted(
    shared: Values, read_params: Callable[[Values, Fail], dict[str, Any]], write_params: Callable[[Values], Values],
    **more: Any,
) -> Counterpart:  # fmt: skip
    """A method that has no weights in mergekit. ``scale``, where evomerge has it, is 1 there."""

    def read(weights: list[float], values: Values, fail: Fail) -> tuple[list[float], dict[str, Any]]:
        return weights, read_params(values, fail)

    def write(weights: Sequence[float], params: Values) -> dict[str, Any]:
        if any(weight != 1 for weight in weights):
            raise refuse(f"weights other than 1 ({list(weights)})")
        if params.get("scale", 1) != 1:
            raise refuse(f"a scale other than 1 (scale: {params['scale']})")
        return dict(write_params(params))

    return Counterpart(read, write, shared, weight="", **more)


def _write_karcher(weights: Sequence[float], params: Values) -> dict[str, Any]:
    if len(set(weights)) > 1:
        raise refuse(f"the weights {list(weights)} of a karcher mean")
    return {"max_iter": params["steps"], "tol": params["tol"]}


def _read_nearswap(values: Values, fail: Fail) -> dict[str, Any]:
    if 0 < values["t"] < SMALLEST_DIFFERENCE:
        fail("t", f"a t of {values['t']} is below 1e-6, what mergekit takes all smaller differences for")
    return {"t": values["t"]}


def _write_nearswap(params: Values) -> Values:
    if 0 < params["t"] < SMALLEST_DIFFERENCE:
        raise refuse(f"a t below 1e-6 (t: {params['t']})")
    return {"t": params["t"]}


def _read_sce(values: Values, fail: Fail) -> dict[str, Any]:
    return {"select_topk": min(1.0, max(0.0, values["select_topk"])), "floor": SCE_FLOOR}


def _write_sce(params: Values) -> Values:
    if params["floor"] != SCE_FLOOR:
        raise refuse(f"a floor other than 1e-6 (floor: {params['floor']})")
    return {"select_topk": params["select_topk"]}


# --- linear, and arcs


def _read_linear(weights: list[float], values: Values, fail: Fail) -> tuple[list[float], dict[str, Any]]:
    return weights, {"normalize": values["normalize"]}


def _read_nuslerp(weights: list[float], values: Values, fail: Fail) -> tuple[list[float], dict[str, Any]]:
    flat, columns = (_flag(values, key, fail) for key in ("nuslerp_flatten", "nuslerp_row_wise"))
    # In mergekit's words row-wise goes along the first dimension.
    vectors = "tensor" if flat else "columns" if columns else "rows"
    return [1.0, 1.0] if abs(sum(weights)) < ZERO_SUM else weights, {"vectors": vectors}


def _write_nuslerp(weights: Sequence[float], params: Values) -> dict[str, Any]:
    return {"nuslerp_flatten": params["vectors"] == "tensor", "nuslerp_row_wise": params["vectors"] == "columns"}


def _read_multislerp(weights: list[float], values: Values, fail: Fail) -> tuple[list[float], dict[str, Any]]:
    if values["eps"] > 1e-6:
        fail("eps", f"only numbers that keep from dividing by zero are supported, but it is {values['eps']}")
    alone = len(weights) == 1  # mergekit then takes the model as it is
    return [1.0] if alone else weights, {"normalize": alone or _flag(values, "normalize_weights", fail)}


def _write_multislerp(weights: Sequence[float], params: Values) -> dict[str, Any]:
    if len(weights) == 1 and not params["normalize"]:
        raise refuse("a multislerp of one expert that is not normalized")
    return {"normalize_weights": params["normalize"]}


def _unchanged(weights: list[float], values: Values, fail: Fail) -> tuple[list[float], dict[str, Any]]:
    return weights, {}


_DENSITY = {"density": 1.0}
_GAMMA = {"density": 1.0, "gamma": 0.01}
_EPSILON = {"density": 1.0, "epsilon": 0.15}
_KEEPS: Values = {"normalize": False, "rescale": False}
_RESCALES: Values = {"normalize": False, "rescale": True}

COUNTERPARTS: Mapping[str, Counterpart] = MappingProxyType(
    {
        "linear": Counterpart(
            _read_linear, lambda w, params: {"normalize": params["normalize"]}, {"normalize": True}, base="model"
        ),
        "slerp": Counterpart(
            lambda w, values, fail: ([1.0, 1.0], {"t": values["t"]}),
            lambda w, params: {"t": w[1] / sum(w) if params["t"] is None else params["t"]},
            {"t": REQUIRED},
            weight="",
            base="first",
        ),
        "nuslerp": Counterpart(
            _read_nuslerp, _write_nuslerp, {"nuslerp_flatten": True, "nuslerp_row_wise": False}, base="origin"
        ),
        "multislerp": Counterpart(
            _read_multislerp, _write_multislerp, {"normalize_weights": True, "eps": 1e-8}, base="origin"
        ),
        "karcher": Counterpart(
            lambda w, values, fail: (w, {"steps": values["max_iter"], "tol": values["tol"]}),
            _write_karcher,
            {"max_iter": 10, "tol": 1e-5},
            weight="",
            base="model",
        ),
        "passthrough": Counterpart(_unchanged, lambda w, params: {}, weight="scale", weight_default=1.0, base="model"),
        "task_arithmetic": replace(
            _task_vectors(elects=False, shared={"normalize": False}, per_model={}),
            idle=("int8_mask", "density", "rescale"),
        ),
        "ties": _task_vectors(elects=True, shared={"normalize": True, "rescale": False}, per_model=_DENSITY),
        "dare_linear": _task_vectors(elects=False, rescales_by="density", shared=_RESCALES, per_model=_DENSITY),
        "dare_ties": _task_vectors(elects=True, rescales_by="density", shared=_RESCALES, per_model=_DENSITY),
        "breadcrumbs": _task_vectors(elects=False, shared=_KEEPS, per_model=_GAMMA),
        "breadcrumbs_ties": _task_vectors(elects=True, shared=_KEEPS, per_model=_GAMMA),
        "della": _task_vectors(
            elects=True, rescales_by="probability", shared=_RESCALES | {"normalize": True}, per_model=_EPSILON
        ),
        "della_linear": _task_vectors(elects=False, rescales_by="probability", shared=_RESCALES, per_model=_EPSILON),
        "model_stock": _unweighted(
            {"filter_wise": False},
            lambda values, fail: {"vectors": "rows" if _flag(values, "filter_wise", fail) else "tensor"},
            lambda params: {"filter_wise": params["vectors"] == "rows"},
        ),
        "nearswap": _unweighted({"t": REQUIRED}, _read_nearswap, _write_nearswap),
        "arcee_fusion": _unweighted({}, lambda values, fail: {}, lambda params: {}),
        "sce": _unweighted({"select_topk": 1.0}, _read_sce, _write_sce, idle=("int8_mask",)),
        "ram": _unweighted(
            {"epsilon": 1e-5},
            lambda values, fail: {"epsilon": values["epsilon"]},
            lambda params: {"epsilon": params["epsilon"]},
        ),
    }
)
