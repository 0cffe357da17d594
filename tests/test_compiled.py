"""Facts of compiled programs, read from texts written by hand."""
# ruff: noqa: E501 (an instruction of XLA's is one line)

import types

import pytest

from benchmarks import compiled, hlo

HEAD = "HloModule jit_step, is_scheduled=true\n\n"

# A step on GPU: two products, and a sync of one kernel in a conditional that hands feedback on.
CONDITIONAL = (
    HEAD
    + """
%wrapped_sign (param_0.1: f32[8,6]) -> f32[8,6] {
  %param_0.1 = f32[8,6]{1,0} parameter(0)
  ROOT %sign.1 = f32[8,6]{1,0} sign(%param_0.1), metadata={op_name="jit(step)/jit(_sync)/sign"}
}

%synced (arg.1: (f32[8,6], f32[8,6])) -> (f32[8,6]) {
  %arg.1 = (f32[8,6]{1,0}, f32[8,6]{1,0}) parameter(0)
  %w.1 = f32[8,6]{1,0} get-tuple-element(%arg.1), index=1
  %new = f32[8,6]{1,0} fusion(%w.1), kind=kLoop, calls=%wrapped_sign
  ROOT %tuple.1 = (f32[8,6]{1,0}) tuple(%new)
}

%left (arg.2: (f32[8,6])) -> (f32[8,6]) {
  %arg.2 = (f32[8,6]{1,0}) parameter(0)
  %b.2 = f32[8,6]{1,0} get-tuple-element(%arg.2), index=0
  %copy.2 = f32[8,6]{1,0} copy(%b.2)
  ROOT %tuple.2 = (f32[8,6]{1,0}) tuple(%copy.2)
}

%gemm (parameter_0: f32[4,8], parameter_1: f32[8,6]) -> f32[4,6] {
  %parameter_0 = f32[4,8]{1,0} parameter(0)
  %parameter_1 = f32[8,6]{1,0} parameter(1)
  ROOT %dot.1 = f32[4,6]{1,0} dot(%parameter_0, %parameter_1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%cast (param_0.3: f32[8,6]) -> bf16[8,6] {
  %param_0.3 = f32[8,6]{1,0} parameter(0)
  ROOT %convert.1 = bf16[8,6]{1,0} convert(%param_0.3)
}

ENTRY %main (w: f32[8,6], b: f32[8,6], x: f32[4,8], turn: pred[]) -> (f32[4,6], f32[4,8], f32[8,6]) {
  %w = f32[8,6]{1,0} parameter(0)
  %b = f32[8,6]{1,0} parameter(1)
  %x = f32[4,8]{1,0} parameter(2)
  %turn = pred[] parameter(3)
  %both = (f32[8,6]{1,0}, f32[8,6]{1,0}) tuple(%b, %w)
  %one = (f32[8,6]{1,0}) tuple(%b)
  %cond = (f32[8,6]{1,0}) conditional(%turn, %both, %one), true_computation=%synced, false_computation=%left, metadata={op_name="jit(step)/jit(_sync)/cond"}
  %new_b = f32[8,6]{1,0} get-tuple-element(%cond), index=0
  %y = f32[4,6]{1,0} fusion(%x, %w), kind=kCustom, calls=%gemm
  %half = bf16[8,6]{1,0} fusion(%new_b), kind=kLoop, calls=%cast
  %x_bar = f32[4,8]{1,0} custom-call(%y, %half), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"]}}}
  %copy.9 = f32[8,6]{1,0} copy(%new_b)
  ROOT %out = (f32[4,6]{1,0}, f32[4,8]{1,0}, f32[8,6]{1,0}) tuple(%y, %x_bar, %copy.9)
}
"""
)

