"""What `dnd` says when it ends is one line, whatever a file or a name holds."""

import pytest

from dnd_jax.core.errors import LONGEST, tell


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nTraceback", "a\\nTraceback"),
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        ("half \ud83d", "half \\ud83d"),
        ("right \u202e to left", "right \\u202e to left"),
        ("naïve, 猫, 🐈", "naïve, 猫, 🐈"),
    ],
)
def test_a_line_is_printable(text, shown, capsys):
    tell(text)
    assert capsys.readouterr().err == f"dnd: {shown}\n"


def test_a_long_value_is_shortened(capsys):
    tell(f"begins {'x' * 10**6} ends")
    line = capsys.readouterr().err
    assert line.startswith("dnd: begins x") and line.endswith("x ends\n")
    assert LONGEST < len(line) < LONGEST + 30
