"""The job file as a JSON Schema, for editors and for programs that write jobs; made from what checks the job file."""

from collections.abc import Mapping
from typing import Any

import msgspec

from batcher.job import ANSWER, METHODS, READING, REGEX, SIMULATOR, keys

_Schema = dict[str, Any]

MEANINGS: Mapping[str, str] = {
    "name": "A name for people.",
    "input": "Where the rows come from.",
    "input.path": "A file, a folder, a glob, or a list of these; relative to the job file.",
    "input.format": "For files whose suffix does not tell.",
    "input.id": "The column that becomes `id` in the results; the position when absent.",
    "input.limit": "The first so many rows only.",
    "input.sample": "So many rows, drawn at random: the same ones every time.",
    "input.where": "Only rows for which this SQL condition holds.",
    "request": "What every row asks: the API's own parameters. Any text may be a template over the row's columns.",
    "request.best_of": "Answers to write, of which the best `n` are returned; all are paid.",
    "request.body": "A template that gives a whole request, in place of everything else.",
    "request.choices": "The labels that an answer may be.",
    "request.clear_thinking": "Leave the thinking of earlier turns out of the prompt.",
    "request.disable_reasoning": "The older way to say that the model shall not think.",
    "request.echo": "Return the prompt before the answer.",
    "request.endpoint": "Chat messages, or a bare text to go on with.",
    "request.extra": "What other servers know: goes into the body as it is.",
    "request.frequency_penalty": "Against saying the same words again.",
    "request.grammar_root": "The rule of the grammar that the answer has to follow.",
    "request.logit_bias": "Token ids that are to come more or less often, from -100 to 100.",
    "request.logprobs": "How likely each token was.",
    "request.max_completion_tokens": "The most tokens that an answer may have, reasoning included; auto learns it.",
    "request.max_tokens": "The older name of max_completion_tokens.",
    "request.messages": "The whole conversation, in place of system and prompt.",
    "request.min_completion_tokens": "The fewest tokens of an answer; -1 for as many as the model can.",
    "request.min_tokens": "The older name of min_completion_tokens.",
    "request.model": "The model that is asked.",
    "request.model_parameters": "What one model knows by itself.",
    "request.n": "Answers per row.",
    "request.parallel_tool_calls": "Whether several tools may be called at once.",
    "request.parse": 'How answers are read: "module:Type" (JSON), or "regex:…".',
    "request.prediction": "A text that the answer is likely to repeat.",
    "request.presence_penalty": "Against staying with the same topics.",
    "request.prompt": "What the user says: {{ column }} is filled in for every row.",
    "request.prompt_cache_key": 'Equal keys share the cache; "auto": found where rows begin alike.',
    "request.reasoning_effort": "How long the model thinks.",
    "request.reasoning_format": "Where the reasoning goes: a field of its own, into the text, or nowhere.",
    "request.response_format": 'The form of the answers: { schema = "file.json" }, or the API\'s own object.',
    "request.return_raw_tokens": "Token ids in place of text.",
    "request.seed": "For answers that can be repeated, as far as the service can.",
    "request.stop": "Texts that end an answer.",
    "request.stream": "Receive the answers while they are written; the results are the same.",
    "request.stream_options": "Of a stream: { include_usage = true }.",
    "request.suffix": "The text after the answer, for servers that fill in.",
    "request.system": "What the model is told before.",
    "request.temperature": "How much chance there is in the answers; 0 for none.",
    "request.tool_choice": "Whether a tool is called: none, auto, required, or the one to call.",
    "request.tools": "The functions that the model may call.",
    "request.top_logprobs": "So many likely tokens at each place.",
    "request.top_p": "The share of likely words to choose from.",
    "request.user": "Your own name for the end user.",
    "request.vote": "Of n answers, the value that most of them have.",
    "service": "Who is asked, and how.",
    "service.api_key_env": "The environment variable that holds the key; never the key itself.",
    "service.base_url": 'The service\'s URL, or "simulator" for answers from this machine.',
    "service.compression": "Of request bodies.",
    "service.dialect": "How the service speaks; by its host when absent.",
    "service.encoding": "Of request bodies.",
    "service.headers_env": "The environment variable that holds extra headers, as lines of `Name: value`.",
    "service.prices": "USD per million tokens, by model; by tier too.",
    "service.proxy": "Use the proxy that the environment names.",
    "service.timeout": "For a whole request.",
    "service.transport": "The HTTP library; reqwest comes with batcher[fast] and takes less CPU.",
    "schedule": "How much may be under way.",
    "schedule.budget_usd": "What all runs of the output may spend, in USD; never exceeded.",
    "schedule.deadline": "When all rows should be done: a time, or a span from the first start.",
    "schedule.dedupe": "Ask requests that are the same once, at temperature 0 or with a seed.",
    "schedule.max_in_flight": "The most requests at once; auto finds it.",
    "schedule.queue_threshold": "Refuse a request rather than let it wait longer: 50 ms to 20 s, for flex and auto.",
    "schedule.requests_per_minute": "A ceiling; auto is what the service is found to allow.",
    "schedule.service_tier": "The service tier of all requests; of a list, what one has no room for goes to the next.",
    "schedule.tokens_per_minute": "The same for prompt and answer tokens together.",
    "schedule.uncached_tokens_per_minute": "The same without tokens from the service's cache.",
    "schedule.wait": "Wait for a limit of an hour or a day; false: the run ends with 75 instead.",
    "retry": "How often a row is asked again.",
    "retry.max_attempts": "Answers or losses after which a row fails.",
    "retry.max_invalid": "Times that a row is asked again because its answer did not fit.",
    "retry.repair": "Show the model its answer that did not fit, and why.",
    "score": "How good the answers are: what each is compared with, and how.",
    "score.answer": 'What is compared: regex:…, a column such as "parsed.label", a template; or the whole answer.',
    "score.by": "The input column that results are grouped by.",
    "score.method": "How an answer is compared with its target; or a function of your own, as module:function.",
    "score.target": "The truth: a column of the input, or a template over its columns.",
    "output": "Where the answers go.",
    "output.keep": "Input columns to carry along.",
    "output.ledger": "Where the ledger lies, if not in the output's folder; required for object stores.",
    "output.path": "The output's folder, relative to the job file, or a URI such as s3://bucket/prefix.",
    "output.raw": "Keep the service's whole answers too.",
    "output.rows_per_part": "Input rows per Parquet file.",
}
"""What each section and key is for, in a line."""

