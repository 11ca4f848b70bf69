import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from conftest import shared
from data import bos_ids, plain_encoder, prompt_ids
from model import causal_lm, hidden_states, load_model, token_logps
from reward import policy_loss
from rollout import COMPLETION, THINKING, rollout, rules, strip_echo, taught

PREFIXES = ["Return the", "A much longer prefix, so that the prompts of a batch are not of one length:\n\n    >>> x = 1", "x"]


def prompts_of(tokenizer):
    return [prompt_ids(tokenizer, plain_encoder(tokenizer), prefix) for prefix in PREFIXES]


def sampled(tiny, **kwargs):
    model, tokenizer = tiny
    model.set_adapter("generator")
    settings = dict(reasoning_tokens=6, completion_tokens=9, generator=torch.Generator().manual_seed(0)) | kwargs
    rule = rules(tokenizer, model)
    return model, rule, rollout(model, prompts_of(tokenizer), rule, **settings)


def learner_logps(model, rule, roll, rows, temperature=1.0):
    mask, hidden = roll.sampled[rows], hidden_states(model, roll.ids[rows])
    kind = torch.where(roll.thinking[rows], THINKING, COMPLETION)[mask]
    return token_logps(model, hidden[:, :-1][mask[:, 1:]], roll.ids[rows][mask], rule.blocked, kind, temperature=temperature), hidden


def make_unequal(rule):
    """Rules under which rows of a random model end at different times: many ids close the completion."""
    return rule._replace(stop=torch.arange(0, 400))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampler_and_learner_agree_batched_and_alone(tiny, temperature):
    model, tokenizer = tiny
    model.set_adapter("generator")
    rule = make_unequal(rules(tokenizer, model))
    roll = rollout(model, prompts_of(tokenizer) * 4, rule, 6, 9, temperature, torch.Generator().manual_seed(0))
    assert len({len(reply) for reply in roll.reply}) > 1
    stats, _ = learner_logps(model, rule, roll, list(range(12)), temperature)
    torch.testing.assert_close(stats.logp, roll.logps[roll.sampled], rtol=1e-4, atol=1e-5)
    for i in range(12):
        stats, _ = learner_logps(model, rule, roll, [i], temperature)
        torch.testing.assert_close(stats.logp, roll.logps[i][roll.sampled[i]], rtol=1e-4, atol=1e-5)


class Force(LogitsProcessor):
    """What `generate` needs to be told to write as rollout does: forbidden ids, and the closing at the budget."""

    def __init__(self, rule, start, budget):
        self.rule, self.start, self.budget = rule, start, budget

    def __call__(self, ids, scores):
        new, close = ids[0, self.start:].tolist(), self.rule.close.tolist()
        out = torch.full_like(scores, float("-inf"))
        end = new.index(self.rule.think_end) if self.rule.think_end in new else None
        if end is None and len(new) < self.budget:
            V = self.rule.blocked.shape[1]
            out[:, :V] = scores[:, :V].masked_fill(self.rule.blocked[THINKING], float("-inf"))
        elif end is None or len(new) - end < len(close):
            out[0, close[0 if end is None else len(new) - end]] = 0.0
        else:
            V = self.rule.blocked.shape[1]
            out[:, :V] = scores[:, :V].masked_fill(self.rule.blocked[COMPLETION], float("-inf"))
        return out


@pytest.mark.parametrize("which", ["tiny", "demo"])
def test_greedy_rollout_equals_generate_with_the_same_rules(which, tiny, demo):
    model, tokenizer = tiny if which == "tiny" else demo
    rule, prompts = rules(tokenizer, model), prompts_of(tokenizer)
    roll = rollout(model, prompts, rule, 5, 12, temperature=0)
    for i, prompt in enumerate(prompts):
        think = len(roll.think[i]) + len(rule.close)
        wanted = model.generate(
            input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
            max_new_tokens=think + 12, eos_token_id=rule.stop.tolist(), pad_token_id=rule.pad,
            logits_processor=LogitsProcessorList([Force(rule, len(prompt), 5)]))[0].tolist()
        assert roll.ids[i, :len(wanted)].tolist() == wanted
        assert not roll.sampled[i, len(wanted):].any()


