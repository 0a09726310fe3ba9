import itertools

import jax
import numpy as np
import pytest

import jaxllm
from jaxllm.data.tokenizers.tokenizer import byte_tokenizer
from jaxllm.inference.decode import Limits, Request
from jaxllm.inference.sampling import Sampler
from jaxllm.inference.text import TextStream
from jaxllm.language_model import Generation, LanguageModel, locate
from jaxllm.models.build import init_params
from jaxllm.models.config import ModelConfig

CONFIG = ModelConfig(vocab_size=262, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48, max_seq_len=160)
GREEDY, WARM = Sampler(temperature=0), Sampler(temperature=1.0, seed=3)
USER = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def lm():
    params = jax.jit(lambda: jax.tree.map(lambda leaf: leaf * 6, init_params(CONFIG, 0)))()
    return LanguageModel(CONFIG, params, byte_tokenizer(), chat=True)


class Letters:
    """Character stream of a tokenizer whose ids are the letters of `text`, in pieces."""

    def push(self, piece):
        return piece

    def flush(self):
        return ""


def test_padding_on_either_side_changes_nothing(lm):
    rows = np.random.default_rng(0).integers(6, 262, (2, 9))
    alone = lm.logits(rows)
    assert alone.dtype == np.float32
    assert alone.shape == (2, 9, 262)
    pad, mask = np.zeros((2, 3), int), np.repeat([[True, False]], 2, 0).repeat([9, 3], 1)
    right = lm.logits(np.concatenate([rows, pad], 1), mask)[:, :9]
    left = lm.logits(np.concatenate([pad, rows], 1), mask[:, ::-1])[:, 3:]
    np.testing.assert_allclose(right, alone, atol=2e-5)
    np.testing.assert_allclose(left, alone, atol=2e-5)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[1, 2, 999_999]], r"token ids 1 to 999999; the model's are 0 to 261"),
        ([[1, -1]], "token ids -1 to 1"),
        ([1, 2], r"shape \[2\], expected rows \[B, T\]"),
        ([[1, 2], [1]], "differ in length; fill them up"),
        ([[]], "rows of 0 tokens; the model takes 1 to max_seq_len=160"),
        (np.zeros((0, 3), int), "no rows; the model takes"),
        ([[1.5]], "tokens are float64, expected rows of ids"),
        ([["text"]], "tokens are <U4, expected rows of ids"),
        ([[1] * 161], "rows of 161 tokens; the model takes 1 to max_seq_len=160"),
    ],
)
def test_tokens_that_are_no_rows_of_ids_are_refused(lm, tokens, message):
    with pytest.raises(ValueError, match=message):
        lm.logits(tokens)


def test_logits_are_traceable_and_a_model_says_what_it_is(lm):
    np.testing.assert_allclose(jax.jit(lm.logits)(np.array([[7, 8]])), lm.logits([[7, 8]]), atol=1e-5)
    assert repr(lm) == "LanguageModel(32,288 parameters in float32, chat)"
    assert lm.decode(lm.encode("Hello")) == "Hello"


def test_packed_weights_give_the_same_logits(lm, monkeypatch):
    half = jax.tree.map(lambda leaf: leaf.astype("bfloat16") if leaf.ndim > 1 else leaf, lm.params)
    wide, packed = (LanguageModel(CONFIG, half, lm.tokenizer) for _ in range(2))
    expected = wide.logits([[7, 8, 9]])
    monkeypatch.setattr("jaxllm.inference.layout.MAX_WIDENED", 0)
    np.testing.assert_allclose(packed.logits([[7, 8, 9]]), expected, atol=2e-5)
    assert packed.decoder.params["blocks"]["ffn"]["up"]["kernel"].dtype == "uint16"


@pytest.mark.parametrize("prompts", [5, [1.5], [[1, "a"]], {"role": "user"}, [None]])
def test_what_is_no_prompt_is_refused(lm, prompts):
    with pytest.raises(ValueError, match=r"a prompt is text, messages .* or ids, and not"):
        lm.generate(prompts)