# On TPU: prefetches, a scan of three rounds, a sync as a loop, and collectives.
LOOPS = (
    HEAD
    + """
%add (p.0: f32[], p.1: f32[]) -> f32[] {
  %p.0 = f32[] parameter(0)
  %p.1 = f32[] parameter(1)
  ROOT %sum = f32[] add(%p.0, %p.1)
}

%piece (q.0: bf16[2,6]) -> bf16[8,6] {
  %q.0 = bf16[2,6]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[8,6]{1,0} all-gather(%q.0), channel_id=4, replica_groups=[1,4]<=[4], dimensions={0}, frontend_attributes={chain_id="0"}
}

%other_piece (r.0: bf16[2,6]) -> bf16[8,6] {
  %r.0 = bf16[2,6]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[8,6]{1,0} all-gather(%r.0), channel_id=4, replica_groups=[1,4]<=[4], dimensions={0}, frontend_attributes={chain_id="0"}
}

%body (s.0: (s32[], f32[4,6], f32[30,6])) -> (s32[], f32[4,6], f32[30,6]) {
  %s.0 = (s32[], f32[4,6]{1,0}, f32[30,6]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s.0), index=0
  %h = f32[4,6]{1,0} get-tuple-element(%s.0), index=1
  %data = f32[30,6]{1,0} get-tuple-element(%s.0), index=2
  %one.0 = s32[] constant(1)
  %next = s32[] add(%i, %one.0)
  %zero.0 = s32[] constant(0)
  %row = f32[1,6]{1,0} dynamic-slice(%data, %i, %zero.0), dynamic_slice_sizes={1,6}
  %new = f32[4,6]{1,0} add(%h, %h)
  ROOT %t.0 = (s32[], f32[4,6]{1,0}, f32[30,6]{1,0}) tuple(%next, %new, %data)
}

%until (s.1: (s32[], f32[4,6], f32[30,6])) -> pred[] {
  %s.1 = (s32[], f32[4,6]{1,0}, f32[30,6]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %three = s32[] constant(3)
  ROOT %lt = pred[] compare(%i.1, %three), direction=LT
}

%sync_body (s.2: (s32[], f32[8,6])) -> (s32[], f32[8,6]) {
  %s.2 = (s32[], f32[8,6]{1,0}) parameter(0)
  %left = s32[] get-tuple-element(%s.2), index=0
  %one.2 = s32[] constant(1)
  %less = s32[] subtract(%left, %one.2)
  %b.2 = f32[8,6]{1,0} get-tuple-element(%s.2), index=1
  %summed = f32[8,6]{1,0} all-reduce(%b.2), replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %t.2 = (s32[], f32[8,6]{1,0}) tuple(%less, %summed)
}

%sync_until (s.3: (s32[], f32[8,6])) -> pred[] {
  %s.3 = (s32[], f32[8,6]{1,0}) parameter(0)
  %left.3 = s32[] get-tuple-element(%s.3), index=0
  %zero.3 = s32[] constant(0)
  ROOT %gt = pred[] compare(%left.3, %zero.3), direction=GT
}

ENTRY %main (b: f32[8,6], h: f32[4,6], data: f32[30,6], turns: s32[], shard: bf16[2,6]) -> (f32[8,6], f32[8,6], f32[4,6]) {
  %b = f32[8,6]{1,0} parameter(0)
  %h.4 = f32[4,6]{1,0} parameter(1)
  %data.4 = f32[30,6]{1,0} parameter(2)
  %turns = s32[] parameter(3)
  %shard = bf16[2,6]{1,0} parameter(4)
  %fetch = (f32[8,6]{1,0:S(1)}, f32[8,6]{1,0}, u32[]{:S(2)}) copy-start(%b)
  %fetched = f32[8,6]{1,0:S(1)} copy-done(%fetch)
  %changed = f32[8,6]{1,0:S(1)} multiply(%fetched, %fetched)
  %back = (f32[8,6]{1,0}, f32[8,6]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%changed)
  %squared = f32[8,6]{1,0} copy-done(%back)
  %unchanged = (f32[8,6]{1,0}, f32[8,6]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%fetched)
  %again = f32[8,6]{1,0} copy-done(%unchanged)
  %start = s32[] constant(0)
  %first = (s32[], f32[4,6]{1,0}, f32[30,6]{1,0}) tuple(%start, %h.4, %data.4)
  %scan = (s32[], f32[4,6]{1,0}, f32[30,6]{1,0}) while(%first), condition=%until, body=%body
  %last = f32[4,6]{1,0} get-tuple-element(%scan), index=1
  %carry = (s32[], f32[8,6]{1,0}) tuple(%turns, %squared)
  %sync = (s32[], f32[8,6]{1,0}) while(%carry), condition=%sync_until, body=%sync_body, metadata={op_name="jit(step)/jit(_sync)/while"}
  %new_b = f32[8,6]{1,0} get-tuple-element(%sync), index=1
  %part.1 = bf16[8,6]{1,0} fusion(%shard), kind=kCustom, calls=%piece
  %part.2 = bf16[8,6]{1,0} fusion(%shard), kind=kCustom, calls=%other_piece
  %own_loss = f32[] constant(0)
  %loss = f32[] all-reduce(%own_loss), replica_groups=mesh['x'=2,'y'=2] {'x','y'}, to_apply=%add
  ROOT %out = (f32[8,6]{1,0}, f32[8,6]{1,0}, f32[4,6]{1,0}) tuple(%new_b, %again, %last)
}
"""
)


