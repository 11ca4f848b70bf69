"""README says what is there: its commands parse, its files exist, its glossary is the log's."""
import re

from conftest import ROOT
from test_scripts import METRICS, run

README = (ROOT / "README.md").read_text()


def test_every_flag_in_the_readme_exists():
    known = set(re.findall(r"--\w+", "".join(run("--help", script=script).stdout for script in
                                             ("train.py", "evaluate.py", "plot.py", "sweep.py", "traces.py", "sft.py", "export.py", "bench.py")))) | {"--flag"}
    known |= set(re.findall(r'"(--\w+)"', (ROOT / "demo" / "make.py").read_text()))
    assert set(re.findall(r"--[a-z]\w+", README)) <= known


def test_every_command_in_the_readme_names_a_script_and_starts():
    commands = [line.split("#")[0].split("&&")[-1].split() for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()]
    commands = [words for words in commands if words]
    assert len(commands) >= 6
    for words in commands:
        assert words[0] == "python"
        if words[1:3] == ["-m", "pytest"]:
            assert (ROOT / words[-1]).is_dir()
        else:
            assert (ROOT / words[1]).exists()
            if "/" not in words[1]:
                end = words.index("--") if "--" in words else len(words)  # what follows it is for train.py
                assert run(*words[2:end], "--help", script=words[1]).returncode == 0, words
                assert run(*words[end + 1:], "--help").returncode == 0, words


def test_the_two_commands_install_what_is_pinned():
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    for block, ending in zip(blocks, ("python train.py --preset demo", "python -m pytest -q tests")):
        assert block.strip() == f"python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt && {ending}"
    assert "pip install -q -r requirements.txt\npython -m pytest -q tests\n" in (ROOT / ".ci" / "run").read_text()


def test_no_number_is_left_open():
    assert "@@" not in README


def test_every_file_in_the_map_exists_and_every_script_is_in_it():
    mapped = re.findall(r"^\| `([\w./]+)` \|", README, re.M)
    names = {name for name in mapped if name.endswith((".py", ".md", "/"))}
    assert all((ROOT / name).exists() for name in names)
    assert {path.name for path in ROOT.glob("*.py")} <= names


def test_the_glossary_names_every_metric():
    glossary = README[README.index("### Glossary"):README.index("## How to fork")]
    assert set(METRICS) - {"step"} <= set(re.findall(r"`(\w+)`", glossary))
