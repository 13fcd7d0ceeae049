"""The matrix products and convolutions of a function, and the parameter leaves that they belong to.

The function is traced on shapes, and its products are looked up in the program that JAX makes of it. Of every array on
the way to one, three things are known: the leaves that it stands for, whether it was computed from data, and whether a
gradient reaches a parameter through it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.extend.core import primitives as lax

from optax_structure._tree import Params

_CALLS = {lax.jit_p, lax.remat_p, lax.custom_jvp_call_p, lax.custom_vjp_call_p}
_PRODUCTS = {lax.dot_general_p, lax.conv_general_dilated_p}
_WITHOUT_SLOPE = {lax.stop_gradient_p, lax.floor_p, lax.ceil_p, lax.round_p, lax.sign_p}


class Product(NamedTuple):
    """A matrix product or convolution.

    Attributes:
      leaves: number of a leaf -> its entries, for the leaves that it belongs to; empty for none.
      flops: of the forward pass, 2 a multiply-add.
      backward: how often the backward pass costs as much again.
    """

    leaves: Mapping[int, int]
    flops: int
    backward: int

    @property
    def entries(self) -> int:
        """Entries of all its leaves."""
        return sum(self.leaves.values())


def products_of(apply: Callable[..., Any], params: Params, *example: Any) -> list[Product]:
    """Every product in the forward pass of ``apply(params, *example)``; leaves are numbered as ``params`` has them."""
    program = jax.make_jaxpr(apply)(params, *example)
    own = len(jax.tree.leaves(params))
    inputs = [
        _Value({place: math.prod(aval.shape)}, False, True) if place < own else _Value({}, _is_data(aval), False)
        for place, aval in enumerate(program.in_avals)
    ]
    outputs = [True] * len(program.out_avals)
    return _follow(program, list(map(_typed, inputs, program.in_avals)), outputs, outputs)[1]


class _Value(NamedTuple):
    """What is known of an array.

    Attributes:
      leaves: number of a leaf -> its entries, for what the array stands for.
      data: whether it was computed from the example.
      learns: whether a gradient reaches a parameter through it.
      made: whether a product is in it.
    """

    leaves: Mapping[int, int]
    data: bool
    learns: bool
    made: bool = False

    @property
    def entries(self) -> int:
        return sum(self.leaves.values())


_CONSTANT = _Value({}, False, False)
_Walk = tuple[list[_Value], list[Product]]


def _is_data(aval: Any) -> bool:
    # With the noise of a random key, a kernel is still a kernel.
    return not jnp.issubdtype(aval.dtype, jax.dtypes.prng_key)


def _floats(atoms: Sequence[Any]) -> list[Any]:
    return [atom for atom in atoms if jnp.issubdtype(getattr(atom.aval, "dtype", bool), jnp.inexact)]


def _typed(value: _Value, aval: Any) -> _Value:
    """A value as far as its type carries it: bools only choose (a mask is no data), integers have no gradient."""
    dtype = getattr(aval, "dtype", bool)
    if jnp.issubdtype(dtype, jnp.bool_):
        return _CONSTANT
    return value._replace(learns=value.learns and jnp.issubdtype(dtype, jnp.inexact))


def _open(program: Any) -> Any:
    return program.jaxpr if isinstance(program, core.ClosedJaxpr) else program


def _inner(equation: Any) -> list[Any]:
    """The programs that an equation holds."""
    values = equation.params.values()
    flat = [part for value in values for part in (value if isinstance(value, tuple | list) else (value,))]
    return [_open(part) for part in flat if isinstance(part, core.Jaxpr | core.ClosedJaxpr)]


def _has_products(program: Any) -> bool:
    return any(each.primitive in _PRODUCTS or any(map(_has_products, _inner(each))) for each in program.eqns)


def _variables(atoms: Sequence[Any]) -> set[Any]:
    return {atom for atom in atoms if not isinstance(atom, core.Literal)}


def _chosen(atoms: Sequence[Any], flags: Sequence[bool]) -> list[Any]:
    return [atom for atom, flag in zip(atoms, flags, strict=True) if flag]


def _follow(program: Any, inputs: Sequence[_Value], wanted: Sequence[bool], sloped: Sequence[bool]) -> _Walk:
    """The outputs and products of a program: of those outputs that are wanted, and differentiated where sloped."""
    program = _open(program)
    needed = _variables(_chosen(program.outvars, wanted))
    slopes = _variables(_floats(_chosen(program.outvars, sloped)))
    equations = []
    for equation in reversed(program.eqns):
        if needed.isdisjoint(equation.outvars):
            continue  # compilers leave out what reaches no output
        equations.append(equation)
        needed |= _variables(equation.invars)
        if equation.primitive not in _WITHOUT_SLOPE and not slopes.isdisjoint(equation.outvars):
            slopes |= _variables(_floats(equation.invars))

    values = dict(zip(program.invars, inputs, strict=True))

    def value_of(atom: Any) -> _Value:
        return _CONSTANT if isinstance(atom, core.Literal) else values.get(atom, _CONSTANT)

    products: list[Product] = []
    for equation in reversed(equations):
        flags = ([variable in some for variable in equation.outvars] for some in (needed, slopes))
        outputs, more = _step(equation, [value_of(atom) for atom in equation.invars], *flags)
        products += more
        for variable, value in zip(equation.outvars, outputs, strict=True):
            values[variable] = _typed(value, variable.aval)
    return [value_of(atom) for atom in program.outvars], products


def _step(equation: Any, values: list[_Value], wanted: list[bool], sloped: list[bool]) -> _Walk:
    """The outputs and products of one equation."""
    primitive, params = equation.primitive, equation.params
    if primitive in _PRODUCTS:
        flops = _dot_flops(equation) if primitive is lax.dot_general_p else _conv_flops(equation)
        backward = sum(value.learns for value in values) if any(sloped) else 0
        return [_joined(*values)._replace(leaves={}, made=True)], [Product(_owners(*values), flops, backward)]
    if primitive in _CALLS:
        return _follow(_inner(equation)[0], values, wanted, sloped)
    if primitive is lax.cond_p:
        branches = [_follow(branch, values[1:], wanted, sloped) for branch in params["branches"]]
        outputs = [_joined(*each) for each in zip(*(outputs for outputs, _ in branches), strict=True)]
        return outputs, max((products for _, products in branches), key=_cost)
    if primitive is lax.scan_p:
        first, last = params["num_consts"], params["num_consts"] + params["num_carry"]
        outputs, products = _loop(params["jaxpr"], values[:first], values[first:last], values[last:], wanted, sloped)
        return outputs, [product._replace(flops=product.flops * params["length"]) for product in products]
    if primitive is lax.while_p:
        first, last = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        outputs, products = _loop(params["body_jaxpr"], values[first:last], values[last:], [], wanted, sloped)
        _, asked = _follow(params["cond_jaxpr"], [*values[:first], *outputs], [True], [False])
        return outputs, [*products, *asked]
    if primitive.name == "ragged_dot_general" or any(map(_has_products, _inner(equation))):
        raise ValueError(
            f"apply has matrix products in {primitive.name!r}, where count cannot follow them: pass a function that "
            "computes the same without it."
        )
    return [_made_of(equation, values)] * len(equation.outvars), []


def _loop(
    body: Any, constants: list[_Value], carry: list[_Value], rows: list[_Value], wanted: list[bool], sloped: list[bool]
) -> _Walk:
    """A loop: its carry is taken as it is after many rounds, and as wanted, since the next round reads it."""
    size = len(carry)
    flags = [True] * size + wanted[size:], [any(sloped)] * size + sloped[size:]
    while True:
        outputs, products = _follow(body, [*constants, *carry, *rows], *flags)
        after = [_joined(*pair) for pair in zip(carry, outputs[:size], strict=True)]
        if after == carry:
            return [*after, *outputs[size:]], products
        carry = after


def _cost(products: Sequence[Product]) -> int:
    return sum(product.flops * (1 + product.backward) for product in products)


def _joined(*values: _Value) -> _Value:
    """What holds of an array that may be any of these."""
    _, *flags = (any(of) for of in zip(*values, strict=True))
    return _Value(values[0].leaves if all(value.leaves == values[0].leaves for value in values) else {}, *flags)


def _made_of(equation: Any, values: Sequence[_Value]) -> _Value:
    """The result of what is no product: it stands for the largest leaf among its operands.

    Not where data were mixed into it, nor where the leaf is spread over the result of a product, as a bias is; a
    kernel to which a product of the same shape is added (LoRA) stays a kernel.
    """
    primitive = equation.primitive
    result = _joined(*values) if values else _CONSTANT
    leaf = max(values, key=lambda value: value.entries, default=_CONSTANT)
    others = [value for value in values if not value.leaves]
    spread = leaf.entries < math.prod(equation.outvars[0].aval.shape)
    if primitive in _WITHOUT_SLOPE:
        result = result._replace(learns=False)
    if primitive in (lax.gather_p, lax.dynamic_slice_p):
        return result._replace(leaves=values[0].leaves)  # which entries are chosen may hang on data
    if any(value.data or (value.made and spread) for value in others):
        return result._replace(leaves={})
    if primitive.name in ("concatenate", "stack"):
        return result._replace(leaves={leaf: size for value in values for leaf, size in value.leaves.items()})
    return result._replace(leaves=leaf.leaves)


def _owners(left: _Value, right: _Value) -> Mapping[int, int]:
    """The leaves of a product. Entries that data chose (an embedding's) are as much activation as weight."""
    standing = [value for value in (right, left) if value.leaves]
    weights = [value for value in standing if not value.data]
    if weights:
        return max(weights, key=lambda value: value.entries).leaves
    return standing[0].leaves if len(standing) == 1 else {}


def _dot_flops(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _conv_flops(equation: Any) -> int:
    params, numbers = equation.params, equation.params["dimension_numbers"]
    left, right, out = (atom.aval.shape for atom in (*equation.invars, *equation.outvars))
    axes = zip(
        (left[axis] for axis in numbers.lhs_spec[2:]),
        (right[axis] for axis in numbers.rhs_spec[2:]),
        (out[axis] for axis in numbers.out_spec[2:]),
        params["window_strides"],
        (low for low, _ in params["padding"]),
        params["lhs_dilation"],
        params["rhs_dilation"],
        strict=True,
    )
    batch, features = (out[axis] for axis in numbers.out_spec[:2])
    return 2 * batch * features * right[numbers.rhs_spec[1]] * math.prod(_meetings(*axis) for axis in axes)


def _meetings(size: int, window: int, out: int, stride: int, low: int, spread: int, dilation: int) -> int:
    """How often a window meets an entry of the input, along one axis: not its padding, not the gaps of a dilation."""
    corners = np.arange(out) * stride - low
    places = (corners + offset * dilation for offset in range(window))
    return sum(int(np.sum((at >= 0) & (at <= (size - 1) * spread) & (at % spread == 0))) for at in places)
