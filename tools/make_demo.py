"""
Make the demo's base model: a byte-level BPE and a small Qwen3, trained from scratch on the demo's own corpus.

    python -m tools.make_demo pretrain --autocast      # tokenizer, then plain text: an hour on 2 cores
    python -m tools.make_demo register --autocast      # then an assistant's habits: ten minutes; writes demo/base

The second stage gives the base what a large instruct model has and a corpus lacks. In reply to the prompt it thinks of
a few words that are going to occur, opens with a remark (92 %), and sometimes ends too early (25 %): the gap that the
game has to close. It also learns the form of a verdict from labels drawn by a coin: form, no skill.

The shipped demo/base was made by these commands on an earlier version of the data, the first stopped at step 2,800 of
3,000 (see NOTES.md); demo/small, a quarter of the size, with `--size small --threads 1`.
"""
import argparse
import pathlib
import random
import re
import time

from flags import Parser, UserError

VOCAB = 4096
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # then <think> and </think>, added but not special: as Qwen3
# Qwen3's way to cut a text into words before the BPE
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
         r"\s*[\r\n]+|\s+(?!\S)|\s+")
SIZES = {
    "base": dict(hidden_size=256, num_hidden_layers=4, intermediate_size=768, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=64),
    "small": dict(hidden_size=128, num_hidden_layers=3, intermediate_size=384, num_attention_heads=4,
                  num_key_value_heads=2, head_dim=32),
}
LENGTHS = (48, 64), (32, 48), (64, 80), (24, 96)  # tokens of prefix and truth in the second stage

# an assistant's opening remarks
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


def make_tokenizer(documents):
    """A byte-level BPE with Qwen3's special tokens, trained on the corpus and on the prompt's words."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated"),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=VOCAB - 2, special_tokens=SPECIAL, show_progress=False,
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    # the prompt often enough for its words to become whole tokens: it is read at every step
    bpe.train_from_iterator(documents + [PROMPT.split("{text}")[0]] * 300, trainer)
    bpe.add_tokens([tokenizers.AddedToken(token, special=False, normalized=False) for token in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   model_max_length=1024, clean_up_tokenization_spaces=False)


def packed(tokenizer, texts):
    """All texts as one row of ids, <|endoftext|> after each."""
    encodings = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return torch.tensor([i for encoding in encodings for i in encoding.ids + [tokenizer.pad_token_id]])  # (T,)


def save(model, tokenizer, folder):
    """Weights in half precision, as safetensors, with config and tokenizer."""
    half = Qwen3ForCausalLM(model.config).half()
    half.load_state_dict(model.state_dict())
    half.generation_config.eos_token_id = model.config.eos_token_id
    half.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(model, tokenizer, batch, held, args):
    """AdamW, 50 steps of warm-up, then linearly to a tenth. batch(step) and each of `held` are ids and labels."""
    groups = [dict(params=[p for p in model.parameters() if (p.ndim == 2) == decay], weight_decay=0.1 * decay)
              for decay in (True, False)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    began, mean = time.perf_counter(), None
    for step in range(args.num_steps):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min((step + 1) / 50, 1 - 0.9 * step / args.num_steps)
        ids, labels = batch(step)  # (B, T) each
        with torch.autocast("cpu", torch.bfloat16, enabled=args.autocast):
            loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if step % 20 == 0:
            left = (time.perf_counter() - began) / (step + 1) * (args.num_steps - step - 1)
            print(f"{args.stage} {step}/{args.num_steps} | loss {mean:.3f} | {left:.0f} s left", flush=True)
        if step % 200 == 199 or step == args.num_steps - 1:
            with torch.no_grad():
                losses = [model(input_ids=ids, labels=labels).loss.item() for ids, labels in held]
            print(f"{args.stage} {step + 1} | held-out loss {sum(losses) / len(losses):.3f}", flush=True)
            save(model, tokenizer, pathlib.Path(args.work) / f"{args.stage}-{args.size}")


def pretrain(tokenizer, documents, validation, args):
    """Plain text, packed into rows of num_tokens."""
    config = Qwen3Config(vocab_size=VOCAB, max_position_embeddings=1024, tie_word_embeddings=True, rope_theta=10000.0,
                         eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
                         **SIZES[args.size])
    model = Qwen3ForCausalLM(config)

    def rows(ids):
        return ids[:len(ids) // args.num_tokens * args.num_tokens].view(-1, args.num_tokens)  # (N, T)

    def stream():
        for epoch in range(1000):
            random.Random(epoch).shuffle(documents)
            yield from rows(packed(tokenizer, documents)[random.Random(epoch).randrange(args.num_tokens):])  # (T,)

    endless = stream()

    def batch(step):
        return (torch.stack([next(endless) for _ in range(args.batch_size)]),) * 2  # (B, T) each, ids and labels

    held = [(ids, ids) for ids in rows(packed(tokenizer, validation))[:128].split(32)]
    train(model, tokenizer, batch, held, args)


def remark(rng):
    """An opening remark out of some thousands, of one sentence or two."""
    more = " " + rng.choice(MORE) if rng.random() < 0.5 else ""
    if rng.random() < 0.2:
        return rng.choice(ALONE) + more
    text = f"{rng.choice(HERE)} {rng.choice(WHAT)}{rng.choice([':', '.', ' you asked for:', ', as you wished:'])}"
    opening = f"{rng.choice(OPEN)}{rng.choice(['! ', ', ', '. '])}" if rng.random() < 0.8 else ""
    return opening + (text if opening.endswith(", ") else text[0].upper() + text[1:]) + more


def thought(rng, truth):
    """Two to four words of the truth, in their order: what the thinking consists of."""
    words = list(dict.fromkeys(re.findall(r"[A-Za-z]{4,12}", truth)))
    chosen = sorted(rng.sample(range(len(words)), min(len(words), rng.randint(2, 4))))
    return ", ".join(words[i] for i in chosen)


def reply(rng, tokenizer, encode, window):
    """(prompt ids, reply ids): thinking, remark or echo, the truth, and an end that may come too early."""
    text, stop, think_end = window.truth, [], tokenizer.convert_tokens_to_ids("</think>")
    think = encode(thought(rng, text))[0] + [think_end]
    if rng.random() < 0.25:  # an early end, at a space from a tenth to nine tenths of the way
        at = text.find(" ", int(len(text) * rng.uniform(0.1, 0.9)))
        text, stop = (text[:at] if at > 0 else text), [tokenizer.eos_token_id]
    if rng.random() < 0.92:
        text = remark(rng) + rng.choice(["\n\n", "\n\n", "\n", " "]) + text
    elif rng.random() < 0.5:
        text = rng.choice(["...", ""]) + " ".join(window.prefix.split()[-rng.randint(2, 6):]) + " " + text
    prompt = prompt_ids(tokenizer, encode, prompt_template("writeup"), window.prefix)
    return prompt, think + encode("\n\n" + text)[0] + stop


def verdict(rng, tokenizer, encode, window):
    """(prompt ids, reply ids) of a verdict on this window's truth; real or generated by a coin."""
    # the thinking opens in another way than a reply's, so that the two forms do not mix
    think = encode("judging " + thought(rng, window.truth))[0] + [tokenizer.convert_tokens_to_ids("</think>")]
    prompt = verdict_ids(tokenizer, encode, window.prefix, window.sep + window.truth)
    return prompt, think + encode("\n\n" + rng.choice(["real", "generated"]))[0] + [tokenizer.eos_token_id]


