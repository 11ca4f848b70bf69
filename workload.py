"""
What bench.py measures: models of random weights, prompts without text, one training step as train.py's loop does it.

What differs from the textbook: nothing ends early and nothing is read from the disk, so that a step's work is known
beforehand. The step is a copy of the loop's lines, not the loop: a script cannot be imported.

Letters: B sequences (b in a micro-batch), P prompt tokens, R and C tokens of thinking and completion, T tokens,
N sampled ones, V vocabulary, H hidden.
"""
import copy
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast, Qwen3Config

from discriminator import Discriminator, discriminator_loss
from model import DTYPES, adapter_parameters, add_adapters, hidden_states, micro_batches, pad, update
from reward import REAL, advantages, policy_loss
from rollout import Rules, reference_hidden, rollout, sampled_stats
from sampler import Sampler

KL_COEF, GRAD_CLIP, LR = 0.05, 1.0, 1e-5


class Work(NamedTuple):
    """How much a step does."""
    B: int
    P: int
    R: int
    C: int
    micro_batch: int = 0


# -----------------------------------------------------------------------------
# models

def qwen3(vocab, hidden, intermediate, layers, heads, kv_heads, head_dim, tied):
    return Qwen3Config(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, tie_word_embeddings=tied,
        max_position_embeddings=40960, rope_parameters={"rope_type": "default", "rope_theta": 1e6}, rms_norm_eps=1e-6)


SHAPES = {"qwen3-8b-random": (151936, 4096, 12288, 36, 32, 8, 128, False),  # as in Qwen/Qwen3-8B's config.json
          "tiny-random": (400, 32, 48, 2, 2, 1, 16, True)}


def build(config, quant, dtype, device):
    """A causal LM from its config, weights random; quantised layer by layer, so that it is never there in full."""
    config, kind, count = copy.deepcopy(config), DTYPES[dtype], config.num_hidden_layers
    kinds, config.num_hidden_layers, config.layer_types = config.layer_types, 1, config.layer_types[:1]
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=kind)
        model.config.num_hidden_layers, model.config.layer_types = count, kinds
        Layer = type(model.base_model.layers[0])  # of Qwen3, Llama and their kin
        layers = (quantised(Layer(model.config, i).to(kind), quant, kind) for i in range(count))
        model.base_model.layers = torch.nn.ModuleList(layers)
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = quant == "nf4", quant == "int8"  # peft and TRL ask for these
    for module in model.modules():  # see load_model
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.requires_grad_(False).eval()


def quantised(layer, quant, kind):
    """A layer with bitsandbytes' linear layers in place of torch's, of the settings that load_model asks for."""
    if quant == "none":
        return layer
    from bitsandbytes.nn import Int8Params, Params4bit
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    config = {"nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=kind),
              "int8": BitsAndBytesConfig(load_in_8bit=True)}[quant]
    weights = {name: part.weight.data for name, part in layer.named_modules() if type(part) is torch.nn.Linear}
    replace_with_bnb_linear(layer, quantization_config=config)
    for name, weight in weights.items():
        part = layer.get_submodule(name)
        settings = {key: value for key, value in vars(part.weight).items() if key not in ("CB", "SCB")}
        Quantised = {"nf4": Params4bit, "int8": Int8Params}[quant]  # int8 is quantised on its way from the CPU
        part.weight = Quantised(weight.cpu(), requires_grad=False, **settings).to(weight.device)
    return layer


def twin(base):
    """A copy of the model that shares its weights, for adapters of its own."""
    memo = {id(p): p for p in base.parameters()}
    for module in base.modules():  # of bitsandbytes: what belongs to its weights is shared with them
        if getattr(getattr(module, "weight", None), "CB", None) is not None:
            module.init_8bit_state()
        states = (module.__dict__.get(name) for name in ("state", "quant_state"))
        memo |= {id(state): state for state in states if state is not None}
    return copy.deepcopy(base, memo)


def bytes_a_step(base, work):
    """Bytes that a decode step cannot help reading: the weights once, and the cache at its mean length."""
    config, head, table = base.config, base.get_output_embeddings().weight, base.get_input_embeddings().weight
    read = [p for p in base.parameters() if p is head or p is not table]  # of the table, a row a sequence
    scales = [p.quant_state.absmax for p in read if getattr(p, "quant_state", None)]
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * heads * head_dim * head.element_size()
    return sum(t.nbytes for t in read + scales) + token * work.B * (work.P + (work.R + work.C) / 2)


# -----------------------------------------------------------------------------
# prompts, rules, a tokenizer

