"""The walker over compiled programs against XLA's own count, and against arithmetic."""

import functools

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lladax.scaling import hlo
from lladax.scaling.cost import Share, program_cost
from lladax.scaling.loops import visits


def compiled(function, *shapes, dtype=jnp.float32):
  arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
  return jax.jit(function).lower(*arrays).compile()


def cost(program, expected=None):
  module = hlo.parse(program.as_text())
  visited, unknown = visits(module, expected)
  return program_cost(module, visited), unknown


@pytest.mark.quick
def test_a_loop_counts_as_often_as_it_runs():
  def layers(x, weights):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

  program = compiled(layers, (64, 32), (7, 32, 32))
  found, unknown = cost(program)
  assert found.flops == 7 * 2 * 64 * 32 * 32
  assert not unknown
  # What the walker is there for: XLA counts the body once.
  assert program.cost_analysis()["flops"] < 0.3 * found.flops


def test_loops_in_loops_multiply():
  def nested(x, weights):
    def outer(x, w):
      return jax.lax.fori_loop(0, 5, lambda _, x: x @ w, x), None

    return jax.lax.scan(outer, x, weights)[0]

  found, _ = cost(compiled(nested, (16, 16), (3, 16, 16)))
  assert found.flops == 3 * 5 * 2 * 16**3


def test_a_loop_whose_count_is_data_is_named_or_reported():
  def until(x, w, bound):
    with jax.named_scope("data_blocks"):
      return jax.lax.fori_loop(0, bound, lambda _, x: x @ w, x)

  arrays = [jax.ShapeDtypeStruct((8, 8), jnp.float32)] * 2
  program = jax.jit(until).lower(*arrays, jax.ShapeDtypeStruct((), jnp.int32)).compile()
  found, unknown = cost(program)
  assert found.flops == 2 * 8**3
  assert ["data_blocks" in loop.op_name for loop in unknown] == [True]
  found, unknown = cost(program, {"data_blocks": lambda module, body: 6.5})
  assert found.flops == 6.5 * 2 * 8**3
  assert not unknown


@settings(max_examples=12, deadline=None)
@given(
  size=st.integers(3, 9),
  window=st.integers(1, 4),
  stride=st.integers(1, 3),
  dilations=st.sampled_from([(1, 1), (2, 1), (1, 2), (3, 1)]),
  padding=st.sampled_from([(0, 0), (1, 1), (2, 0), (3, 3)]),
)
def test_a_convolution_counts_what_meets_the_input(size, window, stride, dilations, padding):
  # XLA for TPU writes every product as a convolution, batched ones with holes and padding.
  lhs, rhs = dilations
  if (size - 1) * lhs + 1 + sum(padding) < (window - 1) * rhs + 1:
    return
  run = functools.partial(
    jax.lax.conv_general_dilated,
    window_strides=(stride,), padding=[padding], lhs_dilation=(lhs,), rhs_dilation=(rhs,),
  )  # fmt: skip
  text = jax.jit(run).lower(jnp.zeros((2, 3, size)), jnp.zeros((5, 3, window)))
  module = hlo.parse(text.compiler_ir("hlo").as_hlo_text())
  found = program_cost(module, visits(module)[0])
  assert found.flops == text.cost_analysis().get("flops", 0.0)


LINE = """  ROOT %fusion.3 = (bf16[2,512,128]{2,1,0:T(8,128)(2,1)S(1)}, /*index=1*/f32[]{:T(128)}) \
fusion(%a, f32[4,2]{1,0} %b, /*index=2*/%c), kind=kLoop, calls=%fused.3, \
metadata={op_name="jit(f)/while/body/x" stack_frame_id=1}, backend_config={"a":{"b":[]}}"""


@pytest.mark.quick
def test_a_line_of_tpu_text():
  found = hlo.parse_instruction(LINE)
  assert (found.name, found.opcode, found.operands) == ("fusion.3", "fusion", ("a", "b", "c"))
  assert [(s.dtype, s.dims, s.space) for s in found.shapes] == [
    ("bf16", (2, 512, 128), 1),
    ("f32", (), 0),
  ]
  assert found.called == {"calls": ("fused.3",)}
  assert found.op_name == "jit(f)/while/body/x"


