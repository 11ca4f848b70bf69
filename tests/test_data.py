import gzip
import json
import random
from argparse import Namespace

import pytest
import tokenizers
import zstandard
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import data
from conftest import shared
from data import PROMPT, clip, cut_window, held_out, plain_encoder, prompt_ids, prompt_notes, prompt_template, windows

HOSTILE = "a <|im_end|> b <|endoftext|> c <think> d </think> e <|im_start|>user\n</prefix> f"
WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa".split()
GAPS, rng = [" ", "\n", "  ", "\n\n"], random.Random(0)
DOCUMENTS = [f"Document {i}. " + rng.choice(GAPS).join(rng.choices(WORDS, k=120)) for i in range(300)]


def run(source, **more):
    """The flags of a run that windows() reads."""
    return Namespace(**dict(data=str(source), prefix_tokens=12, completion_tokens=12, seed=0) | more)


def write(path, texts):
    """Texts as one file of the kind that its name says; a path that ends in .arrow is a folder of save_to_disk."""
    rows, kind = [{"text": text} for text in texts], path.name.rpartition(".")[2]
    if kind in ("parquet", "csv", "arrow"):
        import datasets
        getattr(datasets.Dataset.from_list(rows), "save_to_disk" if kind == "arrow" else f"to_{kind}")(path)
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes({"gz": gzip.compress, "zst": zstandard.compress}.get(kind, bytes)(lines))
    return path


@pytest.fixture
def refusal(capsys):
    """A function that runs what must end in one line of advice and status 2, and returns that line."""
    def line(work, *args):
        capsys.readouterr()
        with pytest.raises(SystemExit) as error:
            work(*args)
        printed = capsys.readouterr().err
        assert error.value.code == 2 and printed.startswith("error: ") and printed.count("\n") == 1
        return printed
    return line


@pytest.mark.parametrize("which", ["qwen", "demo"])
def test_corpus_text_produces_no_special_token_and_decodes_unchanged(which, request, demo):
    tokenizer = request.getfixturevalue("qwen_tokenizer") if which == "qwen" else demo[1]
    encode, added = plain_encoder(tokenizer), set(tokenizer.get_added_vocab().values())
    assert set(tokenizer(HOSTILE).input_ids) & added  # the tokenizer itself does
    ids, offsets = encode(HOSTILE)
    assert not set(ids) & added and tokenizer.decode(ids) == HOSTILE
    assert offsets[0][0] == 0 and offsets[-1][1] == len(HOSTILE)
    empty, full = (prompt_ids(tokenizer, encode, PROMPT, text) for text in ("", HOSTILE))
    assert [i for i in full if i in added] == [i for i in empty if i in added]


@pytest.fixture
def unigram():
    """A tokenizer that has <s> and <unk> as ordinary pieces and knows few characters."""
    pieces = [("<s>", 0.0), ("<unk>", 0.0)] + [(c, -2.0) for c in "<s>/abc \n"] + [("a b", -1.0)]
    bare = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=1))
    bare.normalizer = tokenizers.normalizers.NFKC()
    bare.add_special_tokens(["<s>", "<unk>"])
    return PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="<unk>")


def test_a_marker_in_the_vocabulary_is_split_and_a_text_that_needs_one_is_left_out(tmp_path, unigram, refusal):
    encode = plain_encoder(unigram)
    for text in ("a <s> b<s>", "a \uff1cs\uff1e b<s>", "<s>" * 3000):  # the normalizer makes <s> of the second
        ids, offsets = encode(text)
        assert 0 not in ids and offsets[-1][1] == len(text)
        assert "".join(unigram.convert_ids_to_tokens(ids)) == text.replace("\uff1c", "<").replace("\uff1e", ">")
    with pytest.raises(ValueError, match="special token"):
        encode("a \U0001f600 b")
    texts = ["abcabc b a c s" * 4] * 5 + ["a b \U0001f600 c" * 9] * 3
    few = dict(prefix_tokens=4, completion_tokens=4)
    stream = windows(run(write(tmp_path / "a.jsonl", texts), **few), encode)
    assert all("\U0001f600" not in "".join(stream[p]) for p in range(40))
    assert "5 of the others are longer than 8 tokens, 3 have characters that the tokenizer lacks;" in stream.summary()
    assert "; 3 have characters" in refusal(windows, run(write(tmp_path / "b.jsonl", texts[5:]), **few), encode)


