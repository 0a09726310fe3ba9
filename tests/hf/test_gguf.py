"""GGUF files, written as llama.cpp's converter writes them, against the Hugging Face models that they come from."""

import json
import struct

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter

import jaxllm
from jaxllm import huggingface
from jaxllm.convert import main as convert
from jaxllm.core.tree import named_leaves
from jaxllm.data.tokenizers import tokenizer as tokenizers
from jaxllm.hf.checkpoint import Checkpoint, Writer
from jaxllm.hf.families import FAMILIES
from jaxllm.hf.weights import write_params
from jaxllm.inference.sampling import Sampler
from jaxllm.models.build import abstract_params, bind, graph
from jaxllm.models.config import ComputeConfig
from jaxllm.sample import main as sample
from jaxllm.sharding.mesh import MeshConfig, make_mesh

SIZES = {
    "vocab_size": 264, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "max_position_embeddings": 128, "head_dim": 16, "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
}  # fmt: skip
GEMMA = {**SIZES, "hidden_activation": "gelu_pytorch_tanh", "head_dim": 32, "query_pre_attn_scalar": 32}
LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
ODD = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0, "original_max_position_embeddings": 4096}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
# (architecture of the file, model_type of the original, its config.json)
MODELS = {
    "llama": ("llama", "llama", SIZES),
    "tied": ("llama", "llama", {**SIZES, "tie_word_embeddings": True, "num_key_value_heads": 4}),
    "wide heads": ("llama", "llama", {**SIZES, "head_dim": 32}),
    "biases": ("llama", "llama", {**SIZES, "attention_bias": True, "mlp_bias": True}),
    "attention biases": ("llama", "llama", {**SIZES, "attention_bias": True}),
    "llama3": ("llama", "llama", {**SIZES, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}),
    "linear": ("llama", "llama", {**SIZES, "rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    "yarn": ("llama", "llama", {**SIZES, "rope_scaling": {"rope_type": "yarn", **YARN}}),
    "mistral": ("llama", "mistral", {**SIZES, "sliding_window": 7}),
    "qwen2": ("qwen2", "qwen2", SIZES),
    "qwen3": ("qwen3", "qwen3", {**SIZES, "head_dim": 32}),
    "gemma": ("gemma", "gemma", {**GEMMA, "query_pre_attn_scalar": None, "rope_theta": 10_000.0}),
    "gemma2": ("gemma2", "gemma2", {**GEMMA, "sliding_window": 6, "attn_logit_softcapping": 3.0}),
    "gemma3": ("gemma3", "gemma3_text", {**GEMMA, "sliding_window": 6, "num_hidden_layers": 7, "rope_scaling": {
        "rope_type": "linear", "factor": 8.0}}),
}  # fmt: skip
LOGITS = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def original(directory, model_type, raw):
    """Write a Hugging Face directory of random weights, without a tokenizer; return (config, its parameters)."""
    family = FAMILIES[model_type]
    raw = {"model_type": model_type, **raw}
    config = family.parse(raw, model_type)
    rng = np.random.default_rng(0)
    random = lambda leaf: rng.normal(0.1, 0.2, leaf.shape).astype(np.float32)
    params = jax.tree.map(random, abstract_params(config))
    writer = Writer(directory)
    write_params(params, family.rows(config), config, writer)
    writer.close()
    (directory / "config.json").write_text(json.dumps(raw))
    return config, jax.tree.map(jnp.asarray, params)


def convert_as_llama_cpp(directory, path, architecture, kinds=(), change=None):
    """Write the directory as a GGUF file.

    Args:
      kinds: {tensor of the file: type}, float32 if absent; change: gets {key: (method of GGUFWriter, value)}.
    """
    raw = json.loads((directory / "config.json").read_text())
    writer = GGUFWriter(path, architecture)
    keys = metadata(raw, architecture) | vocabulary()
    if change:
        change(keys)
    for key, (method, value) in keys.items():
        getattr(writer, f"add_{method}")(key, value)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), raw["num_hidden_layers"])
    for theirs, tensor in Checkpoint(directory).items():
        name = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
        if architecture == "llama" and (".attn_q." in name or ".attn_k." in name):
            heads = raw["num_attention_heads" if ".attn_q." in name else "num_key_value_heads"]
            halves = tensor.reshape(heads, 2, len(tensor) // heads // 2, *tensor.shape[1:])
            tensor = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(tensor.shape)
        if architecture.startswith("gemma") and theirs.endswith("norm.weight"):
            tensor = tensor + np.float32(1)
        kind = GGMLQuantizationType[dict(kinds).get(name, "F32")]
        writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    scaling = raw.get("rope_scaling") or {}
    if scaling.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(raw, scaling))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def llama3_divisors(raw, scaling):
    """Return the divisor of each frequency, one by one. Source: the paper's code, as transformers has it."""
    divisors = []
    for i in range(0, raw["head_dim"], 2):
        wavelength = 2 * np.pi * raw["rope_theta"] ** (i / raw["head_dim"])
        turns = scaling["original_max_position_embeddings"] / wavelength
        low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
        smooth = (turns - low) / (high - low)
        middle = 1 / ((1 - smooth) / factor + smooth)
        divisors.append(1.0 if turns > high else factor if turns < low else middle)
    return np.array(divisors, np.float32)


def metadata(raw, architecture):
    """Return {key: (method, value)} as the converter writes them for this architecture."""
    found = {
        "context_length": raw["max_position_embeddings"], "embedding_length": raw["hidden_size"],
        "block_count": raw["num_hidden_layers"], "feed_forward_length": raw["intermediate_size"],
        "attention.head_count": raw["num_attention_heads"], "attention.head_count_kv": raw["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": raw["rms_norm_eps"], "attention.key_length": raw["head_dim"],
        "attention.value_length": raw["head_dim"], "rope.freq_base": raw["rope_theta"],
        "attention.sliding_window": raw.get("sliding_window"),
        "attn_logit_softcapping": raw.get("attn_logit_softcapping"),
    }  # fmt: skip
    if architecture == "llama":
        found |= {"vocab_size": raw["vocab_size"], "rope.dimension_count": raw["head_dim"]}
    scaling = raw.get("rope_scaling") or {}
    if scaling.get("rope_type") in ("linear", "yarn"):
        original_length = scaling.get("original_max_position_embeddings")
        found |= {"rope.scaling.type": scaling["rope_type"], "rope.scaling.factor": scaling["factor"],
                  "rope.scaling.original_context_length": original_length}  # fmt: skip
    methods = {int: "uint32", float: "float32", str: "string"}
    return {f"{architecture}.{key}": (methods[type(value)], value) for key, value in found.items() if value is not None}


def vocabulary():
    """Return the metadata of a byte-level BPE of 264 tokens."""
    characters = [chr(byte) for byte in (*range(33, 127), *range(161, 173), *range(174, 256))]
    alphabet = characters + [chr(256 + i) for i in range(256 - len(characters))]
    tokens = [*SPECIAL, *alphabet, "he", "ll", "llo", "hello", "<tool>"]
    return {
        "tokenizer.ggml.model": ("string", "gpt2"), "tokenizer.ggml.pre": ("string", "gpt-2"),
        "tokenizer.ggml.tokens": ("array", tokens),
        "tokenizer.ggml.token_type": ("array", [3] * 3 + [1] * 260 + [4]),
        "tokenizer.ggml.merges": ("array", ["h e", "l l", "ll o", "he llo"]),
        "tokenizer.ggml.eos_token_id": ("uint32", 2), "tokenizer.ggml.padding_token_id": ("uint32", 0),
        "tokenizer.chat_template": ("string", CHATML), "general.name": ("string", "tiny"),
    }  # fmt: skip


def logits_of(config):
    """Return a function from parameters to the logits of a fixed text."""
    graphdef, _ = graph(config, ComputeConfig(dtype="float32", layers="scan"))
    tokens = jnp.arange(3, 90)[None]
    return jax.jit(lambda params: bind(graphdef, params)(tokens, jnp.ones_like(tokens), jnp.arange(87)[None]))


@pytest.mark.parametrize("name", MODELS)
def test_a_file_is_the_model_that_it_was_made_from(name, tmp_path):
    architecture, model_type, raw = MODELS[name]
    config, params = original(tmp_path, model_type, raw)
    lm = huggingface.load(convert_as_llama_cpp(tmp_path, tmp_path / "model.gguf", architecture))
    assert lm.config == config
    found, expected = named_leaves(lm.params), named_leaves(params)
    assert set(found) == set(expected)
    exact = "gemma" not in architecture  # adding one and taking it away again rounds
    for leaf in expected:
        np.testing.assert_allclose(found[leaf], expected[leaf], rtol=0, atol=0 if exact else 1e-7)
    if name not in LOGITS:  # the same architecture and the same bits
        return
    forward = logits_of(config)
    np.testing.assert_allclose(forward(lm.params), forward(params), rtol=0, atol=0 if exact else 1e-4)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(a Hugging Face directory, the same model as a GGUF file, that file's writer)."""
    directory = tmp_path_factory.mktemp("tiny")
    original(directory, "llama", SIZES)
    return directory, convert_as_llama_cpp(directory, directory / "tiny.gguf", "llama")


def changed(tiny, tmp_path, change):
    return convert_as_llama_cpp(tiny[0], tmp_path / "changed.gguf", "llama", change=change)


def test_divisors_of_another_rule_are_kept_as_they_are(tmp_path):
    raw = {**SIZES, "rope_theta": 1000.0, "rope_scaling": {"rope_type": "llama3", **ODD}}
    config, params = original(tmp_path, "llama", raw)
    lm = huggingface.load(convert_as_llama_cpp(tmp_path, tmp_path / "model.gguf", "llama"))
    assert lm.config != config
    np.testing.assert_allclose(logits_of(lm.config)(lm.params), logits_of(config)(params), atol=1e-4)


def test_stored_precision_is_kept_or_converted_and_sharded(tiny, tmp_path):
    kinds = {"down": "F16", "gate": "BF16", "up": "Q8_0"}
    stored = {f"blk.{i}.ffn_{part}.weight": kind for part, kind in kinds.items() for i in range(3)}
    del stored["blk.0.ffn_up.weight"]  # the types of a parameter may differ from layer to layer
    path = convert_as_llama_cpp(tiny[0], tmp_path / "typed.gguf", "llama", stored)
    mesh = make_mesh(MeshConfig(data=1, tensor=2), jax.devices()[:2])
    lm, spread = huggingface.load(path), huggingface.load(path, mesh=mesh, dtype="bfloat16")
    assert lm.params["head"].dtype == np.float32
    for part, dtype in (("down", "float16"), ("gate", "bfloat16"), ("up", "float32")):
        kept, again = (model.params["blocks"]["ffn"][part]["kernel"] for model in (lm, spread))
        theirs, kind = Checkpoint(tiny[0])[f"model.layers.1.mlp.{part}_proj.weight"], GGMLQuantizationType[kinds[part]]
        values = gguf.quants.dequantize(gguf.quants.quantize(theirs, kind), kind).T
        assert not np.array_equal(values, theirs.T)
        assert (kept.dtype, again.dtype, len(again.sharding.device_set)) == (dtype, jnp.bfloat16, 2)
        np.testing.assert_array_equal(np.asarray(kept[1], np.float32), values)
        np.testing.assert_array_equal(again[1], values.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("devices", [1, 2])
def test_what_becomes_of_the_file_after_loading_does_not_matter(tiny, tmp_path, devices):
    path = changed(tiny, tmp_path, lambda keys: None)
    mesh = make_mesh(MeshConfig(data=1, tensor=2), jax.devices()[:2]) if devices == 2 else None
    params = named_leaves(huggingface.load(path, mesh=mesh).params)
    before = {name: np.array(leaf) for name, leaf in params.items()}
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))  # in place, so that a mapping sees it
    for name, leaf in params.items():
        assert before[name].any()
        np.testing.assert_array_equal(leaf, before[name], err_msg=name)


def test_commands_read_a_file(tiny, tmp_path, capsys):
    path = str(tiny[1])
    assert sample([path, "--prompt", "hello", "--temperature", "0", "--max-new-tokens", "5"]) is None
    lm = jaxllm.load(path)
    asked = [{"role": "user", "content": "hello"}]
    assert lm.is_chat
    assert lm.stop_ids == (2, 0)  # <|endoftext|> is no declared end, but means one
    assert lm.tokenizer.encode("hello <tool>") == [262, lm.tokenizer.encode(" ")[0], 263]
    answer = lm.chat(asked, max_new_tokens=5, sampler=Sampler(temperature=0))
    assert capsys.readouterr().out == answer.text + "\n"
    assert convert([path, str(tmp_path / "run")]) is None
    assert convert([str(tmp_path / "run"), str(tmp_path / "exported")]) is None
    assert "to the last bit" in capsys.readouterr().out
    theirs = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert (theirs["model_type"], theirs["rms_norm_eps"]) == ("llama", 1e-5)
    again = jaxllm.load(tmp_path / "exported")
    assert (again.encode(asked), again.is_chat) == (lm.encode(asked), True)
    assert tokenizers.load(path).fingerprint == tokenizers.load(tmp_path / "run").fingerprint


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        ({"llama.attention.scale": ("float32", 0.5), "llama.rope.scaling.type": ("string", "longrope"),
          "llama.expert_count": ("uint32", 8), "llama.feed_forward_length": ("array", [96, 64, 96]),
          "split.count": ("uint16", 2), "general.type": ("string", "mmproj")},
         [r"attention\.scale=0\.5: unknown, and it may change", r"scaling\.type='longrope': known are none, linear, y",
          r"expert_count=8: only 0 is computed", r"feed_forward_length=\[96, 64, 96\]: layers that differ",
          r"llama-gguf-split --merge", r"general\.type='mmproj'", r"from the metadata llama\.\* only if"]),
        ({"general.architecture": ("string", "mamba")}, [r"architecture='mamba' is not known; known are llama, qwen2"]),
        ({"llama.block_count": ("uint32", 4), "llama.vocab_size": ("uint32", 265)},
         [r"do not fit its metadata", r"blk\.3\.attn_q\.weight: missing", r"token_embd\.weight: shape \[264, 64\]"]),
        ({"llama.block_count": ("uint32", 2)}, [r"blk\.2\.ffn_up\.weight: not part of this model"]),
        ({"llama.context_length": None}, [r"the metadata llama\.\* has no context_length"]),
    ],
)  # fmt: skip
def test_what_cannot_be_exact_is_refused(tiny, tmp_path, change, messages):
    def apply(keys):
        keys |= change
        for key in [key for key, value in change.items() if value is None]:
            del keys[key]

    path = changed(tiny, tmp_path, apply)
    if "general.architecture" in change:
        path.write_bytes(path.read_bytes().replace(b"llama", b"mamba"))
    with pytest.raises(ValueError, match=messages[0]) as error:
        jaxllm.load(path)
    for message in messages[1:]:
        error.match(message)


def test_types_that_are_not_read_are_listed(tiny, tmp_path, capsys):
    path = convert_as_llama_cpp(tiny[0], tmp_path / "typed.gguf", "llama")
    content, mark = path.read_bytes(), b"blk.1.attn_v.weight" + struct.pack("<IQQI", 2, 64, 32, 0)
    assert content.count(mark) == 1
    path.write_bytes(content.replace(mark, mark[:-4] + struct.pack("<I", 22)))
    assert sample([str(path), "--prompt", "hello"]) == 2
    assert "1 tensors of type IQ2_S, as blk.1.attn_v.weight: read are F32, F16" in capsys.readouterr().err


def test_a_directory_of_files_is_no_model(tiny, tmp_path):
    changed(tiny, tmp_path, lambda keys: None)
    with pytest.raises(ValueError, match=r"no run directory.*of its GGUF files name one: changed\.gguf"):
        jaxllm.load(tmp_path)
