"""Costs of a compiled program: known answers, real text of three compilers, and XLA's own count where that is right."""

import gzip
import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from deco_jax.planning import cost
from deco_jax.planning.hlo import TextError


def program(entry, *computations):
    """HLO text of some computations and the lines of the entry."""
    return "\n".join(["HloModule test", *computations, "ENTRY %main (p: f32[1]) -> f32[1] {", *entry, "}"])


def computation(name, *lines):
    return "\n".join([f"%{name} (p: f32[1]) -> f32[1] {{", *lines, "}"])


def test_instructions_read_their_operands_and_write_their_results():
    found = cost.read(
        program(
            [
                "  %p = f32[100]{0} parameter(0)",
                "  %q = bf16[10,10]{1,0} parameter(1)",
                "  %b = f32[10,10]{1,0} bitcast(%p)",
                "  %c = f32[10,10]{1,0} convert(%q)",
                '  ROOT %s = f32[10,10]{1,0} add(%b, %c), metadata={op_name="jit(f)/add"}',
            ]
        )
    )
    assert found.hbm_bytes == (200 + 400) + (400 + 400 + 400)


def test_small_memories_on_the_chip_are_not_traffic():
    """S(1) is a TPU's VMEM: a copy to it reads device memory once, and what works on it there is free."""
    found = cost.read(
        program(
            [
                "  %p = f32[100]{0} parameter(0)",
                "  %start = (f32[100]{0:S(1)}, f32[100]{0}, u32[]{:S(2)}) copy-start(%p)",
                "  %done = f32[100]{0:S(1)} copy-done(%start)",
                "  ROOT %n = f32[100]{0:S(1)} negate(%done)",
            ]
        )
    )
    assert found.hbm_bytes == 400


ALL_REDUCE, OVER_8 = "f32[10]{0} all-reduce", "replica_groups=[1,8]<=[8], to_apply=%add"
SLICED = computation(
    "sliced",
    "  %stack = f32[28,50]{1,0} parameter(0)",
    "  %i = s32[] parameter(1)",
    "  %zero = s32[] constant(0)",
    "  %one = f32[1,50]{1,0} dynamic-slice(%stack, %i, %zero), dynamic_slice_sizes={1,50}",
    "  ROOT %out = f32[50]{0} bitcast(%one)",
)
UPDATED = computation(
    "updated",
    "  %stack = f32[28,50]{1,0} parameter(0)",
    "  %row = f32[50]{0} parameter(1)",
    "  %i = s32[] parameter(2)",
    "  %zero = s32[] constant(0)",
    "  %one = f32[1,50]{1,0} bitcast(%row)",
    "  ROOT %out = f32[28,50]{1,0} dynamic-update-slice(%stack, %one, %i, %zero)",
)
BODY = computation(
    "body",
    "  %t = (s32[], f32[28,50]{1,0}) parameter(0)",
    "  %i = s32[] get-tuple-element(%t), index=0",
    "  %stack = f32[28,50]{1,0} get-tuple-element(%t), index=1",
    "  %row = f32[50]{0} fusion(%stack, %i), kind=kLoop, calls=%sliced",
    "  %new = f32[28,50]{1,0} fusion(%stack, %row, %i), kind=kLoop, calls=%updated",
    "  %two = s32[] constant(2)",
    "  %next = s32[] add(%i, %two)",
    "  ROOT %out = (s32[], f32[28,50]{1,0}) tuple(%next, %new)",
)
CONDITION = computation(
    "condition",
    "  %t = (s32[], f32[28,50]{1,0}) parameter(0)",
    "  %i = s32[] get-tuple-element(%t), index=0",
    "  %n = s32[] constant(28)",
    "  ROOT %less = pred[] compare(%i, %n), direction=LT",
)
ENTRY = [
    "  %p = f32[28,50]{1,0} parameter(0)",
    "  %zero = s32[] constant(0)",
    "  %start = s32[]{:S(6)} copy(%zero)",
    "  %t = (s32[], f32[28,50]{1,0}) tuple(%start, %p)",
    "  ROOT %loop = (s32[], f32[28,50]{1,0}) while(%t), condition=%condition, body=%body",
]
A_TURN = 200 + 4 + 200 + 200 + 4 + 200 + (4 + 4 + 4)  # slice read, its index, row written; row, index, update; counter