def test_a_taught_rollout_trains_the_given_completions_after_the_drawn_thinking(tiny):
    model, rule, roll = sampled(tiny)
    prompts, answers = prompts_of(tiny[1]), [[100, 101, 102], [103], [104, 105]]
    told = taught(roll, prompts, answers, rule)
    for i, (prompt, answer) in enumerate(zip(prompts, answers)):
        row = prompt + roll.think[i] + rule.close.tolist() + answer
        assert told.ids[i, :len(row)].tolist() == row and told.sampled[i].sum() == len(answer)
        assert told.ids[i][told.sampled[i]].tolist() == answer and not told.thinking[i].any()
    model.set_adapter("generator")
    stats, _ = learner_logps(model, rule, told, [0, 1, 2])
    policy_loss(stats.logp, stats.kl, torch.ones(6), 0.0, 6).backward()
    loss = torch.nn.functional.cross_entropy(causal_lm(model)(told.ids).logits[:, :-1][told.sampled[:, 1:]][:, :rule.blocked.shape[1]],
                                             torch.tensor(sum(answers, [])))
    assert loss.item() == pytest.approx(-stats.logp.mean().item(), rel=1e-4)


def test_only_sampled_positions_carry_gradient_the_stop_id_among_them(tiny):
    model, tokenizer = tiny
    model.set_adapter("generator")
    rule = make_unequal(rules(tokenizer, model))
    prompts = prompts_of(tokenizer)
    roll = rollout(model, prompts, rule, 6, 30, generator=torch.Generator().manual_seed(0))
    hidden = hidden_states(model, roll.ids).detach().requires_grad_()
    kind = torch.where(roll.thinking, THINKING, COMPLETION)[roll.sampled]
    stats = token_logps(model, hidden[:, :-1][roll.sampled[:, 1:]], roll.ids[roll.sampled], rule.blocked, kind, hidden.detach()[:, :-1][roll.sampled[:, 1:]] + 0.1)
    policy_loss(stats.logp, stats.kl, torch.ones(len(kind)), 0.05, 10).backward()
    carries = torch.zeros_like(roll.sampled)
    carries[:, 1:] = hidden.grad.abs().sum(-1)[:, :-1] > 0
    assert torch.equal(carries, roll.sampled)
    stopped = 0
    for i, prompt in enumerate(prompts):
        reply = len(prompt) + len(roll.think[i]) + int(roll.think_closed[i])
        forced = rule.close.tolist()[int(roll.think_closed[i]):]
        assert roll.ids[i, reply:reply + len(forced)].tolist() == forced
        assert not carries[i, :len(prompt)].any() and not carries[i, reply:reply + len(forced)].any()
        end = reply + len(forced) + len(roll.reply[i])
        if len(roll.reply[i]) < 30:
            stopped += 1
            assert int(roll.ids[i, end]) in rule.stop.tolist() and carries[i, end]
            end += 1
        assert not carries[i, end:].any()
    assert stopped


@pytest.mark.parametrize("reasoning_tokens", [0, 1, 7])
def test_thinking_keeps_its_budget_and_its_closing_is_forced(tiny, reasoning_tokens):
    model, rule, roll = sampled(tiny, reasoning_tokens=reasoning_tokens)
    assert all(len(think) <= reasoning_tokens for think in roll.think)
    assert all(rule.think_end in row for row in roll.ids.tolist())
    assert all(len(reply) <= 9 for reply in roll.reply)


