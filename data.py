"""
Real texts, cut into windows of prefix and truth; prompts; and text as token ids.

What differs from the textbook:
1. `windows[position]` is a pure function of seed and position, so a run can be resumed anywhere.
2. The cut between prefix and truth moves back to the nearest border of two words, so that it does not give away which
   text is real; white space there belongs to neither side.
3. Corpus text is tokenised by a copy of the tokenizer without special or added tokens.
4. Held-out documents that share 13 words in a row with a train document are not used.
"""
import csv
import functools
import glob
import hashlib
import io
import itertools
import json
import os
import pathlib
import random
import re
import sys
import unicodedata
from typing import NamedTuple

from flags import UserError, escaped, first_line

PILE = "hub:monology/pile-uncopyrighted"
HUB = re.compile(r"hub:([\w.-]+/[\w.-]+)(?:/([\w.-]+))?(?::([\w.-]+))?")  # repository, config, split
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".csv", ".parquet", ".arrow", ".txt", ".md")
NO_DATA = re.compile(r"(state|dataset_info|dataset_dict)\.json$|cache-.*\.arrow$")  # beside the data of save_to_disk
MAX_DOCUMENTS = 200_000  # a local corpus is held in memory
DOCUMENT = 20_000        # characters; a window of a longer document is cut from a slice of it
DOCUMENTS = re.compile(r"(?s).{10000,20000}(?:\n\n|\Z)|.{10000,20000}\s|.{1,20000}")  # in a .txt or .md file
FEW = 2000               # documents; the lengths of more are estimated from a sample
TRIES = 1000             # documents tried for one window
CUT_BACK = 64            # characters that the cut moves back at most
RUN = 13                 # words in a row that make two documents near-duplicates (GPT-3, arXiv 2005.14165, appendix C)
RECENT = 512             # windows of a stream that are kept
# scripts without spaces, in which each character is a word: Thai, Lao, Tibetan, Burmese, Khmer, Tai, kana, Han, Yi ...
UNSPACED = ("\u0e01-\u0e3a\u0e40-\u109f\u1780-\u17da\u17dc-\u17ff\u1950-\u19ff\u1a20-\u1aaf\u1b00-\u1b7f\u2e80-\u2fff"
            "\u3001-\u312f\u3190-\ua4cf\ua980-\ua9ff\uaa60-\uaadf\uf900-\ufaff\ufe30-\ufe4f\uff01-\uff9f"
            "\U00016fe0-\U0001b2ff\U00020000-\U0003ffff")
MARKS = "".join(c for c in map(chr, range(0xe00, 0xff00)) if unicodedata.category(c)[0] == "M")  # vowels, tones
WORD = re.compile(rf"[{UNSPACED}][{MARKS}\u200b-\u200d\U000e0100-\U000e01ef]*|[^\s{UNSPACED}]+")

# the write-up's prompt word for word (it has no <|im_end|> after a turn); the reply continues after <think>
PROMPT = '''<|im_start|>system
You act as a causal model of language.
Example:
"""
user:
<prefix>
The user will present a prefix they wish for you to continue,
then you'll start at the last few words
</prefix>
assistant:
...last few words, then continuation starts,
and you just keep generating, without any other commentary.
"""
<|im_start|>user
<prefix>
{text}
</prefix>
<|im_start|>assistant
<think>'''


# -----------------------------------------------------------------------------
# text to ids

def plain_encoder(tokenizer):
    """Return `encode(text) -> (ids, offsets)`, in which no text can produce a special or an added token.

    offsets are (start, end) in characters, one pair per id. transformers' `split_special_tokens` would let Qwen3's
    <think> through, which is added but not special. ValueError: a character can only be written as <unk>.
    """
    if not tokenizer.is_fast:
        raise UserError(f"--model: {type(tokenizer).__name__} has no fast version, which offsets need; choose another")
    import tokenizers
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    # single characters and runs of spaces stay, unless they are special
    banned = {t["id"] for t in spec["added_tokens"] if len(t["content"].strip()) > 1 - t["special"]}
    spec.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
    bare = tokenizers.Tokenizer.from_str(json.dumps(spec))

    def encode(text):
        cuts = [0, len(text)]
        while True:
            pieces = [(a, bare.encode(text[a:b], add_special_tokens=False)) for a, b in itertools.pairwise(cuts)]
            ids = [i for _, piece in pieces for i in piece.ids]
            offsets = [(a + start, a + end) for a, piece in pieces for start, end in piece.offsets]
            spans = [span for i, span in zip(ids, offsets) if i in banned]
            if not spans:
                return ids, offsets
            if any(end - start < 2 for start, end in spans):
                raise ValueError("the text has a character that this tokenizer can only write as a special token")
            # some vocabularies also have "<s>" as an ordinary piece: break it after its first character
            cuts = sorted({*cuts, *(start + 1 for start, _ in spans)})

    return encode


