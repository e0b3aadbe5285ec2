"""Solvers against the spec's equations in plain loops, dense inverses and dattri; the nulls
against what they claim to be."""

from __future__ import annotations

import math
import random
from functools import partial
from itertools import permutations, product

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import some_examples, tiny_tokenizer
from parity import dattri_llm_dpo
from parity.bergson_magic import tiny_network
from parity.dattri_datainf import LAMBDAS, REFERENCE, gradients, own_scores
from rlhf_trust import StudyError
from rlhf_trust.attribution import solvers
from rlhf_trust.attribution.contribution import (
    attribution_tables,
    contribution,
    example_p,
    example_z,
    group_contrasts,
    label_null,
    normalised,
    reference_null,
    standardised,
    swap_factors,
    swapped_pairs,
)
from rlhf_trust.attribution.gradients import per_example_gradients
from rlhf_trust.attribution.solvers import (
    SOLVERS,
    bm25,
    datainf,
    ekfac,
    exact_joint,
    exact_layerwise,
    gradient_cosine,
    gradient_dot,
    of_items,
    random_scores,
    score_all,
    sentence_cosine,
    tfidf,
    trackstar,
)
from rlhf_trust.attribution.store import InMemory, Joined
from rlhf_trust.chat import EncodedExample
from rlhf_trust.data.preferences import PreferencePair
from rlhf_trust.decode import Example
from rlhf_trust.losses import DPOLoss, INPOLoss, NextTokenLoss, RewardLoss
from rlhf_trust.models import LoRA, new_adapter
from rlhf_trust.stats import rank_agreement
from rlhf_trust.training import example_losses
from scipy.stats import false_discovery_control, spearmanr
from transformers import BertConfig, BertModel

PAD = 0
LAYERWISE = {"datainf", "exact_layerwise", "gradient_dot", "ekfac"}
ALL = SOLVERS | {"ekfac": partial(ekfac, rank=1), "trackstar": trackstar}


def some_gradients(
    n: int, m: int, widths=(7, 3, 40), common: float = 0.5, seed: int = 0
) -> tuple[InMemory, InMemory]:
    """Random gradients, sizes of layers and examples far apart, with a direction in common."""
    rng = np.random.default_rng(seed)
    train, queries = {}, {}
    for index, width in enumerate(widths):
        direction = common * rng.standard_normal(width)
        for tensors, count in ((train, n), (queries, m)):
            sizes = 10.0 ** rng.uniform(-1, 1, (count, 1)) * 10.0 ** (index - 2)
            block = sizes * (direction + rng.standard_normal((count, width)))
            tensors[f"layer{index}"] = torch.from_numpy(block).float()
    ids = [f"e{i}" for i in range(n)], [f"q{j}" for j in range(m)]
    return InMemory(train, ids[0]), InMemory(queries, ids[1])


def tensor(some: InMemory, layer: str) -> torch.Tensor:
    return torch.cat([block for _, block in some.blocks(layer)])


def changed(some: InMemory, **tensors: torch.Tensor) -> InMemory:
    """The same gradients, some layers replaced."""
    return InMemory({layer: tensor(some, layer) for layer in some.layers} | tensors, some.ids)


def rows(some: InMemory, kept) -> InMemory:
    tensors = {layer: tensor(some, layer)[kept] for layer in some.layers}
    return InMemory(tensors, np.array(some.ids)[kept])


class InBlocks(InMemory):
    """Read as from a disk: blocks of three rows, each gone when the next is read."""

    def blocks(self, layer):
        whole, block = self._tensors[layer], torch.empty(3, self.width(layer))
        for start in range(0, len(self), 3):
            part = whole[start : start + 3]
            yield slice(start, start + len(part)), block[: len(part)].copy_(part)
            block.fill_(math.nan)


def relative(got, expected) -> float:
    """Largest difference in an item's scores, relative to its largest score."""
    return float((np.abs(got - expected).max(0) / np.abs(expected).max(0)).max())


# ------------------------------------------------------------------------------------------------


