"""
Texts to features, for MAUVE: the hidden states of the run's own base model, or of another model; and their cache.

What differs from the textbook: mauve-text featurizes gpt2 and bert names alone, one text at a time; this takes any
model, in batches of texts of like length, on the GPU where there is one, and gives for those names what it gives.
"""
import hashlib
import zipfile

from flags import UserError


def base_states(model, tokenizer):
    """Return `ids_of(text)`, `states(ids)` and H of the run's base model: ids (B, T) to last hidden states (B, T, H).
    """
    from data import bos_ids, plain_encoder
    from model import causal_lm, hidden_states, without_adapters
    encode, bos = plain_encoder(tokenizer), bos_ids(tokenizer)

    def ids_of(text):
        return bos + encode(text)[0]

    def states(ids):
        with without_adapters(model):
            return hidden_states(model, ids)  # (B, T, H)

    return ids_of, states, causal_lm(model).config.get_text_config().hidden_size


def hub_states(name, device):
    """Return `ids_of(text)`, `states(ids)` and H of another model, by its id; a text is cut to 1024 tokens."""
    from transformers import AutoModel, AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModel.from_pretrained(name, use_safetensors=True).to(device).eval()
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--featurizer {name} could not be loaded ({reason}); base is the run's own model") from None

    def ids_of(text):
        return tokenizer(text, truncation=True, max_length=1024).input_ids

    def states(ids):
        return model(ids).last_hidden_state  # (B, T, H)

    return ids_of, states, model.config.hidden_size


def featurizer(name, model, tokenizer, device, batch_size=32, cache=None):
    """Return `features(texts) -> (N, H) float32`; with `cache`, a .npz file, no text is computed twice.

    base: last hidden states of the run's own base model, mean over positions. Any other model id: the last token's
    state, of at most 1024 tokens, which for gpt2 and bert names is what mauve-text computes itself. An empty text is a
    row of zeros, far from all others: mauve-text drops it without a word, and a model fallen silent would score high.
    """
    import numpy as np
    import torch
    from model import pad
    ids_of, states, size = base_states(model, tokenizer) if name == "base" else hub_states(name, device)

    @torch.no_grad()
    def features(texts):
        rows = [ids_of(text) if text else [] for text in texts]
        order = sorted((i for i, row in enumerate(rows) if row), key=lambda i: len(rows[i]))  # like lengths together
        out = np.zeros((len(rows), size), dtype=np.float32)  # (N, H)
        for first in range(0, len(order), batch_size):
            part = order[first:first + batch_size]
            hidden = states(pad([rows[i] for i in part], 0, device)).float()  # (B, T, H)
            for i, h in zip(part, hidden):
                n = len(rows[i])
                out[i] = (h[:n].mean(0) if name == "base" else h[n - 1]).cpu().numpy()  # (H,)
        return out  # (N, H)

    source = f"{name} {getattr(model, 'name_or_path', '')} {getattr(model, 'dtype', '')}" if name == "base" else name
    return cached(features, cache, source) if cache else features


def cached(features, file, source):
    """`features` with a memory: vectors by the hash of source and text, in a .npz file beside the run."""
    import numpy as np

    def key(text):
        return hashlib.blake2b(f"{source}\0{text}".encode("utf-8", "replace"), digest_size=16).hexdigest()

    def known_or_new(texts):
        known = {}
        if file.exists():
            try:
                with np.load(file) as saved:
                    known = dict(zip(saved["keys"].tolist(), saved["vectors"]))  # (H,) each
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
                pass  # cut short: it is a cache, and is made anew
        new = list({key(text): text for text in texts if key(text) not in known}.items())
        if new:
            known.update(zip([name for name, _ in new], features([text for _, text in new])))
            beside = file.with_name(file.name + ".new")
            with open(beside, "wb") as out:
                np.savez(out, keys=np.array(list(known)), vectors=np.stack(list(known.values())))
            beside.rename(file)
        return np.stack([known[key(text)] for text in texts])  # (N, H)

    return known_or_new
