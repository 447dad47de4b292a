"""A reward for responses in JSON."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_grpo.errors import UserError, optional
from lightning_grpo.rewards.response import ResponseReward

_FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*?)```", re.DOTALL | re.IGNORECASE)


def read_json(text: str) -> Any:
    """The JSON in a text: its last fenced block, or else the whole text. Raises ValueError if it is not valid."""
    blocks = _FENCE.findall(text)
    return json.loads(blocks[-1] if blocks else text, parse_constant=_refuse, object_pairs_hook=_unique)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key occurs twice")
    return values


@dataclass(kw_only=True, eq=False)
class JSONSchema(ResponseReward):
    """1 if the response is JSON that a schema (json-schema.org) allows, else 0. It needs ``lightning-grpo[json]``.

    The JSON is the last fenced block of the response, or the whole response. Keys that occur twice and NaN are invalid.
    """

    name: str = "json_schema"
    schema: dict[str, Any] | None = None
    """The schema. null: that of each row, in the column ``column``."""
    column: str = "schema"
    """Column with the schema, as a mapping or JSON text. Rows where it is null get no reward."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schema is not None:
            self._validator(self.schema, "JSONSchema.schema")

    def check(self, columns: Sequence[Mapping[str, Any]]) -> None:
        """Raise `UserError` for a row without a valid schema."""
        if self.schema is not None:
            return
        for row, values in enumerate(columns):
            if self.column not in values:
                raise UserError(
                    f"JSONSchema.column is {self.column!r}, and row {row} has no such column; set it to one of "
                    f"{', '.join(values) or '(none)'}, or set JSONSchema.schema"
                )
            if values[self.column] is not None:
                self._validator(values[self.column], f"JSONSchema: the {self.column!r} of row {row}")

    def _validator(self, schema: Any, source: str) -> Any:
        jsonschema = optional("jsonschema", "json", "JSONSchema")
        try:
            schema = json.loads(schema) if isinstance(schema, str) else schema
            validator = jsonschema.validators.validator_for(schema)
            validator.check_schema(schema)
        except (ValueError, TypeError, jsonschema.SchemaError) as error:
            reason = getattr(error, "message", str(error))
            raise UserError(f"{source} is not a JSON schema: {reason}; correct it") from error
        return validator(schema)

    def score(self, text: str, row: Mapping[str, Any]) -> float | None:
        schema = self.schema if self.schema is not None else row.get(self.column)
        if schema is None:
            return None
        try:
            return float(self._validator(schema, "JSONSchema.schema").is_valid(read_json(text)))
        except (ValueError, RecursionError):
            return 0.0
