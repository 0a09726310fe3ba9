import gc
import threading
import time

import numpy as np
import pytest

from jaxllm.core.batch import Batch
from jaxllm.data.loader import DataConfig, DataExhausted, Loader, Source
from jaxllm.data.packing import PackingConfig
from jaxllm.data.shard_writer import DatasetWriter, Encoded, text_tokens


def make_config(*paths, seq_len=16, weights=None, **options):
    weights = weights or [1.0] * len(paths)
    sources = tuple(Source(path=str(path), weight=weight) for path, weight in zip(paths, weights, strict=True))
    return DataConfig(sources=sources, packing=PackingConfig(seq_len=seq_len), **({"threads": 0} | options))


def take(loader, count):
    return [next(loader) for _ in range(count)]


def join(batches):
    """Rows of several batches as one Batch [rows, T]."""
    return Batch(*(np.concatenate(arrays) for arrays in zip(*batches, strict=True)))


def same(first, second):
    return all((a == b).all() and a.dtype == b.dtype for a, b in zip(first, second, strict=True))


@pytest.fixture
def text(text_dataset):
    return text_dataset([7, 40, 3, 25, 61, 12, 30, 9, 18, 44], validation=[10, 25, 13])


@pytest.fixture
def chat(chat_dataset):
    return chat_dataset([(3, 4), (2, 3), (9, 5), (1, 12), (4, 4), (6, 6), (2, 2)], validation=[(3, 3)])


def test_batch_shapes_and_types(text):
    batch = next(Loader(make_config(text, batch_size=4)))
    assert isinstance(batch, Batch)
    assert [array.shape for array in batch] == [(4, 16)] * 5
    assert [str(array.dtype) for array in batch] == ["int32", "int32", "float32", "int32", "int32"]


@pytest.mark.parametrize("kind", ["text", "chat", "both"])
def test_batch_size_does_not_change_the_order(text, chat, kind):
    paths = {"text": [text], "chat": [chat], "both": [chat, text]}[kind]
    small = Loader(make_config(*paths, batch_size=4))
    large = Loader(make_config(*paths, batch_size=8))
    assert same(join(take(small, 10)), join(take(large, 5)))


def test_parts_are_pieces_of_the_same_batches_wherever_they_lie(text):
    config = make_config(text, batch_size=8)
    for parts, rows in (((1,), [2, 3]), ((0, 2), [0, 1, 4, 5]), ((1, 2, 3), [2, 3, 4, 5, 6, 7])):
        for some, whole in zip(take(Loader(config, "train", parts, 4), 4), take(Loader(config), 4), strict=True):
            assert same(some, [array[rows] for array in whole])


@pytest.mark.parametrize("threads", [0, 3])
def test_resume_equals_skipping(text, chat, threads):
    config = make_config(text, chat, weights=[0.7, 0.3], batch_size=3, threads=threads)
    straight = Loader(config)
    take(straight, 7)
    state = straight.get_state()
    assert state == {"sample": 21}
    resumed = Loader(config)
    resumed.set_state(state)
    for _ in range(9):
        assert same(next(straight), next(resumed))
    assert resumed.get_state() == straight.get_state() == {"sample": 48}


def test_resume_with_another_batch_size(text):
    first = Loader(make_config(text, batch_size=6))
    take(first, 2)
    resumed = Loader(make_config(text, batch_size=4))
    resumed.set_state(first.get_state())
    assert same(join(take(resumed, 3)), join(take(first, 2)))


def test_threads_change_nothing_and_end(text):
    config = make_config(text, batch_size=4)
    plain = join(take(Loader(config), 20))
    threaded = Loader(config.model_copy(update={"threads": 4, "prefetch": 8}))
    assert same(join(take(threaded, 20)), plain)
    before = threading.active_count()
    for sample in range(20):
        threaded.set_state({"sample": sample})
        next(threaded)
    del threaded
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert threading.active_count() <= before


def targets(batches):
    """All (target, how often) with weight 1."""
    rows = join(batches)
    return sorted(rows.targets[rows.weights > 0].tolist())


