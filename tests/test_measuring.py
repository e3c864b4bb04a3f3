"""What is measured of a model, against references that know nothing of hooks, placements or files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from evomerge import measuring
from evomerge.checkpoints import open_checkpoint
from evomerge.errors import CandidateError
from evomerge.evaluation import Evaluator, EvaluatorContext, Likelihoods, Target, TaskSpec, load_evaluator
from evomerge.merging import load_resident
from evomerge.placement import Placement, place
from evomerge.testing import tiny

PERPLEXITY = Path(__file__).parents[1] / "evaluators" / "perplexity.py"


def nothing() -> None:
    pass


class Classes(Evaluator):
    """Item i is row i of ``inputs``; the model gives logits."""

    def __init__(self, inputs: Tensor, labels: Sequence[int]):
        super().__init__(EvaluatorContext(Path(), {"one": TaskSpec("one")}))
        self.inputs, self.labels = inputs, labels

    def likelihoods(
        self, target: Target, item_ids: Sequence[str], *, alternatives: bool = True
    ) -> Iterator[Likelihoods]:
        for item_id in item_ids:
            logs = target.model(self.inputs[int(item_id)][None])[0].log_softmax(-1)
            yield Likelihoods(logs, self.labels[int(item_id)])


@pytest.fixture
def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).requires_grad_(False)


def placed(model: nn.Module) -> Placement:
    return Placement(views={name: p.detach() for name, p in model.named_parameters()})


def log_probabilities(model: nn.Module, x: Tensor):
    return lambda parameters: functional_call(model, parameters, (x[None],))[0].log_softmax(-1)


@pytest.mark.parametrize("labels", ["model", "right"])
def test_fisher_is_the_mean_of_each_items_squared_gradients(network: Any, labels: str):
    """By torch.func: the Jacobian of all answers' log-probabilities, item by item."""
    inputs, right = torch.randn(7, 5), [0, 1, 2, 2, 1, 0, 0]
    evaluator, ids = Classes(inputs, right), [str(i) for i in range(7)]
    target = Target(network)
    found = measuring.fisher(evaluator, target, placed(network), ids, labels=labels, advance=nothing)
    parameters = {name: p.detach() for name, p in network.named_parameters()}
    expected = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for x, label in zip(inputs, right, strict=True):
        logs = log_probabilities(network, x)
        shares = logs(parameters).exp() if labels == "model" else torch.eye(3)[label]
        for name, jacobian in jacrev(logs)(parameters).items():
            expected[name] += torch.einsum("y,y...->...", shares, jacobian.square()) / 7
    assert found.keys() == expected.keys()
    for name, F in expected.items():
        torch.testing.assert_close(found[name], F, rtol=1e-5, atol=1e-9)
    assert not any(p.requires_grad or p.grad is not None for p in network.parameters())


def test_mean_of_squares_is_not_square_of_means(network: Any):
    """Two items whose gradients cancel still have Fisher information."""
    inputs = torch.randn(1, 5).repeat(3, 1)
    evaluator = Classes(inputs, [0, 1, 2])
    one = measuring.fisher(evaluator, Target(network), placed(network), ["0"], labels="model", advance=nothing)
    all_three = measuring.fisher(
        evaluator, Target(network), placed(network), ["0", "1", "2"], labels="model", advance=nothing
    )
    for name, F in one.items():
        torch.testing.assert_close(all_three[name], F)


