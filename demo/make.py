"""
Make the demo's base models: a byte-level BPE and two small Qwen3s, trained from nothing on the demo's own corpus.

    python demo/make.py pretrain                 # tokenizer, then plain text
    python demo/make.py pretrain --size small
"""
import argparse
import json
import pathlib
import random
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("stage", choices=["pretrain"])
parser.add_argument("--size", choices=["base", "small"], default="base")
parser.add_argument("--num_steps", type=int, default=3000)
parser.add_argument("--batch_size", type=int, default=24, help="sequences a step")
parser.add_argument("--num_tokens", type=int, default=256, help="tokens a sequence")
parser.add_argument("--lr", type=float, default=3e-3)
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--autocast", action="store_true", help="bfloat16 matmuls: twice as fast where the CPU has AVX512-BF16")
parser.add_argument("--work", default="out/make", help="where what is not shipped is kept")
args = parser.parse_args()

import tokenizers
import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from data import PROMPT, demo_corpus, held_out

VOCAB = 4096
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # then <think> and </think>, added but not special, as Qwen3 has them
SIZES = {
    "base": dict(hidden_size=256, num_hidden_layers=4, intermediate_size=768, num_attention_heads=4, num_key_value_heads=2, head_dim=64),
    "small": dict(hidden_size=128, num_hidden_layers=3, intermediate_size=384, num_attention_heads=4, num_key_value_heads=2, head_dim=32),
}
torch.manual_seed(0)
torch.set_num_threads(args.threads)
work = pathlib.Path(args.work)
work.mkdir(parents=True, exist_ok=True)
documents = [text for text in demo_corpus() if not held_out(text)]
validation = [text for text in demo_corpus() if held_out(text)]


def make_tokenizer():
    """A byte-level BPE with Qwen3's special tokens, trained on the corpus and on the prompt's own words."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=VOCAB - 2, special_tokens=SPECIAL, show_progress=False,
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    # the prompt's words often enough to become whole tokens: a prompt is read at every step
    bpe.train_from_iterator(documents + [PROMPT.split("{text}")[0]] * 300, trainer)
    bpe.add_tokens([tokenizers.AddedToken(token, special=False, normalized=False) for token in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   model_max_length=1024, clean_up_tokenization_spaces=False)


def packed(texts):
    """All texts as one row of ids, <|endoftext|> after each."""
    return torch.tensor([i for e in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
                         for i in e.ids + [tokenizer.pad_token_id]])


def save(model, folder):
    """Weights in half precision, as safetensors, with config and tokenizer."""
    half = Qwen3ForCausalLM(model.config).half()
    half.load_state_dict(model.state_dict())
    half.generation_config.eos_token_id = model.config.eos_token_id
    half.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(model, batch, evaluate, lr, label):
    """AdamW with a warm-up of 50 steps, then linearly to a tenth; batch(step) gives ids and labels."""
    decay = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW([dict(params=decay, weight_decay=0.1), dict(params=rest, weight_decay=0.0)], betas=(0.9, 0.95))
    began, running = time.time(), None
    for step in range(args.num_steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / 50, 1 - 0.9 * step / args.num_steps)
        ids, labels = batch(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.autocast):
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if step % 20 == 0:
            done = time.time() - began
            print(f"{label} {step}/{args.num_steps} loss {running:.3f} {done:.0f}s left {done / (step + 1) * (args.num_steps - step - 1):.0f}s", flush=True)
        if step % 200 == 199 or step == args.num_steps - 1:
            print(f"{label} {step + 1} validation loss {evaluate(model):.3f}", flush=True)
            save(model, work / f"{label}-{args.size}")


def pretrain():
    config = Qwen3Config(vocab_size=VOCAB, max_position_embeddings=1024, tie_word_embeddings=True, rope_theta=10000.0,
                         eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None, **SIZES[args.size])
    model = Qwen3ForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    T = args.num_tokens
    held = packed(validation)
    held = held[:len(held) // T * T].view(-1, T)[:128]  # (N, T)

    def stream():
        for epoch in range(1000):
            random.Random(epoch).shuffle(documents)
            row = packed(documents)
            row = row[random.Random(epoch).randrange(T):]
            yield from row[:len(row) // T * T].view(-1, T)  # (T,)

    def evaluate(model):
        with torch.no_grad():
            return sum(model(input_ids=ids, labels=ids).loss.item() for ids in held.split(32)) / 4

    rows = stream()

    def batch(step):
        ids = torch.stack([next(rows) for _ in range(args.batch_size)])  # (B, T)
        return ids, ids

    train(model, batch, evaluate, args.lr, "pretrain")


tokenizer_folder = work / "tokenizer"
if not tokenizer_folder.exists():
    make_tokenizer().save_pretrained(tokenizer_folder)
tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
print(f"{len(tokenizer)} tokens; {len(documents)} documents, {len(validation)} held out; "
      f"prompt of {len(tokenizer(PROMPT).input_ids)} tokens")
pretrain()