def bos_ids(tokenizer):
    """[bos] where the tokenizer begins every text with one (Llama), [] where it does not (Qwen3)."""
    ids = tokenizer("a").input_ids
    return ids[:1] if ids[0] == tokenizer.bos_token_id else []


def clip(encode, before, text, n):
    """Cut `text` to its first n tokens, as tokenised after `before`. Returns (text, number of tokens left).

    A token that spans the border counts as the text's. A character of several tokens is kept whole or dropped.
    """
    ends = [end for _, end in encode(before + text)[1] if end > len(before)]
    if len(ends) <= n:
        return text, len(ends)
    while n and ends[n - 1] == ends[n]:
        n -= 1
    return text[:ends[n - 1] - len(before)] if n else "", n


# -----------------------------------------------------------------------------
# prompts: a template is a text with {text} where the prefix goes

def prompt_template(name, tokenizer=None):
    """The template behind --prompt: writeup, plain, chat, a file, or a text that is a template already."""
    text = {"writeup": PROMPT + "\n", "plain": "{text}"}.get(name, name)
    if name == "chat":
        text = chat(tokenizer)
    elif "{text}" not in text:
        try:
            text = pathlib.Path(name).read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:
            raise UserError(f"--prompt {name}: give writeup, plain, chat or a text file ({error})") from None
    if text.count("{text}") != 1:
        raise UserError(f"--prompt {name[:80]}: it has {{text}} {text.count('{text}')} times, and must have it once")
    return text


def chat(tokenizer):
    """The write-up's instruction in the tokenizer's own chat template; opens the thinking of a model with </think>."""
    if not tokenizer.chat_template:
        raise UserError("--prompt chat: this tokenizer has no chat template; use --prompt plain, or a file")
    system, user, _ = (turn.partition("\n")[2].strip() for turn in PROMPT.split("<|im_start|>")[1:])
    turns = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    options = dict(tokenize=False, add_generation_prompt=True, enable_thinking=True)
    try:
        try:
            text = tokenizer.apply_chat_template(turns, **options)
        except Exception:  # some templates refuse a system turn
            text = tokenizer.apply_chat_template([{"role": "user", "content": f"{system}\n\n{user}"}], **options)
    except Exception as error:
        raise UserError("--prompt chat: this tokenizer's chat template cannot be used "
                        f"({type(error).__name__}: {first_line(error)}); use --prompt plain, or a file") from None
    return text + "<think>\n" * ("</think>" in tokenizer.get_vocab() and not opens_thinking(text))


def opens_thinking(template):
    return template.rstrip().endswith("<think>")


def prompt_notes(template, tokenizer, reasoning_tokens):
    """Warnings about a template that does not suit the tokenizer, one line each."""
    vocab, notes = tokenizer.get_vocab(), []
    if reasoning_tokens and "</think>" not in vocab:
        notes.append("this tokenizer has no single </think> token: thinking always takes all of --reasoning_tokens")
    if reasoning_tokens and not opens_thinking(template):
        notes.append("the prompt does not end in <think>; --reasoning_tokens 0 turns the thinking off")
    foreign = sorted({*re.findall(r"<\|\w+\|>", template)} - vocab.keys())
    if foreign:
        notes.append(f"the prompt's {' '.join(foreign)} are plain text to this tokenizer; "
                     f"--prompt {'chat' if tokenizer.chat_template else 'plain'} suits this model better")
    return notes


def prompt_ids(tokenizer, encode, template, prefix):
    """Ids of the template around `prefix`; no prefix can open or end a turn."""
    head, tail = (tokenizer(part, add_special_tokens=False).input_ids for part in template.split("{text}"))
    bos = bos_ids(tokenizer)
    return (bos if head[:1] != bos else []) + head + encode(prefix)[0] + tail


# -----------------------------------------------------------------------------
# windows

def words(text):
    """The words of a text: as split by white space, and each character of a script without spaces."""
    return WORD.findall(text) if re.search(f"[{UNSPACED}]", text) else text.split()  # split is four times as fast


class Window(NamedTuple):
    prefix: str  # ends without white space
    sep: str     # the white space between the two; empty where there is none to cut at
    truth: str   # starts without white space, at most completion_tokens tokens


