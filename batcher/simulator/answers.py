"""What the simulated model says: text about the prompt, or a value that fits the asked schema."""

import math
import re
import string
from collections.abc import Sequence
from functools import cached_property, lru_cache
from random import Random
from typing import TypeAlias

import msgspec

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"
Schema: TypeAlias = dict[str, Json]

WEIGHED = 4_000  # characters of a prompt that a choice looks at: enough for a ticket, cheap for a book
QUOTED = 500  # characters of a prompt that sentences and words are taken from
NOISE = 0.12  # share of choices made blindly, so that a good prompt scores about 90 % and not 100 %
DEEP = 6  # levels after which optional parts are left out, so that recursive schemas end
DEEPEST = 64  # levels after which a schema that has no end gets null

_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + "“”‘’–—…•", " "))
_BETWEEN_WORDS = re.compile(r"[,;\n]")
_BETWEEN_HINTS = re.compile(r";|\n|[.!?]\s")
_MEANS = re.compile(r"\s*[:=]\s*|\s+[-–—]\s+")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_SUFFIXES = ("ations", "ation", "ments", "ment", "ings", "ing", "ions", "ion", "ies", "ed", "es", "ly", "s", "e", "y")
_REST = frozenset({"other", "others", "none", "unknown", "neutral", "misc", "general"})  # labels for what fits no other
_COMMON = frozenset(  # words that say nothing when they only join others
    [
        *("about", "after", "all", "and", "any", "are", "because", "been", "but", "can", "cannot", "does", "for"),
        *("from", "had", "has", "have", "her", "his", "how", "into", "its", "not", "one", "our", "out", "she", "some"),
        *("something", "than", "that", "the", "their", "them", "then", "there", "they", "this", "was", "were", "what"),
        *("when", "where", "whether", "which", "who", "why", "will", "with", "would", "you", "your"),
    ]
)