def test_thinking_that_closes_itself_is_trained_on_its_closing(tiny):
    model, tokenizer = tiny
    model.set_adapter("generator")
    rule, prompts = rules(tokenizer, model), prompts_of(tokenizer)
    only = rule.blocked.clone()
    only[THINKING] = True
    only[THINKING, [rule.think_end, 50, 51]] = False  # one chance in about three to close
    roll = rollout(model, prompts * 4, rule._replace(blocked=only), 40, 3, generator=torch.Generator().manual_seed(0))
    assert roll.think_closed.all() and len({len(think) for think in roll.think}) > 1
    closing = (roll.ids == rule.think_end) & roll.sampled
    assert (closing.sum(1) == 1).all() and roll.thinking[closing].all()


def test_forbidden_ids_never_come(tiny):
    model, rule, roll = sampled(tiny, completion_tokens=60)
    vocab, ids = tiny[1].get_vocab(), roll.ids[roll.sampled]
    thinking = roll.thinking[roll.sampled]
    assert ids.max() < len(tiny[1]) < causal_lm(model).config.vocab_size
    assert not torch.isin(ids[thinking], rule.stop).any()
    assert not torch.isin(ids[~thinking], torch.tensor([vocab["<think>"], vocab["</think>"]])).any()
    assert rule.blocked[THINKING, vocab["<think>"]] and rule.blocked[COMPLETION, vocab["</think>"]]
    assert not rule.blocked[THINKING, vocab["</think>"]] and not rule.blocked[COMPLETION, vocab["<|im_end|>"]]


def test_the_same_generator_gives_the_same_rollout(tiny):
    first, again, other = (sampled(tiny, generator=torch.Generator().manual_seed(seed))[2] for seed in (5, 5, 6))
    assert torch.equal(first.ids, again.ids) and not torch.equal(first.ids, other.ids)


def test_a_tokenizer_without_think_tokens_ends_thinking_by_budget_alone():
    model, tokenizer = load_model(str(shared("stories260k")), "none", "fp32", "cpu")
    rule = rules(tokenizer, model)
    assert rule.think_end == -1 and tokenizer.eos_token_id in rule.stop.tolist()
    prompts = prompts_of(tokenizer)
    assert all(prompt[0] == tokenizer.bos_token_id == bos_ids(tokenizer)[0] for prompt in prompts)
    roll = rollout(model, prompts, rule, 4, 8, generator=torch.Generator().manual_seed(0))
    assert [len(think) for think in roll.think] == [4, 4, 4] and not roll.think_closed.any()
    for i, prompt in enumerate(prompts):
        at = len(prompt) + 4
        assert roll.ids[i, at:at + len(rule.close)].tolist() == rule.close.tolist()
    stats, _ = learner_logps(model, rule, roll, [0, 1, 2])
    torch.testing.assert_close(stats.logp, roll.logps[roll.sampled], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reply, words, wanted", [
    ("jumps over the lazy dog", 16, "jumps over the lazy dog"),         # no echo
    ("brown fox jumps over", 16, "jumps over"),                          # two words
    ("...brown fox jumps over", 16, "jumps over"),                       # an ellipsis before them
    ("\u2026 brown fox\n\njumps", 16, "jumps"),                          # another, white space of any kind
    ("The quick brown fox jumps", 16, "jumps"),                          # the whole prefix
    ("The quick brown fox jumps", 2, "The quick brown fox jumps"),       # echoes of at most two words: this is none
    ("fox jumps over", 16, "fox jumps over"),                            # one word is no echo
    ("brown foxes jump", 16, "brown foxes jump"),                        # whole words only
    ("quick brown dogs", 16, "quick brown dogs"),                        # not the last words
    ("... and then", 16, "... and then"),                                # an ellipsis without an echo stays
    ("brown fox", 16, ""),                                               # nothing but an echo
    ("  \n brown fox jumps", 0, "brown fox jumps"),                      # off: white space goes all the same
    ("", 16, ""),
])
def test_echo_equals_the_table(reply, words, wanted):
    assert strip_echo(reply, "The quick brown fox", words) == wanted
