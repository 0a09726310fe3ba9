from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxllm.sharding.config import MeshConfig, axis_sizes
from jaxllm.sharding.mesh import arrange, reader
from jaxllm.sharding.rules import partition_spec

MESH = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("batch", "length"), (8, 16), P(("data", "fsdp"), None)),
        (("batch", "length"), (6, 16), P("data", None)),  # 6 rows: fsdp does not divide what is left
        (("embed", "mlp"), (64, 256), P("fsdp", "tensor")),
        (("embed", "embed"), (64, 64), P("fsdp", None)),  # an axis is used once
        (("layers", "heads", "head_dim", "embed"), (3, 4, 16, 64), P(None, "tensor", None, "fsdp")),
        (("kv_heads",), (1,), P(None)),
        (("batch", "stream", None), (8, 16, 4), P(("data", "fsdp"), "tensor", None)),
        (("batch", "stream", None), (8, 1, 4), P(("data", "fsdp"), None, None)),  # a step of decoding
        ((None, "norm"), (4, 4), P(None, None)),
    ],
)
def test_literal_specs(axes, shape, expected):
    assert partition_spec(axes, shape, MESH) == expected


def test_experts_take_their_axis_and_leave_it_to_the_width_where_they_do_not_divide():
    mesh = {"data": 1, "fsdp": 2, "expert": 4, "tensor": 1}
    assert partition_spec(("experts", "embed", "mlp"), (8, 16, 32), mesh) == P("expert", "fsdp", None)
    assert partition_spec(("experts", "embed", "mlp"), (6, 16, 32), mesh) == P(None, ("fsdp", "expert"), None)
    assert partition_spec(("batch", "length"), (16, 8), mesh) == P(("fsdp", "expert"), None)


def test_stages_have_layers_of_their_own_and_share_the_rows_outside_of_them():
    mesh = {"stage": 2, "data": 2, "fsdp": 2}
    assert partition_spec(("layers", "embed", "mlp"), (4, 16, 32), mesh) == P("stage", "fsdp", None)
    assert partition_spec(("rows", "length"), (16, 8), mesh) == P(("stage", "data", "fsdp"), None)
    assert partition_spec(("batch", "length"), (16, 8), mesh) == P(("data", "fsdp"), None)


def test_axes_missing_from_the_mesh_are_not_used():
    assert partition_spec(("embed", "mlp"), (64, 256), {"data": 8}) == P(None, None)


def test_unknown_axis_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown logical axis 'embeds'; the rules have rows"):
        partition_spec(("embeds",), (4,), MESH)


def test_rank_mismatch():
    with pytest.raises(ValueError, match="name 1 dimensions"):
        partition_spec(("embed",), (4, 4), MESH)


def test_free_axis_takes_what_is_left():
    sizes = {"stage": 1, "data": 4, "fsdp": 2, "expert": 1, "context": 1, "tensor": 1}
    assert axis_sizes(MeshConfig(fsdp=2), 8) == sizes


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=3), "does not use 8 devices exactly"),
        (MeshConfig(fsdp=3), "does not use 8 devices exactly"),
        (MeshConfig(data=-1, fsdp=-1), "at most one is -1"),
        (MeshConfig(tensor=0), "sizes are >= 1"),
    ],
)
def test_impossible_meshes(config, message):
    with pytest.raises(ValueError, match=message):
        axis_sizes(config, 8)


def hosts(*counts):
    """GPUs of hosts, of which one after the other has its devices named by turns."""
    slices = [number for number, count in enumerate(counts) for _ in range(count)]
    make = lambda i, s: SimpleNamespace(platform="gpu", device_kind="H100", slice_index=s, process_index=s, id=i)
    return [make(i, s) for i, s in enumerate(slices)][::-1]


