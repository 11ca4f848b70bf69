"""The state machine of a rollout by hand-made replies, what is drawn and by which numbers, and what is trained."""
import argparse
import types

import pytest
import torch
from transformers import AutoTokenizer

from conftest import shared
from data import Window, prompt_template
from model import FORBIDDEN
from rollout import COMPLETION, THINKING, Rules, Writer, draw, rng_for, rollout, rules, strip_echo
from sampler import Sampler, Step

STOP, THINK_END, PAD = 1, 2, 9
PREFIXES = ["Return the", "A much longer prefix, so that prompts differ in length:\n\n    >>> x = 1", "x"]


class Scripted:
    """A sampler and its reader in one, whose states are logits: at each step, a row wants the next id of its script."""

    captures, sync = False, staticmethod(lambda adapter: None)

    def __init__(self, script, V):
        self.script, self.head = script, torch.nn.Linear(V, V, bias=False)
        self.head.weight.data = torch.eye(V)  # (V, V)
        self.model = types.SimpleNamespace(device=torch.device("cpu"), get_output_embeddings=lambda: self.head,
                                           generation_config=types.SimpleNamespace(eos_token_id=None))

    def decoder(self, key, rows, width, make_reply):
        reply = make_reply()
        return self, reply, Step(lambda: reply.advance(self.read(reply.token)), self)

    def begin(self, prompts, pad_id):
        self.prompts, self.step = prompts, -1
        return self.read(None)

    def read(self, token):
        self.step += 1
        wanted = torch.tensor([row[min(self.step, len(row) - 1)] for row in self.script])  # (B,)
        return torch.where(wanted[:, None] < 0, torch.nan, 9 * self.head.weight[wanted])  # (B, V)


def scripted(rows, reasoning_tokens=3, close=(2, 3), think_end=THINK_END):
    """A greedy rollout of four completion tokens in which the rows want these ids, and its sampler."""
    blocked, B = torch.zeros(2, 16) > 0, len(rows)  # (2, V)
    blocked[THINKING, STOP] = blocked[COMPLETION, THINK_END] = think_end >= 0
    rule = Rules(torch.tensor([STOP]), torch.tensor(close, dtype=torch.long), think_end, blocked, PAD)
    sampler, prompts = Scripted(rows, 16), [[5, 6, 7][:i % 3 + 1] for i in range(B)]
    return rollout(sampler, prompts, rule, reasoning_tokens, 4, 0, [(0, i) for i in range(B)]), sampler


def behind(roll, i):
    """Row i behind its prompt: ids, and sampled and thinking as strings in which x is yes."""
    size = i % 3 + 1
    assert not (roll.sampled | roll.thinking)[i, :size].any() and torch.equal(roll.logps[i] != 0, roll.sampled[i])
    masks = (mask[i, size:].tolist() for mask in (roll.sampled, roll.thinking))
    return roll.ids[i, size:].tolist(), *("".join(".x"[yes] for yes in mask).rstrip(".") for mask in masks)


ROWS = [  # ids that a row wants (0 where one is forced), the ids it gets, sampled, thinking, think_closed
    ([5, 2, 0, 6, 7, 1], [5, 2, 3, 6, 7, 1], "xx.xxx", "xx", True),
    ([5, 5, 5, 0, 0, 6, 7, 8, 4], [5, 5, 5, 2, 3, 6, 7, 8, 4], "xxx..xxxx", "xxx", False),  # both budgets are spent
    ([5, 5, 2, 0, 6, 1], [5, 5, 2, 3, 6, 1], "xxx.xx", "xxx", True),  # closed with the last token of the budget
    ([2, 0, 1], [2, 3, 1], "x.x", "x", True),  # both parts are empty
    ([1, 2, 0, 2, 2, 2, 2, 2], [0, 2, 3, 0, 0, 0, 0], "xx.xxxx", "xx", True)]  # wants what is forbidden


