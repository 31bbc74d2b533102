"""Coercion of argument text to the types of a JSON schema."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm_jax.text.schema_coercion import coerce_to_types, schema_types

TYPES = {
    "string": [{"type": "string"}, {}, None, True, {"type": 5}, {"enum": ["a", "b"]}, {"const": 1}, {"$ref": "#/x"}],
    "integer": [{"type": "integer"}, {"type": [" Integer "]}, {"enum": [1, 2]}, {"anyOf": [{"type": "integer"}]}],
    "number": [{"type": "number"}, {"enum": [0.5]}],
    "boolean": [{"enum": [True]}],
    "null": [{"enum": [None]}],
    "array": [{"enum": [[1]]}],
    "object": [{"enum": [{}]}, {"oneOf": [{"allOf": [{"type": "object"}]}]}],
    "integer null": [{"type": ["integer", "null"]}, {"anyOf": [{"type": "integer"}, {"type": "null"}]}],
    "integer string": [{"anyOf": [{"type": "integer"}, {"$ref": "#/x"}]}, {"type": "integer", "enum": ["auto"]}],
}


@pytest.mark.parametrize(("types", "schema"), [(types, schema) for types, all_ in TYPES.items() for schema in all_])
def test_types_of_a_schema(types, schema):
    assert schema_types(schema) == set(types.split())


def test_hostile_schemas_end():
    deep: dict = {"type": "integer"}
    for _ in range(100_000):
        deep = {"anyOf": [deep]}
    assert schema_types(deep) == {"integer"}
    loop: dict = {"anyOf": []}
    loop["anyOf"] += [loop, loop]
    assert schema_types(loop) == frozenset()
    while "anyOf" in deep:  # dismantled step by step, because freeing it at once recurses
        deep = deep.pop("anyOf")[0]


CASES = [
    ("string", "5", "5"),
    ("string", " true ", " true "),
    ("string null", "null", None),
    ("string null", " null", " null"),
    ("string null", "NULL", None),
    ("integer", "5", 5),
    ("integer", " -05\n", -5),
    ("integer", "+7", 7),
    ("integer", "3.0", 3.0),
    ("integer", "1_000", "1_000"),
    ("integer", "٣", "٣"),
    ("integer", "five", "five"),
    ("integer", "", ""),
    ("integer string", "5", 5),
    ("integer string", "5a", "5a"),
    ("number", "3.0", 3),
    ("number", "3.5", 3.5),
    ("number", "-1e3", -1000),
    ("number", ".5", 0.5),
    ("number", "1e300", 1e300),
    ("number", "1e999", "1e999"),
    ("number", "inf", "inf"),
    ("number", "NaN", "NaN"),
    ("number", "Infinity", "Infinity"),
    ("integer number", "3.5", 3.5),
    ("boolean", "true", True),
    ("boolean", " False ", False),
    ("boolean", "1", True),
    ("boolean", "0", False),
    ("boolean", "yes", "yes"),
    ("boolean integer", "1", 1),
    ("object", '{"a": [1, null]}', {"a": [1, None]}),
    ("object", "{'a': 1}", "{'a': 1}"),
    ("object", '{"a": NaN}', '{"a": NaN}'),
    ("object", '{"a": 1e999}', '{"a": 1e999}'),
    ("object", '{"a": "\\ud800"}', '{"a": "\\ud800"}'),
    ("object string", "5", "5"),
    ("object string", '{"a": 1}', {"a": 1}),
    ("array", "[1, 2]", [1, 2]),
    ("array string", '{"a": 1}', '{"a": 1}'),
    ("array", "1, 2", "1, 2"),
    ("integer", "[1]", [1]),
    ("null", "5", 5),
    ("any", "5", 5),
    ("any", "x", "x"),
]


@pytest.mark.parametrize(("types", "text", "value"), CASES)
def test_coercion(types, text, value):
    coerced = coerce_to_types(text, frozenset(types.split()))
    assert coerced == value
    assert type(coerced) is type(value)


def test_oversized_values_stay_text():
    for types in ("integer", "object", "array", "any", "number"):
        for text in ("[" * 100_000, "9" * 5000):
            assert coerce_to_types(text, frozenset([types])) == text


@given(
    text=st.text() | st.from_regex(r'[-+]?[0-9.eE]+|[\[{][\[\]{}":,0-9 ]*', fullmatch=True),
    types=st.frozensets(st.sampled_from("null integer number boolean object array string".split())),
)
def test_a_value_is_always_json(text, types):
    value = coerce_to_types(text, types)
    assert json.loads(json.dumps(value, allow_nan=False)) == value
    if types == {"string"}:
        assert value == text


@given(value=st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists))
def test_json_is_read_back(value):
    kinds = {list: "array", bool: "boolean", int: "integer", type(None): "null", str: "string"}
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    assert coerce_to_types(text, frozenset([kinds[type(value)]])) == value


@given(value=st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_are_read_back(value):
    coerced = coerce_to_types(repr(value), frozenset(["number"]))
    assert math.isclose(coerced, value, rel_tol=0, abs_tol=0)
