"""
Measure speed and memory against generate(), plain torch and TRL.

    python -m tools.bench                                    # the demo's model on a CPU, about 6 minutes
    python -m tools.bench --only decode trl --json bench.json
    python -m tools.bench --model qwen3-8b-random            # Qwen3-8B with random weights on one GPU, no download
    python -m tools.bench --model qwen3-8b-random --quant nf4 --micro_batch 1

Flags of train.py set the model and the step; those for data, files and the length of a run have no effect.
The comparisons with TRL need: pip install trl==1.16.0 accelerate==1.15.0

What differs from the textbook:
1. Calls that are compared take turns in one process. A ratio is taken turn by turn: median (least to most).
2. Both sides have the same weights, prompts, lengths and batch, and no sequence ends early. A rollout also reads one
   forced token, the end of its thinking; that costs it time and is not counted.
3. The floor of a decode step is the time to read weights and cache once, at the speed of a large copy on this device.
4. Memory is the peak above what is allocated before the call, by CUDA's counter or a trace of torch's CPU allocator.

Letters: B sequences, P prompt tokens, R and C tokens of thinking and completion, N positions, V vocabulary, H hidden.
"""
import importlib.util
import itertools
import json
import os
import pathlib
import statistics
import tempfile
import time
from types import SimpleNamespace

import train
from flags import UserError, check_values, write_whole

SECTIONS = "decode step logps trl".split()
SHAPE = ("vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
         "tie_word_embeddings").split()
RANDOM = {"qwen3-8b-random": (151936, 4096, 12288, 36, 32, 8, 128, False),  # as in Qwen/Qwen3-8B's config.json
          "tiny-random": (400, 32, 48, 2, 2, 1, 16, True)}
SMALL = dict(model="demo", device="cpu", dtype="fp32", adapters="separate", rank=16, alpha=4.0, batch_size=16,
             prompt_tokens=64, reasoning_tokens=0, completion_tokens=128)  # defaults for models other than Qwen3-8B


