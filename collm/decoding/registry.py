"""How routers and combiners are named: a string, a dictionary with parameters, or the user's own callable."""

from __future__ import annotations

import functools
import inspect
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from collm.errors import ConfigurationError, did_you_mean

# What a parameter's annotation asks of its value; other parameters are models, or the user's own affair.
KINDS: dict[Any, tuple[str, tuple[type, ...]]] = {
    float: ("a number", (int, float)),
    int: ("a whole number", (int,)),
    str: ("a text", (str,)),
}
Spec = str | Mapping[str, Any] | Callable[..., Any]


def parse_spec(kind: str, spec: Spec, registry: Mapping[str, Callable[..., Any]]) -> tuple[Callable[..., Any], dict]:
    """The function that a specification names, and the parameters that it gives.

    Args:
        kind (`str`): "router" or "combiner", for the error.
        spec (`str`, `dict` or `Callable`): `"entropy:cut=1.2"`, `{"name": "entropy", "cut": 1.2}`, the same as JSON
            (as the command line passes it), or a callable, which is returned as it is.
        registry (`dict[str, Callable]`): the functions by name.

    Raises:
        [`ConfigurationError`]: an unknown name or parameter, a parameter that is missing, or a value of another kind.
    """
    if callable(spec):
        return spec, {}
    if isinstance(spec, str):
        spec = _from_string(kind, spec)
    parameters = dict(spec)
    name = parameters.pop("name", None)
    if not isinstance(name, str) or name not in registry:
        raise ConfigurationError(
            f'There is no {kind} "{name}".{did_you_mean(str(name), registry)} Available: {", ".join(registry)}; '
            "or pass a callable."
        )
    function = registry[name]
    known = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
    names = [p.name for p in known]
    for given in parameters:
        if given not in names:
            raise ConfigurationError(
                f'The {kind} "{name}" has no parameter "{given}".{did_you_mean(given, names)} '
                f"It takes: {', '.join(names) or 'none'}."
            )
    missing = [p.name for p in known if p.default is p.empty and p.name not in parameters]
    if missing:
        example = {"name": name, **dict.fromkeys(missing, "...")}
        raise ConfigurationError(f'The {kind} "{name}" needs {", ".join(missing)}: for example {json.dumps(example)}.')
    for parameter in known:
        if parameter.name in parameters:
            _check_value(kind, name, parameter, parameters[parameter.name])
    return function, parameters


def _check_value(kind: str, name: str, parameter: inspect.Parameter, value: Any) -> None:
    wanted = KINDS.get(parameter.annotation)
    if wanted is None:
        return
    described, types = wanted
    if (
        not isinstance(value, types)
        or isinstance(value, bool)
        or (isinstance(value, float) and not math.isfinite(value))
    ):
        raise ConfigurationError(f'{parameter.name} of the {kind} "{name}" must be {described}, not {value!r}.')


def bind(function: Callable[..., Any], parameters: Mapping[str, Any]) -> Callable[..., Any]:
    return functools.partial(function, **parameters) if parameters else function


def _from_string(kind: str, text: str) -> dict[str, Any]:
    if text.lstrip().startswith("{"):
        try:
            return dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise ConfigurationError(f"This {kind} is not valid JSON: {text} ({error}).") from error
    name, _, rest = text.partition(":")
    parameters: dict[str, Any] = {"name": name.strip()}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigurationError(f'"{text}" is not a {kind}: write NAME or NAME:PARAMETER=VALUE,PARAMETER=VALUE.')
        try:
            parameters[key.strip()] = json.loads(value)
        except json.JSONDecodeError:
            parameters[key.strip()] = value.strip()
    return parameters
