"""
Sampling by a vLLM server that the user has started, in place of sampler.Sampler: `--sampler URL`, see docs/scale.md.

What differs from a plain client:
1. Each version of an adapter gets a new name and a new folder. vLLM's prefix cache knows an adapter by these two, and
   would serve states of old weights under a name that it has seen.
2. A row takes two requests, one for the thinking and one for the completion, because each forbids other ids.
3. A request's seed is a function of the row's key, so that a row's text does not depend on what is sampled beside it,
   as far as the server's arithmetic allows.
"""
import atexit
import concurrent.futures
import contextlib
import http.client
import json
import pathlib
import shutil
import tempfile
import urllib.error
import urllib.request

import torch

from flags import UserError, first_line
from model import causal_lm
from ranks import FIRST, agreed
from rollout import COMPLETION, THINKING, Written, rng_for

MAX_REQUESTS = 256  # in flight at once
TIMEOUT = 1800      # seconds for one request


class NoAnswer(Exception):
    """The server refused a request, or is not there."""


@contextlib.contextmanager
def explained(status=1):
    """Ends the run in one line, however many requests failed at a time."""
    try:
        yield
    except NoAnswer as error:
        raise UserError(error, status, own=True) from None


class Served:
    """The generator on a server, whose adapters come from `source`, the model that learns."""

    @explained(2)
    def __init__(self, url, source):
        self.url, self.source, self.model, self.version = url.rstrip("/"), source, causal_lm(source), 0
        self.name = self.base = self.ask("/v1/models", lambda answer: answer["data"][0]["id"])
        self.folder = pathlib.Path(agreed(FIRST and tempfile.mkdtemp(prefix="forger-adapters-")))
        self.pool = concurrent.futures.ThreadPoolExecutor(MAX_REQUESTS)
        atexit.register(self.end)

    def end(self):
        """Leave no adapter behind, on the server or on the disk."""
        with contextlib.suppress(NoAnswer):
            if FIRST and self.name != self.base:
                self.ask("/v1/unload_lora_adapter", lora_name=self.name)
        shutil.rmtree(self.folder, ignore_errors=True)

    def ask(self, path, read=str, **body):
        """read(answer), where the answer is parsed if it is JSON. Without a body a GET, else a POST."""
        request = urllib.request.Request(self.url + path, json.dumps(body).encode() if body else None,
                                         {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                text = response.read().decode()
            return read(json.loads(text) if text.startswith("{") else text)
        except urllib.error.HTTPError as error:
            reason = error.read(300).decode(errors="replace")
            raise NoAnswer(f"--sampler {self.url}: {path} was refused ({error.code}: {reason}); start the server as "
                           "docs/scale.md says") from None
        except (OSError, http.client.HTTPException) as error:
            raise NoAnswer(f"--sampler {self.url} does not answer ({first_line(error)}); start it as docs/scale.md "
                           "says; a run that had begun can be resumed") from None
        except (ValueError, LookupError, TypeError) as error:
            raise NoAnswer(f"--sampler {self.url}: what it answers to {path} is not a vLLM server's "
                           f"({type(error).__name__}: {first_line(error)}); start one as docs/scale.md says") from None

    @explained()
    def sync(self, adapter):
        """Hand the server an adapter's weights as they are now; None: the bare base."""
        before, self.name = self.name, self.base
        if adapter is not None:
            self.version += 1
            self.name = f"{self.folder.name}-{self.version}"  # the folder's name is random, so no other run has it
            if FIRST:
                place = self.folder / self.name
                self.source.save_pretrained(place, selected_adapters=[adapter], save_embedding_layers=False)
                self.ask("/v1/load_lora_adapter", lora_name=self.name, lora_path=str((place / adapter).resolve()))
            agreed(None)  # nobody asks for it before it is there
        if before != self.base and FIRST:
            self.ask("/v1/unload_lora_adapter", lora_name=before)
            shutil.rmtree(self.folder / before)

    def release(self):
        """Nothing to free: the server holds the cache."""

    @explained()
    def write(self, prompts, settings, keys):
        """Replies to B prompts, as Written."""
        rules, reasoning_tokens, completion_tokens, temperature = settings
        close, stop, end = rules.close.tolist(), rules.stop.tolist(), rules.think_end
        forbidden = torch.ones(2, self.model.config.get_text_config().vocab_size, dtype=torch.bool)  # (2, V)
        forbidden[:, :rules.blocked.shape[1]] = rules.blocked
        bias = [{id_: -100 for id_ in row.nonzero()[:, 0].tolist()} for row in forbidden]

        def drawn(answer):
            choice = answer["choices"][0]
            return choice["token_ids"], choice["logprobs"]["token_logprobs"]

        def draw(prompt, kind, seed, budget, stop):
            """Ids of at most `budget` tokens, a stop id included, and their log-probs."""
            return self.ask(
                "/v1/completions", drawn, model=self.name, prompt=prompt, seed=seed, temperature=temperature, top_p=1.0,
                top_k=0, max_tokens=budget, stop_token_ids=stop, ignore_eos=True, logit_bias=bias[kind], logprobs=0,
                return_token_ids=True)

        def reply(prompt, key):
            seeds, think, think_logps = torch.randint(2 ** 31, (2,), generator=rng_for(*key)).tolist(), [], []
            if reasoning_tokens:
                think, think_logps = draw(prompt, THINKING, seeds[0], reasoning_tokens, [end] if end >= 0 else [])
            closed = think[-1:] == [end]
            forced = close[closed:]  # the first id of the closing is </think>, which the model has drawn
            text, text_logps = draw(prompt + think + forced, COMPLETION, seeds[1], completion_tokens, stop)
            t, f, c = len(think), len(forced), len(text)
            return Written(think + forced + text, [True] * t + [False] * f + [True] * c, [True] * t + [False] * (f + c),
                           think_logps + [0.0] * f + text_logps, closed, False)

        return list(self.pool.map(reply, prompts, keys))
