"""The commands as a person gives them: output, errors, exit codes, Hydra's flags.

Most tests call `main()` in this process (`run_main`). A new process (`run_module`) is for exit codes, pipes, closed
streams and imports.
"""

import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN, run_main, run_module

import minigpt_pl
from minigpt_pl import runs

COMMANDS = ("train", "sample", "evaluate", "explore", "convert", "export", "play", "prepare", "doctor")


def sample(cwd, *arguments, **options):
    return run_main("sample", "top_k=5", *arguments, cwd=cwd, **options)


class TestSample:
    def test_newest_finished_run(self, trained):
        done = run_module("sample", "prompt=the cat", "seed=1", "num_tokens=12", "top_k=5", cwd=trained)
        assert done.returncode == 0, done.stderr
        steps = runs.read_record(trained / "outputs/tiny")["steps"]
        assert f"checkpoint: outputs/tiny/checkpoints/best.ckpt ({steps} steps)\n" in done.stderr
        model = minigpt_pl.load(trained / "outputs" / "tiny")
        expected = minigpt_pl.generate_text(model, "the cat", num_tokens=12, top_k=5, seed=1)
        assert done.stdout == expected + "\n"

    def test_prompts_need_no_quoting_for_hydra(self, trained):
        done = sample(trained, 'prompt=it\'s a [cat], the {king} "dog" \\ 2001=x', "num_tokens=1")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith('it\'s a [cat], the {king} "dog" \\ 2001=x')
        assert "not in the vocabulary: [cat" in done.stderr

    def test_several_prompts_and_samples(self, trained):
        done = sample(trained, "prompt=[the cat, a well-known king]", "num_samples=2", "seed=0")
        texts = done.stdout.strip().split("\n\n")
        assert [text[:7] for text in texts] == ["the cat", "the cat", "a well-", "a well-"]
        assert texts[0] != texts[1]
        assert "not in the vocabulary: zebra (prompt 2)" in sample(trained, "prompt=[the cat, a zebra]").stderr

    def test_prompts_from_a_file_and_from_standard_input(self, trained, tmp_path):
        (tmp_path / "prompts.txt").write_text("the cat, it's\n\nthe ship\n")
        from_file = sample(trained, f"prompts_file={tmp_path / 'prompts.txt'}", "seed=0")
        from_input = sample(trained, "prompts_file=-", "seed=0", input="the cat, it's\n\nthe ship\n")
        assert from_file.returncode == 0, from_file.stderr
        assert from_file.stdout == from_input.stdout and len(from_file.stdout.split("\n\n")) == 2

    def test_controls_change_the_text(self, trained):
        def write(*arguments):
            return run_main("sample", "prompt=the cat", "num_tokens=30", *arguments, cwd=trained).stdout

        base = write("seed=0", "temperature=1", "top_k=20")
        assert len(base) > 25, "the text of this seed ends too early; use another seed"
        others = [write("seed=2", "temperature=1", "top_k=20"), write("seed=0", "temperature=3", "top_k=20")]
        others += [write("seed=0", "temperature=1", "top_k=1"), write("seed=0", "top_k=20", "num_tokens=3")]
        assert base == write("seed=0", "temperature=1", "top_k=20") and base not in others
        assert write("temperature=0", "top_k=20") == write("top_k=1", "seed=7"), "greedy equals top_k=1"

    @pytest.mark.parametrize(
        "control",
        [
            "top_p=0.3",
            "min_p=0.9",
            "typical_p=0.1",
            "repetition_penalty=5",
            "no_repeat_ngram_size=2",
            "banned_words=[the]",
        ],
    )
    def test_each_control_reaches_the_text(self, trained, control):
        arguments = ["prompt=the cat", "num_tokens=40", "seed=0", "temperature=2", "top_k=20"]
        plain, changed = (run_main("sample", *arguments, *more, cwd=trained) for more in ([], [control]))
        assert changed.returncode == 0, changed.stderr
        assert changed.stdout != plain.stdout

    def test_top_k_all_is_null(self, trained):
        arguments = ["prompt=the cat", "num_tokens=40", "seed=0", "temperature=2"]
        one, all_, none, null = (
            run_main("sample", *arguments, f"top_k={k}", cwd=trained).stdout for k in ("1", "all", "none", "null")
        )
        assert all_ == none == null != one
        compared = run_main("sample", *arguments, "compare={top_k: [1, all]}", cwd=trained).stdout
        assert "[top_k=null]\n" + null in compared
        session = run_module("sample", "interactive=true", cwd=trained, input="/top_k all\n/settings\n").stdout
        assert "  top_k=null\n" in session

    def test_min_tokens(self, trained):
        arguments = ["prompt=the cat", "num_samples=30", "num_tokens=40", "seed=0", "top_k=20"]
        texts = [run_main("sample", *arguments, *more, cwd=trained).stdout for more in ([], ["min_tokens=40"])]
        shortest = [min(len(text.split()) for text in texts_.strip().split("\n\n")) for texts_ in texts]
        assert shortest[0] < 25 <= shortest[1]

    @pytest.mark.parametrize("where", ["tiny", "outputs/tiny", "outputs/tiny/checkpoints/last.ckpt"])
    def test_a_run_by_name_folder_or_checkpoint(self, trained, where):
        setting = "checkpoint" if where.endswith("ckpt") else "run"
        done = sample(trained, "prompt=the cat", f"{setting}={where}")
        assert done.returncode == 0, done.stderr

    def test_starts_without_lightning_or_datasets(self, trained):
        code = (
            "import sys; sys.argv = ['sample', 'prompt=the cat', 'top_k=5']; from minigpt_pl import sample;"
            "sample.main();"
            "print([m for m in ('lightning', 'datasets', 'torchmetrics', 'transformers') if m in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=trained, capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr

    def test_the_library_knows_neither_hydra_nor_lightning(self):
        code = (
            "import sys; import minigpt_pl, minigpt_pl.loss, minigpt_pl.generation.engine;"
            "print([m for m in ('lightning', 'hydra', 'omegaconf', 'datasets') if m in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.fixture
def damaged(trained, tmp_path):
    """A copy of the run, for a test to damage."""
    shutil.copytree(trained / "outputs", tmp_path / "outputs")
    return tmp_path


def assert_refused(done, *messages):
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.stderr and len(errors) == len(messages), done.stderr
    for message in messages:
        assert any(message in error for error in errors), done.stderr


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "messages"),
        [
            (["prompt="], ["prompt='': has no words"]),
            (["prompt=xyzzy plugh"], ["prompt='xyzzy plugh': the model knows none of its words"]),
            ([], ["prompt=null: give prompt="]),
            (["prompt=a", "prompts_file=p.txt"], ["prompts_file=p.txt: prompt=a is also given"]),
            (["prompt=a", "top_k=2.5"], ["top_k=2.5: must be a whole number or null"]),
            (["prompt=a", "temperature=x"], ["temperature=x: must be a number"]),
            (["prompt=a", "interactive=maybe"], ["interactive=maybe: must be true or false"]),
            (["prompt=a", "banned_words=the"], ["banned_words=the: must be a list, as in [a,b]"]),
            (["prompt=a", "temperature=-1"], ["temperature=-1.0: must be at least 0"]),
            (["prompt=a", "temperature=nan"], ["temperature=nan: must be a finite number"]),
            (["prompt=a", "top_k=0"], ["top_k=0: must be at least 1"]),
            (["prompt=a", "top_k=100000"], ["top_k=100000: must be 1 to 26"]),
            (["prompt=a", "top_p=0", "min_tokens=-1"], ["top_p=0.0: must be above 0", "min_tokens=-1: must be"]),
            (["prompt=a", "top_k=5", "min_tokens=61"], ["min_tokens=61: must be at most num_tokens=60"]),
            (["prompt=a", "topk=3"], ["topk=3: no such setting"]),
            (
                ["prompt=a", "run=none"],
                ["run=none: no such run folder or checkpoint; give a run, such as tiny, or the path"],
            ),
            (
                ["prompt=a", "run=tinny"],
                ["no such run folder or checkpoint; did you mean tiny? give a run, such as tiny"],
            ),
            (["prompt=a", "run=tiny", "checkpoint=x"], ["checkpoint=x: run=tiny also chooses one"]),
            (["prompt=[]"], ["prompt=[]: must be a text or a list of texts"]),
            (["prompt=[the cat, 2.50, null]"], ["prompt=['the cat', 2.5, None]: must be a text"]),
            (["the cat"], ['the cat: is not a setting; quote the prompt, as in prompt="the cat"']),
            (
                ["prompt=the", "cat", "sees"],
                ['cat sees: is not a setting; quote the prompt, as in prompt="the cat sees"'],
            ),
            (["prompt=“the", "cat”"], ['cat”: is not a setting; quote the prompt, as in prompt="the cat"']),
            (["--prompt", "the cat"], ['--prompt: is a setting; write prompt="the cat"']),
            (
                ["--top-k=5", "--prompt=a"],
                ["--top-k: is a setting; write top_k=5", "--prompt: is a setting; write prompt=a"],
            ),
            (
                ["prompt=a", "temprature=1"],
                ["temprature=1: no such setting; did you mean temperature? --help lists them"],
            ),
            (["prompt=a", "qqq=1"], ["qqq=1: no such setting; --help lists them"]),
            (["prompt=a", "show=probs"], ["show=probs: must be probabilities"]),
            (["prompt=a", "num_tokens=[1"], ["num_tokens=[1: cannot be read; put quotes around the value"]),
            (
                ["prompt=a", "seed=1,2"],
                ["seed=1,2: has several values; write 0.5 instead of 0,5"],
            ),
            (["run=a,b"], ["run=a,b: has several values; write 'run=[a,b]' for a list, or add -m to sweep"]),
            (["prompt=a", "+topk=3"], ["topk: no such setting"]),
            (["prompt=a", "run=${none}"], ["run: Interpolation key 'none' not found"]),
            (["--nope"], ["unrecognized arguments: --nope; --hydra-help lists the flags"]),
            (["--config-dir", "none"], ["none' not found"]),
            (["--config-name", "none"], ["Cannot find primary config 'none'"]),
            (["prompt=a", "output_dir=none"], ["output_dir=none: holds no finished run"]),
            (["prompt=a", "checkpoint=none.ckpt"], ["checkpoint=none.ckpt: no such run folder or checkpoint"]),
            (["prompts_file=none.txt"], ["prompts_file=none.txt: cannot be read"]),
            (["prompt=a", "top_k=0", "temperature=-1"], ["top_k=0: must be at least 1", "temperature=-1.0: must be"]),
        ],
    )
    def test_sample(self, trained, arguments, messages):
        assert_refused(run_main("sample", *arguments, cwd=trained), *messages)

    def test_a_damaged_checkpoint(self, damaged):
        path = damaged / "outputs" / "tiny" / "checkpoints" / "best.ckpt"
        path.write_bytes(path.read_bytes()[:1000])
        assert_refused(sample(damaged, "prompt=the cat"), "best.ckpt: cannot be read")

    def test_a_foreign_checkpoint(self, damaged):
        path = damaged / "outputs" / "tiny" / "checkpoints" / "best.ckpt"
        for model in (None, "resnet18", {"layers": 3}, {}):
            torch.save({"state_dict": {}, "hyper_parameters": {"model": model}}, path)
            with pytest.raises(minigpt_pl.InputError, match="best.ckpt: not a checkpoint of minigpt_pl"):
                minigpt_pl.load(path)
        assert_refused(sample(damaged, "prompt=the cat"), "best.ckpt: not a checkpoint of minigpt_pl")

    def test_a_checkpoint_that_would_run_code(self, damaged):
        import pathlib

        path = damaged / "outputs" / "tiny" / "checkpoints" / "best.ckpt"
        torch.save({"hyper_parameters": {"model": {}}, "state_dict": pathlib.PurePosixPath("x")}, path)
        assert_refused(sample(damaged, "prompt=the cat"), "best.ckpt: cannot be read")

    def test_the_words_of_another_run(self, damaged):
        from minigpt_pl.tokenizer import build_tokenizer

        build_tokenizer(["", "[UNK]", "the", "cat", "[END]"]).save(str(damaged / "outputs" / "tiny" / "tokenizer.json"))
        assert_refused(sample(damaged, "prompt=the cat"), "tokenizer.json: not the tokenizer that")

    def test_the_words_of_another_run_of_the_same_size(self, damaged):
        from minigpt_pl.tokenizer import build_tokenizer, list_vocabulary, load_tokenizer

        file = damaged / "outputs" / "tiny" / "tokenizer.json"
        words = list_vocabulary(load_tokenizer(file))
        words[2:4] = words[3], words[2]
        build_tokenizer(words).save(str(file))
        assert_refused(sample(damaged, "prompt=the cat"), "tokenizer.json: not the tokenizer that")

    def test_no_words_beside_the_checkpoint(self, damaged):
        (damaged / "outputs" / "tiny" / "tokenizer.json").unlink()
        assert_refused(sample(damaged, "prompt=the cat"), "tokenizer.json: no such file")

    def test_no_finished_run(self, damaged):
        record = damaged / "outputs" / "tiny" / "run.json"
        record.write_text(record.read_text().replace('"finished"', '"interrupted"'))
        assert_refused(sample(damaged, "prompt=the cat"), "finish tiny with train resume=tiny, or give run=tiny")

    def test_a_broken_record(self, damaged, caplog):
        (damaged / "outputs" / "tiny" / "run.json").write_text("{")
        assert_refused(sample(damaged, "prompt=the cat"), "output_dir=outputs: holds no finished run")
        assert "outputs/tiny: left out, because its run.json is damaged" in caplog.text

    @pytest.mark.parametrize(
        ("arguments", "messages"),
        [
            (["quick"], ["quick: is not a setting; write SETTING=VALUE"]),
            (["--resume"], ["--resume: is a setting; write resume=VALUE"]),
            (["--experiment=quick"], ["--experiment: is a setting; write experiment=quick"]),
            (["--resume", "auto"], ["--resume: is a setting; write resume=auto"]),
            (["embed_dim=8"], ["embed_dim=8: no such setting; did you mean model.embed_dim?"]),
            (["schedule.warmup=8"], ["schedule.warmup=8: no such setting; did you mean schedule.warmup_steps?"]),
            (["+epochs=8"], ["epochs: no such setting; did you mean trainer.max_epochs?"]),
            (["data=text", "data.path=none.txt"], ["data.path=none.txt: no such file or folder"]),
            (["data=text"], ["data.path=???: must be given"]),
            (["data=movies"], ["data=movies: no such choice; choose from imdb, text"]),
            (["experiment=quik"], ["experiment=quik: no such choice; did you mean quick? choose from best, fast"]),
            (["experiment=mine"], ["experiment=mine: no such choice; choose from best, fast"]),
            (["data.source=none"], ["data.source=none: has no plain_text"]),
            (["model.embed_dim=-1", "data.cut=chop"], ["model.embed_dim=-1: must be", "data.cut=chop: must be one of"]),
            (["trainer.max_epochs=x", "model.embed_dim=-1"], ["trainer.max_epochs=x: must be a whole number"]),
            (["=3"], ["=3: write SETTING=VALUE without spaces"]),
            (["seed", "=", "3"], ["=: write SETTING=VALUE without spaces"]),
            (["-m", "seed=1,", "2"], ["seed=1,: ends with a comma; write several values without spaces"]),
            (["model=1", "+data=null"], ["model=1: is not a choice", "+data=null: is not a choice"]),
            (["~trainer.nothing"], ["~trainer.nothing: has no value to delete"]),
            (["+seed=1"], ["An item is already at 'seed'. Either remove + prefix: 'seed=1'"]),
            (["resume=none.ckpt"], ["resume=none.ckpt: no such run folder or checkpoint"]),
            (
                ["data.train_splits=[trian]", "data.validation_split=tets"],
                ["data.train_splits=['trian']: must be one of", "data.validation_split=tets: must be one of"],
            ),
            (["trainer.max_time=0:00:00:00"], ["trainer.max_time=0:00:00:00: must be DD:HH:MM:SS"]),
            (
                ["optimizer.second_moment=by_occurrence", "optimizer.name=adamw"],
                ["optimizer.second_moment=by_occurrence: needs optimizer.name=keras_adam"],
            ),
            (["schedule.final_ratio=0.1"], ["schedule.final_ratio=0.1: has no effect with schedule.name=constant"]),
            (["-m", "seed=1,2", "run_name=x"], ["run_name=x: all jobs would have the same name"]),
            (["-m", "seed=1,2", "resume=auto"], ["resume=auto: continues one run, and -m starts several; give"]),
        ],
    )
    def test_train(self, tmp_path, arguments, messages):
        assert_refused(run_main("train", *arguments, cwd=tmp_path), *messages)
        assert not list(tmp_path.glob("outputs/*/run.json"))

    def test_prompts_are_checked_before_training(self, story, tmp_path):
        arguments = [*TINY_RUN, f"data.path={story}", "text_generator.prompts=[xyzzy]"]
        assert_refused(
            run_main("train", *arguments, cwd=tmp_path),
            "text_generator.prompts='xyzzy': the model knows none of its words",
        )

    def test_resume_of_a_damaged_run(self, damaged):
        folder = damaged / "outputs" / "tiny"
        runs.update_record(folder, status="interrupted")
        for path in (folder / "checkpoints").iterdir():
            path.write_bytes(b"nothing")
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert_refused(run_main("train", "resume=auto", cwd=damaged), "tiny: all its checkpoints are damaged")
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before

    def test_an_error_of_a_file_names_the_file(self, tmp_path):
        folder = tmp_path / "mine" / "experiment"
        folder.mkdir(parents=True)
        (folder / "typo.yaml").write_text("# @package _global_\ntrainer:\n  max_epoch: 1\n")
        (folder / "type.yaml").write_text("# @package _global_\ntrainer:\n  max_epochs: x\n")
        done = run_main("train", "--config-dir=mine", "experiment=typo", cwd=tmp_path)
        assert_refused(
            done, "trainer.max_epoch: no such setting; did you mean trainer.max_epochs? --help lists them (in"
        )
        done = run_main("train", "--config-dir=mine", "experiment=type", cwd=tmp_path)
        assert_refused(done, "trainer.max_epochs: must be a whole number (in experiment/type.yaml)")

    def test_one_line_and_exit_code_2_from_a_new_process(self, trained):
        for arguments in (["top_k=0"], ["topk=3"]):
            done = run_module("sample", *arguments, cwd=trained)
            assert (done.returncode, done.stderr.count("\n"), done.stderr[:7]) == (2, 1, "error: ")

    @pytest.mark.parametrize("arguments", [["prompt="], ["topk=3"]])
    def test_full_error_shows_the_traceback(self, trained, arguments):
        done = run_module("sample", *arguments, cwd=trained, env={"HYDRA_FULL_ERROR": "1"})
        assert done.returncode == 1 and "Traceback" in done.stderr


