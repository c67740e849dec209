"""Turns a row into a request: templates, parameters, cache key, token estimate."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

import jinja2
import jinja2.meta
import msgspec
from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from batcher.errors import JobError
from batcher.images import MOST_BYTES, Images
from batcher.job import RequestTemplate
from batcher.parameters import (
    COMBINED,
    clash,
    endpoint_of,
    has_template,
    is_template,
    misfit,
    misfit_message,
    misfits,
)
from batcher.records import FIRST_CAP, Failure, Kind, Request, Row

BYTES_PER_TOKEN = 4
"""English prose in common tokenizers; an estimate until the service has counted."""

BLOCK_BYTES = 128 * BYTES_PER_TOKEN
"""A block of the service's cache: prompts share whole ones."""

IMAGE_TOKENS = 280
"""What an image is reckoned at, whatever its size: the most that the service's reference has for one."""

_Fields = Mapping[str, object]
_Render = Callable[[_Fields], object]
_Compile = Callable[[object, set[str]], _Render | None]


class Composer:
    """The `[request]` section, compiled. `names` are the columns it needs.

    `response_format` is the API's own object where the job gave a schema. Every request asks for the first of the
    service `tiers`. Below `folders` lie the images that rows may name; relative paths start from the first.
    Raises JobError where a template cannot be compiled.
    """

    def __init__(
        self,
        template: RequestTemplate,
        response_format: Mapping[str, object] | None,
        origin: str,
        tiers: Sequence[str] = (),
        folders: Sequence[Path] = (),
    ) -> None:
        self._endpoint = template.endpoint
        self._templates = _Templates(folders)
        key = template.parameters.get("prompt_cache_key")
        self._finds_key = key == "auto"
        self.groups = self._finds_key or is_template(key)
        """Whether rows differ in what they share with others."""
        self._fixed: dict[str, object] = {}
        self._rendered: list[tuple[str, _Render]] = []
        names: set[str] = set()
        parameters = dict(template.parameters)
        if self._finds_key:
            del parameters["prompt_cache_key"]
        if response_format is not None:
            parameters["response_format"] = response_format
        if tiers:
            parameters["service_tier"] = tiers[0]
        if template.learned_cap is not None:
            parameters[template.learned_cap] = FIRST_CAP
        said = _NOTHING
        for name, value in parameters.items():
            # The words of the job's schema are the service's to read, not templates.
            render = None
            if value is not response_format:
                alone = name == "messages" and _stand_alone(value)
                render = self._named(name, value, names, origin, self._messages if alone else self._compile)
            encoded = _encode(value)
            self._fixed[name] = msgspec.Raw(encoded)  # of what is rendered, the place in the order
            if render is not None:
                self._rendered.append((name, render))
            elif name in _SPOKEN:
                said = said.and_(_measured(name, value, encoded))
        self._said = said
        self._extra: dict[str, object] = {name: msgspec.Raw(_encode(value)) for name, value in template.extra.items()}
        if len(tiers) > 1:  # behind all that a row or the job has said, so that it is found there
            self._extra["service_tier"] = self._fixed.pop("service_tier")
        self._learned_cap = template.learned_cap
        if template.learned_cap is not None:  # last in the body, so that another may be put in its place
            self._extra[template.learned_cap] = self._fixed.pop(template.learned_cap)
        # What varies is checked row by row; of messages that do not vary as a whole, each by itself as it is rendered.
        varying = {name for name, _ in self._rendered}
        self._checked = {name for name in varying if name != "messages" or not _stand_alone(parameters[name])}
        self._combined = bool(varying & COMBINED)
        self._constants = parameters
        # Where nothing varies but what is said, the rest is known for all rows.
        self._known: _Known | None = None
        if template.endpoint is not None and template.body is None and not varying - _SPOKEN:
            self._known = _known(template.endpoint, parameters)
        self._whole: _Render | None = None
        if template.body is not None:
            self._whole = self._named("body", template.body, names, origin)
            if template.endpoint is None:
                names.add("url")
        self.names = frozenset(names)

    @property
    def reads_files(self) -> bool:
        """Whether composing reads files, which does not belong on an event loop."""
        return self._templates.read_files

    def compose(self, row: Row, unit: int = 0) -> Request | Failure:
        """The request of a row; a failure where it has none: unreadable input, a null in a template, a bad value."""
        if row.problem is not None:
            return Failure(Kind.BAD_INPUT, row.problem)
        if self._whole is not None:
            return self._forward(self._whole, row, unit)
        assert self._endpoint is not None
        fields = _seen(row.fields, self.names)
        values = self._fixed.copy()
        given = self._constants.copy()
        said = self._said
        name = "body"
        try:
            for name, render in self._rendered:
                value = render(fields)
                if isinstance(value, _NESTING) or name in _SPOKEN:
                    encoded = _encode(value)
                    values[name] = msgspec.Raw(encoded)
                    if name in self._checked and name != "prompt" and not isinstance(value, str):
                        value = _decode(encoded)  # as the service sees it, null where there is a null
                    if name in _SPOKEN:
                        said = said.and_(_measured(name, value, encoded))
                else:
                    values[name] = value
                if name in self._checked and (wrong := misfit(self._endpoint, name, value)):
                    return Failure(Kind.UNSENDABLE, wrong[:300])
                given[name] = value
            if self._combined and (wrong := clash(given)):
                return Failure(Kind.UNSENDABLE, wrong[:300])
            if self._extra:
                values |= self._extra
            body = _encode(values)
        except UnicodeEncodeError:
            return Failure(Kind.UNSENDABLE, "the text holds a lone surrogate, which UTF-8 cannot carry")
        except _MisfitError as error:
            return Failure(Kind.UNSENDABLE, str(error)[:300])
        except Exception as error:  # whatever a template of the job's author raises is this row's failure
            return Failure(Kind.UNSENDABLE, f"request.{name}: {error}"[:300])
        if self._learned_cap is not None and said.prompts > 1:
            return Failure(Kind.UNSENDABLE, f'request.{self._learned_cap} = "auto": only with one prompt in a request')
        known = self._known or _known(self._endpoint, given)
        return _request(row, unit, self._endpoint, known, body, said, _prefixes(values) if self._finds_key else b"")

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
            made = whole(_seen(row.fields, self.names))
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
        said = _NOTHING
        for name in _SPOKEN & request.keys():
            said = said.and_(_measured(name, request[name], _encode(request[name])))
        return _request(row, unit, endpoint, _known(endpoint, request), body, said)

    def _named(
        self, name: str, value: object, names: set[str], origin: str, compile_: _Compile | None = None
    ) -> _Render | None:
        """As `_compile`, with the parameter's name before what is wrong. Raises JobError."""
        with _naming(f"{origin}: request.{name}"):
            return (compile_ or self._compile)(value, names)

    def _compile(self, value: object, names: set[str]) -> _Render | None:
        """A function of the row's fields, or None where the value is the same for every row."""
        if is_template(value):
            return self._templates.compile(cast(str, value), names)
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
            pairs = list(zip(parts, value, strict=True))
            return lambda fields: [constant if render is None else render(fields) for render, constant in pairs]
        return None

    def _messages(self, value: object, names: set[str]) -> _Render | None:
        """As `_compile`, of messages that say nothing of each other: each that varies is checked when it is made."""
        assert isinstance(value, list)
        parts = [self._compile(item, names) for item in value]
        if not any(parts):
            return None
        # Messages that never change are encoded once: a long system prompt costs a row nothing but a copy.
        constants = [msgspec.Raw(_encode(item)) for item in value]
        live = [render is not None and _live(item) == {"content"} for render, item in zip(parts, value, strict=True)]
        triples = list(enumerate(zip(parts, constants, live, strict=True)))

        def rendered(fields: _Fields) -> object:
            made: list[object] = []
            for index, (render, constant, is_content) in triples:
                if render is None:
                    made.append(constant)
                    continue
                message = cast(dict[str, object], render(fields))
                # A text is right wherever content stands, and most are texts.
                if not is_content or message["content"].__class__ is not str:
                    wrong = misfit_message(index, _decode(_encode(message)))
                    if wrong is not None:
                        raise _MisfitError(wrong)
                made.append(message)
            return made

        return rendered