def test_tensors_that_a_parameter_joins_get_their_own_part(network: Any):
    """As where a file has q, k and v apart, and the module one weight."""
    joined = network[0].weight
    views = {"q": joined.detach()[:1], "kv": joined.detach()[1:], "column": joined.detach()[:, 2]}
    evaluator = Classes(torch.randn(4, 5), [0, 1, 2, 0])
    ids = ["0", "1", "2", "3"]
    whole = measuring.fisher(evaluator, Target(network), placed(network), ids, labels="model", advance=nothing)
    parts = measuring.fisher(evaluator, Target(network), Placement(views=views), ids, labels="model", advance=nothing)
    F = whole["0.weight"]
    assert {name: tuple(part.shape) for name, part in parts.items()} == {"q": (1, 5), "kv": (3, 5), "column": (4,)}
    assert torch.equal(parts["q"], F[:1]) and torch.equal(parts["kv"], F[1:]) and torch.equal(parts["column"], F[:, 2])
    grams = measuring.gram(evaluator, Target(network), Placement(views=views), ids, advance=nothing)
    assert set(grams) == {"q", "kv"} and torch.equal(grams["q"], grams["kv"])


def test_gram_by_hand(network: Any):
    inputs = torch.randn(6, 5)
    ids = ["1", "3", "4"]
    found = measuring.gram(Classes(inputs, [0] * 6), Target(network), placed(network), ids, advance=nothing)
    X = inputs[[1, 3, 4]].double()
    hidden = torch.tanh(X @ network[0].weight.T.double() + network[0].bias.double())
    assert list(found) == ["0.weight", "2.weight"]
    torch.testing.assert_close(found["0.weight"].double(), X.T @ X / 3, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["2.weight"].double(), hidden.T @ hidden / 3, rtol=1e-5, atol=1e-6)


def test_a_layer_that_nothing_reaches_has_zeros(network: Any):
    network.add_module("spare", nn.Linear(3, 3))
    model = nn.Sequential(*list(network)[:3])
    model.spare = network.spare  # a child that forward of the others does not call
    model.forward = lambda x: network[2](network[1](network[0](x)))  # type: ignore[method-assign]
    found = measuring.gram(Classes(torch.randn(2, 5), [0, 0]), Target(model), placed(model), ["0"], advance=nothing)
    assert torch.equal(found["spare.weight"], torch.zeros(3, 3))
    assert found["2.weight"].abs().sum() > 0


def test_loss_is_by_token_and_task(network: Any):
    evaluator = Classes(torch.randn(4, 5), [0, 1, 2, 1])
    counts = []
    found = measuring.loss(
        evaluator, Target(network), {"a": ["0", "1", "3"], "b": ["2"]}, advance=lambda: counts.append(1)
    )
    logs = network(evaluator.inputs).log_softmax(-1).double()
    expected = -(logs[0, 0] + logs[1, 1] + logs[3, 1]) / 3
    torch.testing.assert_close(found["a"], expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found["b"], -logs[2, 2], rtol=1e-6, atol=1e-6)
    assert found["a"].dtype == torch.float64 and len(counts) == 4


def test_numbers_that_are_not_finite_are_refused(network: Any):
    evaluator = Classes(torch.full((1, 5), math.nan), [0])
    where = Target(network), placed(network)
    with pytest.raises(CandidateError, match=r"gradient of 0\.weight is not finite"):
        measuring.fisher(evaluator, *where, ["0"], labels="model", advance=nothing)
    with pytest.raises(CandidateError, match=r"input of the layer 0\.weight is not finite"):
        measuring.gram(evaluator, *where, ["0"], advance=nothing)
    with pytest.raises(CandidateError, match="loss on task a is nan"):
        measuring.loss(evaluator, Target(network), {"a": ["0"]}, advance=nothing)
    assert not any(p.requires_grad for p in network.parameters())


# --- real architectures


TEXTS = ["abc de", "hello there", "a", "the quick brown fox"]


def language_model(folder: Path, config) -> tuple[Target, Placement, Evaluator, list[str]]:
    base = tiny.save_model(folder / "base", config, seed=3, dtype=torch.float32)
    (folder / "texts.txt").write_text("\n".join(TEXTS))
    context = EvaluatorContext(folder, {"one": TaskSpec("one", options={"file": "texts.txt", "unit": "line"})})
    evaluator = load_evaluator(str(PERPLEXITY), context)
    model = load_resident(base, auto_class="AutoModelForCausalLM", compute_dtype="float32")
    target, items = Target(model, tiny.tokenizer()), evaluator.load()
    evaluator.prepare(target, items)
    checkpoint = open_checkpoint(base)
    return target, place(model, {n: checkpoint.shape(n) for n in checkpoint.names}), evaluator, [i.id for i in items]


