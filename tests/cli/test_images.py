"""From pictures to a folder that answers: the recipe on images, CIFAR-FS from its archive, and its benchmark."""

from __future__ import annotations

import importlib
import importlib.util
import json
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from PIL import Image

from fewshot_nlp.classifier import FewShotClassifier
from fewshot_nlp.cli import report
from fewshot_nlp.cli.parser import parse
from fewshot_nlp.cli.train import main
from fewshot_nlp.data import load_pools
from fewshot_nlp.learners import build_learner
from tests.tiny import tiny_resnet

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data" / "cifar100"
TINY = (
    "--n_way 2 --k_shot 1 --n_query 2 --eval_n_query 2 --max_steps 2 --meta_batch_size 2 --eval_steps 1 "
    "--eval_episodes 2 --test_episodes 3 --baseline_episodes 1 --eval_k_shots 1 3 --use_cpu true"
)


def picture(label: int, i: int) -> Image.Image:
    """Noise with a bright band whose place tells the class."""
    pixels = np.random.default_rng([label, i]).integers(0, 120, (16, 16, 3), dtype=np.uint8)
    pixels[label : label + 3] = 250
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def class_folders(tmp_path_factory):
    """A folder of class folders, as people have them."""
    folder = tmp_path_factory.mktemp("pictures")
    for label in range(12):
        (folder / f"band {label}").mkdir()
        for i in range(6):
            picture(label, i).save(folder / f"band {label}" / f"{i}.png")
    return folder


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("backbone", ["conv4", "resnet"])
def test_recipe_leaves_a_classifier_and_a_picture(backbone, class_folders, folders, tmp_path, monkeypatch, capsys):
    recipe, out = ROOT / "recipes" / "image_maml.py", tmp_path / "out"
    given = ["--dataset_name", str(class_folders), "--output_dir", str(out), *shlex.split(TINY)]
    own = folders["image"] if backbone == "conv4" else tiny_resnet(tmp_path / "resnet")
    given += ["--model_name_or_path", own, *(["--adapter", "lora"] if backbone == "resnet" else [])]
    monkeypatch.setattr(sys, "argv", [str(recipe), *given])
    runpy.run_path(str(recipe), run_name="__main__")
    results = json.loads((out / "results.json").read_text())
    assert set(results["test"]) == {"1-shot", "3-shot"} and results["protocol"]["transductive"] is False
    assert imread(out / "episode.png").shape[0] > 200
    shown = capsys.readouterr().out
    assert "a test task, with right and wrong answers marked" in shown and ".fit(images, labels)" in shown

    classifier = FewShotClassifier.from_pretrained(out, device="cpu")
    pictures = [picture(label, i) for label in (0, 6) for i in range(3)]
    classifier.fit(pictures, ["top"] * 3 + ["middle"] * 3)
    expected = classifier.predict_proba(pictures)
    arrays = np.stack([np.asarray(each) for each in pictures])
    np.testing.assert_allclose(classifier.predict_proba(arrays), expected, atol=1e-6)
    np.testing.assert_allclose(classifier.predict_proba([*arrays][::-1])[::-1], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "examples", "message"),
    [
        ("text", [picture(0, 0), picture(1, 0)], r"X\[0\] is of type Image, and the backbone takes texts\. Pass texts"),
        ("text", np.zeros((2, 16, 16), dtype=np.uint8), r"X\[0\] is of type ndarray, and the backbone takes texts"),
        ("image", ["lamp", "music"], r"X\[0\] is of type str, and the backbone takes images\. Pass images"),
        ("image", [picture(0, 0), 3], r"X\[1\] of type int is no Pillow image"),
        ("image", np.zeros((2, 16, 16)), r"X\[0\] is an array of float64 and shape \[16, 16\]\. Give bytes"),
        ("image", [picture(0, 0).convert("F")] * 2, r"X\[0\] is of mode 'F', with more than 8 bits"),
    ],
)
def test_other_examples_than_the_backbone_takes_are_one_error(folders, kind, examples, message):
    with pytest.raises(ValueError, match=message):
        FewShotClassifier(model_name_or_path=folders[kind], device="cpu").fit(examples, ["a", "b"])
    if kind == "text":
        fitted = FewShotClassifier(model_name_or_path=folders[kind], device="cpu").fit(["lamp", "music"], ["a", "b"])
        with pytest.raises(ValueError, match=message):
            fitted.predict(examples)


def test_a_picture_that_cannot_be_drawn_takes_nothing_with_it(class_folders, folders, tmp_path, monkeypatch, capsys):
    def half(path, *args):
        path.write_bytes(b"half")
        raise OSError(27, "File too large")

    monkeypatch.setattr(report, "draw_episode", half)
    given = ["--dataset_name", str(class_folders), "--output_dir", str(tmp_path / "out"), *shlex.split(TINY)]
    with pytest.warns(UserWarning, match=r"episode\.png cannot be drawn: .*File too large"):
        main([*given, "--model_name_or_path", folders["image"]], ROOT / "recipes" / "image_maml.yaml")
    assert (tmp_path / "out" / "results.json").is_file() and not (tmp_path / "out" / "episode.png").exists()
    assert "episode.png" not in capsys.readouterr().out