def literal_datainf(train, queries, damping=0.1):
    """The spec's equations, letter by letter: scores [n][m]."""
    n, m = len(train), len(queries)
    influence = np.zeros((n, m))
    for layer in train.layers:
        g = [row.double().numpy() for row in tensor(train, layer)]
        lam = damping * sum((g[i] ** 2).mean() for i in range(n)) / n
        for j in range(m):
            v = tensor(queries, layer)[j].double().numpy()
            r = np.zeros_like(v)
            for i in range(n):
                r += v - np.dot(v, g[i]) / (lam + np.dot(g[i], g[i])) * g[i]
            r /= n * lam
            for k in range(n):
                influence[k, j] -= np.dot(r, g[k])
    return influence


@pytest.mark.parametrize("common", [0.0, 1.0, 1000.0])
def test_datainf_equals_the_equations(common, monkeypatch):
    """Also where gradients are nearly parallel, so that the two terms of r cancel and float32
    would not do."""
    train, queries = some_gradients(30, 4, widths=(4000, 40), common=common)
    expected = literal_datainf(train, queries)
    assert relative(datainf(train, queries).by_item, expected) < 1e-5
    heavy = literal_datainf(train, queries, 10.0)
    assert relative(datainf(train, queries, 10.0).by_item, heavy) < 1e-5
    monkeypatch.setattr(solvers, "PRECISION", math.inf)  # float32 alone
    assert (relative(datainf(train, queries).by_item, expected) > 1e-5) == (common == 1000)


def test_datainf_equals_dattris():
    """dattri 0.3.0's scores on the same gradients, kept by ``tests/parity/dattri_datainf.py``."""
    theirs, (train, queries) = pd.read_csv(REFERENCE), gradients()
    for lam in LAMBDAS:
        rows_of_lam = theirs[theirs["lambda"] == lam].set_index("example")
        wanted = rows_of_lam.loc[list(train.ids), list(queries.ids)].to_numpy()
        own = own_scores(train, queries, lam)
        assert own == pytest.approx(-wanted, rel=1e-5, abs=1e-6 * np.abs(wanted).max())


def test_gradients_of_dpo_equal_dattri_llms():
    """dattri-llm 0.1.0's products of the same pairs' gradients, kept by
    ``tests/parity/dattri_llm_dpo.py``."""
    theirs = pd.read_csv(dattri_llm_dpo.REFERENCE, index_col="pair")
    train, asked = (
        dattri_llm_dpo.some_pairs(*of) for of in ((len(theirs), 1), (theirs.shape[1], 2))
    )
    own = dattri_llm_dpo.own_scores(tiny_network(), train, asked)
    wanted = theirs.loc[[p.id for p in train], [p.id for p in asked]].to_numpy()
    assert own == pytest.approx(-wanted, rel=1e-4, abs=1e-5 * np.abs(wanted).max())


def test_sign_and_scale_against_real_steps(tiny_llama):
    """Steps that up-weight one example move the evaluation loss the way, and as far as, the scores
    say."""
    model = new_adapter(tiny_llama, LoRA(4, 8)).eval().double()  # small steps drown in float32
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in weights.items():
            if ".lora_B." in name:
                weight.normal_(std=0.1)
    rng, loss = random.Random(0), NextTokenLoss()
    examples = []
    for i in range(8):
        text = EncodedExample(tuple(rng.randrange(3, 290) for _ in range(12)), 4)
        examples.append(Example(f"e{i}", "random", (text,)))
    # Evaluation: one training example's own text, and one of none.
    items = [examples[2], examples.pop()]

    def gradients_of(some) -> InMemory:
        values = [loss.loss(model, [example], PAD)[0] for example in some]
        found = [torch.autograd.grad(value, list(weights.values())) for value in values]
        by_name = dict(zip(weights, zip(*found)))
        tensors = {n: torch.stack([g.flatten() for g in gs]).float() for n, gs in by_name.items()}
        return InMemory(tensors, [example.id for example in some])

    train, queries = gradients_of(examples), gradients_of(items)

    @torch.no_grad()
    def change_after(step: dict[str, torch.Tensor]) -> float:
        values = [loss.loss(model, items, PAD).double().mean().item()]
        for sign in (1, -1):  # there, and back again
            for name, weight in weights.items():
                weight += sign * step[name].view_as(weight)
            values.append(loss.loss(model, items, PAD).double().mean().item())
        assert values[2] == pytest.approx(values[0], abs=1e-4)
        return values[1] - values[0]

    # Plain SGD on the example that every solver calls the strongest driver: the evaluation text
    # itself.
    for name, solver in (ALL | {"ekfac": partial(ekfac, rank=4)}).items():
        influence = solver(train, queries).influence
        assert influence.min() < 0 and influence.argmin() == 2, name
    strongest = {name: tensor(train, name)[2].double() for name in weights}
    size = 1e-2 / sum(block.square().sum().item() for block in strongest.values())
    assert change_after({name: -size * block for name, block in strongest.items()}) < -1e-3

    # With heavy damping H is λ_l I, and the score is the change, to first order, after a step of -
    # g_{l,i} / λ_l.
    for solver in (datainf, exact_layerwise):
        influence = solver(train, queries, 1e6).influence
        size, changes = 1e-2 / np.abs(influence).max(), []
        for i in range(len(examples)):
            step = {}
            for k, name in enumerate(train.layers):
                lam = 1e6 * train.squares[:, k].mean().item() / train.width(name)
                step[name] = -size * tensor(train, name)[i].double() / lam
            changes.append(change_after(step))
        assert changes == pytest.approx(size * influence, abs=1e-4)
    # With one λ for all layers, that step is gradient descent's.
    lam = 1e6 * train.squares.sum(1).mean().item() / sum(map(train.width, train.layers))
    joint = exact_joint(train, queries, 1e6).influence
    assert joint == pytest.approx(gradient_dot(train, queries).influence / lam, rel=1e-3)


# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [5, 60])  # fewer and more examples than entries
def test_exact_solvers_equal_dense_inverses(n):
    train, queries = some_gradients(n, 4)

    def dense(g, v, lam):
        return -(g @ np.linalg.solve(g.T @ g / n + lam * np.eye(g.shape[1]), v.T))

    of_layers = {
        layer: tuple(tensor(some, layer).double().numpy() for some in (train, queries))
        for layer in train.layers
    }
    for factor in (0.1, 1e-3):
        found = exact_layerwise(train, queries, factor)
        parts = [dense(g, v, factor * np.square(g).mean()) for g, v in of_layers.values()]
        assert relative(found.by_item, sum(parts)) < 1e-6
        tolerance = 1e-6 * np.abs(parts).max()
        assert found.by_layer == pytest.approx(np.mean(parts, 2), rel=1e-6, abs=tolerance)
        g, v = (np.concatenate(x, 1) for x in zip(*of_layers.values()))
        joint = exact_joint(train, queries, factor)
        assert relative(joint.by_item, dense(g, v, factor * np.square(g).mean())) < 1e-6


def test_datainf_is_exact_where_its_swap_is():
    """With one gradient over and over, the mean of inverses is the inverse of the mean."""
    train, queries = some_gradients(2, 3)
    same = rows(train, [0, 0, 0, 0])
    assert relative(datainf(same, queries).by_item, exact_layerwise(same, queries).by_item) < 1e-5


def test_dot_and_cosine():
    train, queries = some_gradients(6, 3)
    g, v = (
        np.concatenate([tensor(some, layer).double().numpy() for layer in some.layers], 1)
        for some in (train, queries)
    )
    assert relative(gradient_dot(train, queries).by_item, -g @ v.T) < 1e-5
    lengths = np.linalg.norm(g, axis=1)[:, None] * np.linalg.norm(v, axis=1)
    assert gradient_cosine(train, queries).by_item == pytest.approx(-g @ v.T / lengths, abs=1e-6)
    own = gradient_cosine(train, train).by_item
    assert np.diag(own) == pytest.approx(-np.ones(6))
    nothing = InMemory({layer: tensor(queries, layer) * 0 for layer in queries.layers}, queries.ids)
    assert not gradient_cosine(train, nothing).by_item.any()
    assert not datainf(train, nothing).by_item.any()