def test_thinking_closes_by_itself_or_at_its_budget_and_only_drawn_tokens_are_sampled():
    roll, sampler = scripted([row[0] for row in ROWS])
    for i, (_, ids, sampled, thinking, _) in enumerate(ROWS):
        got, *masks = behind(roll, i)
        assert got[:len(ids)] == ids and {*got[len(ids):]} <= {PAD} and masks == [sampled, thinking]
    assert roll.think_closed.tolist() == [row[4] for row in ROWS] and roll.shared == 1 and sampler.step == 8
    assert roll.think == [[5], [5] * 3, [5, 5], [], [0]] and roll.reply == [[6, 7], [6, 7, 8, 4], [6], [], [0] * 4]
    alone, sampler = scripted([ROWS[0][0]])
    assert alone.ids[0].tolist() == roll.ids[0, :7].tolist() and sampler.step == 5  # ends with its last row


def test_a_row_whose_states_are_not_finite_ends_there_and_draws_nothing():
    roll, _ = scripted([[5, 2, 0, 6, -1, 7], [5, 2, 0, 6, 7, 1], [-1], [5, 2, -1]])
    assert roll.broken.tolist() == [True, False, True, True] and roll.logps.isfinite().all()
    assert roll.reply == [[6], [6, 7], [], []] and roll.sampled.sum(1).tolist() == [3, 5, 0, 2]


@pytest.mark.parametrize("reasoning_tokens, close, think_end, row, ids, sampled, thinking", [
    (0, (2, 3), THINK_END, [6, 1], [2, 3, 6, 1], "..xx", ""),               # no thinking: its closing is prompt
    (0, (), THINK_END, [6, 1], [6, 1], "xx", ""),                           # nothing to close
    (2, (), THINK_END, [5, 5, 6, 1], [5, 5, 6, 1], "xxxx", "xx"),           # closed without a token
    (2, (4, 3, 3), -1, [5, 2, 0, 0, 0, 6, 1], [5, 2, 4, 3, 3, 6, 1], "xx...xx", "xx")])  # </think> is no single id
def test_a_closing_of_any_length_is_forced(reasoning_tokens, close, think_end, row, ids, sampled, thinking):
    roll, sampler = scripted([row], reasoning_tokens, close, think_end)
    assert behind(roll, 0) == (ids, sampled, thinking) and not roll.think_closed.any()
    assert sampler.prompts == [[5, *close] if reasoning_tokens == 0 else [5]]


def test_draws_have_the_models_probabilities_and_their_log_probs():
    logits, N = torch.randn(1, 6, generator=rng_for("logits")), 40_000
    logits[0, [0, 2, 5]] = FORBIDDEN
    p = logits.double().softmax(-1)[0]  # (V,)
    drawn, logps = draw(logits.repeat(N, 1), torch.rand(N, dtype=torch.double, generator=rng_for("draw")))
    share = torch.bincount(drawn, minlength=6) / N  # (V,)
    assert not share[[0, 2, 5]].any() and ((share - p).abs() <= 4 * (p * (1 - p) / N).sqrt()).all()
    torch.testing.assert_close(logps.double(), p.log()[drawn], rtol=1e-6, atol=1e-6)
    assert draw(logits.repeat(2, 1), torch.tensor([0.0, 1 - 2**-53], dtype=torch.double))[0].tolist() == [1, 4]
    greedy, logp = draw(torch.tensor([[0.0, 2.0, 1.0]]), None)
    assert greedy.item() == 1 and logp.item() == pytest.approx(-0.407606, abs=1e-6)  # -log(1 + 1/e + 1/e^2)


def writer_of(sampler, tokenizer, prompt="writeup", **flags):
    flags = dict(completion_tokens=9, echo_tokens=16, prefix_tokens=9, temperature=1, seed=3) | flags
    return Writer(sampler, tokenizer, argparse.Namespace(prompt=prompt_template(prompt), **flags))


def test_a_reply_depends_on_seed_purpose_and_position_and_on_no_other_row(tiny):
    writer = writer_of(Sampler(tiny[0], static=False), tiny[1], reasoning_tokens=6)
    windows = [Window(prefix, " ", "truth") for prefix in PREFIXES]
    whole, part, floor = (writer.write(windows[first:], "generator", purpose, 5 + first).roll
                          for first, purpose in ((0, "rollout"), (1, "rollout"), (0, "floor")))
    assert part.reply == whole.reply[1:] and part.think == whole.think[1:] and floor.reply != whole.reply
    assert len({tuple(reply) for reply in writer.write(windows[:1] * 3, "generator", "rollout", 5).roll.reply}) == 3
    assert rng_for(3, "rollout", 5).initial_seed() == 68286343494812848  # the same in every process