def text_loss(model: nn.Module, text: str) -> Tensor:
    """-log p of a text's tokens after the end-of-text token, written out."""
    ids = torch.tensor([[1, *tiny.tokenizer()(text)["input_ids"]]])
    logs = model(input_ids=ids[:, :-1]).logits.log_softmax(-1)
    return -logs[0, torch.arange(ids.shape[1] - 1), ids[0, 1:]].sum()


@pytest.mark.parametrize("tied", [True, False])
def test_a_llama(tmp_path: Path, tied: bool):
    config = tiny.llama_config(tie_word_embeddings=tied)
    target, placement, evaluator, ids = language_model(tmp_path, config)
    F = measuring.fisher(evaluator, target, placement, ids, labels="model", advance=nothing)
    model = target.model.requires_grad_(True)
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for text in TEXTS:
        gradients = torch.autograd.grad(text_loss(model, text), list(model.parameters()))
        for total, gradient in zip(expected.values(), gradients, strict=True):
            total.add_(gradient.square() / len(TEXTS))
    model.requires_grad_(False)
    assert F.keys() == expected.keys()  # tied: the embedding once, under its own name
    for name, total in expected.items():
        torch.testing.assert_close(F[name], total, rtol=1e-3, atol=1e-6)
    grams = measuring.gram(evaluator, target, placement, ids, advance=nothing)
    kinds = {name.rpartition(".layers.")[2].partition(".")[2] for name in grams if ".layers." in name}
    assert kinds == {
        f"{part}.weight"
        for part in (
            *(f"self_attn.{p}_proj" for p in "qkvo"),
            *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
        )
    }
    assert {name for name in grams if ".layers." not in name} == (set() if tied else {"lm_head.weight"})
    norm, embedding = model.model.layers[0].input_layernorm, model.model.embed_tokens
    X = torch.cat([norm(embedding(torch.tensor([1, *tiny.tokenizer()(text)["input_ids"]][:-1]))) for text in TEXTS])
    first = grams["model.layers.0.self_attn.q_proj.weight"]
    torch.testing.assert_close(first, X.T @ X / len(X), rtol=1e-4, atol=1e-5)
    assert torch.equal(first, grams["model.layers.0.self_attn.v_proj.weight"])
    assert grams["model.layers.2.mlp.down_proj.weight"].shape == (48, 48)


def test_a_mixture_of_experts_has_the_files_names(tmp_path: Path):
    """Experts that the module keeps in one tensor are cut into those of the file; they are no linear layers."""
    target, placement, evaluator, ids = language_model(tmp_path, tiny.mixtral_config())
    F = measuring.fisher(evaluator, target, placement, ids, labels="right", advance=nothing)
    assert set(F) == set(open_checkpoint(tmp_path / "base").names)
    model = target.model.requires_grad_(True)
    fused = model.model.layers[1].mlp.experts.gate_up_proj  # (experts, 2 x 24, hidden)
    total = torch.zeros_like(fused)
    for text in TEXTS:
        total += torch.autograd.grad(text_loss(model, text), fused)[0].square() / len(TEXTS)
    for e in range(4):
        name = f"model.layers.1.block_sparse_moe.experts.{e}"
        torch.testing.assert_close(F[f"{name}.w1.weight"], total[e, :24], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(F[f"{name}.w3.weight"], total[e, 24:], rtol=1e-3, atol=1e-6)
    model.requires_grad_(False)
    grams = measuring.gram(evaluator, target, placement, ids, advance=nothing)
    assert "model.layers.0.self_attn.k_proj.weight" in grams and not any("experts" in name for name in grams)
