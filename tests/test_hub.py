"""Training on a data set of the hub, from a small server that plays the hub."""

import hashlib
import http.server
import io
import json
import os
import pty
import re
import subprocess
import sys
import termios
import threading
import time
import urllib.parse
from pathlib import Path
from unittest import mock

import datasets
import huggingface_hub
import pytest
from conftest import TINY_MODEL, checkpoint, imdb_config, train
from huggingface_hub import constants

from minigpt_pl.data import parquet, sources
from minigpt_pl.data.datamodule import TextDataModule
from minigpt_pl.errors import InputError, TextLostError

README = """---
dataset_info:
  config_name: plain_text
  features:
  - {name: text, dtype: string}
configs:
- config_name: plain_text
  default: true
  data_files:
  - {split: train, path: plain_text/train-*}
  - {split: test, path: plain_text/test-*}
  - {split: unsupervised, path: plain_text/unsupervised-*}
---
"""
TOKEN = "hf_secret"


class Hub(http.server.ThreadingHTTPServer):
    """The answers of the hub that `datasets` asks for, for the private data set stanfordnlp/imdb.

    Attributes:
        files: the contents by path.
        commit: the newest commit.
        requests: (method, path without the query, status) of each answer.
        faults: what happens to the next requests for a part of a file, the last one first: "503", "429", "404", "drop"
            (no answer), "half" (half of the body). All happen to the same part, because two threads read.
        faulty_part: this part; None before the first fault.
    """

    def __init__(self, documents: dict[str, list[str]]):
        super().__init__(("127.0.0.1", 0), _Answer)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.files, self.requests, self.faults = {"README.md": README.encode()}, [], []
        self.faulty_part: str | None = None
        self.publish("a" * 40, documents)

    def publish(self, commit: str, documents: dict[str, list[str]]) -> None:
        import pyarrow
        from pyarrow import parquet

        self.commit = commit
        for split, texts in documents.items():
            contents = io.BytesIO()
            parquet.write_table(pyarrow.table({"text": texts}), contents)
            self.files[f"plain_text/{split}-00000-of-00001.parquet"] = contents.getvalue()


class _Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        status, headers, body = self.answer(path)
        part, fault = self.headers["Range"], ""
        if part and self.server.faults and self.server.faulty_part in (None, part):
            self.server.faulty_part, fault = part, self.server.faults.pop()
        if fault.isdecimal():
            status, headers, body = int(fault), {"Retry-After": "7"} if fault == "429" else {}, b""
        self.server.requests.append((self.command, path, fault or status))
        if fault == "drop":
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in ({"Content-Length": len(body), "X-Repo-Commit": self.server.commit} | headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if fault == "half" else body)
        self.close_connection |= fault == "half"

    do_HEAD = do_GET

    def do_POST(self):
        self.paths = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["paths"]
        self.do_GET()

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        files, commit = self.server.files, self.server.commit
        if "stanfordnlp/imdb" not in path:
            return 404, {}, b"{}"
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return 401, {}, b'{"error": "Invalid username or password."}'
        if found := re.fullmatch(r"/api/datasets/stanfordnlp/imdb(?:/revision/(.+))?", path):
            if found[1] not in (None, "v1", commit):
                return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
            siblings = [{"rfilename": name} for name in files]
            return 200, {}, json.dumps({"id": "stanfordnlp/imdb", "sha": commit, "siblings": siblings}).encode()
        if found := re.fullmatch(r"/api/datasets/stanfordnlp/imdb/tree/[^/]+(?:/(.+))?", path):
            folder = f"{found[1]}/" if found[1] else ""
            names = [name for name in files if name.startswith(folder)]
            entries = [
                {"type": "file", "path": name, "oid": self.hash(name), "size": len(files[name])}
                for name in names
                if "/" not in name.removeprefix(folder)
            ]
            inner = {
                folder + name.removeprefix(folder).split("/")[0]
                for name in names
                if name.count("/") > folder.count("/")
            }
            entries += [{"type": "directory", "path": name, "oid": "0", "size": 0} for name in inner]
            return 200, {}, json.dumps(entries).encode()
        if self.command == "POST" and re.fullmatch(r"/api/datasets/stanfordnlp/imdb/paths-info/[^/]+", path):
            known = [name for name in self.paths if name in files]
            entries = [{"type": "file", "path": n, "oid": self.hash(n), "size": len(files[n])} for n in known]
            return 200, {}, json.dumps(entries).encode()
        found = re.fullmatch(r"/datasets/stanfordnlp/imdb/resolve/[^/]+/(.+)", path)
        if found and found[1] in files:
            contents, tag = files[found[1]], {"ETag": f'"{self.hash(found[1])}"', "Accept-Ranges": "bytes"}
            if part := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or ""):
                first, last = int(part[1]), min(int(part[2]), len(contents) - 1)
                tag["Content-Range"] = f"bytes {first}-{last}/{len(contents)}"
                return 206, tag, contents[first : last + 1]
            return 200, tag, contents
        return 404, {"X-Error-Code": "EntryNotFound"}, b""

    def hash(self, name: str) -> str:
        return hashlib.sha1(self.server.files[name]).hexdigest()

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(story, monkeypatch, tmp_path):
    """A running hub that this process uses, with the token."""
    lines = story.read_text().splitlines()
    with Hub({"train": lines[:200], "test": lines[200:260], "unsupervised": lines[260:]}) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.address)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        sources._hub_splits.cache_clear()
        yield server
        server.shutdown()


