"""benchmarks.gpu on a machine without a GPU: a part that cannot run leaves a sentence, and one that can a row."""

import subprocess
import sys

from tests.conftest import ROOT

# Packages of the service that a machine with a GPU lacks, and that this benchmark does without.
WITHOUT = "import sys; sys.modules |= dict.fromkeys(('bentoml', 'litserve'))\n"


def part(*arguments: str) -> tuple[int, list[str]]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stdout.splitlines()


def test_a_part_that_fails_leaves_one_sentence() -> None:
    code, lines = part("training")
    assert (code, len(lines)) == (1, 1)
    assert lines[0].startswith("| training: failed: ValueError: no --data was given |")
    code, lines = part("training", "--data", "nowhere")
    assert (code, len(lines)) == (1, 1)
    assert "nowhere/train.zip" in lines[0]


def test_the_bare_server_needs_no_bentoml() -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"{WITHOUT}import benchmarks.bare, benchmarks.gpu; print('imported')"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "imported", done.stderr
