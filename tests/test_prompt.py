"""From row to request: what a template may do, what a null in it means, and which bytes are sent."""

import json
from collections.abc import Mapping

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batcher.errors import JobError
from batcher.job import Job
from batcher.prompt import Composer
from batcher.records import Failure, Kind, Request, Row

Fields = Mapping[str, object]


def composer(**request: object) -> Composer:
    """The composer of a job with this request."""
    job = Job(input={"path": "rows.jsonl"}, request={"model": "m", **request}, output={"path": "out"})
    return Composer(job.request, None, "job.toml")


def composed(fields: Fields, **request: object) -> Request:
    """The request of a row that has one."""
    made = composer(**request).compose(Row(7, fields))
    assert isinstance(made, Request), made
    return made


def body(fields: Fields, **request: object) -> dict[str, object]:
    """The body of a row's request, read back."""
    decoded: dict[str, object] = json.loads(composed(fields, **request).body)
    return decoded


def content(fields: Fields, template: str) -> object:
    """What a prompt's template makes of a row."""
    messages = body(fields, prompt=template)["messages"]
    assert isinstance(messages, list)
    return messages[0]["content"]


def rendered(fields: Fields, template: str) -> object:
    """What a template makes of a row where any value may stand."""
    parameters = body(fields, prompt="hi", model_parameters={"x": template})["model_parameters"]
    assert isinstance(parameters, dict)
    return parameters["x"]


def failure(fields: Fields, **request: object) -> Failure:
    """The failure of a row that has no request."""
    made = composer(**request).compose(Row(7, fields))
    assert isinstance(made, Failure), made
    assert made.kind is Kind.UNSENDABLE
    return made


# Templates


def test_a_chat_request() -> None:
    """A row becomes the API's own body, with the job's parameters and the row's texts in it."""
    made = body({"text": "Hällo", "lang": "de"}, system="Be short.", prompt="[{{ lang }}]\n{{ text }}", temperature=0)
    assert made == {
        "model": "m",
        "temperature": 0,
        "messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "[de]\nHällo"}],
    }


def test_a_completions_request() -> None:
    """The completions endpoint takes a bare prompt."""
    made = composed({"text": "Once"}, endpoint="completions", prompt="{{ text }} upon", max_tokens=9)
    assert json.loads(made.body) == {"model": "m", "max_tokens": 9, "prompt": "Once upon"}
    assert made.output_tokens == 9


def test_a_request_without_templates() -> None:
    """What does not vary is sent as it is, also where it looks a little like a template."""
    assert content({}, "a } b }} c { d") == "a } b }} c { d"
    assert composer(prompt="always the same").names == frozenset()


def test_newlines_stay() -> None:
    """The last newline of a text belongs to it."""
    assert content({"a": "x"}, "1 {{ a }}\n") == "1 x\n"


def test_the_format_of_the_answer_is_sent() -> None:
    """The API's object that was made of the job's schema goes into every body."""
    job = Job(input={"path": "x"}, request={"model": "m", "prompt": "{{ a }}"}, output={"path": "o"})
    wanted = {"type": "json_schema", "json_schema": {"name": "label", "strict": True, "schema": {}}}
    made = Composer(job.request, wanted, "job").compose(Row(0, {"a": "x"}))
    assert isinstance(made, Request)
    assert json.loads(made.body)["response_format"] == wanted


@pytest.mark.parametrize(
    ("template", "names"),
    [
        ("{{ a }} {{ b.c }} {{ d['e'] }}", {"a", "b", "d"}),
        ("{% if a %}{{ b }}{% else %}{{ c }}{% endif %}", {"a", "b", "c"}),
        ("{% for x in xs %}{{ loop.index }} {{ x }}{% endfor %}", {"xs"}),
        ("{% set y = a %}{{ y }}", {"a"}),
        ("{{ a is defined and b }}", {"a", "b"}),
        ("{{ (a or b) | default(c) }}", {"a", "b", "c"}),
        ("{% for i in range(n) %}{{ i }}{% endfor %}", {"n"}),
        ("{{ range }} {{ dict }} {{ joiner }}", {"range", "dict", "joiner"}),
        ("{{ lipsum() }}", {"lipsum"}),
        ("{# {{ no }} #}{{ yes }}", {"yes"}),
    ],
)
def test_the_columns_that_are_needed(template: str, names: set[str]) -> None:
    """The names that a template does not define itself are known before a row is read."""
    assert composer(prompt=template).names == names


