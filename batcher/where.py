"""An SQL condition over rows, as DuckDB understands it."""

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from batcher.errors import JobError


class Condition:
    """A condition such as "lang = 'en' and score > 3" over columns of these names and types.

    `columns` are the names that it looks at, at least one, in the order of `schema`. `place` opens the messages. Raises
    JobError where the condition cannot be understood.
    """

    def __init__(self, sql: str, schema: pa.Schema, place: str) -> None:
        import duckdb  # its loading is a good part of a start, and most jobs have no condition

        self._place = place
        self._error = duckdb.Error
        self._query = f"SELECT coalesce(({sql}\n)::BOOLEAN, false) FROM rows"
        # It is the user's own condition, but a condition that reads files or the net is none.
        self._database = duckdb.connect(config={"enable_external_access": "false"})
        tree = json.loads(self._ask("SELECT json_serialize_sql(?)", [self._query])[0].as_py())
        if tree["error"]:
            raise JobError(f"{place}: not an SQL condition: {tree['error_message']}")
        used = {name.casefold() for name in _names(tree)}
        self.columns = tuple(name for name in schema.names if name.casefold() in used) or tuple(schema.names[:1])
        # Says what is wrong with names and types; of columns that it does not need, DuckDB need not know the types.
        try:
            self.mask(pa.RecordBatch.from_pylist([], pa.schema([schema.field(name) for name in self.columns])))
        except JobError as error:
            if "Referenced column" not in str(error):
                raise
            raise JobError(f"{str(error).rstrip('!')}; the columns are {', '.join(schema.names)}") from None

    def mask(self, batch: pa.RecordBatch) -> pa.BooleanArray:
        """Which rows it holds for; null counts as false. The batch has `columns` at least. Raises JobError."""
        found = self._ask(self._query, [], batch)
        if len(found) != len(batch):
            raise JobError(f"{self._place}: a condition that gives one truth for each row, please")
        return pa.concat_arrays(found.chunks) if found.num_chunks else pa.array([], pa.bool_())

    def _ask(self, query: str, values: list[str], rows: pa.RecordBatch | None = None) -> pa.ChunkedArray:
        """The one column of the answer, whole: a value may be found to be wrong when it is fetched."""
        try:
            if rows is not None:
                self._database.register("rows", rows)
            return self._database.sql(query, params=values).to_arrow_table().column(0)
        except self._error as error:
            raise JobError(f"{self._place}: {str(error).splitlines()[0]}") from None


def _names(tree: Any) -> Iterator[str]:
    """Every word in a parsed statement that may name a column."""
    if isinstance(tree, dict):
        yield from tree.get("column_names") or ()
        for inner in tree.values():
            yield from _names(inner)
    elif isinstance(tree, list):
        for inner in tree:
            yield from _names(inner)
