import numpy as np

from jaxllm.data.masking import MaskRule, mask_tokens

RULE = MaskRule(mask_id=4, vocab_size=1000)
TOKENS = np.random.default_rng(0).integers(5, 1000, 100_000)
MASKABLE = np.arange(100_000) % 10 > 0


def test_shares_of_what_is_guessed_and_of_what_stands_there():
    found = mask_tokens(TOKENS, MASKABLE, RULE, seed=0, sample=0)
    guessed = found.weights == 1
    np.testing.assert_array_equal(found.targets, TOKENS)
    np.testing.assert_array_equal(found.tokens[~guessed], TOKENS[~guessed])
    assert not guessed[~MASKABLE].any()
    assert abs(guessed[MASKABLE].mean() - 0.15) < 0.005
    shown, was = found.tokens[guessed], TOKENS[guessed]
    assert abs((shown == 4).mean() - 0.8) < 0.015
    assert abs((shown == was).mean() - 0.1) < 0.015
    other = shown[(shown != 4) & (shown != was)]
    assert abs(len(other) / len(shown) - 0.1) < 0.015
    assert len(set(other.tolist())) > 500
    assert (shown.min(), shown.max()) >= (0, 900)


def test_a_function_of_seed_and_sample():
    one, same = (mask_tokens(TOKENS, MASKABLE, RULE, seed=3, sample=7) for _ in range(2))
    for field, again in zip(one, same, strict=True):
        np.testing.assert_array_equal(field, again)
    for seed, sample in ((3, 8), (4, 7), (7, 3)):
        both = (mask_tokens(TOKENS, MASKABLE, RULE, seed, sample).weights * one.weights)[MASKABLE].mean()
        assert abs(both - 0.15**2) < 0.004  # independent
