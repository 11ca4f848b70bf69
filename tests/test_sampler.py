"""What the sampler says of its tokens against what the learner says of them, whatever the cache, model and prompts."""
import pytest
import torch
import transformers

from data import plain_encoder, prompt_ids, prompt_template
from flags import UserError
from model import add_adapters, adapter_parameters, causal_lm, checkpoint_layers, hidden_states, load_model
from rollout import Rules, keyed, rollout, rules, sampled_stats
from sampler import BUCKET, KEPT, AdapterBeside, GrowingReader, Sampler, StaticReader
from test_rollout import PREFIXES

BOTH = pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])


def sampler_of(model, static, name="generator", dtype=torch.float32, merge=True):
    sampler = Sampler(model, dtype, merge, static)
    sampler.sync(name)
    return sampler


def prompts_of(tokenizer):
    """Four times three prompts of different lengths."""
    template = prompt_template("writeup")
    return [prompt_ids(tokenizer, plain_encoder(tokenizer), template, prefix) for prefix in PREFIXES] * 4


def unequal(rule):
    """Rules under which the rows of a random model end at different times, because many ids end a completion."""
    return rule._replace(stop=torch.arange(400))


def gap(model, sampler, prompts, rule, temperature=1.0):
    """How far sampler and learner differ at most in the log-prob of a sampled token; and the rollout."""
    roll = rollout(sampler, prompts, rule, 6, 12, temperature, [(0, i) for i in range(len(prompts))])
    with torch.no_grad():
        stats = sampled_stats(model, roll, list(range(len(prompts))), rule, temperature, False)
    return (stats.logp - roll.logps[roll.sampled]).abs().max().item(), roll


@BOTH
@pytest.mark.parametrize("merge", [True, False], ids=["merged", "beside"])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_sampler_and_learner_agree(static, merge, temperature, tiny):
    model, tokenizer = tiny
    rule, sampler = unequal(rules(tokenizer, model)), sampler_of(model, static, merge=merge)
    assert sampler.static == static and all(isinstance(x, AdapterBeside) != merge for x, _ in sampler.pairs)
    prompts = prompts_of(tokenizer)
    apart = [prompt[i:] for i, prompt in enumerate(prompts)]  # no beginning in common
    for some in (prompts, apart, prompts[:1]):
        distance, roll = gap(model, sampler, some, rule, temperature)
        assert distance < 1e-4 and (len({*map(len, roll.reply)}) > 1 or len(some) == 1)


def random_model(kind, **more):
    """A small causal LM with random weights, and an adapter whose weights are not zero."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=1, max_position_embeddings=128, n_embd=32, n_layer=2, n_head=2, n_positions=128)
    config = getattr(transformers, f"{kind}Config")(**sizes | more)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters():
        p.requires_grad_(False).mul_(3)
    model = add_adapters(model, ["generator"], 4, 2.0)
    for p in adapter_parameters(model, "generator"):
        torch.nn.init.normal_(p, std=0.1)
    return model


def rule_of(V=64):
    return Rules(torch.tensor([0, 1, 2, 3]), torch.tensor([4, 5]), 4, torch.zeros(2, V, dtype=torch.bool), 0)

