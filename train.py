"""
Teach a language model to write like a corpus by making it fool its own discriminator.

One base model plays both players through rsLoRA adapters. Each step: sample a completion for each prefix, pay the
generator for being taken for real (and for the right length), step the generator, step the discriminator.

What differs from textbook REINFORCE and textbook GANs:
1) The generator thinks first, within a budget; thinking and completion are trained by the same reward.
2) No ratio, no clipping: one update a batch, on the policy that sampled it but for its rounding (logp_gap).
3) The KL to the reference is exact over the vocabulary at every sampled position, in the loss, not in the reward.
4) The baseline is a moving average of batch rewards, its value from before the batch.
5) Real and generated text reach the discriminator tokenised alike and cut to the same number of tokens.

    python train.py --preset demo                           # embedded model and corpus, no GPU, minutes
    python train.py                                         # the write-up's run 05: Qwen3-8B on the Pile, one GPU
    python train.py --quant nf4 --micro_batch 1             # the same on a card of 24 GB
    python train.py --data my.jsonl --model some/folder     # your texts, your model
    python train.py --preset demo --init out/sft-1          # start from what sft.py fine-tuned
    python train.py --resume out/demo-1                     # go on where a run stopped
"""
from argparse import BooleanOptionalAction as Switch, Namespace

from flags import Parser, UserError, check

# -----------------------------------------------------------------------------
# flags; the defaults are the write-up's run 05, a preset only changes defaults
DEMO = dict(
    model="demo", data="demo", device="cpu", dtype="fp32", adapters="separate", rank=16, alpha=4.0, prefix_tokens=48,
    reasoning_tokens=12, completion_tokens=48, batch_size=64, micro_batch=16, num_steps=40, g_lr=2e-3, d_lr=3e-3,
    d_scale=1.0, kl_coef=0.1, g_reward="neglog", adv_norm=True, d_pool="mean", d_warmup=8, featurizer="base",
    save_every=10)
REASON = dict(g_reward="azr")  # of --disc reason
PRESETS = {("writeup", "reason"): REASON, ("demo", "head"): DEMO, ("demo", "reason"): DEMO | REASON | dict(
    batch_size=16, num_steps=100, d_lr=6e-3, d_think_tokens=6)}
