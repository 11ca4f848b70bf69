"""
Teach a language model to write like a corpus by making it fool its own discriminator.

One base model plays both players through rsLoRA adapters. Each step, on a batch of prefixes of real texts:
  sample         the generator thinks for a bounded number of tokens, then completes each prefix
  reward         how real the discriminator finds each completion, times how much of the length budget it fills
  generator      one REINFORCE step against a moving average of past rewards, plus the exact KL to the base model
  discriminator  one cross-entropy step on the real and the generated completion of every prefix

What differs from textbook REINFORCE and textbook GANs:
1. Thinking and completion are trained by the same reward.
2. There is one update per batch, so no PPO clipping. `logp_gap` logs how far sampler and learner differ.
3. The KL is summed over the vocabulary at every sampled position, and stands in the loss, not in the reward.
4. The discriminator reads both texts tokenised alike and cut to the same number of tokens.

$ python train.py --preset demo                         # embedded model and corpus, no GPU, six minutes
$ python train.py --preset small                        # SmolLM2-135M on the Pile, any GPU, or --device cpu
$ python train.py                                       # Qwen3-8B on the Pile, one GPU of 80 GB
$ python train.py --quant nf4 --micro_batch 1           # the same on 24 GB
$ python train.py --data my.jsonl --model some/folder   # your texts, your model
$ python train.py --resume out/demo-1                   # continue a stopped run
"""
from argparse import BooleanOptionalAction as Switch

from flags import Parser, Run, check, json_lines, read_lines, short, write_whole

# a preset only changes defaults; any flag still wins
DEMO = dict(
    model="demo", data="demo", device="cpu", dtype="fp32", adapters="separate", rank=16, alpha=4.0, prefix_tokens=48,
    reasoning_tokens=12, completion_tokens=48, batch_size=64, micro_batch=16, num_steps=40, g_lr=2e-3, d_lr=3e-3,
    d_scale=1.0, kl_coef=0.1, g_reward="neglog", adv_norm=True, d_pool="mean", d_warmup=8, featurizer="base",
    save_every=10)
SMALL = DEMO | dict(
    model="HuggingFaceTB/SmolLM2-135M-Instruct", data="pile", device="cuda", dtype="bf16", batch_size=16, micro_batch=8,
    num_steps=80, d_warmup=4, g_lr=5e-4, d_lr=3e-4, floor_sequences=640,
    featurizer="sentence-transformers/all-MiniLM-L6-v2")
PRESETS = dict(writeup={}, demo=DEMO, small=SMALL, best=DEMO | dict(optim="muon", g_lr=1e-2, d_lr=1.5e-2))
REASON = dict(g_reward="azr")  # defaults of --disc reason
DEMO_REASON = dict(batch_size=16, num_steps=100, d_lr=6e-3, d_think_tokens=6)
MAY_CHANGE = "micro_batch grad_ckpt device sampler tis featurizer seeds save_every track".split()  # on resuming


