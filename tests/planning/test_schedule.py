"""The replay of a small scheduled module, written out so that its time is known."""

import pytest

from jaxllm.planning import hlo, schedule, topology
from jaxllm.planning.network import HOP_S, Network, group_of

PLACES = [(0, (x, y, z)) for x in range(4) for y in range(4) for z in range(4)]
NETWORK = Network(topology.parse("v5p:4x4x4"), PLACES)
SLOW = Network(topology.parse("2*v5p:2x2x1"), [(s, (x, y, 0)) for s in (0, 1) for x in (0, 1) for y in (0, 1)])
CLOCK, HBM, LINK = 1.75e9, 2765e9, 90e9
# Ten times: a product of 1750 cycles beside a gather of 64 times 1 MB, then what is left of the gather.
LOOP = """HloModule step, is_scheduled=true

%condition (a: (s32[], f32[4])) -> pred[] {
  %limit = s32[] constant(20)
  %a = (s32[]{:T(128)}, f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%a), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%body (b: (s32[], f32[4])) -> (s32[], f32[4]) {
  %two = s32[] constant(2)
  %b = (s32[], f32[4]{0}) parameter(0)
  %j = s32[] get-tuple-element(%b), index=0
  %part = f32[250000]{0} get-tuple-element(%b), index=1
  %gather = (f32[250000]{0}, f32[16000000]{0}) all-gather-start(%part), replica_groups=[1,64]<=[64], dimensions={0}
  %product = f32[4]{0} fusion(%part), kind=kOutput, calls=%f, backend_config={"estimated_cycles":"1750000"}
  %whole = f32[16000000]{0} all-gather-done(%gather)
  %next = s32[] add(%j, %two)
  ROOT %r = (s32[], f32[4]{0}) tuple(%next, %product)
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %p = f32[250000]{0} parameter(0)
  %sum = f32[250000]{0} all-reduce(%p), replica_groups=mesh['x'=4,'y'=4,'z'=4] {'y'}, to_apply=%add
  %kernel = bf16[8,8]{1,0} custom-call(%p), custom_call_target="tpu_custom_call", metadata={op_name="k"
"over lines"
}, backend_config={"cost_estimate":{"flops":"459000000000"}}
  %splash_mha_fwd.1 = bf16[1,8,512,128]{3,2,1,0} custom-call(%p), custom_call_target="tpu_custom_call", \
operand_layout_constraints={bf16[1,8,512,128]{3,2,1,0}, bf16[1,8,512,128]{3,2,1,0}}
  %splash_mha_dkv.1 = bf16[2,512,128]{2,1,0} custom-call(%p), custom_call_target="tpu_custom_call", \
operand_layout_constraints={bf16[8,512,128]{2,1,0}, bf16[2,512,128]{2,1,0}}
  %t = (s32[], f32[4]{0}) tuple(%sum, %kernel)
  %loop = (s32[], f32[4]{0}) while(%t), condition=%condition, body=%body
  ROOT %out = f32[4]{0} get-tuple-element(%loop), index=1
}
"""


def test_the_time_of_a_schedule():
    found = schedule.estimate(LOOP, NETWORK)
    gather = 64e6 * 63 / 64 / (6 * LINK) + 6 * HOP_S  # three rings of four, two links each
    reduce = 2 * (1e6 * 3 / 4 / (2 * LINK) + 2 * HOP_S)
    product, add = 1e-3, 12 / HBM
    kernel = (459e9 + (4 + 8) * 8 * 512 * 128 * 256) / (0.5 * 459e12)
    assert found.seconds == pytest.approx(10 * (max(product, gather) + add) + reduce + kernel, rel=1e-6)
    assert found.kernels == pytest.approx(kernel)
    assert found.exposed == pytest.approx(reduce + 10 * max(0, gather - product), rel=1e-6)
    for collectives in (found.collectives, schedule.count(LOOP, 64)):
        kinds = {(each.kind, each.group): (each.count, each.bytes) for each in collectives}
        assert kinds == {("all-gather", 64): (10, 1e7), ("all-reduce", 4): (1, 1e6)}