def flags(words=None):
    parser = train.flags(words)
    parser.description = __doc__
    add = parser.add_argument_group("benchmark").add_argument
    add("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="sections to run")
    add("--prompt_tokens", type=int, default=350, help="tokens of each prompt")
    add("--repeats", type=int, default=5, help="turns of each comparison")
    add("--json", default=None, help="file to write the results to")
    parser.set_defaults(reasoning_tokens=256)
    parser.set_defaults(**SMALL if parser.peek("--model") != "qwen3-8b-random" else {})
    return parser


def check(args):
    check_values(args, "rank alpha batch_size prompt_tokens completion_tokens repeats".split())
    if args.batch_size % 2:
        raise UserError(f"--batch_size {args.batch_size}: must be even, as GRPO compares two samples of each prompt")
    if args.json and (os.path.isdir(args.json) or not os.access(pathlib.Path(args.json).parent, os.W_OK)):
        raise UserError(f"--json {args.json} cannot be written; name a file in a folder that can")
    args.prefix_tokens = min(args.prompt_tokens, args.completion_tokens)  # what the discriminator reads of a prompt
    return args


if __name__ == "__main__":
    args = check(flags().parse_args())

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler announces itself otherwise,
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # and warns when a tensor from before the trace is freed

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import (AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache, PreTrainedTokenizerFast, Qwen3Config,
                          Qwen3ForCausalLM)
from transformers.utils import logging

from checkpoint import first_line, provenance
from data import Window
from discriminator import Head
from model import (CHUNK_BYTES, DTYPES, Player, add_adapters, causal_lm, checked_device, load_model, micro_batches,
                   token_stats)
from reward import Baseline, generator_reward, policy_loss
from rollout import Rules, rollout, sampled_stats
from sampler import Sampler

HAS_TRL = importlib.util.find_spec("trl") is not None


# -----------------------------------------------------------------------------
# time and memory

class Clock:
    """Seconds by phase: clock(phase) adds the time since the last call."""

    def __init__(self, device):
        self.device, self.spent, self.last = device, {}, time.perf_counter()

    def __call__(self, phase):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        before, self.last = self.last, time.perf_counter()
        self.spent[phase] = self.spent.get(phase, 0.0) + self.last - before


def peak(call, device):
    """The most GiB that are allocated during a call, above what is there before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**30
    with torch.autograd.profiler.profile(profile_memory=True) as trace:
        call()
    events = [event for event in trace.kineto_results.events() if event.name() == "[memory]"]
    sizes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(sizes, initial=0)) / 2**30  # bytes that are freed count below 0


def row(what, ours, other="", ratio=""):
    print(f"{what:<44}{ours:>10}{other:>10}   {ratio}", flush=True)


def compare(calls, repeats, device, scale=1.0, unit="s"):
    """Time the calls of a dict in turn, and print the first one's seconds, times a scale, beside each other's."""
    memory = {name: peak(call, device) for name, call in calls.items()}  # also warms them up
    seconds, ratio, (ours, *others) = {name: [] for name in calls}, {}, calls
    for _ in range(repeats):
        clock = Clock(device)
        for name, call in calls.items():
            call()
            clock(name)
            seconds[name].append(clock.spent[name])
    for name in others:
        turns = [a / b for a, b in zip(seconds[ours], seconds[name])]
        ratio[name] = statistics.median(turns), min(turns), max(turns)
        row(f"{ours} / {name}, {unit}", *(f"{scale * statistics.median(seconds[key]):.4g}" for key in (ours, name)),
            "{:.2f} ({:.2f} to {:.2f})".format(*ratio[name]))
        row("    memory, GiB", *(f"{memory[key]:.3f}" for key in (ours, name)))
    return dict(seconds=seconds, ratio=ratio, memory_gib=memory)


# -----------------------------------------------------------------------------
# models, texts, a training step

def base_model(args, device):
    """The model of --model; the weights are the same at each call."""
    torch.manual_seed(0)
    if args.model not in RANDOM:
        return load_model(args.model, args.quant, args.dtype, device)[0]
    config, dtype = Qwen3Config(**dict(zip(SHAPE, RANDOM[args.model]))), DTYPES[args.dtype]
    with torch.device("cpu" if args.quant != "none" else device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if args.quant != "none":  # moves and quantises one tensor at a time, with load_model's settings
        nf4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        settings = BitsAndBytesConfig(**nf4 if args.quant == "nf4" else dict(load_in_8bit=True))
        model = Qwen3ForCausalLM.from_pretrained(None, config=config, state_dict=model.state_dict(), dtype=dtype,
                                                 quantization_config=settings, device_map={"": device})
    for module in model.modules():
        module.support_avx512bf16_for_cpu = False  # see load_model
    return model.requires_grad_(False).eval()


def numbers(vocab):
    """A tokenizer whose words are the ids: "17 4" is [17, 4]. Its end token is `vocab`, one above the model's ids.

    There is no pad token: an added token "0" would be cut out of "10".
    """
    words = Tokenizer(models.WordLevel({str(i): i for i in range(vocab + 1)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=str(vocab))


class Game:
    """Two players on one model, with random texts that never end early."""

    def __init__(self, args, device, adapters):
        self.args, B, P = args, args.batch_size, args.prompt_tokens
        self.num_positions = B * (args.reasoning_tokens + args.completion_tokens)
        self.model = add_adapters(base_model(args, device), adapters, args.rank, args.alpha)
        self.vocab = V = causal_lm(self.model).get_output_embeddings().weight.shape[0]
        self.tokenizer, self.baseline = numbers(V), Baseline(args.ema_decay, args.adv_norm)
        self.generator, self.discriminator = [Player(self.model, self.tokenizer, adapters[i]) for i in (0, -1)]
        self.generator.check_length(P + args.reasoning_tokens + 1 + args.completion_tokens)
        self.sampler, self.judge = Sampler(self.model, DTYPES[args.dtype], args.merge), Head(args, self.discriminator)
        self.generator.optimize(args.g_lr, args)
        self.discriminator.optimize(args.d_lr, args, self.judge.parameters())
        blocked = torch.zeros(2, V, dtype=torch.bool, device=device)  # (2, V)
        self.rules = Rules(*torch.tensor([[V], [1]], device=device), think_end=-1, blocked=blocked, pad=0)
        ids = torch.randint(2, V, (B, P + args.completion_tokens))  # (B, P + C)
        ids[1::2, :P] = ids[::2, :P]  # (B/2, P) prompts in pairs that are alike, as GRPO needs them
        self.prompts = ids[:, :P].tolist()  # B lists of P ids
        texts = [self.tokenizer.batch_decode(part) for part in (ids[:, P - args.prefix_tokens:P], ids[:, P:])]
        self.windows = [Window(prefix, " ", truth) for prefix, truth in zip(*texts)]

    def sample(self, sampler):
        args, keys = self.args, [(0, i) for i in range(self.args.batch_size)]
        sampler.sync(self.generator.adapter)
        roll = rollout(sampler, self.prompts, self.rules, args.reasoning_tokens, args.completion_tokens, 1.0, keys)
        assert roll.sampled.sum() == self.num_positions, "a sequence has ended early"
        return roll

    def step(self, clock, reward=None):
        """train.py's step; clock(phase) ends a phase. Where a reward (B,) is given, there is no discriminator."""
        args, judged = self.args, None
        roll = self.sample(self.sampler)
        texts = self.tokenizer.batch_decode(roll.reply)
        clock("sample")
        if reward is None:
            self.discriminator.activate()
            judged = self.judge.score(self.windows, texts, 0)
            reward = generator_reward(judged, 1.0, args.g_reward, args.d_scale)  # (B,)
            clock("judge")
        self.generator.activate()
        advantage = self.baseline.advantages(reward, torch.ones_like(reward, dtype=torch.bool))  # (B,)
        backbone = causal_lm(self.model).base_model  # its pass without gradient is the reference's
        with backbone.register_forward_hook(lambda *_: clock("generator" if torch.is_grad_enabled() else "reference")):
            for rows in micro_batches(range(args.batch_size), args.micro_batch):
                stats = sampled_stats(self.model, roll, rows, self.rules, 1.0, args.kl_coef > 0)  # (N,) each
                weights = advantage[rows].repeat_interleave(roll.sampled[rows].sum(1))  # (N,)
                loss = policy_loss(stats.logp, stats.kl, weights, args.kl_coef, self.num_positions)  # ()
                self.generator.backward(loss)
                clock("generator")
        self.generator.step(1.0)
        clock("optimizer")
        if judged:
            self.discriminator.activate()
            for rows in micro_batches(judged.shown, args.micro_batch):
                self.discriminator.backward(self.judge.loss(judged, rows)[0])
            clock("discriminator")
            self.discriminator.step(1.0)
            clock("optimizer")


# -----------------------------------------------------------------------------
# the sections

def decode(args, device):
    """A rollout and generate() with the same adapter; the adapter merged and beside its layers; the floor."""
    game, tokens = Game(args, device, ["generator"]), args.reasoning_tokens + args.completion_tokens
    ids = torch.tensor(game.prompts, device=device)  # (B, P)

    def generate():
        new = game.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=tokens, eos_token_id=game.vocab, pad_token_id=0)[:, args.prompt_tokens:]  # (B, R + C)
        assert new.numel() == game.num_positions, "a sequence has ended early"

    calls = {"rollout": lambda: game.sample(game.sampler), "generate()": generate}
    if args.merge and args.quant == "none":
        beside = Sampler(game.model, DTYPES[args.dtype], merge=False)
        calls["rollout, adapter beside"] = lambda: game.sample(beside)
    found = compare(calls, args.repeats, device, 1e3 / tokens, "ms per token")

    base, cache, source = causal_lm(game.sampler.model), DynamicCache(), torch.ones(1 << 27, device=device)  # 512 MiB
    base(ids[:, :1], past_key_values=cache, use_cache=True)
    table, head = base.get_input_embeddings().weight, base.get_output_embeddings().weight  # (V, H) each
    floor = sum(p.nbytes for p in base.parameters() if p is head or p is not table)  # of the table B rows are read
    floor += (args.prompt_tokens + tokens / 2) * sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)
    target = source.clone()
    copies = compare({"copy": lambda: target.copy_(source)}, 5, device)["seconds"]["copy"]
    ms = 1e3 * floor * min(copies) / (2 * source.nbytes)
    row("    floor, ms per token", f"{ms:.4g}")
    return found | dict(floor_ms=ms, copy_gb_per_second=2e-9 * source.nbytes / min(copies))