class Template:
    """One text over named values, with the rules of `[request]`. `names` are the values it needs.

    Raises JobError, with `where` in it, where it cannot be compiled.
    """

    def __init__(self, text: str, where: str) -> None:
        names: set[str] = set()
        with _naming(where):
            self._render = _Templates(()).compile(text, names)
        self.names = frozenset(names)

    def render(self, fields: _Fields) -> object:
        """What it gives, of its own type where it is one expression. Raises whatever the template raises."""
        return self._render(_seen(fields, self.names))


class _Templates:
    """Compiles texts over a row's fields; below `folders` lie the images that rows may name."""

    def __init__(self, folders: Sequence[Path]) -> None:
        images = Images(folders)
        self._environment = _Environment(images)
        self._bare = _Environment(images)
        self._bare.globals.clear()
        self.read_files = False
        """Whether one of the texts reads files."""

    def compile(self, text: str, names: set[str]) -> _Render:
        """A function of a row's fields. The names of the fields that it needs are added to `names`."""
        environment = self._environment
        self.read_files |= "data_uri" in text
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


def repaired(request: Request, text: str, why: str) -> Request:
    """A chat's request with two messages more: what the model has answered, and why that does not fit."""
    said = text.encode("utf-8", "replace").decode()
    asked = f"This answer does not fit: {why}\nAnswer again, in the form that was asked for."
    more = _encode([{"role": "assistant", "content": said}, {"role": "user", "content": asked}])
    body = msgspec.json.decode(request.body, type=dict[str, msgspec.Raw])
    body["messages"] = msgspec.Raw(bytes(body["messages"])[:-1] + b"," + more[1:])
    whole = _encode(body)
    return msgspec.structs.replace(
        request,
        body=whole,
        prompt_tokens=request.prompt_tokens + len(more) // BYTES_PER_TOKEN,
        hash=hashlib.blake2b(whole, digest_size=16).digest(),
    )


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """What is wrong with a template, as a JobError that says where it stands."""
    try:
        yield
    except jinja2.TemplateSyntaxError as error:
        raise JobError(f"{where}: not a Jinja template: {error.message} (line {error.lineno})") from None
    except (jinja2.TemplateError, SyntaxError, RecursionError) as error:
        raise JobError(f"{where}: not a Jinja template: {error}") from None


