"""README and docs say what is there: their commands and flags parse, their files exist, every logged key is explained."""
import functools
import re
import runpy
import shlex
import sys
from unittest import mock

import pytest

import flags
from conftest import ROOT, lines

README = (ROOT / "README.md").read_text()
PAGES = {page.name: page.read_text() for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
SCRIPTS = [f"{name}.py" for name in "train evaluate sample sweep plot".split()]
TOOLS = [f"tools.{path.stem}" for path in sorted((ROOT / "tools").glob("*.py"))]
COMMANDS = [shlex.split(line, comments=True) for page in PAGES.values() for block in re.findall(r"```bash\n(.*?)```", page, re.S)
            for part in block.splitlines() for line in part.split("&&") if line.strip().startswith("python ")]


class Caught(Exception):
    pass


@functools.cache
def parser_of(script):
    """The real parser of a script or a tool, caught when the script hands it the command line."""
    def catch(self, *_):
        raise Caught(self)

    with mock.patch.object(flags.Parser, "parse_known_args", catch), mock.patch.object(sys, "argv", [script]):
        with pytest.raises(Caught) as caught:
            (runpy.run_path if script.endswith(".py") else runpy.run_module)(script, run_name="__main__")
    return caught.value.args[0]


@pytest.mark.parametrize("words", [words for words in COMMANDS if "pytest" not in words], ids=" ".join)
def test_a_command_parses_as_printed(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    script, *words = words[2:] if words[1] == "-m" else words[1:]
    if script == "sweep.py":  # what it does not know goes to train.py
        _, words = parser_of(script).parse_known_args(words[:[*words, "--"].index("--")])
        script, words = "train.py", words + COMMANDS[0][:0]
    parser_of(script).parse_args(words)
