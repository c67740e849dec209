"""What a job names by `module:name`: imported from beside the job file, or from what is installed."""

import importlib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import msgspec
from msgspec import inspect

from batcher.errors import JobError

_FORM = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def is_reference(text: str) -> bool:
    """Whether a text has the form `module:name`; either may have dots."""
    return _FORM.fullmatch(text) is not None


@contextmanager
def imported(reference: str, folder: Path) -> Iterator[object]:
    """What `module:name` means; while this is open the module can be imported by its name. Raises JobError.

    A module that lies in `folder` goes before an installed one, and is read anew each time: it may have changed.
    """
    module, _, name = reference.partition(":")
    top = module.partition(".")[0]
    place = str(folder)
    importlib.invalidate_caches()
    here = PathFinder.find_spec(top, [place]) is not None
    hidden = {known: sys.modules.pop(known) for known in list(sys.modules) if here and _within(known, top)}
    sys.path.insert(0, place)
    try:
        try:
            found: object = importlib.import_module(module)
        except (Exception, SystemExit) as error:  # whatever the module does
            raise JobError(f"{module} cannot be imported: {_said(error)}") from None
        try:
            found = reduce(getattr, name.split("."), found)
        except AttributeError:
            raise JobError(f"the module {module} has no {name}") from None
        yield found
    finally:
        sys.path.remove(place)
        for known in [known for known in sys.modules if here and _within(known, top)]:
            del sys.modules[known]
        sys.modules.update(hidden)


def json_schema(reference: str, folder: Path) -> dict[str, object]:
    """The JSON Schema of the type that `module:Type` names. Raises JobError."""
    with imported(reference, folder) as kind:
        try:
            own = getattr(kind, "model_json_schema", None)  # a pydantic model
            made = msgspec.json.schema(kind) if own is None else own()
            if own is None:
                _note_moments(inspect.type_info(kind), made, made, set())
        except Exception as error:  # a type with what JSON Schema has no word for
            raise JobError(f"{reference} has no JSON Schema: {_said(error)}") from None
    if not isinstance(made, dict):
        raise JobError(f"{reference} has no JSON Schema")
    if isinstance(named := made.get("$defs"), dict):  # msgspec has them in another order in each process
        made["$defs"] = dict(sorted(named.items()))
    return made


def _note_moments(kind: Any, place: Any, root: dict[str, Any], done: set[str]) -> None:
    """Give moments their `format`, which msgspec leaves out where a moment of Python may lack its offset.

    `done` are the references that were followed. Unions of several types have no type of their own anyway.
    """
    reference = place.get("$ref")
    if reference is not None:
        if reference not in done:
            done.add(reference)
            _note_moments(kind, root["$defs"][reference.removeprefix("#/$defs/")], root, done)
        return
    match kind:
        case inspect.Metadata():
            _note_moments(kind.type, place, root, done)
        case inspect.UnionType():
            several = [each for each in kind.types if not isinstance(each, inspect.NoneType)]
            for branch in place.get("anyOf", ()) if len(several) == 1 else ():
                _note_moments(several[0], branch, root, done)
        case inspect.DateTimeType() if kind.tz is not False:
            place["format"] = "date-time"
        case inspect.TimeType():
            place["format"] = "time"
        case inspect.ListType() | inspect.SetType() | inspect.FrozenSetType() | inspect.VarTupleType():
            _note_moments(kind.item_type, place.get("items", {}), root, done)
        case inspect.StructType() | inspect.DataclassType() | inspect.TypedDictType() if "properties" in place:
            for field in kind.fields:
                _note_moments(field.type, place["properties"][field.encode_name], root, done)


def _within(module: str, top: str) -> bool:
    return module == top or module.startswith(f"{top}.")


def _said(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