def test_a_pallas_kernel_reads_its_operands_and_writes_its_results():
    """As libtpu writes one: what lies in VMEM is free, an operand that is also a result is read and written."""
    found = cost.read(
        program(
            [
                "  %p = bf16[32,48]{1,0:T(8,128)(2,1)S(1)} parameter(0)",
                "  %x = f32[256,3,4096]{2,1,0:T(4,128)} parameter(1)",
                "  %y = f32[16,128]{1,0:T(8,128)} parameter(2)",
                "  %k = (f32[256,4,4096]{2,1,0:T(4,128)}, f32[16,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)S(1)}) "
                'custom-call(%p, %x, /*index=2*/%y), custom_call_target="tpu_custom_call", '
                'output_to_operand_aliasing={{1}: (2, {})}, backend_config={"body": "TUxJUg(=="}',
                "  ROOT %r = f32[256,4,4096]{2,1,0:T(4,128)} get-tuple-element(%k), index=0",
            ]
        )
    )
    padded = 256 * 4 * 4096 * 4
    assert found.hbm_bytes == padded + 16 * 128 * 4 + padded + 16 * 128 * 4


def test_loops_count_as_often_as_they_turn_and_stacks_by_the_slice():
    found = cost.read(program(ENTRY, SLICED, UPDATED, BODY, CONDITION))
    compare = 4 + 4 + 1  # conditions are not counted: nothing of size happens there
    assert found.hbm_bytes == pytest.approx(4 + 14 * A_TURN, abs=14 * compare), "28 in steps of 2 is 14 turns"


def test_a_stack_is_read_by_the_slice_through_fusions_within_a_fusion():
    """So TPUs write it: a stack in other tiles (a copy that is never made), in a fusion within, sliced without."""
    retiled = computation(
        "retiled",
        "  %a = f32[28,50]{1,0} parameter(0)",
        "  ROOT %r = f32[28,50]{1,0} copy(%a)",
    )
    outer = computation(
        "outer",
        "  %stack = f32[28,50]{1,0} parameter(0)",
        "  %again = f32[28,50]{1,0} fusion(%stack), kind=kLoop, calls=%retiled",
        "  %i = s32[] parameter(1)",
        "  %row = f32[50]{0} fusion(%again, %i), kind=kLoop, calls=%sliced",
        "  ROOT %n = f32[50]{0} negate(%row)",
    )
    entry = [
        "  %p = f32[28,50]{1,0} parameter(0)",
        "  %i = s32[] parameter(1)",
        "  ROOT %f = f32[50]{0} fusion(%p, %i), kind=kLoop, calls=%outer",
    ]
    assert cost.read(program(entry, SLICED, retiled, outer)).hbm_bytes == 200 + 4 + 200
    whole = [*entry[:2], "  ROOT %f = f32[28,50]{1,0} fusion(%p), kind=kLoop, calls=%retiled"]
    assert cost.read(program(whole, retiled)).hbm_bytes == 2 * 28 * 200, "a copy that is made"


def test_xlas_word_for_the_number_of_turns_is_taken():
    known = [line.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"3"}}') for line in ENTRY]
    assert cost.read(program(known, SLICED, UPDATED, BODY, CONDITION)).hbm_bytes == pytest.approx(3 * A_TURN, abs=30)


