"""Beam search against a search that has lists, sorts them, and runs the whole model for each beam and token."""

import jax
import numpy as np
import pytest

from jaxllm.inference.decode import Decoder, Limits, Request
from jaxllm.inference.rules import Rules, Text, banned
from jaxllm.inference.sampling import Sampler
from jaxllm.inference.search import Search
from jaxllm.models.config import ComputeConfig

PROMPTS = [[7, 3, 9], [50], [4, 4, 8, 30, 21, 12]]
STOPS = (11, 17, 29, 40, 52)
GREEDY = Sampler(temperature=0)


def naive(forward, prompt, search, limit, stops):
    """Return [(score, tokens)] of the best answers, the best first."""
    n, power = search.num_beams, search.length_penalty
    opened, ended = [(0.0, [])], []
    for length in range(1, limit + 1):
        found = []
        for score, tokens in opened:
            logprobs = np.asarray(jax.nn.log_softmax(forward(prompt + tokens)[-1]), np.float64)
            found += [(score + logprob, [*tokens, token]) for token, logprob in enumerate(logprobs)]
        found.sort(key=lambda each: -each[0])
        over = lambda tokens, length=length: tokens[-1] in stops or length == limit
        ended += [(score / length**power, tokens) for score, tokens in found[:n] if over(tokens)]
        ended = sorted(ended, key=lambda each: -each[0])[:n]
        opened = [each for each in found if not over(each[1])][:n]
        counted = limit if search.early_stopping == "never" and power > 0 else length
        if (
            len(ended) == n
            and opened
            and (search.early_stopping is True or opened[0][0] / counted**power <= ended[-1][0])
        ):
            break
    return ended


def answers(decoder, prompts, search, limit=9, stops=STOPS):
    requests = [Request(prompt) for prompt in prompts]
    return decoder.answer(requests, search.num_beams, GREEDY, Limits(limit, stops), search)


@pytest.mark.parametrize("early", [False, True, "never"])
@pytest.mark.parametrize("power", [0.0, 1.0, 3.0, -1.0])
def test_answers_are_those_of_a_naive_search_alone_and_in_a_batch(decoder, forward, early, power):
    search = Search(num_beams=3, length_penalty=power, early_stopping=early)
    together = answers(decoder, PROMPTS, search)
    for prompt, found in zip(PROMPTS, together, strict=True):
        expected = naive(forward, prompt, search, 9, STOPS)
        assert [each.tokens for each in found] == [tokens for _, tokens in expected]
        scores = [sum(each.logprobs) / len(each.tokens) ** power for each in found]
        np.testing.assert_allclose(scores, [score for score, _ in expected], rtol=1e-4)
        assert [each.finish_reason for each in found] == [
            "stop" if each.tokens[-1] in STOPS else "length" for each in found
        ]
    alone = answers(decoder, PROMPTS[1:2], search)[0]
    assert [each.tokens for each in alone] == [each.tokens for each in together[1]]


def test_searches_end_at_different_lengths_and_differ_from_greedy(decoder, oracle):
    """The cases above are of little worth if all answers have one length."""
    lengths, first = set(), []
    for early in (False, True):
        for found in answers(decoder, PROMPTS, Search(num_beams=3, early_stopping=early, length_penalty=0.0)):
            lengths |= {len(each.tokens) for each in found}
            first.append(found[0].tokens)
    assert len(lengths) >= 4
    assert any(tokens != oracle(prompt, len(tokens)) for prompt, tokens in zip(PROMPTS, first, strict=False))


def test_a_row_ends_where_the_model_does_while_others_go_on(decoder, forward):
    long = list(np.random.default_rng(0).integers(0, 61, decoder.config.max_seq_len - 3))
    search = Search(num_beams=2)
    found = answers(decoder, [long, PROMPTS[0]], search, stops=())
    assert [len(each.tokens) for each in (*found[0], *found[1])] == [3, 3, 9, 9]
    assert [each.tokens for each in found[0]] == [tokens for _, tokens in naive(forward, long, search, 3, ())]
    assert [each.finish_reason for each in found[0]] == ["length"] * 2


def test_more_searches_than_fit_are_taken_in_turns(decoder, params):
    search = Search(num_beams=3)
    small = Decoder(decoder.config, params, ComputeConfig(dtype="float32", layers="unroll"), max_rows=4)
    tokens = lambda found: [[each.tokens for each in answers] for answers in found]
    assert tokens(answers(small, PROMPTS, search)) == tokens(answers(decoder, PROMPTS, search))


def text(history, counts=0, last=False):
    """Return one row, with three places of no meaning behind it."""
    row = np.asarray([[*history, 1, 1, 1]])
    return Text(row, np.asarray([len(history) - 1]), np.asarray([counts]), np.asarray([last]))