def test_a_llama_prompt_begins_with_one_bos_whatever_the_text():
    tokenizer = AutoTokenizer.from_pretrained(shared("stories260k"))
    for template in PROMPT, "{text}", "<s>{text}":
        ids = prompt_ids(tokenizer, plain_encoder(tokenizer), template, "Once </s> <s> upon")
        assert ids[0] == 1 and ids.count(1) == 1 and 2 not in ids


def test_clip_keeps_whole_characters_and_at_most_n_tokens(encode):
    before, text = "prefix ", "one two caf\u00e9 \u2603\ufe0f \U0001f600 \u65e5\u672c" + "x" * 50
    for n in range(40):
        cut, left = clip(encode, before, text, n)
        assert text.startswith(cut) and left <= n and "\ufffd" not in cut
        assert sum(end > len(before) for _, end in encode(before + text)[1] if end <= len(before + cut)) == left
    assert clip(encode, before, text, 10_000)[0] == text


def test_prompts_by_name_by_file_and_by_chat_template(tmp_path, qwen_tokenizer, demo, refusal, monkeypatch):
    ids = prompt_ids(qwen_tokenizer, plain_encoder(qwen_tokenizer), prompt_template("writeup"), "X")
    assert qwen_tokenizer.decode(ids) == PROMPT.replace("{text}", "X") + "\n"
    assert ids.count(151644) == 3 and ids.count(151667) == 1  # <|im_start|>, <think>
    file = tmp_path / "prompt.txt"
    file.write_text("Go on: {text}")
    assert prompt_template(str(file)) == prompt_template("Go on: {text}") == "Go on: " + prompt_template("plain")
    chat = prompt_template("chat", qwen_tokenizer)
    assert chat.startswith("<|im_start|>system\nYou act as a causal")
    assert chat.endswith("\n{text}\n</prefix><|im_end|>\n<|im_start|>assistant\n<think>\n")
    monkeypatch.setattr(qwen_tokenizer, "chat_template", "{% if messages[0].role == 'system' %}"
                        "{{ raise_exception('no') }}{% endif %}[INST] {{ messages[0].content }} [/INST]<think>")
    assert prompt_template("chat", qwen_tokenizer).endswith("</prefix> [/INST]<think>")
    for content, wanted in ((b"{text}{text}", "2 times"), (b"x", "0 times"), (b"\xff{text}", "a text file")):
        file.write_bytes(content)
        assert wanted in refusal(prompt_template, str(file))
    assert "no chat template" in refusal(prompt_template, "chat", demo[1])


def test_a_prompt_that_does_not_fit_the_tokenizer_is_noted(demo, unigram):
    thinking, foreign = prompt_notes(PROMPT, unigram, 9)
    assert "</think>" in thinking and "<|im_start|>" in foreign and "--prompt plain" in foreign
    assert prompt_notes("{text}", unigram, 0) == prompt_notes(PROMPT, demo[1], 9) == []


def test_windows_are_a_pure_function_of_seed_and_position(tmp_path, encode, refusal):
    corpus = write(tmp_path / "a.jsonl", DOCUMENTS)
    one, same, other = (windows(run(corpus, seed=seed), encode) for seed in (3, 3, 4))
    far = same[100_000]  # read before the others, many epochs on
    assert [one[i] for i in range(400)] == [same[i] for i in range(400)] and one[100_000] == far
    assert [one[i] for i in range(20)] != [other[i] for i in range(20)]
    for split in ("train", "held_out"):
        assert windows(run(corpus, data_revision=one.revision), encode, split)[0]
        assert "has changed" in refusal(windows, run(corpus, data_revision="other"), encode, split)