def flags(words=None):
    """The flags, one a line. The defaults are the write-up's run 05."""
    parser = Parser(__doc__, words)
    add = parser.add_argument
    add("--preset", choices=[*PRESETS], default="writeup",
        help="defaults: writeup (8 billion weights), demo (4 million), small (135 million), best (docs/ablation.md)")
    add = parser.add_argument_group("model").add_argument
    add("--model", default="Qwen/Qwen3-8B", help="hub id or folder of a causal LM, or the embedded demo, demo-small")
    add("--quant", type=short, choices=["none", "nf4", "int8"], default="none", help="quantise the base (bitsandbytes)")
    add("--dtype", type=short, choices=["bf16", "fp16", "fp32"], default="bf16", help="dtype of weights and compute")
    add("--adapters", choices=["shared", "separate"], default="shared", help="one adapter for both players or one each")
    add("--rank", type=int, default=64, help="rank of the rsLoRA adapters")
    add("--alpha", type=float, default=8.0, help="rsLoRA alpha; the adapters are scaled by alpha / sqrt(rank)")
    add("--d_model", default=None, help="another base model for the discriminator (default: the same model)")
    add = parser.add_argument_group("data").add_argument
    add("--data", default="pile", help="pile, demo, hub:user/name, or a path: .jsonl .parquet .csv .txt, a folder ...")
    add("--text_field", default="text", help="field or column that holds the text")
    add("--prompt", default="writeup", help="writeup, plain (the prefix alone), chat, or a file that holds {text}")
    add("--prefix_tokens", type=int, default=None, help="length of a prefix (default: same as --completion_tokens)")
    add("--reasoning_tokens", type=int, default=None, help="thinking budget, 0: none (default: 256; with plain: 0)")
    add("--completion_tokens", type=int, default=256, help="completion budget")
    add("--echo_tokens", type=int, default=16,
        help="longest echo of the prefix that is cut off, in words; as many more tokens are sampled (0: off)")
    add = parser.add_argument_group("generator").add_argument
    add("--g_lr", type=float, default=3e-5, help="learning rate, decays linearly to 0 (0: the generator is frozen)")
    add("--g_reward", choices=["prob", "neglog", "azr"], default="prob", help="p_real, -log(1 - p_real) or 1 - d_value")
    add("--d_scale", type=float, default=30.0, help="factor on the reward")
    add("--kl_coef", type=float, default=0.05, help="weight of the KL to the base model (0: off, saves a pass)")
    add("--ema_decay", type=float, default=0.9, help="decay of the reward baseline")
    add("--adv_norm", action=Switch, default=False, help="divide advantages by a running standard deviation")
    add("--ce_coef", type=float, default=0.0, help="weight of the cross-entropy of the truth, decays to 0 (0: off)")
    add("--temperature", type=float, default=1.0, help="sampling temperature, also in the log-probs (0: greedy)")
    add("--merge", action=Switch, default=None, help="sample from merged weights (default: only in fp32)")
    add("--sampler", default="none", help="URL of a vLLM server that samples; none: this process does")
    add("--tis", type=float, default=None, help="cap on importance weights (0: no weights; default: 2 with --sampler)")
    add = parser.add_argument_group("discriminator").add_argument
    add("--disc", choices=["head", "reason"], default="head", help="a linear head, or verdicts in words after thinking")
    add("--d_lr", type=float, default=2e-4, help="learning rate, decays linearly to 0 (0: the discriminator is frozen)")
    add("--d_loss", choices=["ce", "pair"], default="ce", help="cross-entropy per text, or Bradley-Terry per pair")
    add("--d_loss_scale", type=float, default=1.0, help="factor on the loss; acts only through --grad_clip")
    add("--d_pool", choices=["last", "mean"], default="last", help="the head reads the last hidden state or the mean")
    add("--d_think_tokens", type=int, default=None, help="thinking budget of --disc reason (default: the generator's)")
    add("--d_kl_coef", type=float, default=0.2, help="weight of the KL of --disc reason (0: off)")
    add("--d_warmup", type=int, default=0, help="steps before step 0 that train the discriminator alone")
    add("--d_shuffle", action=Switch, default=False, help="control: train the discriminator on shuffled labels")
    add = parser.add_argument_group("run").add_argument
    add("--batch_size", type=int, default=4, help="sequences per step")
    add("--micro_batch", type=int, default=0, help="sequences per forward pass: less memory, same gradient (0: all)")
    add("--grad_ckpt", action=Switch, default=False, help="gradient checkpointing: less memory, slower")
    add("--num_steps", type=int, default=1600, help="generator steps")
    add("--optim", choices=["adam", "adam8bit", "muon"], default="adam",
        help="adam8bit keeps 8-bit moments (bitsandbytes); muon wants higher rates, five times on the demo")
    add("--beta1", type=float, default=0.95, help="Adam's beta1")
    add("--beta2", type=float, default=0.95, help="Adam's beta2")
    add("--grad_clip", type=float, default=1.0, help="maximum gradient norm")
    add("--floor_sequences", type=int, default=500, help="completions by the untrained base to compare with (0: none)")
    add("--featurizer", default="gpt2-large", help="model that embeds texts for MAUVE; base: the run's own base model")
    add("--seeds", type=int, default=5, help="k-means seeds for MAUVE (0: no evaluation at the end)")
    add("--seed", type=int, default=0, help="seed of adapters, data and sampling")
    add("--device", default="cuda", help="cuda, cuda:1, cpu, ...")
    add("--deterministic", action=Switch, default=False, help="make GPU runs repeatable: slower, no CUDA graph")
    add("--out_dir", default=None, help="folder of the run (default: out/<preset>-<next free number>)")
    add("--save_every", type=int, default=100, help="steps between checkpoints (0: only the last)")
    add("--track", choices=["none", "wandb", "trackio", "tensorboard"], default="none", help="also log to this service")
    add("--resume", default=None, help="folder of a run to continue")
    preset, reason = parser.peek("--preset"), parser.peek("--disc") == "reason"
    plain = parser.peek("--prompt") == "plain"  # nobody asks for thinking or an echo then
    for applies, defaults in ((preset in PRESETS, PRESETS.get(preset)), (reason, REASON),
                              (reason and preset in ("demo", "best"), DEMO_REASON),
                              (plain, dict(reasoning_tokens=0, echo_tokens=0))):  # later ones win
        if applies:
            parser.set_defaults(**defaults)
    return parser


