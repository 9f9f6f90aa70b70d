"""The command line as a user meets it: exit codes, one sentence on stderr, never a traceback."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from service.sources import open_source
from tests.conftest import MODEL, ROOT, encoded, scene

LOOKALIKE = Path(sys.executable).with_name("lookalike")


def run(
    *arguments: str | Path, cwd: Path = ROOT, environment: dict[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    clean = {key: value for key, value in os.environ.items() if not key.startswith("LOOKALIKE_")}
    return subprocess.run(
        [LOOKALIKE, *arguments], cwd=cwd, env=clean | (environment or {}), capture_output=True, text=True, check=False
    )


def refused(*arguments: str | Path, **environment: str) -> str:
    """Run a command that must end with exit code 2 and one sentence; return the sentence."""
    done = run(*arguments, environment=environment)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("lookalike: ")
    assert len(done.stderr.strip().splitlines()) == 1
    return done.stderr


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 200 digits."""
    folder = tmp_path_factory.mktemp("cli") / "store"
    assert run("index", "digits[:200]", "--model", MODEL, "--store", folder).returncode == 0
    return folder


def test_search_needs_no_model(store: Path, tmp_path: Path) -> None:
    (tmp_path / "seven.png").write_bytes(open_source("digits").entry(7).data)
    done = run("search", tmp_path / "seven.png", "--store", store, "-k", "3", "--json", cwd=tmp_path)
    hits = json.loads(done.stdout)["hits"]
    assert [set(hit) for hit in hits] == [{"id", "score", "metadata"}] * 3
    assert hits[0]["id"] == "digits/00007"
    text = run("search", tmp_path / "seven.png", "--store", store, "-k", "1").stdout
    assert text == f'{hits[0]["score"]:.4f}  digits/00007  {{"label": "7"}}\n'


def test_info() -> None:
    facts = json.loads(run("info", MODEL, "--json").stdout)
    assert facts["name"] == "mnist"
    assert facts["dimension"] == 256
    assert "fingerprint" in run("info", MODEL).stdout


def test_bad_pictures_end_with_1(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "good.png").write_bytes(encoded(scene()))
    (folder / "bad.png").write_bytes(b"no picture")
    done = run("index", folder, "--model", MODEL, "--store", tmp_path / "store")
    assert done.returncode == 1
    assert "1 pictures added, 0 there already, 1 could not be read" in done.stderr
    assert "skipped bad.png: not a picture that we take" in done.stderr
    assert "lookalike reindex --store" in done.stderr
    done = run("embed", folder, "--model", MODEL, "--out", tmp_path / "out.parquet")
    assert done.returncode == 1
    assert "1 could not be read" in done.stderr


def test_refusals(store: Path, tmp_path: Path) -> None:
    assert "no such source" in refused("index", "nowhere", "--model", MODEL, "--store", tmp_path / "s")
    assert not (tmp_path / "s").exists()
    assert "holds no picture" in refused("embed", tmp_path, "--model", MODEL, "--out", tmp_path / "o.parquet")
    assert "no such model folder" in refused("index", "digits", "--model", "models/none", "--store", tmp_path / "s")
    assert "no such model folder" in refused("info", "models/none")
    assert "no such model folder" in refused("serve", "--model", "models/none", "--store", tmp_path / "s")
    assert "no store there" in refused(
        "search", MODEL / "card.json", "--store", tmp_path / "s", LOOKALIKE_MODEL=str(MODEL)
    )
    assert "cannot be read" in refused("search", tmp_path / "none.png", "--store", store)
    assert "not a picture" in refused("search", MODEL / "card.json", "--store", store)
    assert "k: expected a whole number from 1 to 1000, got 0" in refused(
        "search", ROOT / "models" / "mnist" / "card.json", "--store", store, "-k", "0"
    )
    assert "API key 1: expected read:KEY" in refused("serve", "--store", store, LOOKALIKE_API_KEYS="a-key-of-mine")
    assert "LOOKALIKE_MAX_K" in refused("search", MODEL / "card.json", "--store", store, LOOKALIKE_MAX_K="many")


def test_a_model_whose_checksum_differs(tmp_path: Path) -> None:
    model = Path(shutil.copytree(MODEL, tmp_path / "model"))
    with (model / "model.onnx").open("ab") as file:
        file.write(b"\0")
    assert "model.onnx: damaged: sha256 is" in refused("info", model)
    assert "damaged" in refused("serve", "--model", model, "--store", tmp_path / "store")


def test_a_store_built_by_another_encoder(store: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(MODEL, tmp_path / "other"))
    for file in ("card.json", "model.fp16.onnx", "model.int8.onnx"):
        (model / file).unlink()
    config = json.loads((model / "preprocessor_config.json").read_text()) | {"resample": 2}
    (model / "preprocessor_config.json").write_text(json.dumps(config))
    for verb in (("index", "digits[:3]"), ("serve",)):
        assert "built by the encoder mnist" in refused(*verb, "--model", model, "--store", store)


def test_a_port_that_is_taken(store: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"cannot listen on 127.0.0.1:{port}: Address already in use; choose another with --port" in refused(
            "serve", "--store", store, "--port", port
        )


def test_usage_errors_end_with_2() -> None:
    tpu = ("pretrain", "digits", "--recipe", "mnist-simclr", "--out", "models/x", "--device", "tpu")
    for arguments in (("serve", "--port", "0"), ("embed",), ("nonsense",), tpu):
        done = run(*arguments)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr


def test_the_training_verbs_say_what_they_need() -> None:
    """Without torch, the verbs that need it name the environment that has it."""
    program = (
        "import sys\n"
        "class NoTorch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch': raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, NoTorch())\n"
        "sys.argv = ['lookalike', 'evaluate', 'models/mnist', '--bank', 'digits', '--queries', 'digits']\n"
        "import lookalike\n"
        "lookalike.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "run `make setup`" in done.stderr


def test_a_store_goes_out_as_parquet_and_into_another(store: Path, tmp_path: Path) -> None:
    done = run("store", "export", "--store", store, "--out", tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, f"{tmp_path / 'out'}: 200 items written\n")
    copy = tmp_path / "copy"
    done = run("store", "import", tmp_path / "out", "--store", copy, "--model", MODEL)
    assert done.returncode == 0
    assert done.stderr == f"{copy}: 200 items added, 0 there already, 0 cannot be\n"
    done = run("store", "check", "--store", copy)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", f"{copy}: no problems found\n")
    (copy / "index.snapshot").write_bytes(b"")
    done = run("store", "check", "--store", copy)
    assert done.returncode == 1
    assert "index.snapshot: it does not begin like a snapshot" in done.stdout
    assert "no store there" in refused("store", "check", "--store", tmp_path / "nowhere")
    assert "is of the encoder mnist already" in refused("reindex", "--model", MODEL, "--store", copy)
