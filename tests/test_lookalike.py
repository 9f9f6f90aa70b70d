"""The command line as a user sees it: exit codes, one sentence on stderr, never a traceback."""

import http.server
import importlib.metadata
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from PIL import Image

import lookalike
from service.sources import open_source
from tests.colours import RGB, picture, text_graph, write_colours
from tests.conftest import MODEL, ROOT, encoded, scene
from tests.service.sources.test_files import tarred


def run(
    *arguments: str | Path, cwd: Path = ROOT, environment: dict[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run the command in this process, which saves the start of another one."""
    output, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(errors):
        for name in [name for name in os.environ if name.startswith("LOOKALIKE_")]:
            patch.delenv(name)
        # The fastest variant differs from one run to the next.
        for name, value in ({"LOOKALIKE_VARIANT": "fp32"} | (environment or {})).items():
            patch.setenv(name, value)
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["lookalike", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            lookalike.main()
    return subprocess.CompletedProcess(arguments, int(end.value.code or 0), output.getvalue(), errors.getvalue())


def run_installed(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    """Run the installed command as a process."""
    command = [Path(sys.executable).with_name("lookalike"), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


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


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of colours, whose encoder knows their names."""
    folder = tmp_path_factory.mktemp("colours")
    (folder / "pictures").mkdir()
    for name in RGB:
        (folder / "pictures" / f"{name}.png").write_bytes(picture(name))
    model = write_colours(folder / "colours")
    assert run("index", folder / "pictures", "--model", model, "--store", folder / "store").returncode == 0
    return folder / "store"


def test_search_takes_words(colours: Path, store: Path) -> None:
    done = run("search", "--text", "a purple thing", "--store", colours, "-k", "2", "--json")
    assert [hit["id"] for hit in json.loads(done.stdout)["hits"]] == ["purple.png", "white.png"]
    assert run("search", "--store", colours, "--text", "red", "-k", "1").stdout.endswith("red.png  {}\n")
    assert "the encoder mnist reads no texts; `lookalike import hf:" in refused(
        "search", "--text", "seven", "--store", store
    )
    assert "expected words, got an empty text" in refused("search", "--text", " ", "--store", colours)
    assert "expected whole characters" in refused("search", "--text", os.fsdecode(b"a \xff"), "--store", colours)
    assert "at most 10000 characters, got 100000" in refused("search", "--text", "a" * 10**5, "--store", colours)
    assert "expected a picture or --text, and not both" in refused("search", "--store", colours)
    assert "expected a picture or --text, and not both" in refused(
        "search", "a.png", "--text", "red", "--store", colours
    )


def test_info_refuses_a_broken_text_tower(tmp_path: Path) -> None:
    model = write_colours(tmp_path / "colours", text=text_graph(dimension=5))
    assert "the text tower gives 5 numbers a text, and the image tower 4" in refused("info", model)
    (model / "tokenizer.json").unlink()
    assert "tokenizer.json: cannot be read" in refused("info", model)


def without_onnxruntime(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    """Run a command in a process that has no onnxruntime, as after `pip install .` without an extra."""
    program = "import sys; sys.modules['onnxruntime'] = None; import lookalike; lookalike.main()"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_a_missing_onnxruntime_is_one_sentence_that_names_the_extra(tmp_path: Path) -> None:
    done = without_onnxruntime("index", "digits[:2]", "--model", MODEL, "--store", tmp_path / "store")
    assert done.returncode == 2
    assert done.stderr == (
        "lookalike: onnxruntime is not installed: install the extra cpu (or gpu, for CUDA) of lookalike, "
        "such as pip install '.[cpu]' in the project's folder\n"
    )
    assert not (tmp_path / "store").exists()


@pytest.mark.slow("starts the command three times")
def test_what_needs_no_onnxruntime_works_without() -> None:
    done = without_onnxruntime("info", MODEL, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(run("info", MODEL, "--json").stdout)
    assert "note: the dimension is what the card says, because onnxruntime is not installed" in done.stderr
    for verb in ("serve", "search"):
        assert without_onnxruntime(verb, "--help").returncode == 0


def imported_by(*arguments: str | Path) -> set[str]:
    """Run a command that succeeds; return the packages that its process has imported at its end."""
    program = (
        "import atexit, sys\n"
        "atexit.register(lambda: print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr))\n"
        "import lookalike\n"
        "sys.argv = ['lookalike', *sys.argv[1:]]\n"
        "lookalike.main()\n"
    )
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines()[-1].split())


def test_help_imports_none_of_what_the_verbs_need() -> None:
    heavy = {"numpy", "onnxruntime", "onnx", "faiss", "apsw", "PIL", "pydantic", "prometheus_client", "pyarrow"}
    heavy |= {"bentoml", "fastapi", "starlette", "sklearn", "scipy", "torch", "tqdm", "asyncio"}
    imported = imported_by("--help")
    assert "typer" in imported
    assert not imported & heavy


def test_version() -> None:
    version = importlib.metadata.version("lookalike")
    assert run("--version").stdout == f"lookalike {version}\n"
    commit = {"LOOKALIKE_COMMIT": "0123abc"}
    assert run("--version", environment=commit).stdout == f"lookalike {version} (commit 0123abc)\n"
    assert f"lookalike {version} (commit 0123abc), bentoml" in run("doctor", environment=commit).stdout


def test_search_imports_no_server_and_no_tool_of_other_verbs(store: Path, tmp_path: Path) -> None:
    (tmp_path / "seven.png").write_bytes(open_source("digits").entry(7).data)
    imported = imported_by("search", tmp_path / "seven.png", "--store", store, "--json")
    assert "faiss" in imported
    assert not imported & {"bentoml", "fastapi", "starlette", "uvicorn", "anyio", "asyncio", "opentelemetry"}
    assert not imported & {"pyarrow", "sklearn", "scipy", "onnx", "torch", "pydantic_settings", "rich", "tqdm"}


def test_info() -> None:
    facts = json.loads(run("info", MODEL, "--json").stdout)
    assert facts["name"] == "mnist"
    assert facts["dimension"] == 128
    assert "fingerprint" in run("info", MODEL).stdout


def test_a_limit_that_is_set_counts_in_every_verb(store: Path, tmp_path: Path) -> None:
    """One's own pictures may be larger than those of strangers, as long as no limit is set."""
    folder, limit = tmp_path / "pictures", {"LOOKALIKE_MAX_PIXELS": "25000000"}
    folder.mkdir()
    (folder / "large.png").write_bytes(encoded(Image.new("1", (5001, 5000))))
    commands = {
        "index": ("index", folder, "--model", MODEL, "--store", tmp_path / "store"),
        "embed": ("embed", folder, "--model", MODEL, "--out", tmp_path / "out"),
        "search": ("search", folder / "large.png", "--store", store),
    }
    for verb, command in commands.items():
        done = run(*command, environment=limit)
        assert done.returncode == (2 if verb == "search" else 1), done.stderr
        named = (tmp_path / "out" / "_failures.jsonl").read_text() if verb == "embed" else done.stderr
        assert "5001x5000; the limit is 25000000 pixels (LOOKALIKE_MAX_PIXELS)" in named, verb
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert run(*command).returncode == 0, verb


def test_bad_pictures_end_with_1(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "good.png").write_bytes(encoded(scene()))
    (folder / "bad.png").write_bytes(b"no picture")
    done = run_installed("index", folder, "--model", MODEL, "--store", tmp_path / "store")
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
    tar = tarred(tmp_path / "set.tar", [("1.input.jpg", b""), ("1.mask.png", b""), ("1.cls", b"a")])
    for command in (
        ("index", tar, "--model", MODEL, "--store"),
        ("embed", tar, "--model", MODEL, "--out"),
        ("whiten", MODEL, "--calibrate", tar, "--out"),
    ):
        said = refused(*command, tmp_path / "s", "--image-key", "depth")
        assert "no picture under the key depth; found input.jpg, mask.png" in said
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


def test_photographs_get_their_encoder_and_digits_theirs_and_both_are_said(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "good.png").write_bytes(encoded(scene()))
    done = run("index", "pictures", "--store", "photos", cwd=tmp_path)
    assert done.returncode == 0
    assert "encoder: .lookalike/models/photos, the default for photographs; --model names another" in done.stderr
    assert "note:" not in done.stderr
    again = run("index", "pictures", "--store", "photos", cwd=tmp_path)
    assert "0 pictures added, 1 there already" in again.stderr
    # By now it is the store's own encoder.
    assert "encoder:" not in again.stderr
    done = run("index", "digits[:20]", "--store", tmp_path / "digits")
    assert "encoder: models/digits, the default for digits; --model names another" in done.stderr
    assert "note:" not in done.stderr
    done = run("index", "digits[:20]", "--model", tmp_path / ".lookalike/models/photos", "--store", tmp_path / "wrong")
    assert "these pictures look like handwritten digits" in done.stderr
    done = run("reindex", "--model", MODEL, "--store", tmp_path / "wrong")
    assert done.returncode == 0
    assert f"20 pictures are of the encoder {MODEL} now" in done.stderr


def test_a_search_where_no_store_is_makes_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(scene()))
    done = run("search", "a.png", "--store", "none", cwd=tmp_path)
    assert done.returncode == 2
    assert "none: no store there" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_import_and_whiten_refuse_in_a_sentence(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "is there already" in refused("import", "efficientnet-lite0", "--out", tmp_path)
    assert "comes with its own" in refused("import", "efficientnet-lite0", "--out", out, "--weights", "mine.pth")
    whiten = ("whiten", MODEL, "--out", out, "--calibrate")
    assert "no such source" in refused(*whiten, "nowhere")
    assert "holds no picture" in refused(*whiten, tmp_path)
    assert "no such model folder" in refused("whiten", "models/none", "--out", out, "--calibrate", "digits")
    assert "expected 1 to 256, got 300" in refused(*whiten, "digits", "--dimension", "300")
    done = run(*whiten, "digits[:10]")
    assert done.returncode == 2
    assert "lookalike: digits[:10]: 9 pictures are too few to learn a whitening on; expected 20 or more" in done.stderr
    assert "Traceback" not in done.stderr
    done = run(*whiten, "digits", "--power", "2")
    assert done.returncode == 2
    assert not out.exists()


@pytest.mark.slow("runs five commands, one of which learns a whitening")
def test_an_encoder_is_whitened_where_torch_is_not(tmp_path: Path) -> None:
    """The verbs of the serving set: in a process where importing torch or training fails."""
    code = (
        "import sys\n"
        "class NoTorch:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'torchvision', 'training'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, NoTorch())\n"
        "import lookalike\n"
        "sys.argv = ['lookalike', *sys.argv[1:]]\n"
        "lookalike.main()\n"
    )

    def without_torch(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    done = without_torch("import", "efficientnet-lite0", "--out", tmp_path / "photos")
    assert (done.returncode, done.stdout) == (0, f"wrote {tmp_path / 'photos'}\n")
    done = without_torch(
        "whiten", MODEL, "--calibrate", "digits[:400]", "--out", tmp_path / "mine", "--dimension", "64"
    )
    assert done.returncode == 0, done.stderr
    assert "learnt on 360 pictures; 0 could not be read" in done.stderr
    assert json.loads(run("info", tmp_path / "mine", "--json").stdout)["dimension"] == 64
    done = without_torch("import", "resnet18", "--out", tmp_path / "resnet")
    assert done.returncode == 2
    assert "needs the training environment" in done.stderr


def test_a_model_whose_checksum_differs(tmp_path: Path) -> None:
    model = Path(shutil.copytree(MODEL, tmp_path / "model"))
    with (model / "model.onnx").open("ab") as file:
        file.write(b"\0")
    says = "model.onnx: damaged: sha256 is"
    assert says in refused("info", model)
    assert says in refused("serve", "--model", model, "--store", tmp_path / "store")
    assert says in refused("index", "digits[:2]", "--model", model, "--store", tmp_path / "store")
    assert says in refused("embed", "digits[:2]", "--model", model, "--out", tmp_path / "parts")
    assert not (tmp_path / "store").exists()
    assert not (tmp_path / "parts").exists()


def test_a_store_whose_encoder_was_damaged(tmp_path: Path) -> None:
    model = Path(shutil.copytree(MODEL, tmp_path / "model"))
    assert run("index", "digits[:2]", "--model", model, "--store", tmp_path / "store").returncode == 0
    with (model / "model.int8.onnx").open("r+b") as file:
        file.write(b"\0")
    for verb in (("serve",), ("search", ROOT / "docs" / "digits.png"), ("index", "digits[:3]")):
        assert "model.int8.onnx: damaged: sha256 is" in refused(*verb, "--store", tmp_path / "store")


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
    done = run_installed("nonsense")
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)


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


def test_duplicates_are_listed_first_and_removed_by_that_list(tmp_path: Path) -> None:
    pictures, folder = tmp_path / "pictures", tmp_path / "store"
    pictures.mkdir()
    for name, seed in (("a.png", 1), ("b.png", 1), ("c.png", 2)):
        (pictures / name).write_bytes(encoded(scene(seed=seed)))
    assert run("index", pictures, "--model", MODEL, "--store", folder).returncode == 0
    chosen = ("duplicates", "--store", folder, "--preset", "exact")
    done = run(*chosen)
    assert done.stdout == "a.png  keep: first added\n  same bytes  b.png\n"
    assert done.stderr == f"{folder}: 1 groups of 2 pictures with scores from 1 on\n"
    (group,) = json.loads(run(*chosen, "--json").stdout)["groups"]
    assert (group["best"], [item["id"] for item in group["items"]]) == ("a.png", ["a.png", "b.png"])
    found = json.loads(run("duplicates", "--store", folder, "--threshold", "0.999", "--json").stdout)
    assert (found["threshold"], len(found["groups"])) == (0.999, 1)
    files = [tmp_path / name for name in ("table.csv", "sheet.html", "remove.sh", "list")]
    done = run(
        *chosen, "--csv", files[0], "--html", files[1], "--script", files[2], "--delete-rest", files[3], "--files"
    )
    assert all(file.stat().st_size for file in files)
    assert "lists 1 items; nothing is removed" in done.stderr
    assert (pictures / "b.png").exists()
    done = run(*chosen, "--delete-rest", files[3], "--files", "--yes")
    assert done.stdout == "removed  b.png\n1 items and 1 files removed, 0 left\n"
    assert sorted(path.name for path in pictures.iterdir()) == ["a.png", "c.png"]
    done = run(*chosen, "--delete-rest", files[3], "--yes", "--json")
    assert done.returncode == 1
    assert [one["id"] for one in json.loads(done.stdout)["left"]] == ["b.png"]


def test_duplicates_refuse_in_a_sentence(store: Path, tmp_path: Path) -> None:
    assert "no store there" in refused("duplicates", "--store", tmp_path / "none")
    assert "no store there" in refused("duplicates", "--store", tmp_path / "none", "--delete-rest", "x", "--yes")
    assert not (tmp_path / "none").exists()
    assert "expected a number above 0" in refused("duplicates", "--store", store, "--threshold", "2")
    assert "needs the list" in refused("duplicates", "--store", store, "--yes")
    assert "needs the list" in refused("duplicates", "--store", store, "--files")
    listed = ("--delete-rest", tmp_path / "list", "--yes")
    assert "writes nothing" in refused("duplicates", "--store", store, *listed, "--csv", tmp_path / "a.csv")
    assert "cannot be written" in refused("duplicates", "--store", store, "--csv", tmp_path / "none" / "a.csv")
    assert "cannot be read" in refused("duplicates", "--store", store, "--delete-rest", tmp_path / "none", "--yes")


def test_a_shell_completes_the_verbs() -> None:
    typed = {"COMP_WORDS": "lookalike sea", "COMP_CWORD": "1", "_LOOKALIKE_COMPLETE": "complete_bash"}
    command = Path(sys.executable).with_name("lookalike")
    done = subprocess.run([command], env=os.environ | typed, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["search"]


def test_doctor_checks_machine_encoder_and_store(store: Path, tmp_path: Path) -> None:
    done = run("doctor", "--store", store)
    assert done.returncode == 0, done.stdout
    about = ["versions", "python", "processor", "memory", "disk", "runtimes", "pictures", "setting", "encoder", "store"]
    assert list(dict.fromkeys(line.split()[1] for line in done.stdout.splitlines())) == about
    assert "200 items of the encoder mnist" in done.stdout
    assert str(store.parent) not in done.stdout
    assert str(store) in run("doctor", "--store", store, "--paths").stdout
    # Each problem has its line, and the other checks go on.
    done = run("doctor", "--store", store, "--model", tmp_path / "nothing")
    assert (done.returncode, done.stdout.count("PROBLEM")) == (1, 1)
    assert str(tmp_path) not in done.stdout
    done = run("doctor", "--store", store, "--model", ROOT / "models" / "cifar10")
    assert done.returncode == 1
    assert "another encoder built it" in done.stdout
    damaged = Path(shutil.copytree(store, tmp_path / "damaged"))
    with (damaged / "catalog.sqlite").open("r+b") as file:
        file.truncate(8192)
    done = run("doctor", "--store", damaged, "--model", MODEL)
    assert done.returncode == 1
    assert "PROBLEM store" in done.stdout


def test_doctor_shows_no_key() -> None:
    done = run("doctor", environment={"LOOKALIKE_API_KEYS": "write:secret-0123456789abcdef"})
    assert "api_keys = (hidden)" in done.stdout
    assert "secret" not in done.stdout


def test_try_opens_no_page_of_another_service_on_its_port(tmp_path: Path) -> None:
    opened, browser = tmp_path / "opened", tmp_path / "browser"
    browser.write_text(f'#!/bin/sh\ntouch "{opened}"\n')
    browser.chmod(0o755)
    environment = {"DISPLAY": ":0", "BROWSER": f"{browser} %s"}

    class Ready(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

    with http.server.HTTPServer(("127.0.0.1", 0), Ready) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        command = ("try", "digits[:3]", "--model", MODEL, "--port", str(other.server_address[1]))
        done = run(*command, cwd=tmp_path, environment=environment)
        assert done.returncode == 2
        assert "Address already in use" in done.stderr
        time.sleep(2)
        other.shutdown()
    assert not opened.exists()