@pytest.mark.parametrize(
    ("rules", "row", "expected"),
    [
        (Rules(ngram=np.int32(1)), text([5, 6, 5]), {5, 6}),
        (Rules(ngram=np.int32(2)), text([5, 6, 7, 5]), {6}),
        (Rules(ngram=np.int32(3)), text([5, 6, 7, 5, 6, 8, 5, 6]), {7, 8}),
        (Rules(ngram=np.int32(3)), text([5, 6]), set()),
        (Rules(ngram=np.int32(4)), text([6, 6, 6]), set()),
        (Rules(words=np.asarray([[-1, -1, 4], [-1, 6, 3], [5, 6, 7], [6, 5, 8]])), text([5, 6]), {4, 3, 7}),
        (Rules(words=np.asarray([[5, 6, 7], [-1, 6, 3]])), text([6]), {3}),
        (Rules(shortest=np.int32(2)), text([5, 6], counts=1), {0, 9}),
        (Rules(shortest=np.int32(2)), text([5, 6], counts=2), set()),
        (Rules(ends=np.asarray([9]), ngram=np.int32(1)), text([9], last=True), set(range(10)) - {9}),
        (Rules(ends=np.asarray([9]), ngram=np.int32(1)), text([9]), {9}),
    ],
)
def test_what_rules_ban(rules, row, expected):
    barred = banned(rules, row, np.asarray([0, 9, -1, -1]), 10)
    assert set(np.flatnonzero(barred[0])) == expected


def test_drawn_and_greedy_answers_keep_the_rules(decoder, forward):
    rules = Search(no_repeat_ngram_size=1, bad_words_ids=((3,),)).rules(())
    prompt, expected = PROMPTS[0], []
    for _ in range(12):
        logits = forward(prompt + expected)[-1].copy()
        logits[[3, *prompt, *expected]] = -np.inf
        expected.append(int(logits.argmax()))
    limits = Limits(12, (), None, rules)
    assert decoder.generate([Request(prompt)], GREEDY, limits)[0].tokens == expected
    for found in decoder.generate([Request(prompt, i) for i in range(3)], Sampler(temperature=2.0), limits):
        assert len({3, *prompt, *found.tokens}) == 3 + 12
        logits = forward(prompt + found.tokens)[len(prompt) - 1 : -1]
        logprobs = np.asarray(jax.nn.log_softmax(logits))[np.arange(12), found.tokens]
        np.testing.assert_allclose(found.logprobs, logprobs, atol=1e-4)  # of the model, not of what the rules leave


def test_a_forced_end_is_said_to_be_a_cut(decoder):
    for rows in (1, 2):
        search = Search(num_beams=rows, forced_eos_token_id=(11,))
        limits = Limits(4, (11,), None, search.rules((11,)))
        found = decoder.answer([Request(PROMPTS[0])], 1, GREEDY, limits, search)[0][0]
        assert found.tokens[-1] == 11
        assert found.finish_reason == ("length" if len(found.tokens) == 4 else "stop")


def test_impossible_searches_are_refused(decoder):
    limits, search = Limits(4), Search(num_beams=2)
    with pytest.raises(ValueError, match="num_samples=3 must be at least 1 and at most num_beams=2"):
        decoder.answer([Request([1])], 3, GREEDY, limits, search)
    with pytest.raises(ValueError, match=r"num_beams=2 looks for the likeliest .* temperature=0.8 draws"):
        decoder.answer([Request([1])], 1, Sampler(), limits, search)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"sequence_bias": [[[3], 1.0]]}, r"asks for sequence_bias=\[\[\[3\], 1.0\]\], which is not computed"),
        ({"num_beam_groups": 2, "diversity_penalty": 0.5}, "diversity_penalty=0.5, num_beam_groups=2"),
        ({"a_new_word": 1}, "asks for a_new_word=1"),
        ({"do_sample": True, "typical_p": 0.9}, "typical_p=0.9"),
        ({"do_sample": True, "num_beams": 4}, "do_sample=True, num_beams=4"),
    ],
)
def test_what_is_not_computed_is_refused(asked, message):
    with pytest.raises(ValueError, match=message):
        Search.read(asked)


def test_words_of_a_checkpoint_are_read():
    assert Search.read({"typical_p": 0.9, "temperature": 0.7, "guidance_scale": None}) == (Search(), GREEDY)
    search, sampler = Search.read({"max_length": 20, "min_length": 3, "forced_eos_token_id": 2, "do_sample": True})
    assert search == Search(max_new_tokens=19, min_new_tokens=2, forced_eos_token_id=(2,))
    assert sampler == Sampler(temperature=1.0, top_k=50, top_p=1.0)
    assert Search.read({"max_length": 20, "max_new_tokens": 5})[0].max_new_tokens == 5
    assert Search.read({"do_sample": True, "top_k": 0})[1].top_k is None
    rules = Search(bad_words_ids=((2,), (7,), (3, 4)), min_new_tokens=3).rules((2,), begun=1)
    assert rules.words.tolist() == [[-1, 7], [3, 4]]
    assert rules.shortest == 2
    assert Search().rules((2,)) == Rules()