def test_ekfac_equals_a_dense_matrix_in_the_eigenbasis():
    rank, n = 2, 9
    train, queries = some_gradients(n, 4, widths=(6, 10))
    names = {"layer0": "x.lora_A.weight", "layer1": "x.lora_B.weight"}
    train, queries = (
        InMemory({new: tensor(some, old) for old, new in names.items()}, some.ids)
        for some in (train, queries)
    )
    expected = np.zeros((n, 4))
    for layer, shape in (("x.lora_A.weight", (rank, 3)), ("x.lora_B.weight", (5, rank))):
        g, v = (tensor(some, layer).double().numpy() for some in (train, queries))
        matrices = g.reshape(n, *shape)
        _, u = np.linalg.eigh(sum(m @ m.T for m in matrices))
        _, w = np.linalg.eigh(sum(m.T @ m for m in matrices))
        basis = np.kron(u, w)  # of matrices read row by row
        second_moment = basis.T @ (g.T @ g / n) @ basis
        h = basis @ np.diag(np.diag(second_moment)) @ basis.T
        h += 0.1 * np.square(g).mean() * np.eye(len(h))
        expected -= g @ np.linalg.solve(h, v.T)
    found = ekfac(train, queries, rank=rank)
    assert relative(found.by_item, expected) < 1e-9
    assert relative(found.by_item, exact_layerwise(train, queries).by_item) > 1e-2
    with pytest.raises(StudyError, match="x.lora_A.weight has 6 entries, not a multiple of rank 4"):
        ekfac(train, queries, rank=4)


def test_ekfac_is_exact_where_a_matrix_is_a_vector():
    train, queries = some_gradients(9, 4)
    expected = exact_layerwise(train, queries).by_item
    assert relative(ekfac(train, queries, rank=1).by_item, expected) < 1e-6


def test_trackstar_by_hand():
    train, queries = some_gradients(12, 4)
    layers = [
        tuple(tensor(some, layer).double().numpy() for some in (train, queries))
        for layer in train.layers
    ]
    s = np.concatenate([np.square(g).mean(0) for g, _ in layers])
    g, v = (np.concatenate(x, 1) / np.sqrt(s) for x in zip(*layers))
    r = g.T @ g / len(g) + 0.1 * np.square(g).mean() * np.eye(g.shape[1])
    values, vectors = np.linalg.eigh(r)
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    g, v = (x @ root / np.linalg.norm(x @ root, axis=1, keepdims=True) for x in (g, v))
    assert trackstar(train, queries).by_item == pytest.approx(-g @ v.T, abs=1e-9)
    own = trackstar(train, train).by_item
    assert np.diag(own) == pytest.approx(-np.ones(12))
    # A weight without a training gradient takes no part.
    block = torch.cat([torch.zeros(12, 1), tensor(train, "layer1")[:, 1:]], 1)
    without = changed(train, layer1=block)
    large = tensor(queries, "layer1").clone()
    large[:, 0] = 1e6
    same = [trackstar(without, q).by_item for q in (queries, changed(queries, layer1=large))]
    assert (same[0] == same[1]).all()


