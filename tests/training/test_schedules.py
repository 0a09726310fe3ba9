import numpy as np
import pytest

from jaxllm.training.schedules import Cosine, WarmupStableDecay, learning_rate, warmup_steps


def curve(config, steps=100, peak=2.0):
    return np.array([float(learning_rate(config, peak, step, steps)) for step in range(steps + 5)])


def test_cosine_literals():
    lr = curve(Cosine(warmup=10, final=0.1))
    np.testing.assert_allclose(lr[[0, 4, 9, 10]], [0.2, 1.0, 2.0, 2.0], rtol=1e-5)
    assert lr[55] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5), rel=1e-4)
    np.testing.assert_allclose(lr[100:], 0.2, rtol=1e-5)


def test_warmup_stable_decay_literals():
    lr = curve(WarmupStableDecay(warmup=10, decay=0.2, final=0.0))
    np.testing.assert_allclose(lr[10:81], 2.0)
    assert lr[90] == pytest.approx(1.0)
    np.testing.assert_allclose(lr[100:], 0.0)


def test_no_warmup_starts_at_the_peak():
    assert curve(Cosine(warmup=0))[0] == 2.0


def test_warmup_longer_than_the_run_is_cut():
    assert curve(Cosine(warmup=1000), steps=10)[9] == pytest.approx(2.0)


def test_a_warmup_below_one_is_a_share_of_the_steps():
    np.testing.assert_array_equal(curve(Cosine(warmup=0.1)), curve(Cosine(warmup=10)))
    short = curve(Cosine(warmup=0.05, final=0.0), steps=9)
    assert short[0] == 2.0 and short[8] < 0.1
    assert [warmup_steps(Cosine(warmup=warmup), 40) for warmup in (0, 0.05, 1, 100)] == [0, 2, 1, 40]