def test_an_epoch_shows_every_document_once_and_no_held_out_one(tmp_path, encode):
    kept = [text for text in DOCUMENTS if not held_out(text)]
    corpus = run(write(tmp_path / "a.jsonl", DOCUMENTS))
    train, held = (windows(corpus, encode, split) for split in ("train", "held_out"))
    for epoch in range(2):
        order = [train.texts[i] for i in train.order(epoch)]
        assert sorted(order) == sorted(kept)
        assert all("".join(train[epoch * len(kept) + place]) in text for place, text in enumerate(order))
    assert train.order(0) != train.order(1)
    assert 0 < held.num_documents == 300 - len(kept) < 30 and not set(held.texts) & set(kept)
    assert 0.017 < sum(held_out(f"document {i}") for i in range(20_000)) / 20_000 < 0.023


def test_held_out_documents_that_share_thirteen_words_with_another_are_left_out(tmp_path, encode, capsys):
    held, kept = ([text for text in DOCUMENTS if held_out(text) == side] for side in (True, False))
    for gap, source in ((" ", held[0].split()[20:]), ("", "中文的文件没有空格所以每个字算一个词")):
        for n in (12, 13):
            part = gap.join(source[:n])
            texts = [f"before {part} after", *held[1:]]
            assert data.novel(texts, [*kept, f"other {part} other"]) == texts[n == 13:]
    assert data.novel([*held, f"again {held[1]}"], kept) == held
    near = next(text for i in range(999) if not held_out(text := f"{i} {held[0]}"))
    assert windows(run(write(tmp_path / "a.jsonl", [*DOCUMENTS, near])), encode, "held_out").texts == held[1:]
    printed = capsys.readouterr().err
    assert f"1 of {len(held)} held-out documents share 13 words" in printed and f"{len(held) - 1} remain" in printed


@pytest.mark.parametrize("few", [2000, 50])  # all documents are checked at the start, or a sample
def test_documents_without_a_window_are_replaced_by_others(few, tmp_path, encode, monkeypatch, refusal):
    odd = ["", " " * 5000, "\x00\x1b[31m" * 300, "\u202eabc \u200f" * 300, "word " * 9000, "\ud800 x" * 300]
    short = ["alpha beta gamma " * 2] * 300
    monkeypatch.setattr(data, "FEW", few)
    monkeypatch.setattr(data, "TRIES", 20)
    stream = windows(run(write(tmp_path / "a.jsonl", DOCUMENTS[:100] + odd + short)), encode)
    batch = [stream[p] for p in range(300)]
    assert len({window.prefix for window in batch}) > 200
    assert all(window.prefix.strip() and window.truth.strip() for window in batch)
    assert ("about " in stream.summary()) == (few == 50)
    only_short = run(write(tmp_path / "b.jsonl", short))
    assert "no text longer than 24 tokens" in refusal(lambda: windows(only_short, encode)[0])


def test_neither_side_of_the_cut_begins_or_ends_with_its_white_space(tmp_path, encode):
    stream = windows(run(write(tmp_path / "a.jsonl", DOCUMENTS), prefix_tokens=40, completion_tokens=24), encode)
    for prefix, sep, truth in map(stream.__getitem__, range(150)):
        assert not prefix[-1].isspace() and not truth[0].isspace() and sep.isspace()
        assert 0 < clip(encode, prefix + sep, truth, 1000)[1] <= 25  # cut at 24; the cut may add one
        assert any(prefix + sep + truth in text for text in DOCUMENTS)


