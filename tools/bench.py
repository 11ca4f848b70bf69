"""
Measure speed and memory against generate(), plain torch and TRL.

    python -m tools.bench                                # the demo's model on a CPU, about 6 minutes
    python -m tools.bench --only decode trl --json bench.json
    python -m tools.bench --model qwen3-8b-random        # Qwen3-8B with random weights on one GPU, no download
    python -m tools.bench --model qwen3-8b-random --quant nf4 --micro_batch 1

The flags of train.py for models, losses and optimizers work here too. Rows with TRL need:
pip install trl==1.16.0 accelerate==1.15.0

What differs from the textbook:
1. Calls that are compared take turns in one process. A ratio is taken turn by turn: median (least to most).
2. All have the same weights, prompts, lengths and batch, and no sequence ends early. A rollout also reads one forced
   token, the end of its thinking; that costs it time and is not counted.
3. Memory is the peak above what is allocated before the call, by CUDA's counter or a trace of torch's CPU allocator.

Letters: B sequences, P prompt tokens, R and C tokens of thinking and completion, N positions, V vocabulary, H hidden.
"""
import importlib.metadata
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
RANDOM = {"qwen3-8b-random": (151936, 4096, 12288, 36, 32, 8, 128, False),  # Qwen/Qwen3-8B's config.json
          "tiny-random": (400, 32, 48, 2, 2, 1, 16, True)}
SMALL = dict(model="demo", device="cpu", dtype="fp32", adapters="separate", rank=16, alpha=4.0, batch_size=16,
             prompt_tokens=64, reasoning_tokens=0, completion_tokens=128)  # defaults for all but Qwen3-8B


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
    check_values(args, "rank alpha batch_size prompt_tokens completion_tokens temperature repeats".split())
    if args.batch_size % 2:
        raise UserError(f"--batch_size {args.batch_size}: must be even, as GRPO compares two samples of each prompt")
    if args.json and (os.path.isdir(args.json) or not os.access(pathlib.Path(args.json).parent, os.W_OK)):
        raise UserError(f"--json {args.json} cannot be written; name a file in a folder that can")
    args.merge = args.dtype == "fp32" if args.merge is None else args.merge
    args.prefix_tokens = min(args.prompt_tokens, args.completion_tokens)  # what the discriminator reads of a prompt
    return args


if __name__ == "__main__":
    args = check(flags().parse_args())

os.environ.update(KINETO_LOG_LEVEL="6", TORCH_CPP_LOG_LEVEL="ERROR")  # torch's profiler is chatty otherwise

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import (AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache, PreTrainedTokenizerFast, Qwen3Config,
                          Qwen3ForCausalLM)
from transformers.utils import logging

from checkpoint import explain_failures, provenance
from data import Window
from discriminator import Head
from model import (CHUNK_BYTES, DTYPES, Player, add_adapters, backbone, causal_lm, checked_device, checkpoint_layers,
                   load_model, micro_batches, positions, token_stats)
from reward import Baseline, generator_reward, policy_loss
from rollout import Rules, rollout, sampled_stats
from sampler import Sampler

HAS_TRL = importlib.util.find_spec("trl") is not None


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


def compare(calls, repeats, device, scale=1.0, unit="s"):
    """Run the calls of a dict in turn and print, for each, seconds times a scale, memory, and the first one's ratio."""
    memory = {name: peak(call, device) for name, call in calls.items()}  # also warms them up
    turns, seconds, ratio, (ours, *_) = [], {}, {}, calls
    for _ in range(repeats):
        clock = Clock(device)
        for name, call in calls.items():
            call()
            clock(name)
        turns.append(clock.spent)
    for name in calls:
        seconds[name], ratios = [turn[name] for turn in turns], [turn[ours] / turn[name] for turn in turns]
        ratio[name] = statistics.median(ratios), min(ratios), max(ratios)
        print(f"{name:<24}{scale * statistics.median(seconds[name]):>10.4g} {unit:<12}{memory[name]:>8.3f} GiB    "
              "ours / this {:.2f} ({:.2f} to {:.2f})".format(*ratio[name]), flush=True)
    return dict(seconds=seconds, memory_gib=memory, ratio=ratio)


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