def test_names_are_found_in_every_parameter() -> None:
    """Every string of the request may be a template, however deep."""
    made = composer(
        model="{{ a }}",
        messages=[{"role": "{{ b }}", "content": [{"type": "text", "text": "see {{ c }}"}]}],
        stop=["{{ d }}"],
        user="{{ e }}",
        response_format={"type": "{{ f }}"},
    )
    assert made.names == set("abcdef")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ a", "unexpected end of template"),
        ("{{ a }", "unexpected '}'"),
        ("line\n{{ a b }}", "(line 2)"),
        ("{% if a %}", "Unexpected end of template"),
        ("{{ a | uper }}", "No filter named 'uper'"),
        ("{{ a is odder }}", "No test named 'odder'"),
        ("{% frobnicate %}", "unknown tag 'frobnicate'"),
        ("{% include 'other' %}", "no other templates"),
        ("{% extends a %}", "no other templates"),
        ("{% import 'x' as y %}", "no other templates"),
        ("{% from 'x' import y %}", "no other templates"),
        ("{{ a | random }}", "No filter named 'random'"),
        ("{% for a in b %}" * 30 + "{% endfor %}" * 30, "too many statically nested blocks"),
        ("{{ " + "(" * 3000 + "a" + ")" * 3000 + " }}", "recursion"),
    ],
)
def test_a_template_that_is_none_is_found_at_once(template: str, said: str) -> None:
    """A mistake in a template is said in one line, with its key, before any row is read."""
    with pytest.raises(JobError) as caught:
        composer(prompt=template)
    message = str(caught.value)
    assert message.startswith("job.toml: request.messages: not a Jinja template: ")
    assert said in message
    assert len(message.splitlines()) == 1


# Types


@pytest.mark.parametrize(
    "value",
    [0, 1.5, True, "text", "", [1, "a", {"b": [None]}], {"role": "user", "name": None}, [], {}, -1, 2**63],
)
@pytest.mark.parametrize(
    "template", ["{{ a }}", "{{a}}", "  {{ a }}\n", "{{- a -}}", "{# why #}{{ a }}", "{{ {'x': {'y': a}}.x.y }}"]
)
def test_a_sole_expression_keeps_its_type(template: str, value: object) -> None:
    """A string that is exactly one expression is the expression's value; nulls inside of it stay JSON's."""
    assert rendered({"a": value}, template) == value


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("n={{ a }}", "n=5"),
        ("{{ a }}{{ a }}", "55"),
        ("{{ a }}}}", "5}}"),
        ("{% if true %}{{ a }}{% endif %}", "5"),
        ("{{ a | string }}", "5"),
        ("{{ a ~ '' }}", "5"),
    ],
)
def test_all_else_is_text(template: str, text: str) -> None:
    """Where anything stands beside the expression, the value becomes a text."""
    assert content({"a": 5}, template) == text


