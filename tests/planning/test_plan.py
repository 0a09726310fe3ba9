"""Plans of a tiny recipe: with the compiler of TPUs where it is installed (pip install 'jaxllm[plan]')."""

import importlib.util
import json
from concurrent.futures import Future
from types import SimpleNamespace

import jax
import pytest

from jaxllm import plan
from jaxllm.models import accounting
from jaxllm.models.config import ComputeConfig, ModelConfig
from jaxllm.planning import aot, candidates, memory, report, search, topology
from jaxllm.planning.aot import Compiled, Job
from jaxllm.sharding.config import MeshConfig, axis_sizes
from jaxllm.training.config import AdamW, StepConfig

MODEL = ModelConfig(vocab_size=512, d_model=128, n_layers=2, n_heads=4, d_ff=256, max_seq_len=128)
JOB = Job(MODEL, ComputeConfig(), AdamW(), StepConfig(), MeshConfig(data=1, fsdp=4), 64, 128)
NODE = topology.parse("h100:4")
RECIPE = """
out: run
model: {vocab_size: 512, d_model: 128, n_layers: 2, n_heads: 4, d_ff: 256, max_seq_len: 128}
data: {sources: [{path: nowhere}], packing: {seq_len: 128}, batch_size: 16}
compute: {remat: full}
mesh: {data: 1, fsdp: 4}
"""
needs_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra plan: libtpu")


def accept(job):
    """Refuse no layout."""


def refuse(job):
    """Refuse every layout."""
    raise ValueError(f"no rows for {job.mesh}")


def test_candidates_are_all_that_may_fit():
    found = candidates.candidates(JOB, NODE, jax.devices()[:4], accept)[0]
    for each in found:
        sizes = axis_sizes(each.job.mesh, 4)
        assert JOB.rows % (sizes["data"] * sizes["fsdp"] * each.job.step.accumulate) == 0
        assert MODEL.kv_heads % sizes["tensor"] == 0
    meshes = {tuple(axis_sizes(each.job.mesh, 4)[axis] for axis in ("data", "fsdp", "tensor")) for each in found}
    assert meshes == {(4, 1, 1), (2, 2, 1), (2, 1, 2), (1, 4, 1), (1, 2, 2), (1, 1, 4)}
    assert {each.job.compute.remat for each in found} == set(candidates.remats())
    assert [each.seconds for each in found] == sorted(each.seconds for each in found)
    small = NODE._replace(chip=NODE.chip.model_copy(update={"hbm_bytes": min(each.bytes for each in found)}))
    fewer = candidates.candidates(JOB, small, jax.devices()[:4], accept)[0]
    assert 0 < len(fewer) < len(found)
    assert max(each.bytes for each in fewer) <= candidates.SLACK * small.chip.hbm_bytes


