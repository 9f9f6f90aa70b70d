"""A recipe: parsing, changes at the command line, and refusals with their messages."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from service.errors import InvalidRequest
from training.recipe import PRESETS, SHIPPED, Augmentation, Recipe, read_recipe


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
    # A change that is left out is off.
    assert tiny_recipe.augmentation.flip == 0
    assert tiny_recipe.augmentation.crop_area == 1
    assert tiny_recipe.views == 2
    assert tiny_recipe.simclr.temperature == 0.2


def test_an_unknown_name_lists_the_shipped_ones() -> None:
    with pytest.raises(InvalidRequest, match=r"nosuch: no such recipe.*mnist-simclr"):
        read_recipe("nosuch")


def test_local_views_have_half_the_side_or_their_own(tiny_recipe: Recipe) -> None:
    assert (tiny_recipe.side, tiny_recipe.local_side) == (8, 4)
    recipe = Recipe.model_validate(tiny_recipe.model_dump() | {"dino": {"local_side": 6}})
    assert recipe.local_side == 6


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"missing\.toml: no such recipe"):
        read_recipe(str(tmp_path / "missing.toml"))


# A row has a key, the line in its place, and the key that the message opens with.
WRONG = [
    # The message names the missing key.
    ("warmup", "warmups = 4", "warmup"),
    # The message names the unknown key.
    ("seed", "sead = 0", "sead"),
    ("rotation", "rotatoin = 15", "augmentation.rotatoin"),
    ("side", "side = 7", "side"),
    ("side", "side = 513", "side"),
    ("side", 'side = "small"', "side"),
    ("seed", "view_side = 7", "view_side"),
    ("seed", "view_side = 9", "view_side"),
    ("channels", "channels = 2", "channels"),
    ("epochs", "epochs = 0", "epochs"),
    ("batch_size", "batch_size = 1", "batch_size"),
    ("seed", "views = 1", "views"),
    ("seed", "views = 17", "views"),
    ("seed", "accumulate = 0", "accumulate"),
    ("learning_rate", "learning_rate = 0", "learning_rate"),
    ("learning_rate", "learning_rate = inf", "learning_rate"),
    ("learning_rate", "learning_rate = nan", "learning_rate"),
    ("weight_decay", "weight_decay = -1e-4", "weight_decay"),
    ("projection", "projection = [32]", "projection.1"),
    ("projection", "projection = [32, 0]", "projection.1"),
    ("seed", 'precision = "float16"', "precision"),
    ("seed", "seed = -1", "seed"),
    ("rotation", "rotation = 181", "augmentation.rotation"),
    ("scale", "scale = 1.0", "augmentation.scale"),
    ("erase", "erase = 1.1", "augmentation.erase"),
    ("erase", "crop_area = 0", "augmentation.crop_area"),
    ("erase", 'preset = "nosuch"', "augmentation.preset"),
    ("erase", "preset = 3", "augmentation.preset"),
    ("erase", "erase = 0.2\n[simclr]\ntemperature = -0.2", "simclr.temperature"),
    ("erase", "erase = 0.2\n[moco]\nmomentum = 1.0", "moco.momentum"),
    ("erase", "erase = 0.2\n[dino]\nlocal_views = -1", "dino.local_views"),
    ("erase", "erase = 0.2\n[dino]\nlocal_side = 3", "dino.local_side"),
    ("erase", "erase = 0.2\n[dino]\nlocal_area = [0.0, 0.4]", "dino.local_area.0"),
    ("erase", "erase = 0.2\n[dino]\nlocal_area = [0.5, 0.4]", "dino.local_area"),
    ("erase", "erase = 0.2\n[clusters]\nclusters = 1", "clusters.clusters"),
    ("erase", 'erase = 0.2\n[triplet]\nmining = "soft"', "triplet.mining"),
    ("erase", "erase = 0.2\n[simsalabim]\nspell = 1", "simsalabim"),
    ("seed", "simclr = 3", "simclr"),
    ("method", 'method = "simsalabim"', "method"),
    ("seed", 'name = "mine"', "name"),
]


@pytest.mark.parametrize(("key", "instead", "named"), WRONG, ids=[instead for _, instead, _ in WRONG])
def test_a_wrong_key_or_value_is_named(
    key: str, instead: str, named: str, tiny_recipe_file: Path, tmp_path: Path
) -> None:
    lines = tiny_recipe_file.read_text().splitlines()
    places = [number for number, line in enumerate(lines) if line.startswith(f"{key} = ")]
    assert len(places) == 1
    lines[places[0]] = instead
    path = tmp_path / "wrong.toml"
    path.write_text("\n".join(lines))
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
    with pytest.raises(ValidationError, match="frozen"):
        tiny_recipe.simclr.temperature = 1


# --set key=value


CHANGES: list[tuple[str, str, Any]] = [
    ("epochs=7", "epochs", 7),
    ("seed=0x10", "seed", 16),
    ("batch_size=1_024", "batch_size", 1024),
    ("learning_rate=3e-4", "learning_rate", 3e-4),
    ("learning_rate=1", "learning_rate", 1.0),
    ("method=byol", "method", "byol"),
    ('method="byol"', "method", "byol"),
    ("method='byol'", "method", "byol"),
    ("backbone=mid-cnn", "backbone", "mid-cnn"),
    ("precision=float32", "precision", "float32"),
    ("projection=[64, 8]", "projection", (64, 8)),
    (" views = 4 ", "views", 4),
    ("augmentation.flip=0.5", "augmentation.flip", 0.5),
    ("augmentation.preset=glyphs", "augmentation.preset", "glyphs"),
    # The file does not have this table.
    ("simclr.temperature=0.5", "simclr.temperature", 0.5),
    ("triplet.mining=hard", "triplet.mining", "hard"),
]


@pytest.mark.parametrize(("change", "key", "expected"), CHANGES, ids=[change for change, _, _ in CHANGES])
def test_a_change_sets_its_key_and_no_other(
    change: str, key: str, expected: Any, tiny_recipe: Recipe, tiny_recipe_file: Path
) -> None:
    recipe = read_recipe(str(tiny_recipe_file), [change])
    content, before = recipe.model_dump(), tiny_recipe.model_dump()
    *table, leaf = key.split(".")
    inner, inner_before = (content[table[0]], before[table[0]]) if table else (content, before)
    assert inner[leaf] == expected != inner_before[leaf]
    assert type(inner[leaf]) is type(expected)
    inner[leaf] = inner_before[leaf]
    # A preset also sets the keys that the file leaves open.
    if leaf != "preset":
        assert content == before


def test_changes_follow_one_another(tiny_recipe_file: Path) -> None:
    recipe = read_recipe(str(tiny_recipe_file), ["epochs=7", "moco.queue=64", "epochs=9", "moco.splits=2"])
    assert recipe.epochs == 9
    assert (recipe.moco.queue, recipe.moco.splits, recipe.moco.momentum) == (64, 2, 0.99)


def test_a_change_serves_shipped_recipes_and_leaves_their_files() -> None:
    before = (SHIPPED / "mnist-simclr.toml").read_bytes()
    assert read_recipe("mnist-simclr", ["epochs=1"]).epochs == 1
    assert read_recipe("mnist-simclr").epochs != 1
    assert (SHIPPED / "mnist-simclr.toml").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("epoch=3", "unknown key; did you mean epochs?"),
        ("learningrate=1", "unknown key; did you mean learning_rate?"),
        ("augmentation.rotatoin=5", "unknown key; did you mean augmentation.rotation?"),
        ("moco.temprature=1", "unknown key; did you mean moco.temperature?"),
        # This is the right leaf without its table.
        ("flip=0.5", "unknown key; did you mean augmentation.flip?"),
        # This is a leaf of another table.
        ("simclr.queue=64", "unknown key; did you mean moco.queue?"),
        # This has both faults.
        ("qeue=64", "unknown key; did you mean moco.queue?"),
        ("zzz=1", "unknown key; the keys are method, backbone, "),
        ("name=mine", "unknown key; the keys are "),
        ("moco.queue.size=3", "unknown key; did you mean moco.queue?"),
        ("epochs", "expected key=value"),
        ("", "expected key=value"),
        ("=3", "unknown key; the keys are "),
    ],
)
def test_a_change_that_cannot_be_made_names_the_nearest_key(change: str, says: str, tiny_recipe_file: Path) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_recipe(str(tiny_recipe_file), [change])
    assert str(caught.value).startswith(f"--set {change}: {says}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("epochs=0", "epochs"),
        ("epochs=", "epochs"),
        ("epochs=many", "epochs"),
        ("epochs=2.5", "epochs"),
        ("projection=[64", "projection"),
        ("augmentation.flip=2", "augmentation.flip"),
        ("method=simsalabim", "method"),
        ("learning_rate=nan", "learning_rate"),
    ],
)
def test_a_change_to_a_value_out_of_range_is_named(change: str, named: str, tiny_recipe_file: Path) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read_recipe(str(tiny_recipe_file), [change])
    assert f"{named}: " in str(caught.value)
    assert "unknown key" not in str(caught.value)


def test_a_change_within_what_the_file_has_as_no_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "odd.toml"
    path.write_text("augmentation = 3")
    with pytest.raises(
        InvalidRequest, match=r"^--set augmentation\.flip=1: augmentation is a table, and .* has 3 there$"
    ):
        read_recipe(str(path), ["augmentation.flip=1"])


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("epoch = 3", "epoch: unknown key; did you mean epochs?"),
        ("flip = 0.5", "flip: unknown key; did you mean augmentation.flip?"),
        ("zzz = 1", "zzz: unknown key; the keys are method, "),
    ],
)
def test_a_files_own_unknown_key_names_the_nearest_one(
    line: str, says: str, tiny_recipe_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "mistyped.toml"
    path.write_text(f"{line}\n{tiny_recipe_file.read_text()}")
    with pytest.raises(InvalidRequest) as caught:
        read_recipe(str(path))
    assert str(caught.value).startswith(f"{path}: {says}")


# Presets, and the kept facts of a recipe.


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_its_values_and_nothing_else(preset: str) -> None:
    expected = Augmentation().model_dump() | PRESETS[preset] | {"preset": preset}
    augmentation = Augmentation.model_validate({"preset": preset})
    assert augmentation.model_dump() == expected
    assert augmentation != Augmentation()


def test_keys_beside_a_preset_win(tiny_recipe_file: Path, tmp_path: Path) -> None:
    assert PRESETS["photos"]["flip"] == 0.5
    path = tmp_path / "preset.toml"
    path.write_text(tiny_recipe_file.read_text() + 'preset = "photos"\nflip = 0.0\nsolarise = 0.4\n')
    augmentation = read_recipe(str(path)).augmentation
    # The file's value wins even if it switches a change off.
    assert augmentation.flip == 0
    assert augmentation.solarise == 0.4
    assert augmentation.crop_area == PRESETS["photos"]["crop_area"]
    # The preset lacks this key, so the file's value stays.
    assert augmentation.rotation == 15
    assert read_recipe(str(path), ["augmentation.blur=0.9"]).augmentation.blur == 0.9
    changed = read_recipe(str(path), ["augmentation.preset=glyphs"]).augmentation
    assert (changed.stroke, changed.crop_area, changed.flip) == (PRESETS["glyphs"]["stroke"], 1, 0)


def all_changed(recipe_file: Path) -> Recipe:
    return read_recipe(
        str(recipe_file),
        ["method=moco", "moco.queue=64", "simclr.temperature=0.9", "augmentation.preset=photos", "augmentation.flip=0"],
    )


def test_a_recipe_survives_being_written_down(tiny_recipe: Recipe, tiny_recipe_file: Path) -> None:
    for recipe in (tiny_recipe, all_changed(tiny_recipe_file)):
        assert Recipe.model_validate(recipe.model_dump()) == recipe
        assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_facts_leave_out_the_tables_of_other_methods(tiny_recipe_file: Path) -> None:
    recipe = all_changed(tiny_recipe_file)
    facts = recipe.facts()
    tables = {key for key, value in facts.items() if isinstance(value, dict)}
    assert tables == {"moco", "augmentation"}
    assert facts["moco"]["queue"] == 64
    # A resumed run is compared in this form, the one of JSON.
    assert facts["projection"] == [32, 16]
    again = Recipe.model_validate(facts)
    assert again.facts() == facts
    # The tables of other methods are not kept.
    assert again.simclr.temperature == 0.2
    other = read_recipe(str(tiny_recipe_file), ["method=moco", "moco.queue=65"])
    assert other.facts() != facts
