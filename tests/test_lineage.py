"""CKA against its definition and the specification's constants; disguised copies are recognised."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run_cells, save_untrained
from hypothesis import given, settings, strategies as st
from rlhf_trust import StudyError, lineage
from rlhf_trust.artifacts import TABLES
from rlhf_trust.models import LoRA, load_base, new_adapter, save_adapter
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

M = 200


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def one(first, second, **options) -> float:
    return float(lineage.cka(first[None], second[None], **options)[0, 0])


def test_independent_noise_looks_derived_to_the_biased_estimator_only():
    rng = np.random.default_rng(0)
    expected = ((256, 0.561, 0.003), (1024, 0.835, -0.001), (4096, 0.953, -0.012))
    for width, biased, unbiased in expected:
        x, y = rng.standard_normal((M, width)), rng.standard_normal((M, width))
        assert one(x, y, unbiased=False) == pytest.approx(biased, abs=6e-4)
        assert one(x, y) == pytest.approx(unbiased, abs=6e-4)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("kernel", lineage.KERNELS)
def test_what_leaves_the_similarity_alone(kernel, unbiased):
    x = noise(1, 60, 24) * np.geomspace(3, 0.1, 24)
    rotation = np.linalg.qr(noise(2, 24, 24))[0]
    for copy in (x, x[:, ::-1], 0.8 * x, x @ rotation, x + 5):
        assert one(x, copy, kernel=kernel, unbiased=unbiased) == pytest.approx(1)
    how = dict(kernel=kernel, unbiased=unbiased, standardised=True)
    assert one(x, x @ rotation, **how) < 0.95
    assert one(x, 3 * x[:, ::-1], **how) == pytest.approx(1)


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(5, 12),
    widths=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    seed=st.integers(0, 2**16),
    kernel=st.sampled_from(lineage.KERNELS),
)
def test_all_layer_pairs_at_once_are_the_definition(m, widths, seed, kernel):
    rng = np.random.default_rng(seed)
    first, second = rng.standard_normal((2, m, widths[0])), rng.standard_normal((3, m, widths[1]))

    def gram(x):
        if kernel == "linear":
            return (x - x.mean(0)) @ (x - x.mean(0)).T
        squares = ((x[:, None] - x[None]) ** 2).sum(-1)
        return np.exp(-squares / (2 * np.median(squares[squares > 1e-12 * squares.max()])))

    def biased(a, b):
        h = np.eye(m) - 1 / m
        return np.trace(a @ h @ b @ h) / (m - 1) ** 2

    def unbiased(a, b):
        a, b, ones = a * (1 - np.eye(m)), b * (1 - np.eye(m)), np.ones(m)
        sums = ones @ a @ ones * (ones @ b @ ones) / ((m - 1) * (m - 2))
        return (np.trace(a @ b) + sums - 2 / (m - 2) * (ones @ a @ b @ ones)) / (m * (m - 3))

    for hsic, option in ((biased, False), (unbiased, True)):
        found = lineage.cka(first, second, option, kernel=kernel)
        for i, x in enumerate(map(gram, first)):
            for j, y in enumerate(map(gram, second)):
                own = hsic(x, x) * hsic(y, y)
                if own > 1e-12:
                    assert found[i, j] == pytest.approx(hsic(x, y) / own**0.5, abs=1e-6)


def kernels(seed: int, layers: int = 3, m: int = 60, width: int = 12) -> np.ndarray:
    return lineage.kernel_matrices(noise(seed, layers, m, width))


def related(shared: np.ndarray, seed: int, scale: float = 1.0) -> np.ndarray:
    """Kernel matrices of states of which half are ``shared`` with others, the rest noise."""
    return lineage.kernel_matrices(np.concatenate([shared, scale * noise(seed, *shared.shape)], 2))


def test_a_null_and_an_interval_tell_relations_from_chance():
    first, second = (related(noise(0, 3, 80, 8), seed) for seed in (1, 2))
    mean = pytest.approx(np.diagonal(lineage.aligned(first, second)).mean())
    values = lineage.one_number(lineage.shuffled(first, second))
    assert values[0] == mean
    assert lineage.p_value(values) == pytest.approx(1 / 200) and abs(values[1:].mean()) < 0.02
    found = lineage.interval(first, second)
    assert found.low < found.value < found.high and found.value == mean
    cubes = [lineage.shuffled(kernels(s), kernels(s + 100), draws=99) for s in range(60)]
    for best in (False, True):  # a maximum over layers is high by chance, too, and its null knows
        ps = np.array([lineage.p_value(lineage.one_number(cube, best=best)) for cube in cubes])
        assert 0.3 < ps.mean() < 0.7 and np.mean(ps <= 0.1) < 0.25
    same = lineage.interval(first, first)
    assert (same.low, same.value, same.high) == pytest.approx((1, 1, 1))


def test_the_interval_covers_the_similarity_over_many_texts():
    """Half-samples of 60 texts hold the value that 1,500 have, in about 95 of 100 studies."""
    truth = lineage.aligned(*(related(noise(0, 1, 1500, 4), seed) for seed in (1, 2)))[0, 0]
    hits = 0
    for study in range(120):
        shared, seed = noise(1000 + study, 1, 60, 4), 2000 + 2 * study
        both = related(shared, seed), related(shared, seed + 1)
        found = lineage.interval(*both, draws=100, name=str(study))
        hits += found.low <= truth <= found.high
    assert hits / 120 > 0.87


def test_layers_are_compared_at_equal_relative_depth():
    assert lineage.same_depth(32, 32, lineage.PAPER_DEPTH) == [(18, 18)]  # the authors' layers[18]
    assert lineage.same_depth(30, 6, lineage.PAPER_DEPTH) == [(17, 3)]
    assert lineage.same_depth(30, 6) == [(4, 0), (9, 1), (14, 2), (19, 3), (24, 4), (29, 5)]
    assert lineage.same_depth(2, 2) == [(0, 0), (1, 1)]


def test_verdicts():
    def verdict(low, high, p=0.005, random_init=0.3):
        return lineage.verdict(lineage.Interval((low + high) / 2, low, high, 200), p, random_init)

    assert verdict(0.9, 0.99) == "derived"
    # A high number that shuffled texts reach as well, or one that random weights reach.
    assert verdict(0.9, 0.99, p=0.2) == "unrelated"
    assert verdict(0.9, 0.99, random_init=0.92) == "open"
    assert verdict(0.75, 0.85) == verdict(0.55, 0.7) == "open"
    assert verdict(0.2, 0.4) == "unrelated"


def test_bad_states_are_named():
    states = noise(0, 2, 10, 3)
    states[1] = [0.1, 0.7, 1.3]  # whose mean over texts is not exactly these
    with pytest.raises(StudyError, match="mine: layer 2 has the same state for every text"):
        lineage.kernel_matrices(states, name="mine")
    with pytest.raises(StudyError, match="kernel: must be one of linear, radial"):
        lineage.kernel_matrices(states, "rbf")


@pytest.mark.parametrize(
    "changed, said",
    [
        (dict(texts=9), "n_texts: 9 texts, intervals need at least 10"),
        (dict(text_counts=[4, 300]), r"text_counts: none of \[4, 300\] lies between 5 and 200"),
    ],
)
def test_settings_that_cannot_work_end_before_a_model_is_read(changed, said):
    fine = dict(texts=M, text_counts=[100, 10, 4])
    assert lineage.usable_counts(**fine) == [10, 100]
    with pytest.raises(StudyError, match=f"50-lineage: {said}"):
        lineage.usable_counts(**fine | changed)


def test_models_that_cannot_be_read_are_named(tiny_llama):
    with pytest.raises(StudyError, match="lineage: mine: text 9 has no tokens"):
        lineage.last_token_states(tiny_llama.model, tiny_llama.tokenizer, [*TEXTS, ""], desc="mine")
    with torch.no_grad():
        tiny_llama.model.model.layers[1].mlp.down_proj.weight[0] = torch.nan
    with pytest.raises(StudyError, match="lineage: mine: states of layer 2 are not finite"):
        lineage.last_token_states(tiny_llama.model, tiny_llama.tokenizer, TEXTS, desc="mine")


TEXTS = [
    "the answer",
    "the question is not wrong",
    "human",
    "what is the assistant to the user?",
    "not",
    "the system",
    "is it",
    "to the answer",
]


def test_states_do_not_depend_on_the_batch(tiny):
    states = lineage.last_token_states(tiny.model, tiny.tokenizer, TEXTS, rows=3)
    assert states.shape == (2, len(TEXTS), 32)
    plain = tiny.model.base_model
    after_last_block = plain.norm if hasattr(plain, "norm") else plain.final_layer_norm
    for index, text in enumerate(TEXTS):
        with torch.no_grad():
            ids = tiny.tokenizer(text, return_tensors="pt")
            hidden = tiny.model(**ids, output_hidden_states=True).hidden_states
            last = after_last_block(torch.tensor(states[1, index]))
        np.testing.assert_allclose(last, hidden[2][0, -1], atol=1e-4)
        np.testing.assert_allclose(states[0, index], hidden[1][0, -1], atol=1e-4)
    assert (lineage.last_token_states(plain, tiny.tokenizer, TEXTS, rows=3) == states).all()


def test_copies_that_compute_the_same_are_seen_through(tiny_llama):
    model, tokenizer = tiny_llama.model, tiny_llama.tokenizer
    mine = lineage.last_token_states(model, tokenizer, TEXTS)
    ids = torch.tensor([tokenizer(TEXTS[3]).input_ids])
    for copy, tolerance in ((lineage.permuted(model), 1e-4), (lineage.rescaled(model, 0.8), 1e-2)):
        with torch.no_grad():
            both = copy(ids).logits, model(ids).logits
        torch.testing.assert_close(*both, atol=tolerance, rtol=tolerance)
        other = lineage.last_token_states(copy, tokenizer, TEXTS)
        assert np.abs(other - mine).max() > 0.1
        np.testing.assert_allclose(np.diagonal(lineage.cka(mine, other)), 1, atol=1e-4)
    pruned = lineage.pruned(model, 0.3)
    for copy in (pruned, lineage.rounded(model)):
        assert not torch.equal(up_projection(copy), up_projection(model))
        other = lineage.last_token_states(copy, tokenizer, TEXTS)
        assert 0.5 < np.diagonal(lineage.cka(mine, other)).mean() < 1
    assert (up_projection(pruned) == 0).float().mean() == pytest.approx(0.3, abs=0.01)
    assert torch.equal(pruned.model.embed_tokens.weight, model.model.embed_tokens.weight)


def up_projection(model) -> torch.Tensor:
    return model.model.layers[0].mlp.up_proj.weight


def test_a_family_is_told_from_unrelated_models(tiny_llama, tmp_path):
    """From random weights of the same shape, and from a model trained on the same texts."""
    base, tokenizer = tiny_llama, tiny_llama.tokenizer
    adapted = new_adapter(base, LoRA(4, 8))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.02)
    save_adapter(base, adapted, tmp_path / "sft")
    expected = lineage.last_token_states(adapted, tokenizer, TEXTS)
    adapted.unload()
    before = [p.clone() for p in base.model.parameters()]
    whole = lineage.merged(base, tmp_path / "sft")
    ids = [tuple(tokenizer(text).input_ids) for text in TEXTS]
    scratch = lineage.trained_from_scratch(base, ids, steps=8, batch=4, learning_rate=1e-2)
    assert all(torch.equal(a, b) for a, b in zip(before, base.model.parameters()))
    fresh, again = lineage.random_init(base), lineage.random_init(base)
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), again.parameters()))

    def loss(model):
        rows = [torch.tensor([i]) for i in ids if len(i) > 1]
        return np.mean([model(input_ids=row, labels=row).loss.item() for row in rows])

    def states_of(model):
        return lineage.last_token_states(model, tokenizer, TEXTS * 2)

    assert loss(scratch) < loss(fresh) - 0.5
    untrained = lineage.trained_from_scratch(base, ids, steps=0)  # other weights than `fresh`
    assert not torch.equal(up_projection(untrained), up_projection(fresh))
    models = {"start": base.model, "sft": whole, "renamed": lineage.permuted(whole)}
    models |= {"random": fresh, "scratch": scratch}
    states = {name: states_of(model) for name, model in models.items()}
    np.testing.assert_allclose(states["sft"][:, : len(TEXTS)], expected, atol=1e-4)
    table = lineage.similarities(states)
    assert len(table) == 10 * len(lineage.MEASURES)
    first = table.set_index(["first", "second", "measure"])["value"]["sft", "random"]
    unbiased, biased = (
        lineage.cka(states["sft"], states["random"], unbiased=unbiased)
        for unbiased in (True, False)
    )
    assert first[lineage.STUDY] == pytest.approx(np.diagonal(unbiased).mean())
    assert first[lineage.PAPER] == pytest.approx(biased[0, 0])
    assert first[lineage.BEST] == pytest.approx(unbiased.max())
    known = dict(start=True, sft=True, renamed=True, random=False, scratch=False)
    told = lineage.separation(table, known).set_index("measure")
    assert told.loc[lineage.STUDY, "auc"] == 1.0
    assert told.iloc[0][["n_derived", "n_unrelated"]].tolist() == [3, 7]

    own = {name: lineage.kernel_matrices(s) for name, s in states.items()}
    others = [states_of(lineage.random_init(base, seed)) for seed in (2, 3)]
    random_init = [lineage.kernel_matrices(some) for some in others]
    found = lineage.against_start(own, table, known, random_init, draws=39)
    assert list(found) == TABLES["lineage"] and len(found) == 4 * len(lineage.MEASURES)
    study, best = (
        found[found["measure"] == measure].set_index("suspect")
        for measure in (lineage.STUDY, lineage.BEST)
    )
    means = [np.diagonal(lineage.aligned(own["start"], other)).mean() for other in random_init]
    assert (study["twins"] == max(means)).all()
    assert study.index[study["derived"]].tolist() == ["sft", "renamed"]
    cube = lineage.aligned(own["start"], own["random"])
    assert study.loc["random", "value"] == pytest.approx(np.diagonal(cube).mean())
    assert best.loc["random", "value"] == pytest.approx(cube.max())
    assert (best["shuffled"] >= study["shuffled"]).all()
    assert best["ci_low"].isna().all() and (best["verdict"] == "").all()
    assert study.loc["sft", "p"] == 1 / 40 and (study.loc["random", "verdict"] != "derived")
    said = lineage.words(found, told.reset_index())[0]
    over = "unbiased at all depths with start, 95 % interval over 16 texts"
    assert said.startswith(f"**Derived models** ({over}): sft")


def test_the_measures_are_all_variants():
    assert len(lineage.MEASURES) == 13 and next(iter(lineage.MEASURES)) == lineage.STUDY
    one_depth = {"depth": lineage.PAPER_DEPTH}
    assert lineage.MEASURES[lineage.PAPER] == ("linear", False, False, one_depth)
    authors = lineage.MEASURES["biased standardised at one depth"]
    assert authors == ("linear", True, False, one_depth)
    states = {name: noise(seed, 2, 20, 4) for seed, name in enumerate("abc")}
    found = lineage.similarities(states).set_index(["first", "second", "measure"])["value"]
    for measure, how in (
        ("biased radial standardised at all depths", dict(unbiased=False, standardised=True)),
        ("unbiased radial at all depths", dict(unbiased=True)),
    ):
        assert found["a", "c", measure] == pytest.approx(
            np.diagonal(lineage.cka(states["a"], states["c"], kernel="radial", **how)).mean()
        )


def test_words_say_what_the_rule_misses():
    nan = np.nan
    rows = [
        ("sft", True, 0.95, 0.93, 0.97, 0.005, "derived", 0.7),
        ("cut", True, 0.85, 0.75, 0.9, 0.005, "open", 0.9),
        ("dull", True, 0.9, 0.85, 0.95, 0.2, "unrelated", 0.95),
        ("twin", False, 0.6, 0.55, 0.65, 0.005, "open", 0.85),
        ("other", False, 0.1, 0.05, 0.2, 0.005, "unrelated", 0.3),
    ]
    columns = "suspect derived measure value ci_low ci_high p verdict twins".split()
    listed = []
    for name, derived, value, low, high, p, called, paper in rows:
        listed += [
            (name, derived, lineage.STUDY, value, low, high, p, called, 0.76),
            (name, derived, lineage.PAPER, paper, nan, nan, nan, "", nan),
            (name, derived, lineage.BEST, value, nan, nan, p, "", nan),
        ]
    table = pd.DataFrame(listed, columns=columns).assign(shuffled=0.1, n=200)
    columns = "measure auc derived unrelated n_derived n_unrelated".split()
    told = pd.DataFrame([("m", 1.0, 0.8, 0.3, 3, 7), ("k", 0.9, 0.5, 0.6, 3, 7)], columns=columns)
    said = lineage.words(table, told)
    assert said[2] == (
        "The rule misses cut (0.850, 0.750 to 0.900, p = 0.005, open); dull (0.900, 0.850 to "
        "0.950, p = 0.200, unrelated); twin (0.600, 0.550 to 0.650, p = 0.005, open)."
    )
    assert "twin (0.850) would be called derived, and sft (0.700) would be missed" in said[3]
    assert "the least similar derived model reaches 0.850 (cut; 95 % of" in said[4]
    assert "the most similar unrelated model reaches 0.600 (twin; 95 % of" in said[5]
    assert "1 of 2 measures separate without error (the others: k)" in said[-1]
    right = table[table["suspect"].isin(["sft", "other"])]
    assert lineage.words(right, told)[2] == "The rule misses no model."
    # A model of unknown origin has a verdict of its own and is in no other sentence.
    for like, called, direction in (("dull", "unrelated", False), ("sft", "derived", True)):
        brought = table[table["suspect"] == like].assign(suspect="mine", derived=None)
        first, *rest = lineage.words(pd.concat([brought, table]), told)
        assert "): mine (0.9" in first and f", {called})." in first
        assert ("has no direction" in first) == direction
        assert rest[2] == said[2].replace("The rule", "Of the other models, the rule")
        assert rest[0].partition(": sft")[2] == said[0].partition(": sft")[2]
        assert rest[1] == said[1] and rest[3:] == said[3:]


def test_separation_counts_pairs():
    table = pd.DataFrame({"first": list("aaab"), "second": list("bcdc"), "measure": "m"})
    table["value"] = [0.9, 0.4, 0.95, 0.1]
    known = dict(a=True, b=True, c=False, d=False)
    found = lineage.separation(table, known).iloc[0]
    assert found["auc"] == pytest.approx(2 / 3)
    assert found[["derived", "unrelated"]].tolist() == [0.9, 0.95]


def test_a_model_of_unknown_origin_counts_on_neither_side():
    """Neither as derived, however similar it is, nor as unrelated, however dissimilar."""
    pairs = [("a", "b", 0.9), ("a", "c", 0.4), ("b", "c", 0.1), ("a", "mine", 1), ("mine", "c", -1)]
    table = pd.DataFrame(pairs, columns=["first", "second", "value"]).assign(measure="m")
    known = dict(a=True, b=True, c=False)
    without = table[~table[["first", "second"]].eq("mine").any(axis=1)]
    both = (lineage.separation(rows, known) for rows in (table, without))
    pd.testing.assert_frame_equal(*both)
    found = lineage.separation(table, known).iloc[0]
    assert found[["n_derived", "n_unrelated"]].tolist() == [1, 2]
    cubes = {(first, second): np.array([[value]]) for first, second, value in pairs}
    assert lineage.margin(cubes, known) == pytest.approx(0.9 - 0.4)
    for lone in (dict(a=True, c=False), dict(a=True, b=True)):  # one side has no pair
        assert list(lineage.separation(table, lone)) == TABLES["lineage_separation"]
        assert lineage.separation(table, lone).empty
        assert np.isnan(lineage.margin(cubes, lone))


def test_a_suspect_of_another_shape_and_tokenizer_gets_a_verdict(tiny_llama, tmp_path):
    """A model that was brought, with no copies and no other derived model: table and words."""

    class Letters:
        """Another tokenizer: a token a letter."""

        pad_token_id = 0

        def __call__(self, text):
            return SimpleNamespace(input_ids=[ord(letter) % 97 + 1 for letter in text])

    config = GPTNeoXConfig(
        vocab_size=100,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=16,
    )
    torch.manual_seed(0)
    mine, texts = GPTNeoXForCausalLM(config).eval(), TEXTS * 2
    states = {"start": lineage.last_token_states(tiny_llama.model, tiny_llama.tokenizer, texts)}
    states["mine"] = lineage.last_token_states(mine, Letters(), texts)
    twin = lineage.random_init(tiny_llama, 5)
    states["twin"] = lineage.last_token_states(twin, tiny_llama.tokenizer, texts)
    assert states["mine"].shape == (3, len(texts), 24)
    known = dict(start=True, twin=False)
    own = {name: lineage.kernel_matrices(some) for name, some in states.items()}
    pairwise = lineage.similarities(states)
    table = lineage.against_start(own, pairwise, known, [own["twin"]], draws=39)
    told = lineage.separation(pairwise, known)
    table.to_csv(tmp_path / "lineage.csv", index=False)
    for rows in (table, pd.read_csv(tmp_path / "lineage.csv")):  # as made, and as the report reads
        assert set(rows.loc[rows["derived"].isna(), "suspect"]) == {"mine"}
        said = lineage.words(rows, told)
        assert said[0].startswith("**Models of unknown origin** (unbiased at all depths with start")
        assert "): mine (" in said[0] and not any("mine" in sentence for sentence in said[1:])
        assert not any("**Derived" in sentence or "Over all" in sentence for sentence in said)
        assert said[1].startswith("**Unrelated models**: twin (")
        assert said[2].startswith("Of the other models, the rule misses")


def test_the_margin_with_fewer_texts():
    shared = noise(0, 3, 60, 6)
    own = {name: related(shared, seed, 0.5) for seed, name in enumerate("abc", 1)}
    own["random"] = kernels(9, layers=2)
    made = lineage.alignments(own)
    derived = [np.diagonal(made[pair]).mean() for pair in (("a", "b"), ("a", "c"), ("b", "c"))]
    others = [made[name, "random"][[1, 2], [0, 1]].mean() for name in "abc"]
    known = dict(a=True, b=True, c=True, random=False)
    assert lineage.margin(made, known) == pytest.approx(min(derived) - max(others))
    found = lineage.margin_by_texts(own, known, [5, 20, 60])
    assert (found["low"] <= found["median"]).all()
    assert (found["high"] - found["low"]).is_monotonic_decreasing
    assert found["median"].iloc[-1] == pytest.approx(lineage.margin(made, known))

    def fewest(*lows):
        return lineage.enough(pd.DataFrame({"texts": [10, 25, 50, 100][: len(lows)], "low": lows}))

    # A small count with a margin by chance is not enough.
    assert fewest(0.1, -0.1, 0.1, 0.2) == 50 and fewest(0.1, 0.2) == 10
    assert fewest(0.1, -0.1) is None


def test_permuting_needs_a_llama(tiny_directories):
    with pytest.raises(StudyError, match="in Llama models only, this is 'gpt_neox'"):
        lineage.permuted(load_base(f"path:{tiny_directories['gpt_neox']}", "float32").model)


@pytest.mark.slow
@pytest.mark.parametrize("copied", ["", "start"])
def test_the_chapter_runs_on_one_model(copied, tiny_directories, tmp_path, monkeypatch):
    """Without copies, or with those of start itself, and where no other model of the study is."""
    monkeypatch.setenv("RLHF_TRUST_BUILD", str(tmp_path))
    model, other = (f"path:{tiny_directories[kind]}" for kind in ("llama", "gpt_neox"))
    save_untrained(load_base(model, "float32"), tmp_path / "models" / "mine")
    encoder = load_base(other, "float32")
    monkeypatch.setattr(
        "rlhf_trust.sources.sentence_encoder", lambda: (encoder.model, encoder.tokenizer)
    )
    sizes = dict(n_train=16, n_held_out=8, max_length=2000, n_texts=12, text_counts=[8, 12])
    chapter = run_cells(
        "50-lineage", model=model, trained=["mine"], copied=copied, scratch_steps=1, **sizes
    )
    copies = [f"start {how}" for how in ("pruned", "8-bit", "renamed", "rescaled")]
    derived = ["start", "mine", *(copies if copied else [])]
    assert [name for name, known in chapter["known"].items() if known] == derived
    told = chapter["told"].iloc[0]
    assert told["n_derived"] == len(derived) * (len(derived) - 1) / 2
    assert told["n_unrelated"] == 3 * len(derived) + 3
