"""Continues a text. Needs onnxruntime, tokenizers and numpy.

python sample.py PROMPT [number of new words] [temperature; 0 is greedy] [top k] [random seed]
"""

import json
import sys
from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession
from tokenizers import Tokenizer

defaults = ["this movie is", "60", "0.8", "20", ""]
prompt, num_tokens, temperature, top_k, seed = sys.argv[1:] + defaults[len(sys.argv) - 1 :]
folder, generator = Path(__file__).parent, np.random.default_rng(int(seed) if seed else None)
session, tokenizer = InferenceSession(folder / "model.onnx"), Tokenizer.from_file(str(folder / "tokenizer.json"))
metadata = session.get_modelmeta().custom_metadata_map
settings = {name: json.loads(metadata[name]) for name in ("max_length", "end_id", "banned_ids")}
ids = tokenizer.encode(prompt).ids
new: list[int] = []
while len(new) < int(num_tokens) and settings["end_id"] not in new[-1:]:
    window = np.array([(ids + new)[-settings["max_length"] :]])  # (1, L): the last words
    logits = session.run(["logits"], {"ids": window})[0][0, -1].astype(float)  # (V,)
    logits[settings["banned_ids"]] = -np.inf
    logits[logits < np.sort(logits)[-int(top_k) :][0]] = -np.inf
    weights = np.exp((logits - logits.max()) / max(float(temperature), 1e-9))
    new.append(int(generator.choice(len(weights), p=weights / weights.sum())))
print(prompt + tokenizer.decode([id_ for id_ in new if id_ != settings["end_id"]]))