def _seen(fields: _Fields, names: frozenset[str]) -> _Fields:
    """A row's fields as templates see them: what is not there is null, and every null knows its name."""
    if not names <= fields.keys():  # JSONL
        fields = dict.fromkeys(names) | dict(fields)
    for value in fields.values():
        if value is None or isinstance(value, _NESTING):
            return {name: _guarded(value, name) for name, value in fields.items()}
    return fields


def _stand_alone(value: object) -> bool:
    """Whether messages can be checked one by one: a list in which the roles are fixed, and no tools are called."""
    return isinstance(value, list) and all(
        isinstance(message, dict)
        and not is_template(message.get("role"))
        and message.get("role") != "tool"
        and "tool_calls" not in message
        for message in value
    )


def _live(message: Mapping[str, object]) -> set[str]:
    """What of a message varies."""
    return {key for key, value in message.items() if has_template(value)}


class _MisfitError(Exception):
    """What a row's templates gave is no message."""


class _Said(NamedTuple):
    """What the model reads, for the estimate: text in bytes of JSON, tokens that can be counted, images, prompts."""

    text: int
    tokens: int
    images: int
    prompts: int

    def and_(self, other: "_Said") -> "_Said":
        """Both together."""
        if self is _NOTHING:
            return other
        return _Said(
            self.text + other.text,
            self.tokens + other.tokens,
            self.images + other.images,
            self.prompts * other.prompts,
        )


_NOTHING = _Said(0, 0, 0, 1)
_SPOKEN = frozenset({"messages", "prompt", "tools", "response_format"})
"""The parameters that the model reads."""
_IMAGE = b'"data:image/'