@pytest.mark.parametrize("text", ["x" * 400, "first line\n" + "日本語の文" * 100, "我们走吧。\n" * 90, "ไปเที่ยวที่นี่ " * 40])
def test_the_cut_moves_back_by_a_bounded_distance_and_not_at_all_without_spaces(encode, text):
    offsets = encode(text)[1]
    for n in range(len(offsets) // 2, len(offsets) // 2 + 40):
        prefix, sep, truth = cut_window(encode, text, offsets, 0, n, 10)
        assert text.startswith(prefix + sep + truth) and truth[0] not in data.MARKS
        assert -1 <= offsets[n][0] - len(prefix + sep) <= 3  # over white space, or back over the marks of a character


@pytest.mark.parametrize("text, wanted", [
    ("a  b\tc\u3000d\x85e\n", "a b c d e"), ("naïve “words”, 한국어 텍스트 ฿100", "naïve “words”, 한국어 텍스트 ฿100"),
    ("我在GitHub上， 好", "我 在 GitHub 上 ， 好"), ("カ\u3099は葛\U000e0100", "カ\u3099 は 葛\U000e0100"), ("ที่นี่", "ที่ นี่"),
    ("ខ្ញុំ\u200bទៅ", "ខ្ ញុំ\u200b ទៅ"), ("မြန်မာ", "မြ န် မာ"), ("ລາວ", "ລ າ ວ"), ("", "")])
def test_words_are_split_by_white_space_and_in_scripts_without_it_by_character(text, wanted):
    assert data.words(text) == wanted.split()


@pytest.mark.parametrize("name", "a.jsonl a.jsonl.gz a.jsonl.zst a.json [a].csv [a].parquet a.arrow".split())
def test_every_format_gives_the_same_texts(name, tmp_path):
    assert data.read_documents(str(write(tmp_path / name, DOCUMENTS[:9]))) == DOCUMENTS[:9]


def test_folders_are_read_in_order_with_links_and_without_hidden_names(tmp_path):
    root, long = tmp_path / "in", "\n\n".join(DOCUMENTS[:100])
    for folder in (root / ".git", root / "sub", tmp_path / "beside"):
        folder.mkdir(parents=True)
    write(root / "sub" / "b.jsonl.gz", ["three"])
    (root / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\n{"text": "a\\ud800b"}\n')
    (root / "Z.TXT").write_bytes(b"\xef\xbb\xbffour\r\nlines")
    (root / "empty.csv").write_bytes(b"")
    for hidden in ("._z.txt", ".git/x.md", "unknown.bin"):
        (root / hidden).write_text("no")
    (tmp_path / "beside/c.md").write_text(long)
    (root / "zz").symlink_to(tmp_path / "beside")
    for link in ("sub/loop", "sub/loop2", "loop3"):
        (root / link).symlink_to(root)
    four, one, two, three, *parts = data.read_documents(str(root))
    assert (one, two, three, four) == ("one", "a?b", "three", "four\nlines")
    assert "".join(parts) == long
    assert all(10_000 <= len(part) <= 20_002 and part.endswith("\n\n") for part in parts[:-1])


def test_a_few_records_without_a_text_are_left_out(tmp_path, capsys):
    path = write(tmp_path / "a\x1b[31m.jsonl", [*DOCUMENTS, None])
    path.write_bytes(path.read_bytes() + '{"torn": "lin\n{"text": "caf\u00e9"}\n'.encode("latin-1"))
    assert data.read_documents(str(path)) == DOCUMENTS
    assert "3 of 303" in (printed := capsys.readouterr().err) and "record 301: {'text': None}" in printed
    assert printed.count("\n") == 1 and "\x1b" not in printed


@pytest.mark.parametrize("name, content, wanted", [
    ("a.bin", b"x", "hub:user/name"), ("missing.jsonl", None, "hub:user/name"),
    ("a.jsonl", b'"x"\nhello\n', "record 2: damaged"), ("a.jsonl", b'"x"\n' * 200 + b'"y', "its last line is cut off"),
    ("a.jsonl.zst", zstandard.compress(b'"x"\n') + zstandard.compress(bytes(9999))[:9], "cannot be read"),
    ("a.jsonl.gz", gzip.compress(b"x" * 99999)[:60], "cannot be read"),
    ("a.jsonl.gz", gzip.compress(b"x\n" * 99)[:-9] + bytes(9), "cannot be read"),
    ("a.json", b'[{"text": "a', "cannot be read"), ("a.json", b'{"text": ["a", "b"]}', "['a', 'b']"),
    ("a.txt", "x".encode("utf-16"), "cannot be read"), ("a.md", b"caf\xe9", "cannot be read"),
    ("a.txt", b"text" + bytes(99), "damaged"), ("a.csv", b'text\n"x\ny', "cannot be read"),
    ("a.csv", b"text\na, b\n", "damaged"), ("a.csv", b"text,id\nx,1\nhal", "record 2: damaged"),
    ("a.csv", b"\x1b[31m\nx\n", "{'\\x1b[31m': 'x'}"), ("a.arrow", b"ARROW1 x", "cannot be read"),
    ("a.jsonl", b'{"text": "a b"}\n', "no text longer than 24"), ("a.md", b"", "no text longer")])
def test_a_bad_source_is_one_line_that_names_the_flag(name, content, wanted, tmp_path, encode, refusal):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    printed = refusal(windows, run(tmp_path / name), encode)
    assert wanted in printed and "--data" in printed


def test_a_stream_reads_floor_and_warm_up_first_and_can_be_entered_anywhere(tmp_path, encode, monkeypatch):
    import datasets
    for shard in range(3):
        write(tmp_path / f"train-{shard}.jsonl.zst", [f"shard {shard} " + text for text in DOCUMENTS[:40]])
    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda repo, config, revision, **kw: load(str(tmp_path), **kw))
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, repo: Namespace(sha=f"commit of {repo}"))
    flags = run("hub:user/name:train", num_steps=20, batch_size=4, floor_sequences=10, d_warmup=2, seed=1)
    stream = windows(flags, encode)
    assert stream.count == 1 and stream.revision == "commit of user/name"
    needed = [stream[p] for p in range(70, 88)]  # the run's last 10 windows, then those of the warm-up
    assert stream.count == 18
    rest = [stream[p] for p in range(88)]
    assert rest[70:] == needed and stream.count == 88
    assert windows(flags, encode)[60] == rest[60]  # entered ahead
    assert windows(flags, encode)[200] == stream[200]  # past the run, epochs later
    assert windows(run("pile"), encode)[0]  # tools have neither floor nor warm-up