@pytest.mark.parametrize("name", ALL)
def test_equal_examples_have_equal_scores(name):
    train, queries = some_gradients(2, 3)
    found = ALL[name](rows(train, [0, 0, 0]), queries).by_item
    assert found == pytest.approx(np.tile(found[:1], (3, 1)), rel=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_blocks_groups_and_layers(name):
    """Scores do not depend on how gradients are stored; groups and layers are parts of the
    whole."""
    solver, (train, queries) = ALL[name], some_gradients(10, 5)
    whole = solver(train, queries)
    in_blocks = solver(
        InBlocks({k: tensor(train, k) for k in train.layers}, train.ids),
        InBlocks({k: tensor(queries, k) for k in reversed(queries.layers)}, queries.ids),
    )
    assert relative(in_blocks.by_item, whole.by_item) < 1e-6
    joined = solver(Joined(rows(train, range(4)), rows(train, range(4, 10))), queries)
    assert relative(joined.by_item, whole.by_item) < 1e-6
    labels = ["b", "a", "b", "b", "a"]
    grouped = solver(train, queries, 0.1, labels)
    assert list(grouped.groups) == ["b", "a"] and (grouped.by_item == whole.by_item).all()
    for label, part in grouped.groups.items():
        alone = solver(train, rows(queries, [j for j in range(5) if labels[j] == label]))
        assert relative(part.by_item, alone.by_item) < 1e-5
        assert part.by_layer.shape == whole.by_layer.shape
        tolerance = 1e-6 * np.abs(alone.by_item).max()
        assert part.by_layer == pytest.approx(alone.by_layer, rel=1e-4, abs=tolerance)
    if name in LAYERWISE:
        assert whole.by_layer.sum(0) == pytest.approx(whole.influence, rel=1e-9)
        # What example_z assumes: permuting a layer's blocks between examples permutes its scores,
        # and no other layer's.
        order = np.random.default_rng(1).permutation(10)
        dealt = solver(changed(train, layer1=tensor(train, "layer1")[order]), queries).by_layer
        expected = np.stack([whole.by_layer[0], whole.by_layer[1][order], whole.by_layer[2]])
        assert dealt == pytest.approx(expected, rel=1e-4, abs=1e-6 * np.abs(expected).max())
    else:
        assert whole.by_layer.shape == (0, 10)


def test_text_and_random_baselines():
    train = ["The cat sat on the mat.", "Stock prices fell on Monday."]
    train += ["A recipe for apple pie", "cats, mats and hats"]
    queries = ["The cat sat on the mat.", "Prices of apple stock fell!", "zyxw"]
    found = tfidf(train, queries)
    assert found.by_item[0, 0] == pytest.approx(-1) and (found.by_item <= 0).all()
    assert found.by_item[:, :2].argmin(0).tolist() == [0, 1] and not found.by_item[:, 2].any()
    assert found.by_item[:, :1] == pytest.approx(tfidf(train, queries[:1]).by_item)
    drawn = random_scores(2000, 2, seed=1).by_item
    assert (drawn == random_scores(2000, 2, seed=1).by_item).all()
    assert (drawn != random_scores(2000, 2, seed=2).by_item).all()
    assert abs(spearmanr(drawn).statistic) < 0.1 and drawn.std() == pytest.approx(1, abs=0.05)
    for bad in (([], queries), (["?", "!"], queries)):
        for similarity in (tfidf, bm25):
            with pytest.raises(StudyError, match="text similarity: .* no"):
                similarity(*bad)


def test_bm25_is_its_formula():
    train = [["cat", "sat", "cat"], ["stock", "fell"], ["cat", "stock", "stock", "pie", "pie"]]
    queries = [["cat", "pie", "zyxw"], ["fell", "fell"], ["zyxw"]]
    n, mean = len(train), np.mean([len(text) for text in train])
    expected = np.zeros((3, 3))
    for i, text in enumerate(train):
        for j, query in enumerate(queries):
            for word in query:
                tf, df = text.count(word), sum(word in other for other in train)
                length = 1.2 * (1 - 0.6 + 0.6 * len(text) / mean)
                idf = math.log(1 + (n - df + 0.5) / (df + 0.5))
                expected[i, j] -= idf * tf * 2.2 / (tf + length)
    texts = [[" ".join(words) for words in some] for some in (train, queries)]
    found = bm25(*texts, k1=1.2, b=0.6)
    assert found.by_item == pytest.approx(expected)
    assert found.by_item[:, :2].argmin(0).tolist() == [2, 1] and not found.by_item[:, 2].any()
    same = bm25(texts[0][:1] * 3, texts[1][:1]).by_item
    assert same.min() < 0 and np.ptp(same) == 0


def test_sentence_embeddings_are_means_over_tokens():
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertModel(BertConfig(vocab_size=300, intermediate_size=32, **size)).eval()
    tokenizer = tiny_tokenizer()
    train = ["the answer", "a rather longer question than that " * 60, "no"] * 12
    queries = ["the answer", "not wrong"]
    found = sentence_cosine(train, queries, encoder=(model, tokenizer))

    def unit(text):
        ids = torch.tensor([tokenizer(text).input_ids[:256]])
        with torch.no_grad():
            mean = model(ids).last_hidden_state[0].mean(0).numpy()
        return mean / np.linalg.norm(mean)

    expected = -np.array([[unit(text) @ unit(query) for query in queries] for text in train])
    assert found.by_item == pytest.approx(expected, abs=1e-5)
    assert found.by_item[0, 0] == pytest.approx(-1, abs=1e-6)
    assert found.by_item[::3] == pytest.approx(found.by_item[:1].repeat(12, 0), abs=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_bad_input(name):
    solver, (train, queries) = ALL[name], some_gradients(4, 2)
    with pytest.raises(StudyError, match="1 training example"):
        solver(rows(train, [0]), queries)
    with pytest.raises(StudyError, match="gradient of layer1 is zero"):
        solver(changed(train, layer1=torch.zeros(4, 3)), queries)
    with pytest.raises(StudyError, match="no evaluation item"):
        solver(train, rows(queries, []))


def test_too_little_damping():
    train, queries = some_gradients(4, 2)
    # Rows repeat, so K has no inverse of its own.
    with pytest.raises(StudyError, match="too small"):
        exact_joint(rows(train, [0, 0, 1, 1]), queries, 1e-300)


# ------------------------------------------------------------------------------------------------


def test_normalised_attains_both_ends():
    scores = np.array([4.0, 1.0, 0.0, -0.5, -2.0])
    assert normalised(scores).tolist() == [1.0, 0.25, 0.0, -0.25, -1.0]
    assert normalised(scores * 1e-300).tolist() == normalised(scores).tolist()
    assert normalised(np.array([1.0, 2.0])).tolist() == [0.5, 1.0]
    assert normalised(np.array([-1.0, -2.0])).tolist() == [-0.5, -1.0]
    assert normalised(np.zeros(3)).tolist() == [0.0, 0.0, 0.0]
    drawn = normalised(np.random.default_rng(0).standard_cauchy(100))
    assert drawn.min() == -1 and drawn.max() == 1


def test_contribution_numbers():
    by_item = np.array([[3.0, 5.0], [-1.0, -3.0], [1.0, 1.0]])  # means 4, -2, 1
    found = contribution(by_item)
    assert found["contribution"] == pytest.approx((1 - 1 + 0.25) / 3)
    assert found["standardised"] == pytest.approx(3 / math.sqrt(21))
    assert found["n"] == 2 and found == contribution(by_item)
    assert found["ci_low"] <= found["standardised"] <= found["ci_high"]
    assert contribution(-by_item)["standardised"] == pytest.approx(-found["standardised"])
    assert contribution(by_item * 1e-200)["standardised"] == pytest.approx(found["standardised"])
    alone = contribution(by_item[:, :1])  # one item: nothing is known of the spread
    assert (alone["ci_high"], alone["ci_low"]) == (math.sqrt(3), -math.sqrt(3))
    nothing = contribution(np.zeros((3, 4)))
    assert (nothing["contribution"], nothing["standardised"]) == (0.0, 0.0)
    assert standardised(np.ones(9)) == pytest.approx(3.0)


def test_tables_of_a_stage():
    train, queries = some_gradients(5, 3)
    groups = ["b", "a", "b"]
    pairs = [PreferencePair(f"p{i}", ("?",), "", "", "s") for i in range(5)]
    texts = random_scores(5, 3, seed=7, groups=groups)
    scores = score_all(train, queries, {"tfidf": texts}, groups=groups)
    assert list(scores) == [*SOLVERS, "tfidf", "random"]
    few = score_all(train, queries, {}, 0.3, groups=groups, solvers={"ekfac": ALL["ekfac"]})
    assert list(few) == ["ekfac", "random"]
    expected = ekfac(train, queries, 0.3, rank=1).by_item
    assert (few["ekfac"].by_item == expected).all()
    scores["datainf, token mean"] = scores["datainf"]
    nulls, verticals = {("datainf", "b"): 0.25}, ["a", "b", "c"]
    found = attribution_tables(scores, pairs, verticals, "sft", "next-token", 3, nulls)
    summary, examples = found
    assert len(summary) == 8 + 8 + 1 and len(examples) == 2 * 2 * 5
    assert summary.iloc[-1][["vertical", "solver", "n"]].tolist() == ["c", "datainf", 0]
    own = summary[(summary["vertical"] == "b") & (summary["solver"] == "datainf")]
    assert own["loss"].tolist() == ["next-token", "next-token, token mean"]
    assert own["p_null"].tolist()[0] == 0.25 and summary["p_null"].notna().sum() == 1
    found = datainf(train, queries, groups=groups).groups["b"]
    expected = contribution(found.by_item, 3)
    assert (own["standardised"] == expected["standardised"]).all() and (own["n"] == 2).all()
    rows = examples[(examples["vertical"] == "b") & (examples["loss"] == "next-token")]
    assert rows["example_id"].tolist() == [p.id for p in pairs]
    assert rows["influence"].tolist() == found.influence.tolist()
    summary, examples = attribution_tables({}, pairs, ["a"], "ppo", "reward")
    assert summary["n"].tolist() == [0] and examples.empty


def test_interval_covers_the_standardised_score_of_all_items():
    """The bootstrap's interval holds the value of the population its items were drawn from about
    95 % of the time."""
    rng = np.random.default_rng(0)
    mean = rng.normal(0.5, 1.0, 30)  # of each example's score over all possible items
    covered = 0
    for _ in range(200):
        by_item = mean[:, None] + rng.normal(0, 1.0, (1, 40)) + rng.normal(0, 0.3, (30, 40))
        found = contribution(by_item, draws=300)
        covered += found["ci_low"] <= standardised(mean) <= found["ci_high"]
    assert 0.87 <= covered / 200 <= 0.99


def noise_scores(rng, n, factors=1.0):
    """DataInf's scores from training gradients that are noise, for items that share a direction."""
    train = {name: torch.randn(n, 8) * factors for name in "ab"}
    items = {name: torch.randn(8) + 0.3 * torch.randn(6, 8) for name in "ab"}
    ids = [str(i) for i in range(max(n, 6))]
    return datainf(InMemory(train, ids[:n]), InMemory(items, ids[:6]), groups=["v"] * 6)


def test_nulls_over_training_data_are_rarely_wrong_under_noise():
    """Noise in training gradients, items with a direction in common: p < .05 in 5 % of studies. (A
    null that flips the items' signs instead rejects most of them.)"""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    swaps, references, items = [], [], []
    for study in range(400):
        margins = torch.randn(30)
        own = noise_scores(rng, 30, torch.sigmoid(-margins)[:, None])
        factors = -np.exp(margins.numpy())
        swaps.append(label_null({"datainf": own}, factors, study, 200)["datainf", "v"])
        joint = noise_scores(rng, 40)
        references.append(reference_null({"datainf": joint}, 25)["datainf", "v"])
        sums = own.by_item.sum(0)
        flips = rng.choice([-1, 1], size=(200, 6))
        items.append((1 + (abs(flips @ sums) >= abs(sums.sum()) * (1 - 1e-9)).sum()) / 201)
    for p in (swaps, references):
        assert 0.025 <= np.mean(np.array(p) < 0.05) <= 0.08
        assert 0.43 <= np.mean(np.array(p) < 0.5) <= 0.57
    assert np.mean(np.array(items) < 0.05) > 0.5


def test_labels_that_matter_are_found():
    rng = np.random.default_rng(0)
    margins, along = rng.normal(size=40), rng.normal(0.8, 1, size=(40, 1))  # rᵀ∇m, mostly above 0
    weights = 1 / (1 + np.exp(margins[:, None]))
    by_item = along * weights * rng.uniform(0.5, 1.5, 6)
    scores = {name: of_items(by_item, ["v"] * 6) for name in ("datainf, token mean", "tfidf")}
    found = label_null(scores, -np.exp(margins))
    assert list(found) == [("datainf, token mean", "v")]  # texts have no gradient to swap
    assert found["datainf, token mean", "v"] < 0.01
    # A pair that is learnt has next to no gradient of its own; its label counts all the same.
    learnt = of_items(along / (1 + np.exp(20)) * np.ones(6), ["v"] * 6)
    assert label_null({"datainf": learnt}, np.full(40, -np.exp(20)))["datainf", "v"] < 0.01
    apart = of_items(np.r_[np.ones(20), np.zeros(20)][:, None] + rng.normal(size=(40, 1)), ["v"])
    assert reference_null({"datainf": apart}, 20)["datainf", "v"] < 0.05


@pytest.mark.parametrize("kind", ["reward", "dpo", "inpo"])
def test_a_swapped_pairs_gradient_is_a_multiple_of_its_own(tiny_llama, kind):
    pairs, generator = some_examples(5, 2), torch.manual_seed(2)
    model = new_adapter(tiny_llama, LoRA(2, 4)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_B." in name:
                weight.normal_(std=0.1, generator=generator)
    reference = {pair.id: (-20.0, -20.0 - i) for i, pair in enumerate(pairs)}
    head = torch.linspace(-1, 1, 32)
    losses = {"reward": RewardLoss(head), "dpo": DPOLoss(0.5, reference)}
    loss = (losses | {"inpo": INPOLoss(0.4, reference)})[kind]

    def both(some, loss):
        blocks = per_example_gradients(model, "default", some, loss, PAD)
        values = example_losses(model, "default", some, loss, PAD)
        return torch.cat(list(blocks.values()), 1).numpy(), values

    (own, values), (other, swapped) = both(pairs, loss), both(*swapped_pairs(pairs, loss))
    factors = swap_factors(loss, values, swapped)
    assert np.ptp(factors) > 0.1
    np.testing.assert_allclose(other, own * factors[:, None], rtol=2e-3, atol=1e-4 * own.max())


def test_group_contrasts():
    rng = np.random.default_rng(0)
    harmless = np.arange(60) % 2 == 0
    by_item = rng.normal(size=(60, 4)) + 2 * harmless[:, None]
    one = of_items(by_item, ["v"] * 3 + ["w"])
    frame = pd.DataFrame({"source: harmless": harmless, "topic": ["a", "b", "c"] * 20})
    table = group_contrasts({"datainf": one, "exact_layerwise": one}, frame, "dpo", "metric")
    assert len(table) == 2 * 2 * 4 and set(table["vertical"]) == {"v", "w"}
    clear = table[table["p_null"] < 0.05]
    assert set(clear["loss"]) == {"metric: source: harmless"} and (clear["ci_low"] > 0).all()
    assert group_contrasts({}, frame, "dpo", "metric").empty


def test_example_z_against_all_permutations():
    rng = np.random.default_rng(0)
    by_layer = rng.standard_normal((3, 4)) * [[1.0], [5.0], [0.1]] + 2.0
    dealt = []  # every outcome of the null [24³, examples]
    for orders in product(permutations(range(4)), repeat=3):
        dealt.append(sum(layer[list(order)] for layer, order in zip(by_layer, orders)))
    dealt = np.array(dealt)
    expected = (by_layer.sum(0) - dealt.mean(0)) / dealt.std(0)
    assert example_z(by_layer) == pytest.approx(expected)
    assert example_z(by_layer * 1e-200) == pytest.approx(expected)
    assert example_z(np.ones((3, 4)) * [[0.1], [0.7], [3.0]]).tolist() == [0.0] * 4
    # Layers that agree spread z out by √layers, independent ones leave it at 1.
    one = rng.standard_normal(500)
    assert example_z(np.tile(one, (25, 1))).std() == pytest.approx(5.0)
    assert example_z(rng.standard_normal((25, 500))).std() == pytest.approx(1.0, abs=0.1)


def test_rank_agreement_of_two_scores():
    rng = np.random.default_rng(0)
    first = rng.standard_normal(60)
    second = first + rng.standard_normal(60)
    found = rank_agreement(first, second, "here")
    assert found.value == pytest.approx(spearmanr(first, second).statistic) and found.n == 60
    # About as wide as Fisher's z says (Bonett and Wright 2000), and where it says.
    half = 1.96 * math.sqrt((1 + found.value**2 / 2) / 57)
    expected = np.tanh(np.arctanh(found.value) + np.array([-half, half]))
    assert [found.low, found.high] == pytest.approx(expected, abs=0.08)
    assert rank_agreement(first, first**3).low == pytest.approx(1)


def test_example_p_against_all_permutations():
    rng = np.random.default_rng(0)
    by_layer = rng.standard_normal((3, 4)) ** 3 + 2.0
    blocks = by_layer - by_layer.mean(1, keepdims=True)
    # An example's 4³ outcomes, equally likely.
    dealt = np.abs(blocks[0][:, None, None] + blocks[1][:, None] + blocks[2])
    expected = [(dealt >= abs(score) - 1e-9).mean() for score in blocks.sum(0)]
    assert example_p(by_layer) == pytest.approx(expected, abs=0.01)
    assert (example_p(by_layer * 1e-9) == example_p(by_layer)).all()
    assert (example_p(np.ones((3, 4))) == 1).all()
    # Independent heavy-tailed layers: nothing to find; one example on which they agree: found.
    layers = rng.standard_t(3, (40, 500))
    p = example_p(layers)
    assert np.mean(p <= 0.05) == pytest.approx(0.05, abs=0.03)
    assert (false_discovery_control(p) > 0.05).all()
    layers[:, 7] = 2.0
    assert (false_discovery_control(example_p(layers)) < 0.05).nonzero()[0].tolist() == [7]