class Prompt:
    """The text that is answered, taken apart at most once."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def words(self) -> list[str]:
        """The distinct longer words, in order."""
        return [word for word in dict.fromkeys(words(self.text[:QUOTED])) if len(word) > 3]

    @cached_property
    def sentences(self) -> list[str]:
        """The sentences, at most 100 characters of each."""
        lines = self.text[:QUOTED].replace(". ", ".\n").replace("? ", "?\n").replace("! ", "!\n").splitlines()
        return [line.strip()[:100] for line in lines if line.strip()]

    @cached_property
    def stems(self) -> frozenset[str]:
        """What a choice is made by."""
        return stems(self.text[:WEIGHED])


def text(prompt: Prompt, draw: Random, ending: str = "") -> str:
    """A few sentences that mention words of the prompt; `ending` closes them."""
    if not prompt.words:
        return "There is little to answer here." + ending
    parts = [f"This is about {', '.join(draw.sample(prompt.words, min(3, len(prompt.words))))}."]
    parts += [f"It says: {sentence(prompt, draw)}" for _ in range(draw.randrange(3))]
    return " ".join(parts) + ending


def sentence(prompt: Prompt, draw: Random, ending: str = "") -> str:
    """One sentence of the prompt; `ending` closes it."""
    return (draw.choice(prompt.sentences) if prompt.sentences else "Nothing was said.") + ending


def json_object(prompt: Prompt, draw: Random, ending: str = "") -> Schema:
    """The small object given when JSON is asked for without a schema."""
    return {"answer": sentence(prompt, draw, ending), "confidence": round(draw.uniform(0.5, 1), 2)}


@lru_cache(maxsize=64)
def read_schema(raw: bytes) -> Schema:
    """The schema that a request carries, kept because jobs send the same one with every row.

    Raises msgspec.ValidationError when it is not an object.
    """
    return msgspec.json.decode(raw, type=dict)


def fitting(schema: Schema, prompt: Prompt, draw: Random, ending: str = "") -> Json:
    """A value that fits the schema and looks like an answer to the prompt.

    Understands type, enum, const, properties, required, items, minItems, maxItems, minimum, maximum, exclusive
    bounds, multipleOf, minLength, maxLength, anyOf and oneOf (the first branch), allOf, and `$ref` to a place in the
    same schema. Free strings end with `ending` where their length allows it.
    """
    return _Filler(schema, prompt, draw, ending).fill(schema, "", 0)


class _Filler:
    """One walk over one schema for one prompt."""

    def __init__(self, root: Schema, prompt: Prompt, draw: Random, ending: str) -> None:
        self.root = root
        self.prompt = prompt
        self.draw = draw
        self.ending = ending

    def fill(self, schema: Json, name: str, depth: int) -> Json:
        if depth > DEEPEST:
            return None
        if not isinstance(schema, dict):  # true, or nothing said: anything fits
            return sentence(self.prompt, self.draw, self.ending)
        if "$ref" in schema:
            return self.fill(resolved(self.root, schema), name, depth + 1)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema and (options := _list(schema["enum"])):
            return self.choose(options, described(schema))
        for word in ("anyOf", "oneOf"):
            if word in schema and (branches := _list(schema[word])):
                branch = branches[0] if depth < DEEP else min(branches, key=weight)
                beside = {key: value for key, value in schema.items() if key != word}
                return self.fill(beside | _object(branch), name, depth + 1)
        if "allOf" in schema and (parts := _list(schema["allOf"])):
            return self.fill(merged(self.root, schema, parts), name, depth + 1)
        match kind(schema):
            case "object":
                return self.object(schema, depth)
            case "array":
                return self.array(schema, name, depth)
            case "integer":
                return integer(schema, self.draw)
            case "number":
                return number(schema, self.draw)
            case "boolean":
                return self.boolean(name, described(schema))
            case "null":
                return None
            case _:
                return self.string(schema)

    def object(self, schema: Schema, depth: int) -> Schema:
        required = [str(name) for name in _list(schema.get("required"))]
        value: Schema = {}
        for name, wanted in _object(schema.get("properties")).items():
            if name in required or (depth < DEEP and self.draw.random() < 0.75):
                value[name] = self.fill(wanted, name, depth + 1)
        for name in required:  # asked for and not described: whatever the schema says of others
            if name not in value:
                value[name] = self.fill(schema.get("additionalProperties"), name, depth + 1)
        return value

    def array(self, schema: Schema, name: str, depth: int) -> list[Json]:
        least = int(_number(schema.get("minItems"), 0))
        most = int(_number(schema.get("maxItems"), max(3, least)))
        count = least if depth >= DEEP else max(least, min(most, self.draw.randint(1, 3)))
        value: list[Json] = []
        for _ in range(count):
            item = self.fill(schema.get("items"), name, depth + 1)
            if item not in value or len(value) < least:
                value.append(item)
        return value

    def choose(self, options: Sequence[Json], description: str) -> Json:
        """The option whose words, or whose hint words in the description, the prompt has most of."""
        if self.draw.random() < NOISE:
            return self.draw.choice(options)
        labels = tuple(map(str, options))
        said = self.prompt.stems
        scores = [
            sum(weights[stem] for stem in sorted(weights.keys() & said)) for weights in hints(labels, description)
        ]
        if not any(scores):
            scores = [plain(label) in _REST for label in labels]
        best = max(scores)
        return self.draw.choice([option for option, score in zip(options, scores, strict=True) if score == best])

    def boolean(self, name: str, description: str) -> bool:
        """True where the prompt has a word of the property's name or description."""
        likely = not self.prompt.stems.isdisjoint(clues(name, description))
        return likely != (self.draw.random() < NOISE)

    def string(self, schema: Schema) -> str:
        value = sentence(self.prompt, self.draw, self.ending)
        least, most = _number(schema.get("minLength"), 0), _number(schema.get("maxLength"), len(value))
        return value[: int(most)].ljust(int(least), ".")


def integer(schema: Schema, draw: Random) -> int:
    """A whole number within the bounds; 0 to 100 where there are none."""
    step = _number(schema.get("multipleOf"), 1) or 1
    return int(multiple(schema, draw, step if step == int(step) else 1))


def number(schema: Schema, draw: Random) -> float:
    """A number within the bounds; 0 to 100 where there are none."""
    if step := _number(schema.get("multipleOf"), 0):
        return round(multiple(schema, draw, step), 10)
    low, high = bounds(schema)
    value = low + (high - low) * (0.01 + 0.98 * draw.random())  # never on a bound, which may be an exclusive one
    short = round(value, 2)
    return short if low < short < high else value


