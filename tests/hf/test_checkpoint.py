import json

import numpy as np
import pytest

from jaxllm.hf.checkpoint import INDEX, SINGLE, Checkpoint, Writer
from jaxllm.hf.families import FAMILIES
from jaxllm.hf.table import Part, Row, finish, names, put, stored_shape, take
from jaxllm.hf.weights import match, read_params, write_params
from jaxllm.models.config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=40, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=4, d_ff=24, max_seq_len=32
)
LLAMA = FAMILIES["llama"]


@pytest.fixture
def directory(tmp_path, drawn):
    writer = Writer(tmp_path)
    write_params(drawn(CONFIG), LLAMA.rows(CONFIG), CONFIG, writer)
    writer.close()
    return tmp_path


def rewrite(directory, change):
    tensors = dict(Checkpoint(directory))
    change(tensors)
    writer = Writer(directory)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()


def test_everything_that_does_not_fit_is_listed_at_once(directory):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.7.extra"] = np.zeros(3)
        tensors["lm_head.weight"] = np.zeros((41, 16), np.float32)

    rewrite(directory, change)
    with pytest.raises(ValueError, match="do not fit") as error:
        match(Checkpoint(directory), LLAMA.rows(CONFIG), CONFIG)
    for line in (
        "model.norm.weight: missing",
        "model.layers.7.extra: not part of this model",
        "lm_head.weight: shape [41, 16], expected [40, 16]",
    ):
        assert line in str(error.value)


@pytest.mark.parametrize("both", [True, False])
def test_files_saved_without_the_head_and_old_leftovers_are_understood(directory, both):
    config = CONFIG.model_copy(update={"tie_embeddings": True})

    def change(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)
        tensors["lm_head.weight"] = tensors["embed_tokens.weight"] if both else tensors.pop("embed_tokens.weight")
        tensors["layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)

    expected = dict(Checkpoint(directory))
    rewrite(directory, change)
    found = LLAMA.open(Checkpoint(directory), config)
    del expected["lm_head.weight"]
    assert set(found) == set(expected)
    for name in set(found) - {"model.embed_tokens.weight"}:
        np.testing.assert_array_equal(found[name], expected[name])
    match(found, LLAMA.rows(config), config)


def test_a_tensor_under_two_names_is_refused(directory):
    rewrite(directory, lambda tensors: tensors.update({"norm.weight": tensors["model.norm.weight"]}))
    with pytest.raises(ValueError, match=r"has model\.norm\.weight twice: .*; remove one"):
        LLAMA.open(Checkpoint(directory), CONFIG)


def test_several_files_read_as_one(directory, tmp_path):
    whole = dict(Checkpoint(directory))
    writer = Writer(tmp_path / "parts", max_bytes=4000)
    (tmp_path / "parts").mkdir()
    for name, tensor in whole.items():
        writer.add(name, tensor)
    writer.close()
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    parts = Checkpoint(tmp_path / "parts")
    assert set(parts) == set(whole)
    for name in whole:
        np.testing.assert_array_equal(parts[name], whole[name])
    (tmp_path / "parts" / "model-00001-of-00009.safetensors").unlink(missing_ok=True)
    first = json.loads((tmp_path / "parts" / INDEX).read_text())["weight_map"]["model.embed_tokens.weight"]
    (tmp_path / "parts" / first).unlink()
    with pytest.raises(ValueError, match=f"names files that are not there: {first}"):
        Checkpoint(tmp_path / "parts")


def test_a_damaged_file_is_named(directory):
    path = directory / SINGLE
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        Checkpoint(directory)


def test_a_file_that_is_cut_after_it_was_opened_is_named(directory):
    checkpoint, path = Checkpoint(directory), directory / SINGLE
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"model\.safetensors ends early, before byte \d+; fetch it again"):
        read_params(checkpoint, LLAMA.rows(CONFIG), CONFIG)


