"""Uses folders of `export transformers` without this package and without a network: stranger.py REQUEST RESULT.

REQUEST is a JSON file, RESULT a file of `torch.save`. tests/test_export_hugging_face.py runs this in a new process.
"""

import json
import socket
import sys
from pathlib import Path

sys.modules["minigpt_pl"] = None  # from here on, `import minigpt_pl` fails


def refuse(*args):
    raise OSError("this process has no network")


socket.socket.connect = socket.getaddrinfo = refuse

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline  # noqa: E402


def use(folder: str, ids: list[int], prompts: list[str], texts: list[str], length: int) -> dict:
    model, report = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    window = model.config.max_position_embeddings
    context = torch.tensor([ids[:window]])
    greedy = {"do_sample": False, "max_new_tokens": length}
    result = {"wrong": [name for names in report.values() for name in names or []]}
    with torch.inference_mode():
        result["logits"] = [model(context[:, :end]).logits for end in range(1, window + 1)]
        outputs, stepwise = None, []
        for position in range(window):  # one token at a time, with the cache
            cache = {} if outputs is None else {"past_key_values": outputs.past_key_values}
            outputs = model(context[:, position : position + 1], use_cache=True, **cache)
            stepwise.append(outputs.logits)
        result["stepwise"] = torch.cat(stepwise, dim=1)
        result["loss"] = model(context, labels=context).loss
        result["hidden"] = model(context, output_hidden_states=True).hidden_states[-1]
    one, batch = tokenizer(prompts[0], return_tensors="pt"), tokenizer(prompts, return_tensors="pt", padding=True)

    def new_ids(inputs, **options) -> list[list[int]]:
        return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist()

    result["greedy"] = new_ids(one, **greedy)
    result["without cache"] = new_ids(one, **greedy, use_cache=False)
    result["static cache"] = new_ids(one, **greedy, cache_implementation="static")
    result["batch"] = new_ids(batch, **greedy)
    result["beams"] = new_ids(one, do_sample=False, num_beams=3, max_new_tokens=length)
    torch.manual_seed(0)
    result["drawn"] = new_ids(batch, temperature=5.0, top_k=None, max_new_tokens=length)
    generator = pipeline("text-generation", folder, trust_remote_code=True)
    result["pipeline"] = [found[0]["generated_text"] for found in generator(prompts, batch_size=2, **greedy)]
    result["default"] = generator(prompts[0])[0]["generated_text"]
    result["ids"] = [tokenizer(text)["input_ids"] for text in texts]
    return result


request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
torch.save({name: use(**arguments) for name, arguments in request.items()}, sys.argv[2])
