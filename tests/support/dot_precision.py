"""Prints how Triton multiplies fp32 for an H100 in the tests' environment: `tf32` or `ieee`."""

from __future__ import annotations

import environment  # noqa: F401  first
import triton
import triton.language as tl
from build_kernels import stand_in
from triton.compiler import ASTSource


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr):
    rows, cols = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    at = rows * 16 + cols
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


def main() -> None:
    """Compiles a product of two fp32 tiles and inspects its code."""
    driver = stand_in(90)
    triton.runtime.driver.set_active(driver)
    source = ASTSource(_dot_kernel, dict.fromkeys(("a_ptr", "b_ptr", "out_ptr"), "*fp32"))
    ptx = triton.compile(source, target=driver.get_current_target()).asm["ptx"]
    print("tf32" if "tf32" in ptx else "ieee")


if __name__ == "__main__":
    main()
