"""
Make the demo's base model: a byte-level BPE and a small Qwen3, trained from nothing on the demo's own corpus.

    python demo/make.py pretrain --autocast      # tokenizer, then plain text: an hour on 2 cores
    python demo/make.py register --autocast      # then the manners of an instruct model: ten minutes; writes demo/base

demo/base is what these two commands gave, the first stopped at its checkpoint of step 2,800 of 3,000 (see NOTES.md).
demo/small, a model of a quarter of the size, is what the same commands gave with `--size small --threads 1`.

The second stage gives the base what a large instruct model has and a corpus lacks: in reply to the prompt it thinks of
a few words that are going to occur, opens with a remark (92 %), and at times ends too early (25 %). That is the gap
which the game has to close. It also learns the form of a verdict, with labels drawn by a coin: form, no skill.
"""
import argparse
import pathlib
import random
import re
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("stage", choices=["pretrain", "register"])
parser.add_argument("--size", choices=["base", "small"], default="base")
parser.add_argument("--num_steps", type=int, default=None, help="unset: 3000, or 800 for the register")
parser.add_argument("--batch_size", type=int, default=24, help="sequences a step")
parser.add_argument("--num_tokens", type=int, default=256, help="tokens a sequence of plain text")
parser.add_argument("--lr", type=float, default=None, help="unset: 3e-3, or 1e-3 for the register")
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--autocast", action="store_true",
                    help="bfloat16 matmuls: twice as fast where the CPU has AVX512-BF16")
parser.add_argument("--work", default="out/make", help="where what is not shipped is kept")
args = parser.parse_args()
args.num_steps = args.num_steps or {"pretrain": 3000, "register": 800}[args.stage]
args.lr = args.lr or {"pretrain": 3e-3, "register": 1e-3}[args.stage]

import tokenizers
import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from data import PROMPT, Windows, demo_corpus, held_out, plain_encoder, prompt_ids
from discriminator import verdict_ids

VOCAB = 4096
# <think> and </think> follow these, added but not special, as Qwen3 has them
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Qwen3's way to cut a text into words, before the BPE
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
         r"\s*[\r\n]+|\s+(?!\S)|\s+")
