"""Damaged images and archives, odd folders, files of settings: an error for people or a result."""

from fuzz.budget import fuzz_in_process
from fuzz.files import any_file


def test_any_file_is_read_or_refused_with_a_word():
    # In a process of its own: a decoder in C may crash it, a pipe or a loop of links may hang it.
    assert fuzz_in_process("files", any_file, 25) > 20
