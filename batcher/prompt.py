"""Turns a row into a request: templates, parameters, cache key, token estimate."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from typing import Any, NoReturn, cast

import jinja2
import jinja2.meta
import msgspec
from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from batcher.errors import JobError
from batcher.job import RequestTemplate, endpoint_of, is_template, misfit, misfits
from batcher.records import Failure, Kind, Request, Row

BYTES_PER_TOKEN = 4
"""English prose in common tokenizers; an estimate until the service has counted."""

_Fields = Mapping[str, object]
_Render = Callable[[_Fields], object]


class Composer:
    """The `[request]` section, compiled. `names` are the columns it needs.

    `response_format` is the API's own object where the job gave a schema.
    Raises JobError where a template cannot be compiled.
    """

    def __init__(self, template: RequestTemplate, response_format: Mapping[str, object] | None, origin: str) -> None:
        self._endpoint = template.endpoint
        self._environment = _Environment()
        self._bare = _Environment()
        self._bare.globals.clear()
        self._fixed: dict[str, object] = {}
        self._rendered: list[tuple[str, _Render]] = []
        names: set[str] = set()
        parameters = dict(template.parameters)
        if response_format is not None:
            parameters["response_format"] = response_format
        for name, value in parameters.items():
            # The words of the job's schema are the service's to read, not templates.
            render = None if value is response_format else self._named(name, value, names, origin)
            if render is None:
                self._fixed[name] = msgspec.Raw(msgspec.json.encode(value))
            else:
                self._rendered.append((name, render))
        # Parameters are no part of the prompt: only what is said counts in the estimate.
        self._apart = sum(
            len(name) + len(msgspec.json.encode(value)) + 4
            for name, value in parameters.items()
            if name in self._fixed and name not in ("messages", "prompt")
        )
        # What varies is checked row by row, but for texts inside messages: those were checked with the job.
        varying = {name for name, _ in self._rendered}
        self._checked = {name for name in varying if name != "messages" or is_template(parameters[name])}
        self._constants = parameters
        self._whole: _Render | None = None
        if template.body is not None:
            self._whole = self._named("body", template.body, names, origin)
            if template.endpoint is None:
                names.add("url")
        self.names = frozenset(names)

    def compose(self, row: Row, unit: int = 0) -> Request | Failure:
        """The request of a row; a failure where it has none: unreadable input, a null in a template, a bad value."""
        if row.problem is not None:
            return Failure(Kind.BAD_INPUT, row.problem)
        if self._whole is not None:
            return self._forward(self._whole, row, unit)
        assert self._endpoint is not None
        fields = self._seen(row)
        values = self._fixed.copy()
        name = "body"
        try:
            for name, render in self._rendered:
                value = render(fields)
                if name in self._checked and (wrong := misfit(self._endpoint, name, value)):
                    return Failure(Kind.UNSENDABLE, wrong)
                values[name] = value
            body = _encode(values)
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
            prompt_tokens=max(1, (len(body) - self._apart) // BYTES_PER_TOKEN),
            output_tokens=cast(int, cap) * cast(int, self._value("n", values) or 1),
            hash=hashlib.blake2b(body, digest_size=16).digest(),
            cache_key=cast(str | None, self._value("prompt_cache_key", values)),
            endpoint=self._endpoint,
        )

    def unserved(self, row: Row) -> str | None:
        """Say so where a row's `url` is one that is not served, or None."""
        if self._endpoint is not None or row.problem is not None or endpoint_of(url := row.fields.get("url")):
            return None
        return f"url: /v1/chat/completions or /v1/completions, not {url!r}"[:200]

    def _forward(self, whole: _Render, row: Row, unit: int) -> Request | Failure:
        """The request of a row that holds it whole; its bytes are not touched where they are bytes or text already."""
        if wrong := self.unserved(row):
            return Failure(Kind.UNSENDABLE, wrong)
        endpoint = self._endpoint or cast(str, endpoint_of(row.fields.get("url")))
        try:
            made = whole(self._seen(row))
            match made:
                case msgspec.Raw():
                    body = bytes(made)
                case str():
                    body = made.encode()
                case _:
                    body = _encode(made)
            request = _decode(body)
        except UnicodeEncodeError:
            return Failure(Kind.UNSENDABLE, "the text holds a lone surrogate, which UTF-8 cannot carry")
        except Exception as error:  # whatever a template of the job's author raises is this row's failure
            return Failure(Kind.UNSENDABLE, f"request.body: {error}"[:300])
        if type(request) is not dict:
            return Failure(Kind.UNSENDABLE, "request.body: a request is a JSON object")
        if wrong := misfits(endpoint, request):
            return Failure(Kind.UNSENDABLE, f"request.body: {wrong}"[:300])
        said = _encode(request["messages" if endpoint == "chat" else "prompt"])
        cap = request.get("max_completion_tokens") or request.get("max_tokens") or 0
        return Request(
            unit=unit,
            row=row.position,
            model=request["model"],
            body=body,
            prompt_tokens=max(1, len(said) // BYTES_PER_TOKEN),
            output_tokens=cap * (request.get("n") or 1),
            hash=hashlib.blake2b(body, digest_size=16).digest(),
            cache_key=request.get("prompt_cache_key"),
            endpoint=endpoint,
        )

    def _seen(self, row: Row) -> _Fields:
        """A row's fields as templates see them: what is not there is null, and every null knows its name."""
        fields = row.fields
        if not self.names <= fields.keys():  # JSONL
            fields = dict.fromkeys(self.names) | dict(fields)
        for value in fields.values():
            if value is None or isinstance(value, _NESTING):
                return {name: _guarded(value, name) for name, value in fields.items()}
        return fields

    def _value(self, name: str, values: Mapping[str, object]) -> object:
        return values[name] if name in self._checked else self._constants.get(name)

    def _named(self, name: str, value: object, names: set[str], origin: str) -> _Render | None:
        """As `_compile`, with the parameter's name before what is wrong. Raises JobError."""
        try:
            return self._compile(value, names)
        except jinja2.TemplateSyntaxError as error:
            wrong = f"{error.message} (line {error.lineno})"
            raise JobError(f"{origin}: request.{name}: not a Jinja template: {wrong}") from None
        except (jinja2.TemplateError, SyntaxError, RecursionError) as error:
            raise JobError(f"{origin}: request.{name}: not a Jinja template: {error}") from None

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
            # Messages that never change are encoded once: a long system prompt costs a row nothing but a copy.
            constants = [msgspec.Raw(_encode(item)) if isinstance(item, _NESTING) else item for item in value]
            pairs = list(zip(parts, constants, strict=True))
            return lambda fields: [constant if render is None else render(fields) for render, constant in pairs]
        return None

    def _template(self, text: str, names: set[str]) -> _Render:
        environment = self._environment
        tree = environment.parse(text)
        if other := next(tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)), None):
            raise jinja2.TemplateSyntaxError("there are no other templates to take in", other.lineno)
        called = {call.node.name for call in tree.find_all(nodes.Call) if isinstance(call.node, nodes.Name)}
        # A column may have the name of a function: `{{ range }}` is the column, `range(3)` the function.
        unknown = jinja2.meta.find_undeclared_variables(self._bare.parse(text))
        names |= unknown - (environment.globals.keys() & called)

        sole = _sole_expression(environment.parse(text.strip()))
        if sole is None:
            template = environment.from_string(text)
        else:
            whole = nodes.Template([nodes.Assign(nodes.Name("result", "store"), sole, lineno=1)], lineno=1)
            whole.set_environment(environment)
            template = environment.from_string(whole)
        render = template.root_render_func
        # One context for all rows: making one costs 8 µs, more than the rendering.
        context = template.new_context()

        def rendered(fields: _Fields) -> str:
            context.vars = dict(fields)
            return "".join(render(context))

        def native(fields: _Fields) -> object:
            context.vars = dict(fields)
            deque(render(context), 0)
            return _native(context.vars["result"])

        return rendered if sole is None else native