@pytest.mark.parametrize(("n", "lost"), [(0, "bottom"), (1, "bottom"), (2, "top")])
def test_a_class_without_an_image_is_one_error(folders, n, lost):
    classes = ["top", "middle", "bottom"]
    classifier = FewShotClassifier(model_name_or_path=folders["image"], device="cpu", classes=classes)
    pictures, labels = [picture(label, 0) for label in (3, 6, 0)], ["middle", "bottom", "top"]
    message = rf"The class '{lost}' has no image, .* no name can be read\. Use at least 1 image of each class"
    with pytest.raises(ValueError, match=message):
        classifier.fit(pictures[:n], labels[:n])
    assert classifier.fit(pictures, labels).predict(pictures).tolist() == labels


def test_images_to_a_text_backbone_are_an_error_before_training(class_folders, bert_folder, tmp_path, capsys):
    given = ["--dataset_name", str(class_folders), "--output_dir", str(tmp_path), *shlex.split(TINY)]
    message = r"holds images, and the encoder takes texts\. Use a backbone for images"
    with pytest.raises(SystemExit, match=message):
        main([*given, "--model_name_or_path", bert_folder, "--adapter", "lora"], ROOT / "recipes" / "image_maml.yaml")


def test_the_recipe_says_how_to_run_it():
    settings = parse([], ROOT / "recipes" / "image_maml.yaml")
    assert settings.episodes.dataset_name == "glyphs" and settings.config.model_name_or_path == "conv4"
    assert build_learner(settings.config).transductive


class TestCIFAR:
    @pytest.fixture
    def script(self):
        return load(ROOT / "data_scripts" / "cifar_fs.py")

    @pytest.fixture
    def archive(self, tmp_path):
        names = [f"thing {i}" for i in range(6)]
        pixels = np.stack([[np.asarray(picture(label, i)) for i in range(5)] for label in range(6)])
        np.savez(tmp_path / "cifar100_60.npz", x=pixels)
        lists = {"classes": names, "train": names[:3][::-1], "validation": names[3:4], "test": names[4:]}
        (tmp_path / "split_1.json").write_text(json.dumps(lists))
        return tmp_path

    def test_every_image_is_in_its_class_and_split(self, script, archive, capsys):
        script.main(["--data_dir", str(archive), "--output_dir", str(archive / "out")])
        assert "train: 3 classes, 15 images" in capsys.readouterr().out
        pools = load_pools(archive / "out")
        assert [pool.label_names for pool in pools.values()] == [
            ["thing 0", "thing 1", "thing 2"], ["thing 3"], ["thing 4", "thing 5"],
        ]  # fmt: skip
        for pool in pools.values():
            for name, rows in pool.rows_by_class.items():
                expected = [picture(int(name[-1]), i).tobytes() for i in range(5)]
                assert [image.tobytes() for image in pool.examples(rows)] == expected

    def test_the_script_says_what_is_wrong(self, script, archive, tmp_path):
        with pytest.raises(SystemExit, match=r"cifar100_60\.npz does not exist"):
            script.main(["--data_dir", str(tmp_path / "nowhere")])
        with pytest.raises(SystemExit, match="is there, and no data set"):
            script.main(["--data_dir", str(archive), "--output_dir", str(archive)])
        np.savez(archive / "cifar100_60.npz", x=np.zeros((5, 4, 16, 16, 3), dtype=np.uint8))
        with pytest.raises(SystemExit, match=r"shape \[5, 4, 16, 16, 3\], and split_1\.json names 6 classes"):
            script.main(["--data_dir", str(archive)])
        np.savez(archive / "cifar100_60.npz", x=np.array([{"pickled": 1}], dtype=object))
        with pytest.raises(ValueError, match="allow_pickle=False"):
            script.main(["--data_dir", str(archive)])

    def test_the_benchmark_has_a_table(self, archive, tmp_path, monkeypatch, capsys):
        monkeypatch.syspath_prepend(ROOT / "recipes" / "benchmarks")
        benchmark = load(ROOT / "recipes" / "benchmarks" / "images.py")
        folder = tmp_path / "data" / "cifar_fs"
        names = [f"thing {i}" for i in range(6)]
        lists = {"classes": names, "train": names[:2], "validation": names[2:4], "test": names[4:]}
        (archive / "split_1.json").write_text(json.dumps(lists))
        load(ROOT / "data_scripts" / "cifar_fs.py").main(["--data_dir", str(archive), "--output_dir", str(folder)])
        tiny = f"--model_name_or_path {tiny_resnet(tmp_path / 'net')} --eval_n_way 2 {TINY} --baseline_episodes 0"
        tiny += " --lora_layers_to_transform 0 --eval_strategy no --save_strategy no --load_best_model_at_end false"
        given = ["--datasets", "cifar_fs", "--data_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", ["images.py", *given, *shlex.split(tiny)])
        benchmark.main()
        table = capsys.readouterr().out.split("\n| method")[-1]
        assert "lora_protonet" in table and "prototypes" in table
        monkeypatch.setattr(sys, "argv", ["images.py", "--data_dir", str(tmp_path / "nowhere")])
        with pytest.raises(SystemExit, match=r"cifar_fs does not exist\. Run data_scripts/cifar_fs\.py first"):
            benchmark.main()

    @pytest.mark.shared
    @pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
    def test_the_real_archive_holds_cifar_fs(self, script):
        lists = json.loads((SHARED / "split_1.json").read_text())
        with np.load(SHARED / "cifar100_60.npz", allow_pickle=False) as archive:
            assert archive["x"].shape == (100, 60, 32, 32, 3) and archive["x"].dtype == np.uint8
        assert [len(lists[split]) for split in ("train", "validation", "test")] == [64, 16, 20]
        assert sorted([*lists["train"], *lists["validation"], *lists["test"]]) == sorted(lists["classes"])