def test_a_loops_counter_may_be_copied():
    """As libtpu does, to keep it in another memory."""
    moved = BODY.replace("  ROOT", "  %moved = s32[]{:S(6)} copy(%next)\n  ROOT").replace("tuple(%next", "tuple(%moved")
    assert cost.read(program(ENTRY, SLICED, UPDATED, moved, CONDITION)).hbm_bytes == pytest.approx(
        14 * A_TURN, rel=0.05
    )


def test_a_loop_of_unknown_length_is_an_error():
    unknown = CONDITION.replace("direction=LT", "direction=NE")
    with pytest.raises(TextError, match="number of turns of the loop loop"):
        cost.read(program(ENTRY, SLICED, UPDATED, BODY, unknown))


def test_what_is_called_twice_counts_twice():
    inner = computation(
        "inner", "  %a = f32[10]{0} parameter(0)", f"  ROOT %r = {ALL_REDUCE}(%a), channel_id=1, {OVER_8}"
    )
    entry = [
        "  %p = f32[10]{0} parameter(0)",
        "  %one = f32[10]{0} call(%p), to_apply=%inner",
        "  ROOT %two = f32[10]{0} call(%one), to_apply=%inner",
    ]
    (collective,) = cost.read(program(entry, inner)).collectives
    assert (collective.times, collective.bytes) == (2, 40)


def test_of_two_branches_the_costlier_counts():
    small = computation("small", "  ROOT %a = f32[10]{0} parameter(0)")
    large = computation("large", "  %a = f32[10]{0} parameter(0)", "  ROOT %n = f32[10]{0} negate(%a)")
    entry = [
        "  %p = pred[] parameter(0)",
        "  %q = f32[10]{0} parameter(1)",
        "  ROOT %c = f32[10]{0} conditional(%p, %q, %q), true_computation=%small, false_computation=%large",
    ]
    assert cost.read(program(entry, small, large)).hbm_bytes == 80


@pytest.mark.parametrize(
    "line, wire",
    [
        ("f32[80]{0} all-gather(%p), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}", 320 * 7 / 8),
        ("f32[10]{0} all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%add", 2 * 40 * 3 / 4),
        ("f32[5]{0} reduce-scatter(%p), replica_groups=mesh['a'=2,'b'=4] {'a'}, to_apply=%add", 40 / 2),
        ("f32[10]{0} all-to-all(%p), replica_groups=mesh['a'=2,'b'=4] {'a','b'}, dimensions={0}", 40 * 7 / 8),
        ("f32[10]{0} all-reduce(%p), replica_groups=mesh['a'=8] {'a':(1)4}, to_apply=%add", 2 * 40 * 3 / 4),
        (
            "f32[10]{0} all-reduce(%p), replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}",
            2 * 40 * 3 / 4,
        ),
        ("f32[10]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}", 40),
    ],
)
def test_what_a_collective_sends(line, wire):
    (collective,) = cost.read(program(["  %p = f32[10]{0} parameter(0)", f"  ROOT %c = {line}"])).collectives
    assert collective.wire_bytes == wire


@pytest.mark.parametrize(
    "groups",
    [
        "replica_groups=mesh['a'=2] {'a':(1)}",
        "replica_groups=mesh['a'=2], device_ids=({0,1}) {'a'}",
        "replica_groups=iota(8)",
        "replica_groups={}",
        "channel_id=1",
    ],
)
def test_groups_of_an_unknown_form_are_an_error_that_shows_them(groups):
    line = f"  ROOT %c = f32[10]{{0}} all-reduce(%p), {groups}, to_apply=%add"
    with pytest.raises(TextError) as error:
        cost.read(program(["  %p = f32[10]{0} parameter(0)", line]))
    assert groups in str(error.value)


def test_the_bytes_beside_a_shape_are_those_of_all_arrays_named():
    """A variadic sum was shown as its largest array's shape with the bytes of all of them."""
    line = "  ROOT %c = (f32[10]{0}, f32[30]{0}, token[]) all-reduce(%p, %q), replica_groups=[1,8]<=[8], to_apply=%add"
    entry = ["  %p = f32[10]{0} parameter(0)", "  %q = f32[30]{0} parameter(1)", line]
    (collective,) = cost.read(program(entry)).collectives
    assert (collective.shape, collective.bytes) == ("f32[30] and 1 more", 160)


