"""Small models, tokenizers and runs that the tests share. Everything is on the CPU and needs no network."""
import contextlib
import io
import json
import os
import pathlib
import runpy
import signal
import sys
from typing import NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that slow tests start
ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

import checkpoint
from data import plain_encoder
from model import add_adapters, load_model

SHARED = ROOT.parent / "shared" / "data"
TINY = ("--preset demo --batch_size 4 --num_steps 3 --d_warmup 1 --prefix_tokens 16 --reasoning_tokens 4 "
        "--completion_tokens 12 --echo_tokens 4 --floor_sequences 6 --seeds 0 --rank 4").split()
torch.set_num_threads(1)  # other jobs may share the cores, and two threads that wait for each other are slow then


def shared(name):
    """A file of real data beside the project; the test is skipped where it is absent."""
    if not (SHARED / name).exists():
        pytest.skip(f"real data shared/data/{name} is not beside this checkout")
    return SHARED / name


class Ended(NamedTuple):
    status: int
    out: str
    err: str


def run_script(script, *words):
    """Run a script in this process, as a user would: its exit status and what it printed."""
    argv, hook, out, err, status = sys.argv, sys.excepthook, io.StringIO(), io.StringIO(), 0
    handlers = {number: signal.getsignal(number) for number in
                (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)}
    lock, checkpoint.lock = checkpoint.lock, lambda out_dir: None  # it would outlast the run, as this process does
    sys.argv = [str(ROOT / script), *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        status = end.code or 0
    finally:
        sys.argv, sys.excepthook, checkpoint.lock = argv, hook, lock
        torch.use_deterministic_algorithms(False)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return Ended(status, out.getvalue(), err.getvalue())


def lines(file):
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


def same_run(one, other):
    """Assert that two runs are one but for times, memory and the folder's name."""
    from safetensors.torch import load_file
    noisy = {"seconds", "sample_seconds", "update_seconds", "tokens_per_second", "memory_gb"}
    for name in ("rollouts", "floor", "verdicts"):
        files = [folder / f"{name}.jsonl" for folder in (one, other)]
        assert files[0].exists() == files[1].exists() and (not files[0].exists() or
                                                           files[0].read_bytes() == files[1].read_bytes())
    a, b = ([{k: v for k, v in row.items() if k not in noisy} for row in lines(folder / "metrics.jsonl")]
            for folder in (one, other))
    assert a == b
    weights = [sorted((folder / "ckpt").rglob("*.safetensors")) for folder in (one, other)]
    assert len(weights[0]) == len(weights[1]) >= 2  # an adapter or two, and a head
    for x, y in zip(*(map(load_file, files) for files in weights)):
        assert x.keys() == y.keys() and all((x[key] == y[key]).all() for key in x)


@pytest.fixture
def train(tmp_path):
    """train(*words): run train.py in this process with tiny settings, in tmp_path/run unless --out_dir is given."""
    def run(*words):
        where = [] if {"--out_dir", "--resume"} & {*map(str, words)} else ["--out_dir", tmp_path / "run"]
        return run_script("train.py", *TINY, *words, *where)
    return run


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a whole tiny run of the demo, evaluated, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "one"
    ended = run_script("train.py", *TINY, "--seeds", 2, "--out_dir", out)
    assert ended.status == 0, ended.err
    return out, ended.out


@pytest.fixture(scope="session")
def demo():
    """The demo's base model and tokenizer."""
    return load_model("demo", "none", "fp32", "cpu")


@pytest.fixture(scope="session")
def encode(demo):
    return plain_encoder(demo[1])


@pytest.fixture(scope="session")
def tiny_folder(demo, tmp_path_factory):
    """A random Qwen3 of two layers with the demo's tokenizer, saved to a folder."""
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=4100, hidden_size=32, num_hidden_layers=2, intermediate_size=48,
                         num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=512,
                         eos_token_id=demo[1].eos_token_id)
    folder = tmp_path_factory.mktemp("tiny")
    model = Qwen3ForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)  # logits of some size, so that agreement means something
    model.save_pretrained(folder)
    demo[1].save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tiny(tiny_folder):
    """The tiny model with two adapters whose weights are not zero, and its tokenizer."""
    model, tokenizer = load_model(tiny_folder, "none", "fp32", "cpu")
    torch.manual_seed(1)
    model = add_adapters(model, ["generator", "discriminator"], 4, 2.0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return model, tokenizer


@pytest.fixture(scope="session")
def qwen_tokenizer():
    return AutoTokenizer.from_pretrained(shared("qwen3_tokenizer"))