TPU_LOOP = """HloModule m
%add (p: s32[], q: s32[]) -> s32[] {
  %p = s32[] parameter(0)
  %one = s32[] constant(1)
  ROOT %sum = s32[] add(%p, %one)
}
%body (arg: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %arg = (s32[], f32[8,8]) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %x = f32[8,8]{1,0} get-tuple-element(%arg), index=1
  %next = s32[] fusion(%i), kind=kLoop, calls=%add
  %k = f32[8,8]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"a":"b"
}}, metadata={op_name="kernel"}, backend_config={"custom_call_config":{"cost_estimate":{"flops":"100","bytes_accessed":"30"}}}
  ROOT %out = (s32[], f32[8,8]) tuple(%next, %k)
}
%condition (arg.1: (s32[], f32[8,8])) -> pred[] {
  %arg.1 = (s32[], f32[8,8]) parameter(0)
  %j = s32[] get-tuple-element(%arg.1), index=0
  %bound = s32[] constant(10)
  ROOT %lt = pred[] compare(%j, %bound), direction=LT
}
ENTRY %main (x.1: f32[8,8]) -> (s32[], f32[8,8]) {
  %x.1 = f32[8,8]{1,0} parameter(0)
  %two = s32[] constant(2)
  %start = (s32[], f32[8,8]) tuple(%two, %x.1)
  ROOT %loop = (s32[], f32[8,8]) while(%start), condition=%condition, body=%body
}
"""


@pytest.mark.quick
def test_a_loop_without_a_known_count_and_a_kernel_that_states_its_cost():
  # Libtpu writes no trip count, and a kernel's attributes may hold line breaks.
  module = hlo.parse(TPU_LOOP)
  visited, unknown = visits(module)
  found = program_cost(module, visited)
  assert not unknown
  assert found.flops == 8 * 100
  assert found.hbm_bytes == 8 * (30 + 8 + 9)  # the kernel, the counter in and out, its test


def test_a_kernel_without_a_cost_is_reported():
  text = TPU_LOOP.replace('"cost_estimate":{"flops":"100","bytes_accessed":"30"}', "")
  module = hlo.parse(text)
  found = program_cost(module, visits(module)[0])
  assert found.flops == 0
  assert found.unknown_calls == {"k": 8}


def test_what_lies_in_vmem_is_no_traffic_and_slices_count_as_slices():
  text = """HloModule m
%fused (p: f32[100,8], i: s32[]) -> f32[1,8] {
  %p = f32[100,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice = f32[1,8]{1,0} dynamic-slice(%p, %i, %zero), dynamic_slice_sizes={1,8}
}
ENTRY %main (x: f32[100,8], y: f32[50]) -> f32[1,8] {
  %x = f32[100,8]{1,0} parameter(0)
  %y = f32[50]{0:S(1)} parameter(1)
  %n = s32[]{:S(2)} constant(3)
  %v = f32[50]{0:S(1)} negate(%y)
  ROOT %f = f32[1,8]{1,0} fusion(%x, %n), kind=kLoop, calls=%fused
}
"""
  module = hlo.parse(text)
  assert program_cost(module, visits(module)[0]).hbm_bytes == 32 + 32


@pytest.mark.quick
def test_what_was_fetched_before_a_kernel_is_not_traffic_of_the_kernel():
  # A slice names what it is of first, a copy what it makes.
  text = """HloModule m
ENTRY %main (w: bf16[8,64], v: bf16[8,64]) -> f32[10] {
  %w = bf16[8,64]{1,0} parameter(0)
  %v = bf16[8,64]{1,0} parameter(1)
  %s = (bf16[8,64]{1,0}, bf16[2,64]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%w), slice={[0:2], [0:64]}
  %sliced = bf16[2,64]{1,0:S(1)} slice-done(%s)
  %c = (bf16[8,64]{1,0:S(1)}, bf16[8,64]{1,0}, u32[]{:S(2)}) copy-start(%v)
  %copied = bf16[8,64]{1,0:S(1)} copy-done(%c)
  ROOT %k = f32[10]{0} custom-call(%copied, %w, %w), custom_call_target="tpu_custom_call", \
metadata={op_name="a/moe/kernel"}, backend_config={"cost_estimate":{"flops":"8","bytes_accessed":"2088"}}
}
"""
  module = hlo.parse(text)
  fetched, of_kernel = 2 * 64 * 2 + 8 * 64 * 2, 2088 - 8 * 64 * 2
  assert program_cost(module, visits(module)[0]).hbm_bytes == fetched + of_kernel
  live = {"/moe/": lambda shapes: Share(flops=0.5, hbm=0.25)}
  found = program_cost(module, visits(module)[0], live)
  assert (found.flops, found.hbm_bytes) == (4, fetched + of_kernel / 4)


def test_text_of_something_else():
  with pytest.raises(ValueError, match="no ENTRY"):
    hlo.parse("hello\n")
