"""A trained model: a network and its tokenizer."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Unpack

from tokenizers import Tokenizer

from minigpt_pl import notebook
from minigpt_pl.checkpoints import choose_checkpoint, find_checkpoint, load_network
from minigpt_pl.config import ControlArguments, NumberControls
from minigpt_pl.errors import InputError
from minigpt_pl.generation.controls import lists_controls
from minigpt_pl.generation.inference import InferenceModel
from minigpt_pl.model import MiniGPT
from minigpt_pl.tokenizer import fingerprint, load_tokenizer


@dataclass
class TextModel:
    """A trained model, as `load` returns it and `generate_text` uses it.

    Attributes:
        network: the network, in eval mode.
        tokenizer: has as many entries as the network has logits.
        end_id: the token that ends a text; None if the network was trained without one.
        checkpoint: the file of the weights; None if the weights come from elsewhere.
    """

    network: MiniGPT
    tokenizer: Tokenizer
    end_id: int | None = None
    checkpoint: Path | None = None
    _prepared: InferenceModel | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def prepared(self) -> InferenceModel:
        """The network, prepared for generation. It is prepared again after its weights have changed."""
        if self._prepared is None or self._prepared.source is not self.network or not self._prepared.is_current():
            self._prepared = InferenceModel(self.network)
        return self._prepared

    @lists_controls
    def generate_text(
        self,
        prompt: str,
        num_tokens: int | None = None,
        temperature: float = NumberControls.temperature,
        top_k: int | None = NumberControls.top_k,
        seed: int | None = None,
        **controls: Unpack[ControlArguments],
    ) -> str:
        """Continue a prompt, as the function `minigpt_pl.generate_text`. `model(prompt)` is the same."""
        from minigpt_pl.generation.text import generate_text  # it imports this file

        return generate_text(self, prompt, num_tokens, temperature, top_k, seed, **controls)

    __call__ = generate_text

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        parameters = sum(weight.numel() for weight in self.network.parameters())
        end = "none" if self.end_id is None else self.tokenizer.id_to_token(self.end_id)
        rows = {"checkpoint": self.checkpoint, "parameters": f"{parameters:,}", "end of a text": end}
        return notebook.table(rows | asdict(self.network.arguments))


def load(path: str | Path | None = None, output_dir: str | Path = "outputs") -> TextModel:
    """Load a trained model.

    Args:
        path: a run folder or its name in `output_dir` (its best checkpoint, else its newest), a checkpoint, or a folder
            of `export transformers`. If None, the newest finished run in `output_dir`.
        output_dir: folder of the run folders.

    Raises:
        InputError: there is no checkpoint, or it is not one of this project.

    Example:
        >>> model = minigpt_pl.load("quick-001")
    """
    if not isinstance(path, str | Path | None):
        raise InputError(f"path={path!r}: must be a run, its folder or a checkpoint, as in load('quick-001')")
    if path is not None and (Path(path) / "model.safetensors").is_file():
        from minigpt_pl.exporting.hugging_face import read_model  # it imports this file

        return read_model(Path(path))
    output_dir = Path(output_dir)
    checkpoint = choose_checkpoint(output_dir, None) if path is None else find_checkpoint(path, output_dir, "path")
    network, end_id, trained_with = load_network(checkpoint)
    file = checkpoint.parent.parent / "tokenizer.json"
    tokenizer = load_tokenizer(file)
    if tokenizer.get_vocab_size() != network.vocab_size or trained_with not in (None, fingerprint(tokenizer)):
        raise InputError(f"{file}: not the tokenizer that {checkpoint} was trained with; copy both from the same run")
    return TextModel(network.eval(), tokenizer, end_id, checkpoint)


def open_model(model: TextModel | str | Path) -> TextModel:
    """The model, or the one that `load` finds.

    Raises:
        InputError: as `load`, or it is something else.
    """
    if isinstance(model, str | Path):
        return load(model)
    if not isinstance(model, TextModel):
        text = " ".join(repr(model).split())
        raise InputError(f"model={text:.60}: must be a TextModel, or a run, as in minigpt_pl.load('quick-001')")
    return model