def parse_flags(words=None):
    """The flags of this run, checked, with defaults that depend on other flags filled in."""
    parser = flags(words)
    args = parser.parse_args()
    if args.resume:
        args = parser.resumed(args, MAY_CHANGE)
    for name, default in dict(prefix_tokens=args.completion_tokens, reasoning_tokens=256,
                              merge=args.dtype == "fp32", tis=0.0 if args.sampler == "none" else 2.0).items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    check(args, parser.given())
    return args


if __name__ == "__main__":
    args = parse_flags()  # before torch is imported: a mistyped flag must not wait for that

    import pathlib
    import secrets
    import time

    import torch

    from checkpoint import Signals, Tracker, explain_failures, lock, make_out_dir, pin, restore, save, write_args
    from data import plain_encoder, prompt_template, windows
    from discriminator import make_judge
    from evaluate import evaluate
    from measures import batch_metrics, check_featurizer, policy_metrics, progress
    from model import TokenStats, checked_device, load_players, load_tokenizer, memory_gb, micro_batches
    from plot import plot_runs
    from ranks import FIRST, everyone, join, leave, mine
    from reward import Baseline, generator_reward, length_score, policy_loss, truncated_ratio
    from rollout import Writer, notes, probe, sampled_stats
    from sampler import Sampler
    from served import Served

    # -----------------------------------------------------------------------------
    # set-up: device, data, model, players. B sequences, R and C token budgets, N sampled tokens
    B, R, C, with_kl = args.batch_size, args.reasoning_tokens, args.completion_tokens, args.kl_coef > 0
    device = checked_device(join(args), args.deterministic)
    explain_failures()
    if args.seeds:
        check_featurizer(args.featurizer)
    pin(args)  # a run is resumed and measured with the very models that it began with
    tokenizer = load_tokenizer(args.model)
    args.prompt = prompt_template(args.prompt, tokenizer)
    stream = windows(args, plain_encoder(tokenizer))
    args.data_revision = stream.revision  # a run can be resumed only on the data that it began with
    hints = notes(args, tokenizer, flags(["--preset", args.preset]).get_default)
    print("\n".join([stream.summary(), *hints]), flush=True)

    torch.manual_seed(args.seed)
    generator, discriminator = players = load_players(args, device)
    sampler = Served(args.sampler, generator.model) if args.sampler != "none" else Sampler(generator.model, args.merge)
    writer = Writer(sampler, tokenizer, args)
    judge = make_judge(args, discriminator, sampler)
    generator.check_length(writer.max_tokens)
    discriminator.check_length(judge.max_tokens)
    probe(writer, generator, [stream[i] for i in range(3)], judge)
    generator.optimize(args.g_lr, args)
    discriminator.optimize(args.d_lr, args, judge.parameters())

    # what the loop changes: players, head, baseline, step; sampling and data are functions of seed and position
    baseline, first_step = Baseline(args.ema_decay, args.adv_norm), -args.d_warmup
    if args.resume:
        out_dir = pathlib.Path(args.resume)
        lock(out_dir)
        first_step = restore(out_dir, players, judge, baseline, stream)
    else:
        out_dir = make_out_dir(args.out_dir, args.preset)
    explain_failures(out_dir)
    files = {name: open(out_dir / f"{name}.jsonl", "a", 1, encoding="utf-8") for name in
             ["metrics", "rollouts"] + ["verdicts"] * (args.disc == "reason")} if FIRST else {}
    if not args.resume:
        args.track_id = secrets.token_hex(4)
        save(out_dir, first_step, players, judge, baseline, stream, files.values())
    write_args(out_dir, args, device)
    signals, tracker = Signals(), Tracker(args, out_dir)  # from here on the run can be resumed
    size = sum(p.numel() for p in {*generator.params, *discriminator.params})
    print(f"{out_dir}: {args.model} on {device}, {size:,} trained parameters", flush=True)

    # the floor: what the untrained base writes for the very prefixes that the run will end with
    total = args.num_steps * B
    num_floor = min(args.floor_sequences, total)
    if num_floor and len(read_lines(out_dir / "floor.jsonl")) != num_floor:
        records = writer.floor(stream, range(total - num_floor, total), signals, out_dir)
        if FIRST:
            write_whole(out_dir / "floor.jsonl", json_lines(records))

    # -----------------------------------------------------------------------------
    # the loop; steps below 0 warm up the discriminator alone, on windows that follow the run's own
    started = time.perf_counter()
    for step in range(first_step, args.num_steps):
        t0, lr_factor = time.perf_counter(), 1 - max(step, 0) / args.num_steps  # linear decay, after the warm-up

        # sample: thinking and completion for each prefix
        first = step * B if step >= 0 else total + (step + args.d_warmup) * B
        batch = [stream[i] for i in range(first, first + B)]
        samples = writer.write(batch, generator.adapter, "rollout", first)
        roll, t1 = samples.roll, time.perf_counter()

        # reward: how real the discriminator finds each completion, times its length score. An empty completion is not
        # judged and earns 0; one whose verdict cannot be parsed is left out of the generator's step. So judged has
        # three sets of rows: shown (not empty), counts (in the generator's step), read (p_real is known)
        discriminator.activate()
        judged = judge.score(batch, samples.texts, first)
        lengths = torch.tensor([length_score(n, C) for n in samples.sizes], device=device)  # (B,)
        reward = generator_reward(judged, lengths, args.g_reward, args.d_scale)  # (B,)
        row = dict(step=step, reward=reward[judged.counts].mean().item(), length_score=lengths.mean().item(),
                   **batch_metrics(samples, judged, [writer.encode(text)[0] for text in samples.texts]))

        # generator step: REINFORCE against the baseline from before this batch, plus the KL to the base
        if step >= 0:
            generator.activate()
            advantage, g_loss, parts = baseline.advantages(reward, judged.counts), 0.0, []  # (B,)
            # mine: this process's share of the rows; everyone: the shares of all. One process has them all
            for rows in micro_batches(mine(range(B)), args.micro_batch):
                part = sampled_stats(generator.model, roll, rows, writer.rules, args.temperature, with_kl)  # (N,) each
                sizes, drawn = roll.sampled[rows].sum(1), roll.logps[rows][roll.sampled[rows]]  # (b,), (N,)
                ratio = truncated_ratio(part.logp, drawn, args.tis)  # (N,) 1 unless --tis is given
                weights = ratio * advantage[rows].repeat_interleave(sizes)  # (N,)
                loss = policy_loss(part.logp, part.kl, weights, args.kl_coef, B * (R + C))  # ()
                generator.backward(loss)
                if args.ce_coef:  # teacher forcing: the truth after the same thinking, with a weight that decays
                    true = writer.truth_logps(generator.model, [batch[i] for i in rows], [roll.think[i] for i in rows])
                    generator.backward(-args.ce_coef * lr_factor * torch.cat(true).sum() / (B * C))
                g_loss += loss.item()
                parts.append([x.detach() for x in part])
            stats = TokenStats(*map(everyone, map(torch.cat, zip(*parts))))  # (N,) each
            row |= dict(baseline=baseline.used, advantage_sd=advantage[judged.counts].std(correction=0).item(),
                        g_loss=sum(everyone([g_loss])), g_grad_norm=generator.step(lr_factor),
                        **policy_metrics(stats, roll, with_kl))

        # discriminator step: its loss on the real and the generated text of every prefix shown
        discriminator.activate()
        d_loss, right = 0.0, torch.zeros(2)  # (2,) real, generated
        for rows in micro_batches(mine(judged.shown), args.micro_batch):
            loss, num_right = judge.loss(judged, rows)  # (), (2,)
            discriminator.backward(loss)
            d_loss += loss.item()
            right += num_right
        d_grad_norm = discriminator.step(lr_factor)
        d_loss, right = sum(everyone([d_loss])), sum(everyone([right]))
        d_acc_real, d_acc_generated = (right / max(len(judged.shown), 1)).tolist()
        t2 = time.perf_counter()

        # log
        skipped = [row.get("g_grad_norm", 0), d_grad_norm].count(None)  # an update is skipped where the norm is None
        row |= dict(d_loss=d_loss, d_acc_real=d_acc_real, d_acc_generated=d_acc_generated, d_grad_norm=d_grad_norm,
                    g_lr=args.g_lr * lr_factor, d_lr=args.d_lr * lr_factor, skipped=skipped, seconds=t2 - t0,
                    sample_seconds=t1 - t0, update_seconds=t2 - t1, memory_gb=memory_gb(device),
                    tokens_per_second=samples.num_sampled / (t2 - t0))
        if step >= 0:
            d_metrics, verdicts = judge.metrics(judged, step)
            paid, p_real = reward.where(judged.counts, torch.nan), judged.p_real.where(judged.read, torch.nan)  # (B,)
            records = writer.records([step] * B, batch, samples, paid, p_real)
            for name, lines in dict(metrics=[row | d_metrics], rollouts=records, verdicts=verdicts).items():
                if name in files:  # verdicts are there with --disc reason only
                    files[name].write(json_lines(lines))
            tracker.log(step, row | d_metrics, records[:8])
        left = (t2 - started) / (step - first_step + 1) * (args.num_steps - step - 1)
        print(progress(row, args, left), flush=True)

        # save; after a skipped update the last good checkpoint stays until the run stops or ends
        due = args.save_every and (step + 1) % args.save_every == 0 and not skipped
        stop = signals.stop()
        if stop or step + 1 == args.num_steps or due:
            save(out_dir, step + 1, players, judge, baseline, stream, files.values())
        if stop:
            signals.leave(f"after step {step}", out_dir)

    # -----------------------------------------------------------------------------
    # MAUVE of the last sequences, beside the floor and a ceiling
    for file in files.values():
        file.close()
    signals.restore()
    leave()  # the first process goes on
    if args.seeds:
        result = evaluate(out_dir, args.featurizer, args.seeds, generator.model, tokenizer, device)
        tracker.log(args.num_steps, result)
    tracker.finish()
    plot_runs([Run(out_dir)], out_dir / "training.png")
