"""
Sampling by a vLLM server that the user has started, in place of sampler.Sampler: `--sampler URL`, see docs/scale.md.

What differs from the textbook:
1. Each version of an adapter gets a new name and a new folder. vLLM's prefix cache knows an adapter by these two, and
   would serve states of old weights under a name that it has seen.
2. A row takes two requests, for the thinking and for the completion, because other ids are forbidden in each.
3. What the server draws is a function of the row's key, as at home, as far as the server keeps to a request's seed.
"""
import concurrent.futures
import itertools
import json
import os
import pathlib
import shutil
import tempfile
import urllib.error
import urllib.request
from typing import NamedTuple

import torch

from flags import UserError, first_line
from model import causal_lm
from ranks import FIRST, agreed, everyone
from rollout import COMPLETION, THINKING, Rules, rng_for

MOST_REQUESTS = 256  # at a time
TIMEOUT = 1800       # seconds for one request


class Served:
    """The generator's model on a server; the learner's, `source`, gives it its adapters."""

    def __init__(self, url, model):
        self.url, self.source, self.model = url.rstrip("/"), model, causal_lm(model)
        self.base = self.call("/v1/models")["data"][0]["id"]
        self.name, self.versions = self.base, itertools.count(1)
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="forger-adapters-"))
        self.pool = concurrent.futures.ThreadPoolExecutor(MOST_REQUESTS)

    def call(self, path, body=None):
        """What the server answers, from JSON; None where it answers in words."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise UserError(f"--sampler {self.url}{path}: status {error.code}, {error.read(300).decode()}", 1) from None
        except (OSError, ValueError) as error:
            raise UserError(f"--sampler {self.url} does not answer ({first_line(error)}); start the server as "
                            "docs/scale.md says", 1) from None
        return json.loads(text) if text[:1] == b"{" else None

    def sync(self, adapter):
        """Give the server an adapter's weights as they are now; None: the bare base."""
        old, self.name = self.name, self.base
        if adapter is not None:
            self.name = agreed(f"forger-{os.getpid()}-{next(self.versions)}")
            if FIRST:
                self.source.save_pretrained(self.folder / self.name, selected_adapters=[adapter],
                                            save_embedding_layers=False)
                path = self.folder / self.name / adapter
                self.call("/v1/load_lora_adapter", {"lora_name": self.name, "lora_path": str(path.resolve())})
            everyone([])  # the others ask for it when it is there
        if old != self.base and FIRST:
            self.call("/v1/unload_lora_adapter", {"lora_name": old})
            shutil.rmtree(self.folder / old)

    def release(self):
        pass

    def complete(self, prompt, seed, budget, stop, blocked, temperature):
        """Ids of one completion, a stop id included, and their log-probs."""
        answer = self.call("/v1/completions", dict(
            model=self.name, prompt=prompt, max_tokens=budget, temperature=temperature, seed=seed, top_p=1.0, top_k=0,
            logprobs=0, return_token_ids=True, detokenize=False, ignore_eos=True, stop_token_ids=stop,
            logit_bias=blocked))
        choice = answer["choices"][0]
        return choice["token_ids"], choice["logprobs"]["token_logprobs"]

    def replies(self, prompts, rules, reasoning_tokens, completion_tokens, temperature, keys):
        """What rollout.Reply holds at its end, for B prompts."""
        close, stop, end = rules.close.tolist(), rules.stop.tolist(), rules.think_end
        rows = torch.ones(2, self.model.config.get_text_config().vocab_size, dtype=torch.bool)  # (2, V)
        rows[:, :rules.blocked.shape[1]] = rules.blocked
        blocked = [{str(i): -100 for i in row.nonzero()[:, 0].tolist()} for row in rows]

        def one(prompt, key):
            """Ids, log-probs, and marks of what is sampled and of what is thinking."""
            seeds, think, logps = torch.randint(2 ** 31, (2,), generator=rng_for(*key)).tolist(), [], []
            if reasoning_tokens:
                think, logps = self.complete(prompt, seeds[0], reasoning_tokens, [end] if end >= 0 else [],
                                             blocked[THINKING], temperature)
            forced = close[think[-1:] == [end]:]
            reply, more = self.complete(prompt + think + forced, seeds[1], completion_tokens, stop, blocked[COMPLETION],
                                        temperature)
            ids, n = think + forced + reply, len(forced)
            return ids, logps + [0.0] * n + more, [True] * len(think) + [False] * n + [True] * len(reply), len(think)

        written = Written(rules, {key: torch.zeros(len(prompts), reasoning_tokens + len(close) + completion_tokens,
                                                   dtype=dtype) for key, dtype in dict(
            ids=torch.long, alive=torch.bool, sampled=torch.bool, thinking=torch.bool, logps=torch.float).items()},
            torch.zeros(len(prompts), dtype=torch.bool), torch.zeros(len(prompts), dtype=torch.bool))
        for i, (ids, logps, sampled, num_think) in enumerate(self.pool.map(one, prompts, keys)):
            n = len(ids)
            for name, values in dict(ids=ids, alive=True, sampled=sampled, logps=logps).items():
                written.out[name][i, :n] = torch.as_tensor(values, dtype=written.out[name].dtype)  # (n,)
            written.out["thinking"][i, :num_think] = True
            written.think_closed[i] = ids[num_think - 1:num_think] == [end]
        return written


class Written(NamedTuple):
    rules: Rules
    out: dict  # tensors (B, budget)
    think_closed: torch.Tensor  # (B,)
    broken: torch.Tensor        # (B,)
