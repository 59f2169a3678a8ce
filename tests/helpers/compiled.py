"""Compile Triton kernels for GPUs that are not there: what the interpreter lets pass, the compiler may not.

A test runs `python FILE` of its own in a process without TRITON_INTERPRET (see `in_a_process`), and there `compiled`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

CAPABILITIES = (80, 90)  # A100, H100


def in_a_process(file: str) -> None:
    """Run a test file as a script, without the interpreter."""
    root = str(Path(__file__).parents[2])  # where `tests` is
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TRITON_DEFAULT_FP_FUSION": "1", "PYTHONPATH": root}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, file], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int = 4) -> None:
    """Compile a kernel to machine code; `types` as in Triton's signatures ("*fp32", "i32"), without the constants."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    # Torch's tensors begin at multiples of 16 bytes, which a launch tells the compiler.
    aligned = {(i,): [["tt.divisibility", 16]] for i, type_ in enumerate(signature.values()) if type_.startswith("*")}
    for capability in CAPABILITIES:
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
        assert made.asm["cubin"]
        assert made.metadata.shared <= 160 * 1024
