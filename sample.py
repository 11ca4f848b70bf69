"""
Try a run, or a bare model: a prefix in, thinking and completions out.

$ python sample.py out/demo-1 --prefix "Return the number of"     # five completions by the trained generator
$ python sample.py out/demo-1 --prefix "$(cat a.txt)" --both      # base and trained model side by side
$ python sample.py out/demo-1 --prefix "Return" --best_of 8       # the best of 8, by the discriminator
$ python sample.py out/demo-1                                     # type prefixes; an empty line ends it
$ python sample.py Qwen/Qwen3-0.6B --prefix "Return" --device cpu # a model without a run
"""
import pathlib

from flags import Parser, Run, UserError, check_device, check_temperature, first_line, readable
from train import parse_flags


def prefixes(text):
    """The prefix of the command line, or those that are typed, until an empty line."""
    while text is None:
        try:
            line = input("prefix> ")
        except EOFError:
            return
        if not line.strip():
            return
        yield line
    yield text


if __name__ == "__main__":
    parser = Parser(__doc__)
    add = parser.add_argument
    add("source", help="folder of a run, or a model: hub id, folder, demo, demo-small")
    add("--prefix", default=None, help="text to continue (default: ask for it)")
    add("--num", type=int, default=5, help="completions to print")
    add("--both", action="store_true", help="sample from the base model, then from the trained one")
    add("--best_of", type=int, default=1, help="completions to choose from: the discriminator's choice is printed")
    add("--temperature", type=float, default=None, help="sampling temperature (default: the run's)")
    add("--prompt", default=None, help="writeup, plain, chat, or a file that holds {text} (default: the run's)")
    add("--seed", type=int, default=0, help="seed of sampling")
    add("--device", default=None, help="cuda, cpu, ... (default: the run's; cpu for the embedded models)")
    flags = parser.parse_args()
    is_run = (pathlib.Path(flags.source) / "args.json").exists()
    for wrong, message in (
        (flags.num < 1 or flags.best_of < 1, "--num and --best_of must be 1 or more"),
        (flags.prefix is not None and not flags.prefix.strip(), "--prefix is empty; give some text"),
        (not is_run and (flags.both or flags.best_of > 1), f"--both and --best_of need a run; {flags.source} is none"),
    ):
        if wrong:
            raise UserError(message)
    if is_run:
        run = Run(flags.source)
        args = run.args
        if flags.prompt == "plain":
            args.reasoning_tokens = args.echo_tokens = 0
    else:
        embedded = flags.source in ("demo", "demo-small")
        args = parse_flags(["--preset", "demo" if embedded else "writeup", "--model", flags.source,
                            *(["--prompt", flags.prompt] if flags.prompt else [])])
    for name in ("temperature", "seed", "device"):
        if getattr(flags, name) is not None:
            setattr(args, name, getattr(flags, name))
    check_device(args.device)
    check_temperature(args.temperature)

    import torch

    from checkpoint import explain_failures, latest, load_run, load_weights
    from data import Window, clean, prompt_template
    from discriminator import make_judge
    from model import DAMAGE, checked_device, load_players
    from rollout import Writer, probe
    from sampler import Sampler

    explain_failures()
    device = checked_device(args.device)
    generator, discriminator = load_run(run, device) if is_run else load_players(args, device)
    args.prompt = prompt_template(flags.prompt or args.prompt, generator.tokenizer)
    sampler = Sampler(generator.model, args.merge)
    writer = Writer(sampler, generator.tokenizer, args)
    judge = make_judge(args, discriminator, sampler) if flags.best_of > 1 else None
    if judge:
        try:
            load_weights(latest(run.folder), [], judge)
        except DAMAGE as error:
            raise UserError(f"{run.folder} has no usable discriminator: {first_line(error)}") from None
    players = {"base": None, "trained": generator.adapter}
    if not flags.both:
        players = {"trained": generator.adapter} if is_run else {"base": None}

    for asked, text in enumerate(prefixes(flags.prefix)):
        prefix = clean(text.rstrip())
        sep = text[len(prefix):] or " "
        generator.check_length(len(writer.prompt_ids(prefix)) + writer.max_reply)
        if not asked and not is_run:  # a run has been checked already
            args.micro_batch = 1
            with torch.no_grad():
                probe(writer, generator, [Window(prefix, sep, prefix)] * 3)
        written = {}  # name of a player to its samples and, with --best_of, their p_real
        for name, adapter in players.items():
            windows = [Window(prefix, sep, "")] * flags.num * flags.best_of
            samples, p_real = writer.write(windows, adapter, "sample", asked * len(windows)), None
            if judge:  # it reads a completion beside a truth of the same length: here the completion itself
                discriminator.activate()
                windows = [window._replace(truth=text) for window, text in zip(windows, samples.texts)]
                p_real = judge.score(windows, samples.texts, 0).p_real.tolist()
            written[name] = samples, p_real
        for number in range(flags.num):  # base and trained side by side
            rows = range(number * flags.best_of, (number + 1) * flags.best_of)
            for name, (samples, p_real) in written.items():
                i = max(rows, key=p_real.__getitem__) if judge else number
                note = f", p_real {p_real[i]:.2f}, best of {flags.best_of}" if judge else ""
                think = writer.decode(samples.roll.think[i]).strip()
                print(f"--- {name} {number + 1}{note}")
                print(readable((f"<think> {think} </think>\n" if think else "") + samples.texts[i]), "\n", flush=True)
