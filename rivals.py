"""
What a user would pick instead of our log-probs and our step, doing the same work, for bench.py: plain torch,
torch.nn.functional.linear_cross_entropy, and TRL, as far as they are installed.

What differs from the textbook: a step of TRL's is timed inside its own loop, between its on_step_begin and its
on_step_end, so without loading, logging and saving; after each of them comes one of ours.

Letters: N positions, V vocabulary, H hidden.
"""
import importlib.util
import tempfile

from clock import Clock, Peak, in_turn, now, peak_of, ratio, timed

import torch
from peft import LoraConfig
from torch.nn import functional as F
from transformers import PrinterCallback, TrainerCallback

from model import token_logps
from rollout import COMPLETION
from workload import GRAD_CLIP, KL_COEF, LR, Players, generator_step, numbers, twin

HAS_TRL = importlib.util.find_spec("trl") is not None
CHUNK = 1 << 26  # bytes of the fp32 logits that F.linear_cross_entropy holds, as ours does
HAS_FUSED = hasattr(F, "linear_cross_entropy")  # from torch 2.13 on


# -----------------------------------------------------------------------------
# log-probs with gradient

class Head(torch.nn.Linear):
    """An output layer that token_logps takes for a model."""

    def get_output_embeddings(self):
        return self


def logps_variants(head, targets):
    """Name to function of hidden states (N, H) that returns the targets' log-probs (N,)."""
    blocked = torch.zeros(2, len(head.weight), dtype=torch.bool, device=targets.device)  # (2, V)
    kind = torch.full_like(targets, COMPLETION)  # (N,)

    def plain(hidden):
        logps = head(hidden).float().log_softmax(-1)  # (N, V)
        return logps.gather(1, targets[:, None])[:, 0]  # (N,)

    variants = {"ours": lambda hidden: token_logps(head, hidden, targets, blocked, kind).logp, "plain": plain}
    if HAS_FUSED:
        rows = max(16, CHUNK // (4 * len(head.weight)))  # its own choice, 8 at Qwen3's vocabulary, is 6 times slower
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows, chunking_method=None)
        variants["F.linear_cross_entropy"] = lambda hidden: -F.linear_cross_entropy(
            hidden, head.weight, targets, reduction="none", options=options)  # (N,)
    if HAS_TRL:
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer.utils import selective_log_softmax
        width, outputs = 32768, ("log_probs", "entropy")  # as GRPOTrainer calls it
        variants["TRL selective_log_softmax"] = lambda hidden: selective_log_softmax(head(hidden), targets)  # (N,)
        variants["TRL chunked"] = lambda hidden: ChunkedLogProbFunction.apply(
            hidden, head.weight, None, targets, 1.0, width, None, 1.0, outputs)[0]  # (N,)
    return variants


def compare_logps(N, V, H, dtype, repeats, device):
    """Time, memory, and difference from the plain one, of forward and backward; the loss weighs positions unequally."""
    random = torch.Generator(device).manual_seed(0)
    head = Head(H, V, bias=False, device=device, dtype=dtype).requires_grad_(False)
    states = torch.randn(N, H, device=device, generator=random).to(dtype)  # (N, H)
    targets = torch.randint(V, (N,), device=device, generator=random)  # (N,)
    weights = torch.randn(N, device=device, generator=random)  # (N,)
    variants, found = logps_variants(head, targets), {}

    def call(name):
        hidden = states.clone().requires_grad_()  # (N, H)
        logp = variants[name](hidden)  # (N,)
        (logp * weights).sum().backward()
        found[name] = logp.detach().float(), hidden.grad.float()  # (N,), (N, H)

    calls = {name: lambda name=name: call(name) for name in variants}
    gradients = 2 * states.nbytes / 2**30  # the leaf and its gradient, which each call makes
    memory = {name: peak_of(each, device) - gradients for name, each in calls.items()}  # warms them up, too
    seconds = in_turn(calls, repeats, device)
    want_logp, want_grad = found["plain"]
    others = [name for name in variants if name != "ours"]
    return {"N": N, "V": V, "H": H, "seconds": seconds, "memory_gib": memory,
            "ratio": {name: ratio(seconds["ours"], seconds[name]) for name in others},
            "memory_ratio": {name: memory["ours"] / memory[name] for name in others},
            "logp_difference": {name: (logp - want_logp).abs().max().item() for name, (logp, _) in found.items()},
            "gradient_difference": {name: ((grad - want_grad).norm() / want_grad.norm()).item()
                                    for name, (_, grad) in found.items()}}


# -----------------------------------------------------------------------------
# a whole step

class InTurn(TrainerCallback):
    """Times TRL's steps and, after each, one of ours: two to warm up, the second of them for the memory."""

    def __init__(self, ours, device):
        self.ours, self.device, self.seconds, self.memory = ours, device, {"ours": [], "TRL": []}, {}

    def on_step_begin(self, config, state, control, **rest):
        self.peak = Peak(self.device).__enter__() if state.global_step == 1 else None
        self.start = now(self.device)

    def on_step_end(self, config, state, control, **rest):
        took = now(self.device) - self.start
        if self.peak:
            self.peak.__exit__(None, None, None)
            self.memory = {"ours": peak_of(self.ours, self.device), "TRL": self.peak.gib}
            return
        own = timed(self.ours, self.device)
        if state.global_step > 2:
            self.seconds["TRL"].append(took)
            self.seconds["ours"].append(own)


def compare_steps(base, work, rank, alpha, dtype, repeats, device):
    """A whole step, ours and GRPOTrainer's: rewards of 0 and 1, no discriminator, the KL on, one update a batch."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    players, drawn = Players(base, "generator", "generator", rank, alpha, work, device), {}
    rewards = torch.arange(work.B, device=device) % 2.0  # (B,)

    def ours():
        roll = players.sample()
        generator_step(players, roll, rewards, Clock(device))
        drawn["ours"] = roll.sampled.sum().item()

    def reward(completion_ids, **rest):
        drawn["TRL"] = sum(map(len, completion_ids))
        return rewards.tolist()

    timer = InTurn(ours, device)
    lora = LoraConfig(r=rank, lora_alpha=alpha, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    texts = [" ".join(map(str, prompt)) for prompt in players.prompts[::2]]
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            folder, per_device_train_batch_size=work.B, num_generations=2, max_completion_length=work.R + work.C,
            max_steps=2 + repeats, beta=KL_COEF, temperature=1.0, top_p=1.0, top_k=0, learning_rate=LR,
            max_grad_norm=GRAD_CLIP, use_cpu=device.type == "cpu", bf16=dtype == torch.bfloat16, shuffle_dataset=False,
            activation_checkpointing=False, logging_strategy="no", save_strategy="no", report_to="none",
            logging_nan_inf_filter=False, disable_tqdm=True)
        trainer = GRPOTrainer(twin(base), reward, config, Dataset.from_dict({"prompt": texts}), callbacks=[timer],
                              processing_class=numbers(players.vocab), peft_config=lora)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return {**work._asdict(), "drawn": drawn, "forced": work.B, "seconds": timer.seconds, "memory_gib": timer.memory,
            "ratio": ratio(timer.seconds["ours"], timer.seconds["TRL"])}
