"""A trained model: a network and its tokenizer."""

from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer

from minigpt_pl.checkpoints import find_checkpoint, load_network
from minigpt_pl.errors import InputError
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


def load(path: str | Path) -> TextModel:
    """Load a trained model.

    Args:
        path: a run folder (its best checkpoint, else its newest), or a checkpoint inside one.

    Raises:
        InputError: there is no checkpoint, or it is not one of this project.
    """
    if not isinstance(path, str | Path):
        raise InputError(f"path={path!r}: must be a run folder or a checkpoint, as in load('outputs/quick-001')")
    checkpoint = find_checkpoint(path)
    network, end_id, trained_with = load_network(checkpoint)
    file = checkpoint.parent.parent / "tokenizer.json"
    tokenizer = load_tokenizer(file)
    if tokenizer.get_vocab_size() != network.vocab_size or trained_with not in (None, fingerprint(tokenizer)):
        raise InputError(f"{file}: not the tokenizer that {checkpoint} was trained with; copy both from the same run")
    return TextModel(network.eval(), tokenizer, end_id, checkpoint)
