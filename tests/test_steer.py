"""tools/steer.py: the vector against plain passes, and that it acts on the reply alone."""
import torch

from conftest import run_script
from data import Window, prompt_template
from rollout import Writer
from sampler import Sampler
from tools.steer import Steering, layers_of, mean_states
from train import parse_flags


def test_the_vector_is_the_difference_of_mean_states_and_a_strength_of_zero_changes_nothing(demo):
    model, tokenizer = demo
    args = parse_flags("--preset demo --completion_tokens 12 --echo_tokens 0".split())
    args.prompt = prompt_template(args.prompt, tokenizer)
    writer = Writer(Sampler(model), tokenizer, args)
    rows = [dict(prefix="def f(", sep="", truth="x): pass", think="a b", completion=""),
            dict(prefix="The sum of", sep=" ", truth="all parts.", think="", completion="x")]
    states = []
    for row in rows:
        before, truth = writer.truth_ids(Window(row["prefix"], row["sep"], row["truth"]), writer.encode(row["think"])[0])
        hidden = model.model(torch.tensor([before + truth]), output_hidden_states=True).hidden_states  # L + 1 of (1, T, H)
        states.append(torch.stack([x[0, len(before):] for x in hidden[1:]]))  # (L, n, H)
    wanted = torch.cat(states, 1).mean(1)  # (L, H)
    torch.testing.assert_close(mean_states(model, writer, rows, "truth"), wanted, atol=1e-4, rtol=1e-4)
    windows = [Window(row["prefix"], row["sep"], row["truth"]) for row in rows]
    plain, steering = writer.write(windows, None, "x", 0), Steering(writer.sampler.model)
    for strength, same in ((0.0, True), (50.0, False)):
        steering.set(2, strength * wanted[1])
        assert (writer.write(windows, None, "x", 0).texts == plain.texts) == same
    assert len(layers_of(model)) == 4 and sum(len(layer._forward_hooks) for layer in layers_of(writer.sampler.model)) == 1


def test_a_run_without_a_floor_is_one_line(finished, tmp_path):
    ended = run_script("tools/steer.py", finished[0])
    assert ended.status == 2 and "100 are needed" in ended.err and ended.err.count("\n") == 1
