"""What every op must satisfy, on every backend. A test class for an op inherits :class:`OpTester` and describes its
inputs.

The tolerance is a policy, not a number: the expected value is the float64 reference on inputs already rounded to the
tested dtype; allowed is twice the error of the reference run in that dtype, plus 1e-10 / 1e-5 / 2e-3 / 1.6e-2 (float64
/ 32 / 16 / bfloat16) of the root mean square of the expected value. NaN fails.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from fastcam import backends

SHARE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
TARGETS = ((80, "sm_80"), (90, "sm_90"), (100, "sm_100"), (120, "sm_120"))  # Ampere, Hopper, two Blackwells


def assert_within_policy(
    actual: Tensor, exact: Tensor, reference: Tensor, dtype: torch.dtype, what: str = "result"
) -> None:
    """``actual`` and ``reference`` come from inputs in ``dtype``, ``exact`` from the same inputs in float64."""
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert actual.dtype == reference.dtype, f"{what}: dtype {actual.dtype}, expected {reference.dtype}"
    if exact.numel() == 0:
        return
    actual, exact, reference = (t.detach().double().cpu() for t in (actual, exact, reference))
    assert not actual.isnan().any(), f"{what}: {int(actual.isnan().sum())} of {actual.numel()} values are NaN"
    allowed = 2 * (reference - exact).abs().max() + SHARE[dtype] * exact.square().mean().sqrt()
    error = (actual - exact).abs().max()
    assert error <= allowed, f"{what}: largest error {error:.3g}, allowed {allowed:.3g}"


def differentiable(args: Any) -> list[Tensor]:
    """The floating tensors of nested arguments, in order."""
    return [t for t in tree_flatten(args)[0] if isinstance(t, Tensor) and t.is_floating_point()]


def cast(args: Any, dtype: torch.dtype) -> Any:
    """Nested arguments with floating tensors in another dtype."""
    return tree_map(lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, args)


class OpTester:
    """Inherit, and give ``op``, ``candidates``, ``cases``, ``small`` and ``inputs``."""

    op: ClassVar[Callable[..., Any]]  # staticmethod(the public function)
    candidates: ClassVar[Mapping[str, Any]]  # its CANDIDATES
    cases: ClassVar[Sequence[Any]]  # what `inputs` understands; the first is an empty batch
    small: ClassVar[Any]  # a case for gradcheck, opcheck and the interpreter
    half_dtypes: ClassVar[Sequence[torch.dtype]] = (torch.float16, torch.bfloat16)
    has_backward: ClassVar[bool] = True

    def inputs(self, case: Any, dtype: torch.dtype, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional arguments (nested lists of tensors allowed) and keyword arguments of one case."""
        raise NotImplementedError

    def run_forward(self, args: tuple, kwargs: dict, backend: str) -> list[Tensor]:
        out = type(self).op(*args, **kwargs, backend=backend)
        return [out] if isinstance(out, Tensor) else list(out)

    def run_backward(self, args: tuple, kwargs: dict, backend: str) -> list[Tensor]:
        flat, spec = tree_flatten(args)
        flat = [t.detach().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t for t in flat]
        out = self.run_forward(tree_unflatten(flat, spec), kwargs, backend)[0]
        weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape).to(out)
        out.backward(weight)
        return [t.grad for t in flat if isinstance(t, Tensor) and t.requires_grad]

    def compare(
        self, run: Callable[..., list[Tensor]], case: Any, dtype: torch.dtype, device: str, backend: str
    ) -> None:
        args, kwargs = self.inputs(case, dtype, device)
        actual = run(args, kwargs, backend)
        exact = run(cast(args, torch.float64), cast(kwargs, torch.float64), "reference")
        reference = run(args, kwargs, "reference")
        for i, three in enumerate(zip(actual, exact, reference, strict=True)):
            assert_within_policy(*three, dtype, what=f"{run.__name__} {i}")

    def chosen(self) -> Sequence[Any]:
        """All cases, or in the interpreter (about a hundred programs a second) the small one."""
        return [self.small] if os.environ.get("TRITON_INTERPRET") == "1" else self.cases

    def test_forward_agrees_with_float64_reference(self, device, backend):
        for case in self.chosen():
            self.compare(self.run_forward, case, torch.float32, device, backend)

    def test_forward_in_16_bits(self, device, backend):
        for dtype in self.half_dtypes:
            self.compare(self.run_forward, self.small, dtype, device, backend)

    def test_backward_agrees_with_float64_reference(self, device, backend):
        if not self.has_backward:
            pytest.skip("not differentiable, by its docstring")
        for case in self.chosen():
            self.compare(self.run_backward, case, torch.float32, device, backend)

    def test_backward_in_16_bits(self, device, backend):
        if not self.has_backward:
            pytest.skip("not differentiable, by its docstring")
        for dtype in self.half_dtypes:
            self.compare(self.run_backward, self.small, dtype, device, backend)

    def test_gradcheck(self, device, backend):
        if not self.has_backward or backend in ("triton", "cuda"):
            pytest.skip("not differentiable, or no float64")
        args, kwargs = self.inputs(self.small, torch.float64, device)
        flat, spec = tree_flatten(args)
        which = [i for i, t in enumerate(flat) if isinstance(t, Tensor) and t.is_floating_point()]

        def function(*tensors: Tensor) -> Tensor:
            full = list(flat)
            for i, t in zip(which, tensors, strict=True):
                full[i] = t
            return self.run_forward(tree_unflatten(full, spec), kwargs, backend)[0]

        assert torch.autograd.gradcheck(function, tuple(flat[i].detach().requires_grad_() for i in which))

    def test_any_strides(self, device, backend):
        args, kwargs = self.inputs(self.small, torch.float32, device)

        def strided(t: Any) -> Any:  # every second element of a tensor whose dimensions are stored the other way round
            if not isinstance(t, Tensor) or t.ndim == 0:
                return t
            wide = t.new_zeros([2 * n for n in reversed(t.shape)]).permute(*reversed(range(t.ndim)))
            view = wide[tuple(slice(None, None, 2) for _ in t.shape)]
            view.copy_(t)
            return view

        plain = self.run_forward(args, kwargs, backend)
        for a, b in zip(self.run_forward(tree_map(strided, args), kwargs, backend), plain, strict=True):
            torch.testing.assert_close(a, b)
            assert a.is_contiguous()

    def test_compiles_without_graph_breaks(self, device, backend):
        args, kwargs = self.inputs(self.small, torch.float32, device)
        tensors = differentiable(args)
        if self.has_backward:
            for t in tensors:
                t.requires_grad_()
        call = functools.partial(type(self).op, backend=backend)
        torch._dynamo.reset()
        compiled = torch.compile(lambda a, k: call(*a, **k), backend="aot_eager", fullgraph=True)
        eager, fast = call(*args, **kwargs), compiled(args, kwargs)
        torch.testing.assert_close(fast, eager)
        if self.has_backward:
            weight = torch.ones_like(eager)
            expected = torch.autograd.grad(eager, tensors, weight)
            torch.testing.assert_close(torch.autograd.grad(fast, tensors, weight), expected)

    def test_inputs_are_not_changed(self, device, backend):
        args, kwargs = self.inputs(self.small, torch.float32, device)
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        before = [t.clone() for t in tensors]
        self.run_forward(args, kwargs, backend)
        torch.testing.assert_close(tensors, before, rtol=0, atol=0, equal_nan=True)

    def test_same_bits_for_every_number_of_threads(self, device, backend):
        if device != "cpu" or backend != "cpp":
            pytest.skip("threads are the C++ backend's")
        args, kwargs = self.inputs(self.cases[-1], torch.float32, device)
        before = torch.get_num_threads()
        results = []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(self.run_forward(args, kwargs, backend))
                if self.has_backward:
                    results[-1] += self.run_backward(args, kwargs, backend)
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=0, atol=0)

    def test_refuses_integers_and_names_itself(self, device, backend):
        args, kwargs = self.inputs(self.small, torch.float32, device)
        name = type(self).op.__name__
        with pytest.raises(TypeError, match=f"^{name}: "):
            type(self).op(*cast(args, torch.int32), **kwargs, backend=backend)

    def test_refused_backend_says_why(self, device, backend):
        args, kwargs = self.inputs(self.small, torch.float32, device)
        name = type(self).op.__name__
        with pytest.raises(backends.BackendError, match=f"^{name}: backend 'metal' does not exist, expected one of "):
            type(self).op(*args, **kwargs, backend="metal")


def compile_for_gpus(kernel: Any, signature: dict[str, str], constants: dict[str, Any], **options: Any) -> None:
    """Compile a Triton kernel to machine code for several GPU generations. Needs no GPU.

    Args:
        kernel: the ``@triton.jit`` function.
        signature: argument name -> Triton type (``"*fp32"``, ``"i32"``, ``"fp32"``) of all arguments that are not
            constants.
        constants: the ``tl.constexpr`` arguments.
        options: ``num_warps``, ``num_stages``.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    full = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    for capability, name in TARGETS:
        source = ASTSource(fn=kernel, signature=full, constexprs=constants)
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert len(built.asm["cubin"]) > 0, f"{kernel.__name__} gave no machine code for {name}"
