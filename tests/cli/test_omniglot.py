"""Omniglot from zips to the table, on made-up drawings; and what the real zips hold."""

from __future__ import annotations

import importlib.util
import io
import json
import shlex
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from PIL import Image, ImageDraw

from fewshot_nlp.classifier import FewShotClassifier
from fewshot_nlp.cli.parser import parse
from fewshot_nlp.config import LEARNERS
from fewshot_nlp.data import load_pools
from fewshot_nlp.learners import build_learner

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data" / "omniglot"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drawn(seed: int) -> bytes:
    """A line in black on white, one bit a pixel, as a PNG file."""
    image = Image.new("1", (105, 105), 1)
    ImageDraw.Draw(image).line(np.random.default_rng(seed).integers(5, 100, 8).tolist(), fill=0, width=3)
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def script():
    return load(ROOT / "data_scripts" / "omniglot.py")


@pytest.fixture(scope="module")
def zips(script, tmp_path_factory):
    """Three characters of each alphabet, eight drawings each; the second zip has other drawings of Latin."""
    folder = tmp_path_factory.mktemp("zips")
    alphabets = [alphabet for names in script.ALPHABETS.values() for alphabet in names]
    for z, (name, own) in enumerate(zip(script.ZIPS, (alphabets[:5], [*alphabets[5:], "Latin"]), strict=True)):
        with zipfile.ZipFile(folder / name, "w") as archive:
            for alphabet in own:
                for c in range(3):
                    for i in range(8):
                        seed = 1000 * z + 100 * alphabets.index(alphabet) + 10 * c + i
                        archive.writestr(f"{name[:-4]}/{alphabet}/character{c:02}/{c:04}_{i:02}.png", drawn(seed))
            archive.writestr(f"{name[:-4]}/.DS_Store", b"")
    return folder


@pytest.fixture(scope="module")
def data(script, zips, tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "omniglot"
    script.main(["--data_dir", str(zips), "--output_dir", str(folder), "--size", "16"])
    return folder


def test_a_character_in_both_zips_counts_once(script, zips):
    found = script.drawings([zips / name for name in script.ZIPS], 28)
    assert len(found) == 24 and {len(images) for images in found.values()} == {8}
    # The first zip's drawing, ink white.
    expected = 255 - np.array(Image.open(io.BytesIO(drawn(100 * 3 + 10 + 2))).convert("L"), dtype=float)
    image = np.array(found["Latin/character01"][2], dtype=float)
    assert image.shape == (28, 28)
    assert image.mean() == pytest.approx(expected.mean(), rel=0.05)


def test_alphabets_are_split_and_training_is_turned(script, data, zips, tmp_path):
    pools = load_pools(data)
    for split, alphabets in script.ALPHABETS.items():
        names = pools[split].label_names
        assert {name.split("/")[0] for name in names} == set(alphabets)
        assert len(names) == 3 * len(alphabets) * (4 if split == "train" else 1)
    for rotations, classes in (("none", [12, 6, 6]), ("all", [48, 24, 24])):
        script.main(["--data_dir", str(zips), "--output_dir", str(tmp_path / "o"), "--rotations", rotations])
        assert [len(pool.label_names) for pool in load_pools(tmp_path / "o").values()] == classes


def test_the_script_says_what_is_wrong(script, zips, tmp_path):
    with pytest.raises(SystemExit, match=r"images_background_small1\.zip does not exist"):
        script.main(["--data_dir", str(tmp_path)])
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit, match="is there, and no data set"):
        script.main(["--data_dir", str(zips), "--output_dir", str(tmp_path)])
    assert (tmp_path / "mine.txt").read_text() == "mine"


