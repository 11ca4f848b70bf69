"""The demo's corpus: long docstrings of Python and of the installed packages, and Python's reference topics."""
import ast
import hashlib
import importlib.metadata
import itertools
import json
import pathlib
import sys
import sysconfig
import warnings

PACKAGES = ("accelerate bitsandbytes datasets huggingface_hub mauve-text numpy pandas peft pyarrow safetensors "
            "scikit-learn scipy tokenizers torch tqdm transformers zstandard").split()


def demo_corpus():
    """Texts of 600 characters and more; cached in a file beside this one, named by a hash of the versions."""
    versions = [sys.version] + [f"{name} {version}" for name in PACKAGES if (version := installed(name))]
    key = hashlib.blake2b("\n".join(versions).encode(), digest_size=6).hexdigest()
    cache = pathlib.Path(__file__).parent / f"corpus-{key}.jsonl"
    if cache.exists():
        return [json.loads(line)["text"] for line in cache.read_text(encoding="utf-8").splitlines()]
    print("reading the demo's corpus from the installed packages, once: half a minute", file=sys.stderr)
    found = itertools.chain.from_iterable(map(docstrings, source_files()))
    texts = list({text[:200]: text for text in found}.values())  # packages repeat themselves: one per beginning
    try:
        partial = cache.with_suffix(".partial")
        partial.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        partial.replace(cache)
    except OSError:
        pass  # a read-only checkout reads the corpus anew each time
    return texts


def source_files():
    stdlib = pathlib.Path(sysconfig.get_paths()["stdlib"])
    files = [(file, file.relative_to(stdlib)) for file in sorted(stdlib.rglob("*.py"))]
    for name in filter(installed, PACKAGES):
        files += [(pathlib.Path(file.locate()), file) for file in sorted(importlib.metadata.files(name) or [])
                  if file.suffix == ".py"]
    skipped = {"test", "tests", "testing", "idlelib", "site-packages"}
    return [file for file, inside in files if not skipped & set(inside.parts)]


def installed(name):
    """The version of a package, None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def docstrings(file):
    """The long docstrings of a file's module, classes, functions and methods; all long strings of pydoc's topics."""
    try:
        source = file.read_bytes()
        if b'"""' not in source and b"'''" not in source and file.name != "topics.py":
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (OSError, ValueError, SyntaxError, RecursionError):
        return []
    if file.match("pydoc_data/topics.py"):
        constants = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        found = [value for value in constants if isinstance(value, str)]
    else:
        functions = (ast.FunctionDef, ast.AsyncFunctionDef)
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        top = [node for node in tree.body if isinstance(node, functions)]
        methods = [node for parent in classes for node in parent.body if isinstance(node, functions)]
        found = [ast.get_docstring(node) or "" for node in [tree, *classes, *top, *methods]]
    return [text.strip() for text in found if len(text.strip()) >= 600]
