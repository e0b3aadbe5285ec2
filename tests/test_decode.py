"""Sampling and log-likelihoods against plain one-at-a-time computations, and what the cache
keeps and refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from rlhf_trust import StudyError, decode
from rlhf_trust.chat import Chat, EncodedExample
from rlhf_trust.decode import Decoding, Generations, MultipleChoice, Prompt
from scipy import stats as scipy_stats

PROMPTS = [
    Prompt(
        f"p{i}",
        (f"is the {'question ' * (i % 5)}answer {i} wrong?",),
        "assistant" if i % 3 == 0 else None,
    )
    for i in range(9)
]
SEQUENCES = [
    EncodedExample(tuple(10 + (7 * i + k) % 200 for k in range(6 + 5 * i)), 3 + i) for i in range(4)
]
EOS = 2


def draw(base, prompts, decoding, rows):
    """Answers by prompt id, drawn in batches of ``rows``."""
    chat, answers = Chat(base.tokenizer, "chatml"), {}
    for i in range(0, len(prompts), rows):
        part = prompts[i : i + rows]
        drawn = decode.sample_batch(
            base.model,
            [chat.prompt_ids(p.turns, p.system) for p in part],
            [p.id for p in part],
            decoding,
            EOS,
            base.tokenizer.pad_token_id,
        )
        answers |= {p.id: answer for p, answer in zip(part, drawn)}
    return answers


# --- sampling -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "decoding", [Decoding(12, 1.0, samples=3, seed=5), Decoding(12)], ids=["sampled", "greedy"]
)
def test_an_answer_does_not_depend_on_its_batch(tiny, decoding):
    alone = draw(tiny, PROMPTS, decoding, 1)
    assert draw(tiny, PROMPTS, decoding, 9) == alone
    assert draw(tiny, PROMPTS[::-1], decoding, 4) == alone
    assert len({str(a) for a in alone.values()}) > 4  # the model does tell prompts apart


def test_samples_differ_and_more_samples_keep_the_first(tiny):
    three, one = (draw(tiny, PROMPTS, Decoding(8, 1.0, samples=n, seed=1), 9) for n in (3, 1))
    assert all(three[p.id][0] == one[p.id][0] for p in PROMPTS)
    assert all(len({tuple(a) for a in three[p.id]}) == 3 for p in PROMPTS)
    assert draw(tiny, PROMPTS, Decoding(8, 1.0, seed=2), 9) != one


def test_greedy_is_what_transformers_generates(tiny, chat):
    ours = draw(tiny, PROMPTS, Decoding(16), 9)
    for prompt in PROMPTS:
        ids = torch.tensor([chat.prompt_ids(prompt.turns, prompt.system)])
        theirs = tiny.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16
        )
        assert ours[prompt.id] == [theirs[0, ids.shape[1] :].tolist()]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature):
    logits, n = torch.tensor([2.0, -1.0, 0.0, 1.0, -30.0, 0.5]), 20_000
    u = torch.from_numpy(decode.uniform_draws("chi-square", 0, 0, n))
    tokens = decode.inverse_cdf(logits.expand(n, -1), temperature, u)
    seen = np.bincount(tokens.numpy(), minlength=6)
    expected = torch.softmax(logits.double() / temperature, -1).numpy() * n
    likely = expected > 1
    assert seen[~likely].sum() <= 3
    assert (
        scipy_stats.chisquare(
            seen[likely], expected[likely] * seen[likely].sum() / expected[likely].sum()
        ).pvalue
        > 0.001
    )


def test_inverse_cdf_at_its_ends():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(3, -1)
    u = torch.tensor([0.0, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    # A token without probability is never drawn.
    assert decode.inverse_cdf(logits, 1.0, u).tolist() == [1, 2, 2]


def test_draws_are_the_items_own():
    first = decode.uniform_draws("a", 0, 0, 4)
    assert np.array_equal(first, decode.uniform_draws("a", 0, 0, 9)[:4])
    others = [decode.uniform_draws(*which, 4) for which in (("b", 0, 0), ("a", 1, 0), ("a", 0, 1))]
    assert not any(np.isclose(first, other).any() for other in others)


def test_answers_end_at_the_end_token(tiny, chat):
    answers = [
        a for of in draw(tiny, PROMPTS, Decoding(40, 1.5, samples=12), 9).values() for a in of
    ]
    ended = [a for a in answers if EOS in a]
    assert ended and len(ended) < len(answers)
    assert all(a.index(EOS) == len(a) - 1 for a in ended)
    assert all(len(a) == 40 for a in answers if EOS not in a)
    assert chat.decode([*chat.tokenizer("not").input_ids, EOS, 65]) == "not"
    assert chat.decode(chat.tokenizer("not<|im_start|>user").input_ids) == "not"


def test_several_greedy_answers_are_refused():
    with pytest.raises(StudyError, match="samples: greedy decoding"):
        Decoding(4, samples=2)


# --- log-likelihoods ------------------------------------------------------------------------------


def direct_logps(model, sequence):
    ids = torch.tensor([sequence.input_ids])
    logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return logps.gather(1, ids[0, 1:, None]).squeeze(1)[sequence.answer_start - 1 :]


@torch.no_grad()
def test_logps_equal_a_direct_log_softmax(tiny):
    logps, mask = decode.token_logps(tiny.model, SEQUENCES, pad=0)
    sums, counts = decode.answer_logps(tiny.model, SEQUENCES[::-1], pad=0, rows=3)
    for row, sequence in enumerate(SEQUENCES):
        n, direct = len(sequence.answer_ids), direct_logps(tiny.model, sequence)
        torch.testing.assert_close(logps[row, :n], direct, atol=1e-5, rtol=0)
        assert (logps[row, n:] == 0).all() and mask[row].tolist() == [1.0] * n + [0.0] * (
            mask.shape[1] - n
        )
        assert sums[::-1][row] == pytest.approx(float(direct.sum()), abs=1e-4)
        assert counts[::-1][row] == n


@torch.no_grad()
def choices(shared: int) -> list[MultipleChoice]:
    """Seven choices with contexts and options of unlike lengths; all contexts begin with ``shared``
    equal tokens."""
    start = tuple(20 + k for k in range(shared))
    return [
        MultipleChoice(
            f"c{i}",
            start + tuple(10 + (11 * i + k) % 200 for k in range(1 + 6 * (i % 3))),
            tuple(
                tuple(30 + (13 * i + 5 * o + k) % 150 for k in range(1 + (i * o) % 6))
                for o in range(1 + i % 4)
            ),
        )
        for i in range(7)
    ]


@pytest.mark.parametrize("shared", [0, 5, 40])
@pytest.mark.parametrize("tokens", [1, 90, 2048])
def test_option_logps_equal_whole_sequences(tiny, shared, tokens):
    """What runs once for all gives what context and option together give, one by one."""
    asked = choices(shared)
    found = decode.option_logps(tiny.model, asked, tiny.tokenizer.pad_token_id, tokens)
    for choice, values in zip(asked, found):
        for option, value in zip(choice.options, values, strict=True):
            with torch.no_grad():
                logits = (
                    tiny.model(input_ids=torch.tensor([choice.context + option]))
                    .logits[0]
                    .double()
                    .log_softmax(-1)
                )
            places = range(len(choice.context) - 1, len(choice.context) + len(option) - 1)
            assert value == pytest.approx(
                sum(logits[p, t].item() for p, t in zip(places, option)), abs=1e-4
            )


def test_options_are_kept_by_content(tiny_llama, generations, monkeypatch):
    asked = choices(5)
    first = generations.option_logps(tiny_llama.model, "weights", "asked", asked[:4])
    assert len(generations.option_logps(tiny_llama.model, "weights", "asked", asked)) == 7
    monkeypatch.setattr(decode, "option_logps", lambda *_, **__: pytest.fail("ran again"))
    again = generations.option_logps(tiny_llama.model, "weights", "asked", asked[3::-1])
    for one, other in zip(first, again[::-1], strict=True):
        assert (one == other).all()


def test_options_weighed_after_an_interruption_are_the_same(tiny_llama, generations, monkeypatch):
    """What all contexts begin with runs first, not all that those left begin with. (Not to the bit:
    some processors multiply a matrix of one row in another order than one of six.)"""
    prefixes, read_prefix = [], decode.read_prefix
    monkeypatch.setattr(
        decode, "read_prefix", lambda *args: prefixes.append(args[1]) or read_prefix(*args)
    )
    asked = [
        MultipleChoice(str(i), (*range(5, 25), *range(40 + i, 60 + 2 * i)), ((7, 8), (9,)))
        for i in range(6)
    ]
    first = generations.option_logps(tiny_llama.model, "weights", "asked", asked)
    (path,) = generations.directory.iterdir()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    again = generations.option_logps(tiny_llama.model, "weights", "asked", asked)
    np.testing.assert_allclose(again, first, rtol=1e-6)
    assert prefixes == [tuple(range(5, 25))] * 2


@pytest.mark.parametrize(("context", "options"), [((), ((1,),)), ((1,), ()), ((1,), ((2,), ()))])
def test_a_choice_without_tokens_is_refused(context, options):
    with pytest.raises(StudyError, match="c1: a choice needs"):
        MultipleChoice("c1", context, options)


def test_rewards_read_the_last_real_token(tiny):
    """Also where the text's own last token is the pad token."""
    head = torch.randn(32, generator=torch.Generator().manual_seed(0))
    sequences = [*SEQUENCES, EncodedExample((5, 6, 7, 8, 0), 2)]
    batched = decode.rewards(tiny.model, head, sequences, pad=0)
    for reward, sequence in zip(batched, sequences):
        hidden = tiny.model(
            input_ids=torch.tensor([sequence.input_ids]), output_hidden_states=True
        ).hidden_states[-1]
        assert float(reward) == pytest.approx(float(hidden[0, -1] @ head), abs=1e-4)
    np.testing.assert_allclose(
        decode.rewards(tiny.model, head, sequences, 0, rows=2), batched, atol=1e-4
    )