def chips(x, y, z, slices=1):
    """TPUs of slices [x, y, z], whose hosts have 2 x 2 x 1 of them each."""
    return [
        SimpleNamespace(
            platform="tpu", device_kind="TPU v5", slice_index=s, core_on_chip=0, coords=(i, j, k),
            process_index=(((s * z) + k) * y // 2 + j // 2) * (x // 2) + i // 2,
        )
        for s, k, j, i in np.ndindex(slices, z, y, x)
    ]  # fmt: skip


@pytest.mark.parametrize("across", ["stage", "data", "fsdp"])
def test_one_axis_goes_over_the_slices_and_all_others_stay_within(across):
    config = MeshConfig(stage=2, data=2, fsdp=4, tensor=2, across=across)
    found = np.vectorize(lambda device: device.slice_index)(arrange(config, hosts(16, 16)))
    axis = ["stage", "data", "fsdp"].index(across)
    first, second = np.split(found, 2, axis=axis)
    assert found.shape == (2, 2, 4, 1, 1, 2)
    assert (first == 0).all()
    assert (second == 1).all()


@pytest.mark.parametrize(
    ("config", "devices"),
    [
        (MeshConfig(fsdp=-1, data=1, tensor=4), chips(4, 4, 4)),  # the network alone would lay rows over two hosts
        (MeshConfig(fsdp=-1, data=1, tensor=2, context=2), chips(4, 4, 4)),
        (MeshConfig(fsdp=6, data=-1, tensor=2), chips(2, 4, 6)),
        (MeshConfig(fsdp=-1, data=2, tensor=4), chips(4, 4, 4, slices=2)),
        (MeshConfig(fsdp=-1, data=1, tensor=4), hosts(8, 8)),  # GPUs: data does not go over the hosts, and need not
    ],
)
def test_a_row_lies_in_one_host(config, devices):
    found = arrange(config, devices)
    rows = found.reshape(-1, config.tensor * config.context)
    assert len({id(device) for device in found.flat}) == len(devices)
    assert all(len({device.process_index for device in row}) == 1 for row in rows)


def test_where_a_host_has_no_room_a_row_goes_over_several():
    assert arrange(MeshConfig(data=1, tensor=-1), chips(4, 4, 4)).shape == (1, 1, 1, 1, 1, 64)  # as decoding has it


@pytest.mark.parametrize(
    ("config", "devices", "message"),
    [
        (MeshConfig(data=1, fsdp=-1), chips(2, 2, 2, slices=2), "mesh.data=1; .* of 2, or set mesh.across to fsdp$"),
        (MeshConfig(data=1, tensor=-1), chips(2, 2, 2, slices=2), "not divide mesh.data=1; make it a multiple of 2$"),
        (MeshConfig(data=8), hosts(5, 3), r"differ in size: \{1: 3, 0: 5\} devices by slice"),
    ],
)
def test_slices_that_do_not_fit(config, devices, message):
    with pytest.raises(ValueError, match=message):
        arrange(config, devices)


def of_a_process(number, config, devices):
    """The parts that a process reads of a mesh of fake devices."""
    shape, devices = axis_sizes(config, len(devices)), arrange(config, devices)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "process_index", lambda: number)
        return reader.__wrapped__(SimpleNamespace(shape=shape, devices=devices))


@pytest.mark.parametrize(
    ("config", "per_process", "expected"),
    [
        (MeshConfig(data=4), 2, [(0, 1), (2, 3)]),
        (MeshConfig(tensor=2), 1, [(0,), (0,), (1,), (1,)]),
        (MeshConfig(data=1, tensor=4), 1, [(0,)] * 4),
        (MeshConfig(fsdp=2, context=2, tensor=2, data=1), 2, [(0,), (0,), (1,), (1,)]),
        (MeshConfig(tensor=2), 3, [(0, 1), (1, 2)]),
        (MeshConfig(context=3, tensor=2), 4, [(0,), (0, 1), (1,)]),
    ],
)
def test_each_process_reads_the_parts_that_its_devices_hold(config, per_process, expected):
    devices = [
        SimpleNamespace(platform="cpu", process_index=number // per_process)
        for number in range(len(expected) * per_process)
    ]
    parts = config.tensor * config.context
    for process, each in enumerate(expected):
        assert of_a_process(process, config, devices) == (each, len(devices) // parts)


def test_the_parts_of_a_process_of_a_torus_do_not_follow_one_another():
    found = [of_a_process(process, MeshConfig(data=1, fsdp=-1), chips(4, 4, 4)) for process in range(16)]
    assert found[0] == ((0, 4, 16, 20), 64)
    assert sorted(part for parts, _ in found for part in parts) == list(range(64))
