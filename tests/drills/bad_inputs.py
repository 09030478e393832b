"""Bad inputs: each must end with exit code 2 and one line that names the setting, and must change no file.

`make_folder` makes the folder for the commands. It contains a trained run, damaged copies of it, and odd files.
"""

import os
import shutil
import zipfile
from pathlib import Path

import h5py
import torch
import yaml

TRAIN = ["data=text", "data.path=story.txt", "data.batch_size=16", "trainer=cpu", "trainer.max_steps=1"]
TRAIN += ["model.embed_dim=16", "model.max_length=16", "trainer.progress_bar=false"]
SAMPLE = ["prompt=the cat", "num_tokens=3", "top_k=5"]
EXPLORE = ["prompts=prompts.yaml", "num_tokens=2", "num_seeds=1", "temperature=1", "top_k=2"]
IMPORT = ["vocabulary=vocabulary.txt"]
HUGE = 10**30

# (command, arguments, words of the message)
BAD_INPUTS: list[tuple[str, list[str], str]] = [
    # A size that needs more memory than any machine has, or a count without end.
    ("train", [*TRAIN, "model.embed_dim=100000000"], "model.embed_dim=100000000: the training needs at least"),
    ("train", [*TRAIN, "model.max_length=1000000000"], "model.max_length=1000000000: the training needs at least"),
    ("train", [*TRAIN, "model.num_blocks=100000000"], "model.num_blocks=100000000: the training needs at least"),
    ("train", [*TRAIN, "model.num_heads=1000000000000"], "model.num_heads=1000000000000: the training needs"),
    ("train", [*TRAIN, "model.head_dim=1000000000000"], "model.head_dim=1000000000000: the training needs"),
    ("train", [*TRAIN, "model.feed_forward_dim=1000000000000"], "model.feed_forward_dim=1000000000000: the training"),
    ("train", [*TRAIN, "data.batch_size=1000000000000"], "data.batch_size=1000000000000: the training needs at least"),
    ("train", [*TRAIN, f"model.vocab_size={HUGE}"], f"model.vocab_size={HUGE}: must be at most 9223372036854775807"),
    ("train", [*TRAIN, "seed=" + "1" * 5000], "Exceeds the limit (4300 digits)"),
    ("train", [*TRAIN, "trainer.devices=9999"], "trainer.devices=9999: this machine has only"),
    ("train", [*TRAIN, "text_generator.num_tokens=1000001"], "text_generator.num_tokens=1000001: must be at least 1"),
    ("sample", [*SAMPLE, f"num_tokens={HUGE}"], f"num_tokens={HUGE}: must be at least 1 and at most 1000000"),
    ("sample", [*SAMPLE, "num_samples=100001"], "num_samples=100001: must be at least 1 and at most 100000"),
    ("sample", [*SAMPLE, f"no_repeat_ngram_size={HUGE}"], f"no_repeat_ngram_size={HUGE}: must be at most"),
    ("evaluate", [f"num_documents={HUGE}"], f"num_documents={HUGE}: must be at most 9223372036854775807"),
    ("explore", [*EXPLORE, "num_seeds=100001"], "num_seeds=100001: must be at least 1 and at most 100000"),
    ("explore", [*EXPLORE, "num_seeds=100000"], "confirm=false: 100,000 texts"),
    # Nothing, or something else, in place of a group, a list or a number.
    *(("train", [*TRAIN, f"{name}=null"], f"{name}=null: is not a choice") for name in ("model", "data", "trainer")),
    ("train", [*TRAIN, "hydra=null"], "hydra=null: is not a choice"),
    ("train", [*TRAIN, "data=[]"], "data=[]: is not a choice"),
    ("train", [*TRAIN, "data=[text,imdb]"], "these choices do not fit together"),
    (
        "train",
        [*TRAIN, "optimizer=null"],
        "optimizer=null: is a group of settings; set one of them, as in optimizer.name",
    ),
    ("train", [*TRAIN, "optimizer=adamw"], "optimizer=adamw: is a group of settings"),
    ("train", [*TRAIN, "optimizer=[1,2]"], "optimizer=[1,2]: is a group of settings"),
    ("train", [*TRAIN, "schedule=cosine"], "schedule=cosine: is a group of settings"),
    ("train", [*TRAIN, "text_generator="], "text_generator=: is a group of settings"),
    ("train", [*TRAIN, "optimizer=${schedule}"], "must be of class OptimizerConfig"),
    ("train", [*TRAIN, "model.embed_dim=[1,2]"], "model.embed_dim=[1,2]: must be a whole number"),
    ("train", [*TRAIN, "model.embed_dim={a: 1}"], "model.embed_dim={a: 1}: must be a whole number"),
    ("train", [*TRAIN, "model.embed_dim="], "model.embed_dim=: must be a whole number"),
    ("train", [*TRAIN, "model.embed_dim=1e3"], "model.embed_dim=1e3: must be a whole number"),
    ("train", [*TRAIN, "seed=null"], "seed=null: must be a whole number"),
    ("train", [*TRAIN, "output_dir=[a]"], "output_dir=[a]: must be a text"),
    ("train", [*TRAIN, "text_generator.prompts=[null]"], "text_generator.prompts=[null]: must be a list"),
    ("train", [*TRAIN, "text_generator.prompts={a: 1}"], "text_generator.prompts={a: 1}: must be a list"),
    ("train", [*TRAIN, "text_generator.prompts=['']"], "text_generator.prompts='': has no words"),
    ("sample", [*SAMPLE, "banned_words={a: 1}"], "banned_words={a: 1}: must be a list"),
    ("sample", [*SAMPLE, "banned_words=[null]"], "banned_words=[null]: must be a list"),
    ("sample", [*SAMPLE, "top_k=[1]"], "top_k=[1]: must be a whole number or null"),
    ("sample", [*SAMPLE, "forced_words={true: cat}"], "must be words by position"),
    ("sample", [*SAMPLE, "forced_words=5"], "forced_words=5: must be words by position"),
    ("sample", [*SAMPLE, "compare=5"], "compare=5: must be lists of values"),
    ("sample", [*SAMPLE, "compare={top_k: [[1]]}"], "top_k=[1]: must be a whole number or null"),
    ("sample", ["prompt=[[the]]"], "prompt=[['the']]: must be a text or a list of texts"),
    ("explore", [*EXPLORE, "temperature=[null]"], "temperature=[null]: must be a list"),
    ("explore", [*EXPLORE, "top_k=[]"], "top_k=[]: must have at least one value"),
    # Settings that do not exist, and references.
    ("explore", [*EXPLORE, "experiment=quick"], "experiment: is not a setting of this command; leave it out"),
    ("train", ["${oops}"], "${oops}: is not a setting"),
    ("train", [*TRAIN, "run_name=${oops}"], "run_name: Interpolation key 'oops' not found; write '${NAME}'"),
    ("train", [*TRAIN, "run_name=${run_name}"], "run_name: Recursive interpolation"),
    ("train", [*TRAIN, "run_name=${a:1}"], "run_name: Unsupported interpolation type a; write"),
    (
        "train",
        [*TRAIN, "model.embed_dim=${output_dir}"],
        "'outputs' of type 'str' could not be converted to Integer",
    ),
    ("train", [*TRAIN, "seed=${oc.env:NO_SUCH_VARIABLE}"], "seed: KeyError raised while resolving"),
    ("train", [*TRAIN, "~trainer.max_time"], "~trainer.max_time: has no value to delete; set one, as in"),
    ("train", [*TRAIN, "~data.path"], "~data.path: cannot be deleted; give it another value"),
    ("train", [*TRAIN, "a.b.c=1"], "a.b.c=1: no such setting"),
    ("train", [*TRAIN, "optimizer.x.y=1"], "no such setting"),
    ("train", [*TRAIN, "😀=1"], "😀=1: cannot be read"),
    ("train", [*TRAIN, "seed==5"], "seed==5: cannot be read"),
    ("train", [*TRAIN, "hydra.mode=x"], "hydra.mode=x: "),
    ("train", [*TRAIN, "hydra.run.dir=file"], "hydra: cannot create file (File exists)"),
    # Numbers out of range, and settings that do not fit together.
    ("train", [*TRAIN, "optimizer.learning_rate=1e999"], "optimizer.learning_rate=inf: must be a finite number"),
    ("train", [*TRAIN, "trainer.limit_train_batches=0"], "trainer.limit_train_batches=0: must be at least 1"),
    ("train", [*TRAIN, "trainer.val_check_interval=1000"], "trainer.val_check_interval=1000: an epoch has only"),
    ("train", [*TRAIN, "trainer.num_nodes=99"], "trainer.num_nodes=99: start the nodes with srun or torchrun"),
    ("train", [*TRAIN, "trainer.max_time='٠١:٠٢:٠٣:٠٤'"], "trainer.max_time=٠١:٠٢:٠٣:٠٤: must be DD:HH:MM:SS"),
    ("train", [*TRAIN, f"trainer.max_time={'9' * 5000}:00:00:00"], "must be DD:HH:MM:SS"),
    ("train", [*TRAIN, "data.max_sequences=1"], "data.max_sequences=1: must be at least data.batch_size=16"),
    ("train", [*TRAIN, "data.batch_size=1000"], "data.batch_size=1000: the text has only 2"),
    ("train", [*TRAIN, "text_generator.top_k=9999"], "text_generator.top_k=9999: the text has only"),
    ("sample", [*SAMPLE, "repetition_penalty=1e-320"], "repetition_penalty=1e-320: must be above 0.001"),
    ("sample", [*SAMPLE, "num_beams=2", "temperature=0", "length_penalty=1e308"], "length_penalty=1e+308: must be"),
    ("sample", [*SAMPLE, "length_penalty=2"], "length_penalty=2.0: has no effect without beam search"),
    ("sample", [*SAMPLE, f"forced_words={{{HUGE}: cat}}"], "must be below num_tokens=3"),
    ("sample", [*SAMPLE, "seed=2147483648"], "seed=2147483648: must be at least 0"),
    # Names and characters.
    ("train", [*TRAIN, "run_name='a\tb'"], r"run_name=a\tb: must be a plain folder name of at most 200 printable"),
    ("train", [*TRAIN, "run_name='a\x1b[31mb'"], r"run_name=a\x1b[31mb: must be a plain folder name"),
    ("train", [*TRAIN, "run_name='a\u202eb'"], "must be a plain folder name"),
    ("train", [*TRAIN, "run_name='a '"], "run_name=a : must be a plain folder name"),
    ("train", [*TRAIN, "run_name=.."], "run_name=..: must be a plain folder name"),
    ("train", [*TRAIN, "run_name=tiny"], "run_name=tiny: outputs/tiny exists"),
    ("train", [*TRAIN, "run_name='a\0b'"], r"run_name=a\x00b: must not contain a null character"),
    ("sample", ["prompt=\udcffthe"], r"prompt='\udcffthe': is not Unicode text"),
    ("convert", ["to_keras='a\0b.weights.h5'"], r"to_keras=a\x00b.weights.h5: must not contain a null character"),
    # Files of the wrong kind.
    ("train", [*TRAIN, "output_dir=file"], "output_dir=file: cannot be created (File exists); give another folder"),
    ("train", [*TRAIN, "output_dir=file/a"], "output_dir=file/a: cannot be created (Not a directory)"),
    ("train", [*TRAIN, "data.cache_dir=file"], "data.cache_dir=file: cannot be created (File exists)"),
    ("train", [*TRAIN, "data.path=binary.txt"], "data.path=binary.txt: cannot be read"),
    ("train", [*TRAIN, "data.path=/dev/zero"], "data.path=/dev/zero: unknown format"),
    ("train", [*TRAIN, "data.path=pipe.txt"], "data.path=pipe.txt: the file is empty"),
    ("train", [*TRAIN, "data.path=blank.txt"], "data: blank.txt has no words"),
    (
        "train",
        [*TRAIN, "data.path=one.txt", "data.validation_share=0.999"],
        "data.validation_share=0.999: holds out all 1",
    ),
    ("train", [*TRAIN, "data.path=broken.csv"], "data.path=broken.csv: cannot be read"),
    ("train", [*TRAIN, "resume=file"], "is not in a run folder"),
    (
        "sample",
        ["prompts_file=/dev/zero"],
        "prompts_file=/dev/zero: cannot be read (longer than 10,000,000 characters)",
    ),
    ("sample", ["prompts_file=huge.txt"], "prompts_file=huge.txt: cannot be read (longer than 10,000,000 characters)"),
    ("sample", ["prompts_file=."], "prompts_file=.: cannot be read"),
    ("sample", [*SAMPLE, "checkpoint=/dev/zero"], "checkpoint=/dev/zero: no such run folder or checkpoint"),
    ("sample", [*SAMPLE, "checkpoint=file"], "checkpoint=file: cannot be read"),
    ("sample", [*SAMPLE, "checkpoint=bomb.keras"], "checkpoint=bomb.keras: cannot be read"),
    (
        "explore",
        [*EXPLORE, "prompts=/dev/zero"],
        "prompts=/dev/zero: cannot be read (longer than 10,000,000 characters)",
    ),
    ("explore", [*EXPLORE, "prompts=story.txt"], "prompts=story.txt: must begin with a kind"),
    ("explore", [*EXPLORE, "folder=file"], "folder=file: cannot be created"),
    ("convert", ["from_keras=bomb.keras", *IMPORT], "from_keras=bomb.keras: cannot be read (it would become 0.1 GB"),
    ("convert", ["from_keras=bomb.weights.h5", *IMPORT], "from_keras=bomb.weights.h5: cannot be read (it would become"),
    ("convert", ["from_keras=/dev/zero", *IMPORT], "from_keras=/dev/zero: no such file"),
    ("convert", ["to_keras=none/a.weights.h5"], "to_keras=none/a.weights.h5: there is no folder none"),
    (
        "convert",
        ["to_keras=a.weights.h5", "vocabulary=a.weights.h5"],
        "vocabulary=a.weights.h5: to_keras writes the same",
    ),
    ("export", ["html", "path=/dev/zero"], "path=/dev/zero: exists, and is not a page"),
    ("export", ["html", "path=file/page.html"], "path=file: cannot be created"),
    # Damaged runs.
    ("sample", [*SAMPLE, "output_dir=nan"], "model: the network's values are NaN or infinite"),
    ("evaluate", ["output_dir=nan"], "checkpoint=nan/tiny/checkpoints/best.ckpt: the network's values are NaN"),
    ("explore", [*EXPLORE, "output_dir=nan"], "explore: the model can generate no text"),
    ("export", ["html", "output_dir=nan"], "best.ckpt: the network's values are NaN or infinite"),
    ("sample", [*SAMPLE, "output_dir=record"], "record"),
    ("evaluate", ["output_dir=settings"], "config.yaml: not the settings of a run"),
    ("explore", [*EXPLORE, "output_dir=settings"], "config.yaml: not the settings of a run"),
]


