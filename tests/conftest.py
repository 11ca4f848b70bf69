"""Small models and tokenizers that the tests share. Everything here is on the CPU, in fp32, and needs no network."""
import os
import pathlib
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from data import plain_encoder
from model import add_adapters, load_model

SHARED = ROOT.parent / "shared" / "data"
torch.set_num_threads(1)  # other work may be on the cores, and two threads that wait for each other are slow then


def shared(name):
    """A file of real data beside the project; the test is skipped where it is absent."""
    if not (SHARED / name).exists():
        pytest.skip(f"real data shared/data/{name} is not beside this checkout")
    return SHARED / name


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
    config = Qwen3Config(vocab_size=4100, hidden_size=32, num_hidden_layers=2, intermediate_size=48, num_attention_heads=2,
                         num_key_value_heads=1, head_dim=16, max_position_embeddings=512, eos_token_id=demo[1].eos_token_id)
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