@pytest.fixture
def mine(tmp_path):
    """A folder with a user's own experiment, mine/experiment/mine.yaml."""
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "mine.yaml").write_text("# @package _global_\ntrainer:\n  max_epochs: 7\n")
    return tmp_path


class TestHydrasFlags:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_cfg_of_each_command(self, command, tmp_path):
        done = run_main(command, "--cfg", "job", "output_dir=elsewhere", cwd=tmp_path)
        assert done.returncode == 0 and "output_dir: elsewhere" in done.stdout.splitlines()
        assert not list(tmp_path.iterdir())

    def test_cfg_resolve_and_package(self, tmp_path):
        done = run_main("train", "data.batch_size=3", "-c", "job", "-p", "data", "--resolve", cwd=tmp_path)
        assert done.stdout.startswith("# @package data\nbatch_size: 3\n")
        assert "cache_dir: outputs/cache" in done.stdout

    @pytest.mark.parametrize("override", ["experiment=mine", "+experiment=mine"])
    def test_a_users_own_experiment(self, mine, override):
        done = run_main("train", "--config-dir", "mine", override, "-c", "job", "-p", "trainer.max_epochs", cwd=mine)
        assert (done.returncode, done.stdout) == (0, "7\n")

    def test_a_users_own_conf_folder(self, mine):
        (mine / "mine" / "other.yaml").write_text("defaults: [sample_schema, hydra_defaults, _self_]\ntop_k: 3\n")
        for flags in (["--config-dir", "mine"], ["--config-dir", "mine", "--config-path", str(mine / "mine")]):
            done = run_main("sample", *flags, "--config-name", "other", "-c", "job", "-p", "top_k", cwd=mine)
            if "--config-path" in flags:  # then conf/hydra_defaults.yaml is not found
                assert_refused(done, "Could not load 'hydra_defaults'")
            else:
                assert (done.returncode, done.stdout) == (0, "3\n")

    def test_deleted_groups_and_settings(self, tmp_path):
        done = run_main("train", "logger=wandb", "~logger", "~seed", "--cfg", "job", cwd=tmp_path)
        assert done.returncode == 0 and "\nlogger:\n  name: csv\n" in done.stdout and "\nseed:" not in done.stdout

    def test_info(self, mine):
        done = run_module("train", "--info", "searchpath", "--config-dir", "mine", cwd=mine)
        assert done.returncode == 0
        assert (done.stdout + done.stderr).count("| command-line | file://") == 1

    def test_shell_completion(self, tmp_path, monkeypatch):
        assert "hydra_bash_completion()" in run_main("train", "-sc", "install=bash", cwd=tmp_path).stdout
        monkeypatch.setenv("COMP_LINE", "minigpt-train trainer.max_e")
        assert run_main("train", "-sc", "query=bash", cwd=tmp_path).stdout == "trainer.max_epochs=\n"
        monkeypatch.setenv("COMP_LINE", "minigpt-train experiment=")
        assert "experiment=quick" in run_main("train", "-sc", "query=bash", cwd=tmp_path).stdout

    def test_version_and_hydras_help(self, tmp_path):
        assert run_main("train", "--version", cwd=tmp_path).stdout.startswith("Hydra 1.3")
        assert "--config-dir" in run_main("train", "--hydra-help", cwd=tmp_path).stdout

    def test_run_dir(self, trained, tmp_path):
        """Hydra creates its folder. It writes files and changes into the folder only on request."""
        arguments = [f"output_dir={trained / 'outputs'}", "prompt=the cat"]
        assert run_main("sample", *arguments, cwd=tmp_path).returncode == 0 and not list(tmp_path.iterdir())
        arguments = [arguments[0], f"hydra.run.dir={tmp_path / 'here'}"]
        assert run_main("sample", *arguments, "prompt=the cat", cwd=tmp_path).returncode == 0
        assert [path.name for path in tmp_path.iterdir()] == ["here"] and not list((tmp_path / "here").iterdir())
        (tmp_path / "here" / "prompts.txt").write_text("the ship")
        more = ["hydra.job.chdir=true", "hydra.output_subdir=.hydra", "prompts_file=prompts.txt"]
        done = run_main("sample", *arguments, *more, cwd=tmp_path)
        assert done.stdout.startswith("the ship"), done.stderr
        assert (tmp_path / "here" / ".hydra" / "overrides.yaml").is_file()

    def test_a_sweep_goes_on_after_a_failed_job(self, trained, tmp_path):
        arguments = ["prompt=the cat", "top_k=0,1", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
        done = run_main("sample", "num_tokens=3", "-m", *arguments, cwd=trained)
        assert_refused(done, "top_k=0: must be at least 1")
        assert done.stdout.startswith("the cat ")
        assert (tmp_path / "sweep" / "multirun.yaml").is_file()


class TestHelp:
    def test_every_setting_with_its_value_and_meaning(self, mine):
        arguments = ["--help", "model.embed_dim=64", "--config-dir", "mine", "experiment=mine"]
        done = run_main("train", *arguments, cwd=mine)
        assert done.returncode == 0, done.stderr
        assert "  model.embed_dim=64\n      width of the embeddings" in done.stdout
        assert "  trainer.max_epochs=7\n" in done.stdout
        assert "  experiment=best|fast|keras|large|mine|quick|small\n" in done.stdout
        assert "  data=imdb|text\n" in done.stdout

    def test_a_setting_without_a_value(self, tmp_path):
        assert "  data.path=???\n" in run_main("train", "data=text", "-h", cwd=tmp_path).stdout

    def test_wrong_settings(self, tmp_path):
        assert_refused(run_main("sample", "--help", "topk=3", cwd=tmp_path), "topk=3: no such setting")

    def test_list_of_commands(self, tmp_path):
        done = run_main("__main__", cwd=tmp_path)
        commands = [line.split(":")[0] for line in done.stdout.splitlines() if line.startswith("python")]
        assert commands == [f"python -m minigpt_pl.{name}" for name in COMMANDS]
        for flag in ("-h", "--help"):
            assert run_main("__main__", flag, cwd=tmp_path).stdout == done.stdout
        assert run_main("__main__", "--version", cwd=tmp_path).stdout == version("minigpt_pl") + "\n"
        assert_refused(run_main("__main__", "train", cwd=tmp_path), "train: write python -m minigpt_pl.train")


def test_resume_of_a_renamed_run(trained, tmp_path):
    shutil.copytree(trained / "outputs" / "tiny", tmp_path / "outputs" / "renamed")  # recorded with run_name=tiny
    done = run_main("train", "resume=renamed", "trainer.max_epochs=3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "outputs" / "renamed" / "run.json").read_text())["epochs"] == 3


def test_resume_uses_the_settings_of_the_run(trained, tmp_path):
    shutil.copytree(trained / "outputs", tmp_path / "outputs")
    done = run_main("train", "resume=outputs/tiny", "trainer.max_epochs=3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "outputs" / "tiny" / "run.json").read_text())
    assert record["epochs"] == 3 and record["status"] == "finished"
    assert len((tmp_path / "outputs" / "tiny" / "samples.jsonl").read_text().splitlines()) == 3


def test_resume_by_name_with_a_moved_text(trained, story, tmp_path):
    """data.path needs data=text, which comes from the record of the run."""
    shutil.copytree(trained / "outputs", tmp_path / "outputs")
    shutil.copy(story, tmp_path / "moved.txt")
    options = ["resume=tiny", "trainer.max_epochs=3"]
    done = run_main("train", *options, "data.path=moved.txt", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "outputs" / "tiny" / "run.json").read_text())["epochs"] == 3
    assert_refused(
        run_main("train", *options, "run_name=other", cwd=tmp_path), "run_name=other: resume=tiny continues tiny"
    )
    changed = tmp_path / "changed.txt"
    changed.write_text(story.read_text() + "The cat sees the dog.\n")
    refused = run_main("train", *options, f"data.path={changed}", cwd=tmp_path)
    assert_refused(refused, "data: this is not the text that")


def test_a_run_in_training_is_not_resumed(trained, tmp_path, caplog):
    shutil.copytree(trained / "outputs", tmp_path / "outputs")
    folder = tmp_path / "outputs" / "tiny"
    runs.update_record(folder, status="running")  # killed or still running: only the lock shows it
    lock = runs.lock(folder)
    done = run_main("train", "resume=auto", cwd=tmp_path)
    assert done.returncode == 0 and "resume=auto: nothing is left to do in outputs" in caplog.text
    caplog.clear()
    options = ["resume=tiny", "trainer.max_epochs=3"]
    assert_refused(run_main("train", *options, cwd=tmp_path), "run_name=tiny: ")
    lock.release()
    done = run_main("train", "resume=auto", cwd=tmp_path)
    assert done.returncode == 0 and "finished after" in caplog.text and "nothing is left to do" in caplog.text
    assert runs.read_record(folder)["status"] == "finished"


@pytest.mark.parametrize("setting", ["output_dir", "data.cache_dir"])
def test_a_file_in_place_of_a_folder(story, tmp_path, setting):
    (tmp_path / "file").write_text("mine")
    done = run_main("train", *TINY_RUN, f"data.path={story}", f"{setting}=file", cwd=tmp_path)
    assert_refused(done, f"{setting}=file: cannot be created")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["x" * 300, "taken"])
def test_unusable_run_names(story, tmp_path, name):
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "taken").write_text("mine")
    done = run_main("train", *TINY_RUN, f"data.path={story}", f"run_name={name}", "resume=auto", cwd=tmp_path)
    assert_refused(done, f"run_name={name}: ")
    assert (tmp_path / "outputs" / "taken").read_text() == "mine"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk(trained):
    command = [sys.executable, "-m", "minigpt_pl.sample", "prompt=the cat", "num_samples=9"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=trained, stdout=full, stderr=subprocess.PIPE, text=True, timeout=600)
    assert_refused(done, "output: no space left on the disk")


