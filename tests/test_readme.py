"""README and docs match the code: commands and flags parse, files exist, every logged key is explained."""
import functools
import re
import runpy
import shlex
from unittest import mock

import pytest

import flags
import sweep
from conftest import ROOT

PAGES = {page: page.read_text() for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
SCRIPTS = [*ROOT.glob("tools/*.py"), *"train.py evaluate.py sample.py sweep.py plot.py".split()]
BLOCKS = re.findall(r"```bash\n(.*?)```", "".join(PAGES.values()), re.S)
COMMANDS = [shlex.split(line, comments=True)[1:] for line in "".join(BLOCKS).replace(" && ", "\n").replace("\\\n", "").splitlines()
            if line.startswith("python ") and " pytest " not in line]


@functools.cache
def parser_of(script):
    """A script's parser, caught where it is about to read the command line."""
    caught = mock.patch.object(flags.Parser, "parse_known_args", autospec=True, side_effect=LookupError)
    with caught as parse, mock.patch("sys.argv", [str(script)]), pytest.raises(LookupError):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return parse.call_args.args[0]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_parses_as_printed(words, monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *_: None)  # a parser changes what Ctrl-C does
    script, *words = [words[1].replace(".", "/") + ".py", *words[2:]] if words[0] == "-m" else words
    if script == "sweep.py":  # train.py gets what sweep.py does not know
        cut = [*words, "--"].index("--")
        known, unknown = parser_of(script).parse_known_args(words[:cut])
        script, words = "train.py", unknown + words[cut + 1:]
        assert sweep.read_factors(known.factors)
    parser_of(script).parse_args(words)


# flags of torchrun, vLLM and srun
FOREIGN = {*"""--nproc_per_node --nnodes --rdzv_backend --rdzv_endpoint --shutdown-timeout --enable-lora --max-lora-rank
--generation-config --logprobs-mode --max-model-len --gres --signals-to-handle""".split()}


def test_readme_is_short_and_names_flags_and_files_that_exist():
    readme = PAGES[ROOT / "README.md"]
    assert len(readme.splitlines()) <= 150 and len(readme.split()) <= 1800
    named = {flag for page in PAGES.values() for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", page)}
    assert named - FOREIGN <= {flag for script in SCRIPTS for flag in parser_of(script)._option_string_actions}
    files = {*re.findall(r"`([\w/]+(?:\.py|/))`", readme.partition("\n## Files")[2].partition("\n## ")[0])}
    links = [page.parent / link for page, text in PAGES.items() for link in re.findall(r"\]\(([^):#]+)", text)]
    assert files and not [file for file in [*map(ROOT.joinpath, files), *links] if not file.exists()]


def test_every_key_of_a_run_is_explained(finished):
    run, explained = flags.Run(finished[0]), {*re.findall(r"`(\w+)`", PAGES[ROOT / "docs" / "files.md"])}
    rows = [run.metrics[0], run.rollouts[0], run.floor[0], run.result, run.mauve, run.info]
    assert {re.sub("(?<!advantage)_(sd|interval)$", "", key) for row in rows for key in row} <= explained