def test_a_prompt_in_common_runs_once_and_changes_nothing(tiny, monkeypatch):
    """Prompts and answers of unlike length, more answers than a batch holds, one prompt alone."""
    prompts = [tuple(range(5, 5 + n)) for n in (3, 30, 17, 8)]
    answers = [tuple((7 * i + j) % 280 + 3 for j in range(1 + 3 * i % 11)) for i in range(7)]
    sequences = [
        EncodedExample(prompt + answer, len(prompt))
        for prompt, k in zip(prompts, (5, 6, 7, 1))
        for answer in answers[:k]
    ]
    head = torch.randn(32, generator=torch.Generator().manual_seed(0))
    alone = [decode.rewards(tiny.model, head, [s], 0)[0] for s in sequences]
    sums = [decode.answer_logps(tiny.model, [s], 0)[0][0] for s in sequences]

    read, backbone = [], decode.backbone

    def counting(model):
        return lambda input_ids, **more: (
            read.append(input_ids.numel()) or backbone(model)(input_ids=input_ids, **more)
        )

    monkeypatch.setattr(decode, "backbone", counting)
    np.testing.assert_allclose(
        decode.rewards(tiny.model, head, sequences, 0, rows=4), alone, atol=1e-4
    )
    np.testing.assert_allclose(
        decode.answer_logps(tiny.model, sequences, 0, rows=4)[0], sums, atol=1e-4
    )
    shared, _ = sum(read), read.clear()
    monkeypatch.setattr(decode, "WORTH_SHARING", 1.0)
    decode.rewards(tiny.model, head, sequences, 0, rows=4)
    decode.answer_logps(tiny.model, sequences, 0, rows=4)
    slides = "sliding_attention" in (getattr(tiny.model.config, "layer_types", None) or ())
    assert shared < 0.9 * sum(read) or slides