def _sole_expression(tree: nodes.Template) -> nodes.Expr | None:
    """The expression of a text that is nothing else."""
    match tree.body:
        case [nodes.Output(nodes=[expression])] if not isinstance(expression, nodes.TemplateData):
            return expression
    return None


class _Unknown(jinja2.StrictUndefined):
    """A name or a field that is not there: an error wherever it is used, and where a list that holds it is printed."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)  # raises


class _Null(jinja2.Undefined):
    """A null of the row: tests as none and false, takes a default, and is never printed."""

    __slots__ = ()

    @property
    def _undefined_message(self) -> str:
        return f"{self._undefined_name} is null"

    def _refuse(self, *_: object) -> NoReturn:
        self._fail_with_undefined_error()

    __str__ = __repr__ = __iter__ = __len__ = __contains__ = _refuse

    def __eq__(self, other: object) -> bool:
        return other is None or isinstance(other, _Null)

    def __hash__(self) -> int:
        return hash(None)


_NESTING = (dict, list, tuple)


def _guarded(value: object, name: str) -> object:
    """The value with each null in it, however deep, replaced by one that knows its name and is never printed."""
    if value is None:
        return _Null(name=name)
    if isinstance(value, dict):
        return {key: item if item.__class__ is str else _guarded(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list):
        return [item if item.__class__ is str else _guarded(item, name) for item in value]
    if isinstance(value, tuple):
        return tuple(_guarded(item, name) for item in value)
    return value


def _as_json(value: object) -> None:
    """A null inside a structure is JSON's; all else that has no JSON is the row's failure."""
    if isinstance(value, _Unknown):
        str(value)  # raises
    if not isinstance(value, _Null):
        raise TypeError(f"a {type(value).__name__} has no place in JSON")


_encode = msgspec.json.Encoder(enc_hook=_as_json, decimal_format="number").encode
_decode = msgspec.json.Decoder().decode


def _to_json(value: object, indent: int | None = None) -> str:
    """The filter `tojson`: JSON as the body has it; Jinja's own is escaped for HTML."""
    text = _encode(_native(value))
    return (text if indent is None else msgspec.json.format(text, indent=indent)).decode()


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox; undefined names are errors, and so is printing a null, also one inside a column."""

    def __init__(self) -> None:
        super().__init__(undefined=_Unknown, keep_trailing_newline=True, finalize=_printed)
        self.tests["none"] = lambda value: value is None or isinstance(value, _Null)
        self.filters["tojson"] = _to_json
        # One row makes one request, however often it is composed.
        del self.filters["random"], self.globals["lipsum"]

    def getattr(self, obj: Any, attribute: str) -> Any:
        """A column's field goes before a method of that name: `items`, `keys`, `count`."""
        return obj[attribute] if isinstance(obj, dict) and attribute in obj else super().getattr(obj, attribute)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """What a method does not find is a null as well."""
        value = super().call(context, obj, *args, **kwargs)
        return _Null(name="what a call returned") if value is None else value


def _printed(value: object) -> object:
    """The value as a template prints it: a decimal with the digits that it has, never as 1E-7."""
    return format(value, "f") if value.__class__ is Decimal else _native(value)


def _native(value: object) -> object:
    """The value as it is, for a text or a parameter; what has no text of its own ends here."""
    if value.__class__ is str:
        return value
    if value is None:
        raise jinja2.UndefinedError("a value is null")
    if isinstance(value, jinja2.Undefined):
        str(value)  # raises
    if callable(value) or isinstance(value, Iterator):
        raise TypeError(f"a {type(value).__name__} is no value; call it, or make it a list")
    return value