MAY_CHANGE = "micro_batch grad_ckpt device featurizer seeds save_every keep max_bad_steps".split()  # on --resume
parser = Parser(__doc__)
add = parser.add_argument
add("--preset", choices=["writeup", "demo"], default="writeup", help="set of defaults; any flag still wins")
# model
add("--model", default="Qwen/Qwen3-8B", help="hub id or folder of a causal LM; demo and demo-small are embedded")
add("--quant", choices=["none", "nf4", "int8"], default="none", help="quantise the base model (bitsandbytes)")
add("--dtype", choices=["bf16", "fp16", "fp32"], default="bf16", help="of weights, or of computation where quantised")
add("--adapters", choices=["shared", "separate"], default="shared", help="one adapter for both players, or one each")
add("--rank", type=int, default=64, help="of the rsLoRA adapters")
add("--alpha", type=float, default=8.0, help="of the rsLoRA adapters; their scale is alpha / sqrt(rank)")
add("--init", default=None, help="folder of a run or of sft.py to start the generator's adapter from (unset: fresh)")
add("--init_ref", choices=["sft", "base"], default="sft", help="KL's reference under --init: that adapter, or the base")
# data
add("--data", default="pile", help="pile, demo, or a path: .jsonl[.gz|.zst], .parquet, .txt, a folder of these")
add("--text_field", default="text", help="field or column that holds the text")
add("--prefix_tokens", type=int, default=None, help="tokens of the prefix (unset: as completion_tokens)")
add("--reasoning_tokens", type=int, default=256, help="most tokens of thinking (0: none)")
add("--completion_tokens", type=int, default=256, help="most tokens of the completion")
add("--echo_tokens", type=int, default=16, help="extra tokens for the prompt's echo, its most words (0: off)")
add("--merge", action=Switch, default=True, help="sample from merged weights, a second copy (off, nf4, int8: none)")
add("--temperature", type=float, default=1.0, help="of sampling, and so of the log-probs (0: greedy, for a look)")
# players
add("--batch_size", type=int, default=4, help="sequences a step")
add("--micro_batch", type=int, default=0, help="sequences a pass of the updates; same gradient, less memory (0: all)")
add("--grad_ckpt", action=Switch, default=False, help="keep less for the backward pass, compute it again: slower")
add("--num_steps", type=int, default=1600, help="steps of the run; the learning rates fall linearly to 0 over them")
add("--g_lr", type=float, default=3e-5, help="generator's learning rate (0: it does not learn)")
add("--d_lr", type=float, default=2e-4, help="discriminator's learning rate (0: it does not learn)")
add("--optim", choices=["adam", "adam8bit"], default="adam", help="adam8bit: moments in 8 bits (bitsandbytes)")
add("--beta1", type=float, default=0.95, help="of both Adams")
add("--beta2", type=float, default=0.95, help="of both Adams")
add("--grad_clip", type=float, default=1.0, help="largest gradient norm of an update")
add("--g_reward", choices=["prob", "neglog", "azr"], default="prob", help="p_real, -log(1 - p_real), 1 - d_value")
add("--azr_t", type=float, default=0.125, help="of --g_reward azr: a d_value up to this earns nothing")
add("--d_scale", type=float, default=30.0, help="factor of the reward, against the KL")
add("--kl_coef", type=float, default=0.05, help="nats of loss a nat of KL to the reference (0: no such pass)")
add("--ema_decay", type=float, default=0.9, help="of the baseline")
add("--adv_norm", action=Switch, default=False, help="divide advantages by a running standard deviation")
add("--disc", choices=["head", "reason"], default="head", help="the discriminator: a linear head, or one that thinks")
add("--d_model", default=None, help="another base model for the discriminator, as --model (unset: the same)")
add("--d_loss", choices=["ce", "pair"], default="ce", help="cross-entropy a text, or Bradley-Terry a pair")
add("--d_loss_scale", type=float, default=1.0, help="factor of the discriminator's loss, the other reading of d-scale")
add("--d_pool", choices=["last", "mean"], default="last", help="the head reads the last state or the mean")
add("--d_think_tokens", type=int, default=None, help="of --disc reason (unset: as reasoning_tokens; 0: none)")
add("--d_kl_coef", type=float, default=0.2, help="as --kl_coef, of --disc reason (0: no reference pass)")
add("--d_value_coef", type=float, default=0.5, help="weight of the value head's loss, of --disc reason")
add("--d_value_detach", action=Switch, default=False, help="the value head of --disc reason trains itself alone")
add("--d_warmup", type=int, default=0, help="steps before step 0 in which only the discriminator learns")
add("--d_shuffle", action=Switch, default=False, help="control: the discriminator learns from shuffled labels")
add("--sft", action=Switch, default=False, help="control: the generator is fine-tuned on the truth, at advantage 1")
# run
add("--floor_sequences", type=int, default=500, help="completions by the bare base model to compare with (0: no floor)")
add("--featurizer", default="gpt2-large", help="of MAUVE: a model id, or base: the run's own base model")
add("--seeds", type=int, default=5, help="seeds of MAUVE's k-means")
add("--seed", type=int, default=0, help="of adapters, data and sampling")
add("--device", default="cuda", help="cuda, cuda:1, cpu, ...")
add("--out_dir", default=None, help="folder of the run (unset: out/<preset>-<next free number>)")
add("--save_every", type=int, default=100, help="steps between checkpoints (0: only at the end)")
add("--keep", type=int, default=0, help="earlier checkpoints to keep, as ckpt-<step> (0: none)")
add("--max_bad_steps", type=int, default=10, help="steps in a row without a finite update that end the run (0: none)")
add("--resume", default=None, help="folder of a run to go on with; needs no other flag, and takes few")
parser.set_defaults(**PRESETS.get((parser.peek("--preset") or "writeup", parser.peek("--disc") or "head"), {}))
args = parser.parse_args()
if args.resume:
    run, changed = parser.going_on(args, MAY_CHANGE)
    args = Namespace(**vars(args) | PRESETS.get((run["preset"], run.get("disc", "head")), {}) | run | changed)
args.prefix_tokens = args.completion_tokens if args.prefix_tokens is None else args.prefix_tokens
if args.disc == "reason" and args.d_think_tokens is None:
    args.d_think_tokens = args.reasoning_tokens
check(args)

import datetime
import functools
import json
import math
import pathlib
import sys
import time