# --- what is kept ---------------------------------------------------------------------------------


@pytest.fixture
def generations(tiny_llama, tmp_path):
    return Generations(tmp_path, Chat(tiny_llama.tokenizer, "chatml"), rows=4)


@pytest.fixture
def asked(monkeypatch):
    """The item ids that the model really ran on."""
    ran, sample = [], decode.sample_batch

    def spy(model, rows, keys, *rest):
        ran.extend(keys)
        return sample(model, rows, keys, *rest)

    monkeypatch.setattr(decode, "sample_batch", spy)
    return ran


def test_a_second_run_does_not_run_the_model(tiny_llama, generations, asked, monkeypatch):
    decoding = Decoding(6, 1.0, samples=2)
    first = generations.answer(tiny_llama.model, "f", "x", PROMPTS, decoding)
    assert sorted(asked) == sorted(p.id for p in PROMPTS)
    asked.clear()
    assert generations.answer(tiny_llama.model, "f", "x", PROMPTS[::-1], decoding) == first[::-1]
    assert asked == []
    generations.answer(tiny_llama.model, "f", "x", [*PROMPTS, Prompt("new", ("what?",))], decoding)
    assert asked == ["new"]
    asked.clear()
    changed = Prompt(PROMPTS[0].id, ("another text",))  # the same id does not make it the same item
    generations.answer(tiny_llama.model, "f", "x", [changed], decoding)
    assert asked == [changed.id]
    asked.clear()
    monkeypatch.setenv("RLHF_TRUST_CACHE", "off")
    assert generations.answer(tiny_llama.model, "f", "x", PROMPTS, decoding) == first
    assert len(asked) == len(PROMPTS)