def test_parameters_may_differ_by_row() -> None:
    """Model, numbers, lists and tables may come from columns."""
    fields = {"which": "b", "t": 0.5, "cap": 10, "stops": ["x", "y"], "form": {"type": "json_object"}, "text": "hi"}
    request = composed(
        fields,
        model="model-{{ which }}",
        prompt="{{ text }}",
        temperature="{{ t }}",
        max_completion_tokens="{{ cap }}",
        n="{{ cap // 5 }}",
        stop="{{ stops }}",
        response_format="{{ form }}",
    )
    assert request.model == "model-b"
    assert request.output_tokens == 20
    assert json.loads(request.body) == {
        "model": "model-b",
        "temperature": 0.5,
        "max_completion_tokens": 10,
        "n": 2,
        "stop": ["x", "y"],
        "response_format": {"type": "json_object"},
        "messages": [{"role": "user", "content": "hi"}],
    }


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("temperature", 3, "temperature: a number from 0 to 2, not 3"),
        ("temperature", "hot", "temperature: a number from 0 to 2, not 'hot'"),
        ("temperature", float("nan"), "temperature: a number from 0 to 2, not nan"),
        ("temperature", True, "temperature: a number from 0 to 2, not True"),
        ("max_completion_tokens", 0, "max_completion_tokens: a whole number from 1, not 0"),
        ("max_completion_tokens", 1.5, "max_completion_tokens: a whole number from 1, not 1.5"),
        ("model", 5, "model: a text of at least 1, not 5"),
        ("model", "", "model: a text of at least 1, not ''"),
        ("n", 0, "n: a whole number from 1 to 128, not 0"),
        ("stop", ["a"] * 5, "stop: a text or a list of at least 1 of at most 4"),
        ("seed", 2**70, "seed: a whole number, not 1180591620717411303424"),
        ("reasoning_effort", "huge", "reasoning_effort: none or low or medium or high, not 'huge'"),
        ("prompt_cache_key", "k" * 1025, "prompt_cache_key: a text of at most 1,024"),
        ("temperature", None, "a is null"),
    ],
)
def test_a_parameter_out_of_range_is_the_rows_failure(name: str, value: object, said: str) -> None:
    """A column's value that the API would refuse fails its row, before it is sent, in the words of the job file."""
    request: dict[str, object] = {"prompt": "hi", name: "{{ a }}"}
    assert said in failure({"a": value}, **request).message


def test_lists_are_checked_too() -> None:
    """A list with templates in it is checked as a whole."""
    assert body({"a": "x"}, prompt="hi", stop=["{{ a }}", "y"])["stop"] == ["x", "y"]
    assert "stop[0]: expected str" in failure({"a": 5}, prompt="hi", stop=["{{ a }}", "y"]).message


# Messages


def test_a_conversation_with_templates_inside() -> None:
    """Messages may be nested; their order, and that of their keys, is the job's."""
    messages = [
        {"role": "system", "content": "You are {{ who }}."},
        {"role": "user", "content": [{"type": "text", "text": "{{ a }}"}, {"type": "text", "text": "fixed"}]},
        {"content": "fixed", "role": "assistant"},
        {"role": "user", "content": "{{ b }}"},
    ]
    made = composed({"who": "kind", "a": "1", "b": "2"}, messages=messages).body.decode()
    assert made == (
        '{"model":"m","messages":[{"role":"system","content":"You are kind."},'
        '{"role":"user","content":[{"type":"text","text":"1"},{"type":"text","text":"fixed"}]},'
        '{"content":"fixed","role":"assistant"},{"role":"user","content":"2"}]}'
    )


def test_a_whole_conversation_in_a_column() -> None:
    """`messages` may be a column; the nulls of its struct are JSON's nulls, and its shape is checked."""
    conversation = [{"role": "system", "content": "s", "name": None}, {"role": "user", "content": "u", "name": "x"}]
    assert body({"talk": conversation}, messages="{{ talk }}")["messages"] == conversation
    assert body({"talk": conversation}, messages="{{ talk[1:] }}")["messages"] == conversation[1:]
    assert (
        failure({"talk": [{"content": "c"}]}, messages="{{ talk }}").message == "messages[0]: every message has a role"
    )
    assert failure({"talk": [{"role": None}]}, messages="{{ talk }}").message == "messages[0]: every message has a role"
    assert "messages: a list of at least 1, not []" in failure({"talk": []}, messages="{{ talk }}").message
    assert "talk is null" in failure({"talk": None}, messages="{{ talk }}").message
    assert "messages[0]: expected object" in failure({"talk": ["hi"]}, messages="{{ talk }}").message


# Nulls

NULLS: Fields = {
    "a": None,
    "meta": {"lang": None, "tags": ["x", None], "deep": [{"score": None}]},
    "pairs": [("k", None)],
    "empty": {},
    "text": "hi",
}


