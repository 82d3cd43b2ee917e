"""The import hook: which modules are replaced here and why, and the finder that makes them."""

import importlib
import importlib.util
import logging
import sys
from collections.abc import Iterable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from selectra.compat.packages import KERNELS, MODULES, PACKAGES, VERSIONS, homes, modules_of
from selectra.errors import BackendError
from selectra.ops import causal_conv1d, cuda, selective_scan

logger = logging.getLogger("selectra")

NOT_INSTALLED = "not installed"
NO_GPU = "its kernels need an NVIDIA GPU, and there is none"


class StandIn(MetaPathFinder, Loader):
    """Finds and makes the modules that are replaced, and says in words which parts of their packages there are not.

    Args:
        replaced: Their names.
    """

    def __init__(self, replaced: Iterable[str]) -> None:
        self.replaced = frozenset(replaced)
        self._whole = tuple(name for name in self.replaced if "." not in name)
        self._aside: dict[str, ModuleType] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A module's specification if it is replaced; None if it is not ours to make.

        Raises:
            ModuleNotFoundError: It belongs to a package that is replaced as a whole, and is not covered.
        """
        if fullname in self.replaced:
            is_package = any(name.startswith(f"{fullname}.") for name in MODULES)
            return ModuleSpec(fullname, self, origin="selectra.compat", is_package=is_package)
        top = fullname.partition(".")[0]
        if top in self._whole:
            covered = ", ".join(sorted(name for name in modules_of(top) if MODULES[name]))
            raise ModuleNotFoundError(f"selectra.compat has no '{fullname}'; it covers {covered}.", name=fullname)
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Put the module's names into it."""
        name = module.__name__
        for theirs, (home, ours) in homes(name).items():
            setattr(module, theirs, getattr(importlib.import_module(home), ours))
        module.__doc__ = f"Stands in for `{name}`: made by selectra.compat."
        if name in VERSIONS:
            module.__dict__["__version__"] = VERSIONS[name]

        def submodule(attribute: str) -> Any:
            if f"{name}.{attribute}" in self.replaced:
                return importlib.import_module(f"{name}.{attribute}")
            raise AttributeError(f"selectra.compat's stand-in for '{name}' has no attribute '{attribute}'.")

        module.__dict__["__getattr__"] = submodule

    def enter(self) -> None:
        """Stand before all other finders; modules that are loaded already are put aside."""
        for name in list(sys.modules):
            if name in self.replaced or name.partition(".")[0] in self._whole:
                self._aside[name] = sys.modules.pop(name)
        sys.meta_path.insert(0, self)

    def leave(self) -> None:
        """Give the names back, and the modules that were put aside."""
        # Others take finders out too.
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        for name, module in list(sys.modules.items()):
            if getattr(getattr(module, "__spec__", None), "loader", None) is self:
                del sys.modules[name]
        sys.modules.update(self._aside)


def find_missing() -> dict[str, str]:
    """The modules to be replaced, each with the reason; those of packages that work are left out."""
    gpu = torch.cuda.is_available()
    broken = {name: reason for name in KERNELS if (reason := _problem_of_kernel(name, gpu)) is not None}
    missing: dict[str, str] = dict(broken)
    for package in PACKAGES:
        if _spec(package.name) is None:
            missing |= dict.fromkeys(modules_of(package.name), NOT_INSTALLED)
        elif not gpu:
            missing |= dict.fromkeys(modules_of(package.name), NO_GPU)
        elif package.kernel in broken:
            missing |= dict.fromkeys(package.needs_kernel, f"{package.kernel}: {broken[package.kernel]}")
    return {name: missing[name] for name in MODULES if name in missing}


def _problem_of_kernel(name: str, gpu: bool) -> str | None:
    if _spec(name) is None:
        return NOT_INSTALLED
    if not gpu:
        return NO_GPU
    try:
        importlib.import_module(name)
    except ImportError as error:
        return f"cannot be loaded: {error}"
    return None


def _spec(name: str) -> ModuleSpec | None:
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:
        # A module that somebody put into sys.modules by hand, without a specification: it is there.
        return ModuleSpec(name, None)
    # A folder of that name on the path, as a clone of a repository has, is no package.
    is_folder = spec is not None and spec.origin is None and spec.submodule_search_locations is not None
    return None if is_folder else spec


def describe(missing: dict[str, str]) -> str:
    """One sentence: what is replaced and why, by which backends, what stays."""
    reasons: dict[str, list[str]] = {}
    for name, reason in missing.items():
        parent = name.rpartition(".")[0]
        if missing.get(parent) != reason:
            reasons.setdefault(reason, []).append(name)
    what = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in reasons.items())
    tops = [name for name in MODULES if "." not in name]
    kept = [name for name in tops if name not in missing]
    stays = f" Left as installed: {', '.join(kept)}." if kept else ""
    return f"selectra.compat stands in for {what or 'nothing'}, by {_backends()}.{stays}"


def _backends() -> str:
    """What the operators would choose here for float32."""
    u, A, B = torch.zeros(1, 1, 1), torch.zeros(1, 1), torch.zeros(1, 1, 1)
    try:
        names = {selective_scan.backend_for(u, u, A, B, B), causal_conv1d.backend_for(u, A)}
    except BackendError as error:
        # Some other backend was asked for, which may suit the tensors that are to come.
        return f"what was asked for ({error})"
    here = f"backend {' and '.join(sorted(names))} on the CPU"
    return f"{here} and cuda on the GPU" if cuda.status().available else here
