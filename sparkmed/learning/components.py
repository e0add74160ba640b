"""Classes of MONAI and torch, and of what the config allows to import, by name, as the config spells them.

MONAI takes several seconds to import, which only a process that builds something of it spends.
"""

import difflib
import importlib
import inspect
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from sparkmed.config import Component
from sparkmed.rejection import InputError


def find(component: Component, modules: Iterable[str], kind: str, imports: Iterable[str] = ()) -> type:
    """The class or function called ``component.name`` in the first of ``modules`` that has it; ``kind`` is for the message.

    A dotted name is imported when it lies below one of ``modules`` or of ``imports``. Either way what is found must be defined
    there too: no name leads out through what a module has imported. Raises :class:`InputError` otherwise, before any import.
    """
    name, places = component.name, list(modules)
    allowed = places + list(imports)
    if "." in name:
        return _imported(name, allowed, kind)
    modules = [importlib.import_module(p) for p in places]
    for module in modules:
        found = getattr(module, name, None)
        if callable(found) and not name.startswith("_") and _within(_home(found), allowed):
            return found
    names = [n for m in modules for n in dir(m) if callable(getattr(m, n)) and not n.startswith("_")]
    near = difflib.get_close_matches(name, names, 1, 0.0)
    raise InputError(f"{kind} {name} is not in {' or '.join(places)}" + (f"; did you mean {near[0]}?" if near else ""))


def _imported(name: str, allowed: list[str], kind: str) -> type:
    module, _, last = name.rpartition(".")
    if not _within(name, allowed):
        raise InputError(f"{kind} {name} is refused: it is not below {' or '.join(allowed)}; the config's imports may allow more")
    try:
        found = getattr(importlib.import_module(module), last, None)
    except ImportError as e:
        raise InputError(f"{kind} {name} cannot be imported here: {e}") from None
    if not callable(found) or last.startswith("_"):
        raise InputError(f"{kind} {name}: {module} has no class or function {last}")
    if not _within(_home(found), allowed):
        raise InputError(f"{kind} {name} is refused: it is defined in {_home(found)}, which is not below {' or '.join(allowed)}")
    return found


def _home(found) -> str:
    return f"{getattr(found, '__module__', None) or ''}.{getattr(found, '__qualname__', '')}"


def _within(name: str, prefixes: Iterable[str]) -> bool:
    return any(name == p or name.startswith(f"{p}.") for p in prefixes)


def parameters(factory) -> dict[str, inspect.Parameter]:
    """Parameters that ``factory`` takes by name; behind ``**kwargs`` those of its base classes, or of the class it returns."""
    if not inspect.isclass(factory):
        own = dict(inspect.signature(factory).parameters)
        returned = typing.get_type_hints(factory).get("return")
        return own | (parameters(returned) if inspect.isclass(returned) and _open(own) else {})
    known: dict[str, inspect.Parameter] = {}
    for base in factory.__mro__:
        if "__init__" in vars(base):
            own = dict(inspect.signature(base.__init__).parameters)
            known = own | known
            if not _open(own):
                break
    known.pop("self", None)
    return known


def _open(known: Mapping[str, inspect.Parameter]) -> bool:
    return any(p.kind == p.VAR_KEYWORD for p in known.values())


def create(factory, component: Component, kind: str, given: Mapping[str, Any]) -> Any:
    """``factory`` called with the component's arguments and with those of ``given`` it knows; the component's own win.

    Raises :class:`InputError` for an argument that it does not take, one that is missing, and when the constructor refuses.
    """
    known = {k: p for k, p in parameters(factory).items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    for name in component.arguments:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.0)
            raise InputError(f"{kind} {component.name} takes no argument {name}" + (f"; did you mean {near[0]}?" if near else ""))
    arguments = {k: v for k, v in given.items() if k in known} | component.arguments
    missing = [k for k, p in known.items() if p.default is p.empty and k not in arguments and k not in _filled_by_factory(factory)]
    if missing:
        raise InputError(f"{kind} {component.name} wants {', '.join(missing)}")
    try:
        return factory(**arguments)
    except Exception as e:  # whatever a constructor raises, the cause is in the config
        raise InputError(f"{kind} {component.name}({_spelt(arguments)}): {type(e).__name__}: {e}") from e


def _filled_by_factory(factory) -> set[str]:
    """What a function passes to the class it returns: not for the caller to give (``block`` and ``layers`` of ``resnet18``)."""
    if inspect.isclass(factory):
        own = inspect.signature(factory.__init__).parameters
    else:
        own = inspect.signature(factory).parameters
    return set(parameters(factory)) - set(own)


def _spelt(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}={v!r}" for k, v in arguments.items())