@pytest.mark.parametrize(
    ("template", "column"),
    [
        ("{{ a }}", "a"),
        ("[{{ a }}]", "a"),
        ("{{ a | upper }}!", "a"),
        ("{{ a | lower }}", "a"),
        ("{{ a | trim }}", "a"),
        ("{{ a | string }}", "a"),
        ("{{ a | title | replace('N', 'M') }}", "a"),
        ("{{ a | e }}", "a"),
        ("{{ a | tojson }}", "a"),
        ("{{ a | int }}", "a"),
        ("{{ a | length }}", "a"),
        ("{{ a | list }}", "a"),
        ("{{ a | join(',') }}", "a"),
        ("{{ a | truncate(3) }}", "a"),
        ("{{ a | pprint }}", "a"),
        ("{{ a | indent }}", "a"),
        ("{{ a ~ 'x' }}", "a"),
        ("{{ a + 1 }}", "a"),
        ("{{ 1 + a }}", "a"),
        ("{{ a < 1 }}", "a"),
        ("{{ a.b }}", "a"),
        ("{{ a[0] }}", "a"),
        ("{{ a() }}", "a"),
        ("{{ 'x' in a }}", "a"),
        ("{{ '%s' % a }}", "a"),
        ("{{ '%s' | format(a) }}", "a"),
        ("{{ '{}'.format(a) }}", "a"),
        ("{{ [a, text] | join('-') }}", "a"),
        ("{{ [text, a] }}!", "a"),
        ("{{ {'k': a} }}!", "a"),
        ("{% for x in a %}{{ x }}{% endfor %}", "a"),
        ("{% set b = a %}{{ b }}", "a"),
        ("{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m(a) }}", "a"),
        ("{{ meta.lang }}", "meta.lang"),
        ("{{ meta['lang'] }}!", "meta.lang"),
        ("{{ meta.lang | upper }}", "meta.lang"),
        ("{{ meta.items() | list }}!", "meta.lang"),
        ("{{ meta.get('lang') }}!", "meta.lang"),
        ("{{ meta }}!", "meta.lang"),
        ("{{ meta | string }}", "meta.lang"),
        ("{{ meta.tags | join(', ') }}", "meta.tags"),
        ("{{ meta.tags | map('upper') | join }}", "meta.tags"),
        ("{% for t in meta.tags %}{{ t }}{% endfor %}", "meta.tags"),
        ("{{ meta.tags | last }}!", "meta.tags"),
        ("{{ meta.tags[1] }}!", "meta.tags"),
        ("{{ meta.deep | map(attribute='score') | join }}", "meta.deep.score"),
        ("{{ pairs[0][1] }}!", "pairs"),
        ("{{ pairs }}!", "pairs"),
    ],
)
def test_a_null_in_a_template_is_the_rows_failure(template: str, column: str) -> None:
    """A null that would be printed, or reckoned with, fails its row and names the column, through every filter."""
    message = failure(NULLS, prompt=template).message
    assert message == f"request.messages: {column} is null"


@pytest.mark.parametrize(
    "template",
    ["{{ empty.get('x') }}!", "{{ empty.get('x') | upper }}", "{{ empty.get('x') ~ '!' }}", "{{ [empty.get('x')] }}!"],
)
def test_what_a_method_does_not_find_is_a_null_too(template: str) -> None:
    """Python's own None, as methods return it, is treated alike."""
    assert "is null" in failure(NULLS, prompt=template).message


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ a is none }}", True),
        ("{{ text is none }}", False),
        ("{{ a is not none }}", False),
        ("{{ a == none }}", True),
        ("{{ none == a }}", True),
        ("{{ a is defined }}", False),
        ("{% if a %}yes{% else %}no{% endif %}", "no"),
        ("{% if not a %}none{% endif %}", "none"),
        ("{{ a or 'nothing' }}", "nothing"),
        ("{{ text if a is none else a }}", "hi"),
        ("{{ a | default('') }}", ""),
        ("[{{ a | d('-') }}]", "[-]"),
        ("{{ meta.lang | default('en') }}", "en"),
        ("{{ meta.tags | reject('none') | join }}", "x"),
        ("{{ meta.tags | select | join }}", "x"),
        ("{% for t in meta.tags if t is not none %}{{ t }}{% endfor %}", "x"),
        ("{{ meta | tojson }}", '{"lang":null,"tags":["x",null],"deep":[{"score":null}]}'),
        ("{{ none in meta.tags }}", True),
        ("{{ empty.get('x') | default('-') }}", "-"),
        ("{{ 'None' }}", "None"),
    ],
)
def test_a_null_can_be_asked_for(template: str, text: object) -> None:
    """Tests, conditions and defaults see a null; a structure with nulls can be written as JSON."""
    assert rendered(NULLS, template) == text


