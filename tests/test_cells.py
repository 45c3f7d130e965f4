"""Tags are read from cells as they were written, or refused."""

import json
import random
import re
from typing import Any

import numpy as np
import pytest

from job.dataset.cells import CellError, Number, parse_tags

NAN = float("nan")


@pytest.mark.parametrize(
    ("value", "tags"),
    [
        ("['a', 'b']", ("a", "b")),
        ('["a", "b"]', ("a", "b")),
        ("('a', 'b')", ("a", "b")),
        ("['machine learning' 'deep learning']", ("machine learning", "deep learning")),
        ("['a'\n 'b']", ("a", "b")),
        ("[\"it's\" 'b']", ("it's", "b")),
        ("array(['a', 'b'], dtype=object)", ("a", "b")),
        ("[np.str_('a'), np.str_('b')]", ("a", "b")),
        ("{'a', 'b'}", ("a", "b")),
        ('{a,b,"c d"}', ("a", "b", "c d")),
        ("[machine learning, deep learning]", ("machine learning", "deep learning")),
        ("[c++, c#]", ("c++", "c#")),
        ("[None, 'a', nan, '']", ("a",)),
        ('["a", null]', ("a",)),
        ("['None', 'nan']", ("None", "nan")),
        ("['caf\\u00e9', 'it\\'s', 'tab\\there']", ("café", "it's", "tab\there")),
        ("{'a': True, 'b': False}", ("a",)),
        ('{"a": 1, "b": 0}', ("a",)),
        (r"['back\dash']", (r"back\dash",)),
        ("\"['a', 'b']\"", ("a", "b")),
        ("array(['a', 'b'],\n      dtype='<U22')", ("a", "b")),
        ('["[draft]", "b"]', ("[draft]", "b")),
        ("set()", ()),
        ("NULL", ()),
        ("nan, a", ("a",)),
        ("(3, 5)", ("3", "5")),
        ({"a": Number("1"), "b": Number("0.0")}, ("a",)),
        ("[]", ()),
        ("{}", ()),
        ("", ()),
        ("[a,,b]", ("a", "b")),
        ("3.10, 3.11", ("3.10", "3.11")),
        ("[3.10, 3.11]", ("3.10", "3.11")),
        ("[3.10 3.11]", ("3.10", "3.11")),
        ("2.0", ("2.0",)),
        ("1e5", ("1e5",)),
        ("007", ("007",)),
        ("life, love", ("life", "love")),
        ('"life, death", love', ("life, death", "love")),
        ('5" pipe, other', ('5" pipe', "other")),
        ("(see below)", ("(see below)",)),
        ("<c#><.net>", ("<c#><.net>",)),
        ("a, a, b", ("a", "b")),
        (["life", "love", "life"], ("life", "love")),
        (["a", None, NAN, " b "], ("a", "b")),
        (np.array(["a", "b"]), ("a", "b")),
        ({"a": True, "b": False, "c": None}, ("a",)),
        (Number("3.10"), ("3.10",)),
        ([Number("3.10"), Number("3")], ("3.10", "3")),
        (5, ("5",)),
        (None, ()),
        (NAN, ()),
    ],
)
def test_a_cell_is_read_as_it_was_written(value: Any, tags: tuple[str, ...]) -> None:
    assert parse_tags(value) == tags


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("['a' 'b' ... 'z']", "was shortened with ..."),
        ("['a', 'b' 'c']", "comma between some items and none between others"),
        ("[sic] a note", "begins with [ and does not end with ]"),
        ("['a', 'b'", "begins with [ and does not end with ]"),
        ("{'choices': ['a']}", "is a record"),
        ('{"choices": ["a"]}', "is a record with the fields choices"),
        ("[['a'], ['b']]", "holds a list"),
        ("[{'name': 'b'}]", "holds a list or record"),
        ("[it's, b]", "quote inside of an item"),
        ("[1, 0, 0, 1]", "a vector of 0 and 1"),
        ([1, 0, 1], "a vector of 0 and 1"),
        ([True, False], "a vector of 0 and 1"),
        ("[1. 0. 0.]", "a vector of 0 and 1"),
        ("1,0,0,1", "a vector of 0 and 1"),
        (True, "holds True, which is no text"),
        ([b"a"], "holds b'a', which is no text"),
        (["['a', 'b']"], "holds the list"),
        ("a, b]", "a piece of a list"),
        ("'a', 'b'", "a list without its brackets"),
        ("deque(['a', 'b'])", "a value of another type"),
        ("Index(['a'], dtype='object')", "a value of another type"),
        ("b'a'", "a value of another type"),
        ('"a"=>"1", "b"=>"0"', "a value of another type"),
        ("[   0    1    2 ... 1997]", "which is no tag"),
        ("{node.js: true, c: false}", "which is no tag"),
        (["a", {"name": "b"}], "holds a record with the fields name"),
        (["a", ["b"]], "holds a list in place of a tag"),
        ({"choices": ["a"]}, "is a record with the fields choices"),
    ],
)
def test_what_is_no_list_of_tags_is_refused(value: Any, message: str) -> None:
    with pytest.raises(CellError, match=re.escape(message)):
        parse_tags(value)


@pytest.mark.parametrize(
    ("text", "delimiter", "tags"),
    [
        ("<c#><.net>", "><", ("c#", ".net")),
        ("a; b, c", ";", ("a", "b, c")),
        ("a|b", "|", ("a", "b")),
        ('"a|b"|c', "|", ("a|b", "c")),
        ('"machine learning" python', " ", ("machine learning", "python")),
        ("<c#> <.net>", "><", ("c#", ".net")),
        ("a  b\tc", " ", ("a", "b", "c")),
        ("a b\nc", "\n", ("a b", "c")),
        ("['a', 'b']", ";", ("a", "b")),
    ],
)
def test_a_delimiter_cuts_what_is_no_list(text: str, delimiter: str, tags: tuple[str, ...]) -> None:
    assert parse_tags(text, delimiter) == tags


def random_tags(rng: random.Random) -> list[str]:
    alphabet = "ab'\"\\,[]{}() é\n\t;:#.0-"
    return ["".join(rng.choice(alphabet) for _ in range(rng.randint(1, 6))) for _ in range(rng.randint(1, 4))]


@pytest.mark.parametrize(
    "write",
    [
        json.dumps,
        repr,
        lambda tags: repr(tuple(tags)),
        lambda tags: json.dumps(tags, ensure_ascii=False),
        lambda tags: str(np.array(tags)),
        lambda tags: str(np.array(tags, dtype=object)),
        lambda tags: repr(np.array(tags)),
    ],
    ids=["json", "python", "tuple", "json-unicode", "numpy", "numpy-object", "numpy-repr"],
)
def test_any_written_list_comes_back_the_same_or_is_refused(write: Any) -> None:
    rng = random.Random(0)
    read = 0
    for _ in range(2000):
        tags = random_tags(rng)
        expected = tuple(dict.fromkeys(text for tag in tags if (text := tag.strip())))
        try:
            found = parse_tags(write(tags))
        except CellError:
            continue
        assert found == expected, write(tags)
        read += 1
    assert read > 1900, "few are refused"