def test_a_collective_in_two_halves_counts_once():
    (collective,) = cost.read(
        program(
            [
                "  %p = f32[10]{0} parameter(0)",
                "  %s = (f32[10]{0}, f32[80]{0}) all-gather-start(%p), replica_groups=[1,8]<=[8], dimensions={0}",
                "  ROOT %d = f32[80]{0} all-gather-done(%s)",
            ]
        )
    ).collectives
    assert (collective.kind, collective.bytes, collective.times) == ("all-gather", 320, 1)


def test_a_collective_spread_over_fusions_counts_once():
    """As libtpu writes one that runs beside other work: fusions here and in a loop name it, with one channel."""
    gather = "f32[80]{0} all-gather(%a), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}"
    argument = "  %a = f32[10]{0} parameter(0)"
    call = "f32[80]{0} custom-call(%a, %g), custom_call_target="
    parts = [
        computation("first", argument, f"  %g = {gather}", f'  ROOT %c = {call}"AsyncCollectiveStart"'),
        computation("middle", argument, f"  ROOT %g.1 = {gather}"),
        computation("last", argument, f"  %g = {gather}", f'  ROOT %c = {call}"AsyncCollectiveDone"'),
    ]
    inner = SLICED, UPDATED, CONDITION
    body = BODY.replace("  %two =", "  %m = f32[80]{0} fusion(%row), kind=kLoop, calls=%middle\n  %two =")
    entry = [
        *ENTRY[:-1],
        "  %loop = (s32[], f32[28,50]{1,0}) while(%t), condition=%condition, body=%body",
        "  %f = f32[80]{0} fusion(%p), kind=kCustom, calls=%first",
        "  ROOT %l = f32[80]{0} fusion(%p), kind=kCustom, calls=%last",
    ]
    found = cost.read(program(entry, *parts, *inner, body))
    assert [(c.bytes, c.times) for c in found.collectives] == [(320, 1)]


# Gradients of 4 layers, kernels (1024, 1024) bf16, 256 rows per device; see data/make.py. They are summed in bf16.
LAYERS, KERNEL, ROWS = 4, 2 * 1024**2, 2 * 256 * 1024


def real(name):
    """A program's text as its compiler wrote it."""
    path = pathlib.Path(__file__).parent / "data" / f"{name}.hlo.gz"
    return gzip.decompress(path.read_bytes()).decode()


def sums(found):
    """{(kind, group): (bytes, times)} of all collectives."""
    totals = {}
    for c in found.collectives:
        moved, times = totals.get((c.kind, c.group), (0, 0))
        totals[c.kind, c.group] = (moved + c.times * c.bytes, times + c.times)
    return totals


def test_groups_in_an_order_of_devices_are_read():
    """v5e:16x16, data 16 × fsdp 16: nearly all groups say `mesh[…], device_ids=(…) {…}`, which passed for pairs."""
    text = real("v5e_mixed")
    assert "device_ids=([16,16]T(1,0)) {'axis_" in text
    assert sums(cost.read(text)) == {
        ("all-gather", 16): (2 * LAYERS * KERNEL, 2 * LAYERS),  # forward and backward
        ("reduce-scatter", 16): (LAYERS * KERNEL, LAYERS),  # over fsdp; a sum of which each device keeps a part
        ("all-reduce", 16): (LAYERS * KERNEL / 16, LAYERS),  # over data, of the part that a device keeps
    }


def test_collectives_on_sparse_cores_are_followed():
    """tpu7x sums gradients in a computation that `call-start … async_execution_thread="sparsecore"` calls."""
    text = real("tpu7x_data")
    assert 'async_execution_thread="sparsecore"' in text
    assert sums(cost.read(text)) == {("all-reduce", 128): (LAYERS * KERNEL, LAYERS)}


