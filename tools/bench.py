"""
Measure speed and memory against the alternatives: generate(), plain torch, TRL.

    python -m tools.bench                                    # the demo's model on a CPU, about 6 minutes
    python -m tools.bench --only decode,step --json bench.json
    python -m tools.bench --model qwen3-8b-random            # random weights in Qwen3-8B's shape, one GPU, no download
    python -m tools.bench --model qwen3-8b-random --quant nf4 --micro_batch 1

The rows that compare with TRL need: pip install trl==1.16.0 accelerate==1.15.0

What differs from the textbook:
1. Calls that are compared take turns in one process. A ratio is taken turn by turn: median (least to most).
2. Both sides have the same weights, adapters, prompts, lengths and batch, and no sequence ends early. A rollout also
   reads one forced token, the end of its thinking; that costs it time and is not counted.
3. The floor of a decode step is the time to read weights and cache once, at the speed of a large copy on this device.
4. Memory is the peak above what is allocated before the call, by CUDA's counter or a trace of torch's CPU allocator.

Letters: B sequences, P prompt tokens, R and C tokens of thinking and completion, N positions, V vocabulary, H hidden.
"""
import contextlib
import gc
import importlib.util
import itertools
import json
import os
import pathlib
import statistics
import tempfile
import time
from argparse import Namespace
from types import SimpleNamespace

import train
from flags import Parser, UserError, check_values, write_whole

SECTIONS = "decode step logps trl".split()
HAS_TRL = importlib.util.find_spec("trl") is not None
TRAIN_FLAGS = ("model quant dtype device adapters rank alpha merge optim batch_size micro_batch reasoning_tokens "
               "completion_tokens kl_coef g_reward d_loss d_pool").split()  # flags of train.py that work here
RANDOM = {"qwen3-8b-random": (151936, 4096, 12288, 36, 32, 8, 128, False),  # as in Qwen/Qwen3-8B's config.json
          "tiny-random": (400, 32, 48, 2, 2, 1, 16, True)}
SMALL = dict(model="demo", device="cpu", dtype="fp32", adapters="separate", rank=16, alpha=4.0, batch_size=16,
             prompt_tokens=64, reasoning_tokens=0, completion_tokens=128, hidden=1024)
LARGE = dict(reasoning_tokens=256)  # defaults for qwen3-8b-random, with those of train.py; SMALL is for other models


def flags(words=None):
    parser = Parser(__doc__, words)
    for action in train.flags([])._actions:
        if action.dest in TRAIN_FLAGS:
            parser._add_action(action)
    add = parser.add_argument
    add("--prompt_tokens", type=int, default=350, help="tokens of each prompt")
    add("--only", default=",".join(SECTIONS), help="sections to run")
    add("--repeats", type=int, default=5, help="turns of a comparison; logps takes at most 3")
    add("--positions", type=int, default=2048, help="positions in logps")
    add("--vocab", type=int, default=151936, help="vocabulary in logps")
    add("--hidden", type=int, default=4096, help="hidden size in logps")
    add("--json", default=None, help="file to write all results to")
    parser.set_defaults(**LARGE if parser.peek("--model") == "qwen3-8b-random" else SMALL)
    return parser


def check(args):
    """Refuse values that cannot be measured. Returns the flags, with train.py's defaults for the rest of a step."""
    args = Namespace(**vars(train.flags([]).parse_args([])) | vars(args))
    args.prefix_tokens = min(args.prompt_tokens, args.completion_tokens)  # what the discriminator reads of a prompt
    check_values(args, "rank alpha batch_size prompt_tokens completion_tokens positions vocab hidden repeats".split())
    if not set(args.only.split(",")) <= set(SECTIONS):
        raise UserError(f"--only {args.only}: the sections are {','.join(SECTIONS)}")
    if "trl" in args.only and args.batch_size % 2:
        raise UserError(f"--batch_size {args.batch_size}: GRPO compares two samples of a prompt; give an even number, "
                        "or leave trl out of --only")
    if args.json and (os.path.isdir(args.json) or not os.access(pathlib.Path(args.json).parent, os.W_OK)):
        raise UserError(f"--json {args.json} cannot be written; name a file in a folder that can")
    return args


if __name__ == "__main__":
    args = check(flags().parse_args())

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler announces itself otherwise,
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # and warns when a tensor from before the trace is freed

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast, Qwen3Config
from transformers.utils import logging

from checkpoint import first_line, provenance
from data import Window
from discriminator import Head
from model import (CHUNK_BYTES, DTYPES, Player, add_adapters, causal_lm, checked_device, load_model, memory_gb,
                   micro_batches, token_stats)