def prompts_of(work, vocab):
    """B prompts of P ids, in pairs that are alike, as GRPO needs them."""
    ids = torch.randint(2, vocab, ((work.B + 1) // 2, work.P))  # (B/2, P)
    return ids.repeat_interleave(2, 0)[:work.B].tolist()  # (B, P)


def endless(vocab, device):
    """Rules that forbid nothing and end nothing: the end is `vocab`, one above the last id. One token is forced."""
    one = torch.tensor([1], device=device)  # (1,)
    return Rules(stop=one * vocab, close=one, think_end=-1, pad=0,
                 blocked=torch.zeros(2, vocab, dtype=torch.bool, device=device))


def numbers(vocab):
    """A tokenizer whose words are the ids: "17 4" is [17, 4]. Its end is `vocab`."""
    words = Tokenizer(models.WordLevel({str(i): i for i in range(vocab + 1)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token=str(vocab))


# -----------------------------------------------------------------------------
# one training step, as train.py's loop does it

class Players:
    """Generator G and discriminator D on one model, one adapter if they are one, with all that a step needs."""

    def __init__(self, base, G, D, rank, alpha, work, device):
        self.G, self.D, self.work, self.device = G, D, work, device
        self.vocab = vocab = base.get_output_embeddings().weight.shape[0]
        self.model = add_adapters(twin(base), sorted({G, D}, reverse=True), rank, alpha)
        self.sampler = Sampler(self.model, base.get_output_embeddings().weight.dtype)
        self.head = Discriminator(base.config.hidden_size, "last").to(device)
        self.g_optimizer = torch.optim.Adam(adapter_parameters(self.model, G), lr=LR)
        d_params = adapter_parameters(self.model, D) + list(self.head.parameters())
        self.d_optimizer = torch.optim.Adam(d_params, lr=LR)
        self.rule, self.tokenizer, self.prompts = endless(vocab, device), numbers(vocab), prompts_of(work, vocab)
        self.truths = torch.randint(2, vocab, (work.B, work.C)).tolist()  # (B, C)
        self.random = torch.Generator(device).manual_seed(0)
        self.state = {"loss_scale": 1.0}
        self.parts = micro_batches(range(work.B), work.micro_batch)

    def standing(self):
        """Bytes that stand between two steps: weights, adapters, optimisers' states, and what else a GPU holds."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        states = (state for optimizer in (self.g_optimizer, self.d_optimizer) for state in optimizer.state.values())
        tensors = {*self.model.parameters(), *self.head.parameters()}
        return sum(t.nbytes for t in tensors) + sum(t.nbytes for state in states for t in state.values())

    def sample(self):
        """A rollout, its replies also as text, as the loop and TRL have them."""
        self.sampler.follow(self.G)
        roll = rollout(self.sampler, self.prompts, self.rule, self.work.R, self.work.C, 1.0, self.random)
        self.tokenizer.batch_decode(roll.reply)
        return roll

    def judge(self, rows, *answers):
        """The discriminator's logits for answers (B lists of ids each) of some rows: (b, 2), one kind after the other.

        As many tokens of the prefix as of the completion are read before an answer, as by default.
        """
        before = min(self.work.P, self.work.C)
        texts = [self.prompts[i][-before:] + answer[i] for answer in answers for i in rows]
        masks = [[False] * before + [True] * len(answer[i]) for answer in answers for i in rows]
        ids, mask = pad(texts, 0, self.device), pad(masks, 0, self.device, torch.bool)  # (b, T) each
        return self.head(hidden_states(self.model, ids), mask)  # (b, 2)

    def stats(self, roll, rows, ref_hidden):
        return sampled_stats(self.model, roll, rows, self.rule, 1.0, ref_hidden)  # (N,) each

    def kl_now(self, roll, parts):
        """The loop logs it after both steps where the adapter is shared."""
        self.model.set_adapter(self.G)
        with torch.no_grad():
            return torch.cat([self.stats(roll, *part).kl for part in parts]).mean().item()


def generator_step(players, roll, reward, clock):
    """REINFORCE and the KL to the base. Returns rows and reference states of each micro-batch."""
    work, parts, advantage = players.work, [], advantages(reward, 0.5)  # (B,)
    players.model.set_adapter(players.G)
    for rows in players.parts:
        ref_hidden = reference_hidden(players.model, roll, rows)  # (N, H)
        clock("reference")
        stats = players.stats(roll, rows, ref_hidden)  # (N,) each
        each = advantage[rows].repeat_interleave(roll.sampled[rows].sum(1))  # (N,)
        policy_loss(stats.logp, stats.kl, each, KL_COEF, work.B * (work.R + work.C)).backward()  # ()
        parts.append((rows, ref_hidden))
        clock("generator")
    update(players.g_optimizer, LR, GRAD_CLIP, players.state)
    clock("optimiser")
    return parts


def learn(players, roll, clock):
    """Reward, generator step, discriminator step, and the KL for the log."""
    model, B, shared = players.model, players.work.B, players.G == players.D
    model.set_adapter(players.D)
    with torch.no_grad():
        logits = torch.cat([players.judge(rows, roll.reply) for rows in players.parts])  # (B, 2)
    reward = 30.0 * logits.softmax(-1)[:, REAL]  # (B,)
    clock("discriminator")
    parts = generator_step(players, roll, reward, clock)
    if shared:
        players.kl_now(roll, parts)
        clock("kl for the log")
    model.set_adapter(players.D)
    for rows in players.parts:
        labels = torch.tensor([REAL] * len(rows) + [1 - REAL] * len(rows), device=players.device)  # (2b,)
        verdicts = players.judge(rows, players.truths, roll.reply)  # (2b, 2)
        (discriminator_loss(verdicts, labels, "ce") * len(rows) / B).backward()  # ()
    clock("discriminator")
    update(players.d_optimizer, LR, GRAD_CLIP, players.state)
    clock("optimiser")
    if shared:
        players.kl_now(roll, parts)
        clock("kl for the log")
