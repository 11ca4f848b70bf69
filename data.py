"""
Real texts, cut into windows of prefix and truth; the prompt; and the one way in which text becomes ids.

Sources (--data): `pile` streams the Pile's public copy, `demo` reads the docstrings that every Python installation
carries, anything else is a path: .jsonl, .jsonl.gz, .jsonl.zst, .parquet, .txt, or a folder of these.

What differs from the textbook:
1. The stream is a pure function of (seed, position): a run can stop and go on, and a later position can be looked up.
2. The cut between prefix and truth moves back to the nearest white space, and that white space belongs to neither side:
   where a text was cut must not tell the real one from the generated one.
3. Corpus text is tokenised by a copy of the tokenizer that knows no special or added token.
"""
import ast
import gzip
import hashlib
import importlib.metadata
import io
import itertools
import json
import pathlib
import random
import re
import sys
import sysconfig
import warnings
from typing import NamedTuple

import zstandard

from flags import UserError
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt")

PILE = "monology/pile-uncopyrighted"
MAX_DOCUMENTS = 200_000   # a local corpus is read up to here and shuffled in memory
LONG_DOCUMENT = 100_000   # characters; a longer document is read through a random slice of this length
DEMO_PACKAGES = ("accelerate bitsandbytes datasets huggingface_hub mauve-text numpy pandas peft pyarrow "
                 "safetensors scikit-learn scipy tokenizers torch tqdm transformers zstandard").split()

# the write-up's prompt word for word (no <|im_end|> after a turn: so it stands there); the reply goes on after <think>
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

def plain_encoder(tokenizer, flag="--model"):
    """Return `encode(text) -> (ids, offsets)`, in which no text can produce a special or an added token.

    offsets are (start, end) in characters of `text`, one pair an id. The tokenizer's own switch is not enough: with
    `split_special_tokens=True` Qwen3's <think> and </think>, added but not marked special, still come out whole.
    """
    if not tokenizer.is_fast:
        kind = type(tokenizer).__name__
        raise UserError(f"{flag}: {kind} has no fast version, which character offsets need; choose another")
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    # runs of spaces may stay
    added = {t["content"]: t["id"] for t in spec["added_tokens"] if len(t["content"].strip()) > 1}
    spec.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
    import tokenizers
    bare = tokenizers.Tokenizer.from_str(json.dumps(spec))
    split = re.compile("|".join(map(re.escape, added)) or "(?!)")

    def encode(text):
        encoding = bare.encode(text, add_special_tokens=False)
        if set(added.values()).isdisjoint(encoding.ids):
            return encoding.ids, encoding.offsets
        # a vocabulary that holds "<s>" as an ordinary piece as well: break each such string after its first character
        cuts = [0] + [match.start() + 1 for match in split.finditer(text)] + [len(text)]
        ids, offsets = [], []
        for start, end in itertools.pairwise(cuts):
            piece = bare.encode(text[start:end], add_special_tokens=False)
            ids += piece.ids
            offsets += [(start + a, start + b) for a, b in piece.offsets]
        assert set(added.values()).isdisjoint(ids), "corpus text produced a special token"
        return ids, offsets

    return encode


def bos_ids(tokenizer):
    """[bos] where the tokenizer itself begins every text with one (Llama), [] where it does not (Qwen3)."""
    ids = tokenizer("a").input_ids
    return ids[:1] if len(ids) and ids[0] == tokenizer.bos_token_id else []


def prompt_template(name, tokenizer):
    return PROMPT + "\n" if name == "writeup" else name


def opens_thinking(template):
    return template.rstrip().endswith("<think>")


def prompt_ids(tokenizer, encode, template, prefix):
    """Ids of the prompt around `prefix`, up to and with the newline after <think>, as in Qwen3's own template."""
    head, tail = (tokenizer(part, add_special_tokens=False).input_ids for part in template.split("{text}"))
    return bos_ids(tokenizer) + head + encode(prefix)[0] + tail


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
# windows

class Window(NamedTuple):
    prefix: str  # ends without white space
    sep: str     # the white space between the two; empty where the window has none to cut at
    truth: str   # starts without white space, at most completion_tokens tokens


def cut_window(encode, text, offsets, start, prefix_tokens, completion_tokens):
    """The window of `text` that begins at token `start`, or None where a side would be empty."""
    low, at = offsets[start][0], offsets[start + prefix_tokens][0]
    last = min(start + prefix_tokens + completion_tokens + 16, len(offsets)) - 1  # 16: white space may be lost
    high = offsets[last][1]
    left = right = next((i for i in range(at, low - 1, -1) if text[i].isspace()), None)
    if left is None:  # one long word, or a script without spaces
        left = right = at
    while left > low and text[left - 1].isspace():
        left -= 1
    while right < high and text[right].isspace():
        right += 1
    prefix, sep = text[low:left], text[left:right]
    truth, n = clip(encode, prefix + sep, text[right:high], completion_tokens)
    return Window(prefix, sep, truth) if prefix.strip() and n else None


