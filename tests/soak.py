"""
Kill a demo run at many random moments, resume it each time, and compare what it leaves with the run that nobody stopped.

    python tests/soak.py                             # 50 kills, kill -9 and SIGTERM mixed: ten minutes on a CPU
    python tests/soak.py --kills 20 --adapters shared
    python tests/soak.py --quant nf4                 # any of train.py's flags

Prints a line a kill. A run that reaches its end is compared, and the next one starts, until all kills are spent.
"""
import argparse
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from conftest import ROOT
from test_scripts import same_run

RUN = ("--preset demo --batch_size 4 --num_steps 80 --d_warmup 2 --prefix_tokens 16 --reasoning_tokens 4 --completion_tokens 12 "
       "--echo_tokens 4 --floor_sequences 64 --seeds 2 --rank 4 --save_every 3 --keep 1").split()

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--kills", type=int, default=50)
parser.add_argument("--seed", type=int, default=0, help="of the moments")
args, flags = parser.parse_known_args()
rng, folder = random.Random(args.seed), pathlib.Path(tempfile.mkdtemp(prefix="soak-"))


def start(*words):
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def checked(process, ends):
    """The output of a process that must end with one of these statuses."""
    told = process.communicate()[0]
    if process.returncode not in ends:
        raise SystemExit(f"ended with {process.returncode}:\n{told}")
    return told


whole = folder / "whole"
began = time.time()
checked(start(*RUN, *flags, "--out_dir", str(whole)), {0})
print(f"uninterrupted: {time.time() - began:.0f} s; {args.kills} kills, {' '.join(flags) or 'default flags'}")

kills, finished, words, out = 0, 0, [], folder / "run-0"
while kills < args.kills or words:
    process = start(*(words or [*RUN, *flags, "--out_dir", str(out)]))
    if kills == args.kills:  # the last one goes to its end
        checked(process, {0})
    else:
        early = rng.random() < 0.2  # while it still loads
        begun = None if early else process.stdout.readline()
        wait = rng.uniform(0, 6 if early else 4)
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            number = rng.choice([signal.SIGKILL, signal.SIGTERM])
            process.send_signal(number)
            told = checked(process, {-9, 143, -15, 0})
            kills += 1
            saved = re.findall(r"step (\d+)/", told)
            print(f"{kills:3d} {number.name} {wait:4.1f} s after {'its start   ' if early or not begun else 'it had loaded'}"
                  f"  status {process.returncode:4d}  last step {saved[-1] if saved else '-'}", flush=True)
    if process.returncode == 0:
        same_run(whole, out)
        finished, words, out = finished + 1, [], folder / f"run-{finished + 1}"
        print(f"    run {finished} ended: equal in every file and tensor", flush=True)
    elif (out / "args.json").exists():
        words = ["--resume", str(out)]
    else:
        shutil.rmtree(out, ignore_errors=True)  # it had not begun: what little is there can go
print(f"{kills} of {args.kills} kills survived; {finished} runs reached their end, all equal to the uninterrupted one")
