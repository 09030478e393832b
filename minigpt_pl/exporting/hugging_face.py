"""A model as a folder for transformers, and back. The folder works without this package."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from minigpt_pl.cpu.linear import inference_without_autocast
from minigpt_pl.errors import InputError
from minigpt_pl.exporting import require
from minigpt_pl.generation.prompts import controls_on_ids
from minigpt_pl.model import LAYER_NORM_EPSILON, MiniGPT
from minigpt_pl.text_model import TextModel
from minigpt_pl.tokenizer import END, PAD, PADDING, UNKNOWN, UNKNOWN_ID, portable, rename_padding

WEIGHTS = "model.safetensors"
CODE = Path(__file__).with_name("modeling_minigpt.py")
MODEL_TYPE = "minigpt_pl"
TOLERANCE = 1e-5  # of the logits, relative to the largest one if that is above 1
# Name in config.json -> argument of MiniGPT.
SIZES = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_length",
    "hidden_size": "embed_dim",
    "num_attention_heads": "num_heads",
    "head_dim": "head_dim",
    "intermediate_size": "feed_forward_dim",
    "num_hidden_layers": "num_blocks",
    "hidden_dropout_prob": "dropout",
    "tie_word_embeddings": "tie_embeddings",
    "token_shift": "token_shift",
}
USAGE = """\
```python
from transformers import pipeline

generator = pipeline("text-generation", "FOLDER", trust_remote_code=True)
print(generator("this movie is")[0]["generated_text"])
```

`FOLDER` is this folder, or its name on the hub. It needs torch and transformers 5, and no other package.
`trust_remote_code=True` runs the file `modeling_minigpt.py` of this folder.
"""


def write_model(folder: Path, model: TextModel) -> None:
    """Write weights, settings, tokenizer and code into `folder`. Then load them with transformers, and compare.

    Raises:
        InputError: the extra `export` is missing, or the installed transformers loads another model.
    """
    require("transformers", "safetensors")
    from safetensors.torch import save_file

    network = model.network
    weights = {name: weight.contiguous() for name, weight in network.state_dict().items()}
    if network.arguments.tie_embeddings:
        del weights["output.weight"]  # transformers ties it again
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    controls, _ = controls_on_ids(model, {})
    generation = {
        "do_sample": True,
        "max_new_tokens": controls.num_tokens,
        "temperature": controls.temperature,
        "top_k": controls.top_k,
        "suppress_tokens": [*controls.banned_ids],
        "pad_token_id": model.tokenizer.token_to_id(PADDING),
        "eos_token_id": controls.end_id,
    }
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
        "pad_token": PAD,
        "unk_token": UNKNOWN,
        "eos_token": END,
        "split_special_tokens": True,  # as here: [END] in a prompt is a text of three words
        "clean_up_tokenization_spaces": False,
    }
    files = {"config": _config(network), "generation_config": generation, "tokenizer_config": tokenizer}
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    portable(model.tokenizer).save(str(folder / "tokenizer.json"))
    shutil.copyfile(CODE, folder / CODE.name)
    _check(folder, network)


def _config(network: MiniGPT) -> dict[str, Any]:
    classes = {"AutoConfig": "MiniGPTConfig", "AutoModelForCausalLM": "MiniGPTForCausalLM"}
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["MiniGPTForCausalLM"],
        "auto_map": {name: f"{CODE.stem}.{class_}" for name, class_ in classes.items()},
        "dtype": "float32",
        "layer_norm_eps": LAYER_NORM_EPSILON,
        **{name: getattr(network.arguments, argument) for name, argument in SIZES.items()},
    }


def _check(folder: Path, network: MiniGPT) -> None:
    """Compare the logits of the longest context, and the names of the weights."""
    import transformers

    from minigpt_pl.exporting.modeling_minigpt import MiniGPTForCausalLM

    transformers.utils.logging.disable_progress_bar()
    loaded, report = MiniGPTForCausalLM.from_pretrained(folder, output_loading_info=True)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(network.vocab_size, (2, network.max_length), generator=generator)  # (B, L)
    with inference_without_autocast(network):
        expected = network(ids)[0]  # (B, L, V)
        difference = float((loaded(ids).logits - expected).abs().max() / expected.abs().max().clamp(min=1))
    wrong = [name for names in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in report[names]]
    if wrong or not difference <= TOLERANCE:
        problem = f"loads other weights ({wrong})" if wrong else f"computes logits that differ by {difference:.1g}"
        raise InputError(f"transformers {transformers.__version__}: {problem}; install another version 5 of it")


def read_model(folder: Path) -> TextModel:
    """Read a folder of `write_model`, or one that `save_pretrained` of transformers wrote for the same classes.

    Raises:
        InputError: the extra `export` is missing, or the folder is damaged or holds another model.
    """
    require("safetensors")
    from safetensors.torch import load_file

    try:
        config, generation = (
            json.loads((folder / name).read_text(encoding="utf-8"))
            for name in ("config.json", "generation_config.json")
        )
        if config["model_type"] != MODEL_TYPE:
            raise ValueError(f"model_type={config['model_type']}")
        config = {"token_shift": False} | config  # older versions do not write it
        network = MiniGPT(**{argument: config[name] for name, argument in SIZES.items()})
        weights = load_file(folder / WEIGHTS)
        if network.arguments.tie_embeddings:
            weights["output.weight"] = weights["token_embedding.weight"]
        network.load_state_dict(weights)
        tokenizer = rename_padding(Tokenizer.from_file(str(folder / "tokenizer.json")), PAD, PADDING)
        if tokenizer.get_vocab_size() != network.vocab_size or tokenizer.id_to_token(UNKNOWN_ID) != UNKNOWN:
            raise ValueError("the tokenizer does not fit the weights")
        end_id = generation.get("eos_token_id")
    except Exception as error:  # of json, safetensors, tokenizers or torch, depending on the damage
        reason = " ".join(str(error).split())
        remedy = "give a folder of `export transformers`, or export it again"
        raise InputError(f"path={folder}: cannot be read ({reason:.200}); {remedy}") from error
    return TextModel(network.eval(), tokenizer, end_id, folder / WEIGHTS)


def push(folder: Path, repository: str) -> str:
    """Upload a folder to the hub in one commit. A new repository is private. Returns its address.

    HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE work as in `huggingface_hub`.

    Raises:
        InputError: the hub cannot be reached, or it refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    files = [CommitOperationAdd(path.name, path) for path in sorted(folder.iterdir())]
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        api.create_commit(repository, files, commit_message="Upload of minigpt_pl")
    except Exception as error:  # several libraries raise errors here
        reason = " ".join(str(error).split()) or type(error).__name__
        remedy = "check the name, the network and `hf auth login`"
        raise InputError(f"push={repository}: not uploaded ({reason:.300}); {remedy}") from error
    return f"{api.endpoint}/{repository}"