class Game:
    """Two players on one model, with random texts that never end early."""

    def __init__(self, args, device, adapters):
        self.args, B, P = args, args.batch_size, args.prompt_tokens
        self.num_positions = B * (args.reasoning_tokens + args.completion_tokens)
        self.model = add_adapters(base_model(args, device), adapters, args.rank, args.alpha)
        V = causal_lm(self.model).get_output_embeddings().weight.shape[0]
        if args.grad_ckpt:
            checkpoint_layers(self.model)

        # the tokenizer's words are the ids: "17 4" is [17, 4]. Its end token is V, one above the model's ids. It has no
        # pad token: a special token "0" would be cut out of "10"
        words = Tokenizer(models.WordLevel({str(i): i for i in range(V + 1)}, unk_token="0"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=str(V))
        blocked = torch.zeros(2, V, dtype=torch.bool, device=device)  # (2, V)
        self.rules = Rules(*torch.tensor([[V], [1]], device=device), think_end=-1, blocked=blocked, pad=0)
        ids = torch.randint(2, V, (B, P + args.completion_tokens))  # (B, P + C)
        ids[1::2, :P] = ids[::2, :P]  # (B/2, P) prompts in pairs that are alike, as GRPO needs them
        self.prompts = ids[:, :P].tolist()  # B lists of P ids
        texts = [self.tokenizer.batch_decode(part) for part in (ids[:, P - args.prefix_tokens:P], ids[:, P:])]
        self.windows = [Window(prefix, " ", truth) for prefix, truth in zip(*texts)]

        self.generator, self.discriminator = [Player(self.model, self.tokenizer, adapters[i]) for i in (0, -1)]
        needed, room = P + args.reasoning_tokens + 1 + args.completion_tokens, positions(self.model)
        if needed > room:
            raise UserError(f"--model {args.model} has {room} positions, and a sequence takes {needed}; lower "
                            "--prompt_tokens, --reasoning_tokens or --completion_tokens")
        self.sampler, self.judge = Sampler(self.model, args.merge), Head(args, self.discriminator)
        self.generator.optimize(args.g_lr, args)
        self.discriminator.optimize(args.d_lr, args, self.judge.parameters())
        self.baseline = Baseline(args.ema_decay, args.adv_norm)

    def sample(self, sampler):
        args = self.args
        sampler.sync(self.generator.adapter)
        roll = rollout(sampler, self.prompts, self.rules, args.reasoning_tokens, args.completion_tokens,
                       args.temperature, [(0, i) for i in range(args.batch_size)])
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
        decoder = backbone(self.model)  # its pass without gradient is the reference's
        with decoder.register_forward_hook(lambda *_: clock("generator" if torch.is_grad_enabled() else "reference")):
            for rows in micro_batches(range(args.batch_size), args.micro_batch):
                stats = sampled_stats(self.model, roll, rows, self.rules, args.temperature, args.kl_coef > 0)  # (N,)
                weights = advantage[rows].repeat_interleave(roll.sampled[rows].sum(1))  # (N,)
                loss = policy_loss(stats.logp, stats.kl, weights, args.kl_coef, self.num_positions)  # ()
                self.generator.backward(loss)
                clock("generator")
        self.generator.step(1.0)
        clock("generator")
        if judged:
            self.discriminator.activate()
            for rows in micro_batches(judged.shown, args.micro_batch):
                self.discriminator.backward(self.judge.loss(judged, rows)[0])
            self.discriminator.step(1.0)
            clock("discriminator")


# -----------------------------------------------------------------------------
# the sections

def decode(args, device):
    """a rollout, generate() with the same adapter, the floor: copies of as many bytes as weights and cache have"""
    P, tokens = args.prompt_tokens, args.reasoning_tokens + args.completion_tokens
    game = Game(args, device, ["generator"])
    base, cache, V = causal_lm(game.sampler.model), DynamicCache(), game.rules.blocked.shape[1]
    ids = torch.tensor(game.prompts, device=device)  # (B, P)

    def generate():
        new = game.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0,
            temperature=args.temperature, max_new_tokens=tokens, eos_token_id=V, pad_token_id=0)[:, P:]  # (B, R + C)
        assert new.numel() == game.num_positions, "a sequence has ended early"

    base(ids[:, :1], past_key_values=cache, use_cache=True)
    table, head = base.get_input_embeddings().weight, base.get_output_embeddings().weight  # (V, H) each
    num_bytes = sum(p.nbytes for p in base.parameters() if p is head or p is not table)  # few rows of table are read
    num_bytes += (P + tokens / 2) * sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)
    source = torch.zeros(int(num_bytes / 2), dtype=torch.uint8, device=device)  # a copy reads it and writes as much
    target = torch.zeros_like(source)

    calls = {"rollout": lambda: game.sample(game.sampler), "generate()": generate,
             "floor": lambda: [target.copy_(source) for _ in range(tokens)]}
    if args.quant == "none":
        other = Sampler(game.model, merge=not args.merge)
        calls["rollout, not merged" if args.merge else "rollout, merged"] = lambda: game.sample(other)
    return compare(calls, args.repeats, device, 1e3 / tokens, "ms a token")


def step(args, device):
    """a whole training step, then its phases"""
    game, turns = Game(args, device, ["shared"] if args.adapters == "shared" else ["generator", "discriminator"]), []

    def whole():
        turns.append(Clock(device))
        game.step(turns[-1])

    whole()  # makes the optimizers' states
    found = compare({"whole step": whole}, args.repeats, device)
    phases = {phase: statistics.median(clock.spent[phase] for clock in turns[2:]) for phase in turns[0].spent}
    for phase, seconds in phases.items():
        print(f"  {phase:<22}{seconds:>10.4g} s {seconds / sum(phases.values()):>14.0%}")
    return found | dict(phases=phases)