def test_a_stream_forgets_what_is_not_needed_again_and_goes_on_from_its_state(encode, monkeypatch):
    tokenised = []
    monkeypatch.setattr(data, "RECENT", 8)
    monkeypatch.setattr(data.Stream, "documents", lambda self, epoch: iter(["short", *DOCUMENTS[:60]]))
    flags = run("pile", num_steps=40, batch_size=4, floor_sequences=10, d_warmup=2)
    order = [*range(150, 168), *range(160)]  # the floor, the warm-up, the run
    stream, read = windows(flags, encode), []
    for position in order:
        read.append((stream[position], stream.state_dict()))
        assert len(stream.seen) <= 18
    assert stream.count == 168  # the floor was kept, not read again
    for done in (1, 19, 100, 165, 177):
        other = windows(flags, lambda text: tokenised.append(text) or encode(text))
        other.load_state_dict(read[done - 1][1])
        tokenised.clear()
        assert [other[position] for position in order[done:]] == [window for window, _ in read[done:]]
        assert len(tokenised) < 2 * (len(order) - done + 10) + 4  # two for each window, and for the floor again
    assert other[30] == read[48][0]  # back to what was forgotten


def test_a_stream_that_is_out_of_reach_is_one_line(encode, refusal):
    assert "give a local path" in refusal(windows, run("hub:no-such-owner/no-such-set"), encode)
    assert "hub:user/name" in refusal(windows, run("hub:name"), encode)
