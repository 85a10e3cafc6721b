"""Load the plugin into mergekit: wait for its import, then call ``host.plugin.on_import``.

mergekit does not look for plugins, so ``mergekit_dam_autoload.pth`` calls `install` in every Python
process of the environment. This file therefore follows three rules:

- It imports only modules that a bare interpreter has loaded (``typing`` would double its cost).
- It does nothing until one of the `WATCHED` modules is imported.
- A failure of the plugin causes one warning, and never a failure of mergekit.
"""

import sys

TYPE_CHECKING = False  # type checkers treat this name as they treat typing's
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

WATCHED = (
    "mergekit.merge_methods",
    "mergekit.plan",
    "mergekit.merge",
    "mergekit.scripts.run_yaml",
    "mergekit.scripts.multimerge",
)
"""Modules of mergekit that are passed to the plugin after they ran, in mergekit's own order."""

_OWN = "mergekit_dam."


class Delivery:
    """Passes modules of mergekit to the plugin, but not while a module of ours is half executed.

    If ``import mergekit_dam.request.method`` is a process's first import, mergekit is executed in
    the middle of it. The plugin would then import an unfinished module. Therefore the modules of
    mergekit wait until our own module is finished.
    """

    def __init__(self) -> None:
        self._pending: list[ModuleType] = []
        self._half_executed: set[str] = set()
        self._failed = False

    def execute(self, loader: "Loader", module: "ModuleType") -> None:
        """Execute `module`, a watched one or one of ours, then deliver what can be delivered."""
        name = module.__name__
        if name.startswith(_OWN):
            self._half_executed.add(name)
        try:
            loader.exec_module(module)
        finally:
            self._half_executed.discard(name)
        if name in WATCHED:
            self._pending.append(module)
        self.flush()

    def add(self, modules: "Sequence[ModuleType]") -> None:
        """Deliver `modules`, which were executed before we could watch them."""
        self._pending.extend(modules)
        self.flush()

    def flush(self) -> None:
        """Call the plugin with every waiting module, unless a module of ours is half executed.

        After a failure nothing more is delivered: the user was warned that `dam` is missing, and
        half a plugin would be worse than none.
        """
        if not self._pending or self._half_executed or self._failed:
            return
        try:
            # The first import of `host` and of `plugin` calls `flush` too, which may leave nothing
            # to do here, or to report.
            from mergekit_dam.host.plugin import on_import

            modules, self._pending = self._pending, []
            for module in modules:
                on_import(module)
        except Exception as error:
            if not self._failed:
                self._failed = True
                _report(error)


class PluginLoader:
    """Replaces a module's loader until the module is executed, and has all its attributes."""

    def __init__(self, loader: "Loader", delivery: Delivery) -> None:
        self._loader = loader
        self._delivery = delivery

    def __getattr__(self, name: str) -> "Any":
        return getattr(self._loader, name)

    def exec_module(self, module: "ModuleType") -> None:
        """Execute `module`, after giving back its own loader, which resources and inspect need.

        If another hook has wrapped this loader, the module has that hook's loader and keeps it.
        """
        if module.__loader__ is self:
            module.__loader__ = self._loader
        if module.__spec__ is not None and getattr(module.__spec__, "loader", None) is self:
            module.__spec__.loader = self._loader
        self._delivery.execute(self._loader, module)


class PluginFinder:
    """A finder for ``sys.meta_path`` that wraps the loader which the other finders find."""

    def __init__(self, delivery: Delivery) -> None:
        self._delivery = delivery
        self._searching: set[str] = set()

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """The other finders' spec, its loader wrapped; None if `name` is not watched nor ours."""
        watched = name in WATCHED or name.startswith(_OWN)
        # Another finder may call importlib.util.find_spec, which calls this method again: hence the
        # set of names. No lock is needed: the interpreter calls finders under its import lock.
        if not watched or name in self._searching:
            return None
        self._searching.add(name)
        try:
            spec = self._search_elsewhere(name, path, target)
        finally:
            self._searching.discard(name)
        if spec is not None and hasattr(spec.loader, "exec_module"):  # a namespace has no loader
            # mypy wants the base class importlib.abc.Loader, but importing it takes too long.
            spec.loader = PluginLoader(spec.loader, self._delivery)  # type: ignore[arg-type, assignment]
        return spec

    def _search_elsewhere(
        self, name: str, path: "Sequence[str] | None", target: "ModuleType | None"
    ) -> "ModuleSpec | None":
        for finder in tuple(sys.meta_path):  # a copy: a search may import, and so add finders
            find_spec = None if finder is self else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find_spec(name, path, target) if find_spec else None
            if spec is not None:
                return spec
        return None


def _report(error: Exception) -> None:
    """Log one warning; `warnings.warn` would raise an exception under ``-W error``."""
    import logging

    log = logging.getLogger("mergekit_dam")
    log.warning(
        "mergekit-dam could not hook into mergekit: %s: %s. `merge_method: dam` will not work, "
        "everything else in mergekit does. Either pip install --upgrade mergekit-dam, or install "
        "a mergekit that it supports; the traceback is logged at level DEBUG.",
        type(error).__name__,
        error,
    )
    log.debug("mergekit-dam failed here:", exc_info=error)


_delivery = Delivery()
_finder = PluginFinder(_delivery)


def install() -> None:
    """Watch for mergekit from now on; modules that are imported already are delivered at once.

    Idempotent: Python 3.11 reads the .pth files of a virtual environment twice.
    """
    if _finder in sys.meta_path:
        return
    sys.meta_path.insert(0, _finder)
    _delivery.add([sys.modules[name] for name in WATCHED if name in sys.modules])