from reward import Baseline, generator_reward, policy_loss
from rollout import Rules, rollout, sampled_stats
from sampler import Sampler


# -----------------------------------------------------------------------------
# time and memory

class Clock:
    """Seconds by phase: clock(phase) adds the time since the last call to the phase."""

    def __init__(self, device):
        self.device, self.spent, self.last = device, {}, time.perf_counter()

    def __call__(self, phase):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        before, self.last = self.last, time.perf_counter()
        self.spent[phase] = self.spent.get(phase, 0.0) + self.last - before


@contextlib.contextmanager
def peak(into, name, device):
    """Store in into[name] the most GiB that are allocated inside, above what is there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield
        most = torch.cuda.max_memory_allocated(device) - before
    else:
        with torch.autograd.profiler.profile(profile_memory=True) as trace:
            yield
        events = [event for event in trace.kineto_results.events() if event.name() == "[memory]"]
        sizes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
        most = max(itertools.accumulate(sizes, initial=0))  # bytes that are freed count below 0
    into[name] = most / 2**30


def compare(calls, repeats, device):
    """Run each call of a dict once for its memory, which also warms it up, then all in turn for their seconds.

    A ratio is (median, least, most) of the first call's seconds over another's, turn by turn.
    """
    memory, seconds = {}, {name: [] for name in calls}
    for name, call in calls.items():
        with peak(memory, name, device):
            call()
    for _ in range(repeats):
        clock = Clock(device)
        for name, call in calls.items():
            call()
            clock(name)
            seconds[name].append(clock.spent[name])
    ours, *others = calls
    turns = {name: [a / b for a, b in zip(seconds[ours], seconds[name])] for name in others}
    ratio = {name: (statistics.median(x), min(x), max(x)) for name, x in turns.items()}
    return dict(seconds=seconds, memory_gib=memory, ratio=ratio)


def row(what, ours="", other="", ratio=""):
    print(f"{what:<44}{ours:>10}{other:>10}   " + (ratio and "{:.2f} ({:.2f} to {:.2f})".format(*ratio)), flush=True)


def show(found, scale=1.0, unit="s"):
    """Print a comparison: seconds, times a scale, and memory."""
    ours, *others = found["seconds"]
    middle = {name: statistics.median(times) * scale for name, times in found["seconds"].items()}
    for name in others:
        row(f"{unit}, {ours} and {name}", f"{middle[ours]:.4g}", f"{middle[name]:.4g}", found["ratio"][name])
        row("  memory, GiB", *(f"{found['memory_gib'][key]:.3f}" for key in (ours, name)))
    return found


# -----------------------------------------------------------------------------
# models, texts, a training step

def base_model(args, device):
    """The model of --model; its weights are the same at each call."""
    torch.manual_seed(0)
    if args.model not in RANDOM:
        return load_model(args.model, args.quant, args.dtype, device)[0]
    V, H, inner, layers, heads, kv_heads, head_dim, tied = RANDOM[args.model]
    config = Qwen3Config(
        vocab_size=V, hidden_size=H, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=head_dim, tie_word_embeddings=tied, max_position_embeddings=40960)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[args.dtype])
    for part in [part for layer in model.base_model.layers for part in layer.modules() if args.quant != "none"]:
        for name, linear in part.named_children():
            if type(linear) is torch.nn.Linear:
                setattr(part, name, quantised(linear, args.quant, DTYPES[args.dtype]).to(device))
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = args.quant == "nf4", args.quant == "int8"  # peft reads these
    return model.requires_grad_(False).eval()


def quantised(linear, quant, dtype):
    """bitsandbytes' layer in place of torch's, with load_model's settings; moving it to a device quantises it."""
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
    sizes, weight = (linear.in_features, linear.out_features), linear.weight.data.cpu()  # (out, in)
    if quant == "nf4":
        layer = Linear4bit(*sizes, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
        layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer)
        layer.support_avx512bf16_for_cpu = False  # see load_model
    else:
        layer = Linear8bitLt(*sizes, bias=False, has_fp16_weights=False, threshold=6.0, device="meta")
        layer.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    return layer


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
        self.tokenizer, one = numbers(V), torch.tensor([1], device=device)  # (1,)
        self.generator, self.discriminator = [Player(self.model, self.tokenizer, adapters[i]) for i in (0, -1)]
        self.generator.check_length(P + args.reasoning_tokens + 1 + args.completion_tokens)
        self.sampler, self.judge = Sampler(self.model, DTYPES[args.dtype], args.merge), Head(args, self.discriminator)
        self.generator.optimize(args.g_lr, args)
        self.discriminator.optimize(args.d_lr, args, self.judge.parameters())
        self.baseline = Baseline(args.ema_decay, args.adv_norm)
        blocked = torch.zeros(2, V, dtype=torch.bool, device=device)  # (2, V)
        self.rules = Rules(stop=one * V, close=one, think_end=-1, blocked=blocked, pad=0)
        ids = torch.randint(2, V, (B, P + args.completion_tokens))  # (B, P + C)
        ids[1::2, :P] = ids[:B // 2 * 2:2, :P]  # (B/2, P) prompts in pairs that are alike, as GRPO needs them
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
        """train.py's loop; clock(phase) ends a phase. With a reward (B,) there is no discriminator."""
        args, B, judged = self.args, self.args.batch_size, None
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
            for rows in micro_batches(range(B), args.micro_batch):
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
    """A rollout against generate() with the same adapter, merged against beside, and the floor."""
    game, tokens = Game(args, device, ["generator"]), args.reasoning_tokens + args.completion_tokens
    ids = torch.tensor(game.prompts, device=device)  # (B, P)

    def generate():
        whole = game.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=tokens, eos_token_id=game.vocab, pad_token_id=0)  # (B, P + R + C)
        assert whole.shape[1] == args.prompt_tokens + tokens

    calls = {"rollout": lambda: game.sample(game.sampler), "generate()": generate}
    if args.merge and args.quant == "none":
        beside = Sampler(game.model, DTYPES[args.dtype], merge=False)
        calls["rollout, adapter beside"] = lambda: game.sample(beside)
    found = show(compare(calls, args.repeats, device), 1e3 / tokens, "ms/token")

    base, cache, source = causal_lm(game.model), DynamicCache(), torch.ones(1 << 27, device=device)  # 512 MiB
    base(ids[:, :1], past_key_values=cache, use_cache=True)
    table, head = base.get_input_embeddings().weight, base.get_output_embeddings().weight  # (V, H) each
    num_bytes = sum(p.nbytes for key, p in base.named_parameters() if "lora_" not in key and (p is head or p is not table))
    num_bytes += sum(x.keys.nbytes + x.values.nbytes for x in cache.layers) * (args.prompt_tokens + tokens / 2)
    target, clock = source.clone(), Clock(device)
    times = compare({"copy": lambda: target.copy_(source)}, 5, device)["seconds"]["copy"]
    found |= dict(bytes=num_bytes, copy_gb_per_second=2e-9 * source.nbytes / min(times))
    found["floor_ms"] = 1e-6 * num_bytes / found["copy_gb_per_second"]
    row(f"ms/token, floor at {found['copy_gb_per_second']:.0f} GB/s", f"{found['floor_ms']:.4g}")
    return found


