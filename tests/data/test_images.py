"""Images go the way of texts: the same pools, splits and samplers, and an encoder of their own."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import ExifTags, Image

from fewshot_nlp.data import EpisodeReader, EpisodeSampler, ImageEncoder, TextEncoder, load_pools, with_rotations
from fewshot_nlp.data.columns import find_columns
from fewshot_nlp.data.images import CACHE_BYTES
from fewshot_nlp.data.leakage import image_key
from tests.data.toy_data import make_pool
from tests.tiny import tiny_tokenizer

CLASSES = [f"sign {i}" for i in range(8)]


def picture(seed: int, size: int = 16, channels: int = 1) -> Image.Image:
    shape = (size, size) if channels == 1 else (size, size, channels)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def make_images(classes=CLASSES, per_class=6) -> Dataset:
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=classes)})
    pictures = [picture(i) for i in range(per_class * len(classes))]
    labels = [i // per_class for i in range(len(pictures))]
    return Dataset.from_dict({"image": pictures, "label": labels}, features=features)


def _damaged() -> Image.Image:
    picture(0).save(file := io.BytesIO(), "PNG", exif=b"no EXIF")
    return Image.open(file)


class TestEncoder:
    def test_an_image_of_the_right_shape_is_only_scaled(self):
        grey, colour = picture(0), picture(1, channels=3)
        pixels = ImageEncoder(16)([grey, grey])["pixel_values"]
        assert pixels.shape == (2, 1, 16, 16) and pixels.dtype == torch.float32
        np.testing.assert_allclose(pixels[1, 0].numpy(), np.array(grey) / 255, rtol=1e-6)
        pixels = ImageEncoder(16, 3, mean=0.5, std=0.25)([colour])["pixel_values"]
        np.testing.assert_allclose(
            pixels[0].numpy(), (np.array(colour).transpose(2, 0, 1) / 255 - 0.5) / 0.25, atol=1e-6
        )

    def test_channels_and_size_are_made_to_fit(self):
        blue = Image.new("RGB", (40, 20), (0, 0, 255))
        assert torch.equal(ImageEncoder(8, 3)([blue])["pixel_values"][0, :, 3, 5], torch.tensor([0.0, 0.0, 1.0]))
        # The luma of blue, ITU-R 601.
        grey = ImageEncoder(8)([blue])["pixel_values"]
        torch.testing.assert_close(grey, torch.full((1, 1, 8, 8), 0.114), atol=1 / 255, rtol=0)
        white_left = Image.fromarray(np.repeat([[255, 0]], 32, axis=0).repeat(16, axis=1).astype(np.uint8))
        halves = ImageEncoder(4)([white_left])["pixel_values"][0, 0]
        assert halves[:, 0].min() == 1 and halves[:, 3].max() == 0
        assert ImageEncoder(4, 3)([Image.new("1", (4, 4), 1)])["pixel_values"].unique().tolist() == [1.0]

    def test_an_image_is_encoded_the_same_alone(self):
        pictures = [picture(i, 20) for i in range(3)]
        together = ImageEncoder(16)(pictures)["pixel_values"]
        alone = [ImageEncoder(16)([each])["pixel_values"] for each in pictures]
        assert torch.equal(together, torch.cat(alone))

    @pytest.mark.parametrize(
        ("images", "message"),
        [
            ([], r"images=\[\] must be a list of one or more"),
            (["cat.png"], r"images\[0\] of type str is no Pillow image"),
            ([Image.new("I;16", (4, 4))], r"images\[0\] is of mode 'I;16', with more than 8 bits"),
            ([_damaged()], r"images\[0\] has damaged EXIF data: .*Save it without"),
        ],
    )
    def test_bad_images_are_errors(self, images, message):
        with pytest.raises(ValueError, match=message):
            ImageEncoder(4)(images)

    @pytest.mark.parametrize(("name", "value"), [("size", 0), ("num_channels", 2), ("std", 0.0)])
    def test_bad_settings_are_errors(self, name, value):
        with pytest.raises(ValueError, match=f"{name}="):
            ImageEncoder(**{name: value})

    def test_what_is_kept_fits_in_memory(self):
        for size, channels in ((28, 1), (224, 3)):
            (row,) = ImageEncoder(size, channels).encode([picture(0)])
            assert row.nbytes * ImageEncoder(size, channels).cache_size <= CACHE_BYTES


class TestPools:
    def test_images_are_found_and_split_by_class(self):
        pools = load_pools(make_images(), name="signs")
        assert [pool.kind for pool in pools.values()] == ["image"] * 3
        assert sorted(name for pool in pools.values() for name in pool.label_names) == CLASSES
        pool = pools["train"]
        row = pool.rows_by_class[pool.label_names[0]][2]
        (found,) = pool.examples([row])
        assert np.array_equal(np.array(found), np.array(picture(row)))
        assert pool.examples([]) == []
        assert pool.fingerprint == load_pools(make_images(), name="signs")["train"].fingerprint
        with pytest.raises(TypeError, match="signs/train holds images, not texts"):
            pool.texts([row])

    @pytest.mark.parametrize("name", ["signs", "signs [1]"])
    def test_a_folder_of_class_folders_is_a_data_set(self, tmp_path, name):
        for i in range(24):
            (tmp_path / name / f"sign {i % 8}").mkdir(parents=True, exist_ok=True)
            picture(i).save(tmp_path / name / f"sign {i % 8}" / f"{i}.png")
        pools = load_pools(tmp_path / name)
        assert sorted(name for pool in pools.values() for name in pool.label_names) == CLASSES
        assert {len(rows) for pool in pools.values() for rows in pool.rows_by_class.values()} == {3}
        spec = EpisodeSampler(pools["train"], n_way=2, k_shot=1, n_query=2)[0]
        episode = EpisodeReader(pools, ImageEncoder(16))(spec)
        expected = np.array(pools["train"].examples(spec.support[1])[0]) / 255
        np.testing.assert_allclose(episode.support.inputs["pixel_values"][1, 0].numpy(), expected, rtol=1e-6)

    def test_an_image_in_two_splits_is_an_error_or_dropped(self):
        rows = make_images(["a", "b"], 3)
        twin = Dataset.from_dict({"image": [picture(99), picture(1)], "label": [0, 0]}, features=rows.features)
        twin = twin.cast(Features({**rows.features, "label": ClassLabel(names=["c"])}))
        parts = DatasetDict({"train": rows, "test": twin})
        with pytest.raises(
            ValueError, match=r"1 images of the train split are in a later split.*row 1 in train, row 7"
        ):
            load_pools(parts)
        pools = load_pools(parts, duplicates="drop")
        assert pools["train"].rows_by_class == {"a": (0, 2), "b": (3, 4, 5)} and pools["train"].num_dropped == 1

    def test_parts_may_read_their_images_in_their_own_mode(self):
        colour = make_images(["c"], 2).cast_column("image", ImageFeature(mode="RGB"))
        parts = DatasetDict({"train": make_images(["a", "b"], 2), "test": colour})
        assert load_pools(parts, duplicates="keep")["test"].examples([5])[0].size == (16, 16)

    def test_an_image_of_more_bits_is_an_error_at_once(self, tmp_path):
        for i in range(8):
            (tmp_path / f"sign {i}").mkdir()
            deep = Image.fromarray(np.full((4, 4), 300 + i, dtype=np.uint16)) if i == 5 else picture(i)
            deep.save(tmp_path / f"sign {i}" / f"{i}.png")
        with pytest.raises(ValueError, match=r"Row 5 has an image that .*sign 5/5\.png\): it is of mode 'I;16', with"):
            load_pools(tmp_path)

    def test_an_image_is_the_same_upright_in_training_and_to_its_user(self, tmp_path):
        """Cameras leave pictures on their side, and note it in the file."""
        turn = Image.Exif()
        turn[ExifTags.Base.Orientation] = 6
        for i in range(8):
            (tmp_path / f"sign {i}").mkdir()
            picture(i).save(tmp_path / f"sign {i}" / "1.png", exif=turn)
        pools = load_pools(tmp_path)
        pool, name = pools["train"], pools["train"].label_names[0]
        users = Image.open(tmp_path / name / "1.png")
        trained = ImageEncoder(16)(pool.examples(pool.rows_by_class[name]))["pixel_values"]
        assert torch.equal(ImageEncoder(16)([users])["pixel_values"], trained)
        assert pool.keys(pool.rows_by_class[name]) == [image_key(picture(int(name[-1])).rotate(-90))]

    def test_a_missing_image_is_an_error(self):
        rows = make_images(["a", "b"], 3)
        missing = Dataset.from_dict({"image": [picture(50), None], "label": [0, 1]}, features=rows.features)
        with pytest.raises(ValueError, match=r"Row 1 has no image \(image=None\)"):
            load_pools(missing)


class TestColumns:
    IMAGE, TEXT, LABEL = ImageFeature(), Value("string"), ClassLabel(names=["a", "b"])

    def test_images_win_over_texts_unless_texts_are_named(self):
        features = Features({"caption": self.TEXT, "photo": self.IMAGE, "label": self.LABEL})
        assert find_columns(features) == ("photo", "label")
        assert find_columns(features, text="caption") == ("caption", "label")
        two = Features({**features, "mask": self.IMAGE})
        assert find_columns(two, image="mask") == ("mask", "label")
        with pytest.raises(
            ValueError, match=r"holds the images: it could be any of \['photo', 'mask'\].*Set image_col"
        ):
            find_columns(two)

    @pytest.mark.parametrize(
        ("named", "message"),
        [
            (
                {"image": "photo", "text": "caption"},
                "text_column_name='caption' and image_column_name='photo' are both",
            ),
            ({"image": "caption"}, "image_column_name='caption' does not hold images"),
            ({"text": "photo"}, "text_column_name='photo' does not hold strings"),
            ({"image": "picture"}, "image_column_name='picture' is not a column"),
        ],
    )
    def test_wrong_names_are_errors(self, named, message):
        features = Features({"caption": self.TEXT, "photo": self.IMAGE, "label": self.LABEL})
        with pytest.raises(ValueError, match=message):
            find_columns(features, **named)


class TestReader:
    @pytest.mark.parametrize("cache_size", [0, 3, None])
    def test_the_cache_changes_nothing(self, cache_size):
        pool = load_pools(make_images())["train"]
        reader = EpisodeReader(pool, ImageEncoder(16), cache_size)
        for spec in EpisodeSampler(pool, n_way=3, k_shot=1, n_query=2, num_episodes=20):
            query = [row for rows in spec.query for row in rows]
            expected = ImageEncoder(16)(pool.examples(query))["pixel_values"]
            assert torch.equal(reader(spec).query.inputs["pixel_values"], expected)
            assert reader(spec).query.labels.tolist() == [0, 0, 1, 1, 2, 2]

    def test_pools_and_encoder_are_of_one_kind(self):
        images, texts = load_pools(make_images(), name="signs"), make_pool({"a": 2, "b": 2})
        with pytest.raises(ValueError, match="toy/train holds texts, and the encoder takes images"):
            EpisodeReader(texts, ImageEncoder(16))
        with pytest.raises(ValueError, match="signs/train holds images, and the encoder takes texts"):
            EpisodeReader(images, TextEncoder(tiny_tokenizer()))
        with pytest.raises(ValueError, match="use_label_names reads words, and 'signs' holds images"):
            EpisodeReader(images, ImageEncoder(16), use_label_names=True)


class TestRotations:
    def test_every_turn_of_a_class_is_a_class(self):
        plain = make_images(["a", "b"], 2)
        turned = with_rotations(plain)
        names = turned.features["label"].names
        assert names == ["a", "b", *(f"{name}, {d} degrees" for d in (90, 180, 270) for name in "ab")]
        assert turned.num_rows == 16
        for row, example in enumerate(turned):
            turns, base = divmod(row, 4)
            assert np.array_equal(np.array(example["image"]), np.rot90(np.array(picture(base)), turns))
            assert example["label"] == 2 * turns + base // 2
        pools = load_pools(
            DatasetDict({"train": turned, "test": make_images(["c"], 1).map(_other, load_from_cache_file=False)})
        )
        assert len(pools["train"].label_names) == 8 and pools["test"].label_names == ["c"]

    def test_columns_of_another_type_are_an_error(self):
        with pytest.raises(ValueError, match="'picture' is None"):
            with_rotations(make_images(), image_column="picture")
        integers = make_images().cast_column("label", Value("int64"))
        with pytest.raises(ValueError, match=r"'label' is Value.*Cast it to ClassLabel"):
            with_rotations(integers)


def _other(row):
    return {"image": picture(500)}


def test_out_of_scope_images_come_last():
    pool = load_pools(make_images())["train"]
    spec = EpisodeSampler(pool, n_way=2, k_shot=1, n_query=1, n_out_of_scope=2)[0]
    episode = EpisodeReader(pool, ImageEncoder(16))(replace(spec, index=5))
    assert episode.query.labels.tolist() == [0, 1, -1, -1]
    assert episode.query.inputs["pixel_values"].shape == (4, 1, 16, 16)