def test_candidates_leave_out_what_slices_and_the_recipe_refuse():
    slices = NODE._replace(name="v5e", shape=(2, 2), slices=2)
    stages = JOB.mesh.model_copy(update={"stage": 2})

    def check(job):
        sizes = axis_sizes(job.mesh, 8)
        job.compute.pipeline.check(2, MODEL.n_layers, job.rows // job.step.accumulate, sizes["data"] * sizes["fsdp"])

    found, refused = candidates.candidates(JOB._replace(mesh=stages), slices, jax.devices(), check)
    assert {each.job.mesh.data % 2 for each in found} == {0}
    assert {each.job.mesh.stage for each in found} == {2}
    assert max(each.job.step.accumulate for each in found) == 64 // (2 * 8)  # data=2, and 8 microbatches of the stages
    assert any("2 slices, which do not divide mesh.data=1" in each for each in refused)
    assert any("rows are not divisible by 8 microbatches" in each for each in refused)


def test_rows_are_shared_where_nothing_else_fits():
    shared = lambda rows, place: {
        (each.job.mesh.context, each.job.compute.remat)
        for each in candidates.candidates(JOB._replace(rows=rows), place, jax.devices()[:4], accept)[0]
    }
    assert {context for context, _ in shared(64, NODE)} == {1}
    one = candidates.candidates(JOB._replace(rows=1), NODE, jax.devices()[:4], accept)[0]
    assert {(each.job.mesh.context, each.job.mesh.tensor) for each in one} == {(1, 4), (2, 2), (4, 1)}
    most = {each.job.compute.remat: each.bytes for each in one if each.job.mesh.context == 1}
    small = NODE._replace(chip=NODE.chip.model_copy(update={"hbm_bytes": most["none"] / candidates.SLACK - 1}))
    assert (1, "none") not in shared(1, small)
    assert (1, "full") in shared(1, small)


def test_what_is_moved_counts_for_the_order():
    parts = aot.abstract(JOB, jax.devices()[:4])
    speed = candidates._Speed(JOB, NODE, parts)
    seconds = lambda remat, accumulate: speed.seconds(
        JOB._replace(compute=ComputeConfig(remat=remat), step=StepConfig(accumulate=accumulate))
    )
    assert seconds("none", 1) < seconds("dots", 1) < seconds("full", 1) < seconds("full", 2)
    assert seconds("offload", 1) > seconds("dots", 1)  # a tiny model computes for less time than its products travel


def _candidate(remat, seconds, size, fsdp=4, accumulate=1):
    compute, mesh = ComputeConfig(remat=remat), MeshConfig(data=1, fsdp=fsdp)
    job = JOB._replace(compute=compute, mesh=mesh, step=StepConfig(accumulate=accumulate))
    return candidates.Candidate(job, size, seconds)


def test_plans_correct_what_is_expected_of_the_others():
    none, *dots = _candidate("none", 1.0, 90), _candidate("dots", 1.2, 50), _candidate("dots", 1.3, 60, 2)
    cut, full = _candidate("dots", 1.21, 40, accumulate=2), _candidate("full", 1.5, 10)
    order = search._Order([none, *dots, cut, full, _candidate("none", 1.1, 95, 2)])
    took = lambda seconds: SimpleNamespace(fits=True, time=SimpleNamespace(step=seconds))
    assert order.take() == none
    assert order.take() == dots[0]  # at the same time: of a policy without a plan only one
    order.learn(none, SimpleNamespace(fits=False))  # nor does what needs 95
    order.learn(dots[0], took(2.4))  # twice what was expected, so that full is the more promising
    assert order.take() == full
    order.learn(full, took(1.6))
    assert [order.take() for _ in range(2)] == [dots[1], cut]  # each mesh once, before smaller microbatches
    assert not order.left


class _Pool:
    """Runs what it is given at once."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        future = Future()
        try:
            future.set_result(function(*arguments))
        except RuntimeError as error:
            future.set_exception(error)
        return future


def test_a_layout_that_fails_leaves_the_other_plans(monkeypatch):
    said, plan = [], SimpleNamespace(fits=True, time=None, needed=1.0, cached=False)

    def compiled(job, _):
        if job.compute.remat == "full":
            raise RuntimeError("the compiler gave up")
        return plan

    monkeypatch.setattr(search, "make_plan", compiled)
    monkeypatch.setattr(search, "ProcessPoolExecutor", _Pool)
    monkeypatch.setattr(topology, "devices", lambda _: jax.devices()[:4])
    found = search.search(JOB, NODE, accept, 12, 1, said.append)
    assert found
    assert "full" not in {job.compute.remat for job, _ in found}
    assert any("compute.remat=full" in each and "failed, RuntimeError: the compiler gave up" in each for each in said)
    assert said[1].startswith("1 of 12, after 0 s: ")
    assert found[0][0].compute.remat == "none"  # no times: by the shapes, the fastest first
    assert said[-1].startswith("ranked by what the shapes let expect")
    own = JOB._replace(mesh=MeshConfig(data=1, fsdp=2, tensor=-1), step=StepConfig(accumulate=4))
    search.search(own, NODE, accept, 1, 1, said.append)  # the recipe's own comes first
    assert "s: mesh.tensor=2: fits" in said[-2]  # which was -1
    with pytest.raises(ValueError, match=r"layouts are refused, the last because no rows .*; others take more memory"):
        search.search(JOB, NODE, refuse, 12, 1, said.append)


def test_ctrl_c_leaves_what_is_compiled(monkeypatch):
    said, plans = [], [SimpleNamespace(fits=True, time=None, needed=1.0, cached=True)]

    def compiled(*_):
        if not plans:
            raise KeyboardInterrupt
        return plans.pop()

    monkeypatch.setattr(search, "make_plan", compiled)
    monkeypatch.setattr(search, "ProcessPoolExecutor", _Pool)
    monkeypatch.setattr(topology, "devices", lambda _: jax.devices()[:4])
    assert len(search.search(JOB, NODE, accept, 12, 1, said.append)) == 1
    assert said[1].endswith("fits, 1.0 GiB, compiled earlier")
    assert said[2].startswith("interrupted; what is compiled is kept")


def test_a_state_that_is_larger_than_the_memory_is_not_compiled(monkeypatch):
    monkeypatch.setattr(topology, "devices", lambda place: jax.devices()[:4])
    monkeypatch.setattr(search, "compile_step", lambda *_: pytest.fail("compiled"))
    size = 4 * accounting.param_count(MODEL)  # of parameters, and twice as much of AdamW
    small = NODE._replace(chip=NODE.chip.model_copy(update={"hbm_bytes": 0.51 * size}))
    found = search.make_plan(JOB, small)
    assert not found.fits
    assert "nothing was compiled for this" in report.sentences(found)
    assert search.nearest(JOB, found, small, accept) == []
    assert "take 8 chips of h100 at least, h100:8" in search.least(JOB, small)  # gradients too: four times the size


def test_decoding_wants_rows_and_tokens(tmp_path, capsys):
    assert plan.main([str(tmp_path / "recipe.yaml"), "--topology", "v5e:2x2", "--decode", "8"]) == 2
    assert "'8': write ROWSxTOKENS, rows at one time and tokens of each, as 8x4096" in capsys.readouterr().err


def test_memory_by_category_is_that_of_the_shapes():
    parts = aot.abstract(JOB._replace(mesh=MeshConfig(data=2, fsdp=4)), jax.devices())
    sizes = memory.expected(JOB, parts, "gpu")
    whole = sum(leaf.size * 4 for leaf in jax.tree.leaves(parts.state.params))
    assert whole / 4 <= sizes["parameters"] < whole / 3.9  # norms are not split
    assert sizes["optimizer"] < 2 * sizes["parameters"] / 1.9  # over the replicas as well
    assert sizes["batch"] == 5 * 4 * 64 * 128 / 8
    assert sum(memory.by_category(sizes, 1e9).values()) == pytest.approx(1e9)
    cut = memory.expected(JOB._replace(step=StepConfig(accumulate=4)), parts, "gpu")
    assert cut["gradients"] == 2 * sizes["gradients"]  # the sum, and those of a microbatch


def test_memory_of_rows_that_devices_share_an_average_and_an_optimizer_that_is_away():
    of = lambda job, kind="gpu": memory.expected(job, aot.abstract(job, jax.devices()[:4]), kind)
    whole = of(JOB._replace(mesh=MeshConfig(data=2, tensor=2)))
    shared = of(JOB._replace(mesh=MeshConfig(data=2, context=2), step=StepConfig(ema_decay=0.9)))
    for name in ("activations", "logits"):
        assert shared[name] == whole[name]  # two devices for a row, either way
    parameters = 4 * accounting.param_count(MODEL)
    assert shared["parameters"] == shared["moving average"] == parameters  # every device has them
    assert shared["optimizer"] == pytest.approx(2 * parameters / 2, rel=0.1)  # the replicas share it, and no others
    away = JOB._replace(mesh=MeshConfig(data=2, context=2), step=StepConfig(offload=True))
    parts = aot.abstract(away, jax.devices()[:4])
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(parts.state.opt_state) if leaf.ndim} == {
        "pinned_host"
    }
    assert of(away)["optimizer"] < 100  # counters
    assert of(away, "cpu")["optimizer"] == shared["optimizer"]


SHORT = "The total memory required for HLO temporaries (47.70G) exceeds available HBM (15.75G)."
LONG = """Ran out of memory in memory space hbm. Used 20.11G of 15.75G hbm. Exceeded hbm capacity by 4.36G.
  Largest program allocations in hbm:
  1. Size: 4.00G
     Operator: op_name="jit(train_step)/loss" source_file="a.py"
     Shape: f32[32768,32000]{1,0:T(8,128)}
"""


@pytest.mark.parametrize(
    ("problem", "needed", "available", "buffers"), [(SHORT, 47.7, 15.75, 0), (LONG, 20.11, 15.75, 1)]
)
def test_what_the_compiler_says_about_memory(problem, needed, available, buffers):
    found = aot.shortage(problem)
    assert (found.needed / 2**30, found.available / 2**30) == pytest.approx((needed, available))
    assert len(found.buffers) == buffers
    if buffers:
        assert found.buffers[0] == (4 * 2**30, "f32[32768,32000]{1,0:T(8,128)} jit(train_step)/loss")


def test_what_is_too_large_is_said():
    parts = aot.abstract(JOB, jax.devices()[:4])
    found = report.plan_of(JOB, NODE, parts, Compiled("", {}, 1.0, problem=SHORT))
    first, second, *_ = report.sentences(found)
    assert first == "it does not fit: 47.70 GiB by the compiler's figure, of 15.75 GiB"
    assert "most of them for activations" in second
    assert "compute.remat and a larger step.accumulate make less" in second
    assert "1 chip at a time work on 16 rows of 128 tokens, remat=none" in second


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_the_compiler_it_says_what_to_install(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    assert plan.main([str(tmp_path / "recipe.yaml"), "--topology", "v5e:2x2"]) == 2
    assert "a plan for v5e:2x2 needs libtpu; run: pip install 'jaxllm[plan]'" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--search"], ["--decode", "8x64"]])
def test_encoders_are_refused(flags, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("model: {", "model: {latent: {size: 8}, "))
    assert plan.main([str(tmp_path / "recipe.yaml"), "--topology", "v5e:2x2", *flags]) == 2
    assert "plans are for decoder-only models; this one has an encoder" in capsys.readouterr().err


def test_arrays_that_share_room_count_once():
    sizes = {"arguments": 3, "outputs": 3, "aliased": 3, "temporary": 20, "code": 1}
    assert Compiled("", sizes, 0.0).total == 24
    assert Compiled("", {**sizes, "peak": 12}, 0.0).total == 13
    assert Compiled("", {**sizes, "peak": 30}, 0.0).total == 24
    parts, place = aot.abstract(JOB, jax.devices()[:4]), NODE._replace(chip=topology.chips()["v5e"])
    accepted = report.plan_of(JOB, place, parts, Compiled("", dict.fromkeys(sizes, 2**36), 1.0))
    assert accepted.fits
    assert "the compiler, which refuses what is too large, accepts it" in report.sentences(accepted)[1]


@needs_compiler
def test_a_plan_for_tpus(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(aot, "CACHE", tmp_path / "cache")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    command = [str(tmp_path / "recipe.yaml"), "--topology", "v5e:2x2", "--out", str(tmp_path / "plan")]
    for cached in (False, True):
        assert plan.main(command) == 0
        [found] = json.loads((tmp_path / "plan/plan.json").read_text())
        assert found["cached"] == cached
    assert "it fits" in capsys.readouterr().out
    assert sum(found["memory"].values()) == pytest.approx(found["needed"])
    assert 0 < found["time"]["mfu"] < 1
    assert found["time"]["basis"].startswith("model estimate")
    assert {each["kind"] for each in found["collectives"]} & {"all-gather", "all-reduce", "reduce-scatter"}