import torch
from tqdm import tqdm

from checkpoint import (Signals, claim, hold, json_lines, last_words, provenance, restore, save, start_from, sync,
                        trace_resume, write_whole)
from data import plain_encoder, prompt_ids, windows
from discriminator import Head
from evaluate import evaluate
from features import featurizer
from measures import distinct
from model import (DTYPES, TokenStats, adapter_parameters, add_adapters, checked_device, checkpoint_layers, load_model,
                   load_tokenizer, memory_gb, memory_needs, micro_batches, positions, update)
from reason import Reason
from reward import advantages, ema, generator_reward, length_score, policy_loss
from rollout import complete, keyed, reference_hidden, rules, sampled_stats, taught
from sampler import Sampler

# -----------------------------------------------------------------------------
# seed, device, model, data
# B sequences, R and C most tokens of thinking and completion, T tokens, N sampled ones, H hidden
B, R, C = args.batch_size, args.reasoning_tokens, args.completion_tokens
device = checked_device(args.device)
torch.manual_seed(args.seed)
sys.excepthook = last_words(None, {}, lambda: False)  # a lack of memory ends in one line
tokenizer = load_tokenizer(args.model)
stream = windows(args.data, plain_encoder(tokenizer), args.prefix_tokens, C, args.seed, text_field=args.text_field)
stream[0]  # a source without a usable text fails here, before the weights are loaded
if args.d_model:  # so does a mistyped name
    plain_encoder(load_tokenizer(args.d_model, "--d_model"), "--d_model")
model, _ = load_model(args.model, args.quant, args.dtype, device)
encode, rule = plain_encoder(tokenizer), rules(tokenizer, model)
featurizer(args.featurizer, model, tokenizer, "cpu")  # one that cannot be had fails here, not after the run

# players: two adapters on one model, one in both roles, or two models
G, D = ("shared", "shared") if args.adapters == "shared" else ("generator", "discriminator")
has_kl = args.kl_coef or G == D and args.disc == "reason" and args.d_kl_coef
REF = ["reference"] if args.init and args.init_ref == "sft" and has_kl else []  # a frozen copy; []: the base
model = add_adapters(model, ([G] if G == D or args.d_model else [G, D]) + REF, args.rank, args.alpha)
if args.init and not args.resume:
    start_from(args.init, model, [G, *REF])
d_model, d_tokenizer = model, tokenizer
if args.d_model:
    d_model, d_tokenizer = load_model(args.d_model, args.quant, args.dtype, device, "--d_model")
    d_model = add_adapters(d_model, [D], args.rank, args.alpha, "--d_model")
models = [model] if d_model is model else [model, d_model]
for lm in models if args.grad_ckpt else []:
    checkpoint_layers(lm)
# what samples: a copy of a model, which follows one of its adapters
samplers = [Sampler(lm, DTYPES[args.dtype], args.merge) for lm in (models if args.disc == "reason" else [model])]
common = d_model, d_tokenizer, (args.prefix_tokens, C), args.micro_batch, args.d_loss_scale, args.d_shuffle
judge = (Head(*common, args.d_pool, args.d_loss) if args.disc == "head" else
         Reason(*common, samplers[-1], D, B, args.d_think_tokens, args.temperature, args.d_kl_coef, args.d_value_coef,
                args.d_value_detach, REF if G == D else []))
most = len(prompt_ids(tokenizer, encode, "")) + args.prefix_tokens + R + len(rule.close) + C + args.echo_tokens
for name, lm, need in ((args.model, model, most), (args.d_model or args.model, d_model, judge.most)):
    if need > positions(lm):
        raise UserError(f"{name} has {positions(lm)} positions and a sequence takes up to {need}; lower --echo_tokens, "
                        "--prefix_tokens, --reasoning_tokens, --d_think_tokens or --completion_tokens")
g_params = adapter_parameters(model, G)
d_params = adapter_parameters(d_model, D) + [p for module in judge.modules.values() for p in module.parameters()]

# -----------------------------------------------------------------------------
# everything the loop changes, besides the weights: saved and restored as this block
Adam = torch.optim.Adam
if args.optim == "adam8bit":
    from bitsandbytes.optim import Adam8bit as Adam