def make_folder(folder: Path, run: Path, text: Path) -> None:
    """Make the folder of the table.

    Args:
        run: a trained run; copies of it become outputs/tiny and the damaged runs.
        text: the text of the run, which becomes story.txt.
    """
    shutil.copy(text, folder / "story.txt")
    for name in ("outputs", "nan", "record", "settings"):
        shutil.copytree(run, folder / name / "tiny")
    for path in (folder / "nan/tiny/checkpoints").iterdir():
        contents = torch.load(path, weights_only=True)
        for weight in contents["state_dict"].values():
            weight.fill_(torch.nan)
        torch.save(contents, path)
    (folder / "record/tiny/run.json").write_text("[1]")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["data"] |= {"batch_size": "many", "path": 5}
    (folder / "settings/tiny/config.yaml").write_text(yaml.safe_dump(settings))

    (folder / "file").write_text("mine")
    (folder / "binary.txt").write_bytes(b"\x00\x01\xff")
    (folder / "blank.txt").write_text("\n \n")
    (folder / "one.txt").write_text("the only line\n")
    (folder / "broken.csv").write_text('text,x\n"unclosed,1\n')
    (folder / "prompts.yaml").write_text("short: [the cat]\n")
    (folder / "vocabulary.txt").write_text("\n[UNK]\nthe\n")
    os.mkfifo(folder / "pipe.txt")
    with (folder / "huge.txt").open("wb") as file:
        file.truncate(2 * 2**30)  # takes no space on the disk
    with zipfile.ZipFile(folder / "bomb.keras", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", "{}")
        archive.writestr("model.weights.h5", bytes(10**8))
    with h5py.File(folder / "bomb.weights.h5", "w") as file:
        file.create_dataset("layers/dense/vars/0", (10**6, 10**6), "float32")
