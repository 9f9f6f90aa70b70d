"""A recipe file: what parses, what is refused, and in which words."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from service.errors import InvalidRequest
from training.recipe import SHIPPED, Recipe, read_recipe


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.toml")), ids=lambda path: path.stem)
def test_a_shipped_recipe_parses_and_opens_with_its_command(path: Path) -> None:
    recipe = read_recipe(path.stem)
    assert recipe.name == path.stem
    lines = path.read_text().splitlines()
    comment = lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))]
    commands = [line for line in comment if "lookalike pretrain" in line]
    assert commands, "the opening comment names no command"
    assert all(f"--recipe {path.stem} " in f"{line} " for line in commands)


def test_there_are_shipped_recipes() -> None:
    assert "mnist-simclr" in {path.stem for path in SHIPPED.glob("*.toml")}


def test_a_file_is_read_as_it_stands(tiny_recipe: Recipe) -> None:
    assert tiny_recipe.name == "tiny"
    assert tiny_recipe.projection == (32, 16)
    assert tiny_recipe.augmentation.rotation == 15
    assert tiny_recipe.augmentation.flip == 0  # left out: off
    assert tiny_recipe.augmentation.crop_area == 1


def test_an_unknown_name_lists_the_shipped_ones() -> None:
    with pytest.raises(InvalidRequest, match=r"nosuch: no such recipe.*mnist-simclr"):
        read_recipe("nosuch")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"missing\.toml: no such recipe"):
        read_recipe(str(tmp_path / "missing.toml"))


@pytest.mark.parametrize(
    ("line", "instead", "named"),
    [
        ("warmup = 4", "warmups = 4", "warmup"),  # missing under its own name …
        ("seed = 0", "sead = 0", "sead"),  # … and unknown under another
        ("rotation = 15", "rotatoin = 15", "augmentation.rotatoin"),
        ("side = 8", "side = 7", "side"),
        ("side = 8", 'side = "small"', "side"),
        ("channels = 1", "channels = 2", "channels"),
        ("epochs = 2", "epochs = 0", "epochs"),
        ("batch_size = 64", "batch_size = 1", "batch_size"),
        ("learning_rate = 2e-3", "learning_rate = 0", "learning_rate"),
        ("learning_rate = 2e-3", "learning_rate = inf", "learning_rate"),
        ("learning_rate = 2e-3", "learning_rate = nan", "learning_rate"),
        ("temperature = 0.2", "temperature = -0.2", "temperature"),
        ("projection = [32, 16]", "projection = [32]", "projection.1"),
        ("projection = [32, 16]", "projection = [32, 0]", "projection.1"),
        ("rotation = 15", "rotation = 181", "augmentation.rotation"),
        ("scale = 0.2", "scale = 1.0", "augmentation.scale"),
        ("erase = 0.2", "erase = 1.1", "augmentation.erase"),
        ("erase = 0.2", "crop_area = 0", "augmentation.crop_area"),
        ('method = "simclr"', 'method = "simsalabim"', "method"),
        ('backbone = "small-cnn"', 'backbone = "huge"', "backbone"),
        ("seed = 0", 'name = "mine"', "name"),
    ],
)
def test_a_wrong_key_or_value_is_named(
    line: str, instead: str, named: str, tiny_recipe_file: Path, tmp_path: Path
) -> None:
    text = tiny_recipe_file.read_text()
    assert text.count(line) == 1
    path = tmp_path / "wrong.toml"
    path.write_text(text.replace(line, instead))
    with pytest.raises(InvalidRequest) as caught:
        read_recipe(str(path))
    assert str(caught.value).startswith(f"{path}: {named}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"side = = 8", b"\xff\xfe not text", b"[augmentation"])
def test_what_is_not_toml_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    with pytest.raises(InvalidRequest, match=r"broken\.toml: not TOML: "):
        read_recipe(str(path))


def test_a_recipe_is_frozen(tiny_recipe: Recipe) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        tiny_recipe.side = 28
    with pytest.raises(ValidationError, match="frozen"):
        tiny_recipe.augmentation.flip = 1
