"""Registers `model_type: "prunekit"` with `transformers`' auto classes and models, without importing them.

`import prunekit` must cost nothing, so what is to be registered waits until `transformers` itself has loaded the table
it belongs in, whichever of the two is imported first.
"""

import sys
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

AUTO = "transformers.models.auto"


def watch() -> None:
    """Register in the tables that `transformers` has loaded, and in the others once they are loaded."""
    for name, register in _TABLES.items():
        if name in sys.modules:
            register(sys.modules[name])
    if not all(name in sys.modules for name in _TABLES):
        sys.meta_path.insert(0, _Watcher())


def _register_configuration(table: Any) -> None:
    from prunekit.auto_classes import PrunekitConfig

    table.AutoConfig.register(PrunekitConfig.model_type, PrunekitConfig, exist_ok=True)


def _register_model(table: Any) -> None:
    from prunekit.auto_classes import PrunekitConfig, PrunekitForCausalLM

    table.AutoModelForCausalLM.register(PrunekitConfig, PrunekitForCausalLM, exist_ok=True)


def _register_classes(module: Any) -> None:
    """Let the classes of families load cut checkpoints of theirs, as adapters without a task type ask for."""
    given = module.PreTrainedModel.from_pretrained
    plain = getattr(given, "__func__", given)  # a plain function where another library has put its own there

    @wraps(plain)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **options: Any) -> Any:
        from prunekit.auto_classes import is_cut, load_as

        if args or not is_cut(pretrained_model_name_or_path):
            return plain(cls, pretrained_model_name_or_path, *args, **options)
        return load_as(cls, pretrained_model_name_or_path, **options)

    module.PreTrainedModel.from_pretrained = classmethod(from_pretrained)


_TABLES: dict[str, Callable[[Any], None]] = {
    f"{AUTO}.configuration_auto": _register_configuration,
    f"{AUTO}.modeling_auto": _register_model,
    "transformers.modeling_utils": _register_classes,
}


class _Watcher(MetaPathFinder):
    """An import hook that registers once the modules with the tables have run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _TABLES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _TABLES[fullname](module)

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec
