import lightning.pytorch as L

from minigpt_pl import TextModel, generate_text
from minigpt_pl.config import TextConfig
from minigpt_pl.data.datamodule import TextDataModule
from minigpt_pl.training.module import MiniGPTModule

datamodule = TextDataModule(TextConfig(path="my.txt"))
datamodule.prepare_data()  # the size of the model depends on the text
datamodule.setup("fit")
module = MiniGPTModule(model={"vocab_size": datamodule.vocab_size}, end_id=datamodule.end_id)
L.Trainer(max_epochs=1).fit(module, datamodule=datamodule)
print(generate_text(TextModel(module.model.eval(), datamodule.tokenizer, datamodule.end_id), "the cat"))