def test_a_pickle_is_never_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(ValueError, match=r"only as pytorch_model\.bin, a pickle.*save_pretrained"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_stored_precision_is_kept_or_converted(directory, dtype):
    rewrite(directory, lambda tensors: tensors.update({k: v.astype(dtype) for k, v in tensors.items()}))
    checkpoint = Checkpoint(directory)
    params = read_params(checkpoint, LLAMA.rows(CONFIG), CONFIG)
    assert params["blocks"]["attention"]["q"]["kernel"].dtype == dtype
    assert read_params(checkpoint, LLAMA.rows(CONFIG), CONFIG, dtype="float32")["head"].dtype == np.float32


def test_an_unknown_key_and_a_wrong_value_are_errors_and_null_is_not():
    raw = {**LLAMA.write(CONFIG), "no_such_key": None}
    assert LLAMA.parse(raw, "config.json") == CONFIG
    with pytest.raises(ValueError, match="hidden_act='quick': known are silu") as error:
        LLAMA.parse({**raw, "residual_multiplier": 0.5, "hidden_act": "quick"}, "config.json")
    assert "residual_multiplier=0.5: unknown, and it may change the model" in str(error.value)


@pytest.mark.parametrize(
    ("row", "theirs", "ours"),
    [
        (Row("q", "w", "(heads head_dim) embed -> embed heads head_dim"), (8, 3), (3, 2, 4)),
        (Row("k", "w", "(heads head_dim) embed -> embed heads head_dim", Part(0, 1, (4, 8, 2))), (14, 3), (3, 2, 4)),
        (
            Row(
                "v", "w", "(heads head_dim) -> heads head_dim", Part(0, 2, (8, 8, 8)),
                "(heads three head_dim) -> (three heads head_dim)",
            ),
            (24,),
            (2, 4),
        ),
    ],
)  # fmt: skip
def test_a_row_read_backwards_is_its_inverse(row, theirs, ours):
    sizes = {"heads": 2, "head_dim": 4, "embed": 3, "three": 3, "layers": 1}
    tensor = np.random.default_rng(0).normal(size=theirs).astype(np.float32)
    parameter = take(row, tensor, sizes)
    assert parameter.shape == ours
    into = np.zeros(stored_shape(row, ours, sizes), np.float32)
    put(row, parameter, into, sizes)
    np.testing.assert_array_equal(take(row, finish(row, into, sizes), sizes), parameter)


def test_names_count_layers_and_experts():
    row = Row("w", "layer.{layer}.expert.{expert}.w", "a b -> b a")
    assert names(row, {"layers": 2, "experts": 2}) == [f"layer.{i}.expert.{j}.w" for i in (0, 1) for j in (0, 1)]


def test_a_parameter_that_a_table_forgets_is_named():
    config = CONFIG.model_copy(update={"norm_placement": "sandwich"})
    with pytest.raises(ValueError, match="no tensor for blocks/attention_out_norm/scale, blocks/ffn_out_"):
        LLAMA.rows(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": -1}, "num_hidden_layers=-1: must be more than 0"),
        ({"hidden_size": "64"}, "hidden_size='64': must be a number"),
        ({"num_attention_heads": None}, "config.json has no num_attention_heads; it is not complete"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0: must be greater than or equal to 1"),
        ({"num_key_value_heads": True}, "num_key_value_heads=True: must be a number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes': must be true or false"),
        ({"max_position_embeddings": 1.5}, "max_position_embeddings=1.5: must be a valid integer"),
        ({"rope_scaling": {"type": "linear", "factor": -2.0}, "rope_parameters": None}, "scaling.factor=-2.0: must be"),
        ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_parameters.rope_theta='1e4': must be a number"),
        ({"rope_parameters": [1]}, r"rope_parameters=[1]: must be keys and values"),
        ({"hidden_act": ["silu"]}, "hidden_act=['silu']: known are silu"),
        ({"num_key_value_heads": 3}, "n_heads=4 is not a multiple of n_kv_heads=3"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_the_rule_and_the_rest_of_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=r"^DIR cannot be read exactly:") as error:
        LLAMA.parse({**LLAMA.write(CONFIG), **change, "new_thing": 7}, "DIR")
    said = str(error.value)
    assert message in said
    assert "new_thing=7: unknown" in said
    assert "pydantic" not in said


# Every kind of wrong value, in every key; None is one that is left out.
WRONG = (None, "64", True, [], [1], [["x"]], {}, {"a": 1}, -1, 0, 1.5, float("inf"), float("nan"))
LISTS = ("layer_types", "no_rope_layers", "rope_parameters", "rope_scaling", "sliding_window_pattern")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_no_family_computes_with_what_is_missing_or_cannot_be(model_type):
    family = FAMILIES[model_type]
    needed = [key for key, (_, *absent) in family.words.keys.items() if not absent]
    raw = {key: 128 if "heads" in key else 1024 for key in needed}
    assert family.parse(raw, "DIR").n_layers > 0
    for key in (*family.words.keys, *LISTS, "no_rope_layer_interval", "query_pre_attn_scalar"):
        for value in WRONG:
            try:
                family.parse({**raw, "new_thing": 7, key: value}, "DIR")
            except ValueError as error:  # and nothing else
                said = str(error)
            assert "new_thing=7: unknown" in said
            if key in needed and value != 1.5:  # a key that another one replaces may be that
                assert (f"no {key};" if value is None else f"{key}={value!r}: must be") in said
    if needed:
        with pytest.raises(ValueError, match="cannot be read exactly") as error:
            family.parse({"hidden_size": "64"}, "DIR")
        for key in set(needed) - {"hidden_size"}:
            assert str(error.value).count(f"has no {key};") == 1
        assert str(error.value).count("hidden_size='64': must be a number") == 1


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("model_type", "rope", "message"),
    [
        ("phi3", LONGROPE, "config.json has no max_position_embeddings"),
        ("phi3", {**LONGROPE, "factor": [1]}, "rope_parameters.factor=[1]: must be a number"),
        ("llama", {"rope_type": "yarn", "factor": [1]}, "rope_parameters.factor=[1]: must be a number"),
        (
            "llama",
            {"rope_type": "yarn", "factor": 2.0, "mscale": "1", "mscale_all_dim": True},
            "mscale='1': must be a n",
        ),
        ("llama", {"rope_type": "yarn", "factor": None}, "rope_type='yarn' without factor"),
        (
            "gemma3_text",
            {"full_attention": {"rope_type": "yarn", "factor": {}}},
            "rope_parameters.factor={}: must be a",
        ),
    ],
)
def test_a_wrong_scaling_of_positions_is_named(model_type, rope, message):
    raw = LLAMA.write(CONFIG) | {"rope_parameters": rope, "rope_scaling": None, "mlp_bias": None}
    if "has no" in message:
        del raw["max_position_embeddings"]
    with pytest.raises(ValueError, match="cannot be read exactly") as error:
        FAMILIES[model_type].parse(raw, "DIR")
    assert message in str(error.value)
