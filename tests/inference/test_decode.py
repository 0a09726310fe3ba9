import jax
import numpy as np
import pytest

from jaxllm.inference.decode import CHECK_EVERY, Decoder, Limits, Request, bucket, programs
from jaxllm.inference.layout import Layout, choose_layout
from jaxllm.inference.sampling import Sampler, penalise
from jaxllm.layers.cache import init_cache
from jaxllm.layers.config import Experts, LongRopeScaling, Rope
from jaxllm.models.build import bind, graph, init_params
from jaxllm.models.config import ComputeConfig, ModelConfig

COMPUTE = ComputeConfig(dtype="float32", layers="unroll")
CONFIG = ModelConfig(vocab_size=61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48, max_seq_len=80)
GREEDY, PLAIN = Sampler(temperature=0), Sampler(temperature=1.0, seed=5)
RANDOM = np.random.default_rng(1)
PROMPTS = [RANDOM.integers(3, 61, n).tolist() for n in (1, 2, 5, 9, 17, 31, 33, 40)]


def tokens_of(decoder, prompts, sampler, count, **limits):
    return [a.tokens for a in decoder.generate([Request(p) for p in prompts], sampler, Limits(count, **limits))]


def test_greedy_equals_the_oracle_without_cache(decoder, oracle):
    found = tokens_of(decoder, PROMPTS, GREEDY, 20)
    assert found == [oracle(prompt, 20) for prompt in PROMPTS]
    assert len({tuple(answer) for answer in found}) > 4  # the model does depend on the prompt


def test_a_conversation_that_grows_needs_one_program_or_a_few(decoder, monkeypatch):
    def shapes(lengths):
        rows = [decoder._padded([Request([3] * n)], GREEDY, Limits(256), decoder._shortest) for n in lengths]
        return {(row[0].shape, *row[-2:]) for row in rows}

    assert shapes(range(1, 80)) == {((1, 80), 80, 80)}
    monkeypatch.setattr(decoder, "_shortest", 8)  # of a model that is too large to read much padding
    monkeypatch.setattr(decoder, "config", CONFIG.model_copy(update={"max_seq_len": 2000}))
    assert [row[0][1] for row in sorted(shapes(range(1, 2000)))] == [32, 64, 128, 256, 512, 1024, 2000]


def test_logprobs_are_those_of_the_full_forward(decoder, forward):
    for prompt, answer in zip(PROMPTS, decoder.generate([Request(p) for p in PROMPTS], PLAIN, Limits(8)), strict=True):
        logits = forward(prompt + answer.tokens)[len(prompt) - 1 : -1]
        expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        np.testing.assert_allclose(answer.logprobs, expected[np.arange(8), answer.tokens], atol=1e-4)


def test_cached_logits_equal_the_full_forward(decoder, forward, params):
    config = decoder.config
    model = bind(graph(config, COMPUTE, **choose_layout(params, COMPUTE)._asdict())[0], decoder.params)
    tokens = np.asarray(PROMPTS[4])[None]
    positions = np.arange(17)[None]
    cache = init_cache(config.n_layers, (1, 32, config.kv_heads, config.head_width), np.float32)
    first, cache = model.prefill(tokens[:, :9], positions[:, :9], cache)
    rest, cache = model.decode(tokens[:, 9:], positions[:, 9:], cache)  # several tokens at once, too
    logits = np.concatenate([model.logits(first), model.logits(rest)], axis=1)[0]
    np.testing.assert_allclose(logits, forward(PROMPTS[4]), atol=2e-5)


def test_rows_on_both_sides_of_longrope_use_their_own_factors_and_none_crosses(params):
    factors = {"short_factors": (1.0, 1.2, 1.4, 1.6), "long_factors": (2.0, 3.0, 4.0, 5.0)}
    config = CONFIG.model_copy(update={"positions": Rope(scaling=LongRopeScaling(original_len=20, **factors))})
    model = jax.jit(lambda *batch: bind(graph(config, COMPUTE)[0], batch[0])(batch[1], None, batch[2]))

    def oracle(prompt, count):
        tokens = list(prompt)
        for _ in range(count):
            row = np.zeros((1, 80), np.int32)
            row[0, : len(tokens)] = tokens
            positions = np.minimum(np.arange(80), len(tokens) - 1)[None]
            tokens.append(int(np.argmax(model(params, row, positions)[0, len(tokens) - 1])))
        return tokens[len(prompt) :]

    decoder = Decoder(config, params, COMPUTE)
    short, long = PROMPTS[3], PROMPTS[5]  # 9 tokens, padded to 32, and 31
    found = decoder.generate([Request(short), Request(long)], GREEDY, Limits(16))
    assert [each.tokens for each in found] == [oracle(short, 11), oracle(long, 16)]
    assert [each.finish_reason for each in found] == ["length", "length"]


