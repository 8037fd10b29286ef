"""Text and JSON from outside never reach a terminal as anything but text."""

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgvqa.untrusted import MAX_DEPTH, cleaned, log_text, one_line, parse_json, parse_object, printable

TEXT = st.text(alphabet=st.characters(codec=None, min_codepoint=0, max_codepoint=0x10FFFF), max_size=40)


def obeyed(character: str) -> bool:
    """Controls (but newline and tab), changes of direction, surrogates."""
    direction = unicodedata.bidirectional(character) in ("LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI")
    return (unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t") or direction


@given(TEXT)
def test_nothing_that_a_terminal_obeys_is_left(text):
    for shown in (printable(text), log_text(text), one_line(text)):
        assert not any(map(obeyed, shown))
    assert "\n" not in one_line(text)
    assert printable(printable(text)) == printable(text)


@given(st.text(alphabet=st.characters(categories=["L", "N", "P", "S", "Zs"], exclude_characters="\ufeff")))
def test_what_people_write_stays_as_it_is(text):
    assert printable(text) == text == log_text(text) == one_line(text)


def test_the_clipboard_and_the_title_stay_alone():
    assert printable("a\x1b]52;c;cm0=\x07b") == "a\\x1b]52;c;cm0=\\x07b"
    assert log_text("\x1b[31mred\x1b[0m \x1b]0;title\x07x\x1b]8;;http://a\x1b\\y") == "red xy"
    assert log_text(" 10%\r 20%\r\ndone") == " 10%\n 20%\ndone"


@pytest.mark.parametrize(
    "document", ["[" * 100_000, "[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2), b"\xff", "{", "NaN,"]
)
def test_json_that_is_none_or_too_deep_is_a_value_error(document):
    with pytest.raises(ValueError):
        parse_json(document)


def test_keys_and_values_are_printable_and_an_object_is_asked_for():
    assert parse_object(b'{"a\\u001b": ["\\u009b", 1, null, 1.5, true]}') == {"a\\x1b": ["\\x9b", 1, None, 1.5, True]}
    with pytest.raises(ValueError, match="found list"):
        parse_object("[]")


@given(st.recursive(st.none() | st.booleans() | st.integers() | TEXT, lambda x: st.lists(x) | st.dictionaries(TEXT, x)))
def test_clean_values_are_json_that_a_terminal_can_show(value):
    assert not any(map(obeyed, json.dumps(cleaned(value), ensure_ascii=False)))


def test_a_whole_number_that_no_float_can_hold_is_refused():
    assert parse_json("[-" + "9" * 290 + "]")[0] < 0
    with pytest.raises(ValueError, match="a is a number of over 300 digits"):
        parse_json('{"a": ' + "1" * 400 + "}")
