"""Turns a row into a request: templates, parameters, cache key, token estimate."""

import hashlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, cast

import jinja2
import jinja2.meta
import msgspec
from jinja2.sandbox import SandboxedEnvironment

from batcher.errors import JobError
from batcher.job import RequestTemplate, is_template, misfit
from batcher.records import Failure, Kind, Request, Row

BYTES_PER_TOKEN = 4
"""English prose in common tokenizers; an estimate until the service has counted."""

_Fields = Mapping[str, object]
_Render = Callable[[_Fields], object]
_WHOLE = re.compile(r"\s*\{\{(.*)\}\}\s*", re.DOTALL)


class Composer:
    """The `[request]` section, compiled. `names` are the columns it needs.

    `response_format` is the API's own object where the job gave a schema.
    Raises JobError where a template cannot be compiled.
    """

    def __init__(self, template: RequestTemplate, response_format: Mapping[str, object] | None, origin: str) -> None:
        self._endpoint = template.endpoint
        self._environment = _Environment()
        self._fixed: dict[str, object] = {}
        self._rendered: list[tuple[str, _Render]] = []
        names: set[str] = set()
        parameters = dict(template.parameters)
        if response_format is not None:
            parameters["response_format"] = response_format
        for name, value in parameters.items():
            try:
                render = self._compile(value, names)
            except jinja2.TemplateError as error:
                raise JobError(f"{origin}: request.{name}: not a Jinja template: {error}") from None
            if render is None:
                self._fixed[name] = msgspec.Raw(msgspec.json.encode(value))
            else:
                self._rendered.append((name, render))
        # What varies as a whole is checked row by row; texts inside messages were checked with the job.
        self._checked = {name for name, value in parameters.items() if is_template(value)}
        self._constants = parameters
        self.names = frozenset(names)

    def compose(self, row: Row, unit: int = 0) -> Request | Failure:
        """The request of a row; a failure where it has none: unreadable input, a null in a template, a bad value."""
        if row.problem is not None:
            return Failure(Kind.BAD_INPUT, row.problem)
        fields = row.fields
        if None in fields.values():
            fields = {name: _Null(name=name) if value is None else value for name, value in fields.items()}
        values = self._fixed.copy()
        name = "body"
        try:
            for name, render in self._rendered:
                value = render(fields)
                if name in self._checked and (wrong := misfit(self._endpoint, name, value)):
                    return Failure(Kind.UNSENDABLE, wrong)
                values[name] = value
            body = msgspec.json.encode(values)
        except UnicodeEncodeError:
            return Failure(Kind.UNSENDABLE, "the text holds a lone surrogate, which UTF-8 cannot carry")
        except Exception as error:  # whatever a template of the job's author raises is this row's failure
            return Failure(Kind.UNSENDABLE, f"request.{name}: {error}"[:300])
        cap = self._value("max_completion_tokens", values) or self._value("max_tokens", values) or 0
        return Request(
            unit=unit,
            row=row.position,
            model=cast(str, self._value("model", values)),
            body=body,
            prompt_tokens=max(1, len(body) // BYTES_PER_TOKEN),
            output_tokens=cast(int, cap) * cast(int, self._value("n", values) or 1),
            hash=hashlib.blake2b(body, digest_size=16).digest(),
            cache_key=cast(str | None, self._value("prompt_cache_key", values)),
        )

    def _value(self, name: str, values: Mapping[str, object]) -> object:
        return values[name] if name in self._checked else self._constants.get(name)

    def _compile(self, value: object, names: set[str]) -> _Render | None:
        """A function of the row's fields, or None where the value is the same for every row."""
        if is_template(value):
            return self._template(cast(str, value), names)
        if isinstance(value, dict):
            inner = {key: self._compile(item, names) for key, item in value.items()}
            if not any(inner.values()):
                return None
            fixed = {key: value[key] for key, render in inner.items() if render is None}
            order = list(value)
            live = [(key, render) for key, render in inner.items() if render is not None]

            def whole(fields: _Fields) -> object:
                made = fixed | {key: render(fields) for key, render in live}
                return {key: made[key] for key in order}

            return whole
        if isinstance(value, list):
            parts = [self._compile(item, names) for item in value]
            if not any(parts):
                return None
            # Texts that never change are encoded once: a long system prompt costs a row nothing but a copy.
            constants = [msgspec.Raw(msgspec.json.encode(item)) for item in value]
            pairs = list(zip(parts, constants, strict=True))
            return lambda fields: [constant if render is None else render(fields) for render, constant in pairs]
        return None

    def _template(self, text: str, names: set[str]) -> _Render:
        environment = self._environment
        names |= jinja2.meta.find_undeclared_variables(environment.parse(text)) - environment.globals.keys()
        whole = _WHOLE.fullmatch(text)
        if whole and "}}" not in whole[1]:
            expression = environment.compile_expression(whole[1], undefined_to_none=False)
            return lambda fields: _native(expression(fields))
        template = environment.from_string(text)
        render = template.root_render_func
        # One context for all rows: making one costs 8 µs, more than the rendering.
        context = template.new_context()

        def rendered(fields: _Fields) -> str:
            context.vars = dict(fields)
            return "".join(render(context))

        return rendered


class _NullError(jinja2.UndefinedError):
    """A null stood where a text was needed."""


class _Null(jinja2.Undefined):
    """A null of the row: tests as none and false, takes a default, and is never printed."""

    __slots__ = ()

    def _refuse(self) -> NoReturn:
        raise _NullError(f"{self._undefined_name or 'a value'} is null")

    __str__ = __iter__ = __len__ = _refuse

    def __eq__(self, other: object) -> bool:
        return other is None or isinstance(other, _Null)

    def __hash__(self) -> int:
        return hash(None)


class _Environment(SandboxedEnvironment):
    """Jinja's sandbox; undefined names are errors, and so is printing a null, also one inside a column."""

    def __init__(self) -> None:
        super().__init__(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, finalize=_native)
        self.tests["none"] = lambda value: value is None or isinstance(value, _Null)

    def getattr(self, obj: Any, attribute: str) -> Any:
        value = super().getattr(obj, attribute)
        return _Null(name=attribute) if value is None else value

    def getitem(self, obj: Any, argument: Any) -> Any:
        value = super().getitem(obj, argument)
        return _Null(name=str(argument)) if value is None else value


def _native(value: object) -> object:
    """The value as it is, for a text or a parameter; nulls and undefined names end here."""
    if value is None:
        raise _NullError("a value is null")
    if isinstance(value, jinja2.Undefined):
        str(value)
    return value