@pytest.fixture
def benchmark(data, tmp_path, monkeypatch):
    """The script with a tiny network and one step a method."""
    monkeypatch.syspath_prepend(ROOT / "recipes" / "benchmarks")
    script, runs = load(ROOT / "recipes" / "benchmarks" / "omniglot.py"), importlib.import_module("runs")
    trained = []
    monkeypatch.setattr(runs, "execute", lambda run, execute=runs.execute: trained.append(run) or execute(run))
    monkeypatch.setattr(script, "Conv4Config", lambda **shape: load_config(**shape))
    monkeypatch.setattr(script, "WAYS", 5)

    def start(*argv):
        AcceleratorState._reset_state(reset_partial_state=True)
        tiny = "--max_steps 1 --n_way 2 --n_query 1 --eval_n_query 1 --eval_episodes 1 --test_episodes 2 --use_cpu true"
        given = ["--dataset_name", str(data), "--output_dir", str(tmp_path / "out"), *shlex.split(tiny), *argv]
        monkeypatch.setattr(sys, "argv", ["omniglot.py", *given])
        script.main()
        return len(trained)

    yield start
    AcceleratorState._reset_state(reset_partial_state=True)


def load_config(**shape):
    from fewshot_nlp.models.scratch import Conv4Config

    return Conv4Config(**{**shape, "image_size": 16, "num_filters": 3})


def test_each_method_is_trained_once_and_stands_in_the_table(benchmark, tmp_path, capsys):
    assert benchmark("--methods", "protonet", "maml", "--inner_steps", "2") == 2
    table = capsys.readouterr().out.split("\n| method")[-1]
    rows = {cells[1].strip(): cells for line in table.splitlines() if len(cells := line.split("|")) > 10}
    assert rows["protonet"][2].strip() == "no" and rows["maml"][2].strip() == "yes"
    assert rows["maml"][5].strip() == "98.7" and rows["maml"][8].strip() == "95.8"
    before = json.loads((tmp_path / "out" / "maml" / "20_way.json").read_text())["untrained"]
    assert 0 <= before["mean"] <= 1 and rows["maml"][7].strip() == f"{100 * before['mean']:.1f}"
    assert json.loads((tmp_path / "out" / "maml" / "20_way.json").read_text())["episodes"] == 2
    card = (tmp_path / "out" / "maml" / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card and "text" not in card.split("---")[2]
    assert ".fit(images, labels)" in card and (tmp_path / "out" / "maml" / "episode.png").is_file()
    with pytest.raises(ValueError, match=r"X\[0\] is of type str, and the backbone takes images\. Pass images"):
        FewShotClassifier.from_pretrained(str(tmp_path / "out" / "maml")).fit(["a", "b"], ["c", "d"])
    again = (tmp_path / "out" / "maml" / "20_way.json").stat().st_mtime_ns
    assert benchmark("--methods", "protonet", "maml", "--inner_steps", "2") == 2
    assert capsys.readouterr().out.split("\n| method")[-1] == table
    assert (tmp_path / "out" / "maml" / "20_way.json").stat().st_mtime_ns == again
    with pytest.raises(SystemExit, match=r"other settings than learning_rate=0\.5"):
        benchmark("--methods", "maml", "--inner_steps", "2", "--learning_rate", "0.5")
    assert benchmark("--methods", "maml", "--learning_rate", "0.5", "--overwrite_output_dir", "true") == 3
    assert (tmp_path / "out" / "maml" / "20_way.json").stat().st_mtime_ns != again


def test_the_settings_of_every_method_are_good(folders, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "recipes" / "benchmarks")
    script = load(ROOT / "recipes" / "benchmarks" / "omniglot.py")
    for name, (_, settings, _) in script.METHODS.items():
        if name in LEARNERS:
            arguments = [*shlex.split(script.COMMON), *shlex.split(settings), "--learner", name]
            told = parse([*arguments, "--model_name_or_path", folders["image"]])
            assert build_learner(told.config).init_params()


def test_without_data_the_benchmark_says_what_to_run(benchmark):
    with pytest.raises(SystemExit, match=r"nowhere does not exist\. Run data_scripts/omniglot\.py first"):
        benchmark("--dataset_name", "nowhere")


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_the_real_zips_hold_242_characters(script):
    found = script.drawings([SHARED / name for name in script.ZIPS], 28)
    assert len(found) == 242 and {len(images) for images in found.values()} == {20}
    by_split = {s: sum(n.split("/")[0] in a for n in found) for s, a in script.ALPHABETS.items()}
    assert by_split == {"train": 137, "validation": 39, "test": 66}