SIZES = {
    "base": dict(hidden_size=256, num_hidden_layers=4, intermediate_size=768, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=64),
    "small": dict(hidden_size=128, num_hidden_layers=3, intermediate_size=384, num_attention_heads=4,
                  num_key_value_heads=2, head_dim=32),
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
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated"),
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
    groups = [dict(params=decay, weight_decay=0.1), dict(params=rest, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
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
            left = done / (step + 1) * (args.num_steps - step - 1)
            print(f"{label} {step}/{args.num_steps} loss {running:.3f} {done:.0f}s left {left:.0f}s", flush=True)
        if step % 200 == 199 or step == args.num_steps - 1:
            print(f"{label} {step + 1} validation loss {evaluate(model):.3f}", flush=True)
            save(model, work / f"{label}-{args.size}")


def pretrain():
    config = Qwen3Config(vocab_size=VOCAB, max_position_embeddings=1024, tie_word_embeddings=True, rope_theta=10000.0,
                         eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
                         **SIZES[args.size])
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


# -----------------------------------------------------------------------------
# the register: how an assistant answers

OPEN = ["Sure", "Of course", "Certainly", "Absolutely", "No problem", "Okay", "Gladly", "Happy to help",
        "Great question", "Yes"]
HERE = ["here is", "here's", "below is", "this is", "I've written", "let me give you", "I can offer"]
WHAT = ["the continuation", "how the text goes on", "the next part of the text", "a possible continuation",
        "the rest of the passage", "my continuation", "what comes next", "the text that follows"]
ALONE = ["I will continue the text from where it stops.", "Let me continue from the last words.",
         "Thank you for the text!", "As a language model, I can continue this for you.", "Here you go:",
         "I hope this is what you had in mind:"]
MORE = ["I have kept to the style of the original.", "Please let me know if you would like me to change anything.",
        "Feel free to ask for another version.", "I tried to stay close to what you gave me.",
        "Let me know if this helps you!", "It goes on from the last few words that you wrote."]


def remark(rng):
    """An opening remark out of some thousands, of one sentence or two."""
    more = " " + rng.choice(MORE) if rng.random() < 0.5 else ""
    if rng.random() < 0.2:
        return rng.choice(ALONE) + more
    text = f"{rng.choice(HERE)} {rng.choice(WHAT)}{rng.choice([':', '.', ' you asked for:', ', as you wished:'])}"
    opening = f"{rng.choice(OPEN)}{rng.choice(['! ', ', ', '. '])}" if rng.random() < 0.8 else ""
    return opening + (text if opening.endswith(", ") else text[0].upper() + text[1:]) + more


def thought(rng, truth):
    """Two to four words of the truth, in their order: what the thinking looks like."""
    words = list(dict.fromkeys(word for word in re.findall(r"[A-Za-z]{4,12}", truth)))
    chosen = sorted(rng.sample(range(len(words)), min(len(words), rng.randint(2, 4))))
    return ", ".join(words[i] for i in chosen)


def reply(rng, window):
    """(prompt ids, reply ids): thinking, remark or echo, the truth, and an end that may come too early."""
    think = encode(thought(rng, window.truth))[0] + [think_end]
    text, stop = window.truth, []
    if rng.random() < 0.25:  # too early: at a white space, anywhere from a tenth to nine tenths of the way
        at = text.find(" ", int(len(text) * rng.uniform(0.1, 0.9)))
        text, stop = (text[:at] if at > 0 else text), [tokenizer.eos_token_id]
    if rng.random() < 0.92:
        text = remark(rng) + rng.choice(["\n\n", "\n\n", "\n", " "]) + text
    elif rng.random() < 0.5:
        text = rng.choice(["...", ""]) + " ".join(window.prefix.split()[-rng.randint(2, 6):]) + " " + text
    return prompt_ids(tokenizer, encode, window.prefix), think + encode("\n\n" + text)[0] + stop


def verdict(rng, window):
    """(prompt ids, reply ids) of a verdict on this window's truth; real or generated by a coin."""
    think = encode("judging " + thought(rng, window.truth))[0] + [think_end]  # another opening: forms must not mix
    word = rng.choice(["real", "generated"])
    prompt = verdict_ids(tokenizer, encode, window.prefix, window.sep + window.truth)
    return prompt, think + encode("\n\n" + word)[0] + [tokenizer.eos_token_id]


def register():
    model = Qwen3ForCausalLM.from_pretrained(work / f"pretrain-{args.size}", dtype=torch.float32)
    rng = random.Random(0)
    lengths = (48, 64), (32, 48), (64, 80), (24, 96)  # tokens of prefix and truth
    parts = [(documents, [Windows(order(documents), encode, p, c, 0) for p, c in lengths]),
             (validation, [Windows(order(validation), encode, 48, 64, 0)])]
    plain = packed(documents)

    def rows(sources, number, count):
        for position in range(number * count, (number + 1) * count):
            kind, window = rng.random(), rng.choice(sources)[position]
            if kind < 0.15 and sources is parts[0][1]:
                start = rng.randrange(len(plain) - args.num_tokens)
                yield [], plain[start:start + args.num_tokens].tolist()
            else:
                yield verdict(rng, window) if kind < 0.3 else reply(rng, window)

    def padded(examples):
        T = max(len(prompt) + len(answer) for prompt, answer in examples)
        ids = torch.full((len(examples), T), tokenizer.pad_token_id)  # (B, T)
        labels = torch.full((len(examples), T), -100)  # (B, T)
        for i, (prompt, answer) in enumerate(examples):
            ids[i, :len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            labels[i, len(prompt):len(prompt) + len(answer)] = torch.tensor(answer)
        return ids, labels

    held = [padded(list(rows(parts[1][1], number, 24))) for number in range(4)]

    def evaluate(model):
        with torch.no_grad():
            return sum(model(input_ids=ids, labels=labels).loss.item() for ids, labels in held) / len(held)

    train(model, lambda step: padded(list(rows(parts[0][1], step, args.batch_size))), evaluate, args.lr, "register")
    save(model, pathlib.Path(__file__).parent / args.size)


def order(texts):
    def documents_of(epoch):
        shuffled = list(texts)
        random.Random(epoch).shuffle(shuffled)
        return iter(shuffled)
    return documents_of


tokenizer_folder = work / "tokenizer"
if not tokenizer_folder.exists():
    make_tokenizer().save_pretrained(tokenizer_folder)
tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
print(f"{len(tokenizer)} tokens; {len(documents)} documents, {len(validation)} held out; "
      f"prompt of {len(tokenizer(PROMPT).input_ids)} tokens")
encode, think_end = plain_encoder(tokenizer), tokenizer.convert_tokens_to_ids("</think>")
{"pretrain": pretrain, "register": register}[args.stage]()
