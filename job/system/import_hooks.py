"""Import bitsandbytes without TorchInductor, which would take a quarter of the time in which the job starts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

LIBRARY = "bitsandbytes"


def install() -> None:
    """Make every later `import bitsandbytes`, which PEFT does at its own import, one without torch.compile.

    It decorates functions with torch.compile, and already that imports TorchInductor. They are its optimizers, and what
    it computes on devices without kernels of its own: neither is used here.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the specification of the library, which is loaded without compilation; None for all others."""
        spec = PathFinder.find_spec(fullname, path, target) if fullname == LIBRARY else None
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                with _no_compilation():
                    execute(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


@contextmanager
def _no_compilation() -> Iterator[None]:
    """Let torch.compile return functions as they are within the block."""
    import torch

    def as_it_is(model: Callable[..., Any] | None = None, **_: Any) -> Any:
        return as_it_is if model is None else model

    library: Any = torch
    compiles, library.compile = library.compile, as_it_is
    try:
        yield
    finally:
        library.compile = compiles
