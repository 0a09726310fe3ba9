import pytest
from jax.sharding import PartitionSpec as P

from jaxllm.sharding.mesh import MeshConfig, axis_sizes
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


def test_axes_missing_from_the_mesh_are_not_used():
    assert partition_spec(("embed", "mlp"), (64, 256), {"data": 8}) == P(None, None)


def test_unknown_axis_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown logical axis 'embeds'; the rules have batch"):
        partition_spec(("embeds",), (4,), MESH)


def test_rank_mismatch():
    with pytest.raises(ValueError, match="name 1 dimensions"):
        partition_spec(("embed",), (4, 4), MESH)


def test_free_axis_takes_what_is_left():
    assert axis_sizes(MeshConfig(fsdp=2), 8) == {"data": 4, "fsdp": 2, "expert": 1, "context": 1, "tensor": 1}


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