def log_probs(head, ids):
    """Functions from hidden states (N, H) to log-probs (N,) of the ids (1, N + 1) that follow the first."""
    targets, mask = ids[0, 1:], torch.arange(ids.shape[1], device=ids.device)[None] > 0  # (N,), (1, N + 1)

    def ours(hidden):
        states = SimpleNamespace(last_hidden_state=F.pad(hidden, (0, 0, 0, 1))[None])  # (1, N + 1, H)
        model = SimpleNamespace(get_decoder=str, base_model=lambda **_: states, get_output_embeddings=lambda: head)
        return token_stats(model, ids, mask).logp  # (N,)

    def plain(hidden):
        return head(hidden).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]  # (N,)

    ways = {"ours": ours, "plain torch": plain}
    if hasattr(F, "linear_cross_entropy"):  # since torch 2.13; its default, 8 rows at Qwen3's V, is 6 times slower
        options = torch.nn.LinearCrossEntropyOptions(
            batch_chunk_size=max(16, CHUNK_BYTES // (4 * len(head.weight))), chunking_method=None)
        ways["F.linear_cross_entropy"] = lambda hidden: -F.linear_cross_entropy(
            hidden, head.weight, targets, reduction="none", options=options)  # (N,)
    if HAS_TRL:
        from trl.kernels import ChunkedLogProbFunction
        ways["TRL's chunked"] = lambda hidden: ChunkedLogProbFunction.apply(  # GRPOTrainer's own call
            hidden, head.weight, None, targets, 1.0, 32768, None, 1.0, ("log_probs", "entropy"))[0]  # (N,)
    return ways


def logps(args, device, N=2048, V=151936):
    """log-probs and their gradient, 2,048 positions, Qwen3's vocabulary"""
    H = 4096 if args.model == "qwen3-8b-random" else 1024
    head = torch.nn.Linear(H, V, bias=False, device=device, dtype=DTYPES[args.dtype]).requires_grad_(False)
    hidden = torch.randn(N, H, device=device, dtype=head.weight.dtype, requires_grad=True)  # (N, H)
    ids, weights = torch.randint(V, (1, N + 1), device=device), torch.randn(N, device=device)  # (1, N + 1), (N,)
    ways = log_probs(head, ids).items()
    calls = {name: lambda way=way: (way(hidden) * weights).sum().backward() for name, way in ways}
    return compare(calls, min(args.repeats, 3), device)


def trl(args, device):
    """a training step and GRPOTrainer's, with rewards of 0 and 1 in place of a discriminator"""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    game, reward = Game(args, device, ["generator"]), torch.arange(args.batch_size, device=device) % 2.0  # (B,)
    base, texts = base_model(args, device), game.tokenizer.batch_decode(game.prompts[::2])
    base.generation_config.eos_token_id = None  # it would end a sequence
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            folder, per_device_train_batch_size=args.batch_size, num_generations=2, beta=args.kl_coef, top_k=0,
            max_completion_length=args.reasoning_tokens + args.completion_tokens, temperature=args.temperature,
            learning_rate=args.g_lr, use_cpu=device.type == "cpu", bf16=args.dtype == "bf16",
            fp16=args.dtype == "fp16", shuffle_dataset=False, activation_checkpointing=args.grad_ckpt, report_to="none")
        trainer = GRPOTrainer(base, lambda **_: reward.tolist(), config, Dataset.from_dict({"prompt": texts}),
                              processing_class=game.tokenizer, peft_config=game.model.peft_config["generator"])
    model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.create_optimizer())
    batch, trainer.current_gradient_accumulation_steps = next(iter(trainer.get_train_dataloader())), 1

    def theirs():
        trainer.state.num_input_tokens_seen = 0
        trainer.training_step(model, batch, None)
        num_tokens = args.batch_size * args.prompt_tokens + game.num_positions
        assert trainer.state.num_input_tokens_seen == num_tokens, "TRL read or wrote another number of tokens"
        trainer.accelerator.clip_grad_norm_(model.parameters(), args.grad_clip)
        optimizer.step()
        model.zero_grad()

    theirs()  # makes the optimizer's state
    return compare({"ours": lambda: game.step(Clock(device), reward), "GRPOTrainer": theirs}, args.repeats, device)


if __name__ == "__main__":
    logging.set_verbosity_error()
    explain_failures()
    device = checked_device(args.device)
    report = {**provenance(device), "args": vars(args)}
    print(f"{args.model}, {args.dtype if args.quant == 'none' else args.quant}, on {report['device']}")
    report["versions"]["trl"] = importlib.metadata.version("trl") if HAS_TRL else None
    if not HAS_TRL:
        print("rows with TRL are left out, it is not installed: pip install trl==1.16.0 accelerate==1.15.0")
    for section in [decode, step, logps, trl]:
        if section.__name__ in args.only and (HAS_TRL or section is not trl):
            print(f"\n{section.__name__}: {section.__doc__}")
            report[section.__name__] = section(args, device)
    if args.json:
        write_whole(pathlib.Path(args.json), json.dumps(report, indent=2) + "\n")