g_optimizer = Adam(g_params, lr=args.g_lr, betas=(args.beta1, args.beta2))
d_optimizer = Adam(d_params, lr=args.d_lr, betas=(args.beta1, args.beta2))
optimizers = {"generator": g_optimizer, "discriminator": d_optimizer}
state = {
    "step": -args.d_warmup,
    "baseline": None,  # moving averages of the batch's mean reward, and of its squared distance from the baseline
    "variance": None,
    "loss_scale": 2.0 ** 14 if args.dtype == "fp16" else 1.0,  # lifts small gradients above fp16's floor
    "bad_steps": 0,  # in a row, up to now
}
# sampling is keyed by (seed, step), windows by (seed, position): there is no other random state to save

out_dir = pathlib.Path(args.resume) if args.resume else claim(args.out_dir, args.preset)
num_trained = sum(p.numel() for p in {*g_params, *d_params})
whole = False  # whether the weights are those of a whole step, so that they can be saved


def checkpoint():
    """Save everything the loop changes."""
    save(out_dir, models, judge.modules, optimizers, state, files.values(), args.keep)


# from here on a lack of memory or of disk ends the run in one line
size, copied = args.micro_batch or B, sum(sampler.num_bytes for sampler in samplers)
at_once = max(B, 32) if args.floor_sequences else B  # of the floor: decoding many at once costs next to nothing
players = (model, most, at_once, size), (d_model, judge.most, 2 * B * judge.samples, 2 * size)
needs = memory_needs(players, optimizers.values(), copied)
sys.excepthook = last_words(out_dir, needs, lambda: whole and not checkpoint())
if args.resume:  # also cuts the files back to the checkpoint, so it comes before they are opened
    hold(out_dir)
    state |= restore(out_dir, models, judge.modules, optimizers)
    trace_resume(out_dir, device)
names = "metrics", "rollouts", *judge.files
files = {name: open(out_dir / f"{name}.jsonl", "a", 1, encoding="utf-8") for name in names}
if not args.resume:
    checkpoint()
    write_whole(out_dir / "args.json", json.dumps({"args": vars(args), **provenance(device)}, indent=2) + "\n")
    # from here on it is a run, and a stopped one can go on
signals = Signals()
print(f"{out_dir}: {args.model} on {device}, {num_trained:,} trained of "
      f"{sum(p.numel() for lm in models for p in lm.parameters()):,} parameters")


# -----------------------------------------------------------------------------
# the loop's verbs; they read the names above, and none of them trains anything
random_for = functools.partial(keyed, device, args.seed)  # (purpose, number): a step can be sampled again
stats_of = functools.partial(sampled_stats, model, rules=rule, temperature=args.temperature)  # the generator's


def sample(batch, adapter, generator):
    """A rollout for each window, and its completion as text, without the echo, cut to C tokens, with its length n."""
    samplers[0].follow(adapter)
    return complete(samplers[0], tokenizer, encode, rule, batch, R, C, args.echo_tokens, args.temperature, generator)


def record(step, window, roll, i, completion, n, reward=None, p_real=None):
    """One row of rollouts.jsonl or floor.jsonl."""
    think = tokenizer.decode(roll.think[i], clean_up_tokenization_spaces=False)
    return dict(step=step, prefix=window.prefix, sep=window.sep, truth=window.truth, think=think, completion=completion,
                reward=reward, p_real=p_real, length_score=length_score(n, C), n_think=len(roll.think[i]),
                n_completion=n, think_closed=bool(roll.think_closed[i]))


def kl_now(roll, parts):
    """Mean KL to the reference on sequences that were sampled before a step, after it."""
    model.set_adapter(G)
    with torch.no_grad():
        kl = [stats_of(roll, rows, ref_hidden=ref_hidden).kl for rows, ref_hidden, _ in parts]  # (N,) in all
        return torch.cat(kl).mean().item()


def give_up(records):
    """End a run whose updates are not finite any more, with the last batch's records beside it."""
    write_whole(out_dir / "bad_step.jsonl", json_lines(records))
    raise UserError(f"{state['bad_steps']} steps in a row (--max_bad_steps) had a gradient that is not finite; their "
                    f"last sequences are in {out_dir}/bad_step.jsonl; the checkpoint from before them stands; start "
                    "anew with a lower --g_lr or --d_lr, or with --dtype bf16 or fp32", status=1)