def test_ids_are_continued_as_they_are(lm):
    ids = lm.encode("Hello")
    said = lm.generate("Hello", max_new_tokens=4, sampler=GREEDY)
    assert lm.generate(ids, max_new_tokens=4, sampler=GREEDY) == said
    assert lm.generate([ids, np.array(ids).tolist()], max_new_tokens=4, sampler=GREEDY)[1].text == said[0].text
    with pytest.raises(ValueError, match="token ids 999 to 999; the model's are 0 to 261"):
        lm.generate([999])


def test_a_model_of_nan_does_not_speak(lm):
    params = {**lm.params, "embed": {"table": lm.params["embed"]["table"].at[7, 0].set(np.nan)}}
    with pytest.raises(ValueError, match="the model's probabilities are NaN: NaN or Inf in embed/table"):
        LanguageModel(CONFIG, params, lm.tokenizer).generate([7], max_new_tokens=2, sampler=GREEDY)


def test_an_empty_text_is_begun_and_a_prompt_without_a_token_refused(lm):
    assert lm.encode("") == [1]
    assert lm.generate([""], max_new_tokens=3, sampler=GREEDY)[0].tokens
    with pytest.raises(ValueError, match="prompt 0 has 0 tokens"):
        lm.decoder.generate([Request([])], GREEDY, Limits(3))


def test_an_answer_shows_its_text_and_no_numbers():
    answer = Generation("a" * 400, [7] * 500, [-0.5] * 500, "stop")
    assert repr(answer) == f"Generation({'a' * 300 + '...'!r}, 500 tokens, 'stop')"
    assert repr(answer._replace(text="b", tokens=[7])) == "Generation('b', 1 token, 'stop')"


@pytest.mark.parametrize("model", [5, None, []])
def test_what_is_no_path_is_refused(model):
    with pytest.raises(ValueError, match="is no path; give a run directory"):
        jaxllm.load(model)