def step(args, device):
    """A training step by phase."""
    game = Game(args, device, ["shared"] if args.adapters == "shared" else ["generator", "discriminator"])
    memory, turns = {}, []
    for turn in range(-1, args.repeats):  # the first makes the optimizers' states
        turns.append(Clock(device))
        game.step(turns[-1])
    with peak(memory, "step", device):
        game.step(Clock(device))
    times = [clock.spent for clock in turns[1:]]
    phases = {phase: statistics.median(spent[phase] for spent in times) for phase in times[0]}
    total = [sum(spent.values()) for spent in times]
    for phase, seconds in phases.items():
        row(f"{phase}, s", f"{seconds:.3f}", f"{seconds / sum(phases.values()):.0%}")
    row("whole step, s", f"{statistics.median(total):.3f}", "", "")
    row("memory above weights and states, GiB", f"{memory['step']:.3f}")
    return dict(phases=phases, seconds=total, memory_gib=memory["step"], total_memory_gb=memory_gb(device))


def logps(args, device):
    """Log-probs and their gradient: token_stats against plain torch, torch's fused loss and TRL."""
    N, V, H = args.positions, args.vocab, args.hidden
    random = torch.Generator(device).manual_seed(0)
    head = torch.nn.Linear(H, V, bias=False, device=device, dtype=DTYPES[args.dtype]).requires_grad_(False)
    states = torch.randn(N, H, device=device, generator=random).to(head.weight.dtype)  # (N, H)
    ids = torch.randint(V, (1, N + 1), device=device, generator=random)  # (1, N + 1)
    weights, targets, found = torch.randn(N, device=device, generator=random), ids[0, 1:], {}  # (N,) each

    def ours(hidden):
        backbone = SimpleNamespace(last_hidden_state=F.pad(hidden, (0, 0, 0, 1))[None])  # (1, N + 1, H)
        model = SimpleNamespace(base_model=lambda **_: backbone, get_output_embeddings=lambda: head)
        return token_stats(model, ids, torch.arange(N + 1, device=device)[None] > 0).logp  # (N,)

    def plain(hidden):
        return head(hidden).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]  # (N,)

    ways = {"ours": ours, "plain torch": plain}
    if hasattr(F, "linear_cross_entropy"):  # since torch 2.13; of its choice, 8 rows at Qwen3's V, it is 6 times slower
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=max(16, CHUNK_BYTES // (4 * V)), chunking_method=None)
        ways["F.linear_cross_entropy"] = lambda hidden: -F.linear_cross_entropy(
            hidden, head.weight, targets, reduction="none", options=options)  # (N,)
    if HAS_TRL:
        from trl.kernels import ChunkedLogProbFunction
        ways["TRL's chunked"] = lambda hidden: ChunkedLogProbFunction.apply(
            hidden, head.weight, None, targets, 1.0, 32768, None, 1.0, ("log_probs", "entropy"))[0]  # (N,)

    def call(name):
        hidden = states.clone().requires_grad_()  # (N, H)
        logp = ways[name](hidden)  # (N,)
        (logp * weights).sum().backward()
        found[name] = logp.detach().float(), hidden.grad.float()  # (N,), (N, H)

    result = show(compare({name: lambda name=name: call(name) for name in ways}, min(args.repeats, 3), device))
    result["gradient_error"] = {name: ((grad - found["plain torch"][1]).norm() / found["plain torch"][1].norm()).item() for name, (_, grad) in found.items()}
    row("distance of our gradient from plain torch's", f"{result['gradient_error']['ours']:.0e}")
    return result


def trl(args, device):
    """A training step without discriminator against GRPOTrainer's: rewards of 0 and 1, KL on, one update a batch."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    game = Game(args, device, ["generator"])
    reward = torch.arange(args.batch_size, device=device) % 2.0  # (B,)

    def pay(prompts, completion_ids, **rest):
        assert game.tokenizer(prompts).input_ids == game.prompts and sum(map(len, completion_ids)) == game.num_positions
        return reward.tolist()

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            folder, per_device_train_batch_size=args.batch_size, num_generations=2, beta=args.kl_coef, temperature=1.0,
            max_completion_length=args.reasoning_tokens + args.completion_tokens, top_p=1.0, top_k=0,
            learning_rate=args.g_lr, max_grad_norm=args.grad_clip, use_cpu=device.type == "cpu",
            bf16=args.dtype == "bf16", fp16=args.dtype == "fp16", shuffle_dataset=False, activation_checkpointing=False,
            report_to="none")
        trainer = GRPOTrainer(
            base_model(args, device), pay, config, Dataset.from_dict({"prompt": game.tokenizer.batch_decode(game.prompts[::2])}),
            processing_class=game.tokenizer, peft_config=game.model.peft_config["generator"])
    model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.create_optimizer())
    batch, trainer.current_gradient_accumulation_steps = next(iter(trainer.get_train_dataloader())), 1

    def theirs():
        trainer.training_step(model, batch, None)
        trainer.accelerator.clip_grad_norm_(model.parameters(), args.grad_clip)
        optimizer.step()
        model.zero_grad()

    def ours():
        game.step(Clock(device), reward)

    ours(), theirs()  # make the optimizers' states
    return show(compare({"ours": ours, "GRPOTrainer": theirs}, args.repeats, device))


if __name__ == "__main__":
    logging.set_verbosity_error()
    device, report = checked_device(args.device), {}
    report = {**provenance(device), "args": vars(args), "trl": None}
    print(f"{args.model}, {args.quant if args.quant != 'none' else args.dtype}, on {report['device']}")
    for section in args.only.split(","):
        if section == "trl" and not HAS_TRL:
            print("\ntrl: left out, TRL is not installed; pip install trl==1.16.0 accelerate==1.15.0")
            continue
        print(f"\n{section}: {SECTIONS[section].__doc__}")
        try:
            report[section] = SECTIONS[section](args, device)
        except torch.OutOfMemoryError as error:  # the other sections may fit
            print(f"left out: {first_line(error)}")
        gc.collect()  # a trainer is a cycle of references with a model in it
    if args.json:
        write_whole(pathlib.Path(args.json), json.dumps(report, indent=2) + "\n")
