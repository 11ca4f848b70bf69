"""What the sampler says of its tokens against what the learner says of them, whatever the cache, model and prompts."""
import pytest
import torch
import transformers

from data import plain_encoder, prompt_ids, prompt_template
from model import adapter_parameters, add_adapters, causal_lm, checkpoint_layers, hidden_states, without_adapters
from rollout import Rules, rng_for, rollout, rules, sampled_stats
from sampler import BUCKET, MAX_CACHES, AdapterBeside, GrowingReader, Sampler, StaticReader
from test_rollout import PREFIXES

RULE = Rules(torch.tensor([0, 1, 2, 3]), torch.tensor([4, 5]), 4, torch.zeros(2, 64, dtype=torch.bool), 0)
BOTH = pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])


def sampler_of(model, static, name="generator", merge=True):
    sampler = Sampler(model, merge, static)
    sampler.sync(name)
    return sampler


def prompts_of(tokenizer):
    """Three prompts of different lengths."""
    template, encode = prompt_template("writeup"), plain_encoder(tokenizer)
    return [prompt_ids(tokenizer, encode, template, prefix) for prefix in PREFIXES]


def gap(model, sampler, prompts, rule, temperature=1.0, completion_tokens=12):
    """How far sampler and learner differ at most in the log-prob of a sampled token; and the rollout."""
    roll = rollout(sampler, prompts, rule, 6, completion_tokens, temperature, [(0, i) for i in range(len(prompts))])
    with torch.no_grad():
        stats = sampled_stats(model, roll, list(range(len(prompts))), rule, temperature, False)
    return (stats.logp - roll.logps[roll.sampled]).abs().max().item(), roll


@BOTH
@pytest.mark.parametrize("temperature, merge", [(0.0, True), (0.7, True), (1.0, True), (1.0, False)])
def test_sampler_and_learner_agree(static, temperature, merge, tiny):
    model, tokenizer = tiny
    rule, sampler, prompts = rules(tokenizer, model), sampler_of(model, static, merge=merge), prompts_of(tokenizer) * 2
    rule = rule._replace(stop=torch.arange(400))  # many ids end a completion, so that rows end at different times
    assert sampler.static == static and all(isinstance(part, AdapterBeside) != merge for part, _ in sampler.pairs)
    for some in (prompts, [prompt[i:] for i, prompt in enumerate(prompts)], prompts[:1]):  # the second: no common start
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
    model = add_adapters(model, ["generator"], 4, 3.0)
    for p in adapter_parameters(model, "generator"):
        torch.nn.init.normal_(p, std=0.1)
    return model


@BOTH
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # peft sees that GPT-2's layers are transposed
@pytest.mark.parametrize("kind", ["Llama", "GPT2", "GPTNeoX", "Phi"])
def test_other_architectures_agree(kind, static):
    model, apart = random_model(kind), [[20 + i] * (1 + i % 5) for i in range(8)]
    for merge in (True, False):
        sampler = sampler_of(model, static, merge=merge)
        sampler.sync("generator")  # a second time: nothing adds up
        assert sampler.static == static
        for prompts in (apart, [[7, 8, 9, *prompt] for prompt in apart]):
            assert gap(model, sampler, prompts, RULE)[0] < 1e-4


@pytest.mark.parametrize("kind, more", [("Mistral", dict(sliding_window=8)), ("GPTNeo", dict(
    window_size=8, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]]))])
def test_a_model_with_a_sliding_window_samples_with_its_growing_cache(kind, more, capsys):
    model = random_model(kind, **more)
    sampler = sampler_of(model, True)
    assert not sampler.static and "growing cache" in capsys.readouterr().out
    assert gap(model, sampler, [[*range(9, 19), *[20 + i] * (1 + i)] for i in range(8)], RULE)[0] < 1e-4


@BOTH
def test_a_cache_reads_prompts_of_any_shape_and_sees_nothing_of_the_last_ones(static, tiny):
    model, tokens = tiny[0], torch.randint(5, 4000, (4, 2), generator=rng_for("tokens"))  # (t, B)
    reader = StaticReader(causal_lm(model), 2, BUCKET) if static else GrowingReader(causal_lm(model))
    for prompts in ([[5, 6, 7, 8], [5, 6]], [[7], [9]], [[7], [9, 8, 7]], [[5, 6, 7]] * 2, [[5, 6], [5, 6, 7, 8]],
                    [[5, 6, 7, 1], [5, 6, 7, 2]]):
        with torch.no_grad():
            states = torch.stack([reader.begin(prompts, 0), *map(reader.read, tokens)], 1)  # (B, t + 1, H)
            plain = [hidden_states(model, torch.tensor([prompt + tokens[:, i].tolist()]))[0, -5:]
                     for i, prompt in enumerate(prompts)]  # B of (t + 1, H)
        torch.testing.assert_close(states, torch.stack(plain), rtol=1e-4, atol=1e-5)


def test_caches_are_kept_by_shape_the_latest_ones():
    sampler = Sampler(random_model("Llama"), static=True)
    first, wider, taller = (sampler.decoder("key", *shape, object) for shape in ((2, 3), (2, BUCKET), (3, 3)))
    assert first is wider and first is not taller and first[0].mask.shape == (2, 1, 1, BUCKET)
    for rows in range(4, 3 + MAX_CACHES):
        sampler.decoder("key", 2, 3, object)
        sampler.decoder("key", rows, 3, object)
    assert len(sampler.caches) == MAX_CACHES and sampler.decoder("key", 2, 3, object) is first
    assert sampler.decoder("key", 3, 3, object) is not taller


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "beside"])
def test_sync_takes_over_an_adapter_from_pristine_weights(merge, tiny):
    model, tokenizer = tiny
    sampler, args = sampler_of(model, False, merge=merge), (prompts_of(tokenizer), rules(tokenizer, model))
    with torch.no_grad():  # an update of the generator
        for p in adapter_parameters(model, "generator"):
            p += 0.05 * torch.randn(p.shape, generator=rng_for("update"))
    assert gap(model, sampler, *args)[0] > 1e-2
    for name in ("generator", "discriminator", "generator"):
        sampler.sync(name)
        model.set_adapter(name)
        assert gap(model, sampler, *args)[0] < 1e-4
    sampler.sync(None)
    with without_adapters(model):  # equal bit for bit, whatever was merged before
        assert torch.equal(*(hidden_states(x, torch.arange(5, 25)[None]) for x in (sampler.model, model)))


def test_the_copy_shares_what_no_adapter_changes(tiny):
    sampler = Sampler(tiny[0])
    changed, shared = {id(part.weight) for part, _ in sampler.pairs}, {p.data_ptr() for p in tiny[0].parameters()}
    assert all((p.data_ptr() in shared) != (id(p) in changed) for p in sampler.model.parameters())
    assert len(changed) == 14 and not any(p.requires_grad for p in sampler.model.parameters())


def test_a_checkpointed_model_samples_the_same(tiny):
    checkpoint_layers(tiny[0])
    for static in (False, True):
        args = sampler_of(tiny[0], static), prompts_of(tiny[1]), rules(tiny[1], tiny[0])
        assert gap(tiny[0], *args)[0] < 1e-4