def test_an_answer_does_not_depend_on_its_batch(decoder):
    prompts = [RANDOM.integers(3, 61, n).tolist() for n in RANDOM.integers(1, 40, 24)]
    together = tokens_of(decoder, prompts, PLAIN, 24)
    for size in (1, 5):
        for i in range(0, 24, size):
            assert tokens_of(decoder, prompts[i : i + size], PLAIN, 24) == together[i : i + size]


def test_turns_of_max_rows_keep_the_order(decoder, monkeypatch):
    expected = tokens_of(decoder, PROMPTS, GREEDY, 6)
    monkeypatch.setattr(decoder, "max_rows", 4)
    assert tokens_of(decoder, PROMPTS, GREEDY, 6) == expected


def test_samples_of_a_prompt_differ_and_can_be_repeated_alone(decoder):
    many = decoder.generate([Request(PROMPTS[3], sample) for sample in range(4)], PLAIN, Limits(12))
    assert len({tuple(answer.tokens) for answer in many}) == 4
    assert decoder.generate([Request(PROMPTS[3], 2)], PLAIN, Limits(12))[0].tokens == many[2].tokens


@pytest.mark.parametrize("sampler", [GREEDY, Sampler(temperature=0.9, top_p=0.9, repetition_penalty=1.3, seed=2)])
def test_stream_equals_generate(decoder, sampler):
    answer = decoder.generate([Request(PROMPTS[2])], sampler, Limits(12))[0]
    steps = list(decoder.stream(Request(PROMPTS[2]), sampler, Limits(12)))
    assert [step.tokens[0] for step in steps] == answer.tokens
    np.testing.assert_allclose([step.logprobs[0] for step in steps], answer.logprobs, atol=1e-5)
    assert [step.finish_reason for step in steps] == [""] * 11 + ["length"]


def test_stop_ids_end_rows_one_by_one(decoder):
    free = tokens_of(decoder, PROMPTS, GREEDY, 20)
    stops = (free[0][3], free[5][7])
    answers = decoder.generate([Request(p) for p in PROMPTS], GREEDY, Limits(20, stops))
    for found, whole in zip(answers, free, strict=True):
        ends = [i for i, token in enumerate(whole) if token in stops]
        assert found.tokens == (whole[: ends[0] + 1] if ends else whole)
        assert found.finish_reason == ("stop" if ends else "length")


def test_finished_ends_a_row_soon(decoder):
    whole = tokens_of(decoder, PROMPTS[:2], GREEDY, 40)
    enough = lambda tokens: len(tokens) >= 5 and tokens[:5] == whole[0][:5]
    first, second = decoder.generate([Request(p) for p in PROMPTS[:2]], GREEDY, Limits(40, finished=enough))
    assert first.tokens == whole[0][: len(first.tokens)]
    assert 5 <= len(first.tokens) <= 5 + CHECK_EVERY
    assert (first.finish_reason, second.finish_reason) == ("stop", "length")
    assert second.tokens == whole[1]


def test_repetition_penalty_covers_prompt_and_answer(decoder, forward):
    prompt, tokens = PROMPTS[1], list(PROMPTS[1])
    for _ in range(10):
        seen = np.isin(np.arange(61), tokens)
        tokens.append(int(np.argmax(penalise(forward(tokens)[-1], seen, np.float32(3)))))
    found = tokens_of(decoder, [prompt, PROMPTS[4]], Sampler(temperature=0, repetition_penalty=3), 10)
    assert found[0] == tokens[2:]


def test_the_models_length_is_the_limit(decoder):
    long = RANDOM.integers(3, 61, 75).tolist()
    answers = decoder.generate([Request(long), Request(PROMPTS[0])], GREEDY, Limits(500))
    assert [len(answer.tokens) for answer in answers] == [5, 79]
    assert [answer.finish_reason for answer in answers] == ["length", "length"]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "prompt 1 has 0 tokens"), ([1] * 80, "80 tokens; the model takes 1 to 79"), ([61], "vocabulary ends at 60")],
)
def test_impossible_prompts_are_refused(decoder, prompt, message):
    with pytest.raises(ValueError, match=message):
        decoder.generate([Request([3]), Request(prompt)], GREEDY, Limits(4))


def test_max_new_tokens_must_be_positive(decoder):
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        decoder.generate([Request([3])], GREEDY, Limits(0))


