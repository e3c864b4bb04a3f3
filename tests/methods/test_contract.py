"""Every method in METHODS holds to the contract that plug-ins inherit."""

from __future__ import annotations

from evomerge.methods import METHODS
from evomerge.testing.factors import FactorsContract
from evomerge.testing.methods import MethodContract


class TestLinear(MethodContract):
    method = METHODS["linear"]
    settings = ({"normalize": False},)
    zero_weights_give_base = False


class TestTaskArithmetic(MethodContract):
    method = METHODS["task_arithmetic"]
    settings = ({"scale": 0.7}, {"scale": -1.0}, {"scale": 0.0})


class TestTies(MethodContract):
    method = METHODS["ties"]
    settings = (
        {"density": 1.0},
        {"density": 0.5, "mode": "sum", "scale": 0.3},
        {"density": 0.01, "normalize": True},
        {"density": 0.5, "scope": "model"},
        {"scale": 0.0},
    )


class TestTiesLinear(MethodContract):
    method = METHODS["ties_linear"]
    settings = ({"density": 1.0}, {"density": 0.5, "scale": 0.3}, {"density": 0.5, "scope": "model"}, {"scale": 0.0})


class TestDareLinear(MethodContract):
    method = METHODS["dare_linear"]
    settings = ({"density": 0.1, "scale": 0.5}, {"density": 1.0}, {"density": 0.3, "rescale": "l1"})


class TestDareTies(MethodContract):
    method = METHODS["dare_ties"]
    settings = (
        {"density": 0.1, "mode": "sum"},
        {"density": 1.0, "normalize": True},
        {"density": 0.3, "rescale": "l1", "scale": 0.5},
    )


class TestDella(MethodContract):
    method = METHODS["della"]
    settings = (
        {"density": 0.3, "epsilon": 0.2, "mode": "sum"},
        {"density": 1.0, "normalize": True},
        {"density": 0.4, "rescale": "l1", "scale": 0.5},
        {"epsilon": 0.0},
    )


class TestDellaLinear(MethodContract):
    method = METHODS["della_linear"]
    settings = ({"density": 0.3, "epsilon": 0.2, "scale": 0.5}, {"density": 1.0}, {"density": 0.3, "rescale": "l1"})


class TestBreadcrumbs(MethodContract):
    method = METHODS["breadcrumbs"]
    settings = ({"density": 0.5, "gamma": 0.2, "scale": 0.7}, {"density": 1.0}, {"density": 0.9, "gamma": 0.5})


class TestBreadcrumbsTies(MethodContract):
    method = METHODS["breadcrumbs_ties"]
    settings = ({"density": 0.5, "gamma": 0.2, "mode": "sum"}, {"density": 1.0}, {"gamma": 0.0, "normalize": True})


class TestConsensus(MethodContract):
    method = METHODS["consensus"]
    settings = (
        {"k": 1, "l": 0.7, "scale": 0.5},
        {"k": 0},
        {"inner": "ties"},
        {"inner": "ties", "density": 0.5, "k": 1, "mode": "sum", "normalize": True},
        {"inner": "ties", "density": 1.0, "l": 0.0},
        {"inner": "ties", "density": 0.5, "scope": "model"},
    )


class TestPcb(MethodContract):
    method = METHODS["pcb"]
    settings = (
        {"density": 0.5, "clip": 0.1, "scale": 0.7},
        {"density": 1.0, "clip": 0.0},
        {"scope": "model"},
        {"density": 0.5, "clip": 0.01, "scope": "model"},
    )


class TestSlerp(MethodContract):
    method = METHODS["slerp"]
    settings = ({"t": 0.0}, {"t": 0.3}, {"t": 1.0})
    zero_weights_give_base = False


class TestNuSlerp(MethodContract):
    method = METHODS["nuslerp"]
    settings = (
        {"vectors": "rows"},
        {"vectors": "columns"},
        {"origin": "base"},
        {"vectors": "rows", "origin": "base"},
    )
    zero_weights_give_base = False  # weights that sum to zero name no place on the arc


class TestMultiSlerp(MethodContract):
    method = METHODS["multislerp"]
    settings = ({"normalize": False}, {"origin": "base"}, {"normalize": False, "origin": "base"})
    zero_weights_give_base = False  # there is no direction without a weight


class TestKarcher(MethodContract):
    method = METHODS["karcher"]
    settings = ({"steps": 0}, {"steps": 1}, {"steps": 100, "tol": 0.0})
    zero_weights_give_base = False