def multiple(schema: Schema, draw: Random, step: float) -> float:
    """A multiple of the step within the bounds."""
    low, high = bounds(schema)
    first, last = int(-(-low // step)), int(high // step)
    if first * step <= _number(schema.get("exclusiveMinimum"), -math.inf):
        first += 1
    if last * step >= _number(schema.get("exclusiveMaximum"), math.inf):
        last -= 1
    return draw.randint(first, max(first, last)) * step


def bounds(schema: Schema) -> tuple[float, float]:
    """The lowest and the highest number that a schema allows, inclusive or not."""
    low = max(_number(schema.get("minimum"), -math.inf), _number(schema.get("exclusiveMinimum"), -math.inf))
    high = min(_number(schema.get("maximum"), math.inf), _number(schema.get("exclusiveMaximum"), math.inf))
    if low == -math.inf:
        low = min(0, high - 100)
    return low, max(low + 100, 100) if high == math.inf else high


def kind(schema: Schema) -> str:
    """The JSON type to make; of several the first that is not null."""
    named = schema.get("type")
    if isinstance(named, list):
        named = next((name for name in named if name != "null"), "null")
    if isinstance(named, str):
        return named
    if "properties" in schema or "required" in schema:
        return "object"
    return "array" if "items" in schema else "string"


def resolved(root: Schema, schema: Schema) -> Schema:
    """A schema with its local reference, such as `#/$defs/address`, replaced by what it names; else by nothing."""
    place: Json = None
    reference = schema["$ref"]
    if isinstance(reference, str) and reference.startswith("#"):
        place = root
        for step in reference.split("/")[1:]:
            place = _object(place).get(step.replace("~1", "/").replace("~0", "~"))
    return _object(place) | {key: value for key, value in schema.items() if key != "$ref"}


def merged(root: Schema, schema: Schema, parts: list[Json]) -> Schema:
    """The parts of allOf as one schema: their properties and required names together, of other words the last."""
    whole: Schema = {}
    properties: Schema = {}
    required: list[Json] = []
    for part in [*parts, {key: value for key, value in schema.items() if key != "allOf"}]:
        one = _object(part)
        for _ in range(DEEP):
            one = resolved(root, one) if "$ref" in one else one
        whole |= one
        properties |= _object(one.get("properties"))
        required += _list(one.get("required"))
    if properties or required:
        whole |= {"properties": properties, "required": required}
    return whole


def weight(branch: Json) -> int:
    """How deep a branch may lead: null, a leaf, something nested, a reference."""
    if not isinstance(branch, dict):
        return 1
    return 3 if "$ref" in branch else {"null": 0, "object": 2, "array": 2}.get(kind(branch), 1)


@lru_cache(maxsize=1024)
def hints(labels: tuple[str, ...], description: str) -> tuple[dict[str, float], ...]:
    """Per label the stems that speak for it: its own words, and those after `label:` in the description.

    A stem that several labels share counts for less. The name of a label for the rest, such as `other`, says nothing.
    """
    names = [plain(label) for label in labels]
    found = [set() if name in _REST else telling(name) for name in names]
    for piece in _BETWEEN_HINTS.split(description):
        head, *tail = _MEANS.split(piece, maxsplit=1)
        said = plain(head)
        for own, name in zip(found, names, strict=True):
            if tail and name and (said == name or said.endswith(" " + name)):
                own |= telling(tail[0])
    return tuple({stem: 1 / sum(stem in other for other in found) for stem in own} for own in found)


@lru_cache(maxsize=1024)
def clues(name: str, description: str) -> set[str]:
    """The stems that speak for a property being true: those of its name and its description."""
    return telling(f"{plain(name)}, {description}")


@lru_cache(maxsize=1 << 15)
def stem(word: str) -> str:
    """The part that forms of a lower case word share, roughly: charged, charges and charging are one."""
    for suffix in _SUFFIXES:
        if word.endswith(suffix) and len(word) - len(suffix) >= 3:
            word = word[: -len(suffix)]
            break
    return word[:-1] if len(word) > 3 and word[-1] == word[-2] else word


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return text.lower().translate(_PUNCTUATION).split()


def stems(text: str) -> frozenset[str]:
    """The distinct stems of a text."""
    return frozenset(map(stem, set(words(text))))


def telling(hint: str) -> set[str]:
    """The stems that a list of hints names: a word between commas always counts, in a phrase the common ones do not."""
    found: set[str] = set()
    for item in _BETWEEN_WORDS.split(hint):
        said = words(item)
        found.update(stem(word) for word in said if len(said) == 1 or (len(word) > 2 and word not in _COMMON))
    return found


def plain(name: str) -> str:
    """A name in words: `feature_request`, `featureRequest` and `"Feature request"` are alike."""
    return " ".join(words(_CAMEL.sub(" ", name)))


def described(schema: Schema) -> str:
    """The description that stands beside a schema, or nothing."""
    description = schema.get("description")
    return description if isinstance(description, str) else ""


def _object(value: Json) -> Schema:
    return value if isinstance(value, dict) else {}


def _list(value: Json) -> list[Json]:
    return value if isinstance(value, list) else []


def _number(value: Json, otherwise: float) -> float:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else otherwise
