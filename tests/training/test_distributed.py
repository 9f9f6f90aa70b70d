"""Two processes that share each batch learn what one learns; what ends one of them ends all.

This file is a program, too: two processes that train a few steps by each method and write what they found. They are
forks of one that has imported torch, since three imports, which torchrun would make, take longer than all the steps.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist

from service.encoding.card import square_preprocessing
from service.errors import InvalidRequest
from service.sources import open_source
from tests.ports import free_port
from training.backbones import build_backbone
from training.batch_norms import synchronise
from training.checkpoint import Cursor, Identity, read_checkpoint
from training.data import Canvas, batches
from training.distributed import check_divisible, exchange, first, joined, own_folder, own_part
from training.material import prepare
from training.methods import METHODS, build_method
from training.pretrain import Learner, begin, load, train
from training.recipe import MethodName, Recipe, read_recipe

pytestmark = pytest.mark.slow("two processes train by each method, and others are started to be killed")

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
# What is wrong shows in the first step, or in the second where it is carried over, as a queue is. So the others need
# not go as far as SimCLR.
STEPS = dict.fromkeys(METHODS, 5) | {"simclr": 20}
# Small steps of SGD. AdamW divides a gradient by its own size, so rounding decides where it is nearly 0; and with large
# steps a change of 1e-7 in the weights of one process alone is one of 1e-3 in its loss after 20 steps.
CHANGES: dict[str, Any] = {"precision": "float32", "optimizer": "sgd", "momentum": 0.9, "learning_rate": 1e-4}
OF_METHOD: dict[str, dict[str, Any]] = {
    "moco": {"moco": {"queue": 128, "splits": 4}},
    "dino": {"dino": {"prototypes": 64, "local_views": 2, "centering": "sinkhorn", "frozen": 0.0}},
    "clusters": {"clusters": {"clusters": 10, "every": 1}},
    "clip": {"text": {"words": {str(digit): (f"digit {digit}",) for digit in range(10)}}},
}
# The largest difference of a loss: of one above 1 as a share of it. Rounding grows most where nearly constant columns
# are scaled to a deviation of 1, and where a maximum is chosen.
CLOSE = dict.fromkeys(METHODS, 1e-5) | {"barlow": 1e-4, "dino": 1e-4, "triplet": 1e-3, "vicreg": 1e-2}
SOURCE = "digits[:300]"
BAD = (3, 40, 41, 77)


def recipe_of(file: Path, name: str) -> Recipe:
    content = read_recipe(str(file)).model_dump() | CHANGES | {"method": name}
    for key, values in OF_METHOD.get(name, {}).items():
        content[key] |= values
    return Recipe.model_validate(content)


def trained(recipe: Recipe, folder: Path) -> tuple[list[float], float]:
    """The losses of the first steps, and how far the processes are apart after them, in any weight or statistic."""
    source = open_source(SOURCE)
    torch.manual_seed(recipe.seed)
    method = build_method(recipe, build_backbone(recipe.backbone, recipe.channels, recipe.side), len(source))
    material = prepare(source, recipe, folder, CPU)
    progress = begin(material, Identity(SOURCE, recipe), None)
    progress.total = STEPS[recipe.method]
    learner, loader = Learner(method, material, recipe, None), load(material, recipe, progress)
    found = [float(learner.step(loader, progress).loss.detach()) for _ in range(progress.total)]
    loader.close()
    material.canvas.close()
    state = torch.cat([one.double().flatten() for one in method.state_dict().values()])
    return found, max(float((one - state).abs().max()) for one in exchange(state))


def normalised(norm: nn.Module, x: Tensor, slope: Tensor) -> list[Tensor]:
    """Output, gradients of input, weight and bias, and running statistics of a batch norm."""
    x = x.clone().requires_grad_()
    y = norm(x)
    (y * slope).sum().backward()
    assert x.grad is not None
    assert norm.weight.grad is not None
    assert norm.bias.grad is not None
    return [y.detach(), x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]


def batch_norm_differences() -> list[float]:
    """How far SyncedBatchNorm is from one that gets the whole batch, in each value of `normalised`."""
    randomness = torch.Generator().manual_seed(0)
    x, slope = (torch.randn(8, 5, 3, 3, generator=randomness) * 2 + 1 for _ in range(2))
    one, several = nn.BatchNorm2d(5), nn.BatchNorm2d(5)
    synchronise(several)
    whole = normalised(one, x, slope)
    mine = normalised(several, own_part(x[None])[0], own_part(slope[None])[0])
    for gradient in mine[2:4]:
        dist.all_reduce(gradient)
    expected = [own_part(whole[0][None])[0], own_part(whole[1][None])[0], *whole[2:]]
    return [float((a - b).abs().max()) for a, b in zip(mine, expected, strict=True)]


def order_with_bad_pictures(folder: Path) -> list[list[float]]:
    """Positions of four batches and the mean pixel of each of their pictures; then the bad pictures that are known."""
    sound = open_source("digits[:100]")

    def read(position: int) -> bytes:
        return b"no picture" if position in BAD else sound.read(position)

    source = replace(sound, read=read)
    canvas = Canvas(source, square_preprocessing(8), 1, folder, CPU)
    drawn = islice(batches(canvas, np.arange(100), 20, 0, Cursor()), 4)
    found = []
    for pixels, positions, _ in drawn:
        means = [mean for share in exchange(pixels.float().mean((1, 2, 3)).tolist()) for mean in share]
        found.append([*map(float, positions.tolist()), *means])
    canvas.close()
    return [*found, [float(at) for at in sorted(canvas.bad)]]


def refusals(file: Path) -> list[str]:
    """The sentences that name what several processes cannot do."""
    said = []
    moco = recipe_of(file, "moco").model_dump()
    odd = Recipe.model_validate(moco | {"moco": moco["moco"] | {"splits": 3}})
    for refused in (
        lambda: check_divisible(63, False),
        lambda: check_divisible(2, False),
        lambda: check_divisible(64, True),
        lambda: build_method(odd, build_backbone("small-cnn", 1, 8), 300),
    ):
        with pytest.raises(InvalidRequest) as error:
            refused()
        said.append(str(error.value))
    return said


def begin_a_run(recipe: Recipe, folder: Path) -> None:
    """Train one step and save."""
    source = open_source(SOURCE)
    torch.manual_seed(recipe.seed)
    method = build_method(recipe, build_backbone(recipe.backbone, recipe.channels, recipe.side), len(source))
    material = prepare(source, recipe, folder, CPU)
    train(method, material, Identity(SOURCE, recipe), folder, session_s=0)
    material.canvas.close()


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def torchrun(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]


@pytest.fixture(scope="module")
def two(tiny_recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes found, by `main`."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, __file__, str(tiny_recipe_file), str(folder)]
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = subprocess.run(command, env=environment() | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found | {"folder": folder}


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_have_the_losses_of_one(
    name: MethodName, two: dict[str, Any], tiny_recipe_file: Path, tmp_path: Path
) -> None:
    alone, _ = trained(recipe_of(tiny_recipe_file, name), tmp_path)
    losses, apart = two["trained"][name]
    differences = np.abs(np.subtract(losses, alone)) / np.maximum(1, np.abs(alone))
    assert differences.max() < CLOSE[name]
    assert apart == 0


def test_a_batch_norm_of_two_processes_is_that_of_the_whole_batch(two: dict[str, Any]) -> None:
    assert max(two["batch_norm"]) < 1e-5


def test_bad_pictures_shift_the_shares_and_not_the_order(two: dict[str, Any], tmp_path: Path) -> None:
    alone = order_with_bad_pictures(tmp_path)
    assert two["order"] == alone
    assert len(alone[-1]) > 1


def test_what_several_processes_cannot_do_is_named(two: dict[str, Any]) -> None:
    odd, small, compiled, splits = two["refusals"]
    assert "batch_size is 63, and 2 processes" in odd
    assert "batch_size is 2" in small
    assert "compile is for one process" in compiled
    assert "moco.splits is 3" in splits


def test_the_first_process_alone_writes_the_run(two: dict[str, Any]) -> None:
    run = two["folder"] / "run"
    written = {path.name.split(".")[0] for path in run.iterdir()}
    assert written == {"checkpoint", "log", "events", "process-1"}
    assert not (run / "process-1" / "checkpoint.pt").exists()
    assert not (run / "process-1" / "canvas.bin").exists()


def test_one_process_resumes_the_run_of_two(two: dict[str, Any], tiny_recipe_file: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_recipe_file, "simclr")
    ends = []
    for folder in (two["folder"] / "run", tmp_path):
        earlier = read_checkpoint(folder)
        assert (earlier is None) == (folder == tmp_path)
        source = open_source(SOURCE)
        torch.manual_seed(recipe.seed)
        method = build_method(recipe, build_backbone(recipe.backbone, recipe.channels, recipe.side), len(source))
        material = prepare(source, recipe, folder, CPU, earlier)
        ends.append(train(method, material, Identity(SOURCE, recipe), folder, earlier))
        material.canvas.close()
    assert ends[0].progress.step == ends[1].progress.step > 1
    assert ends[0].progress.loss == pytest.approx(ends[1].progress.loss, rel=1e-5)


def test_a_process_that_dies_ends_all_within_a_minute_and_leaves_a_checkpoint(
    tiny_recipe_file: Path, tmp_path: Path
) -> None:
    out, errors = tmp_path / "model", tmp_path / "stderr.txt"
    verb = [
        "pretrain",
        SOURCE,
        "--recipe",
        str(tiny_recipe_file),
        "--set",
        "precision=float32",
        "--set",
        "epochs=100000",
    ]
    verb += ["--checkpoint-minutes", "0.001", "--device", "cpu", "--out", str(out)]
    with errors.open("w") as stderr:
        started = subprocess.Popen(torchrun("-m", "lookalike", *verb), env=environment(), stderr=stderr)
    try:
        while not (out.with_name("model.run") / "checkpoint.pt").exists():
            assert started.poll() is None, errors.read_text()[-3000:]
            time.sleep(0.05)
        children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
        ranks = {rank_of(int(child)): int(child) for child in children}
        os.kill(ranks["1"], signal.SIGKILL)
        killed = time.monotonic()
        assert started.wait(60) != 0
        assert time.monotonic() - killed < 60
    finally:
        started.kill()
    for child in ranks.values():
        assert not Path(f"/proc/{child}").exists()
    earlier = read_checkpoint(out.with_name("model.run"))
    assert earlier is not None
    assert earlier.progress.step > 0
    assert not out.exists()


def rank_of(process: int) -> str:
    variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    return next((one.removeprefix(b"RANK=").decode() for one in variables if one.startswith(b"RANK=")), "")


def main(file: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    with joined(CPU):
        run = folder / "run"
        if first():
            (run / "process-1").mkdir(parents=True)
            (run / "process-1" / "canvas.bin").write_bytes(b"of a run that was killed")
        own = own_folder(run)
        found = {
            "batch_norm": batch_norm_differences(),
            "order": order_with_bad_pictures(own),
            "refusals": refusals(file),
            "trained": {name: trained(recipe_of(file, name), own) for name in METHODS},
        }
        begin_a_run(recipe_of(file, "simclr"), own)
        if first():
            (folder / "found.json").write_text(json.dumps(found))


def run() -> int:
    """Run `main` in two processes, and return the exit code of the second."""
    # scikit-learn is imported once, too.
    open_source(SOURCE)
    second = os.fork()
    os.environ["RANK"] = "0" if second else "1"
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    return os.waitstatus_to_exitcode(os.waitpid(second, 0)[1]) if second else 0


if __name__ == "__main__":
    sys.exit(run())