@pytest.mark.parametrize("name", ["text", "chat"])
def test_one_epoch_trains_every_token_once(request, name):
    loader = Loader(make_config(request.getfixturevalue(name), epochs=1, batch_size=4, seq_len=24))
    batches = []
    with pytest.raises(DataExhausted):
        while True:
            batches.append(next(loader))
    [dataset] = loader.datasets
    expected = [
        token
        for document in range(len(dataset))
        for token, learn in list(zip(dataset.tokens(document).tolist(), dataset.trained(document), strict=True))[1:]
        if learn
    ]
    assert targets(batches) == sorted(expected)
    assert len(expected) == dataset.n_trained
    assert loader.get_state() == {"sample": loader.samples_per_epoch}


def test_epochs_are_reshuffled(text):
    loader = Loader(make_config(text, batch_size=1))
    n = loader.samples_per_epoch
    epochs = [[next(loader).tokens.tobytes() for _ in range(n)] for _ in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_seed_changes_the_order_and_the_fingerprint(text):
    first, second = Loader(make_config(text, seed=0)), Loader(make_config(text, seed=1))
    assert not same(next(first), next(second))
    assert first.fingerprint != second.fingerprint


def test_exhausted_says_how_many_and_what_to_set(text):
    loader = Loader(make_config(text, epochs=2, batch_size=8))
    n = loader.samples_per_epoch
    with pytest.raises(
        DataExhausted, match=rf"all {2 * n} samples that data.epochs=2 .* allow are used \({n} are an epoch\); set them"
    ):
        take(loader, 1000)
    assert loader.get_state() == {"sample": 2 * n}
    with pytest.raises(ValueError, match="are used"):
        next(loader)


def test_last_batch_is_filled_with_weightless_rows(text):
    loader = Loader(make_config(text, epochs=1, batch_size=5))
    n = loader.samples_per_epoch
    assert n % 5
    last = take(loader, -(-n // 5))[-1]
    assert last.tokens.shape == (5, 16)
    real = n % 5
    assert last.segments[:real].any(axis=1).all()
    assert not any(array[real:].any() for array in last)


def test_mix_follows_the_weights_exactly(text, chat):
    loader = Loader(make_config(chat, text, weights=[0.85, 0.15], batch_size=4))
    sources = [loader.locate(sample)[0] for sample in range(400)]
    assert sources.count(1) == 60
    assert all(abs(sources[:length].count(1) - 0.15 * length) < 2 for length in range(1, 400))
    batch = next(loader)
    source, row = loader.locate(2)
    assert same(Batch(*(array[2] for array in batch)), loader.plans[source].row(row))


def test_validation_is_one_pass_in_order(text, chat):
    config = make_config(text, chat, batch_size=2, seed=5)
    loader = Loader(config, "validation")
    batches = list(loader)
    rows = join(batches)
    stored = [made.row(index) for made in loader.plans for index in range(len(made))]
    for index, row in enumerate(stored):
        assert same(Batch(*(array[index] for array in rows)), row)
    assert not rows.weights[len(stored) :].any()
    assert rows.weights.sum() == sum(dataset.n_trained for dataset in loader.datasets)
    loader.set_state({"sample": 0})
    assert same(join(list(loader)), rows)


def test_validation_may_leave_a_source_out(text, chat):
    config = make_config(chat, text, batch_size=2)
    chat_only = config.model_copy(
        update={"sources": (config.sources[0], config.sources[1].model_copy(update={"validate_on": False}))}
    )
    assert len(Loader(chat_only, "validation").datasets) == 1
    assert len(Loader(chat_only, "train").datasets) == 2


def test_empty_validation_is_an_error(text_dataset):
    with pytest.raises(ValueError, match=r"split 'validation' of .* has no rows; prepare with a larger --validation"):
        Loader(make_config(text_dataset([5, 5])), "validation")


def test_batch_size_must_divide(text):
    with pytest.raises(ValueError, match="batch_size=6 is not divisible by 4 parts; use a multiple of 4, such as 8"):
        Loader(make_config(text, batch_size=6), "train", (0, 1, 2), 4)
    whole = next(Loader(make_config(text, batch_size=6), "train", range(4), 4))  # which no other process has to fit
    assert same(whole, next(Loader(make_config(text, batch_size=6))))


def test_fingerprint_changes_with_what_decides_the_samples(text, chat, text_dataset):
    base = Loader(make_config(text)).fingerprint
    assert Loader(make_config(text, batch_size=32, threads=2, epochs=3)).fingerprint == base
    assert Loader(make_config(text, seq_len=8)).fingerprint != base
    assert Loader(make_config(text, chat)).fingerprint != base
    assert (
        Loader(make_config(text, chat, weights=[0.5, 0.5])).fingerprint
        != Loader(make_config(text, chat, weights=[0.9, 0.1])).fingerprint
    )
    assert Loader(make_config(text_dataset([7, 41], "changed"))).fingerprint != base


def test_tokenizers_must_agree(text, tmp_path, bpe):
    with DatasetWriter(tmp_path / "other", bpe, "text") as writer:
        writer.add("train", text_tokens(bpe, Encoded("s", "l", [20] * 40, [], 40)))
    with pytest.raises(
        ValueError, match=r"was tokenised with \w+, .* with \w+; prepare both with the same --tokenizer"
    ):
        Loader(make_config(text, tmp_path / "other"))


def test_what_others_read(text, chat, byte):
    loader = Loader(make_config(chat, text))
    assert loader.vocab_size == 262
    assert loader.tokenizer_fingerprint == byte.fingerprint
    assert loader.tokenizer_dir == chat / "tokenizer"
    n_bytes = sum(dataset.bytes_per_token * dataset.n_trained for dataset in loader.datasets)
    assert loader.bytes_per_token == n_bytes / sum(dataset.n_trained for dataset in loader.datasets)


def test_a_row_costs_well_under_a_millisecond(text_dataset):
    loader = Loader(make_config(text_dataset([200] * 300, shard_tokens=1 << 20), seq_len=512, batch_size=16))
    take(loader, 2)
    start = time.process_time()
    take(loader, 20)
    assert (time.process_time() - start) / (20 * 16) < 1e-3


def test_a_curriculum_changes_the_mixture_and_goes_on_exactly(text, chat):
    stages = ({"tokens": 16 * 10, "weights": [1, 0]}, {"tokens": 16 * 6, "weights": [1, 2]}, {"weights": [0, 1]})
    config = make_config(text, chat, batch_size=4).model_copy(update={"seed": 3})
    config = DataConfig(**{**config.model_dump(), "stages": stages})
    loader = Loader(config)
    sources = [loader.locate(sample)[0] for sample in range(40)]
    assert sources[:10] == [0] * 10
    assert sorted(sources[10:16]) == [0, 0, 1, 1, 1, 1]
    assert sources[16:] == [1] * 24
    rows = [loader.locate(sample)[1] for sample in range(40) if sources[sample] == 1]
    size = len(loader.plans[1])
    assert sorted(rows[:size]) == list(range(size))  # a pass goes on from stage to stage
    assert loader.passes(40) == [12 / len(loader.plans[0]), 28 / size]
    whole = join(take(loader, 8))
    resumed = Loader(config.model_copy(update={"batch_size": 8}))
    resumed.set_state({"sample": 16})
    assert same(join(take(resumed, 2)), Batch(*(array[16:] for array in whole)))
    plain = Loader(make_config(text, chat, batch_size=4))
    assert plain.fingerprint != loader.fingerprint


def test_a_source_is_not_passed_over_more_often_than_it_may_be(text, chat):
    config = make_config(text, chat, batch_size=1)
    limited = config.sources[1].model_copy(update={"epochs": 2})
    loader = Loader(config.model_copy(update={"sources": (config.sources[0], limited)}))
    rows = 2 * len(loader.plans[1])
    assert loader.n_samples == 2 * rows - 1  # it begins and ends with the limited source
    assert loader.passes(loader.n_samples)[1] == 2
    take(loader, 2 * rows - 1)
    with pytest.raises(DataExhausted, match="the epochs of the sources allow are used"):
        next(loader)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"weights": [1, 1], "tokens": 5}], "each but the last needs tokens"),
        ([{"weights": [1, 1]}, {"weights": [1, 1]}], "each but the last needs tokens"),
        ([{"weights": [1]}], r"data.stages.0.weights=\[1.0\] must have one weight for each of the 2 sources"),
        ([{"weights": [0, 0]}], "not all of them 0"),
    ],
)
def test_a_curriculum_that_makes_no_sense_is_refused(stages, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(sources=[{"path": "a"}, {"path": "b"}], stages=stages)
