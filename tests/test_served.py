"""The client of a vLLM server against a stand-in that answers as scripted: what it asks for, and what it makes of it."""
import http.server
import json
import threading

import pytest
import torch

from flags import UserError
from rollout import COMPLETION, THINKING, rollout, rules
from served import NoAnswer, Served


class StandIn(http.server.BaseHTTPRequestHandler):
    """Replies with ids from `script`, one list a request, in the order of the prompts; notes what it was asked."""

    def do_GET(self):
        self.reply({"data": [{"id": "base"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body))
        if self.server.refuses in self.path:
            return self.reply({"error": "no such thing"}, 400)
        if "lora" in self.path:
            return self.reply("Success")
        ids = self.server.script(body)
        self.reply({"choices": [{"token_ids": ids, "logprobs": {"token_logprobs": [-0.5] * len(ids)}}]})

    def reply(self, content, status=200):
        self.send_response(status)
        self.end_headers()
        self.wfile.write((content if isinstance(content, str) else json.dumps(content)).encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.asked, server.refuses, server.url = [], "nothing", f"http://127.0.0.1:{server.server_port}/"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_reply_takes_two_requests_and_its_masks_fit(server, tiny):
    model, tokenizer = tiny
    rule, prompts = rules(tokenizer, model), [[5, 6, 7], [8]]
    stop, end = rule.stop[0].item(), rule.think_end
    closing, V = rule.close.tolist(), rule.blocked.shape[1]

    def script(body):  # the first row closes its thinking and stops; the second uses up both budgets
        first, thinks = body["prompt"][0] == 5, body["stop_token_ids"] == [end]
        return ([9, end] if thinks else [10, stop]) if first else ([11] * 4 if thinks else [12] * 3)

    server.script = script
    client = Served(server.url, model)
    roll = rollout(client, prompts, rule, 4, 3, 0.7, [(0, 0), (0, 1)])
    assert roll.think == [[9], [11] * 4] and roll.reply == [[10], [12] * 3] and roll.think_closed.tolist() == [True, False]
    one, two = [5, 6, 7, 9, end, *closing[1:], 10, stop], [8, *[11] * 4, *closing, 12, 12, 12]
    assert roll.ids[0, :len(one)].tolist() == one and roll.ids[1, :len(two)].tolist() == two
    forced = len(closing)
    assert roll.sampled[0].nonzero()[:, 0].tolist() == [3, 4, len(one) - 2, len(one) - 1]
    assert roll.sampled[1].nonzero()[:, 0].tolist() == [1, 2, 3, 4, *range(5 + forced, 8 + forced)]
    assert roll.thinking.sum(1).tolist() == [2, 4] and torch.equal(roll.logps, roll.sampled * -0.5)

    asked = [body for path, body in server.asked if path == "/v1/completions"]
    assert len(asked) == 4 == len({body["seed"] for body in asked})
    for body in asked:
        thinks = body["stop_token_ids"] == [end]
        kind = THINKING if thinks else COMPLETION
        assert {int(i) for i in body["logit_bias"]} >= {*rule.blocked[kind].nonzero()[:, 0].tolist()}
        assert set(body["logit_bias"].values()) == {-100} and max(map(int, body["logit_bias"])) >= V - 1
        assert body["max_tokens"] == (4 if thinks else 3) and body["temperature"] == 0.7 and body["top_k"] == 0
        assert body["model"] == "base" and body["ignore_eos"]
    again = rollout(client, prompts[::-1], rule, 4, 3, 0.7, [(0, 1), (0, 0)])  # a seed follows its key, not its place
    assert again.think[::-1] == roll.think
    assert {(b["seed"], *b["prompt"]) for _, b in server.asked[:4]} == {(b["seed"], *b["prompt"]) for _, b in server.asked[4:]}


def test_each_version_of_an_adapter_has_a_new_name_and_folder(server, tiny):
    client = Served(server.url, tiny[0])
    name = next(iter(tiny[0].peft_config))
    for adapter in (name, name, None):
        client.sync(adapter)
    (load, one), (load_2, two), (unload, gone), (unload_2, gone_2) = server.asked
    assert load == load_2 == "/v1/load_lora_adapter" and unload == unload_2 == "/v1/unload_lora_adapter"
    assert one["lora_name"] != two["lora_name"] and one["lora_path"] != two["lora_path"]
    assert [gone["lora_name"], gone_2["lora_name"]] == [one["lora_name"], two["lora_name"]]
    assert not any(client.folder.iterdir()) and client.name == "base"


def test_a_refusal_and_a_dead_server_are_one_line(server, tiny, capsys):
    client, name = Served(server.url, tiny[0]), next(iter(tiny[0].peft_config))
    server.refuses = "completions"
    with pytest.raises(UserError):  # many requests, one line
        rollout(client, [[5]] * 9, rules(tiny[1], tiny[0]), 4, 3, 1.0, [(0, i) for i in range(9)])
    assert capsys.readouterr().err.count("error: ") == 1
    server.refuses = "load_lora"
    with pytest.raises(UserError) as refused:
        client.sync(name)
    assert refused.value.code == 1 and "/v1/load_lora_adapter was refused (400" in capsys.readouterr().err
    with pytest.raises(NoAnswer, match="not a vLLM server's"):
        client.ask("/v1/models", lambda answer: answer["nothing"])
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError) as dead:
        client.sync(name)
    assert dead.value.code == 1 and "does not answer" in capsys.readouterr().err


def test_a_sampler_that_is_no_address_is_refused(train):
    ended = train("--sampler", "localhost:8000")
    assert ended.status == 2 and "--sampler localhost:8000" in ended.err and "http://" in ended.err