def test_every_decoder_of_a_model_uses_the_sameprograms(decoder, params):
    other = Decoder(decoder.config, params, COMPUTE)
    assert other._advance is decoder._advance
    assert programs(decoder.config, COMPUTE, Layout(columns=True)) is programs(
        decoder.config, COMPUTE, Layout(columns=True)
    )
    assert other.params["embed"]["table"] is params["embed"]["table"]  # no copy in float32
    half = Decoder(decoder.config, params, COMPUTE.model_copy(update={"dtype": "bfloat16"})).params
    assert half["embed"]["table"].dtype == half["blocks"][0]["ffn"]["up"]["kernel"].dtype == "bfloat16"
    assert half["final_norm"]["scale"] is params["final_norm"]["scale"]


def test_a_prompt_that_fills_the_model_gets_its_one_token(decoder, oracle):
    longest = RANDOM.integers(3, 61, decoder.config.max_seq_len - 1).tolist()
    [answer] = decoder.generate([Request(longest)], GREEDY, Limits(9))
    assert (answer.tokens, answer.finish_reason) == (oracle(longest, 1), "length")


def test_no_requests_no_answers(decoder):
    assert decoder.generate([], GREEDY, Limits(4)) == []


def test_buckets():
    found = [bucket(n, 1000) for n in (1, 32, 33, 48, 49, 65, 96, 97, 200, 769, 900)]
    assert found == [32, 32, 48, 48, 64, 96, 96, 128, 256, 1000, 1000]


def test_a_decoder_on_a_cpu_shares_the_memory_of_a_large_model(monkeypatch):
    monkeypatch.setattr("jaxllm.inference.layout.MAX_COPIED", 0)
    config = CONFIG.model_copy(update={"d_model": 64, "n_heads": 4, "d_ff": 64})
    params = jax.device_put(jax.jit(lambda: init_params(config, 0))(), jax.devices()[0])
    stacked, layers = params["blocks"]["ffn"]["up"]["kernel"], Decoder(config, params, COMPUTE).params["blocks"]
    start, size = stacked.unsafe_buffer_pointer(), stacked[0].nbytes
    for i in range(2):
        assert layers[i]["ffn"]["up"]["kernel"].unsafe_buffer_pointer() == start + i * size


def test_stacked_weights_of_a_narrow_type_decode_as_their_wide_copy(decoder, params, monkeypatch):
    half = jax.tree.map(lambda leaf: leaf.astype("bfloat16") if leaf.ndim > 1 else leaf, params)
    wide = Decoder(decoder.config, half, COMPUTE)
    monkeypatch.setattr("jaxllm.inference.layout.MAX_WIDENED", 0)
    narrow = Decoder(decoder.config, half, COMPUTE)
    up, given = (each["blocks"]["ffn"]["up"]["kernel"] for each in (narrow.params, half))
    assert up.dtype == "uint16" and up.unsafe_buffer_pointer() == given.unsafe_buffer_pointer()  # no copy
    assert tokens_of(narrow, PROMPTS, GREEDY, 12) == tokens_of(wide, PROMPTS, GREEDY, 12)


def test_a_router_is_exact_whatever_the_model_computes_in():
    config = CONFIG.model_copy(update={"ffn": Experts(number=4, top_k=2)})
    half = Decoder(config, init_params(config, 0), COMPUTE.model_copy(update={"dtype": "bfloat16"})).params["blocks"][1]
    assert (half["ffn"]["router"].dtype, half["ffn"]["experts"]["up"].dtype) == ("float32", "bfloat16")


@pytest.mark.parametrize("tied", [True, False])
def test_a_large_table_is_in_memory_once_and_a_narrow_one_is_widened_once(tied, monkeypatch):
    config = CONFIG.model_copy(update={"tie_embeddings": tied})
    params = jax.jit(lambda: jax.tree.map(lambda leaf: 6 * leaf, init_params(config, 3)))()
    half = jax.tree.map(lambda leaf: leaf.astype("bfloat16") if leaf.ndim > 1 else leaf, params)
    turned = Decoder(config, params, COMPUTE)
    monkeypatch.setattr("jaxllm.inference.layout.MAX_COPIED", 0)
    plain, narrow = Decoder(config, params, COMPUTE), Decoder(config, half, COMPUTE)
    assert ("columns" in turned.params, "columns" in plain.params, "columns" in narrow.params) == (True, False, True)
    assert plain.params["embed"] is params["embed"] and plain.params.get("head") is params.get("head")
    assert narrow.params["embed"] is half["embed"] and narrow.params["columns"]["kernel"].dtype == "float32"
    assert tokens_of(plain, PROMPTS, GREEDY, 12) == tokens_of(turned, PROMPTS, GREEDY, 12)
    exact = jax.tree.map(lambda leaf: leaf.astype("float32"), half)
    assert tokens_of(narrow, PROMPTS, GREEDY, 12) == tokens_of(Decoder(config, exact, COMPUTE), PROMPTS, GREEDY, 12)
