"""Every annotated shape and type of the packages, checked at every call of a test run, at a few microseconds a call.

jaxtyping's import hook puts `jaxtyping.jaxtyped(typechecker=...)` on every function and class. What that decorator
makes takes each call apart by `inspect.Signature.bind` and checks the arguments twice, in order to word its errors: two
fifths of the time of the tests. Here beartype checks a call once, arguments and returned value, within one scope of
axis names where there are any. It compiles a function's checks when the function is first called.
"""

import functools
import inspect
import typing
from collections.abc import Callable
from types import FunctionType, SimpleNamespace
from typing import Any

import beartype
import jaxtyping

CONF = beartype.BeartypeConf(is_pep484_tower=True, violation_type=jaxtyping.TypeCheckError)

jaxtyping_jaxtyped = jaxtyping.jaxtyped
SCOPE = jaxtyping.jaxtyped("context")


def original_check(function: Any) -> Any:
    """The typechecker of what is left to jaxtyping: generators and coroutines."""
    return beartype.beartype(function, conf=CONF)


def jaxtyped(given: Any = None, *, typechecker: Any = None) -> Any:
    """Stand in for `jaxtyping.jaxtyped` where the import hook calls it."""
    if given is None:
        return functools.partial(jaxtyped, typechecker=typechecker)
    if isinstance(given, str):
        return jaxtyping_jaxtyped(given)
    if inspect.isclass(given):
        if "__dataclass_fields__" in vars(given) and "__init__" in vars(given):
            given.__init__ = checked_at_each_call(given.__init__)
        return given

    # Here a function is called long before its values are made.
    late = inspect.isgeneratorfunction(given) or inspect.isasyncgenfunction(given) or inspect.iscoroutinefunction(given)
    return jaxtyping_jaxtyped(given, typechecker=original_check) if late else checked_at_each_call(given)


def checked_at_each_call(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function; a call with arguments or a result of another type or shape raises `jaxtyping.TypeCheckError`."""
    if not function.__annotations__:
        return function
    config, checked, scoped = jaxtyping.config, None, False

    @functools.wraps(function)
    def checks(*args: Any, **kwargs: Any) -> Any:
        nonlocal checked, scoped
        if config.jaxtyping_disable:
            return function(*args, **kwargs)
        if checked is None:
            known = with_known_types(function)
            scoped = any(map(has_axes, known.__annotations__.values()))
            checked = beartype.beartype(known, conf=CONF)
        if not scoped:
            return checked(*args, **kwargs)
        with SCOPE:
            return checked(*args, **kwargs)

    return checks


def has_axes(annotation: Any) -> bool:
    """Whether there are axes in a type, whose names mean one size throughout a call."""
    if inspect.isclass(annotation) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    parts = annotation if isinstance(annotation, list) else typing.get_args(annotation)
    return any(map(has_axes, parts))


def with_known_types(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with types in place of names; a name that only a type checker imports allows anything."""
    copy = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__, copy.__qualname__, copy.__module__ = (
        function.__kwdefaults__,
        function.__qualname__,
        function.__module__,
    )
    holder = SimpleNamespace()
    for name, annotation in function.__annotations__.items():
        try:
            holder.__annotations__ = {name: annotation}
            copy.__annotations__ |= typing.get_type_hints(holder, function.__globals__, include_extras=True)
        except Exception:  # a NameError, or whatever else evaluating it raises
            copy.__annotations__[name] = Any
    return copy


def install() -> None:
    """Check what is imported from now on."""
    jaxtyping.jaxtyped = jaxtyped
    jaxtyping.install_import_hook(["lens_positions", "experiments"], None)
