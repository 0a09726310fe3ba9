"""The kernels for long rows and for accelerators against the plain one, and which of them is taken when."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from jaxllm.layers import choice, context, cudnn, kernels, splash, stream
from jaxllm.layers.choice import Asked, choose
from jaxllm.layers.masks import CausalMask, FullMask, LayerWindow, Rule, segment_ids
from jaxllm.sharding.mesh import MeshConfig, make_mesh

LENGTH = 192


def arrays(batch=2, heads=4, groups=2, width=16):
    draw = np.random.default_rng(0).normal
    shapes = ((batch, LENGTH, n, width) for n in (heads, groups, groups))
    q, k, v = (jnp.asarray(draw(size=shape), jnp.float32) for shape in shapes)
    return q, k, v, jnp.array([-1.0, 0.0, 1.0, 2.0])


SEGMENTS = jnp.asarray(np.sort(np.random.default_rng(1).integers(0, 4, (2, LENGTH)), axis=-1))
ASKS = {
    "window, softcap, sinks": (CausalMask(SEGMENTS, window=50), 5.0, True),
    "causal": (CausalMask(), None, False),
    "both ways": (FullMask(SEGMENTS), None, False),
}
TPU = Asked("tpu", "bfloat16", 4096, 128, 128, segments=True)
GPU = TPU._replace(platform="gpu")


def results(function, with_sinks):
    """The output, and the gradient of a function of it."""
    q, k, v, sinks = arrays()
    inputs = (q, k, v, sinks) if with_sinks else (q, k, v, None)
    total = lambda *x: jnp.sum(jnp.sin(function(*x)))
    return jax.jit(lambda *x: (function(*x), jax.grad(total, range(3 + with_sinks))(*x)))(*inputs)


@functools.cache
def expected(name):
    mask, softcap, with_sinks = ASKS[name]
    return results(lambda q, k, v, s: kernels.attend(q, k, v, mask, kernels.Scores(0.25, softcap), s), with_sinks)


def check(found, name):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected(name)), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.parametrize("name", ASKS)
@pytest.mark.parametrize(
    "kernel", [functools.partial(splash.attend, interpret=True), stream.attend], ids=["splash", "stream"]
)
def test_kernels_for_long_rows_equal_the_plain_one_and_their_gradients_too(kernel, name, monkeypatch):
    monkeypatch.setattr(stream, "BLOCK", 64)
    mask, softcap, with_sinks = ASKS[name]
    rule = Rule(0.25, softcap, isinstance(mask, CausalMask), getattr(mask, "window", None))
    check(results(lambda q, k, v, sinks: kernel(q, k, v, segment_ids(mask), sinks, rule), with_sinks), name)


@pytest.mark.parametrize("name", ASKS)
@pytest.mark.parametrize(
    "mesh", [MeshConfig(data=2, context=2, tensor=2), MeshConfig(context=2, tensor=4), MeshConfig(context=3)]
)
def test_rows_that_devices_share_give_what_one_device_gives(mesh, name):
    mask, softcap, with_sinks = ASKS[name]
    with jax.set_mesh(make_mesh(mesh, jax.devices()[: 6 if mesh.context == 3 else 8])):
        attend = lambda q, k, v, s: kernels.attend(q, k, v, mask, kernels.Scores(0.25, softcap), s)
        check(results(attend, with_sinks), name)


def test_splash_of_a_share_is_its_part_of_the_whole():
    q, k, v, sinks = arrays(width=8, heads=2, groups=1)
    q, k, v = (jnp.tile(x, (1, 4, 1, 1))[:1, :512] for x in (q, k, v))
    rule, segments = Rule(0.3, window=300), jnp.asarray(np.repeat([[1, 2]], 256, axis=1))
    whole = splash.attend(q, k, v, (segments, segments), sinks[:2], rule, interpret=True)
    places = np.concatenate([np.arange(128, 256), np.arange(256, 384)])
    others = np.concatenate([np.arange(128), np.arange(384, 512)])
    share = context.Share(jnp.int32(1), np.stack([others, places]).astype(np.int32))
    mine = splash.attend(q[:, places], k, v, (segments[:, places], segments), sinks[:2], rule, share, interpret=True)
    np.testing.assert_allclose(mine, whole[:, places], atol=2e-6)


def test_devices_that_share_a_row_have_equal_work_and_get_their_queries_from_each_other():
    assert context.held_chunks(3).tolist() == [[0, 5], [4, 1], [2, 3]]
    for count in (2, 3, 8):
        places = [[4 * chunk for chunk in held] for held in context.held_chunks(count)]
        works = {len(stream.block_pairs(each, 2 * count, 4, Rule(1.0))) for each in places}
        assert works == {2 * count + 1}


def test_pairs_literal():
    pairs = stream.block_pairs([8, 0], 4, 4, Rule(1.0))
    assert pairs.tolist() == [[0, 0, 8], [0, 1, 8], [0, 2, 8], [1, 0, 0]]
    assert stream.block_pairs([8], 4, 4, Rule(1.0, window=5)).tolist() == [[0, 1, 8], [0, 2, 8]]
    assert len(stream.block_pairs([8], 4, 4, Rule(1.0, causal=False))) == 4


def test_blocks_are_judged_by_their_corners_as_by_what_is_in_them():
    for rule in (Rule(1.0), Rule(1.0, window=7), Rule(1.0, causal=False)):
        seen = splash.Visible(np.arange(32), 32, rule)
        whole = np.asarray(seen.mask_function(np.arange(32)[:, None], np.arange(32)[None, :]))
        for row, key in np.ndindex(4, 8):
            block = slice(8 * row, 8 * row + 8), slice(4 * key, 4 * key + 4)
            assert seen[block].tolist() == [[whole[block].any(), whole[block].all()]]


def test_a_window_of_some_layers_is_two_kernels_of_which_one_runs(monkeypatch):
    monkeypatch.setattr(kernels, "LONG", 100)
    monkeypatch.setattr(stream, "BLOCK", 64)
    q, k, v, _ = arrays()
    attend = jax.jit(lambda on: kernels.attend(q, k, v, CausalMask(window=LayerWindow(20, on))))
    for on, window in ((True, 20), (False, None)):
        np.testing.assert_allclose(attend(on), kernels.attend(q, k, v, CausalMask(window=window)), atol=2e-6)


def test_auto_takes_the_kernel_of_the_platform_and_says_so_once(monkeypatch, capfd):
    monkeypatch.setattr(choice, "_has_cudnn", lambda: True)
    choice._say.cache_clear()
    assert choose("auto", TPU) == choose("auto", TPU) == "splash"
    assert choose("auto", GPU) == "cudnn"
    assert choose("auto", GPU._replace(softcap=True)) == choose("auto", TPU._replace(platform="cpu")) == "xla"
    assert capfd.readouterr().err.splitlines() == [
        "attention on tpu: splash", "attention on gpu: cudnn",
        "attention on gpu: xla (cudnn: it does not do scores with a softcap)",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kernel", "asked", "why"),
    [
        ("splash", GPU, "it is for a tpu, and this is a gpu"),
        ("cudnn", TPU, "it is for a gpu, and this is a tpu"),
        ("splash", TPU._replace(bias=True), "a bias on scores"),
        ("splash", TPU._replace(parts=3), "chunks of 4096 / 6 tokens"),
        ("xla", TPU._replace(bias=True, parts=2), "a bias on scores, when devices share rows"),
        ("cudnn", GPU._replace(sinks=True), "sinks"),
        ("cudnn", GPU._replace(dtype="float32"), "float32"),
        ("cudnn", GPU._replace(width=100), "heads of 100"),
        ("cudnn", GPU._replace(value_width=64), "values of another width"),
        ("cudnn", GPU._replace(length=10_000), "several texts in rows of more than 8192"),
        ("cudnn", GPU._replace(parts=2), "rows that devices share"),
        ("cudnn", GPU, "without JAX's CUDA plugin"),
    ],
)
def test_a_named_kernel_that_cannot_run_says_why(kernel, asked, why):
    with pytest.raises(ValueError, match=f"compute.kernel={kernel} cannot compute this attention: .*{why}"):
        choose(kernel, asked)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_auto_drops_no_bias(platform):
    asked = TPU._replace(platform=platform, bias=True)
    assert choose("auto", asked) == "xla"
    with pytest.raises(ValueError, match=r"no kernel can compute .*xla: a bias on scores, when dev"):
        choose("auto", asked._replace(parts=2))


def test_attention_with_a_kernel_of_another_platform_is_refused_before_anything_is_compiled():
    q, k, v, _ = arrays()
    with pytest.raises(ValueError, match="it is for a tpu, and this is a cpu"):
        jax.eval_shape(lambda: kernels.attend(q, k, v, CausalMask(), kernels.Scores(0.25, kernel="splash")))


@pytest.mark.parametrize("rule", [Rule(0.25, window=64), Rule(0.25, causal=False)])
def test_cudnn_is_what_a_program_for_a_gpu_calls(rule, monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91_000)
    q, k, v = (x[:, 1:].astype(jnp.bfloat16) for x in arrays()[:3])
    total = lambda q, k, v: jnp.sum(cudnn.attend(q, k, v, (SEGMENTS[:, 1:],) * 2, rule).astype(jnp.float32))
    text = jax.jit(jax.grad(total)).trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaScaleBiasSoftmaxBackward" in text
    assert (r"sliding_window_length\22: 64" in text, r"mask_type\22: \22CAUSAL" in text) == (rule.causal,) * 2
    assert text.count("tensor<2x1x192x192x") > 0  # the mask, of even sides