def test_the_word_of_a_row_is_left_alone() -> None:
    """A text that happens to be the word None is a text."""
    assert content({"a": "None"}, "{{ a }} {{ a | upper }}") == "None NONE"


# Undefined names and values that are none


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ missing }}", "missing is null"),
        ("{{ text.missing }}", "has no attribute 'missing'"),
        ("{{ empty.missing }}!", "has no attribute 'missing'"),
        ("{{ meta.tags[9] }}!", "has no element 9"),
        ("{{ text.upper }}!", "no value; call it"),
        ("{{ text.upper }}", "no value; call it"),
        ("{{ meta.tags | map('string') }}!", "no value"),
        ("{{ meta.tags | map('string') }}", "no value"),
        ("{{ text + 1 }}", "can only concatenate str"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ range(10**9) }}", "Range too big"),
        ("{{ [meta] | map(attribute='missing') | list }}!", "has no attribute 'missing'"),
        ("{{ [meta] | map(attribute='missing') | list }}", "has no attribute 'missing'"),
    ],
)
def test_what_has_no_value_is_the_rows_failure(template: str, said: str) -> None:
    """A row without the name that a template wants fails, as does a function or an error where a value belongs."""
    assert said in failure(NULLS, prompt=template).message


def test_a_field_goes_before_a_method() -> None:
    """A struct's field is its field, also when Python's dictionaries have a method of that name."""
    fields = {"r": {"items": "apples", "keys": 2, "count": 3}}
    assert content(fields, "{{ r.items }} {{ r.keys }} {{ r.count }}") == "apples 2 3"
    assert content({"r": {"a": 1}}, "{% for k, v in r.items() %}{{ k }}={{ v }}{% endfor %}") == "a=1"


def test_a_column_may_be_called_like_a_function() -> None:
    """A column named as one of Jinja's functions, or as one of our own names, is the column."""
    fields = {"range": "1-5", "dict": "d", "result": "r", "loop": "l"}
    assert content(fields, "{{ range }} {{ dict }} {{ result }}") == "1-5 d r"
    assert content(fields, "{{ result }}") == "r"
    assert content(fields, "{{ range }}") == "1-5"
    assert content({"n": 3}, "{{ range(n) | join }}") == "012"


# The sandbox


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ a.__init__.__globals__ }}",
        "{{ a['__class__'] }}",
        "{{ a | attr('__class__') }}",
        "{{ [a] | map(attribute='__class__') | list }}",
        "{{ '{0.__class__}'.format(a) }}",
        "{{ '{0.__class__}' | format(a) | attr('__class__') }}",
        "{{ '{a.__class__}'.format_map({'a': a}) }}",
        "{{ range.__globals__ }}",
        "{{ range(1).__class__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ joiner.__init__.__globals__.os }}",
        "{{ (1).__class__.__base__ }}",
        "{% for x in [].__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
        "{{ xs.append(1) }}",
        "{{ d.update({'x': 1}) }}",
        "{{ d.pop('k') }}",
    ],
)
def test_the_sandbox_holds(template: str) -> None:
    """A template reaches no internals of Python, and changes nothing of the row."""
    fields = {"a": "x", "xs": [0], "d": {"k": 1}, "range": "r", "cycler": "c", "joiner": "j"}
    made = composer(prompt=f"[{template}]").compose(Row(0, fields))
    assert isinstance(made, Failure), made
    assert (fields["xs"], fields["d"]) == ([0], {"k": 1})


EVIL = "{{ 7 * 7 }} {% for x in [1] %}{{ x }}{% endfor %} {{ ''.__class__ }} {0.__class__} %(a)s ${a}"


@pytest.mark.parametrize("template", ["{{ a }}", "<{{ a }}>", "{{ a | upper | lower }}", "{{ [a] | first }}"])
def test_row_data_is_never_a_template(template: str) -> None:
    """A row's text that looks like a template is a text."""
    text = content({"a": EVIL}, template)
    assert isinstance(text, str)
    assert "{{ 7 * 7 }}" in text
    assert "49" not in text
    assert "{% for x in [1] %}" in text


# One row, one request