_MOMENT = r"^\d{4}-?\d\d-?\d\d"
_VARIABLE = {"pattern": "^[A-Za-z_][A-Za-z0-9_]*$"}
_BY_HAND: Mapping[str, _Schema] = {
    "service.api_key_env": _VARIABLE,
    "service.headers_env": _VARIABLE,
    "service.base_url": {"pattern": f"^({SIMULATOR}$|https?://[^@?#]+$)"},
    "service.timeout": {"$ref": "#/$defs/duration", "default": "10m"},
    "schedule.queue_threshold": {"$ref": "#/$defs/duration"},
    "schedule.deadline": {"anyOf": [{"$ref": "#/$defs/duration"}, {"type": "string", "pattern": _MOMENT}]},
    "score.method": {"anyOf": [{"enum": [*METHODS]}, {"pattern": r"^\w+(\.\w+)*:\w+(\.\w+)*$"}]},
    "score.answer": {"anyOf": [{"pattern": rf"^({REGEX}|({'|'.join(ANSWER)})(\.|$))"}, {"pattern": r"\{[{%#]"}]},
}
"""What job.py checks with its own code."""

_DEFINITIONS: Mapping[str, _Schema] = {
    "duration": {
        "description": 'Such as "90s" or "1.5h", or a number of seconds.',
        "anyOf": [
            {"type": "string", "pattern": r"^\s*\d+(\.\d+)?\s*(ms|s|m|h|d)\s*$"},
            {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1e9},
        ],
    },
    "template": {
        "description": "A Jinja template over the row's columns.",
        "type": "string",
        "pattern": r"\{[{%#]",
    },
    "file": {
        "description": "The text of a file, which may be a template; relative to the job file.",
        "type": "object",
        "properties": {"file": {"type": "string"}},
        "required": ["file"],
        "additionalProperties": False,
    },
    "schema": {
        "description": "A JSON Schema that every answer has to fit: a file, or a table.",
        "type": "object",
        "properties": {"schema": {"type": ["string", "object"]}},
        "required": ["schema"],
        "additionalProperties": False,
    },
}


def schema() -> _Schema:
    """The JSON Schema (draft 2020-12) of a job file, as a document."""
    sections, endpoints = keys()
    written, components = msgspec.json.schema_components(sections.values(), ref_template="#/$defs/{name}")
    names = {
        name: reference["$ref"].removeprefix("#/$defs/") for name, reference in zip(sections, written, strict=True)
    }
    properties: _Schema = {"name": {"type": "string", "minLength": 1, "default": "job"}}
    properties |= {name: _without_null(components.pop(component)) for name, component in names.items()}
    properties["request"] = _request(endpoints)
    properties["input"]["not"] = {"required": ["sample", "limit"]}
    for component in components.values():
        component["additionalProperties"] = False
        for known in component["properties"].values():
            known["minimum"] = 0
    for name, section in properties.items():
        for key, known in section.get("properties", {}).items():
            by_hand = _BY_HAND.get(f"{name}.{key}", {})
            if "$ref" in by_hand:
                known.clear()
            known |= by_hand
            _describe(known, f"{name}.{key}")
        _describe(section, name)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A job of batcher",
        "type": "object",
        "properties": properties,
        "required": ["input", "output"],
        "additionalProperties": False,
        "if": {
            "properties": {"input": {"properties": {"format": {"const": "openai-batch"}}, "required": ["format"]}},
        },
        "then": {"properties": {"request": {"propertyNames": {"enum": ["body", *READING]}}}},
        "else": {"required": ["request"], "properties": {"request": _together(endpoints)}},
        "$defs": {**_DEFINITIONS, **{name: _without_null(component) for name, component in components.items()}},
    }