@pytest.mark.parametrize(
    ("command", "beginning"),
    [("'prompt=the cat' num_samples=2000 num_tokens=20 | head -1", "the cat"), ("--help | true", "")],
)
def test_a_closed_pipe(trained, command, beginning):
    command = f"{sys.executable} -m minigpt_pl.sample {command}"
    done = subprocess.run(command, shell=True, cwd=trained, capture_output=True, text=True, timeout=600)
    assert done.stdout.startswith(beginning) and "Error" not in done.stderr and "Exception" not in done.stderr


@pytest.mark.parametrize("arguments", ["'prompt=the cat'", "--help"])
def test_closed_standard_output(trained, arguments):
    command = f"{sys.executable} -m minigpt_pl.sample {arguments} >&-"
    done = subprocess.run(command, shell=True, cwd=trained, stderr=subprocess.PIPE, text=True, timeout=600)
    assert (done.returncode, done.stderr[:32]) == (2, "error: standard output is closed")


def test_each_line_is_a_prompt(trained):
    (trained / "odd.txt").write_bytes("\ufeffthe cat\x0cthe\u2028dog\r\nthe ship\n".encode())
    texts = sample(trained, "prompts_file=odd.txt", "seed=0").stdout.split("\n\n")
    assert len(texts) == 2 and texts[0].startswith("the cat")
    piped = sample(trained, "prompts_file=-", "seed=0", input=(trained / "odd.txt").read_text(encoding="utf-8"))
    assert piped.stdout.split("\n\n") == texts


def test_closed_standard_input(trained):
    command = f"{sys.executable} -m minigpt_pl.sample prompts_file=- <&-"
    done = subprocess.run(command, shell=True, cwd=trained, capture_output=True, text=True, timeout=600)
    assert_refused(done, "prompts_file=-: cannot be read")