def facts(text, cost=None):
    memory = types.SimpleNamespace(
        argument_size_in_bytes=100,
        output_size_in_bytes=70,
        alias_size_in_bytes=60,
        temp_size_in_bytes=20,
    )
    program = types.SimpleNamespace(
        as_text=lambda: text, memory_analysis=lambda: memory, cost_analysis=lambda: cost
    )
    return compiled.facts(program, kernels=[(8, 6)])


def test_instructions_are_read_with_types_operands_and_computations():
    entry = hlo.parse(CONDITIONAL)
    assert list(entry.program) == ["wrapped_sign", "synced", "left", "gemm", "cast", "main"]
    cond = entry.instructions["cond"]
    assert cond.opcode == "conditional"
    assert [one.name for one in cond.operands] == ["turn", "both", "one"]
    assert cond.op_name == "jit(step)/jit(_sync)/cond"
    assert [one.name for one in cond.called("true_computation")] == ["synced"]
    assert [one.name for one in entry.results] == ["y", "x_bar", "copy.9"]
    assert [one.name for one in entry.parameters] == ["w", "b", "x", "turn"]
    assert [one.name for one in entry.instructions["y"].users] == ["x_bar", "out"]


def test_types_say_their_bytes_and_memory():
    plain, inner, half, flag = hlo.arrays(
        "(f32[2,3]{1,0}, (bf16[8]{0:T(8,128)(2,1)S(1)}, /*index=2*/s4[3]), pred[])"
    )
    assert [array.nbytes for array in (plain, inner, half, flag)] == [24, 16, 2, 1]
    assert [array.space for array in (plain, inner, half, flag)] == [0, 1, 0, 0]


def test_a_text_of_something_else_is_refused():
    with pytest.raises(ValueError, match="has no ENTRY"):
        hlo.parse("module @jit_step {}")


def test_products_are_found_in_fusions_and_calls_with_their_flops():
    work = facts(CONDITIONAL).quiet
    assert work.products == 2
    assert work.flops == 2 * 4 * 8 * 6 + 2 * 4 * 6 * 8


def test_a_step_with_a_sync_and_one_without_are_told_apart():
    found = facts(CONDITIONAL)
    assert (found.conditionals, found.dynamic_loops) == (1, 0)
    assert (found.quiet.copies, found.sync.copies) == (2, 1)  # handing feedback on copies it
    assert (found.quiet.casts, found.sync.casts) == (1, 1)
    # y, the cast, x_bar, the last copy; and either a copy or the signs
    assert (found.quiet.launches, found.sync.launches) == (5, 5)
    assert (found.quiet.decisions, found.sync.decisions) == (1, 1)


def test_memory_counts_what_is_not_written_over_arguments():
    found = facts(CONDITIONAL, {"flops": 3.0, "bytes accessed": 4.0, "utilization": 1.0})
    assert (found.peak, found.aliased, found.temporaries) == (100 + 20 + 10, 60, 20)
    assert found.reported == {"flops": 3.0, "bytes accessed": 4.0}


def test_bytes_are_those_of_operands_and_results():
    kernels = {kernel.name: kernel.nbytes for kernel in facts(CONDITIONAL).quiet.kernels}
    assert kernels["y"] == 4 * (4 * 8 + 8 * 6 + 4 * 6)
    assert kernels["half"] == 4 * 48 + 2 * 48
    assert kernels["copy.9"] == 2 * 4 * 48