class Windows:
    """`windows[position]`: an endless sequence, a pure function of seed and position, one random window a document."""

    def __init__(self, documents, encode, prefix_tokens, completion_tokens, seed):
        self.documents, self.encode, self.seed = documents, encode, seed  # documents(epoch) yields texts
        self.prefix_tokens, self.completion_tokens = prefix_tokens, completion_tokens
        self.stream, self.seen = self._stream(), []

    def __getitem__(self, position):
        while len(self.seen) <= position:
            self.seen.append(next(self.stream))
        return self.seen[position]

    def _stream(self):
        need = self.prefix_tokens + self.completion_tokens
        for epoch in itertools.count():
            found, longest = 0, 0
            for number, text in enumerate(self.documents(epoch)):
                rng = random.Random(f"window {self.seed} {epoch} {number}")
                limit = max(LONG_DOCUMENT, 16 * need)
                if len(text) > limit:
                    start = rng.randrange(len(text) - limit)
                    text = text[start:start + limit]
                offsets = self.encode(text)[1]
                longest = max(longest, len(offsets))
                # of some windows nothing is left, say where all is white space: a few tries, then the next document
                tries = range(4 if len(offsets) > need else 0)
                starts = (rng.randrange(len(offsets) - need) for _ in tries)
                cuts = (cut_window(self.encode, text, offsets, start, self.prefix_tokens, self.completion_tokens)
                        for start in starts)
                window = next(filter(None, cuts), None)
                if window:
                    found += 1
                    yield window
            if not found:
                raise UserError(f"--data has no text longer than {need} tokens (--prefix_tokens {self.prefix_tokens} + "
                                f"--completion_tokens {self.completion_tokens}); its longest has {longest}")


def windows(source, encode, prefix_tokens, completion_tokens, seed, split="train", text_field="text"):
    """The stream of windows of a source: "pile", "demo" or a path.

    split is "train" or "held_out" (2 % of the documents).
    """
    if source == "pile":
        def documents(epoch):
            return (text for text in pile(seed + epoch, text_field) if held_out(text) == (split == "held_out"))
    else:
        texts = demo_corpus() if source == "demo" else read_documents(source, text_field)
        texts = [text for text in texts if held_out(text) == (split == "held_out")]
        if not texts:
            raise UserError(f"--data {source} has no documents in its {split} part")

        def documents(epoch):
            order = list(range(len(texts)))
            random.Random(f"order {seed} {epoch}").shuffle(order)
            return (texts[i] for i in order)

    return Windows(documents, encode, prefix_tokens, completion_tokens, seed)


def held_out(text):
    """True for 2 % of all documents, by a hash of their text: kept for evaluation, whatever the seed."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=4).digest(), "big") % 50 == 0


# -----------------------------------------------------------------------------
# sources

def pile(seed, text_field="text"):
    """Yield the Pile's training texts, shard by shard from one that the seed chooses. Nothing is kept on disk."""
    import datasets
    try:
        stream = datasets.load_dataset(PILE, split="train", streaming=True)
        num_shards = stream.num_shards
        for k in range(num_shards):
            for row in stream.shard(num_shards, (seed + k) % num_shards):
                if text_field not in row:
                    raise UserError(f"--text_field {text_field} is not in the Pile, whose fields are {', '.join(row)}")
                yield clean(row[text_field])
    except Exception as error:  # datasets passes on whatever its http clients raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--data pile: {PILE} could not be read ({reason}); "
                        "give --data a local path, or demo") from None


def read_documents(path, text_field="text"):
    """All texts under a path, at most MAX_DOCUMENTS, in the order of file names. Bad lines are counted and named."""
    path = pathlib.Path(path)
    if not path.exists():
        raise UserError(f"--data {path} does not exist; give pile, demo, or a path to {', '.join(SUFFIXES)}")
    files = sorted(f for f in path.rglob("*") if f.is_file() and f.name.endswith(SUFFIXES)) if path.is_dir() else [path]
    if not files or not files[0].name.endswith(SUFFIXES):
        raise UserError(f"--data {path} is none of {', '.join(SUFFIXES)}, nor a folder of these")
    texts, bad, count = [], [], 0
    for file in files:
        try:
            for where, text in read_file(file, text_field):
                count += 1
                if isinstance(text, str):
                    texts.append(clean(text))
                else:
                    bad.append(where)
                if len(texts) == MAX_DOCUMENTS:
                    print(f"{path}: using its first {MAX_DOCUMENTS:,} documents", file=sys.stderr)
                    return texts
        except (OSError, EOFError, ValueError, zstandard.ZstdError) as error:  # gzip: OSError, pyarrow: ValueError
            raise UserError(f"--data {file} cannot be read: {error}") from None
    if bad:
        note = (f"{len(bad)} of {count} lines of --data {path} are not JSON with a text in "
                f"--text_field {text_field}: {'; '.join(bad[:3])}")
        if len(bad) > 0.01 * count:
            raise UserError(note)
        print(f"{note}: left out", file=sys.stderr)
    return texts