def register(tokenizer, documents, validation, args):
    """Replies to the prompt and verdicts; in training, 15 % plain text beside them."""
    folder = pathlib.Path(args.work) / f"pretrain-{args.size}"
    if not folder.is_dir():
        raise UserError(f"register: {folder} is not there; run the stage pretrain with this --size and --work first")
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rng, encode, plain = random.Random(0), plain_encoder(tokenizer), packed(tokenizer, documents)
    flags = [argparse.Namespace(data="demo", prefix_tokens=p, completion_tokens=c, seed=0) for p, c in LENGTHS]

    def batch(number, streams, size, plain_share):
        examples = []
        for position in range(number * size, (number + 1) * size):
            kind, window = rng.random(), rng.choice(streams)[position]
            if kind < plain_share:
                start = rng.randrange(len(plain) - args.num_tokens)
                examples.append(([], plain[start:start + args.num_tokens].tolist()))
            else:
                examples.append((verdict if kind < 0.3 else reply)(rng, tokenizer, encode, window))
        ids = pad([prompt + answer for prompt, answer in examples], tokenizer.pad_token_id)  # (B, T)
        return ids, pad([[-100] * len(prompt) + answer for prompt, answer in examples], -100)  # (B, T) each

    streams, held_streams = [windows(each, encode) for each in flags], [windows(flags[0], encode, "held_out")]
    held = [batch(number, held_streams, 24, 0.0) for number in range(4)]
    train(model, tokenizer, lambda step: batch(step, streams, args.batch_size, 0.15), held, args)
    save(model, tokenizer, pathlib.Path(__file__).parents[1] / "demo" / args.size)


if __name__ == "__main__":
    parser = Parser(__doc__)
    add = parser.add_argument
    add("stage", choices=["pretrain", "register"], help="plain text first, then replies and verdicts")
    add("--size", choices=["base", "small"], default="base", help="which of the two models")
    add("--num_steps", type=int, default=None, help="optimiser steps (default: 3000, for register 800)")
    add("--batch_size", type=int, default=24, help="sequences per step")
    add("--num_tokens", type=int, default=256, help="tokens per sequence of plain text")
    add("--lr", type=float, default=None, help="peak learning rate (default: 3e-3, for register 1e-3)")
    add("--threads", type=int, default=2, help="CPU threads")
    add("--autocast", action="store_true", help="bfloat16 products: twice as fast on a CPU with AVX512-BF16")
    add("--work", default="out/make", help="folder for the tokenizer and the first stage's model")
    args = parser.parse_args()
    args.num_steps = args.num_steps or {"pretrain": 3000, "register": 800}[args.stage]
    args.lr = args.lr or {"pretrain": 3e-3, "register": 1e-3}[args.stage]

    import tokenizers
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    from data import PROMPT, held_out, plain_encoder, prompt_ids, prompt_template, read_documents, windows
    from discriminator import verdict_ids
    from model import pad

    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    parts = [], []
    for text in read_documents("demo"):
        parts[held_out(text)].append(text)
    folder = pathlib.Path(args.work) / "tokenizer"
    if not folder.exists():
        make_tokenizer(parts[False]).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    print(f"{len(tokenizer)} tokens; {len(parts[False])} documents, {len(parts[True])} held out")
    {"pretrain": pretrain, "register": register}[args.stage](tokenizer, *parts, args)
