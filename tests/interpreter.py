"""Makes Triton interpret kernels on the CPU. To be imported before any kernel is."""

import os
from typing import Any

# Triton's own library is made for the interpreter where the variable is set at its import; it is taken
# back because children of other tests shall not interpret.
os.environ["TRITON_INTERPRET"] = "1"
from triton import knobs
from triton.runtime import interpreter

knobs.propagate_env = False
knobs.runtime.interpret = True
knobs.propagate_env = True
del os.environ["TRITON_INTERPRET"]

_patch = interpreter._patch_lang_tensor


def _patch_with_index(tensor: Any, scope: Any) -> None:
    """Triton 3.6 makes loop bounds of arrays with one element, which NumPy 2.4 refuses to convert."""
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = _patch_with_index
