"""The fast way to sample against the plain one: the model that learns, transformers' own cache."""
import copy

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from conftest import shared
from model import DTYPES, FORBIDDEN, add_adapters, causal_lm, checkpoint_layers, hidden_states, load_model
from rollout import Rules, draw, loop_for, rollout, rules
from sampler import BUCKET, Beside, Growing, Sampler, Standing, Turned, products, turned
from test_rollout import learner_logps, make_unequal, prompts_of

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: the CUDA graph cannot be tested")


def fast(model, name="generator", dtype=torch.float32, merge=True):
    sampler = Sampler(model, dtype, merge)
    sampler.follow(name)
    return sampler


def same_rollouts(model, sampler, prompts, rule, temperature=1.0):
    plain, quick = (rollout(m, prompts, rule, 6, 12, temperature, torch.Generator(rule.close.device).manual_seed(0))
                    for m in (model, sampler))
    assert temperature == 0 or len({len(reply) for reply in plain.reply}) > 1
    assert quick.ids.tolist() == plain.ids.tolist() and quick.sampled.tolist() == plain.sampled.tolist()
    assert quick.think == plain.think and quick.reply == plain.reply
    torch.testing.assert_close(quick.logps, plain.logps, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
@pytest.mark.parametrize("merge", [True, False])
def test_the_sampler_writes_what_the_plain_way_writes(tiny, merge, temperature):
    model, tokenizer = tiny
    model.set_adapter("generator")
    sampler, rule = fast(model, merge=merge), make_unequal(rules(tokenizer, model))
    assert sampler.stands and (sampler.num_bytes > 0) == merge
    same_rollouts(model, sampler, prompts_of(tokenizer) * 3, rule, temperature)
    apart = [prompt[i:] for i, prompt in enumerate(prompts_of(tokenizer) * 3)]  # no beginning in common
    same_rollouts(model, sampler, apart, rule, temperature)


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_a_quantised_model_keeps_its_layers_and_samples_the_same(quant, tiny_folder):
    model, tokenizer = load_model(tiny_folder, quant, "fp32", "cpu")
    torch.manual_seed(1)
    model = add_adapters(model, ["generator"], 4, 2.0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    sampler = fast(model)
    assert sampler.num_bytes == 0 and all(isinstance(twin, Beside) for twin, _ in sampler.twins)
    same_rollouts(model, sampler, prompts_of(tokenizer) * 3, make_unequal(rules(tokenizer, model)), 0)


def test_another_architecture_samples_the_same():
    model, tokenizer = load_model(str(shared("stories260k")), "none", "fp32", "cpu")
    sampler = fast(model, None)
    assert sampler.stands and not sampler.twins
    same_rollouts(model, sampler, [tokenizer(text).input_ids for text in ("Once upon a time", "Tom", "One day, a cat saw")] * 2,
                  make_unequal(rules(tokenizer, model)))


def test_a_model_that_does_not_see_all_of_a_text_goes_the_slow_way(capsys):
    model = MistralForCausalLM(MistralConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                                             num_attention_heads=2, num_key_value_heads=1, sliding_window=8)).eval()
    sampler = fast(model, None)
    assert not sampler.stands and "slow way" in capsys.readouterr().out
    assert isinstance(loop_for(sampler, (rule_of(64), 1, 2, 1.0), 2, 9).reader, Growing)


def rule_of(V):
    return Rules(torch.tensor([0]), torch.tensor([1, 2]), 1, torch.zeros(2, V, dtype=torch.bool), 0)


def test_the_merged_copy_follows_the_adapters_from_pristine_weights(tiny):
    model, tokenizer = tiny
    model.set_adapter("generator")
    rule = rules(tokenizer, model)
    sampler, base = fast(model), copy.deepcopy([layer.get_base_layer().weight for _, layer in fast(model).twins])
    first = [twin.weight.clone() for twin, _ in sampler.twins]

    def gap():
        roll = rollout(sampler, prompts_of(tokenizer), rule, 6, 9, 1.0, torch.Generator().manual_seed(0))
        stats, _ = learner_logps(model, rule, roll, list(range(3)))
        return (stats.logp - roll.logps[roll.sampled]).abs().max().item()

    assert gap() < 1e-4
    with torch.no_grad():  # an update of the generator
        for name, p in model.named_parameters():
            if ".generator." in name:
                p += 0.05 * torch.randn_like(p)
    assert gap() > 1e-2
    sampler.follow("generator")
    assert gap() < 1e-4
    sampler.follow("discriminator")
    sampler.follow(None)
    assert all(torch.equal(twin.weight, weight) for (twin, _), weight in zip(sampler.twins, base))
    assert all(torch.equal(layer.get_base_layer().weight, weight) for (_, layer), weight in zip(sampler.twins, base))
    sampler.follow("discriminator")
    assert not any(torch.equal(twin.weight, weight) for (twin, _), weight in zip(sampler.twins, first))


def test_the_copy_shares_what_no_adapter_changes(tiny):
    model, _ = tiny
    sampler = fast(model)
    adapted = {id(twin.weight) for twin, _ in sampler.twins}
    theirs = {p.data_ptr() for p in causal_lm(model).parameters()}
    assert all(p.data_ptr() in theirs for p in sampler.model.parameters() if id(p) not in adapted)
    assert not any(p.requires_grad for p in sampler.model.parameters())


def test_one_cache_is_kept_and_nothing_of_the_last_call_is_seen(tiny):
    model, tokenizer = tiny
    sampler, rule = fast(model), make_unequal(rules(tokenizer, model))
    settings, (short, *longer) = (6, 12, 0), sorted(prompts_of(tokenizer), key=len)
    alone = rollout(fast(model), [short] * 2, rule, *settings)
    rollout(sampler, [longer[0]] * 2, rule, *settings)
    (loop,) = sampler.loops.values()
    stored = [slab.keys.data_ptr() for slab in loop.reader.cache.layers]
    again = rollout(sampler, [short] * 2, rule, *settings)
    assert again.ids.tolist() == alone.ids.tolist() and torch.equal(again.logps, alone.logps)
    (loop,) = sampler.loops.values()
    assert [slab.keys.data_ptr() for slab in loop.reader.cache.layers] == stored
    assert loop.reader.width % BUCKET == 0


def test_a_standing_cache_reads_the_same_however_wide_it_is(tiny):
    """What a CUDA graph does, without one: attention over all columns, those not written yet among them."""
    model, tokenizer = tiny
    prompts, tokens = prompts_of(tokenizer), torch.randint(5, 4000, (8, 3))  # (8, B)
    told = []
    for width, every_column in ((192, False), (192, True), (448, True)):
        reader = Standing(model, 3, width)
        reader.reads_all = every_column
        with torch.no_grad():
            states = [reader.begin(prompts, 0), *(reader.read(token) for token in tokens)]
        told.append(torch.stack(states))  # (9, B, H)
    torch.testing.assert_close(told[0], told[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(told[0], told[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prompts", [
    [[7], [9]], [[7], [9, 8, 7]], [[5, 6, 7]] * 2, [[5, 6], [5, 6, 7, 8]], [[5, 6, 7, 8], [5, 6]], [[5, 6, 7, 1], [5, 6, 7, 2]],
], ids=str)
def test_a_standing_cache_reads_prompts_of_any_shape(prompts, tiny):
    """Of one token, alike, one the beginning of the other: against transformers' own cache."""
    model, _ = tiny
    tokens, told = torch.randint(5, 4000, (4, 2)), []  # (4, B)
    for reader in (Growing(model), Standing(model, 2, BUCKET), Standing(model, 2, BUCKET, reads_all=True)):
        with torch.no_grad():
            told.append(torch.stack([reader.begin(prompts, 0), *map(reader.read, tokens)]))  # (5, B, H)
    torch.testing.assert_close(told[0], told[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(told[0], told[2], rtol=1e-4, atol=1e-5)


def test_the_prompt_is_not_read_through_the_last_layer(tiny):
    model, tokenizer = tiny
    sampler, seen = fast(model), []
    sampler.model.base_model.layers[-1].mlp.register_forward_hook(lambda _, inputs, out: seen.append(out.shape[1]))
    apart = [prompt[i:] for i, prompt in enumerate(prompts_of(tokenizer))]  # no beginning in common
    for prompts in (prompts_of(tokenizer), prompts_of(tokenizer)[:1] * 3, apart):
        rollout(sampler, prompts, rules(tokenizer, model), 0, 4, 0)
    assert set(seen) == {1}


@pytest.mark.parametrize("dtype, tolerance", [("fp32", 1e-6), ("bf16", 2e-2)])
@pytest.mark.parametrize("heads, few", [(6, 2), (4, 4), (3, 1)])
@pytest.mark.parametrize("T", [1, 5])
def test_attention_by_plain_products_is_sdpa(heads, few, T, dtype, tolerance):
    torch.manual_seed(0)
    query, keys, values = (torch.randn(2, n, m, 8).to(DTYPES[dtype]) for n, m in ((heads, T), (few, 9), (few, 9)))
    mask = torch.zeros(2, 1, T, 9, dtype=query.dtype)
    mask[0, ..., :4] = mask[1, ..., 7:] = torch.finfo(mask.dtype).min
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = heads // few, True
    for scaling in (None, 0.3):
        told = products(module, query, keys, values, mask, scaling=scaling)[0]
        expected = sdpa_attention_forward(module, query, keys, values, mask, scaling=scaling)[0]
        assert told.shape == expected.shape == (2, T, heads, 8)
        torch.testing.assert_close(told, expected, rtol=tolerance, atol=tolerance)
    told, unmasked = (products(module, query, keys, values, m)[0] for m in (mask, None))
    assert not torch.allclose(told, unmasked, atol=0.05), "the mask did nothing"


def test_only_the_copy_on_a_cpu_attends_by_plain_products(tiny):
    assert fast(tiny[0]).model.config._attn_implementation == "products"
    assert causal_lm(tiny[0]).config._attn_implementation == "sdpa"


@pytest.fixture()
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [(3, 1, 12), (3, 12), (64, 1, 12), (65, 1, 12), (5, 4, 12), (20, 4, 12)])
def test_the_product_of_few_rows_taken_the_other_way_round_is_linear(two_threads, shape):
    torch.manual_seed(0)
    for out in (8, 200):
        x, weight, bias = torch.randn(shape), torch.randn(out, 12), torch.randn(out)
        for b in (None, bias):
            told, expected = turned(x, weight, b), torch.nn.functional.linear(x, weight, b)
            assert told.is_contiguous() and told.shape == expected.shape
            torch.testing.assert_close(told, expected, rtol=1e-5, atol=1e-5)


def test_with_threads_only_many_rows_go_through_torchs_linear(two_threads, monkeypatch):
    rows, linear = [], torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, *rest: rows.append(len(x)) or linear(x, *rest))
    layer = Turned(4, 4, bias=False)
    for n in (1, 64, 65):
        layer(torch.randn(n, 4))
    assert rows == [65]
    torch.set_num_threads(1)
    layer(torch.randn(2, 4))
    assert rows == [65, 2]


def test_with_threads_the_fast_way_says_what_the_plain_way_says(tiny, two_threads):
    model, tokenizer = tiny
    model.set_adapter("generator")
    same_rollouts(model, fast(model), prompts_of(tokenizer) * 3, make_unequal(rules(tokenizer, model)))


def test_draws_have_the_models_probabilities():
    torch.manual_seed(0)
    logits = torch.randn(1, 6)
    logits[0, [2, 5]] = FORBIDDEN
    p, N = logits.double().softmax(-1)[0], 40_000
    drawn, logps = draw(logits.repeat(N, 1), torch.rand(N, dtype=torch.double))
    share = torch.bincount(drawn, minlength=6) / N
    assert share[2] == share[5] == 0
    assert ((share - p).abs() <= 4 * (p * (1 - p) / N).sqrt()).all(), (share, p)
    torch.testing.assert_close(logps.double(), p.log()[drawn], rtol=1e-6, atol=1e-6)


def test_draws_at_both_ends_are_allowed_ids():
    logits = torch.zeros(2, 5)
    logits[:, [0, 4]] = FORBIDDEN
    drawn, _ = draw(logits.clone(), torch.tensor([0.0, 1 - 2**-53], dtype=torch.double))
    assert drawn.tolist() == [1, 3]
    greedy, logp = draw(torch.tensor([[0.0, 2.0, 1.0]]), None)
    assert greedy.item() == 1 and logp.item() == pytest.approx(-0.407606, abs=1e-6)  # -log(1 + 1/e + 1/e^2)


def test_a_checkpointed_model_has_the_same_gradients_and_samples_the_same(tiny):
    model, tokenizer = tiny
    model.set_adapter("generator")
    ids = torch.randint(5, 4000, (2, 20))

    def gradients():
        model.zero_grad()
        hidden_states(model, ids).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    before, rule = gradients(), rules(tokenizer, model)
    plain = rollout(model, prompts_of(tokenizer), rule, 6, 12, 0)
    checkpoint_layers(model)
    calls = []
    causal_lm(model).base_model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    after = gradients()
    assert len(calls) == 2, "the layer was not computed again"
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b)
    sampler = fast(model)
    assert sampler.stands and rollout(sampler, prompts_of(tokenizer), rule, 6, 12, 0).ids.tolist() == plain.ids.tolist()


@GPU
@pytest.mark.parametrize("quant, dtype, tolerance", [("none", "fp32", 1e-4), ("none", "bf16", 0.1), ("nf4", "bf16", 0.1)])
def test_the_graph_writes_what_the_plain_way_writes(quant, dtype, tolerance, demo, tmp_path):
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=4096, hidden_size=64, num_hidden_layers=2, intermediate_size=128, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=32, max_position_embeddings=2048, eos_token_id=demo[1].eos_token_id)
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    demo[1].save_pretrained(tmp_path)
    model, tokenizer = load_model(str(tmp_path), quant, dtype, "cuda")
    model = add_adapters(model, ["generator", "discriminator"], 4, 2.0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    sampler, rule = fast(model, dtype=DTYPES[dtype]), rules(tokenizer, model)
    for adapter in ("generator", "discriminator"):  # the second by the first one's graphs: new weights, old addresses
        model.set_adapter(adapter)
        sampler.follow(adapter)
        for prompts, temperature in ((prompts_of(tokenizer), 0), (prompts_of(tokenizer), 1.0), (prompts_of(tokenizer)[:1], 1.0)):
            plain, quick, again = (rollout(m, prompts, rule, 6, 600, temperature, torch.Generator("cuda").manual_seed(0))
                                   for m in (model, sampler, sampler))  # the last by replaying alone
            assert all(loop.graph is not None for loop in sampler.loops.values())
            assert again.ids.tolist() == quick.ids.tolist()
            if dtype == "fp32":
                assert quick.ids.tolist() == plain.ids.tolist()
                torch.testing.assert_close(quick.logps, plain.logps, rtol=tolerance, atol=tolerance)
            stats, _ = learner_logps(model, rule, quick, list(range(len(prompts))), temperature or 1.0)
            torch.testing.assert_close(stats.logp, quick.logps[quick.sampled], rtol=tolerance, atol=tolerance)


@GPU
def test_a_model_that_cannot_be_captured_samples_all_the_same(tiny_folder, capsys):
    model, tokenizer = load_model(tiny_folder, "int8", "bf16", "cuda")  # LLM.int8() looks for outliers, and so waits
    sampler, here = fast(add_adapters(model, ["generator"], 4, 2.0), dtype=torch.bfloat16), torch.cuda.current_stream()
    roll = rollout(sampler, prompts_of(tokenizer), rules(tokenizer, model), 6, 12, 0)
    assert not sampler.captures and all(roll.reply) and torch.cuda.current_stream() == here