def _measured(name: str, value: Any, encoded: bytes) -> _Said:
    """What one of these parameters, valid or not, adds to the estimate."""
    if name == "prompt" and isinstance(value, list | tuple) and value:
        if isinstance(value[0], str):
            return _Said(len(encoded), 0, 0, len(value))
        if isinstance(value[0], list | tuple):
            return _Said(0, sum(map(len, value)), 0, len(value))
        return _Said(0, len(value), 0, 1)
    text, images, start = len(encoded), 0, encoded.find(_IMAGE) if name == "messages" else -1
    while start >= 0:
        stop = encoded.find(b'"', start + len(_IMAGE))
        images += 1
        text -= stop - start
        start = encoded.find(_IMAGE, stop)
    return _Said(text, 0, images, 1)


class _Known(NamedTuple):
    """What the run has to know of a request beside its body. `cap` is for all choices of one prompt."""

    model: str
    cap: int
    cache_key: str | None
    tier: str | None
    stream: bool
    repeatable: bool


def _known(endpoint: str, given: Mapping[str, Any]) -> _Known:
    """Read it from the parameters, all of them checked."""
    cap = given.get("max_completion_tokens") or given.get("max_tokens") or 0
    best = given.get("best_of") or 1 if endpoint == "completions" else 1
    return _Known(
        given["model"],
        cap * max(given.get("n") or 1, best),
        given.get("prompt_cache_key"),
        given.get("service_tier"),
        given.get("stream") is True,
        given.get("temperature") == 0 or given.get("seed") is not None,
    )


_STEPS: tuple[int, ...] = tuple(sorted({2**power * part // 2 for power in range(14) for part in (2, 3)}))
"""Blocks after which the digest of a prefix is taken: ever rarer, so that a long prompt has few."""


def _prefixes(values: Mapping[str, object]) -> bytes:
    """Digests (8 bytes each) of what the model reads up to the ends of `_STEPS`: tools first, as services have it."""
    said = b"".join(
        bytes(cast(msgspec.Raw, values[name])) for name in ("tools", "messages", "prompt") if name in values
    )
    return b"".join(prefix_digests(said, [step * BLOCK_BYTES for step in _STEPS]))


def prefix_digests(said: bytes, ends: Iterable[int]) -> Iterator[bytes]:
    """Digests (8 bytes each) of a text up to each of these ever larger ends that it reaches."""
    digest, done = hashlib.blake2b(digest_size=8), 0
    for end in ends:
        if end > len(said):
            return
        digest.update(said[done:end])
        yield digest.digest()
        done = end


def prefix_tokens(place: int) -> int:
    """About how many tokens long the prefix at this place is, of those that a request has digests of."""
    return _STEPS[place] * BLOCK_BYTES // BYTES_PER_TOKEN


def keyed(request: Request, key: str) -> Request:
    """A request with a key for the service's cache. Its hash stays that of what is asked."""
    body = b'{"prompt_cache_key":' + _encode(key) + b"," + request.body[1:]  # at its end lies what may still change
    return msgspec.structs.replace(request, body=body, cache_key=key)


def _request(
    row: Row, unit: int, endpoint: str, known: _Known, body: bytes, said: _Said, prefixes: bytes = b""
) -> Request | Failure:
    """The request that has this body."""
    if said.images and len(body) > MOST_BYTES:
        return Failure(Kind.UNSENDABLE, f"a request with images may have 10 MiB, and this one has {len(body):,} bytes")
    return Request(
        unit=unit,
        row=row.position,
        model=known.model,
        body=body,
        prompt_tokens=said.text // BYTES_PER_TOKEN + said.tokens + said.images * IMAGE_TOKENS or 1,
        output_tokens=known.cap * said.prompts,
        hash=hashlib.blake2b(body, digest_size=16).digest(),
        cache_key=known.cache_key,
        endpoint=endpoint,
        tier=known.tier,
        stream=known.stream,
        repeatable=known.repeatable,
        prefixes=prefixes,
    )


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

    def __init__(self, images: Images) -> None:
        super().__init__(undefined=_Unknown, keep_trailing_newline=True, finalize=_printed)
        self.tests["none"] = lambda value: value is None or isinstance(value, _Null)
        self.filters["tojson"] = _to_json
        self.filters["data_uri"] = images.data_uri
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