def _describe(written: _Schema, key: str) -> None:
    written.pop("title", None)
    if key in MEANINGS:
        written["description"] = MEANINGS[key]


def _request(endpoints: Mapping[str, Mapping[str, Any]]) -> _Schema:
    """The section's keys, those of all endpoints."""
    properties: _Schema = {"endpoint": {"enum": [*endpoints], "default": "chat"}}
    for known in endpoints.values():
        types = {key: kind for key, kind in known.items() if key not in properties and key not in _NESTED}
        (*written,), _ = msgspec.json.schema_components(types.values())
        properties |= {key: _templated(each) for key, each in zip(types, written, strict=True)}
    others = [{"$ref": "#/$defs/template"}, {"$ref": "#/$defs/file"}]
    properties |= {key: {"anyOf": [*written, *others]} for key, written in _NESTED.items()}
    # Chat has true or false, completions have a number too.
    properties["logprobs"] = _templated(
        {"anyOf": [{"type": "boolean"}, {"type": "integer", "minimum": 0, "maximum": 20}]}
    )
    for key in ("max_completion_tokens", "max_tokens"):
        properties[key]["anyOf"].append({"const": "auto"})
    properties["body"] = {"anyOf": others}
    properties |= _READ
    own = {
        "type": "object",
        "required": ["type"],
        "not": {"anyOf": [{"required": ["schema"]}, {"required": ["file"]}]},
    }
    properties["response_format"] = {"anyOf": [{"$ref": "#/$defs/schema"}, own, *others]}
    taken = {*properties, "system", "service_tier", "queue_threshold"}
    properties["extra"] = {"type": "object", "propertyNames": {"not": {"enum": sorted(taken)}}}
    return {"type": "object", "properties": properties, "additionalProperties": False}


_READ: Mapping[str, _Schema] = {
    "parse": {"type": "string", "pattern": r"^(regex:|[\w.]+:[\w.]+$)"},
    "choices": {"type": "array", "minItems": 1, "uniqueItems": True, "items": {"type": "string", "minLength": 1}},
    "vote": {"enum": ["majority"]},
}


def _typed(*required: str) -> _Schema:
    return {"type": "object", "required": [*required], "not": {"required": ["file"]}}


_NESTED: Mapping[str, list[_Schema]] = {
    "messages": [{"type": "array", "minItems": 1, "items": _typed("role")}],
    "prediction": [_typed("type", "content")],
    "prompt": [{"type": ["string", "array"], "minItems": 1}],
    "response_format": [],
    "stream_options": [_typed()],
    "tool_choice": [{"enum": ["none", "auto", "required"]}, _typed("type", "function")],
    "tools": [{"type": "array", "items": _typed("type", "function")}],
}
"""Parameters whose inside may be templates too; what is right there is checked when the job is read."""


def _together(endpoints: Mapping[str, Mapping[str, Any]]) -> _Schema:
    """What of `[request]` goes together: a whole request, or what the endpoint knows."""
    chat, completions = (set(endpoints[name]) for name in ("chat", "completions"))
    parameters = {
        "required": ["model"],
        "not": {"required": ["max_tokens", "max_completion_tokens"]},
        "if": {"properties": {"endpoint": {"const": "completions"}}, "required": ["endpoint"]},
        "then": {"required": ["prompt"], "properties": dict.fromkeys(sorted(chat - completions), False)},
        "else": {
            "oneOf": [
                {"required": ["prompt"]},
                {"required": ["messages"], "properties": {"system": False}},
            ],
            "properties": {
                **dict.fromkeys(sorted(completions - chat), False),
                "prompt": {"not": {"type": "array"}},
            },
        },
    }
    return {
        "if": {"required": ["body"]},
        "then": {"properties": dict.fromkeys(sorted(chat | completions), False)},
        "else": parameters,
    }


def _templated(written: _Schema) -> _Schema:
    """The schema of a parameter that may be a template too, and the text of a file wherever it may be a text."""
    whole = [_with_files(each) for each in written.get("anyOf", [written])]
    return {"anyOf": [*whole, {"$ref": "#/$defs/template"}, {"$ref": "#/$defs/file"}]}


def _with_files(written: _Schema) -> _Schema:
    if written.get("type") == "array" and "items" in written:
        return written | {"items": {"anyOf": [written["items"], {"$ref": "#/$defs/file"}]}}
    return written


_EMPTY: tuple[tuple[str, Any], ...] = (("default", None), ("required", []))


def _without_null(written: Any) -> Any:
    """A schema in which a key is absent rather than null, for TOML has no null."""
    match written:
        case list():
            return [_without_null(each) for each in written if each != {"type": "null"} and each is not None]
        case dict():
            made = {key: _without_null(each) for key, each in written.items() if (key, each) not in _EMPTY}
            match made:
                case {"anyOf": [dict(sole)], **rest}:
                    return {**sole, **rest}
            return made
    return written