def test_nothing_is_left_behind_for_the_next_row() -> None:
    """What a template sets for one row is unknown in the next."""
    made = composer(prompt="{% if first %}{% set x = text %}{% endif %}{% if x is defined %}{{ x }}{% endif %}.")
    bodies = [made.compose(Row(0, {"first": first, "text": "secret"})) for first in (True, False, True)]
    assert [b"secret" in made.body for made in bodies if isinstance(made, Request)] == [True, False, True]
    sole = composer(prompt="{{ result | default('gone') }}")
    bodies = [sole.compose(Row(0, fields)) for fields in ({"result": "here"}, {})]
    assert [b"gone" in made.body for made in bodies if isinstance(made, Request)] == [False, True]


def test_a_failed_row_does_not_spoil_the_next() -> None:
    """After a row without a request the next one is as it would have been."""
    made = composer(prompt="{{ a }} {{ b | upper }}")
    before = made.compose(Row(0, {"a": "1", "b": "x"}))
    assert isinstance(made.compose(Row(1, {"a": "1", "b": None})), Failure)
    assert made.compose(Row(0, {"a": "1", "b": "x"})) == before


@given(
    st.dictionaries(st.sampled_from(["a", "b", "c"]), st.text(max_size=20), min_size=3),
    st.integers(min_value=0, max_value=2**60),
)
@settings(max_examples=30, deadline=None)
def test_the_body_is_stable(fields: dict[str, str], position: int) -> None:
    """The same row makes the same bytes and the same hash, whichever composer makes them, whatever came before."""
    request: dict[str, object] = {"prompt": "{{ a }}|{{ b }}", "system": "{{ c }}", "user": "{{ a }}", "temperature": 0}
    first = composer(**request)
    first.compose(Row(1, {"a": "x", "b": None, "c": {"d": [1]}}))
    turned = dict(reversed(fields.items()))
    one, other = first.compose(Row(position, fields)), composer(**request).compose(Row(position, turned), 3)
    if isinstance(one, Request):
        assert isinstance(other, Request)
        assert (one.body, one.hash) == (other.body, other.hash)
        assert (one.row, one.unit, other.unit) == (position, 0, 3)
    else:
        assert isinstance(other, Failure)


def test_hashes_tell_requests_apart() -> None:
    """Two rows whose requests differ in a byte have different hashes; the hash has 16 bytes."""
    hashes = {composed({"a": str(number)}, prompt="{{ a }}").hash for number in range(100)}
    assert len(hashes) == 100
    assert {len(digest) for digest in hashes} == {16}


# What is said about a request


def test_the_estimate_of_tokens() -> None:
    """A prompt is estimated at four bytes a token, the answer at its cap, times the number of choices."""
    request = composed({"a": "word " * 400}, prompt="{{ a }}", max_completion_tokens=100, n=3)
    assert 500 <= request.prompt_tokens <= 600
    assert request.output_tokens == 300
    assert composed({"a": ""}, prompt="{{ a }}").prompt_tokens >= 1
    assert composed({"a": "x"}, prompt="{{ a }}").output_tokens == 0


def test_the_cache_key() -> None:
    """A cache key is sent, and known to the scheduler."""
    request = composed({"a": "x", "group": "g1"}, prompt="{{ a }}", prompt_cache_key="job-{{ group }}")
    assert request.cache_key == "job-g1"
    assert json.loads(request.body)["prompt_cache_key"] == "job-g1"
    assert composed({"a": "x"}, prompt="{{ a }}", prompt_cache_key="always").cache_key == "always"
    assert composed({"a": "x"}, prompt="{{ a }}").cache_key is None


def test_a_row_that_could_not_be_read() -> None:
    """A row's own problem is its failure, in the words of the one who read it."""
    made = composer(prompt="{{ a }}").compose(Row(3, {}, "line 4: not JSON"))
    assert made == Failure(Kind.BAD_INPUT, "line 4: not JSON")


@pytest.mark.parametrize("template", ["{{ a }}", "<{{ a }}>"])
def test_a_lone_surrogate_cannot_be_sent(template: str) -> None:
    """A text that UTF-8 cannot carry fails its row; it is never sent changed."""
    assert "lone surrogate" in failure({"a": "x\ud800"}, prompt=template).message


# Whatever comes