class TestModelStock(MethodContract):
    method = METHODS["model_stock"]
    settings = ({"vectors": "rows"},)


class TestNearSwap(MethodContract):
    method = METHODS["nearswap"]
    settings = ({"t": 0.0}, {"t": 0.05})


class TestMagMax(MethodContract):
    method = METHODS["magmax"]
    settings = ({"scale": -0.5},)


class TestRam(MethodContract):
    method = METHODS["ram"]
    settings = ({"epsilon": 0.1, "scale": 0.5}, {"epsilon": 0.0})


class TestArceeFusion(MethodContract):
    method = METHODS["arcee_fusion"]


class TestSce(MethodContract):
    method = METHODS["sce"]
    settings = (
        {"select_topk": 0.3},
        {"select_topk": 0.0},
        {"select_topk": 0.01, "scale": -0.5},
        {"select_topk": 0.5, "floor": 1.0},
    )


class TestPassthrough(MethodContract):
    method = METHODS["passthrough"]
    zero_weights_give_base = False


class TestTSVM(MethodContract):
    method = METHODS["tsv_m"]
    settings = ({"rank_share": 0.1, "scale": 0.5}, {"rank_share": 1.0}, {"matrices": "inner"})


class TestIsoC(MethodContract):
    method = METHODS["iso_c"]
    settings = ({"scale": 0.5}, {"matrices": "inner"})


class TestSVDLinear(MethodContract):
    method = METHODS["svd_linear"]
    settings = ({"rank_share": 0.5}, {"rank_share": 0.9, "matrices": "inner"}, {"rank_share": 1.0})


class TestIsoCTS(MethodContract):
    method = METHODS["iso_cts"]
    settings = ({"common": 0.0}, {"common": 0.5, "scale": 2.0}, {"common": 1.0}, {"matrices": "inner"})


class TestWUDI(MethodContract):
    method = METHODS["wudi"]
    settings = ({"matrices": "all", "steps": 5}, {"matrices": "all", "steps": 3, "lr": 0.01, "scale": 0.5})


class TestKnots(MethodContract):
    method = METHODS["knots"]
    settings = (
        {"density": 1.0, "mode": "sum"},
        {"inner": "dare_ties", "density": 0.7, "matrices": "inner"},
        {"inner": "dare_linear", "scale": 0.5},
        {"singular_values": "after", "density": 0.5},
    )


class TestLoraHub(FactorsContract):
    method = METHODS["lorahub"]
    settings = ({"root": True}, {"scale": 0.5})


class TestRandomVectors(MethodContract):
    method = METHODS["random_vectors"]
    settings = ({"scale": 0.5},)


class TestFisher(MethodContract):
    method = METHODS["fisher"]
    settings = (
        {"normalize": False, "floor_by": "add"},
        {"floor": 0.5, "favor_first": True},
        {"floor": 0.0},
    )
    zero_weights_give_base = False


class TestRegMean(MethodContract):
    method = METHODS["regmean"]
    settings = ({"rho": 1.0}, {"rho": 0.0, "scale": 0.7}, {"matrices": "inner"})


class TestRegMeanPP(MethodContract):
    method = METHODS["regmean_pp"]
    settings = ({"rho": 1.0}, {"scale": 0.7})


class TestLmCocktail(MethodContract):
    method = METHODS["lm_cocktail"]
    settings = ({"temperature": 0.1},)
    zero_weights_give_base = False


class TestAdaRank(MethodContract):
    method = METHODS["adarank"]
    settings = ({"matrices": "all"},)


class TestColumns(MethodContract):
    method = METHODS["columns"]
    settings = ({"matrices": "all"},)


class TestConcrete(MethodContract):
    method = METHODS["concrete"]
    settings = ({"matrices": "all"},)


class TestLines(MethodContract):
    method = METHODS["lines"]
    settings = (
        {"a": 0.3, "b": 0.7},
        {"inner": "ties", "density": 0.5, "mode": "sum", "a": 0.5},
        {"inner": "dare_linear", "a": 1.0, "outside": "ends"},
    )


def test_every_method_is_under_the_contract() -> None:
    held = {
        suite.method.name
        for suite in (*MethodContract.__subclasses__(), *FactorsContract.__subclasses__())
        if suite.__module__ == __name__
    }
    assert held == set(METHODS)
