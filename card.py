"""
The model card that export.py puts beside what it writes: what it is, how to use it, and each run's scores, settings and
versions. Absolute paths are cut to their last name, since a card is made to be passed on.
"""
import pathlib
import re
import shlex
import textwrap

from huggingface_hub import ModelCardData

from data import PROMPT
from flags import escaped

ROLES = {
    "generator": "the generator's adapter, trained to continue the prefix of a real text, after a little thinking, so "
                 "that a discriminator takes the continuation for the real one",
    "discriminator": "the discriminator's adapter, trained to tell real continuations from generated ones; what it has "
                     "in the run's ckpt besides (a head, or a value head) is not here",
    "shared": "one adapter in both roles, trained to continue the prefix of a real text so that it passes for real, "
              "and to tell real from generated; what it has in the run's ckpt besides is not here",
    "taught": "the generator's adapter, fine-tuned on reasoning traces and the real continuations of prefixes",
}
USE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this one
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
prompt = '''{prompt}
'''


def write(text, most, **how):
    inputs = tokenizer(text, return_tensors="pt")
    ids = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=most, **how)
    return tokenizer.decode(ids[0, inputs.input_ids.shape[1]:], skip_special_tokens=not how)


text = prompt.replace("{{text}}", "Return the number of")
{think}
print(write(text + "</think>\\n\\n", {most}))
"""
THINK = """\
stop = model.generation_config.eos_token_id
stop = stop if isinstance(stop, list) else [stop]  # forbidden while it thinks
text += write(text, {most}, suppress_tokens=stop).split("</think>")[0]"""
SCORES = (("mauve", "MAUVE, end of the run"), ("floor", "floor: the base model"),
          ("ceiling", "ceiling: other real texts"), ("fresh", "MAUVE, new samples on held-out prefixes"))


def public(text):
    """Text in one line, without the folders of absolute paths; one with a space in it is seen where it stands alone."""
    text = last_name(str(text))
    return escaped(re.sub(r"(?<![\w./~])~?/(?!/)(?:[^\s/'\"]+/)*(?=[^\s/'\"])", "", text))


def last_name(word):
    """The last name of an absolute path, also of --flag=/some/path; anything else as it is."""
    flag, equals, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
    return flag + equals + (pathlib.PurePath(value).name or value if value[:1] in ("/", "~") else value)


def block(text):
    """An indented block, which nothing in the text can end."""
    lines = textwrap.wrap(public(text), 112, break_on_hyphens=False, break_long_words=False)
    return "\n".join("    " + line for line in lines) + "\n"


def front_matter(base, on_hub, library, relation, tags):
    """What the hub reads, in YAML. A base that is a folder here has no address there, and is left out."""
    link = dict(base_model=base, base_model_relation=relation) if on_hub else {}
    data = ModelCardData(**link, library_name=library, pipeline_tag="text-generation", tags=tags)
    return f"---\n{data.to_yaml()}\n---\n"


def usage(run):
    """How to sample as the run did, with transformers alone."""
    R, C = run.get("reasoning_tokens"), run.get("completion_tokens")
    if not (isinstance(R, int) and isinstance(C, int)):
        return ""
    think = THINK.format(most=R) if R else "# no thinking: this run had none"
    return ("## Use\n\nIt was trained on this prompt: to think, and then to write. `generation_config.json` has the "
            "run's sampling: its temperature, no top-k, no top-p, its stop tokens.\n\n"
            "```python\n" + USE.format(prompt=PROMPT, think=think, most=C) + "```\n")


def scores(result):
    """What result.json says of the run's generator, as a table."""
    def number(value):
        return f"{value:.3f}" if isinstance(value, (int, float)) else "?"

    rows = []
    for key, label in SCORES:
        value, sd, interval = (result.get(name) for name in (key, f"{key}_sd", f"{key}_interval"))
        if value is not None:
            ends = interval if isinstance(interval, list) else []
            rows.append(f"| {label} | {number(value)} | {number(sd)} | {' to '.join(map(number, ends))} |\n")
    if not rows:
        return "Its generator was not measured.\n"
    counted = [f"{public(result[key])} {word}" for key, word in
               (("num_sequences", "sequences"), ("num_steps", "steps"), ("num_seeds", "seeds")) if key in result]
    return (f"Its generator: {', '.join(counted)}, features of {public(result.get('featurizer'))}.\n\n"
            "| | mean | sd over seeds | 95 % interval |\n|---|---|---|---|\n" + "".join(rows))


def role(source):
    """What an adapter was trained for: its role in a run of train.py, or `taught` of sft.py."""
    return "taught" if "mix" in source.run else source.role


def run_section(name, told, result):
    """Scores, command, settings and versions of one run, from its args.json and result.json."""
    settings = []
    for key, value in told["args"].items():
        if isinstance(value, bool):
            settings.append(f"--{key}" if value else f"--no-{key}")
        elif isinstance(value, list):
            settings.append(f"--{key} {shlex.join(last_name(str(part)) for part in value)}")
        elif value is not None and key not in ("out_dir", "resume", "digest"):
            settings.append(f"--{key} {shlex.quote(last_name(str(value)))}")
    command = shlex.join(["python", *(last_name(str(word)) for word in told.get("command") or [])])
    versions = [f"{package} {version}" for package, version in (told.get("versions") or {}).items() if version]
    commit = f"{told.get('commit') or 'unknown'}{', with uncommitted changes' if told.get('dirty') else ''}"
    return (f"## The run {public(name)}\n\n{scores(result)}\nStarted by\n\n{block(command)}\nwith, all told,\n\n"
            f"{block(' '.join(settings))}\nCommit: {public(commit)}. Device: {public(told.get('device'))}. "
            f"Versions: {public(', '.join(versions))}.\n")


def card(title, sources, base, known, method, density, merged):
    """The text of README.md for export.py's sources on a base model; known: the base's name means it elsewhere too."""
    alone = len(sources) == 1 and sources[0].weight == 1
    relation = "adapter" if not merged else "finetune" if alone else "merge"
    address, base = base, public(base)
    library, tags = ("transformers", ["forger"]) if merged else ("peft", ["forger", "lora"])
    how = "" if len(sources) == 1 else ", summed" if method == "sum" else f", merged by TIES with density {density:g}"
    text = front_matter(address, known, library, relation, tags) + f"\n# {public(title)}\n\n"
    text += f"{base} with these changes{how}:\n\n" if merged else f"An adapter for {base}, of these changes{how}:\n\n"
    for source in sources:
        text += f"- {source.weight:+g} x {public(source.name)}: {ROLES.get(role(source), 'an adapter by itself')}\n"
    quantised = [public(source.name) for source in sources if source.run.get("quant", "none") != "none"]
    if quantised and merged:
        text += (f"\n{', '.join(quantised)}: trained on quantised weights, merged into the unquantised ones, which "
                 "differ from them.\n")
    if not alone:
        text += "\nThis combination itself was not measured; the scores below are of what it is made of.\n"
    text += f"\nMade by forger's export.py. Licence: that of the base model, {base}, which is not known here.\n\n"
    if alone and merged and sources[0].role in ("generator", "shared"):
        text += usage(sources[0].run) + "\n"
    return text + "\n".join(run_section(source.name, source.told, source.result) for source in sources if source.told)