def train_in_a_terminal(cwd: Path, environment: dict[str, str], *arguments: str) -> tuple[int, str]:
    """`python -m minigpt_pl.train`, with standard error in a terminal. Returns the exit code and the output."""
    terminal, other_end = pty.openpty()
    termios.tcsetwinsize(terminal, (50, 200))
    command = [sys.executable, "-m", "minigpt_pl.train", *arguments]
    process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=other_end, stderr=other_end)
    os.close(other_end)
    shown = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # the process has ended
            part = b""
        if not part:
            break
        shown += part
    os.close(terminal)
    return process.wait(), shown.decode()


OPTIONS = [*TINY_MODEL, "data=imdb", "data.source=hub", "data.batch_size=16", "trainer=cpu", "trainer.max_epochs=1"]
OPTIONS.append("text_generator.prompts=[the]")


@pytest.mark.slow
def test_train_from_the_hub(hub, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
    code, shown = train_in_a_terminal(tmp_path, environment, *OPTIONS)
    assert code == 0, shown
    assert "imdb from the hub, revision aaaaaaaa (train + test)" in shown
    assert re.search(r"Encoding: [\d.]+k?B", shown), "no progress"
    for noise in ("HTTP Request", "TensorFlow", "Warning", "GET"):
        assert noise not in shown
    reads = [path for method, path, status in hub.requests if method == "GET" and path.endswith(".parquet")]
    assert len(reads) == len(set(reads)) == 3, "a file was read twice"
    assert sum(path.endswith("/dataset_infos.json") for _, path, _ in hub.requests) == 1, (
        "the data set was loaded twice"
    )

    code, shown = train_in_a_terminal(tmp_path, environment | {"HF_TOKEN": "hf_wrong"}, *OPTIONS)
    assert code == 2 and "error: data.source=hub: stanfordnlp/imdb cannot be reached (" in shown
    assert "Traceback" not in shown


def test_a_resume_compares_the_text_and_not_the_commit(hub, tiny_config, story):
    config = tiny_config("trainer.max_epochs=2")
    config.data = imdb_config("hub", batch_size=16, cache_dir=config.data.cache_dir)
    config.trainer.max_epochs = 1
    last = train(config) / "checkpoints" / "last.ckpt"
    steps = checkpoint(last.parent.parent)["global_step"]

    hub.commit, config.trainer.max_epochs = "b" * 40, 2
    train(config, resume_from=last)
    assert checkpoint(last.parent.parent)["global_step"] == 2 * steps

    first, *others = story.read_text().splitlines()[:200]
    hub.publish("c" * 40, {"train": [f"{first} the", *others]})
    config.trainer.max_epochs = 3
    with pytest.raises(InputError, match="data: this is not the text"):
        train(config, resume_from=last)


def test_a_resume_takes_the_reviews_that_auto_took(hub, tiny_config, story, monkeypatch):
    """The packaged reviews, although the hub answers now."""
    lines = story.read_text().splitlines()
    packaged = sources.Source("IMDB reviews, packaged", {"packaged": "small"}, lambda: iter(lines), None)
    monkeypatch.setattr(sources, "_packaged_reviews", lambda: packaged)
    config = tiny_config("trainer.max_epochs=1")
    config.data = imdb_config("auto", batch_size=16, cache_dir=config.data.cache_dir)
    with monkeypatch.context() as silent:
        silent.setattr(sources, "hub_revision", mock.Mock(side_effect=OSError("silent")))
        last = train(config) / "checkpoints" / "last.ckpt"
    steps = checkpoint(last.parent.parent)["global_step"]
    config.trainer.max_epochs = 2
    train(config, resume_from=last)
    assert checkpoint(last.parent.parent)["global_step"] == 2 * steps and not hub.requests


def test_revision_and_a_missing_split(hub):
    source = sources.open_source(imdb_config("hub", revision="v1"))
    assert source.identity["revision"] == hub.commit and len(list(source.train())) == 260
    with pytest.raises(InputError, match="data.source=hub: .* cannot be reached"):
        sources.open_source(imdb_config("hub", revision="v2"))
    hub.commit = "d" * 40
    hub.files["README.md"] = README.replace("  - {split: test, path: plain_text/test-*}\n", "").encode()
    with pytest.raises(InputError, match="data.source=stanfordnlp/imdb: cannot be read .it has no split 'test'"):
        list(sources.open_source(imdb_config("hub")).train())


class TestStreaming:
    """Faults of the network while a data set of the hub is streamed."""

    @pytest.fixture
    def waits(self, hub, monkeypatch):
        """The seconds of each wait. Nothing really waits."""
        huggingface_hub.HfFileSystem.clear_instance_cache()
        monkeypatch.setattr(parquet, "CHUNK_ROWS", 20)
        monkeypatch.setattr(parquet, "WAITS", (1, 2))
        waits = []
        monkeypatch.setattr(time, "sleep", waits.append)
        yield waits
        for thread in threading.enumerate():  # it would read from this hub during the next test
            if thread.name == "read ahead":
                thread.join(60)

    def loader(self, tmp_path):
        config = imdb_config("hub", batch_size=16, streaming=True, sample_documents=200, validation_documents=20)
        config.cache_dir = str(tmp_path / "cache")
        datamodule = TextDataModule(config, 26, 16)
        datamodule.setup()
        assert datamodule.corpus.record["streamed_rows"] == 260 and datamodule.has_validation
        return datamodule.train_dataloader()

    def rows(self, loader) -> list[list[int]]:
        return [row for batch in loader for row in batch.inputs.tolist()]

    @pytest.mark.parametrize(
        ("faults", "expected"),
        [
            (["503"] * 3, [1, 2, 4]),
            (["429"], [8]),
            (["drop"] * 3, [1, 2, 4]),
            (["half"] * 2, [1, 2]),
            (["503"] * 6, [1, 2, 4, 8, 8, 1]),
        ],
        ids=["503", "429", "dropped", "half", "503 for longer"],
    )
    def test_the_text_is_the_same_after_faults(self, hub, waits, tmp_path, faults, expected):
        loader = self.loader(tmp_path)
        whole = self.rows(loader)
        assert len(whole) // 16 == len(loader) and not waits
        loader = self.loader(tmp_path)
        hub.faults = [*faults]
        assert self.rows(loader) == whole and not hub.faults
        # The 8 seconds are the server's 7, and one of huggingface_hub. Its sixth failure is an error, so we wait too.
        assert waits == expected
        assert sum(status in faults for _, _, status in hub.requests) == len(faults)

    def test_a_hub_that_stays_away_ends_in_one_line(self, hub, waits, tmp_path):
        loader = self.loader(tmp_path)
        hub.faults = ["drop"] * 1000
        with pytest.raises(
            TextLostError, match="data.source=hf://.*parquet: cannot be read any more .*resume=auto"
        ) as error:
            self.rows(loader)
        assert len(error.value.problems) == 1 and len(waits) == 3 * 5 + 2 and sum(waits) < 100

    def test_a_file_that_is_gone_is_not_asked_again(self, hub, waits, tmp_path):
        loader = self.loader(tmp_path)
        hub.faults = ["404"] * 1000
        with pytest.raises(TextLostError, match="cannot be read any more"):
            self.rows(loader)
        assert not waits and sum(status == "404" for *_, status in hub.requests) == 1

    def test_words_and_row_groups_are_read_once(self, hub, waits, tmp_path, monkeypatch):
        listed, list_chunks = [], sources.list_chunks
        monkeypatch.setattr(sources, "list_chunks", lambda *a: listed.append(a[1]) or list_chunks(*a))
        self.loader(tmp_path)
        assert sorted(map(len, listed)) == [1, 2]
        hub.requests.clear()
        self.loader(tmp_path)
        assert not [path for _, path, _ in hub.requests if path.endswith(".parquet")]