# A program of one of two slices: a product of 7 ms while 50 MB are summed between them, a kernel for groups of rows.
SLICES = """HloModule step, is_scheduled=true, num_partitions=4

ENTRY %main (p: f32[12500000]) -> f32[12500000] {
  %p = f32[12500000]{0} parameter(0)
  %here = f32[12500000]{0} all-reduce(%p), replica_groups={}, to_apply=%add
  %after = token[] after-all()
  %send = (f32[12500000]{0}, u32[], token[]) send(%here, %after), \
frontend_attributes={_xla_host_transfer_rendezvous="sum_0",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (f32[12500000]{0}, u32[], token[]) recv(%after), frontend_attributes={_xla_host_transfer_rendezvous="sum_0"}
  %product = f32[4]{0} fusion(%p), kind=kOutput, calls=%f, backend_config={"estimated_cycles":"12250000"}
  %sent = token[] send-done(%send)
  %got = (f32[12500000]{0}, token[]) recv-done(%recv)
  %ragged-dot-none.1 = bf16[8,8]{1,0} custom-call(%p), custom_call_target="tpu_custom_call", \
backend_config={"flops":"459000000000"}
  ROOT %sum = f32[12500000]{0} get-tuple-element(%got), index=0
}
"""


def test_sums_between_slices_and_rows_that_a_balanced_router_sends():
    found = schedule.estimate(SLICES, SLOW, grouped=0.25)
    here = 2 * (50e6 * 3 / 4 / (2 * LINK) + 2 * HOP_S)  # among the four of a slice, on two lines
    between, kernel = 2 * 50e6 / 2 / 6.25e9, 459e9 / (0.5 * 459e12) / 4
    assert found.kernels == pytest.approx(kernel)
    assert found.seconds == pytest.approx(here + max(between, 7e-3) + kernel)
    assert {(each.kind, each.group): (each.bytes, each.exposed) for each in found.collectives} == {
        ("all-reduce", 4): (50e6, pytest.approx(here)),
        ("all-reduce between slices", 2): (50e6, pytest.approx(between - 7e-3)),
    }


CUTS = """HloModule step, is_scheduled=true

ENTRY %main (p: f32[8,250000]) -> f32[1,250000] {
  %p = f32[8,250000]{1,0} parameter(0)
  %far = f32[8,250000]{1,0:S(5)} custom-call(), custom_call_target="AllocateBuffer"
  %zero = s32[] constant(0)
  %part = ((f32[8,250000]{1,0}, s32[]), f32[1,250000]{1,0}, u32[]) dynamic-slice-start(%p, %zero)
  %here = f32[1,250000]{1,0} dynamic-slice-done(%part)
  %away = ((f32[8,250000]{1,0:S(5)}, f32[1,250000]{1,0}), f32[8,250000]{1,0:S(5)}, u32[]) \
dynamic-update-slice-start(%far, %here)
  ROOT %there = f32[8,250000]{1,0:S(5)} dynamic-update-slice-done(%away)
}
"""


def test_slices_move_alone_and_to_the_host_more_slowly():
    found = schedule.estimate(CUTS, NETWORK)
    assert found.waiting == pytest.approx(1e6 / HBM + 1e6 / 16e9)
    assert found.seconds == pytest.approx(found.waiting)


@pytest.mark.parametrize(
    ("groups", "first"),
    [("{{0,1},{2,3}}", [0, 1]), ("[2,2]<=[2,2]T(1,0)", [0, 2]), ("mesh['x'=2,'y'=2] {'x'}", [0, 2]),
     ("mesh['x'=2,'y'=2], device_ids=([2,2]T(1,0)) {'x'}", [0, 1]), ("mesh['x'=2,'y'=2] {'x','y'}", [0, 1, 2, 3])],
)  # fmt: skip
def test_groups_in_all_notations(groups, first):
    instruction = hlo.Instruction("a", False, "f32[2]", "all-gather", (), "", f", replica_groups={groups}")
    assert group_of(instruction, 4) == first


def test_slices_meet_over_the_slow_network():
    one, two = (SLOW.seconds("all-reduce", 8e6, 8e6, group) for group in ([0, 1, 2, 3], list(range(8))))
    assert two - one == pytest.approx(2 * 8e6 / 4 / 2 / 6.25e9)  # a quarter of it each, half of which is the other's


@pytest.mark.parametrize(
    ("text", "size"), [("v5p:4x4x4", 64), ("2*v5e:16x16", 512), ("v4:8x8x16", 1024), ("h100:8", 8), ("v6e:1x1", 1)]
)
def test_topologies(text, size):
    found = topology.parse(text)
    assert (found.size, str(found)) == (size, text)


@pytest.mark.parametrize(
    ("text", "said"),
    [("v5p", "write CHIP:SHAPE"), ("v9:2x2", "unknown chip 'v9'; there are v4, v5p"), ("v5e:3x3", "2x2, 2x4, 4x4"),
     ("v5p:8x4x4", "v5p has no shape 8x4x4"), ("2*h100:8", "a plan for GPUs is for one node")],
)  # fmt: skip
def test_what_no_pod_has(text, said):
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        topology.parse(text)