def clean(text):
    """Lone surrogates, which JSON and Python can spell and UTF-8 cannot, become "?"."""
    return text.encode("utf-8", "replace").decode("utf-8")


def read_file(file, text_field):
    """Yield (place, text) for each document of one file; text is None where a line could not be used."""
    if file.name.endswith(".txt"):
        yield f"{file}:1", file.read_text(encoding="utf-8", errors="replace")
    elif file.name.endswith(".parquet"):
        import pyarrow.parquet
        table = pyarrow.parquet.ParquetFile(file)
        names = table.schema_arrow.names
        if text_field not in names:
            raise UserError(f"--data {file} has no column --text_field {text_field}; it has {', '.join(names)}")
        rows = (row for batch in table.iter_batches(columns=[text_field]) for row in batch[0].to_pylist())
        yield from ((f"{file}: row {number}", row) for number, row in enumerate(rows, 1))
    else:
        with open_bytes(file) as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line.decode("utf-8", "replace"))
                    problem = "not an object" if not isinstance(row, dict) else f"fields {', '.join(row)[:80]}"
                except (ValueError, RecursionError):
                    row, problem = {}, "not JSON"
                text = row.get(text_field) if isinstance(row, dict) else None
                yield f"{file}:{number} ({problem})", text


def open_bytes(file):
    if file.name.endswith(".gz"):
        return gzip.open(file, "rb")
    if file.name.endswith(".zst"):
        return io.BufferedReader(zstandard.open(file, "rb"))
    return open(file, "rb")


# -----------------------------------------------------------------------------
# the demo's corpus

def demo_corpus():
    """Docstrings of 600 characters and more, and Python's reference topics, from what is installed; read with `ast`.

    Kept beside demo/make.py after the first reading, under a name that changes with the versions it was read from.
    """
    versions = [sys.version] + [f"{name} {version}" for name in DEMO_PACKAGES if (version := installed(name))]
    key = hashlib.blake2b("\n".join(versions).encode(), digest_size=6).hexdigest()
    cache = pathlib.Path(__file__).parent / "demo" / f"corpus-{key}.jsonl"
    if cache.exists():
        return read_documents(cache)
    stdlib = pathlib.Path(sysconfig.get_paths()["stdlib"])
    files = [(file, file.relative_to(stdlib)) for file in sorted(stdlib.rglob("*.py"))]
    for name in filter(installed, DEMO_PACKAGES):
        owned = sorted(importlib.metadata.files(name) or [])
        files += [(pathlib.Path(f.locate()), f) for f in owned if f.suffix == ".py"]
    skipped = {"test", "tests", "testing", "idlelib", "site-packages"}
    files = [file for file, inside in files if not skipped & set(inside.parts)]
    print("reading the demo's corpus, once: the docstrings of what is installed, half a minute", file=sys.stderr)
    found = itertools.chain.from_iterable(map(docstrings, files))
    texts = list({text[:200]: text for text in found}.values())  # packages repeat themselves: one for each beginning
    try:
        partial = cache.with_suffix(".partial")
        partial.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        partial.replace(cache)
    except OSError:
        pass  # an installation that cannot be written to reads the corpus anew each time
    return texts


def installed(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def docstrings(file):
    """The long docstrings of one source file's module, classes and functions; of pydoc's topics, its long strings."""
    try:
        source = file.read_bytes()
        if b'"""' not in source and b"'''" not in source and file.name != "topics.py":
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (OSError, ValueError, SyntaxError, RecursionError):
        return []
    if file.match("pydoc_data/topics.py"):
        constants = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        found = [value for value in constants if isinstance(value, str)]
    else:
        functions = (ast.FunctionDef, ast.AsyncFunctionDef)
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        methods = [node for owner in classes for node in owner.body if isinstance(node, functions)]
        owners = [tree, *classes, *(node for node in tree.body if isinstance(node, functions)), *methods]
        found = [ast.get_docstring(node) or "" for node in owners]
    return [clean(text.strip()) for text in found if len(text.strip()) >= 600]