def test_prefetches_are_no_copies_unless_they_come_back_unchanged():
    work = facts(LOOPS).quiet
    assert work.copies == 1
    assert work.prefetched == 3 * 4 * 48


def test_what_passes_through_a_sync_without_its_turn_comes_back_unchanged():
    loop = LOOPS.replace("tuple(%turns, %squared)", "tuple(%turns, %fetched)").replace(
        "tuple(%new_b, %again, %last)", "tuple(%kept, %squared, %last)"
    )
    back = "(f32[8,6]{1,0}, f32[8,6]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%new_b)"
    end = "  ROOT %out"
    loop = loop.replace(end, f"  %keep = {back}\n  %kept = f32[8,6]{{1,0}} copy-done(%keep)\n{end}")
    loop = loop.replace("%new_b = f32[8,6]{1,0} get", "%new_b = f32[8,6]{1,0:S(1)} get")
    found = facts(loop)
    assert (found.quiet.copies, found.sync.copies) == (2, 1)


def test_loops_of_known_length_count_as_often_as_they_run():
    work = facts(LOOPS).quiet
    times = {kernel.name: kernel.times for kernel in work.kernels}
    assert (times["row"], times["new"], times["changed"]) == (3, 3, 1)
    assert {kernel.name: kernel.nbytes for kernel in work.kernels}["row"] == 2 * 4 * 6
    assert "next" not in times  # a scalar


def test_a_loop_of_unknown_length_is_a_decision():
    found = facts(LOOPS)
    assert (found.conditionals, found.dynamic_loops) == (0, 1)
    assert (found.quiet.decisions, found.sync.decisions) == (1, 2)


def test_collectives_are_counted_once_with_what_a_ring_sends():
    found = facts(LOOPS)
    gathered, summed, scalar = 2 * 48 * 3 / 4, 2 * 4 * 48 / 2, 2 * 4 * 3 / 4
    assert found.quiet.by_kind() == {"all-gather": (1, gathered), "all-reduce": (1, scalar)}
    assert found.sync.by_kind() == {"all-gather": (1, gathered), "all-reduce": (2, summed + scalar)}
    assert [one.of_sync for one in found.sync.collectives].count(True) == 1


@pytest.mark.parametrize(
    "shapes, attributes, flops",
    [
        # 2 x 5 products of 3 window places, less the 2 that lie beside the input; 4 in, 6 out
        (("3,5,4", "3,4,6", "3,5,6"), "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f",
         2 * 3 * 6 * 4 * (5 * 3 - 2)),
        # a batched product as TPUs write it: one place of four is no zero
        (("4,3,5", "4,5,6", "4,3,6"),
         "window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf", 2 * 4 * 3 * 5 * 6),
        (("3,5", "5,6", "3,6"), "dim_labels=bf_io->bf", 2 * 3 * 5 * 6),
    ],
    ids=["padded", "batched", "plain"],
)  # fmt: skip
def test_convolutions_do_not_count_padding(shapes, attributes, flops):
    left, right, result = (f"f32[{shape}]" for shape in shapes)
    work = facts(
        f"""{HEAD}ENTRY %main (a: {left}, b: {right}) -> {result} {{
  %a = {left} parameter(0)
  %b = {right} parameter(1)
  ROOT %y = {result} convolution(%a, %b), {attributes}
}}"""
    ).quiet
    assert (work.products, work.flops) == (1, flops)


def test_of_an_operand_that_is_only_sliced_the_slices_are_read():
    work = facts(
        HEAD
        + """
%fused (p: f32[100,6], i: s32[], old: f32[100,6]) -> f32[100,6] {
  %p = f32[100,6]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %old = f32[100,6]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %slice = f32[2,6]{1,0} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={2,6}
  ROOT %put = f32[100,6]{1,0} dynamic-update-slice(%old, %slice, %i, %zero)
}

ENTRY %main (a: f32[100,6], n: s32[], b: f32[100,6]) -> f32[100,6] {
  %a = f32[100,6]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %b = f32[100,6]{1,0} parameter(2)
  ROOT %y = f32[100,6]{1,0} fusion(%a, %n, %b), kind=kLoop, calls=%fused
}"""
    ).quiet
    assert work.nbytes == 4 * 12 + 4 + 4 * 12