def test_gradients_are_summed_in_every_step_of_an_accumulation():
    """v5e:4x4, two steps: every layer's sum counts once per layer and step."""
    assert sums(cost.read(real("v5e_accumulation"))) == {("all-reduce", 16): (2 * LAYERS * KERNEL, 2 * LAYERS)}


def test_what_slices_send_to_each_other_is_counted():
    """v5e:2x2 twice: sums within a slice, a quarter of each exchanged with the other slice, and gathered."""
    found = sums(cost.read(real("v5e_slices")))
    assert found["send", 2] == (LAYERS * KERNEL / 4, LAYERS)
    assert found["all-reduce", 4] == found["all-gather", 4] == (LAYERS * KERNEL, LAYERS)


def test_a_gpus_collectives_are_read():
    assert sums(cost.read(real("h100_data"))) == {("all-reduce", 8): (LAYERS * KERNEL, LAYERS)}
    assert sums(cost.read(real("h100_fsdp"))) == {
        ("all-gather", 8): (2 * LAYERS * KERNEL, 2 * LAYERS),
        ("reduce-scatter", 8): (LAYERS * KERNEL, LAYERS),
    }


@pytest.mark.parametrize(
    "name, most", [("h100_data", 4.5), ("tpu7x_data", 2.0), ("v5e_accumulation", 2.0), ("v5e_slices", 1.5)]
)
def test_traffic_is_that_of_the_products_and_not_of_workspaces_or_whole_stacks(name, most):
    """At least each kernel read twice and its gradient written; at most a few times what every layer's products move.

    More when a whole stack is counted for every layer's slice of it, or, on GPUs, where nothing stays on the chip
    between two kernels, cuBLAS's workspace of 32 MiB for every product.
    """
    products = LAYERS * 3 * (KERNEL + 2 * ROWS)
    assert LAYERS * 3 * KERNEL <= cost.read(real(name)).hbm_bytes <= most * products


@pytest.fixture(scope="module")
def layers():
    """Gradients of a stack of 8 layers over 8 devices, compiled as a loop and unrolled."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def shape(*dims, spec):
        return jax.ShapeDtypeStruct(dims, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    def compiled(unroll):
        def loss(kernels, x):
            x, _ = jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels, unroll=unroll)
            return (x**2).sum()

        arguments = shape(8, 256, 256, spec=(None, "x")), shape(512, 256, spec=("x",))
        return jax.jit(jax.grad(loss)).lower(*arguments).compile()

    return compiled(1), compiled(8)


def test_traffic_agrees_with_xla_where_xla_can_count(layers):
    _, unrolled = layers
    assert cost.read(unrolled.as_text()).hbm_bytes == pytest.approx(
        unrolled.cost_analysis()["bytes accessed"], rel=0.05
    )


def test_a_loop_costs_what_it_costs_unrolled(layers):
    """And the copies of slices out of stacks and into them. XLA's own count is off by the number of turns."""
    loop, unrolled = layers
    assert loop.cost_analysis()["bytes accessed"] < 0.5 * unrolled.cost_analysis()["bytes accessed"]
    ours, reference = cost.read(loop.as_text()), cost.read(unrolled.as_text())
    assert reference.hbm_bytes <= ours.hbm_bytes < 1.7 * reference.hbm_bytes


def test_gathers_of_a_sharded_stack_are_counted_in_full(layers):
    """Every layer's kernel is gathered for the forward pass, as a loop or not."""
    for compiled in layers:
        collectives = cost.read(compiled.as_text()).collectives
        gathered = sum(c.times * c.bytes for c in collectives if c.kind == "all-gather")
        assert gathered >= 8 * 256 * 256 * 4, [(c.kind, c.shape, c.times) for c in collectives]
        assert {c.group for c in collectives} == {8}