@pytest.mark.parametrize("prompt, thinking", [("plain", 0), ("writeup", 4)])
@pytest.mark.parametrize("C", [5, 40])
def test_what_is_cut_off_the_text_is_not_sampled(prompt, thinking, C, demo, encode):
    echo, reply = "... of the given ", "... of the given shape and type, filled with zeros, unless asked for ones."
    words, sampler = encode(reply)[0] + [demo[1].eos_token_id], Scripted([], 4096)
    writer = writer_of(sampler, demo[1], prompt, reasoning_tokens=thinking, completion_tokens=C, temperature=0)
    sampler.script = [[50, 51, *writer.rules.close.tolist(), *words] if thinking else words]
    windows = [Window("Return a new array of the given", "\n", "truth")]
    roll, (text,), (size,), num_sampled = writer.write(windows, "generator", "rollout", 0)
    trained = roll.ids[roll.sampled & ~roll.thinking].tolist()
    assert (len(writer.rules.close) == 0) == (prompt == "plain") and roll.think == [[50, 51] if thinking else []]
    assert num_sampled == roll.thinking.sum() + min(len(words), C + 16) and roll.sampled[roll.thinking].all()
    assert trained == words if C == 40 else size == 5 and writer.decode(trained) == echo + text


def test_rules_stop_at_every_end_and_forbid_what_has_no_place(tiny):
    rule, vocab = rules(tiny[1], tiny[0]), tiny[1].get_vocab()
    assert {vocab["<|im_end|>"], tiny[1].eos_token_id} <= {*rule.stop.tolist()} and rule.close[0] == vocab["</think>"]
    assert rule.blocked[THINKING, rule.stop].all() and not rule.blocked[COMPLETION, rule.stop].any()
    assert rule.blocked[:, vocab["<think>"]].all() and rule.blocked[:, rule.think_end].tolist() == [False, True]
    assert rule.blocked.shape == (2, 4096)  # the output layer's last rows, which are no ids, are left out


def test_without_a_think_token_the_closing_is_several_ids():
    tokenizer = AutoTokenizer.from_pretrained(shared("stories260k"))
    rule = rules(tokenizer, Scripted([], len(tokenizer)).model)
    assert rule.think_end == -1 and len(rule.close) > 2 and tokenizer.eos_token_id in rule.stop.tolist()


@pytest.mark.parametrize("reply, words, wanted", [
    ("jumps over the lazy dog", 16, "jumps over the lazy dog"),    # no echo
    ("brown fox jumps over", 16, "jumps over"),                    # two words
    ("...brown fox jumps over", 16, "jumps over"),                 # an ellipsis before them
    ("\u2026 brown fox\n\njumps", 16, "jumps"),                    # another, white space of any kind
    ("The quick brown fox jumps", 16, "jumps"),                    # the whole prefix
    ("The quick brown fox jumps", 2, "The quick brown fox jumps"), # echoes of at most two words: this is none
    ("fox jumps over", 16, "fox jumps over"),                      # one word is no echo
    ("brown foxes jump", 16, "brown foxes jump"),                  # whole words only
    ("... and then", 16, "... and then"),                          # an ellipsis without an echo stays
    ("brown fox", 16, ""),                                         # nothing but an echo
    ("  \n brown fox jumps", 0, "brown fox jumps"),                # off: white space goes all the same
    ("狐狸跳过了狗", 16, "跳过了狗"), ("...棕色狐狸， 跳过", 16, "， 跳过"),  # a script without spaces
    ("敏捷的fox棕色狐狸跳", 9, "跳"), ("狸跳过了狗", 16, "狸跳过了狗")])     # one character is no echo
def test_echo_equals_the_table(reply, words, wanted):
    prefix = "The quick brown fox" if "狸" not in reply else "那只敏捷的fox棕色狐狸"
    assert strip_echo(reply, prefix, words) == wanted