def test_answers_stand_in_the_order_of_prompts_and_samples(lm):
    found = lm.generate(["a much longer prompt", "b"], max_new_tokens=8, sampler=WARM, num_samples=2)
    assert [(answer.prompt, answer.sample) for answer in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert found[2].tokens == lm.generate("b", max_new_tokens=8, sampler=WARM)[0].tokens
    for answer in found:
        assert answer.text == lm.tokenizer.decode(answer.tokens)
        assert len(answer.tokens) == len(answer.logprobs)


def test_nearest_pieces_by_cosine_without_the_text_itself_and_special_tokens(lm):
    a, b, c = lm.tokenizer.encode("abc")
    special = lm.tokenizer.special["<|user|>"]
    rows = {a: [1, 0], special: [1, 0.01], c: [3, 1], b: [1, 2]}
    table = np.zeros((262, 32), np.float32)
    table[:, 5] = 1  # at a right angle to all that follow
    for token, row in rows.items():
        table[token] = [*row, *[0] * 30]
    model = LanguageModel(CONFIG, {**lm.params, "embed": {"table": table}}, lm.tokenizer)
    found = model.nearest("a", count=3)
    assert [piece for piece, _ in found[:2]] == ["c", "b"]
    np.testing.assert_allclose([cosine for _, cosine in found], [3 / 10**0.5, 1 / 5**0.5, 0], atol=1e-6)
    assert [piece for piece, _ in model.nearest("ab", count=1)] == ["c"]
    with pytest.raises(ValueError, match="0 tokens"):
        model.nearest("")


def test_chat_and_respond_use_the_template(lm):
    answer = lm.chat(USER, max_new_tokens=8, sampler=GREEDY)
    special = lm.tokenizer.special
    assert lm.encode(USER) == [1, special["<|user|>"], *lm.tokenizer.encode("Hello"), special["<|assistant|>"]]
    assert lm.chat("Hello", max_new_tokens=8, sampler=GREEDY) == answer
    assert lm.respond("Hello", max_new_tokens=8, sampler=GREEDY) == answer
    assert lm.generate("Hello", max_new_tokens=8, sampler=GREEDY)[0].tokens != answer.tokens


def test_stop_strings_cut_generate_and_stream_alike(lm):
    whole = lm.generate("x", max_new_tokens=60, sampler=WARM)[0]
    stop = whole.text[20:23]
    cut = lm.generate("x", max_new_tokens=60, sampler=WARM, stop=[stop])[0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert cut.tokens == whole.tokens[: len(cut.tokens)]
    assert stop in lm.tokenizer.decode(cut.tokens)
    assert stop not in lm.tokenizer.decode(cut.tokens[:-1])
    assert "".join(lm.stream("x", max_new_tokens=60, sampler=WARM, stop=[stop])) == cut.text


def test_streamed_pieces_join_to_the_answer(lm):
    pieces = list(lm.stream(USER, max_new_tokens=60, sampler=WARM))
    assert "".join(pieces) == lm.chat(USER, max_new_tokens=60, sampler=WARM).text
    assert len(pieces) > 5


def test_no_piece_shows_a_part_of_a_stop_string():
    text = "abENxENDyz"
    for cuts in itertools.product([False, True], repeat=len(text) - 1):
        pieces, start = [], 0
        for i, cut in enumerate((*cuts, True), 1):
            if cut:
                pieces.append(text[start:i])
                start = i
        stream = TextStream(Letters(), ["END", "NDx"])
        shown = [stream.push(piece) for piece in pieces]
        assert "".join(shown) + stream.flush() == "abENx"
        assert stream.stopped


def test_what_is_held_back_comes_at_the_end():
    stream = TextStream(Letters(), ["END"])
    assert [stream.push("abE"), stream.push("N"), stream.flush()] == ["ab", "", "EN"]


def test_characters_are_never_split(lm):
    stream = TextStream(lm.tokenizer.stream(), ["\u20ac!"])
    ids = lm.tokenizer.encode("a\u00e9\u20ac?")
    assert [stream.push(token) for token in ids] == ["a", "", "\u00e9", "", "", "", "\u20ac?"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stop": [""]}, "not empty"),
        ({"stop": "END"}, "must be a list"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
def test_impossible_requests_are_refused(lm, arguments, message):
    with pytest.raises(ValueError, match=message):
        lm.generate("x", **arguments)


@pytest.mark.parametrize("ask", ["generate", "chat", "respond", "stream"])
def test_options_that_are_not_its_own_say_where_they_belong(lm, ask):
    with pytest.raises(
        TypeError, match=r"temperature is of the sampler; give sampler=jaxllm\.Sampler\(temperature=0\)"
    ):
        list(getattr(lm, ask)("x", temperature=0))
    with pytest.raises(TypeError, match=r"unknown option 'max_tokens'; did you mean max_new_tokens\?"):
        list(getattr(lm, ask)("x", max_tokens=3))


def test_a_stream_says_what_is_wrong_when_it_is_asked_for_and_not_when_it_is_read(lm):
    with pytest.raises(TypeError, match=r"unknown option 'num_beams'; did you mean prompt or max_new_tokens"):
        lm.stream("a", num_beams=2)


def test_a_prompt_that_is_too_long_has_the_number_of_the_caller(lm):
    with pytest.raises(ValueError, match="prompt 1 has 201 tokens; the model takes 1 to 159"):
        lm.generate(["x", "y" * 200], num_samples=3)


def test_a_conversation_needs_messages(lm):
    with pytest.raises(ValueError, match="no messages"):
        lm.chat([])


def test_a_foreign_tokenizer_is_refused(lm):
    with pytest.raises(ValueError, match="262 ids and the model 200"):
        LanguageModel(CONFIG.model_copy(update={"vocab_size": 200}), lm.params, byte_tokenizer())


def test_save_and_load_give_the_same_model(lm, tmp_path):
    lm.save(tmp_path / "run")
    (tmp_path / "run.json").write_text('{"model": "run"}')
    for path in (tmp_path, tmp_path / "run" / "checkpoints" / "0"):
        again = jaxllm.load(path)
        assert (again.config, again.is_chat, again.tokenizer.fingerprint) == (CONFIG, True, lm.tokenizer.fingerprint)
        jax.tree.map(np.testing.assert_array_equal, again.params, lm.params)
    with pytest.raises(ValueError, match="is not empty"):
        lm.save(tmp_path / "run")


def test_wrong_paths_are_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist"):
        locate(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no run directory \(no recipe.yaml\)"):
        locate(tmp_path)