SCALARS = st.one_of(
    st.none(),
    st.text(alphabet=st.characters(), max_size=10),
    st.sampled_from(["\ud800", "{{ a }}", "", "None"]),
    st.integers(),
    st.integers(min_value=-(10**30), max_value=10**30),
    st.floats(),
    st.booleans(),
    st.binary(max_size=5),
    st.datetimes(),
    st.dates(),
    st.times(),
    st.timedeltas(),
    st.decimals(allow_nan=False, allow_infinity=False),  # no input has others
    st.complex_numbers(),
    st.fractions(),
    st.sets(st.integers(), max_size=2),
    st.just(object()),
    st.just(len),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(
            st.one_of(st.sampled_from(["b", "role", "content", "items"]), st.integers()), inner, max_size=3
        ),
    ),
    max_leaves=6,
)
ANY = [
    composer(prompt="{{ a }}"),
    composer(prompt="<{{ a }}> {{ b }}"),
    composer(prompt="{{ a | upper }} {{ b | length }} {% for x in c %}{{ x }}{% endfor %}"),
    composer(prompt="{{ a.b }}{{ b['x'] }}{{ c | tojson }}{{ a | join }}"),
    composer(messages="{{ a }}", temperature="{{ b }}", max_completion_tokens="{{ c }}"),
    composer(
        model="{{ a }}", messages=[{"role": "user", "content": [{"type": "text", "text": "{{ b }}"}]}], stop=["{{ c }}"]
    ),
    composer(endpoint="completions", prompt="{{ a }}", n="{{ b }}", prompt_cache_key="{{ c }}"),
    composer(endpoint="completions", prompt=["{{ a }}", "{{ b }}"], logprobs="{{ c }}", best_of=2, n="{{ a }}"),
    composer(messages=[{"role": "{{ a }}", "content": "{{ b }}"}, {"role": "user", "content": "{{ c }}"}]),
    composer(prompt="{{ a }}", tools="{{ b }}", tool_choice="{{ c }}", stream="{{ a }}", logit_bias="{{ b }}"),
    composer(prompt="{{ a | data_uri }}", prediction={"type": "content", "content": "{{ b }}"}, logprobs="{{ c }}"),
    composer(prompt="{{ a | default('') }}{{ b or c }}", response_format="{{ a }}", user="{{ b ~ c }}"),
]


@given(st.dictionaries(st.sampled_from(["a", "b", "c"]), VALUES), st.sampled_from(ANY))
@settings(max_examples=250, deadline=None)
def test_no_row_breaks_the_composing(fields: dict[str, object], made: Composer) -> None:
    """Whatever a row holds, it becomes a request that is JSON, or a failure that says why."""
    result = made.compose(Row(0, fields))
    if isinstance(result, Failure):
        assert result.kind is Kind.UNSENDABLE
        assert 0 < len(result.message) <= 300
    else:
        decoded = json.loads(result.body)
        assert decoded["model"] == result.model
        assert result.prompt_tokens >= 1
        assert result.output_tokens >= 0


TEXTS = [
    "{{ a }}|{{ b }}",
    "{{ a | upper }}{{ b ~ '' }}",
    "{{ [a, b] | join }}",
    "{{ '%s' % a }}{{ b | string }}",
    "{{ a }}",
]


@given(VALUES, VALUES, st.sampled_from(TEXTS))
@settings(max_examples=120, deadline=None)
def test_no_null_becomes_a_word(a: object, b: object, template: str) -> None:
    """No null of a row, however deep, is ever printed as None."""

    def printed(value: object) -> list[str]:
        if isinstance(value, dict):
            return [text for pair in value.items() for item in pair for text in printed(item)]
        if isinstance(value, list | tuple | set):
            return [text for item in value for text in printed(item)]
        return [] if value is None else [str(value)]

    result = composer(prompt=f"{template}!").compose(Row(0, {"a": a, "b": b}))
    if isinstance(result, Request):
        said = json.loads(result.body)["messages"][0]["content"]
        assert said.upper().count("NONE") == sum(
            text.upper().count("NONE") for text in (*printed(a), *([] if template == "{{ a }}" else printed(b)))
        )


# Whole requests

CHAT = {"model": "m", "messages": [{"role": "user", "content": "Hällo"}], "max_tokens": 5, "n": 2, "own": {"a": None}}