def cut_window(encode, text, offsets, start, prefix_tokens, completion_tokens):
    """The window of `text` that begins at token `start`, or None where a side would be empty."""
    low, at = offsets[start][0], offsets[start + prefix_tokens][0]
    last = min(start + prefix_tokens + completion_tokens + 16, len(offsets)) - 1  # 16 spare: white space goes
    cut = next((i for i in range(at, max(low, at - CUT_BACK) - 1, -1)
                if text[i].isspace() or len(WORD.findall(text, max(i - 1, 0), i + 1)) == 2), at)
    prefix, rest = text[low:cut].rstrip(), text[cut:offsets[last][1]].lstrip()
    sep = text[low + len(prefix):offsets[last][1] - len(rest)]
    truth, n = clip(encode, prefix + sep, rest, completion_tokens)
    return Window(prefix, sep, truth) if prefix and n else None


class Windows:
    """`windows[position]` is an endless sequence; split is "train" or "held_out" (2 % of the documents)."""

    def __init__(self, args, encode, split):
        get = vars(args).get  # tools have no floor and no warm-up
        self.args, self.encode, self.split = args, encode, split
        self.field, self.revision = get("text_field", "text"), get("data_revision")
        self.lengths = args.prefix_tokens, args.completion_tokens
        self.need, self.unwritable = sum(self.lengths), 0
        batch_size = get("batch_size", 0) if split == "train" else 0
        self.total, self.warmup = (batch_size * get(key, 0) // get("group", 1) for key in ("num_steps", "d_warmup"))
        self.floor = min(get("floor_sequences", 0), self.total)

    def window_of(self, text, rng):
        """A random window of a text; None where the text is too short or cannot be encoded."""
        size = max(DOCUMENT, 16 * self.need)
        at = rng.randrange(max(len(text) - size, 0) + 1)
        text = text[at:at + size]
        try:
            offsets = self.encode(text)[1]
            for _ in range(4 if len(offsets) > self.need else 0):  # a place may be all white space
                place = rng.randrange(len(offsets) - self.need)
                if window := cut_window(self.encode, text, offsets, place, *self.lengths):
                    return window
        except ValueError:
            self.unwritable += 1

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        """Nothing: only a stream has a place to continue from."""

    def too_short(self):
        p, c = self.lengths
        lacks = f"; {self.unwritable} have characters that the tokenizer lacks" * (self.unwritable > 0)
        return UserError(f"--data {self.args.data} has no text longer than {self.need} tokens (--prefix_tokens {p} + "
                         f"--completion_tokens {c}) in its {self.split} part{lacks}; lower them, or give other texts")


class Corpus(Windows):
    """Texts in memory, in another order each epoch. Any position can be read at once."""

    def __init__(self, args, encode, split):
        super().__init__(args, encode, split)
        texts = read_documents(args.data, self.field)
        digest = hashlib.blake2b("\n".join(texts).encode(), digest_size=8).hexdigest()
        if self.revision not in (None, digest):
            raise UserError(f"--data {args.data} has changed since this run began; restore it, or start another run")
        part = [text for text in texts if held_out(text) == (split == "held_out")]
        self.texts = [text for text in part if len(text.encode()) > self.need]  # a token has at least one byte
        if len(self.texts) <= FEW:
            self.texts = self.usable(self.texts)
        if not self.texts:
            raise self.too_short()
        if split == "held_out":
            count, self.texts = len(self.texts), novel(self.texts, [text for text in texts if not held_out(text)])
            print(f"--data {args.data}: {count - len(self.texts)} of {count} held-out documents share {RUN} words in a "
                  f"row with another and are left out; {len(self.texts)} remain", file=sys.stderr)
        self.revision, self.num_documents = digest, len(self.texts)
        repeated = len(texts) - len({*texts})
        self.facts = (f"{len(texts):,} documents" + f", {repeated:,} of them equal to another" * (repeated > 0)
                      + f", {len(texts) - len(part):,} held out")

    def usable(self, texts):
        return [text for text in texts if self.window_of(text, random.Random(0))]

    def summary(self):
        about, count, unwritable = "", self.num_documents, self.unwritable
        if count > FEW:  # estimated from a sample
            self.unwritable, about = 0, "about "
            usable = len(self.usable(random.Random(0).sample(self.texts, 200)))
            count, unwritable = max(count * usable // 200, 1), count * self.unwritable // 200
        lacks = f", {about}{unwritable:,} have characters that the tokenizer lacks" * (unwritable > 0)
        return (f"data {self.args.data}: {self.facts}; {about}{count:,} of the others are longer than {self.need} "
                f"tokens{lacks}; the run needs {(self.total + self.warmup) / count:.2g} epochs")

    @functools.lru_cache(4)
    def order(self, epoch):
        return random.Random(f"order {self.args.seed} {epoch}").sample(range(self.num_documents), self.num_documents)

    def __getitem__(self, position):
        epoch, place = divmod(position, self.num_documents)
        rng = random.Random(f"window {self.args.seed} {position}")
        text = self.texts[self.order(epoch)[place]]
        for _ in range(TRIES):
            if window := self.window_of(text, rng):
                return window
            text = rng.choice(self.texts)  # that text was too short: try another
        raise self.too_short()


class Stream(Windows):
    """A dataset of the hub in the order of its rows. Floor and warm-up, which a run needs first, are read first."""

    def __init__(self, args, encode, split):
        super().__init__(args, encode, split)
        self.load_state_dict({})
        self.seen[0], self.count = next(self.reader), 1  # fail early

    def summary(self):
        return (f"data {self.args.data}: streamed, revision {self.revision}; the run needs "
                f"{self.total + self.warmup:,} windows")

    def state_dict(self):
        """How far the stream was read: windows in all, the epoch, and documents of that epoch."""
        return dict(count=self.count, epoch=self.epoch, number=self.number)

    def load_state_dict(self, state):
        """Continue from a place ({}: the beginning), without tokenising what comes before it."""
        self.count, self.epoch, self.number = (state.get(key, 0) for key in ("count", "epoch", "number"))
        self.seen, self.reader = {}, self.read()

    def __getitem__(self, position):
        from tqdm import tqdm
        end = self.total + self.warmup
        index = (position + self.floor - self.total) % end if position < end else position
        if index < self.count and index not in self.seen:  # it was forgotten, or is before the place of a resume
            self.load_state_dict({})
        unread = range(self.count, index + 1)
        for i in tqdm(unread, desc="reading the stream up to this step", disable=len(unread) < 256):
            self.seen[i], self.count = next(self.reader), i + 1
            if i - RECENT >= self.floor:  # the windows of the floor are needed again at the end of the run
                self.seen.pop(i - RECENT, None)
        return self.seen[index]

    def read(self):
        from tqdm import tqdm
        while True:
            texts, start = enumerate(self.documents(self.epoch)), self.number
            for _ in tqdm(range(start), desc="skipping documents that were read before", disable=start < 1000):
                next(texts)
            for number, text in texts:
                if held_out(text) == (self.split == "held_out"):
                    rng = random.Random(f"window {self.args.seed} {self.epoch} {number}")
                    if window := self.window_of(text, rng):
                        self.number = number + 1
                        yield window
            if self.number == 0:
                raise self.too_short()
            self.epoch, self.number = self.epoch + 1, 0

    def documents(self, epoch):
        """The texts of all shards, beginning with one that the seed chooses; nothing is kept on disk."""
        import datasets
        import huggingface_hub
        repo, config, part = HUB.fullmatch(PILE if self.args.data == "pile" else self.args.data).groups()
        try:
            self.revision = self.revision or huggingface_hub.HfApi().dataset_info(repo).sha
            rows = datasets.load_dataset(repo, config, split=part or "train", streaming=True, revision=self.revision)
            for k in range(rows.num_shards):
                for row in rows.shard(rows.num_shards, (self.args.seed + epoch + k) % rows.num_shards):
                    text = row.get(self.field, 0)
                    if not isinstance(text, str | None):
                        raise UserError(f"--text_field {self.field}: no text in {repo}; its fields: {', '.join(row)}")
                    if text is not None:
                        yield clean(text)
        except Exception as error:  # datasets passes on whatever its http clients raise
            raise UserError(f"--data {self.args.data}: {repo} cannot be read ({str(error)[:300] or type(error)}); "
                            "give a local path, or demo") from None


def windows(args, encode, split="train"):
    """The windows of args.data in its part `split`."""
    streamed = args.data == "pile" or HUB.fullmatch(args.data)
    return (Stream if streamed else Corpus)(args, encode, split)


def novel(texts, others):
    """The texts that share no RUN words in a row with any of `others`, nor with a text before them."""
    import numpy as np
    from tqdm import tqdm
    factors = np.random.default_rng(0).integers(2 ** 63, size=RUN)  # (RUN,)

    def runs(text):  # a number for each run; different runs have equal numbers with a probability of 2^-63
        numbers = np.fromiter(map(hash, words(text)), np.int64)
        return np.convolve(numbers, factors, "valid").tolist() if len(numbers) >= RUN else []

    ours, known, found = {run for text in texts for run in runs(text)}, set(), []
    for text in tqdm(others, desc="looking for near-duplicates of held-out documents", delay=5):
        known |= ours.intersection(runs(text))
    for text in texts:
        if known.isdisjoint(run := runs(text)):
            found.append(text)
        known.update(run)
    return found


def held_out(text):
    """True for 2 % of all documents, by a hash of their text: kept for evaluation, whatever the seed."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") % 50 == 0


# -----------------------------------------------------------------------------
# files

def tree(path, seen):
    """All files below a path. Links are followed, each folder is read once, names that begin with a dot are skipped."""
    if not path.is_dir():
        yield path
    elif (real := os.path.realpath(path)) not in seen:
        seen.add(real)
        for inner in sorted(path.iterdir()):
            yield from tree(inner, seen) if inner.name[0] != "." else ()


def data_files(source):
    """The files of a path, in the order of their names."""
    try:
        found = sorted(tree(pathlib.Path(source), set()), key=str)
    except OSError as error:
        raise UserError(f"--data {source} cannot be read: {error}") from None
    if splits := [file.parent for file in found if file.name == "dataset_dict.json"]:
        raise UserError(f"--data {source}: {splits[0]} holds the splits of a dataset; name the folder of one")
    files = {os.path.realpath(file): file for file in found
             if file.is_file() and file.name.lower().endswith(SUFFIXES) and not NO_DATA.match(file.name)}
    if not files:
        raise UserError(f"--data {source} is not pile, demo, hub:user/name[/config][:split], nor a file or folder of "
                        f"{', '.join(SUFFIXES)}")
    return list(files.values())


def read_documents(source, field="text"):
    """All texts of demo or of a path, at most MAX_DOCUMENTS. Records without a text are left out and reported."""
    if source == "demo":
        from demo.corpus import demo_corpus
        return list(map(clean, demo_corpus()))
    texts, bad = [], []
    rows = ((file, number, row) for file in data_files(source) for number, row in enumerate(records(file), 1))
    for file, number, row in itertools.islice(rows, MAX_DOCUMENTS):
        text = row.get(field) if isinstance(row, dict) else row
        if isinstance(text, str) and text.count("\0") <= len(text) / 100:
            texts.append(clean(text))
        else:
            what = "damaged" if row is None or isinstance(text, str) else str(row)[:80]
            bad.append(f"{file}, record {number}: {what}")
    count = len(texts) + len(bad)
    note = f"{len(bad)} of {count} records of --data {source} have no --text_field {field}"
    if len(bad) > 0.01 * count:
        raise UserError(f"{note}; the first is {bad[0]}")
    if bad:
        print(escaped(f"{note} and are left out; the first is {bad[0]}"), file=sys.stderr)
    if count == MAX_DOCUMENTS:
        print(f"--data {source}: only its first {MAX_DOCUMENTS:,} records are used", file=sys.stderr)
    return texts


def records(file):
    """Yield the records of one file: texts, dicts with a field for it, or None for a damaged one."""
    kind = file.name.lower().removesuffix(".gz").removesuffix(".zst").rpartition(".")[2]
    try:
        if kind == "jsonl":
            import pyarrow  # it raises OSError where a compressed file is cut short
            compression = {".gz": "gzip", ".zst": "zstd"}.get(file.suffix.lower())
            with io.BufferedReader(pyarrow.input_stream(str(file), compression)) as lines:
                good = False
                for line in filter(bytes.strip, lines):
                    try:
                        yield json.loads(line.decode("utf-8-sig"))
                        good = True
                    except (ValueError, RecursionError):
                        if good and not line.endswith(b"\n"):
                            raise ValueError("its last line is cut off") from None
                        yield None
        elif kind in ("parquet", "arrow"):
            import datasets
            datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs what it raises
            yield from datasets.load_dataset(kind, data_files=glob.escape(str(file)), split="train", streaming=True)
        elif kind == "csv":
            csv.field_size_limit(2 ** 31 - 1)
            with open(file, newline="", encoding="utf-8-sig") as lines:
                rows = csv.DictReader(lines, strict=True)
                if len({*(rows.fieldnames or ())}) < len(rows.fieldnames or ()):
                    raise ValueError("two of its columns have one name")
                for row in rows:  # None: too many fields, or too few
                    yield None if None in row or None in row.values() else row
        else:
            text = file.read_text(encoding="utf-8-sig")
            rows = json.loads(text) if kind == "json" else DOCUMENTS.findall(text)
            yield from rows if isinstance(rows, list) else [rows]
    except (OSError, ValueError, RecursionError, NotImplementedError, csv.Error) as error:
        raise UserError(f"--data {file} cannot be read: {error}") from None


def clean(text):
    """Lone surrogates, which JSON and Python can spell and UTF-8 cannot, become "?"."""
    return text.encode("utf-8", "replace").decode("utf-8")
