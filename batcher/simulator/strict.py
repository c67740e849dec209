"""What the service's strict mode does not take of a schema."""

from batcher.simulator.answers import Json, Schema

LONGEST = 5_000  # characters of the whole schema
DEEPEST = 10  # objects and arrays inside of each other
PROPERTIES = 500
OPTIONS = 500  # of all enums
BRANCHES = 5  # of one anyOf

_UNSUPPORTED = ("pattern", "format", "minItems", "maxItems", "definitions")


def misfit(schema: Schema, length: int) -> str | None:
    """Why strict mode refuses the schema, which is `length` characters long; None when it takes it."""
    if length > LONGEST:
        return f"the schema has {length} characters, more than {LONGEST}"
    if schema.get("type") != "object":
        return "the root must be an object"
    return _Walk(schema).problem(schema, "", 1, ())


class _Walk:
    """One look at all of a schema."""

    def __init__(self, root: Schema) -> None:
        self.root = root
        self.properties = 0
        self.options = 0

    def problem(self, schema: Json, place: str, depth: int, inside: tuple[str, ...]) -> str | None:
        """The first problem at this place or below; `inside` are the definitions that lead here."""
        if not isinstance(schema, dict):
            return None
        where = f" at {place or 'the root'}"
        if (reference := schema.get("$ref")) is not None:
            name = str(reference).removeprefix("#/$defs/")
            known = self.root.get("$defs")
            if not str(reference).startswith("#/$defs/") or not isinstance(known, dict) or name not in known:
                return f"$ref must name one of $defs, not {reference}{where}"
            if name in inside:
                return f"{reference} is recursive{where}"
            return self.problem(known[name], f"{place}.{name}".lstrip("."), depth, (*inside, name))
        for word in _UNSUPPORTED:
            if word in schema:
                return f"{word} is not supported{where}"
        if isinstance(schema.get("type"), list):
            return f"type must be one name, use anyOf for several{where}"
        if schema.get("type") in ("object", "array") and depth > DEEPEST:
            return f"more than {DEEPEST} levels{where}"
        if schema.get("type") == "object" and schema.get("additionalProperties") is not False:
            return f"additionalProperties must be false{where}"
        if isinstance(options := schema.get("enum"), list):
            self.options += len(options)
            if self.options > OPTIONS:
                return f"more than {OPTIONS} enum values"
        branches = schema.get("anyOf")
        if isinstance(branches, list) and len(branches) > BRANCHES:
            return f"more than {BRANCHES} branches of anyOf{where}"
        properties = schema.get("properties")
        named = properties if isinstance(properties, dict) else {}
        self.properties += len(named)
        if self.properties > PROPERTIES:
            return f"more than {PROPERTIES} properties"
        below: list[tuple[str, Json]] = [(f"{place}.{name}".lstrip("."), one) for name, one in named.items()]
        below += [(f"{place}[]", schema.get("items"))]
        for name, one in below:
            if found := self.problem(one, name, depth + 1, inside):
                return found
        for word in ("anyOf", "oneOf", "allOf"):
            several = schema.get(word)
            for one in several if isinstance(several, list) else []:
                if found := self.problem(one, place, depth, inside):
                    return found
        return None
