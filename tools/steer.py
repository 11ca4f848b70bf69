"""
Steering in place of training: add to one layer of the base, while it samples, the mean difference of its states between
real and generated texts, and measure MAUVE by layer and strength, beside the game's.

    python -m tools.steer out/demo-1                                 # every layer, strengths 0.5, 1, 2 and 4
    python -m tools.steer out/demo-1 --layers 2 --strengths 1 1.5

The first half of the run's floor gives the differences; on the prefixes of the second half the steered base writes, and
its texts, the base's and the run's last ones are compared with the truths. A table is printed, and steer.json written.
"""
import json

from flags import Parser, UserError, check_device, write_whole


def flags():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("run", help="folder of a finished run that has a floor, out/NAME")
    add("--layers", type=int, nargs="+", default=None, help="layers to steer, the first is 1 (default: each)")
    add("--strengths", type=float, nargs="+", default=[0.5, 1.0, 2.0, 4.0], help="factors on the difference")
    add("--device", default=None, help="cuda, cuda:1, cpu, ... (default: as in the run)")
    return parser


if __name__ == "__main__":
    args = flags().parse_args()

import torch
from tqdm import tqdm

from checkpoint import explain_failures, pin
from data import Window
from evaluate import column, read_run
from measures import featurizer, mauve_of
from model import backbone, causal_lm, checked_device, load_model, micro_batches, pad
from rollout import Writer
from sampler import Sampler


def layers_of(model):
    """The decoder's layers, in order."""
    num = causal_lm(model).config.get_text_config().num_hidden_layers
    return next(x for x in backbone(model).modules() if isinstance(x, torch.nn.ModuleList) and len(x) == num)


@torch.no_grad()
def mean_states(model, writer, records, key, batch_size=32):
    """Mean states (L, H) of all completion tokens after each layer, with records[key] as the completion."""
    total, count = 0.0, 0
    for part in micro_batches([record for record in records if record[key]], batch_size):
        rows = [writer.truth_ids(Window(r["prefix"], r["sep"], r[key]), writer.encode(r["think"] or "")[0])
                for r in part]
        ids = pad([before + text for before, text in rows], writer.rules.pad, model.device)  # (b, T)
        mask = pad([[0] * len(before) + [1] * len(text) for before, text in rows], 0, ids.device, torch.bool)  # (b, T)
        states = backbone(model)(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states[1:]
        total = total + torch.stack([x[mask].float().sum(0) for x in states])  # (L, H)
        count += mask.sum()
    return total / count  # (L, H)


class Steering:
    """A vector (H,) that is added to a layer's output wherever one token is read: in the reply, not in the prompt."""

    def __init__(self, model):
        self.layers, self.handle = layers_of(model), None
        self.vector = torch.zeros(model.config.get_text_config().hidden_size, device=model.device, dtype=model.dtype)

    def set(self, layer, vector):
        if self.handle:
            self.handle.remove()
        self.vector.copy_(vector)
        self.handle = self.layers[layer - 1].register_forward_hook(self.add)

    def add(self, layer, inputs, output):
        hidden = output[0] if isinstance(output, tuple) else output  # (B, T, H)
        if hidden.shape[1] > 1:
            return output
        return (hidden + self.vector, *output[1:]) if isinstance(output, tuple) else hidden + self.vector


def main(args):
    run = read_run(args.run)
    if len(run.floor) < 100:
        raise UserError(f"{args.run} has {len(run.floor)} texts of the base to learn from, and 100 are needed; give a "
                        "run with --floor_sequences 100 or more")
    check_device(args.device or run.args.device)
    explain_failures()
    pin(run.args)
    device = checked_device(args.device or run.args.device)
    model, tokenizer = load_model(run.args.model, run.args.quant, run.args.dtype, device)
    wanted = args.layers or [*range(1, len(layers_of(model)) + 1)]
    if not 1 <= min(wanted) <= max(wanted) <= len(layers_of(model)):
        raise UserError(f"--layers {' '.join(map(str, wanted))}: this model has layers 1 to {len(layers_of(model))}")
    sampler = Sampler(model, run.args.merge)
    writer, steering = Writer(sampler, tokenizer, run.args), Steering(sampler.model)
    half = len(run.floor) // 2
    known, rest, ends = run.floor[:half], run.floor[half:], run.rollouts[-(len(run.floor) - half):]
    difference = mean_states(model, writer, known, "truth") - mean_states(model, writer, known, "completion")  # (L, H)
    features = featurizer(run.args.featurizer, model, tokenizer, device)
    windows = [Window(r["prefix"], r["sep"], r["truth"]) for r in rest]

    def measured(texts):
        return mauve_of(features(column(rest, "truth")), features(texts), range(run.args.seeds or 5))

    found = {"base": measured(column(rest, "completion")), "game": measured(column(ends, "completion"))}
    settings = [(layer, strength) for layer in wanted for strength in args.strengths]
    for layer, strength in tqdm(settings):
        steering.set(layer, strength * difference[layer - 1])
        texts = [text for i in range(0, len(windows), 32)
                 for text in writer.write(windows[i:i + 32], None, "steer", i).texts]
        found[f"layer {layer}, strength {strength:g}"] = measured(texts) | {"sample": texts[0]}
    write_whole(run.folder / "steer.json", json.dumps(found, indent=2) + "\n")
    for name, score in found.items():
        low, high = score["interval"] or (float("nan"), float("nan"))
        print(f"{name:28s}{score['mauve']:.3f}   95 % {low:.3f} to {high:.3f}")


if __name__ == "__main__":
    main(args)
