import re
import time

import jax
import pytest

from jaxllm.sharding import distributed
from jaxllm.sharding.distributed import PlatformConfig, default_cpu_devices

TOGETHER = {"coordinator": "host:1234", "n_processes": 2, "process_index": 0, "distributed": True}


@pytest.mark.parametrize("missing", TOGETHER)
def test_what_names_the_processes_is_given_together(missing):
    assert PlatformConfig(**TOGETHER).process_index == 0
    given = {key: value for key, value in TOGETHER.items() if key != missing}
    with pytest.raises(ValueError, match="give the three together, with distributed=true") as error:
        PlatformConfig(**given)
    found = re.search(
        r"coordinator=(\S+), n_processes=(\S+), process_index=(\S+), distributed=(\S+):", str(error.value)
    )
    shown = [str(given.get(key)) for key in TOGETHER]
    assert list(found.groups()) == [*shown[:3], "false" if missing == "distributed" else "true"]


@pytest.mark.parametrize("alone", ["coordinator", "n_processes", "process_index"])
def test_none_of_them_is_given_alone(alone):
    with pytest.raises(ValueError, match="give the three together"):
        PlatformConfig(**{alone: TOGETHER[alone]})
    with pytest.raises(ValueError, match="give the three together"):
        PlatformConfig(distributed=True, **{alone: TOGETHER[alone]})


def test_processes_that_are_found_out_need_no_names():
    assert PlatformConfig(distributed=True).coordinator is None
    assert PlatformConfig().distributed is False


@pytest.mark.parametrize(("rows", "cores", "expected"), [(8, 2, 2), (6, 4, 3), (7, 4, 1), (64, 96, 8), (0, 4, 1)])
def test_virtual_devices_divide_the_rows(rows, cores, expected):
    assert default_cpu_devices(rows, cores) == expected


@pytest.mark.parametrize("keep", [True, False])
def test_freed_memory_is_kept_only_if_asked(keep, monkeypatch):
    called = []
    monkeypatch.setattr(distributed, "_keep_freed_memory", lambda: called.append(True))
    monkeypatch.setattr(distributed, "_set_cpu_devices", lambda *_: None)
    distributed.start(PlatformConfig(compile_cache=None, keep_memory=keep))
    assert bool(called) == keep


def test_devices_of_google_are_looked_for():
    assert distributed._google_devices() in (True, False)


@pytest.mark.parametrize(
    ("installed", "devices", "cpu"), [([], False, True), (["libtpu"], False, True), (["libtpu"], True, False),
     (["libtpu", "jax_cuda13_plugin"], False, False)],
)  # fmt: skip
def test_the_compiler_of_plans_is_no_tpu(monkeypatch, installed, devices, cpu):
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: name in installed or None)
    monkeypatch.setattr(distributed, "_google_devices", lambda: devices)
    monkeypatch.delenv("JAX_PLATFORMS")
    platforms = jax.config.jax_platforms
    try:
        jax.config.update("jax_platforms", None)
        assert distributed._cpu_only() == cpu
        assert jax.config.jax_platforms == ("cpu" if installed == ["libtpu"] and cpu else None)
    finally:
        jax.config.update("jax_platforms", platforms)


@pytest.mark.parametrize(("tasks", "nodes", "gpus"), [("4", "4", []), ("32", "4", None), (None, None, None)])
def test_a_process_that_is_alone_on_its_node_has_all_gpus_of_it(monkeypatch, tasks, nodes, gpus):
    for name, value in {"SLURM_NTASKS": tasks, "SLURM_STEP_NUM_NODES": nodes}.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    asked = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given, **_: asked.append(given[3]))
    monkeypatch.setattr(distributed, "_cpu_only", lambda: False)
    distributed.start(PlatformConfig(compile_cache=None, distributed=True))
    assert asked == [gpus]


def test_who_waits_and_who_is_alone_says_so(monkeypatch, capsys):
    def initialize(*given, **_):
        time.sleep(0.2)
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(distributed, "WAIT_S", 0.0)
    with pytest.raises(ValueError, match=r"no TPU pod, Slurm or GKE was found .*set platform.coordinator=HOST"):
        distributed.start(PlatformConfig(compile_cache=None, distributed=True))
    assert capsys.readouterr().err == "waiting for the other processes\n"