def test_what_changes_answers_is_not_reused(tiny_llama, generations, asked):
    usual = Decoding(4, 1.0)

    def answer(fingerprint="f", decoding=usual, form=generations):
        asked.clear()
        form.answer(tiny_llama.model, fingerprint, "x", PROMPTS, decoding)
        return len(asked)

    assert answer() == 9 and answer() == 0
    assert answer("g") == 9
    for decoding in (
        Decoding(4, 0.5),
        Decoding(5, 1.0),
        Decoding(4, 1.0, samples=2),
        Decoding(4, 1.0, seed=1),
    ):
        assert answer(decoding=decoding) == 9
    assert (
        answer(form=Generations(generations.directory, Chat(tiny_llama.tokenizer, "dialogue"))) == 9
    )
    assert answer() == 0


@pytest.mark.parametrize(
    "cut", [b'{"key": "abc", "ans', '{"key": "abc", "answers": ["caf\u00e9'.encode()[:-1]]
)
def test_a_cut_off_line_is_dropped_and_its_item_run_again(tiny_llama, generations, asked, cut):
    decoding = Decoding(6, 1.0)
    first = generations.answer(tiny_llama.model, "f", "x", PROMPTS, decoding)
    (path,) = generations.directory.iterdir()
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + cut)
    asked.clear()
    assert generations.answer(tiny_llama.model, "f", "x", PROMPTS, decoding) == first
    assert asked == [json.loads(lines[-1])["id"]]
    assert path.read_bytes() == whole


def test_an_answer_with_a_line_separator_can_be_read_back(
    tiny_llama, generations, asked, monkeypatch
):
    """U+2028 and U+0085 end a line for ``str.splitlines``, not for JSON."""
    monkeypatch.setattr(generations.chat, "decode", lambda ids: "one\u2028two\u0085three\nfour")
    for _ in range(2):
        assert generations.answer(tiny_llama.model, "f", "x", PROMPTS[:1], Decoding(3)) == [
            ["one\u2028two\u0085three\nfour"]
        ]
    assert asked == ["p0"]


def test_two_items_of_one_id_are_refused(tiny_llama, generations):
    with pytest.raises(StudyError, match="^x: two items have the same id"):
        generations.answer(tiny_llama.model, "f", "x", [PROMPTS[0], PROMPTS[0]], Decoding(2))


def written_out(query, key, value, visible):
    """Attention by its definition, in the numbers' own format."""
    key, value = (states.repeat_interleave(2, dim=1) for states in (key, value))
    scores = (query @ key.mT / query.shape[-1] ** 0.5).masked_fill(~visible, -1e30)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("mask", ["none", "boolean", "additive"])
def test_plain_attention_and_its_first_and_second_derivatives(mask):
    generator = torch.Generator().manual_seed(0)
    states = [
        torch.randn(2, heads, 5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2)
    ]
    visible = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
    if mask != "none":
        visible[1, :, 3:, 1] = False
    given = {"none": None, "boolean": visible}.get(mask, (~visible).double() * -1e30)
    found = []
    for attended in (
        decode.plain_attention(None, *states, given)[0],
        written_out(*states, visible),
    ):
        first = torch.autograd.grad(attended.square().sum(), states, create_graph=True)
        second = torch.autograd.grad(sum(part.square().sum() for part in first), states)
        found.append([attended, *first, *second])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_training_passes_alone_read_plainly(tiny_llama, monkeypatch):
    seen = []
    packed_states = decode.packed_states

    def noted(model, *args, **kwargs):
        seen.append(model.config._attn_implementation)
        return packed_states(model, *args, **kwargs)

    monkeypatch.setattr(decode, "packed_states", noted)
    decode.token_logps(tiny_llama.model, SEQUENCES, 0)
    decode.answer_logps(tiny_llama.model, SEQUENCES, 0)
    assert seen == [decode.PLAIN, "sdpa"]
    assert tiny_llama.model.config._attn_implementation == "sdpa"