def forwarded(fields: Fields, template: str = "{{ body }}", **given: object) -> Request | Failure:
    """What becomes of a row that holds its request whole."""
    job = Job(input={"path": "rows.jsonl", **given}, request={"body": template}, output={"path": "out"})
    return Composer(job.request, None, "job.toml").compose(Row(7, fields))


@pytest.mark.parametrize("spaces", ["", "  "])
def test_a_whole_request_is_sent_as_it_is(spaces: str) -> None:
    """Bytes and text to the byte, an object as JSON; what the scheduler has to know is read out of it."""
    text = spaces + json.dumps(CHAT | {"prompt_cache_key": "k"})
    for value, sent in [
        (msgspec.Raw(text.encode()), text.encode()),
        (text, text.encode()),
        (json.loads(text), msgspec.json.encode(json.loads(text))),
    ]:
        made = forwarded({"body": value})
        assert isinstance(made, Request), made
        assert made.body == sent
        assert (made.model, made.endpoint, made.cache_key, made.output_tokens) == ("m", "chat", "k", 10)
        assert made.prompt_tokens == len(msgspec.json.encode(CHAT["messages"])) // 4


def test_a_text_around_columns_may_be_the_request() -> None:
    """A template that is JSON once it is rendered is a request, too."""
    made = forwarded(
        {"text": 'a "b"'}, '{"model": "m", "messages": [{"role": "user", "content": {{ text | tojson }}}]}'
    )
    assert isinstance(made, Request), made
    assert json.loads(made.body)["messages"][0]["content"] == 'a "b"'


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (None, "request.body: body is null"),
        ("nonsense", "request.body: JSON is malformed"),
        (b"\xff", "request.body: "),
        ([1], "request.body: a request is a JSON object"),
        ({"model": "m"}, "request.body: messages is missing"),
        (CHAT | {"model": None}, "request.body: model is missing"),
        (CHAT | {"stream": "yes"}, "request.body: stream: true or false, not 'yes'"),
        (CHAT | {"tool_choice": "auto"}, "request.body: tool_choice: only with tools"),
        (
            CHAT | {"service_tier": "slow"},
            "request.body: service_tier: priority or default or auto or flex, not 'slow'",
        ),
        (CHAT | {"temperature": 9}, "request.body: temperature: a number from 0 to 2, not 9"),
        (CHAT | {"messages": [{}]}, "request.body: messages[0]: every message has a role"),
        (CHAT | {"max_tokens": "many"}, "request.body: max_tokens: a whole number from 1"),
    ],
)
def test_a_body_that_is_no_request_fails_its_row(body: object, said: str) -> None:
    """What is wrong is said; what is null counts as not given, and what we do not know passes."""
    made = forwarded({"body": msgspec.Raw(body) if isinstance(body, bytes) else body})
    assert isinstance(made, Failure), made
    assert made.kind is Kind.UNSENDABLE
    assert made.message.startswith(said)
    assert isinstance(forwarded({"body": CHAT | {"temperature": None, "stream": False, "own": 3}}), Request)


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        ("/v1/chat/completions", "chat"),
        ("/chat/completions", "chat"),
        ("/v1/completions", "completions"),
        ("/completions", "completions"),
    ],
)
def test_the_url_of_a_batch_file_picks_the_endpoint(url: str, endpoint: str) -> None:
    """With or without the version before it."""
    raw = msgspec.Raw(json.dumps({"prompt": "p", **CHAT}).encode())
    made = forwarded({"custom_id": "a", "url": url, "body": raw}, format="openai-batch")
    assert isinstance(made, Request), made
    assert (made.endpoint, made.body) == (endpoint, bytes(raw))


@pytest.mark.parametrize("url", ["/v1/embeddings", "/v1/responses", "", None, 3])
def test_a_url_that_is_not_served_fails_its_row(url: object) -> None:
    """And says which are."""
    made = forwarded({"custom_id": "a", "url": url, "body": msgspec.Raw(b"{}")}, format="openai-batch")
    assert isinstance(made, Failure), made
    assert (made.kind, made.message) == (
        Kind.UNSENDABLE,
        f"url: /v1/chat/completions or /v1/completions, not {url!r}",
    )