def step(args, device):
    """A training step by phase."""
    game, turns = Game(args, device, ["shared"] if args.adapters == "shared" else ["generator", "discriminator"]), []

    def whole():
        turns.append(Clock(device))
        game.step(turns[-1])

    whole()  # makes the optimizers' states
    found = compare({"step": whole}, args.repeats, device)
    phases = {phase: statistics.median(clock.spent[phase] for clock in turns[2:]) for phase in turns[0].spent}
    for phase, seconds in phases.items():
        row(f"{phase}, s", f"{seconds:.3f}", f"{seconds / sum(phases.values()):.0%}")
    row("whole step, s", f"{statistics.median(found['seconds']['step']):.3f}")
    row("    memory, GiB", f"{found['memory_gib']['step']:.3f}")
    return found | dict(phases=phases)


def log_probs(head, ids):
    """Ways from hidden states (N, H) to log-probs (N,) of ids (1, N + 1) but the first: a dict of functions."""
    V, targets = len(head.weight), ids[0, 1:]  # (N,)

    def ours(hidden):
        states = SimpleNamespace(last_hidden_state=F.pad(hidden, (0, 0, 0, 1))[None])  # (1, N + 1, H)
        model = SimpleNamespace(base_model=lambda **_: states, get_output_embeddings=lambda: head)
        return token_stats(model, ids, torch.ones_like(ids, dtype=torch.bool).index_fill(1, ids.new_zeros(1), False)).logp

    ways = {"ours": ours, "plain torch": lambda hidden: head(hidden).float().log_softmax(-1)[range(len(targets)), targets]}
    if hasattr(F, "linear_cross_entropy"):  # since torch 2.13; with 8 rows, its choice at Qwen3's V, 6 times slower
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=max(16, CHUNK_BYTES // (4 * V)), chunking_method=None)
        ways["F.linear_cross_entropy"] = lambda hidden: -F.linear_cross_entropy(
            hidden, head.weight, targets, reduction="none", options=options)  # (N,)
    if HAS_TRL:
        from trl.kernels import ChunkedLogProbFunction
        ways["TRL's chunked"] = lambda hidden: ChunkedLogProbFunction.apply(  # as GRPOTrainer calls it
            hidden, head.weight, None, targets, 1.0, 32768, None, 1.0, ("log_probs", "entropy"))[0]  # (N,)
    return ways


def logps(args, device, N=2048, V=151936):
    """Log-probs with gradient, at Qwen3's vocabulary."""
    H = 4096 if args.model == "qwen3-8b-random" else 1024
    head = torch.nn.Linear(H, V, bias=False, device=device, dtype=DTYPES[args.dtype]).requires_grad_(False)
    hidden = torch.randn(N, H, device=device, dtype=head.weight.dtype, requires_grad=True)  # (N, H)
    ways, weights = log_probs(head, torch.randint(V, (1, N + 1), device=device)), torch.randn(N, device=device)  # (N,)
    calls = {name: lambda way=way: (way(hidden) * weights).sum().backward() for name, way in ways.items()}
    return compare(calls, min(args.repeats, 3), device)


def trl(args, device):
    """A training step and GRPOTrainer's: rewards of 0 and 1 in place of a discriminator, KL on, one update a batch."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    game, reward = Game(args, device, ["generator"]), torch.arange(args.batch_size, device=device) % 2.0  # (B,)
    texts = game.tokenizer.batch_decode(game.prompts)

    def pay(prompts, completion_ids, **_):
        assert prompts == texts and sum(map(len, completion_ids)) == game.num_positions, "TRL does other work"
        return reward.tolist()

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            folder, per_device_train_batch_size=args.batch_size, num_generations=2, beta=args.kl_coef, temperature=1.0,
            max_completion_length=args.reasoning_tokens + args.completion_tokens, top_p=1.0, top_k=0,
            learning_rate=args.g_lr, use_cpu=device.type == "cpu", bf16=args.dtype == "bf16", shuffle_dataset=False,
            activation_checkpointing=False, report_to="none")
        trainer = GRPOTrainer(base_model(args, device), pay, config, Dataset.from_dict({"prompt": texts[::2]}),
                              processing_class=game.tokenizer, peft_config=game.model.peft_config["generator"])
    model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.create_optimizer())
    batch, trainer.current_gradient_accumulation_steps = next(iter(trainer.get_train_dataloader())), 1

    def theirs():
        trainer.training_step(model, batch, None)
        trainer.accelerator.clip_grad_norm_(model.parameters(), args.grad_clip)
        optimizer.step()
        model.zero_grad()

    theirs()  # makes the optimizer's state
    return compare({"ours": lambda: game.step(Clock(device), reward), "GRPOTrainer": theirs}, args.repeats, device)


if __name__ == "__main__":
    logging.set_verbosity_error()
    device = checked_device(args.device)
    report = {**provenance(device), "args": vars(args)}
    print(f"{args.model}, {args.dtype if args.quant == 'none' else args.quant}, on {report['device']}")
    for section in [decode, step, logps, trl]:
        if section.__name__ not in args.only:
            continue
        print(f"\n{section.__name__}: {section.__doc__}")
        if section is trl and not HAS_TRL:
            print("left out, TRL is not installed: pip install trl==1.16.0 accelerate==1.15.0")
            continue
        try:
            report[section.__name__] = section(args, device)
        except torch.OutOfMemoryError as error:  # the other sections may fit
            print(f"left out, out of memory: {first_line(error)}")
    if args.json:
        write_whole(pathlib.Path(args.json), json.dumps(report, indent=2) + "\n")