# -----------------------------------------------------------------------------
# the floor: what the bare base model writes for the very prefixes that the run will end with
total, floor, partial = args.num_steps * B, out_dir / "floor.jsonl", out_dir / "floor.partial"
if args.floor_sequences and not floor.exists():
    begin = max(total - args.floor_sequences, 0)
    done = partial.read_text(encoding="utf-8").split("\n")[:-1] if partial.exists() else []  # of a stopped run
    done = done[:len(done) // at_once * at_once]
    write_whole(partial, "".join(line + "\n" for line in done))
    for first in tqdm(range(begin + len(done), total, at_once), desc="floor"):
        batch = [stream[position] for position in range(first, min(first + at_once, total))]
        roll, completions = sample(batch, None, random_for("floor", first))
        with open(partial, "a", encoding="utf-8") as file:
            rows = (record((first + i) // B, batch[i], roll, i, *completions[i]) for i in range(len(batch)))
            file.write(json_lines(rows))
        if signals.stop:
            signals.leave("before the first step", out_dir)
    sync(partial)
    partial.rename(floor)
    samplers[0].loops.clear()  # the caches of these batches

# -----------------------------------------------------------------------------
# the loop; steps below 0 are the warm-up, in which only the discriminator learns
started, first_step = time.time(), state["step"]
for step in range(first_step, args.num_steps):
    t0, whole, g_grad_norm = time.time(), True, 0.0  # a warm-up has no g_grad_norm
    lr_factor = 1 - max(step, 0) / args.num_steps

    # sample; the warm-up's windows lie behind those of the run
    first = step * B if step >= 0 else total + (step + args.d_warmup) * B
    batch = [stream[position] for position in range(first, first + B)]
    roll, completions = sample(batch, G, random_for("rollout", step))
    num_drawn = roll.sampled.sum().item()
    t1 = time.time()

    # reward: what the discriminator, as it stands, makes of the completions; an empty one is not `shown` and earns 0,
    # one whose verdict cannot be `read` does not take part in this step (`counts`)
    d_model.set_adapter(D)
    judged = judge.look(batch, completions, random_for, step)
    lengths = torch.tensor([length_score(n, C) for _, n in completions], device=device)  # (B,)
    reward = generator_reward(judged, lengths, args.g_reward, args.d_scale, args.azr_t)  # (B,)

    # generator step: REINFORCE against the baseline from before this batch, and the KL; not in the warm-up
    if step >= 0:
        model.set_adapter(G)
        mean_reward = reward[judged.counts].mean().item()
        baseline = mean_reward if state["baseline"] is None else state["baseline"]
        variance = ema(state["variance"], (reward - baseline)[judged.counts].square().mean().item(), args.ema_decay)
        advantage = advantages(reward, baseline, variance if args.adv_norm else None)  # (B,)
        advantage = torch.where(judged.counts, advantage, 0.0)  # (B,)
        if args.sft:  # the same loss on the truth, at advantage 1, is supervised fine-tuning
            prompts = [prompt_ids(tokenizer, encode, window.prefix) for window in batch]
            roll = taught(roll, prompts, [encode(window.truth)[0][:C] for window in batch], rule)
            advantage = torch.ones(B, device=device)  # (B,)
        parts, g_loss = [], 0.0
        for rows in micro_batches(range(B), args.micro_batch):
            ref_hidden = reference_hidden(model, roll, rows, *REF) if args.kl_coef else None  # (N, H)
            stats = stats_of(roll, rows, ref_hidden=ref_hidden)  # (N,) each
            each = advantage[rows].repeat_interleave(roll.sampled[rows].sum(1))  # (N,)
            loss = policy_loss(stats.logp, stats.kl, each, args.kl_coef, B * (R + C))  # ()
            (loss * state["loss_scale"]).backward()
            g_loss += loss.item()
            parts.append((rows, ref_hidden, TokenStats(*(x.detach() for x in stats))))  # (N,) each
        whole = False
        if math.isfinite(mean_reward):
            state.update(baseline=ema(state["baseline"], mean_reward, args.ema_decay), variance=variance)
        g_grad_norm = update(g_optimizer, args.g_lr * lr_factor, args.grad_clip, state)
        kl_after_g = kl_now(roll, parts) if G == D and args.kl_coef else None

    # discriminator step: the real and the generated text of every prefix
    d_model.set_adapter(D)
    d_loss, right = 0.0, torch.zeros(2)  # (2,) of real, of generated
    for rows in micro_batches(judged.shown, args.micro_batch):
        loss, found = judge.loss(judged, rows)  # (), (2,)
        (loss * state["loss_scale"]).backward()
        d_loss += loss.item()
        right += found  # (2,)
    whole = False
    d_grad_norm = update(d_optimizer, args.d_lr * lr_factor, args.grad_clip, state)
    kl_after_d = kl_now(roll, parts) if G == D and args.kl_coef and step >= 0 else None
    d_acc_real, d_acc_generated = (right / max(len(judged.shown), 1)).tolist()
    t2 = time.time()

    skipped = [g_grad_norm, d_grad_norm].count(None)
    state["bad_steps"] = state["bad_steps"] + 1 if skipped else 0
    paid = reward.where(judged.counts, torch.nan), judged.p_real.where(judged.read, torch.nan)  # (B,) each; nan: null
    records = [record(step, batch[i], roll, i, *completions[i], *(x[i].item() for x in paid)) for i in range(B)]
    if 0 < args.max_bad_steps <= state["bad_steps"]:
        give_up(records)

    # log
    left = (t2 - started) / (step - first_step + 1) * (args.num_steps - step - 1)
    accuracy = f"d_acc {d_acc_real:.2f} {d_acc_generated:.2f}"
    speed = f"{t2 - t0:.1f} s/step, {datetime.timedelta(seconds=int(left))} left"
    if step < 0:
        print(f"warm-up {step + args.d_warmup + 1}/{args.d_warmup} | d_loss {d_loss:.3f} | {accuracy} | {speed}",
              flush=True)
    else:
        stats = TokenStats(*map(torch.cat, zip(*(stats for _, _, stats in parts))))  # (N,) each
        written = ~roll.thinking[roll.sampled]  # (N,) of the completion
        told, logs = judge.tell(judged, step)
        row = dict(
            step=step, reward=mean_reward, p_real=judged.p_real[judged.read].mean().item(),
            length_score=lengths.mean().item(), baseline=baseline,
            advantage_sd=advantage[judged.counts].std(correction=0).item(), g_loss=g_loss,
            kl=stats.kl.mean().item() if args.kl_coef else None, kl_after_g=kl_after_g, kl_after_d=kl_after_d,
            entropy=stats.entropy.mean().item(),
            logp_gap=(stats.logp - roll.logps[roll.sampled]).abs().mean().item(),
            d_loss=d_loss, d_acc_real=d_acc_real, d_acc_generated=d_acc_generated,
            g_grad_norm=g_grad_norm, d_grad_norm=d_grad_norm, g_lr=args.g_lr * lr_factor, d_lr=args.d_lr * lr_factor,
            think_closed=roll.think_closed.float().mean().item(), num_think=sum(map(len, roll.think)) / B,
            num_completion=sum(n for _, n in completions) / B,
            distinct_2=distinct([encode(text)[0] for text, _ in completions], 2),
            coherence=(stats.ref_logp[written] > -10).float().mean().item() if args.kl_coef else None,
            skipped=skipped, seconds=time.time() - t0, sample_seconds=t1 - t0,
            update_seconds=t2 - t1, tokens_per_second=num_drawn / (t2 - t0), memory_gb=memory_gb(device), **told)
        for name, rows in dict(metrics=[row], rollouts=records, **logs).items():
            files[name].write(json_lines(rows))
        print(f"step {step}/{args.num_steps} | reward {mean_reward:.3f} | p_real {row['p_real']:.2f} | length "
              f"{row['length_score']:.2f} | {accuracy} | kl {row['kl'] or 0:.4f} | {speed}", flush=True)

    # save
    state["step"], stop = step + 1, signals.stop
    due = args.save_every and (step + 1) % args.save_every == 0 and not state["bad_steps"]
    if stop or step + 1 == args.num_steps or due:
        checkpoint()
    if stop:
        signals.leave(f"after step {step}", out_dir)

# -----------------------------------------------------------------------------
# MAUVE of what was written, beside the floor and a ceiling
if signals.stop:
    signals.leave("before the evaluation", out_dir)
for file in files.values():
    file.close()
signals.default()
evaluate(out_dir, args.featurizer, args.seeds, model, tokenizer, device)
